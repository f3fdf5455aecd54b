"""The laws, for every model kind, over every store, through every door.

The truth is what torch recorded in golden.npz when the model was exported: inputs, lengths, outputs and final states
(foreign graphs: what the graph itself answered when it was taken in).

Laws 4 and 6 need processes: they are started once per store, and all kinds and doors go through the same kills and
races together; each kind and door is then a test of its own. How Redis itself is killed is in test_outages.py and
chaos.py, what a failing store does to law 3 in test_store_faults.py.
"""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import pytest
from doors import BATCH_DOORS, DOORS, STEP_DOORS, Answer, Array, Call, HttpDoor, Script, State, outputs_of, put, step
from onnx import numpy_helper
from redis_servers import GIVEN, cluster_url
from serving import MODELS, Process, Running, golden, running

from service.engine.model import Runtime
from service.engine.repository import Repository
from stepcast.errors import (
    DeadlineExceeded,
    ExamplesMismatch,
    NonFinite,
    NotStreaming,
    ShapeMismatch,
    StepcastError,
    StepConflict,
)
from stepcast.manifest import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE, Manifest, read_manifest, sha256_of

pytestmark = pytest.mark.service

STORES = ("memory", "sqlite", "redis", "cluster", *GIVEN)
DURABLE = ("sqlite", "redis", "cluster", *GIVEN)
GRPC = ("--grpc-port", "0")
BATCH_ROWS = "32"  # of the processes, where no more sessions step at once: a start tries batches of up to so many rows
Opened = Callable[[str], Script]


@cache
def manifest(model: str) -> Manifest:
    """A model's manifest."""
    return read_manifest(MODELS / model / "1")


@cache
def recording(model: str) -> dict[str, Array]:
    """What torch recorded."""
    return golden(model)


KINDS = sorted(path.name for path in MODELS.iterdir() if path.is_dir())
STREAMING = [name for name in KINDS if manifest(name).streaming]


