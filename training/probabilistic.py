"""How good predictive distributions are: CRPS, calibration, coverage and width of central intervals.

Functions of arrays, for reports and backtests alike, and an accumulator of masked batches. Quantiles of a distribution
whose quantiles are given are those, and between and beyond them what rollouts draw from (`between_quantiles`).

Shape letters: P parameters of a target (their order is the manifest's), L levels, K targets, M components or samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from stepcast.manifest import Distribution, Output
from stepcast.predictive import Predictive, between_quantiles, components

Floats = NDArray[np.float64]

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
"""Where calibration is measured, unless the model has levels of its own."""
HALVINGS = 100  # of an interval of float64 numbers: then it is one or two of them


def levels_of(distribution: Distribution) -> tuple[float, ...]:
    """Where a distribution is measured."""
    return distribution.levels or LEVELS


def quantiles(distribution: Distribution, parameters: Floats, levels: Sequence[float]) -> Floats:
    """The quantiles (..., L) of distributions with parameters (..., P); of counts the least that reach the level."""
    at = np.broadcast_to(np.asarray(levels), (*parameters.shape[:-1], len(levels)))
    return _QUANTILES[distribution.kind](distribution, parameters[..., None, :], at)


def crps(distribution: Distribution, parameters: Floats, truth: Floats) -> Floats:
    """The continuous ranked probability score (...) of distributions with parameters (..., P), in the truth's unit.

    The integral of (F(x) - [truth <= x])² over x; smaller is better, and of a forecast that is sure it is the absolute
    error. Closed forms, but for quantiles, whose score is twice the pinball loss averaged over their levels.
    """
    return _CRPS[distribution.kind](distribution, parameters, truth)


def pinball(quantiles: Floats, levels: Sequence[float], truth: Floats) -> Floats:
    """What each quantile (..., L) at its level costs: level per unit above it, 1 - level per unit below it."""
    over = truth[..., None] - quantiles  # (..., L)
    p = np.asarray(levels)
    return np.asarray(np.maximum(p * over, (p - 1) * over))


def crps_of_samples(samples: Floats, truth: Floats) -> Floats:
    """The CRPS (...) of the empirical distribution of samples (..., M).

    E|X - y| - E|X - X'| / 2 with X, X' drawn from the samples (Gneiting and Raftery, 2007, equation 21); the second
    term by sorting.
    """
    count = samples.shape[-1]
    ranks = 2 * np.arange(1, count + 1) - count - 1
    spread = (np.sort(samples, axis=-1) * ranks).sum(axis=-1) / count**2
    return np.asarray(np.abs(samples - truth[..., None]).mean(axis=-1) - spread)


def central(levels: Sequence[float]) -> list[tuple[float, int, int]]:
    """Share, lower and upper place of each central interval between two of the levels, the widest first."""
    pairs = [(i, j) for i, p in enumerate(levels) for j, q in enumerate(levels) if p < 0.5 and abs(p + q - 1) < 1e-9]
    return [(levels[j] - levels[i], i, j) for i, j in pairs]


def band(predictive: Predictive, outputs: ArrayLike, share: float) -> Floats:
    """Lower and upper end (2, ..., K) of the central intervals with a share, in the order of the point forecasts.

    Args:
        predictive: Of the model.
        outputs: (..., O).
        share: Of the distribution that lies between the ends.
    """
    levels = ((1 - share) / 2, (1 + share) / 2)
    ends = quantiles(predictive.distribution, predictive.parameters(np.asarray(outputs)), levels)  # (..., K, 2)
    return np.moveaxis(ends, -1, 0)[..., np.argsort(predictive.points)]


# --- kinds ------------------------------------------------------------------------------------------------------------


def _normal_cdf_pdf(z: Floats) -> tuple[Floats, Floats]:
    return np.asarray(special.ndtr(z)), np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)


def _given_quantiles(distribution: Distribution, parameters: Floats, at: Floats) -> Floats:
    shape = (*at.shape, parameters.shape[-1])
    return between_quantiles(np.broadcast_to(parameters, shape), np.asarray(distribution.levels), at)


def _given_crps(distribution: Distribution, parameters: Floats, truth: Floats) -> Floats:
    return np.asarray(2 * pinball(parameters, distribution.levels, truth).mean(axis=-1))


def _gaussian_quantiles(_: Distribution, parameters: Floats, at: Floats) -> Floats:
    return np.asarray(parameters[..., 0] + parameters[..., 1] * special.ndtri(at))


def _gaussian_crps(_: Distribution, parameters: Floats, truth: Floats) -> Floats:
    """Gneiting and Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation, 2007, section 4.2."""
    mean, scale = np.moveaxis(parameters, -1, 0)
    z = (truth - mean) / scale
    below, density = _normal_cdf_pdf(z)
    return np.asarray(scale * (z * (2 * below - 1) + 2 * density - 1 / np.sqrt(np.pi)))


def _student_t_quantiles(_: Distribution, parameters: Floats, at: Floats) -> Floats:
    location, scale, df = np.moveaxis(parameters, -1, 0)
    return np.asarray(location + scale * special.stdtrit(df, at))


def _student_t_crps(_: Distribution, parameters: Floats, truth: Floats) -> Floats:
    """Jordan, Krueger and Lerch, Evaluating Probabilistic Forecasts with scoringRules, 2019, appendix A."""
    location, scale, df = np.moveaxis(parameters, -1, 0)
    z = (truth - location) / scale
    log_density = -special.betaln(df / 2, 0.5) - 0.5 * np.log(df) - (df + 1) / 2 * np.log1p(z**2 / df)
    away = z * (2 * special.stdtr(df, z) - 1) + 2 * np.exp(log_density) * (df + z**2) / (df - 1)
    spread = special.betaln(0.5, df - 0.5) - 2 * special.betaln(0.5, df / 2)
    return np.asarray(scale * (away - 2 * np.sqrt(df) / (df - 1) * np.exp(spread)))


def _count_below(mean: Floats, dispersion: Floats, count: Floats) -> Floats:
    """P(X <= count) of a negative binomial; 0 below 0."""
    share = special.betainc(1 / dispersion, np.maximum(count, 0) + 1, 1 / (1 + dispersion * mean))
    return np.asarray(np.where(count < 0, 0.0, share), np.float64)


def _negative_binomial_quantiles(_: Distribution, parameters: Floats, at: Floats) -> Floats:
    mean, dispersion = (np.broadcast_to(values, at.shape) for values in np.moveaxis(parameters, -1, 0))
    high = np.ceil(mean)
    while (short := _count_below(mean, dispersion, high) < at).any():
        high = np.where(short, 2 * high + 1, high)
    low = np.full_like(high, -1.0)
    while (open_ := high - low > 1).any():  # low does not reach the level, high does
        middle = np.floor((low + high) / 2)
        reaches = _count_below(mean, dispersion, middle) >= at
        low, high = np.where(open_ & ~reaches, middle, low), np.where(open_ & reaches, middle, high)
    return np.asarray(high)


def _negative_binomial_crps(_: Distribution, parameters: Floats, truth: Floats) -> Floats:
    """Wei and Held, Calibration Tests for Count Data, 2014; in the form of scoringRules' crps_nbinom."""
    mean, dispersion = np.moveaxis(parameters, -1, 0)
    size, odds = 1 / dispersion, dispersion * mean
    spread = odds * (1 + odds)  # (1 - p) / p² with p = 1 / (1 + odds)
    wider = special.betainc(size + 1, np.maximum(truth - 1, 0) + 1, 1 / (1 + odds))
    inner = (2 * np.where(truth < 1, 0.0, wider) - 1) / (1 + odds) + special.hyp2f1(size + 1, 0.5, 2, -4 * spread)
    return np.asarray(truth * (2 * _count_below(mean, dispersion, truth) - 1) - size * spread * inner)


