"""States in the server's table on the device, beside a bare loop whose states never leave it.

python -m benchmarks.device                  on the GPU, or "absent: no CUDA device"
python -m benchmarks.device --device cpu     tiny, to see that it works

Both sides take inputs from the host and bring outputs back. The bare loop does nothing else: its state tensors are
inputs and outputs by turns. Ours finds its rows by tags, gathers, scatters and brings the new states to the host, as
the server does between a request and a commit.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service.engine.model import Runtime
from service.engine.onnx_session import open_session
from stepcast.errors import ManifestError

from . import model
from .bare import POOL, pool
from .requests import ATOL, RTOL, WrongAnswer
from .servers import StartFailed

Floats = npt.NDArray[np.float32]
Step = Callable[[Floats], Floats]

SHAPES = (model.Shape(), model.Shape(name="bench-4x1024", hidden=1024, layers=4))
TINY = model.Shape(name="bench-tiny", features=4, hidden=8, outputs=2, layers=2)
BATCHES = (1, 64, 1024, 16_384)
LEAST = 0.5
ROUNDS = 4


class Bare:
    """A loop around onnxruntime on a device; two sets of state tensors take turns."""

    def __init__(self, shape: model.Shape, rows: int, device: str) -> None:
        self._session = open_session(model.ensure(shape) / "model.onnx", device)
        names = [f"lstm_{layer}.{key}" for layer in range(shape.layers) for key in "hc"]
        zeros = np.zeros((rows, shape.hidden), np.float32)
        sets = [[ort.OrtValue.ortvalue_from_numpy(zeros.copy(), device, 0) for _ in names] for _ in range(2)]
        self._y = np.zeros((rows, 1, shape.outputs), np.float32)
        self._turns = []
        for before, after in (sets, sets[::-1]):
            binding = self._session.io_binding()
            binding.bind_cpu_input("lengths", np.ones(rows, np.int32))
            for name, old, new in zip(names, before, after, strict=True):
                binding.bind_ortvalue_input(f"{name}.in", old)
                binding.bind_ortvalue_output(f"{name}.out", new)
            binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(self._y))
            self._turns.append(binding)

    def step(self, x: Floats) -> Floats:
        """Advance by x (B, 1, F); y (B, 1, O)."""
        binding = self._turns[0]
        self._turns.reverse()
        binding.bind_cpu_input("x", x)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        return self._y


class Resident:
    """What the server does: tags in, outputs, new states and tags out."""

    def __init__(self, shape: model.Shape, rows: int, device: str) -> None:
        self._runtime = Runtime(model.ensure(shape), device=device)
        if not self._runtime.reside(rows * self._runtime.row_bytes):
            raise StartFailed("states do not stay on the device; the log says why")
        self._tags = np.zeros(rows, np.int64)

    def step(self, x: Floats) -> Floats:
        """Advance by x (B, 1, F); y (B, 1, O)."""
        return self._runtime.run_resident(x, None, self._tags, self._initial)[0]

    def _initial(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        if self._tags.any():
            raise WrongAnswer(f"{len(rows)} rows had left a table that has room for all")
        return np.frombuffer(self._runtime.initial(len(rows)), np.uint8).reshape(len(rows), -1)


def compare(shape: model.Shape, rows: int, device: str, seconds: float) -> dict[str, Any]:
    """Both in turns on the same inputs; rates, latencies and the ratio of the rates.

    Raises:
        WrongAnswer: their outputs differ.
    """
    start = 13 * np.arange(rows)
    inputs = [np.ascontiguousarray(pool(shape)[(start + k) % POOL][:, None]) for k in range(8)]
    sides: dict[str, Step] = {
        "bare": Bare(shape, rows, device).step,
        "resident": Resident(shape, rows, device).step,
    }
    for x in inputs:
        want, got = (step(x) for step in sides.values())
        if not np.allclose(got, want, RTOL, ATOL):
            raise WrongAnswer(f"resident outputs differ from the bare loop's by {np.abs(got - want).max():.3g}")
    took: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, step in sides.items():
            took[name] += _timed(step, inputs, seconds / ROUNDS)
    found: dict[str, Any] = {name: _summary(rows, times) for name, times in took.items()}
    ratio = found["resident"]["steps_per_s"] / found["bare"]["steps_per_s"]
    return {"model": shape.name, "sessions": rows, **found, "ratio": ratio}


def _timed(step: Step, inputs: Sequence[Floats], seconds: float) -> list[float]:
    """The seconds of each run, for `seconds`."""
    took: list[float] = []
    began = before = time.perf_counter()
    while before - began < seconds:
        step(inputs[len(took) % len(inputs)])
        now = time.perf_counter()
        took.append(now - before)
        before = now
    return took


def _summary(rows: int, took: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(took, (50, 99))
    return {"steps_per_s": rows * len(took) / sum(took), "p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99}


def run(shapes: Sequence[model.Shape], batches: Sequence[int], device: str, seconds: float) -> dict[str, Any]:
    """Every shape with every number of sessions, all of them in one batch.

    Raises:
        StartFailed: the device is not there.
    """
    try:
        open_session(model.ensure(shapes[0]) / "model.onnx", device)
    except ManifestError as error:
        raise StartFailed(f"no CUDA device: {error}") from error
    results = [compare(shape, rows, device, seconds) for shape in shapes for rows in batches]
    checks = [
        {
            "what": f"{r['model']} on {device}, {r['sessions']:,} sessions: states in the table / bare loop",
            "value": r["ratio"],
            "at_least": LEAST,
            "holds": r["ratio"] >= LEAST,
        }
        for r in results
    ]
    return {"device": device, "results": results, "checks": checks}


def cuda(_: object, quick: bool) -> dict[str, Any]:
    """The scenario of `python -m benchmarks`."""
    return run(SHAPES, BATCHES, "cuda", 1.0 if quick else 4.0)


def table(results: Sequence[dict[str, Any]]) -> str:
    """For the eye."""
    lines = [f"{'model':<14}{'sessions':>9}{'':>10}{'steps/s':>13}{'p50 ms':>9}{'p99 ms':>9}{'ratio':>7}"]
    for r in results:
        for name in ("bare", "resident"):
            ratio = f"{r['ratio']:>7.2f}" if name == "resident" else ""
            numbers = f"{r[name]['steps_per_s']:>13,.0f}{r[name]['p50_ms']:>9.3f}{r[name]['p99_ms']:>9.3f}"
            lines.append(f"{r['model']:<14}{r['sessions']:>9,}{name:>10}{numbers}{ratio}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure this alone; 1 where an answer was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, help="per side and number of sessions (4; cpu: 0.1)")
    arguments = parser.parse_args(argv)
    shapes, batches = (SHAPES, BATCHES) if arguments.device == "cuda" else ((TINY,), (1, 3))
    seconds = arguments.seconds or (4.0 if arguments.device == "cuda" else 0.1)
    try:
        found = run(shapes, batches, arguments.device, seconds)
    except StartFailed as error:
        print(f"absent: {error}")
        return 0
    except WrongAnswer as error:
        print(f"wrong answer: {error}")
        return 1
    print(table(found["results"]))
    for check in found["checks"]:
        print(f"{check['what']}: {check['value']:.2f} >= {LEAST}{'' if check['holds'] else '  missed'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
