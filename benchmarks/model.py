"""The benchmark's model, F -> layers x LSTM(H) -> O: a model directory, proved by torch, cached under .cache/bench.

There are three graphs of the same weights: `own`, as the trainer exports; `gaps`, which takes a missing reading (NaN)
for the mean 0; and `foreign`, as torch.onnx writes two nn.LSTM(batch_first=True) whose states are inputs h0, c0, h1, c1
[1, B, H]: without `lengths`, with a manifest as `import-onnx` writes it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .machine import ROOT

REPOSITORY = ROOT / ".cache" / "bench" / "models"


@dataclass(frozen=True)
class State:
    """A state tensor of the graph."""

    layer: str
    key: str
    input: str
    output: str


@dataclass(frozen=True)
class Shape:
    """16 -> 2 x LSTM(128) -> 4 by default."""

    name: str = "bench"
    features: int = 16
    hidden: int = 128
    outputs: int = 4
    layers: int = 2
    kind: Literal["own", "gaps", "foreign"] = "own"

    @property
    def directory(self) -> Path:
        """Where the model lies."""
        return REPOSITORY / self.name / "1"

    @property
    def states(self) -> list[State]:
        """The state tensors, layer by layer."""
        pairs = [(layer, key) for layer in range(self.layers) for key in "hc"]
        if self.kind == "foreign":
            return [State(f"lstm_{a}", k, f"{k}{a}", f"{k}{a}_out") for a, k in pairs]
        return [State(f"lstm_{a}", k, f"lstm_{a}.{k}.in", f"lstm_{a}.{k}.out") for a, k in pairs]

    @property
    def row(self) -> tuple[int, ...]:
        """A row's state tensor, without the batch axis."""
        return (1, self.hidden) if self.kind == "foreign" else (self.hidden,)


GAPS = Shape("bench-gaps", kind="gaps")
FOREIGN = Shape("bench-imported", kind="foreign")
SERVED = (Shape(), GAPS, FOREIGN)
"""What every server of a benchmark serves."""


def ensure(shape: Shape | None = None) -> Path:
    """The model's directory, made where it is not there yet."""
    shape = shape or Shape()
    if not (shape.directory / "manifest.json").exists():
        _build(shape)
    return shape.directory


def _build(shape: Shape) -> None:
    import onnx
    import torch

    torch.manual_seed(0)
    lstm = torch.nn.LSTM(shape.features, shape.hidden, shape.layers, batch_first=True)
    dense = torch.nn.Linear(shape.hidden, shape.outputs)
    shape.directory.mkdir(parents=True, exist_ok=True)
    graph = (_foreign_graph if shape.kind == "foreign" else _graph)(shape, lstm, dense)
    opset = 17 if shape.kind == "foreign" else 20
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(shape.directory / "model.onnx"))
    np.savez(shape.directory / "golden.npz", **_golden(shape, lstm, dense))
    (shape.directory / "manifest.json").write_text(json.dumps(_manifest(shape), indent=2))


