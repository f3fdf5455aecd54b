"""Gathers concurrent work into few runs; bounded; knows no model and no session.

Whatever arrived while the last run was busy goes together into the next one; a lone caller waits for nobody.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

import numpy as np

from stepcast.errors import DeadlineExceeded, StepcastError

from ..telemetry import as_ours
from .arrays import Floats, Lengths, RunGraph

Commit: TypeAlias = Awaitable[object] | None  # what comes after a run, and is awaited

UNFINISHED_RUNS: Final = 2  # that wait for their commit while the next one runs; more would only make batches small
SLOW_COMMIT_S: Final = (
    0.05  # those that wait longer do not count: a server of the store that hangs has its own steps only
)
MOST_NOTES: Final = 1 << 16  # runs remembered for the metrics until these are read

# Where batches come in between, a chunk takes this share of its time: what comes meanwhile waits for its end. Then
# chunks stop for a while, even if nothing else is to be done: else every single step would find one under way.
CROSSED_SHARE: Final = 0.125
REST_S: Final = 0.002

# A chunk of fewer rows times steps costs more by its start than by these; measured, cells would look dear for ever.
LEAST_CELLS: Final = 32

# A moving average believes a short time sooner than a long one, which other processes may have caused.
FASTER: Final = 0.3
SLOWER: Final = 0.05
FULL_ROWS: Final = 16  # batches of so many rows and more tell what a row costs; in smaller ones the fixed cost hides it


class Batch(Protocol):
    """Single steps that run together."""

    rows: int  # so far: others may join until it begins
    error: StepcastError | None  # why its run failed

    def begin(self, now: float) -> bool:
        """Let nobody join any more, and drop what is too late; False: nothing is left to run."""

    def go(self) -> None:
        """Run; nothing changes if that raises."""


B = TypeVar("B", bound=Batch)
Then = Callable[[Any], Commit]


@dataclass(eq=False)
class Run:
    """N rows that advance together by T steps, in chunks if there are many."""

    x: Floats  # (N, T, F)
    lengths: Lengths | None  # (N,) valid steps per row, None: all T
    state: bytes  # packed, of the N rows
    deadline: float  # monotonic time (s) after which it is not begun any more
    then: Then  # takes it at the end, with `outputs` and `state`, or `error`
    gone: Callable[[], bool]  # whether nobody waits for the outputs any more
    at: int = 0  # steps made
    outputs: Floats = field(init=False)  # (N, T, O)
    error: StepcastError | None = None

    def __post_init__(self) -> None:
        self.rows, self.steps = self.x.shape[:2]


class Batcher(Generic[B]):
    """Runs the work of one model.

    Args:
        run: Called from the event loop or from one thread, never twice at once, nor while a batch runs.
        finish: Takes a batch that has run.
        batch_rows: Most rows in one chunk (a larger run goes alone).
        chunk_s: About how long a chunk of a long sequence may take; None: sequences cannot be cut.
        inline_s: What is expected to take longer is run in a thread, so that the event loop stays free.
    """

    def __init__(
        self, run: RunGraph, finish: Callable[[B], Commit], *, batch_rows: int, chunk_s: float | None, inline_s: float
    ) -> None:
        self._run, self._finish = run, finish
        self._batch_rows, self._chunk_s, self._inline_s = batch_rows, chunk_s, inline_s
        self._batches: deque[B] = deque()
        self._runs: deque[Run] = deque()
        self._task: asyncio.Task[None] | None = None
        self._called = False  # `_look` is about to be
        self._crossed = False  # batches ran since the last chunk
        self._resting = False  # no chunk for a while
        self._closing = False  # then chunks rest no more
        self._unfinished: set[asyncio.Future[Any]] = set()
        self._slow: set[asyncio.Future[Any]] = set()  # those that do not count any more
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stepcast-run")  # has no thread until it is needed
        self._made: deque[tuple[int, float]] = deque(maxlen=MOST_NOTES)
        self.runs = 0  # that were made
        # Moving averages: a run's fixed cost is not told apart from its cells'.
        self._run_s, self._row_s, self._cell_s = 50e-6, 10e-6, 20e-6

    def submit(self, batch: B) -> None:
        """Queue a batch; it begins once, and is finished once if it has anything to run."""
        self._batches.append(batch)
        self._look_soon()

    def submit_run(self, run: Run) -> None:
        """Queue a run; it is finished exactly once."""
        self._runs.append(run)
        self._look_soon()

    async def close(self) -> None:
        """Wait until everything that is queued has been finished."""
        self._closing = True
        self._rested()
        while self._called or self._task or self._unfinished or self._slow:
            task = self._task or asyncio.ensure_future(asyncio.sleep(0))
            await asyncio.wait([task, *self._unfinished, *self._slow])
        self._pool.shutdown(wait=False)

    def take_runs(self) -> list[tuple[int, float]]:
        """Rows and seconds of the runs since the last time, the newest of them."""
        made = list(self._made)
        self._made.clear()
        return made

    def _chunk_due(self) -> bool:
        return bool(self._runs) and not self._resting

    def _look_soon(self) -> None:
        if self._task is None and not self._called and (self._batches or self._chunk_due()):
            self._called = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Run a short batch at once, without a task; where there is more to it, let a task do it."""
        self._called = False
        waits = self._chunk_due() or len(self._unfinished) >= UNFINISHED_RUNS
        if waits or self._expected_s(self._batches[0]) > self._inline_s:
            self._task = asyncio.get_running_loop().create_task(self._work())
            return
        batch = self._batches.popleft()
        if batch.begin(time.monotonic()):
            self._ran(batch, self._timed(batch))
        if self._batches:
            self._look_soon()

    async def _work(self) -> None:
        try:
            while self._batches or self._chunk_due():
                while len(self._unfinished) >= UNFINISHED_RUNS:
                    await self._wait_for_commit()
                if self._batches:
                    batch = self._batches.popleft()
                    if batch.begin(time.monotonic()):
                        self._ran(batch, await self._anywhere(self._expected_s(batch), self._timed, batch))
                if self._chunk_due():
                    await self._next_chunk()
                await asyncio.sleep(0)  # sockets are read and answers written between runs
        finally:
            self._task = None
            self._look_soon()

    async def _wait_for_commit(self) -> None:
        """Wait for one of the unfinished, but not for long."""
        first = asyncio.FIRST_COMPLETED
        done, late = await asyncio.wait(self._unfinished, timeout=SLOW_COMMIT_S, return_when=first)
        if not done:
            self._unfinished -= late
            self._slow |= late
            for commit in late:
                commit.add_done_callback(self._slow.discard)

    def _rested(self) -> None:
        """Chunks may go on."""
        self._resting = False
        self._look_soon()

    def _expected_s(self, batch: B) -> float:
        return max(self._run_s, batch.rows * self._row_s)

    async def _anywhere(self, expected_s: float, timed: Callable[..., float], *args: object) -> float:
        """The seconds that something took; it is done in a thread where it would hold the event loop."""
        if expected_s <= self._inline_s:
            return timed(*args)
        return await asyncio.get_running_loop().run_in_executor(self._pool, timed, *args)

    def _timed(self, batch: B) -> float:
        started = time.perf_counter()
        try:
            batch.go()
        except Exception as error:
            batch.error = _failure(error)
        return time.perf_counter() - started

    def _ran(self, batch: B, took: float) -> None:
        """Learn from a batch's run and let it go on to its commit."""
        self._crossed = True
        self._run_s = _nearer(self._run_s, took)
        if batch.rows >= FULL_ROWS:
            self._row_s = _nearer(self._row_s, took / batch.rows)
        self._made.append((batch.rows, took))
        self.runs += 1
        self._await(self._finish(batch))

    def _await(self, commit: Commit) -> None:
        if commit is not None:
            task = asyncio.ensure_future(commit)
            self._unfinished.add(task)
            task.add_done_callback(self._unfinished.discard)

    async def _next_chunk(self) -> None:
        """Advance the oldest runs by one chunk; those that are not at their end go to the queue's."""
        runs = self._take_runs()
        if not runs:
            return
        rows, chunk = sum(run.rows for run in runs), max(run.steps - run.at for run in runs)
        if self._chunk_s is not None:
            chunk_s = self._chunk_s * (CROSSED_SHARE if self._crossed else 1.0)
            chunk = min(chunk, max(1, LEAST_CELLS // rows, int(chunk_s / (self._cell_s * rows))))
        crossed, self._crossed = self._crossed, False
        took = await self._anywhere(rows * chunk * self._cell_s, self._timed_chunk, runs, chunk)
        self._cell_s = _nearer(self._cell_s, took / (rows * chunk))
        self._made.append((rows, took))
        self.runs += 1
        for run in runs:
            if run.error is None and run.at < run.steps:
                self._runs.append(run)
            else:
                self._await(run.then(run))
        if crossed and self._runs and not self._closing:
            self._resting = True
            asyncio.get_running_loop().call_later(REST_S, self._rested)

    def _take_runs(self) -> list[Run]:
        """The oldest runs that fit into one chunk; expired and abandoned ones are finished at once."""
        now, rows = time.monotonic(), 0
        runs: list[Run] = []
        while self._runs and (not runs or rows + self._runs[0].rows <= self._batch_rows):
            run = self._runs.popleft()
            if run.at == 0 and (run.deadline < now or run.gone()):
                run.error = too_late()
                self._await(run.then(run))
            else:
                runs.append(run)
                rows += run.rows
        return runs

    def _timed_chunk(self, runs: Sequence[Run], chunk: int) -> float:
        """Run; if that fails, run each alone, so that only the guilty one fails. The seconds it took."""
        started = time.perf_counter()
        try:
            advance(self._run, runs, chunk)
        except Exception as error:
            if len(runs) == 1:
                runs[0].error = _failure(error)
            else:
                for run in runs:
                    self._timed_chunk([run], chunk)
        return time.perf_counter() - started


def too_late() -> DeadlineExceeded:
    """The error of work that waited too long."""
    return DeadlineExceeded("the step waited longer than its deadline for its run; it was not applied")


def _failure(error: Exception) -> StepcastError:
    return as_ours(error, f"the model could not be run: {type(error).__name__}")


def _nearer(average: float, seen: float) -> float:
    """A moving average. (A thread's processor time would be the measure, but asking for it takes as long as a run.)"""
    return average + (FASTER if seen < average else SLOWER) * (seen - average)


def advance(graph: RunGraph, runs: Sequence[Run], chunk: int) -> None:
    """Advance several runs by up to `chunk` steps: gather, run, scatter. Nothing changes if the graph raises."""
    takes = [min(chunk, run.steps - run.at) for run in runs]
    alone = runs[0] if takes == [runs[0].steps] else None  # as it is, at once
    x, lengths = (alone.x, alone.lengths) if alone else _gather(runs, takes)
    y, new = graph(x, lengths, np.frombuffer(b"".join([run.state for run in runs]), np.uint8).reshape(len(x), -1))
    end = 0
    for run, take in zip(runs, takes, strict=True):
        rows = slice(end, end := end + run.rows)
        if run.at == 0:
            run.outputs = np.empty((run.rows, run.steps, y.shape[2]), np.float32)
        run.outputs[:, run.at : run.at + take] = y[rows, :take]
        run.state = new[rows].tobytes()
        run.at += take


def _gather(runs: Sequence[Run], takes: Sequence[int]) -> tuple[Floats, Lengths]:
    """Stack so many next steps of each run, padded on the right."""
    x = np.zeros((sum(run.rows for run in runs), max(takes), runs[0].x.shape[2]), np.float32)
    lengths = np.empty(len(x), np.int32)
    end = 0
    for run, take in zip(runs, takes, strict=True):
        rows = slice(end, end := end + run.rows)
        x[rows, :take] = run.x[:, run.at : run.at + take]
        lengths[rows] = take if run.lengths is None else np.clip(run.lengths - run.at, 0, take)
    return x, lengths
