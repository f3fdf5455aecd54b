"""The nouns of stepping: which session, a call on its way, a hot session; and masks as compaction."""

import struct
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..engine.batcher import Batcher, Job
from ..engine.repository import Served
from ..records import block as sheet
from ..records import record as records
from ..records.record import Record

if TYPE_CHECKING:
    from .columns import Track
    from .roster import Cohort

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

    __slots__ = ("answer", "digest", "entry", "next", "policy", "seq", "verified")

    def __init__(
        self,
        entry: "Entry",
        x: Floats,
        mask: Mask | None,
        digest: bytes,
        seq: int | None,
        deadline: float,
        future: "Future",
        policy: str | None = None,
    ) -> None:
        super().__init__(x, mask, b"", deadline, future)
        self.entry, self.digest, self.seq, self.policy = entry, digest, seq, policy
        self.verified = False
        self.next: Record | None = None
        self.answer: Floats | None = None

    def start(self, state: bytes) -> None:
        """Make ready for a (further) run from `state`."""
        self.state, self.at, self.parts, self.outputs, self.error = state, 0, [], None, None


class SingleStep(Step):
    """A step of one example by one step without a mask; it joins others in a column where its session can.

    Args:
        data: The inputs, float32.
        alone: Do not join: the column that it was in failed.
    """

    __slots__ = ("alone", "data")

    def __init__(
        self, entry: "Entry", data: bytes, seq: int | None, deadline: float, future: Future, alone: bool = False
    ) -> None:
        self.entry, self.data, self.seq, self.deadline, self.future = entry, data, seq, deadline, future
        self.alone, self.verified = alone, False
        self.rows = self.steps = self.calls = 1
        self.features, self.at, self.state = len(data) // 4, 0, b""
        self.parts = []
        self.mask = self.lengths = self.outputs = self.error = self.next = self.answer = self.policy = None

    @property
    def x(self) -> Floats:  # type: ignore[override]
        """The inputs (1, 1, F)."""
        return np.frombuffer(self.data, np.float32).reshape(1, 1, -1)

    @property
    def digest(self) -> bytes:  # type: ignore[override]
        """Of the inputs; few need it, since a column digests its rows together."""
        return sheet.digest(self.data)


class Entry:
    """A hot session: its record as last seen, and the calls that wait for their turn.

    Attributes:
        data: The record as the store has it; None: not loaded, or there is none (see `stored`).
        track: Where its single steps go; None: `data` is not known to be of the plainest kind (records/block.py).
        step, ttl_s: Of the record, where there is a track.
        cohort: Who has the record instead; whoever touches the session dissolves it first (service/sessions/roster.py).
        tag: Of the state, where a device holds it (Runtime.run_resident).
        used: Since eviction looked at it.
    """

    __slots__ = (
        *("decoded", "address", "batcher", "busy", "data", "key", "queue", "served", "size", "step", "stored"),
        *("cohort", "tag", "track", "ttl_s", "used"),
    )

    def __init__(self, address: Address) -> None:
        self.address, self.key = address, address.key
        self.decoded: Record | None = None
        self.data: bytes | None = None
        self.stored = False
        self.served: Served | None = None
        self.batcher: Batcher[Job] | None = None  # of `served`
        self.track: Track | None = None
        self.step = self.tag = 0
        self.ttl_s: float | None = None
        self.cohort: Cohort | None = None
        self.queue: list[Step] = []  # short, and mostly empty: a deque would cost 600 bytes per hot session
        self.busy = self.used = False
        self.size = 0

    @property
    def known(self) -> bool:
        """Whether the session's record, or that there is none, is known."""
        return self.data is not None or self.decoded is not None

    @property
    def record(self) -> Record | None:
        """The record; None: not known. BadRecord where the bytes are not one."""
        if self.decoded is None and self.data is not None:
            self.decoded = records.decode(self.data)
        return self.decoded

    def keep(self, data: bytes | None, record: Record | None = None) -> None:
        """Take a record: the store's bytes, or (`data` None) one that is not stored so; both None: nothing is known."""
        self.data, self.decoded, self.track, self.tag = data, record, None, 0


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


def digest(x: Floats, mask: Mask | None) -> bytes:
    """DIGEST_BYTES that name a payload: sheet.digest of a single step, else BLAKE2b over shape, values and mask."""
    if x.shape[:2] == (1, 1) and mask is None:
        return sheet.digest(x.tobytes())
    data = x.tobytes() if mask is None else x.tobytes() + mask.tobytes()
    data += struct.pack("<QQ", *x.shape[:2])
    return blake2b(data, digest_size=records.DIGEST_BYTES).digest()
