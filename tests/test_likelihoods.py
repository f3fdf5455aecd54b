"""Distributions with parameters: losses are torch's, draws lie as quantiles say, scores are integrals."""

from typing import Any

import numpy as np
import pytest
import torch
from networks import layer_specs, network, plain
from scipy import stats
from torch import Tensor
from torch import distributions as truth

from stepcast.errors import ConfigError
from stepcast.manifest import Distribution, Feature, Output
from stepcast.predictive import Predictive
from training.check import check_labels
from training.data.batch import Batch
from training.data.in_memory import Examples, InMemory
from training.distributions import distribution_of
from training.layers.distribution_specs import DistributionSpec
from training.layers.specs import RnnLossSpec
from training.network import Network
from training.probabilistic import DistributionMetrics, central, crps, crps_of_samples, pinball, quantiles
from training.report import forecast_of

KINDS = ("gaussian", "student_t", "negative_binomial", "mixture")
TARGETS = [Output(name="a", unit="1/h", mean=6.0, scale=2.0), Output(name="b", scale=0.5)]
# Parameters in the manifest's order, two rows of each kind.
PARAMETERS: dict[str, Any] = {
    "gaussian": [[1.0, 2.0], [-3.0, 0.1]],
    "student_t": [[1.0, 2.0, 3.5], [-3.0, 0.1, 40.0]],
    "negative_binomial": [[7.5, 0.4], [0.3, 2.0]],
    "mixture": [[0.2, 0.5, 0.3, -2.0, 0.0, 6.0, 1.0, 0.3, 2.0], [0.9, 0.05, 0.05, 0.0, 1.0, -1.0, 0.1, 0.1, 0.1]],
}


def spec_of(kind: str) -> DistributionSpec:
    """With its defaults."""
    (made,) = layer_specs([{"kind": "rnn_loss", "distribution": {"kind": kind}}])
    assert isinstance(made, RnnLossSpec)
    assert made.distribution is not None
    return made.distribution


def torchs(kind: str, p: Tensor) -> Any:
    """torch's distribution of parameters (..., P) in the manifest's order."""
    if kind == "gaussian":
        return truth.Normal(p[..., 0], p[..., 1])
    if kind == "student_t":
        return truth.StudentT(p[..., 2], p[..., 0], p[..., 1])
    if kind == "negative_binomial":
        return truth.NegativeBinomial(1 / p[..., 1], logits=(p[..., 0] * p[..., 1]).log())
    weights, means, scales = p.chunk(3, dim=-1)
    return truth.MixtureSameFamily(truth.Categorical(weights), truth.Normal(means, scales))


def described(kind: str) -> Distribution:
    """A distribution of one target, in the manifest's words."""
    return Distribution.model_validate(
        {"kind": kind, "targets": {"t": [f"p{i}" for i in range(len(PARAMETERS[kind][0]))]}}
    )


def labels_of(kind: str, shape: tuple[int, ...], seed: int = 2) -> Tensor:
    """Whole numbers for counts."""
    random = np.random.default_rng(seed)
    drawn = random.poisson(6.0, shape) if kind == "negative_binomial" else 2 * random.normal(size=shape)
    return torch.tensor(drawn, dtype=torch.float32)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_their_gradients_are_those_of_torchs_densities(kind: str) -> None:
    """Of raw values from -3 to 3, for two targets, in float64 by torch.distributions."""
    made = distribution_of(spec_of(kind), TARGETS)
    torch.manual_seed(1)
    z = (6 * torch.rand(3, 4, 2 * len(made.begin)) - 3).requires_grad_()
    y = labels_of(kind, (3, 4, 2))
    losses = made.losses(z, y)
    (gradient,) = torch.autograd.grad(losses.sum(), z)

    exact = z.detach().double().requires_grad_()
    parameters = made.double()(exact).unflatten(-1, (len(made.per_target), 2))[..., -len(PARAMETERS[kind][0]) :, :]
    want = -torchs(kind, parameters.transpose(-1, -2)).log_prob(y.double())
    (want_gradient,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(losses.detach().double(), want.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "z", "y", "near"),
    [
        ("student_t", [0.3, 0.5, 1e6], 1.2, truth.Normal(0.3, np.log1p(np.exp(0.5)) + 1e-4)),
        ("negative_binomial", [2.0, -30.0], 7.0, truth.Poisson(TARGETS[0].mean * (np.log1p(np.exp(2.0)) + 1e-4))),
    ],
)
def test_losses_at_the_end_of_a_family_are_those_of_its_limit(kind: str, z: list[float], y: float, near: Any) -> None:
    """A million degrees of freedom are the normal distribution, a dispersion of a millionth is Poisson's."""
    loss = distribution_of(spec_of(kind), TARGETS[:1]).losses(torch.tensor([[z]]), torch.tensor([[[y]]]))
    assert float(loss) == pytest.approx(-float(near.log_prob(torch.tensor(y))), rel=1e-4)


