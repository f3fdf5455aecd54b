"""Single steps of networks as torch's exporters write them, imported, beside our own export; no server, no doors.

All take turns within each round, so that a slow moment of the machine is everybody's.
"""

import contextlib
import io
import itertools
import json
import logging
import statistics
import time
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.engine.model import Runtime
from stepcast.imports import run as take_in

from . import model
from .contenders import Bench
from .machine import pinned
from .requests import ATOL, RTOL, WrongAnswer
from .rounds import spread
from .servers import StartFailed

Floats = npt.NDArray[np.float32]
ROWS: Final = (1, 16, 64, 256)
KINDS: Final = ("LSTM", "GRU", "RNN")
_EXPORTERS: Final = {"TorchScript": False, "dynamo": True}
_MODELS: Final = model.REPOSITORY.parent / "exports"
_AT_MOST: Final = 1.1
_CHECKED: Final = 20  # steps of which the answers are compared
_SHAPE: Final = model.Shape()


def exports(bench: Bench, quick: bool) -> Generator[None, None, dict[str, Any]]:
    """Processor time per step: imported LSTMs / our own export; imported networks with exact steps / with quick ones.

    Raises:
        StartFailed: torch, or what its dynamo exporter needs, is not there.
        WrongAnswer: some do not answer alike.
    """
    yield
    ours, rounds = {"own": _quick(model.ensure(_SHAPE))}, 5 if quick else 25
    theirs = {name: _quick(_imported("LSTM", name)) for name in _EXPORTERS}
    modes = {kind: {mode: _quick(_imported(kind, single_steps=mode)) for mode in ("exact", "quick")} for kind in KINDS}
    for alike in ({**ours, **theirs}, *modes.values()):
        _check(alike)
    beside, checks, dearer = dict[str, Any](), [], dict[str, Any]()
    with pinned(bench.park.server_core):
        bench.park.only()
        for rows in ROWS:
            times = _times({**ours, **theirs}, rows, rounds)
            for name in theirs:
                ratios = _ratios(times[name], times["own"])
                what = f"2 x LSTM(128) by torch's {name} exporter, batches of {rows} / our own export"
                value = statistics.median(ratios)
                checks.append({"what": what, "value": value, "compared": ratios, "at_most": _AT_MOST})
                checks[-1]["holds"] = value <= _AT_MOST
                beside.setdefault(name, {})[rows] = spread(ratios)
            for kind, both in modes.items():
                times = _times(both, rows, rounds)
                dearer.setdefault(kind, {})[rows] = spread(_ratios(times["exact"], times["quick"]))
    return {"imported_over_own": beside, "exact_over_quick": dearer, "checks": checks}


def _quick(directory: Path) -> Runtime:
    """A model as a server runs it."""
    runtime = Runtime(directory, device="cpu")
    runtime.quicken()
    return runtime


def _imported(kind: str, exporter: str = "TorchScript", single_steps: str = "exact") -> Path:
    """16 -> 2 x LSTM(128), GRU(128) or RNN(128) -> 4, exported and imported; the LSTM has our own export's weights."""
    name = f"{kind}-{exporter}-{single_steps}".lower()
    directory = _MODELS / name / "1"
    if not directory.is_dir():
        _MODELS.mkdir(parents=True, exist_ok=True)
        file, partial = _MODELS / f"{name}.onnx", _MODELS / f"{name}.json"
        partial.write_text(json.dumps({"single_steps": single_steps}))
        try:
            _export(kind, file, dynamo=_EXPORTERS[exporter])
        except ImportError as error:
            raise StartFailed(f"torch cannot export: {error}") from error
        with contextlib.redirect_stdout(io.StringIO()):
            to = ["--name", name, "--version", "1", "--models", str(_MODELS)]
            take_in([str(file), "--manifest", str(partial), *to], "stepcast")
    return directory


def _export(kind: str, file: Path, *, dynamo: bool) -> None:
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            cells = getattr(torch.nn, kind)
            self.layers = cells(_SHAPE.features, _SHAPE.hidden, _SHAPE.layers, batch_first=True)
            self.dense = torch.nn.Linear(_SHAPE.hidden, _SHAPE.outputs)

        def forward(self, x: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y, after = self.layers(x, states if kind == "LSTM" else states[0])
            return (self.dense(y), *(after if kind == "LSTM" else (after,)))

    torch.manual_seed(0)
    network, states = Network().eval(), ["h", "c"] if kind == "LSTM" else ["h"]
    example = torch.zeros(2, 5, _SHAPE.features), *(torch.zeros(_SHAPE.layers, 2, _SHAPE.hidden) for _ in states)
    axes: list[dict[int, Any]] = [{0: "batch", 1: "time"}, *({1: "batch"} for _ in states)]
    options: dict[str, Any] = {"input_names": ["x", *(f"{s}0" for s in states)]}
    if dynamo:
        sizes = {name: torch.export.Dim(name) for name in ("batch", "time")}
        every = [{axis: sizes[name] for axis, name in each.items()} for each in axes]
        options["dynamic_shapes"] = (every[0], tuple(every[1:]))
    else:
        options["dynamic_axes"] = dict(zip(options["input_names"], axes, strict=True))
    quiet = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
    with warnings.catch_warnings(), quiet[0], quiet[1]:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            names = ["y", *(f"{s}n" for s in states)]
            torch.onnx.export(network, example, file, dynamo=dynamo, verbose=False, output_names=names, **options)
        finally:
            logging.disable(logging.NOTSET)


def _check(alike: Mapping[str, Runtime]) -> None:
    """Raises WrongAnswer unless all answer alike for some steps of three rows."""
    x = np.random.default_rng(0).normal(size=(_CHECKED, 3, _SHAPE.features)).astype(np.float32)
    answers = {name: _answers(runtime, x) for name, runtime in alike.items()}
    for (name, got), (other, want) in itertools.pairwise(answers.items()):
        if not np.allclose(got, want, RTOL, ATOL):
            raise WrongAnswer(f"{name} does not answer as {other}: off by {np.abs(got - want).max():.3g}")


def _answers(runtime: Runtime, x: Floats) -> Floats:
    """Outputs (T, B, O) of steps x (T, B, F)."""
    states = np.frombuffer(runtime.initial(x.shape[1]), np.uint8).reshape(x.shape[1], -1)
    answers = []
    for step in x:
        after = np.empty_like(states)
        answers.append(runtime.step(step, [states], [after]))
        states = after
    return np.stack(answers)


def _times(runtimes: Mapping[str, Runtime], rows: int, rounds: int) -> dict[str, list[float]]:
    """Processor time of a step of some rows, of each in each round."""
    x = np.random.default_rng(1).normal(size=(rows, _SHAPE.features)).astype(np.float32)
    took: dict[str, list[float]] = {name: [] for name in runtimes}
    steps = max(4, 1000 // rows)
    for _ in range(1 + rounds):  # the first one warms up
        for name, runtime in runtimes.items():
            states = np.frombuffer(runtime.initial(rows), np.uint8).reshape(rows, -1)
            after = np.empty_like(states)
            before = time.process_time()
            for _ in range(steps):
                runtime.step(x, [states], [after])
            took[name].append((time.process_time() - before) / steps)
    return {name: times[1:] for name, times in took.items()}


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]
