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
from .core import NS_PER_MS, Answers, Ask, Batch, Group, Lane, Load, Session, Together, Waiter
from .run import MaskedRun

Outcome = list[bool] | BaseException


class Commits:
    """The commits of a server.

    Args:
        go_on: Lets the next call of a session begin.
    """

    def __init__(
        self,
        store: Store,
        cache: SessionCache,
        metrics: Metrics,
        go_on: Callable[[Session], None],
    ) -> None:
        self._store, self._cache = store, cache
        self._metrics, self._go_on = metrics, go_on

    # --- what ran -----------------------------------------------------------------------------------------------

    def batch(self, batch: Batch) -> "asyncio.Future[None] | None":
        """Commit a batch that ran; one that failed is run again row by row. None: all is known already."""
        if batch.error is not None:
            self._failed(batch, batch.error)
            return None
        for guest in batch.guests:
            guest.then(guest)
        batch.left, batch.started = len(batch.sessions), time.perf_counter()
        for group in batch.groups:
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
        outputs, advance = run.reply(), shape.advance(ask.x.shape[1], logs=ask.mask is None)
        log = ask.x.tobytes()[ask.x.nbytes - advance.log_new :]
        parts = run.state, lane.digests.call(ask.x, ask.mask), outputs.tobytes()
        block = LoneBlock(advance, session.key, data, lane.clock() // NS_PER_MS, parts, log)
        group = Group([session], ask.x.reshape(1, -1), [ask.seq], block, None, [ask.waiter], None, (), {0: ask})
        group.answers = Answers(outputs[None], lane.version)
        return self.batch(Batch(lane, ask.deadline, 0, [session], groups=[group]))

    def _failed(self, batch: Batch, error: StepcastError) -> None:
        """One of a batch's rows is guilty: each runs alone, so that the others do not suffer."""
        _part(batch.roster)
        if len(batch.sessions) + len(batch.guests) == 1:
            for guest in batch.guests:
                guest.error = error
                guest.then(guest)
            for session in batch.sessions:
                self.refuse(batch.lane.load, session, batch.waiter(0), error)
                self._go_on(session)
            return
        for row in range(len(batch.sessions)):
            batch.lane.batcher.submit(batch.alone(row))
        for guest in batch.guests:
            batch.lane.batcher.submit(batch.guest_alone(guest))

    def drop(self, batch: Batch, rows: Sequence[int]) -> None:
        """Refuse rows of a batch that are too late to be run; their sessions are as they were."""
        _part(batch.roster)
        gone = [(batch.sessions[row], batch.waiter(row)) for row in rows]
        batch.leave_out(rows)
        for session, waiter in gone:
            self.refuse(batch.lane.load, session, waiter, too_late())
            self._go_on(session)

    # --- what the store says ------------------------------------------------------------------------------------

    def _told(self, batch: Batch, group: Group, rows: Sequence[int], outcome: Outcome) -> None:
        """The store said what became of some rows of a group."""
        if isinstance(outcome, list) and False not in outcome:
            if group.roster is not None and group.roster.whole and len(rows) == len(group.sessions):
                self._advance_roster(batch.lane, group, group.roster)
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
                batch.committed.set_result(None)

    def _advance_some(self, batch: Batch, group: Group, rows: Sequence[int], outcome: Outcome) -> None:
        """Some rows were refused by the store, or it is unknown what it has."""
        _part(group.roster)
        if not isinstance(outcome, list):
            error = as_ours(outcome, "the step could not be stored")
            for row in rows:
                session = group.sessions[row]
                session.forget()
                self.refuse(batch.lane.load, session, group.waiter(row), error)
                self._go_on(session)
            return
        self._advance(batch, group, [row for row, applied in zip(rows, outcome, strict=True) if applied])
        for row, applied in zip(rows, outcome, strict=True):
            if not applied:  # another writer was first: load, and compute again
                session = group.sessions[row]
                self._metrics.conflicts.labels(session.address.model).inc()
                session.forget()
                session.queue.insert(0, group.ask(row, batch.deadline))
                self._go_on(session)

    def _advance(self, batch: Batch, group: Group, rows: Sequence[int]) -> None:
        """Answer rows that are stored, and let their sessions go on."""
        if group.roster is not None:
            _part(group.roster)
        sessions, waiters, many, answers = group.sessions, group.waiters, group.many, group.answers
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
            places = group.places if whole else [group.places[row] for row in rows]
            outputs = answers.outputs if whole else answers.outputs[list(rows)]
            many.form(lane, group)
            many.answer(places, outputs[:, 0, 0], steps)

    def _advance_roster(self, lane: Lane, group: Group, roster: Together) -> None:
        """The store has all records of a roster."""
        count, before = len(group.sessions), roster.records
        lane.load.leave(count)
        lane.calls += count
        lane.rows += count
        roster.stepped(group.block.new, group.block.place)
        lane.spares.give(before)
        if group.many is not None:
            group.many.answer(group.places, group.answers.outputs[:, 0, 0], roster.steps)

    # --- answers ------------------------------------------------------------------------------------------------

    def refuse(self, load: Load, session: Session, waiter: Waiter, error: BaseException) -> None:
        """Refuse a call that has left its queue."""
        load.leave(1)
        try:
            waiter.refused(error)
        except Exception:  # it writes to a socket: others of the batch must not suffer
            log.exception("an error for session %s could not be given", session.key)

    def repeat(self, load: Load, session: Session, waiter: Waiter, answers: Answers, step: int) -> None:
        """Answer a call by a kept answer."""
        self._metrics.retries.labels(session.address.model).inc()
        load.leave(1)
        try:
            waiter.stepped(answers, 0, step)
        except Exception:
            log.exception("an answer for session %s could not be given", session.key)


def _part(roster: Together | None) -> None:
    """From here on each session goes by itself."""
    if roster is not None:
        roster.split()
        roster.let_go()
