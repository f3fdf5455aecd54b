"""import: how the tensors of a graph lie is found out by trying, and a graph of one row takes many where it can."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import httpx
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto as T
from onnx import helper
from serving import running

from service.engine.imports.onnx_graphs import import_onnx
from service.engine.model import Runtime
from stepcast import imports
from stepcast.errors import ManifestError
from stepcast.manifest import MODEL_FILE, Manifest

pytestmark = pytest.mark.service
Array = np.ndarray[Any, Any]
node = helper.make_node


def imported(file: Path, **known: Any) -> tuple[Runtime, Manifest]:
    """A graph's model as the import makes it, told these fields of the manifest."""
    partial = file.with_suffix(".json")
    partial.write_text(json.dumps(known))
    directory = import_onnx(file, file.parent / "models", "m", None, partial).directory
    runtime = Runtime(directory, device="cpu")
    runtime.quicken()
    return runtime, runtime.manifest


def lstm_alone(x: Array) -> Array:
    """What foreign.torch_lstm's mathematics says, from zeros."""
    zeros = np.zeros((len(x), foreign.UNITS))
    return foreign.lstm_numpy(x, zeros, zeros)[0]


def undeclared(path: Path) -> Path:
    """The same graph with no size nor name of any input or output axis, but for features and units."""
    model = onnx.load(path)
    for port in (*model.graph.input, *model.graph.output):
        for dim in port.type.tensor_type.shape.dim:
            if not (dim.HasField("dim_value") and dim.dim_value > 1):
                dim.Clear()
    onnx.save(model, path)
    return path


def misdeclared(path: Path) -> Path:
    """The same graph, its output said to have the 7 steps of the exporter's example."""
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    onnx.save(model, path)
    return path


LSTMS: dict[str, Callable[[Path], Path]] = {
    "batch of 1": lambda p: foreign.torch_lstm(p, rows=1, dims=(1, "seq")),
    "batch of 1, one step": lambda p: foreign.torch_lstm(p, rows=1, dims=(1, 1)),
    "batch of 1, unfixed data": lambda p: foreign.torch_lstm(p, rows=1),
    "names that say nothing": lambda p: foreign.torch_lstm(p, dims=(None, None), rows="n"),
    "undeclared": lambda p: undeclared(foreign.torch_lstm(p, rows=1)),
    "the example's steps": lambda p: misdeclared(foreign.torch_lstm(p)),
}


@pytest.mark.parametrize("case", LSTMS)
def test_an_lstm_steps_as_numpy_does_however_it_is_declared(tmp_path: Path, case: str) -> None:
    """Nothing but the graph itself is told; its rows run together."""
    known = {"states": [{"input": "h0", "output": "hn"}, {"input": "c0", "output": "cn"}]}
    if case == "undeclared":  # h0 [?, ?, 3] may have its rows on the first axis or on the second
        known["states"] = [{**state, "batch_axis": 1, "shape": [1, 3]} for state in known["states"]]
    runtime, manifest = imported(LSTMS[case](tmp_path / "lstm.onnx"), **known)
    assert (manifest.rows, manifest.input.batch_axis, manifest.states[0].batch_axis) == ("many", 0, 1)
    x = np.random.default_rng(4).normal(size=(5, 6, 4)).astype(np.float32)
    np.testing.assert_allclose(foreign.stepped(runtime, x), lstm_alone(x), 1e-4, 1e-5)
    blank = np.frombuffer(runtime.initial(5), np.uint8).reshape(5, -1)
    np.testing.assert_allclose(runtime.run(x, None, blank)[0], lstm_alone(x), 1e-4, 1e-5)


