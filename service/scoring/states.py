"""The sessions of a run: their states in memory, as many as fit; the rest in its scratch file."""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ..engine.arrays import Bytes
from .scratch import Reached, Saved, Scratch

Ints = npt.NDArray[np.int64]

BEFORE: Final = -(2**63)
"""The moment of a session without a row."""
_LEAST: Final = 256
_OVERHEAD: Final = 300  # bytes of a session beside its state, about


class States:
    """Sessions by key; a session's place in the arrays is its slot.

    Args:
        initial: The packed state of a session without a history.
        begun: Asks where sessions that the run has not met yet begin; those that it does not tell begin at `initial`.
        limit_bytes: Of memory; the sessions of one chunk are held whatever they take.

    Attributes:
        state: (slots, row_bytes); step, moment: (slots,) of each session's last row.
    """

    def __init__(
        self, scratch: Scratch, initial: bytes, begun: Callable[[Sequence[str]], list[Saved]], limit_bytes: int
    ) -> None:
        self._scratch, self._begun = scratch, begun
        self._initial = np.frombuffer(initial, np.uint8)
        self._most = max(_LEAST, limit_bytes // (len(initial) + _OVERHEAD))
        self._resting = scratch.reached().rows > 0  # sessions may rest in the scratch file
        self._clear()

    def _clear(self) -> None:
        self._slots: dict[str, int] = {}
        self._replaces: list[bytes] = []
        self._changed = np.zeros(_LEAST, np.bool_)
        self.state: Bytes = np.zeros((_LEAST, len(self._initial)), np.uint8)
        self.step: Ints = np.zeros(_LEAST, np.int64)
        self.moment: Ints = np.full(_LEAST, BEFORE, np.int64)

    def ready(self, keys: Sequence[str], reached: Reached) -> Ints:
        """The slots of sessions, which are in memory from now on; `reached` is how far the run is."""
        slots = self._slots
        fresh = [key for key in keys if key not in slots]
        if fresh:
            if len(slots) + len(fresh) > self._most and slots:
                self.checkpoint(reached)
                self._clear()
                return self.ready(keys, reached)
            self._enter(fresh)
        return np.array([self._slots[key] for key in keys], np.int64)

    def _enter(self, keys: Sequence[str]) -> None:
        first, end = len(self._slots), len(self._slots) + len(keys)
        if end > len(self.step):
            self._grow(end)
        self._slots.update(zip(keys, range(first, end), strict=True))
        self._replaces += [b""] * len(keys)
        self.state[first:end], self.step[first:end], self.moment[first:end] = self._initial, 0, BEFORE
        self._changed[first:end] = False
        found = list(self._scratch.load(keys)) if self._resting else []
        known = {saved.key for saved in found}
        for saved in [*found, *self._begun([key for key in keys if key not in known])]:
            slot = self._slots[saved.key]
            self.state[slot] = np.frombuffer(saved.state, np.uint8)
            self.step[slot], self.moment[slot], self._replaces[slot] = saved.step, saved.moment, saved.replaces

    def _grow(self, count: int) -> None:
        more = max(count, 2 * len(self.step)) - len(self.step)
        self.state = np.concatenate([self.state, np.zeros((more, self.state.shape[1]), np.uint8)])
        self.step = np.concatenate([self.step, np.zeros(more, np.int64)])
        self.moment = np.concatenate([self.moment, np.full(more, BEFORE, np.int64)])
        self._changed = np.concatenate([self._changed, np.zeros(more, np.bool_)])

    def changed(self, slots: Ints) -> None:
        """These have changed since the last checkpoint."""
        self._changed[slots] = True

    def checkpoint(self, reached: Reached) -> None:
        """Save what has changed, and how far the run is; everything up to there has been written."""
        keys = list(self._slots)
        slots = np.flatnonzero(self._changed).tolist()
        self._scratch.save(reached, (self._saved(keys[slot], slot) for slot in slots))
        self._changed[:] = False
        self._resting = True

    def _saved(self, key: str, slot: int) -> Saved:
        step, moment = int(self.step[slot]), int(self.moment[slot])
        return Saved(key, step, moment, self._replaces[slot], self.state[slot].tobytes())
