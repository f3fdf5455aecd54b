"""import of graphs that hide their state: it is lifted, and steps are what the whole is; or one line says why not."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto as T
from onnx import helper
from torch import nn

from service.engine.imports.onnx_graphs import import_onnx
from service.engine.model import Runtime
from stepcast import imports
from stepcast.errors import ManifestError

F, H, OUTPUTS = 3, 4, 2
node = helper.make_node
RANDOM = np.random.default_rng(11)
KERNELS = {
    name: RANDOM.normal(size=(1, gates * H, size)).astype(np.float32) / 2
    for gates in (1, 4)
    for name, size in ((f"W{gates}", F), (f"R{gates}", H))
}


class Tagger(nn.Module):
    """A recurrent network as it is usually written: whoever calls it gives no state, and gets none."""

    def __init__(self, kind: str, layers: int, last: bool) -> None:
        super().__init__()
        self.body = getattr(nn, kind)(F, H, layers, batch_first=True)
        self.head, self.last = nn.Linear(H, OUTPUTS), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.body(x)
        return self.head(hidden[:, -1] if self.last else hidden)  # type: ignore[no-any-return]


def taken(file: Path, folder: Path) -> Runtime:
    """The imported model as it is served: by a graph for single steps where there is one."""
    runtime = Runtime(import_onnx(file, folder / "models", "m").directory, device="cpu")
    runtime.quicken()
    return runtime


def whole(file: Path, x: Any) -> Any:
    """What the graph itself answers for whole sequences, row by row."""
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[[row]]})[0] for row in range(len(x))])


def states_of(runtime: Runtime) -> list[tuple[str, str, tuple[int, ...]]]:
    """Layer, key and shape of each state."""
    return [(state.layer, state.key, state.shape) for state in runtime.manifest.states]


@pytest.mark.parametrize(
    ("kind", "layers", "dynamo", "last", "want"),
    [
        ("LSTM", 1, False, True, [("body", "h", (H,)), ("body", "c", (H,))]),
        ("LSTM", 1, True, False, [("lstm_0", "h", (H,)), ("lstm_0", "c", (H,))]),
        ("GRU", 2, False, False, [("body_0", "h", (H,)), ("body_1", "h", (H,))]),
        ("GRU", 2, True, True, [("gru_0", "h", (H,)), ("gru_1", "h", (H,))]),
        ("RNN", 1, False, False, [("body", "h", (H,))]),
    ],
)
def test_what_torch_exports_without_a_state_steps_as_torch_answers(
    tmp_path: Path, kind: str, layers: int, dynamo: bool, last: bool, want: Any
) -> None:
    """Both exporters; of a network that gives its last answer only, each step gives the answer so far."""
    torch.manual_seed(5)
    network, file = Tagger(kind, layers, last).eval(), tmp_path / "tagger.onnx"
    dims = {0: "rows", 1: "steps"}
    how: dict[str, Any] = {"dynamic_axes": {"x": dims, "y": dims if not last else {0: "rows"}}}
    if dynamo:
        how = {"dynamic_shapes": {"x": {0: torch.export.Dim("rows"), 1: torch.export.Dim("steps")}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "verbose": False}
        torch.onnx.export(network, (torch.zeros(2, 5, F),), str(file), dynamo=dynamo, **names, **how)
    runtime = taken(file, tmp_path)
    assert states_of(runtime) == want
    assert runtime.quick
    assert "state inputs and outputs were added" in runtime.manifest.provenance.data
    x = RANDOM.normal(size=(3, 7, F)).astype(np.float32)
    with torch.no_grad():
        answers = [network(torch.from_numpy(x[:, : step + 1])) for step in range(7)]
    expected = np.stack([answer.numpy() if last else answer.numpy()[:, -1] for answer in answers], axis=1)
    np.testing.assert_allclose(foreign.stepped(runtime, x), expected, 1e-5, 1e-6)


def tf2onnx(file: Path, *, op: str = "LSTM", steps: Any = None, batch: Any = None, **changes: Any) -> Path:
    """Keras LSTM(return_sequences=True) as tf2onnx writes it.

    The input goes to time-major order, the initial states are a constant 0 expanded to a shape computed from the batch,
    and the sequence comes back through Squeeze and Transpose. With `lengths`, they are computed as well.
    """
    gates = 4 if op == "LSTM" else 1
    zeros = [
        node("Shape", ["x"], ["shape"]),
        node("Slice", ["shape", "zero", "one"], ["rows"]),
        node("Concat", ["rows", "units"], ["rows_units"], axis=0),
        node("Expand", ["null", "rows_units"], ["zeros"]),
        node("Unsqueeze", ["zeros", "zero"], ["init"]),
    ]
    lengths = [
        node("Slice", ["shape", "one", "two"], ["many"]),
        node("Cast", ["many"], ["many32"], to=T.INT32),
        node("Expand", ["many32", "rows"], ["lengths"]),
    ]
    given = "lengths" if changes.get("lengths") else ""
    path = f"StatefulPartitionedCall/model_1/lstm_3/PartitionedCall/{op}__27"
    states = ["init", "init"] if op == "LSTM" else ["init"]
    weights = {"W": KERNELS[f"W{gates}"], "R": KERNELS[f"R{gates}"]}
    weights |= {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "units": np.array([H])}
    weights |= {"null": np.zeros(1, np.float32)} | changes.get("weights", {})
    nodes = [
        node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
        *zeros,
        *(lengths if given else []),
        node(
            op,
            ["xt", "W", "R", "", given, *states],
            changes.get("results", ["all"]),
            path,
            hidden_size=H,
            **changes.get("attributes", {}),
        ),
        *changes.get("after", [node("Squeeze", ["all", "one"], ["flat"])]),
        node("Transpose", ["flat"], ["y"], perm=[1, 0, 2]),
    ]
    inputs, outputs = [("x", T.FLOAT, [batch, steps, F])], [("y", T.FLOAT, [batch, steps, changes.get("width", H)])]
    return foreign.save(file, nodes, inputs, outputs, weights)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("op", ["LSTM", "RNN"])
def test_what_tf2onnx_writes_is_lifted(tmp_path: Path, op: str, lengths: bool) -> None:
    """Axes without names, a layer's name between others; single steps are the whole, by onnxruntime's own answers."""
    file = tf2onnx(tmp_path / "keras.onnx", op=op, lengths=lengths)
    runtime = taken(file, tmp_path)
    assert states_of(runtime) == [("lstm_3", key, (H,)) for key in ("hc" if op == "LSTM" else "h")]
    x = RANDOM.normal(size=(3, 6, F)).astype(np.float32)
    np.testing.assert_allclose(foreign.stepped(runtime, x), whole(file, x), 1e-5, 1e-6)


def test_a_fixed_number_of_steps_is_freed(tmp_path: Path) -> None:
    """Keras networks often say how many steps their sequences have: sessions go on after them."""
    file = tf2onnx(tmp_path / "keras.onnx", steps=6, batch="rows")
    runtime = taken(file, tmp_path)
    assert runtime.manifest.n_features == F
    x = RANDOM.normal(size=(3, 6, F)).astype(np.float32)
    np.testing.assert_allclose(foreign.stepped(runtime, x), whole(file, x), 1e-5, 1e-6)
    free = whole(tf2onnx(tmp_path / "free.onnx"), x := RANDOM.normal(size=(2, 9, F)).astype(np.float32))
    np.testing.assert_allclose(foreign.stepped(runtime, x), free, 1e-5, 1e-6)


def test_a_number_of_steps_that_reshapes_hold_is_freed(tmp_path: Path) -> None:
    """As torch's exporters write it for an example of six steps."""
    after = [
        node("Transpose", ["all"], ["rows_last"], perm=[0, 2, 1, 3]),
        node("Reshape", ["rows_last", "to"], ["flat"]),
    ]
    file = tf2onnx(tmp_path / "fixed.onnx", steps=6, after=after, weights={"to": np.array([6, -1, H])})
    runtime = taken(file, tmp_path)
    x = RANDOM.normal(size=(3, 9, F)).astype(np.float32)
    free = whole(tf2onnx(tmp_path / "free.onnx"), x)
    np.testing.assert_allclose(foreign.stepped(runtime, x), free, 1e-5, 1e-6)


