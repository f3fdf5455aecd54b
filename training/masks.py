"""Masks become lengths: the present steps of each row are moved to the front, and their outputs back again.

So a masked step holds the state, and no layer ever sees anything but right-padded rows. The server does the same
before it runs the graph, so training, export and service mean the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .layers.base import State

MaskedSteps = Literal["hold", "zero"]


def valid_steps(lengths: Tensor, n_steps: int) -> Tensor:
    """Which steps are no padding, bool (B, T)."""
    return torch.arange(n_steps, device=lengths.device) < lengths[:, None]


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

    def enter(self, state: State) -> State:
        """The state of the packed rows."""
        return state

    def leave(self, after: State, before: State) -> State:
        """The state of the batch's rows, from that of the packed rows."""
        return after

    def unpack(self, y: Tensor) -> Tensor:
        """(B, T, ...) with the steps back in their places and 0 at absent ones."""
        if self.lengths is None:
            return y
        valid = valid_steps(self.lengths, y.shape[1])
        y = torch.where(valid.view(*valid.shape, *[1] * (y.ndim - 2)), y, 0.0)
        return y if self.order is None else torch.zeros_like(y).scatter(1, _expanded(self.order, y), y)


def _expanded(order: Tensor, x: Tensor) -> Tensor:
    return order.view(*order.shape, *[1] * (x.ndim - 2)).expand(x.shape)


@dataclass(frozen=True, slots=True)
class Runs:
    """DL4J's rule: an absent step sets the state to zero. Each run of present steps becomes a row of its own.

    R runs; the first of a row goes on from the row's state if it begins at the first step, all others from zero.
    """

    lengths: Tensor  # (R,)
    row: Tensor  # (R,), the batch's row
    start: Tensor  # (R,), the step where it begins
    mask: Tensor  # (B, T)

    @classmethod
    def of(cls, mask: Tensor) -> "Runs":
        """The runs of a mask (B, T)."""
        edge = torch.zeros_like(mask[:, :1])
        before, behind = torch.cat([edge, mask[:, :-1]], dim=1), torch.cat([mask[:, 1:], edge], dim=1)
        row, start = (mask & ~before).nonzero(as_tuple=True)
        _, stop = (mask & ~behind).nonzero(as_tuple=True)
        return cls(stop + 1 - start, row, start, mask)

    def _steps(self) -> Tensor:
        """(R, longest): the step each place of a run stands for; beyond the run's end any step."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        steps = self.start[:, None] + torch.arange(longest, device=self.mask.device)
        return steps.clamp(max=self.mask.shape[1] - 1)

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) to (R, longest, ...)."""
        return x[self.row[:, None], self._steps()]

    def unpack(self, y: Tensor) -> Tensor:
        """(R, longest, ...) to (B, T, ...) with 0 at absent steps."""
        valid = valid_steps(self.lengths, y.shape[1])
        out = y.new_zeros(*self.mask.shape, *y.shape[2:])
        rows = self.row[:, None].expand_as(valid)
        return out.index_put((rows[valid], self._steps()[valid]), y[valid])

    def enter(self, state: State) -> State:
        """The state each run starts from."""
        begins = self.start == 0
        return _each(state, lambda t: torch.where(_column(begins, t), t[self.row], 0.0))

    def leave(self, after: State, before: State) -> State:
        """The state behind the last step: that of a run which reaches it, else zero."""
        reaches = self.start + self.lengths == self.mask.shape[1]
        rows = self.row[reaches]
        return {
            name: {k: torch.zeros_like(before[name][k]).index_put((rows,), t[reaches]) for k, t in layer.items()}
            for name, layer in after.items()
        }


class Moves(Protocol):
    """What `Packing` and `Runs` have in common."""

    @property
    def lengths(self) -> Tensor | None: ...
    def pack(self, x: Tensor) -> Tensor: ...
    def unpack(self, y: Tensor) -> Tensor: ...
    def enter(self, state: State) -> State: ...
    def leave(self, after: State, before: State) -> State: ...


def moves_of(mask: Tensor | None, masked_steps: MaskedSteps) -> Moves:
    """How the steps of a batch are moved under either rule."""
    if masked_steps == "zero" and mask is not None and not bool(mask.all()) and bool(mask.any()):
        return Runs.of(mask)
    return Packing.of(mask)


def _each(state: State, change: Callable[[Tensor], Tensor]) -> State:
    return {name: {key: change(t) for key, t in layer.items()} for name, layer in state.items()}


def _column(flags: Tensor, like: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (like.ndim - 1))
