"""Model versions: sessions stay on theirs, new ones go live under load, and policies say what becomes of the rest."""

import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import foreign
import httpx
import numpy as np
import orjson
import pytest
from doors import WebSocketDoor
from serving import MODELS, running

from service.engine import repository as repository_module
from service.engine.imports.onnx_graphs import import_onnx
from service.engine.model import Runtime
from service.engine.repository import Repository
from stepcast.client import Client
from stepcast.errors import ModelNotFound, ShapeMismatch
from stepcast.manifest import GOLDEN_FILE, MANIFEST_FILE, read_manifest

X = np.random.default_rng(5).normal(size=(20, 3)).round(3).tolist()
MODEL = "/v1/models/m"


def publish(models: Path, version: int, kind: str) -> Path:
    """Put a test model into a repository as a version of `m`, whole or not at all."""
    target, staged = models / "m" / str(version), models / f".staged-{version}"
    shutil.copytree(MODELS / kind / "1", staged)
    manifest = json.loads((staged / MANIFEST_FILE).read_text())
    (staged / MANIFEST_FILE).write_text(json.dumps({**manifest, "name": "m", "version": version}))
    target.parent.mkdir(exist_ok=True)
    staged.rename(target)
    return target


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository with version 1 of `m`, an LSTM."""
    folder = tmp_path / "models"
    folder.mkdir()
    publish(folder, 1, "lstm")
    return folder


@contextmanager
def serving(models: Path, **settings: Any) -> Iterator[httpx.Client]:
    """A client of a server that looks for new versions often."""
    with (
        running(**{"store": "memory://", "models": models, "repository_poll_s": 0.05, **settings}) as server,
        httpx.Client(base_url=server.url, timeout=20) as client,
    ):
        yield client


def step(client: httpx.Client, session: str, x: Any, **fields: Any) -> dict[str, Any]:
    """One step that goes well."""
    response = client.post(f"{MODEL}/sessions/{session}/step", json={"inputs": x, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that comes by itself."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def live(client: httpx.Client) -> int:
    """The live version."""
    return int(client.get(MODEL).json()["version"])


def goes_live(client: httpx.Client, models: Path, version: int, kind: str) -> None:
    """Publish a version and wait until it is live."""
    publish(models, version, kind)
    until(lambda: live(client) == version)


def refused(response: httpx.Response, code: str) -> dict[str, Any]:
    """A problem document of that code."""
    problem: dict[str, Any] = response.json()
    assert problem.get("code") == code, problem
    return problem


@pytest.mark.service
def test_a_new_version_goes_live_under_load_and_drops_nothing(models: Path) -> None:
    """Every step while version 2 is loaded is answered; old sessions stay on 1, new ones are on 2."""
    done, failed, versions = threading.Event(), [], {}

    def load(client: httpx.Client, worker: int) -> None:
        number = 0
        while not done.is_set():
            number += 1
            body = {"inputs": X[number % 20], "seq": number}
            old = client.post(f"{MODEL}/sessions/old-{worker}/step", json=body)
            new = client.post(f"{MODEL}/sessions/new-{worker}-{number}/step", json={"inputs": X[0]})
            failed.extend(r.text for r in (old, new) if r.status_code != 200)
            versions[f"old-{worker}", number] = old.json()["version"]
            versions[f"new-{worker}-{number}", number] = new.json()["version"]

    with serving(models) as client:
        for worker in range(3):
            step(client, f"old-{worker}", X[1], seq=1)
        workers = [threading.Thread(target=load, args=(client, worker)) for worker in range(3)]
        for thread in workers:
            thread.start()
        try:
            until(lambda: len(versions) >= 6)  # each worker has stepped a new session on version 1
            goes_live(client, models, 2, "gru")
            seen = len(versions)
            until(lambda: len(versions) > seen + 30)
        finally:
            done.set()
            for thread in workers:
                thread.join()
    assert not failed
    assert {v for (name, _), v in versions.items() if name.startswith("old")} == {1}
    assert {v for (name, _), v in versions.items() if name.startswith("new")} == {1, 2}


@pytest.mark.service
def test_a_version_that_cannot_prove_itself_never_goes_live(models: Path) -> None:
    """Another model's golden file, or a graph that was changed: version 1 stays live."""
    with serving(models) as client:
        for version, name in ((2, GOLDEN_FILE), (3, "model.onnx")):
            shutil.copytree(MODELS / "gru" / "1", models / f".staged-{version}")
            wrong = models / f".staged-{version}"
            manifest = json.loads((wrong / MANIFEST_FILE).read_text())
            (wrong / MANIFEST_FILE).write_text(json.dumps({**manifest, "name": "m", "version": version}))
            shutil.copy(MODELS / "lstm" / "1" / name, wrong / name)
            wrong.rename(models / "m" / str(version))
        goes_live(client, models, 4, "simple_rnn")
        assert client.get(MODEL).json()["versions"] == [1, 4]


