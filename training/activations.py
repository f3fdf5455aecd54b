"""Activations by their DL4J names: as torch functions and as ONNX nodes.

Where the worlds disagree on a name, DL4J's formula counts: hardsigmoid is clip(0.2 x + 0.5, 0, 1), which is ONNX
HardSigmoid's default. torch's and Keras 3's, relu6(x + 3) / 6, is hardsigmoid6.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import Graph

ActivationName = Literal[
    "identity",
    "sigmoid",
    "tanh",
    "relu",
    "relu6",
    "leakyrelu",
    "elu",
    "selu",
    "gelu",
    "swish",
    "mish",
    "softplus",
    "softsign",
    "hardsigmoid",
    "hardsigmoid6",
    "hardtanh",
    "rationaltanh",
    "rectifiedtanh",
    "thresholdedrelu",
    "cube",
    "softmax",
]


def hardsigmoid(x: Tensor) -> Tensor:
    """clip(0.2 x + 0.5, 0, 1)."""
    return (0.2 * x + 0.5).clamp(0.0, 1.0)


def rationaltanh(x: Tensor) -> Tensor:
    """1.7159 tanh(2x/3), with tanh approximated as sign(y) (1 - 1 / (1 + |y| + y^2 + 1.41645 y^4))."""
    y = x * (2.0 / 3.0)
    square = y * y
    return 1.7159 * torch.sign(y) * (1.0 - 1.0 / (1.0 + y.abs() + square + 1.41645 * square * square))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leakyrelu": lambda x: F.leaky_relu(x, 0.01),
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "swish": F.silu,
    "mish": F.mish,
    "softplus": lambda x: F.softplus(x, threshold=60.0),
    "softsign": F.softsign,
    "hardsigmoid": hardsigmoid,
    "hardsigmoid6": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "rationaltanh": rationaltanh,
    "rectifiedtanh": lambda x: torch.relu(torch.tanh(x)),
    "thresholdedrelu": lambda x: torch.where(x > 1.0, x, 0.0),
    "cube": lambda x: x * x * x,
    "softmax": lambda x: torch.softmax(x, dim=-1),
}

# What one ONNX node says as it stands; the others are written out below.
ONNX_NODES: dict[str, tuple[str, dict[str, float]]] = {
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "relu": ("Relu", {}),
    "leakyrelu": ("LeakyRelu", {"alpha": 0.01}),
    "elu": ("Elu", {"alpha": 1.0}),
    "selu": ("Selu", {}),
    "softplus": ("Softplus", {}),
    "softsign": ("Softsign", {}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}),
    "hardsigmoid6": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "softmax": ("Softmax", {"axis": -1}),
    "thresholdedrelu": ("ThresholdedRelu", {"alpha": 1.0}),
}

# What an ONNX RNN, LSTM or GRU node takes in its `activations` attribute: name, and alpha and beta if it has them.
RECURRENT_NODES: dict[str, tuple[str, float | None, float | None]] = {
    "sigmoid": ("Sigmoid", None, None),
    "tanh": ("Tanh", None, None),
    "relu": ("Relu", None, None),
    "leakyrelu": ("LeakyRelu", 0.01, None),
    "elu": ("Elu", 1.0, None),
    "softplus": ("Softplus", None, None),
    "softsign": ("Softsign", None, None),
    "hardsigmoid": ("HardSigmoid", 0.2, 0.5),
    "hardsigmoid6": ("HardSigmoid", 1 / 6, 0.5),
    "identity": ("Affine", 1.0, 0.0),
}


def write_activation(graph: Graph, name: str, x: str) -> str:
    """Add an activation's nodes to a graph."""
    if name == "identity":
        return x
    if name in ONNX_NODES:
        op, attributes = ONNX_NODES[name]
        return graph.add(op, x, **attributes)
    return _COMPOSED[name](graph, x)


def _clip(graph: Graph, x: str, low: float, high: float) -> str:
    return graph.add("Clip", x, graph.constant(low), graph.constant(high))


def _gelu(graph: Graph, x: str) -> str:
    erf = graph.add("Erf", graph.add("Mul", x, graph.constant(2.0**-0.5)))
    half = graph.add("Mul", x, graph.constant(0.5))
    return graph.add("Mul", half, graph.add("Add", erf, graph.constant(1.0)))


def _rationaltanh(graph: Graph, x: str) -> str:
    y = graph.add("Mul", x, graph.constant(2.0 / 3.0))
    square = graph.add("Mul", y, y)
    fourth = graph.add("Mul", graph.add("Mul", square, square), graph.constant(1.41645))
    low = graph.add("Add", graph.add("Add", graph.add("Abs", y), square), fourth)
    inverse = graph.add("Reciprocal", graph.add("Add", low, graph.constant(1.0)))
    size = graph.add("Sub", graph.constant(1.0), inverse)
    return graph.add("Mul", graph.add("Mul", graph.add("Sign", y), size), graph.constant(1.7159))


_COMPOSED: dict[str, Callable[[Graph, str], str]] = {
    "relu6": lambda g, x: _clip(g, x, 0.0, 6.0),
    "hardtanh": lambda g, x: _clip(g, x, -1.0, 1.0),
    "rectifiedtanh": lambda g, x: g.add("Relu", g.add("Tanh", x)),
    "swish": lambda g, x: g.add("Mul", x, g.add("Sigmoid", x)),
    "mish": lambda g, x: g.add("Mul", x, g.add("Tanh", g.add("Softplus", x))),
    "cube": lambda g, x: g.add("Mul", g.add("Mul", x, x), x),
    "gelu": _gelu,
    "rationaltanh": _rationaltanh,
}
