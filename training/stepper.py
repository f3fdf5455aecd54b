"""An exported model on onnxruntime, as the service runs it: rows, lengths and states in, answers and states out."""

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stepcast.manifest import MODEL_FILE, Manifest, StateTensor

Floats = NDArray[np.float32]
States = dict[str, Floats]  # by "layer.key", each (B, *shape)


class Stepper:
    """Runs model.onnx of a directory.

    Args:
        directory: Where model.onnx lies.
        states: The manifest's state tensors.
        threads: For one run; one is fastest for single steps of small networks.
    """

    def __init__(self, directory: Path, states: tuple[StateTensor, ...], *, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        path = str(directory / MODEL_FILE)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._states = states
        self._wanted = ["y", *(s.output for s in states)]

    @classmethod
    def of(cls, directory: Path, manifest: Manifest) -> "Stepper":
        """The model of a finished model directory."""
        return cls(directory, manifest.states)

    def initial_states(self, rows: int) -> States:
        """The states of sequences that have not begun."""
        return {f"{s.layer}.{s.key}": np.full((rows, *s.shape), s.initial, np.float32) for s in self._states}

    def run(self, x: Floats, lengths: NDArray[np.int32], states: States) -> tuple[Floats, States]:
        """One call over (B, T, F)."""
        feed = {"x": x, "lengths": lengths, **{s.input: states[f"{s.layer}.{s.key}"] for s in self._states}}
        y, *after = self._session.run(self._wanted, feed)
        return y, {f"{s.layer}.{s.key}": a for s, a in zip(self._states, after, strict=True)}

    def in_blocks(self, x: Floats, lengths: NDArray[np.int32], states: States, block: int) -> tuple[Floats, States]:
        """The same as `run`, `block` steps at a time."""
        outputs = []
        for start in range(0, x.shape[1], block):
            part = np.ascontiguousarray(x[:, start : start + block])
            left = np.clip(lengths - start, 0, part.shape[1]).astype(np.int32)
            y, states = self.run(part, left, states)
            outputs.append(y)
        return np.concatenate(outputs, axis=1), states
