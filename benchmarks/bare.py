"""Bare onnxruntime on the benchmark's model: the limit that all servers are measured against, and the truth.

The state goes from outputs to inputs without a copy of ours: nothing is gathered, stored or sent.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from . import model

Floats = npt.NDArray[np.float32]
POOL = 1024
"""Different input rows; session s at step k reads row (13 s + k) mod POOL."""


def session(directory: Path | None = None, threads: int = 1) -> ort.InferenceSession:
    """The model, on as many threads as the servers use."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = (directory or model.ensure()) / "model.onnx"
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Bare:
    """A loop around onnxruntime for a batch of B rows with their state."""

    def __init__(self, batch: int, shape: model.Shape | None = None) -> None:
        self.shape = shape or model.Shape()
        self._session = session(model.ensure(self.shape))
        names = [f"lstm_{layer}.{key}" for layer in range(self.shape.layers) for key in "hc"]
        self._inputs = [f"{name}.in" for name in names]
        self._outputs = ["y", *(f"{name}.out" for name in names)]
        self.batch = batch
        self.state: list[Any] = [np.zeros((batch, self.shape.hidden), np.float32) for _ in names]

    def step(self, x: Floats) -> Floats:
        """Advance by x (B, T, F); y (B, T, O)."""
        feeds = dict(zip(self._inputs, self.state, strict=True))
        y, *self.state = self._session.run(
            self._outputs, {"x": x, "lengths": np.full(len(x), x.shape[1], np.int32), **feeds}
        )
        result: Floats = y
        return result

    def rate(self, seconds: float) -> tuple[float, list[float]]:
        """Steps per second over all rows, and the seconds of each run."""
        x = np.random.default_rng(1).standard_normal((self.batch, 1, self.shape.features), np.float32)
        took: list[float] = []
        started = before = time.perf_counter()
        while before - started < seconds:
            self.step(x)
            now = time.perf_counter()
            took.append(now - before)
            before = now
        return len(took) * self.batch / (before - started), took


def pool(shape: model.Shape | None = None) -> Floats:
    """The input rows (POOL, F): numbers of four decimals, so that their JSON text is short and exact enough."""
    shape = shape or model.Shape()
    values = np.random.default_rng(7).standard_normal((POOL, shape.features)).round(4)
    return values.astype(np.float32)


class Truth:
    """What the answers must be: the offline pass over every session's inputs, made when asked for.

    Args:
        sessions: How many; session s reads its rows of the pool.
        inputs: k -> the inputs (sessions, F) of everyone's k-th step, where they are others than the pool's.
    """

    def __init__(
        self, sessions: int, shape: model.Shape | None = None, inputs: Callable[[int], Floats] | None = None
    ) -> None:
        self.shape = shape or model.Shape()
        values, start = pool(self.shape), 13 * np.arange(sessions)
        self._inputs = inputs or (lambda k: values[(start + k) % POOL])
        self._bare = Bare(sessions, self.shape)
        self._outputs: list[Floats] = []

    def outputs(self, steps: int) -> Floats:
        """The outputs (steps, sessions, O) of the first `steps` steps."""
        for k in range(len(self._outputs), steps):
            self._outputs.append(self._bare.step(self._inputs(k)[:, None])[:, 0])
        return np.stack(self._outputs[:steps])
