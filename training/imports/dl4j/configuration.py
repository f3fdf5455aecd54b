"""configuration.json as layers in the order of their parameters: a MultiLayerNetwork, or a ComputationGraph.

A graph has one input and one output; between them it may branch and merge.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stepcast.errors import ManifestError

from .dialect import Named, named
from .layers import Reading, Spec, read_layer

MOST_LAYERS: Final = 1000
INPUT: Final = "observed"  # what a recipe calls the network's input
OUTPUTS: Final = ("rnn_output", "rnn_loss")
LAYER: Final = ("layer",)  # what every layer's class has in its name
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")

# Preprocessors that only say where the time axis is: ours always have one.
INERT: Final = ("rnntofeedforward", "feedforwardtornn")
OPERATIONS: Final = {
    "add": "add",
    "subtract": "subtract",
    "product": "mul",
    "average": "average",
    "max": "max",
    "min": "min",
}


@dataclass(frozen=True)
class Link:
    """One layer or vertex, and its parameters' place in the flat vector: behind those of the links before it.

    Attributes:
        name: As DL4J has it; "" if it has none.
        key: What other links call it.
        sources: Keys of what it reads.
        reading: What it becomes.
    """

    name: str
    key: str
    sources: tuple[str, ...]
    reading: Reading


def read_configuration(content: bytes, name: str) -> list[Link]:
    """Read a configuration.

    Args:
        content: Of configuration.json.
        name: For messages.

    Returns:
        The layers, each behind those that it reads, in the order of their parameters.

    Raises:
        ManifestError: no JSON, no network, or one that Stepcast has no layers for.
    """
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{name}: is no JSON ({error})") from error
    if not isinstance(tree, dict):
        raise ManifestError(f"{name}: is no object")
    if "confs" in tree:
        links = list(_chain(tree, name))
    elif "vertices" in tree:
        links = list(_graph(tree, name))
    else:
        raise ManifestError(f"{name}: has neither 'confs' (MultiLayerNetwork) nor 'vertices' (ComputationGraph)")
    if not any(link.reading.specs for link in links):
        raise ManifestError(f"{name}: has no layer")
    return links


def specs_of(links: Sequence[Link]) -> list[Spec]:
    """The `network:` list: names kept where they are legal and free, `from` where it is not the layer before.

    A network without an output layer gets one of no weights.
    """
    specs: list[Spec] = []
    called, before = {INPUT: INPUT}, INPUT  # by link: what `from` calls its last layer
    taken = {INPUT}
    for link in links:
        sources = [called[source] for source in link.sources]
        called[link.key] = sources[0]  # of one that does nothing
        for number, spec in enumerate(link.reading.specs):
            name = _name(link, number, taken)
            taken.add(name)
            wired = {"from": sources} if number == 0 and sources != [before] else {}
            specs.append({**spec, **({"name": name} if link.name else {}), **wired})
            called[link.key] = before = name
    if specs[-1]["kind"] not in OUTPUTS:  # the network's answer is its last layer's
        specs.append({"kind": "rnn_loss", "activation": "identity"})
    return specs


def _name(link: Link, number: int, taken: set[str]) -> str:
    """DL4J's name if it is legal and free, with its number if the link becomes several layers."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", link.name or link.key)
    name = (name if _NAME.fullmatch(name) else f"layer_{name}")[:56] + (f"_{number}" if number else "")
    return next(each for each in (name, *(f"{name}_{n}" for n in range(2, len(taken) + 3))) if each not in taken)


