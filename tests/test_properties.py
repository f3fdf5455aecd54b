"""Random sequences of everything that can be done to sessions, against a model of the semantics.

Two replicas with hot copies of their own share one store; each operation goes through one of them. After each, every
session must be what the model says: the inputs since its state was initial (or set), run in one pass.
"""

import asyncio
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from asking import ask
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from serving import MODELS, few_models

from service.engine.model import Runtime
from service.engine.repository import Repository
from service.sessions.core import Address
from service.sessions.edits import NewState, States
from service.sessions.many import Columns, Many
from service.sessions.rollout import Plan, rollout
from service.sessions.stored import etag
from service.sessions.turns import Sessions
from service.settings import Settings
from service.store import Store
from service.store.memory import MemoryStore
from service.store.sqlite import SqliteStore
from service.telemetry import Metrics
from stepcast.errors import (
    CheckpointExists,
    CheckpointNotFound,
    ExamplesMismatch,
    NoFeedback,
    PreconditionFailed,
    SessionExists,
    SessionNotFound,
    StepcastError,
    StepConflict,
)

pytestmark = pytest.mark.service

KIND = "stacked"
TTL_S = 100
KEPT = 16
NAMES = ("a", "b")
Array = np.ndarray[Any, Any]
Payload = tuple[Any, ...]


@cache
def runtime() -> Runtime:
    return Runtime(MODELS / KIND / "1", device="cpu")


@cache
def repository() -> Repository:
    found = Repository(few_models(), device="cpu", threads=1)
    found.scan()
    return found


@cache
def metrics() -> Metrics:
    return Metrics()


# --- the model of the semantics -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A session as it must be: a state to begin with, and what was put in since."""

    examples: int = 0
    step: int = 0
    base: bytes = b""
    past: tuple[tuple[Array, Array], ...] = ()  # x (N, T, F), mask (N, T)
    kept: tuple[tuple[int, Payload, Array], ...] = ()  # seq, payload, outputs (N, T, O)
    ttl_s: float = TTL_S
    expires: float = 0.0

    def stepped(self, x: Array, mask: Array, seq: int | None, payload: Payload) -> "tuple[Known, Array | None]":
        """The session after a step call and what must be answered (None: what was answered to that payload)."""
        expected = self.step + x.shape[1]
        if seq not in (None, expected):
            if any((seq, payload) == answer[:2] for answer in self.kept):
                return self, None
            raise StepConflict("a gap, or another payload", expected_seq=expected)
        if self.examples not in (0, len(x)):
            raise ExamplesMismatch("another N")
        base = self.base if self.examples else runtime().initial(len(x))
        after = replace(self, examples=len(x), step=expected, base=base, past=(*self.past, (x, mask)))
        return after, after.run()[0][:, -x.shape[1] :]

    def answered(self, payload: Payload, outputs: Array) -> "Known":
        return replace(self, kept=(*self.kept, (self.step, payload, outputs))[-KEPT:])

    def run(self) -> tuple[Array, bytes]:
        """All outputs (N, T, O) since the base, NaN where masked, and the state: one pass per row."""
        starts = np.frombuffer(self.base, np.uint8).reshape(self.examples, -1)
        if not self.past:
            return np.empty((self.examples, 0, runtime().manifest.n_outputs)), self.base
        x, mask = (np.concatenate(parts, axis=1) for parts in zip(*self.past, strict=True))
        y, states = np.full((*mask.shape, runtime().manifest.n_outputs), np.nan, np.float32), []
        for n, start in enumerate(starts):
            if mask[n].any():
                y[n, mask[n]], start = runtime().run(x[n : n + 1, mask[n]], None, start[None])
            states.append(start.tobytes())
        return y, b"".join(states)


# --- the machine ----------------------------------------------------------------------------------------------------

sessions = st.sampled_from(NAMES)
replicas = st.integers(0, 1)
seeds = st.integers(0, 2**16)


