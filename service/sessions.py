"""The life of a session: open, step in order, get, set, clear, fork, rewind, roll out, expire.

A session is a record in the store; this process keeps hot copies so that the steady path needs no read. A step is
computed on the hot copy and committed by one compare-and-set per batch: a copy that was stale is refused by the store,
loaded again and the step is computed again. So any replica may step any session, and nothing is applied twice.

A negative answer (a gap in seq, another N, a kept answer) is never given from a hot copy that may be stale: the record
is loaded first.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from stepcast.errors import (
    DeadlineExceeded,
    Draining,
    ExamplesMismatch,
    Internal,
    NotStreaming,
    QueueFull,
    SessionBusy,
    ShapeMismatch,
    StateVersionMismatch,
    StepcastError,
    StepConflict,
)

from . import record as records
from .batcher import Batcher, Job
from .calls import Address, Call, Entry, Floats, Future, Mask, SingleStep, Step, StepAnswer
from .columns import Cell, Column, ManySteps, Row
from .hot import HotSessions
from .ledger import Ledger
from .record import Record
from .repository import Repository, Served
from .settings import Settings
from .store import Store, Write
from .telemetry import Metrics, log
from .versions import migrated, replayable


class Sessions:
    """All sessions of a server. Everything runs on one event loop.

    Args:
        clock: Wall clock in ms, for created and used times.
    """

    def __init__(
        self,
        repository: Repository,
        store: Store,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], int] = records.wall_clock_ms,
    ) -> None:
        self.repository, self.store, self.settings, self.metrics = repository, store, settings, metrics
        self.ledger = Ledger(store, settings.ttl_s, clock, self._replaced)
        self._clock = clock
        self._hot = HotSessions(settings.hot_bytes)
        self._batchers: dict[tuple[str, int], Batcher[Job]] = {}
        self._to_load: list[Entry] = []
        self._loading: set[asyncio.Task[None]] = set()
        self._waiting: Counter[str] = Counter()
        self._settled = asyncio.Event()
        self.draining = False

    # --- stepping -----------------------------------------------------------------------------------------------

    def step(
        self,
        address: Address,
        x: Floats,
        mask: Mask | None,
        digest: bytes,
        seq: int | None,
        deadline_s: float | None = None,
    ) -> "asyncio.Future[StepAnswer]":
        """Queue a step call; the future has its answer once it is committed.

        Calls of one session are applied in the order of these calls. A future that is cancelled before its run
        is made leaves the session as it was.

        Args:
            x: (N, T, F) float32, finite or NaN, checked against the model.
            mask: (N, T) bool, False: this example's state stays as it is at this step; None: all True.
            digest: 8 bytes that name the payload.
            seq: The number that the last step of the call shall have.

        Raises:
            ModelNotFound, NotStreaming, QueueFull, Draining: refused at once. Other errors come through the future.
        """
        entry, deadline = self._enter(address, deadline_s)
        future: asyncio.Future[StepAnswer] = asyncio.get_running_loop().create_future()
        self._queue(Step(entry, x, mask, digest, seq, deadline, future))
        return future

    def single_step(self, address: Address, data: bytes, digest: bytes, seq: int | None, future: Future) -> None:
        """Queue a step of one example by one step, as `step` does.

        Args:
            data: The inputs, float32 and finite, as many as the live version takes.
            future: Gets the answer; or what stands for a future.
        """
        entry, deadline = self._enter(address, None)
        step = SingleStep(entry, data, digest, seq, deadline, future)
        served = entry.served
        if served is None or len(data) != 4 * served.n_features or not _goes_plainly(entry, served, seq):
            self._queue(step)
            return
        assert entry.record is not None  # what _queue would come to, by way of _next, _start and _admit
        assert entry.batcher is not None
        step.state = entry.record.state
        entry.busy = True
        self._waiting[address.model] += 1
        self._hot.used(entry)
        entry.batcher.submit(step)

    def step_many(self, many: ManySteps, asked: Sequence[tuple[int, Address, bytes, int | None, bytes]]) -> None:
        """Queue single steps of sessions of one model, as `single_step` does; refusals go to `many` too.

        Args:
            asked: Place in `many`, session, inputs (float32, checked, as many as the live version takes), seq, digest.
        """
        if not asked:
            return
        served = self.repository.live(asked[0][1].model)
        limits, waiting = self.settings, self._waiting[served.name] + len(asked)
        together = served.manifest.streaming and not (self.draining or limits.log_steps or waiting > limits.queue_limit)
        rows: list[Row] = []
        for place, address, data, seq, digest in asked:
            entry = self._hot.get(address.key)
            if together and entry is not None and _goes_plainly(entry, served, seq):
                assert entry.record is not None
                entry.busy = True
                self._hot.used(entry)
                rows.append(Row(place, entry, entry.record, data, digest, seq))
                continue
            try:
                self.single_step(address, data, digest, seq, Cell(many, place))
            except StepcastError as error:
                many.refuse(place, error)
        deadline = time.monotonic() + limits.deadline_s
        for start in range(0, len(rows), limits.batch_rows):
            column = Column(many, rows[start : start + limits.batch_rows], deadline)
            self._waiting[served.name] += column.rows
            self._batcher(served).submit(column)

    def _enter(self, address: Address, deadline_s: float | None) -> tuple[Entry, float]:
        """The session's entry, and when its call must have begun; raises where the call can not be queued."""
        served = self.repository.live(address.model)
        if not served.manifest.streaming:
            self.check_streams(served)
        limits, model = self.settings, address.model
        entry = self._hot.get(address.key)
        waiting = self._waiting[model]
        if waiting >= limits.queue_limit:
            raise _full(f"model {model!r}", waiting, limits.queue_limit)
        if entry is not None and len(entry.queue) >= limits.session_queue_limit:
            raise _full(f"session {address.session!r}", len(entry.queue), limits.session_queue_limit)
        if self.draining:
            raise Draining("the server is shutting down. Connect again.", retry_after_s=1.0)
        if entry is None:
            entry = self._hot.enter(address)
        return entry, time.monotonic() + (deadline_s or limits.deadline_s)

    def _queue(self, step: Step) -> None:
        entry = step.entry
        entry.queue.append(step)
        self._waiting[entry.address.model] += 1
        if not entry.busy:
            self._next(entry)

    def check_streams(self, served: Served) -> None:
        """Raises NotStreaming where the model can not be stepped."""
        if not served.manifest.streaming:
            raise NotStreaming(
                f"model {served.name!r} version {served.version} reads sequences from both ends. Use predict.",
                model=served.name,
            )

    def _settle(self, step: Step, answer: StepAnswer | None, error: StepcastError | None = None) -> None:
        """Answer or refuse a call that has left its queue; every call comes here once."""
        self._leave(step.entry.address.model)
        if step.future.done():
            return
        try:
            if answer is not None:
                step.future.set_result(answer)
            elif error is not None:
                step.future.set_exception(error)
        except Exception:  # what stands for a future writes to a socket: others of the batch must not suffer
            log.exception("an answer for session %s could not be given", step.entry.key)

    def _leave(self, model: str) -> None:
        self._waiting[model] -= 1
        if self.draining:
            self._settled.set()

    def _replaced(self, key: str) -> None:
        """A session was written not by a step: an idle hot copy is let go (a busy one will be refused)."""
        entry = self._hot.get(key)
        if entry is not None:
            self._hot.drop(entry)

    def _next(self, entry: Entry) -> None:
        """Start the oldest waiting call of an idle session."""
        entry.busy = False
        while entry.queue:
            step = entry.queue[0]
            if entry.record is None and not step.abandoned():
                entry.busy = True
                self._load_soon(entry)
                return
            entry.queue.popleft()
            if step.abandoned():
                self._settle(step, None)
            elif self._start(entry, step):
                entry.busy = True
                return
        if entry.record is None or not entry.stored:  # nothing worth keeping: no session, or one in doubt
            self._hot.drop(entry)
        self._hot.evict()

    def _start(self, entry: Entry, step: Step) -> bool:
        """Decide on a call. True: it is on its way; False: the next one may go on."""
        assert entry.record is not None
        try:
            decided = self._admit(entry, entry.record, step)
        except Exception as error:
            self._settle(step, None, _as_ours(error, "the step could not be started"))
            return False
        if isinstance(decided, StepAnswer):
            self.metrics.retries.labels(entry.address.model).inc()
            self._settle(step, decided)
            return False
        if decided is None:  # decide on the store's record, not on a copy
            entry.queue.appendleft(step)
            entry.record = None
            return False
        self._hot.used(entry)
        assert entry.batcher is not None
        entry.batcher.submit(step)
        return True

    def _admit(self, entry: Entry, record: Record, step: Step) -> Served | StepAnswer | None:
        """Decide on a call: the model that runs it, a kept answer, or None (load the record, then decide).

        Raises:
            StepcastError: refused.
        """
        served = entry.served
        if served is None:
            served = self._served_by(entry, record)
            if served is None:
                if not step.verified:
                    return None
                served, record = self._moved(entry, record)
            entry.served, entry.batcher = served, self._batcher(served)
        if step.features != served.n_features:  # the door looked at the live version
            raise ShapeMismatch(
                f"inputs have {step.features} features, session {entry.address.session!r} is on version "
                f"{served.version} of model {served.name!r}, which takes {served.n_features}",
                got=step.features,
                features=served.n_features,
                version=served.version,
            )
        expected = record.step + step.calls
        fits = record.examples in (0, step.rows)
        if fits and (step.seq is None or step.seq == expected):
            step.start(record.state if record.examples else served.runtime.initial(step.rows))
            return served
        if not step.verified:
            return None
        if step.seq is not None and step.seq != expected:
            kept = record.answer(step.seq)
            if kept is not None and kept.digest == step.digest:
                outputs = np.frombuffer(kept.outputs, np.float32).reshape(step.rows, kept.steps, -1)
                return StepAnswer(outputs, step.seq, record.version)
            raise self._conflict(entry, record, step, kept is not None)
        raise ExamplesMismatch(
            f"session {entry.address.session!r} has {record.examples} examples, got {step.rows}. "
            "Clear the state to change the number.",
            examples=record.examples,
            got=step.rows,
        )

    def _conflict(self, entry: Entry, record: Record, step: Step, other_payload: bool) -> StepConflict:
        session, expected = entry.address.session, record.step + step.calls
        what = "another payload" if other_payload else "a gap" if (step.seq or 0) > expected else "no kept answer"
        if not entry.stored and not record.step:
            text = f"session {session!r} does not exist (never created, ended or expired), got seq {step.seq}"
        else:
            text = f"session {session!r} is at step {record.step}, got seq {step.seq} with {what}"
        return StepConflict(
            f"{text}. Send seq {expected}.", session=session, step=record.step, seq=step.seq, expected_seq=expected
        )

    def _served_by(self, entry: Entry, record: Record) -> Served | None:
        """The version that made the session's state; None where it is not served (any more)."""
        served = self.repository.get(entry.address.model, record.version)
        if served is not None and (served.fingerprint == record.fingerprint or not entry.stored):
            return served
        return None

    def _moved(self, entry: Entry, record: Record) -> tuple[Served, Record]:
        """What the version policy says of a session whose version is not served."""
        policy = self.settings.version_policy
        live = self.repository.live(entry.address.model)
        if policy == "pin" or (policy == "replay" and not replayable(record, live)):
            raise self.version_mismatch(entry.address, record)
        entry.record = moved = migrated(record, live, policy)
        log.info("session %s moved from version %s to %s by %s", entry.key, record.version, live.version, policy)
        return live, moved

    def version_mismatch(self, address: Address, record: Record) -> StateVersionMismatch:
        """The error for a session whose model version is not served."""
        return StateVersionMismatch(
            f"session {address.session!r} has a state of version {record.version}, which is not served (there are "
            f"{self.repository.versions(address.model)}). Clear the state to go on with the live version.",
            session=address.session,
            version=record.version,
            versions=self.repository.versions(address.model),
        )

    def _batcher(self, served: Served) -> Batcher[Job]:
        batcher = self._batchers.get((served.name, served.version))
        if batcher is None:
            rows = self.metrics.batch_rows.labels(served.name)
            seconds = self.metrics.run_seconds.labels(served.name)

            def observe(batch: int, took: float) -> None:
                rows.observe(batch)
                seconds.observe(took)

            batcher = self._batchers[served.name, served.version] = Batcher(
                served.runtime.run,
                self._finish,
                observe,
                batch_rows=self.settings.batch_rows,
                chunk_s=self.settings.chunk_s if served.manifest.streaming else None,
                inline_s=self.settings.inline_s if served.runtime.device == "cpu" else -1.0,
            )
        return batcher

    # --- committing ---------------------------------------------------------------------------------------------

    def _finish(self, jobs: list[Job]) -> Awaitable[object] | None:
        """Take what a run made: calls beside the sessions are answered, steps are committed first."""
        steps: list[Step] = []
        waits: list[Awaitable[None]] = []
        for job in jobs:
            if isinstance(job, Step):
                steps.append(job)
            elif isinstance(job, Column):
                waits.append(self._commit_column(job))
            elif isinstance(job, Call) and not job.future.done():
                job.future.set_result(None)
        if steps:
            waits.append(self._commit(steps))
        if len(waits) > 1:
            return asyncio.gather(*waits)
        return waits[0] if waits else None

    async def _commit(self, steps: list[Step]) -> None:
        """Commit, answer, and let each session go on."""
        now, ready, writes = self._clock(), [], []
        for step in steps:
            try:
                write = self._write(step, now)
            except Exception:  # a defect here must not leave the whole batch without answers
                log.exception("a step of session %s could not be written down", step.entry.key)
                write, step.error = None, Internal("the step could not be stored")
            if write is None:
                self._fail(step, step.error or SessionBusy("the session was changed while the step ran"))
            else:
                ready.append(step)
                writes.append(write)
        if not writes:
            return
        started = time.perf_counter()
        try:
            applied = await self.store.commit(writes)
        except Exception as error:
            refusal = _as_ours(error, "the step could not be stored")
            for step in ready:
                self._forget(step.entry)
                self._fail(step, refusal)
            return
        self.metrics.commit_seconds.observe(time.perf_counter() - started)
        self._count(ready, applied)
        for step, ok in zip(ready, applied, strict=True):
            if ok:
                self._committed(step)
            else:
                self._again(step)

    async def _commit_column(self, column: Column) -> None:
        """Commit the rows of a batch step and let each session go on; what can not go together goes alone."""
        rows = column.sessions
        if column.error is not None and not isinstance(column.error, DeadlineExceeded):
            for row in rows:  # one of them is guilty: alone, the others are not held up by it
                self._alone(column, row)
            return
        started = time.perf_counter()
        try:
            if column.error is not None:
                raise column.error
            applied = await self.store.commit(column.writes(self._clock(), self.ledger.ttl_s))
        except Exception as error:
            refusal = _as_ours(error, "the step could not be stored")
            for row in rows:
                self._forget(row.entry)
                self._leave(column.model)
                column.many.refuse(row.place, refusal)
                self._next(row.entry)
            return
        self.metrics.commit_seconds.observe(time.perf_counter() - started)
        self.metrics.calls.labels(column.model).inc(sum(applied))
        self.metrics.steps.labels(column.model).inc(sum(applied))
        good = [i for i, ok in enumerate(applied) if ok]
        self._column_committed(column, good)
        for row, ok in zip(rows, applied, strict=True):
            if not ok:
                self.metrics.conflicts.labels(column.model).inc()
                self._forget(row.entry)
                self._alone(column, row)

    def _column_committed(self, column: Column, good: list[int]) -> None:
        assert column.outputs is not None
        rows = [column.sessions[i] for i in good]
        for row in rows:
            entry = row.entry
            entry.record = row.next
            self._hot.measure(entry, row.size)
            if entry.queue:
                self._next(entry)
            else:
                entry.busy = False
        self._waiting[column.model] -= len(rows) - 1
        self._leave(column.model)
        self._hot.evict()
        column.many.answer([row.place for row in rows], column.outputs[good, 0], [row.next.step for row in rows])

    def _alone(self, column: Column, row: Row) -> None:
        """Step one of many by itself, before the calls that wait for its session."""
        cell = Cell(column.many, row.place)
        step = SingleStep(row.entry, row.data, row.digest, row.seq, column.deadline, cell)
        row.entry.queue.appendleft(step)
        self._next(row.entry)

    def _write(self, step: Step, now: int) -> Write | None:
        """The write that commits a step; None where it failed, was refused, or nobody waits for it any more."""
        entry, record = step.entry, step.entry.record
        if step.error is not None or record is None or step.abandoned():
            return None
        last = record.step + step.calls
        step.answer = step.reply()
        answer = records.encode_answer(last, step.digest, step.calls, step.answer.tobytes())
        inputs = self._logged(record, step) if self.settings.log_steps else b""
        step.next = record.advanced(last, step.rows, step.state, answer, inputs, max(now, record.used_ms))
        expect = record.token if entry.stored else None
        touch = bool(record.flags & records.HAS_CHECKPOINTS)
        data = step.next.encode()
        step.size = len(data)
        return Write(entry.key, expect, data, self.ledger.ttl_s(record), None, touch)

    def _logged(self, record: Record, step: Step) -> bytes:
        """The input log after this step; it is exact for one example without masks, others are not kept."""
        if step.rows != 1 or step.mask is not None:
            return b""
        row = step.features * 4
        return (record.inputs + step.raw())[-self.settings.log_steps * row :]

    def _committed(self, step: Step) -> None:
        entry, record = step.entry, step.next
        assert record is not None
        assert step.answer is not None
        entry.record, entry.stored = record, True
        self._hot.measure(entry, step.size)
        self._settle(step, StepAnswer(step.answer, record.step, record.version))
        self._next(entry)

    def _again(self, step: Step) -> None:
        """Another writer was first: load the record and compute again."""
        entry = step.entry
        self.metrics.conflicts.labels(entry.address.model).inc()
        self._forget(entry)
        entry.queue.appendleft(step)
        self._next(entry)

    def _fail(self, step: Step, error: StepcastError) -> None:
        self._settle(step, None, error)
        self._next(step.entry)

    def _forget(self, entry: Entry) -> None:
        """Whether a write was applied is unknown: the next call loads."""
        entry.record = entry.served = None

    def _count(self, steps: Sequence[Step], applied: Sequence[bool]) -> None:
        model = steps[0].entry.address.model
        self.metrics.calls.labels(model).inc(sum(applied))
        self.metrics.steps.labels(model).inc(sum(s.rows * s.calls for s, ok in zip(steps, applied, strict=True) if ok))

    # --- loading and the hot copies -----------------------------------------------------------------------------

    def _load_soon(self, entry: Entry) -> None:
        for step in entry.queue:
            step.verified = True  # the load is made after these calls came
        if not self._to_load:
            task = asyncio.get_running_loop().create_task(self._load())
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)
        self._to_load.append(entry)

    async def _load(self) -> None:
        entries, self._to_load = self._to_load, []
        try:
            found = await self.store.load([entry.key for entry in entries])
        except Exception as error:
            refusal = _as_ours(error, "the session could not be loaded")
            for entry in entries:
                self._refuse_all(entry, refusal)
            return
        for entry, data in zip(entries, found, strict=True):
            try:
                self._loaded(entry, data)
            except Exception as error:
                self._refuse_all(entry, _as_ours(error, "the session could not be loaded"))

    def _loaded(self, entry: Entry, data: bytes | None) -> None:
        entry.served = None
        if data is None:
            entry.record, entry.stored = self._blank(entry), False
        else:
            entry.record, entry.stored = self.ledger.decode(entry.key, data), True
        self._hot.measure(entry, len(data or b""))
        self._next(entry)

    def _blank(self, entry: Entry) -> Record:
        served = self.repository.live(entry.address.model)
        return records.new_record(served.version, served.fingerprint, clock=self._clock)

    def _refuse_all(self, entry: Entry, error: StepcastError) -> None:
        entry.record = None
        waiting, entry.queue = list(entry.queue), deque()
        entry.busy = False
        for step in waiting:
            self._settle(step, None, error)
        self._hot.drop(entry)

    def gauge(self) -> None:
        """Bring the gauges up to date; called when metrics are read."""
        self.metrics.waiting.set(sum(self._waiting.values()))
        self.metrics.hot.set(len(self._hot))
        self.metrics.hot_bytes.set(self._hot.bytes)

    def retired(self, served: Served) -> None:
        """A version is not served any more: hot sessions ask anew which one is theirs."""
        for entry in self._hot:
            if entry.served is served:
                entry.served = None

    # --- beside the sessions ------------------------------------------------------------------------------------

    async def run(self, served: Served, x: Floats, mask: Mask | None, state: bytes) -> Call:
        """Run rows through a model beside any session, in the same batches.

        Args:
            x: (N, T, F), T >= 1; mask: (N, T) or None; state: packed, of N rows.

        Returns:
            The finished call: `reply()` and `state`.

        Raises:
            NonFinite, DeadlineExceeded, QueueFull, Draining.
        """
        waiting = self._waiting[served.name]
        if waiting >= self.settings.queue_limit:
            raise _full(f"model {served.name!r}", waiting, self.settings.queue_limit)
        if self.draining:
            raise Draining("the server is shutting down. Connect again.", retry_after_s=1.0)
        deadline = time.monotonic() + self.settings.deadline_s
        call = Call(x, mask, state, deadline, asyncio.get_running_loop().create_future())
        self._waiting[served.name] += 1
        try:
            self._batcher(served).submit(call)
            await call.future
        finally:
            self._leave(served.name)
        if call.error is not None:
            raise call.error
        return call

    async def drain(self) -> None:
        """Refuse new steps, answer the accepted ones, then close the store."""
        self.draining = True
        try:
            while any(self._waiting.values()):
                self._settled.clear()
                await self._settled.wait()
            for batcher in list(self._batchers.values()):
                await batcher.close()
        finally:  # also where the time for draining is over: acknowledged steps may wait to be written
            await self.store.close()


def _as_ours(error: Exception, otherwise: str) -> StepcastError:
    """The error itself if it is one for callers; else it is logged, and `otherwise` is said."""
    if isinstance(error, StepcastError):
        return error
    log.error("%s", otherwise, exc_info=error)
    return Internal(otherwise)


def _full(what: str, waiting: int, limit: int) -> QueueFull:
    return QueueFull(
        f"{what} has {waiting} steps waiting (limit {limit}). Retry after 0.05 s.",
        waiting=waiting,
        limit=limit,
        retry_after_s=0.05,
    )


def _goes_plainly(entry: Entry, served: Served, seq: int | None) -> bool:
    """Whether a session is hot, idle, of one example, on this version, and where the caller thinks it is."""
    record = entry.record
    return (
        record is not None
        and not entry.busy
        and entry.stored
        and entry.served is served
        and record.examples == 1
        and (seq is None or seq == record.step + 1)
    )
