"""Makes a graph that was exported for one row take many, where that can be proved.

The graph is run node by node: for three rows at once, and for each row alone as it was exported. As long as a node
keeps the rows apart it stays. Where it does not (its shape says 1, it drops the axis of rows, it needs a state of as
many rows) a few ways to write it are tried, and the first that gives each row what it gave alone is taken. In the end
the whole graph has to answer as the exported one does, for other numbers of rows, other states and other lengths.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from stepcast.errors import ManifestError

from .. import onnx_door as onnx
from ..arrays import Array
from ..onnx_session import open_session
from .axes import ROWS, Layout, Trial, Wrong, layouts
from .reading import Reading
from .rewrites import Rewritten

_MOST_LAYOUTS: Final = 16
_MOST_CHOICES: Final = 500  # of nodes that are written once more, since there was no way on
_PROOFS: Final = ((1, 2), (2, 3), (5, 2))  # rows and steps
_NEAR: Final = {"rtol": 1e-4, "atol": 1e-5}
_RECURRENT: Final = {"LSTM": {4: 0, 5: 1, 6: 1}, "GRU": {4: 0, 5: 1}, "RNN": {4: 0, 5: 1}}  # inputs: axis of rows
_NAME: Final = "rows/"


def rebatched(reading: Reading) -> Rewritten | None:
    """Let a graph of one row take many; if that cannot be proved, say why it runs row by row."""
    if reading.found.rows == "many" or reading.known.get("rows") == "one":
        return None
    features = sum(f.get("width", 1) for f in reading.layout["features"])
    candidates = layouts(reading.roles, reading.known, features, "one")
    with_rows = (c for c in candidates if None not in (c.batch, *(axis for axis, _ in c.states)))
    why = ""
    tried = list(itertools.islice(with_rows, _MOST_LAYOUTS))
    for blocks, layout in itertools.product((False, True), tried):
        try:
            model = _Walk(reading, layout, blocks=blocks).model()
            _prove(reading, layout, model)
        except _Stuck as error:
            why = why or str(error)
        else:
            return Rewritten(
                model,
                "it was exported for one row and takes many now, each as the exported graph does",
                reading.settled(),
            )
    why = why or "no axis of its inputs can hold rows"
    return Rewritten(reading.graph.model, f"it takes one row a run: {why}", {"rows": "one"})


def _prove(reading: Reading, layout: Layout, model: Any) -> None:
    """Raises _Stuck where rows together are not what the exported graph makes of each."""
    made = reading.graph.rewritten(model)
    try:
        fixed = Reading(made, {**reading.settled(), "rows": "many"})
        old, new = Trial(reading.graph, reading.roles, reading.known), Trial(made, fixed.roles, fixed.known)
        found = fixed.found
        for seed, (rows, steps) in enumerate(_PROOFS, 1):
            x, states = new.example(found.layout, rows, steps, seed)
            together = new.run(found.layout, x, states)
            alone = [old.run(layout, x[[row]], [state[[row]] for state in states]) for row in range(rows)]
            axes = (found.batch, *(axis for axis, _ in found.layout.states))
            for number, (axis, tensor) in enumerate(zip(axes, together, strict=True)):
                each = [np.reshape(one[number], np.take(tensor, [0], axis or 0).shape) for one in alone]
                if axis is None or not new.holds(tensor, axis, each):
                    raise _Stuck(f"rows together are not rows alone, {rows} rows of {x.shape[1]} steps")
    except (ManifestError, Wrong, ValueError) as error:
        raise _Stuck(f"it was rewritten for many rows, but {error}") from error


class _Stuck(Exception):
    """Why a graph cannot take many rows."""


class _Value(NamedTuple):
    """A tensor of the run of all rows, and of each row's own run.

    Attributes:
        axis: Where the rows are; None: nowhere, it is the same for all, or a size.
        proper: Whether each row's own tensor has that axis too; else it has an axis less. Mostly its size is 1. If not,
            the rows lie there in blocks, as the bands of three frames on the batch axis of a GRU over bands do.
    """

    together: Array
    alone: list[Array]
    axis: int | None = None
    proper: bool = True

    @property
    def plain(self) -> bool:
        """Whether the rows have an axis of their own, where each row's tensor has one of size 1; or no axis."""
        return self.axis is None or (self.proper and self.together.shape[self.axis] == ROWS)


