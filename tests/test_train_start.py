"""Layers that learn at rates of their own or not at all, and runs that begin with the weights of others.

One update of the real trainer, held against numbers that were found by hand.
"""

from pathlib import Path
from typing import Any

import dl4j_zips as dl4j
import numpy as np
import pytest
import torch
import yaml
from networks import OUT, echo_source, layer_specs, network, plain, training
from pydantic import ValidationError
from torch import Tensor

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Output, read_manifest
from training.__main__ import main
from training.config import Config, StartConfig
from training.data.in_memory import Examples, InMemory
from training.network import Network
from training.progress import Progress
from training.start import begin
from training.stepper import Stepper
from training.train import Trainer

SGD: dict[str, Any] = {"optimiser": "sgd", "momentum": 0.0, "learning_rate": 0.1}
DENSE: dict[str, Any] = {"kind": "dense", "units": 1, "activation": "identity"}

# --- Rates and frozen layers -------------------------------------------------------------------------------------

START = (1.0, 1.0, 2.0, 6.0)  # w, b, a, c
# y = a (w x + b) + c at x 2, label 0: the answer is 12, the error 12, and d mse / dy = 24.
GRADIENT = (24 * 2 * 2, 24 * 2, 24 * 3, 24)


def source(x: float = 2.0, y: float = 0.0) -> InMemory:
    """One row of one step."""
    one = Examples([np.array([[x]], np.float32)], [np.array([[y]], np.float32)])
    outputs = (Output(name="y"),)
    splits: Any = {"train": one, "validation": one, "test": one}
    return InMemory(splits, (Feature(name="x"),), outputs, "regression", batch=1, seed=0)


def two(below: dict[str, Any] | None = None, above: dict[str, Any] | None = None) -> Network:
    """Two linear layers with weights START."""
    made = Network(layer_specs([{**DENSE, **(below or {})}, {**OUT, **(above or {})}]), *_io())
    with torch.no_grad():
        for leaf, value in zip(made.parameters(), START, strict=True):
            leaf.fill_(value)
    return made


def _io() -> tuple[list[Feature], list[Output], bool]:
    return [Feature(name="x")], [Output(name="y")], False


def after(net: Network, epochs: int = 1, **config: Any) -> list[float]:
    """All weights after some epochs of one update each."""
    trainer = Trainer(net, source(), training(**{"epochs": epochs, **SGD, **config}))
    for epoch in range(epochs):
        trainer.epoch(epoch, Progress.silent())
    return [float(p.detach()) for p in net.parameters()]


def moved(*rates: float) -> Any:
    """START less its gradient times a rate for each weight."""
    steps = zip(START, rates, GRADIENT, strict=True)
    return pytest.approx([value - rate * gradient for value, rate, gradient in steps], rel=1e-5)


def test_a_layer_learns_at_its_own_rate() -> None:
    """Below 0.01, above the training's 0.1; or each its own, whatever the training's is."""
    assert after(two()) == moved(0.1, 0.1, 0.1, 0.1)
    assert after(two({"learning_rate": 0.01})) == moved(0.01, 0.01, 0.1, 0.1)
    assert after(two({"learning_rate": 0.01}, {"learning_rate": 0.2}), learning_rate=9) == moved(0.01, 0.01, 0.2, 0.2)


def test_a_frozen_layer_stays_and_the_others_learn_as_before() -> None:
    """Its weights pass gradients on to what is below."""
    assert after(two({"frozen": True})) == moved(0, 0, 0.1, 0.1)
    assert after(two(above={"frozen": True})) == moved(0.1, 0.1, 0, 0)
    assert after(two({"frozen": True}, {"learning_rate": 0.02})) == moved(0, 0, 0.02, 0.02)


