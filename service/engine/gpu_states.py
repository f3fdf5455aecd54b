"""States that stay on the device: a table of packed rows, gathered and scattered inside the graph.

Without it every run copies the states of its rows to the device. Here the table is an input and an output of the graph,
bound to the same memory, so that onnxruntime changes it in place (its ScatterND copies the rest only if the two
differ). The new states come back to the host in the same run, as one packed array: they are what the store commits.

Residency is an optimisation and nothing else. A row is found by its tag, a number that the run which made the state
gave out and that is never given out again; a row that is not found is uploaded. So nothing is ever invalidated: whoever
refuses a result forgets its tag, and the state from before, whose tag has left the table, is uploaded next time.

No CUDA graphs: capturing one runs the model several times (onnxruntime issue 32243), and a state that is changed in
place would advance each time.
"""

import itertools
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from stepcast.manifest import Manifest

from . import onnx_door as onnx
from .arrays import Bytes, Floats, Ints, Lengths
from .buffers import check_run

StatesOf = Callable[[Ints], Bytes]
"""Takes numbers of rows in the batch, gives their packed states (len, row_bytes) uint8."""
OpenSession = Callable[[bytes], ort.InferenceSession]

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
        """A slot for each row. Until `keep`, the slots hold nothing that anybody can find.

        Args:
            tags: (B,) what `keep` gave for the rows' states; 0 is never found. B is at most the capacity.

        Returns:
            The slots (B,), all different, and the numbers of the rows whose state is not in theirs.
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
        taken: list[Ints] = []
        while count:
            if self._next >= len(self._oldest):
                self._list(count)
            slots = self._oldest[self._next : self._next + count]
            self._next += len(slots)
            slots = slots[self._used[slots] <= self._listed]  # the others were used since the list was made
            self._used[slots] = self._claims
            taken.append(slots)
            count -= len(slots)
        return np.concatenate(taken) if taken else np.empty(0, np.int64)

    def _list(self, count: int) -> None:
        """List a sixteenth of all slots, the oldest in order: one look at all of them serves many evictions."""
        size = min(len(self._used), max(count, len(self._used) // 16))
        oldest = np.argpartition(self._used, size - 1)[:size]
        self._oldest = oldest[np.argsort(self._used[oldest], kind="stable")]
        self._listed, self._next = self._claims - 1, 0


class ResidentStates:
    """The table of one model version, and the graph around the model that uses it.

    Args:
        model: model.onnx, of the manifest's directory.
        open_session: Opens a graph on the device.
        device: cuda, or cpu where tests prove the graph.
        budget_bytes: The table's size; what is not in it is uploaded when it is stepped.
        initial: The packed state of a row without history.
        grain: Floats per index of the scatter; None: what the device likes.

    Raises:
        CannotReside: the graph is not of a form that can be wrapped, or there is no room for one row.
    """

    def __init__(
        self,
        model: Path,
        manifest: Manifest,
        open_session: OpenSession,
        *,
        device: str,
        budget_bytes: int,
        initial: bytes,
        grain: int | None = None,
    ) -> None:
        _check_manifest(manifest)
        self._manifest, self._floats = manifest, manifest.state_row_bytes // 4
        self.capacity = min(budget_bytes // manifest.state_row_bytes, MOST_SLOTS)
        if self.capacity < 1:
            raise CannotReside(f"resident_bytes is {budget_bytes}, one row's state takes {manifest.state_row_bytes}")
        grain = math.gcd(grain or (GRAIN if device == "cuda" else self._floats), self._floats)
        pieces = self._floats // grain
        self._session = open_session(resident_model(model, manifest, pieces))
        self._uploads = open_session(_upload_model(self._floats, pieces))
        self._slots = Slots(self.capacity)
        self._buffers: dict[int, _Buffers] = {}
        self._lock = threading.Lock()
        shape = ((self.capacity + 1) * pieces, grain)  # the last row is scratch, for padding
        self._table = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, device, 0)
        self._initial = np.frombuffer(initial, np.uint8)
        self._upload(np.array([self.capacity]), self._initial[None])
        self.uploaded = 0  # rows, so far

    def run(self, x: Floats, lengths: Lengths | None, tags: Ints, states_of: StatesOf) -> tuple[Floats, Bytes]:
        """Advance B rows by up to T steps; see Runtime.run_resident. B is at most the capacity."""
        with self._lock:
            slots, missing = self._slots.claim(tags)
            if len(missing):
                self._upload(slots[missing], states_of(missing))
                self.uploaded += len(missing)
            buffers, rows = self._advance(x, lengths, slots), len(x)
            y = buffers.y[:rows].copy()
            check_run(y, lengths, [buffers.sound[:rows]])
            tags[:] = self._slots.keep(slots)
            return y, buffers.new[:rows].view(np.uint8)

    def _upload(self, slots: Ints, states: Bytes) -> None:
        """Write packed states (M, row_bytes) into their slots; in buckets of rows, as in `_advance`."""
        bucket = _bucket(len(slots))
        places = np.full(bucket, self.capacity, np.int64)
        places[: len(slots)] = slots
        rows = np.empty((bucket, self._floats), np.float32)
        rows.view(np.uint8)[: len(slots)] = states
        rows.view(np.uint8)[len(slots) :] = self._initial
        binding = self._uploads.io_binding()
        binding.bind_ortvalue_input(_TABLE, self._table)
        binding.bind_cpu_input(_SLOTS, places)
        binding.bind_cpu_input(_NEW, rows)
        binding.bind_ortvalue_output(_TABLE_OUT, self._table)
        binding.synchronize_inputs()
        self._uploads.run_with_iobinding(binding)

    def _advance(self, x: Floats, lengths: Lengths | None, slots: Ints) -> "_Buffers":
        """Run the rows in their slots; their buffers hold what came out."""
        rows, steps = x.shape[:2]
        bucket = _bucket(rows)
        buffers = self._buffers.get(bucket) if steps == 1 else None
        if buffers is None:
            buffers = _Buffers(self._session, self._manifest, self._table, bucket, steps)
            if steps == 1:
                self._buffers[bucket] = buffers
        buffers.x[:rows] = x
        buffers.lengths[:rows] = steps if lengths is None else lengths
        buffers.slots[:rows] = slots
        buffers.x[rows:], buffers.lengths[rows:], buffers.slots[rows:] = 0, 0, self.capacity
        buffers.run()
        return buffers


class _Buffers:
    """Buffers and bindings for runs of one shape, padded to a power of two of rows so that shapes are few."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, table: ort.OrtValue, rows: int, steps: int
    ) -> None:
        assert manifest.lengths is not None  # _check_manifest
        self._session, self._binding = session, session.io_binding()
        self.x = np.zeros((rows, steps, manifest.n_features), np.float32)
        self.lengths = np.zeros(rows, np.int32)
        self.slots = np.zeros(rows, np.int64)
        self.y = np.zeros((rows, steps, manifest.n_outputs), np.float32)
        self.new = np.zeros((rows, manifest.state_row_bytes // 4), np.float32)
        self.sound = np.zeros((rows, 1), np.float32)
        inputs = {manifest.input.name: self.x, manifest.lengths: self.lengths, _SLOTS: self.slots}
        self._inputs = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()}
        self._binding.bind_ortvalue_input(_TABLE, table)
        self._binding.bind_ortvalue_output(_TABLE_OUT, table)
        for name, value in {manifest.output.name: self.y, _NEW: self.new, _SOUND: self.sound}.items():
            self._binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(value))

    def run(self) -> None:
        """x, lengths and slots through the graph; y, new, sound and the table change."""
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)  # each time: this is what copies it to the device
        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding)


