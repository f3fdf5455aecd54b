"""The life of sessions where things go wrong or happen at once; in process, on stores that do as they are told."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import ask
from serving import MODELS, few_models

from service.engine.repository import Repository
from service.records.block import Block
from service.records.record import decode
from service.sessions.core import Address
from service.sessions.edits import NewState, States
from service.sessions.rollout import Plan, rollout
from service.sessions.turns import Sessions
from service.settings import Settings
from service.store import Done, Store, Write
from service.store.memory import MemoryStore
from service.store.write_behind import BehindStore
from service.telemetry import Metrics
from stepcast.errors import (
    CheckpointExists,
    Internal,
    PreconditionFailed,
    QueueFull,
    StateVersionMismatch,
    StepConflict,
    StoreUnavailable,
    TooLarge,
)

pytestmark = [pytest.mark.anyio, pytest.mark.service]

KIND = "lstm"
X = np.array([[[0.1, 0.2, 0.3]]], np.float32)


def rooms(store: Store, models: Path | None = None, **settings: Any) -> States:
    """Sessions and states on a store."""
    models = models or few_models()
    repository = Repository(models, device="cpu", threads=1)
    repository.scan()
    return States(Sessions(repository, store, Settings(models=models, **settings), Metrics()))


def send(states: States, name: str, x: Any = X, seq: int | None = None, **more: Any) -> "asyncio.Future[Any]":
    return ask(states.sessions, at(name), x, seq=seq, **more)


def at(name: str) -> Address:
    return Address("n", KIND, name)


def hot(states: States) -> tuple[float, float]:
    """How many sessions are hot, and how many calls wait."""
    states.sessions.gauge()
    text = states.sessions.metrics.text().decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return float(lines["stepcast_hot_sessions"]), float(lines["stepcast_waiting_steps"])


async def turns(number: int) -> None:
    """Let everything else run that can."""
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository with one version; add_version adds a second one of other layers."""
    shutil.copytree(MODELS / KIND, tmp_path / "models" / KIND)
    return tmp_path / "models"


def add_version(models: Path, number: int) -> None:
    """A version whose layers differ from version 1's."""
    folder = models / KIND / str(number)
    shutil.copytree(MODELS / "gru" / "1", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "name": KIND, "version": number}))


class Faulty(MemoryStore):
    """A store that raises what it is told to, before or after it has done its work."""

    def __init__(self) -> None:
        super().__init__()
        self.on_load: Exception | None = None
        self.before_replace: Exception | None = None
        self.after_replace: Exception | None = None

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        if self.on_load is not None:
            raise self.on_load
        return await super().load(keys)

    def replace(self, block: Block, done: Done) -> None:
        after = self.after_replace
        if self.before_replace is not None:
            done(range(len(block)), self.before_replace)
        elif after is not None:
            super().replace(block, lambda rows, _: done(rows, after))
        else:
            super().replace(block, done)


class Gated(MemoryStore):
    """A store whose commits, and loads of session b, wait for a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.reached = asyncio.Event()

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        if at("b").key in keys:
            self.reached.set()
            await self.gate.wait()
        return await super().load(keys)

    async def change(self, writes: Sequence[Write]) -> list[bool]:
        self.reached.set()
        await self.gate.wait()
        return await super().change(writes)

    def replace(self, block: Block, done: Done) -> None:
        self.reached.set()
        self.later = asyncio.ensure_future(self._replace_later(block, done))

    async def _replace_later(self, block: Block, done: Done) -> None:
        await self.gate.wait()
        super().replace(block, done)


# --- errors of the store ----------------------------------------------------------------------------------------------


async def test_a_defect_of_the_store_answers_every_waiting_call() -> None:
    """An exception that is not one of ours is an Internal to each caller; nobody waits for ever, nothing is stuck."""
    store = Faulty()
    states = rooms(store)
    for fault in ("on_load", "before_replace"):
        setattr(store, fault, ValueError("a defect"))
        calls = [send(states, name) for name in ("a", "a", "b")]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [Internal] * 3
        assert hot(states) == (0, 0)
        setattr(store, fault, None)
    assert (await send(states, "a", seq=1)).step == 1


@pytest.mark.parametrize("applied", [True, False])
async def test_a_commit_of_unknown_outcome_is_resolved_by_the_retry(applied: bool) -> None:
    """The retry with seq gets the answer of the applied step, or applies it; either way once."""
    store = Faulty()
    states = rooms(store)
    first = await send(states, "a", seq=1)
    fault = "after_replace" if applied else "before_replace"
    setattr(store, fault, StoreUnavailable("no reply within 1 s.", retry_after_s=0.5))
    with pytest.raises(StoreUnavailable):
        await send(states, "a", seq=2)
    setattr(store, fault, None)
    second = await send(states, "a", seq=2)
    assert (first.step, second.step) == (1, 2)
    other = rooms(MemoryStore())
    await send(other, "a")
    np.testing.assert_array_equal(second.outputs, (await send(other, "a")).outputs)
    assert (await states.view(at("a"))).record.state == (await other.view(at("a"))).record.state


async def test_calls_behind_a_commit_of_unknown_outcome_see_what_was_applied() -> None:
    """Three calls in flight; the first one's commit is applied, but its answer is lost: the others go on from it."""
    store = Faulty()
    states = rooms(store)
    await send(states, "a", seq=1)
    store.after_replace = StoreUnavailable("no reply within 1 s.", retry_after_s=0.5)
    calls = [send(states, "a", seq=seq) for seq in (2, 3, 4)]
    calls[0].add_done_callback(lambda _: setattr(store, "after_replace", None))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results[0], StoreUnavailable)
    assert [result.step for result in results[1:]] == [3, 4]
    assert (await states.view(at("a"))).record.step == 4


