"""Several horizons of a table: labels, outputs, what they are relative to, and how each is measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Output, read_manifest
from training.__main__ import main
from training.config import load
from training.data.table import TableSource
from training.distributions import Gaussian
from training.layers.output import Head
from training.layers.specs import RnnOutputSpec
from training.network import Network
from training.skill import Measurement
from training.stepper import Stepper

NAN = float("nan")
HOURS = 200


def recipe(directory: Path, horizon: Any = (1, 3), **data: Any) -> Path:
    """A recipe over one series of two columns: a day's wave and a ramp."""
    steps = np.arange(HOURS)
    rows = [
        f"2021-01-{1 + h // 24:02}T{h % 24:02}:00:00Z,{20 + 10 * np.sin(h / 4):.4f},{h % 7},{h % 24}" for h in steps
    ]
    (directory / "heat.csv").write_text("\n".join(["when,heat,load,sun", *rows]) + "\n")
    horizon = list(horizon) if isinstance(horizon, tuple) else horizon
    settings = {
        "name": "heat",
        "data": {
            "kind": "table",
            "path": "heat.csv",
            "time": "when",
            "every": "1h",
            "columns": {"heat": {"target": True, "unit": "K"}, "load": {"target": True}, "sun": {}},
            "horizon": horizon,
            "target_scale": "change",
            "validation": "2021-01-06",
            "test": "2021-01-07",
            "warm_up": 24,
            **data,
        },
        "network": [{"kind": "lstm", "units": 4}, {"kind": "rnn_output", "residual": True}],
        "training": {"epochs": 1, "batch": 2},
    }
    path = directory / "heat.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def opened(path: Path) -> TableSource:
    source = load(path).data.open(batch=2, seed=0, root=path.parent)
    assert isinstance(source, TableSource)
    return source


def test_every_target_at_every_horizon_is_an_output(tmp_path: Path) -> None:
    """Named by its target and how far ahead; scaled by how much the target changes over that time."""
    source = opened(recipe(tmp_path, (1, 3, 24)))
    told = [(o.name, o.target, o.ahead, o.unit) for o in source.outputs]
    assert told == [
        ("heat", "heat", 1, "K"),
        ("load", "load", 1, ""),
        ("heat+3h", "heat", 3, "K"),
        ("load+3h", "load", 3, ""),
        ("heat+24h", "heat", 24, "K"),
        ("load+24h", "load", 24, ""),
    ]
    train = source.x[0, :120, :2].astype(np.float64)
    for output, ahead in zip(source.outputs[::2], (1, 3, 24), strict=True):
        assert output.scale == pytest.approx((train[ahead:, 0] - train[:-ahead, 0]).std(), rel=1e-5)
        assert output.mean == 0
    assert [(f.source, f.feature) for f in source.feedback] == [("heat", "heat"), ("load", "load")]


@pytest.mark.parametrize(
    ("every", "horizon", "names"),
    [
        ("15min", [1, 4], ["heat", "heat+60min"]),
        ("1D", [7, 14], ["heat+7D", "heat+14D"]),
        ("1h30min", [1, 2], ["heat", "heat+2x1h30min"]),
        ("1h", 6, ["heat"]),
    ],
)
def test_outputs_are_named_by_their_time(every: str, horizon: Any, names: list[str], tmp_path: Path) -> None:
    """In the unit of `every`; with a number alone an output keeps its target's name."""
    step = {"15min": 15, "1D": 1440, "1h30min": 90, "1h": 60}[every]
    times = np.datetime64("2021-01-01T00:00") + np.arange(100) * np.timedelta64(step, "m")
    path = recipe(tmp_path, horizon, every=every, columns={"heat": {"target": True}})
    (tmp_path / "heat.csv").write_text("\n".join(["when,heat", *(f"{t}Z,{i}" for i, t in enumerate(times))]))
    config = yaml.safe_load(path.read_text())
    config["data"] |= {"validation": f"{times[60]}Z", "test": f"{times[80]}Z"}
    path.write_text(yaml.safe_dump(config))
    source = opened(path)
    assert [o.name for o in source.outputs] == names
    assert (source.outputs[0].target is None) == isinstance(horizon, int)
    assert bool(source.feedback) == (horizon != 6 and horizon[0] == 1)


def test_labels_lie_at_their_horizons_and_end_with_their_split(tmp_path: Path) -> None:
    """The last label of a horizon is the split's last reading; lanes go on into one another."""
    source = opened(recipe(tmp_path, (1, 3)))
    (validation,) = source.batches("validation")
    assert validation.y_mask is not None
    ramp = source.x[0, 120:144, 1]
    y, known = validation.y[0, 24:].numpy(), validation.y_mask[0, 24:].numpy()
    np.testing.assert_array_equal(y[:23, 1], ramp[1:])
    np.testing.assert_array_equal(y[:21, 3], ramp[3:])
    assert known[:, 1].tolist() == [True] * 23 + [False]
    assert known[:, 3].tolist() == [True] * 21 + [False] * 3
    assert not validation.y_mask[0, :24].any()
    (train,) = source.batches("train", 0)
    assert train.y_mask is not None
    assert train.y_mask[0].all()  # the first lane's last labels are the second lane's readings
    assert train.y_mask[1, -4:, 3].tolist()[-3:] != [True] * 3


