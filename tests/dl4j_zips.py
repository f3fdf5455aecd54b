"""DL4J zips as ModelSerializer writes them, and what DL4J's layers compute of their parameters, in plain numpy.

Formulas are DL4J's own (columns of the gates I, F, O, G; peepholes in RW's last three columns wFF, wOO, wGG), and work
on DL4J's own matrices: nothing here goes through the importer.
"""

import json
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Params = dict[str, Array]
Mode = Literal["JAVACPP", "LONG_SHAPE", "MIXED_DATA_TYPES"]
TYPES = {"FLOAT": ">f4", "DOUBLE": ">f8", "HALF": ">f2"}
FLAGS = {"FLOAT": 8192, "DOUBLE": 16384, "HALF": 4096}


def utf(text: str) -> bytes:
    """Java's writeUTF."""
    return struct.pack(">H", len(text)) + text.encode()


def array(value: Array, mode: Mode = "MIXED_DATA_TYPES", kind: str = "FLOAT", order: str = "C") -> bytes:
    """An INDArray, its elements in memory in `order`; the flag says 'c' whatever they are, as DL4J's recorded ones."""
    long = mode != "JAVACPP"
    strides = [s // value.itemsize for s in np.asarray(value, order=order).strides]
    flag = FLAGS[kind] if mode == "MIXED_DATA_TYPES" else 0
    shape = np.array([value.ndim, *value.shape, *strides, flag, 1, 99], ">i8" if long else ">i4")
    count = ">q" if long else ">i"
    header = utf(mode) + struct.pack(count, len(shape)) + utf("LONG" if long else "INT") + shape.tobytes()
    data = np.asarray(value, TYPES[kind]).tobytes(order=order)
    return header + utf(mode) + struct.pack(count, value.size) + utf(kind) + data


def flat(params: Sequence[Params]) -> Array:
    """All parameters in one row [1, N], each matrix column by column."""
    return np.concatenate([p.reshape(-1, order="F") for layer in params for p in layer.values()])[None]


# --- The two dialects of configuration.json ----------------------------------------------------------------------

ACTIVATIONS = {"tanh": "TanH", "softsign": "SoftSign", "sigmoid": "Sigmoid", "softmax": "Softmax", "relu": "ReLU"}
ACTIVATIONS |= {"identity": "Identity", "hardsigmoid": "HardSigmoid", "cube": "Cube"}
OLD_NAMES = {"GravesLSTM": "gravesLSTM", "GravesBidirectionalLSTM": "gravesBidirectionalLSTM", "OutputLayer": "output"}
OLD_NAMES |= {"RnnOutputLayer": "rnnoutput", "DenseLayer": "dense", "GlobalPoolingLayer": "GlobalPooling"}


def activation(name: str, old: bool) -> Any:
    """An activation's object."""
    told = ACTIVATIONS[name]
    return {told: {}} if old else {"@class": f"org.nd4j.linalg.activations.impl.Activation{told}"}


def layer(kind: str, old: bool = False, **fields: Any) -> dict[str, Any]:
    """A layer's object; activations by our names."""
    made = {k: activation(v, old) if k in ("activationFn", "gateActivationFn") else v for k, v in fields.items()}
    if old:
        return {OLD_NAMES.get(kind, kind): made}
    return {"@class": f"org.deeplearning4j.nn.conf.layers.{kind}", **made}


def chain(layers: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A MultiLayerConfiguration."""
    return {"backpropType": "Standard", "confs": [{"layer": one, "seed": 1} for one in layers], **more}


def graph(layers: Sequence[dict[str, Any]], old: bool = False) -> dict[str, Any]:
    """A ComputationGraphConfiguration that is the same chain."""
    names = [f"v{n}" for n in range(len(layers))]

    def vertex(one: dict[str, Any]) -> dict[str, Any]:
        held = {"layerConf": {"layer": one}, "preProcessor": None}
        return {"LayerVertex": held} if old else {"@class": "org.deeplearning4j.nn.conf.graph.LayerVertex", **held}

    return {
        "networkInputs": ["in"],
        "networkOutputs": [names[-1]],
        "vertices": {name: vertex(one) for name, one in zip(names, layers, strict=True)},
        "vertexInputs": {name: [before] for name, before in zip(names, ["in", *names], strict=False)},
    }


def save(file: Path, configuration: Any, params: Sequence[Params] = (), **entries: bytes) -> Path:
    """Write a zip; `entries` by their names before the dot replace or add."""
    parts = {"configuration": json.dumps(configuration).encode()}
    if params:
        parts["coefficients"] = array(flat(params))
    endings = {"configuration": "json"}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**parts, **entries}.items():
            archive.writestr(f"{name}.{endings.get(name, 'bin')}", content)
    return file


# --- What DL4J computes ------------------------------------------------------------------------------------------


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hardsigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "cube": lambda x: x**3,
    "softmax": softmax,
}


def lstm(
    x: Array, p: Params, act: str = "tanh", gate: str = "sigmoid", names: Sequence[str] = ("W", "RW", "b")
) -> Array:
    """h of every step (B, T, n) of a LSTM, or of a GravesLSTM if RW is 4 n + 3 wide."""
    w, rw, b = (np.asarray(p[name], np.float64) for name in names)
    a, s, n = FUNCTIONS[act], FUNCTIONS[gate], rw.shape[0]
    to_f, to_o, to_g = rw[:, 4 * n :].T if rw.shape[1] > 4 * n else np.zeros((3, n))
    h, c, out = np.zeros((len(x), n)), np.zeros((len(x), n)), []
    for t in range(x.shape[1]):
        z = x[:, t] @ w + h @ rw[:, : 4 * n] + b
        i, f, o, g = (z[:, n * k : n * (k + 1)] for k in range(4))
        c = s(f + c * to_f) * c + s(g + c * to_g) * a(i)
        h = s(o + c * to_o) * a(c)
        out.append(h)
    return np.stack(out, axis=1)


def simple_rnn(x: Array, p: Params, act: str = "tanh", names: Sequence[str] = ("W", "RW", "b")) -> Array:
    """h of every step (B, T, n)."""
    w, rw, b = (np.asarray(p[name], np.float64) for name in names)
    h, out = np.zeros((len(x), len(rw))), []
    for t in range(x.shape[1]):
        h = FUNCTIONS[act](x[:, t] @ w + h @ rw + b)
        out.append(h)
    return np.stack(out, axis=1)


def dense(x: Array, p: Params, act: str) -> Array:
    """act(x W + b)."""
    return FUNCTIONS[act](x @ np.asarray(p["W"], np.float64) + p.get("b", 0.0))


def merged(ahead: Array, back: Array, mode: str) -> Array:
    """Two directions in one."""
    ways = {"ADD": ahead + back, "MUL": ahead * back, "AVERAGE": (ahead + back) / 2}
    return np.concatenate([ahead, back], axis=-1) if mode == "CONCAT" else ways[mode]


# --- Parameters --------------------------------------------------------------------------------------------------


@dataclass
class Draw:
    """Random parameters in DL4J's shapes, small enough to saturate nothing."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(3))

    def __call__(self, **shapes: tuple[int, ...]) -> Params:
        return {name: self.random.normal(size=shape).astype(np.float32) * 0.4 for name, shape in shapes.items()}

    def lstm(self, size: int, n: int, peepholes: bool = False, side: str = "") -> Params:
        """W, RW, b."""
        wide = 4 * n + 3 * peepholes
        return self(**{f"W{side}": (size, 4 * n), f"RW{side}": (n, wide), f"b{side}": (4 * n,)})

    def rnn(self, size: int, n: int) -> Params:
        """W, RW, b."""
        return self(W=(size, n), RW=(n, n), b=(n,))

    def dense(self, size: int, n: int) -> Params:
        """W, b."""
        return self(W=(size, n), b=(n,))
