"""Rewrites of a graph before it is described: each makes a graph that answers the same and can be served better."""

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from .questions import joined
from .reading import Reading


class Rewritten(NamedTuple):
    """What a rewrite made.

    Attributes:
        model: onnx's ModelProto.
        done: A sentence of what was done; the manifest's provenance keeps it.
        fields: Fields of the manifest that are known by it; states and constants come to those that are known already.
    """

    model: Any
    done: str
    fields: Mapping[str, Any] = {}


Rewrite: TypeAlias = Callable[[Reading], Rewritten | None]


def rewritten(reading: Reading, rewrites: Iterable[Rewrite]) -> tuple[Reading, list[str]]:
    """The reading of a graph after these rewrites, in order, and what each of them did.

    Each is given a reading of the graph that those before it left; it gives None if there is nothing to do.
    """
    done: list[str] = []
    for rewrite in rewrites:
        made = rewrite(reading)
        if made is not None:
            graph = reading.graph.rewritten(made.model)
            known = joined(reading.known, made.fields)
            reading = Reading(graph, _remaining(known, {port.name for port in graph.ports[0]}))
            done.append(made.done)
    return reading, done


def _remaining(known: dict[str, Any], inputs: Container[str]) -> dict[str, Any]:
    """What is known of inputs that are still there."""
    keys = {"states": "input", "constants": "name"}
    lists = {name: [e for e in known[name] if e[key] in inputs] for name, key in keys.items() if name in known}
    return {**known, **lists}
