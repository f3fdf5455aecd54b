"""One way for every step: rows of any kind in one batch, admitted by one rule, each with its own fate."""

import asyncio
import gc
import json
import shutil
import time
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from asking import Answer, ask
from serving import MODELS, few_models

from service.engine.repository import Repository
from service.records.block import Block
from service.records.record import Record, decode
from service.sessions import roster as rosters
from service.sessions.core import Address
from service.sessions.many import Columns, Many
from service.sessions.turns import Sessions
from service.settings import Settings
from service.store import Done, Store, Write
from service.store.memory import MemoryStore
from service.telemetry import Metrics
from stepcast.errors import DeadlineExceeded, Draining, NonFinite, QueueFull, StepConflict

pytestmark = [pytest.mark.anyio, pytest.mark.service]

KIND = "lstm"


def sessions_on(store: Store, models: Path | None = None, **settings: Any) -> Sessions:
    """Sessions of the models of a directory."""
    models = models or few_models()
    repository = Repository(models, device="cpu", threads=1)
    repository.scan()
    return Sessions(repository, store, Settings(models=models, **settings), Metrics())


def at(name: str, model: str = KIND) -> Address:
    return Address("n", model, name)


def readings(examples: int, steps: int, seed: int, kind: str = KIND) -> Any:
    features = json.loads((MODELS / kind / "1" / "manifest.json").read_text())["features"]
    return np.random.default_rng(seed).normal(size=(examples, steps, len(features))).astype(np.float32)


async def stored(sessions: Sessions, name: str) -> Record:
    (data,) = await sessions.store.load([at(name).key])
    assert data is not None
    return decode(data)


def step_many(sessions: Sessions, names: list[str], columns: Columns, kind: str = KIND) -> "asyncio.Future[Many]":
    """A batch step; its list of sessions is JSON."""
    future: asyncio.Future[Many] = asyncio.get_running_loop().create_future()
    listed, address = orjson.dumps(names), partial(at, model=kind)
    sessions.batch_steps.step("n", kind, listed, lambda: names, lambda count: columns, address, future.set_result)
    return future


class Slow(MemoryStore):
    """A store that answers `replace` after a while, or when it is told to."""

    def __init__(self, wait_s: float = 0.0) -> None:
        super().__init__()
        self.wait_s = wait_s
        self.gate = asyncio.Event()
        self.blocks: list[int] = []
        self._later: set[asyncio.Task[None]] = set()

    def replace(self, block: Block, done: Done) -> None:
        self.blocks.append(len(block))
        task = asyncio.ensure_future(self._replace_later(block, done))
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def _replace_later(self, block: Block, done: Done) -> None:
        if self.wait_s:
            await asyncio.sleep(self.wait_s)
        else:
            await self.gate.wait()
        super().replace(block, done)


# --- one batch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_steps", [0, 3])
async def test_rows_of_every_kind_are_one_batch_and_equal_the_whole_pass(log_steps: int) -> None:
    """New and old sessions, one row and three, short records and full ones, with a checkpoint, after long calls."""
    sessions = sessions_on(MemoryStore(), log_steps=log_steps)
    served = sessions.repository.live(KIND)
    runs: list[int] = []
    run = served.runtime.step
    served.runtime.step = lambda x, *rest: (runs.append(len(x)), run(x, *rest))[1]  # type: ignore[method-assign]
    examples = {f"s{i}": 1 + 2 * (i % 2) for i in range(12)}
    given: dict[str, list[Any]] = {name: [] for name in examples}
    got: dict[str, list[Answer]] = {name: [] for name in examples}
    for turn in range(24):
        names = [name for i, name in enumerate(examples) if turn >= i]  # they come one after the other
        calls = {}
        for i, name in enumerate(names):
            steps = 3 if (turn + i) % 5 == 4 else 1
            x = readings(examples[name], steps, 100 * turn + i)
            given[name].append(x)
            calls[name] = ask(sessions, at(name), x, seq=sum(part.shape[1] for part in given[name]))
        for name, call in calls.items():
            got[name].append(await call)
    for name, parts in given.items():
        whole = np.concatenate(parts, axis=1)
        start = np.frombuffer(served.runtime.initial(examples[name]), np.uint8).reshape(examples[name], -1)
        y, state = served.runtime.run(whole, None, start)
        np.testing.assert_allclose(np.concatenate([a.outputs for a in got[name]], axis=1), y, rtol=1e-4, atol=1e-5)
        record = await stored(sessions, name)
        assert record.step == whole.shape[1]
        want = state.reshape(-1).view(np.float32)
        np.testing.assert_allclose(np.frombuffer(record.state, np.float32), want, rtol=1e-4, atol=1e-5)
        kept = whole[:, -log_steps:].tobytes() if log_steps and examples[name] == 1 else b""
        assert record.inputs == kept
    assert max(runs) >= 12  # single steps of all kinds ran together