class _Nodes:
    """Collects nodes and constants of a graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Any) -> str:
        import onnx

        self.constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        import onnx

        self.nodes.append(onnx.helper.make_node(kind, inputs, outputs, **attributes))


def _graph(shape: Shape, lstm: Any, dense: Any) -> Any:
    import onnx

    made = _Nodes()
    made.constant("none", np.array(0, np.int32))
    made.constant("first", np.array([0], np.int64))
    made.constant("second", np.array([1], np.int64))
    made.add("Greater", ["lengths", "none"], ["alive"])
    made.add("Unsqueeze", ["alive", "second"], ["alive_rows"])
    if shape.kind == "gaps":
        made.constant("mean", np.zeros(shape.features, np.float32))
        made.add("IsNaN", ["x"], ["missing"])
        made.add("Where", ["missing", "mean", "x"], ["filled"])
    made.add("Transpose", ["filled" if shape.kind == "gaps" else "x"], ["y0"], perm=[1, 0, 2])
    for layer in range(shape.layers):
        _lstm(made, shape, lstm, layer)
    made.constant("W", dense.weight.detach().numpy().T)
    made.constant("b", dense.bias.detach().numpy())
    made.add("MatMul", [f"y{shape.layers}", "W"], ["product"])
    made.add("Add", ["product", "b"], ["sum"])
    made.add("Transpose", ["sum"], ["y"], perm=[1, 0, 2])

    inputs = [_tensor("x", "B", "T", shape.features), _tensor("lengths", "B", kind=onnx.TensorProto.INT32)]
    inputs += [_tensor(state.input, "B", shape.hidden) for state in shape.states]
    outputs = [_tensor("y", "B", "T", shape.outputs)]
    outputs += [_tensor(state.output, "B", shape.hidden) for state in shape.states]
    return onnx.helper.make_graph(made.nodes, shape.name, inputs, outputs, made.constants)


def _foreign_graph(shape: Shape, lstm: Any, dense: Any) -> Any:
    """What torch.onnx makes of it, node by node; its time axis is dynamic, its states have the batch on axis 1."""
    import onnx

    made = _Nodes()
    made.constant("axis", np.array([1], np.int64))
    made.add("Transpose", ["x"], ["rows0"], perm=[1, 0, 2])
    for layer in range(shape.layers):
        inputs = [f"rows{layer}", *_weights(made, lstm, layer), "", f"h{layer}", f"c{layer}"]
        made.add("LSTM", inputs, [f"all{layer}", f"h{layer}_out", f"c{layer}_out"], hidden_size=shape.hidden)
        made.add("Squeeze", [f"all{layer}", "axis"], [f"rows{layer + 1}"])
    made.add("Transpose", [f"rows{shape.layers}"], ["last"], perm=[1, 0, 2])
    made.constant("W", dense.weight.detach().numpy().T)
    made.constant("b", dense.bias.detach().numpy())
    made.add("MatMul", ["last", "W"], ["product"])
    made.add("Add", ["b", "product"], ["y"])
    inputs = [_tensor("x", "batch", "time", shape.features)]
    inputs += [_tensor(state.input, 1, "batch", shape.hidden) for state in shape.states]
    outputs = [_tensor("y", "batch", "time", shape.outputs)]
    outputs += [_tensor(state.output, 1, "batch", shape.hidden) for state in shape.states]
    return onnx.helper.make_graph(made.nodes, "main_graph", inputs, outputs, made.constants)


def _tensor(name: str, *axes: str | int, kind: int = 1) -> Any:
    import onnx

    return onnx.helper.make_tensor_value_info(name, kind, list(axes))


def _weights(made: _Nodes, lstm: Any, layer: int) -> list[str]:
    """W, R and B of one LSTM node; torch's gates i,f,g,o become ONNX's i,o,f,c."""

    def gates(name: str) -> Any:
        i, f, g, o = np.split(getattr(lstm, f"{name}_l{layer}").detach().numpy(), 4)
        return np.concatenate([i, o, f, g])

    return [
        made.constant(f"W{layer}", gates("weight_ih")[None]),
        made.constant(f"R{layer}", gates("weight_hh")[None]),
        made.constant(f"B{layer}", np.concatenate([gates("bias_ih"), gates("bias_hh")])[None]),
    ]


def _lstm(made: _Nodes, shape: Shape, lstm: Any, layer: int) -> None:
    """One LSTM node; a row of length 0 keeps its state."""
    weights = _weights(made, lstm, layer)
    for key in "hc":
        made.add("Unsqueeze", [f"lstm_{layer}.{key}.in", "first"], [f"{key}_before{layer}"])
    states = [f"h_before{layer}", f"c_before{layer}"]
    outputs = [f"all{layer}", f"h_after{layer}", f"c_after{layer}"]
    made.add("LSTM", [f"y{layer}", *weights, "lengths", *states], outputs, hidden_size=shape.hidden)
    made.add("Squeeze", [f"all{layer}", "second"], [f"y{layer + 1}"])
    for key in "hc":
        made.add("Squeeze", [f"{key}_after{layer}", "first"], [f"{key}_rows{layer}"])
        made.add("Where", ["alive_rows", f"{key}_rows{layer}", f"lstm_{layer}.{key}.in"], [f"lstm_{layer}.{key}.out"])


def _golden(shape: Shape, lstm: Any, dense: Any) -> dict[str, Any]:
    """Four rows of lengths 7, 5, 1 and 0 as torch computes them; with gaps, some readings are missing."""
    import torch

    rows, steps, random = 4, 7, np.random.default_rng(0)
    x, lengths = random.standard_normal((rows, steps, shape.features), np.float32), np.array([7, 5, 1, 0], np.int32)
    if shape.kind == "gaps":
        x[random.random(x.shape) < 0.2] = np.nan
    golden: dict[str, Any] = {"x": x, "lengths": lengths, "y": np.zeros((rows, steps, shape.outputs), np.float32)}
    before = 0.1 * random.standard_normal((2, shape.layers, rows, shape.hidden), np.float32)
    after = before.copy()
    with torch.no_grad():
        for row in range(3):
            state = (torch.from_numpy(before[0, :, row : row + 1]), torch.from_numpy(before[1, :, row : row + 1]))
            y, (h, c) = lstm(torch.from_numpy(np.nan_to_num(x[row : row + 1, : lengths[row]])), state)
            golden["y"][row, : lengths[row]] = dense(y)[0].numpy()
            after[0, :, row], after[1, :, row] = h[:, 0].numpy(), c[:, 0].numpy()
    for layer in range(shape.layers):
        for i, key in enumerate("hc"):
            golden[f"state_in.lstm_{layer}.{key}"] = before[i, layer].reshape(rows, *shape.row)
            golden[f"state_out.lstm_{layer}.{key}"] = after[i, layer].reshape(rows, *shape.row)
    return golden


def _manifest(shape: Shape) -> dict[str, Any]:
    foreign = shape.kind == "foreign"
    missing = "mean" if shape.kind == "gaps" else "refuse"
    return {
        "schema_version": 1,
        "name": shape.name,
        "version": 1,
        "features": [{"name": f"f{i}", "missing": missing} for i in range(shape.features)],
        "outputs": [{"name": f"o{i}"} for i in range(shape.outputs)],
        "task": "regression",
        "lengths": None if foreign else "lengths",
        "single_steps": "exact" if foreign else "quick",
        "states": [
            {
                "layer": state.layer,
                "key": state.key,
                "input": state.input,
                "output": state.output,
                "shape": list(shape.row),
                "batch_axis": 1 if foreign else 0,
            }
            for state in shape.states
        ],
        "sha256": hashlib.sha256((shape.directory / "model.onnx").read_bytes()).hexdigest(),
    }
