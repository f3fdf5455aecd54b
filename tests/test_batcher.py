"""The batcher: what arrives together runs together, within bounds, and nobody pays for a neighbour.

The model is a running sum: state float32 [1], y[t] = state + x[0] + ... + x[t]; so every answer is known by value.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.batcher import REST_S, Batcher, Run, advance, too_late
from stepcast.errors import DeadlineExceeded, Internal, NonFinite, StepcastError

pytestmark = pytest.mark.service

Array = np.ndarray[Any, Any]


def total(x: Array, lengths: Array | None, states: Array) -> tuple[Array, Array]:
    """The running sum of B rows; 666 is a number it cannot take, 777 one that it refuses."""
    if (x == 666).any():
        raise ValueError("no such number")
    if (x == 777).any():
        raise NonFinite("not this one")
    start = states.view(np.float32)
    valid = np.ones(x.shape[:2], bool) if lengths is None else np.arange(x.shape[1]) < lengths[:, None]
    y = start[:, :, None] + np.cumsum(np.where(valid, x[:, :, 0], 0), axis=1)[:, :, None].transpose(0, 2, 1)
    y = y.transpose(0, 2, 1).astype(np.float32)
    return y, np.ascontiguousarray(y[:, -1]).view(np.uint8)


class Job(Run):
    """A run that tells its bench when it is finished."""

    def __init__(self, x: Array, lengths: Array | None, state: bytes, deadline: float) -> None:
        super().__init__(x, lengths, state, deadline, lambda job: job.bench.finish([job]), lambda: self.left)
        self.left = False
        self.bench: Bench


class Singles:
    """Single steps that run together; `jobs` may join until it begins."""

    def __init__(self, *jobs: Job) -> None:
        self.jobs = list(jobs)
        self.error: StepcastError | None = None
        self.bench: Bench

    @property
    def rows(self) -> int:
        return sum(job.rows for job in self.jobs)

    def begin(self, now: float) -> bool:
        late = [job for job in self.jobs if job.deadline < now or job.left]
        for job in late:
            job.error = too_late()
        self.jobs = [job for job in self.jobs if job not in late]
        if late:
            self.bench.finish(late)
        return bool(self.jobs)

    def go(self) -> None:
        advance(self.bench.graph, self.jobs, 1)


def job(values: Any, start: float = 0.0, lengths: list[int] | None = None, wait_s: float = 60) -> Job:
    """Rows of numbers."""
    x = np.array(values, np.float32, ndmin=2)[:, :, None]
    counts = None if lengths is None else np.array(lengths, np.int32)
    return Job(x, counts, np.full(len(x), start, np.float32).tobytes(), time.monotonic() + wait_s)


class Bench:
    """A batcher with a record of its runs (rows, steps) and of what it finished."""

    def __init__(self, finish: Callable[[list[Job]], Awaitable[object] | None] | None = None, **options: Any) -> None:
        self.runs: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.done: list[Job] = []
        self._then = finish
        limits = {"batch_rows": 100, "chunk_s": 1.0, "inline_s": 1.0, **options}
        self.batcher = Batcher(self.graph, self.finish_batch, **limits)

    def graph(self, x: Array, lengths: Array | None, states: Array) -> tuple[Array, Array]:
        self.runs.append((len(x), x.shape[1]))
        self.threads.add(threading.get_ident())
        return total(x, lengths, states)

    def finish(self, jobs: list[Job]) -> Awaitable[object] | None:
        self.done.extend(jobs)
        return self._then(jobs) if self._then else None

    def finish_batch(self, batch: Singles) -> Awaitable[object] | None:
        for job in batch.jobs:
            job.error = batch.error
        return self.finish(batch.jobs)

    def submit(self, one: Job | Singles) -> None:
        """Queue; single steps as a batch of their own."""
        one.bench = self
        if isinstance(one, Singles):
            for each in one.jobs:
                each.bench = self
            self.batcher.submit(one)
        elif one.steps == 1:
            self.submit(Singles(one))
        else:
            self.batcher.submit_run(one)

    def go(self, *jobs: Job | Singles) -> "Bench":
        """Submit at once, wait for the end."""

        async def all_at_once() -> None:
            for one in jobs:
                self.submit(one)
            await self.batcher.close()

        every = [each for one in jobs for each in (one.jobs if isinstance(one, Singles) else [one])]
        asyncio.run(all_at_once())
        assert sorted(map(id, self.done)) == sorted(map(id, every))  # each exactly once
        return self


def outputs(one: Job) -> list[list[float]]:
    """A job's outputs (N, T)."""
    assert one.error is None
    assert one.outputs is not None
    return one.outputs[:, :, 0].tolist()


