"""The life of a session: open, step in order, get, set, clear, fork, rewind, roll out, expire.

A session is a record in the store; this process keeps hot copies so that the steady path needs no read. A step is
computed on the hot copy and committed by one compare-and-set per batch: a copy that was stale is refused by the store,
loaded again and the step is computed again. So any replica may step any session, and nothing is applied twice.

A negative answer (a gap in seq, another N, a kept answer) is never given from a hot copy that may be stale: the record
is loaded first.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from stepcast.errors import (
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

from ..engine.batcher import Batcher, Job
from ..engine.repository import Repository, Served
from ..records import block as sheet
from ..records import record as records
from ..records.record import Record
from ..settings import Settings
from ..store import Store, Write
from ..telemetry import Metrics, as_ours, log
from .cache import HotSessions
from .columns import Column, Load, Track, Waiter
from .core import Address, Call, Entry, Floats, Mask, SingleStep, Step, StepAnswer
from .express import Express
from .stored import Ledger
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
        self.express = Express(self, self._hot, store, settings, metrics, clock)
        self.join = self.express.join
        self._tracks: dict[tuple[str, int], Track] = {}
        self._loads: dict[str, Load] = {}
        self._to_load: list[Entry] = []
        self._loading: set[asyncio.Task[None]] = set()
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
        policy: str | None = None,
    ) -> "asyncio.Future[StepAnswer]":
        """Queue a step call; the future has its answer once it is committed.

        Calls of one session are applied in the order of these calls. A future that is cancelled before its run
        is made leaves the session as it was.

        Args:
            x: (N, T, F) float32, finite or NaN, checked against the model.
            mask: (N, T) bool, False: this example's state stays as it is at this step; None: all True.
            digest: DIGEST_BYTES that name the payload.
            seq: The number that the last step of the call shall have.
            policy: What to do where the session's version is not served: pin, reset, replay; None: the server's.

        Raises:
            ModelNotFound, NotStreaming, QueueFull, Draining: refused at once. Other errors come through the future.
        """
        entry, deadline = self._enter(address, deadline_s)
        future: asyncio.Future[StepAnswer] = asyncio.get_running_loop().create_future()
        self._queue(Step(entry, x, mask, digest, seq, deadline, future, policy))
        return future

    def single_step(self, address: Address, data: bytes, seq: int | None, waiter: Waiter) -> None:
        """Queue a step of one example by one step, as `step` does.

        Args:
            data: The inputs, float32 and finite, as many as the live version takes.
            waiter: Gets the answer.
        """
        if not self.join(address.key, data, seq, waiter):
            entry, deadline = self._enter(address, None)
            self._queue(SingleStep(entry, data, seq, deadline, waiter))

    def _enter(self, address: Address, deadline_s: float | None) -> tuple[Entry, float]:
        """The session's entry, and when its call must have begun; raises where the call can not be queued."""
        served = self.repository.live(address.model)
        if not served.manifest.streaming:
            self.check_streams(served)
        limits, model = self.settings, address.model
        entry = self._hot.get(address.key)
        waiting = self._load_of(model).waiting
        if waiting >= limits.queue_limit:
            raise _full(f"model {model!r}", waiting, limits.queue_limit)
        if entry is not None and len(entry.queue) >= limits.session_queue_limit:
            raise _full(f"session {address.session!r}", len(entry.queue), limits.session_queue_limit)
        if self.draining:
            raise Draining("the server is shutting down. Connect again.", retry_after_s=1.0)
        if entry is None:
            entry = self._hot.enter(address)
        elif entry.cohort is not None:
            entry.cohort.dissolve()
        return entry, time.monotonic() + (deadline_s or limits.deadline_s)

    def _queue(self, step: Step) -> None:
        entry = step.entry
        entry.queue.append(step)
        self._load_of(entry.address.model).waiting += 1
        if not entry.busy:
            self.go_on(entry)

    def check_streams(self, served: Served) -> None:
        """Raises NotStreaming where the model can not be stepped."""
        if not served.manifest.streaming:
            raise NotStreaming(
                f"model {served.name!r} version {served.version} reads sequences from both ends. Use predict.",
                model=served.name,
            )

    def settle(self, step: Step, answer: StepAnswer | None, error: StepcastError | None = None) -> None:
        """Answer or refuse a call that has left its queue; every call comes here once."""
        self.leave(step.entry.address.model)
        if step.future.done():
            return
        try:
            if answer is not None:
                step.future.set_result(answer)
            elif error is not None:
                step.future.set_exception(error)
        except Exception:  # what stands for a future writes to a socket: others of the batch must not suffer
            log.exception("an answer for session %s could not be given", step.entry.key)

    def leave(self, model: str, count: int = 1) -> None:
        """That many calls wait no longer."""
        self._load_of(model).waiting -= count
        if self.draining:
            self._settled.set()

    def _replaced(self, key: str) -> None:
        """A session was written not by a step: an idle hot copy is let go (a busy one will be refused)."""
        entry = self._hot.get(key)
        if entry is not None:
            self._hot.drop(entry)

    def go_on(self, entry: Entry) -> None:
        """Start the oldest waiting call of an idle session."""
        entry.busy = False
        while entry.queue:
            step = entry.queue[0]
            if not entry.known and not step.abandoned():
                entry.busy = True
                self._load_soon(entry)
                return
            del entry.queue[0]
            if step.abandoned():
                self.settle(step, None)
            elif self._start(entry, step):
                entry.busy = True
                return
        if not entry.known or not entry.stored:  # nothing worth keeping: no session, or one in doubt
            self._hot.drop(entry)
        self._hot.evict()

    def _start(self, entry: Entry, step: Step) -> bool:
        """Decide on a call. True: it is on its way; False: the next one may go on."""
        if isinstance(step, SingleStep) and not step.alone and self.join(entry.key, step.data, step.seq, step.future):
            self.leave(entry.address.model)  # counted by the column now
            entry.used = False  # by this call alone: it has just been loaded, or is known to be used by the next one
            return True
        try:
            assert entry.record is not None
            decided = self._admit(entry, entry.record, step)
        except Exception as error:
            self.settle(step, None, as_ours(error, "the step could not be started"))
            return False
        if isinstance(decided, StepAnswer):
            self.metrics.retries.labels(entry.address.model).inc()
            self.settle(step, decided)
            return False
        if decided is None:  # decide on the store's record, not on a copy
            entry.queue.insert(0, step)
            entry.keep(None)
            return False
        entry.used = True
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
                served, record = self._moved(entry, record, step.policy or self.settings.version_policy)
            entry.served, entry.batcher = served, self.track(served).batcher
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

    def _moved(self, entry: Entry, record: Record, policy: str) -> tuple[Served, Record]:
        """What the version policy says of a session whose version is not served."""
        live = self.repository.live(entry.address.model)
        if policy == "pin" or (policy == "replay" and not replayable(record, live)):
            raise self.version_mismatch(entry.address, record)
        moved = migrated(record, live, policy)
        entry.keep(None, moved)
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

    def _load_of(self, model: str) -> Load:
        load = self._loads.get(model)
        if load is None:
            load = self._loads[model] = Load()
        return load

    def track(self, served: Served) -> Track:
        """Where the single steps of a served version go."""
        track = self._tracks.get((served.name, served.version))
        if track is None:
            track = Track(served, self._batcher(served), self._load_of(served.name))
            self._tracks[served.name, served.version] = track
        return track

    def _batcher(self, served: Served) -> Batcher[Job]:
        rows = self.metrics.batch_rows.of(served.name)
        seconds = self.metrics.run_seconds.of(served.name)

        def observe(batch: int, took: float) -> None:
            rows.observe(batch)
            seconds.observe(took)

        return Batcher(
            served.runtime.run,
            self._finish,
            observe,
            batch_rows=self.settings.batch_rows,
            chunk_s=self.settings.chunk_s if served.manifest.streaming else None,
            inline_s=self.settings.inline_s if served.runtime.device == "cpu" else -1.0,
        )

    # --- committing ---------------------------------------------------------------------------------------------

    def _finish(self, jobs: list[Job]) -> Awaitable[object] | None:
        """Take what a run made: calls beside the sessions are answered, steps are committed first."""
        if len(jobs) == 1 and isinstance(jobs[0], Column):
            return self.express.finish(jobs[0])
        steps: list[Step] = []
        waits: list[Awaitable[None]] = []
        for job in jobs:
            if isinstance(job, Step):
                steps.append(job)
            elif isinstance(job, Column):  # one that expired, beside others that did
                self.express.finish(job)
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
            refusal = as_ours(error, "the step could not be stored")
            for step in ready:
                self._forget(step.entry)
                self._fail(step, refusal)
            return
        self.metrics.commit_seconds.observe(time.perf_counter() - started)
        self._count(ready, applied)
        for step, write, ok in zip(ready, writes, applied, strict=True):
            if ok:
                self._committed(step, write.record)
            else:
                self._again(step)

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
        return Write(entry.key, expect, step.next.encode(), self.ledger.ttl_s(record), None, touch)

    def _logged(self, record: Record, step: Step) -> bytes:
        """The input log after this step; it is exact for one example without masks, others are not kept."""
        if step.rows != 1 or step.mask is not None:
            return b""
        row = step.features * 4
        return (record.inputs + step.x.tobytes())[-self.settings.log_steps * row :]

    def _committed(self, step: Step, data: bytes | None) -> None:
        entry, record = step.entry, step.next
        assert record is not None
        assert step.answer is not None
        entry.stored = True
        entry.keep(data, record)
        self._find_track(entry)
        self._hot.measure(entry, len(data or b""))
        self.settle(step, StepAnswer(step.answer, record.step, record.version))
        self.go_on(entry)

    def _find_track(self, entry: Entry) -> None:
        """Let the session's single steps join columns, where its record is of the plainest kind."""
        if entry.data is None or self.settings.log_steps:
            return
        served = entry.served or self.repository.get(entry.address.model, sheet.version(entry.data))
        if served is None or not served.manifest.streaming:
            return
        track = self.track(served)
        found = sheet.fits(entry.data, served.fingerprint, served.version, track.state_bytes, track.output_bytes)
        if found is not None:
            entry.step, ttl_s = found
            entry.ttl_s = self.ledger.seconds(ttl_s)
            entry.served, entry.batcher, entry.track = served, track.batcher, track

    def _again(self, step: Step) -> None:
        """Another writer was first: load the record and compute again."""
        entry = step.entry
        self.metrics.conflicts.labels(entry.address.model).inc()
        self._forget(entry)
        entry.queue.insert(0, step)
        self.go_on(entry)

    def _fail(self, step: Step, error: StepcastError) -> None:
        self.settle(step, None, error)
        self.go_on(step.entry)

    def _forget(self, entry: Entry) -> None:
        """Whether a write was applied is unknown: the next call loads."""
        entry.keep(None)
        entry.served = None

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
            refusal = as_ours(error, "the session could not be loaded")
            for entry in entries:
                self._refuse_all(entry, refusal)
            return
        for entry, data in zip(entries, found, strict=True):
            try:
                self._loaded(entry, data)
            except Exception as error:
                self._refuse_all(entry, as_ours(error, "the session could not be loaded"))

    def _loaded(self, entry: Entry, data: bytes | None) -> None:
        entry.served, entry.stored = None, data is not None
        if data is None:
            entry.keep(None, self._blank(entry))
        else:
            entry.keep(data)
            self._find_track(entry)
            if entry.track is None:
                entry.keep(data, self.ledger.decode(entry.key, data))
        self._hot.measure(entry, len(data or b""))
        self.go_on(entry)

    def _blank(self, entry: Entry) -> Record:
        served = self.repository.live(entry.address.model)
        return records.new_record(served.version, served.fingerprint, clock=self._clock)

    def _refuse_all(self, entry: Entry, error: StepcastError) -> None:
        entry.keep(None)
        waiting, entry.queue = entry.queue, []
        entry.busy = False
        for step in waiting:
            self.settle(step, None, error)
        self._hot.drop(entry)

    def gauge(self) -> None:
        """Bring the gauges up to date; called when metrics are read."""
        for track in self._tracks.values():
            made, track.made = track.made, 0
            self.metrics.calls.labels(track.served.name).inc(made)
            self.metrics.steps.labels(track.served.name).inc(made)
        self.metrics.waiting.set(sum(load.waiting for load in self._loads.values()))
        self.metrics.hot.set(len(self._hot))
        self.metrics.hot_bytes.set(self._hot.bytes)

    def retired(self, served: Served) -> None:
        """A version is not served any more: hot sessions ask anew which one is theirs."""
        for entry in self._hot:
            if entry.served is served:
                if entry.cohort is not None:
                    entry.cohort.dissolve()
                entry.served = entry.track = None

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
        load = self._load_of(served.name)
        waiting = load.waiting
        if waiting >= self.settings.queue_limit:
            raise _full(f"model {served.name!r}", waiting, self.settings.queue_limit)
        if self.draining:
            raise Draining("the server is shutting down. Connect again.", retry_after_s=1.0)
        deadline = time.monotonic() + self.settings.deadline_s
        call = Call(x, mask, state, deadline, asyncio.get_running_loop().create_future())
        load.waiting += 1
        try:
            self.track(served).batcher.submit(call)
            await call.future
        finally:
            self.leave(served.name)
        if call.error is not None:
            raise call.error
        return call

    async def drain(self) -> None:
        """Refuse new steps, answer the accepted ones, then close the store."""
        self.draining = True
        try:
            while any(load.waiting for load in self._loads.values()):
                self._settled.clear()
                await self._settled.wait()
            for track in list(self._tracks.values()):
                await track.batcher.close()
        finally:  # also where the time for draining is over: acknowledged steps may wait to be written
            await self.store.close()


def _full(what: str, waiting: int, limit: int) -> QueueFull:
    return QueueFull(
        f"{what} has {waiting} steps waiting (limit {limit}). Retry after 0.05 s.",
        waiting=waiting,
        limit=limit,
        retry_after_s=0.05,
    )