def repository_of(models: Path) -> Repository:
    """As a server has it."""
    return Repository(models, device="cpu", threads=1)


@pytest.mark.service
def test_a_version_that_failed_is_not_loaded_at_every_poll(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and proving cost a core where the model is large; a file that comes back is seen."""
    wrong = publish(models, 2, "gru")
    golden = (wrong / GOLDEN_FILE).read_bytes()
    (wrong / GOLDEN_FILE).unlink()
    loads = []

    def counted(directory: Path, **options: Any) -> Runtime:
        loads.append(directory)
        return Runtime(directory, **options)

    monkeypatch.setattr(repository_module, "Runtime", counted)
    repository = repository_of(models)
    for _ in range(5):
        repository.scan()
    assert loads == [models / "m" / "1", wrong]
    (wrong / GOLDEN_FILE).write_bytes(golden)
    repository.scan()
    repository.scan()
    assert loads == [models / "m" / "1", wrong, wrong]
    assert repository.versions("m") == [1, 2]


@pytest.mark.service
@pytest.mark.parametrize("resident", [False, True])
def test_a_retired_version_is_freed(models: Path, resident: bool) -> None:
    """Nothing in the engine keeps its weights, its buffers or its table."""
    publish(models, 2, "gru")
    repository = repository_of(models)
    repository.scan()
    runtime = repository.require("m", 2).runtime
    assert runtime.quick
    if resident:
        assert runtime.reside(2**16)
    runtime.step(
        np.zeros((2, 3), np.float32),
        [np.zeros((2, runtime.row_bytes), np.uint8)],
        [np.zeros((2, runtime.row_bytes), np.uint8)],
    )
    there = weakref.ref(runtime)
    del runtime
    repository.retire("m", 2)
    gc.collect()
    assert there() is None
    assert repository.live("m").version == 1


@pytest.mark.service
def test_a_version_of_more_than_64_bits_is_not_found(models: Path) -> None:
    """The fact can be encoded: a 404, not a 500."""
    repository = repository_of(models)
    repository.scan()
    for version, fact in ((2**63 - 1, 2**63 - 1), (2**64, "18446744073709551616")):
        with pytest.raises(ModelNotFound, match=f"no version {version}") as refusal:
            repository.require("m", version)
        assert refusal.value.facts["version"] == fact
        assert orjson.dumps(refusal.value.problem())


@pytest.mark.service
def test_folders_that_are_no_versions_are_passed_over(models: Path) -> None:
    """A digit that is no decimal number does not end the scan."""
    shutil.copytree(models / "m" / "1", models / "m" / "²")
    repository = repository_of(models)
    assert [served.version for served in repository.scan()] == [1]


@pytest.mark.service
def test_a_golden_file_of_another_shape_is_a_failure_not_a_crash(models: Path) -> None:
    """The other versions are served."""
    wrong = publish(models, 2, "gru")
    arrays = dict(np.load(wrong / GOLDEN_FILE))
    np.savez(wrong / GOLDEN_FILE, **{**arrays, "x": arrays["x"][:, :, :2]})
    repository = repository_of(models)
    assert [served.version for served in repository.scan()] == [1]
    assert "x, lengths and y are" in repository.failures[str(wrong)]


@pytest.mark.service
def test_retire_is_refused_while_sessions_hold_the_version(models: Path) -> None:
    """409 with their number; forced, or once they have ended, it goes, and its files stay."""
    with serving(models) as client:
        for name in ("a", "b", "c"):
            step(client, name, X[0])
        client.delete(f"{MODEL}/sessions/c")
        goes_live(client, models, 2, "gru")
        step(client, "d", X[0])
        problem = refused(client.delete(f"{MODEL}/versions/1"), "version_in_use")
        assert (problem["sessions"], problem["version"]) == (2, 1)
        assert step(client, "a", X[1])["version"] == 1
        gone = client.delete(f"{MODEL}/versions/1", params={"force": "true"})
        assert (gone.status_code, gone.json()) == (200, {"model": "m", "version": 1, "sessions": 2})
        assert client.get(MODEL).json()["versions"] == [2]
        refused(client.delete(f"{MODEL}/versions/1"), "model_not_found")
        time.sleep(0.2)  # several polls: what was retired is not loaded again
        assert client.get(MODEL).json()["versions"] == [2]
        assert (models / "m" / "1" / MANIFEST_FILE).exists()
        client.delete(f"{MODEL}/sessions/d")
        assert client.delete(f"{MODEL}/versions/2").status_code == 200
        refused(client.get(MODEL), "model_not_found")
        refused(client.post(f"{MODEL}/sessions/a/step", json={"inputs": X[0]}), "model_not_found")


@pytest.mark.service
def test_failed_versions_are_shown_with_the_reason(models: Path) -> None:
    """Beside what is served, without the repository's place; one that is mended or removed is shown no more."""
    wrong = publish(models, 2, "gru")
    golden = (wrong / GOLDEN_FILE).read_bytes()
    (wrong / GOLDEN_FILE).unlink()
    foreign = models / "other" / "3"
    foreign.mkdir(parents=True)
    (foreign / "theirs.onnx").write_bytes(b"a graph")
    with serving(models) as client:
        shown = client.get("/v1/models").json()
        assert [(model["name"], model["versions"]) for model in shown["models"]] == [("m", [1])]
        assert [(failed["name"], failed["version"]) for failed in shown["failed"]] == [("m", 2), ("other", 3)]
        reasons = [failed["reason"] for failed in shown["failed"]]
        assert reasons[0].startswith("m/2/golden.npz")
        assert (
            reasons[1] == "other/3/manifest.json: no such file. To take in a graph made by others, run stepcast import"
        )
        shutil.rmtree(foreign)
        (wrong / GOLDEN_FILE).write_bytes(golden)
        until(lambda: client.get("/v1/models").json()["failed"] == [])
        assert live(client) == 2


@pytest.mark.service
def test_load_brings_a_version_into_service_at_once(models: Path) -> None:
    """A retired one, a new one that nobody polled, one that failed; what is served stays as it is."""
    with serving(models, repository_poll_s=0) as client:
        at = f"{MODEL}/versions/1"
        assert client.delete(at, params={"force": "true"}).status_code == 200
        refused(client.get(MODEL), "model_not_found")
        answer = client.post(f"{at}/load")
        assert (answer.status_code, answer.json()) == (200, {"model": "m", "version": 1, "versions": [1]})
        before = step(client, "a", X[0])
        assert client.post(f"{at}/load").json()["versions"] == [1]
        assert step(client, "a", X[0])["step"] == before["step"] + 1
        wrong = publish(models, 2, "gru")
        golden = (wrong / GOLDEN_FILE).read_bytes()
        (wrong / GOLDEN_FILE).unlink()
        for _ in range(2):
            problem = refused(client.post(f"{MODEL}/versions/2/load"), "version_failed")
            assert "golden.npz" in problem["detail"]
        assert live(client) == 1
        (wrong / GOLDEN_FILE).write_bytes(golden)
        assert client.post(f"{MODEL}/versions/2/load").json()["versions"] == [1, 2]
        assert live(client) == 2


@pytest.mark.service
@pytest.mark.parametrize(
    "name", ["m/versions/9", "nobody/versions/1", "%2e%2e/versions/1", "..%2fmodels%2fm/versions/1"]
)
def test_load_of_what_is_not_there_is_404(models: Path, name: str) -> None:
    """No directory, or a name that leads elsewhere."""
    with serving(models) as client:
        answer = client.post(f"/v1/models/{name}/load")
        assert (answer.status_code, answer.json()["code"]) in [(404, "model_not_found"), (404, "route_not_found")]


@pytest.mark.service
def test_loads_and_polls_at_once_load_a_version_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads ask for a version that is new: one loads it, the others wait and find it."""
    loads = []

    def counted(directory: Path, **options: Any) -> Runtime:
        loads.append(directory)
        return Runtime(directory, **options)

    monkeypatch.setattr(repository_module, "Runtime", counted)
    repository = repository_of(models)
    asks = [repository.scan, lambda: repository.load("m", 1)] * 4
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(ask) for ask in asks]:
            done.result()
    assert loads == [models / "m" / "1"]
    assert repository.versions("m") == [1]


@pytest.mark.service
def test_pin_refuses_sessions_whose_version_is_gone(models: Path) -> None:
    """Stepping, reading and rolling out say which version is missing; a clear goes on with the live one."""
    with serving(models, version_policy="pin") as client:
        for x in X[:3]:
            step(client, "a", x)
        goes_live(client, models, 2, "gru")
        assert step(client, "a", X[3])["version"] == 1  # it is hot, and stays so after the retirement
        client.delete(f"{MODEL}/versions/1", params={"force": "true"})
        at = f"{MODEL}/sessions/a"
        for response in (
            client.post(f"{at}/step", json={"inputs": X[4]}),
            client.get(f"{at}/state"),
            client.post(f"{at}/rollout", json={"steps": 1, "inputs": [X[0]]}),
        ):
            problem = refused(response, "state_version_mismatch")
            assert (problem["version"], problem["versions"]) == (1, [2])
        assert client.get(at).json()["step"] == 4
        assert client.delete(f"{at}/state").json()["version"] == 2
        fresh = step(client, "fresh", X[4])
        assert step(client, "a", X[4]) == {**fresh, "step": 5}


@pytest.mark.service
def test_reset_starts_from_the_initial_state(models: Path) -> None:
    """The session goes on with the live version from nothing; step numbers and N go on."""
    with serving(models, version_policy="reset") as client:
        step(client, "a", [X[0], X[1]])
        goes_live(client, models, 2, "gru")
        client.delete(f"{MODEL}/versions/1", params={"force": "true"})
        fresh = step(client, "fresh", [X[2], X[3]])
        assert step(client, "a", [X[2], X[3]], seq=2) == {**fresh, "step": 2}
        response = client.post(f"{MODEL}/sessions/a/step", json={"inputs": X[0]})
        refused(response, "examples_mismatch")


@pytest.mark.service
@pytest.mark.parametrize("chunked", [False, True])
def test_replay_rebuilds_the_state_from_kept_inputs(models: Path, chunked: bool) -> None:
    """After ten inputs on version 1, the eleventh answers as if all had been on version 2."""
    with serving(models, version_policy="replay", log_steps=50) as client:
        if chunked:
            step(client, "a", [X[:4]])
            step(client, "a", [X[4:10]])
        else:
            for x in X[:10]:
                step(client, "a", x)
        goes_live(client, models, 2, "gru")
        client.delete(f"{MODEL}/versions/1", params={"force": "true"})
        want = step(client, "fresh", [X[:11]])
        got = step(client, "a", X[10], seq=11)
        assert (got["step"], got["version"]) == (11, 2)
        np.testing.assert_allclose(got["outputs"], want["outputs"][0][10], rtol=1e-5, atol=1e-6)
        again = step(client, "a", X[10], seq=11)
        assert again == got


@pytest.mark.service
def test_replay_is_refused_where_it_would_be_wrong(models: Path) -> None:
    """Several examples, or masked steps, are not in the log: 409 as with pin, never a silent reset."""
    with serving(models, version_policy="replay", log_steps=50) as client:
        step(client, "wide", [X[0], X[1]])
        step(client, "masked", X[0])
        step(client, "masked", X[0], mask=0)
        goes_live(client, models, 2, "gru")
        client.delete(f"{MODEL}/versions/1", params={"force": "true"})
        for name, x in (("wide", [X[0], X[1]]), ("masked", X[0])):
            refused(client.post(f"{MODEL}/sessions/{name}/step", json={"inputs": x}), "state_version_mismatch")


@pytest.mark.service
def test_a_request_chooses_its_policy(models: Path) -> None:
    """The server pins; a step that asks for it is reset or replayed, through HTTP, the WebSocket and the SDK."""
    with serving(models, version_policy="pin", log_steps=50) as client:
        for name in ("http", "socket", "sdk", "pinned"):
            for x in X[:3]:
                step(client, name, x)
        goes_live(client, models, 2, "gru")
        client.delete(f"{MODEL}/versions/1", params={"force": "true"})
        url = str(client.base_url).rstrip("/")
        refused(client.post(f"{MODEL}/sessions/pinned/step", json={"inputs": X[3]}), "state_version_mismatch")
        unknown = client.post(f"{MODEL}/sessions/pinned/step", json={"inputs": X[3], "version_policy": "guess"})
        refused(unknown, "invalid_request")
        want = step(client, "fresh", [X[:4]])["outputs"][0][3]
        replayed = step(client, "http", X[3], version_policy="replay", seq=4)
        assert (replayed["step"], replayed["version"]) == (4, 2)
        np.testing.assert_allclose(replayed["outputs"], want, rtol=1e-5, atol=1e-6)
        socket = WebSocketDoor(url, "m", packed=False)
        assert socket.call("step", "socket", inputs=X[3], version_policy="replay")["outputs"] == replayed["outputs"]
        socket.close()
        with Client(url) as sdk:
            reset = sdk.session("m", "sdk").step(X[3], version_policy="reset")
        assert (reset.step, reset.version) == (4, 2)
        np.testing.assert_allclose(reset.outputs, step(client, "new", X[3])["outputs"], rtol=1e-5, atol=1e-6)
        assert step(client, "http", X[4])["version"] == 2  # it has moved
        refused(client.post(f"{MODEL}/sessions/pinned/step", json={"inputs": X[3]}), "state_version_mismatch")


@pytest.mark.service
def test_the_same_version_with_another_graph_is_no_home_for_a_state(models: Path, tmp_path: Path) -> None:
    """The fingerprint tells: a state of another graph is refused, whatever its number."""
    store = f"sqlite:///{tmp_path / 's.db'}"
    with serving(models, store=store) as client:
        step(client, "a", X[0])
        kept = client.get(f"{MODEL}/sessions/a/state").json()
    shutil.rmtree(models / "m" / "1")
    publish(models, 1, "graves_lstm")
    with serving(models, store=store) as client:
        at = f"{MODEL}/sessions/a"
        refused(client.post(f"{at}/step", json={"inputs": X[1]}), "state_version_mismatch")
        refused(client.get(f"{at}/state"), "state_version_mismatch")
        problem = refused(client.put(f"{MODEL}/sessions/b/state", json=kept), "state_mismatch")
        assert problem["fingerprint"] == read_manifest(models / "m" / "1").fingerprint != kept["fingerprint"]


def test_a_session_on_a_version_with_other_features_is_told_so(models: Path, tmp_path: Path) -> None:
    """A door looks at the live version; a session of an older one with other features is refused, not broken."""
    with serving(models) as client:
        step(client, "a", X[0])
        import_onnx(foreign.torch_lstm(tmp_path / "g.onnx"), models, "m", 2)
        until(lambda: live(client) == 2)
        four = [1.0, 2.0, 3.0, 4.0]
        problem = refused(client.post(f"{MODEL}/sessions/a/step", json={"inputs": four}), "shape_mismatch")
        assert (problem["features"], problem["version"], problem["got"]) == (3, 1, 4)
        body = {"sessions": ["a", "b"], "inputs": [four, four]}
        answer = client.post(f"{MODEL}/step", json=body).json()
        assert answer["errors"]["0"]["code"] == "shape_mismatch"
        assert answer["steps"] == [None, 1]
        assert step(client, "a", X[1])["step"] == 2  # its own features are taken
        socket = WebSocketDoor(str(client.base_url).rstrip("/"), "m", packed=False)
        assert socket.call("step", "a", inputs=X[1], seq=3)["step"] == 3
        assert socket.call("step", "b", inputs=four)["version"] == 2
        with pytest.raises(ShapeMismatch):
            socket.call("step", "a", inputs=four)
        socket.close()
