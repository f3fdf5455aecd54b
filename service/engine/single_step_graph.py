"""The graph for one step: what model.onnx says of T steps, written for a single one.

Each LSTM, GRU and RNN becomes the matrix products and activations of its equations (https://onnx.ai/onnx/operators/,
opset 13), which onnxruntime fuses and vectorises; in an exact graph it stays a node. Inputs and outputs lose their axes
of size 1, and a state of all layers in one tensor becomes one port per layer: the bytes in memory are the same, and
nothing is copied from one shape to the other. The caller proves the result against golden.npz, as it does model.onnx.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import eq, ge, gt, le, lt
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from . import onnx_door as onnx
from .arrays import Array
from .buffers import ROWS, Ports, Shape
from .one_step_scans import without_scans
from .settled import settle, shapes_of

Axes = tuple[int, ...]
View = tuple[str, Axes]

# Of weights: they are in memory twice, and the larger they are the more of a run is the products themselves.
MOST_BYTES: Final = 64 << 20
_LEAST_OPSET: Final = 13
_SIMPLE: Final = frozenset({b"Tanh", b"Sigmoid", b"Relu", b"Softsign"})
_DEFAULTS: Final = {"LSTM": [b"Sigmoid", b"Tanh", b"Tanh"], "GRU": [b"Sigmoid", b"Tanh"], "RNN": [b"Tanh"]}
_KNOWN_ATTRIBUTES: Final = frozenset(
    {"activations", "direction", "hidden_size", "input_forget", "layout", "linear_before_reset"}
)
_COMPARE: Final = {"Greater": gt, "GreaterOrEqual": ge, "Less": lt, "LessOrEqual": le, "Equal": eq}
_KEEP_VALUES: Final = frozenset({"Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape"})
_ONE_OF_MANY: Final = frozenset({"Slice", "Gather", "Split"})
_NAME: Final = "one_step/"


class SingleStepGraph(NamedTuple):
    """A serialised model, and its ports."""

    model: bytes
    ports: Ports


def single_step_graph(path: Path, ports: Ports, lengths: str | None, *, exact: bool = False) -> SingleStepGraph | None:
    """The graph of `path`, of these ports, for one step that every row has.

    It has no other outputs, nor `lengths`, the input of valid steps per row, where nothing needs it. If it is to be
    exact, recurrent nodes stay nodes, since equations round otherwise. None where nothing is gained: no recurrent node
    is of a kind that is known, or the graph is large or has graphs inside that are no Scan over the steps.
    """
    model = onnx.load(str(path), load_external_data=False)
    outside = any(i.data_location == onnx.TensorProto.EXTERNAL for i in model.graph.initializer)
    unfit = onnx.opset(model) < _LEAST_OPSET or model.functions or outside
    if unfit or path.stat().st_size > MOST_BYTES:
        return None
    for port in (*model.graph.input, *model.graph.output):
        if port.name in ports:
            port.CopyFrom(_port(port, port.name, ports[port.name][0][1]))
    model = settle(model)
    if model.ByteSize() > MOST_BYTES:
        return None
    inside = any(onnx.subgraphs(node) for node in model.graph.node)
    if inside:
        if (model := without_scans(model)) is None:
            return None
        model = onnx.shape_inference.infer_shapes(model)
    rewriter = _Rewriter(model.graph, ports, lengths, exact)
    if not rewriter.rewrite() and not inside:
        return None
    return SingleStepGraph(bytes(model.SerializeToString()), rewriter.ports)


class _Rewriter:
    """Goes through the nodes in order. Views and stacks are followed, not made, until somebody needs them.

    A view is another tensor with axes of size 1 put in, if any, at these places of the result. A stack is others one
    behind the other, along a first axis that these do not have.
    """

    def __init__(self, graph: Any, ports: Ports, lengths: str | None, exact: bool) -> None:
        self._graph, self._lengths, self._exact = graph, lengths, exact
        self.ports = dict(ports)  # of the graph that is made
        self._given: set[str] = set()  # tensors that are outputs
        self._nodes: list[Any] = []
        self._rewrote = False  # whether a recurrent node is that of one step now
        self._constants = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
        self._shapes = shapes_of(graph)
        self._views: dict[str, View] = {}
        self._stacks: dict[str, list[str]] = {}
        self._whole: dict[View, str] = {}  # views and stacks that are there, as somebody needed them
        self._everywhere: dict[str, Any] = {} if lengths is None else {lengths: np.array(1)}  # one value all over

    def rewrite(self) -> bool:
        """Change the graph; False where nothing was gained by it."""
        graph = self._graph
        onnx.replace(graph.input, [new for port in graph.input for new in self._take_apart(port)])
        for node in graph.node:
            views = self._followed(node)
            self._views |= {name: view for name, view in zip(node.output, views, strict=False) if name}
            if not views:
                onnx.replace(node.input, [self._made(name) for name in node.input])
                self._nodes.append(node)
        outputs = [port for port in graph.output if port.name in self.ports]
        onnx.replace(graph.output, [new for port in outputs for new in self._give(port)])
        onnx.replace(graph.node, self._nodes)
        onnx.prune(graph)
        self._take_as_read()
        self._give_as_made()
        onnx.prune(graph)
        needed = onnx.needed(graph.node, (port.name for port in graph.output))
        onnx.replace(graph.input, (port for port in graph.input if port.name in needed or port.name != self._lengths))
        del graph.value_info[:]
        return self._rewrote

    def _take_apart(self, port: Any) -> list[Any]:
        """The ports of an input: without axes of size 1, and several where it is only read layer by layer."""
        if port.name not in self.ports:
            return [port]
        shape, axes = _without_ones(self.ports[port.name][0][1])
        readers = {node.op_type for node in self._graph.node if port.name in node.input}
        if axes:
            self._views[port.name] = f"{_NAME}{port.name}/0", axes
            return self._declare(port, shape, [f"{_NAME}{port.name}/0"])
        if shape[0] != ROWS and shape[1:2] == (ROWS,) and readers <= _ONE_OF_MANY:
            stack = self._stacks[port.name] = [f"{_NAME}{port.name}/{number}" for number in range(shape[0])]
            return self._declare(port, shape[1:], stack)
        return [port]

    def _give(self, port: Any) -> list[Any]:
        """The ports of an output, in the shape that it has already."""
        base, axes = self._view_of(port.name)
        stack, whole = self._stacks.get(base), self.ports[port.name][0][1]
        shape, ones = _without_ones(whole)
        if stack and whole[1:2] == (ROWS,):
            return self._declare(port, whole[1:], [self._own(part) for part in stack])
        if stack or axes != ones:
            base, shape = self._made(port.name), whole
        return self._declare(port, shape, [self._own(base)])

    def _own(self, name: str) -> str:
        """A tensor that is this output and no other: the one that a node makes, else a copy."""
        if name in self._given or not any(name in node.output for node in self._nodes):
            name = self._add("Identity", name)
        self._given.add(name)
        return name

    def _declare(self, port: Any, shape: Shape, names: Sequence[str]) -> list[Any]:
        """Have ports of these names and this shape instead of one."""
        self.ports[port.name] = [(name, shape) for name in names]
        return [_port(port, name, shape) for name in names]

    def _take_as_read(self) -> None:
        """Let inputs have the axes that are put into them at once, where nobody reads them without."""
        graph, readers = self._graph, {name: node for node in self._graph.node for name in node.input}
        count = Counter(name for node in graph.node for name in node.input)
        views = [view for view in self._whole.items() if count[view[0][0]] == 1]
        made = {base: (axes, whole) for (base, axes), whole in views if whole in readers[base].output}
        self._reshape(graph.input, made)
        given = {port.name for port in graph.input}
        onnx.replace(graph.node, (node for node in graph.node if not given.intersection(node.output)))

    def _give_as_made(self) -> None:
        """Let outputs have the axes that recurrent nodes give them."""
        given = {port.name for port in self._graph.output}
        raw = {whole for node in self._graph.node if node.op_type in _DEFAULTS for whole in node.output} - given
        self._reshape(self._graph.output, {b: (axes, w) for (b, axes), w in self._whole.items() if w in raw})

    def _reshape(self, declared: Any, as_they_are: Mapping[str, tuple[Axes, str]]) -> None:
        """Declare other tensors instead of ports, which are these but for axes of size 1; all of a stack or none."""
        old = {port.name: port for port in declared}
        for name, parts in self.ports.items():
            views = [as_they_are.get(part) for part, _ in parts]
            if len({view and view[0] for view in views}) == 1 and views[0] and parts[0][0] in old:
                shape = _with_ones(parts[0][1], views[0][0])
                self.ports[name] = [(view[1], shape) for view in views if view]
                for (part, _), (new, _) in zip(parts, self.ports[name], strict=True):
                    old[part] = _port(old[part], new, shape)
        onnx.replace(declared, list(old.values()))

    def _followed(self, node: Any) -> list[View]:
        """What its outputs are views of; empty where it has to stay."""
        self._look_for_one_value(node)
        follow: Callable[[Any], list[View]] | None = {
            **dict.fromkeys(_DEFAULTS, self._recurrent),
            **dict.fromkeys(("MatMul", "Add"), self._through),
            **dict.fromkeys(_ONE_OF_MANY, self._one_of_many),
            **dict.fromkeys(("Unsqueeze", "Squeeze", "Transpose", "Reshape", "Identity"), self._moves_nothing),
            **{"Where": self._where, "Concat": self._concat},
        }.get(node.op_type)
        return follow(node) if follow else []

    def _add(self, op: str, *inputs: str | Array | Axes, **attributes: Any) -> str:
        """Add a node, and an initializer for each input that is no name; the name of its output."""
        names, output = list(inputs), f"{_NAME}{len(self._nodes)}"
        for at, value in enumerate(inputs):
            if not isinstance(value, str):
                names[at] = f"{_NAME}constant_{len(self._graph.initializer)}"
                array = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
                self._graph.initializer.append(onnx.numpy_helper.from_array(array, names[at]))
        self._nodes.append(onnx.helper.make_node(op, names, [output], **attributes))
        return output

    def _view_of(self, name: str) -> View:
        return self._views.get(name, (name, ()))

    def _made(self, name: str) -> str:
        """The name of a tensor that is there; a view or a stack is made when first needed."""
        base, axes = view = self._view_of(name)
        if view not in self._whole:
            if base in self._stacks:
                parts = [self._add("Unsqueeze", part, (0,)) for part in self._stacks[base]]
                self._whole[view] = self._add("Concat", *parts, axis=0)
            elif axes:
                self._whole[view] = self._add("Unsqueeze", base, axes)
        return self._whole.get(view, base)

    def _flat(self, name: str, axes: Axes = (0,)) -> str:
        """A tensor without these axes of size 1."""
        base, inside = self._view_of(name)
        return base if inside == axes else self._add("Squeeze", self._made(name), axes)

    def _moves_nothing(self, node: Any) -> list[View]:
        """Axes of size 1 come, go or change places."""
        (base, inside), order = self._view_of(node.input[0]), _attributes(node).get("perm")
        before, after = (self._shapes.get(name) for name in (node.input[0], node.output[0]))
        if node.op_type == "Identity":
            return [(base, inside)]
        if before is None or after is None or base in self._stacks or (node.op_type == "Reshape" and "" in before):
            return []
        if order is not None:
            kept = [at for at in order if before[at] != 1]
            if kept != sorted(kept):
                return []
            inside = tuple(at for at, size in enumerate(before) if size == 1)
            base = self._flat(node.input[0], inside)
        axes = _put_in(after, [size for at, size in enumerate(before) if at not in inside])
        return [] if axes is None else [(base, axes)]

    def _through(self, node: Any) -> list[View]:
        """The product of a view with a matrix, or its sum with a vector, is a view of that of its base."""
        ranks = (2,) if node.op_type == "MatMul" else (0, 1)
        constant = [name in self._constants and self._constants[name].ndim in ranks for name in node.input]
        if constant.count(True) != 1 or (node.op_type == "MatMul" and (constant[0] or self._exact)):
            return []  # onnxruntime joins a product of matrices with the sum behind it, and rounds otherwise then
        name = node.input[constant.index(False)]
        (base, axes), shape = self._view_of(name), self._shapes.get(name)
        if not axes or shape is None or axes[-1] >= len(shape) - 1:
            return []
        return [(self._add(node.op_type, *(base if given == name else given for given in node.input)), axes)]

    def _one_of_many(self, node: Any) -> list[View]:
        """One index of the first axis of a stack, or each."""
        stack, axis = self._stacks.get(self._view_of(node.input[0])[0]), _attributes(node).get("axis", 0)
        if stack is None or axis or any(name not in self._constants for name in node.input[1:]):
            return []
        values = [self._constants[name] for name in node.input[1:]]
        match node.op_type, [value.reshape(-1).tolist() for value in values]:
            case "Gather", [[number]]:
                return [(stack[number], tuple(range(values[0].ndim)))]
            case "Slice", [[first], [end], [0]] | [[first], [end], [0], [1]] if len(stack[first:end]) == 1:
                return [(stack[first], (0,))]
            case "Split", _ if len(stack) == len(node.output):
                return [(part, (0,)) for part in stack]
        return []

    def _concat(self, node: Any) -> list[View]:
        """What is put together along a first axis, layer by layer, is a stack."""
        parts = [self._view_of(name) for name in node.input]
        if _attributes(node).get("axis") != 0 or any(axes != (0,) for _, axes in parts):
            return []
        self._stacks[node.output[0]] = [base for base, _ in parts]
        return [(node.output[0], ())]

    def _look_for_one_value(self, node: Any) -> None:
        """Follow that every row has one step: `lengths` is 1 everywhere, so a row is present everywhere."""
        if not any(name in self._everywhere for name in node.input):
            return
        values = [self._everywhere.get(name, self._constants.get(name)) for name in node.input[:2]]
        known = [value.reshape(()) for value in values if value is not None and value.size == 1]
        if node.op_type in _COMPARE and len(known) == 2:
            self._everywhere[node.output[0]] = _COMPARE[node.op_type](*known)
        elif node.op_type in _KEEP_VALUES and node.input[0] in self._everywhere:
            self._everywhere[node.output[0]] = known[0]

    def _where(self, node: Any) -> list[View]:
        """A selection that takes every row of one side is that side, unless it repeats it."""
        if node.input[0] not in self._everywhere:
            return []
        taken = node.input[1 if self._everywhere[node.input[0]] else 2]
        ours, out = self._shapes.get(taken, ()), self._shapes.get(node.output[0], ())
        repeats = len(ours) != len(out) or any(mine == 1 != whole for mine, whole in zip(ours, out, strict=True))
        return [self._view_of(taken)] if ours and not repeats else []

    def _recurrent(self, node: Any) -> list[View]:
        """Write it for one step, if every row has that step."""
        given = _attributes(node)
        x, _, _, _, lengths = (*node.input, *[""] * 5)[:5]
        if (
            given.get("direction", b"forward") != b"forward"
            or given.get("layout", 0)
            or (lengths and self._everywhere.get(lengths) != 1)
            or self._shapes.get(x, (0,))[0] != 1
        ):
            return []
        after = self._node_alone(node) if self._exact else self._equations(node, given)
        self._rewrote = self._rewrote or bool(after)
        return [(after[0], (0, 1)), *((name, (0,)) for name in after)] if after else []

    def _node_alone(self, node: Any) -> list[str]:
        """Keep the node, without lengths; of its answers only the last state is needed."""
        alone, name = onnx.copy(node), f"{_NAME}{len(self._nodes)}"
        onnx.replace(alone.input, ["" if at == 4 else self._made(name) for at, name in enumerate(node.input)])
        states = [f"{name}/{state}" for state in ("h", "c")[: 2 if node.op_type == "LSTM" else 1]]
        onnx.replace(alone.output, ["", *states])
        self._nodes.append(alone)
        flat = [self._add("Squeeze", state, (0,)) for state in states]
        self._whole |= {(base, (0,)): state for base, state in zip(flat, states, strict=True)}
        return flat

    def _equations(self, node: Any, given: Mapping[str, Any]) -> list[str]:
        """Write it as equations, if its attributes are the usual ones."""
        kind = node.op_type
        x, w, r, b, _, h, c, p = (*node.input, *[""] * 8)[:8]
        acts = given.get("activations") or _DEFAULTS[kind]
        if (
            not given.keys() <= _KNOWN_ATTRIBUTES
            or given.get("input_forget", 0)
            or len(acts) != len(_DEFAULTS[kind])
            or not _SIMPLE.issuperset(acts)
            or any(getattr(self._constants.get(name), "dtype", None) != np.float32 for name in (w, r, b, p) if name)
            or not h
            or (kind == "LSTM" and not c)
        ):
            return []
        size = self._constants[r].shape[2]
        both = np.concatenate([self._constants[w][0], self._constants[r][0]], axis=1)
        bias = self._constants[b] if b else np.zeros(2 * len(both), np.float32)
        weights = both.reshape(-1, size, both.shape[1]).transpose(0, 2, 1)
        cell = _Cell(self._add, weights, bias.reshape(2, -1, size), [act.decode() for act in acts])
        x, h = self._flat(x), self._flat(h)
        if kind == "LSTM":
            return cell.lstm(x, h, self._flat(c), self._constants[p].reshape(3, size) if p else None)
        return [cell.gru(x, h, bool(given.get("linear_before_reset", 0))) if kind == "GRU" else cell.rnn(x, h)]


class _Cell(NamedTuple):
    """Writes the equations of one recurrent node of G gates, in ONNX's order, for rows (B, F) and (B, H)."""

    add: Callable[..., str]  # _Rewriter._add
    weights: Array  # W and R (G, F + H, H)
    bias: Array  # of W and of R (2, G, H)
    acts: Sequence[str]

    def sums(self, x: str, h: str, gates: int) -> Iterator[str]:
        """W x + R h + b of the first gates, each in one product over [x, h]."""
        xh = self.add("Concat", x, h, axis=1)
        return (self.add("Gemm", xh, self.weights[gate], self.bias[:, gate].sum(axis=0)) for gate in range(gates))

    def lstm(self, x: str, h: str, c: str, peepholes: Array | None) -> list[str]:
        """The new h and c; gates i, o, f, c, peepholes (3, H) for i, o, f."""
        add, (gate_act, cell_act, out_act) = self.add, self.acts
        i, o, f, g = self.sums(x, h, 4)
        if peepholes is not None:
            i = add("Add", i, add("Mul", c, peepholes[0]))
            f = add("Add", f, add("Mul", c, peepholes[2]))
        i, f, g = add(gate_act, i), add(gate_act, f), add(cell_act, g)
        c_after = add("Add", add("Mul", f, c), add("Mul", i, g))
        if peepholes is not None:
            o = add("Add", o, add("Mul", c_after, peepholes[1]))
        return [add("Mul", add(gate_act, o), add(out_act, c_after)), c_after]

    def gru(self, x: str, h: str, linear_before_reset: bool) -> str:
        """The new h; gates z, r, h."""
        add, (gate_act, cell_act) = self.add, self.acts
        z, r = (add(gate_act, total) for total in self.sums(x, h, 2))
        (forward, back), bias = np.split(self.weights[2], [-self.bias.shape[2]]), self.bias[:, 2]
        from_x = add("Gemm", x, forward, bias[0])
        if linear_before_reset:
            from_h = add("Mul", r, add("Gemm", h, back, bias[1]))
        else:
            from_h = add("Gemm", add("Mul", r, h), back, bias[1])
        new = add(cell_act, add("Add", from_x, from_h))
        return add("Add", new, add("Mul", z, add("Sub", h, new)))

    def rnn(self, x: str, h: str) -> str:
        """The new h."""
        return self.add(self.acts[0], *self.sums(x, h, 1))


