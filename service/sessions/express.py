"""The way of plain steps: into a column, through one run, into the store by one write, and the answers out.

Everything that is not plain, or is refused, goes back to where sessions take their turns (service/sessions/turns.py).
"""

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stepcast.errors import DeadlineExceeded, StepcastError

from ..engine.repository import Repository, Served
from ..records.block import Block
from ..settings import Settings
from ..store import Done, Store
from ..telemetry import Metrics, log
from .cache import HotSessions
from .columns import OPEN_S, Column, ManySteps, Track, Waiter
from .core import Entry, SingleStep, Step, StepAnswer, as_ours
from .roster import Cohort, Rosters

Floats = npt.NDArray[np.float32]


class Turns(Protocol):
    """Where sessions take their turns, and what is counted there."""

    repository: Repository
    draining: bool

    def track(self, served: Served) -> Track:
        """Where the single steps of a served version go."""

    def go_on(self, entry: Entry) -> None:
        """Start the oldest waiting call of an idle session."""

    def settle(self, step: Step, answer: StepAnswer | None, error: StepcastError | None = None) -> None:
        """Answer or refuse a call that has left its queue."""

    def leave(self, model: str, count: int = 1) -> None:
        """That many calls wait no longer."""


class Express:
    """Columns of all models of a server.

    Args:
        clock: Wall clock in ms.

    Attributes:
        few: Batch steps of fewer sessions make no columns of their own, their steps join those of other calls.
    """

    few = 32

    def __init__(
        self,
        turns: Turns,
        hot: HotSessions,
        store: Store,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], int],
    ) -> None:
        self._turns, self._hot, self._store, self._settings, self._metrics = turns, hot, store, settings, metrics
        self._clock = clock
        self._rosters = Rosters()

    def join(self, key: str, data: bytes, seq: int | None, waiter: Waiter) -> bool:
        """Queue a step of one example by one step, where its session is hot, idle and of the plainest kind.

        Args:
            key: Of the session's address.
            data: The inputs, float32 and finite.
            seq: The number that the step shall have.
            waiter: Gets the answer.

        Returns:
            False: nothing was done; `single_step` takes it, or says why not.
        """
        entry = self._hot.get(key)
        if entry is None or entry.busy or (seq is not None and seq != entry.step + 1):
            return False
        track = entry.track
        if track is None or len(data) != track.input_bytes:
            return False
        load, now = track.load, time.monotonic()
        if load.waiting >= self._settings.queue_limit:
            return False
        column = track.open
        if column is None or now > track.until:
            if self._turns.draining:
                return False
            column = self._open(track, now)
        load.waiting += 1
        entry.busy = entry.used = True
        column.entries.append(entry)
        column.inputs.append(data)
        column.seqs.append(seq)
        column.waiters.append(waiter)
        if len(column.entries) >= self._settings.batch_rows:
            track.open = None
        return True

    def _open(self, track: Track, now: float) -> Column:
        """A column that steps may join."""
        column = track.open = Column(track, now + self._settings.deadline_s, self._clock())
        track.until = now + OPEN_S
        track.batcher.submit(column)
        return column

    def step_many(
        self,
        model: str,
        namespace: str,
        sessions: Sequence[str],
        roster: bytes,
        x: Floats,
        seqs: Sequence[int | None] | None,
        many: ManySteps,
    ) -> Sequence[int]:
        """Queue single steps of many sessions of a model, of those that are hot, idle and of the plainest kind.

        Args:
            namespace, sessions: Of their addresses.
            roster: What the caller calls them all (service/sessions/roster.py).
            x: (K, F) float32, finite, checked against the live version.
            many: Gets the answers.

        Returns:
            The places of the others: `single_step` takes them.
        """
        track, limits = self._turns.track(self._turns.repository.live(model)), self._settings
        everyone = range(len(sessions))
        few = len(sessions) < self.few  # they join those of other calls
        if few or self._turns.draining or track.load.waiting + len(sessions) > limits.queue_limit:
            return everyone
        prefix = f"{namespace}/{model}/"
        hot, others, places = self._hot.get, [], []
        entries: list[Entry] = []
        for place in everyone:
            entry = hot(prefix + sessions[place])
            if entry is not None and entry.cohort is not None:
                entry.cohort.dissolve()
            if entry is not None and not entry.busy and entry.track is track:
                seq = None if seqs is None else seqs[place]
                if seq is None or seq == entry.step + 1:
                    entry.busy = entry.used = True
                    entries.append(entry)
                    places.append(place)
                    continue
            others.append(place)
        deadline = time.monotonic() + limits.deadline_s
        for start in range(0, len(entries), limits.batch_rows):
            cut = slice(start, start + limits.batch_rows)
            there = places[cut]
            column = Column(track, deadline, self._clock(), x if len(there) == len(sessions) else x[there])
            column.entries, column.many, column.places = entries[cut], many, there
            column.seqs = [None] * len(there) if seqs is None else [seqs[place] for place in there]
            track.load.waiting += len(there)
            track.batcher.submit(column)
        if not others and track.served.runtime.resident is None and self._rosters.came_before(roster):
            many.roster = roster
        return others

    def cohorts(self, roster: bytes) -> list[Cohort] | None:
        """The cohorts that a roster's sessions have formed, where a batch step of them all may go the shortest way."""
        return self._rosters.find(roster)

    def step_cohorts(
        self, cohorts: list[Cohort], model: str, x: Floats, seqs: Sequence[int | None] | None, many: ManySteps
    ) -> bool:
        """Queue a batch step of cohorts.

        Args:
            x, seqs, many: As for `step_many`.

        Returns:
            False: nothing was done, their sessions have to be looked at.
        """
        track, limits = self._turns.track(self._turns.repository.live(model)), self._settings
        if any(cohort.track is not track for cohort in cohorts) or self._turns.draining:
            return False
        if track.load.waiting + len(x) > limits.queue_limit:
            return False
        if seqs is not None:
            wanted = cohorts[0].following
            for cohort in cohorts[1:]:
                wanted = wanted + cohort.following
            if seqs != wanted:
                return False
        start, deadline, now_ms = 0, time.monotonic() + limits.deadline_s, self._clock()
        for cohort in cohorts:
            end = start + len(cohort.entries)
            column = Column(track, deadline, now_ms, x[start:end])
            column.entries, column.many, column.places, column.cohort = cohort.entries, many, range(start, end), cohort
            column.seqs = [None] * (end - start) if seqs is None else list(cohort.following)
            cohort.busy = True
            track.load.waiting += end - start
            track.batcher.submit(column)
            start = end
        return True

    def finish(self, column: Column) -> "asyncio.Future[None] | None":
        """Commit a column; what can not go together goes alone. None: the store has answered already."""
        cohort = column.cohort
        if column.error is not None:
            column.part()
            if isinstance(column.error, DeadlineExceeded):
                self._refuse_column(column, column.error)
            else:  # one of its rows is guilty: alone, the others are not held up by it
                for row in range(column.rows):
                    self._once_more(column, row, alone=True)
            return None
        entries, started = column.entries, time.perf_counter()
        wait: asyncio.Future[None] | None = None
        settled, left = False, column.rows
        results: list[bool | BaseException] = [False] * left

        def done(rows: Sequence[int], outcome: list[bool] | BaseException) -> None:
            nonlocal settled, left
            left -= len(rows)
            told: Sequence[bool | BaseException] = outcome if isinstance(outcome, list) else [outcome] * len(rows)
            for row, applied in zip(rows, told, strict=True):
                results[row] = applied
            if left:
                return
            lost = [applied for applied in results if not isinstance(applied, bool)]
            outcome = lost[0] if lost else [applied is True for applied in results]
            settled = True
            if isinstance(outcome, list):
                if cohort is not None and cohort.whole and False not in outcome:
                    self._replied_together(column, cohort, started)
                else:
                    column.part()
                    self._replied(column, outcome, started)
            else:
                column.part()
                self._refuse_column(column, as_ours(outcome, "the step could not be stored"))
            if wait is not None:
                wait.set_result(None)

        if cohort is not None and cohort.whole:
            assert column.sheet is not None
            block = Block(cohort.keys, cohort.records, column.sheet.new, cohort.ttl_s, stays=True)
            block.place = cohort.place
            self._store.replace(block, done)
            cohort.place = block.place
        else:
            column.part()
            old: list[bytes] = [entry.data for entry in entries]  # type: ignore[misc]  # they have a track
            blocks: dict[tuple[float | None, int, int], list[int]] = {}
            for row, entry in enumerate(entries):
                blocks.setdefault((entry.ttl_s, len(old[row]), len(column.next[row])), []).append(row)
            for (ttl_s, *_), rows in blocks.items():
                block = Block(
                    [entries[row].key for row in rows],
                    [old[row] for row in rows],
                    [column.next[row] for row in rows],
                    ttl_s,
                )
                self._store.replace(block, functools.partial(_some, done, rows))
        if not settled:
            wait = asyncio.get_running_loop().create_future()
        return wait

    def _replied(self, column: Column, applied: list[bool], started: float) -> None:
        """The store said which rows of a column it has."""
        self._metrics.commit_seconds.observe(time.perf_counter() - started)
        good = applied.count(True)
        column.track.made += good
        whole = good == len(applied)
        rows = range(len(applied)) if whole else [row for row, ok in enumerate(applied) if ok]
        self._advance(column, rows)
        if whole and column.many is not None and column.many.roster:
            self._form(column, column.many)
        if not whole:
            for row, ok in enumerate(applied):
                if not ok:  # another writer was first: load, and compute again
                    self._metrics.conflicts.labels(column.track.served.name).inc()
                    column.entries[row].keep(None)
                    self._once_more(column, row, alone=False)
        self._hot.evict()

    def _replied_together(self, column: Column, cohort: Cohort, started: float) -> None:
        """The store has all rows of a cohort."""
        many, answers, sheet = column.many, column.answers, column.sheet
        assert many is not None
        assert answers is not None
        assert sheet is not None
        self._metrics.commit_seconds.observe(time.perf_counter() - started)
        column.track.made += column.rows
        self._turns.leave(column.track.served.name, column.rows)
        column.track.spares.give(cohort.records)
        cohort.stepped(sheet.new)
        many.answer_all(column.places, answers.outputs, cohort.steps)
        self._hot.evict()

    def _form(self, column: Column, many: ManySteps) -> None:
        """Let the sessions of a batch step that came before be a cohort, where their records have stopped growing."""
        sheet, entries = column.sheet, column.entries
        if sheet is None or not sheet.full or any(entry.busy or entry.track is not column.track for entry in entries):
            return
        if any(entry.ttl_s != entries[0].ttl_s or self._hot.get(entry.key) is not entry for entry in entries):
            return
        many.cohorts[column.places[0]] = Cohort(column.track, entries, sheet.new)
        if sum(len(cohort.entries) for cohort in many.cohorts.values()) == len(many.steps):
            self._rosters.enter(many.roster, [many.cohorts[place] for place in sorted(many.cohorts)])

    def _advance(self, column: Column, rows: Sequence[int]) -> None:
        """Answer rows of a column that are stored, and let their sessions go on."""
        entries, following, hot = column.entries, column.next, self._hot
        many, answers, waiters, steps = column.many, column.answers, column.waiters, []
        assert answers is not None
        tags = None if column.tags is None else column.tags.tolist()
        self._turns.leave(column.track.served.name, len(rows))
        for row in rows:
            entry, data = entries[row], following[row]
            step = entry.step + 1
            if len(data) != len(entry.data or b""):
                hot.measure(entry, len(data))
            entry.data, entry.decoded, entry.step = data, None, step
            if tags is not None:
                entry.tag = tags[row]
            if many is not None:
                steps.append(step)
            else:
                try:
                    waiters[row].stepped(answers, row, step)
                except Exception:  # it writes to a socket: others of the column must not suffer
                    log.exception("an answer for session %s could not be given", entry.key)
            if entry.queue:
                self._turns.go_on(entry)
            else:
                entry.busy = False
        if many is not None:
            outputs = answers.outputs
            there = column.places if len(rows) == column.rows else [column.places[row] for row in rows]
            many.answer_all(there, outputs if len(rows) == column.rows else outputs[list(rows)], steps)

    def _refuse_column(self, column: Column, error: StepcastError) -> None:
        """Nothing of a column is known to be stored."""
        for row, entry in enumerate(column.entries):
            entry.keep(None)
            self._turns.settle(SingleStep(entry, column.input(row), None, 0.0, column.waiter(row)), None, error)
            self._turns.go_on(entry)

    def _once_more(self, column: Column, row: int, alone: bool) -> None:
        """Step one of a column anew, before the calls that wait for its session."""
        entry = column.entries[row]
        step = SingleStep(entry, column.input(row), column.seqs[row], column.deadline, column.waiter(row), alone)
        entry.queue.insert(0, step)
        self._turns.go_on(entry)


def _some(done: Done, rows: list[int], at: Sequence[int], outcome: list[bool] | BaseException) -> None:
    done([rows[i] for i in at], outcome)