def one_row(path: Path, rows: int | str = 1) -> Path:
    """Exported for one row, as tracers do it: its axis is dropped and put back, shapes and a cell are constants.

    h [1, 3] -> h' = lstm(x [1, 4], h, c = 1/2); y = [h', 7].
    """
    half = onnx.numpy_helper.from_array(np.array([0.5], np.float32))
    nodes = [
        node("Squeeze", ["x", "zero"], ["bare"]),  # [4]
        node("Reshape", ["bare", "as_rows"], ["again"]),  # [1, 1, 4]
        node("Reshape", ["h", "as_state"], ["h_layer"]),  # [1, 1, 3]
        node("ConstantOfShape", ["as_state"], ["c_layer"], value=half),
        node("LSTM", ["again", "W", "R", "", "", "h_layer", "c_layer"], ["all", "h_last"], hidden_size=foreign.UNITS),
        node("Squeeze", ["h_last", "both"], ["flat"]),  # [3]
        node("Unsqueeze", ["flat", "zero"], ["h_next"]),
        node("Concat", ["h_next", "seven"], ["y"], axis=1),
    ]
    weights = {"W": foreign.GATES, "R": foreign.BACK, "zero": np.array([0]), "both": np.array([0, 1])}
    weights |= {
        "as_rows": np.array([1, 1, 4]),
        "as_state": np.array([1, 1, 3]),
        "seven": np.full((1, 1), 7, np.float32),
    }
    inputs = [("x", T.FLOAT, [rows, 4]), ("h", T.FLOAT, [rows, 3])]
    return foreign.save(path, nodes, inputs, [("y", T.FLOAT, [rows, 4]), ("h_next", T.FLOAT, [rows, 3])], weights)


@pytest.mark.parametrize("rows", [1, "batch"], ids=["said to be one", "said to be many"])
def test_a_graph_of_one_row_takes_many(tmp_path: Path, rows: int | str) -> None:
    """Reshape, Squeeze, Unsqueeze, Concat and a constant state are written for rows, also if a batch was declared."""
    file = one_row(tmp_path / "one.onnx", rows)
    runtime, manifest = imported(file, states=[{"input": "h", "output": "h_next"}])
    assert manifest.rows == "many"
    assert "takes many now" in manifest.provenance.data
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(5).normal(size=(4, 6, 4)).astype(np.float32)
    want = np.empty((4, 6, 4), np.float32)
    for row in range(4):
        h = np.zeros((1, 3), np.float32)
        for step in range(6):
            want[row, step], h = session.run(["y", "h_next"], {"x": x[row, [step]], "h": h})
    np.testing.assert_allclose(foreign.stepped(runtime, x), want, 1e-5, 1e-6)
    assert want[2, 3, 3] == 7


def mixing(path: Path, rows: int | str) -> Path:
    """total += x - its mean over rows and numbers: of two rows it is not what it is of each."""
    nodes = [
        node("ReduceMean", ["x"], ["mean"], keepdims=0),
        node("Sub", ["x", "mean"], ["rest"]),
        node("Add", ["total_in", "rest"], ["total_out"]),
        node("Identity", ["total_out"], ["y"]),
    ]
    inputs = [("x", T.FLOAT, [rows, 2]), ("total_in", T.FLOAT, [rows, 2])]
    outputs = [("y", T.FLOAT, [rows, 2]), ("total_out", T.FLOAT, [rows, 2])]
    return foreign.save(path, nodes, inputs, outputs, {})


@pytest.mark.parametrize("rows", [1, "batch"], ids=["said to be one", "said to be many"])
def test_a_graph_that_mixes_rows_runs_row_by_row(tmp_path: Path, rows: int | str) -> None:
    """The manifest says so, and which node is the cause; each session is answered as if it were alone."""
    runtime, manifest = imported(
        mixing(tmp_path / "mixing.onnx", rows), states=[{"input": "total_in", "output": "total_out"}]
    )
    assert manifest.rows == "one"
    assert "one row a run: node ReduceMean 'mean' mixes rows, or drops them" in manifest.provenance.data
    x = np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2) ** 2
    want = (x - x.mean(axis=2, keepdims=True)).cumsum(axis=1)
    np.testing.assert_array_equal(foreign.stepped(runtime, x), want)


