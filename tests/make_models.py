"""Writes tests/models/: one tiny model of every kind, exported and proved by the trainer (untrained weights).

    .venv/bin/python tests/make_models.py [KIND...]

The files are committed, so that the server's tests need no torch. Run again after a change of the export.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from stepcast.manifest import Feature, Feedback, Output
from training.config import Config
from training.data.batch import Batch
from training.data.source import Split
from training.export import describe, publish, stage
from training.network import Network

MODELS = Path(__file__).parent / "models"
LSTM = {"kind": "lstm", "units": 4}
OUT = {"kind": "rnn_output"}
SOFTMAX = {"kind": "rnn_output", "loss": "mcxent"}

KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "lstm": ([LSTM, OUT], {}),
    "stacked": ([LSTM, {"kind": "gru", "units": 3}, {"kind": "simple_rnn", "units": 5}, OUT], {"missing": True}),
    "simple_rnn": ([{"kind": "simple_rnn", "units": 4}, OUT], {}),
    "gru": ([{"kind": "gru", "units": 4}, OUT], {}),
    "graves_lstm": ([{"kind": "graves_lstm", "units": 4}, OUT], {}),
    "bidirectional": ([{"kind": "bidirectional", "mode": "concat", "layer": LSTM}, OUT], {}),
    "last_step": ([LSTM, {"kind": "last_time_step"}, SOFTMAX], {"classes": ("calm", "gust", "storm")}),
    "pooling": ([LSTM, {"kind": "global_pooling", "pooling": "avg"}, SOFTMAX], {"classes": ("calm", "gust", "storm")}),
    "conv1d": ([{"kind": "conv1d", "units": 3, "kernel": 3}, LSTM, OUT], {}),
    "characters": ([LSTM, SOFTMAX], {"classes": ("a", "b", "c"), "feedback": True}),
}


class Toy:
    """Random readings of three features; fits every kind."""

    description = "random numbers"

    def __init__(self, missing: bool = False, classes: tuple[str, ...] | None = None, feedback: bool = False) -> None:
        self.classes = classes
        self.task: Literal["regression", "classification"] = "classification" if classes else "regression"
        self.readout: Literal["each", "last"] = "each"
        policy: Literal["hold", "refuse"] = "hold" if missing else "refuse"
        self.features: tuple[Feature, ...] = tuple(
            Feature(name=name, unit="m/s", mean=0.5, scale=2.0, missing=policy, indicator=missing) for name in "uvw"
        )
        self.outputs = tuple(Output(name=name) for name in classes or ("u", "v"))
        self.feedback: tuple[Feedback, ...] = tuple(Feedback(source=n, feature=n) for n in "uv") if not classes else ()
        if feedback:
            self.features = (Feature(name="character", width=3),)
            self.feedback = (Feedback(source="class", feature="character"),)

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        """Eight sequences of sixteen steps."""
        generator = torch.Generator().manual_seed(1)
        if len(self.features) == 1:
            x = torch.eye(3)[torch.randint(3, (8, 16), generator=generator)]
        else:
            x = torch.randn(8, 16, 3, generator=generator)
        yield Batch(x, torch.zeros(8, 16, len(self.outputs)))


def make(kind: str) -> None:
    """Write tests/models/<kind>/1."""
    network_config, options = KINDS[kind]
    config = Config.model_validate(
        {
            "name": kind,
            "description": "a tiny model for tests",
            "data": {"kind": "python", "class": "make_models:Toy", "options": options},
            "network": network_config,
        }
    )
    torch.manual_seed(7)
    source = Toy(**options)
    network = Network.of(config.network, source)
    staged = stage(network, source, MODELS)
    manifest = describe(network, source, config, staged, version=1, metrics={})
    publish(staged, manifest, MODELS)


def main() -> None:
    """Make the kinds named on the command line, or all."""
    kinds = sys.argv[1:] or list(KINDS)
    for kind in kinds:
        shutil.rmtree(MODELS / kind, ignore_errors=True)
        make(kind)
        print(kind)


if __name__ == "__main__":
    main()
