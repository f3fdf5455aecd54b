"""Output layers that answer with a distribution: values, losses, units, what the manifest says, what is learned."""

from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from networks import layer_specs, network, plain, training
from pydantic import ValidationError
from torch import Tensor

from stepcast.manifest import Distribution, Feature, Manifest, Output
from training.data.in_memory import Examples, InMemory
from training.network import Network
from training.train import Trainer

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.9)
QUANTILE = {"kind": "quantile", "levels": LEVELS}
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
        ({"targets": {"t": ["t@0.1", "t"]}}, "names 2 outputs, there are 3 levels"),
        ({"targets": {"t": ["t@0.1", "t", "u"]}}, "'u' is not an output"),
        ({"targets": {"v": ["t@0.1", "t", "t@0.9"]}}, "'v' is not an output"),
        ({"levels": [0.5, 0.1, 0.9]}, "do not ascend"),
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
