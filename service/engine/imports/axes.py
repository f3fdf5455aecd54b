"""How the tensors of a graph lie: where the batch and time axes are, what one row of one step is.

Exporters declare sizes that were the example's, and names that say nothing. So what is declared only says which
readings are possible; each is tried: three rows are run together and alone, sequences of two lengths. A reading is
right if rows do not depend on each other; the outputs' axes are those along which the rows, and the steps, are found.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from stepcast.errors import ManifestError
from stepcast.manifest import Tolerance

from ..arrays import Array
from ..buffers import laid, taken
from ..onnx_session import Port, one_line, open_session, run_within
from .graphs import Graph
from .questions import Question, Unclear
from .roles import Roles, StatePorts

ROWS: Final = 3  # that are run together
_STEPS: Final = (2, 3)
_MOST_NAMED: Final = 64  # features that have a name each

Axis = int | None


class Layout(NamedTuple):
    """A reading of the inputs: axes of batch and time, and shapes of one row (one step of it for x)."""

    batch: Axis
    time: Axis
    shape: tuple[int, ...]
    states: tuple[tuple[Axis, tuple[int, ...]], ...]  # batch axis and shape of each


class Found(NamedTuple):
    """What trying a reading showed: how many rows a run takes, the output's axes, and the shape of one row's step."""

    rows: Literal["many", "one"]
    layout: Layout
    batch: Axis
    time: Axis
    shape: tuple[int, ...]


def found_layout(graph: Graph, roles: Roles, known: Mapping[str, Any]) -> Found:
    """Find out how the tensors of a graph lie; `known` are fields of a manifest, which win.

    Raises:
        ManifestError: no reading is right, or more than one.
    """
    features = sum(feature.get("width", 1) for feature in known["features"]) if "features" in known else None
    trial, why = Trial(graph, roles, known), ""
    for rows in ("many", "one") if "rows" not in known else (known["rows"],):
        found: list[Found] = []
        for layout in layouts(roles, known, features, rows):
            try:
                found.append(trial.many(layout) if rows == "many" else trial.one(layout))
            except Wrong as error:
                why = why or str(error)
        if found:
            return _agreed(roles, found) if rows == "many" else found[0]
    raise _unfixed(roles, features) if _is_unfixed(roles, known, features) else ManifestError(why)


def _is_unfixed(roles: Roles, known: Mapping[str, Any], features: int | None) -> bool:
    """Whether the likeliest reading lacks a size that only the user knows."""
    first = next((batch for batch in _batches(roles.input, "one")), None)
    time = _times(roles.input, first)[0]
    given = known.get("input", {})
    axes = given.get("batch_axis", first), given.get("time_axis", time)
    shapes = [_row(roles.input, axes, given.get("shape"), features)]
    return None in shapes or any(not list(_of_state(state, "one")) for state in roles.states)


def _unfixed(roles: Roles, features: int | None) -> ManifestError:
    """Why there is no reading at all."""
    for state in roles.states:
        if len(state.input.dynamic) > 1:
            many = f"{len(state.input.dynamic)} dynamic axes"
            return ManifestError(f"state input {state.input} has {many}. Give $.states with batch_axis and shape.")
    if features is None:
        text = f"how many features has a step? Input {roles.input} has no fixed size for them."
        block = [{"name": roles.input.name, "width": None}]
        return Unclear(Question(text, ["--features N"], {"features": block}, likely=False))
    return ManifestError(f"input {roles.input} has no step of {features} numbers, as $.features says. Correct it.")


def _agreed(roles: Roles, found: Sequence[Found]) -> Found:
    """The first of the findings, if all have the same batch axes."""
    axes = sorted({one.layout.batch for one in found}, key=str)
    if len(axes) > 1:
        text = f"which axis of input {roles.input} is the batch? {' and '.join(map(str, axes))} are both possible."
        batch, time = found[0].layout.batch, found[0].layout.time
        options = [f"--batch-axis input={batch}", f"--time-axis input={'none' if time is None else time}"]
        raise Unclear(Question(text, options, {"input": {"batch_axis": batch, "time_axis": time}}))
    return found[0]


def layout_fields(roles: Roles, known: Mapping[str, Any], found: Found) -> dict[str, Any]:
    """What was found, as fields of a manifest: input, output, states, features, outputs, rows."""
    layout: Layout = found.layout
    made: dict[str, Any] = {"rows": found.rows}
    for side, port, batch, time, shape in (
        ("input", roles.input, layout.batch, layout.time, layout.shape),
        ("output", roles.output, found.batch, found.time, found.shape),
    ):
        given = known.get(side, {})
        made[side] = {"name": port.name, "batch_axis": batch, "time_axis": time, "dtype": port.dtype, **given}
        if len(shape) != 1:
            made[side]["shape"] = shape
    states = [
        {
            **{"layer": "state", "key": port.name, "input": port.name, "output": result.name, "dtype": port.dtype},
            **{"shape": shape, "batch_axis": axis, **given},
        }
        for (port, result, given), (axis, shape) in zip(roles.states, layout.states, strict=True)
    ]
    features = known.get("features") or _features(roles.input, layout.shape)
    outputs = known.get("outputs") or numbered("y", math.prod(found.shape), blocks=False)
    return {**made, "states": states, "features": features, "outputs": outputs}


def numbered(letter: str, count: int, blocks: bool) -> list[dict[str, Any]]:
    """Names by number; many numbers are rather one block, where there may be blocks."""
    if blocks and count > _MOST_NAMED:
        return [{"name": letter, "width": count}]
    return [{"name": f"{letter}{number}"} for number in range(count)]


def _features(port: Port, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """A vector's numbers have a name each; those of a frame or a spectrum are one block."""
    size = math.prod(shape)
    return numbered("x", size, blocks=True) if len(shape) < 2 else [{"name": port.name, "width": size}]