class Broken:
    """Waits, and cannot take what it is given."""

    creates = True

    def done(self) -> bool:
        return False

    def refused(self, _: BaseException) -> None:
        raise ConnectionError("gone")

    def stepped(self, *_: Any) -> None:
        raise ConnectionError("gone")


async def test_a_caller_that_cannot_be_answered_harms_nobody_else() -> None:
    """The others of its batch are answered, its session goes on, and what it asked for was done once."""
    states = rooms(MemoryStore())
    await asyncio.gather(send(states, "a"), send(states, "b"))
    states.sessions.step(at("a"), X, None, 2, Broken())
    answers = await asyncio.gather(send(states, "b", seq=2), send(states, "a", seq=3))
    assert [answer.step for answer in answers] == [2, 3]
    assert hot(states) == (2, 0)


# --- limits and hot copies --------------------------------------------------------------------------------------------


async def test_refused_calls_leave_nothing_hot() -> None:
    """Calls that the queue has no room for, abandoned ones and refused first steps do not fill the memory."""
    states = rooms(MemoryStore(), queue_limit=1)
    waiting = send(states, "a")
    for i in range(100):
        with pytest.raises(QueueFull):
            send(states, f"flood-{i}")
    await waiting
    assert hot(states) == (1, 0)
    for i in range(10):
        gone = send(states, f"gone-{i}")
        gone.cancel()
        await turns(10)
        with pytest.raises(StepConflict):
            await send(states, f"bad-{i}", seq=7)
    assert hot(states) == (1, 0)


async def test_a_draining_server_closes_its_store_though_steps_still_wait() -> None:
    """What write-behind has acknowledged is stored when the time for draining is over."""
    base = Gated()
    behind = BehindStore(base, interval_s=3600)
    await behind.open()
    states = rooms(behind)
    base.gate.set()
    for seq in (1, 2, 3):
        await send(states, "a", seq=seq)
    base.gate.clear()
    base.reached.clear()
    stuck = send(states, "b", seq=1)
    await base.reached.wait()
    drain = asyncio.create_task(states.sessions.drain())
    await asyncio.sleep(0)
    drain.cancel()  # as a timeout does
    base.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await drain
    (data,) = await base.load([at("a").key])
    assert data is not None
    assert decode(data).step == 3
    await stuck


async def test_if_match_any_needs_a_session() -> None:
    """If-Match: * holds for whatever session there is, and for none where there is none."""
    states = rooms(MemoryStore())
    await send(states, "a")
    state = states.state(at("a"), await states.view(at("a")))["state"]
    body = NewState(state={layer: {k: v.tolist() for k, v in keys.items()} for layer, keys in state.items()})
    assert (await states.put(at("a"), body, "*")).step == 1
    with pytest.raises(PreconditionFailed):
        await states.put(at("b"), body, "*")


# --- checkpoints ------------------------------------------------------------------------------------------------------


async def test_two_checkpoints_of_one_name_at_once_are_one_and_a_refusal() -> None:
    """The one that came first stays what it was."""
    store = Gated()
    one, other = rooms(store), rooms(store)
    store.gate.set()
    await send(one, "a")
    store.gate.clear()
    store.reached.clear()
    first = asyncio.create_task(one.checkpoint(at("a"), "k"))
    second = asyncio.create_task(other.checkpoint(at("a"), "k"))
    await store.reached.wait()
    await turns(10)  # the second has looked for the name, too
    store.gate.set()
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(result) for result in results] == [dict, CheckpointExists]


