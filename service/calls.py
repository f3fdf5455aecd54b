"""The nouns of stepping: which session, a call on its way, a hot session; and masks as compaction."""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from .batcher import Job
from .record import Record
from .repository import Served

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Future: TypeAlias = "asyncio.Future[Any]"

_ENTRY_BYTES: Final = 1200
"""What a hot session costs beside its state and answers, about."""


@dataclass(frozen=True, slots=True)
class Address:
    """Which session: tenant, model, id."""

    namespace: str
    model: str
    session: str

    @property
    def key(self) -> str:
        """The store's key."""
        return f"{self.namespace}/{self.model}/{self.session}"


@dataclass(frozen=True, slots=True)
class StepAnswer:
    """The answer to a step call: outputs (N, T, O) float32, NaN where masked, and the number of its last step."""

    outputs: Floats
    step: int
    version: int


class Call(Job):
    """Rows on their way through a model: a job of the batcher that knows its mask and who waits for it."""

    __slots__ = ("calls", "future", "mask")

    def __init__(self, x: Floats, mask: Mask | None, state: bytes, deadline: float, future: "Future") -> None:
        self.calls = x.shape[1]
        self.mask = mask
        self.future = future
        lengths = None
        if mask is not None:
            x, lengths = compact(x, mask)
        super().__init__(x, lengths, state, deadline)

    def abandoned(self) -> bool:
        return self.future.done()

    def reply(self) -> Floats:
        """Outputs (N, calls, O), NaN where the mask was 0."""
        assert self.outputs is not None
        return self.outputs if self.mask is None else scatter(self.outputs, self.mask)


class Step(Call):
    """A step call: it has its turn in its session."""

    __slots__ = ("answer", "digest", "entry", "next", "seq", "verified")

    def __init__(
        self,
        entry: "Entry",
        x: Floats,
        mask: Mask | None,
        digest: bytes,
        seq: int | None,
        deadline: float,
        future: "Future",
    ) -> None:
        super().__init__(x, mask, b"", deadline, future)
        self.entry, self.digest, self.seq = entry, digest, seq
        self.verified = False
        self.next: Record | None = None
        self.answer: Floats | None = None

    def start(self, state: bytes) -> None:
        """Make ready for a (further) run from `state`."""
        self.state, self.at, self.parts, self.outputs, self.error = state, 0, [], None, None


class Entry:
    """A hot session: its record as last seen, and the calls that wait for their turn."""

    __slots__ = ("address", "busy", "key", "queue", "record", "served", "size", "stored")

    def __init__(self, address: Address) -> None:
        self.address, self.key = address, address.key
        self.record: Record | None = None
        self.stored = False
        self.served: Served | None = None
        self.queue: deque[Step] = deque()
        self.busy = False
        self.size = 0

    def bytes_now(self) -> int:
        """About how much memory the entry takes."""
        record = self.record
        if record is None:
            return _ENTRY_BYTES
        return _ENTRY_BYTES + len(record.state) + len(record.inputs) + sum(map(len, record.answers))


def compact(x: Floats, mask: Mask) -> tuple[Floats, npt.NDArray[np.int32]]:
    """Gather each row's present steps to the front, as training does.

    Args:
        x: (N, T, F); mask: (N, T), True where present.

    Returns:
        x (N, T', F), T' the most present steps of a row (at least 1), and lengths (N,).
    """
    lengths = mask.sum(axis=1, dtype=np.int32)
    order = np.argsort(~mask, axis=1, kind="stable")
    front = np.take_along_axis(x, order[:, :, None], axis=1)[:, : max(1, int(lengths.max(initial=0)))]
    return np.ascontiguousarray(front), lengths


def scatter(y: Floats, mask: Mask) -> Floats:
    """The inverse of compact for outputs (N, T', O): (N, T, O), NaN where the mask is False."""
    out = np.full((*mask.shape, y.shape[2]), np.nan, np.float32)
    valid = np.arange(y.shape[1]) < mask.sum(axis=1)[:, None]
    out[mask] = y[valid]
    return out
