"""The nouns of stepping: which session, who waits, a session kept ready, the lane of a version, a batch of steps."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from stepcast.errors import StepcastError

from ..engine.batcher import Batcher, Run
from ..engine.repository import Served
from ..records.block import Block, LoneBlock, Spares, side_by_side
from ..records.digest import Digests
from ..records.layout import Advance, Shape, Shapes, facts

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

OPEN_S: Final = 0.02
"""How long steps may join a batch: its deadline is that of the first."""


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
        left: Set when some wait no longer.
    """

    __slots__ = ("left", "limit", "waiting")

    def __init__(self, limit: int) -> None:
        self.waiting, self.limit = 0, limit
        self.left = asyncio.Event()

    def leave(self, count: int) -> None:
        """That many wait no longer."""
        self.waiting -= count
        if not self.limit:
            self.left.set()


class Together(Protocol):
    """Sessions whose records lie side by side: a roster. Whoever touches one alone splits it first.

    Attributes:
        whole: It was not split.
        keys, records, advance, place: As in the Block of their next step.
        steps: Of the sessions.
    """

    whole: bool
    keys: list[str]
    records: Bytes
    advance: Advance
    place: object
    steps: list[int]

    def note_use(self) -> bool: ...
    def stepped(self, records: Bytes, place: object) -> None: ...
    def split(self) -> None: ...
    def let_go(self) -> None: ...


class Places(Protocol):
    """The answer to a batch step, as it fills (sessions/many.py)."""

    def waiter(self, place: int) -> Waiter: ...
    def answer(self, places: Sequence[int], outputs: Floats, steps: Sequence[int]) -> None: ...
    def form(self, lane: "Lane", group: "Group") -> None: ...


class Lane:
    """One served version: where its steps go.

    Args:
        deadline_s: How long a step may wait for its run.
        clock: Wall clock in ms.
        drop: Refuses rows of a batch that are too late to be run.

    Attributes:
        open: The batch that steps may join now.
        calls, rows: Step calls made, and rows times steps, that are not in the metrics yet; `commits`: seconds of each.
        spares: For the records of rosters.
    """

    __slots__ = (
        *("_clock", "_deadline_s", "_until", "batcher", "calls", "commits", "digests", "drop", "load", "open", "rows"),
        *("served", "shapes", "spares", "version"),
    )

    def __init__(
        self,
        served: Served,
        batcher: "Batcher[Batch]",
        shapes: Shapes,
        load: Load,
        digests: Digests,
        deadline_s: float,
        clock: Callable[[], int],
        drop: "Callable[[Batch, Sequence[int]], None]",
    ) -> None:
        self.served, self.version, self.batcher, self.shapes = served, served.version, batcher, shapes
        self.load, self.digests, self.drop = load, digests, drop
        self._deadline_s, self._clock = deadline_s, clock
        self.open: Batch | None = None
        self._until = 0.0
        self.calls = self.rows = 0
        self.commits: list[float] = []
        self.spares = Spares()

    def joinable(self, now: float) -> "Batch":
        """The batch that steps join at `now` (monotonic)."""
        if self.open is not None and now <= self._until:
            return self.open
        batch = self.open = Batch(self, now + self._deadline_s, self._clock())
        self._until = now + OPEN_S
        self.batcher.submit(batch)
        return batch

    def closed(self, now: float) -> "Batch":
        """A batch that nobody joins; its maker fills and submits it."""
        return Batch(self, now + self._deadline_s, self._clock())


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
        self.roster: Together | None = None
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


class Group:
    """The sessions of a batch whose records have one shape: N examples each.

    Attributes:
        x: (B, N x F) float32.
        sessions, seqs, waiters: By row. `waiters` is empty where `many` says whose answer the rows are part of, at
            which `places`.
        block: Their next records; `answers`: what they are answered; `tags` (B, N): of the new states. Once it ran.
        roster: All its sessions, where their records lie side by side.
        asks: The calls, by row, of those that had to wait for their turn.
    """

    __slots__ = ("answers", "asks", "block", "many", "places", "roster", "seqs", "sessions", "tags", "waiters", "x")

    def __init__(
        self,
        sessions: list[Session],
        x: Floats,
        seqs: Sequence[int | None],
        block: Block,
        roster: Together | None = None,
    ) -> None:
        self.sessions, self.x, self.seqs, self.block, self.roster = sessions, x, seqs, block, roster
        self.waiters: Sequence[Waiter] = ()
        self.asks: dict[int, Ask] = {}
        self.many: Places | None = None
        self.places: Sequence[int] = ()
        self.tags: Ints | None = None
        self.answers: Answers

    def waiter(self, row: int) -> Waiter:
        """Who waits for a row."""
        return self.waiters[row] if self.many is None else self.many.waiter(self.places[row])

    def ask(self, row: int, deadline: float) -> Ask:
        """The call of a row, to be decided on again."""
        ask = self.asks.get(row)
        if ask is None:
            x = self.x[row].reshape(self.block.advance.before.examples, 1, -1)
            ask = Ask(x, None, self.seqs[row], deadline, self.waiter(row))
        ask.verified = False
        return ask

    def ran(self, lane: Lane, outputs: Floats, tags: Ints | None) -> None:
        """Fill in what the run made: outputs (B x N, O), tags (B x N,)."""
        count, block = len(self.sessions), self.block
        block.outputs[:] = outputs.view(np.uint8).reshape(count, -1)
        block.digests[:] = lane.digests.rows(self.x)
        if block.log is not None:
            block.log[:] = self.x.view(np.uint8)
        self.answers = Answers(outputs.reshape(count, -1, 1, outputs.shape[1]), lane.version)
        self.tags = None if tags is None else tags.reshape(count, -1)


