"""Gathers concurrent jobs into few runs; bounded; knows no model and no session.

The rule: whatever arrived while the last run was busy goes together into the next one. No timers, so a lone caller
waits for nobody. Single steps go before long sequences; a long sequence runs in chunks, single steps in between.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from stepcast.errors import DeadlineExceeded, Internal, StepcastError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Lengths = npt.NDArray[np.int32]
Run = Callable[[Floats, Lengths | None, Bytes], tuple[Floats, Bytes]]

log = logging.getLogger("stepcast.batcher")

UNFINISHED_RUNS: Final = 2
"""Batches that may wait for `finish` (their commit) while the next one runs; more would only make batches small."""

CROSSED_SHARE: Final = 0.125
"""Of a chunk's time, where single steps come in between: those that come meanwhile wait for its end."""

REST_S: Final = 0.002
"""How long chunks stop then, even if nothing else is to be done: else every single step would find one under way."""

FULL_ROWS: Final = 16
"""Runs of this many single steps and more tell what one row costs; in smaller ones the fixed cost hides it."""


class Job:
    """N rows that advance together by up to T steps.

    Args:
        x: (N, T, F) float32.
        lengths: (N,) int32 valid steps per row, None: all T.
        state: Packed state of the N rows.
        deadline: Monotonic time (s) after which the job is not run any more.

    After the run: `outputs` (N, T, O) float32 and `state`, or `error`.
    """

    whole = False
    """Whether the job is a run of its own: `begin` says that its time has come, `go` makes it, once."""

    __slots__ = ("at", "deadline", "error", "features", "lengths", "outputs", "parts", "rows", "state", "steps", "x")

    def __init__(self, x: Floats, lengths: Lengths | None, state: bytes, deadline: float) -> None:
        self.x = x
        self.lengths = lengths
        self.state = state
        self.deadline = deadline
        self.rows, self.steps, self.features = x.shape
        self.at = 0
        self.parts: list[Floats] = []
        self.outputs: Floats | None = None
        self.error: StepcastError | None = None

    def abandoned(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return False

    def count(self) -> int:
        """Rows so far; others may join a whole job until it begins."""
        rows: int = self.rows
        return rows

    def begin(self) -> None:
        """The job was taken from the queue."""

    def go(self) -> None:
        """Run by itself; nothing changes if that raises."""
        raise TypeError(f"{type(self).__name__} is no run of its own")


J = TypeVar("J", bound=Job)


class Batcher(Generic[J]):
    """Runs jobs of one model, many at a time.

    Args:
        run: (x (B,T,F), lengths (B,) or None, states (B,S) uint8) -> (y (B,T,O), new states). Called from the event
            loop or from one thread, never twice at once.
        finish: Takes the jobs of a run in order, done or failed; what it returns is awaited before more than
            UNFINISHED_RUNS batches are under way.
        observe: Takes rows and seconds of each run.
        batch_rows: Most rows in one run (a larger job runs alone).
        chunk_s: About how long a chunk of a long sequence may take, and an eighth of it while single steps come in
            between; None: sequences can not be cut.
        inline_s: Runs expected to take longer are made in a thread, so that the event loop stays free.
    """

    def __init__(
        self,
        run: Run,
        finish: Callable[[list[J]], Awaitable[object] | None],
        observe: Callable[[int, float], None],
        *,
        batch_rows: int,
        chunk_s: float | None,
        inline_s: float,
    ) -> None:
        self._run, self._finish, self._observe = run, finish, observe
        self._batch_rows, self._chunk_s, self._inline_s = batch_rows, chunk_s, inline_s
        self._short: deque[J] = deque()
        self._long: deque[J] = deque()
        self._task: asyncio.Task[None] | None = None
        self._called = False  # `_look` is about to be
        self._crossed = False  # single steps ran since the last chunk
        self._rest: asyncio.TimerHandle | None = None  # no chunk until then
        self._closing = False
        self._unfinished: set[asyncio.Future[object]] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._run_s = 50e-6  # moving averages: a run's fixed cost is not told apart from its cells'
        self._row_s = 10e-6
        self._cell_s = 20e-6

    def submit(self, job: J) -> None:
        """Queue a job; it is handed to `finish` exactly once."""
        (self._short if job.steps == 1 else self._long).append(job)
        self._look_soon()

    async def close(self) -> None:
        """Wait until every queued job has been finished."""
        self._closing = True
        if self._rest is not None:
            self._rest.cancel()
            self._rested()
        while self._called or self._task is not None or self._unfinished:
            waiting = {t for t in (self._task, *self._unfinished) if t is not None}
            if waiting:
                await asyncio.wait(waiting)
            else:
                await asyncio.sleep(0)
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _look(self) -> None:
        """Make a short run at once, without a task; where there is more to it, let a task do it."""
        self._called = False
        if not self._ready():
            return
        loop, job = asyncio.get_running_loop(), self._short[0] if self._short else None
        chunks = bool(self._long) and self._rest is None
        if job is None or chunks or not job.whole or not self._may_run(job.count()):
            self._task = loop.create_task(self._work())
            return
        jobs = self._take(self._short)
        if jobs:
            self._crossed = True
            self._done(jobs, 1, self._timed(jobs, 1))
        self._look_soon()

    def _ready(self) -> bool:
        """Whether there is anything to run now."""
        return bool(self._short) or (bool(self._long) and self._rest is None)

    def _look_soon(self) -> None:
        if self._task is None and not self._called and self._ready():
            self._called = True
            asyncio.get_running_loop().call_soon(self._look)

    def _rested(self) -> None:
        """Chunks may go on."""
        self._rest = None
        self._look_soon()

    def _may_run(self, rows: int) -> bool:
        """Whether single steps of that many rows may run now, on the event loop."""
        return len(self._unfinished) < UNFINISHED_RUNS and self._expected_s(rows, 1) <= self._inline_s

    async def _work(self) -> None:
        try:
            while self._ready():
                while len(self._unfinished) >= UNFINISHED_RUNS:
                    await asyncio.wait(self._unfinished, return_when=asyncio.FIRST_COMPLETED)
                if self._short:
                    jobs = self._take(self._short)
                    if jobs:
                        self._crossed = True
                        await self._round(jobs, 1)
                if self._long and self._rest is None:
                    await self._long_round()
                await asyncio.sleep(0)  # sockets are read and answers written between runs
        finally:
            self._task = None
            self._look_soon()

    def _take(self, queue: deque[J]) -> list[J]:
        """The oldest jobs that fit into one run; expired and abandoned ones are finished at once."""
        now, rows = time.monotonic(), 0
        jobs: list[J] = []
        gone: list[J] = []
        while queue and (not jobs or (not queue[0].whole and rows + queue[0].rows <= self._batch_rows)):
            job = queue.popleft()
            job.begin()
            if job.at == 0 and (job.deadline < now or job.abandoned()):
                job.error = DeadlineExceeded("the step waited longer than its deadline for its run; it was not applied")
                gone.append(job)
            else:
                jobs.append(job)
                rows += job.rows
                if job.whole:
                    break
        if gone:
            self._finished(gone)
        return jobs

    async def _long_round(self) -> None:
        jobs = self._take(self._long)
        if not jobs:
            return
        longest = max(job.steps - job.at for job in jobs)
        rows = sum(job.rows for job in jobs)
        chunk = longest
        if self._chunk_s is not None:
            chunk_s = self._chunk_s * (CROSSED_SHARE if self._crossed else 1.0)
            chunk = min(longest, max(1, int(chunk_s / (self._cell_s * rows))))
        crossed, self._crossed = self._crossed, False
        await self._round(jobs, chunk)
        if crossed and self._long and not self._closing:
            self._rest = asyncio.get_running_loop().call_later(REST_S, self._rested)

    async def _round(self, jobs: list[J], chunk: int) -> None:
        """Run jobs by up to `chunk` steps; those that are done go to `finish`, the rest to the queue's end."""
        rows = sum(job.rows for job in jobs)
        if self._expected_s(rows, chunk) <= self._inline_s:
            busy = self._timed(jobs, chunk)
        else:
            busy = await asyncio.get_running_loop().run_in_executor(self._executor(), self._timed, jobs, chunk)
        self._done(jobs, chunk, busy)

    def _done(self, jobs: list[J], chunk: int, busy: float) -> None:
        """After a run: learn from it, finish the jobs that are done and queue the others."""
        rows = jobs[0].rows if len(jobs) == 1 else sum(job.rows for job in jobs)
        self._learn(rows, chunk, busy)
        self._observe(rows, busy)
        done = jobs
        if chunk > 1 or jobs[0].steps > 1:
            done = [job for job in jobs if job.error is not None or job.at >= job.steps]
            self._long.extend(job for job in jobs if job.error is None and job.at < job.steps)
        if done:
            self._finished(done)

    def _expected_s(self, rows: int, steps: int) -> float:
        if steps > 1:
            return rows * steps * self._cell_s
        return max(self._run_s, rows * self._row_s)

    def _learn(self, rows: int, steps: int, busy: float) -> None:
        if steps == 1:
            self._run_s = _nearer(self._run_s, busy)
            if rows >= FULL_ROWS:
                self._row_s = _nearer(self._row_s, busy / rows)
        else:
            self._cell_s = _nearer(self._cell_s, busy / (rows * steps))

    def _timed(self, jobs: Sequence[J], chunk: int) -> float:
        """Run; the seconds it took."""
        started = time.perf_counter()
        if jobs[0].whole:
            self._go(jobs[0])
        else:
            self._advance(jobs, chunk)
        return time.perf_counter() - started

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="stepcast-run")
        return self._pool

    def _finished(self, jobs: list[J]) -> None:
        waits = self._finish(jobs)
        if waits is not None:
            task = asyncio.ensure_future(waits)
            self._unfinished.add(task)
            task.add_done_callback(self._unfinished.discard)

    def _go(self, job: J) -> None:
        try:
            job.go()
        except Exception as error:
            job.error = _as_ours(error)

    def _advance(self, jobs: Sequence[J], chunk: int) -> None:
        """Run; where a batch fails, run its jobs alone, so that only the guilty one fails."""
        try:
            advance(self._run, jobs, chunk)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].error = _as_ours(error)
                return
            for job in jobs:
                self._advance([job], chunk)


