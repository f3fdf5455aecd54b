"""Rewrites a graph so that no node of it has a graph inside: only then can single steps have a graph of their own.

Exporters leave branches whose condition is a constant (a sample rate), or a question about a shape. Such a branch is
decided here once: its condition must follow from constants and shapes alone, and be the same for several numbers of
rows and steps.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from stepcast.errors import ManifestError

from .. import onnx_door as onnx
from ..arrays import Array
from .axes import Trial, Wrong
from .reading import Reading
from .rewrites import Rewritten

_OPSET: Final = 17  # what an older graph is converted to; single_step_graph.py needs 13
_OLD: Final = 13
_SIZES: Final = ((1, 1), (1, 2), (2, 3), (3, 1))  # rows and steps for which conditions are evaluated
_SHAPE_OF: Final = frozenset({"Shape", "Size"})


def plain(reading: Reading) -> Rewritten | None:
    """Write functions out, convert an old opset, and put the branch that is always taken in the place of an If."""
    model, done = onnx.copy(reading.graph.model), []
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
        done.append("its functions were written out")
    if onnx.opset(model) < _OLD:
        converted = _converted(model)
        if converted is not None:
            model = converted
            done.append(f"it was converted from opset {onnx.opset(reading.graph.model)} to {_OPSET}")
    if any(node.op_type == "If" for node in model.graph.node):
        decided = _Decider(reading, model).decide()
        if decided:
            done.append(f"{decided} branches that are always taken replaced their conditions")
    return Rewritten(model, ", ".join(done)) if done and _answers_alike(reading, model) else None


def _answers_alike(reading: Reading, model: Any) -> bool:
    """Whether a graph answers as the one that it was made of: converters may have faults."""
    found, known = reading.found, reading.known
    inputs = {port.name for port in model.graph.input}
    left = [constant for constant in known.get("constants", ()) if constant["name"] in inputs]
    old = Trial(reading.graph, reading.roles, known)
    example = old.example(found.layout, 2 if found.rows == "many" else 1)
    want = old.run(found.layout, *example)
    try:
        new = Trial(reading.graph.rewritten(model), reading.roles, {**known, "constants": left})
        got = new.run(found.layout, *example)
    except (ManifestError, Wrong):
        return False
    pairs = zip(got, want, strict=True)
    return all(a.shape == b.shape and np.allclose(a, b, 1e-5, 1e-6, equal_nan=True) for a, b in pairs)


def declared(reading: Reading) -> Rewritten | None:
    """Let outputs have no size that was only the exporter's example's: onnxruntime refuses buffers of another."""
    roles, found = reading.roles, reading.found
    axes: dict[str, set[int | None]] = {roles.output.name: {found.time}}
    if found.rows == "many":
        axes |= {s.output.name: {axis} for s, (axis, _) in zip(roles.states, found.layout.states, strict=True)}
        axes[roles.output.name] = {found.batch, found.time}
    model, wrong = onnx.copy(reading.graph.model), []
    for port in model.graph.output:
        dims = port.type.tensor_type.shape.dim  # none, where nothing is declared
        for axis, dim in enumerate(dims):
            if axis in axes.get(port.name, ()) and dim.HasField("dim_value"):
                wrong.append(f"size {dim.dim_value} of axis {axis} of output {port.name!r}")
                dim.Clear()
    if not wrong:
        return None
    del model.graph.value_info[:]
    return Rewritten(model, f"{', '.join(wrong)} was the example's only")


def _converted(model: Any) -> Any | None:
    """The model in a newer opset; None where onnx cannot convert it."""
    try:
        converted = onnx.version_converter.convert_version(model, _OPSET)
        onnx.checker.check_model(converted)
    except Exception:  # onnx's exceptions have no common base but this; a graph may stay as old as it is
        return None
    converted.ir_version = max(8, model.ir_version)
    return converted


class _Decider:
    """Replaces the If nodes of a model, in place."""

    def __init__(self, reading: Reading, model: Any) -> None:
        self._reading, self._model, self._graph = reading, model, model.graph
        self._numbers = itertools.count(1)

    def decide(self) -> int:
        """How many were replaced."""
        self._settle_constants()
        decided = 0
        while True:
            taken = self._decisions()
            if not taken:
                break
            nodes = [new for node in self._graph.node for new in self._inlined(node, taken)]
            onnx.replace(self._graph.node, nodes)
            decided += len(taken)
        if decided:
            del self._graph.value_info[:]
            onnx.prune(self._graph)
        return decided

    def _settle_constants(self) -> None:
        """Inputs that are always the same become part of the graph."""
        constants = {entry["name"]: entry for entry in self._reading.known.get("constants", ())}
        for name, entry in constants.items():
            value = np.array(entry["values"], entry["dtype"]).reshape(entry.get("shape", ()))
            self._graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        onnx.replace(self._graph.input, [port for port in self._graph.input if port.name not in constants])

    def _decisions(self) -> dict[str, bool]:
        """Conditions that are the same in all runs, by name."""
        nodes = [node for node in self._graph.node if node.op_type == "If"]
        asked = sorted({node.input[0] for node in nodes if self._follows_from_shapes(node.input[0])})
        values: list[list[Array]] = []
        if asked:
            runs = onnx.copy(self._model)
            boolean = onnx.TensorProto.BOOL
            known = {port.name for port in runs.graph.output}
            runs.graph.output.extend(
                onnx.helper.make_tensor_value_info(n, boolean, None) for n in asked if n not in known
            )
            values = list(self._evaluated(runs, asked))
        return {
            name: bool(found[0].reshape(()))
            for name, found in zip(asked, zip(*values, strict=True), strict=False)
            if len({bool(value.reshape(())) for value in found}) == 1
        }

    def _evaluated(self, model: Any, names: list[str]) -> Iterator[list[Array]]:
        """The values of tensors in runs of several sizes."""
        found = self._reading.found
        known = {**self._reading.known, "constants": ()}
        trial = Trial(self._reading.graph.rewritten(model), self._reading.roles, known)
        for rows, steps in _SIZES:
            if rows > 1 and found.rows == "one":
                continue
            try:
                yield trial.run(found.layout, *trial.example(found.layout, rows, steps), names)
            except Wrong:  # of this many rows or steps, nothing can be said
                continue

    def _follows_from_shapes(self, name: str) -> bool:
        """Whether no value of an input decides a tensor, but shapes and constants do."""
        makers = {output: node for node in self._graph.node for output in node.output}
        inputs = {port.name for port in self._graph.input}
        left, seen = [name], set()
        while left:
            tensor = left.pop()
            if tensor in inputs:
                return False
            if tensor in seen or tensor not in makers:
                continue
            seen.add(tensor)
            node = makers[tensor]
            if node.op_type in onnx.RANDOM:
                return False
            if node.op_type not in _SHAPE_OF:
                left += [*node.input, *onnx.captured(node)]
        return True

    def _inlined(self, node: Any, taken: Mapping[str, bool]) -> Iterable[Any]:
        """The nodes of the branch that is taken instead of an If; any other node as it is."""
        if node.op_type != "If" or node.input[0] not in taken:
            return [node]
        side = "then_branch" if taken[node.input[0]] else "else_branch"
        branch = next(a.g for a in node.attribute if a.name == side)
        made = [*(i.name for i in branch.initializer), *(name for n in branch.node for name in n.output if name)]
        prefix = f"branch{next(self._numbers)}/"
        names = {name: f"{prefix}{name}" for name in made}
        for value in branch.initializer:
            value.name = names[value.name]
            self._graph.initializer.append(value)
        inside = list(branch.node)
        for each in inside:
            onnx.rename(each, names)
        results = [names.get(port.name, port.name) for port in branch.output]
        out = [onnx.helper.make_node("Identity", [a], [b]) for a, b in zip(results, node.output, strict=True) if b]
        return [*inside, *out]
