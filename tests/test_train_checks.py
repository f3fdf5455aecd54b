"""What can be known is checked before the first epoch; what was trained is measured and exported without surprise."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from networks import OUT, echo_source, layer_specs, network, plain, training
from test_train import LSTM, ragged_source
from test_train_updates import Fixed, rows, weights, with_weights

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Output, read_manifest
from training.__main__ import main
from training.config import load
from training.data.batch import Batch
from training.data.csv_sequences import CsvSequencesConfig
from training.data.in_memory import Examples, InMemory
from training.data.source import Split
from training.data.table import TableSource
from training.data.tokens import Tokens
from training.evaluate import answers
from training.export import stage, state_tensors
from training.metrics import ClassificationMetrics
from training.network import Network
from training.skill import Measurement
from training.stepper import Stepper
from training.train import Trainer


def test_network_trained_with_masked_steps_zero_is_exported_as_it_is_served(tmp_path: Path) -> None:
    """The service holds the state at absent steps, whatever training did: golden.npz has to say the same."""
    source = ragged_source()
    net = network(LSTM, source.features, outputs=1)
    Trainer(net, source, training(masked_steps="zero", epochs=1)).fit()
    assert (stage(net, source, tmp_path) / "golden.npz").exists()


# --- Tables and what their forecasts are worth -------------------------------------------------------------------


def table(directory: Path, *, steps: int = 300, minutes: int = 60, test: int = 100, **data: Any) -> Path:
    """A recipe beside one series of a daily wave; the last `test` steps are the test split."""
    times = np.datetime64("2021-03-01T00:00") + np.arange(steps) * np.timedelta64(minutes, "m")
    heat = 10 + 5 * np.sin(2 * np.pi * np.arange(steps) * minutes / 1440) + 0.1 * np.sin(np.arange(steps))
    lines = [f"{time}Z,{value:.4f}" for time, value in zip(times, heat, strict=True)]
    (directory / "heat.csv").write_text("when,heat\n" + "\n".join(lines) + "\n")
    recipe = {
        "name": "heat",
        "data": {
            "kind": "table",
            "path": "heat.csv",
            "time": "when",
            "every": f"{minutes}min",
            "columns": {"heat": {"target": True}},
            "validation": str(times[steps - 2 * test]),
            "test": str(times[steps - test]),
            "warm_up": 20,
            **data,
        },
        "network": [{"kind": "lstm", "units": 3}, {"kind": "rnn_output"}],
        "training": {"epochs": 1, "batch": 2},
    }
    path = directory / "heat.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def trained(path: Path, *more: str) -> int:
    return main(["train", str(path), "--out", str(path.parent / "m"), "--runs", str(path.parent / "r"), *more])


@pytest.mark.parametrize("test", [168, 30, 4])
def test_short_test_split_is_measured_drawn_and_exported(test: int, tmp_path: Path) -> None:
    """A week's plot of less than a week; distances beyond the split are left out."""
    assert trained(table(tmp_path, steps=max(2 * test + 100, 120), test=test)) == 0
    directory = tmp_path / "m" / "heat" / "1"
    assert (directory / "test_week.png").exists()
    skill = read_manifest(directory).provenance.metrics["skill"]
    assert list(skill) == [f"{ahead} ahead" for ahead in (1, 6, 24) if ahead < test]
    assert skill["1 ahead"]["heat"]["rows"] == test - 1


def measured(path: Path) -> tuple[Measurement, TableSource]:
    config = load(path)
    source = config.data.open(batch=2, seed=0, root=path.parent)
    assert isinstance(source, TableSource)
    assert trained(path) == 0
    manifest = read_manifest(path.parent / "m" / "heat" / "1")
    return Measurement(Stepper.of(path.parent / "m" / "heat" / "1", manifest), source), source


