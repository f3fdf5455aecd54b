"""The laws, for every model kind, over every store, through every door.

The truth is what torch recorded in golden.npz when the model was exported: inputs, lengths, outputs and final states.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from doors import DOORS, HttpDoor, Script, State
from serving import MODELS, Process, Running, golden, running

from service.repository import Repository
from service.runtime import Runtime
from stepcast.errors import (
    ExamplesMismatch,
    NonFinite,
    NotStreaming,
    ShapeMismatch,
    StepcastError,
    StepConflict,
)
from stepcast.manifest import read_manifest

pytestmark = pytest.mark.service

KINDS = sorted(path.name for path in MODELS.iterdir() if path.is_dir())
STREAMING = [name for name in KINDS if read_manifest(MODELS / name / "1").streaming]
STORES = ("memory", "sqlite", "redis", "cluster")
KIND = "lstm"


@pytest.fixture(scope="module", params=STORES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store's URL."""
    if request.param == "redis":
        return str(request.getfixturevalue("redis_server").url)
    if request.param == "cluster":
        return "redis+cluster://" + ",".join(s.name for s in request.getfixturevalue("redis_cluster")[:2])
    folder = tmp_path_factory.mktemp("laws")
    return "memory://" if request.param == "memory" else f"sqlite:///{folder / 'sessions.db'}"


@pytest.fixture(scope="module")
def server(store: str) -> Iterator[Running]:
    """A server on that store."""
    with running(store=store) as server:
        yield server


@pytest.fixture(params=DOORS)
def opened(request: pytest.FixtureRequest, server: Running) -> Iterator[Callable[[str], Script]]:
    """Opens a door to a model."""
    made: list[Any] = []

    def opened(model: str) -> Script:
        made.append(DOORS[request.param](server.url, model))
        return Script(made[-1])

    yield opened
    for door in made:
        door.close()


@pytest.fixture
def name() -> str:
    """A session id that no other test has."""
    return f"s-{Random().getrandbits(48):012x}"


def close(got: Any, want: Any, model: str) -> None:
    """Assert that two results are equal within the manifest's tolerance."""
    tolerance = read_manifest(MODELS / model / "1").tolerance
    np.testing.assert_allclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol)


def states_close(got: State, want: State, model: str) -> None:
    assert got.keys() == want.keys()
    for layer, keys in want.items():
        for key, value in keys.items():
            close(got[layer][key].reshape(value.shape), value, model)


def recorded(model: str, side: str, row: int) -> State:
    """The recorded state of one row, before (state_in) or after (state_out)."""
    arrays, state = golden(model), {}
    for tensor in read_manifest(MODELS / model / "1").states:
        value = arrays[f"{side}.{tensor.layer}.{tensor.key}"][row : row + 1]
        state.setdefault(tensor.layer, {})[tensor.key] = value.reshape(1, -1)
    return state


def shaped(state: State, model: str) -> State:
    """A flat state in the manifest's shapes."""
    manifest = read_manifest(MODELS / model / "1")
    return {
        layer: {key: value.reshape(-1, *manifest.layers[layer][key].shape) for key, value in keys.items()}
        for layer, keys in state.items()
    }


def rows_of(model: str) -> list[tuple[int, int]]:
    """(row, length) of the recorded sequences that are not empty."""
    return [(row, int(n)) for row, n in enumerate(golden(model)["lengths"]) if n]


# --- law 1 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", STREAMING)
@pytest.mark.parametrize("block", [1, 3, None])
def test_law1_stepping_equals_one_call_equals_torch(
    opened: Callable[[str], Script], model: str, block: int | None, name: str
) -> None:
    """Stepping T times, in blocks, and in one call give torch's outputs and final states."""
    script, arrays = opened(model), golden(model)
    for row, length in (rows_of(model)[0], rows_of(model)[-2]):  # one that goes on, one that begins
        session = f"{name}-{row}"
        script.put(session, shaped(recorded(model, "state_in", row), model))
        x, parts = arrays["x"][row : row + 1, :length], []
        for start in range(0, length, block or length):
            y, step = script.step(session, x[:, start : start + (block or length)])
            parts.append(y)
        assert step == length
        close(np.concatenate(parts, axis=1)[0], arrays["y"][row, :length], model)
        states_close(script.state(session), recorded(model, "state_out", row), model)


