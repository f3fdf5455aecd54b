"""Hidden state lifted: a recurrent node that starts from zeros and drops its last state gets a state input and output.

This is how most exporters write a network whose caller gave it no state. The node stays as it is, so a whole sequence
is answered as before; what is new is that its last state can be given to the next call. Something else in the graph may
look at other steps, so that chunks equal the whole is proved here.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import numpy as np

from stepcast.errors import ManifestError
from stepcast.manifest import Tolerance

from .. import onnx_door as onnx
from ..arrays import Array
from .freed import free, keep_sizes
from .reading import Reading
from .rewrites import Rewritten
from .sizes import Axis, Part, Parts, Sizes, keep

_CELLS: Final = frozenset({"LSTM", "GRU", "RNN"})
_MOVES: Final = frozenset(
    {"Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
_NO_DATA: Final = frozenset({"Constant", "ConstantOfShape", "Shape", "Size"})
_STEPS: Final = 5  # of the sequence that proves it
_NOT_LAYERS: Final = re.compile(r"(Stateful)?PartitionedCall(_\d+)?|node|main_graph|model(_\d+)?|sequential(_\d+)?|")


class Port(NamedTuple):
    """Where a node takes a state, and where it gives the next one."""

    key: str
    input: int
    output: int


class Stateful(NamedTuple):
    """A node that carries states: which of its inputs has the steps along which axis, and the states' batch axis."""

    node: Any
    ports: Sequence[Port]
    data: int = 0
    time: int = 0
    batch: int = 0

    @property
    def told(self) -> str:
        """As errors name it."""
        return f"{self.node.op_type} node {self.node.name or self.node.output[0]!r}"

    @property
    def backwards(self) -> bool:
        """Whether it reads steps before earlier ones."""
        given = _attributes(self.node)
        turned = [*given.get("scan_input_directions", ()), *given.get("scan_output_directions", ())]
        return bool(given.get("direction", b"forward") != b"forward" or any(turned))


class Hidden(NamedTuple):
    """A state that no caller can reach: `times` rows of `shape` for each row of the batch."""

    stateful: Stateful
    port: Port
    dtype: Any
    shape: tuple[int, ...]
    times: int
    initial: float

    @property
    def cell(self) -> bool:
        """Whether the first axis is of directions, of which there is one."""
        return self.stateful.node.op_type in _CELLS

    @property
    def row(self) -> tuple[int, ...]:
        """The shape without that axis."""
        return self.shape[self.cell :]

    @property
    def own(self) -> tuple[int, ...]:
        """The shape for one row of the batch."""
        return (self.times, *self.row) if self.times > 1 else self.row


def stateful_nodes(graph: Any) -> Iterator[Stateful]:
    """Nodes of kinds that carry state, whether the graph's caller gives it or not."""
    for node in graph.node:
        match node.op_type:
            case "LSTM":
                yield Stateful(node, (Port("h", 5, 1), Port("c", 6, 2)), batch=1)
            case "GRU" | "RNN":
                yield Stateful(node, (Port("h", 5, 1),), batch=1)
            case "LinearAttention":
                yield Stateful(node, (Port("s", 3, 1),), time=1)
            case "CausalConvWithState":
                given = _attributes(node)
                time = 1 if given.get("channels_last") else 1 + given.get("ndim", 1)
                yield Stateful(node, (Port("past", 3, 1),), time=time)
            case "Scan":
                given = _attributes(node)
                carried = len(node.input) - given["num_scan_inputs"]
                ports = [Port(f"s{number}", number, number) for number in range(carried)]
                yield Stateful(node, ports, carried, given.get("scan_input_axes", [0])[0])


def lift(reading: Reading) -> Rewritten | None:
    """Give hidden states ports; None where there are none.

    Raises:
        ManifestError: a node needs steps that have not come yet, or chunks of steps are not what the whole is.
    """
    known, original = reading.known, reading.graph.model
    if known.get("streaming") is False or not any(True for _ in stateful_nodes(original.graph)):
        return None
    try:
        lifting = _Lifting(reading)
        if not lifting.hidden:
            return None
        own, states = lifting.own(), lifting.open()
        fields = {"states": [*own, *states]}
        after = Reading(reading.graph.rewritten(lifting.model), {**known, **fields})
        _prove(Parts(original, lifting.constants), after, lifting.time, lifting.steps)
    except ManifestError as error:
        raise ManifestError(f"{reading.graph.file}: {error}") from error
    told = ", ".join(dict.fromkeys(hidden.stateful.told for hidden in lifting.hidden))
    done = f"{told} started from a state of its own and dropped the last one: state inputs and outputs were added"
    return Rewritten(lifting.model, done, {"states": states if "states" in known else fields["states"]})