@pytest.mark.parametrize("kind", ["quantile", *KINDS])
@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_losses_stay_finite_whatever_the_raw_values(kind: str, size: float) -> None:
    """Raw values and labels far out: no NaN, no infinity, neither in losses nor in gradients; scales stay positive."""
    made = distribution_of(spec_of(kind), TARGETS)
    torch.manual_seed(1)
    z = (size * torch.randn(50, 4, 2 * len(made.begin))).requires_grad_()
    y = (size * labels_of(kind, (50, 4, 2))).round()
    losses = made.losses(z, y)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    assert bool(torch.isfinite(losses).all())
    assert bool(torch.isfinite(gradient).all())
    for place, parameter in enumerate(made.per_target):
        if parameter.role == "spread":
            assert bool((made(z)[..., 2 * place : 2 * place + 2] > 0).all())


# --- units and names --------------------------------------------------------------------------------------------------


def head_of(kind: str, **more: Any) -> Network:
    """A network that is its head, without weights: it answers where training starts."""
    layers = [{"kind": "rnn_output", "distribution": {"kind": kind}, "weight_init": "zero", **more}]
    return Network(layer_specs(layers), plain(1), TARGETS, False)


@pytest.mark.parametrize(
    ("kind", "a", "b"),
    [
        ("gaussian", {"a": 6.0, "a@scale": 2.0002}, {"b": 0.0, "b@scale": 0.50005}),
        ("student_t", {"a": 6.0, "a@scale": 2.0002, "a@df": 10.0001}, {"b": 0.0, "b@scale": 0.50005, "b@df": 10.0001}),
        ("negative_binomial", {"a": 6.0006, "a@dispersion": 0.500001}, {"b": 0.50005, "b@dispersion": 0.500001}),
        (
            "mixture",
            {
                "a": 6.0,
                **{f"a@weight_{i}": 1 / 3 for i in range(3)},
                **{f"a@mean_{i}": m for i, m in enumerate((4.0, 6.0, 8.0))},
                **{f"a@scale_{i}": 1.4002 for i in range(3)},
            },
            {"b": 0.0, "b@weight_1": 1 / 3, "b@mean_0": -0.5, "b@mean_2": 0.5, "b@scale_1": 0.35005},
        ),
    ],
)
def test_parameters_begin_as_the_targets_are_in_the_callers_units(
    kind: str, a: dict[str, float], b: dict[str, float]
) -> None:
    """A mean of 6 and a deviation of 2, and of 0 and 0.5; counts begin at the target's mean."""
    net = head_of(kind)
    y, _ = net(torch.zeros(1, 1, 1))
    told = dict(zip([output.name for output in net.head.outputs], y.detach()[0, 0].tolist(), strict=True))
    assert {name: told[name] for name in {**a, **b}} == pytest.approx({**a, **b}, rel=1e-5)
    assert net.head.described is not None
    assert [*net.head.described.targets["a"]] == [name for name in a if kind != "mixture" or name != "a"]
    units = {output.name: output.unit for output in net.head.outputs}
    assert units["a"] == "1/h"
    assert {units[name] for name in units if name.rstrip("_012") in ("a@df", "a@dispersion", "a@weight")} <= {""}


