"""The nouns of stepping: which session, a call on its way, a hot session; and masks as compaction."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .batcher import Batcher, Job
from .record import Record
from .repository import Served

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Future: TypeAlias = Any
"""An asyncio.Future, or what answers done, set_result and set_exception as one."""


@dataclass(frozen=True, slots=True)
class Address:
    """Which session: tenant, model, id; and the store's key."""

    namespace: str
    model: str
    session: str
    key: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.namespace}/{self.model}/{self.session}")


@dataclass(slots=True)
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
        return bool(self.future.done())

    def reply(self) -> Floats:
        """Outputs (N, calls, O), NaN where the mask was 0."""
        assert self.outputs is not None
        return self.outputs if self.mask is None else scatter(self.outputs, self.mask)


class Step(Call):
    """A step call: it has its turn in its session."""

    __slots__ = ("answer", "digest", "entry", "next", "seq", "size", "verified")

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
        self.size = 0  # bytes of the next record

    def start(self, state: bytes) -> None:
        """Make ready for a (further) run from `state`."""
        self.state, self.at, self.parts, self.outputs, self.error = state, 0, [], None, None


class SingleStep(Step):
    """A step of one example by one step without a mask, the commonest there is; its inputs stay bytes.

    Made in one go: the chain of constructors above costs as much as the rest of queueing.
    """

    __slots__ = ("data",)

    def __init__(
        self, entry: "Entry", data: bytes, digest: bytes, seq: int | None, deadline: float, future: Future
    ) -> None:
        self.entry, self.data, self.digest, self.seq = entry, data, digest, seq
        self.deadline, self.future = deadline, future
        self.rows = self.steps = self.calls = 1
        self.features = len(data) // 4
        self.at = self.size = 0
        self.mask = self.lengths = self.outputs = self.error = self.next = self.answer = None
        self.verified = False
        self.state = b""

    @property
    def x(self) -> Floats:  # type: ignore[override]
        """The inputs (1, 1, F)."""
        return np.frombuffer(self.data, np.float32).reshape(1, 1, -1)

    def raw(self) -> bytes:
        return self.data

    def reply(self) -> Floats:
        assert self.outputs is not None
        return self.outputs

    def start(self, state: bytes) -> None:
        self.state, self.at, self.outputs, self.error = state, 0, None, None


class Entry:
    """A hot session: its record as last seen, and the calls that wait for their turn."""

    __slots__ = ("address", "batcher", "busy", "key", "queue", "record", "served", "size", "stored")

    def __init__(self, address: Address) -> None:
        self.address, self.key = address, address.key
        self.record: Record | None = None
        self.stored = False
        self.served: Served | None = None
        self.batcher: Batcher[Job] | None = None  # of `served`
        self.queue: deque[Step] = deque()
        self.busy = False
        self.size = 0


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