def test_frozen_weights_are_not_pulled_and_count_in_no_norm() -> None:
    """l2 and adamw's decay leave them; the global norm is that of (72, 24), 75.89, alone."""
    frozen = two({"frozen": True})
    assert after(frozen, l2=0.5) == pytest.approx([1, 1, 2 - 0.1 * (72 + 0.5 * 2), 6 - 2.4], rel=1e-5)
    clipped = after(two({"frozen": True}), gradient="clip_global_norm", gradient_threshold=30.0)
    share = 30 / float(np.hypot(72, 24))
    assert clipped == moved(0, 0, 0.1 * share, 0.1 * share)
    decayed = after(two({"frozen": True}), optimiser="adamw", weight_decay=0.5)
    assert decayed == pytest.approx([1, 1, 2 * (1 - 0.05) - 0.1, 6 - 0.1], rel=1e-5)


def test_adamw_decays_each_layer_at_its_rate() -> None:
    """w (1 - rate * decay), then Adam's first step, the rate itself; biases take that step alone."""
    got = after(two({"learning_rate": 0.01}), optimiser="adamw", weight_decay=0.5)
    assert got == pytest.approx([1 - 0.005 - 0.01, 1 - 0.01, 2 - 0.1 - 0.1, 6 - 0.1], rel=1e-5)


def test_a_schedule_multiplies_every_layers_rate() -> None:
    """Half a cosine over two epochs: the second has 0.505 of the rate. Only the frozen layer's partner moves twice."""
    net = two({"frozen": True}, {"learning_rate": 0.001})
    got = after(net, 2, schedule="cosine")
    a, c = 2 - 0.001 * 72, 6 - 0.001 * 24
    error = a * 3 + c  # w x + b stays 3
    expected = [1, 1, a - 0.001 * 0.505 * 2 * error * 3, c - 0.001 * 0.505 * 2 * error]
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrapper", ["bidirectional", "mask_zero", "time_distributed"])
def test_a_wrapper_learns_as_the_layer_in_it(wrapper: str) -> None:
    """Its rate and whether it is frozen are said where the weights are."""
    kind = "dense" if wrapper == "time_distributed" else "lstm"
    inner = {"kind": kind, "units": 2, "frozen": True}
    net = network([{"kind": wrapper, "layer": inner}, OUT], plain(1), outputs=1)
    before = [p.detach().clone() for p in net.parameters()]
    Trainer(net, echo_source(), training(**SGD)).epoch(0, Progress.silent())
    same = [torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)]
    assert same == [True] * (len(same) - 2) + [False, False]


def test_a_resumed_run_keeps_each_layers_rate(tmp_path: Path) -> None:
    """Two epochs and two more are four, bit for bit."""
    layers = [{"kind": "lstm", "units": 3, "learning_rate": 0.003}, {"kind": "gru", "units": 2, "frozen": True}, OUT]

    def run(epochs: int, resume: bool, directory: Path) -> list[Tensor]:
        net = network(layers, plain(1), outputs=1)
        config = training(epochs=epochs, schedule="constant", learning_rate=0.05)
        Trainer(net, echo_source(), config, directory=directory).fit(resume=resume)
        return list(net.parameters())

    whole = run(4, False, tmp_path / "whole")
    run(2, False, tmp_path / "parts")
    parts = run(4, True, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ({"kind": "lstm", "units": 2, "frozen": True, "learning_rate": 0.1}, "a frozen layer has no learning rate"),
        ({"kind": "dropout", "p": 0.1, "frozen": True}, "Extra inputs are not permitted"),
        ({"kind": "lstm", "units": 2, "learning_rate": 0}, "greater than 0"),
    ],
)
def test_rates_that_mean_nothing_are_refused(layer: dict[str, Any], says: str) -> None:
    """When the recipe is read."""
    with pytest.raises(ValidationError, match=says):
        layer_specs([layer, OUT])


def test_a_network_that_is_frozen_altogether_is_refused() -> None:
    """There is nothing to train."""
    with pytest.raises(ConfigError, match="every layer with weights is frozen"):
        after(two({"frozen": True}, {"frozen": True}))