@pytest.mark.parametrize("kind", ["gaussian", "student_t", "mixture"])
def test_only_locations_move_with_the_last_reading(kind: str) -> None:
    """With residual: scales, degrees of freedom and weights are those without."""
    layers = [{"kind": "rnn_loss", "distribution": {"kind": kind}}]
    size = len(distribution_of(spec_of(kind), TARGETS[:1]).begin)
    features = [Feature(name="a", mean=3.0, scale=5.0), *plain(size - 1)]
    z = torch.linspace(-1.0, 1.0, size)
    z[0] = 17.0
    still, moved = (
        Network(layer_specs([{**layers[0], "residual": residual}]), features, TARGETS[:1], False)
        for residual in (False, True)
    )
    assert still.head.loss.distribution is not None
    shift = (moved(z.view(1, 1, -1))[0] - still(z.view(1, 1, -1))[0])[0, 0]
    want = [17.0 * (parameter.role == "location") for parameter in still.head.loss.distribution.per_target]
    torch.testing.assert_close(shift, torch.tensor(want))


def test_the_point_forecast_of_a_mixture_is_the_mean_of_the_whole() -> None:
    """Weights 1/6, 1/3, 1/2 and means 1, 5, -2: 5/6."""
    made = distribution_of(spec_of("mixture"), TARGETS[:1])
    z = torch.tensor([[[0.0, np.log(2.0), np.log(3.0), 1.0, 5.0, -2.0, 0.0, 0.0, 0.0]]])
    assert float(made(z)[0, 0, 0]) == pytest.approx(5 / 6, rel=1e-5)


def counts(values: list[float]) -> InMemory:
    """A source of counts."""
    x = [np.zeros((len(values), 1), np.float32)]
    examples = Examples(x, [np.array(values, np.float32)[:, None]])
    return InMemory(
        splits={"train": examples},
        features=(plain(1)[0],),
        outputs=(Output(name="n", mean=2.0, scale=3.0),),
        task="regression",
        batch=1,
        seed=0,
        alignment="start",
        description="counts",
    )


