"""The graph for one step: what model.onnx says of T steps, written anew for a single one.

A recurrent node walks over time; for one step its loop, its lengths and the selection of rows that have any step are
work for nothing. Here each LSTM, GRU and RNN becomes the matrix products and activations of its equations
(https://onnx.ai/onnx/operators/, opset 13), which onnxruntime fuses and vectorises. A run takes 0.55 to 0.9 of the
time. All other nodes stay as they are. The caller proves the result against golden.npz, as it does model.onnx.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Axes = tuple[int, ...]

MOST_BYTES: Final = 64 << 20
"""Of weights: they are in memory twice, and the larger they are the more of a run is the products themselves."""

_LEAST_OPSET: Final = 13
_SIMPLE: Final = frozenset({"Tanh", "Sigmoid", "Relu", "Softsign"})
_DEFAULTS: Final[Mapping[str, tuple[str, ...]]] = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
    "RNN": ("Tanh",),
}
_KNOWN_ATTRIBUTES: Final = frozenset({"activations", "direction", "hidden_size", "layout", "linear_before_reset"})
_NAME: Final = "one_step/"


def one_step_graph(path: Path, x: str, y: str, lengths: str | None) -> bytes | None:
    """The graph for x (B, 1, F), every row having that step; without `lengths` where nothing is left that needs it.

    Args:
        path: model.onnx of batch first, time second, all states float32 and batch first.
        x, y, lengths: Names of its input, output and input of valid steps per row.

    Returns:
        A serialised model; None where there is nothing to gain: no recurrent node that could be written anew, a graph
        with graphs inside, or one that is large.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    outside = any(i.data_location == onnx.TensorProto.EXTERNAL for i in graph.initializer)
    if opset < _LEAST_OPSET or model.functions or outside or _has_graphs(graph) or path.stat().st_size > MOST_BYTES:
        return None
    for port in graph.input:
        if port.name == x:
            port.type.tensor_type.shape.dim[1].dim_value = 1
    for port in graph.output:
        if port.name == y and len(port.type.tensor_type.shape.dim) > 1:
            port.type.tensor_type.shape.dim[1].dim_value = 1
    rewriter = _Rewriter(onnx.shape_inference.infer_shapes(model).graph, lengths)
    nodes = rewriter.rewritten()
    if not rewriter.written_anew:
        return None
    del graph.node[:]
    del graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(rewriter.made)
    _drop_unused(graph, lengths)
    return bytes(model.SerializeToString())


