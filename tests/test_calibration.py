"""Recalibration: distributions as wide as the errors on held-out rows; by literal numbers, by draws, in the graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from networks import CELLS
from test_horizons import opened, recipe

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Output, read_manifest
from stepcast.predictive import Predictive
from training.__main__ import main
from training.calibration import calibrate, fitted
from training.check import check_held_out
from training.config import Config, load
from training.data.in_memory import Examples, InMemory
from training.data.table import TableSource
from training.distributions import distribution_of
from training.evaluate import evaluate
from training.export import stage, state_tensors
from training.graph import Graph
from training.job import fit_anew
from training.layers.output import Head
from training.metrics import RegressionResult
from training.network import Network
from training.probabilistic import DistributionMetrics, crps
from training.stepper import Stepper

assert CELLS  # importing it sets torch to one thread

KINDS = ("quantile", "gaussian", "student_t", "negative_binomial", "mixture")
GAUSSIAN = {"kind": "gaussian"}


def config(distribution: dict[str, Any], *layers: dict[str, Any], **training: Any) -> Config:
    """Of a network that is its head, whose readings are the raw values, or of other layers."""
    return Config.model_validate(
        {
            "name": "noise",
            "data": {"kind": "python", "class": "make_models:Toy"},
            "network": layers or [{"kind": "rnn_loss", "distribution": distribution}],
            "training": {"calibrate": "validation", **training},
        }
    )


def drawn(kind: str, wider: float, rows: int = 40, steps: int = 100) -> tuple[Network, InMemory]:
    """A network whose readings are raw values, and labels whose spread is `wider` than it says; every tenth is NaN."""
    outputs, random = (Output(name="y", mean=10.0, scale=4.0),), np.random.default_rng(5)
    (spec,) = config({"kind": kind}).network
    raw = len(distribution_of(spec.distribution, outputs).begin)  # type: ignore[union-attr,arg-type]
    features = tuple(Feature(name=f"x{i}") for i in range(raw))
    net = Network([spec], features, outputs, False)
    head = net.head
    assert isinstance(head, Head)
    assert head.described is not None
    x = random.normal(size=(rows, steps, raw)).astype(np.float32)
    y = net(torch.from_numpy(x))[0].numpy()
    if kind == "negative_binomial":
        y[..., 1] *= wider
    labels = Predictive(head.outputs, head.described).draw(y.reshape(rows * steps, -1), random).reshape(rows, steps, 1)
    if kind != "negative_binomial":
        labels = y[..., :1] + wider * (labels - y[..., :1])
    labels[:, ::10] = np.nan
    examples = Examples(list(x), list(labels))
    source = InMemory(
        splits={"train": examples, "validation": examples},
        features=features,
        outputs=outputs,
        task="regression",
        batch=16,
        seed=0,
        description="draws",
    )
    return net, source


def shares(net: Network, source: InMemory, directory: Path) -> list[float]:
    """How many labels lie below each level's quantile, by the exported graph, and in how many levels that is wrong."""
    head = net.head
    assert isinstance(head, Head)
    assert head.described is not None
    stepper = Stepper(stage(net, source, directory), state_tensors(net))
    result = evaluate(stepper, source, "validation", distribution=DistributionMetrics(head.outputs, head.described))
    assert isinstance(result, RegressionResult)
    assert result.distribution is not None
    (target,) = result.distribution.targets
    return [abs(float(level) - share) for level, share in target.calibration.items() if share is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wider", [2.0, 0.5])
def test_spread_that_is_wrong_by_a_factor_of_two_is_mended(kind: str, wider: float, tmp_path: Path) -> None:
    """3,600 labels, of a spread that the head has not: the factor is found, and the graph then tells the truth."""
    net, source = drawn(kind, wider)
    if kind != "negative_binomial":  # its quantiles are whole numbers
        assert max(shares(net, source, tmp_path)) > 0.08
    factors = calibrate(net, source, config({"kind": kind}))
    assert factors == {"y": pytest.approx(wider, rel=0.15 if kind == "negative_binomial" else 0.05)}
    assert net.head.stretch.item() == pytest.approx(factors["y"], rel=1e-6)  # type: ignore[union-attr,operator]
    if kind != "negative_binomial":
        assert max(shares(net, source, tmp_path)) < 0.02
    assert calibrate(net, source, config({"kind": kind})) == factors  # whatever it was before


def test_factor_has_the_least_crps() -> None:
    """Of two targets with gaps, one a tenth too wide: no factor near it is better, and labels at gaps are none."""
    (spec,) = config(GAUSSIAN).network
    net = Network([spec], [Feature(name=n) for n in "abcd"], [Output(name="u"), Output(name="v")], False)
    head, random = net.head, np.random.default_rng(3)
    assert isinstance(head, Head)
    assert head.described is not None
    outputs = np.concatenate([random.normal(size=(500, 2)), 0.5 + random.random((500, 2))], axis=1)
    labels = outputs[:, :2] + outputs[:, 2:] * [0.9, 3.0] * random.standard_t(4, (500, 2))
    there = random.random((500, 2)) < 0.7
    found = fitted(head, outputs.astype(np.float32), np.where(there, labels, np.nan).astype(np.float32), there)

    def cost(target: int, factor: float) -> float:
        mean, scale, rows = outputs[:, target], outputs[:, 2 + target], there[:, target]
        assert head.described is not None
        scores = crps(head.described, np.stack([mean, factor * scale], axis=-1), labels[:, target])
        return float(scores[rows].mean())

    for target in (0, 1):
        least = cost(target, float(found[target]))
        assert all(cost(target, float(found[target]) * off) > least for off in (0.98, 0.995, 1.005, 1.02))
    assert found[1] / found[0] == pytest.approx(3.0 / 0.9, rel=0.2)


@pytest.mark.parametrize(
    ("kind", "parameters", "stretched"),
    [
        ("quantile", [5.0, 0.0, 4.0, -1.0, 8.0, 1.0], [5.0, 0.0, 3.0, -0.5, 11.0, 0.5]),
        ("gaussian", [5.0, 0.0, 3.0, 1.0], [5.0, 0.0, 6.0, 0.5]),
        ("student_t", [5.0, 0.0, 3.0, 1.0, 7.0, 8.0], [5.0, 0.0, 6.0, 0.5, 7.0, 8.0]),
        ("negative_binomial", [5.0, 2.0, 3.0, 1.0], [5.0, 2.0, 6.0, 0.5]),
        (
            "mixture",
            [5.0, 0.0, 0.25, 0.5, 0.75, 0.5, 2.0, -1.0, 6.0, 1.0, 3.0, 1.0, 2.0, 4.0],
            [5.0, 0.0, 0.25, 0.5, 0.75, 0.5, -1.0, -0.5, 7.0, 0.5, 6.0, 0.5, 4.0, 2.0],
        ),
    ],
)
def test_point_forecasts_stay_and_all_else_moves_away_from_them(
    kind: str, parameters: list[float], stretched: list[float]
) -> None:
    """Literal numbers of two targets, twice as wide and half as wide: in torch, and as a graph writes it."""
    more = {"components": 2} if kind == "mixture" else {}
    (spec,) = config({"kind": kind, **more}).network
    made = distribution_of(spec.distribution, [Output(name="u"), Output(name="v")])  # type: ignore[union-attr,arg-type]
    factors, given = torch.tensor([2.0, 0.5]), torch.tensor(parameters)
    assert made.stretched(given, factors).tolist() == stretched
    graph = Graph(len(parameters))
    written, scale = made.write_stretched(graph, graph.x, factors, torch.ones(len(parameters)))
    graph.output(graph.add("Mul", written, graph.constant(scale.numpy())), "y", ["B", "T", len(parameters)])
    session = onnxruntime.InferenceSession(graph.model(doc="").SerializeToString())
    lengths = np.ones(1, np.int32)
    (y,) = session.run(["y"], {"x": given.numpy()[None, None], "lengths": lengths})
    assert y[0, 0].tolist() == stretched


def test_each_output_layer_has_factors_of_its_own(tmp_path: Path) -> None:
    """Two output layers, in another order than the data's targets: factors by name, and a graph that is proved."""
    random = np.random.default_rng(7)
    layers = [
        {"kind": "rnn_output", "distribution": GAUSSIAN, "outputs": ["v"]},
        {"kind": "rnn_output", "distribution": GAUSSIAN, "outputs": ["u"]},
    ]
    whole = config(GAUSSIAN, *layers)
    x = random.normal(size=(30, 50, 1)).astype(np.float32)
    labels = random.normal(size=(30, 50, 2)) * [3.0, 0.2]
    examples = Examples(list(x), list(labels.astype(np.float32)))
    source = InMemory(
        splits={"train": examples, "validation": examples},
        features=(Feature(name="x"),),
        outputs=(Output(name="u"), Output(name="v")),
        task="regression",
        batch=10,
        seed=0,
    )
    net = Network.of(whole.network, source)
    for head, _ in net.head.tasks():
        assert head.linear is not None
        torch.nn.init.zeros_(head.linear.weight)  # mean 0 and deviation 1, whatever comes in
    factors = calibrate(net, source, whole)
    assert factors == {"u": pytest.approx(3.0, rel=0.05), "v": pytest.approx(0.2, rel=0.05)}
    stepper = Stepper(stage(net, source, tmp_path), state_tensors(net))
    y, _ = stepper.run(x[:1, :1], np.ones(1, np.int32), {})
    assert [o.name for o in net.head.outputs] == ["u", "v", "v@scale", "u@scale"]
    assert y[0, 0].tolist() == pytest.approx([0.0, 0.0, factors["v"], factors["u"]], abs=1e-3)


# --- folds ------------------------------------------------------------------------------------------------------------


def test_folds_leave_out_the_labels_of_a_stretch_of_time(tmp_path: Path) -> None:
    """120 training hours in three: no label of or in the stretch is learned from, and it is what is measured."""
    source = opened(recipe(tmp_path, (1, 3)))
    before = source.y.copy()
    for number, (rest, block) in enumerate(source.folds(3)):
        first, last = 40 * number, 40 * number + 40
        assert block.bounds == {**source.bounds, "test": (first, last)}
        assert (block.features, block.outputs) == (source.features, source.outputs)
        np.testing.assert_array_equal(block.y, before)
        assert rest.bounds == source.bounds
        for output, ahead in enumerate((1, 1, 3, 3)):
            gone = np.isnan(rest.y[0, :, output]) & ~np.isnan(before[0, :, output])
            assert np.flatnonzero(gone).tolist() == [t for t in range(190) if t < last and t + ahead >= first]
    np.testing.assert_array_equal(source.y, before)
    with pytest.raises(ConfigError, match=r"training.folds: 121, there are 120 training steps"):
        next(source.folds(121))


def probabilistic(directory: Path, **training: Any) -> Path:
    """The recipe of heat with a distribution."""
    path = recipe(directory, (1, 3))
    tree = yaml.safe_load(path.read_text())
    tree["network"][-1]["distribution"] = GAUSSIAN
    tree["training"] |= training
    path.write_text(yaml.safe_dump(tree))
    return path


@torch.no_grad()
def test_folds_measure_each_stretch_by_a_network_that_has_not_learned_from_it(tmp_path: Path) -> None:
    """The same by hand in torch: train without each stretch, answer it, and take the factors of all rows together."""
    whole = load(probabilistic(tmp_path, calibrate="folds", folds=2))
    source = whole.data.open(batch=2, seed=0, root=tmp_path)
    assert isinstance(source, TableSource)
    parts = []
    for rest, block in source.folds(2):
        with torch.enable_grad():
            other, _ = fit_anew(whole, rest)
        (batch,) = block.batches("test")
        assert batch.y_mask is not None
        rows = batch.y_mask.any(dim=-1)
        y, _ = other(batch.x, batch.x_mask)
        parts.append([one[rows].numpy() for one in (y, batch.y, batch.y_mask)])
    net = Network.of(whole.network, source)
    assert isinstance(net.head, Head)
    outputs, labels, there = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    want = dict(zip(("heat", "load", "heat+3h", "load+3h"), fitted(net.head, outputs, labels, there), strict=True))
    with torch.enable_grad():
        assert calibrate(net, source, whole) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("how", [{"calibrate": "validation"}, {"calibrate": "folds", "folds": 2}])
def test_command_calibrates_and_says_by_how_much(how: dict[str, Any], tmp_path: Path) -> None:
    """Factors stand in the manifest; an export of the same run has the same graph, one without them another."""
    path, models = probabilistic(tmp_path, **how), tmp_path / "models"
    places = ["--out", str(models), "--runs", str(tmp_path / "runs")]
    assert main(["train", str(path), *places]) == 0
    assert main(["export", str(path), *places]) == 0
    assert main(["export", str(path), *places, "--set", "training.calibrate=null"]) == 0
    first, second, third = (models / "heat" / str(version) for version in (1, 2, 3))
    factors = read_manifest(first).provenance.metrics["spread_factors"]
    assert set(factors) == {"heat", "load", "heat+3h", "load+3h"}
    assert all(1 / 32 < factor < 32 and factor != 1 for factor in factors.values())
    assert (first / "model.onnx").read_bytes() == (second / "model.onnx").read_bytes()
    assert "spread_factors" not in read_manifest(third).provenance.metrics
    row, lengths = np.full((1, 1, 3), 0.5, np.float32), np.ones(1, np.int32)
    answers = []
    for directory in (first, third):
        manifest = read_manifest(directory)
        stepper = Stepper.of(directory, manifest)
        answers.append(stepper.run(row, lengths, stepper.initial_states(1))[0][0, 0])
    wide, narrow = np.array(answers)
    np.testing.assert_allclose(wide[:4], narrow[:4], rtol=1e-6)
    np.testing.assert_allclose(wide[4:], narrow[4:] * list(factors.values()), rtol=1e-5)


def test_backtest_from_origins_calibrates_each_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before each origin, by the validation rows of that origin."""
    path = probabilistic(tmp_path, calibrate="validation")
    options = ["--origins", "2", "--without", "trees", "--out", str(tmp_path / "models")]
    assert main(["backtest", str(path), *options]) == 0
    assert capsys.readouterr().out.count("spread of distributions times") == 2


@pytest.mark.parametrize(
    ("training", "data", "told"),
    [
        ({"calibrate": "sometimes"}, {}, "training.calibrate: Input should be 'validation' or 'folds'"),
        ({"calibrate": "folds", "start": {"checkpoint": "best.pt"}}, {}, "from drawn weights, not from start"),
        ({"calibrate": "folds", "folds": 500}, {}, "training.folds: 500, there are 120 training steps"),
        ({"calibrate": "validation"}, {"horizon": [1, 24]}, r"output 'heat+24h' has no label in the validation split"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_the_first_epoch(
    training: dict[str, Any],
    data: dict[str, Any],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the key, and nothing trained."""
    path = probabilistic(tmp_path, **training)
    tree = yaml.safe_load(path.read_text())
    tree["data"] |= data
    path.write_text(yaml.safe_dump(tree))
    assert main(["train", str(path), "--out", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_network_without_a_distribution_has_nothing_to_calibrate(tmp_path: Path) -> None:
    """Refused when the recipe is read; folds of what is no table before anything is trained."""
    with pytest.raises(ConfigError, match=r"training.calibrate stretches distributions, and no output layer has one"):
        load(recipe(tmp_path), ["training.calibrate=validation"])
    net, source = drawn("gaussian", 1.0, rows=2, steps=4)
    with pytest.raises(ConfigError, match=r"folds are stretches of time, of data.kind table"):
        check_held_out(net, source, config(GAUSSIAN, calibrate="folds"))
