"""Predictive distributions: where their parameters stand among a model's outputs, and draws from them.

One law, for rollouts of the service and offline. The draws are those of a numpy Generator: the same seed gives the same
numbers wherever the outputs are the same.

Shape letters: R rows, K targets, P parameters of a target, M components of a mixture.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from .manifest import Distribution, Output

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

SMALLEST: Final = 2.0**-53
"""A uniform draw is kept this far from 0 and 1, where a tail has no end."""
LEAST: Final = 1e-12
"""What a dispersion is at least, whatever a graph that others made says,"""
LEAST_DF: Final = 1.0
"""and how many degrees of freedom there are: Cauchy's distribution. Fewer draw numbers that float32 does not have."""
MOST_EVENTS: Final = 1e18
"""The largest rate that numpy draws counts at is about nine times this."""


class Predictive:
    """The predictive distributions that a model's outputs describe.

    Args:
        outputs: The model's.
        distribution: Which of them are whose parameters.

    Attributes:
        targets: Names, in the order of all that is answered.
        points: (K,) where each target's point forecast stands among the outputs.
    """

    def __init__(self, outputs: Sequence[Output], distribution: Distribution) -> None:
        places = {output.name: place for place, output in enumerate(outputs)}
        self.distribution = distribution
        self.targets = tuple(distribution.targets)
        self.points = np.array([places[target] for target in self.targets])
        self._places = np.array([[places[name] for name in names] for names in distribution.targets.values()])

    def parameters(self, outputs: npt.NDArray[np.floating]) -> Doubles:
        """(..., K, P) of outputs (..., O)."""
        return np.asarray(outputs, np.float64)[..., self._places]

    def draw(self, outputs: Floats, random: np.random.Generator) -> Floats:
        """One value of every target (R, K) given outputs (R, O); targets are drawn independently of each other.

        NaN where a parameter is not finite.

        What is asked of the generator, each for all of (R, K) in one call, in this order:

        - quantile: `random`, the arguments of the inverse distribution function;
        - gaussian: `standard_normal`;
        - student_t: `standard_t` of the degrees of freedom;
        - negative_binomial: `standard_gamma` of 1 / dispersion, then `poisson` of the mean times gamma x dispersion;
        - mixture: `random`, which component, then `standard_normal`.
        """
        parameters = self.parameters(outputs)
        finite = np.asarray(np.isfinite(parameters).all(axis=-1))
        drawn = DRAWS[self.distribution.kind](np.where(finite[..., None], parameters, 1.0), self.distribution, random)
        return np.where(finite, drawn, np.nan).astype(np.float32)


def components(parameters: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Weights, means and scales (..., M) of a mixture's parameters (..., 3 M); float32's weights sum to 1 again."""
    weights, means, scales = np.split(parameters, 3, axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True), means, scales


def _quantile(parameters: Doubles, distribution: Distribution, random: np.random.Generator) -> Doubles:
    return between_quantiles(parameters, np.array(distribution.levels), random.random(parameters.shape[:-1]))


def _gaussian(parameters: Doubles, _: Distribution, random: np.random.Generator) -> Doubles:
    mean, scale = np.moveaxis(parameters, -1, 0)
    return np.asarray(mean + scale * random.standard_normal(mean.shape))


def _student_t(parameters: Doubles, _: Distribution, random: np.random.Generator) -> Doubles:
    location, scale, df = np.moveaxis(parameters, -1, 0)
    return np.asarray(location + scale * random.standard_t(np.maximum(df, LEAST_DF)))


def _negative_binomial(parameters: Doubles, _: Distribution, random: np.random.Generator) -> Doubles:
    mean, dispersion = np.moveaxis(parameters, -1, 0)
    dispersion = np.maximum(dispersion, LEAST)
    rate = mean * dispersion * random.standard_gamma(1 / dispersion)
    return np.asarray(random.poisson(np.clip(rate, 0.0, MOST_EVENTS)), np.float64)


def _mixture(parameters: Doubles, _: Distribution, random: np.random.Generator) -> Doubles:
    weights, means, scales = components(parameters)
    u = random.random(parameters.shape[:-1])[..., None]
    chosen = np.minimum((weights.cumsum(axis=-1) <= u).sum(axis=-1, keepdims=True), weights.shape[-1] - 1)
    mean, scale = (np.take_along_axis(values, chosen, -1)[..., 0] for values in (means, scales))
    return np.asarray(mean + scale * random.standard_normal(mean.shape))


DRAWS: Final[dict[str, Callable[[Doubles, Distribution, np.random.Generator], Doubles]]] = {
    "quantile": _quantile,
    "gaussian": _gaussian,
    "student_t": _student_t,
    "negative_binomial": _negative_binomial,
    "mixture": _mixture,
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
