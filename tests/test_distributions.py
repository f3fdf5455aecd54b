"""Output layers that answer with a distribution: values, losses, units, what the manifest says, what is learned."""

import io
import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from make_models import Toy
from networks import layer_specs, network, plain, training
from pydantic import ValidationError
from rich.console import Console
from serving import running
from torch import Tensor

from stepcast import Client
from stepcast.manifest import MODEL_FILE, Distribution, Feature, Manifest, Output, read_manifest, sha256_of
from training.config import Config
from training.data.in_memory import Examples, InMemory
from training.evaluate import evaluate
from training.export import describe, publish, stage
from training.metrics import RegressionResult
from training.network import Network
from training.probabilistic import DistributionMetrics
from training.report import print_report, write_report
from training.stepper import Stepper
from training.train import Trainer

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.9)
QUANTILE = {"kind": "quantile", "levels": LEVELS}
FAN_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.9)
SCALED = [Output(name="a", unit="°C", mean=10.0, scale=4.0), Output(name="b", mean=-3.0, scale=0.5)]


def out(distribution: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An output layer with a distribution."""
    return {"kind": "rnn_output", "distribution": distribution, **more}


def loss_alone(distribution: dict[str, Any], targets: int, features: int = 2, **more: Any) -> Network:
    """A network that is its head: the readings are the raw values."""
    layers = [{"kind": "rnn_loss", "distribution": distribution, **more}]
    return Network(layer_specs(layers), plain(features), [Output(name=f"y{k}") for k in range(targets)], False)


def softplus(z: Any) -> Any:
    """log(1 + e^z)."""
    return np.logaddexp(0.0, z)


def quantiles_by_hand(z: Any) -> Any:
    """(..., 5) of raw values: median, then the gaps from the lowest level to the highest."""
    gaps = softplus(z[..., 1:])
    median = z[..., 0]
    return np.stack(
        [
            median - gaps[..., 1] - gaps[..., 0],
            median - gaps[..., 1],
            median,
            median + gaps[..., 2],
            median + gaps[..., 2] + gaps[..., 3],
        ],
        axis=-1,
    )


def pinball_by_hand(quantiles: Any, truth: Any) -> Any:
    """Mean over the levels of what a quantile costs: 1 - level above the truth, level below it."""
    over = truth[..., None] - quantiles
    return np.where(over > 0, np.array(LEVELS) * over, (np.array(LEVELS) - 1) * over).mean(axis=-1)


def test_quantiles_are_the_median_and_gaps_added_up() -> None:
    """By value: the point forecasts of both targets first, then the other levels from below."""
    z = torch.tensor([[[1.0, -2.0, 0.5, 0.0, -1.0, 2.0, 3.0, 0.1, -4.0, 1.5]]])  # (1, 1, R * K)
    net = loss_alone(QUANTILE, 2, 10)
    y, _ = net(z)
    want = quantiles_by_hand(z[0, 0].double().view(5, 2).T.numpy())  # (K, levels)
    np.testing.assert_allclose(y[0, 0], want[:, [2, 0, 1, 3, 4]].T.ravel(), rtol=1e-6)


def test_quantile_loss_is_the_pinball_loss_averaged_over_levels() -> None:
    """Against the formula, at labels below, between and above; masked by output, with a weight for each target."""
    random = np.random.default_rng(1)
    z, y = random.normal(size=(3, 4, 10)), 3 * random.normal(size=(3, 4, 2))
    mask = random.random((3, 4, 2)) < 0.7
    net = loss_alone(QUANTILE, 2, 10, loss_weights=[1.0, 3.0])
    labels = torch.tensor(np.where(mask, y, np.nan), dtype=torch.float32)
    total, count = net.head.losses(torch.tensor(z, dtype=torch.float32), None, labels, torch.tensor(mask))
    want = pinball_by_hand(quantiles_by_hand(np.moveaxis(z.reshape(3, 4, 5, 2), 2, 3)), y) * [1.0, 3.0]
    assert float(total) == pytest.approx(want[mask].sum(), rel=1e-5)
    assert int(count) == mask.sum()


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0, 1e6])
def test_quantiles_never_cross(size: float) -> None:
    """Whatever the raw values, the last reading and the units are."""
    features = [Feature(name="a", mean=1e3, scale=1e-2), Feature(name="b", mean=-7.0, scale=1e4), *plain(1)]
    net = Network(layer_specs([{"kind": "dense", "units": 3}, out(QUANTILE, residual=True)]), features, SCALED, False)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in net.head.parameters():
            weight.copy_(size * torch.randn_like(weight))
        y, _ = net(100 * torch.randn(50, 4, 3))
    for first in (0, 1):
        ascending = y[..., first::2][..., [1, 2, 0, 3, 4]]
        assert bool((ascending.diff(dim=-1) >= 0).all())


def test_quantiles_begin_as_those_of_the_normal_distribution_in_the_callers_units() -> None:
    """Before training, without weights: mean + scale * normal quantile, and the last reading with residual."""
    features = [Feature(name="a", mean=2.0, scale=5.0), *plain(1)]
    for residual in (False, True):
        net = Network(layer_specs([out(QUANTILE, residual=residual)]), features, SCALED, False)
        assert net.head.linear is not None
        torch.nn.init.zeros_(net.head.linear.weight)
        y, _ = net(torch.tensor([[[17.0, 0.0]]]))
        normal = np.array([NormalDist().inv_cdf(level) for level in (0.5, 0.05, 0.25, 0.75, 0.9)])
        want = np.stack([10 + 4 * normal + 17 * residual, -3 + 0.5 * normal], axis=1)
        np.testing.assert_allclose(y.detach()[0, 0].view(5, 2), want, rtol=1e-5)


def test_labels_are_scaled_and_relative_to_the_last_reading() -> None:
    """The loss of labels in the caller's units is that of the network's own scale."""
    features = [Feature(name="a", mean=2.0, scale=5.0), *plain(1)]
    torch.manual_seed(3)
    net = Network(layer_specs([out(QUANTILE, residual=True)]), features, SCALED, False)
    x, y = torch.tensor([[[17.0, 0.3]]]), torch.tensor([[[31.0, -3.25]]])
    z, base, _ = net.train_pass(x, None, net.initial_state(1))
    total, count = net.head.losses(z, base, y, None)
    scaled = np.array([(31.0 - 17.0 - 10.0) / 4.0, (-3.25 + 3.0) / 0.5])
    quantiles = quantiles_by_hand(z.detach().double().view(5, 2).T.numpy())
    assert float(total.detach()) == pytest.approx(pinball_by_hand(quantiles, scaled).sum(), rel=1e-5)
    assert int(count) == 2


def test_quantiles_have_names_units_and_a_description() -> None:
    """Outputs are called target@level, in the target's unit; the manifest lists each target's from low to high."""
    net = network([out({"kind": "quantile"})], outputs=1)
    assert net.head.described == Distribution(
        kind="quantile", levels=(0.1, 0.5, 0.9), targets={"y0": ("y0@0.1", "y0", "y0@0.9")}
    )
    head = Network(layer_specs([out({"kind": "quantile"})]), plain(), SCALED, False).head
    assert [o.name for o in head.outputs] == ["a", "b", "a@0.1", "b@0.1", "a@0.9", "b@0.9"]
    assert head.outputs[2] == Output(name="a@0.1", unit="°C", mean=10.0, scale=4.0)


@pytest.mark.parametrize(
    ("distribution", "more", "told"),
    [
        ({"kind": "quantile", "levels": [0.1, 0.9]}, {}, "want 0.5 and a level on either side of it"),
        ({"kind": "quantile", "levels": [0.5, 0.9]}, {}, "want 0.5 and a level on either side of it"),
        ({"kind": "quantile", "levels": [0.9, 0.5, 0.1]}, {}, "do not ascend"),
        ({"kind": "quantile", "levels": [0.0, 0.5, 0.9]}, {}, "greater than 0"),
        ({"kind": "quantile"}, {"loss": "mae"}, "has its own loss and activation"),
        ({"kind": "quantile"}, {"activation": "relu"}, "has its own loss and activation"),
    ],
)
def test_wrong_distributions_are_refused_when_the_recipe_is_read(
    distribution: dict[str, Any], more: dict[str, Any], told: str
) -> None:
    """With what is wrong."""
    with pytest.raises(ValidationError, match=told):
        layer_specs([out(distribution, **more)])


def test_distributions_that_do_not_fit_the_data_are_refused() -> None:
    """Classes, and an rnn_loss on as many values as there are targets."""
    with pytest.raises(ValueError, match="is one of numbers, the data has classes"):
        network([out(QUANTILE)], classification=True)
    with pytest.raises(ValueError, match="rnn_loss has 4 units, the data has 3 outputs, 5 numbers for each"):
        network([{"kind": "rnn_loss", "distribution": QUANTILE}])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"targets": {"t": ["t@0.1", "t"]}}, "names 2 outputs, quantile has 3 parameters"),
        ({"targets": {"t": ["t@0.1", "t", "u"]}}, "'u' is not an output"),
        ({"targets": {"v": ["t@0.1", "t", "t@0.9"]}}, "'v' is not an output"),
        ({"levels": [0.5, 0.1, 0.9]}, "do not ascend"),
        ({"kind": "student_t"}, "'levels' belongs to kind 'quantile'"),
        ({"kind": "gaussian", "levels": []}, "names 3 outputs, gaussian has 2 parameters"),
        ({"kind": "mixture", "levels": [], "targets": {"t": ["t", "t"]}}, "mixture has 3 parameters"),
    ],
)
def test_manifest_refuses_a_distribution_that_its_outputs_do_not_have(change: dict[str, Any], told: str) -> None:
    """A wrong list of outputs, and levels that are no levels."""
    outputs = [{"name": name} for name in ("t", "t@0.1", "t@0.9")]
    distribution = {"kind": "quantile", "levels": [0.1, 0.5, 0.9], "targets": {"t": ["t@0.1", "t", "t@0.9"]}}
    whole = {"name": "m", "version": 1, "features": [{"name": "f"}], "outputs": outputs, "task": "regression"}
    made = Manifest.model_validate({**whole, "distribution": distribution, "sha256": "0" * 64})
    assert [output.name for output in made.points] == ["t"]
    with pytest.raises(ValidationError, match=told):
        Manifest.model_validate({**whole, "distribution": {**distribution, **change}, "sha256": "0" * 64})


def noisy_source(draw: Any, sequences: int = 40, steps: int = 25) -> InMemory:
    """y = draw(x) at steps of their own; x is 1 or 3."""
    random = np.random.default_rng(6)
    x = [random.choice([1.0, 3.0], (steps, 1)).astype(np.float32) for _ in range(sequences)]
    examples = Examples(x, [draw(random, v).astype(np.float32) for v in x])
    return InMemory(
        splits={"train": examples},
        features=(Feature(name="x"),),
        outputs=(Output(name="y"),),
        task="regression",
        batch=10,
        seed=0,
        alignment="start",
        description="noise",
    )


def learned(distribution: dict[str, Any], source: InMemory, **more: Any) -> tuple[Tensor, Tensor]:
    """Answers at x = 1 and at x = 3 after training."""
    torch.manual_seed(4)
    net = Network.of(layer_specs([{"kind": "dense", "units": 8}, out(distribution)]), source)
    Trainer(net, source, training(epochs=100, learning_rate=0.05, schedule="cosine", **more)).fit()
    with torch.no_grad():
        y, _ = net(torch.tensor([[[1.0], [3.0]]]))
    return y[0, 0], y[0, 1]


def test_quantiles_are_learned() -> None:
    """Noise of the exponential distribution, x times as large: -x log(1 - level)."""
    source = noisy_source(lambda random, x: x * random.exponential(size=x.shape))
    for x, y in zip((1.0, 3.0), learned({"kind": "quantile", "levels": (0.1, 0.5, 0.9)}, source), strict=True):
        want = -x * np.log(1 - np.array([0.5, 0.1, 0.9]))
        np.testing.assert_allclose(y, want, rtol=0.15, atol=0.05)


def test_masks_by_output_are_taken() -> None:
    """Every target has a loss of its own: one that is missing is left out."""
    net = network([out(QUANTILE)])
    z, base, _ = net.train_pass(torch.zeros(1, 2, 4), None, net.initial_state(1))
    labels = torch.tensor([[[0.0, torch.nan, 1.0], [torch.nan, torch.nan, 2.0]]])
    total, count = net.head.losses(z, base, labels, ~labels.isnan())
    assert torch.isfinite(total)
    assert int(count) == 3


# --- a fan ------------------------------------------------------------------------------------------------------------


def inverse_by_hand(levels: Any, quantiles: Any, u: float) -> float:
    """The value at which the distribution function of some quantiles is u."""
    p, q = list(levels), [float(value) for value in quantiles]
    if u < p[0]:
        return q[0] + (q[1] - q[0]) / math.log(p[1] / p[0]) * math.log(u / p[0])
    if u > p[-1]:
        return q[-1] - (q[-1] - q[-2]) / math.log((1 - p[-2]) / (1 - p[-1])) * math.log((1 - u) / (1 - p[-1]))
    return float(np.interp(u, p, q))


def torch_fan(net: Network, before: Tensor, ahead: Tensor, paths: int, seed: int, levels: Any) -> Any:
    """(P, H, 2): torch fed with its own draws, from the uniforms of the two streams of a seed.

    Args:
        net: Of targets u and v, which are features 0 and 1.
        before: (T, F) what the session has stepped.
        ahead: (H, F) what is known of the future.
        paths: P.
        seed: Of the rollout.
        levels: Of the net's quantiles.
    """
    first, later = (np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(2))
    order = [1 + i for i in range(levels.index(0.5))] + [0] + [1 + i for i in range(levels.index(0.5), len(levels) - 1)]

    def values(y: Tensor, uniforms: Any) -> Tensor:
        quantiles = y.view(-1, len(levels), 2)[:, order]  # (P, levels, 2)
        rows = [[inverse_by_hand(levels, quantiles[p, :, k], uniforms[p, k]) for k in range(2)] for p in range(len(y))]
        return torch.tensor(rows, dtype=torch.float32)

    y, state = net(before[None])
    state = {
        layer: {key: t.repeat(paths, *[1] * (t.ndim - 1)) for key, t in keys.items()} for layer, keys in state.items()
    }
    fed, steps = values(y[0, -1:].repeat(paths, 1), first.random((paths, 2))), []
    for known in ahead:
        x = torch.cat([fed, known[2:].repeat(paths, 1)], dim=1)
        y, state = net(x[:, None], None, state)
        fed = values(y[:, 0], later.random((paths, 2)))
        steps.append(fed.numpy())
    return np.stack(steps, axis=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Toy, Path]:
    """A quantile model, trained and exported: the network, its source, and the repository."""
    config = Config.model_validate(
        {
            "name": "fan",
            "data": {"kind": "python", "class": "make_models:Toy", "options": {"missing": True, "scaled": True}},
            "network": [
                {"kind": "lstm", "units": 6},
                out({"kind": "quantile", "levels": FAN_LEVELS}, residual=True),
            ],
            "training": {"epochs": 2},
        }
    )
    source, models = Toy(missing=True, scaled=True), tmp_path_factory.mktemp("models")
    torch.manual_seed(8)
    net = Network.of(config.network, source)
    Trainer(net, source, config.training).fit()
    staged = stage(net, source, models)
    manifest = describe(net, source, config, sha256=sha256_of(staged / MODEL_FILE), version=1, metrics={})
    publish(staged, manifest, models)
    return net, source, models


@torch.no_grad()
def test_fan_of_the_service_is_torchs_from_the_same_seed(exported: tuple[Network, Toy, Path]) -> None:
    """A quantile model is trained, exported, served, and rolled out with 100 sample paths in one call."""
    net, _, models = exported
    torch.manual_seed(9)
    before, ahead = torch.randn(5, 3), torch.full((7, 3), torch.nan)
    ahead[:, 2] = torch.randn(7)
    ahead[3, 2] = torch.nan  # held
    with running(models=models, store="memory://") as server, Client(server.url) as client:
        session = client.session("fan", "a")
        session.step(before.numpy(), rows="steps")
        told = session.rollout(7, ahead.numpy(), paths=100, seed=11, keep_paths=True, levels=[0.1, 0.5, 0.8])
    want = torch_fan(net, before, ahead, 100, 11, FAN_LEVELS)
    assert told.paths is not None
    assert told.quantiles is not None
    assert told.levels == (0.1, 0.5, 0.8)
    for k, name in enumerate("uv"):
        np.testing.assert_allclose(told.paths[name][0], want[..., k], rtol=1e-4, atol=1e-4)
        fan = np.quantile(want[..., k], told.levels, axis=0).T
        np.testing.assert_allclose(told.quantiles[name][0], fan, rtol=1e-4, atol=1e-4)
    assert told.paths["u"].std() > 0.5


@torch.no_grad()
def test_evaluation_scores_the_exported_distributions(exported: tuple[Network, Toy, Path], tmp_path: Path) -> None:
    """As served: CRPS is twice the pinball loss of torch's quantiles; tables and metrics.json have it."""
    net, source, models = exported
    manifest = read_manifest(models / "fan" / "1")
    assert manifest.distribution is not None
    metrics = DistributionMetrics(manifest.outputs, manifest.distribution)
    result = evaluate(Stepper.of(models / "fan" / "1", manifest), source, "test", distribution=metrics)
    assert isinstance(result, RegressionResult)
    assert result.distribution is not None
    (batch,) = source.batches("test")
    y = net(batch.x)[0].view(-1, 5, 2)[:, [1, 2, 0, 3, 4]].numpy()  # (R, levels, targets); the labels are 0
    levels = np.array(FAN_LEVELS)[:, None]
    want = 2 * np.maximum(-levels * y, (1 - levels) * y).mean(axis=(0, 1))
    assert [t.crps for t in result.distribution.targets] == pytest.approx(want, rel=1e-4)
    assert result.distribution.targets[0].rows == 8 * 16
    below = (y >= 0).mean(axis=0)
    assert [*result.distribution.targets[1].calibration.values()] == pytest.approx(below[:, 1])
    console = Console(width=160, record=True, file=io.StringIO())
    print_report(result, console)
    assert f"{want[0]:.4g}" in console.export_text()
    metrics_file, page = write_report(tmp_path, result)
    told = json.loads(metrics_file.read_text())["distribution"]
    assert told["targets"][0]["crps"] == result.distribution.targets[0].crps
    assert "Distribution: quantile" in page.read_text()
