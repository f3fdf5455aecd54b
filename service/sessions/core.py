"""The nouns of stepping: which session, who waits, a session kept ready, the lane of a version, a batch of steps."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import numpy as np
import numpy.typing as npt

from stepcast.errors import ExamplesMismatch, StepcastError

from ..engine.batcher import Batcher, Run
from ..engine.repository import Served
from ..records.block import Block, LoneBlock, Spares, as_records, side_by_side
from ..records.digest import Digests
from ..records.layout import Advance, Facts, Shape, Shapes, facts
from ..settings import Settings
from .feed import Feed

if TYPE_CHECKING:
    from .many import Many

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

NS_PER_MS: Final = 1_000_000
LONG_QUEUE: Final = 512
"""Steps that may wait, whatever their pace."""
PACE_S: Final = 0.25
"""Over how long the pace of a long queue is measured."""
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


def another_n(address: Address, examples: int, got: int, where: str = "") -> ExamplesMismatch:
    """The error for another number of examples than the session has."""
    text = f"session {address.session!r} has {examples} examples, got {got}{where}"
    return ExamplesMismatch(f"{text}. Clear the state to change the number.", examples=examples, got=got)


@dataclass(slots=True, eq=False)
class Answers:
    """What sessions of one batch are answered."""

    outputs: Floats  # (B, N, T, O), NaN where a step was masked
    version: int  # of the model
    began: float = 0.0  # its run, monotonic; 0: it ran in chunks,
    ended: float = 0.0  # and when it was over; 0: these are kept answers
    made: dict[str, Any] = field(default_factory=dict)  # encodings of all rows that a door wants to make once


class Waiter(Protocol):
    """Who asked for a step; it answers at once, without a turn of the event loop."""

    __slots__ = ()

    @property
    def creates(self) -> bool:
        """Whether its step may create the session."""

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
    patience_s: float = math.inf  # for how long they should, at most
    waiting: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)  # set when some wait no longer
    most: int = field(init=False)  # the limit while the queue is short
    pace: float = 0.0  # how many leave in a second, where the queue is long; 0: it is short, or not known
    _since: float = 0.0  # from when on a long queue's pace is measured; 0: it is short
    _gone: int = 0  # how many left since then

    def __post_init__(self) -> None:
        self.most = self.limit

    def leave(self, count: int) -> None:
        """That many wait no longer."""
        self.waiting -= count
        if self._since or self.waiting > LONG_QUEUE:
            self._pace(count)
        if not self.limit:
            self.left.set()

    def _pace(self, count: int) -> None:
        """Let no more wait than leave within `patience_s`: to accept a step that comes too late helps nobody."""
        now = time.monotonic()
        self._gone += count
        if self.waiting <= LONG_QUEUE:
            self._since = self.pace = 0.0
            if self.limit:
                self.limit = self.most
        elif not self._since:
            self._since, self._gone = now, 0
        elif now - self._since >= PACE_S:
            self.pace = self._gone / (now - self._since)
            self._since, self._gone = now, 0
            if self.limit:
                self.limit = int(min(self.most, max(self.pace * self.patience_s, LONG_QUEUE)))

    def wait_s(self) -> float:
        """How long a step that comes now will wait for its run."""
        return self.waiting / self.pace if self.pace else 0.0


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
    fed: bool = False  # some of its steps came from a source (Feed)
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
    roster: "Roster | None" = None  # who has the record instead
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
    named: Served | None = None  # the version by whose names the inputs were put in their places; None: no names
    starts: bool = False  # from the initial state, whatever the session has
    on: Served | None = None  # the version that the session has to be on, or starts on; None: its own, or the live one
    verified: bool = False  # the session's record was loaded after the call came, so the call may be refused on it


@dataclass(slots=True, eq=False)
class Roster:
    """Sessions of one served version that are stepped together: they have no record of their own while it is whole.

    Whoever touches one of them alone splits it first.
    """

    lane: Lane
    sessions: list[Session]
    records: Bytes  # (B, W), and how each changes by a step:
    advance: Advance
    keys: list[str] = field(init=False)  # of each session,
    steps: list[int] = field(init=False)  # its step,
    following: list[int] = field(init=False)  # and that after the next batch step;
    level: bool = field(init=False)  # they are all the same
    place: object = None  # what the store has noted of them (Block)
    whole: bool = True  # no session has been touched alone
    busy: bool = False  # a batch step of all is under way
    used: bool = True  # since eviction looked

    def __post_init__(self) -> None:
        self.keys = [session.key for session in self.sessions]
        self.steps = [session.step for session in self.sessions]
        self.following = [step + 1 for step in self.steps]
        self.level = self.steps.count(self.steps[0]) == len(self.steps)
        for session in self.sessions:
            session.forget()
            session.roster = self

    def stepped(self, records: Bytes, place: object) -> None:
        """All have taken a step, and have these records now."""
        self.records, self.place = records, place
        self.steps = steps = self.following
        self.following = [steps[0] + 1] * len(steps) if self.level else [step + 1 for step in steps]
        self.busy, self.used = False, True

    def note_use(self) -> bool:
        """Pass on to the sessions that they were used; whether they were, since the last time."""
        if not self.used:
            return False
        self.used = False
        for session in self.sessions:
            session.used = True
        return True

    def split(self) -> None:
        """Give every session its own record; one whose step is under way stays busy until that is settled."""
        if not self.whole:
            return
        self.note_use()
        self.whole = False
        for session, data, step in zip(self.sessions, as_records(self.records), self.steps, strict=True):
            session.data, session.step, session.lane, session.shape = data, step, self.lane, self.advance.before
            session.roster, session.busy = None, self.busy
        if not self.busy:
            self.let_go()

    def let_go(self) -> None:
        """Hold on to nothing: there may be names for it left."""
        self.sessions, self.records, self.keys = [], self.records[:0].copy(), []


@dataclass(slots=True, eq=False)
class Rows:
    """Single steps of sessions. Lists are by row."""

    sessions: list[Session] = field(default_factory=list)
    inputs: list[bytes] = field(default_factory=list)  # float32 [N,F] each
    seqs: list[int | None] = field(default_factory=list)
    waiters: list[Waiter] = field(default_factory=list)
    asks: dict[int, Ask] = field(default_factory=dict)  # by row, the calls that had to wait for their turn
    x: Floats | None = None  # (B, F): of a batch step, instead of inputs; and of its rows, instead of waiters:
    many: "Many | None" = None  # whose answer they are part of,
    places: Sequence[int] = ()  # and where
    roster: Roster | None = None  # all the sessions, where their records lie side by side

    def waiter(self, row: int) -> Waiter:
        """Who waits for a row."""
        return self.waiters[row] if self.many is None else self.many.waiter(self.places[row])

    def feeds(self) -> list[Feed]:
        """The waiters of steps that all came from a source."""
        return cast(list[Feed], self.waiters)

    def stacked(self) -> Floats:
        """The inputs (B, N x F) of sessions of one N."""
        if self.x is not None:
            return self.x
        return np.frombuffer(b"".join(self.inputs), np.float32).reshape(len(self.sessions), -1)

    def take(self, rows: Sequence[int]) -> "Rows":
        """Some of them; they go each by itself, not as a roster."""
        asks = {at: self.asks[row] for at, row in enumerate(rows) if row in self.asks}
        taken = Rows([self.sessions[row] for row in rows], seqs=[self.seqs[row] for row in rows], asks=asks)
        if self.x is None:
            taken.inputs, taken.waiters = [self.inputs[row] for row in rows], [self.waiters[row] for row in rows]
        else:
            taken.x, taken.many, taken.places = self.x[rows], self.many, [self.places[row] for row in rows]
        return taken


@dataclass(slots=True, eq=False)
class Group:
    """The rows of a batch whose records have one shape: N examples each."""

    rows: Rows
    x: Floats  # (B, N x F)
    block: Block  # their next records
    fed: bool = False  # they came from a source: all waiters are Feeds
    tags: Ints | None = None  # (B, N), of the new states, once it ran
    answers: Answers = field(init=False)  # once it ran

    def ask(self, row: int, deadline: float) -> Ask:
        """The call of a row, to be decided on again."""
        ask = self.rows.asks.get(row)
        if ask is None:
            x = self.x[row].reshape(self.block.advance.before.examples, 1, -1)
            ask = Ask(x, None, self.rows.seqs[row], deadline, self.rows.waiter(row))
        ask.verified = False
        return ask

    def ran(self, lane: Lane, outputs: Floats, tags: Ints | None) -> None:
        """Fill in what the run made: outputs (B x N, O), tags (B x N,)."""
        count, block = len(self.rows.sessions), self.block
        block.outputs[:] = outputs.view(np.uint8).reshape(count, -1)
        block.digests[:] = lane.digests.rows(self.x)
        if block.log is not None:
            block.log[:] = self.x.view(np.uint8)
        self.answers = Answers(outputs.reshape(count, -1, 1, outputs.shape[1]), lane.version)
        self.tags = None if tags is None else tags.reshape(count, -1)


@dataclass(slots=True, eq=False)
class Batch:
    """Single steps that run and commit together; their sessions stay busy until each is settled."""

    lane: Lane
    deadline: float  # monotonic; after it none of the batch is begun any more
    now_ms: int  # wall clock
    steps: Rows = field(default_factory=Rows)
    guests: list[Run] = field(default_factory=list)  # rows of no session that advance by one step
    rows: int = 0  # of the model, all of these together
    error: StepcastError | None = None
    groups: list[Group] = field(default_factory=list)  # what became of it
    began: float = 0.0  # its run, monotonic
    started: float = 0.0  # its commit, s,
    left: int = 0  # steps of which it is not known yet,
    committed: "asyncio.Future[None] | None" = None  # and who waits for that

    def add(self, session: Session, data: bytes, seq: int | None, waiter: Waiter, rows: int) -> None:
        """Let a session's step join."""
        steps = self.steps
        steps.sessions.append(session)
        steps.inputs.append(data)
        steps.seqs.append(seq)
        steps.waiters.append(waiter)
        self.rows += rows
        session.used = True
        if self.rows >= self.lane.settings.batch_rows:
            self.lane.open = None

    def begin(self, now: float) -> bool:
        """Let nobody join any more, and drop what is too late; False: nothing is left to run."""
        self.began = now
        if self.lane.open is self:
            self.lane.open = None
        if self.deadline < now:
            self.lane.drop(self, range(len(self.steps.sessions)))
        elif self.steps.asks:
            late = [row for row, ask in self.steps.asks.items() if ask.deadline < now or ask.waiter.done()]
            if late:
                self.lane.drop(self, late)
        return bool(self.steps.sessions) or bool(self.guests)

    def leave_out(self, rows: Sequence[int]) -> None:
        """Go on without some rows."""
        self.steps = self.steps.take(sorted(set(range(len(self.steps.sessions))) - set(rows)))
        self.rows = sum(session.examples for session in self.steps.sessions) + sum(guest.rows for guest in self.guests)

    def singles(self) -> "list[Batch]":
        """Each of its steps and guests as a batch of its own."""
        made, steps = (self.lane, self.deadline, self.now_ms), self.steps
        alone = [Batch(*made, steps.take([row]), rows=one.examples) for row, one in enumerate(steps.sessions)]
        return alone + [Batch(*made, guests=[guest], rows=guest.rows) for guest in self.guests]

    # --- the run ------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Run: inputs and records in, outputs and next records out. Nothing changes if the run raises."""
        if len(self.steps.sessions) == 1 and not self.guests and self.steps.x is None and self._go_alone():
            return
        lane, guests, width = self.lane, self.guests, self.lane.served.n_features
        groups = self._grouped() if self.steps.sessions else []
        parts = [group.x.reshape(-1, width) for group in groups] + [guest.x[:, 0] for guest in guests]
        before = [group.block.before for group in groups]
        before += [np.frombuffer(guest.state, np.uint8)[None] for guest in guests]
        after = [group.block.after for group in groups] + [np.empty((1, len(g.state)), np.uint8) for g in guests]
        tags = None if lane.served.runtime.resident is None else self._tags(groups)
        x = parts[0] if len(parts) == 1 else np.concatenate(parts)
        outputs, at = lane.served.runtime.step(x, before, after, tags), 0
        for group in groups:
            end = at + group.block.advance.before.examples * len(group.rows.sessions)
            group.ran(lane, outputs[at:end], None if tags is None else tags[at:end])
            at = end
        for guest, state in zip(guests, after[len(groups) :], strict=True):
            guest.outputs, guest.state, guest.at = outputs[at : at + guest.rows, None], state.tobytes(), 1
            at += guest.rows
        self.groups = groups

    def _go_alone(self) -> bool:
        """The same for a single session, by hand: a lone caller waits for every microsecond."""
        lane, session, inputs = self.lane, self.steps.sessions[0], self.steps.inputs[0]
        data, shape = session.data, session.shape
        if data is None or shape is None:  # never of a busy session
            return False
        made = lane.served.runtime.step_one(inputs, data, shape.state_at, shape.examples)
        if made is None:
            return False
        outputs, state = made
        parts = state, lane.digests.row(inputs), outputs.tobytes()
        advance, position, fed = shape.single or shape.following(), b"", False
        if lane.fed and isinstance(feed := self.steps.waiters[0], Feed):
            advance, position, fed = shape.fed or shape.feeding(), feed.position, True
        log = inputs if advance.log_new else b""
        block = LoneBlock(advance, session.key, data, self.now_ms, parts, log, position)
        group = Group(self.steps, np.frombuffer(inputs, np.float32)[None], block, fed)
        group.answers = Answers(outputs.reshape(1, shape.examples, 1, -1), lane.version)
        self.groups = [group]
        return True

    def _grouped(self) -> list[Group]:
        """The steps by the shape of their sessions' records."""
        steps, roster = self.steps, self.steps.roster
        if roster is not None and roster.whole:
            block = Block(roster.advance, roster.keys, roster.records, self.now_ms, self.lane.spares)
            block.stays, block.place = True, roster.place
            return [Group(steps, steps.stacked(), block)]
        if not self.lane.fed or steps.many is not None:
            return self._by_shape(steps, fed=False)
        fed = [row for row, waiter in enumerate(steps.waiters) if isinstance(waiter, Feed)]
        if len(fed) in (0, len(steps.sessions)):
            return self._by_shape(steps, fed=bool(fed))
        others = sorted(set(range(len(steps.sessions))) - set(fed))
        return self._by_shape(steps.take(fed), fed=True) + self._by_shape(steps.take(others), fed=False)

    def _by_shape(self, steps: Rows, fed: bool) -> list[Group]:
        shapes: list[Shape] = [session.shape for session in steps.sessions]  # type: ignore[misc]  # they have a lane
        if shapes.count(shapes[0]) == len(shapes):
            return [self._group(shapes[0], steps, fed)]
        rows: dict[Shape, list[int]] = {}
        for row, shape in enumerate(shapes):
            rows.setdefault(shape, []).append(row)
        return [self._group(shape, steps.take(there), fed) for shape, there in rows.items()]

    def _group(self, shape: Shape, steps: Rows, fed: bool) -> Group:
        """The steps of sessions whose records have one shape."""
        old: list[bytes] = [session.data for session in steps.sessions]  # type: ignore[misc]  # they have a lane
        keys = [session.key for session in steps.sessions]
        advance = shape.fed or shape.feeding() if fed else shape.single or shape.following()
        block = Block(advance, keys, side_by_side(old), self.now_ms)
        if fed:
            block.feed(b"".join([feed.position for feed in steps.feeds()]))
        return Group(steps, steps.stacked(), block, fed)

    def _tags(self, groups: list[Group]) -> Ints:
        """The tags of all rows' states; those of guests have none."""
        tags: list[Ints] = []
        for group in groups:
            sessions, examples = group.rows.sessions, group.block.advance.before.examples
            if examples == 1:
                tags.append(np.array([session.tag for session in sessions], np.int64))
            else:
                tags += [np.broadcast_to(np.asarray(session.tag, np.int64), examples) for session in sessions]
        return np.concatenate([*tags, *(np.zeros(guest.rows, np.int64) for guest in self.guests)])
