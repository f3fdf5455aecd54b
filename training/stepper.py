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
        lengths: Whether the graph takes the rows' lengths; if not, each row is run by itself.
        has_time: Whether it takes many steps; if not, each step is run by itself.
    """

    def __init__(
        self,
        directory: Path,
        states: tuple[StateTensor, ...],
        *,
        threads: int = 1,
        lengths: bool = True,
        has_time: bool = True,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        path = str(directory / MODEL_FILE)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._states, self._takes_lengths, self._has_time = states, lengths, has_time
        self._wanted = ["y", *(s.output for s in states)]

    @classmethod
    def of(cls, directory: Path, manifest: Manifest) -> "Stepper":
        """The model of a finished model directory."""
        has_time = manifest.input.time_axis is not None
        return cls(directory, manifest.states, lengths=manifest.lengths is not None, has_time=has_time)

    def initial_states(self, rows: int) -> States:
        """The states of sequences that have not begun."""
        return {f"{s.layer}.{s.key}": np.full((rows, *s.shape), s.initial, np.float32) for s in self._states}

    def run(self, x: Floats, lengths: NDArray[np.int32], states: States) -> tuple[Floats, States]:
        """One call over (B, T, F)."""
        return self._call(x, {"lengths": lengths}, states) if self._takes_lengths else self._by_rows(x, lengths, states)

    def _by_rows(self, x: Floats, lengths: NDArray[np.int32], states: States) -> tuple[Floats, States]:
        """`run` for a graph without lengths: each row by its own length, and step by step where it has no time."""
        answers, after = np.zeros((*x.shape[:2], 0), np.float32), {name: value.copy() for name, value in states.items()}
        for row, length in enumerate(lengths.tolist()):
            one = slice(row, row + 1)
            spans = [slice(0, length)] if self._has_time and length else [slice(t, t + 1) for t in range(length)]
            for span in spans:
                piece = x[one, span] if self._has_time else x[one, span.start]
                y, found = self._call(piece, {}, {name: value[one] for name, value in after.items()})
                if not answers.size:
                    answers = np.zeros((*x.shape[:2], y.shape[-1]), np.float32)
                answers[one, span] = y if self._has_time else y[:, None]
                for name, value in found.items():
                    after[name][one] = value
        return answers, after

    def _call(self, x: Floats, more: dict[str, NDArray[np.int32]], states: States) -> tuple[Floats, States]:
        feed = {"x": x, **more, **{s.input: states[f"{s.layer}.{s.key}"] for s in self._states}}
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
