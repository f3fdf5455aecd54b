"""Rewrites of a graph before it is described: each makes a graph that answers the same and can be served better."""

from collections.abc import Callable, Container, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from .axes import Found, found_layout, layout_fields
from .graphs import Graph
from .roles import Roles, roles_of


class Reading:
    """A graph with what is known of it, as a rewrite is given them; what it shows is read when first asked for."""

    def __init__(self, graph: Graph, known: Mapping[str, Any]) -> None:
        self.graph, self.known = graph, known

    @cached_property
    def roles(self) -> Roles:
        """What each tensor is, by the likeliest reading."""
        return roles_of(self.graph, self.known)

    @cached_property
    def found(self) -> Found:
        """How the tensors lie, by trying."""
        return found_layout(self.graph, self.roles, self.known)

    @property
    def layout(self) -> dict[str, Any]:
        """The same as fields of a manifest: see `layout_fields`."""
        return layout_fields(self.roles, self.known, self.found)


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
            reading = Reading(graph, _joined(reading.known, made.fields, {port.name for port in graph.ports[0]}))
            done.append(made.done)
    return reading, done


def _joined(known: Mapping[str, Any], fields: Mapping[str, Any], inputs: Container[str]) -> dict[str, Any]:
    """Known states and constants stay, unless their input is gone or a rewrite says something else of it."""
    lists = {}
    for name, key in (("states", "input"), ("constants", "name")):
        if name in known or name in fields:
            entries = {entry[key]: entry for entry in (*known.get(name, ()), *fields.get(name, ()))}
            lists[name] = [entry for input_name, entry in entries.items() if input_name in inputs]
    return {**known, **fields, **lists}
