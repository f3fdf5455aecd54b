"""The graph for one step against model.onnx: the same numbers, for every recurrent node that becomes equations."""

import logging
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from serving import MODELS

from service.engine import model as runtime_module
from service.engine.buffers import ROWS, Ports
from service.engine.imports.onnx_graphs import import_onnx
from service.engine.model import Runtime
from service.engine.repository import Repository
from service.engine.settled import settle
from service.engine.single_step_graph import SingleStepGraph, single_step_graph
from stepcast.errors import NonFinite

RECURRENT = {"LSTM", "GRU", "RNN"}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
F, H = 3, 5
PORTS: Ports = {
    "x": [("x", (ROWS, 1, F))],
    "y": [("y", (ROWS, 1, H))],
    **{name: [(name, (ROWS, H))] for name in ("h.in", "c.in", "h.out", "c.out")},
}


def kinds() -> list[str]:
    """Every model kind that a server steps on bound buffers."""
    found = sorted(path.parents[1].name for path in MODELS.glob("*/1/manifest.json"))
    return [kind for kind in found if Runtime(MODELS / kind / "1", device="cpu").quicken()]


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_steps_are_those_of_the_model(kind: str, rows: int) -> None:
    """Ten steps by way of the one-step graph, and ten by model.onnx."""
    quick, plain = (Runtime(MODELS / kind / "1", device="cpu") for _ in range(2))
    assert quick.quicken()
    random, tolerance = np.random.default_rng(7), plain.manifest.tolerance
    states = np.frombuffer(plain.initial(rows), np.uint8).reshape(rows, -1)
    ours, theirs = np.array(states), np.array(states)
    for _ in range(10):
        x = random.integers(0, 2, (rows, plain.manifest.n_features)).astype(np.float32)
        after = np.empty_like(ours)
        got = quick.step(x, [ours], [after])
        want, theirs = plain.run(x[:, None], None, theirs)
        ours = after
        np.testing.assert_allclose(got, want[:, 0], tolerance.rtol, tolerance.atol)
        np.testing.assert_allclose(ours.view(np.float32), theirs.view(np.float32), tolerance.rtol, tolerance.atol)


def test_most_kinds_have_one() -> None:
    """Layers that walk over time by themselves (Scan) too; those whose lengths differ by layer keep model.onnx."""
    assert {"lstm", "gru", "simple_rnn", "graves_lstm", "stacked", "characters", "dense_between"} <= set(kinds())
    assert {"scan_activations", "lstm_normed", "mask_zero_normed", "pooling_max"} <= set(kinds())
    assert not {"mask_zero", "bidirectional", "dense"} & set(kinds())


