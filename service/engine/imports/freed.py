"""Lets a graph that declares its example's numbers of rows and steps take any number, where that can be proved.

torch's exporters write the example's size wherever they have been told or have seen no other one, though often no node
depends on it. Rows of size 1 need more than another declaration at times: see batch.py.
"""

import itertools
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from stepcast.errors import ManifestError

from .. import onnx_door as onnx
from ..buffers import taken
from .axes import ROWS, Trial, Wrong
from .reading import Reading
from .rewrites import Rewritten

_RANK: Final = 3  # of an input that has rows, steps and features
_FEW: Final = 16  # rows of an exporter's example
_MOST: Final = 16  # readings that are tried
_NEAR: Final[dict[str, Any]] = {"rtol": 1e-4, "atol": 1e-5}


def many_rows(reading: Reading) -> Rewritten | None:
    """Free an axis of x, and one of each state of the same size above 1, along which rows do not mix.

    Behind an axis of size 1, which is rather that of the rows, there may be channels; the last axis is the features';
    and what has more than a few rows may be one frame, each of whose bins goes its own way.
    """
    roles, known = reading.roles, reading.known
    if not roles.states or "rows" in known or reading.found.rows == "many":
        return None
    for axis, size in _sized(roles.input.shape[:-1]):
        if 1 in roles.input.shape[:axis] or size > _FEW:
            break
        places = [[at for at, other in _sized(state.input.shape) if other == size] for state in roles.states]
        for each in itertools.islice(itertools.product(*places), _MOST):
            axes = {state.input.name: at for state, at in zip(roles.states, each, strict=True)}
            freed = _Freed(reading, {roles.input.name: axis, **axes}, size, "batch_axis")
            if freed.mixes_no_rows():
                said = (
                    f"it was declared with {size} rows along axis {axis} of {roles.input.name!r}, and takes any number"
                )
                return Rewritten(freed.model, said, freed.fields)
    return None


def many_steps(reading: Reading) -> Rewritten | None:
    """Free the axis of x along which single steps, each with the states of the last one, are the whole."""
    x, known = reading.roles.input, reading.known
    given = "time_axis" in known.get("input", {}) or len(x.shape) < _RANK or not reading.roles.states
    if given or reading.found.layout.time is not None:
        return None
    for axis, size in _sized(x.shape):
        freed = _Freed(reading, {x.name: axis}, size, "time_axis")
        if axis != reading.found.layout.batch and freed.steps_are_the_whole():
            said = f"input {x.name!r} was declared with {size} steps along axis {axis}, and takes any number"
            return Rewritten(freed.model, said, freed.fields)
    return None


def _sized(shape: tuple[int | str | None, ...]) -> list[tuple[int, int]]:
    """Axes of a fixed size above 1."""
    return [(axis, size) for axis, size in enumerate(shape) if isinstance(size, int) and size > 1]


class _Freed:
    """A graph with no fixed size along these axes of inputs, and along those of outputs that have the same size.

    Attributes:
        model: onnx's ModelProto.
        fields: What is known, with the roles that were found, and the freed axes under this name.
    """

    def __init__(self, reading: Reading, axes: Mapping[str, int], size: int, name: str) -> None:
        self._before, self._size, self._axis = reading, size, axes[reading.roles.input.name]
        self.model = onnx.copy(reading.graph.model)
        for port in self.model.graph.input:
            if port.name in axes:
                port.type.tensor_type.shape.dim[axes[port.name]].dim_param = name
        for port in self.model.graph.output:
            for dim in port.type.tensor_type.shape.dim:
                if dim.dim_value == size:
                    dim.Clear()
        del self.model.graph.value_info[:]
        settled = reading.settled()
        states = [{**s, name: axes[s["input"]]} if s["input"] in axes else s for s in settled["states"]]
        self.fields = {**settled, "states": states, "input": {**settled["input"], name: self._axis}}
        self._after = Reading(reading.graph.rewritten(self.model), self.fields)

    def mixes_no_rows(self) -> bool:
        """Whether rows together are rows alone, as trying the freed graph shows."""
        try:
            return self._after.found.rows == "many" and self._after.found.layout.batch == self._axis
        except ManifestError:
            return False

    def steps_are_the_whole(self) -> bool:
        """Whether it answers as before, and step by step as in one call."""
        before, after = self._before, self._after
        try:
            found = after.found
            if (found.rows, found.layout.time) != (before.found.rows, self._axis) or found.time is None:
                return False
            new, old = (Trial(one.graph, one.roles, one.known) for one in (after, before))
            x, states = new.example(found.layout, ROWS if found.rows == "many" else 1, self._size, seed=1)
            whole = new.run(found.layout, x, states)
            pairs = list(zip(whole, old.run(found.layout, x, states), strict=True))
            parts = []
            for step in range(self._size):
                y, *ends = new.run(found.layout, x[:, step : step + 1], states)
                parts.append(taken(y, (found.batch, found.time)))
                states = [taken(value, (at,)) for value, (at, _) in zip(ends, found.layout.states, strict=True)]
            pairs += zip(ends, whole[1:], strict=True)
            pairs.append((np.concatenate(parts, 1), taken(whole[0], (found.batch, found.time))))
        except (ManifestError, Wrong, ValueError):
            return False
        return all(one.shape == other.shape and np.allclose(one, other, **_NEAR) for one, other in pairs)
