"""Layers that only move steps: reversed, the last one copied to all, absent ones made zero."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..graph import Graph
from ..masks import valid_steps
from .base import Layer, LayerState


class Reverse(Layer):
    """Each row's present steps in reverse. It cannot be stepped: the first answer is made of the last step."""

    streaming = False

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        return reverse(x, lengths), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        return write_reverse(graph, x), {}


class DuplicateToTimeSeries(Layer):
    """The summary at each row's last present step, at every step. It cannot be stepped for the same reason."""

    streaming = False

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        if lengths is None:
            return x[:, -1:].expand_as(x), state
        last = (lengths - 1).clamp(min=0).view(-1, *[1] * (x.ndim - 1))
        return x.gather(1, last.expand(-1, 1, *x.shape[2:])).expand_as(x), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        behind = graph.add("Sub", graph.add("Cast", graph.lengths, to=7), graph.index(1))
        last = graph.add("Unsqueeze", graph.add("Max", behind, graph.index(0)), graph.ints(1))  # (B, 1)
        summary = graph.add("GatherND", x, last, batch_dims=1)  # (B, ...)
        return graph.add("Expand", graph.add("Unsqueeze", summary, graph.ints(1)), graph.add("Shape", x)), {}


class Mask(Layer):
    """Zeros at absent steps.

    Masks are lengths by now, and absent steps stand behind the present ones, where no layer looks: for the present
    steps, and so for every answer, this is the identity.

    Args:
        name: How the layer is called.
        axes: Of one step's values: 1, or 3 for frames.
    """

    def __init__(self, name: str, axes: int) -> None:
        super().__init__(name)
        self.axes = axes

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        if lengths is None:
            return x, state
        valid = valid_steps(lengths, x.shape[1])
        return torch.where(valid.view(*valid.shape, *[1] * self.axes), x, 0.0), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        valid = graph.add("Unsqueeze", graph.valid(), graph.ints(*range(2, 2 + self.axes)))
        return graph.add("Where", valid, x, graph.constant(0.0)), {}


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Each row's valid steps in reverse; the padding stays where it is."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)
    order = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
    return x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand(x.shape))


def write_reverse(graph: Graph, x: str) -> str:
    """`reverse` in ONNX. The operator wants lengths of at least 1; one step in reverse is that step."""
    lengths = graph.add("Max", graph.add("Cast", graph.lengths, to=7), graph.index(1))
    return graph.add("ReverseSequence", x, lengths, batch_axis=0, time_axis=1)
