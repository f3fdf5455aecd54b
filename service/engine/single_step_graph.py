"""The graph for one step: what model.onnx says of T steps, written for a single one.

A recurrent node walks over time; for one step its loop, its lengths and the selection of rows that have any step are
work for nothing. Here each LSTM, GRU and RNN becomes the matrix products and activations of its equations
(https://onnx.ai/onnx/operators/, opset 13), which onnxruntime fuses and vectorises. A run takes 0.55 to 0.9 of the
time. Inputs and outputs lose their axes of size 1, and a state of all layers in one tensor becomes one port per layer:
the bytes in memory are the same, and nothing is copied from one shape to the other. All other nodes stay as they are.
The caller proves the result against golden.npz, as it does model.onnx.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from . import onnx_door as onnx
from .arrays import Array
from .buffers import ROWS, Ports, Shape

Axes = tuple[int, ...]

# Of weights: they are in memory twice, and the larger they are the more of a run is the products themselves.
MOST_BYTES: Final = 64 << 20
_LEAST_OPSET: Final = 13
_SIMPLE: Final = frozenset({"Tanh", "Sigmoid", "Relu", "Softsign"})
_DEFAULTS: Final[Mapping[str, tuple[str, ...]]] = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
    "RNN": ("Tanh",),
}
_KNOWN_ATTRIBUTES: Final = frozenset({"activations", "direction", "hidden_size", "layout", "linear_before_reset"})
_COMPARE: Final[Mapping[str, Callable[..., Array]]] = {
    **{"Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less},
    **{"LessOrEqual": np.less_equal, "Equal": np.equal},
}
_KEEP_VALUES: Final = frozenset({"Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape"})
_ONE_OF_MANY: Final = frozenset({"Slice", "Gather", "Split"})
_NAME: Final = "one_step/"
_ROWS_AXIS: Final = "one_step/rows"


class SingleStepGraph(NamedTuple):
    """A serialised model, and its ports."""

    model: bytes
    ports: Ports


def single_step_graph(path: Path, ports: Ports, lengths: str | None) -> SingleStepGraph | None:
    """The graph for one step, every row having that step; without `lengths` where nothing is left that needs it.

    Args:
        path: model.onnx.
        ports: Of it.
        lengths: The name of its input of valid steps per row.

    Returns:
        None where there is nothing to gain: no recurrent node that could be written as equations, a graph with graphs
        inside, or one that is large.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    inside = any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute)
    outside = any(i.data_location == onnx.TensorProto.EXTERNAL for i in graph.initializer)
    unfit = onnx.opset(model) < _LEAST_OPSET or model.functions or outside or inside
    if unfit or path.stat().st_size > MOST_BYTES:
        return None
    for port in (*graph.input, *graph.output):
        if port.name in ports:
            port.CopyFrom(_port(port.name, port.type.tensor_type.elem_type, ports[port.name][0][1]))
    rewriter = _Rewriter(onnx.shape_inference.infer_shapes(model).graph, ports, lengths)
    nodes = rewriter.rewritten()
    if not rewriter.rewrote:
        return None
    del graph.value_info[:]
    onnx.replace(graph.node, nodes)
    graph.initializer.extend(rewriter.made)
    for side in (graph.input, graph.output):
        onnx.replace(side, [new for port in side for new in rewriter.new_ports(port)])
    _drop_unused(graph, lengths)
    return SingleStepGraph(bytes(model.SerializeToString()), rewriter.ports)


