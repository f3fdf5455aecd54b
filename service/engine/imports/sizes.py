"""Which axes of a graph's tensors grow with which axes of its inputs: found by running parts of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from stepcast.errors import ManifestError

from .. import onnx_door as onnx
from ..arrays import Array
from ..onnx_session import open_session

_BASE: Final = 2
_ONLY_SHAPES: Final = frozenset({"Shape", "Size"})


class Axis(NamedTuple):
    """An axis of no fixed size: it grows `times` as fast as an axis of the inputs."""

    name: str
    times: int = 1


Sizes = tuple[int | Axis, ...]


class Part:
    """The part of a graph that makes some tensors, ready to run."""

    def __init__(self, parts: "Parts", names: Sequence[str]) -> None:
        self._parts, self._names = parts, list(names)
        self._made = [name for name in dict.fromkeys(names) if name not in parts.inputs]
        self._session = open_session(parts.cut(self._made), "cpu") if self._made else None
        self._inputs = [port.name for port in self._session.get_inputs()] if self._session else []

    def run(self, sizes: Mapping[str, int], feeds: Mapping[str, Array]) -> list[Array]:
        """The tensors, the inputs' axes having these sizes; an input that is not fed is plain."""
        wanted = {*self._inputs, *self._names} & self._parts.inputs.keys()
        given = {name: feeds[name] if name in feeds else self._parts.plain(name, sizes) for name in wanted}
        try:
            feeds = {name: given[name] for name in self._inputs}
            made = self._session.run(self._made, feeds) if self._session else ()
            found = given | dict(zip(self._made, made, strict=True))
            return [found[name] for name in self._names]
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise ManifestError(f"it does not run with inputs of other sizes than declared: {error}") from error


class Parts:
    """A graph, of which parts are run.

    Attributes:
        inputs: The sizes of each input; an axis without a name gets one.
    """

    def __init__(self, model: Any, constants: Iterable[Mapping[str, Any]]) -> None:
        self._model = model
        held = {value.name for value in model.graph.initializer}
        self._ports = {port.name: port.type.tensor_type for port in model.graph.input if port.name not in held}
        self.inputs = {name: _declared(name, kind) for name, kind in self._ports.items()}
        self.constants = {c["name"]: np.array(c["values"], c["dtype"]).reshape(c.get("shape", ())) for c in constants}

    def plain(self, name: str, sizes: Mapping[str, int]) -> Array:
        """A value of an input: a constant's own, else zeros, of integers ones."""
        if name in self.constants:
            return self.constants[name]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self._ports[name].elem_type)
        shape = [sizes.get(size.name, _BASE) if isinstance(size, Axis) else size for size in self.inputs[name]]
        return np.full(shape, np.issubdtype(dtype, np.integer), dtype)

    def sizes(self, names: Sequence[str]) -> tuple[list[Sizes], list[Array]]:
        """The sizes of tensors, and what they are for plain inputs.

        Raises:
            ManifestError: the graph does not run with axes of other sizes.
        """
        part = Part(self, names)
        plain = part.run({}, {})
        found: list[list[int | Axis]] = [list(value.shape) for value in plain]
        for axis in dict.fromkeys(size.name for sizes in self.inputs.values() for size in sizes if type(size) is Axis):
            for sizes, before, after in zip(found, plain, part.run({axis: _BASE + 1}, {}), strict=True):
                for at, (size, grown) in enumerate(zip(before.shape, after.shape, strict=True)):
                    if grown != size:
                        sizes[at] = Axis(axis, grown - size)
        return [tuple(sizes) for sizes in found], plain

    def only_shapes(self, name: str) -> bool:
        """Whether a tensor is the same for all inputs of one shape."""
        nodes = [node for node in self._model.graph.node if node.op_type not in _ONLY_SHAPES]
        return not onnx.needed(nodes, [name]) & (self._ports.keys() - self.constants.keys())

    def cut(self, names: Sequence[str]) -> bytes:
        """The serialised part that makes these tensors."""
        part = onnx.ModelProto()
        part.CopyFrom(self._model)
        keep(part.graph, names)
        onnx.replace(part.graph.input, (port for port in part.graph.input if port.name in _read(part.graph)))
        known = {port.name: port for port in part.graph.output}
        onnx.replace(part.graph.output, [known.get(name) or onnx.ValueInfoProto(name=name) for name in names])
        return bytes(part.SerializeToString())


def keep(graph: Any, names: Iterable[str]) -> None:
    """Drop the nodes and weights that these tensors do not need."""
    needed = onnx.needed(graph.node, names)
    onnx.replace(graph.node, (node for node in graph.node if needed.intersection(node.output)))
    read = _read(graph)
    onnx.replace(graph.initializer, (value for value in graph.initializer if value.name in read))


def _read(graph: Any) -> set[str]:
    """What nodes read, also those of graphs inside."""
    read = {name for node in graph.node for name in node.input}
    inside = [
        inner
        for node in graph.node
        for a in node.attribute
        for inner in (*([a.g] if a.HasField("g") else []), *a.graphs)
    ]
    return read.union({port.name for port in graph.output}, *map(_read, inside))


def _declared(name: str, kind: Any) -> Sizes:
    dims = enumerate(kind.shape.dim)
    return tuple(d.dim_value if d.HasField("dim_value") else Axis(d.dim_param or f"{name}_{at}") for at, d in dims)
