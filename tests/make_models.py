"""Writes tests/models/: a tiny model of every kind, exported and proved by the trainer (untrained weights).

    .venv/bin/python tests/make_models.py [KIND...]

The files are committed, so that the server's tests need no torch. Run again after a change of the export.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import foreign
import torch

from service.engine.imports.onnx_graphs import import_onnx
from stepcast.manifest import MODEL_FILE, CalendarChannel, Feature, Feedback, Output, sha256_of
from training.config import Config
from training.data.batch import Batch
from training.data.source import Split
from training.export import describe, publish, stage
from training.network import Network

Policy = Literal["refuse", "mean", "zero", "hold"]
MODELS = Path(__file__).parent / "models"

Layers = list[dict[str, Any]]

OUT = {"kind": "rnn_output"}
SOFTMAX = {"kind": "rnn_output", "loss": "mcxent"}
LSTM = {"kind": "lstm", "units": 4}
GRU = {"kind": "gru", "units": 3}
SIMPLE = {"kind": "simple_rnn", "units": 4}
GRAVES = {"kind": "graves_lstm", "units": 4}
LAST = {"kind": "last_time_step"}
THREE = ("calm", "gust", "storm")
BOUNDED = (
    "sigmoid",
    "tanh",
    "relu6",
    "hardtanh",
    "rationaltanh",
    "softsign",
    "hardsigmoid",
    "hardsigmoid6",
    "rectifiedtanh",
    "softmax",
)
UNBOUNDED = (
    *("identity", "cube", "leakyrelu", "elu", "selu", "gelu", "swish", "mish", "softplus", "relu"),
    "thresholdedrelu",
)
COVARIATES = (
    Feature(name="station", categories=("Brae", "Cape Wrath", "7"), embedding=2, missing="hold", static=True),
    Feature(name="u", unit="m/s", mean=0.5, scale=2.0, missing="hold", indicator=True),
    Feature(name="price", mean=1.0, scale=3.0, missing="hold", known=True, ahead=1),
    *(
        Feature(name=f"{of}_{wave}", calendar=CalendarChannel(of=of, wave=wave, zone=zone))
        for of, wave, zone in (
            ("hour", "sin", "America/New_York"),
            ("hour", "cos", "America/New_York"),
            ("week", "sin", "UTC"),
        )
    ),
)
STATION = 0
PLACE_BY_PLACE = ("subtract", "mul", "average", "max", "min")
QUIET = -0.25  # what the layers see where Toy's `quiet` reads 0


@dataclass(frozen=True)
class Kind:
    """A model for tests.

    Attributes:
        network: As in a training configuration.
        data: Arguments of `Toy`.
        spread: How much noise is on the weights as they were initialised, so that no bias is 0 and no gain is 1.
    """

    network: Layers
    data: dict[str, Any] = field(default_factory=dict)
    spread: float = 0.2


def both(mode: str, layer: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A bidirectional layer."""
    return {"kind": "bidirectional", "mode": mode, "layer": layer, **more}


def normed(layer: dict[str, Any]) -> dict[str, Any]:
    """A recurrent layer with layer norm."""
    return {**layer, "layer_norm": True}


def pooled(pooling: str, **more: Any) -> Layers:
    """A many-to-one network that pools over the steps."""
    return [LSTM, {"kind": "global_pooling", "pooling": pooling, **more}, SOFTMAX]


def dense(units: int, activation: str = "tanh") -> dict[str, Any]:
    """A dense layer."""
    return {"kind": "dense", "units": units, "activation": activation}


