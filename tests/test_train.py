"""The training loop: updates, truncation, lanes, resuming, early stopping, penalties, several processes."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from networks import CELLS, OUT, Spoiled, echo_source, network, plain, training
from torch import Tensor, nn

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Feedback, Output
from training.__main__ import main
from training.checkpoint import check_meaning, load_checkpoint, meaning_of
from training.data.batch import Batch
from training.data.in_memory import Examples, InMemory
from training.data.source import Source, Split
from training.export import stage
from training.network import Network
from training.optimise import make_optimiser, normalise_gradients, penalise, rate_factor
from training.parallel import World, join
from training.progress import Progress
from training.segments import cut
from training.train import History, Trainer

LSTM: list[dict[str, Any]] = [{"kind": "lstm", "units": 8}, OUT]


def echo_network(layers: list[dict[str, Any]] = LSTM, seed: int = 1) -> Network:
    return network(layers, [Feature(name="x")], outputs=1, seed=seed, spread=0.0)


def fit(
    source: Source,
    directory: Path | None = None,
    *,
    layers: list[dict[str, Any]] = LSTM,
    resume: bool = False,
    **config: Any,
) -> tuple[Network, History]:
    net = echo_network(layers)
    trainer = Trainer(net, source, training(**config), seed=3, directory=directory)
    return net, trainer.fit(resume=resume)


def weights(net: Network) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def equal(a: Network, b: Network) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize(
    ("config", "updates"),
    [({}, 3), ({"backprop": "truncated", "tbptt_forward": 4}, 9), ({"backprop": "truncated", "tbptt_forward": 50}, 3)],
)
def test_one_update_per_segment(config: dict[str, Any], updates: int) -> None:
    """Three batches of ten steps: one update each, or ceil(10 / 4) = 3 each."""
    assert fit(echo_source(), epochs=1, **config)[1].updates == updates


def test_training_learns(tmp_path: Path) -> None:
    """The loss of the last of 20 epochs is a fraction of the first's, truncated or not, in every precision there is."""
    for config in ({}, {"backprop": "truncated", "tbptt_forward": 5}, {"precision": "bfloat16"}):
        losses = fit(echo_source(), epochs=20, learning_rate=0.03, **config)[1].losses
        assert losses[-1][1] < 0.35 * losses[0][1], config


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd", "nesterov", "rmsprop", "adagrad"])
def test_every_optimiser_learns(optimiser: str) -> None:
    """Ten epochs lower the validation loss."""
    losses = fit(echo_source(), epochs=10, optimiser=optimiser, learning_rate=0.02)[1].losses
    assert losses[-1][1] < losses[0][1]


def test_segments_without_labels_are_passed_over_with_their_state() -> None:
    """Labels at the last steps only: segments before give no update, not even a decay, but their state arrives."""
    source = echo_source(labelled=[8, 9])
    config = {"epochs": 1, "backprop": "truncated", "tbptt_forward": 2, "l2": 0.1}
    assert fit(source, **config)[1].updates == 3  # one for each batch, not five
    net = echo_network()
    trainer = Trainer(net, source, training(**config))
    ((batch, rows),) = list(trainer._batches("validation", 0))
    assert rows == 4
    segments = list(cut(batch, 2))
    state = net.initial_state(4)
    for segment in segments[:-1]:
        state = trainer._advance(segment, state)
    expected = net(batch.x[:, :8])[1]
    torch.testing.assert_close(state["lstm_0"]["c"], expected["lstm_0"]["c"], rtol=1e-4, atol=1e-5)


def test_training_on_nothing_is_an_error() -> None:
    """DL4J logs a warning and trains nothing; here it stops."""
    with pytest.raises(ConfigError, match="nothing can be learned"):
        fit(echo_source(labelled=[]))


