"""onnx, loaded when a graph is first taken apart: importing the service does not load it."""

from collections.abc import Iterable, Sequence
from typing import Any


def __getattr__(name: str) -> Any:
    """What onnx has under this name."""
    import onnx

    return getattr(onnx, name)


def opset(model: Any) -> int:
    """The version of ONNX's own operators that a model is written for."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def inlined(model: Any) -> Any:
    """A model without functions of its own: each call is the function's nodes."""
    from onnx import inliner

    return inliner.inline_local_functions(model)


def replace(field: Any, values: Iterable[Any]) -> None:
    """Let a repeated field hold these values."""
    kept = list(values)
    del field[:]
    field.extend(kept)


def needed(nodes: Sequence[Any], names: Iterable[str]) -> set[str]:
    """These tensors, and all that they are computed from."""
    found = set(names)
    for node in reversed(nodes):  # each stands behind those whose outputs it reads
        if found.intersection(node.output):
            found.update(node.input)
    return found
