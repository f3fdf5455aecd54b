"""Which tensor of a graph is what: data, a state with its next value, lengths, a constant.

The evidence, the strongest first. A pair is taken where it is the only one of its input and of its output:

1. names that are alike but for words such as `in` and `next`, numbers of layers included (names.py);
2. an input that starts a node's state, and the output that brings that node's next state (flow.py);
3. names that are alike but for a number that one of them lacks;
4. an output to which the input is carried, moved, scaled and added to: c in an LSTM, h in a GRU, a cache.

Nodes win over names: an exporter can be given output names in the wrong order. A tensor whose name speaks of data is
never a state by its name or shape, and one input and one output remain for the data. What is left is paired by the
fewest matrix products in between; where several pairings are equally likely, the proof decides, or the user.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeAlias

from stepcast.errors import ManifestError
from stepcast.manifest import ITEM_BYTES

from ..onnx_session import Port
from .flow import Flow
from .graphs import Graph
from .names import Likeness, is_beside, is_data, is_length, is_reset, is_state, likeness
from .questions import Question

_TRIED: Final = 5  # states that are paired by trying all ways
_MOST: Final = 2**28  # numbers in a tensor: what is tried must be in memory several times
_FLOATS: Final = ("float32", "float64", "float16")

JOIN: Final = ","  # between the names of inputs that are joined

Pairs: TypeAlias = list[tuple[Port, Port]]


class StatePorts(NamedTuple):
    """A state: the input that takes it, the output that gives its next value, and what is known of it already."""

    input: Port
    output: Port
    known: Mapping[str, Any]


class Roles(NamedTuple):
    """What each tensor of a graph is, by the likeliest reading.

    Attributes:
        lengths: The name of the input of valid steps per row, or None.
        questions: What the graph does not say.
        others: Other pairings of the states, as likely as `states`: a proof must tell.
    """

    input: Port
    output: Port
    states: list[StatePorts]
    lengths: str | None
    questions: Sequence[Question] = ()
    others: Sequence[list[StatePorts]] = ()

    @property
    def pairing(self) -> Question:
        """Asks how those states go on that the other readings pair differently."""
        open_pairs = [(s.input, s.output) for s in self.states if not all(s in other for other in self.others)]
        return _pairing_question(open_pairs)


def roles_of(graph: Graph, known: Mapping[str, Any]) -> Roles:
    """Find out what each tensor of a graph is; `known` are fields of a manifest, which win over guesses.

    Raises:
        ManifestError: a known name is not the graph's, or the graph has no tensor that can be its data.
    """
    return _Roles(graph, known).roles()


class _Roles:
    """Takes the tensors of a graph one after the other out of those that are free."""

    def __init__(self, graph: Graph, known: Mapping[str, Any]) -> None:
        self.graph, self.known = graph, known
        self.sides = {
            side: {p.name: p for p in ports} for side, ports in zip(("input", "output"), graph.ports, strict=True)
        }
        self.free = {side: dict(ports) for side, ports in self.sides.items()}
        self.questions: list[Question] = []
        self.data: dict[str, Port] = {}

    @cached_property
    def flow(self) -> Flow:
        """Read when names do not say it all."""
        return Flow(self.graph.model)

    def roles(self) -> Roles:
        """What each is."""
        self._refuse_what_no_row_has()
        for constant in self.known.get("constants", ()):
            self._take("input", constant.get("name"), "$.constants")
        for side in self.free:
            if "name" in self.known.get(side, {}):
                self.data[side] = self._take(side, self.known[side]["name"], f"$.{side}")
        lengths = self._lengths()
        pairs, given = self._given_states()
        for alike in (self._named, self._held, self._nearly_named, self._carried):
            pairs += self._continued(alike)
        self.data.setdefault("input", self._data_input())
        self.free["input"].pop(self.data["input"].name, None)
        readings = self._matched()
        pairs += readings[0]
        for port, result in readings[0]:
            del self.free["input"][port.name], self.free["output"][result.name]
        self._ask_for_the_rest()
        if "output" not in self.data:
            self.data["output"] = self._data_output()
        order = list(self.sides["input"])

        def states(every: Pairs) -> list[StatePorts]:
            inputs = sorted(every, key=lambda pair: order.index(pair[0].name))
            return [StatePorts(port, result, given.get(port.name, {})) for port, result in inputs]

        others = [states(pairs[: len(pairs) - len(reading)] + reading) for reading in readings[1:]]
        return Roles(self.data["input"], self.data["output"], states(pairs), lengths, self.questions, others)

    def _refuse_what_no_row_has(self) -> None:
        for side, ports in self.sides.items():
            if not ports:
                raise ManifestError(f"{self.graph.file}: the graph has no {side}s")
            for port in ports.values():
                numbers = math.prod(size for size in port.shape if isinstance(size, int))
                if numbers > _MOST:
                    raise ManifestError(f"{self.graph.file}: {side} {port} has {numbers} numbers, the limit is {_MOST}")
                if side == "input" and port.dtype not in ITEM_BYTES:
                    raise ManifestError(f"{self.graph.file}: input {port}: no session can hold or send this type")

    def _take(self, side: str, name: Any, where: str) -> Port:
        free = self.free[side]
        if name not in free:
            raise ManifestError(f"{where}: the graph has no free tensor {name!r}, it has {sorted(free)}")
        return free.pop(name)

    def _lengths(self) -> str | None:
        name = self.known.get("lengths")
        if "lengths" not in self.known:
            ports = [port for port in self.free["input"].values() if port.dtype == "int32" and len(port.shape) == 1]
            found = [port.name for port in ports if "len" in port.name.lower()]
            name = found[0] if len(found) == 1 else None
        return None if name is None else self._take("input", name, "$.lengths").name

    def _given_states(self) -> tuple[Pairs, dict[str, Mapping[str, Any]]]:
        """States that are known with their outputs; and what is known of each, by its input."""
        pairs: Pairs = []
        for number, state in enumerate(self.known.get("states", ())):
            where = f"$.states[{number}]"
            if "output" in state:
                port = self._take("input", state.get("input"), f"{where}.input")
                pairs.append((port, self._take("output", state["output"], f"{where}.output")))
            elif state.get("input") not in self.free["input"]:
                self._take("input", state.get("input"), f"{where}.input")
        return pairs, {state["input"]: state for state in self.known.get("states", ())}

    # --- pairs of which one kind of evidence is sure

    def _named(self, port: Port, result: Port) -> bool:
        return likeness(port.name, result.name) is Likeness.FULL and self._may_be_named(port, result)

    def _nearly_named(self, port: Port, result: Port) -> bool:
        alike = likeness(port.name, result.name) > Likeness.NONE and self._may_be_named(port, result)
        return alike and not is_length(port.name)

    def _may_be_named(self, port: Port, result: Port) -> bool:
        """Whether neither tensor is called data, and the graph's nodes do not say otherwise."""
        starts, brings = self.flow.takes(port.name), self.flow.gives(result.name)
        return not (is_data(port.name) and is_data(result.name)) and (starts == brings or not starts or not brings)

    def _held(self, port: Port, result: Port) -> bool:
        starts = self.flow.takes(port.name)
        return bool(starts) and starts == self.flow.gives(result.name)

    def _carried(self, port: Port, result: Port) -> bool:
        way = self.flow.way(port.name, result.name)
        is_named = any(speaks(p.name) for p in (port, result) for speaks in (is_data, is_length))
        return way is not None and way.carried and not is_named

    def _continued(self, alike: Callable[[Port, Port], bool]) -> Pairs:
        """Free inputs with the one output that continues each; these are free no more."""
        every = itertools.product(self.free["input"].values(), self.free["output"].values())
        found = [(port, result) for port, result in every if _fits(port, result) and alike(port, result)]
        pairs = [pair for pair in found if self._only(pair, found)]
        if not self._data_remains(pairs):
            return []
        for port, result in pairs:
            del self.free["input"][port.name], self.free["output"][result.name]
        return pairs

    def _only(self, pair: tuple[Port, Port], found: Pairs) -> bool:
        """Whether a pair is the only one of its input and output; of copies of one tensor the last is the state."""
        port, result = pair
        results = [o for i, o in found if i is port]
        if len({self.flow.original(o.name) for o in results}) == 1 and result is not results[-1]:
            return False
        copies = {self.flow.original(o.name) for o in results} == {self.flow.original(result.name)}
        return copies and sum(o is result for _, o in found) == 1

    def _data_remains(self, pairs: Pairs) -> bool:
        """Whether an input and an output that can be data are left when these pairs are taken."""
        for at, (side, ports) in enumerate(self.free.items()):
            taken = [pair[at].name for pair in pairs]
            if side not in self.data and all(name in taken or not _is_array(p) for name, p in ports.items()):
                return False
        return True

    # --- what is left

    def _data_input(self) -> Port:
        """The one free input that can carry the data."""
        if "input" in self.data:
            return self.data["input"]
        ports = [port for port in self.free["input"].values() if _is_array(port)]
        floats = [port for port in ports if port.dtype in _FLOATS]
        ports = floats or ports
        ports = [port for port in ports if not is_reset(port.name)] or ports
        if not ports:
            every = ", ".join(map(str, self.sides["input"].values()))
            raise ManifestError(f"{self.graph.file}: none of the inputs {every} can carry data")
        if len(ports) == 1:
            return ports[0]
        for is_it in (self._is_called_data, self._cannot_be_a_state, lambda port: len(port.dynamic) > 1):
            found = [port for port in ports if is_it(port)]
            if len(found) == 1:
                return found[0]
        likely = [port for port in ports if not is_state(port.name)] or ports
        self._ask_which("input", ports, likely[0])
        return likely[0]

    def _data_output(self) -> Port:
        """The one free output that can carry the data."""
        ports = [port for port in self.free["output"].values() if port.dtype in ITEM_BYTES]
        called = [port for port in ports if self._is_called_data(port) and not is_beside(port.name)]
        if len(called) == 1:  # an action may be a number of int64, its value is a float
            return called[0]
        ports = [port for port in ports if port.dtype in _FLOATS] or ports
        if not ports:
            every = ", ".join(map(str, self.sides["output"].values()))
            raise ManifestError(f"{self.graph.file}: no output is left for the answer: {every}")
        ports = [port for port in ports if not is_beside(port.name)] or ports
        found = [port for port in ports if self._is_called_data(port)] if len(ports) > 1 else ports
        if len(found) != 1:
            self._ask_which("output", ports, (found or ports)[0])
        return (found or ports)[0]

    def _is_called_data(self, port: Port) -> bool:
        return is_data(port.name)

    def _cannot_be_a_state(self, port: Port) -> bool:
        return not any(_fits(port, result) for result in self.free["output"].values())

    def _ask_which(self, side: str, ports: Iterable[Port], likely: Port) -> None:
        text = f"which {side} carries the data? It may be {', '.join(map(str, ports))}."
        self.questions.append(Question(text, [f"--{side} {likely.name}"], {side: {"name": likely.name}}))

    def _matched(self) -> list[Pairs]:
        """Pairings of all free inputs that can be states, by the fewest products on their ways; the best, all alike."""
        outputs = [port for port in self.free["output"].values() if not is_data(port.name)]
        states = [port for port in self.free["input"].values() if self._ways(port, outputs)]
        if "output" not in self.data and len(self.free["output"]) <= len(states):  # one is left for the answer
            states = [port for port in states if not self._may_be_joined(port)]
        if not states or len(states) > _TRIED:
            return [self._in_order(states, outputs)]
        ranked: list[tuple[tuple[int, ...], Pairs]] = []
        for results in itertools.product(*(self._ways(port, outputs) for port in states)):
            if len({result.name for result, _ in results}) == len(results):
                rank = tuple(map(sum, zip(*(way for _, way in results), strict=True)))
                ranked.append((rank, [(port, result) for port, (result, _) in zip(states, results, strict=True)]))
        best = min((rank for rank, _ in ranked), default=None)
        equal = [pairs for rank, pairs in ranked if rank == best] or [[]]
        taken = [{result.name for _, result in pairs} for pairs in equal]
        first = {id(pairs): [port.name in names for port in outputs] for pairs, names in zip(equal, taken, strict=True)}
        return sorted(equal, key=lambda pairs: first[id(pairs)])  # the data is rather the first output than the last

    def _ways(self, port: Port, outputs: Iterable[Port]) -> list[tuple[Port, tuple[int, ...]]]:
        """The outputs that may continue an input, and how unlikely each is: its shape, its way's products, carried."""
        if not _has_values(port) or is_length(port.name) or is_reset(port.name):
            return []
        ways = [(result, self.flow.way(port.name, result.name)) for result in outputs if _fits(port, result)]
        return [(result, (_oddness(port, result), way.products, not way.carried)) for result, way in ways if way]

    def _in_order(self, states: list[Port], outputs: list[Port]) -> Pairs:
        """Many states of which nothing says how they go on: in order, and asked."""
        pairs: Pairs = []
        for port in states:
            rest = [result for result, _ in self._ways(port, outputs) if result not in [o for _, o in pairs]]
            if rest:
                pairs.append((port, rest[0]))
        if pairs:
            self.questions.append(_pairing_question(pairs))
        return pairs

    def _ask_for_the_rest(self) -> None:
        """Inputs that nothing explains: more data to be joined, constants; what is likely is suggested, never set."""
        more = [port for port in self.free["input"].values() if self._may_be_joined(port)]
        if more:
            order = list(self.sides["input"])
            parts = sorted([self.data["input"], *more], key=lambda port: order.index(port.name))
            text = f"do the inputs {', '.join(map(str, parts))} all carry data of a step? Nothing else explains "
            text += "them. --input joins them, in this order; or give --input one of them, --constant the others."
            names = JOIN.join(port.name for port in parts)
            self.questions = [question for question in self.questions if "input" not in question.fields]
            self.questions.append(Question(text, [f"--input {names}"], {"input": {"name": names}}))
        for port in self.free["input"].values():
            if port not in more:
                self.questions.append(self._constant(port))

    def _may_be_joined(self, port: Port) -> bool:
        """Whether a free input may carry data beside the others."""
        kind = port.dtype in _FLOATS or is_data(port.name)
        spoken = is_state(port.name) or is_reset(port.name) or is_length(port.name)
        return kind and _has_values(port) and not spoken and port.dtype != "bool"

    def _constant(self, port: Port) -> Question:
        """Asks for the value of an input: one that the graph compares it with, or 0 for a flag that begins anew."""
        values = self.flow.compared_with(port.name)
        likely = values[:1] or [0.0] * is_reset(port.name)
        dims = [size if isinstance(size, int) else 1 for size in port.shape]
        fields = {"name": port.name, "dtype": port.dtype, "shape": dims, "values": likely or None}
        fits = any(_fits(port, result) for result in self.sides["output"].values())
        text = f"what is input {port}? It is not the data, and "
        text += "no output is surely its next value." if fits else "no output can be its next value."
        text += f" The graph compares it with {', '.join(f'{value:g}' for value in values)}." if values else ""
        text += " A session that begins anew is a new or a cleared one here." if is_reset(port.name) else ""
        text += " It is rather how many steps of a chunk are valid." if is_length(port.name) else ""
        answer = f"--constant {port.name}={f'{likely[0]:g}' if likely else 'VALUE'}"
        return Question(text, [answer], {"constants": [fields]}, bool(likely))


