"""Masks become lengths: the present steps of each row are moved to the front, and their outputs back again.

So a masked step holds the state, and no layer ever sees anything but right-padded rows. The server does the same
before it runs the graph, so training, export and service mean the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layers.base import valid_steps


@dataclass(frozen=True, slots=True)
class Packing:
    """How the steps of a batch are moved. No lengths: all steps are there. No order: nothing has to move."""

    lengths: Tensor | None = None  # (B,) int64
    order: Tensor | None = None  # (B, T) int64: place t takes its step from order[t]

    @classmethod
    def of(cls, mask: Tensor | None) -> "Packing":
        """The packing of a mask (B, T), True where a step is present."""
        if mask is None or bool(mask.all()):
            return cls()
        lengths = mask.sum(dim=1)
        if torch.equal(mask, valid_steps(lengths, mask.shape[1])):
            return cls(lengths)
        return cls(lengths, torch.argsort(~mask, dim=1, stable=True))

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) with the present steps in front."""
        return x if self.order is None else x.gather(1, _expanded(self.order, x))

    def unpack(self, y: Tensor) -> Tensor:
        """(B, T, ...) with the steps back in their places and 0 at absent ones."""
        if self.lengths is None:
            return y
        valid = valid_steps(self.lengths, y.shape[1])
        y = torch.where(valid.view(*valid.shape, *[1] * (y.ndim - 2)), y, 0.0)
        return y if self.order is None else torch.zeros_like(y).scatter(1, _expanded(self.order, y), y)


def _expanded(order: Tensor, x: Tensor) -> Tensor:
    return order.view(*order.shape, *[1] * (x.ndim - 2)).expand(x.shape)