def scan_model(path: Path, *, over: str = "x") -> Path:
    """s and p carried over axis 1 of x: s' = s + x, p' = p s'; y stacks s', the body has a constant of its own.

    The second Scan reads what the first one stacked, and a tensor `c` from around it; names inside both are the same.
    """

    def body(read: str) -> Any:
        floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("s", "p", "x_t")]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("s1", "p1", "y_t")]
        nodes = [
            helper.make_node("Add", ["s", "x_t"], ["sum"]),
            helper.make_node("Mul", ["sum", read], ["s1"]),
            helper.make_node("Mul", ["p", "s1"], ["p1"]),
            helper.make_node("Identity", ["s1"], ["y_t"]),
        ]
        half = numpy_helper.from_array(np.array([0.5], np.float32), "half")
        return helper.make_graph(nodes, "body", floats, ends, [half])

    axes = {"num_scan_inputs": 1, "scan_input_axes": [1], "scan_output_axes": [1]}
    graph = helper.make_graph(
        [
            helper.make_node("Concat", ["x", "x"], ["twice"], axis=1),
            helper.make_node("Scan", ["h.in", "c.in", over], ["s_a", "p_a", "y_a"], body=body("half"), **axes),
            helper.make_node("Scan", ["s_a", "p_a", "y_a"], ["h.out", "c.out", "y"], body=body("c"), **axes),
        ],
        "scans",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "T", H]),
            *(helper.make_tensor_value_info(f"{s}.in", TensorProto.FLOAT, ["B", H]) for s in "hc"),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "T", H]),
            *(helper.make_tensor_value_info(f"{s}.out", TensorProto.FLOAT, ["B", H]) for s in "hc"),
        ],
        [numpy_helper.from_array(np.array([3.0], np.float32), "c")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def test_scans_over_one_step_become_that_step(tmp_path: Path) -> None:
    """By value, of two rows; no graph is left inside."""
    ports = {**PORTS, "x": [("x", (ROWS, 1, H))]}
    made = single_step_graph(scan_model(tmp_path / "model.onnx"), ports, None)
    assert made is not None
    assert "Scan" not in {node.op_type for node in onnx.load_from_string(made.model).graph.node}
    x, h, c = (np.array(v, np.float32) for v in ([[1.0], [2.0]], [[10.0], [20.0]], [[-1.0], [0.5]]))
    x, h, c = (np.repeat(v, H, axis=1) for v in (x, h, c))
    feeds = {made.ports["x"][0][0]: x, made.ports["h.in"][0][0]: h, made.ports["c.in"][0][0]: c}
    session = ort.InferenceSession(made.model, providers=["CPUExecutionProvider"])
    got = dict(zip((port.name for port in session.get_outputs()), session.run(None, feeds), strict=True))
    first = (h + x) * 0.5
    second = (first + first) * 3.0
    for name, want in {"y": second, "h.out": second, "c.out": c * first * second}.items():
        np.testing.assert_allclose(got[made.ports[name][0][0]].reshape(2, H), want, rtol=1e-6)


def test_scans_over_several_steps_stay_as_they_are(tmp_path: Path) -> None:
    """One of a single step goes over two: there is no such graph."""
    ports = {**PORTS, "x": [("x", (ROWS, 1, H))]}
    assert single_step_graph(scan_model(tmp_path / "model.onnx", over="twice"), ports, None) is None


def recurrent_model(path: Path, op: str, *, bias: bool = True, peepholes: bool = False, **attributes: Any) -> Path:
    """x (B, T, F) through one recurrent node with lengths, states h and for LSTM c; y is its sequence."""
    random, gates = np.random.default_rng(3), GATES[op]
    values = {
        "W": random.normal(0, 0.5, (1, gates * H, F)),
        "R": random.normal(0, 0.5, (1, gates * H, H)),
        "B": random.normal(0, 0.5, (1, 2 * gates * H)),
        "P": random.normal(0, 0.5, (1, 3 * H)),
    }
    ints = {"first": [0], "second": [1]}
    states = ["h", "c"] if op == "LSTM" else ["h"]
    inputs = ["xt", "W", "R", "B" if bias else "", "lengths", *(f"{s}0" for s in states), *(["P"] * peepholes)]
    outputs = ["all", *(f"{s}1" for s in states)]
    nodes = [
        helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
        *(helper.make_node("Unsqueeze", [f"{s}.in", "first"], [f"{s}0"]) for s in states),
        helper.make_node(op, inputs, outputs, hidden_size=H, **attributes),
        helper.make_node("Squeeze", ["all", "second"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["y"], perm=[1, 0, 2]),
        *(helper.make_node("Squeeze", [f"{s}1", "first"], [f"{s}.out"]) for s in states),
    ]
    used = {name for node in nodes for name in node.input}
    initializers = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items() if k in used]
    initializers += [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in ints.items()]
    ports = [helper.make_tensor_value_info(f"{s}.in", TensorProto.FLOAT, ["B", H]) for s in states]
    graph = helper.make_graph(
        nodes,
        "recurrent",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "T", F]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, ["B"]),
            *ports,
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "T", H]),
            *(helper.make_tensor_value_info(f"{s}.out", TensorProto.FLOAT, ["B", H]) for s in states),
        ],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