def rmse_of_lag(source: TableSource, ahead: int, lag: int) -> float:
    """Of the value `lag` steps before what is forecast, over all origins of the test split."""
    start, stop = source.bounds["test"]
    values = source.x[0, :, 0].astype(np.float64)
    at = np.arange(start + ahead, stop)
    return float(np.sqrt(np.square(values[at - lag] - values[at]).mean()))


@pytest.mark.parametrize(("minutes", "day"), [(60, 24), (30, 48), (180, 8)])
def test_day_before_is_a_day_before_on_every_grid(minutes: int, day: int, tmp_path: Path) -> None:
    """Further ahead than a day it is the same time of the last day that is known."""
    measurement, source = measured(table(tmp_path, minutes=minutes))
    for ahead in (1, day, day + 2):
        (skill,) = measurement.skills([ahead])
        lag = day if ahead <= day else 2 * day
        assert float(skill.rmse("day_before")[0]) == pytest.approx(rmse_of_lag(source, ahead, lag), rel=1e-4)
        assert float(skill.rmse("persistence")[0]) == pytest.approx(rmse_of_lag(source, ahead, ahead), rel=1e-4)


def test_model_of_a_longer_horizon_is_measured_against_its_baselines(tmp_path: Path) -> None:
    """It cannot run free, but what it says can be compared: six steps ahead, and there only."""
    measurement, source = measured(table(tmp_path, horizon=6))
    metrics = read_manifest(tmp_path / "m" / "heat" / "1").provenance.metrics
    assert list(metrics["skill"]) == ["6 ahead"]
    assert (tmp_path / "m" / "heat" / "1" / "test_week.png").exists()
    (skill,) = measurement.skills([1, 6, 24])
    assert skill.ahead == 6
    assert float(skill.rmse("persistence")[0]) == pytest.approx(rmse_of_lag(source, 6, 6), rel=1e-4)
    assert float(skill.rmse("model")[0]) == pytest.approx(metrics["test"]["average"]["rmse"], rel=1e-3)


def test_target_scaled_by_its_change_needs_residual(tmp_path: Path) -> None:
    """Without it the network would have to say the whole value in units of its change."""
    with pytest.raises(ConfigError, match=r"data\.target_scale is 'change', .* Set residual: true"):
        load(table(tmp_path, target_scale="change"))
    load(table(tmp_path, target_scale="change"), ["network.1.residual=true"])


# --- Labels ------------------------------------------------------------------------------------------------------


def labelled(*values: float, split: Split = "train") -> Fixed:
    """One sequence of two steps with good labels, and one of `values` in a split; the last step is masked."""
    mask = torch.tensor([[True] * len(values) + [False]])
    batch = Batch(torch.zeros(1, len(values) + 1, 1), rows([*values, math.nan]), None, mask)
    good = Batch(torch.zeros(1, 2, 1), torch.full((1, 2, 1), 0.5))
    return Fixed(**{"train": (good,), "validation": (good,), split: (good, batch)})


