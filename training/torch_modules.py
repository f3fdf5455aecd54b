"""Torch modules that carry a state, in one shape: rows and steps in, rows and steps out, every state tensor by name.

`stepcast.export` takes modules as they are written: torch's own recurrent layers and cells, and any module whose
forward takes `(x, state)` and gives `(y, next state)`. A state is a tensor, or tensors in tuples, lists and dicts.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepcast.errors import ManifestError

TRIED_ROWS = 3


class Slot(NamedTuple):
    """A state tensor: its address, its shape for one row, and the value of all its elements at a session's begin."""

    layer: str
    key: str
    shape: tuple[int, ...]
    initial: float

    @property
    def name(self) -> str:
        """As the graph has it."""
        return f"{self.layer}.{self.key}"


class Stepped(nn.Module):
    """A module that takes x (B, T, F), or (B, F) where it takes one step, and its state tensors (B, *shape) one by one.

    It gives y (B, T, O) or (B, O), and the next state tensors in the same order.
    """

    slots: Sequence[Slot]
    has_time: bool

    def initial(self, rows: int) -> list[Tensor]:
        """The states of sessions that begin."""
        return [torch.full((rows, *slot.shape), slot.initial) for slot in self.slots]


class _Layers(Stepped):
    """nn.LSTM, nn.GRU or nn.RNN; each of its layers has a state of its own."""

    has_time = True

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        kind = type(module).__name__.lower()
        if module.bidirectional:
            raise ManifestError(f"nn.{type(module).__name__} is bidirectional: its answers need what has not come yet")
        if module.proj_size:
            raise ManifestError(
                f"nn.{type(module).__name__} has proj_size {module.proj_size}, which ONNX does not know"
            )
        self.module = module
        self._keys = "hc" if isinstance(module, nn.LSTM) else "h"
        numbers = range(module.num_layers)
        self.slots = [Slot(f"{kind}_{n}", key, (module.hidden_size,), 0.0) for n in numbers for key in self._keys]

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        count = len(self._keys)
        given = [torch.stack(states[at::count]) for at in range(count)]  # (layers, B, H) each
        x = x if self.module.batch_first else x.transpose(0, 1)
        y, after = self.module(x, tuple(given) if count > 1 else given[0])
        y = y if self.module.batch_first else y.transpose(0, 1)
        whole = after if count > 1 else (after,)
        return y, *(part for layer in zip(*(each.unbind(0) for each in whole), strict=True) for part in layer)


class _Cell(Stepped):
    """nn.LSTMCell, nn.GRUCell or nn.RNNCell."""

    has_time = False

    def __init__(self, module: nn.RNNCellBase) -> None:
        super().__init__()
        kind, keys = (
            type(module).__name__.removesuffix("Cell").lower(),
            "hc" if isinstance(module, nn.LSTMCell) else "h",
        )
        self.module = module
        self.slots = [Slot(f"{kind}_0", key, (module.hidden_size,), 0.0) for key in keys]

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        after = self.module(x, states if len(states) > 1 else states[0])
        return (after[0], *after) if isinstance(after, tuple) else (after, after)


class _Module(Stepped):
    """A module of (x, state); `axes` are where it has the batch: of x, and of each state tensor."""

    def __init__(self, module: nn.Module, state: Any, x: Tensor, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.module, self._state, self._axes, self.has_time = module, state, axes, x.ndim == 3
        self.slots = [
            Slot(layer, key, (*tensor.shape[:axis], *tensor.shape[axis + 1 :]), _value(f"{layer}.{key}", tensor))
            for (layer, key, tensor), axis in zip(named(state), axes[1:], strict=True)
        ]

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        at = self._axes[0]
        given = [tensor.movedim(0, axis) for tensor, axis in zip(states, self._axes[1:], strict=True)]
        made = self.module(x.movedim(0, at), filled(self._state, iter(given)))
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], Tensor):
            raise ManifestError(f"the module gives {_told(made)}, want a pair: outputs, next state")
        y, after = made
        found = {f"{layer}.{key}": tensor for layer, key, tensor in named(after)}
        if list(found) != [slot.name for slot in self.slots]:
            have = [slot.name for slot in self.slots]
            raise ManifestError(
                f"the module takes the state tensors {have} and gives {list(found)}. Give the same ones."
            )
        moved = [tensor.movedim(axis, 0) for tensor, axis in zip(found.values(), self._axes[1:], strict=True)]
        for slot, tensor in zip(self.slots, moved, strict=True):
            if tuple(tensor.shape[1:]) != slot.shape:
                raise ManifestError(
                    f"state {slot.name} goes in as {list(slot.shape)}, comes out as {list(tensor.shape[1:])}"
                )
        return (y.movedim(at, 0) if y.ndim == x.ndim else y), *moved


