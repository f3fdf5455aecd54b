"""Steps what a source gives, tells a sink, acknowledges: each entry once, the entries of a session in their order.

One entry of a session is on its way at a time; the next waits until what became of it is known, and told. So an entry
at or before the position of a session's record is done with, but for the last one's letter.

    read -> line of the session -> sessions -> told with the record (outbox), or: sink, then acknowledged
                                    |-> refused for now: again, later
                                    |-> refused for good: dead letter
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from stepcast.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    QuotaExceeded,
    SessionBusy,
    StateVersionMismatch,
    StepcastError,
    StepConflict,
    StoreUnavailable,
    Unavailable,
)

from ...records.block import Letter, Outbox
from ...sessions.core import Answers
from ...store.streams import Entry, Sink, Source
from ...telemetry import Metrics, as_ours, log
from ..answers import document
from ..steps import Steps, Way
from .entries import Step, general, problem, read

PATIENCE_S: Final = 30.0
"""How long an entry is tried that a version to come, room for sessions, or the end of a defect may let through."""
_FOR_NOW: Final = (Unavailable, QueueFull, DeadlineExceeded, SessionBusy, ModelNotFound)
_MAYBE: Final = (Internal, StateVersionMismatch, QuotaExceeded)
_PAUSES_S: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
T = TypeVar("T")


def _pause_s(tries: int) -> float:
    return _PAUSES_S[min(tries, len(_PAUSES_S) - 1)]


class Pile(Generic[T]):
    """Collects what is to be done, and does all of it at once, again and again until it was done."""

    def __init__(self, work: Callable[[list[T]], Awaitable[None]]) -> None:
        self._work = work
        self._items: list[T] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, item: T) -> None:
        """Something more to do."""
        self._items.append(item)
        if self._task is None:
            self._task = asyncio.create_task(self._go())

    async def _go(self) -> None:
        tries = 0
        items: list[T] = []
        while items or self._items:
            items, self._items = [*items, *self._items], []
            try:
                await self._work(items)
                items, tries = [], 0
            except Exception as error:
                log.warning("%s", as_ours(error, "what became of entries could not be told"))
                await asyncio.sleep(_pause_s(tries))
                tries += 1
        self._task = None

    def cancel(self) -> None:
        """Give up."""
        if self._task is not None:
            self._task.cancel()


class Consumer:
    """One consumer of a source.

    Args:
        way: The namespace and model of the sessions.
        outbox: Where the store tells of steps together with their records; None: they go to `sink` afterwards.
        most: Entries in hand before no more are read.
    """

    def __init__(
        self, steps: Steps, way: Way, source: Source, sink: Sink, outbox: Outbox | None, most: int, metrics: Metrics
    ) -> None:
        self._steps, self._way, self._source, self._sink = steps, way, source, sink
        self._outbox, self._most, self._metrics = outbox, most, metrics
        self._lines: dict[str, deque[Step] | None] = {}  # by session; None: nothing waits behind the one on its way
        self._ready: list[Step] = []
        self._in_hand = 0
        self._changed = asyncio.Event()
        self._stopping = False
        self._letters: Pile[tuple[Step, Letter]] = Pile(self._append)
        self._done: Pile[Step] = Pile(self._acknowledge)
        self._tasks: set[asyncio.Task[None]] = set()
        self._warned: set[str] = set()
        self._counts = {"stepped": 0, "redelivered": 0, "buried": 0, "retried": 0}

    # --- life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read until cancelled."""
        tries = 0
        while True:
            if self._in_hand > self._most // 2:
                self._changed.clear()
                await self._changed.wait()
                continue
            try:
                entries = await self._source.read(self._most - self._in_hand)
                tries = 0
            except StoreUnavailable as error:
                log.warning("the source cannot be read: %s", error)
                await asyncio.sleep(_pause_s(tries))
                tries += 1
                continue
            for entry in entries:
                self._take(entry)

    async def stop(self, patience_s: float) -> None:
        """See what is on its way to its end, once nobody reads; what waits behind it stays for the next reader."""
        self._stopping = True
        try:
            async with asyncio.timeout(patience_s):
                while self._in_hand:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            log.error("%s entries were still in hand after %s s; they will be given again", self._in_hand, patience_s)
        self._letters.cancel()
        self._done.cancel()
        for task in self._tasks:
            task.cancel()

    async def gauge(self) -> None:
        """Bring the metrics up to date; called when they are read."""
        for outcome, count in self._counts.items():
            self._metrics.stream_entries.labels(outcome).inc(count)
            self._counts[outcome] = 0
        self._metrics.stream_in_hand.set(self._in_hand)
        self._metrics.stream_shares.set(len(self._source.shares()))
        try:
            lags = await self._source.lags()
        except StoreUnavailable as error:
            log.warning("the lag is not known: %s", error)
            return
        self._metrics.stream_lag.clear()
        self._metrics.stream_lag_seconds.clear()
        for name, lag in lags.items():
            if lag.entries is not None:
                self._metrics.stream_lag.labels(name.decode()).set(lag.entries)
            self._metrics.stream_lag_seconds.labels(name.decode()).set(lag.seconds)

    # --- lines --------------------------------------------------------------------------------------------------

    def _take(self, entry: Entry) -> None:
        """Put an entry behind those of its session."""
        step = Step(self, entry, self._source.name, self._outbox)
        self._in_hand += 1
        entry.share.in_hand[entry.id] = entry
        lines, session = self._lines, step.session
        if session not in lines:
            lines[session] = None
            self._submit(step)
            return
        line = lines[session]
        if line is None:
            line = lines[session] = deque()
        line.append(step)

    def _go_on(self, step: Step) -> None:
        """What became of a step is known and told: the next of its session may go."""
        line = self._lines[step.session]
        while line:
            following = line.popleft()
            if self._stopping or following.entry.share.lost:
                self._leave(following)
                continue
            if not self._ready:
                asyncio.get_running_loop().call_soon(self._submit_ready)
            self._ready.append(following)
            return
        del self._lines[step.session]

    def _leave(self, step: Step) -> None:
        """An entry is not in hand any more."""
        self._in_hand -= 1
        step.entry.share.in_hand.pop(step.entry.id, None)  # it may have been given twice
        if not self._changed.is_set():
            self._changed.set()

    def _submit_ready(self) -> None:
        ready, self._ready = self._ready, []
        for step in ready:
            self._submit(step)

    def _submit(self, step: Step) -> None:
        """Hand a step to the sessions."""
        if self._stopping or step.entry.share.lost:
            self._leave(step)
            self._go_on(step)
            return
        steps, way, fields = self._steps, self._way, step.entry.fields
        try:
            seq, reader = read(fields, step), steps.look(way)
            share = self._source.share_of(fields[b"session"])
            if share not in (None, step.entry.share.index):
                text = f"session {step.session!r} belongs to share {share} of the source, the entry is in another"
                self._start(self._bury(step, InvalidRequest(text, share=share), certain=True))
                return
            plain = None if b"mask" in fields or b"shape" in fields else reader.read(step.raw, step.kind, reader.bare)
            if plain is None:
                steps.take_any(way, step.session, general(fields, step, seq), step.kind, step)
                return
            _, data, step.form = plain
            if not steps.turns.feed(way.prefix + step.session, data, seq, step):
                steps.queue(way, step.session, data, seq, step)
        except Exception as error:
            self.refused(step, error)

    # --- what becomes of a step ---------------------------------------------------------------------------------

    def stepped(self, step: Step, answers: Answers, row: int, number: int) -> None:
        """It was made and is stored; with an outbox it is told and acknowledged too."""
        self._counts["stepped"] += 1
        if self._outbox is None:
            self._letters.add((step, step.letter(answers, row, number)))
        else:
            self._leave(step)
            self._go_on(step)

    def redelivered(self, step: Step, answers: Answers | None, number: int) -> None:
        """It was made before."""
        self._counts["redelivered"] += 1
        if self._outbox is not None or not number:  # told then
            self._done.add(step)
            self._go_on(step)
        elif answers is not None:
            self._letters.add((step, step.letter(answers, 0, number)))
        else:
            text = f"the entry became step {number} of session {step.session!r}, whose answer is no longer kept"
            self._start(self._bury(step, StepConflict(text, session=step.session, step=number), certain=True))

    def refused(self, step: Step, error: BaseException) -> None:
        """It was not made, or that is not known."""
        ours, now = as_ours(error, "an entry could not be stepped"), time.monotonic()
        step.since = step.since or now
        if isinstance(ours, _FOR_NOW) or (isinstance(ours, _MAYBE) and now - step.since < PATIENCE_S):
            if not step.tries:
                log.log(self._level(ours), "%r is tried again: %s", step, ours)
            self._counts["retried"] += 1
            asyncio.get_running_loop().call_later(_pause_s(step.tries), self._submit, step)
            step.tries += 1
        else:
            self._start(self._bury(step, ours))

    def _level(self, error: StepcastError) -> int:
        """A warning for the first error of a kind; the metrics count the others."""
        level = logging.DEBUG if error.code in self._warned else logging.WARNING
        self._warned.add(error.code)
        return level

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bury(self, step: Step, error: StepcastError, certain: bool = False) -> None:
        """Put an entry among the dead letters.

        Unless that is `certain`, not one that was stepped before, by whatever model was served then: the record tells.
        """
        tries, entry = 0, step.entry
        while True:
            try:
                if not certain and await self._took_in(step):
                    self._counts["redelivered"] += 1
                    await self._source.acknowledge([entry])
                else:
                    document(error, self._metrics)
                    await self._source.bury(entry, problem(error))
                    self._counts["buried"] += 1
                    log.log(self._level(error), "%r is a dead letter: %s", step, error)
                break
            except StepcastError as failure:
                log.warning("%r cannot be a dead letter yet: %s", step, failure)
                if self._stopping or entry.share.lost:
                    break
                await asyncio.sleep(_pause_s(tries))
                tries += 1
        self._leave(step)
        self._go_on(step)

    async def _took_in(self, step: Step) -> bool:
        """Whether the record has a position at or behind the entry's."""
        try:
            address = self._way.address(step.session)
        except StepcastError:  # no session has such an id
            return False
        found = await self._steps.turns.ledger.find(address)
        if found is None or found.source is None or found.source.name != self._source.name:
            return False
        return (step.entry.first, step.entry.second) <= (found.source.first, found.source.second)

    async def _append(self, told: list[tuple[Step, Letter]]) -> None:
        await self._sink.append([letter for _, letter in told])
        for step, _ in told:
            self._done.add(step)
            self._go_on(step)

    async def _acknowledge(self, done: list[Step]) -> None:
        await self._source.acknowledge([step.entry for step in done])
        for step in done:
            self._leave(step)
