"""What the nodes of a graph say: which output carries on what an input brings."""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeAlias

from .. import onnx_door as onnx

STATE_PORTS: Final = {"LSTM": {5: 1, 6: 2}, "GRU": {5: 1}, "RNN": {5: 1}}
"""Operators that hold a state: which input's next value is which output. Output 0 has all steps of output 1."""

_MOVES: Final = frozenset(
    {
        "Slice",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Reshape",
        "Gather",
        "Identity",
        "Split",
        "Cast",
        "Flatten",
        "Concat",
    }
    | {"Dropout", "Expand"}
)
_OF_ALL: Final = frozenset({"Concat", "Mul", "Add", "Sub", "Sum", "Where"})
_LINEAR: Final = _MOVES | _OF_ALL | {"Div"}
_CONTRACTS: Final = frozenset(
    {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "MatMulInteger", "QLinearMatMul", "ConvInteger", "Attention"}
    | {"LSTM", "GRU", "RNN", "If", "Loop", "Scan"}
)
_SHAPES_ONLY: Final = frozenset({"Shape", "Size", "ConstantOfShape", "RandomNormalLike", "RandomUniformLike"})

_SHORT: Final = 16

Held: TypeAlias = frozenset[tuple[int, int]]
"""Places in which nodes hold a state: a node's number and the output that has its next value."""


class Way(NamedTuple):
    """How an output follows from an input.

    Attributes:
        products: Matrix products, convolutions and the like on the shortest way.
        carried: Whether the output is the input, moved, scaled and added to: c in an LSTM, h in a GRU, a cache.
    """

    products: int
    carried: bool


class Flow:
    """The ways of values through a graph whose nodes stand in the order in which they run."""

    def __init__(self, model: Any) -> None:
        graph = (onnx.inlined(model) if model.functions else model).graph
        self._nodes = list(graph.node)
        self._reads = [[name for name in (*node.input, *_captured(node)) if name] for node in self._nodes]
        self._read = {name for names in self._reads for name in names} | {port.name for port in graph.output}
        self._constants = dict(_constants(graph))
        self._ways: dict[str, dict[str, Way]] = {}
        self._copies: dict[str, str] = {}
        for node in self._nodes:
            if node.op_type == "Identity":
                self._copies[node.output[0]] = self.original(node.input[0])

    def takes(self, name: str) -> Held:
        """Where an input starts a node's state, moved at most: sliced, squeezed, transposed."""
        moved, found = {name}, set()
        for at, node in enumerate(self._nodes):
            found |= {(at, to) for of, to in _ports(node).items() if of < len(node.input) and node.input[of] in moved}
            if moved.intersection(_moved(node)):
                moved.update(node.output)
        return frozenset(found)

    def gives(self, name: str) -> Held:
        """Which nodes' next states an output brings, moved at most."""
        return self._given.get(name, frozenset())

    def way(self, before: str, after: str) -> Way | None:
        """How an output follows from an input; None: it does not."""
        if before not in self._ways:
            self._ways[before] = self._flood(before)
        return self._ways[before].get(after)

    def compared_with(self, name: str) -> list[float]:
        """Numbers that the graph compares a tensor with: a sample rate that it knows."""
        moved, found = {name}, list[float]()
        for node in self._nodes:
            if moved.intersection(_moved(node)):
                moved.update(node.output)
            elif node.op_type == "Equal" and moved.intersection(node.input):
                found += [value for other in node.input for value in self._constants.get(other, ())]
        return found

    def original(self, name: str) -> str:
        """The tensor that this one is only another name of."""
        return self._copies.get(name, name)

    @cached_property
    def _given(self) -> dict[str, Held]:
        held: dict[str, Held] = {}
        for at, node in enumerate(self._nodes):
            ports = set(_ports(node).values())
            if ports:
                # the states of all steps are the next state where nobody reads that of the last one
                last = len(node.output) > 1 and node.output[1] in self._read
                each = {name: 1 if to == 0 and not last else to for to, name in enumerate(node.output) if name}
                held |= {name: frozenset({(at, to)}) for name, to in each.items() if to in ports}
            elif moved := frozenset[tuple[int, int]]().union(*(held.get(name, ()) for name in _moved(node))):
                held |= dict.fromkeys(node.output, moved)
        return held

    def _flood(self, source: str) -> dict[str, Way]:
        """The shortest way to every tensor that depends on this one."""
        found = {source: Way(0, True)}
        for node, reads in zip(self._nodes, self._reads, strict=True):
            ways = [found[name] for name in reads if name in found]
            if not ways or node.op_type in _SHAPES_ONLY:
                continue
            moved = [found[name] for name in _moved(node, _LINEAR) if name in found]
            products = min(way.products for way in ways) + (node.op_type in _CONTRACTS)
            way = Way(products, any(way.carried for way in moved))
            found |= dict.fromkeys(node.output, way)
        return found


def _ports(node: Any) -> dict[int, int]:
    return STATE_PORTS.get(node.op_type, {})


def _moved(node: Any, operators: frozenset[str] = _MOVES) -> list[str]:
    """The inputs whose values a node passes on."""
    if node.op_type not in operators:
        return []
    if node.op_type == "Where":
        return list(node.input[1:])
    return list(node.input[: None if node.op_type in _OF_ALL else 1])


def _captured(node: Any) -> list[str]:
    """Tensors from outside that graphs inside a node may read."""
    inner = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)]
    return [name for graph in inner for other in graph.node for name in (*other.input, *_captured(other))]


def _constants(graph: Any) -> Iterator[tuple[str, list[float]]]:
    """Short constants, by name."""
    tensors = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        if node.op_type == "Constant":
            tensors += [(node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value"]
    for name, tensor in tensors:
        if math.prod(tensor.dims) <= _SHORT and tensor.data_type != onnx.TensorProto.STRING:
            yield name, [float(value) for value in onnx.numpy_helper.to_array(tensor).reshape(-1)]
