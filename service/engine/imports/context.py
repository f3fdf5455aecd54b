"""Moves what a graph's users do around it into the graph: chunks that begin with old values, chunks that overlap.

Both become states as any other, which the server keeps, forks and rewinds. So a caller sends new values and gets final
ones.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from stepcast.errors import ManifestError

from .. import onnx_door as onnx
from .reading import Reading
from .rewrites import Rewritten

_LEAST_OPSET: Final = 11
_END: Final = np.iinfo(np.int64).max


def framed(reading: Reading) -> Rewritten | None:
    """Keep the last values of an input, and those of an output to which later steps add, as states."""
    known = reading.known
    context, overlap = known.get("input", {}).get("context", 0), known.get("output", {}).get("overlap", 0)
    if not context and not overlap:
        return None
    if onnx.opset(reading.graph.model) < _LEAST_OPSET:
        raise ManifestError(
            f"{reading.graph.file}: opset {onnx.opset(reading.graph.model)} is older than {_LEAST_OPSET}"
        )
    framer = _Framer(reading)
    if context:
        framer.keep_context(context)
    if overlap:
        framer.add_overlap(overlap)
    return Rewritten(framer.model, ", ".join(framer.done), framer.fields)


class _Framer:
    """Adds nodes before and behind a graph's own."""

    def __init__(self, reading: Reading) -> None:
        self.model = onnx.copy(reading.graph.model)
        self.fields, self.done = reading.settled(), list[str]()
        self._graph, self._roles = self.model.graph, reading.roles

    def keep_context(self, context: int) -> None:
        """A step's values stand behind the last ones of the step before, along the input's last axis."""
        name = self._roles.input.name
        port = next(port for port in self._graph.input if port.name == name)
        size = _last_size(port)
        if not port.type.tensor_type.shape.dim:
            raise ManifestError(f"input {name!r} is not declared to have any axis, so nothing of it can be kept")
        if size is not None and size <= context:
            raise ManifestError(f"$.input.context is {context}, of {size} values that input {name!r} takes")
        make, before, after, new = onnx.helper.make_node, f"{name}.context", f"{name}.context.next", f"{name}.new"
        ends = [self._constant(f"{name}.context.{n}", [value]) for n, value in enumerate((-context, _END, -1))]
        nodes = [make("Concat", [before, new], [name], axis=-1), make("Slice", [name, *ends], [after])]
        onnx.replace(self._graph.node, [*nodes, *self._graph.node])
        onnx.replace(self._graph.input, [p for p in self._graph.input if p.name != name])
        self._graph.input.extend([_like(port, new, size and size - context), _like(port, before, context)])
        self._graph.output.append(_like(port, after, context))
        self._state(name, "context", before, after)
        self.fields["input"] = {**self.fields["input"], "name": new, "context": context}
        self.done.append(f"the last {context} values of {name!r} are kept as a state and stand before the next ones")

    def add_overlap(self, overlap: int) -> None:
        """The values to which later steps add come back with them, along the output's last axis."""
        name = self._roles.output.name
        port = next(port for port in self._graph.output if port.name == name)
        size = _last_size(port)
        if size is None or size <= overlap:
            raise ManifestError(
                f"$.output.overlap is {overlap}, output {name!r} has {size or 'no fixed number of'} values"
            )
        shift, rank = size - overlap, len(port.type.tensor_type.shape.dim)
        make, names = onnx.helper.make_node, [f"{name}.{what}" for what in ("overlap", "padded", "sum", "final")]
        before, padded, total, final = names
        after = f"{name}.overlap.next"
        pads = self._constant(f"{name}.pads", [*[0] * (2 * rank - 1), shift])
        cuts = [self._constant(f"{name}.cut.{n}", [value]) for n, value in enumerate((0, shift, _END, -1))]
        nodes = [
            make("Pad", [before, pads], [padded]),
            make("Add", [padded, name], [total]),
            make("Slice", [total, cuts[0], cuts[1], cuts[3]], [final]),
            make("Slice", [total, cuts[1], cuts[2], cuts[3]], [after]),
        ]
        self._graph.node.extend(nodes)
        onnx.replace(self._graph.output, [p for p in self._graph.output if p.name != name])
        self._graph.output.extend([_like(port, final, shift), _like(port, after, overlap)])
        self._graph.input.append(_like(port, before, overlap))
        self._state(name, "overlap", before, after)
        self.fields["output"] = {**self.fields["output"], "name": final, "overlap": overlap}
        self.done.append(f"the last {overlap} values of {name!r} are kept as a state, to which the next ones are added")

    def _state(self, layer: str, key: str, before: str, after: str) -> None:
        entry = {"layer": layer, "key": key, "input": before, "output": after}
        self.fields["states"] = [*self.fields["states"], entry]

    def _constant(self, name: str, values: Sequence[int]) -> str:
        self._graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
        return name


def _last_size(port: Any) -> int | None:
    """The size of a port's last axis, where it is fixed."""
    dims = port.type.tensor_type.shape.dim
    return dims[-1].dim_value if dims and dims[-1].HasField("dim_value") else None


def _like(port: Any, name: str, size: int | None) -> Any:
    """A port of the same axes, but for the last one's size."""
    made = type(port)()
    made.CopyFrom(port)
    made.name = name
    if size is not None:
        made.type.tensor_type.shape.dim[-1].dim_value = size
    return made