def test_one_row_of_the_examples_steps_becomes_any(tmp_path: Path) -> None:
    """What exporters write where nobody names an axis: all of the example's sizes."""
    file = tf2onnx(tmp_path / "fixed.onnx", steps=6, batch=1)
    runtime = taken(file, tmp_path)
    assert runtime.manifest.rows == "many"
    assert states_of(runtime) == [("lstm_3", "h", (H,)), ("lstm_3", "c", (H,))]
    x = RANDOM.normal(size=(3, 6, F)).astype(np.float32)
    np.testing.assert_allclose(foreign.stepped(runtime, x), whole(file, x), 1e-5, 1e-6)


def test_a_graph_without_a_state_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A product with a matrix has nothing to lift: a recurrent network that was unrolled looks like this."""
    ports = [("x", T.FLOAT, ["rows", F])], [("y", T.FLOAT, ["rows", 4 * H])]
    nodes = [node("MatMul", ["x", "W"], ["y"])]
    file = foreign.save(tmp_path / "plain.onnx", nodes, *ports, {"W": np.ascontiguousarray(KERNELS["W4"][0].T)})
    assert imports.run([str(file), "--models", str(tmp_path / "models")], "stepcast") == 0
    assert "it has no state: what it answers to a step follows from this step alone" in capsys.readouterr().out


def test_a_first_state_that_is_the_same_everywhere_is_told(tmp_path: Path) -> None:
    """It need not be zero: the manifest says what it is."""
    file = tf2onnx(tmp_path / "half.onnx", op="RNN", weights={"null": np.float32([0.5])})
    runtime = taken(file, tmp_path)
    assert [state.initial for state in runtime.manifest.states] == [0.5]
    x = RANDOM.normal(size=(2, 4, F)).astype(np.float32)
    np.testing.assert_allclose(foreign.stepped(runtime, x), whole(file, x), 1e-5, 1e-6)


def test_last_states_that_are_outputs_become_states(tmp_path: Path) -> None:
    """torch networks that return their states, but take none: y is the only output that is left to be data."""
    last = [node("Squeeze", ["all", "one"], ["flat"]), node("Identity", ["h"], ["hn"])]
    file = tf2onnx(tmp_path / "states.onnx", op="RNN", after=last, results=["all", "h"])
    model = onnx.load(str(file))
    model.graph.output.append(helper.make_tensor_value_info("hn", T.FLOAT, [1, None, H]))
    onnx.save(model, str(file))
    runtime = taken(file, tmp_path)
    assert runtime.manifest.output.name == "y"
    assert states_of(runtime) == [("lstm_3", "h", (H,))]


def test_scan_that_starts_from_zeros_is_lifted(tmp_path: Path) -> None:
    """A sum over time as a Scan: its state is the sum."""
    body = helper.make_graph(
        [node("Add", ["sum", "now"], ["sum_out"]), node("Identity", ["sum_out"], ["each"])],
        "body",
        [helper.make_tensor_value_info(name, T.FLOAT, [None, F]) for name in ("sum", "now")],
        [helper.make_tensor_value_info(name, T.FLOAT, [None, F]) for name in ("sum_out", "each")],
    )
    nodes = [
        node("Shape", ["x"], ["rows"], start=0, end=1),
        node("Concat", ["rows", "width"], ["shape"], axis=0),
        node("ConstantOfShape", ["shape"], ["zeros"]),
        node("Scan", ["zeros", "x"], ["total", "y"], "running_sum", num_scan_inputs=1, body=body, **AXES),
    ]
    ports = [("x", T.FLOAT, ["rows", "steps", F])], [("y", T.FLOAT, ["rows", "steps", F])]
    runtime = taken(foreign.save(tmp_path / "scan.onnx", nodes, *ports, {"width": np.array([F])}), tmp_path)
    assert states_of(runtime) == [("running_sum", "s0", (F,))]
    x = np.arange(2 * 4 * F, dtype=np.float32).reshape(2, 4, F)
    np.testing.assert_array_equal(foreign.stepped(runtime, x), x.cumsum(axis=1))


AXES = {"scan_input_axes": [1], "scan_output_axes": [1]}


def test_what_goes_over_the_bands_of_a_frame_stays(tmp_path: Path) -> None:
    """A network that reads the 4 bands of a frame by a recurrent node, and carries one state that it is given."""
    nodes = [
        node("Unsqueeze", ["x", "two"], ["x2"]),
        node("Transpose", ["x2"], ["bands"], perm=[1, 0, 2]),
        node("RNN", ["bands", "W", "R"], ["all", "last"], "over_bands", hidden_size=H),
        node("Squeeze", ["last", "zero"], ["frame"]),
        node("Add", ["frame", "h_in"], ["h_out"]),
        node("Tanh", ["h_out"], ["y"]),
    ]
    weights = {"W": KERNELS["W1"][:, :, :1], "R": KERNELS["R1"], "zero": np.array([0]), "two": np.array([2])}
    inputs = [("x", T.FLOAT, ["rows", 4]), ("h_in", T.FLOAT, ["rows", H])]
    outputs = [("y", T.FLOAT, ["rows", H]), ("h_out", T.FLOAT, ["rows", H])]
    runtime = taken(foreign.save(tmp_path / "bands.onnx", nodes, inputs, outputs, weights), tmp_path)
    assert [state.input for state in runtime.manifest.states] == ["h_in"]


def test_a_hidden_state_beside_a_given_one(tmp_path: Path) -> None:
    """Both are states afterwards: of two recurrent nodes one is told its state, the other is not."""
    nodes = [
        node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
        node("RNN", ["xt", "W", "R", "", "", "h_in"], ["first", "h_out"], hidden_size=H),
        node("Squeeze", ["first", "one"], ["second"]),
        node("RNN", ["second", "R", "R"], ["all"], "decoder", hidden_size=H),
        node("Squeeze", ["all", "one"], ["flat"]),
        node("Transpose", ["flat"], ["y"], perm=[1, 0, 2]),
    ]
    weights = {"W": KERNELS["W1"], "R": KERNELS["R1"], "one": np.array([1])}
    inputs = [("x", T.FLOAT, ["rows", "steps", F]), ("h_in", T.FLOAT, [1, "rows", H])]
    outputs = [("y", T.FLOAT, ["rows", "steps", H]), ("h_out", T.FLOAT, [1, "rows", H])]
    runtime = taken(foreign.save(tmp_path / "two.onnx", nodes, inputs, outputs, weights), tmp_path)
    assert {state.input for state in runtime.manifest.states} == {"h_in", "decoder.h"}


def twice(file: Path, op: str, **attributes: Any) -> Path:
    """A network that reads time backwards too, or backwards only."""
    both = {name: np.tile(KERNELS[name], (2, 1, 1)) for name in ("W4", "R4")}
    weights = {"W": both["W4"], "R": both["R4"]} if attributes["direction"] == "bidirectional" else {}
    join = [node("Transpose", ["all"], ["moved"], perm=[0, 2, 1, 3]), node("Reshape", ["moved", "both"], ["flat"])]
    join = join if weights else [node("Squeeze", ["all", "one"], ["flat"])]
    extra = {"both": np.array([0, 0, 2 * H])} | weights
    width = 2 * H if weights else H
    made = tf2onnx(file, op=op, attributes=attributes, after=join, weights=extra, width=width)
    model = onnx.load(str(made))
    if weights:
        (zeros,) = (one for one in model.graph.node if one.output[0] == "init")
        zeros.input[1] = "zero"
        model.graph.node.insert(6, node("Concat", ["init", "init"], ["init2"], axis=0))
        (recurrent,) = (one for one in model.graph.node if one.op_type == op)
        recurrent.input[5] = recurrent.input[6] = "init2"
    onnx.save(model, str(made))
    return made


def mean_over_time(file: Path) -> Path:
    """The hidden sequence is centred over all its steps."""
    after = [
        node("Squeeze", ["all", "one"], ["hidden"]),
        node("ReduceMean", ["hidden"], ["mean"], axes=[0], keepdims=1),
        node("Sub", ["hidden", "mean"], ["flat"]),
    ]
    return tf2onnx(file, op="RNN", after=after)


def learned_start(file: Path) -> Path:
    """The first state is a weight."""
    return tf2onnx(file, op="RNN", weights={"null": np.arange(H, dtype=np.float32)})


REFUSED: list[tuple[Callable[[Path], Path], str]] = [
    (lambda file: twice(file, "LSTM", direction="bidirectional"), "reads time backwards: its answers need readings"),
    (lambda file: twice(file, "LSTM", direction="reverse"), "reads time backwards: its answers need readings"),
    (mean_over_time, "something else in the graph looks at other steps"),
    (learned_start, "starts from values that differ"),
    (lambda file: tf2onnx(file, batch=2, steps=6), "takes 2 rows at once and no other number"),
]


@pytest.mark.parametrize(("make", "why"), REFUSED, ids=["bidirectional", "reverse", "mean", "learned", "two rows"])
def test_what_cannot_be_lifted_is_refused(tmp_path: Path, make: Callable[[Path], Path], why: str) -> None:
    """One sentence that says why, and nothing is left behind."""
    with pytest.raises(ManifestError, match=why) as error:
        import_onnx(make(tmp_path / "graph.onnx"), tmp_path / "models", "m")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "models").exists()


# --- operators of opset 27 and of onnxruntime -------------------------------------------------------------------------

HEADS, KEY, VALUE = 2, 3, 4


def attention(file: Path, domain: str, rule: str) -> Path:
    """x (B, T, 2*3 + 2*3 + 2*4 + 2 + 2): queries, keys, values, decay and rate side by side; no state is given."""
    sizes = [HEADS * KEY, HEADS * KEY, HEADS * VALUE, HEADS, HEADS]
    optional = ["g" if "gated" in rule else "", "b" if "delta" in rule else ""]
    rates = [node("Softplus", ["g_raw"], ["g_abs"]), node("Neg", ["g_abs"], ["g"]), node("Sigmoid", ["b_raw"], ["b"])]
    attend = node(
        "LinearAttention", ["q", "k", "v", "", *optional], ["y", "last"], "mixer/LinearAttention", domain=domain
    )
    for name, value in {"q_num_heads": HEADS, "kv_num_heads": HEADS, "update_rule": rule}.items():
        attend.attribute.append(helper.make_attribute(name, value))
    nodes = [node("Split", ["x", "sizes"], ["q", "k", "v", "g_raw", "b_raw"], axis=2), *rates, attend]
    ports = [("x", T.FLOAT, ["B", "T", sum(sizes)])], [("y", T.FLOAT, ["B", "T", HEADS * VALUE])]
    return saved(file, domain, nodes, *ports, {"sizes": np.array(sizes)})


def convolution(file: Path, domain: str) -> Path:
    """x (B, T, 3), three channels, each with a kernel of 4 over the steps so far."""
    nodes = [
        node("Transpose", ["x"], ["channels"], perm=[0, 2, 1]),
        node("CausalConvWithState", ["channels", "kernel", "bias"], ["made", "last"], domain=domain, activation="silu"),
        node("Transpose", ["made"], ["y"], perm=[0, 2, 1]),
    ]
    ports = [("x", T.FLOAT, ["B", "T", F])], [("y", T.FLOAT, ["B", "T", F])]
    return saved(file, domain, nodes, *ports, {"kernel": KERNEL, "bias": BIAS})


KERNEL, BIAS = RANDOM.normal(size=(F, 1, 4)).astype(np.float32), RANDOM.normal(size=F).astype(np.float32)


def saved(file: Path, domain: str, nodes: Any, inputs: Any, outputs: Any, weights: Any) -> Path:
    """A graph of opset 27, or of 21 with operators of a domain."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)] if domain else [helper.make_opsetid("", 27)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(file))
    return file