# What can be stepped.
KINDS: dict[str, Kind] = {
    "lstm": Kind([LSTM, OUT], spread=0),
    "stacked": Kind([LSTM, GRU, {"kind": "simple_rnn", "units": 5}, OUT], {"missing": True}, spread=0),
    "simple_rnn": Kind([SIMPLE, OUT], spread=0),
    "gru": Kind([{"kind": "gru", "units": 4}, OUT], spread=0),
    "graves_lstm": Kind([GRAVES, OUT], spread=0),
    "last_step": Kind([LSTM, LAST, SOFTMAX], {"classes": THREE}, spread=0),
    "pooling": Kind(pooled("avg"), {"classes": THREE}, spread=0),
    "conv1d": Kind([{"kind": "conv1d", "units": 3, "kernel": 3}, LSTM, OUT], spread=0),
    "characters": Kind([LSTM, SOFTMAX], {"classes": ("a", "b", "c"), "feedback": True}, spread=0),
    "simple_rnn_normed": Kind([normed(SIMPLE), OUT]),
    "lstm_normed": Kind([normed(LSTM), OUT]),
    "gru_normed": Kind([normed(GRU), OUT]),
    "graves_lstm_normed": Kind([normed(GRAVES), OUT]),
    "mask_zero": Kind([{"kind": "mask_zero", "value": QUIET, "layer": LSTM}, OUT], {"quiet": True}),
    "mask_zero_normed": Kind([{"kind": "mask_zero", "value": QUIET, "layer": normed(GRU)}, OUT], {"quiet": True}),
    "pooling_max": Kind(pooled("max"), {"classes": THREE}),
    "pooling_sum": Kind(pooled("sum"), {"classes": THREE}),
    "pooling_pnorm": Kind(pooled("pnorm", p=3), {"classes": THREE}),
    "dense": Kind([dense(4), OUT]),  # nothing to remember, and yet a session
    "dense_between": Kind(
        [
            {**dense(3), "name": "encoder"},
            {**LSTM, "name": "memory"},
            {"kind": "rnn_to_feed_forward"},
            {"kind": "time_distributed", "layer": dense(3, "relu")},
            {"kind": "feed_forward_to_rnn"},
            {"kind": "dropout", "p": 0.5},
            GRU,
            {"kind": "mask"},
            {"kind": "activation", "activation": "softsign"},
            dense(3),
            OUT,
        ]
    ),
    "embedding": Kind(
        [{"kind": "embedding", "vocabulary": 5, "units": 3}, LSTM, SOFTMAX],
        {"reads": "token", "classes": ("a", "b", "c", "d", "e"), "feedback": True},
    ),
    "conv1d_dilated": Kind(
        [
            {"kind": "conv1d", "units": 3, "kernel": 2, "dilation": 3},
            {"kind": "conv1d", "units": 2, "kernel": 1},
            GRU,
            {"kind": "conv1d", "units": 2, "kernel": 2},
            OUT,
        ]
    ),
    "conv2d": Kind(
        [
            {"kind": "rnn_to_cnn", "height": 3, "width": 4},
            {"kind": "conv2d", "units": 2, "kernel": [2, 2], "padding": [1, 0]},
            {"kind": "cnn_to_feed_forward"},
            LSTM,
            OUT,
        ],
        {"reads": "frame"},
    ),
    "pool2d": Kind(
        [
            {"kind": "rnn_to_cnn", "height": 3, "width": 2, "channels": 2},
            {"kind": "mask"},
            {"kind": "pool2d", "kernel": [2, 2], "padding": [1, 1]},
            {"kind": "conv2d", "units": 3, "kernel": [2, 1], "stride": [1, 2], "activation": "elu"},
            {"kind": "pool2d", "kernel": [2, 2], "padding": [0, 1], "pooling": "avg"},
            {"kind": "cnn_to_rnn"},
            GRU,
            OUT,
        ],
        {"reads": "frame"},
    ),
    "rnn_loss": Kind([{**LSTM, "units": 2}, {"kind": "rnn_loss"}]),
    "rnn_loss_classes": Kind([{**LSTM, "units": 3}, {"kind": "rnn_loss", "loss": "mcxent"}], {"classes": THREE}),
    "residual": Kind([GRU, {**OUT, "residual": True}], {"missing": True, "scaled": True}),
    "quantile": Kind(
        [GRU, {**OUT, "residual": True, "distribution": {"kind": "quantile", "levels": [0.05, 0.1, 0.5, 0.8]}}],
        {"missing": True, "scaled": True},
    ),
    **{
        kind: Kind([GRU, {**OUT, "residual": True, "distribution": {"kind": kind}}], {"missing": True, "scaled": True})
        for kind in ("gaussian", "student_t", "mixture")
    },
    "negative_binomial": Kind([GRU, {**OUT, "distribution": {"kind": "negative_binomial"}}], {"scaled": True}),
    "binary": Kind([GRU, {**OUT, "loss": "xent", "activation": "sigmoid"}]),
    "covariates": Kind([LSTM, {**OUT, "residual": True}], {"reads": "covariates"}),
    "policies": Kind([LSTM, OUT], {"policies": ["mean", "zero", "hold"]}),
    "activations_bounded": Kind([*(dense(6, name) for name in BOUNDED), SIMPLE, OUT], spread=1.0),
    "activations_unbounded": Kind([*(dense(6, name) for name in UNBOUNDED), SIMPLE, OUT], spread=0.3),
    "cell_activations": Kind(  # each cell is one ONNX node
        [
            {**SIMPLE, "activation": "leakyrelu"},
            {**LSTM, "activation": "softsign", "gate_activation": "hardsigmoid"},
            {**GRU, "activation": "elu", "gate_activation": "hardsigmoid"},
            {**GRAVES, "activation": "identity", "gate_activation": "softsign"},
            OUT,
        ],
        spread=0.6,
    ),
    "graph": Kind(  # a skip connection, a feature by its name, every vertex, two output layers
        [
            {**dense(3), "name": "left"},
            {**LSTM, "units": 3, "name": "memory"},
            {"kind": "add", "from": ["left", "memory"], "name": "both"},
            {**GRU, "from": ["v"], "name": "right"},
            *({"kind": kind, "from": ["both", "right"]} for kind in PLACE_BY_PLACE),
            {"kind": "merge", "from": [f"{kind}_0" for kind in PLACE_BY_PLACE]},
            {"kind": "subset", "first": 1, "last": 13},
            {"kind": "scale", "factor": -1.5},
            {"kind": "shift", "amount": 0.5},
            {**OUT, "outputs": ["v"]},
            {**OUT, "from": ["both", "u"], "outputs": ["u"], "loss": "mae", "weight": 2},
        ],
        {"missing": True},
    ),
    "recurrences": Kind(
        [
            {"kind": "min_gru", "units": 4},
            {"kind": "attention", "units": 4, "window": 3, "heads": 2},
            {"kind": "layer_norm"},
            normed({"kind": "slstm", "units": 3}),
            {"kind": "rg_lru", "units": 3},
            OUT,
        ],
        {"missing": True},
    ),
    "scan_activations": Kind(  # no ONNX node knows them
        [
            {**SIMPLE, "activation": "rationaltanh"},
            {**LSTM, "activation": "hardtanh"},
            {**GRU, "activation": "swish", "gate_activation": "hardtanh"},
            {**GRAVES, "activation": "rectifiedtanh"},
            OUT,
        ]
    ),
}