async def test_a_checkpoint_is_made_while_others_step() -> None:
    """A checkpoint is a session at one moment: its step and its state belong together."""
    states = rooms(MemoryStore())
    await send(states, "a")
    steps = asyncio.gather(*(send(states, "a") for _ in range(99)))
    made = []
    for i in range(5):
        await turns(20)
        made.append(await states.checkpoint(at("a"), f"k{i}"))
    await steps
    alone = rooms(MemoryStore())
    want = {}
    for number in range(1, 101):
        await send(alone, "a")
        want[number] = (await alone.view(at("a"))).record.state
    assert len({checkpoint["step"] for checkpoint in made}) > 1
    for checkpoint in made:
        await states.rewind(at("a"), checkpoint["name"])
        record = (await states.view(at("a"))).record
        assert record.step == checkpoint["step"]
        np.testing.assert_allclose(
            np.frombuffer(record.state, np.float32), np.frombuffer(want[record.step], np.float32), atol=1e-5
        )


# --- versions ---------------------------------------------------------------------------------------------------------


async def test_a_layer_of_another_version_is_refused(models: Path) -> None:
    """A state is of one version: a layer of another one cannot be put beside its layers."""
    states = rooms(MemoryStore(), models)
    await send(states, "a")
    add_version(models, 2)
    states.repository.scan()
    layer, tensors = next(iter(states.repository.live(KIND).manifest.layers.items()))
    body = NewState({key: [[0.0] * tensor.shape[0]] for key, tensor in tensors.items()}, layer, version=2)
    before = (await states.view(at("a"))).record
    with pytest.raises(StateVersionMismatch):
        await states.put(at("a"), body)
    assert (await states.view(at("a"))).record == before


async def test_a_refused_first_step_does_not_bind_a_session_to_a_version(models: Path) -> None:
    """The session begins on the version that is live when its first step is applied."""
    states = rooms(MemoryStore(), models)
    with pytest.raises(StepConflict):
        await send(states, "a", seq=7)
    add_version(models, 2)
    states.repository.scan()
    assert (await send(states, "a")).version == 2


async def test_a_hot_session_leaves_a_retired_version(models: Path) -> None:
    """A session that is hot on a version is refused when that is not served any more, and goes on once cleared."""
    states = rooms(MemoryStore(), models)
    await send(states, "a")
    add_version(models, 2)
    states.repository.scan()
    assert (await send(states, "a")).version == 1
    await states.retire(KIND, 1, force=True)
    with pytest.raises(StateVersionMismatch):
        await send(states, "a")
    await states.clear(at("a"))
    assert (await send(states, "a")).version == 2


async def test_a_stale_hot_copy_of_a_retired_version_is_not_the_reason_to_refuse(models: Path) -> None:
    """Another replica has cleared the session meanwhile: the step is decided on the store's record."""
    store = MemoryStore()
    add_version(models, 2)
    one, other = rooms(store, models), rooms(store, models)
    await one.create(at("a"), version=1)
    assert (await send(one, "a")).version == 1
    other.repository.retire(KIND, 1)
    await other.clear(at("a"))
    await one.retire(KIND, 1, force=True)
    assert (await send(one, "a")).version == 2


async def test_answers_of_another_version_do_not_survive_a_put(models: Path) -> None:
    """A rollout must not begin with an output of another model."""
    states = rooms(MemoryStore(), models)
    await send(states, "a", seq=1)
    add_version(models, 2)
    states.repository.scan()
    layers = states.repository.live(KIND).manifest.layers
    state = {name: {key: [[0.0] * t.shape[0]] for key, t in tensors.items()} for name, tensors in layers.items()}
    await states.put(at("a"), NewState(state=state, version=2))
    record = (await states.view(at("a"))).record
    assert (record.version, record.step, record.answers) == (2, 1, ())


# --- rollouts ---------------------------------------------------------------------------------------------------------


async def test_a_rollout_after_a_masked_step_begins_with_the_last_output_there_was() -> None:
    """A masked step has no output; what is fed is the one before."""
    states = rooms(MemoryStore())
    await send(states, "a")
    plan = Plan(2, np.array([[np.nan, np.nan, 0.5]] * 2, np.float32))
    want = await rollout(states, at("a"), plan)
    mask = np.zeros((1, 1), bool)
    await ask(states.sessions, at("a"), X, mask, 2)
    got = await rollout(states, at("a"), plan)
    np.testing.assert_array_equal(got["outputs"], want["outputs"])


async def test_a_rollout_is_bounded_by_what_a_body_may_be() -> None:
    """Examples times steps, not steps alone: else one small request could take all memory."""
    states = rooms(MemoryStore(), body_limit_bytes=4096)
    await send(states, "a", np.zeros((40, 1, 3), np.float32))
    with pytest.raises(TooLarge):
        await rollout(states, at("a"), Plan(9, np.zeros((9, 3), np.float32)))
    answer = await rollout(states, at("a"), Plan(8, np.zeros((8, 3), np.float32)))
    assert answer["outputs"].shape == (40, 8, 2)
