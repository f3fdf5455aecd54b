"""A graph with what is known of it: what each tensor is, and how it lies."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from stepcast.errors import ManifestError

from .axes import Found, found_layout, layout_fields
from .graphs import Graph
from .questions import OpenQuestions, Question, Unclear, joined
from .roles import Roles, StatePorts, roles_of


class Reading:
    """A graph with what is known of it, as a rewrite is given them; what it shows is read when first asked for.

    A known constant needs no type and no shape, as the graph has them, and one value may stand for all.
    """

    def __init__(self, graph: Graph, known: Mapping[str, Any]) -> None:
        self.graph = graph
        self.known = {**known, "constants": constants} if (constants := _completed(known, graph)) else known

    @cached_property
    def roles(self) -> Roles:
        """What each tensor is, by the likeliest reading."""
        return roles_of(self.graph, self.known)

    @cached_property
    def found(self) -> Found:
        """How the tensors lie, by trying.

        Raises:
            OpenQuestions: it is not sure what each tensor is.
            ManifestError: no reading is right, or more than one.
        """
        if self.roles.questions:
            raise self.asking([*self.roles.questions, *self._pairing(), *self._further()])
        try:
            return found_layout(self.graph, self.roles, self.known)
        except Unclear as error:
            raise self.asking([error.question]) from error

    @property
    def layout(self) -> dict[str, Any]:
        """The same as fields of a manifest: see `layout_fields`."""
        return layout_fields(self.roles, self.known, self.found)

    def settled(self) -> dict[str, Any]:
        """What is known, with the roles that were found: a graph that is made of this one is read in the same way.

        Raises:
            OpenQuestions: it is not sure what each tensor is.
        """
        roles, known = self.roles, self.known
        if roles.questions:
            raise self.asking([*roles.questions, *self._pairing()])
        main = {side: {**known.get(side, {}), "name": getattr(roles, side).name} for side in ("input", "output")}
        states = [{**given, "input": port.name, "output": result.name} for port, result, given in roles.states]
        return {**known, **main, "lengths": roles.lengths, "states": states}

    def pairings(self) -> list["Reading"]:
        """Readings with all pairings of the states that are equally likely; this one if there is but one."""
        return [self, *(self._paired(states) for states in self.roles.others)] if self.roles.others else [self]

    def asking(self, questions: Sequence[Question]) -> OpenQuestions:
        """The error that asks these, with a partial manifest: what is known, what was read, the likeliest answers."""
        roles = self.roles
        sure = [state for state in roles.states if all(state in other for other in roles.others)]
        names: dict[str, Any] = {"input": {"name": roles.input.name}, "output": {"name": roles.output.name}}
        draft = joined(names, self._paired(sure).known)
        for question in questions:
            draft = joined(draft, question.fields)
        return OpenQuestions(self.graph.file, questions, draft)

    def _pairing(self) -> list[Question]:
        """The question how states go on, where only the user knows: single steps prove no pairing."""
        single = len(self.roles.input.dynamic) < 2
        return [self.roles.pairing] if self.roles.others and single else []

    def _paired(self, states: Sequence[StatePorts]) -> "Reading":
        pairs = [{"input": state.input.name, "output": state.output.name} for state in states]
        return Reading(self.graph, joined(self.known, {"states": pairs}))

    def _further(self) -> list[Question]:
        """What is not clear either, given the likeliest answers."""
        if not all(question.likely for question in self.roles.questions):
            return []
        try:
            likely = Reading(self.graph, self.asking(self.roles.questions).draft)
            found_layout(self.graph, likely.roles, likely.known)
        except Unclear as error:
            return [error.question]
        except ManifestError:
            return []  # the likeliest answers may be wrong
        return []


def _completed(known: Mapping[str, Any], graph: Graph) -> list[dict[str, Any]]:
    """The known constants, with the graph's types and shapes."""
    if not known.get("constants"):
        return []
    ports, made = {port.name: port for port in graph.ports[0]}, []
    for constant in known["constants"]:
        port = ports.get(constant.get("name"))
        if port is None:
            raise ManifestError(f"$.constants: the graph has no input {constant.get('name')!r}, it has {sorted(ports)}")
        shape = constant.get("shape", [size if isinstance(size, int) else 1 for size in port.shape])
        values = constant.get("values")
        if not isinstance(values, Sequence) or len(values) not in (1, math.prod(shape)):
            raise ManifestError(
                f"$.constants: {port.name!r} has values {values!r}. Give {math.prod(shape)}, or one for all."
            )
        values = list(values) * (math.prod(shape) // len(values)) if len(values) == 1 else values
        made.append({"dtype": port.dtype, **constant, "shape": shape, "values": values})
    return made
