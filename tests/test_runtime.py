"""One loaded model: foreign graphs by value, states of other types, and what is refused before it is served."""

import json
import shutil
from pathlib import Path
from typing import Any

import foreign
import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto as T
from onnx import helper
from serving import MODELS, golden, running

from service.engine.arrays import state_arrays
from service.engine.buffers import ROWS, step_ports
from service.engine.golden import placements
from service.engine.imports.onnx_graphs import import_onnx
from service.engine.model import Runtime
from service.engine.single_step_graph import single_step_graph
from stepcast.errors import ManifestError, NonFinite, ShapeMismatch
from stepcast.manifest import GOLDEN_FILE, MANIFEST_FILE, Manifest, read_manifest, sha256_of, write_manifest

Array = np.ndarray[Any, Any]

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


def records(sessions: int, rows: int, row_bytes: int) -> tuple[Array, Array]:
    """A matrix of records, a session each, and where their states are in it: strided, at no multiple of 8."""
    matrix = np.zeros((sessions, 76 + rows * row_bytes + 3), np.uint8)
    return matrix, matrix[:, 76 : 76 + rows * row_bytes]


def taken_in(tmp_path: Path, layout: str) -> Runtime:
    """A foreign graph in the repository: of the layouts of foreign.LAYOUTS, or `odd`."""
    known: dict[str, Any] = foreign.ODD if layout == "odd" else {}
    write = foreign.odd if layout == "odd" else lambda path: foreign.stacked_lstm(path, layout)
    partial = tmp_path / "partial.json"
    partial.write_text(json.dumps(known))
    made = import_onnx(write(tmp_path / "g.onnx"), tmp_path / "models", "g", 1, partial)
    return Runtime(made.directory, device="cpu")


class Bare:
    """onnxruntime alone on the same rows; states as the graph has them."""

    def __init__(self, runtime: Runtime, rows: int) -> None:
        self.spec = runtime.manifest
        self.session = onnxruntime.InferenceSession(runtime.directory / "model.onnx")
        self.constants = {c.name: np.array(c.values[0], c.dtype) for c in self.spec.constants}
        self.states = {}
        for state in self.spec.states:
            shape = [*state.shape[: state.batch_axis], rows, *state.shape[state.batch_axis :]]
            self.states[state.input] = np.full(shape, state.initial, state.dtype)

    def step(self, x: Array) -> Array:
        """x (R, F) -> y (R, O)."""
        port, axes = self.spec.input, (self.spec.input.batch_axis, self.spec.input.time_axis)
        moved = {(0, 1): x[:, None], (1, 0): x[None], (0, None): x, (1, None): x.T}[axes]
        names = [self.spec.output.name, *(state.output for state in self.spec.states)]
        y, *new = self.session.run(names, {port.name: np.ascontiguousarray(moved), **self.states, **self.constants})
        self.states = dict(zip(self.states, new, strict=True))
        made: Array = y.reshape(len(x), -1)  # its one axis beside rows and numbers is of size 1
        return made


@pytest.mark.service
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("layout", [*foreign.LAYOUTS, "odd"])
def test_foreign_steps_equal_runs_and_bare_onnxruntime_at_any_number_of_rows(
    tmp_path: Path, layout: str, quick: bool
) -> None:
    """Sessions of one, three and two rows in one call, buffers that grow from 11 to 700 rows, three steps each."""
    runtime = taken_in(tmp_path, layout)
    if quick and not runtime.quicken():
        assert layout == "odd", "an LSTM has a graph for single steps"
        return
    random = np.random.default_rng(4)
    for cuts in ([(1, 1)], [(4, 1), (1, 3), (2, 2)], [(100, 3), (400, 1)]):
        count = sum(sessions * rows for sessions, rows in cuts)
        made = [[records(sessions, rows, runtime.row_bytes)[1] for sessions, rows in cuts] for _ in range(2)]
        for part, (sessions, rows) in zip(made[0], cuts, strict=True):
            part[:] = np.frombuffer(runtime.initial(sessions * rows), np.uint8).reshape(sessions, -1)
        bare = Bare(runtime, count)
        states = np.frombuffer(runtime.initial(count), np.uint8).reshape(count, -1)
        for _ in range(3):
            x = random.integers(-3, 4, (count, runtime.manifest.n_features)).astype(np.float32)
            y = runtime.step(x, *made)
            want = bare.step(x)
            ran, states = runtime.run(x[:, None], None, states)
            np.testing.assert_allclose(y, want, 1e-5, 1e-6)
            np.testing.assert_array_equal(y, ran[:, 0])
            assert b"".join(part.tobytes() for part in made[1]) == states.tobytes()
            made.reverse()
        kept = runtime.unpack(states.tobytes(), count)["state"]
        for state in runtime.manifest.states:
            got = np.moveaxis(kept[state.key], 0, state.batch_axis)
            np.testing.assert_allclose(got, bare.states[state.input], 1e-5, 1e-6)