def outputs_of(model: str | SingleStepGraph, rows: int) -> dict[str, Any]:
    """All outputs of a graph for one step of random rows, in the shapes of model.onnx."""
    graph, ports = model if isinstance(model, SingleStepGraph) else (model, PORTS)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(5)
    values: dict[str, Any] = {"x": random.normal(size=(rows, 1, F)).astype(np.float32)}
    for name in ("h.in", "c.in"):
        values[name] = random.normal(size=(rows, H)).astype(np.float32)
    feeds: dict[str, Any] = {"lengths": np.ones(rows, np.int32)}
    for name, value in values.items():
        ((port, shape),) = ports[name]
        feeds[port] = value.reshape(shape)
    wanted = {port.name for port in session.get_inputs()}
    names = [port.name for port in session.get_outputs()]
    got = dict(zip(names, session.run(None, {k: v for k, v in feeds.items() if k in wanted}), strict=True))
    known = {ports[name][0][0]: name for name in ports}
    return {
        known.get(name, name): value.reshape(rows, *([1] * (known.get(name) == "y")), -1) for name, value in got.items()
    }


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("LSTM", {}),
        ("LSTM", {"bias": False}),
        ("LSTM", {"peepholes": True}),
        ("LSTM", {"activations": ["Sigmoid", "Softsign", "Tanh"]}),
        ("GRU", {}),
        ("GRU", {"linear_before_reset": 1}),
        ("GRU", {"linear_before_reset": 1, "bias": False}),
        ("RNN", {}),
        ("RNN", {"activations": ["Relu"]}),
    ],
)
@pytest.mark.parametrize("rows", [1, 4])
def test_equations_are_those_of_the_operators(tmp_path: Path, op: str, options: dict[str, Any], rows: int) -> None:
    """What onnxruntime's own LSTM, GRU and RNN answer, without them and without lengths."""
    path = recurrent_model(tmp_path / "model.onnx", op, **options)
    made = single_step_graph(path, PORTS, "lengths")
    assert made is not None
    graph = onnx.load_from_string(made.model).graph
    assert not RECURRENT & {node.op_type for node in graph.node}
    assert "lengths" not in {port.name for port in graph.input}
    want, got = outputs_of(str(path), rows), outputs_of(made, rows)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("LSTM", {"clip": 0.5}),
        ("LSTM", {"activations": ["HardSigmoid", "Tanh", "Tanh"]}),
        ("LSTM", {"input_forget": 1}),
        ("RNN", {"activations": ["Affine"], "activation_alpha": [0.5], "activation_beta": [0.1]}),
    ],
)
def test_other_nodes_stay(tmp_path: Path, op: str, options: dict[str, Any]) -> None:
    """Nothing is gained where the only recurrent node has rarer attributes."""
    assert single_step_graph(recurrent_model(tmp_path / "model.onnx", op, **options), PORTS, "lengths") is None


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("LSTM", {}),
        ("LSTM", {"bias": False, "peepholes": True}),
        ("LSTM", {"clip": 0.5, "activations": ["HardSigmoid", "Tanh", "Softsign"]}),
        ("GRU", {"linear_before_reset": 1}),
        ("RNN", {}),
    ],
)
@pytest.mark.parametrize("rows", [1, 4])
def test_an_exact_graph_keeps_the_nodes_and_every_bit(
    tmp_path: Path, op: str, options: dict[str, Any], rows: int
) -> None:
    """Lengths and moves of axes are gone, but for one: the last state is y too, and cannot be one port for both."""
    path = recurrent_model(tmp_path / "model.onnx", op, **options)
    made = single_step_graph(path, PORTS, "lengths", exact=True)
    assert made is not None
    graph = onnx.load_from_string(made.model).graph
    assert [node.op_type for node in graph.node if node.op_type != "Identity"] == [op, "Squeeze"]
    assert "lengths" not in {port.name for port in graph.input}
    assert made.ports["h.in"][0][1] == (1, ROWS, H)
    assert made.ports["x"][0][1] == (1, ROWS, F)
    want, got = outputs_of(str(path), rows), outputs_of(made, rows)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)


def test_weights_that_the_graph_puts_together_become_equations(tmp_path: Path) -> None:
    """torch's dynamo exporter slices the gates of a large network and joins them in ONNX's order."""
    path = recurrent_model(tmp_path / "model.onnx", "LSTM")
    want, model = outputs_of(str(path), 3), onnx.load(str(path))
    graph = model.graph
    (whole,) = (value for value in graph.initializer if value.name == "W")
    i, o, f, c = np.split(numpy_helper.to_array(whole), 4, axis=1)
    whole.CopyFrom(numpy_helper.from_array(np.concatenate([i, f, c, o], axis=1), "torch"))
    for name, place in {"zero": 0, "one": H, "three": 3 * H, "four": 4 * H}.items():
        graph.initializer.append(numpy_helper.from_array(np.array([place]), name))
    graph.node.insert(0, helper.make_node("Concat", ["i", "o", "fc"], ["W"], axis=1))
    for name, start, end in (("i", "zero", "one"), ("o", "three", "four"), ("fc", "one", "three")):
        graph.node.insert(0, helper.make_node("Slice", ["torch", start, end, "second"], [name]))
    onnx.save(model, str(path))
    made = single_step_graph(path, PORTS, "lengths")
    assert made is not None
    assert not {"LSTM", "Slice"} & {node.op_type for node in onnx.load_from_string(made.model).graph.node}
    got = outputs_of(made, 3)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, 1e-5, 1e-6)