def attention_numpy(x: Any, rule: str) -> Any:
    """The recurrences of https://onnx.ai/onnx/operators/onnx__LinearAttention.html for x (B, T, F)."""
    q, k, v, g, b = np.split(x, np.cumsum([HEADS * KEY, HEADS * KEY, HEADS * VALUE, HEADS]), axis=2)
    q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in (q, k, v))  # (B, T, heads, d)
    decay = np.exp(-np.log1p(np.exp(g))) if "gated" in rule else np.ones_like(g)
    rate = 1 / (1 + np.exp(-b)) if "delta" in rule else np.ones_like(b)
    state, parts = np.zeros((len(x), HEADS, KEY, VALUE)), []
    for t in range(x.shape[1]):
        state = decay[:, t, :, None, None] * state
        known = np.einsum("bhkv,bhk->bhv", state, k[:, t]) if "delta" in rule else 0
        state = state + rate[:, t, :, None, None] * np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t] - known)
        parts.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]).reshape(len(x), -1) / np.sqrt(KEY))
    return np.stack(parts, axis=1)


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
@pytest.mark.parametrize("domain", ["", "com.microsoft"], ids=["opset27", "microsoft"])
def test_linear_attention_keeps_its_state(tmp_path: Path, domain: str, rule: str) -> None:
    """By the equations of its documentation, step by step."""
    runtime = taken(attention(tmp_path / "attention.onnx", domain, rule), tmp_path)
    assert states_of(runtime) == [("mixer", "s", (HEADS, KEY, VALUE))]
    x = RANDOM.normal(size=(2, 6, runtime.manifest.n_features)).astype(np.float32) / 2
    np.testing.assert_allclose(foreign.stepped(runtime, x), attention_numpy(x, rule), 1e-5, 1e-5)


