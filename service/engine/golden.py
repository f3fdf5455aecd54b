"""The proof of a version: golden.npz, recorded when the model was exported, must come out of the graph again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from stepcast.errors import ManifestError
from stepcast.manifest import GOLDEN_FILE, MODEL_FILE, Manifest

from .arrays import Array, Bytes, Floats, RunGraph
from .buffers import blank_rows, row_type, rows_of
from .onnx_session import reading

RunSteps = Callable[[Floats, Bytes], tuple[Floats, Bytes]]  # as `BoundSteps.run`
_MOST_STEPS: Final = 100  # that are compared bit by bit
RECURRENT: Final = ("LSTM", "GRU", "RNN")


class Proof(NamedTuple):
    """What running golden.npz showed: the largest absolute errors."""

    rows: int
    steps: int
    output_error: float
    state_error: float
    stepped: bool


class Golden:
    """The arrays of a model's golden.npz; raises ManifestError where it cannot be read or lacks what is needed."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self._manifest, self._row = directory, manifest, row_type(manifest)
        path = directory / GOLDEN_FILE
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays: dict[str, Array] = dict(file)
        except (OSError, ValueError) as error:
            raise ManifestError(f"{path}: cannot be read ({error})") from error
        missing = {"x", "lengths", "y"} - set(arrays)
        if missing:
            raise ManifestError(f"{path}: arrays {sorted(missing)} are missing")
        self._x = np.ascontiguousarray(arrays["x"], np.float32)  # (B, T, F)
        self._lengths = np.ascontiguousarray(arrays["lengths"], np.int32)  # (B,)
        self._y = arrays["y"]  # (B, T, O)
        shape = self._x.shape[:2]
        want = (*shape, manifest.n_features), shape[:1], (*shape, manifest.n_outputs)
        got = self._x.shape, self._lengths.shape, self._y.shape
        if got != want:
            raise ManifestError(f"{path}: x, lengths and y are {got}, want {want}")
        self._before, self._after = self._states(arrays, "state_in"), self._states(arrays, "state_out")

    def prove(self, run: RunGraph) -> Proof:
        """Reproduce it in one call and, where the model streams, one step at a time; raises ManifestError if not."""
        whole = self._compare("one call", lambda: run(self._x, self._lengths, self._before))
        stepped = self.prove_steps(run) if self._manifest.streaming else (0.0, 0.0)
        output_error, state_error = map(max, whole, stepped)
        return Proof(len(self._x), self._x.shape[1], output_error, state_error, self._manifest.streaming)

    def prove_steps(self, run: RunGraph) -> tuple[float, float]:
        """The same by single steps alone; the largest errors of outputs and states."""
        return self._compare("one step at a time", lambda: self._one_by_one(run))

    def prove_same(self, run: RunSteps, other: RunSteps) -> None:
        """Raises ManifestError unless both give the same bits, step after step, for readings of golden.npz."""
        x, states = self.samples()
        for at in range(min(len(x), _MOST_STEPS)):
            now = np.take(x, range(at, at + len(states)), axis=0, mode="wrap")[:, None]
            (y, after), (want, states) = run(now, states), other(now, states)
            if y.tobytes() != want.tobytes() or after.tobytes() != states.tobytes():
                raise ManifestError(f"{self._directory}: single steps are not bit for bit those of {MODEL_FILE}")

    def samples(self) -> tuple[Floats, Bytes]:
        """Numbers such as the model gets: readings of single steps (M, F), and packed states (2 B, row_bytes)."""
        there = np.arange(self._x.shape[1]) < self._lengths[:, None]  # (B, T)
        return self._x[there], np.concatenate([self._before, self._after])

    def _states(self, arrays: Mapping[str, Array], side: str) -> Bytes:
        """Packed states (B, row_bytes)."""
        packed, tensors = blank_rows(len(self._x), self._row)
        for state in self._manifest.states:
            name, want = f"{side}.{state.layer}.{state.key}", (len(self._x), *state.shape)
            got = arrays[name].shape if name in arrays else None
            if got != want:
                raise ManifestError(f"golden.npz: {name} is {got}, want {want}")
            tensors[state.input][:] = arrays[name]
        return packed

    def _one_by_one(self, run: RunGraph) -> tuple[Floats, Bytes]:
        states, y = self._before, np.zeros_like(self._y)
        for step in range(self._x.shape[1]):
            cut = slice(step, step + 1)
            alive = (self._lengths > step).astype(np.int32)
            y[:, cut], states = run(np.ascontiguousarray(self._x[:, cut]), alive, states)
        return y, states

    def _compare(self, how: str, answer: Callable[[], tuple[Floats, Bytes]]) -> tuple[float, float]:
        with reading(f"{self._directory}: {how}"):
            y, states = answer()
        valid = np.arange(self._x.shape[1]) < self._lengths[:, None]
        output_error = self._error(f"outputs in {how}", y[valid], self._y[valid])
        got, want = rows_of(states, self._row), rows_of(self._after, self._row)
        state_errors = [
            self._error(f"state {s.layer}.{s.key} in {how}", got[s.input], want[s.input]) for s in self._manifest.states
        ]
        return output_error, max(state_errors, default=0.0)

    def _error(self, what: str, got: Array, want: Array) -> float:
        """The largest absolute difference."""
        rtol, atol = self._manifest.tolerance.rtol, self._manifest.tolerance.atol
        a, b = got.astype(np.float64), want.astype(np.float64)
        error = np.abs(a - b)
        if not np.all(error <= atol + rtol * np.abs(b)):
            far = f"by up to {np.nanmax(error):.3g} (rtol {rtol:g}, atol {atol:g})"
            raise ManifestError(f"{self._directory}: {what} differ from golden.npz {far}")
        return float(error.max(initial=0.0))


def placements(profile: Path) -> dict[str, str]:
    """Which execution provider ran each recurrent node, by a profile that onnxruntime wrote (`Runtime.end_profile`)."""
    return {
        event["name"].removesuffix("_kernel_time"): event["args"]["provider"]
        for event in json.loads(profile.read_text())
        if event.get("cat") == "Node" and event.get("args", {}).get("op_name") in RECURRENT
    }