@pytest.mark.service
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("layout", [*foreign.LAYOUTS, "odd"])
def test_foreign_sequences_equal_single_steps(tmp_path: Path, layout: str, quick: bool) -> None:
    """Rows of length 4, 0, 1 and 2; one of length 0 keeps its state."""
    runtime = taken_in(tmp_path, layout)
    if quick:
        runtime.quicken()
    x = np.random.default_rng(6).normal(size=(4, 4, runtime.manifest.n_features)).astype(np.float32)
    lengths = np.array([4, 0, 1, 2], np.int32)
    _, start = runtime.run(x[::-1], None, np.frombuffer(runtime.initial(4), np.uint8).reshape(4, -1))
    y, end = runtime.run(x, lengths, start)
    states = start
    for t in range(4):
        alive = (lengths > t).astype(np.int32)
        stepped, states = runtime.run(x[:, t : t + 1], alive, states)
        np.testing.assert_allclose(stepped[alive > 0, 0], y[alive > 0, t], 1e-5, 1e-6)
    assert end[1].tobytes() == start[1].tobytes()
    got, want = (runtime.unpack(s.tobytes(), 4)["state"] for s in (states, end))
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, 1e-3 if value.dtype == np.float16 else 1e-5, 1e-6)


@pytest.mark.service
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", [*foreign.LAYOUTS, "odd", "lstm"])
def test_one_session_alone_steps_as_in_company(tmp_path: Path, layout: str, rows: int) -> None:
    """`step_one` from a record's bytes, of one row and of three."""
    runtime = Runtime(MODELS / "lstm" / "1", device="cpu") if layout == "lstm" else taken_in(tmp_path, layout)
    runtime.quicken()
    state = runtime.initial(rows)
    ran = np.frombuffer(state, np.uint8).reshape(rows, -1)
    for number in range(3):
        x = np.full((rows, runtime.manifest.n_features), number - 1, np.float32)
        x += np.arange(rows, dtype=np.float32)[:, None]
        answer = runtime.step_one(x.tobytes(), b"head" + state + b"tail", 4, rows)
        assert answer is not None
        y, state = answer
        want, ran = runtime.run(x[:, None], None, ran)
        np.testing.assert_array_equal(y, want[:, 0])
        assert state == ran.tobytes()


@pytest.mark.service
def test_states_of_every_type_are_exact(tmp_path: Path) -> None:
    """bool, float16 on another axis, float64 and int64 at odd bytes, and a constant: sums of integers by value."""
    runtime = taken_in(tmp_path, "odd")
    assert runtime.row_bytes == 1 + 4 + 8 + 8
    state = {
        "flag": np.array([True, False]),
        "half": np.array([[1, 2], [3, 4]], np.float16),
        "total": np.array([1e15 + 0.5, 4]),
        "count": np.array([[2**60], [6]]),
    }
    packed = np.frombuffer(runtime.pack({"state": state}), np.uint8).reshape(1, -1)
    after = np.empty_like(packed)
    y = runtime.step(np.array([[1, 2], [3, 4]], np.float32), [packed], [after])
    assert y[1].tolist() == [11 * 10 + 7]
    new = runtime.unpack(after.tobytes(), 2)["state"]
    assert {key: value.tolist() for key, value in new.items()} == {
        "flag": [False, True],
        "half": [[2, 4], [6, 8]],
        "total": [1e15 + 3.5, 11],
        "count": [[2**60 + 1], [7]],
    }