def test_counts_are_whole_and_stay_unscaled() -> None:
    """Labels that are no counts stop training before it begins; changes of counts are none."""
    net = Network.of(
        layer_specs([{"kind": "rnn_output", "distribution": {"kind": "negative_binomial"}}]), counts([1.0])
    )
    check_labels(net, counts([0.0, 3.0, 7.0]))
    for wrong in (2.5, -1.0):
        with pytest.raises(ConfigError, match=f"takes labels that are whole and at least 0, output 'n' is {wrong:g}"):
            check_labels(net, counts([0.0, wrong]))
    with pytest.raises(ValueError, match="changes are of both signs"):
        network([{"kind": "rnn_output", "residual": True, "distribution": {"kind": "negative_binomial"}}])


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_distribution_of_the_parameters(kind: str) -> None:
    """20,000 draws of each row lie below its quantiles as often as the levels say."""
    outputs = [Output(name=name) for name in ("t", *described(kind).targets["t"])]
    predictive = Predictive(
        outputs, described(kind).model_copy(update={"targets": {"t": described(kind).targets["t"]}})
    )
    levels = (0.05, 0.3, 0.5, 0.9)
    for row in PARAMETERS[kind]:
        made = predictive.draw(np.tile(np.array([np.nan, *row], np.float32), (20_000, 1)), np.random.default_rng(3))[
            :, 0
        ]
        at = quantiles(described(kind), np.array(row), levels)
        below = [(made <= quantile).mean() for quantile in at]
        want = levels
        if kind == "negative_binomial":
            mean, dispersion = row
            want = stats.nbinom.cdf(at, 1 / dispersion, 1 / (1 + mean * dispersion))
        np.testing.assert_allclose(below, want, atol=0.012)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_what_is_no_distribution_are_no_errors(kind: str) -> None:
    """A parameter that is not finite gives NaN, in its own row; one that should be positive is made so."""
    outputs = [Output(name=name) for name in ("t", *described(kind).targets["t"])]
    good = [0.0, *PARAMETERS[kind][0]]
    rows = np.array([good, [0.0, np.inf, *good[2:]], [*good[:-1], np.nan], [*good[:-1], -1.0]], np.float32)
    made = Predictive(outputs, described(kind)).draw(rows, np.random.default_rng(1))
    assert np.isfinite(made[:, 0]).tolist() == [True, False, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_is_asked_in_the_order_that_is_written_down(kind: str) -> None:
    """The draws made again by hand, from a generator of the same seed."""
    rows = np.array(PARAMETERS[kind])
    p, random = np.moveaxis(rows, -1, 0), np.random.default_rng(7)
    if kind == "gaussian":
        want = p[0] + p[1] * random.standard_normal((2, 1))[:, 0]
    elif kind == "student_t":
        want = p[0] + p[1] * random.standard_t(p[2][:, None])[:, 0]
    elif kind == "negative_binomial":
        want = random.poisson(p[0] * p[1] * random.standard_gamma(1 / p[1]))
    else:
        chosen = [np.searchsorted(np.cumsum(row[:3]), u) for row, u in zip(rows, random.random(2), strict=True)]
        normal = random.standard_normal(2)
        want = np.array([row[3 + c] + row[6 + c] * n for row, c, n in zip(rows, chosen, normal, strict=True)])
    outputs = [Output(name=name) for name in described(kind).targets["t"]]
    predictive = Predictive([Output(name="t"), *outputs], described(kind))
    made = predictive.draw(np.insert(rows, 0, 0.0, axis=1).astype(np.float32), np.random.default_rng(7))
    np.testing.assert_allclose(made[:, 0], want, rtol=1e-5)


# --- scores -----------------------------------------------------------------------------------------------------------


def cdf_of(kind: str, row: Any) -> Any:
    """scipy's distribution function."""
    if kind == "gaussian":
        return stats.norm(row[0], row[1]).cdf
    if kind == "student_t":
        return stats.t(row[2], row[0], row[1]).cdf
    if kind == "negative_binomial":
        return stats.nbinom(1 / row[1], 1 / (1 + row[0] * row[1])).cdf
    return lambda x: sum(row[i] * stats.norm(row[3 + i], row[6 + i]).cdf(x) for i in range(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("y", [0.0, 1.0, 4.0, 11.0])
def test_crps_is_the_integral_of_the_squared_difference(kind: str, y: float) -> None:
    """(F(x) - [y <= x])² over all x, numerically; of counts the sum."""
    for row in PARAMETERS[kind]:
        cdf = cdf_of(kind, row)
        if kind == "negative_binomial":
            x = np.arange(2000)
            want = ((cdf(x) - (x >= y)) ** 2).sum()
        else:
            below, above = np.linspace(-90.0, y, 30_001), np.linspace(y, 90.0, 30_001)
            want = np.trapezoid(cdf(below) ** 2, below) + np.trapezoid((1 - cdf(above)) ** 2, above)
        got = crps(described(kind), np.array(row), np.array(y))
        assert float(got) == pytest.approx(want, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_quantiles_reach_their_level(kind: str) -> None:
    """F(q) is the level; of counts q is the least that reaches it."""
    levels = np.array([0.001, 0.05, 0.3, 0.5, 0.9, 0.999])
    made = quantiles(described(kind), np.array(PARAMETERS[kind]), levels.tolist())
    assert made.shape == (2, 6)
    for row, got in zip(PARAMETERS[kind], made, strict=True):
        cdf = cdf_of(kind, row)
        if kind == "negative_binomial":
            assert (cdf(got) >= levels).all()
            assert (cdf(got - 1) < levels).all()
        else:
            np.testing.assert_allclose(cdf(got), levels, rtol=1e-6)


def test_quantiles_of_counts_take_a_level_that_is_met() -> None:
    """Mean 1, dispersion 1: half of all counts are 0, three quarters at most 1."""
    got = quantiles(described("negative_binomial"), np.array([1.0, 1.0]), (0.4999, 0.5, 0.5001, 0.75, 0.76))
    np.testing.assert_array_equal(got, [0, 0, 1, 1, 2])


def test_quantiles_are_scored_by_the_pinball_loss() -> None:
    """Twice its average over the levels; by value. Other levels are interpolated."""
    three = Distribution(kind="quantile", levels=(0.25, 0.5, 0.75), targets={"t": ("a", "t", "b")})
    rows, y = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]), np.array([3.0, 0.0])
    np.testing.assert_allclose(pinball(rows, three.levels, y), [[0.5, 0.5, 0.25], [0.75, 1.0, 1.0]])
    np.testing.assert_allclose(crps(three, rows, y), [2 * 1.25 / 3, 2 * 2.75 / 3])
    np.testing.assert_allclose(quantiles(three, rows, (0.25, 0.375, 0.75)), [[1.0, 1.5, 4.0]] * 2)


def test_crps_of_samples_is_that_of_their_steps() -> None:
    """Against the double sum over all pairs; of one sample the absolute error."""
    random = np.random.default_rng(5)
    samples, y = random.normal(size=(4, 9)), random.normal(size=4)
    pairs = np.abs(samples[:, :, None] - samples[:, None, :]).mean(axis=(1, 2))
    want = np.abs(samples - y[:, None]).mean(axis=1) - pairs / 2
    np.testing.assert_allclose(crps_of_samples(samples, y), want, rtol=1e-12)
    np.testing.assert_allclose(crps_of_samples(samples[:, :1], y), np.abs(samples[:, 0] - y), rtol=1e-12)


def test_metrics_count_what_is_present() -> None:
    """By value, over two batches with masks by output: CRPS, calibration, coverage and width."""
    outputs = [Output(name=name) for name in ("t", "u", "t@0.1", "u@0.1", "t@0.9", "u@0.9")]
    targets = {name: (f"{name}@0.1", name, f"{name}@0.9") for name in "ut"}  # in another order than the labels
    metrics = DistributionMetrics(outputs, Distribution(kind="quantile", levels=(0.1, 0.5, 0.9), targets=targets))
    y = np.array([[0.0, 5.0], [1.0, 9.0], [3.0, 0.0], [2.0, 5.0]])
    present = np.array([[True, False], [True, True], [True, True], [False, False]])
    forecast = np.tile([1.0, 5.0, 0.5, 4.0, 2.5, 6.0], (4, 1))
    metrics.update(forecast[:1], y[:1], present[:1])
    metrics.update(forecast[1:], y[1:], present[1:])
    u, t = metrics.result().targets
    costs = pinball(np.array([0.5, 1.0, 2.5]), (0.1, 0.5, 0.9), np.array([0.0, 1.0, 3.0]))
    assert (t.name, t.rows, u.rows) == ("t", 3, 2)
    assert t.crps == pytest.approx(2 * costs.mean())
    assert t.calibration == pytest.approx({"0.1": 1 / 3, "0.5": 2 / 3, "0.9": 2 / 3})
    (interval,) = t.intervals
    assert (interval.share, interval.coverage, interval.width) == pytest.approx((0.8, 1 / 3, 2.0))
    assert (u.intervals[0].coverage, u.intervals[0].width) == pytest.approx((0.0, 2.0))
    empty = DistributionMetrics(outputs, metrics.predictive.distribution).result().targets[0]
    assert (empty.rows, empty.crps, empty.calibration) == (0, None, dict.fromkeys(("0.1", "0.5", "0.9")))
    assert central((0.05, 0.1, 0.5, 0.9, 0.95)) == [(pytest.approx(0.9), 0, 4), (pytest.approx(0.8), 1, 3)]


def test_a_drawn_forecast_has_its_band() -> None:
    """The 80 % interval of each target, whose distributions lie in another order, with gaps where nothing counts."""
    outputs = [Output(name=name) for name in ("t", "u", "u@scale", "t@scale")]
    pair = Distribution(kind="gaussian", targets={"u": ("u", "u@scale"), "t": ("t", "t@scale")})
    y = torch.tensor([[[1.0, 20.0, 3.0, 0.5], [2.0, 30.0, 1.0, 0.1]]])
    batch = Batch(y[..., :1], y[..., :2], y_mask=torch.tensor([[True, False]]))
    drawn = forecast_of(outputs[:2], batch, y.numpy(), Predictive(outputs, pair))
    away = 1.2815515655446004
    assert drawn.band is not None
    np.testing.assert_allclose(drawn.band[:, 0], [[1 - 0.5 * away, 20 - 3 * away], [1 + 0.5 * away, 20 + 3 * away]])
    assert np.isnan(drawn.band[:, 1]).all()
    np.testing.assert_array_equal(drawn.predicted[0], [1.0, 20.0])