def end(one: Job) -> list[float]:
    """A job's state after it."""
    return np.frombuffer(bytes(one.state), np.float32).tolist()


def test_what_joins_a_batch_before_it_begins_runs_with_it() -> None:
    """Ten single steps are one run; each has its own numbers, in the order they came."""
    jobs = [job([[i]], start=100 * i) for i in range(10)]
    bench = Bench()

    async def one_by_one() -> None:
        batch = Singles(jobs[0])
        bench.submit(batch)
        for one in jobs[1:]:
            batch.jobs.append(one)
        await bench.batcher.close()

    asyncio.run(one_by_one())
    assert bench.runs == [(10, 1)]
    assert [outputs(one) for one in jobs] == [[[101.0 * i]] for i in range(10)]
    assert [end(one) for one in jobs] == [[101.0 * i] for i in range(10)]
    assert bench.done == jobs


def test_a_chunk_has_at_most_batch_rows_and_a_larger_run_goes_alone() -> None:
    """Rows, not runs, are counted."""
    jobs = [job([[1, 1]]) for _ in range(10)] + [job([[2, 2]] * 9), job([[3, 3]] * 3), job([[4, 4]])]
    bench = Bench(batch_rows=4).go(*jobs)
    assert bench.runs == [(4, 2), (4, 2), (2, 2), (9, 2), (4, 2)]
    assert outputs(jobs[10]) == [[2.0, 4.0]] * 9


def test_a_long_sequence_runs_in_chunks_and_single_steps_go_between() -> None:
    """Chunked sums are whole sums; singles that came later are done first."""
    long = job([[i % 7 for i in range(2000)], [1] * 2000], start=5)
    single = job([[7]])
    bench = Bench(chunk_s=1e-4).go(long, single)
    assert len(bench.runs) > 5
    assert bench.done == [single, long]
    want = np.cumsum([[i % 7 for i in range(2000)], [1] * 2000], axis=1) + 5
    assert outputs(long) == want.tolist()
    assert end(long) == want[:, -1].tolist()


def test_chunks_are_short_and_rest_while_single_steps_come() -> None:
    """Between two chunks that single steps have crossed lies a rest; without any, chunks follow one another."""
    long = job([[1] * 3000])
    at: list[tuple[float, int]] = []

    class Timed(Bench):
        def graph(self, x: Array, lengths: Array | None, states: Array) -> tuple[Array, Array]:
            at.append((time.perf_counter(), x.shape[1]))
            time.sleep(2e-6 * x.shape[1])
            return super().graph(x, lengths, states)

    bench = Timed(chunk_s=2e-3)

    async def crossed() -> None:
        bench.submit(long)
        while long not in bench.done and len(at) < 400:
            bench.submit(job([[1]]))
            await asyncio.sleep(2e-4)
        await bench.batcher.close()

    asyncio.run(crossed())
    assert outputs(long) == [np.arange(1, 3001).tolist()]
    chunks = [i for i, (_, steps) in enumerate(at) if steps > 1]
    pairs = [(a, b) for a, b in pairwise(chunks) if b > a + 1 and any(c < a for c in chunks)]
    gaps = [at[b][0] - at[a][0] for a, b in pairs]
    assert len(gaps) > 3
    assert np.median(gaps) >= REST_S
    alone = Bench(chunk_s=2e-3).go(job([[1] * 3000]))
    assert np.median([at[i][1] for i in chunks[1:]]) < np.median([steps for _, steps in alone.runs])


def test_sequences_that_cannot_be_cut_run_whole() -> None:
    """chunk_s None: a bidirectional model sees all steps at once."""
    assert Bench(chunk_s=None).go(job([[1] * 500])).runs == [(1, 500)]


