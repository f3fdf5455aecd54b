"""Stepping: whose turn it is, which number a step gets, which batch it goes in, what becomes of it.

A session is a record in the store; this process keeps copies so that the steady path needs no read. A step is computed
on the copy and committed by one compare-and-set per batch: a copy that was stale is refused by the store, loaded again
and the step is computed again. So any replica may step any session, and nothing is applied twice.

A negative answer (a gap in seq, another N, a kept answer) is never given from a copy that may be stale: the record is
loaded first.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from stepcast.errors import SessionBusy, ShapeMismatch, StateVersionMismatch, StepcastError, StepConflict

from ..engine.batcher import Run, too_late
from ..engine.repository import Repository, Served
from ..records import record as records
from ..records.digest import same_payload
from ..records.layout import LAYOUT, BadRecord, facts
from ..records.record import Record
from ..settings import Settings
from ..store import Store
from ..telemetry import Metrics, as_ours, log
from .batch_steps import BatchSteps
from .cache import SessionCache
from .commit import Commits
from .core import NS_PER_MS, Address, Answers, Ask, Floats, Lane, Load, Mask, Session, Waiter, another_n
from .feed import Feed, is_next, step_there
from .lanes import Lanes, check_streams, full
from .quotas import Quotas
from .roster import Rosters
from .run import MaskedRun
from .stored import Ledger


class Sessions:
    """All sessions of a server. Everything runs on one event loop.

    Args:
        clock: Wall clock in ns, for created and used times.
    """

    def __init__(
        self,
        repository: Repository,
        store: Store,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.repository, self.store, self.settings, self.metrics = repository, store, settings, metrics
        self.ledger = Ledger(store, settings.ttl_s, lambda: clock() // NS_PER_MS, self._replaced)
        self._clock, self.quotas = clock, Quotas(store, settings)
        self._cache, self._rosters = SessionCache(settings.hot_bytes), Rosters()
        self._commits = Commits(store, self._cache, metrics, self._go_on)
        self._lanes = Lanes(settings, metrics, clock, self._commits.batch, self._commits.drop)
        self.digests = self._lanes.digests
        self.batch_steps = BatchSteps(repository, self._cache, self._rosters, self._lanes, settings, self.step)
        self._to_load: list[Session] = []
        self._tasks: set[asyncio.Future[None]] = set()

    @property
    def draining(self) -> bool:
        """Whether new steps are refused."""
        return self._lanes.draining

    def admit(self, model: str) -> None:
        """Raises QueueFull or Draining where no step of a model may come."""
        self._lanes.room(model, 1)

    def load(self, model: str) -> Load:
        """The steps of a model that wait."""
        return self._lanes.load(model)

    # --- taking steps -------------------------------------------------------------------------------------------

    def join(self, key: str, data: bytes, seq: int | None, waiter: Waiter) -> bool:
        """Queue a single step, if its session is ready and idle, and `seq` is the next number.

        Args:
            key: Of the session's address.
            data: The inputs, float32 [N,F] of the session's N, finite or NaN.
            seq: The number that the step shall have; None: the next.
            waiter: Gets the answer; it stays until then, its `done` is not asked.

        Returns:
            False: nothing was done; `step` takes it, or says why not.
        """
        session = self._cache.get(key)
        if session is None or session.busy or (seq is not None and seq != session.step + 1):
            return False
        lane, shape = session.lane, session.shape
        if lane is None or shape is None or len(data) != shape.input_bytes or lane.load.waiting >= lane.load.limit:
            return False
        lane.load.waiting += 1
        session.busy = True
        lane.joinable(time.monotonic()).add(session, data, seq, waiter, shape.examples)
        return True

    def feed(self, key: str, data: bytes, seq: int | None, feed: Feed) -> bool:
        """The same as `join` of a step that came from a source, if its position is the next too."""
        session = self._cache.get(key)
        if session is None or session.data is None or session.lane is None or not is_next(session.data, feed.position):
            return False
        session.lane.fed = True
        return self.join(key, data, seq, feed)

    def step(
        self,
        address: Address,
        x: Floats,
        mask: Mask | None,
        seq: int | None,
        waiter: Waiter,
        policy: str | None = None,
        named: Served | None = None,
        *,
        starts: bool = False,
        on: Served | None = None,
        within_s: float | None = None,
    ) -> None:
        """Queue a call of T steps behind those of its session that wait; the session may have to be loaded first.

        Args:
            x: (N, T, F) float32, finite or NaN, checked against the model.
            mask: (N, T) bool, False: this example's state stays as it is at this step; None: all True.
            seq: The number that the last step shall have; None: the next.
            policy: What to do if the session's version is not served: pin, reset, replay; None: the server's.
            named: The version by whose names the inputs were put in their places; None: they came without names.
            starts: The call takes the session back to step 0 and the initial state first, in the same commit. The same
                call again, with its `seq`, is a retry.
            on: The version that the session has to be on, or starts on; None: its own, or the live one.
            within_s: Longest time to wait for the run; None, or more than deadline_s: deadline_s.

        Raises:
            ModelNotFound, NotStreaming, QueueFull, Draining: refused at once. StepConflict: a call that starts has not
                the number of its steps. Other errors reach the waiter.
        """
        load = self._lanes.admit(on or self.repository.live(address.model), 1)
        if starts and seq not in (None, x.shape[1]):
            text = f"session {address.session!r} starts, so this call ends with step {x.shape[1]}, got seq {seq}"
            raise StepConflict(f"{text}. Send seq {x.shape[1]}.", seq=seq, expected_seq=x.shape[1])
        session, limit = self._cache.get(address.key), self.settings.session_queue_limit
        if session is None:
            session = self._cache.enter(address)
        elif session.roster is not None:
            session.roster.split()
        if len(session.queue) >= limit:
            raise full(f"session {address.session!r}", len(session.queue), limit)
        load.waiting += 1
        waits_s = self.settings.deadline_s if within_s is None else min(within_s, self.settings.deadline_s)
        session.queue.append(Ask(x, mask, seq, time.monotonic() + waits_s, waiter, policy, named, starts, on))
        if not session.busy:
            self._go_on(session)

    async def run(self, served: Served, x: Floats, mask: Mask | None, state: bytes) -> MaskedRun:
        """Run rows through a model that are of no session, in the same batches.

        Args:
            x: (N, T, F), T >= 1; mask: (N, T) or None; state: packed, of N rows.

        Returns:
            The finished run: `reply()` and `state`.

        Raises:
            NonFinite, DeadlineExceeded, QueueFull, Draining.
        """
        load, lane = self._lanes.room(served.name, 1), self._lanes.of(served)
        now, future = time.monotonic(), asyncio.get_running_loop().create_future()

        def ran(_: MaskedRun) -> None:
            if not future.done():
                future.set_result(None)

        run = MaskedRun(x, mask, state, now + self.settings.deadline_s, ran, future.done)
        load.waiting += 1
        try:
            if run.steps == 1 and run.lengths is None and served.manifest.streaming:
                batch = lane.joinable(now)
                batch.guests.append(run)
                batch.rows += run.rows
            else:
                lane.batcher.submit_run(run)
            await future
        finally:
            load.leave(1)
        if run.error is not None:
            raise run.error
        return run

    # --- turns --------------------------------------------------------------------------------------------------

    def _go_on(self, session: Session) -> None:
        """Start the oldest waiting call of an idle session; load the session first where its record is not known."""
        queue, session.busy = session.queue, False
        while queue:
            if session.data is None:
                session.busy = True
                self._load_soon(session)
                return
            ask = queue.pop(0)
            try:
                if ask.waiter.done() or ask.deadline < time.monotonic():
                    raise too_late()
                if self._decide(session, ask):
                    session.busy = True
                    return
            except Exception as error:
                self._refuse(session, ask, as_ours(error, "the step could not be started"))
        if session.roster is None and (session.data is None or not session.stored):
            self._cache.drop(session)  # nothing worth keeping: no session, or one in doubt
        self._cache.evict()

    def _decide(self, session: Session, ask: Ask) -> bool:
        """Let a call begin, or answer it from the record, or load the record first.

        Returns:
            Whether it has begun.

        Raises:
            StepcastError: refused.
        """
        missing = not session.stored and not ask.waiter.creates
        if session.data is None or (not ask.verified and (session.lane is None or ask.starts or missing)):
            return _load_again(session, ask)
        had = len(session.data) if session.stored else 0
        if ask.starts and not self._was_made(ask, session.data):
            self._restart(session, ask.on, session.data)
        elif missing:
            self.ledger.there(session.address, None)
        lane, data, shape = session.lane, session.data, session.shape
        if isinstance(ask.waiter, Feed) and not is_next(data, ask.waiter.position):
            return self._redelivered(session, ask, ask.waiter, data) if ask.verified else _load_again(session, ask)
        if lane is None or shape is None:
            return self._move(session, ask, records.decode(data))
        rows, steps, features = ask.x.shape
        takes = lane.served.n_features
        if features != takes:  # the door looked at the live version
            made_by = f"version {lane.version} of model {lane.served.name!r}, which takes {takes}"
            text = f"inputs have {features} features, session {session.address.session!r} is on {made_by}"
            raise ShapeMismatch(text, got=features, features=takes, version=lane.version)
        if ask.on not in (None, lane.served):
            text = f"session {session.address.session!r} is on version {lane.version}, not {ask.on and ask.on.version}"
            raise StateVersionMismatch(f"{text}. Leave the version out, or start anew.", version=lane.version)
        if ask.named is not None and ask.named.names != lane.served.names:  # the same, or the session was moved since
            text = f"session {session.address.session!r} is on version {lane.version}, whose names are others than"
            raise ShapeMismatch(f"{text} version {ask.named.version}'s. Send the step alone.", version=lane.version)
        examples, numbered = shape.examples, ask.seq is None or ask.seq == session.step + steps
        if examples in (0, rows) and numbered:
            if not examples:
                self._open(session, lane, data, rows, had)
            self._begin(session, lane, ask)
            return True
        if not ask.verified:
            return _load_again(session, ask)
        if not numbered:
            self._repeat(session, lane, ask, data)
            return False
        raise another_n(session.address, examples, rows)

    def _was_made(self, ask: Ask, data: bytes) -> bool:
        """Whether a numbered call that starts a session is a retry: its answer is kept."""
        kept = None if ask.seq is None else records.decode(data).answer(ask.seq)
        return kept is not None and same_payload(kept, self.digests.call(ask.x, ask.mask), ask.x, ask.mask)

    def _restart(self, session: Session, on: Served | None, data: bytes) -> None:
        """Take a session back to its start, as long as the call does not fail: the store has its old record."""
        served = on or self.repository.live(session.address.model)
        session.take(records.restarted(data, served.version, served.fingerprint), self._lanes.of(served))
        session.stored = False

    def _open(self, session: Session, lane: Lane, data: bytes, rows: int, had: int) -> None:
        """Give a session that has no state the initial one of so many rows; TooLarge or QuotaExceeded.

        Args:
            had: Bytes of the record that the store has; 0: it has none.
        """
        size = len(data) + rows * lane.served.manifest.state_row_bytes
        self.quotas.check(session.address.session, size)
        self.quotas.take(session.address.namespace, int(not had), size - had)
        session.take(records.opened(data, rows, lane.served.runtime.initial(rows)), lane)

    def _begin(self, session: Session, lane: Lane, ask: Ask) -> None:
        """Let a call join a batch; one of several steps, or with a mask, runs by itself."""
        if isinstance(ask.waiter, Feed):
            lane.fed = True
        if ask.x.shape[1] == 1 and ask.mask is None:
            batch = lane.joinable(time.monotonic())
            batch.steps.asks[len(batch.steps.sessions)] = ask
            batch.add(session, ask.x.tobytes(), ask.seq, ask.waiter, len(ask.x))
            return
        session.used = True
        then = partial(self._commits.call, session, lane, ask)
        lane.batcher.submit_run(MaskedRun(ask.x, ask.mask, session.state(), ask.deadline, then, ask.waiter.done))

    def _repeat(self, session: Session, lane: Lane, ask: Ask, data: bytes) -> None:
        """Answer a call whose number was used: by the kept answer of the same payload.

        Raises:
            StepConflict: there is none.
        """
        kept = records.decode(data).answer(ask.seq or 0)
        if kept is not None and same_payload(kept, self.digests.call(ask.x, ask.mask), ask.x, ask.mask):
            outputs = np.frombuffer(kept.outputs, np.float32).reshape(1, len(ask.x), kept.steps, -1)
            self._commits.repeat(lane.load, session, ask.waiter, Answers(outputs, facts(data).version), kept.seq)
            return
        expected, name = session.step + ask.x.shape[1], session.address.session
        what = "another payload" if kept else "a gap" if (ask.seq or 0) > expected else "no kept answer"
        if not session.stored and not session.step:
            text = f"session {name!r} does not exist (never created, ended or expired), got seq {ask.seq}"
        else:
            text = f"session {name!r} is at step {session.step}, got seq {ask.seq} with {what}"
        raise StepConflict(
            f"{text}. Send seq {expected}.", session=name, step=session.step, seq=ask.seq, expected_seq=expected
        )

    def _redelivered(self, session: Session, ask: Ask, feed: Feed, data: bytes) -> bool:
        """Answer a call that a source gives again; False: no call has begun.

        Raises:
            SourceConflict: the session is fed from another source.
        """
        answers, step = None, step_there(data, feed.position, session.address)
        record = records.decode(data)
        kept = record.answer(step) if step else None
        if kept is not None:
            outputs = np.frombuffer(kept.outputs, np.float32).reshape(1, record.examples, kept.steps, -1)
            answers = Answers(outputs, record.version)
        self._commits.redelivered(self._lanes.load(session.address.model), session, feed, answers, step)
        return False

    def _refuse(self, session: Session, ask: Ask, error: BaseException) -> None:
        self._commits.refuse(self._lanes.load(session.address.model), session, ask.waiter, error)

    # --- loading ------------------------------------------------------------------------------------------------

    def _load_soon(self, session: Session) -> None:
        for ask in session.queue:
            ask.verified = True  # the load is made after these calls came
        if not self._to_load:
            task = asyncio.ensure_future(self._load())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._to_load.append(session)

    async def _load(self) -> None:
        """Load what is to be loaded, each group of the store by itself."""
        sessions, self._to_load = self._to_load, []
        groups = self.store.apart([session.key for session in sessions])
        await asyncio.gather(*(self._load_all([sessions[place] for place in group]) for group in groups))

    async def _load_all(self, sessions: list[Session]) -> None:
        try:
            found = await self.store.load([session.key for session in sessions])
        except Exception as error:
            refusal = as_ours(error, "the session could not be loaded")
            for session in sessions:
                self._refuse_all(session, refusal)
            return
        now_ms = self._clock() // NS_PER_MS
        for session, data in zip(sessions, found, strict=True):
            try:
                self._loaded(session, data, now_ms)
            except BadRecord as error:
                log.error("session %s: %s", session.key, error)
                text = f"the stored session cannot be read by this server: {error}"
                self._refuse_all(session, SessionBusy(text))
            except Exception as error:
                self._refuse_all(session, as_ours(error, "the session could not be loaded"))

    def _loaded(self, session: Session, data: bytes | None, now_ms: int) -> None:
        """Keep what the store has of a session, and let it go on."""
        session.stored = data is not None
        if data is None:
            live = self.repository.live(session.address.model)
            session.take(records.blank(live.version, live.fingerprint, now_ms), self._lanes.of(live))
        else:
            if data[:1] != bytes([LAYOUT]):
                data = records.decode(data).encode()  # an older layout; the token stays
            found = facts(data)
            served = self.repository.get(session.address.model, found.version)
            fits = served is not None and served.fingerprint == found.fingerprint
            session.take(data, self._lanes.of(served) if served is not None and fits else None, found)
        self._cache.measure(session, len(data or b""))
        self._go_on(session)

    def _refuse_all(self, session: Session, error: StepcastError) -> None:
        session.forget()
        waiting, session.queue = session.queue, []
        session.busy = False
        for ask in waiting:
            self._refuse(session, ask, error)
        self._cache.drop(session)

    def _replaced(self, key: str) -> None:
        """A session was written not by a step: an idle copy is let go (a busy one will be refused)."""
        session = self._cache.get(key)
        if session is not None:
            self._cache.drop(session)

    # --- versions -----------------------------------------------------------------------------------------------

    def _move(self, session: Session, ask: Ask, record: Record) -> bool:
        """What the version policy says of a session whose version is not served; then decide on the call.

        "reset" starts from the initial state; "replay" runs the kept inputs through the live version, which is exact
        where these are all inputs since the state was initial.

        Raises:
            StateVersionMismatch: the policy is "pin", or there is nothing to replay.
        """
        live, policy = self.repository.live(session.address.model), ask.policy or self.settings.version_policy
        check_streams(live)
        if policy == "pin" or (policy == "replay" and not _replayable(record, live)):
            raise self.version_mismatch(session.address, record)
        state = live.runtime.initial(record.examples)

        def moved(state: bytes) -> None:
            lane = self._lanes.of(live)
            session.take(
                replace(record, version=live.version, fingerprint=live.fingerprint, state=state).encode(), lane
            )
            log.info("session %s moved from version %s to %s by %s", session.key, record.version, live.version, policy)

        def replayed(run: Run) -> None:
            if run.error is None:
                moved(run.state)
                session.queue.insert(0, ask)
            else:
                self._refuse(session, ask, run.error)
            self._go_on(session)

        if policy == "replay" and record.examples:
            x = np.frombuffer(record.inputs, np.float32).reshape(1, -1, live.n_features)
            self._lanes.of(live).batcher.submit_run(Run(x, None, state, ask.deadline, replayed, ask.waiter.done))
            return True
        moved(state)
        return self._decide(session, ask)

    def version_mismatch(self, address: Address, record: Record) -> StateVersionMismatch:
        """The error for a session whose model version is not served."""
        versions = self.repository.versions(address.model)
        text = f"a state of version {record.version}, which is not served (there are {versions})"
        advice = "Clear the state to go on with the live version."
        said = {"session": address.session, "version": record.version, "versions": versions}
        return StateVersionMismatch(f"session {address.session!r} has {text}. {advice}", **said)

    def retired(self, served: Served) -> None:
        """A version is not served any more: sessions that are kept ready ask again which one is theirs."""
        self._rosters.retire(served)
        for session in self._cache:
            if session.lane is not None and session.lane.served is served:
                session.lane = session.shape = None
        self._lanes.retire(served)

    # --- life ---------------------------------------------------------------------------------------------------

    def gauge(self) -> None:
        """Bring the metrics up to date; called when they are read."""
        self.metrics.waiting.set(self._lanes.count())
        self.metrics.hot.set(len(self._cache))
        self.metrics.hot_bytes.set(self._cache.bytes)

    def runs(self, served: Served) -> int:
        """How many runs a version has made since it is served."""
        return self._lanes.of(served).batcher.runs

    async def drain(self) -> None:
        """Refuse new steps, answer the accepted ones, then close the store."""
        try:
            await self._lanes.drain()
        finally:  # also where the time for draining is over: acknowledged steps may wait to be written
            await self.store.close()


def _replayable(record: Record, live: Served) -> bool:
    """Whether a session can be rebuilt: it has no state yet, or a log of one example that can be the model's inputs."""
    steps, rest = divmod(len(record.inputs), 4 * live.n_features)
    return not record.examples or (record.examples == 1 and not rest and 0 < steps <= record.step)


def _load_again(session: Session, ask: Ask) -> bool:
    """Let a call be decided on the store's record, not on a copy."""
    session.queue.insert(0, ask)
    session.forget()
    return False
