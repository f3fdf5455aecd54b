"""Joins the inputs of a graph that carry data, such as an observation and the last action: a step has one input.

The joined input is named after its parts, with commas between, as it is asked for. Each part is a feature of its width.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from stepcast.errors import ManifestError

from .. import onnx_door as onnx
from ..onnx_session import Port
from .reading import Reading
from .rewrites import Rewritten
from .roles import JOIN

_LEAST_OPSET: Final = 10  # whose Slice has its ends as inputs


def joined_data(reading: Reading) -> Rewritten | None:
    """Cut one input into those that `input.name` lists with commas; None where it names one.

    Parts with the same axes but the last keep them. Others are cut from a vector of a row's numbers, in C order; then a
    call has one step.

    Raises:
        ManifestError: a part is no input of the graph, or one step of it has no fixed size.
    """
    known = reading.known.get("input", {})
    ports = {port.name: port for port in reading.graph.ports[0]}
    name = known.get("name", "")
    names = name.split(JOIN)
    if len(names) < 2 or name in ports:
        return None
    if unknown := [part for part in names if part not in ports]:
        raise ManifestError(f"$.input.name: the graph has no inputs {unknown}, it has {sorted(ports)}")
    if len({*names}) < len(names):
        raise ManifestError(f"$.input.name: {name!r} names an input twice. Give each once.")
    if (version := onnx.opset(reading.graph.model)) < _LEAST_OPSET:
        raise ManifestError(f"{reading.graph.file}: opset {version} is older than {_LEAST_OPSET}. Export it again.")
    parts = [ports[part] for part in names]
    alike = len({part.shape[:-1] for part in parts}) == 1 and len(parts[0].shape) > 1
    widths = [_width(part, -1 if alike else 1) for part in parts]
    first = parts[0].shape[:-1] if alike else parts[0].shape[:1]
    model = onnx.copy(reading.graph.model)
    _cut(model.graph, name, parts, widths, flat=not alike)
    model.graph.input.append(_port(name, parts, [*first, sum(widths)]))
    features = [{"name": part, "width": width} for part, width in zip(names, widths, strict=True)]
    said = f"inputs {', '.join(map(repr, names))} are joined: a step has the values of each, in this order"
    return Rewritten(model, said, {"input": known, "features": reading.known.get("features", features)})


def _width(port: Port, axis: int) -> int:
    """How many numbers a part has behind an axis."""
    sizes = [size for size in port.shape[axis:] if isinstance(size, int)]
    if not port.shape or len(sizes) < len(port.shape[axis:]):
        raise ManifestError(f"input {port} cannot be joined with others: it has no fixed size. Join them in the graph.")
    return math.prod(sizes)


def _cut(graph: Any, name: str, parts: Sequence[Port], widths: Sequence[int], *, flat: bool) -> None:
    """Nodes in front of all others that make the parts of the joined input; the parts are inputs no more."""
    make, nodes = onnx.helper.make_node, []
    last, end = _weight(graph, f"{name}/axis", [-1]), 0
    for part, width in zip(parts, widths, strict=True):
        cut, begin, end = f"{name}/{part.name}", end, end + width
        ends = [_weight(graph, f"{cut}/{what}", [at]) for what, at in (("begin", begin), ("end", end))]
        nodes.append(make("Slice", [name, *ends, last], [cut]))
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(part.dtype))
        if flat:
            shape = _weight(graph, f"{cut}/shape", [-1, *(size for size in part.shape[1:] if isinstance(size, int))])
            nodes.append(make("Reshape", [cut, shape], [f"{cut}/shaped"]))
        nodes.append(make("Cast", [nodes[-1].output[0] if flat else cut], [part.name], to=kind))
    onnx.replace(graph.node, [*nodes, *graph.node])
    gone = {part.name for part in parts}
    onnx.replace(graph.input, [port for port in graph.input if port.name not in gone])


def _weight(graph: Any, name: str, values: Sequence[int]) -> str:
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
    return name


def _port(name: str, parts: Sequence[Port], shape: Sequence[int | str | None]) -> Any:
    """The joined input: of the parts' type if they have the same, else of float32."""
    dtypes = {part.dtype for part in parts}
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtypes.pop() if len(dtypes) == 1 else "float32"))
    return onnx.helper.make_tensor_value_info(name, kind, shape)