def test_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    """Two epochs, then three more from the checkpoint, dropout and a schedule included; and best.pt is the best."""
    layers = [LSTM[0], {"kind": "dropout", "p": 0.3}, OUT]
    config = {"schedule": "cosine", "optimiser": "adam", "backprop": "truncated", "tbptt_forward": 4}
    unbroken, history = fit(echo_source(), tmp_path / "a", layers=layers, epochs=5, **config)
    broken = Trainer(
        echo_network(layers), echo_source(), training(epochs=5, **config), seed=3, directory=tmp_path / "b"
    )
    for _ in range(2):
        loss = broken.epoch(broken.history.epoch, Progress.silent())
        broken._note(loss, broken.validate("validation") or loss)
    torch.rand(7)  # whatever else draws random numbers in between
    resumed, resumed_history = fit(echo_source(), tmp_path / "b", layers=layers, epochs=5, resume=True, **config)
    assert equal(unbroken, resumed)
    assert history == resumed_history
    best = torch.load(tmp_path / "b" / "best.pt", weights_only=True)
    assert all(torch.equal(best[k], v) for k, v in resumed.state_dict().items())
    last = load_checkpoint(tmp_path / "a", torch.device("cpu"))
    other = load_checkpoint(tmp_path / "b", torch.device("cpu"))
    assert last is not None
    assert other is not None
    assert all(torch.equal(last["network"][k], v) for k, v in other["network"].items())


@pytest.mark.parametrize("cell", CELLS)
def test_narrow_numbers_train_every_cell(cell: str) -> None:
    """bfloat16 on a CPU: the loss falls, states and weights stay float32."""
    layers = [{"kind": cell, "units": 8}, {"kind": "dense", "units": 4}, OUT]
    config = {"precision": "bfloat16", "backprop": "truncated", "tbptt_forward": 4, "learning_rate": 0.03}
    net, history = fit(echo_source(), layers=layers, epochs=6, **config)
    assert history.losses[-1][1] < history.losses[0][1]
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_float16_is_refused_on_a_cpu() -> None:
    """It would neither be fast nor scale its gradients."""
    with pytest.raises(ConfigError, match=r"training\.precision: float16 needs CUDA"):
        fit(echo_source(), precision="float16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device: NOT TESTED is training on a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cell", CELLS)
def test_gpu_trains_every_cell_in_every_precision(cell: str, precision: str, tmp_path: Path) -> None:
    """The loss falls, weights stay float32, and what was trained there is proved on the CPU."""
    layers = [{"kind": cell, "units": 8}, {"kind": cell, "units": 8, "layer_norm": True}, OUT]
    net, world = echo_network(layers), join("cuda")
    config = training(epochs=8, backprop="truncated", tbptt_forward=4, learning_rate=0.03, precision=precision)
    history = Trainer(net, ragged_source(), config, world=world, seed=3, directory=tmp_path / "runs").fit()
    assert history.losses[-1][1] < history.losses[0][1]
    assert {(p.dtype, p.device.type) for p in net.parameters()} == {(torch.float32, "cuda")}
    assert (stage(net, ragged_source(), tmp_path) / "golden.npz").exists()


def test_seed_decides_everything() -> None:
    """The same seed gives the same weights, another one others."""
    assert equal(fit(echo_source())[0], fit(echo_source())[0])
    assert not equal(fit(echo_source(seed=0))[0], fit(echo_source(seed=1))[0])


def test_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    """Not a traceback, and no pickle is run."""
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match=r"last\.pt: not a checkpoint"):
        fit(echo_source(), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": [{"kind": "lstm", "units": 9}, OUT]}, "size mismatch"),
        ({"layers": [{"kind": "graves_lstm", "units": 8}, OUT]}, "Missing key"),
        ({"optimiser": "sgd"}, "optimiser adam, not sgd"),
    ],
)
def test_checkpoint_of_another_configuration_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    """In one line that says what does not fit; nothing is trained on top of it."""
    fit(echo_source(), tmp_path, epochs=1)
    with pytest.raises(ConfigError, match=rf"last\.pt: is of another configuration \(.*{reason}"):
        fit(echo_source(), tmp_path, epochs=2, resume=True, **change)


