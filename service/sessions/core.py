"""The nouns of stepping: which session, who waits, a session kept ready, a call that waits for its turn."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..engine.batcher import Batcher
from ..engine.repository import Served
from ..records.block import Spares
from ..records.digest import Digests
from ..records.layout import Shape, Shapes, facts

if TYPE_CHECKING:
    from .batch import Batch

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Address:
    """Which session: tenant, model, id; and the store's key."""

    namespace: str
    model: str
    session: str
    key: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.namespace}/{self.model}/{self.session}")


class Answers:
    """What sessions of one batch are answered.

    Args:
        outputs: (B, N, T, O) float32, NaN where a step was masked.
        version: Of the model.

    Attributes:
        made: Encodings of all rows that a door wants to make once.
    """

    __slots__ = ("made", "outputs", "version")

    def __init__(self, outputs: Floats, version: int) -> None:
        self.outputs, self.version = outputs, version
        self.made: dict[str, Any] = {}


class Waiter(Protocol):
    """Who asked for a step; it answers at once, without a turn of the event loop."""

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        """The session is at `step` now, or its kept answer of that step is here: row `row` of the answers."""

    def refused(self, error: BaseException) -> None:
        """The step was not made, or it is unknown whether it was."""

    def done(self) -> bool:
        """Whether nobody waits any more; a step that has not begun is dropped then."""


class Load:
    """The steps of a model that wait, of all its versions.

    Attributes:
        waiting: How many.
        limit: The most that may; 0 while the server drains.
    """

    __slots__ = ("limit", "waiting")

    def __init__(self, limit: int) -> None:
        self.waiting, self.limit = 0, limit


class Lane:
    """One served version: where its steps go.

    Attributes:
        open: The batch that steps may join now, and `until` when (monotonic).
        finish: Takes a batch that has run. drop: Refuses rows of one that are too late to be run.
        calls, rows: Step calls made, and rows times steps, that are not in the metrics yet.
        spares: For the records of rosters.
    """

    __slots__ = (
        *("batcher", "calls", "digests", "drop", "finish", "load", "open", "rows", "served", "shapes", "spares"),
        "until",
    )

    def __init__(
        self,
        served: Served,
        batcher: Batcher,
        shapes: Shapes,
        load: Load,
        digests: Digests,
        finish: "Callable[[Batch], asyncio.Future[None] | None]",
        drop: "Callable[[Batch, Sequence[int]], None]",
    ) -> None:
        self.served, self.batcher, self.shapes = served, batcher, shapes
        self.load, self.digests, self.finish, self.drop = load, digests, finish, drop
        self.open: Batch | None = None
        self.until = 0.0
        self.calls = self.rows = 0
        self.spares = Spares()


class Session:
    """A session that is kept ready: its record as last seen, and the calls that wait for their turn.

    Attributes:
        data: The record as the store has it, or a blank one of a new session; None: it has to be loaded.
        stored: Whether the store has `data`.
        lane: Of the version that made its state; None: that is not served, or `data` is None.
        shape, step: Of the record; `shape` is None where the lane is.
        tag: Of the state, where a device holds it (Runtime.run_resident): a number, or one for each row.
        busy: A call of it is on its way, or it is being loaded.
        used: Since eviction looked at it.
        roster: Who has the record instead; whoever touches the session splits the roster first.
    """

    __slots__ = (
        *("address", "busy", "data", "key", "lane", "queue", "roster", "shape", "size", "step", "stored", "tag"),
        "used",
    )

    def __init__(self, address: Address) -> None:
        self.address, self.key = address, address.key
        self.data: bytes | None = None
        self.stored = False
        self.lane: Lane | None = None
        self.shape: Shape | None = None
        self.step = 0
        self.tag: int | Ints = 0
        self.roster: Holder | None = None
        self.queue: list[Ask] = []  # short, and mostly empty: a deque would cost 600 bytes per session
        self.busy = self.used = False
        self.size = 0

    @property
    def examples(self) -> int:
        """N; 0 where it is not fixed, or not known here."""
        return 0 if self.shape is None else self.shape.examples

    def state(self) -> bytes:
        """The packed state of the N rows."""
        data, shape = self.data, self.shape
        return b"" if data is None or shape is None else data[shape.state_at : shape.log_at]

    def forget(self) -> None:
        """The record is unknown from now on: the next call loads it."""
        self.data = self.lane = self.shape = None

    def take(self, data: bytes, lane: Lane | None) -> None:
        """Keep a record of the present layout, which is of the lane's version.

        Raises:
            BadRecord: its lengths are not those of the version.
        """
        found = facts(data)
        self.shape = None if lane is None else lane.shapes.of(data, found)
        self.data, self.lane, self.step, self.tag = data, lane, found.step, 0


class Holder(Protocol):
    """What holds the records of several sessions (a roster)."""

    def note_use(self) -> bool:
        """Pass on to the sessions that they were used; whether they were, since the last time."""

    def split(self) -> None:
        """Give every session its own record."""


class Ask:
    """A step call that waits for its turn.

    Args:
        x: (N, T, F) float32, finite or NaN, checked against the model.
        mask: (N, T) bool, False: this example's state stays as it is at this step; None: all True.
        seq: The number that the last step of the call shall have; None: the next.
        deadline: Monotonic time after which it is not begun any more.
        policy: What to do if the session's version is not served: pin, reset, replay; None: the server's.

    Attributes:
        verified: The session's record was loaded after the call came, so the call may be refused on it.
    """

    __slots__ = ("deadline", "mask", "policy", "seq", "verified", "waiter", "x")

    def __init__(
        self, x: Floats, mask: Mask | None, seq: int | None, deadline: float, waiter: Waiter, policy: str | None = None
    ) -> None:
        self.x, self.mask, self.seq, self.deadline, self.waiter, self.policy = x, mask, seq, deadline, waiter, policy
        self.verified = False

    @property
    def steps(self) -> int:
        """T."""
        return int(self.x.shape[1])

    @property
    def single(self) -> bool:
        """Whether it is a single step of all examples: it goes with others in a batch."""
        return self.x.shape[1] == 1 and self.mask is None
