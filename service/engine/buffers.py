"""Single steps on the CPU: buffers that are bound to the graph once, so that a run is copies in, the model, copies out.

A packed row is every state tensor of the manifest, in order, without padding; numpy reads it as a structured type.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from stepcast.errors import ManifestError, NonFinite
from stepcast.manifest import ITEM_BYTES, MODEL_FILE, Manifest

from .arrays import Array, Bytes, Floats, Lengths
from .onnx_session import reading

Shape = tuple[int, ...]
Ports = Mapping[str, Sequence[tuple[str, Shape]]]
"""What a graph has for the manifest's input, output and states by name: a port of the shape for one step, or one port
for each index of the tensor's first axis."""

ROWS: Final = -1  # in a shape: as many as there are rows
_LEAST_ROWS: Final = 64
_MOST_BOUND: Final = 1024


def row_type(manifest: Manifest) -> np.dtype[Any]:
    """One row's packed state as a structured type; a field per state tensor, named as its input."""
    return np.dtype([(state.input, state.dtype, state.shape) for state in manifest.states])


def rows_of(states: Bytes, row: np.dtype[Any]) -> dict[str, Array]:
    """The state tensors (B, *shape) of packed rows (B, row_bytes), by input; views."""
    rows: Array = states.view(row)[:, 0] if row.names else states
    return {name: rows[name] for name in row.names or ()}


def blank_rows(rows: int, row: np.dtype[Any]) -> tuple[Bytes, dict[str, Array]]:
    """Packed rows to be filled (B, row_bytes), and their tensors as `rows_of` gives them."""
    packed = np.empty((rows, row.itemsize), np.uint8)
    return packed, rows_of(packed, row)


def laid(rows: Array, axes: Sequence[int | None]) -> Array:
    """A tensor as a graph takes it: its leading axes at these places; those of None, of size 1, are left out."""
    places = [axis for axis in axes if axis is not None]
    kept = [size for size, axis in zip(rows.shape, axes, strict=False) if axis is not None]
    rows = rows.reshape(*kept, *rows.shape[len(axes) :])
    return np.ascontiguousarray(np.moveaxis(rows, range(len(places)), places))


def taken(tensor: Array, axes: Sequence[int | None]) -> Array:
    """The inverse of `laid`, as a view."""
    places = [axis for axis in axes if axis is not None]
    rows = np.moveaxis(tensor, places, range(len(places)))
    return np.expand_dims(rows, [at for at, axis in enumerate(axes) if axis is None])


def step_ports(session: Any, manifest: Manifest, constants: Mapping[str, Array]) -> Ports:
    """The ports of model.onnx for one step, or ManifestError where it does not run with these shapes.

    The output's is learned from a run: exporters forget sizes of outputs.
    """
    spec, y, states = manifest.input, manifest.output, manifest.states
    many = ROWS if manifest.rows == "many" else 1
    x = _with_axes(manifest.row_shape, {spec.batch_axis: many, spec.time_axis: 1})
    inputs = {spec.name: x, **{s.input: _with_axes(s.shape, {s.batch_axis: many}) for s in states}}
    dtypes = {spec.name: spec.dtype, **{s.input: s.dtype for s in states}}
    with reading(MODEL_FILE):
        feeds = {name: np.zeros([abs(size) for size in shape], dtypes[name]) for name, shape in inputs.items()}
        if manifest.lengths is not None:
            feeds[manifest.lengths] = np.ones(1, np.int32)
        (found,) = session.run([y.name], {**feeds, **constants})
        left = found.shape if y.batch_axis is None else np.delete(found.shape, y.batch_axis).tolist()
    if found.size != manifest.n_outputs:
        raise ManifestError(f"output {y.name!r} is {found.shape} for one step, not {manifest.n_outputs} numbers")
    outputs = {s.output: inputs[s.input] for s in states} | {y.name: _with_axes(left, {y.batch_axis: many})}
    return {name: [(name, shape)] for name, shape in {**inputs, **outputs}.items()}


def _with_axes(shape: Sequence[int], sizes: Mapping[int | None, int]) -> Shape:
    """A shape with axes of these sizes put in at these places."""
    rest, rank = iter(shape), len(shape) + len(sizes.keys() - {None})
    return tuple(sizes[axis] if axis in sizes else next(rest) for axis in range(rank))