class Machine(RuleBasedStateMachine):
    """Two replicas and the model, side by side."""

    def stores(self, folder: Path) -> tuple[Store, Store]:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.now = 1_000_000.0
        self.folder = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.known: dict[str, Known] = {}
        self.saved: dict[str, dict[str, Known]] = {}
        self.sent: dict[str, list[tuple[int, Payload]]] = {name: [] for name in NAMES}
        self.stored = self.stores(Path(self.folder.name))
        self.replicas = []
        for store, hot_bytes in zip(self.stored, (2**20, 4000), strict=True):  # one evicts all the time
            self.do(store.open())
            options = Settings(models=MODELS, ttl_s=TTL_S, hot_bytes=hot_bytes)
            self.replicas.append(States(Sessions(repository(), store, options, metrics(), self.clock_ns)))
            self.replicas[-1].sessions.batch_steps.few = 1  # batch steps of two sessions form batches and rosters, too

    def clock_ns(self) -> int:
        return self.clock_ms() * 1_000_000

    def clock_ms(self) -> int:
        return int(self.now * 1000)

    def teardown(self) -> None:
        for states in self.replicas:
            self.do(states.sessions.drain())
        self.loop.close()
        self.folder.cleanup()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @contextmanager
    def refused(self, error: type[StepcastError] | None) -> Iterator[None]:
        """The block raises exactly this error."""
        if error is None:
            yield
        else:
            with pytest.raises(error):
                yield

    def set(self, name: str, known: Known) -> None:
        """A write: the time to live starts anew."""
        self.known[name] = replace(known, expires=self.now + known.ttl_s)

    def forget(self, name: str) -> None:
        self.known.pop(name, None)
        self.saved.pop(name, None)

    # --- steps ---

    def inputs(self, seed: int, steps: int, examples: int, masked: bool) -> tuple[Array, Array, Payload]:
        random = np.random.default_rng(seed)
        x = random.normal(size=(examples, steps, 3)).astype(np.float32)
        x[0, 0, seed % 3] = np.nan if seed % 5 == 0 else x[0, 0, seed % 3]  # a missing reading
        mask = random.random((examples, steps)) < 0.6 if masked else np.ones((examples, steps), bool)
        return x, mask, (x.tobytes(), mask.tobytes(), x.shape)

    def send(
        self, replica: int, name: str, x: Array, mask: Array, seq: int | None, **how: Any
    ) -> "asyncio.Future[Any]":
        given = None if mask.all() else mask
        return ask(self.replicas[replica].sessions, address(name), x, given, seq, **how)

    @rule(name=sessions, replica=replicas, seed=seeds, steps=st.integers(1, 3), examples=st.integers(1, 2),
          masked=st.booleans(), number=st.sampled_from(["none", "next", "gap", "same"]))  # fmt: skip
    def step(self, name: str, replica: int, seed: int, steps: int, examples: int, masked: bool, number: str) -> None:
        before = self.known.get(name, Known())
        examples = before.examples or examples if seed % 8 else examples
        x, mask, payload = self.inputs(seed, steps, examples, masked)
        seq = {"none": None, "next": before.step + steps, "gap": before.step + steps + 1, "same": before.step}[number]
        self.stepped(replica, name, x, mask, seq or None, payload)

    @rule(name=sessions, seed=seeds, calls=st.lists(st.tuples(replicas, st.integers(1, 3), st.booleans()), min_size=1))
    def steps_in_turn(self, name: str, seed: int, calls: list[tuple[int, int, bool]]) -> None:
        """Calls of some steps each, through this replica and that."""
        for i, (replica, steps, masked) in enumerate(calls[:5]):
            before = self.known.get(name, Known())
            x, mask, payload = self.inputs(seed + i, steps, before.examples or 1 + seed % 2, masked)
            self.stepped(replica, name, x, mask, before.step + steps if seed % 3 else None, payload)

    def stepped(self, replica: int, name: str, x: Array, mask: Array, seq: int | None, payload: Payload) -> None:
        before = self.known.get(name, Known())

        async def call() -> Any:
            return await self.send(replica, name, x, mask, seq)

        try:
            after, want = before.stepped(x, mask, seq, payload)
        except StepcastError as refusal:
            expected = refusal
        else:
            expected = None
        if expected is not None:
            with pytest.raises(type(expected)) as caught:
                self.do(call())
            assert caught.value.facts.get("expected_seq") == expected.facts.get("expected_seq")
            return
        got = self.do(call())
        if want is None:
            (first,) = [answer[2] for answer in before.kept if answer[:2] == (seq, payload)][-1:]
            assert got.step == seq
            np.testing.assert_array_equal(got.outputs, first)
            return
        assert got.step == after.step
        close(got.outputs, want)
        self.set(name, after.answered(payload, got.outputs))
        self.sent[name].append((after.step, payload))

    @precondition(lambda self: any(self.sent.values()))
    @rule(data=st.data(), replica=replicas, other=st.booleans())
    def retry(self, data: st.DataObject, replica: int, other: bool) -> None:
        """An old call comes again, perhaps with another payload."""
        name = data.draw(st.sampled_from([name for name, sent in self.sent.items() if sent]))
        seq, (values, masks, shape) = data.draw(st.sampled_from(self.sent[name][-KEPT - 2 :]))
        x, mask = np.frombuffer(values, np.float32).reshape(shape), np.frombuffer(masks, bool).reshape(shape[:2])
        if other:
            x = np.nan_to_num(x) + 1
        self.stepped(replica, name, x, mask, seq, (x.tobytes(), mask.tobytes(), shape))

    @rule(name=sessions, replica=replicas, seed=seeds)
    def many_steps(self, name: str, replica: int, seed: int) -> None:
        """More calls than answers are kept, all in flight at once, in order."""
        known = self.known.get(name, Known())
        made = [self.inputs(seed + i, 1, known.examples or 1, False) for i in range(KEPT + 2)]
        first = known.step + 1

        async def together() -> list[Any]:
            futures = [self.send(replica, name, x, m, first + i) for i, (x, m, _) in enumerate(made)]
            return await asyncio.gather(*futures)

        for answer, (x, mask, payload) in zip(self.do(together()), made, strict=True):
            known = known.stepped(x, mask, None, payload)[0].answered(payload, answer.outputs)
            assert answer.step == known.step
            self.sent[name].append((known.step, payload))
        close(np.concatenate([answer[2] for answer in known.kept], axis=1), known.run()[0][:, -KEPT:])
        self.set(name, known)

    @rule(name=sessions, seed=seeds, calls=st.lists(replicas, min_size=2, max_size=6))
    def steps_at_once(self, name: str, seed: int, calls: list[int]) -> None:
        """Several steps without seq through both replicas at once: each is applied once, in the order answered."""
        known = self.known.get(name, Known())
        made = [self.inputs(seed + i, 1, known.examples or 1, False) for i in range(len(calls))]

        async def together() -> list[Any]:
            futures = [self.send(r, name, x, mask, None) for r, (x, mask, _) in zip(calls, made, strict=True)]
            return await asyncio.gather(*futures)

        answers = self.do(together())
        assert sorted(answer.step for answer in answers) == [known.step + 1 + i for i in range(len(calls))]
        for answer, (x, mask, payload) in sorted(zip(answers, made, strict=True), key=lambda pair: pair[0].step):
            known, want = known.stepped(x, mask, None, payload)
            close(answer.outputs, want)
            known = known.answered(payload, answer.outputs)
        self.set(name, known)

    @rule(names=st.lists(sessions, min_size=1, max_size=4), replica=replicas, seed=seeds, numbered=st.booleans())
    def batch_step(self, names: list[str], replica: int, seed: int, numbered: bool) -> None:
        """Several sessions in one call, one perhaps twice; each is stepped or refused as if it had been alone."""
        made = [self.inputs(5 * seed + 1 + i, 1, 1, False) for i in range(len(names))]
        x = [np.nan_to_num(inputs) for inputs, _, _ in made]
        seqs = [self.known.get(name, Known()).step + 1 if numbered else None for name in names]

        async def together() -> Many:
            done: asyncio.Future[Many] = asyncio.get_running_loop().create_future()
            columns = Columns(np.concatenate(x)[:, 0], seqs if numbered else None)
            self.replicas[replica].sessions.batch_steps.step(
                "n", KIND, repr(names).encode(), lambda: names, lambda _: columns, address, done.set_result
            )
            return await done

        many = self.do(together())
        for i, (name, (_, mask, _), seq) in enumerate(zip(names, made, seqs, strict=True)):
            before, payload = self.known.get(name, Known()), (x[i].tobytes(), mask.tobytes(), x[i].shape)
            try:
                after, want = before.stepped(x[i], mask, seq, payload)
            except StepcastError as refusal:
                wanted = refusal
            else:
                wanted = None
            if wanted is not None:
                assert type(many.errors[i]) is type(wanted)
                continue
            assert (many.steps[i], i in many.errors) == (after.step, False)
            assert want is not None
            close(many.outputs[i], want[0, 0])
            self.set(name, after.answered(payload, many.outputs[i][None, None]))
            self.sent[name].append((after.step, payload))

    @rule(name=sessions, replica=replicas, seed=seeds)
    def cancelled(self, name: str, replica: int, seed: int) -> None:
        """A call whose caller is gone before the run changes nothing."""
        x, mask, _ = self.inputs(seed, 1, self.known.get(name, Known()).examples or 1, False)

        async def leave() -> None:
            self.send(replica, name, x, mask, None, stays=False).cancel()
            await asyncio.sleep(0)

        self.do(leave())

    # --- the rest ---

    @rule(name=sessions, replica=replicas, examples=st.integers(0, 2), ttl_s=st.sampled_from([None, 30.0]))
    def create(self, name: str, replica: int, examples: int, ttl_s: float | None) -> None:
        with self.refused(SessionExists if name in self.known else None):
            self.do(self.replicas[replica].create(address(name), examples, ttl_s=ttl_s))
            self.set(name, Known(examples, base=runtime().initial(examples), ttl_s=ttl_s or TTL_S))

    @rule(name=sessions, replica=replicas, seed=seeds, examples=st.integers(1, 2), step=st.sampled_from([None, 0, 7]),
          match=st.sampled_from([None, None, "right", "wrong"]))  # fmt: skip
    def put(self, name: str, replica: int, seed: int, examples: int, step: int | None, match: str | None) -> None:
        """Set the whole state."""
        before, states = self.known.get(name), self.replicas[replica]
        base = np.random.default_rng(seed).normal(size=(examples, runtime().row_bytes // 4)).astype(np.float32)
        state = {
            layer: {key: value.tolist() for key, value in keys.items()}
            for layer, keys in runtime().unpack(base.tobytes(), examples).items()
        }
        tag = None if match is None else '"no"'
        if match == "right" and before:
            tag = etag(self.do(states.view(address(name))).record)
        refused = match == "wrong" or (match == "right" and not before)
        with self.refused(PreconditionFailed if refused else None):
            self.do(states.put(address(name), NewState(state=state, step=step), tag))
            known = before or Known()
            number = known.step if step is None else step
            same = (number, examples) == (known.step, known.examples)
            kept = known.kept if same else ()
            self.set(name, Known(examples, number, base.tobytes(), (), kept, known.ttl_s))

    @rule(name=sessions, replica=replicas)
    def put_what_get_answers(self, name: str, replica: int) -> None:
        """Changes nothing (but the time to live)."""
        if name not in self.known:
            return
        states = self.replicas[replica]
        answer = states.state(address(name), self.do(states.view(address(name))))
        if not answer["examples"]:
            return
        del answer["session"]
        self.do(states.put(address(name), NewState(**answer)))
        self.set(name, self.known[name])

    @rule(name=sessions, replica=replicas)
    def clear(self, name: str, replica: int) -> None:
        with self.refused(None if name in self.known else SessionNotFound):
            self.do(self.replicas[replica].clear(address(name)))
            self.set(name, Known(step=self.known[name].step, ttl_s=self.known[name].ttl_s))

    @rule(name=sessions, replica=replicas)
    def end(self, name: str, replica: int) -> None:
        with self.refused(None if name in self.known else SessionNotFound):
            self.do(self.replicas[replica].end(address(name)))
            self.forget(name)

    @rule(name=sessions, to=sessions, replica=replicas)
    def fork(self, name: str, to: str, replica: int) -> None:
        error: type[StepcastError] | None = None if name in self.known else SessionNotFound
        if name == to or (name in self.known and to in self.known):
            error = SessionExists
        with self.refused(error):
            self.do(self.replicas[replica].fork(address(name), to))
            self.set(to, self.known[name])

    @rule(name=sessions, replica=replicas, label=st.sampled_from(["x", "y"]))
    def checkpoint(self, name: str, replica: int, label: str) -> None:
        error: type[StepcastError] | None = CheckpointExists if label in self.saved.get(name, {}) else None
        with self.refused(error if name in self.known else SessionNotFound):
            self.do(self.replicas[replica].checkpoint(address(name), label))
            self.saved.setdefault(name, {})[label] = self.known[name]
            self.set(name, self.known[name])

    @rule(name=sessions, replica=replicas, label=st.sampled_from(["x", "y"]))
    def rewind(self, name: str, replica: int, label: str) -> None:
        error: type[StepcastError] | None = None if label in self.saved.get(name, {}) else CheckpointNotFound
        with self.refused(error if name in self.known else SessionNotFound):
            self.do(self.replicas[replica].rewind(address(name), label))
            self.set(name, replace(self.saved[name][label], ttl_s=self.known[name].ttl_s))

    @rule(name=sessions, replica=replicas, seed=seeds, steps=st.integers(1, 3), commit=st.booleans(),
          number=st.sampled_from(["none", "next", "again", "gap"]))  # fmt: skip
    def roll_out(self, name: str, replica: int, seed: int, steps: int, commit: bool, number: str) -> None:
        """Outputs u and v are fed back as features u and v; w is known."""
        before = self.known.get(name, Known())
        known = np.random.default_rng(seed).normal(size=(steps, 3)).astype(np.float32)
        known[:, :2] = np.nan
        rolled = [(seq, payload[1]) for seq, payload, _ in before.kept if payload[0] == "rollout"]
        seq = {"none": None, "next": before.step + steps, "again": before.step + steps, "gap": before.step + 9}[number]
        if number == "again" and rolled:
            seq, values = rolled[-1]
            known = np.frombuffer(values, np.float32).reshape(-1, 3)
            steps = len(known)
        seq = seq if commit else None
        payload: Payload = ("rollout", known.tobytes())
        work = rollout(self.replicas[replica], address(name), Plan(steps, known, commit, seq))
        stored = [answer for answer in before.kept if answer[:2] == (seq, payload)]
        if name not in self.known:
            error: type[StepcastError] | None = SessionNotFound
        elif seq not in (None, before.step + steps):
            error = None if stored else StepConflict
        else:
            error = NoFeedback if not before.kept or np.isnan(last_outputs(before)).any() else None
        if error is not None:
            with pytest.raises(error):
                self.do(work)
            return
        answer = self.do(work)
        if seq not in (None, before.step + steps):
            np.testing.assert_array_equal(answer["outputs"], stored[-1][2])
            return
        after, last = before, last_outputs(before)
        for row in known:
            x = np.column_stack([last, np.full(len(last), row[2])]).astype(np.float32)[:, None]
            after, y = after.stepped(x, np.ones(x.shape[:2], bool), None, ())
            assert y is not None
            last = y[:, -1]
        close(answer["outputs"], after.run()[0][:, -steps:])
        if commit:
            assert answer["step"] == after.step
            self.set(name, after.answered(payload, answer["outputs"]))

    @rule(seconds=st.sampled_from([20.0, 40.0]))
    def wait(self, seconds: float) -> None:
        """Time passes; sessions that were not written in their time are forgotten, checkpoints with them."""
        self.now += seconds
        for name in [name for name, known in self.known.items() if known.expires <= self.now]:
            self.forget(name)

    @invariant()
    def sessions_are_what_the_model_says(self) -> None:
        for name in NAMES:
            known = self.known.get(name)
            state = known.run()[1] if known and known.examples else b""
            for states in self.replicas:
                self.do(self.compare(states, name, known, state))

    async def compare(self, states: States, name: str, known: Known | None, state: bytes) -> None:
        listed, _ = await states.list_sessions("n", KIND, name, "", 100)
        if known is None:
            assert not listed
            with pytest.raises(SessionNotFound):
                await states.view(address(name))
            return
        assert listed == [name]
        record = (await states.view(address(name))).record
        assert (record.step, record.examples, len(record.answers)) == (known.step, known.examples, len(known.kept))
        close(np.frombuffer(record.state, np.float32), np.frombuffer(state, np.float32))
        labels = [checkpoint["name"] for checkpoint in await states.checkpoints(address(name))]
        assert labels == sorted(self.saved.get(name, {}))


def address(name: str) -> Address:
    return Address("n", KIND, name)


def close(got: Any, want: Any) -> None:
    tolerance = runtime().manifest.tolerance
    np.testing.assert_allclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol)


def last_outputs(known: Known) -> Array:
    """Each row's last output that was not masked."""
    outputs = np.concatenate([answer[2] for answer in known.kept], axis=1)
    last = outputs[:, 0].copy()
    for t in range(outputs.shape[1]):
        here = ~np.isnan(outputs[:, t]).any(axis=1)
        last[here] = outputs[here, t]
    return last


class OnMemory(Machine):
    def stores(self, folder: Path) -> tuple[Store, Store]:
        shared = MemoryStore(clock=lambda: self.now)
        return shared, shared


class OnSqlite(Machine):
    def stores(self, folder: Path) -> tuple[Store, Store]:
        one, other = (SqliteStore(folder / "own.db", clock_ms=self.clock_ms) for _ in range(2))
        return one, other


class Profiles:
    """Always the same examples, so that a change that breaks nothing never fails."""

    common: ClassVar = {
        "derandomize": True,
        "database": None,
        "deadline": None,
        "phases": [Phase.generate],  # a failure is shown as found: shrinking takes minutes
        "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    }
    many = settings(max_examples=25, stateful_step_count=40, **common)
    few = settings(max_examples=8, stateful_step_count=40, **common)


@pytest.mark.parametrize(("machine", "profile"), [(OnMemory, Profiles.many), (OnSqlite, Profiles.few)])
def test_sessions_do_what_the_model_of_their_semantics_says(machine: type[Machine], profile: settings) -> None:
    """Any sequence of operations through two replicas leaves what the model says, and answers what it says."""
    run_state_machine_as_test(machine, settings=profile)
