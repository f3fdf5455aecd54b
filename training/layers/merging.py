"""How several inputs become one: in torch, in ONNX, and what it needs of their shapes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from ..graph import Graph
from .spec import IllegalStack, Merge, Shape

_PAIRWISE: dict[Merge, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "add": (torch.add, "Add"),
    "average": (torch.add, "Add"),
    "subtract": (torch.sub, "Sub"),
    "mul": (torch.mul, "Mul"),
    "max": (torch.maximum, "Max"),
    "min": (torch.minimum, "Min"),
}


def merge(how: Merge, values: Sequence[Tensor]) -> Tensor:
    """One tensor of several (..., F); a single one is itself."""
    if len(values) == 1:
        return values[0]
    if how == "concat":
        return torch.cat(list(values), dim=-1)
    y = reduce(_PAIRWISE[how][0], values)
    return y / len(values) if how == "average" else y


def write_merge(graph: Graph, how: Merge, values: Sequence[str]) -> str:
    """`merge` in ONNX."""
    if len(values) == 1:
        return values[0]
    if how == "concat":
        return graph.add("Concat", *values, axis=-1)
    y = reduce(lambda a, b: graph.add(_PAIRWISE[how][1], a, b), values)
    return graph.add("Div", y, graph.constant(float(len(values)))) if how == "average" else y


def merged_shape(how: Merge, inputs: Sequence[tuple[str, Shape]]) -> Shape:
    """The shape of what is merged.

    Args:
        how: Side by side, or place by place.
        inputs: Names and shapes; values, no frames, unless there is only one.

    Raises:
        IllegalStack: inputs of different sizes, too many of them, or answers per row beside values per step.
    """
    if how == "subtract" and len(inputs) != 2:
        raise IllegalStack(f"subtract takes two inputs, got {len(inputs)}")
    first = inputs[0][1]
    if len(inputs) == 1:
        return first
    ended, going = ([name for name, shape in inputs if shape.summary == is_so] for is_so in (True, False))
    if ended and going:
        raise IllegalStack(
            f"{ended[0]!r} is the answer of a many-to-one readout, {going[0]!r} still has its steps. "
            f"Put last_time_step behind {going[0]!r}, or duplicate_to_time_series behind {ended[0]!r}."
        )
    sizes = [shape.size for _, shape in inputs]
    known = [size for size in sizes if size is not None]
    if how == "concat":
        return replace(first, size=sum(known) if len(known) == len(sizes) else None)
    if len(set(known)) > 1:
        told = ", ".join(f"{name!r} has {shape.size}" for name, shape in inputs)
        raise IllegalStack(f"{how} takes inputs of one size, {told}")
    return replace(first, size=next(iter(known), None))