class _Way(NamedTuple):
    """How a node is written, and its outputs' values then."""

    nodes: list[Any]
    values: list[_Value]


class _Walk:
    """One way through a graph, with rows on these axes of the inputs; also in blocks, if said. Raises _Stuck."""

    def __init__(self, reading: Reading, layout: Layout, *, blocks: bool) -> None:
        self._blocks, self._own = blocks, dict[tuple[str, ...], list[list[Array] | None]]()
        self._model = onnx.copy(reading.graph.model)
        self._graph, self._opset = self._model.graph, onnx.opset(self._model)
        self._weights = {i.name: onnx.numpy_helper.to_array(i) for i in self._graph.initializer}
        self._values: dict[str, _Value] = {name: _same(value) for name, value in self._weights.items()}
        self._numbers = itertools.count()
        trial = Trial(reading.graph, reading.roles, reading.known)
        x, states = trial.example(layout, ROWS)
        alone = [trial.feeds(layout, x[[row]], [state[[row]] for state in states]) for row in range(ROWS)]
        self._axes = {reading.roles.input.name: layout.batch}
        self._axes |= {s.input.name: axis for s, (axis, _) in zip(reading.roles.states, layout.states, strict=True)}
        if reading.roles.lengths is not None:
            self._axes[reading.roles.lengths] = 0
        for name in alone[0]:
            each, axis = [feeds[name] for feeds in alone], self._axes.get(name)
            self._values[name] = _same(each[0]) if axis is None else _Value(np.concatenate(each, axis), each, axis)
        self._rows_of = reading.roles.input.name
        self._ends = {
            state.output.name: axis for state, (axis, _) in zip(reading.roles.states, layout.states, strict=True)
        }

    def model(self) -> Any:
        """The graph for many rows."""
        nodes = self._written()
        for name, axis in self._ends.items():
            if self._values[name][2:] != (axis, True):
                raise _Stuck(f"state output {name!r} does not have the rows where its input has them")
        weights = [onnx.numpy_helper.from_array(value, name) for name, value in self._weights.items()]
        onnx.replace(self._graph.node, nodes)
        onnx.replace(self._graph.initializer, weights)
        self._relabel()
        onnx.prune(self._graph)
        return self._model

    def _relabel(self) -> None:
        """Declare where inputs and outputs have the rows, and nothing that was true of one row only."""
        for port in self._graph.input:
            axis = self._axes.get(port.name)
            if axis is not None:
                port.type.tensor_type.shape.dim[axis].dim_param = "rows"
        for port in self._graph.output:
            value = self._values[port.name]
            sizes = [f"{port.name}_{at}" for at in range(value.together.ndim)]
            if value.axis is not None and value.plain:
                sizes[value.axis] = "rows"
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.together.dtype)
            port.CopyFrom(onnx.helper.make_tensor_value_info(port.name, kind, sizes))
        del self._graph.value_info[:]

    def _written(self) -> list[Any]:
        """The nodes as they are written for many rows; where there is no way on, an earlier choice is changed."""
        nodes, why = list(self._graph.node), ""
        chosen: list[list[Any]] = []
        ways: list[Iterator[_Way]] = []
        blamed: defaultdict[int, set[str]] = defaultdict(set)  # tensors because of which there was no way on, by node
        for _ in range(_MOST_CHOICES + len(nodes)):
            at = len(chosen)
            if at == len(nodes):
                return [new for written in chosen for new in written]
            if at == len(ways):
                ways.append(self._ways(nodes[at]))
            way = next(ways[at], None)
            if way is not None:
                self._values |= dict(zip(filter(None, nodes[at].output), way.values, strict=True))
                chosen.append(way.nodes)
                continue
            why = why or f"node {nodes[at].op_type} {nodes[at].name or nodes[at].output[0]!r} mixes rows, or drops them"
            blamed[at] |= onnx.needed(nodes[:at], nodes[at].input)
            before = [number for number in range(at) if blamed[at].intersection(nodes[number].output)]
            if not before:
                break
            blamed[before[-1]] |= blamed.pop(at)
            del ways[before[-1] + 1 :], chosen[before[-1] :]
        raise _Stuck(why)

    def _ways(self, node: Any) -> Iterator[_Way]:
        """Ways to write a node that give each row what it gives alone; those that keep its tensors' axes first."""
        alone = self._alone(node)
        later, known = [], set()
        for nodes in itertools.chain([[node]], self._others(node)):
            together = self._run(nodes, node)
            if together is None or None in alone:
                continue
            values = [_matched(a, [one[n] for one in alone if one]) for n, a in enumerate(together)]
            found = [value for value in values if value is not None]
            lie = tuple((value.axis, value.proper) for value in found)
            in_blocks = any(value.proper and not value.plain for value in found)
            if len(found) == len(values) and lie not in known and (self._blocks or not in_blocks):
                known.add(lie)
                if all(value.plain for value in found):
                    yield _Way(nodes, found)
                else:
                    later.append(_Way(nodes, found))
        yield from later

    def _alone(self, node: Any) -> list[list[Array] | None]:
        """What a node makes for each row, however the nodes before it are written."""
        key = tuple(node.output)
        if key not in self._own:
            self._own[key] = self._runs([node], node, range(ROWS))
        return self._own[key]

    def _run(self, nodes: Sequence[Any], whose: Any) -> list[Array] | None:
        """What nodes make of the outputs of one of them, for all rows; None where they do not run."""
        return self._runs(nodes, whose, [None])[0]

    def _runs(self, nodes: Sequence[Any], whose: Any, rows: Sequence[int | None]) -> list[list[Array] | None]:
        """The same for each of these rows; None stands for all of them together."""
        made = {name for node in nodes for name in node.output}
        names = {name for node in nodes for name in (*node.input, *onnx.captured(node))} - made - {""}
        fed = sorted(names - self._weights.keys())
        values = {name: self._values[name] for name in fed}
        feeds = [{n: v.together if row is None else v.alone[row] for n, v in values.items()} for row in rows]
        kind = onnx.helper.np_dtype_to_tensor_dtype
        info = onnx.helper.make_tensor_value_info
        inputs = [info(name, kind(value.dtype), None) for name, value in feeds[0].items()]
        outputs = [onnx.ValueInfoProto(name=name) for name in whose.output if name]
        weights = [onnx.numpy_helper.from_array(self._weights[n], n) for n in sorted(names & self._weights.keys())]
        graph = onnx.helper.make_graph(nodes, "part", inputs, outputs, weights)
        part = onnx.helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        try:
            session = open_session(part.SerializeToString(), "cpu", quiet=True)
            return [list(session.run(None, each)) for each in feeds]
        except Exception:  # onnxruntime's exceptions have no common base but this; most ways of writing it do not run
            return [None] * len(feeds)

    # --- other ways to write a node ---------------------------------------------------------------------------------

    def _others(self, node: Any) -> Iterator[list[Any]]:
        """Ways to write a node that may keep the rows apart where it does not."""
        values = [self._values.get(name) for name in node.input]
        first = values[0] if values else None
        if first is not None and first.axis is not None:
            if node.op_type == "Reshape":
                yield from self._reshaped(node, first)
            if node.op_type in ("Squeeze", "Unsqueeze"):
                yield from self._other_axes(node, first)
            if node.op_type in ("Squeeze", "Unsqueeze", "Reshape", "Gather", "Slice"):
                yield [onnx.helper.make_node("Identity", node.input[:1], node.output)]
            if not first.proper:
                yield from self._moved(node, first.axis)
        if node.op_type in _RECURRENT and self._blocks:
            yield from self._in_blocks(node)
        yield from self._expanded(node, values)

    def _reshaped(self, node: Any, first: _Value) -> Iterator[list[Any]]:
        """Another size than 1 for the rows, or an axis for them."""
        asked = self._values[node.input[1]].alone[0].tolist()
        made = self._alone(node)[0]
        got = list(made[0].shape) if made else []
        for at, size in enumerate(got):
            if size == 1 and at == first.axis:
                yield [self._with(node, 1, [*asked[:at], 0, *asked[at + 1 :]])]
            if size == 1:
                yield [self._with(node, 1, [*got[:at], -1, *got[at + 1 :]])]
        for at in range(len(got) + 1):
            yield [self._with(node, 1, [*got[:at], -1, *got[at:]])]
        for at in sorted(range(len(got)), key=lambda at: got[at] != 1) if self._blocks else ():
            yield self._laid(node.input[0], first, got, at, node.output[0])

    def _laid(self, name: str, value: _Value, shape: Sequence[int], at: int, out: str) -> list[Any]:
        """Nodes that give each row's tensor another shape, the rows lying along an axis of it, in blocks."""
        make, nodes, own = onnx.helper.make_node, list[Any](), list(value.alone[0].shape)
        axis = value.axis or 0

        def then(operator: str, *numbers: int) -> None:
            to = f"{_NAME}{next(self._numbers)}"
            if operator == "Transpose":
                nodes.append(make(operator, [name], [to], perm=numbers))
            else:
                nodes.append(make(operator, [name, self._constant(numbers)], [to]))

        if any(size != 1 for size in own[:axis]):  # else the rows come first in memory
            if value.proper:
                then("Reshape", *own[:axis], -1, *own[axis:])
                name = nodes[-1].output[0]
            rank = len(own) + 1
            then("Transpose", axis, *(other for other in range(rank) if other != axis))
            name = nodes[-1].output[0]
        if any(size != 1 for size in shape[:at]):
            then("Reshape", -1, *shape)
            name = nodes[-1].output[0]
            then("Transpose", *range(1, at + 1), 0, *range(at + 1, len(shape) + 1))
            name = nodes[-1].output[0]
        then("Reshape", *shape[:at], -1, *shape[at + 1 :])
        nodes[-1].output[0] = out
        return nodes

    def _in_blocks(self, node: Any) -> Iterator[list[Any]]:
        """A recurrent node whose states have their rows on another axis than its batch, that of layers, say."""
        new, before, after = _copied(node), list[Any](), list[Any]()
        for number, output in zip((5, 6), (1, 2), strict=True):
            name = node.input[number] if len(node.input) > number else ""
            value = self._values.get(name)
            if value is None or value.axis is None:
                continue
            own = value.alone[0].shape
            new.input[number] = f"{_NAME}{next(self._numbers)}"
            before += self._laid(name, value, own, 1, new.input[number])
            if len(node.output) > output and node.output[output]:
                new.output[output] = f"{_NAME}{next(self._numbers)}"
                blocks = _Value(value.together, value.alone, 1)
                after += self._laid(new.output[output], blocks, own, value.axis, node.output[output])
        if before:
            yield [*before, new, *after]

    def _other_axes(self, node: Any, first: _Value) -> Iterator[list[Any]]:
        """An axis less is put in or taken out: that of the rows."""
        axes = self._axes_of(node)
        if axes is None:  # Squeeze: all of size 1
            axes = [at for at, size in enumerate(first.alone[0].shape) if size == 1]
        for left in (axes, *(axes[:at] + axes[at + 1 :] for at in range(len(axes)))):
            for shift in (0, 1):
                moved = [axis + shift if axis >= 0 else axis for axis in left]
                if moved:
                    yield [self._with_axes(node, moved)]

    def _moved(self, node: Any, rows: int) -> Iterator[list[Any]]:
        """The same of a tensor that has the rows on an axis more, in front of those that the node speaks of."""
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Transpose" and "perm" in given:
            perm = [rows, *(axis + (axis >= rows) for axis in given["perm"])]
            yield [_copied(node, perm=perm)]
        if "axis" in given or node.op_type in ("Concat", "Split", "Gather"):
            axis = given.get("axis", 0)
            yield [_copied(node, axis=axis + 1 if axis >= rows else axis)]
        axes = self._axes_of(node)
        if axes is not None and node.op_type not in ("Squeeze", "Unsqueeze"):
            yield [self._with_axes(node, [axis + (axis >= rows) if axis >= 0 else axis for axis in axes])]

    def _expanded(self, node: Any, values: Sequence[_Value | None]) -> Iterator[list[Any]]:
        """Inputs that are the same for all rows, repeated for each."""
        places = {value.axis for value in values if value is not None and value.axis is not None}
        if not places:
            return
        wanted = _RECURRENT.get(node.op_type) or dict.fromkeys(range(len(values)), min(places))
        nodes, new = [], _copied(node)
        for number, axis in wanted.items():
            value = values[number] if number < len(values) else None
            if value is not None and value.axis is None and value.together.shape[axis : axis + 1] == (1,):
                repeated = self._repeated(node.input[number], axis, value.together.ndim)
                nodes += repeated
                new.input[number] = repeated[-1].output[0]
        if nodes:
            yield [*nodes, new]

    def _repeated(self, name: str, axis: int, rank: int) -> list[Any]:
        """Nodes that give a tensor one copy per row along an axis of size 1; the last one's output is it."""
        sizes, rows, shape, out = (f"{_NAME}{next(self._numbers)}" for _ in range(4))
        make, x = onnx.helper.make_node, self._axes[self._rows_of] or 0
        ones = [self._constant([1] * count) for count in (axis, rank - axis - 1)]
        return [
            make("Shape", [self._rows_of], [sizes]),
            make("Gather", [sizes, self._constant([x])], [rows]),
            make("Concat", [ones[0], rows, ones[1]], [shape], axis=0),
            make("Expand", [name, shape], [out]),
        ]

    def _axes_of(self, node: Any) -> list[int] | None:
        """A node's axes, of its attribute or of an input that is known."""
        for attribute in node.attribute:
            if attribute.name == "axes":
                return list(attribute.ints)
        at = 3 if node.op_type == "Slice" else 1
        if node.op_type in ("Squeeze", "Unsqueeze", "Slice") or node.op_type.startswith("Reduce"):
            value = self._values.get(node.input[at]) if len(node.input) > at and node.input[at] else None
            return None if value is None or value.axis is not None else np.ravel(value.together).astype(int).tolist()
        return None

    def _with_axes(self, node: Any, axes: Sequence[int]) -> Any:
        if any(attribute.name == "axes" for attribute in node.attribute) or self._opset < 13:
            return _copied(node, axes=list(axes))
        return self._with(node, 3 if node.op_type == "Slice" else 1, axes)

    def _with(self, node: Any, number: int, values: Sequence[int]) -> Any:
        """The node with these numbers as an input."""
        new = _copied(node)
        while len(new.input) <= number:
            new.input.append("")
        new.input[number] = self._constant(values)
        return new

    def _constant(self, values: Sequence[int]) -> str:
        name = f"{_NAME}{next(self._numbers)}"
        self._weights[name] = np.array(values, np.int64)
        self._values[name] = _same(self._weights[name])
        return name