class _Lifting:
    """Finds the hidden states of a graph, and opens them.

    Attributes:
        model: A copy of the graph, which is changed.
        time: The axis of the inputs that its steps are.
        steps: How many the graph as it was takes, where that is fixed.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.constants = reading.known.get("constants", ())
        self.model = onnx.ModelProto()
        self.model.CopyFrom(reading.graph.model)
        self.time, self.steps = "", 0
        for stateful in stateful_nodes(self.model.graph):
            _name_outputs(stateful)
        self._parts = Parts(self.model, self.constants)
        alone = [one for one in stateful_nodes(self.model.graph) if any(self._alone(one, port) for port in one.ports)]
        self.hidden = self._seen(self._over_time(alone)) if alone else []

    def own(self) -> list[dict[str, Any]]:
        """The states that the caller gives already, as far as they can be told."""
        states = self._reading.known.get("states")
        if states is not None or not self._many_inputs():
            return list(states or ())
        return [{"input": s.input.name, "output": s.output.name, **s.known} for s in self._reading.roles.states]

    def _many_inputs(self) -> bool:
        return len(self._parts.inputs) > 1 + len(self.constants)

    def _alone(self, stateful: Stateful, port: Port) -> bool:
        """Whether the state at this port is nobody's."""
        given = _input(stateful.node, port.input)
        return not given or self._parts.only_shapes(given)

    def _over_time(self, alone: Sequence[Stateful]) -> list[Stateful]:
        """Those whose steps are the graph's: others may go over the bands of a frame."""
        sizes = self._steps_of(alone)
        if not any(isinstance(size, Axis) for size in sizes) and not self._many_inputs():
            sizes = self._freed(alone, sizes)
        self.time = next((size.name for size in sizes if isinstance(size, Axis)), "")
        mine = [one for one, size in zip(alone, sizes, strict=True) if size == Axis(self.time)]
        for one in mine:
            if one.backwards:
                why = "its answers need readings that have not come yet, so the graph cannot be stepped"
                raise ManifestError(f"{one.told} reads time backwards: {why}. Export it with forward nodes only.")
        return mine

    def _steps_of(self, nodes: Sequence[Stateful]) -> list[int | Axis]:
        found, _ = self._parts.sizes([one.node.input[one.data] for one in nodes])
        return [sizes[one.time] for one, sizes in zip(nodes, found, strict=True)]

    def _freed(self, nodes: Sequence[Stateful], fixed: Sequence[int | Axis]) -> list[int | Axis]:
        """The sizes after the time axis of a graph that declares the example's has no fixed size any more."""
        for port in self.model.graph.input:
            for axis, dim in enumerate(list(port.type.tensor_type.shape.dim)[:-1]):
                if dim.dim_value > 1 and dim.dim_value in fixed:
                    self.steps = dim.dim_value
                    free(self.model.graph, {port.name: axis}, self.steps, "time")
                    try:
                        return self._running(nodes)
                    except ManifestError as error:
                        keep_sizes(self.model.graph, self.steps)
                        with suppress(ManifestError):
                            return self._running(nodes)
                        said = f"input {port.name!r} has {self.steps} steps, and {error}"
                        raise ManifestError(f"{said}. Export it with a dynamic time axis.") from error
        return list(fixed)

    def _running(self, nodes: Sequence[Stateful]) -> list[int | Axis]:
        """The sizes of a graph that was changed; raises ManifestError if it does not run with other sizes."""
        self._parts = Parts(self.model, self.constants)
        self._parts.sizes([port.name for port in self.model.graph.output])
        return self._steps_of(nodes)

    def _seen(self, nodes: Sequence[Stateful]) -> list[Hidden]:
        """The hidden states of nodes: their shapes by what the nodes give, first values by what they are given."""
        pairs = [(one, port) for one in nodes for port in one.ports if self._alone(one, port)]
        results = [one.node.output[port.output] for one, port in pairs]
        given = [_input(one.node, port.input) for one, port in pairs]
        found, values = self._parts.sizes([*results, *filter(None, given)])
        starts = iter(values[len(pairs) :])
        seen = []
        for (one, port), sizes, value, name in zip(pairs, found, values, given, strict=False):
            start = next(starts).reshape(-1) if name else np.zeros(1, value.dtype)
            rows, rest = (sizes[one.batch], sizes[: one.batch] + sizes[one.batch + 1 :]) if sizes else (0, ())
            if any(isinstance(size, Axis) for size in rest) or not sizes:
                raise ManifestError(
                    f"{one.told} carries a state of shape {_told(sizes)}, which has no row for each row"
                )
            if (start != start[0]).any():
                raise ManifestError(f"{one.told} starts from values that differ: a state has one initial value")
            times = rows.times if isinstance(rows, Axis) else 1
            shape = tuple(size for size in rest if isinstance(size, int))
            seen.append(Hidden(one, port, value.dtype, shape, times, float(start[0])))
        return seen

    # --- the new graph ------------------------------------------------------------------------------------------------

    def open(self) -> list[dict[str, Any]]:
        """Add ports for the hidden states; what the manifest says of them."""
        graph = self.model.graph
        batch = self._name_axes()
        self._drop_last_states()
        taken = {name for node in graph.node for name in (*node.input, *node.output)}
        names = _layer_names([hidden.stateful for hidden in self.hidden])
        states, enter, leave = [], list[Any](), list[Any]()
        for hidden in self.hidden:
            layer = names[_key(hidden.stateful)]
            name = f"{layer}.{hidden.port.key}"
            name = f"lifted.{name}" if {name, f"{name}.out"} & taken else name
            states.append({"layer": layer, "key": hidden.port.key, **self._declare(hidden, name, batch)})
            for nodes, node in zip((enter, leave), self._ways(hidden, name), strict=True):
                nodes.append(node)
        onnx.replace(graph.node, [*enter, *graph.node, *leave])  # copies: no node is known by its old self any more
        keep(graph, [port.name for port in graph.output])
        del graph.value_info[:]
        return states

    def _name_axes(self) -> int | str:
        """Write the sizes that were found into inputs and outputs, for exporters forget them; the batch's."""
        graph = self.model.graph
        outputs = [port.name for port in graph.output]
        results = [hidden.stateful.node.output[hidden.port.output] for hidden in self.hidden]
        found, _ = self._parts.sizes([*outputs, *results])
        sizes = {**self._parts.inputs, **dict(zip(outputs, found, strict=False))}
        for port in (*graph.input, *graph.output):
            if port.name in sizes:
                kind = port.type.tensor_type.elem_type
                names = [
                    size if isinstance(size, int) else size.name if size.times == 1 else None
                    for size in sizes[port.name]
                ]
                port.CopyFrom(onnx.helper.make_tensor_value_info(port.name, kind, names))
        size = found[len(outputs)][self.hidden[0].stateful.batch]
        if isinstance(size, int) and size > 1:
            why = f"takes {size} rows at once and no other number"
            raise ManifestError(
                f"{self.hidden[0].stateful.told} {why}. Export it with a dynamic batch axis, or one row."
            )
        return size.name if isinstance(size, Axis) else size

    def _drop_last_states(self) -> None:
        """Outputs that are nothing but last states are outputs of states from now on."""
        graph = self.model.graph
        last = {hidden.stateful.node.output[hidden.port.output] for hidden in self.hidden}
        moves = [node for node in graph.node if node.op_type in _MOVES]
        made = {name for node in graph.node if node.op_type not in _MOVES | _NO_DATA for name in node.output}
        kept = [port for port in graph.output if not onnx.needed(moves, [port.name]) & made <= last]
        if kept:
            onnx.replace(graph.output, kept)

    def _declare(self, hidden: Hidden, name: str, batch: int | str) -> dict[str, Any]:
        """Add an input and an output for one state; the graph's tensors of it."""
        kind, own = onnx.helper.np_dtype_to_tensor_dtype(hidden.dtype), list(hidden.own)
        rows = batch if isinstance(batch, str) else batch // hidden.times
        for ports, end in ((self.model.graph.input, name), (self.model.graph.output, f"{name}.out")):
            ports.append(onnx.helper.make_tensor_value_info(end, kind, [rows, *own]))
        entry = {"input": name, "output": f"{name}.out", "dtype": hidden.dtype.name, "shape": own, "batch_axis": 0}
        return {**entry, "initial": hidden.initial}

    def _ways(self, hidden: Hidden, name: str) -> tuple[Any, Any]:
        """Nodes from the input to the recurrent node, which reads it from now on, and from there to the output."""
        node, port = hidden.stateful.node, hidden.port
        node.input.extend([""] * (port.input + 1 - len(node.input)))
        node.input[port.input] = f"{name}.given"
        ends = (name, f"{name}.given"), (node.output[port.output], f"{name}.out")
        kinds, values = ("Identity", "Identity"), list[list[int]]()
        if hidden.cell and hidden.times == 1 and onnx.opset(self.model) >= 13:
            kinds, values = ("Unsqueeze", "Squeeze"), [[0], [0]]
        elif hidden.cell or hidden.times > 1:
            kinds, values = ("Reshape", "Reshape"), [[*hidden.shape[: hidden.cell], -1, *hidden.row], [-1, *hidden.own]]
        shapes = [f"{name}.{number}" for number in range(len(values))]
        for label, value in zip(shapes, values, strict=True):
            self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), label))
        given = [[end, *shapes[number : number + 1]] for number, (end, _) in enumerate(ends)]
        enter, leave = (
            onnx.helper.make_node(kind, read, [made], name=f"{made}.{kind}")
            for kind, read, (_, made) in zip(kinds, given, ends, strict=True)
        )
        return enter, leave