def test_sessions_of_a_graph_of_one_row_are_served_together(tmp_path: Path) -> None:
    """One batch step of three sessions answers each as if it were alone, and the model says how it runs."""
    imported(mixing(tmp_path / "mixing.onnx", 1), states=[{"input": "total_in", "output": "total_out"}])
    x = np.array([[1, 3], [10, 30], [5, 5]], np.float32)
    with running(store="memory://", models=tmp_path / "models") as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/v1/models/m").json()["rows"] == "one"
        body = {"sessions": ["a", "b", "c"], "inputs": x.tolist()}
        answers = [client.post("/v1/models/m/step", json=body).json() for _ in range(2)]
    want = x - x.mean(axis=1, keepdims=True)
    np.testing.assert_array_equal([answer["outputs"] for answer in answers], [want, 2 * want])


def hidden(path: Path) -> Path:
    """An LSTM exported for one row and seven steps, its state hidden: zeros at first, dropped at the end."""
    nodes = [
        node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
        node("LSTM", ["xt", "W", "R"], ["all"], hidden_size=foreign.UNITS),
        node("Squeeze", ["all", "one"], ["flat"]),
        node("Transpose", ["flat"], ["y"], perm=[1, 0, 2]),
    ]
    weights = {"W": foreign.GATES, "R": foreign.BACK, "one": np.array([1])}
    return foreign.save(path, nodes, [("x", T.FLOAT, [1, 7, 4])], [("y", T.FLOAT, [1, 7, 3])], weights)


def test_a_hidden_state_of_one_row_is_lifted_and_takes_many(tmp_path: Path) -> None:
    """Seven steps, a batch of 1 and no state were exported: sessions go on by single steps, and three run together."""
    runtime, manifest = imported(hidden(tmp_path / "hidden.onnx"))
    assert manifest.rows == "many"
    x = np.random.default_rng(8).normal(size=(3, 21, 4)).astype(np.float32)
    np.testing.assert_allclose(foreign.stepped(runtime, x), lstm_alone(x), 1e-4, 1e-5)


@pytest.mark.parametrize("layout", ["time first", "rows in the middle"])
def test_axes_need_no_names(tmp_path: Path, layout: str) -> None:
    """x [T, B, 3, 5] or [3, B, 5], y [T, B, 15] or [5, 3, B]: the axes are found by what happens along them."""
    if layout == "time first":
        nodes = [node("Reshape", ["x", "flat"], ["numbers"]), node("CumSum", ["numbers", "time"], ["sums"])]
        nodes += [node("Add", ["sums", "total_in"], ["y"]), node("Gather", ["y", "last"], ["total_out"], axis=0)]
        x, y, total = [None, None, 3, 5], [None, None, 15], [1, None, 15]
    else:
        nodes = [
            node("Transpose", ["x"], ["turned"], perm=[2, 0, 1]),
            node("Add", ["total_in", "turned"], ["total_out"]),
        ]
        nodes += [node("Identity", ["total_out"], ["y"])]
        x, y, total = [3, None, 5], [5, 3, None], [5, 3, None]
    weights = {"flat": np.array([0, 0, 15]), "time": np.array(0), "last": np.array([-1])}
    inputs = [("x", T.FLOAT, x), ("total_in", T.FLOAT, total)]
    outputs = [("y", T.FLOAT, y), ("total_out", T.FLOAT, total)]
    file = foreign.save(tmp_path / "g.onnx", nodes, inputs, outputs, weights)
    runtime, manifest = imported(file, states=[{"input": "total_in", "output": "total_out"}])
    axes = [(port.batch_axis, port.time_axis) for port in (manifest.input, manifest.output)]
    assert axes == ([(1, 0), (1, 0)] if layout == "time first" else [(1, None), (2, None)])
    assert manifest.input.shape == ((3, 5))
    assert [(feature.name, feature.width) for feature in manifest.features] == [("x", 15)]
    values = np.arange(4 * 3 * 15, dtype=np.float32).reshape(4, 3, 15)
    want = values.cumsum(axis=1)
    if layout != "time first":
        want = want.reshape(4, 3, 3, 5).transpose(0, 1, 3, 2).reshape(4, 3, 15)
    np.testing.assert_array_equal(foreign.stepped(runtime, values), want)