@pytest.mark.service
def test_given_states_are_held_exactly_or_refused(tmp_path: Path) -> None:
    """Lists, arrays and bytes of one's own dtype or another, by value; what a dtype does not hold is refused."""
    manifest = taken_in(tmp_path, "odd").manifest
    good = {"flag": [True], "half": [[1, 2]], "total": np.array([3], np.int32), "count": np.array([[5.0]])}
    made, rows = state_arrays({"state": good}, manifest)
    tensors = made["state"]
    assert rows == 1
    assert {key: value.tolist() for key, value in tensors.items()} == {
        "flag": [True],
        "half": [[1, 2]],
        "total": [3],
        "count": [[5]],
    }
    assert {key: value.dtype.name for key, value in tensors.items()} == {
        "flag": "bool",
        "half": "float16",
        "total": "float64",
        "count": "int64",
    }
    packed = np.array([[5]], "<i8").tobytes()
    assert state_arrays({"state": {**good, "count": packed}}, manifest)[0]["state"]["count"].tolist() == [[5]]
    for wrong in (np.array([[5.5]]), [[5.5]], np.array([[2**63]], np.uint64), packed[:-1], [["5"]], [[5], [5, 6]]):
        with pytest.raises(ShapeMismatch, match=r"state\.state\.count"):
            state_arrays({"state": {**good, "count": wrong}}, manifest)


@pytest.mark.service
def test_an_infinite_state_of_any_float_type_is_refused(tmp_path: Path) -> None:
    """float16 overflows at 65,520, long before float32; by way of step, step_one and run."""
    runtime = taken_in(tmp_path, "odd")
    x = np.array([[65_520, 0]], np.float32)
    states = np.frombuffer(runtime.initial(1), np.uint8).reshape(1, -1)
    with pytest.raises(NonFinite):
        runtime.step(x, [states], [np.empty_like(states)])
    with pytest.raises(NonFinite):
        runtime.step_one(x.tobytes(), states.tobytes(), 0)
    with pytest.raises(NonFinite):
        runtime.run(np.repeat(x[:, None], 2, axis=1), None, states)


@pytest.mark.service
def test_a_state_that_is_the_output_too_is_written_once(tmp_path: Path) -> None:
    """y = h: one port for both."""
    nodes = [helper.make_node("Add", ["x", "h"], ["y"])]
    path = foreign.save(
        tmp_path / "g.onnx", nodes, [(n, T.FLOAT, ["n", 2]) for n in "xh"], [("y", T.FLOAT, ["n", 2])], {}
    )
    directory = tmp_path / "g" / "1"
    directory.mkdir(parents=True)
    shutil.move(path, directory / "model.onnx")
    axes = {"batch_axis": 0, "time_axis": None}
    manifest = Manifest.model_validate(
        {
            **{"name": "g", "version": 1, "task": "regression", "lengths": None},
            **{"input": {"name": "x", **axes}, "output": {"name": "y", **axes}},
            **{"features": [{"name": "a"}, {"name": "b"}], "outputs": [{"name": "c"}, {"name": "d"}]},
            "states": [{"layer": "s", "key": "h", "input": "h", "output": "y", "shape": [2]}],
            "sha256": sha256_of(directory / "model.onnx"),
        }
    )
    write_manifest(directory, manifest)
    runtime = Runtime(directory, device="cpu")
    before = np.array([[1, 2], [3, 4]], np.float32).view(np.uint8)
    after = np.empty_like(before)
    y = runtime.step(np.array([[10, 20], [30, 40]], np.float32), [before], [after])
    assert y.tolist() == after.view(np.float32).tolist() == [[11, 22], [33, 44]]


@pytest.mark.service
@pytest.mark.parametrize("layout", foreign.LAYOUTS)
def test_a_graph_for_single_steps_of_a_foreign_lstm_copies_nothing(tmp_path: Path, layout: str) -> None:
    """States of both layers are ports of their own, and nothing moves bytes but y, which is the last layer's h too."""
    runtime = taken_in(tmp_path, layout)
    ports = step_ports(runtime._session, runtime.manifest, {})
    made = single_step_graph(runtime.directory / "model.onnx", ports, None)
    assert made is not None
    graph = onnx.load_from_string(made.model).graph
    kinds = [node.op_type for node in graph.node]
    assert not {*kinds} & {"LSTM", "Slice", "Squeeze", "Unsqueeze", "Transpose"}
    assert (kinds.count("Identity"), kinds.count("Concat")) == (1, 2), "Concat: x and h of each layer"
    assert [shape for _, shape in made.ports["h0"]] == [(ROWS, foreign.UNITS)] * 2