def test_checkpoint_of_another_vocabulary_of_the_same_size_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another text of as many characters: weights fit, and mean something else. Resume and export say which."""
    for name, letters in (("a", "abcd"), ("b", "abcx")):
        (tmp_path / f"{name}.txt").write_text("".join(letters[i * i % 4] for i in range(400)) + letters * 100)
    recipe = Path(__file__).parents[1] / "training" / "recipes" / "characters.yaml"
    sets = ["training.epochs=1", "training.batch=2", "network.1.units=4", "network.2.units=4"]
    places = ["--out", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]

    def run(verb: str, name: str, *flags: str) -> int:
        given = [word for value in (*sets, f"data.options.path={tmp_path}/{name}.txt") for word in ("--set", value)]
        return main([verb, str(recipe), *given, *places, *flags])

    assert run("train", "a") == 0
    for verb, *flags in (("train", "--resume"), ("export",)):
        assert run(verb, "b", *flags) == 2
        assert "of another configuration (number 3 of the outputs was 'd', is 'x')" in capsys.readouterr().err
    assert run("train", "a", "--resume") == 0
    assert run("export", "a") == 0


@pytest.mark.parametrize(
    ("told", "change"),
    [
        ("number 0 of the features was 'x', is 'z'", {"features": (Feature(name="z"),)}),
        ("number 0 of the outputs was 'y', is 'z'", {"outputs": (Output(name="z"),)}),
        ("number 1 of the classes was 'b', is None", {"classes": ("a",)}),
        (
            "number 0 of the categories of 'x' was 'north', is 'south'",
            {"features": (Feature(name="x", categories=("south", "north"), embedding=2),)},
        ),
    ],
)
def test_every_name_of_the_data_is_told_apart(told: str, change: dict[str, Any]) -> None:
    """Features, outputs, classes, and the categories of a feature, each by its place."""
    north = Feature(name="x", categories=("north", "south"), embedding=2)
    named = replace(echo_source(), classes=("a", "b"), features=(north,))
    saved = {"meaning": meaning_of(named)}
    check_meaning(saved, named)
    check_meaning({}, named)  # a checkpoint of a version that did not say
    with pytest.raises(ValueError, match=told):
        check_meaning(saved, replace(named, **change))


SHORT = ["data.options.train=2", "data.options.validation=1", "data.options.test=1", "training.schedule=constant"]


def command(verb: str, directory: Path, *more: str) -> tuple[int, Path]:
    """A command on a small version of the control charts; its exit code, and where checkpoints are."""
    recipe = Path(__file__).parents[1] / "training" / "recipes" / "control_charts.yaml"
    sets = [word for setting in (*SHORT, *(m for m in more if "=" in m)) for word in ("--set", setting)]
    flags = [flag for flag in more if flag.startswith("--")]
    places = ["--out", str(directory / "models"), "--runs", str(directory / "runs")]
    return main([verb, str(recipe), *sets, *places, *flags]), directory / "runs" / "control_charts"


def test_resume_from_the_command_line_exports_the_same_bytes(tmp_path: Path) -> None:
    """Two epochs and two more give the graph, the golden rows and the checkpoint of four in a row."""
    threads = torch.get_num_threads()
    assert command("train", tmp_path / "a", "training.epochs=4")[0] == 0
    assert command("train", tmp_path / "b", "training.epochs=2")[0] == 0
    code, runs = command("train", tmp_path / "b", "training.epochs=4", "--resume", "--tensorboard")
    assert code == 0
    assert list((runs / "tensorboard").iterdir())
    made = [tmp_path / who / "models" / "control_charts" / version for who, version in (("a", "1"), ("b", "2"))]
    assert made[0].joinpath("model.onnx").read_bytes() == made[1].joinpath("model.onnx").read_bytes()
    golden = [np.load(one / "golden.npz") for one in made]
    assert all(np.array_equal(golden[0][key], golden[1][key]) for key in golden[0].files)
    torch.set_num_threads(threads)


def test_export_refuses_weights_of_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line; no model directory appears."""
    threads = torch.get_num_threads()
    assert command("train", tmp_path, "training.epochs=1", "network.0.units=4")[0] == 0
    assert command("export", tmp_path, "network.0.units=5")[0] == 2
    assert re.search(r"ConfigError: .*best\.pt: is of another configuration", capsys.readouterr().err)
    assert [path.name for path in (tmp_path / "models" / "control_charts").iterdir()] == ["1"]
    torch.set_num_threads(threads)


