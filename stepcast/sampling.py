"""Draws from the distributions that a model's outputs describe: one law, for rollouts of the service and offline.

The draws are those of a numpy Generator: the same seed gives the same numbers wherever the outputs are the same.

Shape letters: R rows, K targets, P parameters of a target.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from .manifest import Distribution, Manifest

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

SMALLEST: Final = 2.0**-53
"""A uniform draw is kept this far from 0 and 1, where a tail has no end."""


class Sampler:
    """Draws values of a model's targets.

    Attributes:
        targets: Their names, in the order of the draws.
        points: (K,) where each target's point forecast stands among the outputs.
    """

    def __init__(self, manifest: Manifest, distribution: Distribution) -> None:
        places = {output.name: place for place, output in enumerate(manifest.outputs)}
        self.distribution = distribution
        self.targets = tuple(distribution.targets)
        self.points = np.array([places[target] for target in self.targets])
        self._places = np.array([[places[name] for name in names] for names in distribution.targets.values()])

    def parameters(self, outputs: npt.NDArray[np.floating]) -> Doubles:
        """(..., K, P) of outputs (..., O)."""
        return np.asarray(outputs, np.float64)[..., self._places]

    def draw(self, outputs: Floats, random: np.random.Generator) -> Floats:
        """One value of every target (R, K) given outputs (R, O); targets are drawn independently of each other.

        What is asked of the generator, in this order, in one call each:

        - quantile: `random((R, K))`, the arguments of the inverse distribution function;
        """
        return DRAWS[self.distribution.kind](self.parameters(outputs), self.distribution, random).astype(np.float32)


def _draw_quantile(parameters: Doubles, distribution: Distribution, random: np.random.Generator) -> Doubles:
    return between_quantiles(parameters, np.array(distribution.levels), random.random(parameters.shape[:-1]))


DRAWS: Final[dict[str, Callable[[Doubles, Distribution, np.random.Generator], Doubles]]] = {
    "quantile": _draw_quantile,
}


def between_quantiles(quantiles: Doubles, levels: Doubles, at: Doubles) -> Doubles:
    """The inverse distribution function that quantiles suggest, (...) at arguments (...) between 0 and 1.

    Linear between two levels. Beyond the outermost level each tail is exponential and goes through the two outermost
    quantiles: q_1 + (q_2 - q_1) / log(p_2 / p_1) * log(u / p_1) below the lowest level p_1, and likewise above.

    Args:
        quantiles: (..., P), ascending.
        levels: (P,) of them, ascending.
        at: (...).
    """
    u = np.clip(at, SMALLEST, 1 - SMALLEST)
    left = np.clip(np.searchsorted(levels, u, side="right") - 1, 0, len(levels) - 2)
    low, high = (np.take_along_axis(quantiles, (left + i)[..., None], -1)[..., 0] for i in (0, 1))
    inside = low + (high - low) * (u - levels[left]) / (levels[left + 1] - levels[left])
    lower = _tail(quantiles[..., 0], quantiles[..., 1], levels[0], levels[1], u)
    upper = _tail(quantiles[..., -1], quantiles[..., -2], 1 - levels[-1], 1 - levels[-2], 1 - u)
    return np.asarray(np.where(u < levels[0], lower, np.where(u > levels[-1], upper, inside)))


def _tail(outer: Doubles, inner: Doubles, outer_level: float, inner_level: float, u: Doubles) -> Doubles:
    return np.asarray(outer + (inner - outer) * np.log(u / outer_level) / np.log(inner_level / outer_level))
