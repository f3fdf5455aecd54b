"""Six kinds of control charts, generated from the formulas of Alcock and Manolopoulos (1999).

R. J. Alcock and Y. Manolopoulos, "Time-Series Similarity Queries Employing a Feature-Based Approach", 7th Hellenic
Conference on Informatics, Ioannina 1999. With the time t = 1..n, m = 30, s = 2 and noise r(t) uniform in [-3, 3]:

    normal            y(t) = m + r(t) s
    cyclic            y(t) = m + r(t) s + a sin(2 pi t / T)    a and T uniform in [10, 15]
    increasing        y(t) = m + r(t) s + g t                  g uniform in [0.2, 0.5]
    decreasing        y(t) = m + r(t) s - g t
    upward shift      y(t) = m + r(t) s + k x                  x uniform in [7.5, 20], k = 0 before t3 and 1 from it,
    downward shift    y(t) = m + r(t) s - k x                  t3 uniform in [n/3, 2n/3]

The original has n = 60. Here n varies from series to series, so that a batch needs padding and masks.
"""

from pathlib import Path

import numpy as np

from stepcast.errors import ConfigError
from stepcast.manifest import Feature

from ..data.align import Array, one_hot
from ..data.in_memory import Classified, Examples, in_splits

KINDS = ("normal", "cyclic", "increasing", "decreasing", "upward shift", "downward shift")
MEAN, DEVIATION = 30.0, 2.0


class ControlCharts(Classified):
    """A `Source`, many-to-one: one value per step, and the kind of chart as label of the last step.

    Args:
        batch: Series per batch.
        seed: Of the series and of their order.
        root: Not used; there are no files.
        train: Series of each kind to train on.
        validation: Series of each kind to validate with.
        test: Series of each kind to test with.
        lengths: Fewest and most steps of a series.
        bucket: See `plan_batches`.
    """

    def __init__(
        self,
        *,
        batch: int,
        seed: int,
        root: Path,
        train: int = 150,
        validation: int = 50,
        test: int = 100,
        lengths: tuple[int, int] = (40, 60),
        bucket: int = 0,
    ) -> None:
        if not 6 <= lengths[0] <= lengths[1]:
            raise ConfigError(f"data.options.lengths {list(lengths)}: wanted [fewest, most], at least 6")
        rng = np.random.default_rng([seed, 1999])
        splits = in_splits(lambda count: _charts(rng, count, lengths), train=train, validation=validation, test=test)
        values = np.concatenate(splits["train"].x)
        super().__init__(
            splits,
            Feature(name="value", mean=float(values.mean()), scale=float(values.std())),
            KINDS,
            batch=batch,
            seed=seed,
            bucket=bucket,
            description=f"control charts after Alcock and Manolopoulos (1999), {len(splits['train'].x)} to train on",
        )


def _charts(rng: np.random.Generator, count: int, lengths: tuple[int, int]) -> Examples:
    kinds = np.repeat(np.arange(len(KINDS)), count)
    x = [chart(rng, int(kind), int(rng.integers(lengths[0], lengths[1] + 1))) for kind in kinds]
    return Examples(x, [one_hot(np.array([kind]), len(KINDS)) for kind in kinds])


def chart(rng: np.random.Generator, kind: int, steps: int) -> Array:
    """One series [steps, 1] of a kind, by its place in `KINDS`."""
    t = np.arange(1, steps + 1)
    y = MEAN + rng.uniform(-3, 3, steps) * DEVIATION
    sign = -1 if kind in (3, 5) else 1
    if kind == 1:
        y += rng.uniform(10, 15) * np.sin(2 * np.pi * t / rng.uniform(10, 15))
    elif kind in (2, 3):
        y += sign * rng.uniform(0.2, 0.5) * t
    elif kind in (4, 5):
        y += sign * rng.uniform(7.5, 20) * (t >= rng.uniform(steps / 3, 2 * steps / 3))
    return y.astype(np.float32)[:, None]