def test_early_stopping_keeps_the_best_weights(tmp_path: Path) -> None:
    """A learning rate that ruins everything: patience ends the run, and the weights are the best epoch's."""
    net, history = fit(echo_source(), epochs=50, optimiser="sgd", learning_rate=3.0, patience=2)
    assert history.epoch == history.best_epoch + 3 < 50
    trainer = Trainer(net, echo_source(), training())
    assert trainer.validate("validation") == pytest.approx(history.best)


def test_a_loss_that_is_never_finite_is_said_after_the_first_epoch(tmp_path: Path) -> None:
    """A learning rate beyond all bounds: one error that names the loss, and no checkpoint."""
    with pytest.raises(
        ConfigError, match=r"not finite after epoch 1 \(training .*(nan|inf).*Lower training.learning_rate"
    ):
        fit(echo_source(), tmp_path, epochs=3, optimiser="sgd", learning_rate=1e38)
    assert list(tmp_path.iterdir()) == []


# --- Masks and labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e3, math.nan])
def test_values_under_masks_change_no_weight_and_no_score(value: float) -> None:
    """Whole runs, truncated, over sequences that end early and miss labels: bit for bit the same."""
    source = ragged_source()
    masks = [mask for batch in source.batches("train") for mask in (batch.x_mask, batch.y_mask)]
    assert any(mask is not None and not mask.all() for mask in masks)
    runs = [fit(one, backprop="truncated", tbptt_forward=4, l2=0.01) for one in (source, Spoiled(source, value))]
    assert equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    scores = [Trainer(runs[0][0], one, training()).validate("train") for one in (source, Spoiled(source, value))]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("loss", ["mse", "l2", "mcxent"])
def test_update_divides_by_examples_where_that_is_asked_for(loss: str) -> None:
    """DL4J: the sum over steps divided by the rows, however many steps of them count; mse by the outputs as well."""
    x = [np.full((steps, 1), 0.5, np.float32) for steps in (5, 2, 1, 4)]
    y = [np.eye(2, dtype=np.float32)[np.arange(len(one)) % 2] for one in x]
    source = InMemory(
        splits={"train": Examples(x, y)},
        features=(Feature(name="x"),),
        outputs=(Output(name="a"), Output(name="b")),
        task="classification" if loss == "mcxent" else "regression",
        batch=4,
        seed=0,
        classes=("a", "b") if loss == "mcxent" else None,
        alignment="start",
    )
    moved = []
    for average in ("unmasked", "examples"):
        layers = [{"kind": "lstm", "units": 3}, {**OUT, "loss": loss}]
        net = network(layers, source.features, outputs=2, classification=loss == "mcxent")
        before = weights(net)
        config = training(optimiser="sgd", momentum=0.0, learning_rate=0.1, average=average)
        Trainer(net, source, config).epoch(0, Progress.silent())
        moved.append([after - was for after, was in zip(weights(net), before, strict=True)])
    steps, rows = 12, 4
    for per_step, per_row in zip(*moved, strict=True):
        torch.testing.assert_close(per_row, per_step * steps / rows, rtol=1e-3, atol=1e-6)
    assert max(float(one.abs().max()) for one in moved[1]) > 1e-2


