"""One loaded model: foreign graphs by value, states of other types, and what is refused before it is served."""

import json
import shutil
from pathlib import Path
from typing import Any

import foreign
import httpx
import numpy as np
import pytest
from serving import MODELS, golden, running

from service.engine.golden import placements
from service.engine.imports.onnx_graphs import import_onnx
from service.engine.model import Runtime
from stepcast.errors import ManifestError, NonFinite
from stepcast.manifest import GOLDEN_FILE, MANIFEST_FILE, read_manifest

COUNTER: dict[str, Any] = {
    "input": {"name": "x", "batch_axis": 1, "time_axis": None},
    "output": {"name": "y", "batch_axis": 1, "time_axis": None},
    "states": [
        {"layer": "sum", "key": "total", "input": "total_in", "output": "total_out", "initial": 0.5},
        {"layer": "sum", "key": "count", "input": "count_in", "output": "count_out"},
    ],
}


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    """The repository directory of a graph with a float64 and an int64 state and the batch on axis 1."""
    partial = tmp_path / "partial.json"
    partial.write_text(json.dumps(COUNTER))
    return import_onnx(foreign.counter(tmp_path / "c.onnx"), tmp_path / "models", "counter", 1, partial).directory


def changed(directory: Path, **fields: Any) -> Path:
    """The model directory with other fields in its manifest."""
    path = directory / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return directory


def test_states_of_other_types_and_axes_are_exact(counter: Path) -> None:
    """y[t] = total + count, float64 and int64 states kept exactly, rows of different length side by side."""
    runtime = Runtime(counter, device="cpu")
    assert [(s.dtype, s.batch_axis, s.shape) for s in runtime.manifest.states] == [
        ("float64", 1, (1,)),
        ("int64", 1, (1,)),
    ]
    x = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    lengths = np.array([4, 0, 2], np.int32)
    start = np.frombuffer(runtime.initial(3), np.uint8).reshape(3, -1)
    y, states = runtime.run(x, lengths, start)
    assert y[0, :, 0].tolist() == [1.5, 3.5, 6.5, 10.5]
    assert y[2, :2, 0].tolist() == [9.5, 19.5]
    state = runtime.unpack(states.tobytes(), 3)["sum"]
    assert state["total"].ravel().tolist() == [6.5, 0.5, 17.5]
    assert state["count"].ravel().tolist() == [4, 0, 2]
    assert runtime.pack({"sum": state}) == states.tobytes()
    exact = {"total": np.array([[1e15 + 0.5]]), "count": np.array([[2**60 + 1]])}
    packed = np.frombuffer(runtime.pack({"sum": exact}), np.uint8).reshape(1, -1)
    _, after = runtime.run(np.ones((1, 1, 1), np.float32), None, packed)
    state = runtime.unpack(after.tobytes(), 1)["sum"]
    assert (state["total"].item(), state["count"].item()) == (1e15 + 1.5, 2**60 + 2)


def test_states_of_other_types_travel_over_http(counter: Path) -> None:
    """JSON keeps int64 and float64; a fraction is no int64, an infinite total is refused, masks keep both."""
    with running(store="memory://", models=counter.parents[1]) as server:
        at = f"{server.url}/v1/models/counter/sessions/s"
        body = {"sum": {"total": [[0.1]], "count": [[2**53 + 1]]}}
        assert httpx.put(f"{at}/state", json={"state": body}).status_code == 200
        assert httpx.get(f"{at}/state").json()["state"] == body
        for key, value, code in (
            ("count", [[1.5]], "shape_mismatch"),
            ("count", [[2**63]], "shape_mismatch"),
            ("count", [["1"]], "shape_mismatch"),
            ("total", [[1e308, 1]], "shape_mismatch"),
        ):
            response = httpx.put(f"{at}/state", json={"state": {"sum": {**body["sum"], key: value}}})
            assert response.json()["code"] == code, (key, value)
        httpx.post(f"{at}/step", json={"inputs": [2.0], "mask": 0})
        assert httpx.get(f"{at}/state").json()["state"] == body
        clear = {"sum": {"total": [[0.0]], "count": [[0]]}}
        httpx.put(f"{at}/state", json={"state": clear})
        assert httpx.post(f"{at}/step", json={"inputs": [2.0]}).json()["outputs"] == [3.0]
        for kind in ("npz", "safetensors"):
            media = f"application/x-{kind}"
            data = httpx.get(f"{at}/state", headers={"accept": media}).content
            put = httpx.put(f"{at}-{kind}/state", content=data, headers={"content-type": media})
            assert put.status_code == 200, put.text
            assert httpx.get(f"{at}-{kind}/state").json()["state"] == {"sum": {"total": [[2.0]], "count": [[1]]}}