class Buffers(NamedTuple):
    """The buffers for B rows, and the graph bound to them."""

    binding: Any
    x: Array  # (B, F), or (B, ...) where the graph's lies so that no view has its rows flat
    before: list[Array]  # (B, *shape) of each state tensor
    after: list[Array]
    y: Array  # (B, ...)
    floats: list[Array]  # all numbers that the graph writes and that may be infinite


class BoundSteps:
    """Runs of B rows by one step, B of any size, of a graph with these ports; it may do without `lengths`."""

    def __init__(self, session: Any, manifest: Manifest, ports: Ports, constants: Mapping[str, Array]) -> None:
        self._session, self._manifest, self.ports, self._constants = session, manifest, ports, constants
        self._shapes = {name: p[0][1] if len(p) == 1 else (len(p), *p[0][1]) for name, p in ports.items()}
        self._row = row_type(manifest)
        self._names = self._row.names or ()
        self._lengths_port = manifest.lengths if manifest.lengths in {p.name for p in session.get_inputs()} else None
        places = (self._row.fields or {}).values()
        self._alone = manifest.rows == "one"
        self._aligned = all(offset % dtype.base.itemsize == 0 for dtype, offset, *_ in places)
        self._lock = threading.Lock()  # the batcher's thread and the event loop may both want one step
        self._grow(_LEAST_ROWS)

    def run(self, x: Floats, states: Bytes) -> tuple[Floats, Bytes]:
        """`Runtime.run` for x (B, 1, F), all rows having that step."""
        new = np.empty_like(states)
        return self.step(x[:, 0], [states], [new])[:, None], new

    def step(self, x: Floats, before: Sequence[Bytes], after: Sequence[Bytes]) -> Floats:
        """`Runtime.step`; where it raises NonFinite, `after` has been written all the same."""
        if self._alone and len(x) > 1:
            each = zip(x[:, None], _one_by_one(before, len(x)), _one_by_one(after, len(x)), strict=True)
            return np.concatenate([self.step(*row) for row in each])
        with self._lock:
            bound = self._bound.get(len(x)) or self._bind(len(x))
            bound.x[:] = x if bound.x.ndim == 2 else x.reshape(bound.x.shape)
            for packed, buffer in self._in_pairs(before, bound.before):
                buffer[...] = packed
            self._session.run_with_iobinding(bound.binding)
            for packed, buffer in self._in_pairs(after, bound.after):
                packed[...] = buffer
            return _sound(bound)

    def step_one(self, x: bytes, record: bytes, at: int, rows: int) -> tuple[Floats, bytes]:
        """`Runtime.step_one`."""
        size = self._row.itemsize
        if rows > 1 or not self._aligned:
            before = np.frombuffer(record, np.uint8, rows * size, at)[None]
            after = np.empty_like(before)
            y = self.step(np.frombuffer(x, np.float32).reshape(rows, -1), [before], [after])
            return y, after.tobytes()
        with self._lock:
            bound = self._bound.get(1) or self._bind(1)  # its tensors lie as a packed row does
            values = np.frombuffer(x, np.float32)
            bound.x[0] = values if bound.x.ndim == 2 else values.reshape(bound.x.shape[1:])
            self._read[:size] = np.frombuffer(record, np.uint8, size, at)
            self._session.run_with_iobinding(bound.binding)
            return _sound(bound), self._written[:size].tobytes()

    def _in_pairs(self, parts: Sequence[Bytes], buffers: Sequence[Array]) -> Iterator[tuple[Array, Array]]:
        """Each tensor of packed rows and its rows of the buffer, in one shape."""
        at = 0
        for part in parts if self._names else ():
            packed = part.view(self._row)  # (b, n)
            end = at + packed.size
            alone = packed.shape[1] == 1
            rows = packed[:, 0] if alone else packed
            for name, buffer in zip(self._names, buffers, strict=True):
                cut = buffer[at:end]
                yield rows[name], cut if alone else cut.reshape(*packed.shape, *cut.shape[1:])
            at = end

    def _grow(self, rows: int) -> None:
        """Make room for that many rows."""
        self._most = rows = 1 << (rows - 1).bit_length()
        pad = 8 * (len(self._names) + 1)  # where a tensor must not begin behind another at once
        self._lengths = np.ones(rows, np.int32)
        spec = self._manifest
        x_bytes = ITEM_BYTES[spec.input.dtype] * spec.n_features
        y_bytes = ITEM_BYTES[spec.output.dtype] * spec.n_outputs
        self._x = np.zeros(rows * x_bytes, np.uint8)
        self._read = np.zeros(rows * self._row.itemsize + pad, np.uint8)
        self._written = np.zeros(rows * (self._row.itemsize + y_bytes) + pad, np.uint8)
        self._bound: dict[int, Buffers] = {}

    def _bind(self, rows: int) -> Buffers:
        """The buffers' beginnings as the inputs and outputs of `rows` rows."""
        if rows > self._most:
            self._grow(rows)
        spec, binding = self._manifest, self._session.io_binding()
        (x,) = self._laid(binding.bind_input, self._x, {spec.input.name: spec.input.dtype}, rows).values()
        before = self._laid(binding.bind_input, self._read, {s.input: s.dtype for s in spec.states}, rows)
        # The output may be a state's as well: then it is there once.
        dtypes = {s.output: s.dtype for s in spec.states} | {spec.output.name: spec.output.dtype}
        made = self._laid(binding.bind_output, self._written, dtypes, rows)
        floats = [tensor for tensor in made.values() if tensor.dtype.kind == "f"]
        if all(tensor.dtype == np.float32 for tensor in made.values()):  # most models: then they are one piece
            floats = [self._written[: sum(tensor.nbytes for tensor in floats)].view(np.float32)]
        if self._lengths_port is not None:
            binding.bind_cpu_input(self._lengths_port, self._lengths[:rows])
        for name, value in self._constants.items():
            binding.bind_cpu_input(name, value)
        old = [before[s.input].reshape(rows, *s.shape) for s in spec.states]
        new = [made[s.output].reshape(rows, *s.shape) for s in spec.states]
        flat = x.reshape(rows, -1)
        x = flat if np.may_share_memory(flat, x) else x
        bound = Buffers(binding, x, old, new, made[spec.output.name], floats)
        if len(self._bound) >= _MOST_BOUND:
            self._bound.clear()
        self._bound[rows] = bound
        return bound

    def _laid(self, bind: Callable[..., None], memory: Bytes, dtypes: Mapping[str, str], rows: int) -> dict[str, Array]:
        """Bind tensors that lie one behind the other, each at a multiple of its item size; they are given by row."""
        by_row, end = {}, 0
        for name, dtype in dtypes.items():
            ports, whole, item = self.ports[name], self._shapes[name], np.dtype(dtype).itemsize
            shape = [rows if size == ROWS else size for size in whole]
            start = -(-end // item) * item
            end = start + item * math.prod(shape)
            tensor = memory[start:end].view(dtype).reshape(shape)
            for (port, _), part in zip(ports, tensor if len(ports) > 1 else [tensor], strict=True):
                bind(port, "cpu", 0, part.dtype, part.shape, part.ctypes.data)
            by_row[name] = np.moveaxis(tensor, whole.index(ROWS), 0) if ROWS in whole else tensor[None]
        return by_row


def _one_by_one(parts: Sequence[Bytes], rows: int) -> Iterator[Sequence[Bytes]]:
    """Packed states of `rows` rows in any cuts, row by row; views."""
    sessions = [session for part in parts for session in part]
    each = rows // len(sessions)
    return ([row[None]] for session in sessions for row in session.reshape(each, -1))


def _sound(bound: Buffers) -> Floats:
    """The outputs of a run (B, O)."""
    _check_finite(bound.floats)
    if bound.y.dtype == np.float32:
        return bound.y.copy().reshape(len(bound.y), -1)
    y = narrowed(bound.y).reshape(len(bound.y), -1)
    _check_finite([y])
    return y


def narrowed(values: Array) -> Floats:
    """Numbers of a graph as float32, as the wire has them; those that are too large for it become infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32, order="C", copy=False)


def check_run(y: Floats, lengths: Lengths | None, states: Iterable[Array]) -> None:
    """Raises NonFinite where an output (B, T, O) within its row's length, or a state, is NaN or infinite."""
    if lengths is not None and not np.isfinite(y).all():
        y = y[np.arange(y.shape[1]) < lengths[:, None]]
    _check_finite(array for array in (y, *states) if array.dtype.kind == "f")


def _check_finite(arrays: Iterable[Array]) -> None:
    for array in arrays:
        # The product overflows first, cheaply; vdot, unlike dot, does not warn of it.
        if not math.isfinite(np.vdot(array, array)) and not np.isfinite(array).all():
            raise NonFinite("the model's outputs or its state would not be finite; nothing was committed")