def _bucket(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


# --- graphs ---------------------------------------------------------------------------------------------------------

_NAME: Final = "stepcast/"  # of what is added to a graph; a slash begins no name that exporters give
_TABLE, _TABLE_OUT, _SLOTS = f"{_NAME}table", f"{_NAME}table_out", f"{_NAME}slots"
_NEW, _SOUND = f"{_NAME}new", f"{_NAME}sound"

# The table is (rows x pieces, floats per piece): one index per piece, so that a GPU's threads share a row.
_PLACES: Final = """
column = Unsqueeze(slots, innermost)
first = Mul(column, pieces)
places = Add(first, range)
"""
_GATHER: Final = """
found = Gather<axis=0>(table, places)
old = Reshape(found, packed)
"""
_SCATTER: Final = """
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
        "its axes are not batch, then time": axes != {(0, 1)} or any(s.batch_axis for s in m.states),
    }
    for reason, applies in why.items():
        if applies:
            raise CannotReside(reason)


def resident_model(path: Path, manifest: Manifest, pieces: int) -> bytes:
    """The model around a table: states are gathered from it by slot, and new ones scattered into it.

    All new states are one more output, packed rows (B, S) float32 in the manifest's order; another one (B, 1) is finite
    where a row's new state is, so that the host need not look through the states.

    Raises:
        CannotReside: the graph is too old or of fixed batch size, or no new state depends on an old one.
    """
    model, states = onnx.load(str(path)), dict(enumerate(manifest.states))
    graph, floats = model.graph, manifest.state_row_bytes // 4
    if onnx.opset(model) < 13:
        raise CannotReside(f"its opset is {onnx.opset(model)}, the least is 13")
    ports = {port.name: port for port in (*graph.input, *graph.output)}
    for name in (manifest.input.name, *(s.input for s in manifest.states)):
        if ports[name].type.tensor_type.shape.dim[0].HasField("dim_value"):
            raise CannotReside(f"input {name!r} has a fixed batch size")
    for state in manifest.states:
        graph.input.remove(ports[state.input])
        if state.output != manifest.output.name:
            graph.output.remove(ports[state.output])
    theirs = {f"in{n}": s.input for n, s in states.items()} | {f"out{n}": s.output for n, s in states.items()}
    apart = [f"{', '.join(f'row{n}' for n in states)} = Split<axis=1>(old, sizes)"]
    apart += [f"in{n} = Reshape(row{n}, shape{n})" for n in states]
    packed = [f"flat{n} = Flatten<axis=1>(out{n})" for n in states]
    packed += [f"new = Concat<axis=1>({', '.join(f'flat{n}' for n in states)})"]
    before = _nodes(theirs, _PLACES, _GATHER, *apart)
    after = _nodes(theirs, *packed, _SCATTER, _SOUNDNESS)
    onnx.replace(graph.node, [*before, *graph.node, *after])
    if _TABLE not in onnx.needed(graph.node, [_NEW]):  # else nothing would keep the scatter behind the gather
        raise CannotReside("its new states do not depend on the old ones")
    shapes = {f"shape{n}": [-1, *s.shape] for n, s in states.items()}
    graph.initializer.extend(_constants(pieces, floats, sizes=[s.size for s in manifest.states], **shapes))
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((floats, 1), np.float32), f"{_NAME}zeros"))
    graph.input.extend([_port(_TABLE, floats // pieces), _port(_SLOTS)])
    graph.output.extend([_port(_TABLE_OUT, floats // pieces), _port(_NEW, floats), _port(_SOUND, 1)])
    return bytes(model.SerializeToString())


def _upload_model(floats: int, pieces: int) -> bytes:
    """(table, slots (M,), states (M, S)) -> the table with these rows."""
    inputs = [_port(_TABLE, floats // pieces), _port(_SLOTS), _port(_NEW, floats)]
    outputs = [_port(_TABLE_OUT, floats // pieces)]
    nodes, constants = _nodes({}, _PLACES, _SCATTER), _constants(pieces, floats)
    graph = onnx.helper.make_graph(nodes, "upload", inputs, outputs, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _nodes(theirs: Mapping[str, str], *lines: str) -> list[Any]:
    """Nodes as onnx.parser reads them; tensors have the names in `theirs`, or our prefix."""
    nodes = [onnx.parser.parse_node(line) for line in "\n".join(lines).splitlines() if line]
    for node in nodes:
        for names in (node.input, node.output):
            onnx.replace(names, [theirs.get(name, _NAME + name) for name in names])
    return nodes


def _constants(pieces: int, floats: int, **more: list[int]) -> list[Any]:
    """What the nodes know by name, int64."""
    values = {
        "innermost": [-1],
        "pieces": [pieces],
        "range": list(range(pieces)),
        "packed": [-1, floats],
        "cut": [-1, pieces, floats // pieces],
        **more,
    }
    return [onnx.numpy_helper.from_array(np.array(value, np.int64), _NAME + name) for name, value in values.items()]


def _port(name: str, width: int = 0) -> Any:
    """Rows of floats of some width, or one int64 each."""
    shape, kind = ([None, width], onnx.TensorProto.FLOAT) if width else ([None], onnx.TensorProto.INT64)
    return onnx.helper.make_tensor_value_info(name, kind, shape)
