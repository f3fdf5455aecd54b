"""One loaded model: pack states, run ONNX, unpack states, prove golden.npz. The only door to onnxruntime.

States travel packed: uint8 [B, state_row_bytes], a row being every state tensor of the manifest in order. That is
what a session's record holds, so gathering a batch is joining bytes.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from stepcast.errors import ManifestError, NonFinite
from stepcast.manifest import GOLDEN_FILE, ITEM_BYTES, MODEL_FILE, Manifest, StateTensor, read_manifest

from .buffers import BoundSteps
from .gpu_states import CanNotReside, Ints, ResidentStates, StatesOf
from .single_step_graph import one_step_graph

log = logging.getLogger("stepcast.runtime")

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Lengths = npt.NDArray[np.int32]

Run = Callable[[Floats, Lengths | None, Bytes], tuple[Floats, Bytes]]

_NOT_FINITE: Final = "the model's outputs or its state would not be finite; nothing was committed"
RECURRENT: Final = ("LSTM", "GRU", "RNN")
_ORT_TYPES: Final = {
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "bool": "tensor(bool)",
}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph; axes of no fixed size have a name, or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype} [{', '.join(map(str, self.shape))}]"

    @property
    def fixed_rows(self) -> bool:
        """Whether one axis at most is of no fixed size: a state's, not a sequence's."""
        return sum(not isinstance(size, int) for size in self.shape) <= 1


@dataclass(frozen=True, slots=True)
class Proof:
    """What running golden.npz showed: the largest absolute errors."""

    rows: int
    steps: int
    output_error: float
    state_error: float
    stepped: bool


class Runtime:
    """A model version, ready to run.

    Args:
        directory: models/<name>/<version>/.
        device: auto takes CUDA when onnxruntime has it, cuda insists on it.
        threads: onnxruntime's intra-op threads.

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
        _check_signature(self.manifest, self._session)
        self.device = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self.row_bytes = self.manifest.state_row_bytes
        self._states = _layout(self.manifest)
        self._outputs = [self.manifest.output.name, *(s.output for s in self.manifest.states)]
        self._constants = {c.name: np.array(c.values, dtype=c.dtype).reshape(c.shape) for c in self.manifest.constants}
        self._initial_row = b"".join(np.full(s.shape, s.initial, dtype=s.dtype).tobytes() for s in self.manifest.states)
        self._plain = self._is_plain()
        self._all_float32 = all(s.dtype == "float32" for s in self.manifest.states)
        bindable = self._plain and self._all_float32 and not any(s.batch_axis for s in self.manifest.states)
        self._bound: BoundSteps | None = None
        self.quick = False
        if bindable and self.device == "cpu":
            self._bound = BoundSteps(self._session, self.manifest, self._constants)

    def initial(self, rows: int) -> bytes:
        """The packed state of `rows` rows that have no history."""
        return self._initial_row * rows

    def run(self, x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
        """Advance B rows by up to T steps.

        Args:
            x: (B, T, F) float32.
            lengths: (B,) int32, valid steps per row; None: T in every row. A row of length 0 keeps its state.
            states: (B, state_row_bytes) uint8.

        Returns:
            y (B, T, O) float32, of which steps past a row's length mean nothing, and the new states.

        Raises:
            NonFinite: an output or a state of some row is NaN or infinite.
        """
        y, new = (self._run_graph if self._plain else self._run_foreign)(x, lengths, states)
        self._check_finite(y, lengths, new)
        return y, new

    def step(self, x: Floats, before: Sequence[Bytes], after: Sequence[Bytes], tags: Ints | None = None) -> Floats:
        """Advance B rows by one step, their states being wherever they are.

        Args:
            x: (B, F) float32.
            before: Packed states, together B rows, each uint8 (rows, state_row_bytes).
            after: Where the new states go, in the same cuts.
            tags: Of the states, as for `run_resident`.

        Returns:
            y (B, O) float32, the caller's own.

        Raises:
            NonFinite: as `run`; what `after` holds means nothing then.
        """
        if self._bound is not None and self.resident is None:
            y, finite = self._bound.step(x, before, after)
            if not finite:
                raise NonFinite(_NOT_FINITE)
            return y
        states = before[0] if len(before) == 1 else np.concatenate(before)
        if tags is None:
            tags = np.zeros(len(x), np.int64)
        y, new = self.run_resident(x[:, None], None, tags, lambda rows: states[rows])
        at = 0
        for part in after:
            part[:] = new[at : at + len(part)]
            at += len(part)
        return np.ascontiguousarray(y[:, 0])

    def step_one(self, x: bytes, record: bytes, at: int) -> tuple[Floats, bytes] | None:
        """The same for one row, None where the graph or the device takes no such way.

        Args:
            x: (F) float32.
            record: Bytes with the packed state at offset `at`.

        Returns:
            y (1, O) float32, the caller's own, and the new packed state.

        Raises:
            NonFinite: as `run`.
        """
        if self._bound is None or self.resident is not None:
            return None
        y, state, finite = self._bound.step_one(x, record, at)
        if not finite:
            raise NonFinite(_NOT_FINITE)
        return y, state

    def run_resident(self, x: Floats, lengths: Lengths | None, tags: Ints, states_of: StatesOf) -> tuple[Floats, Bytes]:
        """As `run`, for rows whose states may be on the device already.

        A tag names one state of one row for as long as this process lives. The caller keeps it beside the state's
        bytes and drops it together with them (a state that was loaded or set has tag 0). It need not tell whether a
        result was committed: of a refused one it forgets the tag, and what it goes back to is uploaded. Without
        residency all of this does nothing but `run`.

        Args:
            x, lengths: As for `run`.
            tags: (B,) int64, changed in place when the run has succeeded: from those of the states before, 0 where
                there is none, to those of the new states.
            states_of: Takes numbers of rows (M,) and gives their packed states (M, state_row_bytes) uint8; called
                for the rows that are not on the device, if any.

        Returns:
            As `run`. The new states are valid until the next call.

        Raises:
            NonFinite: as `run`; the batch's states have left the device, and no tag has changed.
        """
        if self.resident is not None and len(x) <= self.resident.capacity:
            return self.resident.run(x, lengths, tags, states_of, self._check_resident)
        y, new = self.run(x, lengths, states_of(np.arange(len(x))))
        tags[:] = 0
        return y, new

    def reside(self, budget_bytes: int, *, grain: int | None = None) -> bool:
        """Keep states of hot rows on the device from now on; a table of up to budget_bytes is allocated.

        Returns:
            Whether it was possible and reproduced golden.npz. If not, the log says why, and all runs are plain ones.
        """
        model = self.directory / MODEL_FILE
        try:
            self.resident = ResidentStates(
                model,
                self.manifest,
                lambda graph: open_session(graph, self.device, self._threads),
                device=self.device,
                budget_bytes=budget_bytes,
                initial=self.initial(1),
                grain=grain,
            )
            _Prover(self, self._run_tagged()).prove()
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            self.resident = None
            why = error if isinstance(error, CanNotReside | ManifestError) else f"{type(error).__name__}: {error}"
            log.warning("%s: states do not stay on the device: %s", model, why)
            return False
        log.info("%s: states of %d rows stay on the device", model, self.resident.capacity)
        return True

    def quicken(self) -> bool:
        """Make plain single steps by a graph of their own from now on (service/engine/single_step_graph.py).

        Returns:
            Whether there is one and it reproduced golden.npz. If it did not, the log says why; steps go as before.
        """
        before = self._bound
        if before is None or not self.manifest.streaming:
            return False
        path = self.directory / MODEL_FILE
        try:
            spec = self.manifest
            graph = one_step_graph(path, spec.input.name, spec.output.name, spec.lengths)
            if graph is None:
                return False
            self._bound = BoundSteps(open_session(graph, self.device, self._threads), self.manifest, self._constants)
            _Prover(self, self._run_bound).prove_steps()
        except Exception as error:  # onnx's and onnxruntime's exceptions have no common base but this
            self._bound = before
            why = error if isinstance(error, ManifestError) else f"{type(error).__name__}: {error}"
            log.warning("%s: single steps have no graph of their own: %s", path, why)
            return False
        self.quick = True
        return True

    def _run_bound(self, x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
        """`run` for one step by way of `step`, of the rows that have it."""
        rows = np.arange(len(x)) if lengths is None else np.flatnonzero(lengths)
        y, new = np.zeros((len(x), 1, self.manifest.n_outputs), np.float32), np.array(states)
        if len(rows):
            after = new[rows]
            y[rows, 0] = self.step(np.ascontiguousarray(x[rows, 0]), [states[rows]], [after])
            new[rows] = after
        return y, new

    def _run_tagged(self) -> Run:
        """`run` by way of the table, for one batch after the other with the same rows, in which each goes on."""
        before, tags = b"", np.zeros(0, np.int64)

        def run(x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
            nonlocal before, tags
            if states.tobytes() != before:
                tags = np.zeros(len(x), np.int64)
            y, new = self.run_resident(x, lengths, tags, lambda rows: states[rows])
            before = new.tobytes()
            return y, new.copy()

        return run

    def prove(self) -> Proof:
        """Reproduce golden.npz in one call and, where the model streams, one step at a time.

        Raises:
            ManifestError: golden.npz is missing or wrong, or an output or state is off by more than the tolerance.
        """
        return _Prover(self, self.run).prove()

    def unpack(self, states: bytes, rows: int) -> dict[str, dict[str, npt.NDArray[Any]]]:
        """Packed state as {layer: {key: array (rows, *shape)}}."""
        table = np.frombuffer(states, np.uint8).reshape(rows, self.row_bytes)
        state: dict[str, dict[str, npt.NDArray[Any]]] = {}
        for tensor, cut in self._states:
            state.setdefault(tensor.layer, {})[tensor.key] = _tensor_rows(table[:, cut], tensor)
        return state

    def pack(self, state: dict[str, dict[str, npt.NDArray[Any]]]) -> bytes:
        """The inverse of unpack; arrays have the manifest's dtypes and shapes already."""
        values = [state[tensor.layer][tensor.key] for tensor, _ in self._states]
        if not values or not len(values[0]):
            return b""
        return np.concatenate([_byte_rows(value) for value in values], axis=1).tobytes()

    def _is_plain(self) -> bool:
        m = self.manifest
        return (
            m.lengths is not None
            and (m.input.batch_axis, m.input.time_axis) == (0, 1)
            and (m.output.batch_axis, m.output.time_axis) == (0, 1)
        )

    def _check_resident(self, y: Floats, lengths: Lengths | None, sound: Floats) -> None:
        _check_outputs(y, lengths)
        if not np.isfinite(sound).all():
            raise NonFinite("the model's state would not be finite; nothing was committed")

    def _check_finite(self, y: Floats, lengths: Lengths | None, states: Bytes) -> None:
        _check_outputs(y, lengths)
        if self._all_float32:
            flat = states.reshape(-1).view(np.float32)
            with np.errstate(over="ignore"):
                square = np.dot(flat, flat)
            finite = np.isfinite(square) or np.isfinite(flat).all()  # the product overflows first, cheaply
        else:
            finite = all(
                np.isfinite(np.ascontiguousarray(states[:, cut]).view(tensor.dtype)).all()
                for tensor, cut in self._states
                if tensor.dtype.startswith("float")
            )
        if not finite:
            raise NonFinite("the model's state would not be finite; nothing was committed")

    def _feeds(self, states: Bytes) -> dict[str, npt.NDArray[Any]]:
        feeds = dict(self._constants)
        for tensor, cut in self._states:
            rows = _tensor_rows(states[:, cut], tensor)
            feeds[tensor.input] = np.moveaxis(rows, 0, tensor.batch_axis) if tensor.batch_axis else rows
        return feeds

    def _packed(self, outputs: list[npt.NDArray[Any]], rows: int) -> Bytes:
        if not outputs:
            return np.empty((rows, 0), np.uint8)
        parts = []
        for (tensor, _), value in zip(self._states, outputs, strict=True):
            parts.append(_byte_rows(np.moveaxis(value, tensor.batch_axis, 0) if tensor.batch_axis else value))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _run_graph(self, x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
        feeds = self._feeds(states)
        feeds[self.manifest.input.name] = x
        if self.manifest.lengths is not None:
            feeds[self.manifest.lengths] = np.full(len(x), x.shape[1], np.int32) if lengths is None else lengths
        y, *new = self._session.run(self._outputs, feeds)
        return y, self._packed(new, len(x))

    def _run_foreign(self, x: Floats, lengths: Lengths | None, states: Bytes) -> tuple[Floats, Bytes]:
        """A graph without `lengths`, without a time axis or with other axes: rows of equal length go together."""
        rows, steps = x.shape[:2]
        each = np.full(rows, steps, np.int32) if lengths is None else lengths
        y = np.zeros((rows, steps, self.manifest.n_outputs), np.float32)
        new = np.array(states)
        stepwise = self.manifest.input.time_axis is None or self.manifest.output.time_axis is None
        spans = [(t, t + 1) for t in range(steps)] if stepwise else [(0, steps)]
        for start, stop in spans:
            for length in np.unique(each[each > start]):
                pick = np.flatnonzero(each > start if stepwise else each == length)
                end = stop if stepwise else int(length)
                y[pick, start:end], new[pick] = self._run_block(x[pick, start:end], new[pick])
                if stepwise:
                    break
        return y, new

    def _run_block(self, x: Floats, states: Bytes) -> tuple[Floats, Bytes]:
        """One run of rows of equal length through a graph with axes of its own."""
        spec, rows, steps = self.manifest, *x.shape[:2]
        feeds = self._feeds(states)
        feeds[spec.input.name] = np.ascontiguousarray(_to_graph(x, spec.input.batch_axis, spec.input.time_axis))
        if spec.lengths is not None:
            feeds[spec.lengths] = np.full(rows, steps, np.int32)
        y, *new = self._session.run(self._outputs, feeds)
        y = _from_graph(np.asarray(y, np.float32), spec.output.batch_axis, spec.output.time_axis)
        return y.reshape(rows, steps, spec.n_outputs), self._packed(new, rows)


def open_session(
    model: Path | bytes, device: str, threads: int = 1, profile: Path | None = None
) -> ort.InferenceSession:
    """A graph on a device; the arguments are Runtime's.

    Raises:
        ManifestError: onnxruntime can not load it, or the device is not there.
    """
    path = "a wrapped graph" if isinstance(model, bytes) else str(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if device == "cuda" and not cuda:
        raise ManifestError(f"device is 'cuda', onnxruntime has {ort.get_available_providers()}. Install service-gpu.")
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda and device != "cpu":
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA's libraries from their own packages, where they are not on the system's path
        # TF32 has 10 bits of mantissa: golden.npz would not be reproduced within float32's tolerance
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
    try:
        source = model if isinstance(model, bytes) else path
        session = ort.InferenceSession(source, options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise ManifestError(f"{path}: onnxruntime can not load it: {error}") from error
    if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise ManifestError(f"{path}: device is 'cuda', but onnxruntime fell back to {session.get_providers()}")
    return session


def signature(path: Path) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of a graph.

    Raises:
        ManifestError: onnxruntime can not load it.
    """
    session = open_session(path, "cpu")
    names = {name: dtype for dtype, name in _ORT_TYPES.items()}

    def port(given: Any) -> Port:
        return Port(given.name, names.get(given.type, given.type), tuple(given.shape))

    return [port(i) for i in session.get_inputs()], [port(o) for o in session.get_outputs()]


def runtime_version() -> str:
    """onnxruntime's version."""
    return str(ort.__version__)


def _check_signature(manifest: Manifest, session: ort.InferenceSession) -> None:
    inputs = {i.name: i.type for i in session.get_inputs()}
    outputs = {o.name: o.type for o in session.get_outputs()}
    want_in = {manifest.input.name: "tensor(float)"}
    if manifest.lengths is not None:
        want_in[manifest.lengths] = "tensor(int32)"
    want_in |= {c.name: _ORT_TYPES[c.dtype] for c in manifest.constants}
    want_in |= {s.input: _ORT_TYPES[s.dtype] for s in manifest.states}
    want_out = {manifest.output.name: "tensor(float)"} | {s.output: _ORT_TYPES[s.dtype] for s in manifest.states}
    for name, want in want_in.items():
        if inputs.get(name) != want:
            raise ManifestError(f"input {name!r} is {inputs.get(name)} in model.onnx, {want} in manifest.json")
    for name, want in want_out.items():
        if outputs.get(name) != want:
            raise ManifestError(f"output {name!r} is {outputs.get(name)} in model.onnx, {want} in manifest.json")
    extra = sorted(set(inputs) - set(want_in))
    if extra:
        raise ManifestError(f"model.onnx has inputs that manifest.json does not speak of: {extra}")


def _check_outputs(y: Floats, lengths: Lengths | None) -> None:
    if not np.isfinite(y).all():
        valid = y if lengths is None else y[np.arange(y.shape[1]) < lengths[:, None]]
        if not np.isfinite(valid).all():
            raise NonFinite("the model's outputs are not finite; nothing was committed")


def _layout(manifest: Manifest) -> list[tuple[StateTensor, slice]]:
    layout, start = [], 0
    for tensor in manifest.states:
        layout.append((tensor, slice(start, start + tensor.row_bytes)))
        start += tensor.row_bytes
    return layout


def _tensor_rows(cut: Bytes, tensor: StateTensor) -> npt.NDArray[Any]:
    return np.ascontiguousarray(cut).view(tensor.dtype).reshape(len(cut), *tensor.shape)


def _byte_rows(value: npt.NDArray[Any]) -> Bytes:
    rows = len(value)
    return np.ascontiguousarray(value).reshape(rows, -1).view(np.uint8)


def _to_graph(x: Floats, batch_axis: int, time_axis: int | None) -> Floats:
    if time_axis is None:
        return np.moveaxis(x[:, 0], 0, batch_axis)
    return np.moveaxis(x, (0, 1), (batch_axis, time_axis))


def _from_graph(y: Floats, batch_axis: int, time_axis: int | None) -> Floats:
    if time_axis is None:
        return np.moveaxis(y, batch_axis, 0)
    return np.moveaxis(y, (batch_axis, time_axis), (0, 1))


class _Prover:
    """Compares a runtime with the arrays that torch recorded when the model was exported."""

    def __init__(self, runtime: Runtime, run: Run) -> None:
        self.runtime, self.run = runtime, run
        path = runtime.directory / GOLDEN_FILE
        try:
            with np.load(path, allow_pickle=False) as file:
                self.golden = {name: file[name] for name in file.files}
        except (OSError, ValueError) as error:
            raise ManifestError(f"{path}: can not be read ({error})") from error
        missing = {"x", "lengths", "y"} - set(self.golden)
        if missing:
            raise ManifestError(f"{path}: arrays {sorted(missing)} are missing")
        self.x = np.ascontiguousarray(self.golden["x"], np.float32)
        self.lengths = np.ascontiguousarray(self.golden["lengths"], np.int32)

    def prove(self) -> Proof:
        rows, steps = self.x.shape[:2]
        whole = self.run(self.x, self.lengths, self._states("state_in"))
        output_error, state_error = self._compare(*whole, "one call")
        streams = self.runtime.manifest.streaming
        if streams:
            stepped = self._compare(*self._one_by_one(), "one step at a time")
            output_error, state_error = max(output_error, stepped[0]), max(state_error, stepped[1])
        return Proof(rows, steps, output_error, state_error, streams)

    def prove_steps(self) -> None:
        """The same by single steps alone."""
        self._compare(*self._one_by_one(), "one step at a time")

    def _states(self, side: str) -> Bytes:
        rows, row_bytes = len(self.x), self.runtime.row_bytes
        state: dict[str, dict[str, npt.NDArray[Any]]] = {}
        for tensor in self.runtime.manifest.states:
            value = self.golden.get(f"{side}.{tensor.layer}.{tensor.key}")
            if value is None or value.shape != (rows, *tensor.shape):
                got = None if value is None else value.shape
                raise ManifestError(
                    f"golden.npz: {side}.{tensor.layer}.{tensor.key} is {got}, want {(rows, *tensor.shape)}"
                )
            state.setdefault(tensor.layer, {})[tensor.key] = value.astype(tensor.dtype)
        return np.frombuffer(self.runtime.pack(state), np.uint8).reshape(rows, row_bytes)

    def _one_by_one(self) -> tuple[Floats, Bytes]:
        states, parts = self._states("state_in"), []
        for step in range(self.x.shape[1]):
            alive = (self.lengths > step).astype(np.int32)
            y, states = self.run(np.ascontiguousarray(self.x[:, step : step + 1]), alive, states)
            parts.append(y)
        y_all = np.concatenate(parts, axis=1) if parts else self.golden["y"]
        return y_all, states

    def _compare(self, y: Floats, states: Bytes, how: str) -> tuple[float, float]:
        valid = np.arange(self.x.shape[1]) < self.lengths[:, None]
        output_error = self._differ("outputs", y[valid], self.golden["y"][valid], how)
        state_error = 0.0
        got = self.runtime.unpack(states.tobytes(), len(self.x))
        want = self.runtime.unpack(self._states("state_out").tobytes(), len(self.x))
        for layer, keys in want.items():
            for key, value in keys.items():
                state_error = max(state_error, self._differ(f"state {layer}.{key}", got[layer][key], value, how))
        return output_error, state_error

    def _differ(self, what: str, got: npt.NDArray[Any], want: npt.NDArray[Any], how: str) -> float:
        if not want.size:
            return 0.0
        tolerance = self.runtime.manifest.tolerance
        a, b = got.astype(np.float64), want.astype(np.float64)
        error = np.abs(a - b)
        if not np.all(error <= tolerance.atol + tolerance.rtol * np.abs(b)):
            raise ManifestError(
                f"{self.runtime.directory}: {what} in {how} differ from golden.npz by up to {np.nanmax(error):.3g} "
                f"(rtol {tolerance.rtol:g}, atol {tolerance.atol:g})"
            )
        return float(error.max())


def placements(directory: Path, device: str, profile: Path) -> dict[str, str]:
    """Which execution provider runs each recurrent node, seen by running golden.npz under onnxruntime's profiler.

    Args:
        profile: Prefix of the profile file that onnxruntime writes.
    """
    runtime = Runtime(directory, device=device, profile=profile)
    runtime.prove()
    events = json.loads(Path(runtime._session.end_profiling()).read_text())
    return {
        event["name"].removesuffix("_kernel_time"): event["args"]["provider"]
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("op_name") in RECURRENT
    }


assert set(_ORT_TYPES) == set(ITEM_BYTES)