# --- readings -------------------------------------------------------------------------------------------------------


def layouts(roles: Roles, known: Mapping[str, Any], features: int | None, rows: str) -> Iterator[Layout]:
    """Every reading of the inputs that what is declared allows, the likeliest first."""
    names = {port.input.shape[axis] for port in roles.states for axis in port.input.dynamic} - {None, ""}
    given, x = known.get("input", {}), roles.input
    shared = [axis for axis in x.dynamic if x.shape[axis] in names]
    batches = [given["batch_axis"]] if "batch_axis" in given else shared or _batches(x, rows)
    if rows == "one" and roles.states and not any(port.input.dynamic for port in roles.states):
        batches = sorted(batches, key=x.dynamic.__contains__)  # what the states lack is rather time
    states = [list(_of_state(state, rows)) for state in roles.states]
    for batch in batches:
        for time in [given["time_axis"]] if "time_axis" in given else _times(x, batch):
            shape = _row(x, (batch, time), given.get("shape"), features)
            if shape is not None and (batch is None or batch != time):
                yield from (Layout(batch, time, shape, each) for each in itertools.product(*states))


def _batches(port: Port, rows: str) -> list[Axis]:
    """Axes that may be the batch: those of no fixed size; where one row is run at a time, also those of size 1."""
    if rows == "many":
        return list(port.dynamic)
    return [*port.dynamic, *(axis for axis, size in enumerate(port.shape) if size == 1), None]


def _times(port: Port, batch: Axis) -> list[Axis]:
    """Axes that may be time: those of no fixed size, unless a matrix's other axis, which is rather its features."""
    others: list[Axis] = [axis for axis in port.dynamic if axis != batch]
    return [None, *others] if len(port.shape) < 3 else [*others, None]


def _row(port: Port, axes: Sequence[Axis], given: Any, features: int | None) -> tuple[int, ...] | None:
    """The shape of one row's step; one size that is not declared follows from the number of features."""
    rest = [size for axis, size in enumerate(port.shape) if axis not in axes]
    if given is not None:
        return tuple(given)
    sizes = [size for size in rest if isinstance(size, int)]
    if len(rest) - len(sizes) > (features is not None):
        return None
    left, over = divmod(features or math.prod(sizes), max(1, math.prod(sizes)))
    if over or (len(rest) == len(sizes) and left != 1):
        return None
    return tuple(size if isinstance(size, int) else left for size in rest)


def _of_state(state: StatePorts, rows: str) -> Iterator[tuple[Axis, tuple[int, ...]]]:
    """A state's batch axis, and its shape without it."""
    given, port = state.known, state.input
    for axis in [given["batch_axis"]] if "batch_axis" in given else _batches(port, rows):
        shape = _row(port, (axis,), given.get("shape"), None)
        if shape is not None:
            yield axis, shape


# --- trials ---------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """Why a layout is wrong."""