async def test_a_guilty_row_fails_alone_whatever_its_batch() -> None:
    """A row of a batch, of three examples, and a row of no session: the others are as if it had not been there."""
    sessions, kind = sessions_on(MemoryStore(), MODELS), "lstm_normed"
    served = sessions.repository.live(kind)
    x, three = readings(1, 1, 0, kind), readings(3, 1, 1, kind)
    bad = np.full_like(x, 3e38)
    given = {"a": x, "bad": bad, "b": three}
    calls = [ask(sessions, at(name, kind), each) for name, each in given.items()]
    beside = asyncio.ensure_future(sessions.run(served, x, None, served.runtime.initial(1)))
    first, refused, second, run = await asyncio.gather(*calls, beside, return_exceptions=True)
    assert isinstance(refused, NonFinite)
    assert [first.step, second.step] == [1, 1]
    np.testing.assert_allclose(run.reply(), first.outputs, rtol=1e-5)
    (nothing,) = await sessions.store.load([at("bad", kind).key])
    assert nothing is None
    assert (await ask(sessions, at("bad", kind), x, seq=1)).step == 1


async def test_a_retry_is_known_across_batches_and_payloads() -> None:
    """The kept answer of the same payload, as a step and as a call of one step; another payload is a conflict."""
    sessions = sessions_on(MemoryStore())
    x = readings(3, 1, 7)
    first = await ask(sessions, at("a"), x, seq=1)
    again = await ask(sessions, at("a"), x, seq=1)
    np.testing.assert_array_equal(first.outputs, again.outputs)
    assert again.step == 1
    with pytest.raises(StepConflict, match="another payload"):
        await ask(sessions, at("a"), x + 1, seq=1)
    long = readings(3, 4, 8)
    await ask(sessions, at("a"), long, seq=5)
    for _ in range(2):
        assert (await ask(sessions, at("a"), x, seq=1)).step == 1
        assert (await ask(sessions, at("a"), long, seq=5)).step == 5


# --- admission ------------------------------------------------------------------------------------------------------


async def test_the_deadline_holds_for_steps_that_wait_for_their_session() -> None:
    """Eight steps of one session on a store of 0.3 s: those that could only begin after 0.5 s are refused, not late."""
    sessions = sessions_on(Slow(0.3), deadline_s=0.5)
    started = time.monotonic()
    results = await asyncio.gather(
        *(ask(sessions, at("a"), readings(1, 1, i)) for i in range(8)), return_exceptions=True
    )
    made = [result for result in results if isinstance(result, Answer)]
    assert [answer.step for answer in made] == list(range(1, len(made) + 1))
    assert 1 <= len(made) <= 3
    assert all(isinstance(result, DeadlineExceeded) for result in results[len(made) :])
    assert time.monotonic() - started < 1.5
    assert (await stored(sessions, "a")).step == len(made)


async def test_a_batch_that_comes_too_late_leaves_the_sessions_ready() -> None:
    """A loop that stood still: every step is refused, and no session has to be read again."""
    store = MemoryStore()
    sessions = sessions_on(store, deadline_s=0.5)
    names = [f"s{i}" for i in range(64)]
    await asyncio.gather(*(ask(sessions, at(name), readings(1, 1, 0)) for name in names))
    calls = [ask(sessions, at(name), readings(1, 1, 1), seq=2) for name in names]
    time.sleep(0.6)  # noqa: ASYNC251  (the loop stands still)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [DeadlineExceeded] * 64
    sessions.gauge()
    text = sessions.metrics.text().decode()
    assert "stepcast_hot_sessions 64.0" in text
    assert "stepcast_waiting_steps 0.0" in text
    loads: list[int] = []
    load = store.load
    store.load = lambda keys: (loads.append(len(keys)), load(keys))[1]  # type: ignore[method-assign]
    answers = await asyncio.gather(*(ask(sessions, at(name), readings(1, 1, 1), seq=2) for name in names))
    assert [answer.step for answer in answers] == [2] * 64
    assert loads == []