def test_expired_and_abandoned_jobs_are_never_run() -> None:
    """They are finished with DeadlineExceeded, their state as it was; the others run."""
    late, fine, left = job([[1]], start=3, wait_s=-1), job([[2]]), job([[2]])
    long, gone, last = job([[1] * 50], wait_s=-1), job([[1] * 50]), job([[1] * 5])
    left.left = gone.left = True
    bench = Bench().go(Singles(late, fine, left), Singles(job([[1]], wait_s=-1)), long, gone, last)
    assert bench.runs == [(1, 1), (1, 5)]
    for one in (late, left, long, gone):
        assert isinstance(one.error, DeadlineExceeded)
    assert end(late) == [3.0]
    assert outputs(fine) == [[2.0]]
    assert end(last) == [5.0]


def test_only_the_guilty_fail() -> None:
    """Where a chunk raises, each run goes alone: one has our error, one its own, the others their numbers."""
    jobs = [job([[i, i]], start=9 if i == 666 else 0) for i in (1, 666, 3, 777, 5)]
    Bench().go(*jobs)
    assert [outputs(jobs[i]) for i in (0, 2, 4)] == [[[1.0, 2.0]], [[3.0, 6.0]], [[5.0, 10.0]]]
    assert isinstance(jobs[1].error, Internal)
    assert "ValueError" in jobs[1].error.message
    assert isinstance(jobs[3].error, NonFinite)
    assert end(jobs[1]) == [9.0]


def test_a_batch_that_fails_says_why() -> None:
    """The batch is finished with the error; our own errors as they are, a stranger's as ours."""
    for value, kind in ((666, Internal), (777, NonFinite)):
        batch = Singles(job([[1]]), job([[value]], start=9))
        Bench().go(batch)
        assert isinstance(batch.error, kind)
        assert end(batch.jobs[1]) == [9.0]


def test_a_long_job_that_fails_in_a_later_chunk_is_finished_once() -> None:
    """An error in the middle ends it."""
    bad = job([[1] * 300 + [777] + [1] * 300])
    bench = Bench(chunk_s=1e-4).go(bad, job([[1] * 100]))
    assert isinstance(bad.error, NonFinite)
    assert len(bench.done) == 2


def test_long_runs_are_made_in_a_thread() -> None:
    """What is expected to be longer than inline_s does not hold the event loop; what is shorter stays on it."""
    here = threading.get_ident()
    assert Bench(inline_s=1.0).go(job([[1]])).threads == {here}
    assert here not in Bench(inline_s=-1.0).go(job([[1]]), job([[1] * 9])).threads


def test_close_waits_for_what_finish_started() -> None:
    """A commit that takes a while is waited for; at most two are under way while more is run."""
    under_way, most, committed = 0, 0, []

    async def commit(jobs: list[Job]) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.005)
        under_way -= 1
        committed.extend(jobs)

    jobs = [job([[i]]) for i in range(8)]
    Bench(finish=commit, batch_rows=1).go(*jobs)
    assert sorted(map(id, committed)) == sorted(map(id, jobs))
    assert most == 2


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 12), st.booleans()),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 13),
    st.randoms(use_true_random=False),
)
def test_any_mixture_in_any_chunks_is_what_each_is_alone(
    shapes: list[tuple[int, int, bool]], chunk: int, random: Any
) -> None:
    """Rows, steps and lengths of all kinds, advanced together by `chunk` until all are done."""
    jobs, wants = [], []
    for rows, steps, ragged in shapes:
        values = [[random.randrange(100) for _ in range(steps)] for _ in range(rows)]
        lengths = [random.randrange(steps + 1) for _ in range(rows)] if ragged else None
        jobs.append(job(values, 10, lengths))
        each = lengths or [steps] * rows
        wants.append([(10 + np.cumsum(v[:n])).tolist() for v, n in zip(values, each, strict=True)])
    running = list(jobs)
    while running:
        advance(total, running, chunk)
        running = [one for one in running if one.at < one.steps]
    for one, want in zip(jobs, wants, strict=True):
        got = outputs(one)
        for row, expected, state in zip(got, want, end(one), strict=True):
            assert row[: len(expected)] == expected
            assert state == (expected[-1] if expected else 10.0)
