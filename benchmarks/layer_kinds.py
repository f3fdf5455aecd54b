"""What the recurrent layer kinds are worth: each in the place of the recipe's LSTM, with as many weights.

    python -m benchmarks.layer_kinds [--data weather characters] [--kinds lstm gru ...] [--epochs N] [--units H]

`griffin` is rg_lru in the block that its authors put around it.

Seed, data, epochs and learning rate are the recipe's and the same for all. A kind gets as many units as bring the
whole network's number of weights closest to that of the LSTM's. Times are the processor's, on one thread: an update of
training, and a single step of one row on the graph that the server makes of it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.engine.model import Runtime
from stepcast.manifest import MODEL_FILE, sha256_of
from training.config import Config, load
from training.data.source import Source
from training.data.table import TableSource
from training.evaluate import evaluate
from training.export import describe, publish, stage, state_tensors
from training.network import Network
from training.skill import Measurement
from training.stepper import Stepper
from training.train import Trainer

from .machine import ROOT

KINDS = ("lstm", "gru", "slstm", "min_gru", "rg_lru", "griffin")
DATA = ("weather", "characters")
DISTANCES = (1, 6, 24)
SINGLE_STEPS = 500


@dataclass(frozen=True)
class Row:
    """One kind on one data set: its numbers by the column they stand in."""

    kind: str
    units: int
    weights: int
    scores: dict[str, float]
    update_ms: float
    step_us: float


def measure(config: Config, source: Source, kind: str, weights: int) -> Row:
    """Train, export and time one kind.

    Args:
        config: The recipe; its LSTMs are replaced.
        source: Its data.
        kind: In their place.
        weights: The number to come close to.
    """
    config = _of_size(config, source, kind, weights)
    torch.manual_seed(config.seed)
    network = Network.of(config.network, source)
    trainer = Trainer(network, source, config.training, seed=config.seed)
    started = time.process_time()
    history = trainer.fit()
    update_ms = (time.process_time() - started) * 1e3 / history.updates
    with tempfile.TemporaryDirectory() as directory:
        staged = stage(network, source, Path(directory))
        scores = _scores(Stepper(staged, state_tensors(network)), source)
        digest = sha256_of(staged / MODEL_FILE)
        manifest = describe(network, source, config, sha256=digest, version=1, metrics={})
        step_us = _single_step_us(publish(staged, manifest, Path(directory)))
    memory = "rg_lru" if kind == "griffin" else kind
    units = next(spec.units for spec in config.network if spec.kind == memory)
    return Row(kind, units, _weights(network), scores, update_ms, step_us)


def _of_size(config: Config, source: Source, kind: str, weights: int) -> Config:
    """The recipe with another kind, of the number of units that comes closest to so many weights."""
    low, high = 1, 2048
    while low < high:  # the first number of units that has at least so many
        middle = (low + high) // 2
        if _weights(Network.of(_replaced(config, kind, middle).network, source)) < weights:
            low = middle + 1
        else:
            high = middle
    sizes = [_replaced(config, kind, units) for units in (max(1, low - 1), low)]
    return min(sizes, key=lambda one: abs(_weights(Network.of(one.network, source)) - weights))


def _replaced(config: Config, kind: str, units: int) -> Config:
    tree = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    network = []
    for number, layer in enumerate(tree["network"]):
        network += (
            [layer]
            if layer["kind"] != "lstm"
            else _griffin(number, units)
            if kind == "griffin"
            else [{"kind": kind, "units": units}]
        )
    tree["network"] = network
    return Config.model_validate(tree)


def _griffin(number: int, units: int) -> list[dict[str, Any]]:
    """Griffin's recurrent block around rg_lru, without its convolution: norm, a gate beside it, a skip connection."""
    begin, norm, gate, memory, end = (f"{name}_of_{number}" for name in ("begin", "norm", "gate", "memory", "end"))
    dense = {"kind": "dense", "units": units, "activation": "identity"}
    return [
        {**dense, "name": begin},
        {"kind": "layer_norm", "name": norm},
        {**dense, "activation": "gelu", "name": gate},
        {"kind": "rg_lru", "units": units, "name": memory, "from": [norm]},
        {"kind": "mul", "from": [gate, memory]},
        {**dense, "name": end},
        {"kind": "add", "from": [begin, end]},
    ]


def _weights(network: Network) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _scores(stepper: Stepper, source: Source) -> dict[str, float]:
    """On the test split, lower is better: bits of classes, errors of numbers, of a table relative to persistence's."""
    if isinstance(source, TableSource):
        skills = Measurement(stepper, source).skills(DISTANCES)
        return {f"{skill.ahead} h": float(np.nanmean(skill.ratio("model"))) for skill in skills}
    result = evaluate(stepper, source, "test").as_dict()
    named = ("bits", result["bits"]) if result["task"] == "classification" else ("rmse", result["average"]["rmse"])
    return {named[0]: named[1] or float("nan")}


def _single_step_us(directory: Path) -> float:
    """The median of single steps of one row."""
    runtime = Runtime(directory, device="cpu")
    runtime.quicken()
    x = np.zeros((1, 1, runtime.manifest.n_features), np.float32)
    state = np.frombuffer(runtime.initial(1), np.uint8).reshape(1, -1)
    times = []
    for _ in range(SINGLE_STEPS):
        started = time.perf_counter()
        runtime.run(x, None, state)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def table(rows: Sequence[Row]) -> str:
    """As it stands in the documentation."""
    names = [*rows[0].scores]
    head = ["kind", "units", "weights", *names, "update [ms]", "step [µs]"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        scores = [f"{row.scores[name]:.3f}" for name in names]
        cells = [f"`{row.kind}`", str(row.units), f"{row.weights:,}", *scores]
        lines.append("| " + " | ".join([*cells, f"{row.update_ms:.1f}", f"{row.step_us:.0f}"]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each data set."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer_kinds", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA, help="recipes (default: all)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--units", type=int, help="of each LSTM (default: the recipe's)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in arguments.data:
        path = ROOT / "training" / "recipes" / f"{name}.yaml"
        overrides = [f"training.epochs={arguments.epochs}"] if arguments.epochs else []
        config = load(path, overrides)
        source = config.data.open(batch=config.training.batch, seed=config.seed, root=path.parent)
        lstm = _replaced(config, "lstm", arguments.units) if arguments.units else config
        weights = _weights(Network.of(lstm.network, source))
        rows = []
        for kind in arguments.kinds:
            rows.append(measure(config, source, kind, weights))
            print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
        epochs = config.training.epochs
        print(f"\n{name}: {source.description}; {epochs} epochs, seed {config.seed}\n\n{table(rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