@pytest.mark.parametrize("domain", ["", "com.microsoft"], ids=["opset27", "microsoft"])
def test_a_causal_convolution_keeps_what_it_looks_at(tmp_path: Path, domain: str) -> None:
    """Its state are the last three values of each channel."""
    runtime = taken(convolution(tmp_path / "convolution.onnx", domain), tmp_path)
    assert [shape for _, _, shape in states_of(runtime)] == [(F, 3)]
    x = RANDOM.normal(size=(2, 6, F)).astype(np.float32)
    padded = np.concatenate([np.zeros((2, 3, F), np.float32), x], axis=1)
    z = BIAS + sum(padded[:, tap : tap + 6] * KERNEL[:, 0, tap] for tap in range(4))
    np.testing.assert_allclose(foreign.stepped(runtime, x), z / (1 + np.exp(-z)), 1e-5, 1e-6)


def test_an_operator_that_is_too_new_is_named(tmp_path: Path) -> None:
    """Opset 28 has one that onnxruntime does not know."""
    ports = [("x", T.FLOAT, ["B", "T", 4])], [("y", T.FLOAT, ["B", "T", 2])]
    file = saved(tmp_path / "new.onnx", "", [node("SwiGLU", ["x"], ["y"])], *ports, {})
    model = onnx.load(str(file))
    model.opset_import[0].version = 28
    onnx.save(model, str(file))
    with pytest.raises(ManifestError, match="operator SwiGLU of opset 28 is not in opset 26") as error:
        import_onnx(file, tmp_path / "models", "m")
    assert "\n" not in str(error.value)