class Trial:
    """Runs a graph by readings of it."""

    def __init__(self, graph: Graph, roles: Roles, known: Mapping[str, Any]) -> None:
        self._roles, self._session = roles, open_session(graph.content, "cpu", name=str(graph.file), quiet=True)
        dtypes = {port.name: port.dtype for port in graph.ports[0]}
        constants = known.get("constants", ())
        for c in constants:
            if c["dtype"] != dtypes[c["name"]]:
                raise ManifestError(f"$.constants: input {c['name']!r} is {dtypes[c['name']]}, not {c['dtype']}")
        self._constants = {c["name"]: np.array(c["values"], c["dtype"]).reshape(c.get("shape", ())) for c in constants}
        self._outputs = [roles.output.name, *(state.output.name for state in roles.states)]
        self._near = Tolerance.model_validate(known.get("tolerance", {}))

    def many(self, layout: Layout) -> Found:
        """Rows together are rows alone; raises Wrong if not."""
        x, states = self.example(layout, ROWS)
        together = self.run(layout, x, states)
        alone = [self.run(layout, x[[row]], [state[[row]] for state in states]) for row in range(ROWS)]
        for number, (axis, _) in enumerate(layout.states, 1):
            if axis not in self._rows_along(together[number], [each[number] for each in alone]):
                raise Wrong(self._mixed(f"state {self._outputs[number]!r}"))
        found = self._rows_along(together[0], [each[0] for each in alone])
        if not found:
            raise Wrong(self._mixed(f"output {self._outputs[0]!r}"))
        return self._shaped(layout, together[0], "many", found[0])

    def one(self, layout: Layout) -> Found:
        """One row runs, and gives states of the shapes that it takes; raises Wrong if not."""
        x, states = self.example(layout, 1)
        y, *after = self.run(layout, x, states)
        for (axis, shape), result, name in zip(layout.states, after, self._outputs[1:], strict=True):
            want = laid(np.empty((1, *shape)), (axis,)).shape
            if result.shape != want:
                raise Wrong(f"state output {name!r} is {list(result.shape)}, its input is {list(want)}")
        time = self._time(layout, y, 1)
        ones = [axis for axis, size in enumerate(y.shape) if size == 1 and axis != time]
        return self._shaped(layout, y, "one", ones[0] if ones else None)

    def example(self, layout: Layout, rows: int, steps: int = _STEPS[0], seed: int = 0) -> tuple[Array, list[Array]]:
        """Random x (B, T, *shape) and states (B, *shape)."""
        random = np.random.default_rng(seed)
        steps = 1 if layout.time is None else steps
        x = _random(random, (rows, steps, *layout.shape), self._roles.input.dtype)
        shapes = zip(self._roles.states, layout.states, strict=True)
        return x, [_random(random, (rows, *shape), state.input.dtype) / 8 for state, (_, shape) in shapes]

    def run(
        self,
        layout: Layout,
        x: Array,
        states: Sequence[Array],
        outputs: Sequence[str] = (),
        steps: int | None = None,
    ) -> list[Array]:
        """Outputs for x (B, T, *shape) and states (B, *shape), by default y and the next states; raises Wrong.

        `steps` of each row count, where the graph takes lengths; all by default.
        """
        try:
            return run_within(self._session, outputs or self._outputs, self.feeds(layout, x, states, steps))
        except ManifestError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise Wrong(f"the graph does not run as the manifest reads it: {one_line(error)}") from error

    def feeds(self, layout: Layout, x: Array, states: Sequence[Array], steps: int | None = None) -> dict[str, Array]:
        """The graph's inputs for x (B, T, *shape) and states (B, *shape)."""
        roles = self._roles
        feeds = {roles.input.name: laid(x, (layout.batch, layout.time)).astype(roles.input.dtype), **self._constants}
        for state, (axis, _), value in zip(roles.states, layout.states, states, strict=True):
            feeds[state.input.name] = laid(value, (axis,)).astype(state.input.dtype)
        if roles.lengths is not None:
            feeds[roles.lengths] = np.full(len(x), x.shape[1] if steps is None else steps, np.int32)
        return feeds

    def _rows_along(self, together: Array, alone: Sequence[Array]) -> list[int]:
        """The axes along which the rows that were run alone are found in what was run together."""
        sized = [axis for axis, size in enumerate(together.shape) if size == len(alone)]
        return [axis for axis in sized if self.holds(together, axis, alone)]

    def holds(self, together: Array, axis: int, alone: Sequence[Array]) -> bool:
        """Whether the rows along an axis are those that were run alone."""
        rows = zip(np.split(together, len(alone), axis), alone, strict=True)
        near: dict[str, Any] = {"rtol": self._near.rtol, "atol": self._near.atol, "equal_nan": True}
        return all(row.shape == want.shape and np.allclose(row, want, **near) for row, want in rows)

    def _mixed(self, what: str) -> str:
        rows = f"{what}: a row's answer depends on the rows beside it, or has no axis of its own"
        return f"{rows}. Give $.input, $.output and $.states with their batch_axis and time_axis."

    def _time(self, layout: Layout, y: Array, rows: int) -> Axis:
        """The axis of the output that grows with the steps."""
        if layout.time is None:
            return None
        longer = self.run(layout, *self.example(layout, rows, _STEPS[1]))[0]
        if longer.ndim != y.ndim:
            raise Wrong(f"output {self._outputs[0]!r} has another rank for {_STEPS[1]} steps than for {_STEPS[0]}")
        grown = [axis for axis, sizes in enumerate(zip(y.shape, longer.shape, strict=True)) if sizes == _STEPS]
        return grown[0] if grown else None

    def _shaped(self, layout: Layout, y: Array, rows: Literal["many", "one"], batch: Axis) -> Found:
        time = self._time(layout, y, ROWS if rows == "many" else 1)
        return Found(rows, layout, batch, time, taken(y, (batch, time)).shape[2:])


def _random(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Numbers that a graph may be given: normal, or 0 and 1 for integers and flags."""
    return random.normal(size=shape) if dtype.startswith("float") else random.integers(0, 2, shape).astype(np.float64)