# --- The start ---------------------------------------------------------------------------------------------------

RECIPE_NETWORK: list[dict[str, Any]] = [
    {"kind": "lstm", "units": 3, "frozen": True},
    {"kind": "dropout", "p": 0.2},
    {"kind": "rnn_output"},
]


def zipped(file: Path, classes: int = 1) -> list[dl4j.Params]:
    """A LSTM of three units on one input, and an output layer; its parameters."""
    draw = dl4j.Draw()
    params = [draw.lstm(1, 3), draw.dense(3, classes)]
    layers = [
        dl4j.layer("LSTM", nin=1, nout=3, activationFn="tanh"),
        dl4j.layer("RnnOutputLayer", nin=3, nout=classes, activationFn="identity", lossFn={"@class": "x.LossMSE"}),
    ]
    dl4j.save(file, dl4j.chain(layers), params)
    return params


def recipe(folder: Path, start: dict[str, Any], **settings: Any) -> Path:
    """A recipe of numbered files: y is twice x."""
    random = np.random.default_rng(6)
    for number in range(6):
        x = random.normal(size=(8, 1))
        for letter, values in (("x", x), ("y", 2 * x)):
            np.savetxt(folder / f"{letter}_{number}.csv", values, fmt="%.5f")
    files = {"features": "x_%d.csv", "labels": "y_%d.csv"}
    splits = {split: {**files, "numbers": list(n)} for split, n in (("train", (0, 3)), ("validation", (4, 4)))}
    data = {"kind": "csv_sequences", "task": "regression", "test": {**files, "numbers": [5, 5]}, **splits}
    made = {"name": "tuned", "data": data, "network": RECIPE_NETWORK}
    path = folder / "tuned.yaml"
    path.write_text(yaml.safe_dump({**made, "training": {"epochs": 2, "batch": 2, "start": start, **settings}}))
    return path