class _Rewriter:
    """Goes through the nodes in order. Views are followed, not made, until somebody needs them.

    Views are tensors that are others with axes of size 1 put in, if any, at these places of the result. Stacks are
    others one behind the other, along a first axis that these do not have.
    """

    def __init__(self, graph: Any, ports: Ports, lengths: str | None) -> None:
        self._graph = graph
        self.ports = dict(ports)  # of the graph that is made
        self.made: list[Any] = []  # initializers that were added
        self.rewrote = 0  # recurrent nodes that are equations now
        self._nodes: list[Any] = []
        self._constants: dict[str, Array] = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
        self._shapes = _shapes(graph)
        self._views: dict[str, tuple[str, Axes]] = {}
        self._stacks: dict[str, list[str]] = {}
        self._whole: dict[tuple[str, Axes], str] = {}  # views and stacks that somebody needed: what was made for them
        self._everywhere = {} if lengths is None else {lengths: np.array(1, np.int32)}  # one value all over
        self._renamed: dict[str, str] = {}  # what a node makes that is an output

    def rewritten(self) -> list[Any]:
        """All nodes."""
        for port in self._graph.input:
            if port.name in self.ports:
                self._take_apart(port.name)
        for node in self._graph.node:
            if not self._rewrite(node):
                self._keep(node)
        for port in self._graph.output:
            self._give(port.name)
        for node in self._nodes:
            for names in (node.input, node.output):
                onnx.replace(names, [self._renamed.get(name, name) for name in names])
        return self._nodes

    def new_ports(self, port: Any) -> list[Any]:
        """What is declared instead of an input or output."""
        new = self.ports.get(port.name, ())
        if not new or new[0][0] == port.name:
            return [port]
        kind = port.type.tensor_type.elem_type
        return [_port(name, kind, shape) for name, shape in new]

    # --- inputs and outputs -------------------------------------------------------------------------------------

    def _take_apart(self, name: str) -> None:
        """Let an input have no axes of size 1, and be several where it is only read layer by layer."""
        shape, axes = _without_ones(self.ports[name][0][1])
        readers = [node for node in self._graph.node if name in node.input]
        if shape[0] != ROWS and shape[1:2] == (ROWS,) and not axes and all(n.op_type in _ONE_OF_MANY for n in readers):
            self._stacks[name] = self._declare(name, shape[1:], shape[0])
        elif axes:
            self._views[name] = self._declare(name, shape, 1)[0], axes

    def _give(self, name: str) -> None:
        """Make an output, in the shape that it has already."""
        (base, axes), stack = self._view_of(name), self._stacks.get(name)
        whole = self.ports[name][0][1] if name in self.ports else ()
        shape, ones = _without_ones(whole)
        if stack and whole[1:2] == (ROWS,):
            for new, part in zip(self._declare(name, whole[1:], len(stack)), stack, strict=True):
                self._put_out(part, new)
        elif axes and axes == ones:
            self._put_out(base, self._declare(name, shape, 1)[0])
        elif stack or axes or base != name:
            self._put_out(self._made(name), name)

    def _put_out(self, source: str, name: str) -> None:
        """Let an output be what a node makes, else a copy."""
        taken = {*self._renamed, *(port.name for port in self._graph.output)}
        if source not in taken and any(source in node.output for node in self._nodes):
            self._renamed[source] = name
        else:
            self._add("Identity", [source], name)

    def _declare(self, name: str, shape: Shape, count: int) -> list[str]:
        names = [f"{_NAME}{name}/{number}" for number in range(count)]
        self.ports[name] = [(new, shape) for new in names]
        return names

    # --- nodes --------------------------------------------------------------------------------------------------

    def _rewrite(self, node: Any) -> bool:
        """Whether a node is dealt with; else it stays."""
        if node.op_type == "Constant" and node.attribute[0].name in ("value", "value_int", "value_ints"):
            value = onnx.helper.get_attribute_value(node.attribute[0])
            is_tensor = node.attribute[0].name == "value"
            self._constants[node.output[0]] = onnx.numpy_helper.to_array(value) if is_tensor else np.array(value)
            return False
        self._look_for_one_value(node)
        rewrite: Callable[[Any], bool] | None = {
            **dict.fromkeys(("LSTM", "GRU", "RNN"), self._recurrent),
            **dict.fromkeys(("MatMul", "Add"), self._through),
            **dict.fromkeys(_ONE_OF_MANY, self._one_of_many),
            **dict.fromkeys(("Unsqueeze", "Squeeze", "Transpose", "Identity"), self._moves_nothing),
            **{"Where": self._where, "Concat": self._concat},
        }.get(node.op_type)
        return rewrite is not None and rewrite(node)

    def _keep(self, node: Any) -> None:
        onnx.replace(node.input, [self._made(name) for name in node.input])
        self._nodes.append(node)

    def _add(self, op: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        output = output or f"{_NAME}{len(self._nodes)}"
        self._nodes.append(onnx.helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def _constant(self, value: Array) -> str:
        name = f"{_NAME}constant_{len(self.made)}"
        self.made.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    # --- what is the same as something else ---------------------------------------------------------------------

    def _made(self, name: str) -> str:
        """The name of a tensor that is there; a view or a stack is made when first needed."""
        base, axes = self._view_of(name)
        if (base, axes) not in self._whole:
            if base in self._stacks:
                first = self._constant(np.array([0], np.int64))
                parts = [self._add("Unsqueeze", [part, first]) for part in self._stacks[base]]
                self._whole[base, axes] = self._add("Concat", parts, axis=0)
            elif axes:
                self._whole[base, axes] = self._add("Unsqueeze", [base, self._constant(np.array(axes, np.int64))])
        return self._whole.get((base, axes), base)

    def _view_of(self, name: str) -> tuple[str, Axes]:
        return self._views.get(name, (name, ()))

    def _be(self, name: str, base: str, axes: Axes) -> bool:
        """Let `name` stand for `base` with axes put in."""
        self._views[name] = base, axes
        return True

    def _moves_nothing(self, node: Any) -> bool:
        """Axes of size 1 come, go or change places."""
        (base, inside), order = self._view_of(node.input[0]), _attributes(node).get("perm")
        before, after = (self._shapes.get(name) for name in (node.input[0], node.output[0]))
        if node.op_type == "Identity":
            return self._be(node.output[0], base, inside)
        if before is None or after is None or base in self._stacks:
            return False
        if order is not None:
            kept = [at for at in order if before[at] != 1]
            if kept != sorted(kept):
                return False
            ones = tuple(at for at, size in enumerate(before) if size == 1)
            if inside != ones:
                base, inside = self._flat(node.input[0], *ones), ones
        axes = _put_in(after, [size for at, size in enumerate(before) if at not in inside])
        return axes is not None and self._be(node.output[0], base, axes)

    def _flat(self, name: str, *axes: int) -> str:
        """A tensor without these axes of size 1."""
        base, inside = self._view_of(name)
        if inside == axes:
            return base
        return self._add("Squeeze", [self._made(name), self._constant(np.array(axes, np.int64))])

    def _through(self, node: Any) -> bool:
        """The product of a view with a matrix, or its sum with a vector, is a view of that of its base."""
        ranks = (2,) if node.op_type == "MatMul" else (0, 1)
        constant = [name in self._constants and self._constants[name].ndim in ranks for name in node.input]
        if constant.count(True) != 1 or (node.op_type == "MatMul" and constant[0]):
            return False
        name = node.input[constant.index(False)]
        (base, axes), shape = self._view_of(name), self._shapes.get(name)
        if not axes or shape is None or axes[-1] >= len(shape) - 1:
            return False
        inputs = [given if fixed else base for given, fixed in zip(node.input, constant, strict=True)]
        return self._be(node.output[0], self._add(node.op_type, inputs), axes)

    # --- layers in one tensor -----------------------------------------------------------------------------------

    def _one_of_many(self, node: Any) -> bool:
        """One index of the first axis of a stack."""
        stack, axis = self._stacks.get(node.input[0]), _attributes(node).get("axis", 0)
        if stack is None or axis or any(name not in self._constants for name in node.input[1:]):
            return False
        numbers = [self._constants[name].reshape(-1).tolist() for name in node.input[1:]]
        if node.op_type == "Split" and len(node.output) == len(stack):
            for name, part in zip(node.output, stack, strict=True):
                self._be(name, part, (0,))
            return True
        if node.op_type == "Gather" and len(numbers[0]) == 1:
            scalar = self._constants[node.input[1]].ndim == 0
            return self._be(node.output[0], stack[numbers[0][0]], () if scalar else (0,))
        if node.op_type == "Slice" and numbers[2:] in ([[0]], [[0], [1]]):
            picked = stack[numbers[0][0] : numbers[1][0]]
            return len(picked) == 1 and self._be(node.output[0], picked[0], (0,))
        return False

    def _concat(self, node: Any) -> bool:
        """What is put together along a first axis, layer by layer, is a stack."""
        parts = [self._view_of(name) for name in node.input]
        if _attributes(node).get("axis") != 0 or any(axes != (0,) for _, axes in parts):
            return False
        self._stacks[node.output[0]] = [base for base, _ in parts]
        return True

    # --- what is the same for every row -------------------------------------------------------------------------

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

    def _where(self, node: Any) -> bool:
        condition = self._everywhere.get(node.input[0])
        if condition is None:
            return False
        taken = node.input[1 if condition else 2]
        ours, out = self._shapes.get(taken), self._shapes.get(node.output[0])
        if ours is None or out is None or len(ours) != len(out):
            return False
        if any(mine == 1 and whole != 1 for mine, whole in zip(ours, out, strict=True)):
            return False  # it would be repeated
        return self._be(node.output[0], *self._view_of(taken))

    # --- recurrent nodes ----------------------------------------------------------------------------------------

    def _recurrent(self, node: Any) -> bool:
        given, kind = _attributes(node), node.op_type
        names = [*node.input, *[""] * (8 - len(node.input))]
        x, w, r, b, lengths, h, c, p = names
        acts = tuple(a.decode() for a in given.get("activations", ())) or _DEFAULTS[kind]
        if (
            set(given) - _KNOWN_ATTRIBUTES
            or given.get("direction", b"forward") != b"forward"
            or given.get("layout", 0)
            or len(acts) != len(_DEFAULTS[kind])
            or not set(acts) <= _SIMPLE
            or any(name not in self._constants or self._constants[name].dtype != np.float32 for name in (w, r))
            or any(name and name not in self._constants for name in (b, p))
            or (lengths and self._everywhere.get(lengths) != 1)
            or not h
            or (kind == "LSTM" and not c)
            or self._shapes.get(x, (0,))[0] != 1
        ):
            return False
        size = self._constants[r].shape[2]
        wide, back = (self._constants[name][0].reshape(-1, size, self._constants[name].shape[2]) for name in (w, r))
        bias = self._constants[b][0] if b else np.zeros(2 * len(wide) * size, np.float32)
        cell = _Cell(self._add, self._constant, wide, back, bias.reshape(2, -1, size), acts)
        x, h, c_after = self._flat(x, 0), self._flat(h, 0), ""
        if kind == "LSTM":
            peepholes = self._constants[p][0].reshape(3, size) if p else None
            h_after, c_after = cell.lstm(x, h, self._flat(c, 0), peepholes)
        elif kind == "GRU":
            h_after = cell.gru(x, h, bool(given.get("linear_before_reset", 0)))
        else:
            h_after = cell.rnn(x, h)
        after: list[tuple[str, Axes]] = [(h_after, (0, 1)), (h_after, (0,)), (c_after, (0,))]
        for name, (base, axes) in zip(node.output, after, strict=False):
            if name:
                self._be(name, base, axes)
        self.rewrote += 1
        return True


@dataclass(slots=True, eq=False)
class _Cell:
    """Writes the equations of one recurrent node of G gates, in ONNX's order, for rows (B, F) and (B, H)."""

    add: Callable[..., str]  # of a node: its output
    constant: Callable[[Array], str]
    wide: Array  # W (G, H, F)
    back: Array  # R (G, H, H)
    bias: Array  # of W and of R (2, G, H)
    acts: Sequence[str]

    def _product(self, x: str, weight: Array, bias: Array) -> str:
        return self.add("Gemm", [x, self.constant(weight.T), self.constant(bias)])

    def _both(self, xh: str, gate: int) -> str:
        """W x + R h + b of a gate, in one product over [x, h]."""
        weight = np.concatenate([self.wide[gate], self.back[gate]], axis=1)
        return self._product(xh, weight, self.bias[0, gate] + self.bias[1, gate])

    def lstm(self, x: str, h: str, c: str, peepholes: Array | None) -> tuple[str, str]:
        """The new h and c; gates i, o, f, c, peepholes (3, H) for i, o, f."""
        add, (gate_act, cell_act, out_act) = self.add, self.acts
        xh = add("Concat", [x, h], axis=1)
        i, o, f, g = (self._both(xh, gate) for gate in range(4))
        if peepholes is not None:
            i = add("Add", [i, add("Mul", [c, self.constant(peepholes[0])])])
            f = add("Add", [f, add("Mul", [c, self.constant(peepholes[2])])])
        i, f, g = add(gate_act, [i]), add(gate_act, [f]), add(cell_act, [g])
        c_after = add("Add", [add("Mul", [f, c]), add("Mul", [i, g])])
        if peepholes is not None:
            o = add("Add", [o, add("Mul", [c_after, self.constant(peepholes[1])])])
        return add("Mul", [add(gate_act, [o]), add(out_act, [c_after])]), c_after

    def gru(self, x: str, h: str, linear_before_reset: bool) -> str:
        """The new h; gates z, r, h."""
        add, (gate_act, cell_act) = self.add, self.acts
        xh = add("Concat", [x, h], axis=1)
        z, r = (add(gate_act, [self._both(xh, gate)]) for gate in range(2))
        forward = self._product(x, self.wide[2], self.bias[0, 2])
        if linear_before_reset:
            back = add("Mul", [r, self._product(h, self.back[2], self.bias[1, 2])])
        else:
            back = self._product(add("Mul", [r, h]), self.back[2], self.bias[1, 2])
        new = add(cell_act, [add("Add", [forward, back])])
        return add("Add", [new, add("Mul", [z, add("Sub", [h, new])])])

    def rnn(self, x: str, h: str) -> str:
        """The new h."""
        return self.add(self.acts[0], [self._both(self.add("Concat", [x, h], axis=1), 0)])


# --- graphs ---------------------------------------------------------------------------------------------------------


def _attributes(node: Any) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _port(name: str, kind: int, shape: Shape) -> Any:
    return onnx.helper.make_tensor_value_info(name, kind, [_ROWS_AXIS if size == ROWS else size for size in shape])


def _without_ones(shape: Shape) -> tuple[Shape, Axes]:
    """A shape without axes of size 1 before the rows, nor time behind them; which axes these were."""
    rows = shape.index(ROWS) if shape else 0
    axes = tuple(at for at, size in enumerate(shape) if size == 1 and (at < rows or at == rows + 1 == len(shape) - 2))
    return tuple(size for at, size in enumerate(shape) if at not in axes), axes


def _put_in(shape: Sequence[int | str], base: Sequence[int | str]) -> Axes | None:
    """Where axes of size 1 are put into `base` to make `shape`; None where that does not make it."""
    axes, left = [], list(base)
    for at, size in enumerate(shape):
        if left and size == left[0]:
            left.pop(0)
        else:
            axes.append(at)
    return None if left or any(shape[at] != 1 for at in axes) else tuple(axes)


def _shapes(graph: Any) -> dict[str, tuple[int | str, ...]]:
    """Of tensors whose rank is known; a size that is not is a name, or ''."""
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim
        )
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def _drop_unused(graph: Any, lengths: str | None) -> None:
    """Remove nodes and initializers that no output needs, and `lengths` if it is one of them."""
    needed = onnx.needed(graph, (port.name for port in graph.output))
    onnx.replace(graph.node, (node for node in graph.node if needed.intersection(node.output)))
    onnx.replace(graph.initializer, (value for value in graph.initializer if value.name in needed))
    onnx.replace(graph.input, (port for port in graph.input if port.name != lengths or lengths in needed))