# --- graphs ---------------------------------------------------------------------------------------------------------


def _attributes(node: Any) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _port(port: Any, name: str, shape: Shape) -> Any:
    """A port of the same type, of another name and shape."""
    sizes = [f"{_NAME}rows" if size == ROWS else size for size in shape]
    return onnx.helper.make_tensor_value_info(name, port.type.tensor_type.elem_type, sizes)


def _without_ones(shape: Shape) -> tuple[Shape, Axes]:
    """A shape without axes of size 1 before the rows, nor time behind them; which axes these were."""
    rows = shape.index(ROWS) if shape else 0
    axes = tuple(at for at, size in enumerate(shape) if size == 1 and (at < rows or at == rows + 1 == len(shape) - 2))
    return tuple(size for at, size in enumerate(shape) if at not in axes), axes


def _with_ones(shape: Shape, axes: Axes) -> Shape:
    """A shape with axes of size 1 put in, at these places of the result."""
    rest = iter(shape)
    return tuple(1 if at in axes else next(rest) for at in range(len(shape) + len(axes)))


def _put_in(shape: Sequence[int | str], base: Sequence[int | str]) -> Axes | None:
    """Where axes of size 1 are put into `base` to make `shape`; None where that does not make it."""
    axes, left = [], list(base)
    for at, size in enumerate(shape):
        if left and size == left[0]:
            left.pop(0)
        else:
            axes.append(at)
    return None if left or any(shape[at] != 1 for at in axes) else tuple(axes)
