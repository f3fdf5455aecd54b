"""Mean, deviation and range of columns, read once, batch by batch, in float64."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stepcast.errors import ConfigError

Normalisation = Literal["standard", "min_max", "none"]


class Moments:
    """Statistics over present values only; NaN does not count.

    Batches are merged with the pairwise formulas of Chan, Golub and LeVeque (1983): sums of squares would lose
    the deviation of a column whose mean is large.
    """

    def __init__(self, columns: int) -> None:
        self.count = np.zeros(columns)
        self.mean = np.zeros(columns)
        self.m2 = np.zeros(columns)
        self.low = np.full(columns, np.inf)
        self.high = np.full(columns, -np.inf)

    def update(self, values: NDArray[np.floating]) -> None:
        """Take in [rows, columns]."""
        there = ~np.isnan(values)
        count = there.sum(axis=0)
        mean = np.where(there, values, 0.0).sum(axis=0) / np.maximum(count, 1)
        m2 = (np.where(there, values - mean, 0.0) ** 2).sum(axis=0)
        total = np.maximum(self.count + count, 1)
        shift = mean - self.mean
        self.mean = self.mean + shift * count / total
        self.m2 = self.m2 + m2 + shift**2 * self.count * count / total
        self.count = self.count + count
        self.low = np.minimum(self.low, np.where(there, values, np.inf).min(axis=0))
        self.high = np.maximum(self.high, np.where(there, values, -np.inf).max(axis=0))

    @property
    def deviation(self) -> NDArray[np.float64]:
        """Of the population, per column."""
        return np.asarray(np.sqrt(self.m2 / np.maximum(self.count, 1)))

    def normalisation(self, kind: Normalisation) -> list[tuple[float, float]]:
        """(mean, scale) per column for (x - mean) / scale: population deviation, or range; 1 where that is 0."""
        if kind == "none":
            return [(0.0, 1.0)] * len(self.count)
        empty = self.count == 0
        if kind == "standard":
            mean, scale = self.mean, self.deviation
        else:
            mean, scale = np.where(empty, 0.0, self.low), np.where(empty, 0.0, self.high - self.low)
        return [(float(m), float(s) if s > 0 else 1.0) for m, s in zip(mean, scale, strict=True)]


def check_resolution(name: str, mean: float, deviation: float) -> None:
    """See that float32, which networks and requests are made of, can tell a column's values apart.

    Args:
        name: Of the column, for the message.
        mean: Of its values in float64.
        deviation: Of these; 0 for a constant, which has nothing to tell apart.

    Raises:
        ConfigError: neighbouring float32 numbers are more than a sixteenth of the deviation apart.
    """
    apart = float(np.spacing(np.float32(abs(mean))))
    if deviation > 0 and apart > deviation / 16:
        raise ConfigError(
            f"data: {name} has mean {mean:.10g} and deviation {deviation:.3g}. float32 numbers lie {apart:g} apart "
            "there: its values would fall together. Subtract a constant from it before."
        )