def _mixture_quantiles(_: Distribution, parameters: Floats, at: Floats) -> Floats:
    """By halving: the mixture's quantile lies between the smallest and the largest of its components'."""
    weights, means, scales = components(parameters)
    each = means + scales * special.ndtri(at)[..., None]  # (..., L, M)
    low, high = each.min(axis=-1), each.max(axis=-1)
    for _turn in range(HALVINGS):
        middle = (low + high) / 2
        reaches = (weights * special.ndtr((middle[..., None] - means) / scales)).sum(axis=-1) >= at
        low, high = np.where(reaches, low, middle), np.where(reaches, middle, high)
    return np.asarray(high)


def _mixture_crps(_: Distribution, parameters: Floats, truth: Floats) -> Floats:
    """Grimit, Gneiting, Berrocal and Johnson, The Continuous Ranked Probability Score for Circular Variables, 2006."""
    weights, means, scales = components(parameters)

    def mean_absolute(mean: Floats, scale: Floats) -> Floats:
        """Of a normal variable."""
        below, density = _normal_cdf_pdf(mean / scale)
        return np.asarray(2 * scale * density + mean * (2 * below - 1))

    away = (weights * mean_absolute(truth[..., None] - means, scales)).sum(axis=-1)
    pairs = mean_absolute(
        means[..., :, None] - means[..., None, :], np.hypot(scales[..., :, None], scales[..., None, :])
    )
    return np.asarray(away - 0.5 * np.einsum("...i,...j,...ij->...", weights, weights, pairs))