@pytest.mark.parametrize(
    ("loss", "activation", "bad", "wanted"),
    [
        ("msle", "identity", -1.0, "more than -1"),
        ("mape", "identity", 0.0, "other than 0"),
        ("poisson", "softplus", -0.5, "at least 0"),
        ("kl_divergence", "sigmoid", -0.1, "at least 0"),
        ("xent", "sigmoid", 1.5, "between 0 and 1"),
        ("xent", "sigmoid", -0.1, "between 0 and 1"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_that_a_loss_cannot_take_are_refused_before_the_first_epoch(
    loss: str, activation: str, bad: float, wanted: str, split: Split
) -> None:
    """With the loss, the label, its place and what the loss takes; what is masked does not matter."""
    net = network([{**OUT, "loss": loss, "activation": activation}], plain(1), outputs=1)
    before = weights(net)
    with pytest.raises(ConfigError) as caught:
        Trainer(net, labelled(0.5, bad, split=split), training()).fit()
    assert f"loss {loss} takes labels {wanted}, output 'y' is {bad:g}" in str(caught.value)
    assert f"at step 1 of row 0 of batch 1 of {split}" in str(caught.value)
    assert weights(net) == before
    assert Trainer(net, labelled(0.5, 0.25), training(epochs=1)).fit().epoch == 1


def test_labels_are_judged_in_the_networks_scale() -> None:
    """A count of 0 is -1 once it is normalised: the message says so."""
    source = replace(labelled(3.0, 0.0), outputs=(Output(name="count", mean=2.0, scale=2.0),))
    net = Network.of(layer_specs([{**OUT, "loss": "msle"}]), source)
    with pytest.raises(ConfigError, match=r"output 'count' is -1 \(0 in the data.*normalise"):
        Trainer(net, source, training()).fit()


def classes_of(y: list[list[float]], **changes: Any) -> InMemory:
    """One sequence for each split with rows of class labels."""
    label = np.array(y, np.float32)
    examples = Examples([np.zeros((len(y), 1), np.float32)], [label])
    settings: dict[str, Any] = {
        "features": (Feature(name="x"),),
        "outputs": tuple(Output(name=f"c{i}") for i in range(label.shape[1])),
        "classes": tuple(f"c{i}" for i in range(label.shape[1])),
        **changes,
    }
    splits: dict[Split, Examples] = {"train": examples, "test": examples}
    return InMemory(splits=splits, task="classification", batch=1, seed=0, alignment="start", **settings)


def test_row_with_two_classes_is_an_error_in_training_and_in_metrics() -> None:
    """The first of them would be taken for the class."""
    metrics = ClassificationMetrics(("a", "b", "c"))
    with pytest.raises(ValueError, match="present row 1 has 2 classes"):
        metrics.update(np.eye(3)[[0, 0]], np.array([[1, 0, 0], [0, 1, 1]]))
    metrics.update(np.eye(3)[[0]], np.array([[0.8, 0.1, 0.1]]))  # a label may be smooth
    source = classes_of([[1, 0, 0], [0, 1, 1]])
    net = network([OUT], plain(1), outputs=3, classification=True)
    with pytest.raises(ConfigError, match=r"2 classes at step 1 of row 0 of batch 0 of train"):
        Trainer(net, source, training()).fit()


def test_row_without_a_class_is_learned_nothing_from_but_cannot_be_measured() -> None:
    """In the test split it would end the run after its last epoch; with one output a 0 is the other class."""
    empty = classes_of([[1, 0], [0, 0]])
    for split, refused in (("test", True), ("train", False)):
        full = classes_of([[1, 0], [0, 1]])
        source = replace(full, splits={**full.splits, split: empty.splits["test"]})
        trainer = Trainer(network([OUT], plain(1), outputs=2, classification=True), source, training(epochs=1))
        if refused:
            with pytest.raises(ConfigError, match=r"0 classes at step 1 of row 0 of batch 0 of test, wanted one"):
                trainer.fit()
        else:
            assert trainer.fit().epoch == 1
    sigmoid = {**OUT, "activation": "sigmoid", "loss": "xent"}
    one = classes_of([[1], [0]])
    assert Trainer(network([sigmoid], plain(1), outputs=1), one, training(epochs=1)).fit().epoch == 1


def test_top_n_counts_ties_in_the_order_of_the_classes() -> None:
    """As accuracy does: a model that says the same of every class is right as often as chance, not always."""
    metrics = ClassificationMetrics(("a", "b", "c", "d"))
    metrics.update(np.full((4, 4), 0.25), np.eye(4))
    result = metrics.result()
    assert result.accuracy == 0.25
    assert result.top_n == {2: 0.5, 3: 0.75}


# --- Names, widths, lanes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "classification", "classes": ["a", "a"]}, "classes named twice: 'a'"),
        ({"feature_names": ["a", "a"]}, "features named twice: 'a'"),
        (
            {"output_names": ["a"], "feedback": [{"source": "a", "feature": "z"}]},
            "feedback[0].feature 'z' is not a feat",
        ),
        ({"feedback": [{"source": "y_9", "feature": "x_0"}]}, "feedback[0].source 'y_9' is not an output"),
        ({"label_columns": [0, 1], "output_names": ["a", "a"]}, "outputs named twice: 'a'"),
    ],
)
def test_names_that_no_manifest_can_hold_are_refused_before_training(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line, nothing trained."""
    files = {"features": "x_%d.csv", "labels": "y_%d.csv", "numbers": [0, 1]}
    if "label_columns" in changes:
        del files["labels"]
    for number in range(2):
        (tmp_path / f"x_{number}.csv").write_text("1,0,3\n0,1,4\n" if "label_columns" in changes else "1,0\n0,1\n")
        (tmp_path / f"y_{number}.csv").write_text("0\n1\n")
    data = {"kind": "csv_sequences", "task": "regression", "train": files, **changes}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "made", "data": data, "network": [{"kind": "lstm", "units": 2}, OUT]}))
    assert trained(path) == 2
    error = capsys.readouterr().err
    assert error.startswith("ConfigError: data: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_column_named_like_a_calendar_channel_is_refused(tmp_path: Path) -> None:
    """Both would be the feature hour_sin."""
    path = table(tmp_path, calendar=["hour"], columns={"heat": {"target": True}, "hour_sin": {}})
    text = (tmp_path / "heat.csv").read_text().splitlines()
    (tmp_path / "heat.csv").write_text("\n".join([text[0] + ",hour_sin", *(line + ",0" for line in text[1:])]))
    with pytest.raises(ConfigError, match=r"data: columns: 'hour_sin' is also .* calendar"):
        load(path).data.open(batch=2, seed=0, root=tmp_path)


def test_evaluating_on_data_of_another_width_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the model takes, and what the data gives."""
    path = table(tmp_path, calendar=["hour"])
    assert trained(path) == 0
    capsys.readouterr()
    code = main(["evaluate", str(path), "--out", str(tmp_path / "m"), "--set", "data.calendar=[]"])
    assert code == 2
    error = capsys.readouterr().err
    assert "takes 'heat', 'hour_sin', 'hour_cos', the data gives 'heat'" in error
    assert error.count("\n") == 1


@dataclass(frozen=True)
class Losing(Fixed):
    """Two lanes, of which the second window has only one."""

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        x = torch.zeros(2, 3, 1)
        yield Batch(x, x, starts=torch.tensor([True, True]))
        yield Batch(x[:1], x[:1], starts=torch.tensor([False]))


def test_lanes_that_lose_a_row_are_an_error(tmp_path: Path) -> None:
    """In training as in evaluation: which row goes on is not known."""
    net = with_weights(LSTM_ONE, (0.1,) * 5)
    with pytest.raises(ConfigError, match="2 rows, the next one has 1"):
        Trainer(net, Losing(()), training()).fit()
    stepper = Stepper(stage(net, Losing(()), tmp_path), state_tensors(net))
    with pytest.raises(ConfigError, match="2 rows, the next one has 1"):
        list(answers(stepper, Losing(()), "test"))


LSTM_ONE: list[dict[str, Any]] = [{"kind": "simple_rnn", "units": 1}, OUT]


# --- Numbers that float32 cannot tell apart ---------------------------------------------------------------------


def test_numbers_that_collapse_in_float32_are_refused(tmp_path: Path) -> None:
    """Unix seconds of one minute lie 128 apart in float32, and the server takes float32. A constant is no harm."""
    for number in range(3):
        seconds = 1.7e9 + 20 * number + np.arange(20)
        (tmp_path / f"x_{number}.csv").write_text("".join(f"20130101,{s:.0f}\n" for s in seconds))
        (tmp_path / f"z_{number}.csv").write_text("".join(f"20130101,{s - 1.7e9:.0f}\n" for s in seconds))
        (tmp_path / f"y_{number}.csv").write_text("1\n" * 20)
    opened = []
    for letter in "zx":
        files = {"features": f"{letter}_%d.csv", "labels": "y_%d.csv", "numbers": [0, 2]}
        config = CsvSequencesConfig.model_validate({"kind": "csv_sequences", "task": "regression", "train": files})
        if letter == "z":
            opened.append(config.open(batch=2, seed=0, root=tmp_path))
            continue
        with pytest.raises(ConfigError, match=r"feature 'x_1' has mean 1700000030 .* 128 apart .*Subtract"):
            config.open(batch=2, seed=0, root=tmp_path)
    assert opened[0].features[1].scale == pytest.approx(np.arange(60).std())


def test_table_measures_its_readings_before_they_are_rounded(tmp_path: Path) -> None:
    """The same seconds as a column of a table."""
    path = table(tmp_path, columns={"heat": {"target": True}, "clock": {}})
    text = (tmp_path / "heat.csv").read_text().splitlines()
    lines = [f"{line},{1700000000 + number % 60}" for number, line in enumerate(text[1:])]
    (tmp_path / "heat.csv").write_text("\n".join([text[0] + ",clock", *lines]) + "\n")
    with pytest.raises(ConfigError, match=r"feature 'clock' .* 128 apart .*Subtract"):
        load(path).data.open(batch=2, seed=0, root=tmp_path)


# --- Messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("training.lerning_rate=0.1", "training.lerning_rate: unknown. Did you mean learning_rate?"),
        ("network.0.unit=3", "network[0].unit: unknown. Did you mean units?"),
        ("data.colums={}", "data.colums: unknown. Did you mean columns?"),
        ("data.zzz=1", "data.zzz: unknown"),
    ],
)
def test_unknown_key_is_told_with_the_nearest_one(setting: str, hint: str, tmp_path: Path) -> None:
    """Of the keys that could stand there."""
    with pytest.raises(ConfigError) as caught:
        load(table(tmp_path), [setting])
    assert hint in str(caught.value)