def test_a_chunk_of_fixed_length_is_one_step(tmp_path: Path) -> None:
    """x [B, 6, 2] without its mean over the six, which no single step has: twelve numbers a step, as many back."""
    nodes = [
        node("ReduceMean", ["x"], ["mean"], axes=[1]),
        node("Sub", ["x", "mean"], ["rest"]),
        node("Add", ["total_in", "rest"], ["total_out"]),
        node("Identity", ["total_out"], ["y"]),
    ]
    inputs = [("x", T.FLOAT, ["B", 6, 2]), ("total_in", T.FLOAT, ["B", 6, 2])]
    outputs = [("y", T.FLOAT, ["B", 6, 2]), ("total_out", T.FLOAT, ["B", 6, 2])]
    runtime, manifest = imported(foreign.save(tmp_path / "g.onnx", nodes, inputs, outputs, {}))
    assert (manifest.input.shape, manifest.input.time_axis, manifest.n_features) == ((6, 2), None, 12)
    x = np.arange(3 * 4 * 12, dtype=np.float32).reshape(3, 4, 12) ** 2
    chunks = x.reshape(3, 4, 6, 2)
    want = (chunks - chunks.mean(axis=2, keepdims=True)).cumsum(axis=1).reshape(3, 4, 12)
    np.testing.assert_allclose(foreign.stepped(runtime, x), want, 1e-5)


def branches(path: Path) -> Path:
    """y = total += x * k, k by a constant `kind` and by whether x has two axes; one more choice depends on a value."""

    def branch(name: str, value: float) -> Any:
        made = node("Mul", ["x", f"{name}.k"], [f"{name}.out"])
        weight = onnx.numpy_helper.from_array(np.array(value, np.float32), f"{name}.k")
        out = helper.make_tensor_value_info(f"{name}.out", T.FLOAT, None)
        return helper.make_graph([made], name, [], [out], [weight])

    def choice(condition: str, output: str, yes: Any, no: Any) -> Any:
        return node("If", [condition], [output], then_branch=yes, else_branch=no)

    nodes = [
        node("Equal", ["kind", "sixteen"], ["is_kind"]),
        node("Shape", ["x"], ["sizes"]),
        node("Size", ["sizes"], ["rank"]),
        node("Equal", ["rank", "two"], ["is_matrix"]),
        choice("is_kind", "scaled", branch("yes", 10), branch("no", 1)),
        choice("is_matrix", "more", branch("matrix", 100), branch("other", 1000)),
        node("ReduceMax", ["x"], ["top"], keepdims=0),
        node("Greater", ["top", "never"], ["is_large"]),
        choice("is_large", "odd", branch("large", 1e6), branch("small", 0)),
        node("Sum", ["total_in", "scaled", "more", "odd"], ["total_out"]),
        node("Identity", ["total_out"], ["y"]),
    ]
    weights = {"sixteen": np.array(16), "two": np.array(2), "never": np.array(1e9, np.float32)}
    inputs = [("x", T.FLOAT, ["B", 3]), ("kind", T.INT64, []), ("total_in", T.FLOAT, ["B", 3])]
    outputs = [("y", T.FLOAT, ["B", 3]), ("total_out", T.FLOAT, ["B", 3])]
    return foreign.save(path, nodes, inputs, outputs, weights)


