"""Lengths as a server gives them: int32, and a row without a step keeps its state.

torch exports packed sequences with int64 lengths, and an LSTM node answers zeros for an empty row. Both are mended in
the graph, so no part of the service knows of it.
"""

from typing import Any, Final

import numpy as np

from .. import onnx_door as onnx
from ..buffers import taken
from .axes import ROWS, Trial, Wrong
from .flow import STATE_PORTS
from .reading import Reading
from .rewrites import Rewritten

_LENGTHS_PORT: Final = 4  # of LSTM, GRU and RNN
_PASSED_ON: Final = frozenset({"Cast", "Gather", "Identity", "Reshape", "Squeeze", "TopK", "Unsqueeze"})
_LEAST_OPSET: Final = 13


def int32_lengths(reading: Reading) -> Rewritten | None:
    """Take int32 where the graph takes int64 lengths: as the manifest names them, or as recurrent nodes read them."""
    graph, known = reading.graph.model.graph, reading.known
    name = known["lengths"] if "lengths" in known else _read_by_nodes(graph)
    given = {
        entry.get(key) for field, key in (("constants", "name"), ("states", "input")) for entry in known.get(field, ())
    }
    ports = {port.name: port for port in reading.graph.ports[0] if port.dtype == "int64" and len(port.shape) == 1}
    if name not in ports.keys() - given:
        return None
    model = onnx.copy(reading.graph.model)
    wide = f"{name}.int64"
    for node in model.graph.node:
        onnx.rename(node, {name: wide})
    for port in model.graph.input:
        if port.name == name:
            port.type.tensor_type.elem_type = onnx.TensorProto.INT32
    cast = onnx.helper.make_node("Cast", [name], [wide], to=onnx.TensorProto.INT64)
    onnx.replace(model.graph.node, [cast, *model.graph.node])
    return Rewritten(model, f"lengths {name!r} were int64 and are int32", {"lengths": name})


def _read_by_nodes(graph: Any) -> str | None:
    """The tensor that recurrent nodes have their lengths from."""
    makers = {name: node for node in graph.node for name in node.output}
    read = [n.input[_LENGTHS_PORT] for n in graph.node if n.op_type in STATE_PORTS and len(n.input) > _LENGTHS_PORT]
    found = set()
    for name in filter(None, read):
        while name in makers and makers[name].op_type in _PASSED_ON:
            name = makers[name].input[0]
        found.add(name)
    return found.pop() if len(found) == 1 else None


def empty_rows_kept(reading: Reading) -> Rewritten | None:
    """Keep the state of a row of length 0, if the graph gives it another one."""
    roles = reading.roles
    if roles.lengths is None or not roles.states or onnx.opset(reading.graph.model) < _LEAST_OPSET or _keeps(reading):
        return None
    model = onnx.copy(reading.graph.model)
    graph = model.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int32), "lengths.none"))
    nodes = [onnx.helper.make_node("Greater", [roles.lengths, "lengths.none"], ["lengths.some"])]
    stepped = {state.output.name: f"{state.output.name}.stepped" for state in roles.states}
    for node in graph.node:
        onnx.rename(node, stepped)
    for state, (axis, shape) in zip(roles.states, reading.found.layout.states, strict=True):
        name, sizes = state.output.name, [-1 if at == axis else 1 for at in range(1 + len(shape))]
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(sizes, np.int64), f"{name}.rows"))
        nodes += [
            onnx.helper.make_node("Reshape", ["lengths.some", f"{name}.rows"], [f"{name}.some"]),
            onnx.helper.make_node("Where", [f"{name}.some", stepped[name], state.input.name], [name]),
        ]
    onnx.replace(graph.node, [*graph.node, *nodes])
    return Rewritten(model, "rows of length 0 keep their state")


def _keeps(reading: Reading) -> bool:
    """Whether rows of length 0 keep their state, or do not run at all."""
    found, trial = reading.found, Trial(reading.graph, reading.roles, reading.known)
    if found.rows == "one":
        return True  # such a row is never run
    x, states = trial.example(found.layout, ROWS)
    try:
        _, *after = trial.run(found.layout, x, states, steps=0)
    except Wrong:
        return True
    pairs = zip(after, states, found.layout.states, reading.roles.states, strict=True)
    return all(np.array_equal(taken(a, (axis,)), b.astype(s.input.dtype)) for a, b, (axis, _), s in pairs)
