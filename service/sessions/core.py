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
from ..records.layout import Advance, Facts, Shape, Shapes, facts
from ..settings import Settings

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

NS_PER_MS: Final = 1_000_000
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


@dataclass(slots=True, eq=False)
class Answers:
    """What sessions of one batch are answered."""

    outputs: Floats  # (B, N, T, O), NaN where a step was masked
    version: int  # of the model
    made: dict[str, Any] = field(default_factory=dict)  # encodings of all rows that a door wants to make once


class Waiter(Protocol):
    """Who asked for a step; it answers at once, without a turn of the event loop."""

    __slots__ = ()

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        """The session is at `step` now, or its kept answer of that step is here: row `row` of the answers."""

    def refused(self, error: BaseException) -> None:
        """The step was not made, or it is unknown whether it was."""

    def done(self) -> bool:
        """Whether nobody waits any more; a step that has not begun is dropped then."""


@dataclass(slots=True, eq=False)
class Load:
    """The steps of a model that wait, of all its versions."""

    limit: int  # the most that may wait; 0 while the server drains
    waiting: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)  # set when some wait no longer

    def leave(self, count: int) -> None:
        """That many wait no longer."""
        self.waiting -= count
        if not self.limit:
            self.left.set()


class Together(Protocol):
    """Sessions whose records lie side by side (a roster); whoever touches one alone splits it first."""

    whole: bool
    """It was not split."""
    keys: list[str]
    records: Bytes
    advance: Advance
    place: object
    """These four are what the Block of the next step needs."""
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