def test_a_dl4j_network_is_tuned_by_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its frozen LSTM is DL4J's in the exported graph too; the output layer has learned from where DL4J's was."""
    params = zipped(tmp_path / "net.zip")
    where = ["--out", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    path = recipe(tmp_path, {"dl4j": "net.zip"}, learning_rate=0.01)
    assert main(["train", str(path), *where]) == 0
    assert "begins with the weights of net.zip: lstm_0, rnn_output_0" in capsys.readouterr().out
    directory = tmp_path / "models" / "tuned" / "1"
    manifest = read_manifest(directory)
    assert manifest.provenance.config["training"]["start"] == {"dl4j": "net.zip"}
    (feature,) = manifest.features
    x = np.random.default_rng(1).normal(size=(2, 5, 1)).astype(np.float32)
    want = dl4j.lstm((x - feature.mean) / feature.scale, params[0])
    stepper = Stepper.of(directory, manifest)
    _, states = stepper.run(x, np.array([5, 5], np.int32), stepper.initial_states(2))
    np.testing.assert_allclose(states["lstm_0.h"], want[:, -1], atol=1e-6)
    tuned = torch.load(tmp_path / "runs" / "tuned" / "best.pt", weights_only=True)
    far = np.abs(tuned["head.linear.weight"].numpy() - params[1]["W"].T)
    assert 0 < far.max() < 0.2


def test_a_run_begins_with_the_weights_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """best.pt, by the order of the layers; dropout between them has no weights and does not count."""
    zipped(tmp_path / "net.zip")
    where = ["--out", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    path = recipe(tmp_path, {"dl4j": "net.zip"})
    assert main(["train", str(path), *where, "--set", "name=first"]) == 0
    again = recipe(tmp_path, {"checkpoint": "runs/first/best.pt", "fresh": ["rnn_output_0"]})
    assert main(["train", str(again), *where]) == 0
    assert "begins with the weights of runs/first/best.pt: lstm_0\n" in capsys.readouterr().out
    first, second = (torch.load(tmp_path / "runs" / name / "best.pt", weights_only=True) for name in ("first", "tuned"))
    assert torch.equal(first["layers.0.kernel.weight_hh_l0"], second["layers.0.kernel.weight_hh_l0"])
    assert not torch.equal(first["head.linear.weight"], second["head.linear.weight"])
    capsys.readouterr()
    last = recipe(tmp_path, {"checkpoint": "runs/first/last.pt"})
    assert main(["train", str(last), *where]) == 2
    assert "holds more than weights. Give the best.pt of a run." in capsys.readouterr().err


def test_a_start_replaces_every_weight_but_those_named_fresh(tmp_path: Path) -> None:
    """The same network, with and without; a file may have more layers behind the last one that is taken."""
    params = zipped(tmp_path / "net.zip", classes=4)
    layers = [RECIPE_NETWORK[0], OUT]
    net = network(layers, plain(1), outputs=2)
    drawn = net.head.linear.weight.detach().clone()
    start = StartConfig(dl4j=Path("net.zip"), fresh=("rnn_output_0",))
    assert begin(net, start, tmp_path) == ["lstm_0"]
    assert torch.equal(net.head.linear.weight, drawn)
    mine = net.layers[0].kernel
    gates = np.concatenate([params[0]["b"][3 * g : 3 * g + 3] for g in (3, 1, 0, 2)])
    assert (mine.bias_ih_l0.detach().numpy() == gates).all()
    assert not mine.bias_hh_l0.any()
    assert not any(p.requires_grad for p in mine.parameters())


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ({"dl4j": "net.zip"}, r"layer 1 of those with weights: has linear.bias \[4\].*'rnn_output_0' has .* \[2\]"),
        ({"dl4j": "net.zip", "fresh": ["lstm_0", "rnn_output_0"]}, "names every layer with weights"),
        ({"dl4j": "net.zip", "fresh": ["lstm_1"]}, "no layer 'lstm_1' with weights. Did you mean 'lstm_0'?"),
        ({"dl4j": "none.zip"}, r"none.zip: cannot be read \(No such file or directory\)"),
        ({"checkpoint": "net.zip"}, "not a checkpoint"),
        ({"checkpoint": "none.pt"}, "not a checkpoint"),
    ],
)
def test_a_start_that_does_not_fit_is_one_line(start: dict[str, Any], says: str, tmp_path: Path) -> None:
    """It names the file, the layers and the shapes."""
    zipped(tmp_path / "net.zip", classes=4)
    net = network([RECIPE_NETWORK[0], OUT], plain(1), outputs=2)
    with pytest.raises(ConfigError, match=says) as raised:
        begin(net, StartConfig.model_validate(start), tmp_path)
    assert "\n" not in str(raised.value)


def test_a_start_of_fewer_or_more_layers_says_what_to_do(tmp_path: Path) -> None:
    """Both counts, and the key that helps."""
    zipped(tmp_path / "net.zip")
    start = StartConfig(dl4j=Path("net.zip"))
    more = network([RECIPE_NETWORK[0], {"kind": "dense", "units": 2}, OUT], plain(1), outputs=1)
    with pytest.raises(ConfigError, match=r"has 2 layers with weights, the network has 3. Name the layers in .*fresh"):
        begin(more, start, tmp_path)
    fewer = network([OUT], plain(1), outputs=1)
    with pytest.raises(ConfigError, match="has 2 layers with weights, the network has 1"):
        begin(fewer, start, tmp_path)


def test_a_start_is_one_of_two(tmp_path: Path) -> None:
    """A recipe that names both or neither is refused with the path of the key."""
    zipped(tmp_path / "net.zip")
    for start in ({}, {"dl4j": "a", "checkpoint": "b"}):
        with pytest.raises(ValidationError, match="wanted one of dl4j and checkpoint"):
            Config.model_validate(yaml.safe_load(recipe(tmp_path, start).read_text()))
