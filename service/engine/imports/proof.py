"""The proof of an imported model: what was read of the graph is tried before anything is written to the repository."""

from pathlib import Path

import numpy as np

from stepcast.errors import ManifestError
from stepcast.manifest import GOLDEN_FILE, MODEL_FILE

from ..arrays import Array
from ..model import Runtime
from ..onnx_session import reading

_ROWS, _STEPS = 6, 8


def record(directory: Path) -> None:
    """Record golden.npz from the graph's own answers, and prove that the manifest reads the graph rightly.

    Raises ManifestError where rows depend on each other, or stepping is not what whole sequences are.
    """
    runtime = Runtime(directory, device="cpu")
    tolerance = runtime.manifest.tolerance
    x = np.random.default_rng(0).normal(size=(_ROWS, _STEPS, runtime.manifest.n_features)).astype(np.float32)
    lengths = np.array([_STEPS, _STEPS, 5, 3, 1, 0], np.int32)
    blank = np.frombuffer(runtime.initial(_ROWS), np.uint8).reshape(_ROWS, -1)
    with reading(directory / MODEL_FILE):
        _, start = runtime.run(x[::-1].copy(), None, blank)  # a state that the graph itself has made
        start = np.where(np.arange(_ROWS)[:, None] % 2, start, blank)
        y, end = runtime.run(x, lengths, start)
        for row, length in enumerate(lengths[:-1]):
            alone, _ = runtime.run(x[[row]], lengths[[row]], start[[row]])
            if not np.allclose(alone[0, :length], y[row, :length], tolerance.rtol, tolerance.atol):
                why = "an axis is read wrongly, or the graph mixes its batch"
                advice = "Give $.input, $.output and $.states with their batch_axis and time_axis."
                raise ManifestError(f"a row's answer depends on the rows beside it: {why}. {advice}")
    arrays: dict[str, Array] = {"x": x, "lengths": lengths, "y": y}
    for side, states in (("state_in", start), ("state_out", end)):
        for layer, keys in runtime.unpack(states.tobytes(), _ROWS).items():
            arrays |= {f"{side}.{layer}.{key}": value for key, value in keys.items()}
    np.savez_compressed(directory / GOLDEN_FILE, allow_pickle=False, **arrays)
    runtime.prove()