def test_text_that_cannot_be_used_is_told_with_file_and_line(tmp_path: Path) -> None:
    """A word without a vector; a label that training does not have."""
    (tmp_path / "w.txt").write_text("2 2\ngood 1 0\nbad 0 1\n")
    (tmp_path / "a.tsv").write_text("yes\tgood\nno\tbad\n")
    for text, message in (("yes\tgood\nno\tunheard\n", "no word with a vector"), ("maybe\tgood\n", "label 'maybe'")):
        (tmp_path / "b.tsv").write_text(text)
        with pytest.raises(ConfigError) as caught:
            Tokens(batch=1, seed=0, root=tmp_path, vectors="w.txt", train="a.tsv", test="b.tsv")
        line = text.count("\n")
        assert f"{tmp_path / 'b.tsv'}, line {line}: " in str(caught.value)
        assert message in str(caught.value)


def test_evaluating_an_empty_split_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing could be measured: exit code 2, with the split."""
    path = table(tmp_path)
    assert trained(path) == 0
    capsys.readouterr()
    empty = ["--set", "data.validation=2021-03-09T08:00", "--set", "data.test=2021-03-09T08:00"]
    arguments = ["evaluate", str(path), "--out", str(tmp_path / "m"), "--split", "validation"]
    assert main([*arguments, *empty]) == 2
    assert "no label in the validation split" in capsys.readouterr().err


def test_files_are_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However the configuration was named on the command line."""
    table(tmp_path)
    (tmp_path / "heat.csv").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["train", "heat.yaml"]) == 2
    assert f"{tmp_path / 'heat.csv'}: " in capsys.readouterr().err
    assert main(["train", "heat.yaml", "--set", "seed=x"]) == 2
    assert f"{tmp_path / 'heat.yaml'}: seed: " in capsys.readouterr().err


def test_echo_source_passes_every_check() -> None:
    """What is right is not refused."""
    assert Trainer(network(LSTM, plain(1), outputs=1), echo_source(), training(epochs=1)).fit().epoch == 1
