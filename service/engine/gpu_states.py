"""States that stay on the device: a table of packed rows, gathered and scattered inside the graph.

The table is an input and an output of the graph, bound to the same memory, so that onnxruntime changes it in place (its
ScatterND copies the rest only if the two differ). The new states, which the store commits, come back in the same run.

A row is found by its tag, a number that the run which made the state gave out and that is never given out again; the
caller keeps it with the state's bytes. A row that is not found (a state that was loaded or set has tag 0) is uploaded.
So nothing is ever invalidated: whoever refuses a result forgets its tag, and goes back to a state that is uploaded.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from stepcast.manifest import Manifest

from . import onnx_door as onnx
from .arrays import Array, Bytes, Floats, Ints, Lengths
from .buffers import check_run

StatesOf = Callable[[Ints], Bytes]
"""Takes numbers of rows in the batch, gives their packed states (len, row_bytes) uint8."""
OpenSession = Callable[[bytes], ort.InferenceSession]
"""Opens a graph on the device."""

SLOT_BITS: Final = 24
MOST_SLOTS: Final = (1 << SLOT_BITS) - 1
GRAIN: Final = 8  # floats that one thread of CUDA's ScatterND copies: it has a thread per index, however long its row

_RUNS = itertools.count(1)  # of all tables, so that a tag of one is never found in another


class CannotReside(Exception):
    """Why a model's states cannot stay on the device; it runs as any other."""