def _objects(value: Any, where: str, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise ManifestError(f"{where}: is no {'list' if kind is list else 'object'}")
    if len(value) > MOST_LAYERS:
        raise ManifestError(f"{where}: has {len(value)} entries, at most {MOST_LAYERS} are read")
    return value


def _chain(tree: Mapping[str, Any], name: str) -> Iterator[Link]:
    """The layers of a MultiLayerNetwork."""
    preprocessors = _objects(tree.get("inputPreProcessors") or {}, f"{name}: inputPreProcessors", dict)
    before = INPUT
    for number, held in enumerate(_objects(tree["confs"], f"{name}: confs", list)):
        key = str(number)
        _check_preprocessor(preprocessors.get(key), f"{name}: inputPreProcessors.{key}")
        layer = named(_objects(held, f"{name}: confs[{key}]", dict).get("layer"), f"{name}: confs[{key}].layer", LAYER)
        told = layer.text("layerName", "") if layer.fields.get("layerName") else ""
        yield Link(told, key, (before,), read_layer(layer))
        before = key


def _check_preprocessor(value: Any, where: str) -> None:
    found = named(value, where, ("preprocessor",))
    if found.kind and found.kind not in INERT:
        raise ManifestError(f"{where}: is {found.told!r}, which Stepcast does not import. It reads {', '.join(INERT)}.")


def _graph(tree: Mapping[str, Any], name: str) -> Iterator[Link]:
    """The vertices of a ComputationGraph, the output last."""
    vertices = _objects(tree["vertices"], f"{name}: vertices", dict)
    begin, ends = (_names(tree.get(key), f"{name}: {key}") for key in ("networkInputs", "networkOutputs"))
    if len(begin) != 1 or len(ends) != 1:
        raise ManifestError(f"{name}: has {len(begin)} inputs and {len(ends)} outputs. One of each is imported.")
    told = _objects(tree.get("vertexInputs"), f"{name}: vertexInputs", dict)
    inputs = {vertex: _names(told.get(vertex), f"{name}: vertexInputs.{vertex}") for vertex in vertices}
    for vertex, sources in inputs.items():
        if lost := [source for source in sources if source not in vertices and source != begin[0]]:
            raise ManifestError(f"{name}: vertex {vertex!r} reads {lost[0]!r}, which is not there")
    order = _order(tree, begin[0], inputs, name)
    if order[-1:] != ends:
        raise ManifestError(f"{name}: vertex {order[-1]!r} does not lead to the output {ends[0]!r}")
    for vertex in order:
        read = tuple(INPUT if source == begin[0] else source for source in inputs[vertex])
        yield Link(vertex, vertex, read, _vertex(vertices[vertex], f"{name}: vertices.{vertex}", len(read)))


def _names(value: Any, where: str) -> list[str]:
    names = _objects(value, where, list)
    if not names or not all(isinstance(one, str) for one in names):
        raise ManifestError(f"{where}: is no list of names")
    return [str(one) for one in names]


def _order(tree: Mapping[str, Any], begin: str, inputs: Mapping[str, list[str]], name: str) -> list[str]:
    """Vertices in the order of their parameters: the one that is stored, else the one that DL4J finds.

    It takes away, first come first served, what waits for nothing; those that one vertex sets free in the order of
    the configuration.
    """
    if tree.get("topologicalOrderStr") is not None:
        stored = _names(tree["topologicalOrderStr"], f"{name}: topologicalOrderStr")
        order = [vertex for vertex in stored if vertex != begin]
        behind = {vertex: set(order[:at]) | {begin} for at, vertex in enumerate(order)}
        if sorted(order) != sorted(inputs) or any(set(inputs[v]) - behind[v] for v in order):
            raise ManifestError(f"{name}: topologicalOrderStr is no order of its vertices")
        return order
    waits = {vertex: set(sources) for vertex, sources in inputs.items()}
    order = [begin]
    for done in order:  # grows
        for vertex, sources in waits.items():
            if done in sources:
                sources.discard(done)
                if not sources:
                    order.append(vertex)
    if len(order) <= len(inputs):
        raise ManifestError(f"{name}: vertices wait for each other: {', '.join(sorted(set(inputs) - set(order)))}")
    return order[1:]


def _vertex(value: Any, where: str, inputs: int) -> Reading:
    """What a vertex with a number of inputs becomes."""
    vertex = named(value, where, ("vertex",))
    if vertex.kind == "layer":
        _check_preprocessor(vertex.fields.get("preProcessor"), f"{where}.preProcessor")
        held = _objects(vertex.fields.get("layerConf"), f"{where}.layerConf", dict)
        return read_layer(named(held.get("layer"), f"{where}.layerConf.layer", LAYER))
    if vertex.kind == "preprocessor":
        _check_preprocessor(vertex.fields.get("preProcessor"), f"{where}.preProcessor")
        return Reading(())
    if vertex.kind == "merge" and inputs == 1:
        return Reading(())
    if vertex.kind not in _VERTICES:
        known = ", ".join(("layer", "preprocessor", *_VERTICES))
        raise ManifestError(f"{where}: is {vertex.told!r}, which Stepcast does not import. It reads {known}.")
    return Reading((_VERTICES[vertex.kind](vertex),))


def _merge(vertex: Named) -> Spec:
    if vertex.number("mergeAxis", 1.0) != 1:
        raise ManifestError(f"{vertex.where}.mergeAxis: Stepcast merges values, which are axis 1")
    return {"kind": "merge"}


def _elementwise(vertex: Named) -> Spec:
    operation = vertex.text("op", "").lower()
    if operation not in OPERATIONS:
        raise ManifestError(f"{vertex.where}.op: is {vertex.fields.get('op')!r}, known are {', '.join(OPERATIONS)}")
    return {"kind": OPERATIONS[operation]}


def _subset(vertex: Named) -> Spec:
    first, last = (vertex.number(key, -1.0) for key in ("from", "to"))
    if not 0 <= first <= last or first % 1 or last % 1:
        raise ManifestError(f"{vertex.where}: takes values {first:g} to {last:g}, wanted whole numbers in this order")
    return {"kind": "subset", "first": int(first), "last": int(last)}


_VERTICES: Final[dict[str, Callable[[Named], Spec]]] = {
    "merge": _merge,
    "elementwise": _elementwise,
    "subset": _subset,
    "scale": lambda vertex: {"kind": "scale", "factor": vertex.number("scaleFactor", 1.0)},
    "shift": lambda vertex: {"kind": "shift", "amount": vertex.number("shiftFactor", 0.0)},
    "lasttimestep": lambda vertex: {"kind": "last_time_step"},
    "duplicatetotimeseries": lambda vertex: {"kind": "duplicate_to_time_series"},
    "reversetimeseries": lambda vertex: {"kind": "reverse"},
}