def _nearer(average: float, seen: float) -> float:
    """A moving average that believes a short time sooner than a long one, which other processes may have caused.

    (The thread's processor time would be the measure, but asking for it can take as long as a small run.)
    """
    return average + (0.3 if seen < average else 0.05) * (seen - average)


def _as_ours(error: Exception) -> StepcastError:
    if isinstance(error, StepcastError):
        return error
    log.error("a run failed", exc_info=error)
    return Internal(f"the model could not be run: {type(error).__name__}")


def advance(run: Run, jobs: Sequence[Job], chunk: int) -> None:
    """One run of several jobs by up to `chunk` steps: gather, run, scatter. Nothing changes if the run raises."""
    first = jobs[0]
    if len(jobs) == 1 and first.steps <= chunk:
        x, lengths, takes = first.x, first.lengths, [first.steps]
    else:
        x, lengths, takes = _gather(jobs, chunk)
    rows = len(x)
    states = _joined(jobs, rows)
    y, new = run(x, lengths, states)
    at = 0
    for job, take in zip(jobs, takes, strict=True):
        part = y[at : at + job.rows, :take]
        job.state = new[at : at + job.rows].tobytes()
        at += job.rows
        job.at += take
        if job.steps == take:
            job.outputs = part
            continue
        job.parts.append(part)
        if job.at >= job.steps:
            job.outputs = np.concatenate(job.parts, axis=1)


def _joined(jobs: Sequence[Job], rows: int) -> Bytes:
    """The jobs' states (rows, S)."""
    return np.frombuffer(b"".join([job.state for job in jobs]), np.uint8).reshape(rows, -1)


def _gather(jobs: Sequence[Job], chunk: int) -> tuple[Floats, Lengths | None, list[int]]:
    """Stack the next up to `chunk` steps of all jobs, padded on the right."""
    takes = [min(chunk, job.steps - job.at) for job in jobs]
    longest = max(takes)
    if longest == 1 and all(job.lengths is None and job.steps == 1 for job in jobs):
        return np.concatenate([job.x for job in jobs]), None, takes
    rows = sum(job.rows for job in jobs)
    x = np.zeros((rows, longest, jobs[0].x.shape[2]), np.float32)
    lengths = np.empty(rows, np.int32)
    at = 0
    for job, take in zip(jobs, takes, strict=True):
        x[at : at + job.rows, :take] = job.x[:, job.at : job.at + take]
        lengths[at : at + job.rows] = take if job.lengths is None else np.clip(job.lengths - job.at, 0, take)
        at += job.rows
    return x, lengths, takes