@dataclass(frozen=True)
class Lanes:
    """Two lanes of 12 steps in windows of 4; the second lane starts anew in the second window."""

    window: int = 4
    features: tuple[Feature, ...] = (Feature(name="x"),)
    outputs: tuple[Output, ...] = (Output(name="y"),)
    task: Literal["regression"] = "regression"
    classes: None = None
    readout: Literal["each"] = "each"
    feedback: tuple[Feedback, ...] = ()
    description: str = "lanes"

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        x = torch.linspace(-1, 1, 24).view(2, 12, 1)
        for start in range(0, 12, self.window):
            starts = torch.tensor([start == 0, start in (0, 4)])
            part = x[:, start : start + self.window]
            yield Batch(part, part.sin(), starts=starts)


def test_lanes_carry_their_state_from_batch_to_batch() -> None:
    """Windows of 4 give the validation loss of two sequences, one of 12 steps and one of 4 and 8."""
    net = echo_network()
    trainer = Trainer(net, Lanes(), training())
    x = torch.linspace(-1, 1, 24).view(2, 12, 1)
    with torch.no_grad():
        first, _ = net(x[:1])
        second = torch.cat([net(x[1:, :4])[0], net(x[1:, 4:])[0]], dim=1)
    expected = (torch.cat([first, second]) - x.sin()).square().mean()
    assert trainer.validate("validation") == pytest.approx(float(expected), rel=1e-5)


# --- Optimisation ------------------------------------------------------------------------------------------------


def with_gradients(layers: list[dict[str, Any]] = LSTM) -> Network:
    net = network(layers, plain(1), outputs=1)
    torch.manual_seed(0)
    for p in net.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    return net


def norms(net: Network, per: str) -> list[float]:
    layers: list[nn.Module] = [*net.layers, net.head]
    groups = {
        "layer": [[p.grad for p in layer.parameters() if p.grad is not None] for layer in layers],
        "parameter": [[p.grad] for layer in layers for p in layer.parameters() if p.grad is not None],
        "network": [[p.grad for p in net.parameters() if p.grad is not None]],
    }[per]
    return [float(torch.cat([g.flatten() for g in group]).norm()) for group in groups]


@pytest.mark.parametrize(
    ("kind", "per"),
    [("clip_global_norm", "network"), ("clip_l2_per_layer", "layer"), ("clip_l2_per_parameter", "parameter")],
)
@pytest.mark.parametrize("limit", [0.5, 4.0])
def test_clipping_limits_norms_and_keeps_directions(kind: str, per: str, limit: float) -> None:
    """What is short stays as it is; what is long gets the limit's length."""
    before, net = norms(with_gradients(), per), with_gradients()
    normalise_gradients(net, training(gradient=kind, gradient_threshold=limit))
    assert norms(net, per) == pytest.approx([min(n, limit) for n in before], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "per"), [("renormalize_l2_per_layer", "layer"), ("renormalize_l2_per_parameter", "parameter")]
)
def test_renormalising_makes_every_norm_one(kind: str, per: str) -> None:
    """Short ones too."""
    net = with_gradients()
    normalise_gradients(net, training(gradient=kind))
    assert norms(net, per) == pytest.approx([1.0] * len(norms(net, per)), rel=1e-5)


def test_elementwise_clipping() -> None:
    """Each number on its own."""
    net, wild = with_gradients(), with_gradients()
    normalise_gradients(net, training(gradient="clip_elementwise", gradient_threshold=0.3))
    for p, w in zip(net.parameters(), wild.parameters(), strict=True):
        if p.grad is not None:
            assert w.grad is not None
            assert torch.equal(p.grad, w.grad.clamp(-0.3, 0.3))


def test_penalties_pull_on_weights_and_not_on_biases() -> None:
    """l2 w + l1 sign(w), peepholes included."""
    layers = [{"kind": "graves_lstm", "units": 3, "layer_norm": True}, OUT]
    net, before = with_gradients(layers), with_gradients(layers)
    penalise(net, training(l1=0.1, l2=0.01))
    for (name, p), q in zip(net.named_parameters(), before.parameters(), strict=True):
        if p.grad is None:
            continue
        assert q.grad is not None
        pulled = "weight" in name or name.endswith("peephole")
        extra = 0.01 * p.detach() + 0.1 * p.detach().sign() if pulled else torch.zeros(())
        torch.testing.assert_close(p.grad, q.grad + extra)


