"""What no input decides is computed once: weights that an exporter slices and joins in the graph, counts of steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import onnx_door as onnx
from .arrays import Array
from .onnx_session import open_session

Shapes = dict[str, tuple[int | str, ...]]


def settle(model: Any) -> Any:
    """A copy of the model with initializers instead of nodes that follow from constants and from sizes that are known.

    Its shapes are inferred. Raises ManifestError where onnxruntime cannot compute such nodes.
    """
    while True:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        if not _settle_known(model):
            return model
        del model.graph.value_info[:]  # what was inferred without knowing that: now more may follow


def _settle_known(model: Any) -> bool:
    """Settle, in place, what follows from shapes as they are inferred; whether there was anything."""
    graph, sizes = model.graph, _Sizes(model.graph)
    known = {value.name for value in graph.initializer}
    follow, stay = [], []
    for node in graph.node:
        asked = sizes.asked(node)
        if asked is not None:
            graph.initializer.append(onnx.numpy_helper.from_array(asked, node.output[0]))
        elif known.issuperset(_read(node)) and node.op_type not in onnx.RANDOM and not onnx.subgraphs(node):
            follow.append(node)
        else:
            stay.append(node)
            continue
        known.update(node.output)
    if len(stay) == len(graph.node):
        return False
    read = {port.name for port in graph.output}.union(*map(_read, stay))
    names = [name for node in follow for name in node.output if name in read]
    for name, value in zip(names, _computed(model, follow, names), strict=True):
        graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.replace(graph.node, stay)
    onnx.prune(graph)
    return True


def _computed(model: Any, nodes: Sequence[Any], names: Sequence[str]) -> list[Array]:
    """The values of tensors that these nodes make of initializers: onnxruntime's, as if it had computed them itself."""
    if not names:
        return []
    alone = onnx.copy(model)
    del alone.graph.input[:], alone.graph.value_info[:]
    onnx.replace(alone.graph.node, nodes)
    onnx.replace(alone.graph.output, [onnx.ValueInfoProto(name=name) for name in names])
    onnx.prune(alone.graph)
    return list(open_session(alone.SerializeToString(), "cpu").run(names, {}))


def _read(node: Any) -> set[str]:
    """Tensors that a node or the graphs inside it read."""
    return onnx.captured(node).union(filter(None, node.input))


class _Sizes:
    """Follows the nodes, in order, that ask for shapes."""

    def __init__(self, graph: Any) -> None:
        self._shapes = shapes_of(graph)
        self._initializers = {value.name: value for value in graph.initializer}
        self._asked: dict[str, Array] = {}  # whole shapes, of which sizes may be unknown

    def asked(self, node: Any) -> Array | None:
        """The sizes that a node gives, if they are known: a shape, or a part of one."""
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        shape, places = next(iter(node.input), ""), node.input[1:]
        if node.op_type == "Shape" and shape in self._shapes:
            sizes = np.array(self._shapes[shape][given.get("start", 0) : given.get("end")], object)
            self._asked[node.output[0]] = sizes
        elif node.op_type in ("Gather", "Slice") and shape in self._asked and self._initializers.keys() >= set(places):
            values = [onnx.numpy_helper.to_array(self._initializers[name]) for name in places]
            sizes = self._asked[shape]
            sizes = np.asarray(sizes[values[0]] if node.op_type == "Gather" else _slice(sizes, *values), object)
        else:
            return None
        known = sizes.size and all(isinstance(size, int) and size for size in sizes.flat)
        return sizes.astype(np.int64) if known else None


def _slice(sizes: Array, start: Array, end: Array, _axis: object = None, step: Array | None = None) -> Array:
    """A part of a shape, as the operator Slice takes it."""
    return sizes[slice(start.item(), end.item(), None if step is None else step.item())]


def shapes_of(graph: Any) -> Shapes:
    """Of tensors whose rank is known; a size that is not is a name, or ''."""
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return {
        name: tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in kind.shape.dim)
        for name, kind in types.items()
        if kind.HasField("shape")
    }
