"""One loaded model: initial states, runs, single steps, states packed and unpacked.

States travel packed: uint8 (B, row_bytes), a row being every state tensor of the manifest in order. That is what a
session's record holds, so gathering a batch is joining bytes.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from stepcast.errors import ManifestError
from stepcast.manifest import MODEL_FILE, InputTensor, Manifest, OutputTensor, read_manifest

from .arrays import Array, Bytes, Floats, Ints, Lengths, State
from .buffers import BoundSteps, blank_rows, check_run, row_type, rows_of, step_ports
from .golden import Golden, Proof, Run
from .gpu_states import CannotReside, ResidentStates, StatesOf
from .onnx_session import check_signature, open_session
from .single_step_graph import single_step_graph

log = logging.getLogger("stepcast.runtime")


class Runtime:
    """A model version, ready to run.

    Args:
        directory: models/<name>/<version>/.
        device: auto takes CUDA when onnxruntime has it, cuda insists on it.
        threads: onnxruntime's intra-op threads.
        profile: Prefix of a file that onnxruntime writes (`end_profile`).

    Raises:
        ManifestError: the directory is not what its manifest says, or the device is not there.

    Attributes:
        quick: Whether single steps have a graph of their own.
    """

    def __init__(self, directory: Path, *, device: str = "auto", threads: int = 1, profile: Path | None = None) -> None:
        self.directory = directory
        self._threads = threads
        self.resident: ResidentStates | None = None
        self.manifest: Manifest = read_manifest(directory)
        self._session = open_session(directory / MODEL_FILE, device, threads, profile)
        check_signature(self.manifest, self._session)
        self.device = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self.row_bytes = self.manifest.state_row_bytes
        self._row = row_type(self.manifest)
        self._outputs = [self.manifest.output.name, *(s.output for s in self.manifest.states)]
        self._constants = {c.name: np.array(c.values, dtype=c.dtype).reshape(c.shape) for c in self.manifest.constants}
        self._initial_row = b"".join(np.full(s.shape, s.initial, dtype=s.dtype).tobytes() for s in self.manifest.states)
        axes = {(port.batch_axis, port.time_axis) for port in (self.manifest.input, self.manifest.output)}
        self._mixes_lengths = self.manifest.lengths is not None and axes == {(0, 1)}
        self.quick = False
        self._bound: BoundSteps | None = None
        if self.device == "cpu":
            ports = step_ports(self._session, self.manifest, self._constants)
            self._bound = BoundSteps(self._session, self.manifest, ports, self._constants)

    def initial(self, rows: int) -> bytes:
        """The packed state of `rows` rows that have no history."""
        return self._initial_row * rows

    def run(self, x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
        """Advance B rows by up to T steps.

        Args:
            x: (B, T, F) float32.
            lengths: (B,) int32, valid steps per row; None: T in every row. A row of length 0 keeps its state.
            states: (B, row_bytes) uint8.

        Returns:
            y (B, T, O) float32, of which steps past a row's length mean nothing, and the new states.

        Raises:
            NonFinite: an output or a state of some row is NaN or infinite.
        """
        if x.shape[1] == 1 and len(x) and self._bound is not None:
            return self._bound.run(x, lengths, states)
        y, new = (self._run_graph if self._mixes_lengths else self._run_by_length)(x, lengths, states)
        check_run(y, lengths, rows_of(new, self._row).values())
        return y, new

    def step(self, x: Floats, before: Sequence[Bytes], after: Sequence[Bytes], tags: Ints | None = None) -> Floats:
        """Advance R rows by one step, their states being wherever they are.

        Args:
            x: (R, F) float32.
            before: Packed states, each uint8 (b, n * row_bytes): b sessions of n rows, the bytes of a session being
                contiguous. Together R rows, in order.
            after: Where the new states go, in the same cuts.
            tags: (R,) of the states, as for `run_resident`.

        Returns:
            y (R, O) float32, the caller's own.

        Raises:
            NonFinite: as `run`; what `after` holds means nothing then.
        """
        if self._bound is not None and self.resident is None:
            return self._bound.step(x, before, after)
        tags = np.zeros(len(x), np.int64) if tags is None else tags
        y, new = self.run_resident(x[:, None], None, tags, lambda rows: _joined(before, len(x))[rows])
        flat, at = new.reshape(-1), 0
        for part in after:
            part[:] = flat[at : at + part.size].reshape(part.shape)
            at += part.size
        return np.ascontiguousarray(y[:, 0])

    def step_one(self, x: bytes, record: bytes, at: int, rows: int = 1) -> tuple[Floats, bytes] | None:
        """The same for one session alone; None on CUDA and with resident states, where `step` is the way.

        Args:
            x: (N, F) float32.
            record: Bytes with the packed state of N rows at offset `at`.
            rows: N.

        Returns:
            y (N, O) float32, the caller's own, and the new packed state.

        Raises:
            NonFinite: as `run`.
        """
        if self._bound is None or self.resident is not None:
            return None
        return self._bound.step_one(x, record, at, rows)

    def run_resident(self, x: Floats, lengths: Lengths | None, tags: Ints, states_of: StatesOf) -> tuple[Floats, Bytes]:
        """As `run`, for rows whose states may be on the device already.

        A tag names one state of one row for as long as this process lives. The caller keeps it with the state's
        bytes and drops it together with them (a state that was loaded or set has tag 0). It need not tell whether a
        result was committed: of a refused one it forgets the tag, and what it goes back to is uploaded. Without
        residency all of this does nothing but `run`.

        Args:
            x, lengths: As for `run`.
            tags: (B,) int64, changed in place when the run has succeeded: from those of the states before, 0 where
                there is none, to those of the new states.
            states_of: Takes numbers of rows (M,) and gives their packed states (M, row_bytes) uint8; called for the
                rows that are not on the device, if any.

        Returns:
            As `run`. The new states are valid until the next call.

        Raises:
            NonFinite: as `run`; the batch's states have left the device, and no tag has changed.
        """
        if self.resident is not None and len(x) <= self.resident.capacity:
            return self.resident.run(x, lengths, tags, states_of)
        y, new = self.run(x, lengths, states_of(np.arange(len(x))))
        tags[:] = 0
        return y, new

    def reside(self, budget_bytes: int, *, grain: int | None = None) -> bool:
        """Keep states of hot rows on the device from now on; a table of up to budget_bytes is allocated.

        Returns:
            Whether it was possible and reproduced golden.npz. If not, the log says why, and all runs are plain ones.
        """
        with self._trying("states do not stay on the device"):
            self.resident = ResidentStates(
                self.directory / MODEL_FILE,
                self.manifest,
                lambda graph: open_session(graph, self.device, self._threads),
                device=self.device,
                budget_bytes=budget_bytes,
                grain=grain,
            )
            Golden(self.directory, self.manifest).prove(self._run_tagged())
            log.info("%s: states of %d rows stay on the device", self.directory, self.resident.capacity)
            return True
        self.resident = None
        return False

    def quicken(self) -> bool:
        """Make single steps by a graph of their own from now on (single_step_graph.py).

        Returns:
            Whether there is one and it reproduced golden.npz. If it did not, the log says why; steps go as before.
        """
        if self._bound is None or not self.manifest.streaming:
            return False
        with self._trying("single steps have no graph of their own"):
            made = single_step_graph(self.directory / MODEL_FILE, self._bound.ports, self.manifest.lengths)
            if made is not None:
                session = open_session(made.model, self.device, self._threads)
                bound = BoundSteps(session, self.manifest, made.ports, self._constants)
                Golden(self.directory, self.manifest).prove_steps(bound.run)
                self._bound, self.quick = bound, True
        return self.quick

    def prove(self) -> Proof:
        """Reproduce golden.npz in one call and, where the model streams, one step at a time.

        Raises:
            ManifestError: golden.npz is missing or wrong, or an output or state is off by more than the tolerance.
        """
        return Golden(self.directory, self.manifest).prove(self.run)

    def end_profile(self) -> Path:
        """The profile of model.onnx so far, where one was asked for; it ends here."""
        return Path(self._session.end_profiling())

    def unpack(self, states: bytes, rows: int) -> State:
        """Packed state as {layer: {key: array (rows, *shape)}}."""
        tensors = rows_of(np.frombuffer(states, np.uint8).reshape(rows, self.row_bytes), self._row)
        state: State = {}
        for tensor in self.manifest.states:
            state.setdefault(tensor.layer, {})[tensor.key] = np.ascontiguousarray(tensors[tensor.input])
        return state

    def pack(self, state: Mapping[str, Mapping[str, Array]]) -> bytes:
        """The inverse of unpack; arrays have the manifest's dtypes and shapes already."""
        values = [state[tensor.layer][tensor.key] for tensor in self.manifest.states]
        packed, tensors = blank_rows(len(values[0]) if values else 0, self._row)
        for tensor, value in zip(tensors.values(), values, strict=True):
            tensor[:] = value
        return packed.tobytes()

    def _run_by_length(self, x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
        """A graph that takes no lengths, no time or other axes: rows of equal length go together, or step by step."""
        rows, steps = x.shape[:2]
        each = np.full(rows, steps, np.int32) if lengths is None else lengths
        y = np.zeros((rows, steps, self.manifest.n_outputs), np.float32)
        new = np.array(states)
        if self.manifest.input.time_axis is None or self.manifest.output.time_axis is None:
            spans = [(t, t + 1, each > t) for t in range(each.max(initial=0))]
        else:
            spans = [(0, int(length), each == length) for length in np.unique(each[each > 0])]
        for start, end, there in spans:
            pick = np.flatnonzero(there)
            run = self._bound.run if self._bound is not None and end - start == 1 else self._run_graph
            y[pick, start:end], new[pick] = run(x[pick, start:end], None, new[pick])
        return y, new

    def _run_graph(self, x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
        """One run of model.onnx; of rows of equal length, where it does not mix lengths."""
        spec, rows, steps = self.manifest, *x.shape[:2]
        into, out_of = _axes(spec.input), _axes(spec.output)
        moved = np.moveaxis(x if len(into) > 1 else x[:, 0], range(len(into)), into)
        feeds = {spec.input.name: np.ascontiguousarray(moved), **self._constants}
        tensors = rows_of(states, self._row)
        for state in spec.states:
            feeds[state.input] = np.ascontiguousarray(np.moveaxis(tensors[state.input], 0, state.batch_axis))
        if spec.lengths is not None:
            feeds[spec.lengths] = np.full(rows, steps, np.int32) if lengths is None else lengths
        y, *values = self._session.run(self._outputs, feeds)
        new, tensors = blank_rows(rows, self._row)
        for state, value in zip(spec.states, values, strict=True):
            tensors[state.input][:] = np.moveaxis(value, state.batch_axis, 0)
        y = np.moveaxis(y, out_of, range(len(out_of)))
        return y.reshape(rows, steps, spec.n_outputs), new

    def _run_tagged(self) -> Run:
        """`run` by way of the table, for one batch after the other with the same rows, in which each goes on."""
        tags: dict[bytes, Ints] = {}

        def run(x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
            mine = tags.pop(states.tobytes(), np.zeros(len(x), np.int64))
            y, new = self.run_resident(x, lengths, mine, lambda rows: states[rows])
            tags[new.tobytes()] = mine
            return y, new.copy()

        return run

    @contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        """Go on without what fails inside; the log says why."""
        try:
            yield
        except Exception as error:  # onnx's and onnxruntime's exceptions have no common base but this
            known = isinstance(error, CannotReside | ManifestError)
            why = error if known else f"{type(error).__name__}: {error}"
            log.warning("%s: %s: %s", self.directory / MODEL_FILE, what, why)


def _joined(parts: Sequence[Bytes], rows: int) -> Bytes:
    """Packed rows (R, row_bytes) of parts (b, n * row_bytes)."""
    if len(parts) == 1 and len(parts[0]) == rows:
        return parts[0]
    return np.concatenate([part.reshape(-1) for part in parts]).reshape(rows, -1)


def _axes(port: InputTensor | OutputTensor) -> list[int]:
    """Where a graph has the rows, and the steps if it has steps."""
    return [port.batch_axis] if port.time_axis is None else [port.batch_axis, port.time_axis]