def test_schedule_falls_from_the_rate_to_a_hundredth() -> None:
    """Half a cosine over the epochs; constant is 1."""
    cosine = training(schedule="cosine", epochs=10)
    factors = [rate_factor(cosine, epoch) for epoch in range(11)]
    assert factors == pytest.approx([0.01 + 0.99 * (1 + math.cos(math.pi * e / 10)) / 2 for e in range(11)])
    assert (factors[0], factors[-1]) == (1.0, pytest.approx(0.01))
    assert rate_factor(training(), 5) == 1.0


def test_only_what_learns_is_optimised() -> None:
    """An LSTM's second bias is none of it."""
    net = echo_network()
    (group,) = make_optimiser(net, training()).param_groups
    assert len(group["params"]) == sum(p.requires_grad for p in net.parameters()) == len(list(net.parameters())) - 1


# --- Telling -----------------------------------------------------------------------------------------------------


def test_tensorboard_gets_both_curves(tmp_path: Path) -> None:
    """Read back from the event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Progress(2, tensorboard=tmp_path) as progress:
        Trainer(echo_network(), echo_source(), training(epochs=2)).fit(progress=progress)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("loss/training")] == [1, 2]
    assert [e.step for e in events.Scalars("loss/validation")] == [1, 2]


# --- Several processes -------------------------------------------------------------------------------------------


def test_share_splits_rows_and_keeps_empty_processes_in_step() -> None:
    """Five rows over two processes; one row over two: the second gets it without its label."""
    batch = Batch(torch.arange(5.0).view(5, 1, 1), torch.zeros(5, 1, 1))
    rows = [World(rank, 2).share(batch).x.flatten().tolist() for rank in range(2)]
    assert rows == [[0, 2, 4], [1, 3]]
    one = replace(batch, x=batch.x[:1], y=batch.y[:1])
    idle = World(1, 2).share(one)
    assert idle.y_mask is not None
    assert not idle.y_mask.any()
    assert idle.x.shape == (1, 1, 1)


def test_sums_are_taken_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """nccl knows no tensors of the CPU; what is given stays as it is."""
    seen: list[Tensor] = []
    monkeypatch.setattr("torch.distributed.all_reduce", seen.append)
    given = torch.tensor(1)
    assert World(1, 2, torch.device("meta")).sum(given).device.type == "meta"
    assert [one.device.type for one in seen] == ["meta"]
    assert World(1, 2).sum(given) is not given
    assert World().sum(given) is given


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With how many there are; and CUDA where there is none."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"training\.device: 'cuda' is asked for"):
        join("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"a process 2 on this machine, torch sees 2 CUDA device"):
        join("auto")


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0)])
def test_one_process_prints_what_the_data_is(
    rank: str | None, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every process opens the source, torchrun's first one says so; an error is told by each."""
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    recipe = Path(__file__).parents[1] / "training" / "recipes" / "control_charts.yaml"
    assert main(["export", str(recipe), "--runs", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert out.count("control_charts: ") == lines
    assert "Train first" in error


def ragged_source() -> InMemory:
    """Nine sequences, so that the last batch has a single one; some end early and some labels are missing."""
    source = echo_source(sequences=9)
    examples = source.splits["train"]
    ends = [10, 3, 10, 7, 1, 10, 5, 10, 10]
    x = [one[:end] for one, end in zip(examples.x, ends, strict=True)]
    y = [one[:end].copy() for one, end in zip(examples.y, ends, strict=True)]
    y[0][4:] = y[3][:5] = np.nan
    return replace(source, splits={**source.splits, "train": Examples(x, y)})
