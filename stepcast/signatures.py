"""Methods that are made of descriptions of calls show the description's parameters, and their own result."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

M = TypeVar("M", bound=Callable[..., Any])


def described(method: M, ask: Callable[..., Any], result: Any, name: str | None = None) -> M:
    """Give a method the name, documentation and parameters of what it asks; help() and documentation show them.

    Args:
        method: Takes what `ask` takes, after `self`.
        ask: The description; a function, or a method with a `self` of its own.
        result: What the method returns or, if it is a coroutine function, what its result is.
        name: The method's name; by default that of `ask`.
    """
    asked = inspect.signature(ask)
    own = [parameter for parameter in asked.parameters.values() if parameter.name != "self"]
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__name__ = name or ask.__name__
    method.__doc__ = ask.__doc__
    method.__annotations__ = {**ask.__annotations__, "return": result}
    method.__signature__ = asked.replace(  # type: ignore[attr-defined]
        parameters=[self, *own], return_annotation=result
    )
    return method
