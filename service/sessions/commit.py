"""What becomes of a run: into the store by one compare-and-set per session, then the answers, then the next calls."""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from stepcast.errors import SessionBusy, StepcastError

from ..engine.batcher import too_late
from ..records.block import LoneBlock
from ..store import Store
from ..telemetry import Metrics, as_ours, log
from .cache import SessionCache
from .core import NS_PER_MS, Answers, Ask, Batch, Group, Lane, Load, Roster, Rows, Session, Waiter
from .feed import Feed, address_letters
from .run import MaskedRun

Outcome = list[bool] | BaseException


class Commits:
    """The commits of a server; `go_on` lets the next call of a session begin."""

    def __init__(self, store: Store, cache: SessionCache, metrics: Metrics, go_on: Callable[[Session], None]) -> None:
        self._store, self._cache = store, cache
        self._metrics, self._go_on = metrics, go_on

    def batch(self, batch: Batch) -> "asyncio.Future[None] | None":
        """Commit a batch that ran; one that failed is run again row by row. None: all is known already."""
        if batch.error is not None:
            self._failed(batch, batch.error)
            return None
        for guest in batch.guests:
            guest.then(guest)
        batch.left, batch.started = len(batch.steps.sessions), time.perf_counter()
        for group in batch.groups:
            group.answers.began, group.answers.ended = batch.began, batch.started
            if group.fed:
                address_letters(group)
            self._store.replace(group.block, partial(self._told, batch, group))
        if not batch.left:
            return None
        batch.committed = asyncio.get_running_loop().create_future()
        return batch.committed

    def call(self, session: Session, lane: Lane, ask: Ask, run: MaskedRun) -> "asyncio.Future[None] | None":
        """Commit a session's call that had a run of its own."""
        shape, data = session.shape, session.data
        if run.error is not None or shape is None or data is None or ask.waiter.done():
            changed = SessionBusy("the session was changed while the step ran")
            self.refuse(lane.load, session, ask.waiter, run.error or changed)
            self._go_on(session)
            return None
        fed = isinstance(ask.waiter, Feed)
        outputs, advance = run.reply(), shape.advance(ask.x.shape[1], logs=ask.mask is None, fed=fed)
        log = ask.x.tobytes()[ask.x.nbytes - advance.log_new :]
        parts = run.state, lane.digests.call(ask.x, ask.mask), outputs.tobytes()
        position = ask.waiter.position if isinstance(ask.waiter, Feed) else b""
        block = LoneBlock(advance, session.key, data, lane.clock() // NS_PER_MS, parts, log, position)
        steps = Rows([session], seqs=[ask.seq], waiters=[ask.waiter], asks={0: ask})
        group = Group(steps, ask.x.reshape(1, -1), block, fed)
        group.answers = Answers(outputs[None], lane.version)
        return self.batch(Batch(lane, ask.deadline, 0, steps, groups=[group]))

    def _failed(self, batch: Batch, error: StepcastError) -> None:
        """One of a batch's rows is guilty: each runs alone, so that the others do not suffer."""
        steps, guests = batch.steps, batch.guests
        _part(steps.roster)
        if len(steps.sessions) + len(guests) > 1:
            for alone in batch.singles():
                batch.lane.batcher.submit(alone)
            return
        for guest in guests:
            guest.error = error
            guest.then(guest)
        for session in steps.sessions:
            self.refuse(batch.lane.load, session, steps.waiter(0), error)
            self._go_on(session)

    def drop(self, batch: Batch, rows: Sequence[int]) -> None:
        """Refuse rows of a batch that are too late to be run; their sessions are as they were."""
        steps = batch.steps
        _part(steps.roster)
        gone = [(steps.sessions[row], steps.waiter(row)) for row in rows]
        batch.leave_out(rows)
        for session, waiter in gone:
            self.refuse(batch.lane.load, session, waiter, too_late())
            self._go_on(session)

    def _told(self, batch: Batch, group: Group, rows: Sequence[int], outcome: Outcome) -> None:
        """The store said what became of some rows of a group."""
        if isinstance(outcome, list) and False not in outcome:
            roster = group.rows.roster
            if roster is not None and roster.whole and len(rows) == len(group.rows.sessions):
                self._advance_roster(batch.lane, group, roster)
            else:
                self._advance(batch, group, rows)
        else:
            self._advance_some(batch, group, rows, outcome)
        batch.left -= len(rows)
        if not batch.left:
            batch.lane.commits.append(time.perf_counter() - batch.started)
            if self._cache.bytes > self._cache.limit_bytes:
                self._cache.evict()
        if batch.committed is not None and not batch.committed.done():
            batch.committed.set_result(None)  # by the first of several servers: one that hangs holds up its own alone

    def _advance_some(self, batch: Batch, group: Group, rows: Sequence[int], outcome: Outcome) -> None:
        """Some rows were refused by the store, or it is unknown what it has."""
        steps, error = group.rows, None
        _part(steps.roster)
        if isinstance(outcome, list):
            self._advance(batch, group, [row for row, applied in zip(rows, outcome, strict=True) if applied])
            rows = [row for row, applied in zip(rows, outcome, strict=True) if not applied]
        else:
            error = as_ours(outcome, "the step could not be stored")
        for row in rows:
            session = steps.sessions[row]
            session.forget()
            if error is None:  # another writer was first: load, and compute again
                self._metrics.conflicts.labels(session.address.model).inc()
                session.queue.insert(0, group.ask(row, batch.deadline))
            else:
                self.refuse(batch.lane.load, session, steps.waiter(row), error)
            self._go_on(session)

    def _advance(self, batch: Batch, group: Group, rows: Sequence[int]) -> None:
        """Answer rows that are stored, and let their sessions go on."""
        if group.rows.roster is not None:
            _part(group.rows.roster)
        sessions, waiters, many, answers = group.rows.sessions, group.rows.waiters, group.rows.many, group.answers
        records, advance = group.block.records(), group.block.advance
        shape, taken, grown = advance.after, advance.steps, not advance.steady
        tags, steps, lane = group.tags, [], batch.lane
        lane.load.leave(len(rows))
        lane.calls += len(rows)
        lane.rows += len(rows) * taken * shape.examples
        for row in rows:
            session = sessions[row]
            session.data, session.shape, session.stored = records[row], shape, True
            session.step = step = session.step + taken
            if grown:
                self._cache.measure(session, shape.width)
            if tags is not None:
                session.tag = tags[row] if shape.examples > 1 else int(tags[row, 0])
            if many is not None:
                steps.append(step)
            else:
                try:
                    waiters[row].stepped(answers, row, step)
                except Exception:  # it writes to a socket: others of the batch must not suffer
                    log.exception("an answer for session %s could not be given", session.key)
            if session.queue:
                self._go_on(session)
            else:
                session.busy = False
        if many is not None and steps:
            whole = len(rows) == len(sessions)
            places = group.rows.places if whole else [group.rows.places[row] for row in rows]
            outputs = answers.outputs if whole else answers.outputs[list(rows)]
            if many.form is not None:
                many.form(lane, group)
            many.answer(places, outputs[:, 0, 0], steps)

    def _advance_roster(self, lane: Lane, group: Group, roster: Roster) -> None:
        """The store has all records of a roster."""
        count, before, many = len(roster.sessions), roster.records, group.rows.many
        lane.load.leave(count)
        lane.calls += count
        lane.rows += count
        roster.stepped(group.block.new, group.block.place)
        lane.spares.give(before)
        if many is not None:
            many.answer(group.rows.places, group.answers.outputs[:, 0, 0], roster.steps)

    def refuse(self, load: Load, session: Session, waiter: Waiter, error: BaseException) -> None:
        """Refuse a call that has left its queue."""
        load.leave(1)
        if not session.stored:  # it may have a record that this call alone has begun with
            session.forget()
        _tell(session, waiter.refused, error)

    def repeat(self, load: Load, session: Session, waiter: Waiter, answers: Answers, step: int) -> None:
        """Answer a call by a kept answer."""
        self._metrics.retries.labels(session.address.model).inc()
        load.leave(1)
        _tell(session, waiter.stepped, answers, 0, step)

    def redelivered(self, load: Load, session: Session, feed: Feed, answers: Answers | None, step: int) -> None:
        """Answer a call of a source's that was taken in before."""
        self._metrics.retries.labels(session.address.model).inc()
        load.leave(1)
        _tell(session, feed.redelivered, answers, step)


def _tell(session: Session, answer: Callable[..., None], *said: object) -> None:
    try:
        answer(*said)
    except Exception:  # it writes to a socket: others of the batch must not suffer
        log.exception("session %s could not be answered", session.key)


def _part(roster: Roster | None) -> None:
    """From here on each session goes by itself."""
    if roster is not None:
        roster.split()
        roster.let_go()
