"""Forecasts without a network: what every model of a table's series has to beat.

Naive ones repeat a value: the last one, or the one at the same time of the last known day, week or year, as far as such
a period is more than a step of the table's grid and lies in its training rows. Fitted ones forecast the change from
the last value, from the readings now and how they have changed over lags of up to two days.

Letters: S series, L steps, R origins, O targets, P predictors.
"""

import math
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits

from .data.table import TableSource

Floats = NDArray[np.float64]
Rows = tuple[NDArray[np.float32], Floats]  # predictors (N, P) and changes (N,)
Fitted = Literal["linear", "trees"]
PERIODS = {"day_before": "1D", "week_before": "7D", "year_before": "365D"}
# Steps back, as far as they lie within two days; of those a day back also the neighbour of the forecast's own hour.
LAGS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96)
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
TREES = 300


class Baselines:
    """Naive forecasts of a table's targets, and what others are fitted to.

    Attributes:
        truth: (S, L, O), NaN where missing.
        last: (S, L, O) the last observed values, NaN before the first.
        day: Steps of a day; on a grid that does not divide it the first step that is at least a day away.
    """

    def __init__(self, source: TableSource) -> None:
        self.source = source
        names = [f.name for f in source.features]
        self.columns = [names.index(t) for t in source.targets]
        self.truth = source.x[..., self.columns].astype(np.float64)
        self.last = carried(self.truth)
        self.day = self._steps("1D")
        self._forecasts: dict[tuple[Fitted, int], Floats] = {}

    def _steps(self, period: str) -> int:
        return math.ceil(pd.Timedelta(period) / pd.Timedelta(self.source.config.every))

    @cached_property
    def periods(self) -> dict[str, int]:
        """Steps of the periods that the training rows have seen, by what repeating one is called."""
        start, stop = self.source.bounds["train"]
        steps = {name: self._steps(period) for name, period in PERIODS.items()}
        return {name: count for name, count in steps.items() if 1 < count < stop - start}

    def naive(self, ahead: int, origin: NDArray[np.int64]) -> dict[str, Floats]:
        """Forecasts (S, R, O) by name: `persistence`, and one for each period.

        Args:
            ahead: Steps.
            origin: (R,) the steps that forecasts are made at.
        """
        found = {"persistence": self.last[:, origin]}
        for name, period in self.periods.items():
            # The same time of the last known period, or where that is missing the last value before it.
            at = origin + ahead - period * math.ceil(ahead / period)
            found[name] = np.where((at >= 0)[:, None], self.last[:, np.maximum(at, 0)], np.nan)
        return found

    @cached_property
    def scale(self) -> Floats:
        """(S, O) mean absolute change over a day (or a step that is longer) of the training rows: MASE's divisor."""
        start, stop = self.source.bounds["train"]
        rows = self.truth[:, start:stop]
        changes = np.abs(rows[:, self.day :] - rows[:, : -self.day])
        there = ~np.isnan(changes)
        total, count = np.where(there, changes, 0.0).sum(axis=1), there.sum(axis=1)
        return np.asarray(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))

    @cached_property
    def predictors(self) -> NDArray[np.float32]:
        """(S, L, P): readings now, whether they are missing, and their changes over the lags."""
        now = carried(self.source.x.astype(np.float64))
        missing = np.isnan(self.source.x)
        known = np.nan_to_num(now)
        moving = [k for k, f in enumerate(self.source.features) if f.missing != "refuse"]  # not the calendar
        parts = [known, missing[..., missing.any(axis=(0, 1))]]
        lags = {k for k in LAGS if k <= 2 * self.day} | {k for k in (self.day - 1, self.day) if k > 0}
        for lag in sorted(lags):
            change = np.zeros_like(known[..., moving])
            change[:, lag:] = known[:, lag:, moving] - known[:, :-lag, moving]
            parts.append(change)
        return np.concatenate(parts, axis=-1).astype(np.float32)

    def fitted(self, kind: Fitted, ahead: int) -> Floats:
        """Forecasts (S, L, O) of every step; one regression for each target.

        It is fitted to the training rows. Of several penalties, or numbers of trees, the one is taken that is best on
        the validation rows: there the network chooses its epoch.
        """
        if (kind, ahead) not in self._forecasts:
            columns = [self._fitted(kind, ahead, k) for k in range(len(self.columns))]
            self._forecasts[kind, ahead] = np.stack(columns, axis=-1)
        return self._forecasts[kind, ahead]

    def _fitted(self, kind: Fitted, ahead: int, target: int) -> Floats:
        """One target's forecasts, (S, L)."""
        n_steps = self.truth.shape[1]
        change = np.full(self.truth.shape[:2], np.nan)
        change[:, : n_steps - ahead] = self.truth[:, ahead:, target] - self.last[:, : n_steps - ahead, target]
        x, rows = self.predictors, {}
        for split in ("train", "validation"):
            start, stop = self.source.bounds[split]
            there = ~np.isnan(change) & self.source.grid.present
            there[:, :start] = there[:, max(start, stop - ahead) :] = False  # no label of a later split
            rows[split] = (x[there], change[there])
        if not len(rows["train"][1]):
            return self.last[..., target]
        fit = _linear if kind == "linear" else _trees
        return self.last[..., target] + fit(rows["train"], rows["validation"], x.reshape(-1, x.shape[-1])).reshape(
            change.shape
        )


def _linear(train: Rows, validation: Rows, everything: NDArray[np.float32]) -> Floats:
    """Ridge regression on standardised predictors: forecasts of all rows."""
    mean, deviation = train[0].mean(axis=0), train[0].std(axis=0)
    deviation[deviation == 0] = 1.0
    ridges = [Ridge(alpha=penalty).fit((train[0] - mean) / deviation, train[1]) for penalty in PENALTIES]
    if len(validation[1]):
        x, y = (validation[0] - mean) / deviation, validation[1]
        ridges.sort(key=lambda ridge: float(np.square(ridge.predict(x) - y).mean()))
    return np.asarray(ridges[0].predict((everything - mean) / deviation), np.float64)


def _trees(train: Rows, validation: Rows, everything: NDArray[np.float32]) -> Floats:
    """Gradient-boosted trees: forecasts of all rows."""
    trees = HistGradientBoostingRegressor(
        max_iter=TREES,
        learning_rate=0.05,
        max_leaf_nodes=15,
        min_samples_leaf=50,
        l2_regularization=1.0,
        early_stopping=False,
    )
    with threadpool_limits(torch.get_num_threads()):  # what the recipe's `threads` says
        trees.fit(*train)
        best = TREES - 1
        if len(validation[1]):
            best = int(np.argmin([np.square(y - validation[1]).mean() for y in trees.staged_predict(validation[0])]))
        return np.asarray(next(islice(trees.staged_predict(everything), best, None)), np.float64)


def carried(values: Floats) -> Floats:
    """(S, L, O) with the last observed value in place of missing ones."""
    steps = np.arange(values.shape[1])[None, :, None]
    latest = np.maximum.accumulate(np.where(np.isnan(values), 0, steps), axis=1)
    return np.take_along_axis(values, latest, axis=1)