def test_what_no_input_decides_is_computed_once() -> None:
    """Weights put together, and sizes of a shape of which others are unknown; what is random or has rows stays."""
    model = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["": 17]>
    g (float[rows, 2, 3] x) => (float[rows, 6] y, float[2] noise, int64[1] many)
    <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, float[2, 3] w = {1, 2, 3, 4, 5, 6}>
    {
        upper = Slice (w, zero, one, zero)
        lower = Slice (w, one, two, zero)
        swapped = Concat <axis = 0> (lower, upper)
        scaled = Mul (x, swapped)
        shape = Shape (scaled)
        many = Slice (shape, zero, one)
        step = Gather (shape, one)
        last = Shape <start = -1> (scaled)
        width = Mul (step, last)
        flat = Concat <axis = 0> (many, width)
        y = Reshape (scaled, flat)
        noise = RandomNormal <shape = [2]> ()
    }""")
    made = settle(model)
    assert [node.op_type for node in made.graph.node] == ["Mul", "Shape", "Slice", "Concat", "Reshape", "RandomNormal"]
    values = {value.name: numpy_helper.to_array(value).tolist() for value in made.graph.initializer}
    assert values["swapped"] == [[4, 5, 6], [1, 2, 3]]
    assert values["width"] == [6]
    assert {dim.dim_value for value in made.graph.output for dim in value.type.tensor_type.shape.dim} == {0, 1, 2, 6}


def test_a_selection_that_repeats_stays(tmp_path: Path) -> None:
    """Where(row is present, one row for all, state) is as many rows as there are states."""
    path = recurrent_model(tmp_path / "model.onnx", "RNN")
    model = onnx.load(str(path))
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int32), "none"))
    graph.initializer.append(numpy_helper.from_array(np.ones((1, H), np.float32), "ones"))
    graph.node.extend(
        [
            helper.make_node("Greater", ["lengths", "none"], ["present"]),
            helper.make_node("Unsqueeze", ["present", "second"], ["rows"]),
            helper.make_node("Where", ["rows", "ones", "h.in"], ["many"]),
        ]
    )
    graph.output.append(helper.make_tensor_value_info("many", TensorProto.FLOAT, ["B", H]))
    onnx.save(model, str(path))
    made = single_step_graph(path, {**PORTS, "many": [("many", (ROWS, H))]}, "lengths")
    assert made is not None
    assert outputs_of(made, 4)["many"].tolist() == np.ones((4, H)).tolist()


def test_a_graph_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """golden.npz is the judge: steps go on by model.onnx, and the log says so."""

    def wrong(path: Path, ports: Ports, lengths: str | None, *, exact: bool) -> SingleStepGraph | None:
        made = single_step_graph(path, ports, lengths, exact=exact)
        assert made is not None
        model = onnx.load_from_string(made.model)
        for value in model.graph.initializer:
            value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value) * 2, value.name))
        return made._replace(model=bytes(model.SerializeToString()))

    monkeypatch.setattr(runtime_module, "single_step_graph", wrong)
    runtime = Runtime(MODELS / "rnn_loss" / "1", device="cpu")
    with caplog.at_level(logging.WARNING):
        assert not runtime.quicken()
    assert "single steps have no graph of their own" in caplog.text
    states = np.frombuffer(runtime.initial(2), np.uint8).reshape(2, -1)
    x, after = np.ones((2, runtime.manifest.n_features), np.float32), np.array(states)
    want, new = runtime.run(x[:, None], None, states)
    np.testing.assert_allclose(runtime.step(x, [states], [after]), want[:, 0], 1e-6, 1e-7)
    np.testing.assert_allclose(after.view(np.float32), new.view(np.float32), 1e-6, 1e-7)


def test_a_graph_that_rounds_otherwise_is_not_taken_for_exact_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Equations are within the tolerance of golden.npz, and not model.onnx bit for bit."""
    directory = import_onnx(foreign.torch_lstm(tmp_path / "g.onnx"), tmp_path, "g").directory
    exact = Runtime(directory, device="cpu")
    assert exact.manifest.single_steps == "exact"
    assert exact.quicken()
    monkeypatch.setattr(runtime_module, "single_step_graph", lambda *args, exact: single_step_graph(*args))
    rounding = Runtime(directory, device="cpu")
    with caplog.at_level(logging.WARNING):
        assert not rounding.quicken()
    assert "single steps are not bit for bit those of model.onnx" in caplog.text
    (directory / "manifest.json").write_text((directory / "manifest.json").read_text().replace('"exact"', '"quick"'))
    assert Runtime(directory, device="cpu").quicken()


def test_a_repository_serves_it_and_refuses_what_is_not_finite() -> None:
    """Loaded as a server does."""
    repository = Repository(MODELS, device="cpu", threads=1)
    repository.scan()
    assert {name for name in repository.names() if repository.live(name).runtime.quick} == set(kinds())
    runtime = repository.live("lstm").runtime
    states = np.frombuffer(runtime.initial(2), np.uint8).reshape(2, -1).copy()
    states.view(np.float32)[1] = np.nan
    with pytest.raises(NonFinite):
        runtime.step(np.ones((2, runtime.manifest.n_features), np.float32), [states], [np.empty_like(states)])