def _prove(whole: Parts, lifted: Reading, time: str, fixed: int) -> None:
    """Raises ManifestError unless steps, each with the states that the last one gave, are what one call is.

    Args:
        whole: The graph as it was; it takes `fixed` steps, 0: any number.
        lifted: What was made of it.
        time: The axis of its inputs that are the steps.
    """
    states, lengths = [(s.input.name, s.output.name, s.known) for s in lifted.roles.states], lifted.roles.lengths
    parts = Parts(lifted.graph.model, lifted.known.get("constants", ()))
    outputs = [port.name for port in lifted.graph.ports[1] if port.name not in {output for _, output, _ in states}]
    steps, random = fixed or _STEPS, np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for name in parts.inputs.keys() - parts.constants.keys():
        value = parts.plain(name, {time: steps})
        feeds[name] = random.normal(size=value.shape).astype(value.dtype) if value.dtype.kind == "f" else value
    carried = {name: np.full_like(feeds.pop(name), known.get("initial", 0)) for name, _, known in states}
    if lengths is not None:
        feeds[lengths] = feeds[lengths] * steps
    want = Part(whole, outputs).run({}, {**feeds, **carried})
    one, made = Part(parts, [*outputs, *(output for _, output, _ in states)]), []
    for step in range(steps):
        now = {name: _cut(value, parts.inputs[name], Axis(time), step) for name, value in feeds.items()}
        if lengths is not None:
            now[lengths] = np.ones_like(feeds[lengths])
        found = one.run({}, {**now, **carried})
        made.append(found[: len(outputs)])
        carried = dict(zip(carried, found[len(outputs) :], strict=True))
    near = Tolerance.model_validate(lifted.known.get("tolerance", {}))
    sizes, _ = parts.sizes(outputs)
    for number, (name, size) in enumerate(zip(outputs, sizes, strict=True)):
        pieces = [found[number] for found in made]
        got = np.concatenate(pieces, size.index(Axis(time))) if Axis(time) in size else pieces[-1]
        if got.shape != want[number].shape or not np.allclose(got, want[number], near.rtol, near.atol):
            raise ManifestError(
                f"output {name!r} by single steps is not what it is in one call, although its nodes keep their states"
                ": something else in the graph looks at other steps. Export it with that as a state."
            )