@pytest.mark.parametrize(("kind", "factor"), [(16, 110), (8, 101)])
def test_branches_that_are_always_taken_are_decided(tmp_path: Path, kind: int, factor: int) -> None:
    """Those that follow from constants and shapes; what a value decides stays a branch."""
    constant = {"name": "kind", "dtype": "int64", "shape": [], "values": [kind]}
    runtime, manifest = imported(branches(tmp_path / "g.onnx"), constants=[constant])
    graph = onnx.load(runtime.directory / MODEL_FILE).graph
    assert [n.input[0] for n in graph.node if n.op_type == "If"] == ["is_large"]
    assert [port.name for port in graph.input] == ["x", "total_in"]
    assert manifest.constants == ()
    assert "2 branches" in manifest.provenance.data
    x = np.arange(2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3)
    np.testing.assert_array_equal(foreign.stepped(runtime, x), factor * x.cumsum(axis=1))


def windowed(path: Path, rows: int | str = "B", opset: int = 17) -> Path:
    """y = w * x over chunks of five values, of which two overlap on both sides; `count` counts the chunks."""
    nodes = [
        node("Mul", ["x", "w"], ["y"]),
        node("Add", ["count_in", "one"], ["count_out"]),
    ]
    weights = {"w": np.array([1, 2, 3, 4, 5], np.float32), "one": np.ones((1, 1), np.float32)}
    inputs = [("x", T.FLOAT, [rows, 1, 5]), ("count_in", T.FLOAT, [rows, 1])]
    outputs = [("y", T.FLOAT, [rows, 1, 5]), ("count_out", T.FLOAT, [rows, 1])]
    foreign.save(path, nodes, inputs, outputs, weights)
    model = onnx.load(path)
    model.opset_import[0].version = opset
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("rows", ["B", 1])
def test_context_and_overlap_are_states(tmp_path: Path, rows: int | str) -> None:
    """Three new values in and three final values out; what the server keeps is what a wrapper would keep."""
    ports = {"input": {"context": 2}, "output": {"overlap": 2}}
    runtime, manifest = imported(windowed(tmp_path / "w.onnx", rows), **ports)
    assert (manifest.n_features, manifest.n_outputs, manifest.rows) == (3, 3, "many")
    assert (manifest.input.context, manifest.output.overlap) == (2, 2)
    assert {f"{state.layer}.{state.key}" for state in manifest.states} >= {"x.context", "y.overlap"}
    x = np.arange(1, 4 * 6 * 3 + 1, dtype=np.float32).reshape(4, 6, 3)
    for row, got in enumerate(foreign.stepped(runtime, x)):
        chunk, total = np.zeros(5), np.zeros(6 * 3 + 2)
        for step in range(6):
            chunk = np.concatenate([chunk[3:], x[row, step]])
            total[3 * step : 3 * step + 5] += chunk * [1, 2, 3, 4, 5]
        np.testing.assert_array_equal(got.reshape(-1), total[: 6 * 3])


@pytest.mark.parametrize(
    ("ports", "opset", "words"),
    [
        ({"input": {"context": 5}}, 17, r"\$\.input\.context is 5, of 5 values that input 'x' takes"),
        ({"output": {"overlap": 6}}, 17, r"\$\.output\.overlap is 6, output 'y' has 5 values"),
        ({"input": {"context": 1}}, 10, "opset 10 is older than 11"),
    ],
)
def test_context_that_cannot_be_is_refused(tmp_path: Path, ports: Any, opset: int, words: str) -> None:
    """The field, and what the graph has."""
    with pytest.raises(ManifestError, match=words):
        imported(windowed(tmp_path / "w.onnx", opset=opset), **ports)


def test_context_is_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the tensor's name or without; anything else than a number is named."""
    file, models = str(windowed(tmp_path / "w.onnx")), str(tmp_path / "models")
    assert imports.run([file, "--models", models, "--context", "x:2", "--overlap", "2"], "stepcast") == 0
    said = capsys.readouterr().out
    assert "3 features, 3 outputs" in said
    assert "note: the last 2 values of 'x' are kept as a state" in said
    with pytest.raises(ManifestError, match="--context 'x:two' is not a number of values"):
        imports.run([file, "--models", models, "--context", "x:two"], "stepcast")
