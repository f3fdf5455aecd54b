"""One loaded model: initial states, runs, single steps.

States travel packed: uint8 (B, row_bytes), a row being every state tensor of the manifest in order, as in a record.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from stepcast.errors import ManifestError
from stepcast.manifest import MODEL_FILE, Manifest, read_manifest

from .arrays import Array, Bytes, Floats, Ints, Lengths, RunGraph, State
from .buffers import BoundSteps, blank_rows, check_run, laid, narrowed, row_type, rows_of, step_ports, taken
from .golden import Golden, Proof
from .gpu_states import CannotReside, ResidentStates, StatesOf
from .onnx_session import check_signature, open_session
from .single_step_graph import single_step_graph

log = logging.getLogger("stepcast.runtime")


class Runtime:
    """The model version in a directory, ready to run; `profile` is the prefix of a file that onnxruntime writes.

    Raises ManifestError: the directory is not what its manifest says, or `device` (auto, cpu, cuda) is not there.
    """

    def __init__(self, directory: Path, *, device: str = "auto", threads: int = 1, profile: Path | None = None) -> None:
        self.directory, self._threads = directory, threads
        self.manifest: Manifest = read_manifest(directory)
        self._session = open_session(directory / MODEL_FILE, device, threads, profile)
        check_signature(self.manifest, self._session)
        self.device = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self.row_bytes = self.manifest.state_row_bytes
        self._row = row_type(self.manifest)
        self._outputs = [self.manifest.output.name, *(s.output for s in self.manifest.states)]
        self._constants = {c.name: np.array(c.values, dtype=c.dtype).reshape(c.shape) for c in self.manifest.constants}
        self._initial_row = b"".join(np.full(s.shape, s.initial, dtype=s.dtype).tobytes() for s in self.manifest.states)
        ports = self.manifest.input, self.manifest.output
        self._into, self._out_of = ((port.batch_axis, port.time_axis) for port in ports)
        mixes_lengths = self.manifest.lengths is not None and self._into == self._out_of == (0, 1)
        self._runs_by_length = self.manifest.rows == "one" or not mixes_lengths
        self.resident: ResidentStates | None = None
        self.quick = False  # whether single steps have a graph of their own
        self._bound: BoundSteps | None = None
        if self.device == "cpu":
            plain = step_ports(self._session, self.manifest, self._constants)
            self._bound = BoundSteps(self._session, self.manifest, plain, self._constants)

    def initial(self, rows: int) -> bytes:
        """The packed state of `rows` rows that have no history."""
        return self._initial_row * rows

    def run(self, x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
        """Advance B rows by up to T steps; raises NonFinite where an output or a state of some row is NaN or infinite.

        Args:
            x: (B, T, F) float32.
            lengths: (B,) int32, valid steps per row; None: T in every row. A row of length 0 keeps its state.
            states: (B, row_bytes) uint8.

        Gives y (B, T, O) float32, of which steps past a row's length mean nothing, and the new states.
        """
        single = self._bound if x.shape[1] == 1 else None
        if single is not None and len(x) and (lengths is None or lengths.all()):
            return single.run(x, states)
        by_length = single is not None or self._runs_by_length
        y, new = (self._run_by_length if by_length else self._run_graph)(x, lengths, states)
        check_run(y, lengths, rows_of(new, self._row).values())
        return y, new

    def step(self, x: Floats, before: Sequence[Bytes], after: Sequence[Bytes], tags: Ints | None = None) -> Floats:
        """Advance R rows, x (R, F), by one step, wherever their states are; y (R, O) float32 is the caller's own.

        Args:
            before: Packed states of the R rows in order, each uint8 (b, n * row_bytes): b sessions of n rows, a
                session's bytes being contiguous.
            after: Where the new states go, in the same cuts; where NonFinite is raised, these mean nothing.
            tags: (R,) of the states, as for `run_resident`.
        """
        if self._bound is not None and self.resident is None:
            return self._bound.step(x, before, after)

        def states_of(rows: Ints) -> Bytes:
            joined = before[0] if len(before) == 1 else np.concatenate([part.reshape(-1) for part in before])
            return joined.reshape(len(x), -1)[rows]

        tags = np.zeros(len(x), np.int64) if tags is None else tags
        y, new = self.run_resident(x[:, None], None, tags, states_of)
        flat, end = new.reshape(-1), 0
        for part in after:
            part[:] = flat[end : (end := end + part.size)].reshape(part.shape)
        return np.ascontiguousarray(y[:, 0])

    def step_one(self, x: bytes, record: bytes, at: int, rows: int = 1) -> tuple[Floats, bytes] | None:
        """`step` for one session of N rows alone, x (N, F), its packed state at offset `at` of a record.

        Gives y (N, O) and the new packed state; None where only `step` is possible: on CUDA and with resident states.
        """
        if self._bound is None or self.resident is not None:
            return None
        return self._bound.step_one(x, record, at, rows)

    def run_resident(self, x: Floats, lengths: Lengths | None, tags: Ints, states_of: StatesOf) -> tuple[Floats, Bytes]:
        """As `run`, for rows whose states may be on the device already (gpu_states.py); else it does nothing but `run`.

        The new states are valid until the next call. Where NonFinite is raised, no tag has changed.

        Args:
            tags: (B,) int64 of the states before, 0 where there is none (a state that was loaded or set); changed in
                place to those of the new states. The caller drops a tag together with the state's bytes.
            states_of: Gives the packed states (M, row_bytes) of rows (M,) that are not on the device.
        """
        if self.resident is not None and len(x) <= self.resident.capacity:
            return self.resident.run(x, lengths, tags, states_of)
        y, new = self.run(x, lengths, states_of(np.arange(len(x))))
        tags[:] = 0
        return y, new

    def reside(self, budget_bytes: int, *, grain: int | None = None) -> bool:
        """Keep states of hot rows on the device from now on, in a table of up to budget_bytes.

        False where it is not possible or does not reproduce golden.npz: the log says why, and all runs are plain ones.
        """
        with self._trying("states do not stay on the device"):
            opener = partial(open_session, device=self.device, threads=self._threads)
            model = self.directory / MODEL_FILE
            self.resident = ResidentStates(model, self.manifest, opener, self.device, budget_bytes, grain)
            Golden(self.directory, self.manifest).prove(self._run_tagged())
            log.info("%s: states of %d rows stay on the device", self.directory, self.resident.capacity)
            return True
        self.resident = None
        return False

    def quicken(self) -> bool:
        """Make single steps by a graph of their own from now on (single_step_graph.py).

        False where there is none, or it does not reproduce golden.npz (the log says why): steps go as before. Where the
        manifest wants exact steps, it must give the bits that model.onnx gives here, on this machine.
        """
        plain, exact = self._bound, self.manifest.single_steps == "exact"
        if plain is None or not self.manifest.streaming or self.manifest.rows == "one":
            return False
        with self._trying("single steps have no graph of their own"):
            made = single_step_graph(self.directory / MODEL_FILE, plain.ports, self.manifest.lengths, exact=exact)
            if made is not None:
                session = open_session(made.model, self.device, self._threads)
                self._bound = BoundSteps(session, self.manifest, made.ports, self._constants)
                golden = Golden(self.directory, self.manifest)
                golden.prove_steps(self.run)
                if exact:
                    golden.prove_same(self._bound.run, plain.run)
                self.quick = True
                return True
        self._bound = plain
        return False

    def prove(self) -> Proof:
        """Reproduce golden.npz, or raise ManifestError: see `Golden`."""
        return Golden(self.directory, self.manifest).prove(self.run)

    def end_profile(self) -> Path:
        """The profile of model.onnx so far, where one was asked for; it ends here."""
        return Path(self._session.end_profiling())

    def unpack(self, states: bytes, rows: int) -> State:
        """Packed state as {layer: {key: array (rows, *shape)}}."""
        found = rows_of(np.frombuffer(states, np.uint8).reshape(rows, self.row_bytes), self._row)
        layers = self.manifest.layers.items()
        return {layer: {key: np.ascontiguousarray(found[t.input]) for key, t in keys.items()} for layer, keys in layers}

    def pack(self, state: Mapping[str, Mapping[str, Array]]) -> bytes:
        """The inverse of unpack; arrays have the manifest's dtypes and shapes already."""
        values = {tensor.input: state[tensor.layer][tensor.key] for tensor in self.manifest.states}
        packed, tensors = blank_rows(max(map(len, values.values()), default=0), self._row)
        for name, value in values.items():
            tensors[name][:] = value
        return packed.tobytes()

    def _run_by_length(self, x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
        """Where the graph takes no lengths, no time or other axes: rows of equal length together, or step by step."""
        rows, steps = x.shape[:2]
        each = np.full(rows, steps, np.int32) if lengths is None else lengths
        y = np.zeros((rows, steps, self.manifest.n_outputs), np.float32)
        new = np.array(states)
        if self.manifest.input.time_axis is None or self.manifest.output.time_axis is None:
            spans = [(t, t + 1, each > t) for t in range(each.max(initial=0))]
        else:
            groups = range(rows) if self.manifest.rows == "one" else np.unique(each)
            of = np.arange(rows) if self.manifest.rows == "one" else each
            spans = [(0, int(each[of == group][0]), of == group) for group in groups]
        for start, end, there in spans:
            pick, cut = np.flatnonzero(there), slice(start, end)
            if self._bound is not None and end - start == 1:
                y[pick, cut], new[pick] = self._bound.run(x[pick, cut], new[pick])
            elif end > start:
                y[pick, cut], new[pick] = self._run_graph(x[pick, cut], None, new[pick])
        return y, new

    def _run_graph(self, x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
        """One run of model.onnx; of rows of equal length, where it does not mix lengths."""
        spec, rows, steps = self.manifest, *x.shape[:2]
        shape = spec.row_shape
        fed = laid(x.reshape(rows, steps, *shape), self._into).astype(spec.input.dtype, copy=False)
        feeds = {spec.input.name: fed, **self._constants}
        tensors = rows_of(states, self._row)
        for state in spec.states:
            feeds[state.input] = laid(tensors[state.input], (state.batch_axis,))
        if spec.lengths is not None:
            feeds[spec.lengths] = np.full(rows, steps, np.int32) if lengths is None else lengths
        y, *values = self._session.run(self._outputs, feeds)
        new, tensors = blank_rows(rows, self._row)
        for state, value in zip(spec.states, values, strict=True):
            tensors[state.input][:] = taken(value, (state.batch_axis,))
        return narrowed(taken(y, self._out_of)).reshape(rows, steps, spec.n_outputs), new

    def _run_tagged(self) -> RunGraph:
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
            why = error if isinstance(error, CannotReside | ManifestError) else f"{type(error).__name__}: {error}"
            log.warning("%s: %s: %s", self.directory / MODEL_FILE, what, why)