_QUANTILES: dict[str, Callable[[Distribution, Floats, Floats], Floats]] = {
    "quantile": _given_quantiles,
    "gaussian": _gaussian_quantiles,
    "student_t": _student_t_quantiles,
    "negative_binomial": _negative_binomial_quantiles,
    "mixture": _mixture_quantiles,
}
_CRPS: dict[str, Callable[[Distribution, Floats, Floats], Floats]] = {
    "quantile": _given_crps,
    "gaussian": _gaussian_crps,
    "student_t": _student_t_crps,
    "negative_binomial": _negative_binomial_crps,
    "mixture": _mixture_crps,
}


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A central interval.

    Attributes:
        share: That it is meant to hold.
        coverage: Share of the labels that it held.
        width: Mean, in the target's unit: how sharp the forecast is.
    """

    share: float
    coverage: float | None
    width: float | None


@dataclass(frozen=True)
class TargetResult:
    """One target; what needs a label is None without any.

    Attributes:
        name: The target's.
        rows: Labels that counted.
        crps: Mean.
        calibration: By level, the share of labels at or below the quantile.
        intervals: The widest first.
    """

    name: str
    rows: int
    crps: float | None
    calibration: dict[str, float | None]
    intervals: tuple[Interval, ...]


@dataclass(frozen=True)
class DistributionResult:
    """Each target's distribution, measured."""

    kind: str
    targets: tuple[TargetResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


class DistributionMetrics:
    """Sums of scores over masked batches.

    Args:
        outputs: The model's.
        distribution: The manifest's description of them.
    """

    def __init__(self, outputs: Sequence[Output], distribution: Distribution) -> None:
        self.predictive = Predictive(outputs, distribution)
        self.levels = levels_of(distribution)
        self.intervals = central(self.levels)
        targets = len(self.predictive.targets)
        self._rows = np.zeros(targets, np.int64)
        self._crps = np.zeros(targets)
        self._below = np.zeros((targets, len(self.levels)))
        self._inside = np.zeros((targets, len(self.intervals)))
        self._width = np.zeros((targets, len(self.intervals)))

    def update(self, outputs: ArrayLike, labels: ArrayLike, present: NDArray[np.bool_]) -> None:
        """Take in outputs (..., O) and labels (..., K), which lie as the point forecasts do, where present (..., K)."""
        parameters = self.predictive.parameters(np.asarray(outputs))  # (..., K, P)
        y = np.asarray(labels, np.float64)
        for k, place in enumerate(self.predictive.points):
            there = present[..., place]
            self._score(k, parameters[..., k, :][there], y[..., place][there])

    def _score(self, k: int, parameters: Floats, truth: Floats) -> None:
        distribution = self.predictive.distribution
        at = quantiles(distribution, parameters, self.levels)  # (R, L)
        self._rows[k] += len(truth)
        self._crps[k] += crps(distribution, parameters, truth).sum()
        self._below[k] += (truth[:, None] <= at).sum(axis=0)
        for number, (_, low, high) in enumerate(self.intervals):
            self._inside[k, number] += ((truth >= at[:, low]) & (truth <= at[:, high])).sum()
            self._width[k, number] += (at[:, high] - at[:, low]).sum()

    def result(self) -> DistributionResult:
        """The scores of everything taken in so far."""
        targets = tuple(self._target(k, name) for k, name in enumerate(self.predictive.targets))
        return DistributionResult(self.predictive.distribution.kind, targets)

    def _target(self, k: int, name: str) -> TargetResult:
        rows = int(self._rows[k])

        def mean(total: float) -> float | None:
            return float(total) / rows if rows else None

        return TargetResult(
            name,
            rows,
            mean(self._crps[k]),
            {f"{level:g}": mean(below) for level, below in zip(self.levels, self._below[k], strict=True)},
            tuple(
                Interval(round(share, 9), mean(self._inside[k, i]), mean(self._width[k, i]))
                for i, (share, _, _) in enumerate(self.intervals)
            ),
        )