class Batch:
    """Single steps that run and commit together; their sessions stay busy until each is settled.

    Args:
        lane: Of the model version.
        deadline: Monotonic time after which none of it is begun any more.
        now_ms: Wall clock.

    Attributes:
        sessions, inputs, seqs, waiters: By row; inputs are float32 [N,F] in bytes. Instead of `inputs` a batch step has
            `x` (B, F), and instead of `waiters` the answer `many` that the rows are part of, at these `places`.
        asks: The calls, by row, of those that had to wait for their turn: they may be too late, or their callers gone.
        guests: Rows of no session that advance by one step.
        roster: All its sessions, where their records lie side by side.
        groups: What became of it.
        left: Rows whose commit is not known yet, and `committed`: who waits for that.
    """

    __slots__ = (
        *("asks", "committed", "deadline", "error", "groups", "guests", "inputs", "lane", "left", "many", "now_ms"),
        *("places", "roster", "rows", "seqs", "sessions", "started", "waiters", "x"),
    )

    def __init__(self, lane: Lane, deadline: float, now_ms: int) -> None:
        self.lane, self.deadline, self.now_ms = lane, deadline, now_ms
        self.sessions: list[Session] = []
        self.inputs: list[bytes] = []
        self.seqs: list[int | None] = []
        self.waiters: list[Waiter] = []
        self.asks: dict[int, Ask] = {}
        self.guests: list[Run] = []
        self.x: Floats | None = None
        self.many: Places | None = None
        self.places: Sequence[int] = ()
        self.roster: Together | None = None
        self.groups: list[Group] = []
        self.rows = self.left = 0
        self.started = 0.0
        self.error: StepcastError | None = None
        self.committed: asyncio.Future[None] | None = None

    def begin(self, now: float) -> bool:
        """Let nobody join any more, and drop what is too late; False: nothing is left to run."""
        if self.lane.open is self:
            self.lane.open = None
        if self.deadline < now:
            self.lane.drop(self, range(len(self.sessions)))
        elif self.asks:
            late = [row for row, ask in self.asks.items() if ask.deadline < now or ask.waiter.done()]
            if late:
                self.lane.drop(self, late)
        return bool(self.sessions) or bool(self.guests)

    def leave_out(self, rows: Sequence[int]) -> None:
        """Go on without some rows."""
        self.roster = None
        stay = sorted(set(range(len(self.sessions))) - set(rows))
        self.asks = {at: self.asks[row] for at, row in enumerate(stay) if row in self.asks}
        self.sessions, self.seqs = [self.sessions[row] for row in stay], [self.seqs[row] for row in stay]
        self.inputs = [self.inputs[row] for row in stay] if self.inputs else []
        self.waiters = [self.waiters[row] for row in stay] if self.waiters else []
        self.places = [self.places[row] for row in stay] if self.many is not None else ()
        self.x = None if self.x is None else self.x[stay]
        self.rows = sum(session.examples for session in self.sessions) + sum(guest.rows for guest in self.guests)

    def alone(self, row: int) -> "Batch":
        """One of its rows as a batch of its own."""
        alone = Batch(self.lane, self.deadline, self.now_ms)
        alone.sessions, alone.inputs, alone.seqs = [self.sessions[row]], [self.input(row)], [self.seqs[row]]
        alone.waiters, alone.rows = [self.waiter(row)], self.sessions[row].examples
        if row in self.asks:
            alone.asks[0] = self.asks[row]
        return alone

    def guest_alone(self, guest: Run) -> "Batch":
        """One of its guests as a batch of its own."""
        alone = Batch(self.lane, self.deadline, self.now_ms)
        alone.guests, alone.rows = [guest], guest.rows
        return alone

    def waiter(self, row: int) -> Waiter:
        """Who waits for a row."""
        return self.waiters[row] if self.many is None else self.many.waiter(self.places[row])

    def input(self, row: int) -> bytes:
        """One row's inputs."""
        return self.inputs[row] if self.x is None else self.x[row].tobytes()

    # --- the run ------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Run: inputs and records in, outputs and next records out. Nothing changes if the run raises."""
        if len(self.sessions) == 1 and not self.guests and self.x is None and self._go_alone():
            return
        lane, guests, width = self.lane, self.guests, self.lane.served.n_features
        groups = self._grouped() if self.sessions else []
        parts = [group.x.reshape(-1, width) for group in groups] + [guest.x[:, 0] for guest in guests]
        before = [group.block.before for group in groups]
        before += [np.frombuffer(guest.state, np.uint8)[None] for guest in guests]
        after = [group.block.after for group in groups] + [np.empty((1, len(g.state)), np.uint8) for g in guests]
        tags = None if lane.served.runtime.resident is None else self._tags(groups)
        x = parts[0] if len(parts) == 1 else np.concatenate(parts)
        outputs, at = lane.served.runtime.step(x, before, after, tags), 0
        for group in groups:
            end = at + group.block.advance.before.examples * len(group.sessions)
            group.ran(lane, outputs[at:end], None if tags is None else tags[at:end])
            at = end
        for guest, state in zip(guests, after[len(groups) :], strict=True):
            guest.outputs, guest.state, guest.at = outputs[at : at + guest.rows, None], state.tobytes(), 1
            at += guest.rows
        self.groups = groups

    def _go_alone(self) -> bool:
        """The same for a single session, by hand: a lone caller waits for every microsecond."""
        lane, session, inputs = self.lane, self.sessions[0], self.inputs[0]
        data, shape = session.data, session.shape
        if data is None or shape is None:  # never of a busy session
            return False
        made = lane.served.runtime.step_one(inputs, data, shape.state_at, shape.examples)
        if made is None:
            return False
        outputs, state = made
        parts = state, lane.digests.row(inputs), outputs.tobytes()
        advance = shape.single or shape.following()
        block = LoneBlock(advance, session.key, data, self.now_ms, parts, inputs if advance.log_new else b"")
        group = Group(self.sessions, np.frombuffer(inputs, np.float32)[None], self.seqs, block)
        group.waiters, group.asks = self.waiters, self.asks
        group.answers = Answers(outputs.reshape(1, shape.examples, 1, -1), lane.version)
        self.groups = [group]
        return True

    def _grouped(self) -> list[Group]:
        """The sessions by the shape of their records."""
        roster = self.roster
        if roster is not None and roster.whole and self.x is not None:
            block = Block(roster.advance, roster.keys, roster.records, self.now_ms, self.lane.spares)
            block.stays, block.place = True, roster.place
            group = Group(self.sessions, self.x, self.seqs, block, roster)
            group.many, group.places = self.many, self.places
            return [group]
        shapes: list[Shape] = [session.shape for session in self.sessions]  # type: ignore[misc]  # they have a lane
        if shapes.count(shapes[0]) == len(shapes):
            return [self._group(shapes[0], None)]
        rows: dict[Shape, list[int]] = {}
        for row, shape in enumerate(shapes):
            rows.setdefault(shape, []).append(row)
        return [self._group(shape, there) for shape, there in rows.items()]

    def _group(self, shape: Shape, rows: list[int] | None) -> Group:
        """The sessions of some rows (None: all), which have records of one shape."""
        sessions, seqs, waiters, places = self.sessions, self.seqs, self.waiters, self.places
        inputs, x, asks = self.inputs, self.x, self.asks
        if rows is not None:
            sessions, seqs = [sessions[row] for row in rows], [seqs[row] for row in rows]
            waiters = [waiters[row] for row in rows] if waiters else waiters
            places = [places[row] for row in rows] if self.many is not None else places
            inputs = [inputs[row] for row in rows] if inputs else inputs
            x = None if x is None else x[rows]
            asks = {at: asks[row] for at, row in enumerate(rows) if row in asks}
        if x is None:
            x = np.frombuffer(b"".join(inputs), np.float32).reshape(len(sessions), -1)
        old: list[bytes] = [session.data for session in sessions]  # type: ignore[misc]  # they have a lane
        block = Block(
            shape.single or shape.following(), [session.key for session in sessions], side_by_side(old), self.now_ms
        )
        group = Group(sessions, x, seqs, block)
        group.waiters, group.many, group.places, group.asks = waiters, self.many, places, asks
        return group

    def _tags(self, groups: list[Group]) -> Ints:
        """The tags of all rows' states; those of guests have none."""
        tags: list[Ints] = []
        for group in groups:
            examples = group.block.advance.before.examples
            if examples == 1:
                tags.append(np.array([session.tag for session in group.sessions], np.int64))
            else:
                tags += [np.broadcast_to(np.asarray(session.tag, np.int64), examples) for session in group.sessions]
        tags += [np.zeros(guest.rows, np.int64) for guest in self.guests]
        return np.concatenate(tags)