class _Rewriter:
    """Goes through the nodes in order. Views are followed, not made, until somebody needs them.

    Attributes:
        made: Initializers that were added.
        written_anew: How many recurrent nodes were.
    """

    def __init__(self, graph: Any, lengths: str | None) -> None:
        from onnx import numpy_helper

        self._graph = graph
        self.made: list[Any] = []
        self.written_anew = 0
        self._nodes: list[Any] = []
        self._constants: dict[str, Array] = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        self._shapes = _shapes(graph)
        self._same: dict[str, str] = {}
        """Names that stand for others."""
        self._views: dict[str, tuple[str, Axes]] = {}
        """Names of tensors that are others with axes of size 1 put in: at these places of the result."""
        self._everywhere: dict[str, Array] = {}
        """Names of tensors that have one value all over."""
        if lengths is not None:
            self._everywhere[lengths] = np.array(1, np.int32)

    def rewritten(self) -> list[Any]:
        """All nodes."""
        for node in self._graph.node:
            if not self._rewrite(node):
                self._keep(node)
        for port in self._graph.output:
            if port.name in self._same or port.name in self._views:
                self._add("Identity", [self._made(self._same.get(port.name, port.name))], port.name)
        return _without_copies(self._nodes, {port.name for port in self._graph.output})

    def _rewrite(self, node: Any) -> bool:
        """Whether a node is dealt with; else it stays."""
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            from onnx import numpy_helper

            self._constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            return False
        self._look_for_one_value(node)
        if node.op_type in ("LSTM", "GRU", "RNN"):
            return self._recurrent(node)
        view = {"Unsqueeze": self._unsqueeze, "Squeeze": self._squeeze, "Transpose": self._transpose}.get(node.op_type)
        if view is not None:
            return view(node)
        return (node.op_type == "Identity" and self._identity(node)) or (node.op_type == "Where" and self._where(node))

    def _keep(self, node: Any) -> None:
        inputs = [self._made(name) for name in node.input]
        del node.input[:]
        node.input.extend(inputs)
        self._nodes.append(node)

    def _add(self, op: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        from onnx import helper

        output = output or f"{_NAME}{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def _constant(self, value: Array) -> str:
        from onnx import numpy_helper

        name = f"{_NAME}constant_{len(self.made)}"
        self.made.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    # --- what is the same as something else ---------------------------------------------------------------------

    def _made(self, name: str) -> str:
        """The name of a tensor that is there; a view is made when first needed."""
        name = self._same.get(name, name)
        if name in self._views:
            base, axes = self._views.pop(name)
            self._same[name] = self._add("Unsqueeze", [base, self._constant(np.array(axes, np.int64))])
            return self._same[name]
        return name

    def _view_of(self, name: str) -> tuple[str, Axes]:
        name = self._same.get(name, name)
        return self._views.get(name, (name, ()))

    def _be(self, name: str, base: str, axes: Axes) -> bool:
        """Let `name` stand for `base` with axes put in."""
        if axes:
            self._views[name] = base, axes
        else:
            self._same[name] = self._same.get(base, base)
        return True

    def _identity(self, node: Any) -> bool:
        return self._be(node.output[0], *self._view_of(node.input[0]))

    def _axes(self, node: Any, rank: int) -> Axes | None:
        axes = self._constants.get(node.input[1]) if len(node.input) > 1 else None
        return None if axes is None else tuple(sorted(int(axis) % rank for axis in axes.reshape(-1)))

    def _unsqueeze(self, node: Any) -> bool:
        base, inside = self._view_of(node.input[0])
        shape = self._shapes.get(node.output[0])
        axes = None if shape is None else self._axes(node, len(shape))
        if shape is None or axes is None or inside:
            return False
        return self._be(node.output[0], base, axes)

    def _squeeze(self, node: Any) -> bool:
        base, inside = self._view_of(node.input[0])
        shape = self._shapes.get(node.input[0])
        axes = None if shape is None else self._axes(node, len(shape))
        if axes is None or not inside or not set(axes) <= set(inside):
            return False
        left = tuple(axis - sum(gone < axis for gone in axes) for axis in inside if axis not in axes)
        return self._be(node.output[0], base, left)

    def _transpose(self, node: Any) -> bool:
        """Of (B, 1, F) to (1, B, F) and back: nothing moves."""
        shape = self._shapes.get(node.input[0])
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        if order != [1, 0, 2] or shape is None or 1 not in shape[:2]:
            return False
        one = 1 if shape[1] == 1 else 0
        return self._be(node.output[0], self._flat(node.input[0], one), (1 - one,))

    def _flat(self, name: str, axis: int) -> str:
        """A tensor without its axis `axis` of size 1."""
        base, inside = self._view_of(name)
        if inside == (axis,):
            return base
        return self._add("Squeeze", [self._made(name), self._constant(np.array([axis], np.int64))])

    # --- what is the same for every row -------------------------------------------------------------------------

    def _look_for_one_value(self, node: Any) -> None:
        """Follow that every row has one step: `lengths` is 1 everywhere, so a row is present everywhere."""
        compare: Mapping[str, Callable[[Array, Array], Array]] = {
            **{"Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less},
            **{"LessOrEqual": np.less_equal, "Equal": np.equal},
        }
        values = [self._everywhere.get(name, self._scalar(name)) for name in node.input]
        if not any(name in self._everywhere for name in node.input):
            return
        first, second = (*values, None, None)[:2]
        if node.op_type in ("Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape") and first is not None:
            self._everywhere[node.output[0]] = first
        elif node.op_type in compare and first is not None and second is not None:
            self._everywhere[node.output[0]] = compare[node.op_type](first, second)

    def _scalar(self, name: str) -> Array | None:
        value = self._constants.get(name)
        return value.reshape(()) if value is not None and value.size == 1 else None

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
        from onnx import helper

        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        names = [*node.input, *[""] * (8 - len(node.input))]
        x, w, r, b, lengths, h_before, c_before, p = names
        kind = node.op_type
        acts = tuple(a.decode() for a in given.get("activations", ())) or _DEFAULTS[kind]
        weights = [self._constants.get(name) for name in (w, r)]
        if (
            set(given) - _KNOWN_ATTRIBUTES
            or given.get("direction", b"forward") != b"forward"
            or given.get("layout", 0)
            or len(acts) != len(_DEFAULTS[kind])
            or not set(acts) <= _SIMPLE
            or any(weight is None or weight.dtype != np.float32 for weight in weights)
            or any(name and name not in self._constants for name in (b, p))
            or (lengths and self._everywhere.get(lengths) != 1)
            or not h_before
            or (kind == "LSTM" and not c_before)
            or self._shapes.get(x, (0,))[0] != 1
        ):
            return False
        wide, back = weights[0][0], weights[1][0]  # type: ignore[index]  # neither is None
        size = back.shape[1]
        bias = self._constants[b][0] if b else np.zeros(2 * len(wide), np.float32)
        cell = _Cell(self, size, wide, back, bias[: len(wide)], bias[len(wide) :], acts)
        x, h_before = self._flat(x, 0), self._flat(h_before, 0)
        c_after = ""
        if kind == "LSTM":
            peepholes = self._constants[p][0].reshape(3, size) if p else None
            h_after, c_after = cell.lstm(x, h_before, self._flat(c_before, 0), peepholes)
        elif kind == "GRU":
            h_after = cell.gru(x, h_before, bool(given.get("linear_before_reset", 0)))
        else:
            h_after = cell.rnn(x, h_before)
        after: list[tuple[str, Axes]] = [(h_after, (0, 1)), (h_after, (0,)), (c_after, (0,))]
        for name, (base, axes) in zip(node.output, after, strict=False):
            if name:
                self._be(name, base, axes)
        self.written_anew += 1
        return True


class _Cell:
    """Writes the equations of one recurrent node for rows (B, F) and (B, H).

    Args:
        wide, back: W (gates x H, F) and R (gates x H, H), in ONNX's order of gates.
        wide_bias, back_bias: Their biases (gates x H).
    """

    def __init__(
        self,
        rewriter: _Rewriter,
        size: int,
        wide: Array,
        back: Array,
        wide_bias: Array,
        back_bias: Array,
        acts: Sequence[str],
    ) -> None:
        self._add, self._constant = rewriter._add, rewriter._constant
        self._size, self._wide, self._back = size, wide, back
        self._wide_bias, self._back_bias, self._acts = wide_bias, back_bias, acts

    def _gate(self, number: int) -> slice:
        return slice(number * self._size, (number + 1) * self._size)

    def _product(self, x: str, weight: Array, bias: Array) -> str:
        return self._add("Gemm", [x, self._constant(weight.T), self._constant(bias)])

    def _both(self, xh: str, number: int) -> str:
        """W x + R h + b of a gate, in one product over [x, h]."""
        gate = self._gate(number)
        weight = np.concatenate([self._wide[gate], self._back[gate]], axis=1)
        return self._product(xh, weight, self._wide_bias[gate] + self._back_bias[gate])

    def lstm(self, x: str, h: str, c: str, peepholes: Array | None) -> tuple[str, str]:
        """The new h and c; gates i, o, f, c, peepholes (3, H) for i, o, f."""
        add, (gate_act, cell_act, out_act) = self._add, self._acts
        xh = add("Concat", [x, h], axis=1)
        i, o, f, g = (self._both(xh, number) for number in range(4))
        if peepholes is not None:
            i = add("Add", [i, add("Mul", [c, self._constant(peepholes[0])])])
            f = add("Add", [f, add("Mul", [c, self._constant(peepholes[2])])])
        i, f, g = add(gate_act, [i]), add(gate_act, [f]), add(cell_act, [g])
        c_after = add("Add", [add("Mul", [f, c]), add("Mul", [i, g])])
        if peepholes is not None:
            o = add("Add", [o, add("Mul", [c_after, self._constant(peepholes[1])])])
        return add("Mul", [add(gate_act, [o]), add(out_act, [c_after])]), c_after

    def gru(self, x: str, h: str, linear_before_reset: bool) -> str:
        """The new h; gates z, r, h."""
        add, gate, (gate_act, cell_act) = self._add, self._gate(2), self._acts
        xh = add("Concat", [x, h], axis=1)
        z, r = add(gate_act, [self._both(xh, 0)]), add(gate_act, [self._both(xh, 1)])
        forward = self._product(x, self._wide[gate], self._wide_bias[gate])
        if linear_before_reset:
            back = add("Mul", [r, self._product(h, self._back[gate], self._back_bias[gate])])
        else:
            back = self._product(add("Mul", [r, h]), self._back[gate], self._back_bias[gate])
        new = add(cell_act, [add("Add", [forward, back])])
        return add("Add", [new, add("Mul", [z, add("Sub", [h, new])])])

    def rnn(self, x: str, h: str) -> str:
        """The new h."""
        return self._add(self._acts[0], [self._both(self._add("Concat", [x, h], axis=1), 0)])


# --- graphs ---------------------------------------------------------------------------------------------------------


def _has_graphs(graph: Any) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute)


def _shapes(graph: Any) -> dict[str, tuple[int | str, ...]]:
    """Of tensors whose rank is known; a size that is not is a name, or ''."""
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim
        )
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def _without_copies(nodes: list[Any], outputs: set[str]) -> list[Any]:
    """Let an output be what it would be copied from, where a node makes that and nobody asked for its name."""
    makers = {name: node for node in nodes for name in node.output}
    renamed: dict[str, str] = {}
    for node in nodes:
        source, name = (node.input[0], node.output[0]) if node.op_type == "Identity" else ("", "")
        if name in outputs and source in makers and source not in outputs and source not in renamed:
            renamed[source] = name
    kept = []
    for node in nodes:
        if node.op_type == "Identity" and renamed.get(node.input[0]) == node.output[0]:
            continue
        for names in (node.input, node.output):
            new = [renamed.get(name, name) for name in names]
            del names[:]
            names.extend(new)
        kept.append(node)
    return kept


def _drop_unused(graph: Any, lengths: str | None) -> None:
    """Remove nodes and initializers that no output needs, and `lengths` if it is one of them."""
    needed = {port.name for port in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    _keep_only(graph.node, reversed(kept))
    _keep_only(graph.initializer, (value for value in list(graph.initializer) if value.name in needed))
    _keep_only(graph.input, (port for port in list(graph.input) if port.name != lengths or lengths in needed))


def _keep_only(field: Any, kept: Iterator[Any]) -> None:
    whole = list(kept)
    del field[:]
    field.extend(whole)