class Slots:
    """Which row's state each of `capacity` slots of the table holds; the one unused for longest gives way."""

    def __init__(self, capacity: int) -> None:
        self._tags = np.zeros(capacity, np.int64)
        self._used = np.zeros(capacity, np.int64)  # the number of the last claim
        self._owner = np.zeros(capacity, np.int64)
        self._claims = 0
        self._oldest: Ints = np.arange(capacity)  # in order, as of claim `_listed`; from `_next` on they may give way
        self._listed = self._next = 0

    def claim(self, tags: Ints) -> tuple[Ints, Ints]:
        """A slot for each row (B,), all different, and the numbers of the rows whose state is not in theirs.

        `tags` (B,) are what `keep` gave for the rows' states; 0 is never found. B is at most the capacity.
        Until `keep`, the slots hold nothing that anybody can find.
        """
        self._claims += 1
        slots = tags & MOST_SLOTS
        slots[slots >= len(self._tags)] = 0  # another table's tag; the comparison below does not find it
        found = (tags > 0) & (self._tags[slots] == tags)
        rows = np.flatnonzero(found)
        self._owner[slots[rows]] = rows  # of rows with the same tag (a fork's), one has the slot, the others are copies
        found[rows] = self._owner[slots[rows]] == rows
        self._used[slots[found]] = self._claims
        missing = np.flatnonzero(~found)
        slots[missing] = self._free(len(missing))
        self._tags[slots] = 0
        return slots, missing

    def keep(self, slots: Ints) -> Ints:
        """Say that claimed slots hold their rows' new states; the tags (B,) of these."""
        run = next(_RUNS) % (1 << (63 - SLOT_BITS))
        tags: Ints = slots | (run << SLOT_BITS)
        self._tags[slots] = tags
        return tags

    def _free(self, count: int) -> Ints:
        """`count` slots, those unused for longest, but none of this claim's."""
        taken: list[Ints] = [np.empty(0, np.int64)]
        while count:
            if self._next >= len(self._oldest):  # one look at all slots serves many evictions: it finds a sixteenth
                size = min(len(self._used), max(count, len(self._used) // 16))
                oldest = np.argpartition(self._used, size - 1)[:size]
                self._oldest = oldest[np.argsort(self._used[oldest], kind="stable")]
                self._listed, self._next = self._claims - 1, 0
            slots = self._oldest[self._next : self._next + count]
            self._next += len(slots)
            slots = slots[self._used[slots] <= self._listed]  # the others were used since the list was made
            self._used[slots] = self._claims
            taken.append(slots)
            count -= len(slots)
        return np.concatenate(taken)


class ResidentStates:
    """The table of one model version, and the graph around the model that uses it.

    It has `budget_bytes`; what is not in it is uploaded when it is stepped. `device` is cuda, or cpu where tests prove
    the graph; `grain` is the floats per index of the scatter, None: what the device likes.

    Raises CannotReside where the graph is not of a form that can be wrapped, or there is no room for one row.
    """

    def __init__(
        self, model: Path, manifest: Manifest, opener: OpenSession, device: str, budget_bytes: int, grain: int | None
    ) -> None:
        _check_manifest(manifest)
        self.capacity = min(budget_bytes // manifest.state_row_bytes, MOST_SLOTS)
        if self.capacity < 1:
            raise CannotReside(f"resident_bytes is {budget_bytes}, one row's state takes {manifest.state_row_bytes}")
        floats = manifest.state_row_bytes // 4
        grain = math.gcd(grain or (GRAIN if device == "cuda" else floats), floats)
        pieces = floats // grain
        self._manifest, self._session = manifest, opener(resident_model(model, manifest, pieces))
        self._uploads = opener(_upload_model(floats, pieces))
        self._slots = Slots(self.capacity)
        self._buffers: dict[int, _Buffers] = {}  # of single steps, by rows
        self._lock = threading.Lock()
        shape = ((self.capacity + 1) * pieces, grain)  # the last row is scratch, for padding
        self._table = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, device, 0)
        self._upload(np.array([self.capacity]), np.zeros((1, manifest.state_row_bytes), np.uint8))
        self.uploaded = 0  # rows, so far

    def run(self, x: Floats, lengths: Lengths | None, tags: Ints, states_of: StatesOf) -> tuple[Floats, Bytes]:
        """Advance B rows by up to T steps; see Runtime.run_resident. B is at most the capacity."""
        rows, steps = x.shape[:2]
        with self._lock:
            slots, missing = self._slots.claim(tags)
            if len(missing):
                self._upload(slots[missing], states_of(missing))
                self.uploaded += len(missing)
            bucket = _bucket(rows)
            buffers = self._buffers.get(bucket) if steps == 1 else None
            if buffers is None:
                buffers = _Buffers(self._session, self._manifest, self._table, bucket, steps)
                if steps == 1:
                    self._buffers[bucket] = buffers
            buffers.x[:rows], buffers.x[rows:] = x, 0
            buffers.lengths[:rows], buffers.lengths[rows:] = steps if lengths is None else lengths, 0
            buffers.slots[:rows], buffers.slots[rows:] = slots, self.capacity
            buffers.run()
            y = buffers.y[:rows].copy()
            check_run(y, lengths, [buffers.sound[:rows]])
            tags[:] = self._slots.keep(slots)
            return y, buffers.new[:rows].view(np.uint8)

    def _upload(self, slots: Ints, states: Bytes) -> None:
        """Write packed states (M, row_bytes) into their slots; the last one again up to a power of two."""
        pick = np.minimum(np.arange(_bucket(len(slots))), len(slots) - 1)
        places, rows, binding = slots[pick], states[pick].view(np.float32), self._uploads.io_binding()
        binding.bind_ortvalue_input(_TABLE, self._table)
        binding.bind_cpu_input(_SLOTS, places)
        binding.bind_cpu_input(_NEW, rows)
        binding.bind_ortvalue_output(_TABLE_OUT, self._table)
        binding.synchronize_inputs()
        self._uploads.run_with_iobinding(binding)


class _Buffers:
    """What the graph reads and writes beside the table: all bound once, padded so that there are few shapes."""

    def __init__(self, session: ort.InferenceSession, m: Manifest, table: ort.OrtValue, rows: int, steps: int) -> None:
        assert m.lengths is not None  # _check_manifest
        self._session, self._binding = session, session.io_binding()
        self.x: Array = np.zeros((rows, steps, m.n_features), np.float32)
        self.lengths, self.slots = np.zeros(rows, np.int32), np.zeros(rows, np.int64)
        self.y, self.sound = np.zeros((rows, steps, m.n_outputs), np.float32), np.zeros((rows, 1), np.float32)
        self.new = np.zeros((rows, m.state_row_bytes // 4), np.float32)
        inputs = {m.input.name: self.x, m.lengths: self.lengths, _SLOTS: self.slots}
        self._inputs = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()}
        self._binding.bind_ortvalue_input(_TABLE, table)
        self._binding.bind_ortvalue_output(_TABLE_OUT, table)
        for name, value in {m.output.name: self.y, _NEW: self.new, _SOUND: self.sound}.items():
            self._binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(value))

    def run(self) -> None:
        """x, lengths and slots through the graph; y, new, sound and the table change."""
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)  # each time: this is what copies it to the device
        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding)


def _bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()


_NAME: Final = "stepcast/"  # of what is added to a graph; a slash begins no name that exporters give
_TABLE, _TABLE_OUT, _SLOTS = f"{_NAME}table", f"{_NAME}table_out", f"{_NAME}slots"
_NEW, _SOUND = f"{_NAME}new", f"{_NAME}sound"

# The table is (rows x pieces, floats per piece): one index per piece, so that a GPU's threads share a row.
_PLACES: Final = """
innermost = Constant<value_ints=[-1]>()
pieces = Constant<value_int={pieces}>()
range = Constant<value_ints={range}>()
column = Unsqueeze(slots, innermost)
first = Mul(column, pieces)
places = Add(first, range)
"""
_GATHER: Final = """
packed = Constant<value_ints=[-1, {floats}]>()
found = Gather<axis=0>(table, places)
old = Reshape(found, packed)
"""
_SCATTER: Final = """
cut = Constant<value_ints=[-1, {pieces}, {piece}]>()
indices = Unsqueeze(places, innermost)
cuts = Reshape(new, cut)
table_out = ScatterND(table, indices, cuts)
"""
_SOUNDNESS: Final = "sound = MatMul(new, zeros)"  # 0 x inf and 0 x NaN are NaN