async def test_a_full_queue_and_a_draining_server_refuse_every_kind_of_step_alike() -> None:
    """A single step, a call, a batch step and rows of no session, of a session that is ready."""
    store = Slow()
    sessions = sessions_on(store, queue_limit=2)
    store.gate.set()
    await ask(sessions, at("a"), readings(1, 1, 0))
    served, x = sessions.repository.live(KIND), readings(1, 1, 1)
    store.gate.clear()
    waiting = [ask(sessions, at(name), x) for name in "bc"]
    names = [f"s{i}" for i in range(40)]
    for refusal in (QueueFull, Draining):
        with pytest.raises(refusal):
            ask(sessions, at("a"), x)
        with pytest.raises(refusal):
            ask(sessions, at("a"), readings(1, 2, 1))
        with pytest.raises(refusal):
            step_many(sessions, names, Columns(np.repeat(x[0], 40, axis=0)))
        with pytest.raises(refusal):
            await sessions.run(served, x, None, served.runtime.initial(1))
        if refusal is QueueFull:
            drain = asyncio.create_task(sessions.drain())
            await asyncio.sleep(0)
    store.gate.set()
    assert [answer.step for answer in await asyncio.gather(*waiting)] == [1, 1]
    await drain


async def test_a_batch_step_that_cannot_wait_is_refused_before_it_is_read() -> None:
    """More sessions than the queue takes: one refusal, nothing of the columns is looked at."""
    sessions = sessions_on(MemoryStore(), queue_limit=100)
    names = [f"s{i}" for i in range(101)]

    def read(_: int) -> Columns:
        raise AssertionError("the columns were read")

    with pytest.raises(QueueFull, match="101"):
        sessions.batch_steps.step("n", KIND, orjson.dumps(names), lambda: names, read, at, lambda _: None)


# --- what is kept, and for how long ---------------------------------------------------------------------------------