def test_law1_inputs_of_every_rank_mean_the_same(opened: Callable[[str], Script], name: str) -> None:
    """[F], [N,F] and [N,T,F] with one example and one step give the same numbers, each in its own rank."""
    script, x = opened(KIND), golden(KIND)["x"][0, :1]
    flat, _ = script.step(f"{name}-1", x[0])
    rows, _ = script.step(f"{name}-2", x)
    cube, _ = script.step(f"{name}-3", x[None])
    assert (flat.ndim, rows.ndim, cube.ndim) == (1, 2, 3)
    np.testing.assert_array_equal(flat, rows[0])
    np.testing.assert_array_equal(flat, cube[0, 0])


def test_law1_a_bidirectional_model_is_refused_by_step_and_served_by_predict(server: Running, name: str) -> None:
    """What can not be stepped says so; predict gives torch's outputs."""
    refused = [kind for kind in KINDS if kind not in STREAMING]
    assert refused
    for model in refused:
        arrays, door = golden(model), HttpDoor(server.url, model, packed=False)
        with pytest.raises(NotStreaming):
            Script(door).step(name, arrays["x"][0, :1])
        row, length = max(rows_of(model), key=lambda pair: pair[1])
        inputs = np.where(np.isnan(arrays["x"]), None, arrays["x"].astype(object))[row, :length].tolist()
        answer = door._client.post(f"{server.url}/v1/models/{model}/predict", json={"inputs": inputs}).json()
        want = arrays["y"][row, :length]
        close(answer["outputs"], want[-1] if read_manifest(MODELS / model / "1").readout == "last" else want, model)
        door.close()


