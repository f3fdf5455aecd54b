"""Which tensor of a graph is what: data, a state with its next value, lengths, a constant."""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from stepcast.errors import ManifestError

from ..onnx_session import Port
from .graphs import Graph

_AFFIXES: Final = re.compile("(in|out)(put)?|prev(ious)?|past|present|next|new|old|cur(rent)?|init(ial)?|final|last")


class StatePorts(NamedTuple):
    """A state: the input that takes it, the output that gives its next value, and what is known of it already."""

    input: Port
    output: Port
    known: Mapping[str, Any]


class Roles(NamedTuple):
    """What each tensor of a graph is. `lengths` is the input's name, or None."""

    input: Port
    output: Port
    states: list[StatePorts]
    lengths: str | None


def roles_of(graph: Graph, known: Mapping[str, Any]) -> Roles:
    """Find out what each tensor of a graph is; `known` are fields of a manifest, which win over guesses.

    Raises:
        ManifestError: a name is not the graph's, or the graph can be read in more than one way.
    """
    return _Reading(*graph.ports, known).roles()


class _Reading:
    """Takes the tensors of a graph one after the other out of those that are free."""

    def __init__(self, inputs: list[Port], outputs: list[Port], known: Mapping[str, Any]) -> None:
        self.known = known
        self.free = {"input": {port.name: port for port in inputs}, "output": {port.name: port for port in outputs}}

    def roles(self) -> Roles:
        """What each is; those that are left over are refused."""
        known = self.known
        for constant in known.get("constants", ()):
            self._take("input", constant.get("name"), "$.constants")
        named = [side for side in self.free if "name" in known.get(side, {})]
        main = {side: self._take(side, known[side]["name"], f"$.{side}") for side in named}
        lengths, states = self._lengths(), self._states()
        x, y = (main.get(side) or self._main(side) for side in self.free)
        if self.free["input"]:
            raise ManifestError(
                f"inputs {', '.join(map(str, self.free['input'].values()))} are neither data nor state. Give "
                "$.constants with name, dtype, shape and values of each, or $.lengths (int32), or $.states."
            )
        return Roles(x, y, states, lengths)

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

    def _states(self) -> list[StatePorts]:
        """State inputs with their outputs: of the same type and shape, and of the same stem or the only ones."""
        if "states" in self.known:
            return [self._given(given, f"$.states[{n}]") for n, given in enumerate(self.known["states"])]
        pairs = self._continued(lambda port, result: stem(port.name) == stem(result.name) != "")
        if all(len(ports) > 1 for ports in self.free.values()):
            pairs += self._continued(lambda port, result: max(len(port.dynamic), len(result.dynamic)) <= 1)
        return [StatePorts(port, result, {}) for port, result in pairs]

    def _given(self, given: Mapping[str, Any], where: str) -> StatePorts:
        port, result = (self._take(side, given.get(side), f"{where}.{side}") for side in self.free)
        return StatePorts(port, result, given)

    def _continued(self, alike: Callable[[Port, Port], bool]) -> list[tuple[Port, Port]]:
        """Free inputs with the one output that continues each; these are free no more."""
        every = itertools.product(self.free["input"].values(), self.free["output"].values())
        pairs = [(port, result) for port, result in every if _fits(port, result) and alike(port, result)]
        for port, result in pairs:
            results = ", ".join(str(o) for i, o in pairs if i is port)
            if sum(i is port for i, _ in pairs) > 1 or sum(o is result for _, o in pairs) > 1:
                text = f"input {port} may be continued by any of the outputs {results}. Give $.states with layer, key, "
                raise ManifestError(f"{text}input and output of each.")
        for port, result in pairs:
            del self.free["input"][port.name], self.free["output"][result.name]
        return pairs

    def _main(self, side: str) -> Port:
        """The one free tensor that can carry the data."""
        floats = [port for port in self.free[side].values() if port.dtype == "float32" and port.shape]
        if len(floats) != 1:
            said = f"which {side} carries the data? {', '.join(map(str, floats)) or 'none is float32'}. "
            raise ManifestError(f"{said}Give $.{side}.name, and $.states for tensors that come back.")
        return self.free[side].pop(floats[0].name)


def stem(name: str) -> str:
    """What two names of one state have in common: `h_in` and `h_out`, `h0` and `hn`, `state` and `stateN` are alike."""
    words = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])N\b", "", name).replace("::", "_").lower())
    kept = [word for word in words if not _AFFIXES.fullmatch(word)]
    if len(kept) == len(words) > 1 and kept[-1] in ("0", "n", "1"):  # behind `in` or `out` a number is a layer's
        kept.pop()
    if kept and len(kept[-1]) == 2 and kept[-1][1] == "n":
        kept[-1] = kept[-1][0]
    return "_".join(kept)


def _fits(port: Port, result: Port) -> bool:
    """Whether an output can be the next value of an input: exporters often forget an output's fixed sizes."""
    if port.dtype != result.dtype or len(port.shape) != len(result.shape) or not port.shape:
        return False
    fixed = (pair for pair in zip(port.shape, result.shape, strict=True) if all(isinstance(size, int) for size in pair))
    return all(a == b for a, b in fixed)