# What reads sequences from both ends.
KINDS |= {
    "bidirectional": Kind([both("concat", LSTM), OUT], spread=0),
    "bidirectional_add": Kind([both("add", GRAVES), OUT]),  # DL4J's GravesBidirectionalLSTM
    "bidirectional_mul": Kind([both("mul", GRU), OUT]),
    "bidirectional_average": Kind([both("average", SIMPLE), OUT]),
    "bidirectional_normed": Kind([both("concat", normed(GRU)), OUT]),
    "bidirectional_last": Kind([both("concat", LSTM, last=True), SOFTMAX], {"classes": THREE}),
    "reverse": Kind([{"kind": "reverse"}, LSTM, {"kind": "reverse"}, OUT]),
    "decoder": Kind([LSTM, LAST, {"kind": "duplicate_to_time_series"}, GRU, OUT]),
}

# Graphs that others made, and what the import must be told about them.
FOREIGN: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "foreign_lstm": (foreign.torch_lstm, {}),
    "foreign_chunks": (
        foreign.silero,
        {"constants": [{"name": "sr", "dtype": "int64", "shape": [], "values": [8000]}]},
    ),
    "foreign_counter": (
        foreign.counter,
        {"input": {"name": "x", "batch_axis": 1, "time_axis": None}},
    ),
}