@dataclass(slots=True, eq=False)
class Lane:
    """One served version: where its steps go."""

    served: Served
    batcher: "Batcher[Batch]"
    shapes: Shapes
    load: Load
    digests: Digests
    settings: Settings
    clock: Callable[[], int]  # wall clock, ns
    drop: "Callable[[Batch, Sequence[int]], None]"  # refuses rows of a batch that are too late to be run
    version: int
    open: "Batch | None" = None  # the batch that steps may join now,
    until: float = 0.0  # and how long, monotonic
    calls: int = 0  # step calls made, rows times steps, and seconds of each commit, that are not in the metrics yet
    rows: int = 0
    commits: list[float] = field(default_factory=list)
    spares: Spares = field(default_factory=Spares)  # for the records of rosters

    def joinable(self, now: float) -> "Batch":
        """The batch that steps join at `now` (monotonic)."""
        if self.open is not None and now <= self.until:
            return self.open
        batch = self.open = self.closed(now)
        self.until = now + OPEN_S
        self.batcher.submit(batch)
        return batch

    def closed(self, now: float) -> "Batch":
        """A batch that nobody joins; its maker fills and submits it."""
        return Batch(self, now + self.settings.deadline_s, self.clock() // NS_PER_MS)


@dataclass(slots=True, eq=False)
class Session:
    """A session that is kept ready: its record as last seen, and the calls that wait for their turn."""

    address: Address
    key: str
    data: bytes | None = None  # the record, or a blank one of a new session; None: it has to be loaded
    stored: bool = False  # the store has `data`
    lane: Lane | None = None  # of the version that made its state; None: that is not served, or `data` is None
    shape: Shape | None = None  # of the record; None where the lane is
    step: int = 0
    tag: int | Ints = 0  # of the state, where a device holds it (Runtime.run_resident); an array has one for each row
    roster: Together | None = None  # who has the record instead
    queue: "list[Ask]" = field(default_factory=list)  # mostly empty: a deque would cost 600 bytes per session
    busy: bool = False  # a call of it is on its way, or it is being loaded
    used: bool = False  # since eviction looked at it
    size: int = 0  # in the cache

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

    def take(self, data: bytes, lane: Lane | None, found: Facts | None = None) -> None:
        """Keep a record of the present layout, which is of the lane's version.

        Args:
            found: What its header says, if it has been read.

        Raises:
            BadRecord: its lengths are not those of the version.
        """
        found = found or facts(data)
        self.shape = None if lane is None else lane.shapes.of(data, found)
        self.data, self.lane, self.step, self.tag = data, lane, found.step, 0


@dataclass(slots=True, eq=False)
class Ask:
    """A step call that waits for its turn."""

    x: Floats  # (N, T, F), finite or NaN, checked against the model
    mask: Mask | None  # (N, T), False: this example's state stays as it is at this step
    seq: int | None  # the number that the call's last step shall have; None: the next
    deadline: float  # monotonic; after it the call is not begun any more
    waiter: Waiter
    policy: str | None = None  # what to do if the session's version is not served; None: the server's
    verified: bool = False  # the session's record was loaded after the call came, so the call may be refused on it

    @property
    def single(self) -> bool:
        """Whether it is a single step of all examples: it goes with others in a batch."""
        return self.x.shape[1] == 1 and self.mask is None


@dataclass(slots=True, eq=False)
class Group:
    """The sessions of a batch whose records have one shape: N examples each. Lists are by row."""

    sessions: list[Session]
    x: Floats  # (B, N x F)
    seqs: Sequence[int | None]
    block: Block  # their next records
    roster: Together | None = None  # all its sessions, where their records lie side by side
    waiters: Sequence[Waiter] = ()
    many: Places | None = None  # instead of waiters: whose answer the rows are part of, and at which places
    places: Sequence[int] = ()
    asks: dict[int, Ask] = field(default_factory=dict)  # by row, the calls that had to wait for their turn
    tags: Ints | None = None  # (B, N), of the new states, once it ran
    answers: Answers = field(init=False)  # once it ran

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


@dataclass(slots=True, eq=False)
class Batch:
    """Single steps that run and commit together; their sessions stay busy until each is settled. Lists are by row."""

    lane: Lane
    deadline: float  # monotonic; after it none of the batch is begun any more
    now_ms: int  # wall clock
    sessions: list[Session] = field(default_factory=list)
    inputs: list[bytes] = field(default_factory=list)  # float32 [N,F] each
    seqs: list[int | None] = field(default_factory=list)
    waiters: list[Waiter] = field(default_factory=list)
    x: Floats | None = None  # (B, F): of a batch step, instead of inputs; and of its rows, instead of waiters:
    many: Places | None = None  # whose answer they are part of,
    places: Sequence[int] = ()  # and where
    asks: dict[int, Ask] = field(default_factory=dict)  # by row, the calls that had to wait for their turn
    guests: list[Run] = field(default_factory=list)  # rows of no session that advance by one step
    roster: Together | None = None  # all its sessions, where their records lie side by side
    rows: int = 0
    error: StepcastError | None = None
    groups: list[Group] = field(default_factory=list)  # what became of it
    started: float = 0.0  # its commit, s,
    left: int = 0  # rows of which it is not known yet,
    committed: "asyncio.Future[None] | None" = None  # and who waits for that

    def add(self, session: Session, data: bytes, seq: int | None, waiter: Waiter, rows: int) -> None:
        """Let a session's step join."""
        self.sessions.append(session)
        self.inputs.append(data)
        self.seqs.append(seq)
        self.waiters.append(waiter)
        self.rows += rows
        session.used = True
        if self.rows >= self.lane.settings.batch_rows:
            self.lane.open = None

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
        alone, session = Batch(self.lane, self.deadline, self.now_ms), self.sessions[row]
        alone.add(session, self.input(row), self.seqs[row], self.waiter(row), session.examples)
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
        x = np.frombuffer(inputs, np.float32)[None]
        group = Group(self.sessions, x, self.seqs, block, None, self.waiters, None, (), self.asks)
        group.answers = Answers(outputs.reshape(1, shape.examples, 1, -1), lane.version)
        self.groups = [group]
        return True

    def _grouped(self) -> list[Group]:
        """The sessions by the shape of their records."""
        roster = self.roster
        if roster is not None and roster.whole and self.x is not None:
            block = Block(roster.advance, roster.keys, roster.records, self.now_ms, self.lane.spares)
            block.stays, block.place = True, roster.place
            return [Group(self.sessions, self.x, self.seqs, block, roster, (), self.many, self.places)]
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
        return Group(sessions, x, seqs, block, None, waiters, self.many, places, asks)

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