def _cut(value: Array, sizes: Sizes, time: Axis, step: int) -> Array:
    """One step of a value that has steps."""
    return value.take([step], sizes.index(time)) if time in sizes else value


# --- nodes ------------------------------------------------------------------------------------------------------------


def _attributes(node: Any) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _input(node: Any, number: int) -> str:
    return str(node.input[number]) if number < len(node.input) else ""


def _name_outputs(stateful: Stateful) -> None:
    """Name the outputs that carry states, which most exporters leave out."""
    node = stateful.node
    base = next(filter(None, node.output))
    for port in stateful.ports:
        node.output.extend([""] * (port.output + 1 - len(node.output)))
        node.output[port.output] = node.output[port.output] or f"{base}.{port.key}.last"


def _key(stateful: Stateful) -> str:
    """What tells a node from all others: nodes need no names."""
    return str(stateful.node.output[stateful.ports[0].output])


def _layer_names(nodes: Sequence[Stateful]) -> dict[str, str]:
    """A layer's name for each node: what its exporter made of the module's name, else its kind and a number."""
    bases = {}
    for one in nodes:
        words = re.split(r"[/:.]+", re.sub(r"__\d+$", "", one.node.name).removeprefix("node_"))
        kept = [word for word in words if not _NOT_LAYERS.fullmatch(word)]
        if kept and re.fullmatch(rf"{one.node.op_type}(_\d+)?", kept[-1], re.IGNORECASE):
            kept.pop()
        bases[_key(one)] = ".".join(kept) or f"{one.node.op_type.lower()}_"
    count, seen = Counter(bases.values()), Counter[str]()
    names = {}
    for key, base in bases.items():
        numbered = count[base] > 1 or base.endswith("_")
        names[key] = f"{base.removesuffix('_')}_{seen[base]}" if numbered else base
        seen[base] += 1
    return names


def _told(sizes: Sizes) -> str:
    return str([size.name if isinstance(size, Axis) else size for size in sizes])