class Toy:
    """Random readings; fits every kind.

    Args:
        missing: Readings may be missing: the last one holds, and an indicator says so.
        policies: What a missing reading of each feature means, without indicators.
        classes: For classification.
        feedback: Where the model can run free on its classes; `reads` says how they are read.
        reads: Three numbers (with `feedback` one of three characters), a token, or a frame of twelve pixels.
        quiet: Every third step reads 0 everywhere.
        scaled: Outputs have units of their own.
    """

    description = "random numbers"

    def __init__(
        self,
        missing: bool = False,
        classes: tuple[str, ...] | None = None,
        feedback: bool = False,
        *,
        policies: tuple[Policy, ...] | None = None,
        reads: Literal["numbers", "token", "frame", "covariates"] = "numbers",
        quiet: bool = False,
        scaled: bool = False,
    ) -> None:
        self.classes, self.reads, self.quiet = classes, reads, quiet
        self.task: Literal["regression", "classification"] = "classification" if classes else "regression"
        self.readout: Literal["each", "last"] = "each"
        all_the_same: Policy = "hold" if missing else "refuse"
        self.features: tuple[Feature, ...] = tuple(
            Feature(name=name, unit="m/s", mean=0.5, scale=2.0, missing=policy, indicator=missing)
            for name, policy in zip("uvw", policies or (all_the_same,) * 3, strict=True)
        )
        units = {"unit": "m/s", "mean": -1.0, "scale": 3.0} if scaled else {}
        self.outputs = tuple(Output(name=name, **units) for name in classes or ("u", "v"))
        self.feedback: tuple[Feedback, ...] = tuple(Feedback(source=n, feature=n) for n in "uv") if not classes else ()
        if reads == "token" or feedback:
            self.features = (Feature(name="character", width=1 if reads == "token" else 3),)
            self.feedback = (Feedback(source="class", feature="character"),)
        if reads == "covariates":
            self.features, self.every_s = COVARIATES, 3600.0
            self.feedback = (Feedback(source="u", feature="u"),)
        if reads == "frame":
            self.features, self.feedback = (Feature(name="frame", width=12),), ()

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        """Eight sequences of sixteen steps."""
        generator = torch.Generator().manual_seed(1)
        if self.reads == "token":
            x = torch.randint(5, (8, 16, 1), generator=generator).float()
        elif len(self.features) == 1 and self.reads == "numbers":
            x = torch.eye(3)[torch.randint(3, (8, 16), generator=generator)]
        else:
            x = torch.randn(8, 16, sum(f.width for f in self.features), generator=generator)
        if self.reads == "covariates":
            x[..., STATION] = torch.randint(4, (8, 16), generator=generator).float()  # 0: an unknown one
        if self.quiet:
            x[:, ::3] = 0.0
        yield Batch(x, torch.zeros(8, 16, len(self.outputs)))


def make(kind: str) -> None:
    """Write tests/models/<kind>/1."""
    made = KINDS[kind]
    config = Config.model_validate(
        {
            "name": kind,
            "description": "a tiny model for tests",
            "data": {"kind": "python", "class": "make_models:Toy", "options": made.data},
            "network": made.network,
        }
    )
    torch.manual_seed(7)
    source = Toy(**made.data)
    network = Network.of(config.network, source)
    if made.spread:
        for weight in network.parameters():
            weight.data += made.spread * torch.randn_like(weight)
    staged = stage(network, source, MODELS)
    manifest = describe(network, source, config, sha256=sha256_of(staged / MODEL_FILE), version=1, metrics={})
    publish(staged, manifest, MODELS)


def take_in(kind: str) -> None:
    """Write tests/models/<kind>/1 of a foreign graph; its golden.npz is the graph's own."""
    write, known = FOREIGN[kind]
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder) / "partial.json"
        partial.write_text(json.dumps(known))
        import_onnx(write(Path(folder) / f"{kind}.onnx"), MODELS, kind, 1, partial)


def main() -> None:
    """Make the kinds named on the command line, or all."""
    for kind in sys.argv[1:] or [*KINDS, *FOREIGN]:
        shutil.rmtree(MODELS / kind, ignore_errors=True)
        (take_in if kind in FOREIGN else make)(kind)
        print(kind)


if __name__ == "__main__":
    main()
