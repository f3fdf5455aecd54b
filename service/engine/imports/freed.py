"""Lets a graph that declares its example's numbers of rows and steps take any number, where that can be proved.

torch's exporters write the example's size wherever they have been told or have seen no other one, though often no node
depends on it. Rows of size 1 need more than another declaration at times: see batch.py.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from stepcast.errors import ManifestError

from .. import onnx_door as onnx
from ..arrays import Array
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


def any_size(reading: Reading) -> Rewritten | None:
    """Take the example's size out of Reshape nodes, if x declares any number of steps and only that one runs."""
    roles = reading.roles
    if roles.questions or _reads(reading):
        return None
    for _, size in _sized(roles.output.shape[:-1]):
        freed = _Freed(reading, {}, size, "time_axis", reshaped=True)
        if _reads(freed.after) and freed.answers_as_before():
            return Rewritten(
                freed.model, f"its Reshape nodes held the example's size {size}, and take any", freed.fields
            )
    return None


def _reads(reading: Reading) -> bool:
    """Whether there is a reading that is right."""
    try:
        return bool(reading.found)
    except ManifestError:
        return False


def many_steps(reading: Reading) -> Rewritten | None:
    """Free the axis of x along which single steps, each with the states of the last one, are the whole."""
    x, known = reading.roles.input, reading.known
    given = "time_axis" in known.get("input", {}) or len(x.shape) < _RANK or not reading.roles.states
    if given or reading.found.layout.time is not None:
        return None
    for (axis, size), reshaped in itertools.product(_sized(x.shape), (False, True)):
        freed = _Freed(reading, {x.name: axis}, size, "time_axis", reshaped=reshaped)
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
        after: The graph's reading.
    """

    def __init__(
        self, reading: Reading, axes: Mapping[str, int], size: int, name: str, *, reshaped: bool = False
    ) -> None:
        self._before, self._size, self._axis = reading, size, axes.get(reading.roles.input.name)
        self.model = onnx.copy(reading.graph.model)
        free(self.model.graph, axes, size, name)
        if reshaped:
            keep_sizes(self.model.graph, size)
        settled = reading.settled()
        states = [{**s, name: axes[s["input"]]} if s["input"] in axes else s for s in settled["states"]]
        known = {} if self._axis is None else {name: self._axis}
        self.fields = {**settled, "states": states, "input": {**settled["input"], **known}}
        self.after = Reading(reading.graph.rewritten(self.model), self.fields)

    def mixes_no_rows(self) -> bool:
        """Whether rows together are rows alone, as trying the freed graph shows."""
        try:
            return self.after.found.rows == "many" and self.after.found.layout.batch == self._axis
        except ManifestError:
            return False

    def answers_as_before(self) -> bool:
        """Whether it answers as before, to as many steps as before."""
        try:
            found = self.after.found
            new, old = (Trial(one.graph, one.roles, one.known) for one in (self.after, self._before))
            x, states = new.example(found.layout, ROWS if found.rows == "many" else 1, self._size, seed=1)
            pairs = zip(new.run(found.layout, x, states), old.run(found.layout, x, states), strict=True)
            return _near(pairs)
        except (ManifestError, Wrong, ValueError):
            return False

    def steps_are_the_whole(self) -> bool:
        """Whether it answers as before, and step by step as in one call."""
        after = self.after
        if not self.answers_as_before():
            return False
        try:
            found = after.found
            if (found.rows, found.layout.time) != (self._before.found.rows, self._axis) or found.time is None:
                return False
            new, parts = Trial(after.graph, after.roles, after.known), []
            x, states = new.example(found.layout, ROWS if found.rows == "many" else 1, self._size, seed=2)
            whole = new.run(found.layout, x, states)
            for step in range(self._size):
                y, *ends = new.run(found.layout, x[:, step : step + 1], states)
                parts.append(taken(y, (found.batch, found.time)))
                states = [taken(value, (at,)) for value, (at, _) in zip(ends, found.layout.states, strict=True)]
            y = taken(whole[0], (found.batch, found.time))
            return _near([(np.concatenate(parts, 1), y), *zip(ends, whole[1:], strict=True)])
        except (ManifestError, Wrong, ValueError):
            return False


def _near(pairs: Iterable[tuple[Array, Array]]) -> bool:
    return all(one.shape == other.shape and np.allclose(one, other, **_NEAR) for one, other in pairs)


def free(graph: Any, axes: Mapping[str, int], size: int, name: str) -> None:
    """Declare no fixed size along these axes of inputs, nor along those of outputs that have this size."""
    for port in graph.input:
        if port.name in axes:
            port.type.tensor_type.shape.dim[axes[port.name]].dim_param = name
    for port in graph.output:
        for dim in port.type.tensor_type.shape.dim:
            if dim.dim_value == size:
                dim.Clear()
    del graph.value_info[:]


def keep_sizes(graph: Any, size: int) -> None:
    """Let Reshape nodes keep the size of an axis where a constant says this number: for ONNX this is a 0."""
    constants = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer}
    for node in graph.node:
        sizes = constants.get(node.input[1]) if node.op_type == "Reshape" else None
        if sizes is not None and size in sizes and 0 not in sizes:
            onnx.replace(node.attribute, ())  # `allowzero` is its only one: a 0 would be a size
            name = f"{node.output[0]}/sizes"
            graph.initializer.append(onnx.numpy_helper.from_array(np.where(sizes == size, 0, sizes), name))
            node.input[1] = name
