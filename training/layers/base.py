"""What every layer kind is: a torch module that carries its state in the open and can write itself in ONNX."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..graph import Graph

LayerState = dict[str, Tensor]  # by key: each (B, *shape)
State = dict[str, LayerState]  # by layer name


class Layer(nn.Module):
    """One layer of a stack.

    A layer sees right-padded sequences only: masks were turned into lengths before (see network.py). It never looks
    at padded steps, what it puts out there is any finite number, and a row of length 0 returns its state unchanged.

    Attributes:
        name: How the state is addressed.
        streaming: False if an output depends on later steps.
    """

    streaming = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes per row of the state tensors, by key. All of them start at zero."""
        return {}

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        """Run over the sequences.

        Args:
            x: (B, T, F), or frames (B, T, C, H, W).
            lengths: (B,) int64, valid steps per row; None: all T of them.
            state: One tensor for each of `state_shapes`.

        Returns:
            The outputs with the same B and T, and the state after each row's last valid step.
        """
        raise NotImplementedError

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """Add this layer to a graph: what `forward` does, with names of tensors in place of tensors."""
        raise NotImplementedError


def keep(lengths: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` for rows that have steps, `old` for rows of length 0."""
    if lengths is None:
        return new
    moved = (lengths > 0).view(-1, *[1] * (new.ndim - 1))
    return torch.where(moved, new, old)