def stepped(module: nn.Module, example: Any, states: Any) -> tuple[Stepped, Tensor]:
    """A copy of a module on the CPU in that shape, and the example's readings (B, T, F) or (B, F).

    Args:
        module: nn.LSTM, nn.GRU, nn.RNN, a cell of these, or a module of (x, state).
        example: x as the module takes it, with a batch.
        states: The state of a session that begins, as the module takes it; not for torch's own layers.

    Raises:
        ManifestError: the module is none of these, or its rows depend on each other.
    """
    module = copy.deepcopy(module).to("cpu").eval()
    kinds = {str(tensor.dtype) for tensor in module.parameters() if tensor.is_floating_point()} - {"torch.float32"}
    if kinds:
        raise ManifestError(
            f"the module's weights are {', '.join(sorted(kinds))}, want torch.float32. Call .float() first."
        )
    x = torch.as_tensor(example).detach().to("cpu")
    x = x.float() if x.is_floating_point() else x
    own = isinstance(module, nn.LSTM | nn.GRU | nn.RNN | nn.LSTMCell | nn.GRUCell | nn.RNNCell)
    ranks = (3,) if isinstance(module, nn.RNNBase) else (2,) if own else (2, 3)
    if x.ndim not in ranks:
        raise ManifestError(f"example is {list(x.shape)}, want rank {' or '.join(map(str, ranks))}, the batch included")
    if own and states is not None:
        raise ManifestError(f"states of {type(module).__name__} are known. Leave them out.")
    if isinstance(module, nn.RNNBase):
        return _Layers(module), x if module.batch_first else x.transpose(0, 1)
    if isinstance(module, nn.RNNCellBase):
        return _Cell(module), x
    if states is None:
        name = type(module).__name__
        raise ManifestError(
            f"states of {name} are not known. Give the state of a session that begins; a module without one is "
            "exported by torch.onnx and taken in by `stepcast import`, which lifts hidden states."
        )
    return _read(module, x, states)


def _read(module: nn.Module, x: Tensor, states: Any) -> tuple[Stepped, Tensor]:
    """The reading of batch axes in which rows do not depend on each other."""
    tensors, why = [tensor for _, _, tensor in named(states)], ""
    for batch in range(x.ndim - 1):
        rows = x.shape[batch]
        axes = [[axis for axis, size in enumerate(tensor.shape) if size == rows] for tensor in tensors]
        for each in itertools.product(*axes):
            made = _Module(module, states, x, (batch, *each))
            try:
                if rows_alone(made, x.movedim(batch, 0)):
                    return made, x.movedim(batch, 0)
                why = why or "a row's answer depends on the rows beside it"
            except ManifestError:
                raise
            except Exception as error:  # whatever a module of the user's raises
                why = (
                    why or f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                )
    sizes = [list(tensor.shape) for tensor in tensors]
    raise ManifestError(
        f"the module cannot be run by rows, x {list(x.shape)}, states {sizes}: {why or 'no axis in common'}"
    )


@torch.no_grad()
def rows_alone(made: Stepped, x: Tensor) -> bool:
    """Whether rows together are rows alone, in outputs and states."""
    pick = torch.arange(TRIED_ROWS) % len(x)
    x = jittered(x[pick])
    before = [torch.randn(TRIED_ROWS, *slot.shape) / 4 for slot in made.slots]
    together = made(x, *before)
    for row in range(TRIED_ROWS):
        cut = slice(row, row + 1)
        alone = made(x[cut], *(tensor[cut] for tensor in before))
        for one, all_ in zip(alone, together, strict=True):
            if all_[cut].shape != one.shape or not torch.allclose(all_[cut], one, 1e-4, 1e-5):
                return False
    return True


def jittered(x: Tensor) -> Tensor:
    """Readings that differ a little from those of the example; tokens stay tokens."""
    return x + torch.randn(x.shape) / 8 if x.is_floating_point() else x


# --- states -----------------------------------------------------------------------------------------------------------


def named(state: Any, path: tuple[str, ...] = ()) -> list[tuple[str, str, Tensor]]:
    """The tensors of a state with their layer and key: the names of dicts, the numbers of tuples and lists."""
    if isinstance(state, Tensor):
        *layer, key = path or ("state",)
        return [(".".join(layer) or "state", key, state)]
    parts: list[tuple[Any, Any]]
    if isinstance(state, dict):
        parts = list(state.items())
    elif isinstance(state, tuple | list):
        parts = list(enumerate(state))
    else:
        raise ManifestError(f"a state is a tensor, or tensors in tuples, lists and dicts; got {_told(state)}")
    return [found for name, part in parts for found in named(part, (*path, str(name)))]


def filled(state: Any, tensors: Iterator[Tensor]) -> Any:
    """A state of the same form with these tensors."""
    if isinstance(state, Tensor):
        return next(tensors)
    if isinstance(state, dict):
        return {name: filled(part, tensors) for name, part in state.items()}
    parts = [filled(part, tensors) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def _value(name: str, tensor: Tensor) -> float:
    """The one value of all elements."""
    if tensor.dtype != torch.float32:
        raise ManifestError(f"state {name} is {tensor.dtype}, want torch.float32")
    first = float(tensor.flatten()[0]) if tensor.numel() else 0.0
    if bool((tensor != first).any()):
        raise ManifestError(
            f"state {name} has different values. Give the state of a session that begins: one value, as 0."
        )
    return first


def _told(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list | dict) else "")
