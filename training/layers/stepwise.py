"""What every layer that runs from step to step has: its state by key, and how rows of different lengths end."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..graph import Graph
from ..masks import valid_steps
from .base import Layer, LayerState, keep

CellState = tuple[Tensor, ...]  # h first, each (B, H)


class Stepwise(Layer):
    """A layer of `units` values per step whose state is vectors of that size.

    Class attributes:
        KEYS: The state's keys; `h` first, which is also the layer's output.
    """

    KEYS: ClassVar[tuple[str, ...]] = ("h",)
    units: int

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return dict.fromkeys(self.KEYS, (self.units,))

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        before = tuple(state[key] for key in self.KEYS)
        y, after = self.unroll(x, lengths, before)
        if lengths is not None:
            y = torch.where(valid_steps(lengths, x.shape[1])[..., None], y, 0.0)
        kept = (keep(lengths, new, old) for new, old in zip(after, before, strict=True))
        return y, dict(zip(self.KEYS, kept, strict=True))

    def unroll(self, x: Tensor, lengths: Tensor | None, before: CellState) -> tuple[Tensor, CellState]:
        """Outputs (B, T, H) and the state behind each row's last valid step; anything at padding and in empty rows."""
        raise NotImplementedError

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        before = [state[key] for key in self.KEYS]
        y, after = self.write_unroll(graph, x, before)
        kept = [graph.keep(new, old) for new, old in zip(after, before, strict=True)]
        return y, dict(zip(self.KEYS, kept, strict=True))

    def write_unroll(self, graph: Graph, x: str, before: list[str]) -> tuple[str, list[str]]:
        """`unroll` in ONNX."""
        raise NotImplementedError


def behind_last(states: CellState, lengths: Tensor | None) -> CellState:
    """The states behind each row's last valid step, of states at every step (B, T, H)."""
    if lengths is None:
        return tuple(s[:, -1] for s in states)
    last = (lengths - 1).clamp(min=0)[:, None, None]
    return tuple(s.gather(1, last.expand(-1, 1, s.shape[2]))[:, 0] for s in states)