def url_of(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """A store's URL; an SQLite file lies in the folder."""
    match kind:
        case "redis":
            return str(request.getfixturevalue("redis_server").url)
        case "cluster":
            return cluster_url(request.getfixturevalue("redis_cluster"))
        case "sqlite":
            return f"sqlite:///{folder / 'sessions.db'}"
    return GIVEN.get(kind, "memory://")


@pytest.fixture(scope="module", params=STORES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store's URL."""
    return url_of(request.param, request, tmp_path_factory.mktemp("laws"))


@pytest.fixture(scope="module")
def server(store: str) -> Iterator[Running]:
    """A server on that store."""
    with running(store=store, models=MODELS, grpc_port=0) as server:
        yield server


@pytest.fixture(params=DOORS)
def opened(request: pytest.FixtureRequest, server: Running) -> Iterator[Opened]:
    """Opens a door to a model."""
    made: list[Any] = []

    def opened(model: str) -> Script:
        made.append(STEP_DOORS[request.param](server.url, model))
        return Script(made[-1], manifest(model))

    yield opened
    for door in made:
        door.close()


every_step_door = pytest.mark.parametrize("opened", STEP_DOORS, indirect=True)


@pytest.fixture
def name() -> str:
    """A session id that no other test has."""
    return f"s-{Random().getrandbits(48):012x}"


def close(got: Any, want: Any, model: str) -> None:
    """Assert that two results are equal within the manifest's tolerance."""
    tolerance, got, want = manifest(model).tolerance, np.asarray(got), np.asarray(want)
    if got.shape != want.shape or not (abs(got - want) <= tolerance.atol + tolerance.rtol * abs(want)).all():
        # Ten times as slow, and also right for what is not finite.
        np.testing.assert_allclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol)


def states_close(got: State, want: State, model: str) -> None:
    """Assert that two states have the same layers and keys, and values within the tolerance."""
    assert got.keys() == want.keys()
    for layer, keys in want.items():
        assert got[layer].keys() == keys.keys()
        for key, value in keys.items():
            close(got[layer][key].reshape(value.shape), value, model)


def recorded(model: str, side: str, row: int) -> State:
    """The recorded state of one row, before (state_in) or after (state_out)."""
    state: State = {}
    for tensor in manifest(model).states:
        value = recording(model)[f"{side}.{tensor.layer}.{tensor.key}"][row : row + 1]
        state.setdefault(tensor.layer, {})[tensor.key] = value
    return state


def rows_of(model: str) -> list[tuple[int, int]]:
    """(row, length) of the recorded sequences that are not empty."""
    return [(row, int(n)) for row, n in enumerate(recording(model)["lengths"]) if n]


def begins(model: str, row: int) -> bool:
    """Whether a recorded sequence begins, without a history."""
    return not any(value.any() for keys in recorded(model, "state_in", row).values() for value in keys.values())


def longest(model: str) -> tuple[int, int]:
    """(row, length) of a longest recorded sequence."""
    return max(rows_of(model), key=lambda pair: pair[1])


def readings(model: str, count: int = 1) -> Array:
    """The first steps of the first recorded sequence, none of them missing, (count, F)."""
    return np.nan_to_num(recording(model)["x"][0, :count])


# --- law 1 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", STREAMING)
@pytest.mark.parametrize("block", [1, 3, None])
def test_law1_stepping_equals_one_call_equals_torch(opened: Opened, model: str, block: int | None, name: str) -> None:
    """Stepping T times, in blocks, and in one call give torch's outputs and final states."""
    in_blocks_it_is_as_recorded(opened(model), model, block, name)


@pytest.mark.parametrize("model", STREAMING)
@pytest.mark.parametrize("opened", BATCH_DOORS, indirect=True)
def test_law1_batch_steps_equal_torch(opened: Opened, model: str, name: str) -> None:
    """A session as a column of the batch step gives torch's outputs and final states."""
    in_blocks_it_is_as_recorded(opened(model), model, 1, name)


def in_blocks_it_is_as_recorded(script: Script, model: str, block: int | None, name: str) -> None:
    """Step two recorded sequences, one that goes on and one that begins, by so many steps a call."""
    arrays = recording(model)
    for row, length in (rows_of(model)[0], rows_of(model)[-2]):
        session = f"{name}-{row}"
        script.put(session, recorded(model, "state_in", row))
        x, parts = arrays["x"][row : row + 1, :length], []
        for start in range(0, length, block or length):
            y, number = script.step(session, x[:, start : start + (block or length)])
            parts.append(y)
        assert number == length
        close(np.concatenate(parts, axis=1)[0], arrays["y"][row, :length], model)
        states_close(script.state(session), recorded(model, "state_out", row), model)


@pytest.mark.parametrize("model", STREAMING)
def test_law1_inputs_of_every_rank_mean_the_same(opened: Opened, model: str, name: str) -> None:
    """[F], [N,F] and [N,T,F] with one example and one step give the same numbers, each in its own rank."""
    script, x = opened(model), recording(model)["x"][0, :1]
    flat, _ = script.step(f"{name}-1", x[0])
    rows, _ = script.step(f"{name}-2", x)
    cube, _ = script.step(f"{name}-3", x[None])
    assert (flat.ndim, rows.ndim, cube.ndim) == (1, 2, 3)
    np.testing.assert_array_equal(flat, rows[0])
    np.testing.assert_array_equal(flat, cube[0, 0])


@pytest.mark.parametrize("model", [kind for kind in KINDS if kind not in STREAMING])
@every_step_door
def test_law1_what_reads_from_both_ends_is_refused_by_step(opened: Opened, model: str, name: str) -> None:
    """A model that cannot be stepped says so."""
    with pytest.raises(NotStreaming):
        opened(model).step(name, recording(model)["x"][0, :1])


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("packed", [False, True], ids=["http-json", "http-msgpack"])
def test_law1_predict_equals_torch(server: Running, model: str, packed: bool) -> None:
    """Whole sequences without a session: one by one, and all at once with masks."""
    arrays, many_to_one = recording(model), manifest(model).readout == "last"
    rows = [(row, length) for row, length in rows_of(model) if begins(model, row)]
    most = max(length for _, length in rows)
    x = arrays["x"][[row for row, _ in rows], :most]
    mask = [[int(step < length) for step in range(most)] for _, length in rows]
    with closing(HttpDoor(server.url, model, packed)) as door:
        together = door.predict(inputs=x, mask=mask)
        for (row, length), y in zip(rows, together, strict=True):
            want = arrays["y"][row, length - 1] if many_to_one else arrays["y"][row, :length]
            close(y if many_to_one else y[:length], want, model)
            close(door.predict(inputs=arrays["x"][row, :length]), want, model)


# --- law 2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", STREAMING)
@every_step_door
def test_law2_an_answer_does_not_depend_on_batch_mates(opened: Opened, model: str, name: str) -> None:
    """Eight sessions, stepped at once by different numbers of steps, answer as each does alone."""
    script, arrays, rows = opened(model), recording(model), rows_of(model)
    mates = {f"{name}-{mate}": (*rows[mate % len(rows)], 1 + mate % 4) for mate in range(8)}
    for answer in script.door.together(
        [put(session, recorded(model, "state_in", row)) for session, (row, _, _) in mates.items()]
    ):
        assert not isinstance(answer, Exception), answer
    parts: dict[str, list[Array]] = {session: [] for session in mates}
    for turn in range(max(length for _, length, _ in mates.values())):
        calls = [
            step(session, arrays["x"][row : row + 1, turn * block : min(turn * block + block, length)])
            for session, (row, length, block) in mates.items()
            if turn * block < length
        ]
        for call, answer in zip(calls, script.door.together(calls), strict=True):
            parts[call.session].append(outputs_of(answer)[0])
    for session, (row, length, _) in mates.items():
        close(np.concatenate(parts[session], axis=1)[0], arrays["y"][row, :length], model)
        states_close(script.state(session), recorded(model, "state_out", row), model)


@pytest.mark.parametrize("model", STREAMING)
def test_law2_padding_and_masks_change_nothing(opened: Opened, model: str, name: str) -> None:
    """Rows padded on the right, and rows with gaps anywhere, answer as the present steps alone do."""
    script, arrays = opened(model), recording(model)
    row, length = longest(model)
    x = arrays["x"][row : row + 1, :length]
    script.put(name, recorded(model, "state_in", row))
    mask = np.ones((1, 2 * length), int)
    spread = np.full((1, 2 * length, x.shape[2]), 0.5, np.float32)
    for at in range(length):  # a gap after each step, with values that must not matter
        spread[0, 2 * at], mask[0, 2 * at + 1] = x[0, at], 0
    y, number = script.step(name, spread, mask=mask.tolist())
    assert number == 2 * length
    close(y[0, ::2], arrays["y"][row, :length], model)
    assert np.isnan(y[0, 1::2]).all()
    states_close(script.state(name), recorded(model, "state_out", row), model)


# --- law 3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", STREAMING)
@every_step_door
def test_law3_a_refused_step_leaves_the_state_bit_for_bit(
    request: pytest.FixtureRequest, opened: Opened, model: str, name: str
) -> None:
    """Wrong shape, infinity, another N, a gap in seq and another payload change nothing."""
    script, x = opened(model), readings(model)
    script.step(name, x, seq=1)
    before = script.document(name)
    infinite = x.copy()
    infinite[0, 0] = np.inf
    refused: list[tuple[type[StepcastError], Callable[[], Any]]] = [
        (ShapeMismatch, lambda: script.step(name, x[:, :-1] if x.shape[1] > 1 else np.tile(x, 2))),
        (NonFinite, lambda: script.step(name, infinite)),
        (StepConflict, lambda: script.step(name, x, seq=7)),
        (StepConflict, lambda: script.step(name, x + 1, seq=1)),
    ]
    if request.node.callspec.params["opened"] in DOORS:
        refused.append((ExamplesMismatch, lambda: script.step(name, np.tile(x, (2, 1)))))
    for error, attempt in refused:
        with pytest.raises(error):
            attempt()
        assert script.document(name) == before


@pytest.mark.parametrize("model", STREAMING)
def test_law3_a_masked_step_leaves_the_state_bit_for_bit(opened: Opened, model: str, name: str) -> None:
    """A step whose mask is 0 counts, and changes no state."""
    script, x = opened(model), recording(model)["x"][0, :1]
    script.step(name, x)
    before = script.document(name)
    y, number = script.step(name, x, mask=[0])
    after = script.document(name)
    assert number == 2
    assert np.isnan(y).all()
    assert after["state"] == before["state"]


@pytest.mark.parametrize("model", STREAMING)
def test_law3_one_masked_example_keeps_its_state_beside_others(opened: Opened, model: str, name: str) -> None:
    """Of three examples the masked one keeps its state bit for bit, the others advance as alone."""
    script, x = opened(model), recording(model)["x"][[0, 1, 3], 0]
    script.step(name, x)
    before = script.state(name)
    script.step(name, x, mask=[1, 0, 1])
    after = script.state(name)
    for row in (0, 2):
        alone = np.tile(x[row : row + 1, None], (1, 2, 1))
        script.step(f"{name}-{row}", alone)
        want = script.state(f"{name}-{row}")
        got = {layer: {key: value[row : row + 1] for key, value in keys.items()} for layer, keys in after.items()}
        states_close(got, want, model)
    for layer, keys in before.items():
        for key, value in keys.items():
            np.testing.assert_array_equal(after[layer][key][1], value[1])


@pytest.fixture(scope="module")
def hurried(store: str) -> Iterator[Running]:
    """A server where every step comes too late for its run; so it tries no batches of them either."""
    with running(store=store, models=MODELS, deadline_s=1e-9, batch_rows=1, grpc_port=0) as server:
        yield server


@pytest.mark.parametrize("model", STREAMING)
@pytest.mark.parametrize("door", STEP_DOORS)
def test_law3_a_step_that_is_too_late_leaves_the_state_bit_for_bit(
    hurried: Running, door: str, model: str, name: str
) -> None:
    """With a number and without, nothing of the session changes."""
    with closing(STEP_DOORS[door](hurried.url, model)) as way:
        script = Script(way, manifest(model))
        script.put(name, recorded(model, "state_in", rows_of(model)[0][0]), step=5)
        before = script.document(name)
        for seq in (None, 6):
            with pytest.raises(DeadlineExceeded):
                script.step(name, readings(model), seq=seq)
            assert script.document(name) == before


@pytest.mark.parametrize("model", STREAMING)
@every_step_door
def test_law3_a_client_that_goes_away_leaves_the_session_whole(opened: Opened, model: str, name: str) -> None:
    """Its step is applied once or not at all: sent again, the answers and the state are those of an unbroken run."""
    arrays, (row, length) = recording(model), rows_of(model)[-2]
    x = arrays["x"][row : row + 1, :length]
    opened(model).put(name, recorded(model, "state_in", row))
    opened(model).door.drop(step(name, x[:, 0], seq=1))
    script = opened(model)
    assert script.document(name)["step"] in (0, 1)
    parts = []
    for at in range(length):
        y, number = script.step(name, x[:, at], seq=at + 1)
        assert number == at + 1
        parts.append(y)
    close(np.concatenate(parts), arrays["y"][row, :length], model)
    states_close(script.state(name), recorded(model, "state_out", row), model)


# --- law 4 ------------------------------------------------------------------------------------------------------------


class Life:
    """Two sessions of one kind behind one door, stepped along their recorded sequences, whatever dies on the way."""

    def __init__(self, door: str, model: str) -> None:
        self.door, self.model = door, model
        self.rows = {f"{door}-{row}": (row, length) for row, length in (rows_of(model)[0], rows_of(model)[-2])}
        self.parts: dict[str, list[Array]] = {session: [] for session in self.rows}
        self.begun: set[str] = set()
        self.script: Script | None = None
        self.done = False
        self.error: Exception | None = None

    def open(self, url: str) -> None:
        """A server was started: what was acknowledged last is there, and is answered as it was."""
        self.script = Script(STEP_DOORS[self.door](url, self.model), manifest(self.model))
        self._ask([self._step(session, len(parts)) for session, parts in self.parts.items() if parts], self._again)

    def close(self) -> None:
        """Give connections back."""
        if self.script is not None:
            self.script.door.close()

    def advance(self) -> None:
        """One step of each session; after the last one the whole is checked."""
        rows = {session: row for session, (row, _) in self.rows.items() if session not in self.begun}
        self._ask([put(session, recorded(self.model, "state_in", row)) for session, row in rows.items()], self._begin)
        going = [session for session, (_, length) in self.rows.items() if len(self.parts[session]) < length]
        self._ask([self._step(session, len(self.parts[session]) + 1) for session in going], self._go_on)
        if not going:
            self._check()
            self.done = True

    def _check(self) -> None:
        """The answers and the final states are those of an unbroken run."""
        assert self.script is not None
        for session, (row, length) in self.rows.items():
            close(np.concatenate(self.parts[session]), recording(self.model)["y"][row, :length], self.model)
            assert self.script.document(session)["step"] == length
            states_close(self.script.state(session), recorded(self.model, "state_out", row), self.model)

    def _step(self, session: str, seq: int) -> Call:
        row, _ = self.rows[session]
        return step(session, recording(self.model)["x"][row : row + 1, seq - 1], seq=seq)

    def _begin(self, session: str, answer: Answer) -> None:
        assert isinstance(answer, dict), answer
        assert answer["step"] == 0
        self.begun.add(session)

    def _go_on(self, session: str, answer: Answer) -> None:
        y, number = outputs_of(answer)
        self.parts[session].append(y)
        assert number == len(self.parts[session])

    def _again(self, session: str, answer: Answer) -> None:
        y, number = outputs_of(answer)
        assert number == len(self.parts[session])
        np.testing.assert_array_equal(y, self.parts[session][-1])

    def _ask(self, calls: list[Call], take: Callable[[str, Answer], None]) -> None:
        """Take what was answered; then raise, if the connection was lost."""
        assert self.script is not None
        answers = self.script.door.together(calls) if calls else []
        lost = [answer for answer in answers if isinstance(answer, ConnectionError)]
        for call, answer in zip(calls, answers, strict=True):
            if not isinstance(answer, ConnectionError):
                take(call.session, answer)
        if lost:
            raise lost[0]


class Town:
    """All lives of a store, one thread for each door."""

    def __init__(self) -> None:
        self.lives = {(door, model): Life(door, model) for door in STEP_DOORS for model in STREAMING}
        self._moves = threading.Semaphore(0)

    def go_on(self, process: Process, moves: int | None = None) -> None:
        """Step all lives: to their ends, or until so many moves were made and the process is killed in their midst."""
        ready = threading.Barrier(len(STEP_DOORS))
        threads = [threading.Thread(target=self._go_on, args=(door, process.url, ready)) for door in STEP_DOORS]
        for thread in threads:
            thread.start()
        if moves is not None:
            while moves and any(thread.is_alive() for thread in threads):
                moves -= self._moves.acquire(timeout=0.1)
            process.kill()
        for thread in threads:
            thread.join()
        for life in self.lives.values():
            life.close()

    def _go_on(self, door: str, url: str, ready: threading.Barrier) -> None:
        lives = [life for (name, _), life in self.lives.items() if name == door]
        for life in lives:
            try:
                life.open(url)
            except Exception as error:
                life.error = life.error or error
        ready.wait(60)
        while lives := [life for life in lives if not life.done and life.error is None]:
            for life in lives:
                try:
                    life.advance()
                except ConnectionError:
                    return
                except Exception as error:
                    life.error = error
                self._moves.release()


@pytest.fixture(scope="module", params=DURABLE)
def survivors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """All lives, after two kills."""
    url, town = url_of(request.param, request, tmp_path_factory.mktemp("kills")), Town()
    for moves in (3 * len(town.lives), 4 * len(town.lives)):
        town.go_on(Process(url, *GRPC, models=MODELS, batch_rows=BATCH_ROWS), moves)
    process = Process(url, *GRPC, models=MODELS, batch_rows=BATCH_ROWS)
    try:
        town.go_on(process)
        yield town
    finally:
        process.kill()


@pytest.mark.parametrize("model", STREAMING)
@pytest.mark.parametrize("door", STEP_DOORS)
def test_law4_killed_at_any_moment_a_session_goes_on(survivors: Town, door: str, model: str) -> None:
    """kill -9, start again on the same store: every acknowledged step is there, once, the numbers an unbroken run's."""
    life = survivors.lives[door, model]
    if life.error is not None:
        raise life.error
    assert life.done


# --- law 5 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", STREAMING)
def test_law5_set_of_get_changes_nothing(opened: Opened, model: str, name: str) -> None:
    """Putting back what get answered leaves every bit as it was, kept answers included."""
    script, x = opened(model), recording(model)["x"][0, :2]
    first, _ = script.step(name, x[:1], seq=1)
    before = script.document(name)
    fields = {k: before[k] for k in ("state", "step", "version", "fingerprint", "examples")}
    script.call("state.set", name, **fields)
    after = script.document(name)
    assert after["state"] == before["state"]
    assert after["step"] == before["step"]
    retried, number = script.step(name, x[:1], seq=1)
    assert number == 1
    np.testing.assert_array_equal(retried, first)


@pytest.mark.parametrize("model", STREAMING)
def test_law5_a_fork_is_its_parent_and_then_goes_its_own_way(opened: Opened, model: str, name: str) -> None:
    """get after fork equals the parent; stepping the child leaves the parent as it was."""
    script, x = opened(model), readings(model, 2)
    script.step(name, x[:1])
    script.call("fork", name, to=f"{name}-child")
    parent, child = script.document(name), script.document(f"{name}-child")
    assert parent["state"] == child["state"]
    assert parent["step"] == child["step"]
    script.step(f"{name}-child", x[1:])
    assert script.document(name)["state"] == parent["state"]


@pytest.mark.parametrize("model", STREAMING)
def test_law5_rewind_equals_having_stopped(opened: Opened, model: str, name: str) -> None:
    """After a rewind to k the session answers as one that stopped at k, bit for bit."""
    script, x = opened(model), readings(model, 3)
    script.step(name, x[:1], seq=1)
    then = script.document(name)
    script.call("checkpoint", name, name="k")
    first, _ = script.step(name, x[1:2], seq=2)
    script.step(name, x[2:3], seq=3)
    script.call("rewind", name, to="k")
    now = script.document(name)
    assert {k: now[k] for k in ("state", "step", "examples")} == {k: then[k] for k in ("state", "step", "examples")}
    second, number = script.step(name, x[1:2], seq=2)
    assert number == 2
    np.testing.assert_array_equal(first, second)


# --- law 6 ------------------------------------------------------------------------------------------------------------

EACH = 5  # steps without a number, by each replica


class Race:
    """Two replicas that step the same two sessions of one kind at the same moments.

    One session is stepped without numbers: all steps count. The other gets each step of a recorded sequence from both:
    it counts once.

    Args:
        urls: Of the replicas.
    """

    def __init__(self, door: str, model: str, urls: list[str]) -> None:
        self.door, self.model, self.urls = door, model, urls
        self.start = threading.Barrier(len(urls))
        self.numbers: list[int] = []
        self.parts: dict[str, list[Array]] = {url: [] for url in urls}
        self.errors: list[Exception] = []

    def run(self) -> None:
        """Step from all sides."""
        with closing(HttpDoor(self.urls[0], self.model, packed=False)) as door:
            before = recorded(self.model, "state_in", rows_of(self.model)[-2][0])
            Script(door, manifest(self.model)).put(f"{self.door}-numbered", before)
        threads = [threading.Thread(target=self._replica, args=(url,)) for url in self.urls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _replica(self, url: str) -> None:
        script = Script(STEP_DOORS[self.door](url, self.model), manifest(self.model))
        try:
            self._step(script, self.parts[url])
        except threading.BrokenBarrierError:
            pass  # the other one says why
        except Exception as error:
            self.errors.append(error)
            self.start.abort()
        finally:
            script.door.close()

    def _step(self, script: Script, parts: list[Array]) -> None:
        for _ in range(EACH):
            self.start.wait(20)
            self.numbers.append(script.step(f"{self.door}-counted", readings(self.model))[1])
        row, length = rows_of(self.model)[-2]
        for at in range(length):
            self.start.wait(20)
            x = recording(self.model)["x"][row : row + 1, at]
            y, number = script.step(f"{self.door}-numbered", x, seq=at + 1)
            assert number == at + 1
            parts.append(y)

    def check(self) -> None:
        """Each step is there once, and the numbers are those of an unbroken run."""
        if self.errors:
            raise self.errors[0]
        assert sorted(self.numbers) == list(range(1, 2 * EACH + 1))
        row, length = rows_of(self.model)[-2]
        with closing(HttpDoor(self.urls[0], self.model, packed=True)) as door:
            script = Script(door, manifest(self.model))
            states_close(script.state(f"{self.door}-counted"), self._counted(), self.model)
            states_close(script.state(f"{self.door}-numbered"), recorded(self.model, "state_out", row), self.model)
        for parts in self.parts.values():
            np.testing.assert_array_equal(parts, self.parts[self.urls[0]])
            close(np.concatenate(parts), recording(self.model)["y"][row, :length], self.model)

    def _counted(self) -> State:
        """The state of one that took as many steps alone."""
        runtime = Runtime(MODELS / self.model / "1", device="cpu")
        blank = np.frombuffer(runtime.initial(1), np.uint8).reshape(1, -1)
        _, state = runtime.run(np.tile(readings(self.model)[None], (1, 2 * EACH, 1)), None, blank)
        return runtime.unpack(state.tobytes(), 1)


@pytest.fixture(scope="module", params=DURABLE)
def races(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Race]]:
    """All races of a store, run."""
    store = url_of(request.param, request, tmp_path_factory.mktemp("races"))
    replicas = [Process(store, *GRPC, models=MODELS, batch_rows=BATCH_ROWS) for _ in range(2)]
    try:
        urls = [replica.url for replica in replicas]
        races = {(door, model): Race(door, model, urls) for door in STEP_DOORS for model in STREAMING}
        for race in races.values():
            race.run()
        yield races
    finally:
        for replica in replicas:
            replica.kill()


@pytest.mark.parametrize("model", STREAMING)
@pytest.mark.parametrize("door", STEP_DOORS)
def test_law6_two_replicas_never_lose_or_double_a_step(
    races: dict[tuple[str, str], Race], door: str, model: str
) -> None:
    """Two processes stepping the same session at once: every step is there once, in numbers, answers and state."""
    races[door, model].check()


# --- law 7 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", KINDS)
def test_law7_what_is_exported_is_what_was_trained(model: str) -> None:
    """onnxruntime reproduces torch's recording within the manifest's tolerance, also step by step."""
    proof = Runtime(MODELS / model / "1").prove()
    assert proof.rows > 0
    assert proof.stepped == (model in STREAMING)


def other_weights(folder: Path) -> None:
    """A graph that computes something else, of which the manifest knows."""
    graph = onnx.load(folder / MODEL_FILE)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    real = {name for name, weight in weights.items() if weight.dtype == np.float32 and weight.size > 1}
    for tensor in graph.graph.initializer:
        if tensor.name in (real or weights):
            weight = weights[tensor.name]
            changed = weight * np.float32(1.1) if real else weight + 1
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    onnx.save(graph, folder / MODEL_FILE)
    document = json.loads((folder / MANIFEST_FILE).read_text())
    document["sha256"] = sha256_of(folder / MODEL_FILE)
    (folder / MANIFEST_FILE).write_text(json.dumps(document))


def other_file(folder: Path) -> None:
    """A graph that computes the same, of which the manifest does not know."""
    graph = onnx.load(folder / MODEL_FILE)
    graph.doc_string = "changed"
    onnx.save(graph, folder / MODEL_FILE)


def other_recording(side: str) -> Callable[[Path], None]:
    """A golden file in which every array of one side is a little different."""

    def change(folder: Path) -> None:
        with np.load(folder / GOLDEN_FILE) as file:
            arrays = {key: _moved(file[key]) if key.startswith(side) else file[key] for key in file}
        np.savez(folder / GOLDEN_FILE, **arrays)

    return change


def _moved(array: Array) -> Array:
    return array + np.array(0.01 if array.dtype.kind == "f" else 1, array.dtype)


TAMPERINGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (other_weights, "differ from golden.npz"),
    "file": (other_file, "sha256 is"),
    "outputs": (other_recording("y"), "outputs in one call differ from golden.npz"),
    "states": (other_recording("state_out"), "state .* differ from golden.npz"),
}


@pytest.mark.parametrize("model", KINDS)
def test_law7_a_version_that_cannot_prove_it_never_goes_live(model: str, tmp_path: Path) -> None:
    """A graph or a golden file that was tampered with is not served, and it is said why; the version before stays."""
    wanted = {}
    shutil.copytree(MODELS / model / "1", tmp_path / model / "1")
    for version, (tamper, said) in enumerate(TAMPERINGS.values(), 2):
        if "state" in said and not manifest(model).states:
            continue
        folder = shutil.copytree(MODELS / model / "1", tmp_path / model / str(version))
        document = json.loads((folder / MANIFEST_FILE).read_text())
        (folder / MANIFEST_FILE).write_text(json.dumps({**document, "version": version}))
        tamper(folder)
        wanted[str(folder)] = said
    repository = Repository(tmp_path, device="cpu", threads=1)
    repository.scan()
    assert repository.versions(model) == [1]
    assert repository.failures.keys() == wanted.keys()
    for folder, said in wanted.items():
        assert re.search(said, repository.failures[folder])