def test_each_horizon_is_relative_to_the_last_reading(tmp_path: Path) -> None:
    """A network of zeros says that nothing will change, at any horizon."""
    path = recipe(tmp_path, (1, 3))
    source, config = opened(path), load(path)
    network = Network.of(config.network, source).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        y, _ = network(torch.from_numpy(source.x[:, :50]))
    now = source.x[0, :50, :2]
    np.testing.assert_allclose(y[0].numpy(), np.concatenate([now, now], axis=1), rtol=1e-5, atol=1e-5)


def test_every_horizon_is_measured_by_its_own_output_and_by_the_rollout(tmp_path: Path) -> None:
    """Direct and rolled out beside the baselines, over the same rows; the manifest keeps both."""
    path = recipe(tmp_path, (1, 3))
    assert main(["train", str(path), "--out", str(tmp_path / "m"), "--runs", str(tmp_path / "r")]) == 0
    directory = tmp_path / "m" / "heat" / "1"
    manifest, source = read_manifest(directory), opened(path)
    assert [o.name for o in manifest.outputs] == ["heat", "load", "heat+3h", "load+3h"]
    stepper = Stepper.of(directory, manifest)
    measurement = Measurement(stepper, source)
    one, three = measurement.skills([1, 6, 24])
    assert (one.ahead, three.ahead) == (1, 3)
    assert list(one.forecasts) == ["model", "persistence", "day_before"]
    assert list(three.forecasts) == ["model", "rollout", "persistence", "day_before"]
    start, stop = source.bounds["test"]
    origin = np.arange(start, stop - 3)
    truth = source.x[0, origin + 3, :2]
    direct = measurement.replay.y[0, origin - measurement.replay.start, 2:]
    expected = np.sqrt(np.square(direct.astype(np.float64) - truth).mean(axis=0))
    np.testing.assert_allclose(three.rmse("model"), expected, rtol=1e-6)
    # The rollout by hand: the answers of the step before come back, `sun` is missing.
    at = 30  # of the replay, the warm-up of 24 steps included
    states = {name: values[at] for name, values in measurement.replay.states.items()}
    y, length = measurement.replay.y[:, at], np.ones(1, np.int32)
    for _ in range(2):
        x = np.concatenate([y[:, None, :2], np.full((1, 1, 1), np.nan, np.float32)], axis=2)
        out, states = stepper.run(x, length, states)
        y = out[:, 0]
    column = measurement.replay.start + at - start
    assert column == 6
    np.testing.assert_allclose(three.forecasts["rollout"][0, column], y[0, :2], rtol=1e-5)
    skill = manifest.provenance.metrics["skill"]
    assert set(skill) == {"1 ahead", "3 ahead"}
    assert skill["3 ahead"]["heat"]["rmse"] == pytest.approx(expected[0], abs=1e-4)
    assert skill["3 ahead"]["heat"]["rollout"] == pytest.approx(three.rmse("rollout")[0], abs=1e-4)
    assert "rollout" not in skill["1 ahead"]["heat"]
    assert json.loads((directory / "manifest.json").read_text())["outputs"][2]["ahead"] == 3


@pytest.mark.parametrize(
    ("horizon", "message"),
    [
        ([6, 1], r"horizon: got \[6, 1\], wanted steps ahead, each more than the one before"),
        ([1, 1], r"horizon: got \[1, 1\]"),
        ([], r"horizon: got \[\]"),
        (-1, r"horizon: got \[-1\]"),
        ([0, 1], "a horizon of 0, belong to a label"),
    ],
)
def test_horizons_that_are_none_are_refused(horizon: Any, message: str, tmp_path: Path) -> None:
    """Before any file is read."""
    with pytest.raises(ConfigError, match=message):
        load(recipe(tmp_path, horizon))


def test_class_has_one_horizon(tmp_path: Path) -> None:
    """A list of one is a list, too."""
    path = recipe(tmp_path, [1], columns={"heat": {}}, target_scale="value", label="load")
    with pytest.raises(ConfigError, match=r"horizon: got \[1\], but a label has one. Give a number."):
        load(path)


def test_faithful_gaussian_learns_means_as_under_the_squared_error() -> None:
    """The mean's gradient is its error, the scale's that of the likelihood; below the output only means are heard."""
    random = torch.Generator().manual_seed(3)
    z = torch.randn(2, 3, 4, generator=random, requires_grad=True)  # two targets: two means, two raw scales
    target = torch.randn(2, 3, 2, generator=random)
    (plain,) = torch.autograd.grad(Gaussian(False).losses(z, target).sum(), z)
    (faithful,) = torch.autograd.grad(Gaussian(True).losses(z, target).sum(), z)
    torch.testing.assert_close(faithful[..., :2], z[..., :2].detach() - target)
    torch.testing.assert_close(faithful[..., 2:], plain[..., 2:])
    features, outputs = [Feature(name="a")], [Output(name="b"), Output(name="c")]
    spec = RnnOutputSpec.model_validate({"kind": "rnn_output", "distribution": {"kind": "gaussian", "faithful": True}})
    head = Head(spec, 3, features, outputs, False)
    hidden = torch.randn(2, 3, 3, generator=random, requires_grad=True)
    total, _ = head.losses(head(hidden), None, target, None)
    (gradient,) = torch.autograd.grad(total, hidden)
    assert head.linear is not None
    weight, bias = head.linear.weight.detach()[:2], head.linear.bias.detach()[:2]
    torch.testing.assert_close(gradient, (hidden.detach() @ weight.T + bias - target) @ weight)
    torch.testing.assert_close(head(hidden), head.linear(hidden))