def _check_manifest(m: Manifest) -> None:
    axes = {(port.batch_axis, port.time_axis) for port in (m.input, m.output)}
    why = {
        "it has no state": not m.states,
        "it takes no lengths": m.lengths is None,
        "it takes constants": bool(m.constants),
        "its states are not all float32": any(s.dtype != "float32" for s in m.states),
        "it takes one row a run": m.rows == "one",
        "its inputs or outputs are not all float32": {m.input.dtype, m.output.dtype} != {"float32"},
        "its inputs or outputs are no vectors": any(len(port.shape or (1,)) != 1 for port in (m.input, m.output)),
        "its axes are not batch, then time": axes != {(0, 1)} or any(s.batch_axis for s in m.states),
    }
    if reasons := [reason for reason, applies in why.items() if applies]:
        raise CannotReside(reasons[0])


def resident_model(path: Path, manifest: Manifest, pieces: int) -> bytes:
    """The model around a table: states are gathered from it by slot, and new ones scattered into it.

    All new states are one more output, packed rows (B, S) float32 in the manifest's order; another one (B, 1) is finite
    where a row's new state is, so that the host need not look through the states.

    Raises CannotReside where the graph is too old or of fixed batch size, or no new state depends on an old one.
    """
    model, states, sizes = onnx.load(str(path)), dict(enumerate(manifest.states)), [s.size for s in manifest.states]
    graph, floats = model.graph, sum(sizes)
    if onnx.opset(model) < 13:
        raise CannotReside(f"its opset is {onnx.opset(model)}, the least is 13")
    ports = {port.name: port for port in (*graph.input, *graph.output)}
    for name in (manifest.input.name, *(state.input for state in manifest.states)):
        if ports[name].type.tensor_type.shape.dim[0].HasField("dim_value"):
            raise CannotReside(f"input {name!r} has a fixed batch size")
    for state in manifest.states:
        graph.input.remove(ports[state.input])
        if state.output != manifest.output.name:
            graph.output.remove(ports[state.output])
    row, flat = (", ".join(f"{name}{n}" for n in states) for name in ("row", "flat"))
    apart = [f"sizes = Constant<value_ints={sizes}>()", f"{row} = Split<axis=1>(old, sizes)"]
    for n, s in states.items():
        apart += [f"shape{n} = Constant<value_ints={[-1, *s.shape]}>()", f"in{n} = Reshape(row{n}, shape{n})"]
    packed = [*(f"flat{n} = Flatten<axis=1>(out{n})" for n in states), f"new = Concat<axis=1>({flat})"]
    theirs = {f"in{n}": s.input for n, s in states.items()} | {f"out{n}": s.output for n, s in states.items()}
    before = _nodes([_PLACES, _GATHER, *apart], floats, pieces, theirs)
    after = _nodes([*packed, _SCATTER, _SOUNDNESS], floats, pieces, theirs)
    onnx.replace(graph.node, [*before, *graph.node, *after])
    if _TABLE not in onnx.needed(graph.node, [_NEW]):  # else nothing would keep the scatter behind the gather
        raise CannotReside("its new states do not depend on the old ones")
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((floats, 1), np.float32), f"{_NAME}zeros"))
    graph.input.extend([_port(_TABLE, floats // pieces), _port(_SLOTS)])
    graph.output.extend([_port(_TABLE_OUT, floats // pieces), _port(_NEW, floats), _port(_SOUND, 1)])
    return bytes(model.SerializeToString())


def _upload_model(floats: int, pieces: int) -> bytes:
    """(table, slots (M,), states (M, S)) -> the table with these rows."""
    nodes = _nodes([_PLACES, _SCATTER], floats, pieces, {})
    inputs = [_port(_TABLE, floats // pieces), _port(_SLOTS), _port(_NEW, floats)]
    graph = onnx.helper.make_graph(nodes, "upload", inputs, [_port(_TABLE_OUT, floats // pieces)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _nodes(lines: Iterable[str], floats: int, pieces: int, theirs: Mapping[str, str]) -> list[Any]:
    """Nodes as onnx.parser reads them; tensors have the names in `theirs`, or our prefix."""
    text = "\n".join(lines).format(floats=floats, pieces=pieces, piece=floats // pieces, range=[*range(pieces)])
    nodes = [onnx.parser.parse_node(line) for line in text.splitlines() if line]
    for node in nodes:
        for names in (node.input, node.output):
            onnx.replace(names, [theirs.get(name, _NAME + name) for name in names])
    return nodes


def _port(name: str, width: int = 0) -> Any:
    """Rows of floats of some width, or one int64 each."""
    shape, kind = ([None, width], onnx.TensorProto.FLOAT) if width else ([None], onnx.TensorProto.INT64)
    return onnx.helper.make_tensor_value_info(name, kind, shape)
