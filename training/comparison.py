"""Forecasts of several forecasters for the same moments: errors, ratios, and how sure one can be of a difference.

Letters: S series, R origins (the steps that forecasts start from), O targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stepcast.manifest import Distribution

from .probabilistic import crps, quantiles

Floats = NDArray[np.float64]
RESAMPLES = 1000


@dataclass(frozen=True)
class Comparison:
    """What forecasters said at one distance, and what came.

    Only what every forecaster and the truth have is compared (`there`), so that all errors are of the same rows.

    Attributes:
        ahead: Steps from origin to truth.
        truth: (S, R, O), NaN where unknown.
        forecasts: By forecaster, each (S, R, O); NaN where it has none.
        scale: (S, O) mean absolute change over a season of the training rows, what MASE divides by.
        distribution: Of the forecaster "model", if it says more than one number.
        parameters: (S, R, O, P) of its distributions.
    """

    ahead: int
    truth: Floats
    forecasts: Mapping[str, Floats]
    scale: Floats
    distribution: Distribution | None = None
    parameters: Floats | None = None

    @property
    def there(self) -> NDArray[np.bool_]:
        """(S, R, O), what is compared."""
        known = [self.truth, *self.forecasts.values()]
        return np.asarray(np.logical_and.reduce([~np.isnan(values) for values in known]))

    @property
    def rows(self) -> NDArray[np.int64]:
        """(O,), how many forecasts are compared."""
        return np.asarray(self.there.sum(axis=(0, 1)))

    def beside(self, more: Mapping[str, Floats]) -> "Comparison":
        """The same with further forecasts (S, R, O)."""
        return replace(self, forecasts={**self.forecasts, **more})

    def errors(self, name: str) -> Floats:
        """Forecast minus truth, (S, R, O), NaN where not compared."""
        return np.where(self.there, self.forecasts[name] - self.truth, np.nan)

    def rmse(self, name: str) -> Floats:
        """Root mean square error, (O,)."""
        return np.sqrt(_mean(np.square(self.errors(name)), (0, 1)))

    def ratio(self, name: str, to: str = "persistence") -> Floats:
        """RMSE over another's, (O,); NaN where that has no error."""
        mine, other = self.rmse(name), self.rmse(to)
        return np.divide(mine, other, out=np.full_like(mine, np.nan), where=other > 0)

    def mase(self, name: str) -> Floats:
        """Mean absolute scaled error, (O,): Hyndman and Koehler, "Another look at measures of forecast accuracy", 2006.

        The error of each series is divided by the mean absolute change over a season of its own training rows.
        """
        scale = np.where(self.scale > 0, self.scale, np.nan)[:, None]
        return _mean(np.abs(self.errors(name)) / scale, (0, 1))

    def mae(self, name: str) -> Floats:
        """Mean absolute error, (O,)."""
        return _mean(np.abs(self.errors(name)), (0, 1))

    def crps(self, name: str) -> Floats:
        """Mean continuous ranked probability score, (O,); of a forecaster of one number its mean absolute error."""
        if name != "model" or self.distribution is None or self.parameters is None:
            return self.mae(name)
        scores = crps(self.distribution, self.parameters, self.truth)
        return _mean(np.where(self.there, scores, np.nan), (0, 1))

    def coverage(self, share: float = 0.8) -> Floats | None:
        """How much of what came lies within the model's central interval of a share, (O,); None without intervals."""
        if self.distribution is None or self.parameters is None:
            return None
        bounds = quantiles(self.distribution, self.parameters, ((1 - share) / 2, (1 + share) / 2))  # (S, R, O, 2)
        inside = (self.truth >= bounds[..., 0]) & (self.truth <= bounds[..., 1])
        return _mean(np.where(self.there, inside.astype(np.float64), np.nan), (0, 1))

    def interval(self, name: str, block: int, *, level: float = 0.95, seed: int = 0) -> Floats:
        """Bounds of the ratio to persistence, (2, O + 1), the last column of the mean over targets.

        Moving blocks (Kuensch 1989): stretches of `block` origins are drawn with replacement until there are as many
        origins as before; all series and forecasters keep their place in them, so what depends on each other stays
        together. The bounds are percentiles of the ratios of `RESAMPLES` such draws.
        """
        squares = [np.nansum(np.square(self.errors(n)), axis=0) for n in (name, "persistence")]  # each (R, O)
        count = len(squares[0])
        block = max(1, min(block, count))
        sums = [_stretches(s, block) for s in squares]  # each (R - block + 1, O)
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, len(sums[0]), (RESAMPLES, -(-count // block)))
        mine, other = (s[drawn].sum(axis=1) for s in sums)  # each (RESAMPLES, O)
        ratios = np.sqrt(np.divide(mine, other, out=np.full_like(mine, np.nan), where=other > 0))
        tails = [50 * (1 - level), 50 * (1 + level)]
        return np.asarray(np.percentile(np.column_stack([ratios, _mean(ratios, 1)]), tails, axis=0))

    def diebold_mariano(self, name: str, rival: str) -> Floats:
        """Two-sided p-values, (O,), that both have the same squared error; NaN where the test says nothing.

        Diebold and Mariano 1995, with the correction for small samples of Harvey, Leybourne and Newbold 1997. The loss
        differential is the mean over the series at each origin: series of one moment are no independent samples.
        Its variance takes autocovariances up to `ahead` - 1 steps; where that sum is not positive there is no p-value.
        """
        worse = np.square(self.errors(name)) - np.square(self.errors(rival))
        differences = _mean(worse, (0,))  # (R, O)
        return np.array([_same_loss(column, self.ahead) for column in differences.T])


def joined(parts: Sequence[Comparison]) -> Comparison:
    """One comparison of the origins of several, which have the same forecasters; MASE's scales are averaged."""
    forecasts = {n: np.concatenate([p.forecasts[n] for p in parts], axis=1) for n in parts[0].forecasts}
    truth = np.concatenate([p.truth for p in parts], axis=1)
    given = [p.parameters for p in parts if p.parameters is not None]
    return replace(
        parts[0],
        truth=truth,
        forecasts=forecasts,
        scale=np.mean([p.scale for p in parts], axis=0),
        parameters=np.concatenate(given, axis=1) if given else None,
    )


def rounded(value: float, places: int = 4) -> float | None:
    """For JSON: None for what could not be measured."""
    return round(float(value), places) if np.isfinite(value) else None


def as_dict(comparison: Comparison, targets: Sequence[str]) -> dict[str, Any]:
    """RMSE of every forecaster and the model's ratio to persistence by target, for the manifest."""
    errors = {name: comparison.rmse(name) for name in comparison.forecasts}
    ratio, rows = comparison.ratio("model"), comparison.rows
    return {
        target: {
            "rmse": rounded(errors["model"][k]),
            **{name: rounded(error[k]) for name, error in errors.items() if name != "model"},
            "ratio": rounded(ratio[k]),
            "rows": int(rows[k]),
        }
        for k, target in enumerate(targets)
    }


def _mean(values: Floats, axes: int | tuple[int, ...]) -> Floats:
    """The mean of what is there; NaN, without a warning, where nothing is."""
    there = ~np.isnan(values)
    total, count = np.where(there, values, 0.0).sum(axis=axes), there.sum(axis=axes)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))


def _stretches(values: Floats, block: int) -> Floats:
    """Sums of all stretches of `block` rows, (R - block + 1, O)."""
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
    return np.asarray(total[block:] - total[:-block])


def _same_loss(differences: Floats, ahead: int) -> float:
    """The p-value of one series of loss differentials (R,), NaN at origins that are not compared."""
    there = ~np.isnan(differences)
    count = int(there.sum())
    if count <= ahead:
        return float("nan")
    centred = np.where(there, differences - differences[there].mean(), 0.0)
    # Gaps stay where they are: a product with a gap counts as 0, as if it were a step of mean loss.
    covariances = [float(centred[lag:] @ centred[: len(centred) - lag]) / count for lag in range(ahead)]
    variance = (covariances[0] + 2 * sum(covariances[1:])) / count
    if variance <= 0:
        return float("nan")
    correction = (count + 1 - 2 * ahead + ahead * (ahead - 1) / count) / count
    statistic = differences[there].mean() / np.sqrt(variance) * np.sqrt(max(correction, 0.0))
    return float(2 * stats.t.sf(abs(statistic), count - 1))
