"""The proof of a version: golden.npz, recorded when the model was exported, must come out of the graph again."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from stepcast.errors import ManifestError
from stepcast.manifest import GOLDEN_FILE, Manifest

from .arrays import Array, Bytes, Floats, Lengths
from .buffers import blank_rows, row_type, rows_of
from .onnx_session import reading

Run = Callable[[Floats, Lengths | None, Bytes], tuple[Floats, Bytes]]
"""As `Runtime.run`."""

RECURRENT: Final = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True, slots=True)
class Proof:
    """What running golden.npz showed: the largest absolute errors."""

    rows: int
    steps: int
    output_error: float
    state_error: float
    stepped: bool


class Golden:
    """The arrays of a model's golden.npz.

    Raises:
        ManifestError: the file cannot be read, or has not all that is needed.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self._manifest, self._row = directory, manifest, row_type(manifest)
        path = directory / GOLDEN_FILE
        try:
            with np.load(path, allow_pickle=False) as file:
                self._arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError) as error:
            raise ManifestError(f"{path}: cannot be read ({error})") from error
        missing = {"x", "lengths", "y"} - set(self._arrays)
        if missing:
            raise ManifestError(f"{path}: arrays {sorted(missing)} are missing")
        self._x = np.ascontiguousarray(self._arrays["x"], np.float32)  # (B, T, F)
        self._lengths = np.ascontiguousarray(self._arrays["lengths"], np.int32)  # (B,)
        shape, wide = self._x.shape[:2], (manifest.n_features, manifest.n_outputs)
        want = (*shape, wide[0]), shape[:1], (*shape, wide[1])
        got = self._x.shape, self._lengths.shape, self._arrays["y"].shape
        if got != want:
            raise ManifestError(f"{path}: x, lengths and y are {got}, want {want}")
        self._before, self._after = self._states("state_in"), self._states("state_out")

    def prove(self, run: Run) -> Proof:
        """Reproduce it in one call and, where the model streams, one step at a time.

        Raises:
            ManifestError: an output or a state is off by more than the tolerance, or the graph does not run.
        """
        whole = self._compare("one call", lambda: run(self._x, self._lengths, self._before))
        stepped = self.prove_steps(run) if self._manifest.streaming else (0.0, 0.0)
        output_error, state_error = np.maximum(whole, stepped).tolist()
        return Proof(len(self._x), self._x.shape[1], output_error, state_error, self._manifest.streaming)

    def prove_steps(self, run: Run) -> tuple[float, float]:
        """The same by single steps alone; the largest errors of outputs and states."""
        return self._compare("one step at a time", lambda: self._one_by_one(run))

    def _states(self, side: str) -> Bytes:
        """Packed states (B, row_bytes)."""
        packed, tensors = blank_rows(len(self._x), self._row)
        for state in self._manifest.states:
            name, want = f"{side}.{state.layer}.{state.key}", (len(self._x), *state.shape)
            value = self._arrays.get(name)
            if value is None or value.shape != want:
                raise ManifestError(f"golden.npz: {name} is {None if value is None else value.shape}, want {want}")
            tensors[state.input][:] = value
        return packed

    def _one_by_one(self, run: Run) -> tuple[Floats, Bytes]:
        states, y = self._before, np.zeros_like(self._arrays["y"])
        for step in range(self._x.shape[1]):
            alive = (self._lengths > step).astype(np.int32)
            out, states = run(np.ascontiguousarray(self._x[:, step : step + 1]), alive, states)
            y[:, step] = out[:, 0]
        return y, states

    def _compare(self, how: str, answer: Callable[[], tuple[Floats, Bytes]]) -> tuple[float, float]:
        with reading(f"{self._directory}: {how}"):
            y, states = answer()
        valid = np.arange(self._x.shape[1]) < self._lengths[:, None]
        output_error = self._differ("outputs", y[valid], self._arrays["y"][valid], how)
        got, want = rows_of(states, self._row), rows_of(self._after, self._row)
        errors = [
            self._differ(f"state {state.layer}.{state.key}", got[state.input], want[state.input], how)
            for state in self._manifest.states
        ]
        return output_error, max(errors, default=0.0)

    def _differ(self, what: str, got: Array, want: Array, how: str) -> float:
        """The largest absolute difference."""
        if not want.size:
            return 0.0
        tolerance = self._manifest.tolerance
        a, b = got.astype(np.float64), want.astype(np.float64)
        error = np.abs(a - b)
        if not np.all(error <= tolerance.atol + tolerance.rtol * np.abs(b)):
            raise ManifestError(
                f"{self._directory}: {what} in {how} differ from golden.npz by up to {np.nanmax(error):.3g} "
                f"(rtol {tolerance.rtol:g}, atol {tolerance.atol:g})"
            )
        return float(error.max())


def placements(profile: Path) -> dict[str, str]:
    """Which execution provider ran each recurrent node, by a profile that onnxruntime wrote (`Runtime.end_profile`)."""
    return {
        event["name"].removesuffix("_kernel_time"): event["args"]["provider"]
        for event in json.loads(profile.read_text())
        if event.get("cat") == "Node" and event.get("args", {}).get("op_name") in RECURRENT
    }
