"""Rewrites of a graph before it is described: each makes a graph that answers the same and can be served better."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeAlias

from .graphs import Graph
from .questions import joined
from .roles import Roles, roles_of


class Reading:
    """A graph with what is known of it, as a rewrite is given them. `roles` are read when first asked for."""

    def __init__(self, graph: Graph, known: Mapping[str, Any]) -> None:
        self.graph, self.known = graph, known

    @cached_property
    def roles(self) -> Roles:
        """What each tensor is, by the likeliest reading."""
        return roles_of(self.graph, self.known)


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

REWRITES: Final[tuple[Rewrite, ...]] = ()
"""In this order. Each is given a reading of the graph that those before it left; None: there is nothing to do."""


def rewritten(reading: Reading) -> tuple[Reading, list[str]]:
    """The reading of a graph after all rewrites, and what each of them did."""
    done: list[str] = []
    for rewrite in REWRITES:
        made = rewrite(reading)
        if made is not None:
            reading = Reading(reading.graph.rewritten(made.model), joined(reading.known, made.fields))
            done.append(made.done)
    return reading, done
