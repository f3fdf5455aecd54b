"""A step on a stream, described once: `send` and `step` of both streams are made of it."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, overload

import numpy as np
import numpy.typing as npt

from . import codec
from .codec import Answer, Layout, O_co, StepInputs
from .features import FeatureNames, Floats, Rows
from .inputs import Array, Columns, F, Form, NamedColumns, NamedRow, Records, Row, form
from .signatures import described

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AskedStep(Generic[O_co]):
    """A step as a caller asks for it."""

    form: Form[Any]
    mask: npt.ArrayLike | None
    layout: Layout
    rows: Rows
    session: str | None

    def prepare(self, names: FeatureNames | None) -> StepInputs:
        """Its fields."""
        return codec.step_inputs(self.form, names, self.mask, self.layout, self.rows)


class StreamStepOptions(TypedDict, total=False):
    """What a step may say besides its inputs."""

    mask: npt.ArrayLike | None
    layout: Layout
    rows: Rows
    session: str | None


# A text is also what numpy takes for an array of no axes; a row comes first.
@overload
def asked_step(inputs: Row, **options: Unpack[StreamStepOptions]) -> AskedStep[NamedRow]:  # type: ignore[overload-overlap]
    ...
@overload
def asked_step(inputs: Columns, **options: Unpack[StreamStepOptions]) -> AskedStep[NamedColumns]: ...
@overload
def asked_step(inputs: Records, **options: Unpack[StreamStepOptions]) -> AskedStep[list[NamedRow]]: ...
@overload
def asked_step(inputs: F, **options: Unpack[StreamStepOptions]) -> AskedStep[F]: ...
@overload
def asked_step(inputs: Array, **options: Unpack[StreamStepOptions]) -> AskedStep[Floats]: ...
def asked_step(
    inputs: Any,
    mask: npt.ArrayLike | None = None,
    *,
    layout: Layout = "NWC",
    rows: Rows = "examples",
    session: str | None = None,
) -> AskedStep[Any]:
    """Advance a session; applied exactly once, in the order of calls.

    Args:
        inputs: As `Session.step` takes them, and the outputs come in the same form.
        mask: 0 where a step is absent.
        layout: NCW: [N,F,T] in and [N,O,T] out.
        rows: What the rows of inputs of rank 2 are: examples, or the steps of one example.
        session: Which session, on a stream for any of them.

    `send` puts the step on its way and gives a future, `step` waits for the answer.
    """
    return AskedStep(form(_own(inputs)), mask, layout, rows, session)


def _own(inputs: Any) -> Any:
    """Inputs that stay as they are when the caller fills the same array or dict again before they are sent."""
    if isinstance(inputs, np.ndarray):
        return inputs.copy()
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


class AsyncSender(Protocol):
    """A stream on asyncio."""

    def put(self, asked: AskedStep[T]) -> "asyncio.Future[Answer[T]]": ...


class Sender(Protocol):
    """A stream for synchronous code."""

    def put(self, asked: AskedStep[T]) -> "Future[Answer[T]]": ...


def awaited_send(
    ask: Callable[P, AskedStep[T]],
) -> Callable[Concatenate[AsyncSender, P], "asyncio.Future[Answer[T]]"]:
    """A method that puts a step on its way and gives its future."""

    def send(self: AsyncSender, /, *args: P.args, **kwargs: P.kwargs) -> "asyncio.Future[Answer[T]]":
        return self.put(ask(*args, **kwargs))

    return described(send, ask, "asyncio.Future[Answer]", "send")


def awaited_step(
    ask: Callable[P, AskedStep[T]],
) -> Callable[Concatenate[AsyncSender, P], Coroutine[Any, Any, Answer[T]]]:
    """A coroutine method that steps."""

    async def step(self: AsyncSender, /, *args: P.args, **kwargs: P.kwargs) -> Answer[T]:
        return await self.put(ask(*args, **kwargs))

    return described(step, ask, Answer, "step")


def waiting_send(ask: Callable[P, AskedStep[T]]) -> Callable[Concatenate[Sender, P], "Future[Answer[T]]"]:
    """A method that puts a step on its way and gives its future."""

    def send(self: Sender, /, *args: P.args, **kwargs: P.kwargs) -> "Future[Answer[T]]":
        return self.put(ask(*args, **kwargs))

    return described(send, ask, "Future[Answer]", "send")


def waiting_step(ask: Callable[P, AskedStep[T]]) -> Callable[Concatenate[Sender, P], Answer[T]]:
    """A method that steps and waits."""

    def step(self: Sender, /, *args: P.args, **kwargs: P.kwargs) -> Answer[T]:
        return self.put(ask(*args, **kwargs)).result()

    return described(step, ask, Answer, "step")