# --- law 2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", STREAMING)
def test_law2_an_answer_does_not_depend_on_batch_mates(server: Running, model: str, name: str) -> None:
    """Sixteen sessions of different lengths stepped at once answer as each does alone."""
    arrays, lengths = golden(model), [n for _, n in rows_of(model)]
    rows = [row for row, _ in rows_of(model)]
    results: dict[int, Any] = {}

    def run(mate: int) -> None:
        row, length = rows[mate % len(rows)], lengths[mate % len(rows)]
        door = HttpDoor(server.url, model, packed=True)
        script = Script(door)
        script.put(f"{name}-{mate}", shaped(recorded(model, "state_in", row), model))
        block = 1 + mate % 4
        parts = [
            script.step(f"{name}-{mate}", arrays["x"][row : row + 1, at : min(at + block, length)])[0]
            for at in range(0, length, block)
        ]
        results[mate] = (row, length, np.concatenate(parts, axis=1), script.state(f"{name}-{mate}"))
        door.close()

    threads = [threading.Thread(target=run, args=(mate,)) for mate in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    for row, length, y, state in results.values():
        close(y[0], arrays["y"][row, :length], model)
        states_close(state, recorded(model, "state_out", row), model)


@pytest.mark.parametrize("model", STREAMING)
def test_law2_padding_and_masks_change_nothing(opened: Callable[[str], Script], model: str, name: str) -> None:
    """Rows padded on the right, and rows with gaps anywhere, answer as the present steps alone do."""
    script, arrays = opened(model), golden(model)
    row, length = max(rows_of(model), key=lambda pair: pair[1])
    x = arrays["x"][row : row + 1, :length]
    script.put(name, shaped(recorded(model, "state_in", row), model))
    mask = np.ones((1, 2 * length), int)
    spread = np.full((1, 2 * length, x.shape[2]), 0.5, np.float32)
    for at in range(length):  # a gap after each step, with values that must not matter
        spread[0, 2 * at], mask[0, 2 * at + 1] = x[0, at], 0
    y, step = script.step(name, spread, mask=mask.tolist())
    assert step == 2 * length
    close(y[0, ::2], arrays["y"][row, :length], model)
    assert np.isnan(y[0, 1::2]).all()
    states_close(script.state(name), recorded(model, "state_out", row), model)


# --- law 3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", STREAMING)
def test_law3_a_refused_step_leaves_the_state_bit_for_bit(
    opened: Callable[[str], Script], model: str, name: str
) -> None:
    """Wrong shape, infinity, another N, a gap in seq and another payload change nothing."""
    script = opened(model)
    x = np.nan_to_num(golden(model)["x"][0, :1])
    script.step(name, x, seq=1)
    before = script.document(name)
    infinite = x.copy()
    infinite[0, 0] = np.inf
    refused: list[tuple[type[StepcastError], Callable[[], Any]]] = [
        (ShapeMismatch, lambda: script.step(name, x[:, :-1] if x.shape[1] > 1 else np.tile(x, 2))),
        (NonFinite, lambda: script.step(name, infinite)),
        (ExamplesMismatch, lambda: script.step(name, np.tile(x, (2, 1)))),
        (StepConflict, lambda: script.step(name, x, seq=7)),
        (StepConflict, lambda: script.step(name, x + 1, seq=1)),
    ]
    for error, attempt in refused:
        with pytest.raises(error):
            attempt()
        assert script.document(name) == before


@pytest.mark.parametrize("model", STREAMING)
def test_law3_a_masked_step_leaves_the_state_bit_for_bit(
    opened: Callable[[str], Script], model: str, name: str
) -> None:
    """A step whose mask is 0 counts, and changes no state."""
    script = opened(model)
    x = golden(model)["x"][0, :1]
    script.step(name, x)
    before = script.document(name)
    y, step = script.step(name, x, mask=[0])
    after = script.document(name)
    assert step == 2
    assert np.isnan(y).all()
    assert after["state"] == before["state"]


def test_law3_one_masked_example_keeps_its_state_beside_others(opened: Callable[[str], Script], name: str) -> None:
    """Of three examples the masked one keeps its state bit for bit, the others advance as alone."""
    script, x = opened(KIND), golden(KIND)["x"][:3, 0]
    script.step(name, x)
    before = script.state(name)
    script.step(name, x, mask=[1, 0, 1])
    after = script.state(name)
    for layer, keys in before.items():
        for key, value in keys.items():
            np.testing.assert_array_equal(after[layer][key][1], value[1])
            assert not np.array_equal(after[layer][key][0], value[0])


# --- law 4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "redis", "cluster"])
def test_law4_killed_between_steps_a_session_goes_on(
    request: pytest.FixtureRequest, kind: str, spawn: Callable[..., Process], tmp_path: Path, name: str
) -> None:
    """kill -9, start again on the same store: every acknowledged step is there, the numbers are an unbroken run's."""
    if kind == "redis":
        url = str(request.getfixturevalue("redis_server").url)
    elif kind == "cluster":
        url = "redis+cluster://" + ",".join(s.name for s in request.getfixturevalue("redis_cluster")[:2])
    else:
        url = f"sqlite:///{tmp_path / 'sessions.db'}"
    arrays = golden(KIND)
    row, length = max(rows_of(KIND), key=lambda pair: pair[1])
    x, parts = arrays["x"][row : row + 1, :length], []
    for step in range(length):
        process = spawn(url) if step % 4 == 0 else process  # noqa: F821
        door = HttpDoor(process.url, KIND, packed=False)
        script = Script(door)
        if step == 0:
            script.put(name, shaped(recorded(KIND, "state_in", row), KIND))
        y, number = script.step(name, x[:, step], seq=step + 1)
        again, _ = script.step(name, x[:, step], seq=step + 1)
        np.testing.assert_array_equal(y, again)
        assert number == step + 1
        parts.append(y)
        if step == length - 1:
            states_close(script.state(name), recorded(KIND, "state_out", row), KIND)
        door.close()
        if step % 4 == 3:
            process.kill()
    close(np.concatenate(parts), arrays["y"][row, :length], KIND)


# --- law 5 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", STREAMING)
def test_law5_set_of_get_changes_nothing(opened: Callable[[str], Script], model: str, name: str) -> None:
    """Putting back what get answered leaves every bit as it was, kept answers included."""
    script, x = opened(model), golden(model)["x"][0, :2]
    script.step(name, x[:1], seq=1)
    before = script.document(name)
    fields = {k: before[k] for k in ("state", "step", "version", "fingerprint", "examples")}
    script.door.call("state.set", name, **fields)
    after = script.document(name)
    assert after["state"] == before["state"]
    assert after["step"] == before["step"]
    retried, step = script.step(name, x[:1], seq=1)
    assert step == 1
    assert retried.shape[0] == 1


@pytest.mark.parametrize("model", STREAMING)
def test_law5_a_fork_is_its_parent_and_then_goes_its_own_way(
    opened: Callable[[str], Script], model: str, name: str
) -> None:
    """get after fork equals the parent; stepping the child leaves the parent as it was."""
    script, x = opened(model), np.nan_to_num(golden(model)["x"][0, :2])
    script.step(name, x[:1])
    script.door.call("fork", name, to=f"{name}-child")
    parent, child = script.document(name), script.document(f"{name}-child")
    assert parent["state"] == child["state"]
    assert parent["step"] == child["step"]
    script.step(f"{name}-child", x[1:])
    assert script.document(name)["state"] == parent["state"]


@pytest.mark.parametrize("model", STREAMING)
def test_law5_rewind_equals_having_stopped(opened: Callable[[str], Script], model: str, name: str) -> None:
    """After a rewind to k the session answers as one that stopped at k, bit for bit."""
    script, x = opened(model), np.nan_to_num(golden(model)["x"][0, :3])
    script.step(name, x[:1], seq=1)
    then = script.document(name)
    script.door.call("checkpoint", name, name="k")
    first, _ = script.step(name, x[1:2], seq=2)
    script.step(name, x[2:3], seq=3)
    script.door.call("rewind", name, to="k")
    now = script.document(name)
    assert {k: now[k] for k in ("state", "step", "examples")} == {k: then[k] for k in ("state", "step", "examples")}
    second, step = script.step(name, x[1:2], seq=2)
    assert step == 2
    np.testing.assert_array_equal(first, second)


# --- law 6 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [s for s in STORES if s != "memory"], indirect=True)
def test_law6_two_replicas_never_lose_or_double_a_step(store: str, server: Running, name: str) -> None:
    """Two servers stepping the same session at once: every step is there once, the state is that of as many steps."""
    x, each, last = golden(KIND)["x"][0, :1], 40, {}
    with running(store=store) as other:

        def run(url: str) -> None:
            script = Script(HttpDoor(url, KIND, packed=False))
            last[url] = [script.step(name, x)[1] for _ in range(each)]
            script.door.close()

        threads = [threading.Thread(target=run, args=(s.url,)) for s in (server, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    numbers = sorted(number for steps in last.values() for number in steps)
    assert numbers == list(range(1, 2 * each + 1))
    alone, script = f"{name}-alone", Script(HttpDoor(server.url, KIND, packed=False))
    script.step(alone, np.tile(x[None], (1, 2 * each, 1)))
    states_close(script.state(name), script.state(alone), KIND)
    script.door.close()


# --- law 7 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", KINDS)
def test_law7_what_is_exported_is_what_was_trained(model: str) -> None:
    """onnxruntime reproduces torch's recording within the manifest's tolerance, also step by step."""
    proof = Runtime(MODELS / model / "1").prove()
    assert proof.rows > 0
    assert proof.stepped == (model in STREAMING)


def test_law7_a_version_that_can_not_prove_it_never_goes_live(tmp_path: Path) -> None:
    """A version whose golden file disagrees is not served; the one before stays live."""
    for version in (1, 2):
        folder = tmp_path / KIND / str(version)
        folder.mkdir(parents=True)
        for file in (MODELS / KIND / "1").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    manifest = tmp_path / KIND / "2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2', 1))
    arrays = golden(KIND)
    arrays["y"] = arrays["y"] + 0.01
    np.savez(tmp_path / KIND / "2" / "golden.npz", **arrays)  # type: ignore[arg-type]
    repository = Repository(tmp_path, device="cpu", threads=1)
    repository.scan()
    assert repository.versions(KIND) == [1]
    assert "differ from golden.npz" in next(iter(repository.failures.values()))