async def test_a_retired_version_is_freed(tmp_path: Path) -> None:
    """Nothing holds its runtime once its sessions have ended or moved: not a lane, a session, a roster or a batch."""
    shutil.copytree(MODELS / KIND, tmp_path / KIND)
    sessions = sessions_on(MemoryStore(), tmp_path)
    names = [f"s{i}" for i in range(40)]
    for _ in range(20):
        await step_many(sessions, names, Columns(np.repeat(readings(1, 1, 0)[0], 40, axis=0)))
    served = sessions.repository.live(KIND)
    runtime = weakref.ref(served.runtime)
    sessions.repository.retire(KIND, 1)
    sessions.retired(served)
    del served
    await asyncio.sleep(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # what other tests have left is not asked here
        gc.collect()
    assert runtime() is None


async def test_rosters_that_were_split_hold_no_names() -> None:
    """Two thousand long ids in another order each time: what is kept of a roster does not grow with its names."""
    sessions = sessions_on(MemoryStore())
    names = [f"{i:03d}" + "x" * 200 for i in range(40)]
    x = np.repeat(readings(1, 1, 0)[0], 40, axis=0)
    for turn in range(30):
        order = names[turn:] + names[:turn] if turn > 20 else names
        for _ in range(2):
            many = await step_many(sessions, order, Columns(x))
            assert not many.errors
    known = sessions._rosters._rosters
    assert known
    assert max(map(len, known)) == 16
    held = sum(len(roster.keys) for there in known.values() for roster in there)
    assert held <= 40
    assert rosters.roster_name("n", KIND, b"a") != rosters.roster_name("n", KIND, b"b")


async def a_roster(sessions: Sessions, names: list[str], kind: str = KIND) -> Any:
    """Batch steps until the sessions are a roster; the inputs (K, F) of one more."""
    x = np.repeat(readings(1, 1, 0, kind)[0], len(names), axis=0)
    for _ in range(20):
        assert not (await step_many(sessions, names, Columns(x), kind)).errors
    assert [roster.whole for there in sessions._rosters._rosters.values() for roster in there] == [True]
    return x


async def test_a_guilty_row_of_a_roster_fails_alone() -> None:
    """The others take their step, all are as if there had been no roster, and the next batch step goes on."""
    sessions, names = sessions_on(MemoryStore(), MODELS), [f"s{i}" for i in range(40)]
    x = await a_roster(sessions, names, "lstm_normed")
    bad = x.copy()
    bad[7] = 3e38
    many = await step_many(sessions, names, Columns(bad), "lstm_normed")
    assert list(many.errors) == [7]
    assert isinstance(many.errors[7], NonFinite)
    assert many.steps == [None if i == 7 else 21 for i in range(40)]
    for turn in range(3):
        many = await step_many(sessions, names, Columns(x), "lstm_normed")
        assert not many.errors
        assert many.steps == [21 + turn if i == 7 else 22 + turn for i in range(40)]


async def test_a_roster_that_comes_too_late_goes_on_later() -> None:
    """Every step is refused, nothing is applied, and no session stays busy."""
    sessions, names = sessions_on(MemoryStore(), deadline_s=0.5), [f"s{i}" for i in range(40)]
    x = await a_roster(sessions, names)
    late = step_many(sessions, names, Columns(x))
    time.sleep(0.6)  # noqa: ASYNC251  (the loop stands still)
    many = await late
    assert [type(error) for error in many.errors.values()] == [DeadlineExceeded] * 40
    assert (await ask(sessions, at("s3"), x[:1, None], seq=21)).step == 21
    many = await step_many(sessions, names, Columns(x))
    assert many.steps == [22 if i == 3 else 21 for i in range(40)]


async def test_replay_runs_in_chunks_between_the_steps_of_others(tmp_path: Path) -> None:
    """The kept inputs of a session go through the new version by the batcher, not at once on the event loop."""
    shutil.copytree(MODELS / KIND, tmp_path / KIND)
    sessions = sessions_on(MemoryStore(), tmp_path, log_steps=5000, version_policy="replay", chunk_s=1e-4)
    x = readings(1, 5000, 3)
    await ask(sessions, at("a"), x)
    shutil.copytree(tmp_path / KIND / "1", tmp_path / KIND / "2")
    manifest = json.loads((tmp_path / KIND / "2" / "manifest.json").read_text())
    (tmp_path / KIND / "2" / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    sessions.repository.scan()
    served = sessions.repository.require(KIND, 1)
    sessions.repository.retire(KIND, 1)
    sessions.retired(served)
    live = sessions.repository.live(KIND)
    rows: list[int] = []
    run = live.runtime.run
    live.runtime.run = lambda x, *rest: (rows.append(x.shape[1]), run(x, *rest))[1]  # type: ignore[method-assign]
    last = readings(1, 1, 4)
    answers = await asyncio.gather(ask(sessions, at("a"), last), *(ask(sessions, at(f"b{i}"), last) for i in range(5)))
    assert [answer.step for answer in answers] == [5001, 1, 1, 1, 1, 1]
    assert answers[0].version == 2
    assert len(rows) > 3
    start = np.frombuffer(live.runtime.initial(1), np.uint8).reshape(1, -1)
    y, _ = run(np.concatenate([x, last], axis=1), None, start)
    np.testing.assert_allclose(answers[0].outputs[0, 0], y[0, -1], rtol=1e-4, atol=1e-5)


# --- across an upgrade ----------------------------------------------------------------------------------------------

LAYOUT_2 = json.loads((Path(__file__).parent / "data" / "layout_2.json").read_text())
"""Sessions of tests/models/lstm as a server of record layout 2 left them, with the calls that it had answered."""


@pytest.mark.parametrize("name", LAYOUT_2)
async def test_a_session_of_layout_2_goes_on_and_its_retries_are_known(name: str) -> None:
    """Every call that the server before had answered is answered again, also after a step; another payload is not."""
    store = MemoryStore()
    sessions, calls = sessions_on(store), LAYOUT_2[name]["calls"]
    await store.change([Write(at("a").key, None, bytes.fromhex(LAYOUT_2[name]["record"]))])
    assert (await store.load([at("a").key]))[0][0] == 2
    for turn in range(2):
        for call in calls:
            x = np.array(call["inputs"], np.float32)
            mask = None if call["mask"] is None else np.array(call["mask"], bool)
            again = await ask(sessions, at("a"), x, mask, call["seq"])
            np.testing.assert_array_equal(again.outputs, np.array(call["outputs"], np.float32))
            assert again.step == call["seq"]
            with pytest.raises(StepConflict, match="another payload"):
                await ask(sessions, at("a"), x + 1, mask, call["seq"])
        last, examples = calls[-1]["seq"], len(calls[0]["inputs"])
        assert (await ask(sessions, at("a"), readings(examples, 1, turn), seq=last + 1 + turn)).step == last + 1 + turn
    record = await stored(sessions, "a")
    assert record.encode()[0] == 3
    assert [kept.legacy for kept in record.kept()] == [False, False] + [True] * len(calls)
