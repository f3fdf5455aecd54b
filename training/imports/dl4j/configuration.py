"""configuration.json as one chain of layers: a MultiLayerNetwork, or a ComputationGraph that is a chain."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from stepcast.errors import ManifestError

from .dialect import named
from .layers import Reading, Spec, read_layer

MOST_LAYERS: Final = 1000
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
OUTPUTS: Final = ("rnn_output", "rnn_loss")

# Preprocessors that only say where the time axis is: ours always have one.
INERT: Final = ("rnntofeedforward", "feedforwardtornn")
VERTICES: Final[dict[str, Spec]] = {
    "lasttimestep": {"kind": "last_time_step"},
    "duplicatetotimeseries": {"kind": "duplicate_to_time_series"},
    "reversetimeseries": {"kind": "reverse"},
}


@dataclass(frozen=True)
class Link:
    """One layer or vertex, and its parameters' place in the flat vector: behind those of the links before it.

    Attributes:
        name: As DL4J has it; "" if it has none.
        reading: What it becomes.
    """

    name: str
    reading: Reading


def read_configuration(content: bytes, name: str) -> list[Link]:
    """Read a configuration.

    Args:
        content: Of configuration.json.
        name: For messages.

    Returns:
        The layers in the order of the data, which is that of the parameters too.

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


def specs_of(links: list[Link]) -> list[Spec]:
    """The `network:` list: names kept where they are legal and free, an output layer of no weights where none is."""
    specs: list[Spec] = []
    taken = {"observed"}
    for link in links:
        for number, spec in enumerate(link.reading.specs):
            name = re.sub(r"[^A-Za-z0-9_]", "_", link.name)
            if number == 0 and _NAME.fullmatch(name) and name not in taken:
                taken.add(name)
                spec = {**spec, "name": name}
            specs.append(spec)
    if specs[-1]["kind"] not in OUTPUTS:  # the network's answer is its last layer's
        specs.append({"kind": "rnn_loss", "activation": "identity"})
    return specs


def _objects(value: Any, where: str, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise ManifestError(f"{where}: is no {'list' if kind is list else 'object'}")
    if len(value) > MOST_LAYERS:
        raise ManifestError(f"{where}: has {len(value)} entries, at most {MOST_LAYERS} are read")
    return value


def _chain(tree: Mapping[str, Any], name: str) -> Iterator[Link]:
    """The layers of a MultiLayerNetwork."""
    preprocessors = _objects(tree.get("inputPreProcessors") or {}, f"{name}: inputPreProcessors", dict)
    for number, held in enumerate(_objects(tree["confs"], f"{name}: confs", list)):
        where = f"{name}: confs[{number}].layer"
        _check_preprocessor(preprocessors.get(str(number)), f"{name}: inputPreProcessors.{number}")
        yield _layer(_objects(held, f"{name}: confs[{number}]", dict).get("layer"), where)


def _layer(value: Any, where: str) -> Link:
    layer = named(value, where, ("layer",))
    name = layer.text("layerName", "") if layer.fields.get("layerName") else ""
    return Link(name, read_layer(layer))


def _check_preprocessor(value: Any, where: str) -> None:
    found = named(value, where, ("preprocessor",))
    if found.kind and found.kind not in INERT:
        raise ManifestError(f"{where}: is {found.told!r}, which Stepcast does not import. It reads {', '.join(INERT)}.")


def _graph(tree: Mapping[str, Any], name: str) -> Iterator[Link]:
    """The vertices of a ComputationGraph that is a chain, from its input."""
    vertices = _objects(tree["vertices"], f"{name}: vertices", dict)
    inputs = _objects(tree.get("vertexInputs"), f"{name}: vertexInputs", dict)
    begin = _objects(tree.get("networkInputs"), f"{name}: networkInputs", list)
    ends = _objects(tree.get("networkOutputs"), f"{name}: networkOutputs", list)
    if not all(isinstance(end, str) for end in (*begin, *ends)):
        raise ManifestError(f"{name}: networkInputs and networkOutputs are not names")
    if len(begin) != 1 or len(ends) != 1:
        raise ManifestError(f"{name}: has {len(begin)} inputs and {len(ends)} outputs. One of each is imported.")
    follows: dict[str, str] = {}
    for vertex in vertices:
        sources = _objects(inputs.get(vertex), f"{name}: vertexInputs.{vertex}", list)
        if len(sources) != 1 or not isinstance(sources[0], str):
            raise ManifestError(f"{name}: vertex {vertex!r} has {len(sources)} inputs. Chains are imported.")
        if sources[0] in follows:
            branches = f"{follows[sources[0]]!r} and {vertex!r}"
            raise ManifestError(f"{name}: {branches} both follow {sources[0]!r}. Chains are imported.")
        follows[sources[0]] = vertex
    at, seen = begin[0], 0
    while at in follows and seen < len(vertices):
        at, seen = follows[at], seen + 1
        yield _vertex(vertices[at], f"{name}: vertices.{at}", at)
    if at != ends[0] or seen != len(vertices):
        raise ManifestError(f"{name}: the chain from {begin[0]!r} ends at {at!r}, the output is {ends[0]!r}")


def _vertex(value: Any, where: str, told: str) -> Link:
    vertex = named(value, where, ("vertex",))
    if vertex.kind == "layer":
        _check_preprocessor(vertex.fields.get("preProcessor"), f"{where}.preProcessor")
        held = _objects(vertex.fields.get("layerConf"), f"{where}.layerConf", dict)
        return replace(_layer(held.get("layer"), f"{where}.layerConf.layer"), name=told)
    if vertex.kind == "merge":  # of one input: nothing
        return Link(told, Reading(()))
    if vertex.kind == "preprocessor":
        _check_preprocessor(vertex.fields.get("preProcessor"), f"{where}.preProcessor")
        return Link(told, Reading(()))
    if (spec := VERTICES.get(vertex.kind)) is None:
        known = ", ".join(("layer", "merge", "preprocessor", *VERTICES))
        raise ManifestError(f"{where}: is {vertex.told!r}, which Stepcast does not import. It reads {known}.")
    return Link(told, Reading((spec,)))