def _same(value: Array) -> _Value:
    return _Value(value, [value] * ROWS)


def _matched(together: Array, alone: Sequence[Array]) -> _Value | None:
    """How a tensor of all rows holds the rows' own; None: it does not."""
    each = list(alone)
    for at, size in enumerate(together.shape):
        if size and size % ROWS == 0 and all(map(_near, np.split(together, ROWS, at), each)):
            return _Value(together, each, at)
    if all(_near(together, one) for one in each):
        return _Value(together, each)
    for at, size in enumerate(together.shape):
        if size == ROWS and all(map(_near, (np.take(together, row, at) for row in range(ROWS)), each)):
            return _Value(together, each, at, proper=False)
    is_size = together.dtype.kind == "i" and together.ndim < 2 and all(np.array_equal(each[0], one) for one in each)
    return _Value(together, each) if is_size and together.shape == each[0].shape else None


def _near(a: Array, b: Array) -> bool:
    return a.shape == b.shape and np.allclose(a, b, **_NEAR, equal_nan=True)


def _copied(node: Any, **attributes: Any) -> Any:
    """A node of its own, some attributes changed."""
    made = type(node)()
    made.CopyFrom(node)
    onnx.replace(made.attribute, (a for a in node.attribute if a.name not in attributes))
    made.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())
    return made