def test_what_turns_infinite_is_refused_and_never_committed(counter: Path) -> None:
    """An output beyond float32, a state beyond float64: 422, and the session is as it was."""
    runtime = Runtime(counter, device="cpu")
    far = {"total": np.array([[3e38]]), "count": np.array([[0]])}
    start = np.frombuffer(runtime.pack({"sum": far}), np.uint8).reshape(1, -1)
    with pytest.raises(NonFinite, match="outputs"):
        runtime.run(np.full((1, 1, 1), 3e38, np.float32), None, start)
    with running(store="memory://", models=counter.parents[1]) as server:
        at = f"{server.url}/v1/models/counter/sessions/s"
        httpx.put(f"{at}/state", json={"state": {"sum": {"total": [[3e38]], "count": [[0]]}}})
        before = httpx.get(f"{at}/state").content
        response = httpx.post(f"{at}/step", json={"inputs": [3e38]})
        assert (response.status_code, response.json()["code"]) == (422, "non_finite")
        assert httpx.get(f"{at}/state").content == before
        mates = {"sessions": ["s", "a", "b"], "inputs": [[3e38], [1.0], [2.0]]}
        answer = httpx.post(f"{server.url}/v1/models/counter/step", json=mates).json()
        assert list(answer["errors"]) == ["0"]
        assert answer["outputs"][1:] == [[2.5], [3.5]]
        assert httpx.get(f"{at}/state").content == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": {**COUNTER["input"], "name": "z"}}, "input 'z' is None"),
        ({"output": {**COUNTER["output"], "name": "z"}}, "output 'z' is None"),
        ({"lengths": "lengths"}, "input 'lengths' is None"),
        ({"constants": [{"name": "x2", "dtype": "int64", "shape": [], "values": [1]}]}, "input 'x2' is None"),
        ({"states": []}, "inputs that manifest.json does not speak of"),
        ({"sha256": "0" * 64}, "sha256"),
        ({"nonsense": 1}, "nonsense"),
        ({"version": 0}, "version"),
        ({"features": []}, "features"),
        ({"task": "classification"}, "classes"),
        ({"feedback": [{"source": "y0", "feature": "nope"}]}, "nope"),
    ],
)
def test_a_manifest_that_is_not_the_graphs_is_refused(counter: Path, fields: dict[str, Any], words: str) -> None:
    """Names, types, checksum, unknown keys: the message says which."""
    with pytest.raises(ManifestError, match=words):
        Runtime(changed(counter, **fields), device="cpu")


def test_a_state_of_another_type_is_refused(counter: Path) -> None:
    """int64 in the graph, float32 in the manifest."""
    states = json.loads((counter / MANIFEST_FILE).read_text())["states"]
    states[1]["dtype"] = "float32"
    with pytest.raises(ManifestError, match=r"'count_in' is int64 in model.onnx, float32 in"):
        Runtime(changed(counter, states=states), device="cpu")


@pytest.fixture
def lstm(tmp_path: Path) -> Path:
    """A copy of the LSTM of the tests."""
    return Path(shutil.copytree(MODELS / "lstm" / "1", tmp_path / "lstm" / "1"))


@pytest.mark.service
def test_the_proof_is_the_golden_file(lstm: Path) -> None:
    """A missing file, a missing array, another number by more than the tolerance: not served."""
    runtime = Runtime(lstm, device="cpu")
    proof = runtime.prove()
    arrays = golden("lstm")
    assert (proof.rows, proof.steps, proof.stepped) == (*arrays["x"].shape[:2], True)
    assert 0 <= proof.output_error < 1e-5
    row = int(arrays["lengths"].argmax())
    for name, place in (("y", (row, 0, 0)), ("state_out.lstm_0.c", (row, 1))):
        wrong = {**arrays, name: arrays[name].copy()}
        wrong[name][place] += 0.01
        np.savez(lstm / GOLDEN_FILE, **wrong)
        with pytest.raises(ManifestError, match=r"differ from golden\.npz by up to 0\.01"):
            runtime.prove()
    for name in ("lengths", "state_in.lstm_0.h"):
        np.savez(lstm / GOLDEN_FILE, **{key: value for key, value in arrays.items() if key != name})
        with pytest.raises(ManifestError, match=name):
            runtime.prove()
    (lstm / GOLDEN_FILE).write_bytes(b"no archive")
    with pytest.raises(ManifestError, match="cannot be read"):
        runtime.prove()
    (lstm / GOLDEN_FILE).unlink()
    with pytest.raises(ManifestError, match="cannot be read"):
        runtime.prove()


@pytest.mark.service
@pytest.mark.parametrize("name", ["model.onnx", MANIFEST_FILE])
def test_missing_and_broken_files_are_named(lstm: Path, name: str) -> None:
    """Each by its path."""
    (lstm / name).write_bytes(b"{")
    with pytest.raises(ManifestError, match=name):
        Runtime(lstm, device="cpu")
    (lstm / name).unlink()
    with pytest.raises(ManifestError, match=name):
        Runtime(lstm, device="cpu")


@pytest.mark.service
def test_placements_name_each_recurrent_node(tmp_path: Path) -> None:
    """`service check` says where LSTM, GRU and RNN run: on the CPU here."""
    layers = [state.layer for state in read_manifest(MODELS / "stacked" / "1").states]
    assert {"lstm_0", "gru_0", "simple_rnn_0"} <= set(layers)
    runtime = Runtime(MODELS / "stacked" / "1", device="cpu", profile=tmp_path / "profile")
    runtime.prove()
    found = placements(runtime.end_profile())
    assert len(found) == 3
    assert set(found.values()) == {"CPUExecutionProvider"}
