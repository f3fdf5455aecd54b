"""Small recurrent ONNX graphs as others export them, with the same mathematics in numpy."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(7)
FEATURES, UNITS = 4, 3


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Array]) -> Path:
    """Write a graph; (name, type, shape) of inputs and outputs."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


W = RANDOM.normal(size=(FEATURES, UNITS)).astype(np.float32)
U = RANDOM.normal(size=(UNITS, UNITS)).astype(np.float32)
V = RANDOM.normal(size=(UNITS, 1)).astype(np.float32)


def silero(path: Path, sr: int = T.INT64) -> Path:
    """A voice detector's shape: one chunk a time, h and c in one tensor [2,B,H], a sample rate as a constant."""
    node = helper.make_node
    nodes = [
        node("Gather", ["state", "zero"], ["h"], axis=0),
        node("Gather", ["state", "one"], ["c"], axis=0),
        node("MatMul", ["input", "W"], ["xw"]),
        node("MatMul", ["h", "U"], ["hu"]),
        node("Add", ["xw", "hu"], ["sum"]),
        node("Tanh", ["sum"], ["h1"]),
        node("Mul", ["c", "half"], ["c0"]),
        node("Add", ["c0", "h1"], ["c1"]),
        node("MatMul", ["c1", "V"], ["cv"]),
        node("Cast", ["sr"], ["rate"], to=T.FLOAT),
        node("Div", ["rate", "base"], ["gain"]),
        node("Mul", ["cv", "gain"], ["output"]),
        node("Unsqueeze", ["h1", "axis"], ["h2"]),
        node("Unsqueeze", ["c1", "axis"], ["c2"]),
        node("Concat", ["h2", "c2"], ["stateN"], axis=0),
    ]
    weights = {
        "W": W,
        "U": U,
        "V": V,
        "zero": np.array(0),
        "one": np.array(1),
        "axis": np.array([0]),
        "half": np.float32([0.5]),
        "base": np.float32([16_000]),
    }
    inputs = [("input", T.FLOAT, ["batch", FEATURES]), ("state", T.FLOAT, [2, "batch", UNITS]), ("sr", sr, [])]
    outputs = [("output", T.FLOAT, ["batch", 1]), ("stateN", T.FLOAT, [2, "batch", UNITS])]
    return save(path, nodes, inputs, outputs, weights)


def silero_numpy(x: Array, state: Array, rate: float) -> tuple[Array, Array]:
    """x (B, T, F), state (B, 2, H) -> y (B, T, 1), state."""
    h, c, parts = state[:, 0], state[:, 1], []
    for t in range(x.shape[1]):
        h = np.tanh(x[:, t] @ W + h @ U)
        c = 0.5 * c + h
        parts.append(c @ V * rate / 16_000)
    return np.stack(parts, axis=1), np.stack([h, c], axis=1)


GATES = RANDOM.normal(size=(1, 4 * UNITS, FEATURES)).astype(np.float32)
BACK = RANDOM.normal(size=(1, 4 * UNITS, UNITS)).astype(np.float32)


def torch_lstm(
    path: Path,
    names: tuple[str, ...] = ("x", "h0", "c0", "y", "hn", "cn"),
    dims: tuple[Any, Any] = ("batch", "seq"),
    rows: Any = None,
) -> Path:
    """nn.LSTM(batch_first=True) as torch.onnx writes it: state batch on axis 1, no lengths."""
    x, h0, c0, y, hn, cn = names
    batch, seq = dims
    rows = batch if rows is None else rows
    nodes = [
        helper.make_node("Transpose", [x], ["xt"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["xt", "W", "R", "", "", h0, c0], ["yt", hn, cn], hidden_size=UNITS),
        helper.make_node("Squeeze", ["yt", "one"], ["ys"]),
        helper.make_node("Transpose", ["ys"], [y], perm=[1, 0, 2]),
    ]
    inputs = [(x, T.FLOAT, [batch, seq, FEATURES])] + [(n, T.FLOAT, [1, rows, UNITS]) for n in (h0, c0)]
    outputs = [(y, T.FLOAT, [batch, seq, UNITS])] + [(n, T.FLOAT, [1, rows, UNITS]) for n in (hn, cn)]
    return save(path, nodes, inputs, outputs, {"W": GATES, "R": BACK, "one": np.array([1])})


def lstm_numpy(x: Array, h: Array, c: Array) -> tuple[Array, Array, Array]:
    """x (B, T, F), h and c (B, H) -> y (B, T, H), h, c; ONNX's gate order i, o, f, c."""

    def sigmoid(z: Array) -> Array:
        return 1 / (1 + np.exp(-z))

    parts = []
    for t in range(x.shape[1]):
        i, o, f, g = np.split(x[:, t] @ GATES[0].T + h @ BACK[0].T, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        parts.append(h)
    return np.stack(parts, axis=1), h, c


def counter(path: Path) -> Path:
    """y = total + count, of float64 `total` (a running sum of x) and int64 `count` (steps so far); batch axis last."""
    node = helper.make_node
    nodes = [
        node("Cast", ["x"], ["wide"], to=T.DOUBLE),
        node("Add", ["total_in", "wide"], ["total_out"]),
        node("Add", ["count_in", "one"], ["count_out"]),
        node("Cast", ["count_out"], ["count"], to=T.DOUBLE),
        node("Add", ["total_out", "count"], ["sum"]),
        node("Cast", ["sum"], ["y"], to=T.FLOAT),
    ]
    inputs = [("x", T.FLOAT, [1, "n"]), ("total_in", T.DOUBLE, [1, "n"]), ("count_in", T.INT64, [1, "n"])]
    outputs = [("y", T.FLOAT, [1, "n"]), ("total_out", T.DOUBLE, [1, "n"]), ("count_out", T.INT64, [1, "n"])]
    return save(path, nodes, inputs, outputs, {"one": np.array([1])})