def _is_array(port: Port) -> bool:
    """Whether it can have rows."""
    return bool(port.shape) and port.dtype in ITEM_BYTES


def _has_values(port: Port) -> bool:
    """Whether it may differ from row to row: a single number of no dynamic axis is rather a constant for all."""
    return _is_array(port) and (bool(port.dynamic) or math.prod(s for s in port.shape if isinstance(s, int)) > 1)


def _fits(port: Port, result: Port) -> bool:
    """Whether an output can be the next value of an input: exporters often forget an output's fixed sizes."""
    if port.dtype != result.dtype or len(port.shape) != len(result.shape) or not port.shape:
        return False
    fixed = (pair for pair in zip(port.shape, result.shape, strict=True) if all(isinstance(size, int) for size in pair))
    return all(a == b for a, b in fixed)


def _pairing_question(pairs: Pairs) -> Question:
    """Asks how states go on, of which nothing says more than their order."""
    inputs, outputs = (", ".join(str(pair[at]) for pair in pairs) for at in (0, 1))
    text = f"which output continues which of the inputs {inputs}? Nothing tells apart {outputs}."
    options = [f"--state {port.name}:{result.name}" for port, result in pairs]
    fields = [{"input": port.name, "output": result.name} for port, result in pairs]
    return Question(text, options, {"states": fields})


def _oddness(port: Port, result: Port) -> int:
    """How many sizes of an output are fixed that its input leaves open: an output with the example's is rather data."""
    pairs = zip(port.shape, result.shape, strict=True)
    return sum(isinstance(after, int) and not isinstance(before, int) for before, after in pairs)
