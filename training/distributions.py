"""What an output layer says of each target besides one number: parameters of a distribution, and the loss they have.

A distribution turns raw values of the layer into parameters in the network's scale; the head takes them to the caller's
units. Raw values and parameters lie parameter by parameter, (P, K) in one axis: the K point forecasts come first.

Shape letters: B rows, T steps, K targets, R raw values and P parameters per target.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcast.manifest import Distribution as Described
from stepcast.manifest import Output

from .graph import Graph
from .layers.distribution_specs import (
    DistributionSpec,
    GaussianSpec,
    MixtureSpec,
    NegativeBinomialSpec,
    QuantileSpec,
)

SCALE_FLOOR = 1e-4
"""The least scale, in deviations of the target: a point that is hit by chance must not cost everything else."""
DISPERSION_FLOOR = 1e-6
"""The least dispersion: a Poisson distribution, but for one part in a million of its mean."""
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Parameter:
    """One output of each target.

    Attributes:
        suffix: Behind the target's name; "" is the point forecast.
        role: A location is scaled and moved as the target is, a spread is scaled, a count, a dispersion and a plain
            number stay as they are; of these three only a count has a unit.
    """

    suffix: str
    role: Literal["location", "spread", "count", "dispersion", "plain"]

    def of(self, target: Output) -> Output:
        """The output of a target."""
        name = target.name + self.suffix
        if self.role == "location":
            return target.model_copy(update={"name": name})
        if self.role == "spread":
            return Output(name=name, unit=target.unit, scale=target.scale)
        return Output(name=name, unit=target.unit if self.role == "count" else "")


Kind = Literal["quantile", "gaussian", "student_t", "negative_binomial", "mixture"]


class Distribution(nn.Module, ABC):
    """What every kind answers.

    Attributes:
        kind: The manifest's word, and the loss's name.
        per_target: P outputs for each target, the point forecast first.
        begin: R raw values that stand for a target of mean 0 and deviation 1: where training starts.
    """

    kind: ClassVar[Kind]
    per_target: tuple[Parameter, ...]
    begin: tuple[float, ...]
    faithful: bool = False

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """Raw values (B, T, R * K) to parameters (B, T, P * K), both in the network's scale."""

    @abstractmethod
    def losses(self, z: Tensor, target: Tensor) -> Tensor:
        """The loss of every target (B, T, K) given raw values (B, T, R * K)."""

    @abstractmethod
    def write(self, graph: Graph, z: str, targets: int) -> str:
        """Write `forward` into a graph: the name of the parameters."""

    def describe(self, targets: Sequence[Output]) -> Described:
        """The manifest's description: the parameters as they lie, but for what has an order of its own."""
        names = {t.name: tuple(t.name + parameter.suffix for parameter in self.per_target) for t in targets}
        return Described(kind=self.kind, targets=names)

    def outputs(self, targets: Sequence[Output]) -> tuple[Output, ...]:
        """The graph's outputs, P * K of them."""
        return tuple(parameter.of(target) for parameter in self.per_target for target in targets)

    def moved(self, targets: Sequence[Output]) -> tuple[Output | None, ...]:
        """The target that each output moves with, None for those that do not move."""
        return tuple(t if parameter.role == "location" else None for parameter in self.per_target for t in targets)

    def stretched(self, parameters: Tensor, factors: Tensor) -> Tensor:
        """The same distributions, wider or narrower about their point forecasts, which stay.

        The distance of every location from the point forecast, every spread and every dispersion is multiplied.

        Args:
            parameters: (..., P * K), in any unit in which they lie about their point forecasts.
            factors: (K,), one for each target.
        """
        targets = len(factors)
        about, by = self._about(targets).to(parameters.device), self._stretch(factors)
        points = parameters[..., :targets].repeat(*[1] * (parameters.ndim - 1), len(self.per_target))
        about = torch.where(about, points, 0.0)
        return about + (parameters - about) * by

    def write_stretched(self, graph: Graph, parameters: str, factors: Tensor, scale: Tensor) -> tuple[str, Tensor]:
        """Write `stretched` into a graph: the name of its parameters, and what these are to be multiplied by.

        That is `scale` (P * K,), or what does both in one product where all is stretched about 0.
        """
        targets = len(factors)
        about, by = self._about(targets), self._stretch(factors)
        if not about[targets:].any():
            return parameters, scale * by
        points = graph.add("Gather", parameters, graph.ints(*list(range(targets)) * len(self.per_target)), axis=2)
        centre = graph.add("Where", graph.constant(about.numpy(), np.bool_), points, graph.constant(0.0))
        away = graph.add("Mul", graph.add("Sub", parameters, centre), graph.constant(by.cpu().numpy()))
        return graph.add("Add", centre, away), scale

    def _about(self, targets: int) -> Tensor:
        """(P * K,), which parameters are stretched about the point forecast; all others about 0."""
        return torch.tensor([p.role == "location" for p in self.per_target]).repeat_interleave(targets)

    def _stretch(self, factors: Tensor) -> Tensor:
        """(P * K,), what each parameter is multiplied by."""
        spreads = [p.suffix != "" and p.role in ("location", "spread", "dispersion") for p in self.per_target]
        return torch.cat([factors if spread else torch.ones_like(factors) for spread in spreads])

    def _raw(self, z: Tensor) -> tuple[Tensor, ...]:
        """The R raw values (B, T, K)."""
        return z.chunk(len(self.begin), dim=-1)

    def _parts(self, graph: Graph, z: str, targets: int) -> list[str]:
        """Names of the R raw values (B, T, K)."""
        return graph.add_many("Split", len(self.begin), z, graph.ints(*[targets] * len(self.begin)), axis=2)


class Quantiles(Distribution):
    """Quantiles at fixed levels that cannot cross: the median, and softplus gaps added up away from it.

    The loss is the pinball loss, averaged over the levels (Koenker and Bassett, Regression Quantiles, 1978).
    """

    kind = "quantile"
    levels: Tensor

    def __init__(self, spec: QuantileSpec) -> None:
        super().__init__()
        self.ascending = spec.levels
        self.below = spec.levels.index(0.5)
        others = [level for level in spec.levels if level != 0.5]
        self.per_target = (
            Parameter("", "location"),
            *(Parameter(f"@{level:g}", "location") for level in others),
        )
        self.register_buffer("levels", torch.tensor([0.5, *others]), persistent=False)
        normal = [NormalDist().inv_cdf(level) for level in spec.levels]
        self.begin = (0.0, *(_inverse_softplus(gap) for gap in np.diff(normal)))

    def forward(self, z: Tensor) -> Tensor:
        return self._quantiles(z).flatten(-2)

    def _quantiles(self, z: Tensor) -> Tensor:
        """(B, T, P, K): the median, the levels below it, the levels above it."""
        z = z.view(*z.shape[:-1], len(self.begin), -1)  # (B, T, R, K)
        median, gaps = z[..., :1, :], F.softplus(z[..., 1:, :])
        below = gaps[..., : self.below, :].flip(-2).cumsum(-2).flip(-2)
        above = gaps[..., self.below :, :].cumsum(-2)
        return torch.cat([median, median - below, median + above], dim=-2)

    def losses(self, z: Tensor, target: Tensor) -> Tensor:
        over = target[..., None, :] - self._quantiles(z)  # (B, T, P, K)
        levels = self.levels[:, None]
        return torch.maximum(levels * over, (levels - 1) * over).mean(dim=-2)

    def write(self, graph: Graph, z: str, targets: int) -> str:
        median, *raw = self._parts(graph, z, targets)
        gaps = [graph.add("Softplus", gap) for gap in raw]
        below = [graph.add("Sub", median, so_far) for so_far in _running(graph, gaps[: self.below][::-1])]
        above = [graph.add("Add", median, so_far) for so_far in _running(graph, gaps[self.below :])]
        return graph.add("Concat", median, *below[::-1], *above, axis=2)

    def describe(self, targets: Sequence[Output]) -> Described:
        names = {
            t.name: tuple(t.name if level == 0.5 else f"{t.name}@{level:g}" for level in self.ascending)
            for t in targets
        }
        return Described(kind=self.kind, levels=self.ascending, targets=names)


def _running(graph: Graph, terms: Sequence[str]) -> list[str]:
    """Names of the sums of the first one, two, ... terms."""
    sums = list(terms[:1])
    for term in terms[1:]:
        sums.append(graph.add("Add", sums[-1], term))
    return sums


class Gaussian(Distribution):
    """Mean and standard deviation; the loss is the negative log likelihood.

    A faithful one learns its means as under the mean squared error, and from them alone the layers below: the scale
    takes the means and the layers below as constants (Stirn et al., Faithful Heteroscedastic Regression with Neural
    Networks, 2023).
    """

    kind = "gaussian"
    per_target = (Parameter("", "location"), Parameter("@scale", "spread"))

    def __init__(self, faithful: bool) -> None:
        super().__init__()
        self.faithful = faithful
        self.begin = (0.0, _inverse_softplus(1.0))

    def forward(self, z: Tensor) -> Tensor:
        mean, scale = self._raw(z)
        return torch.cat([mean, _positive(scale)], dim=-1)

    def losses(self, z: Tensor, target: Tensor) -> Tensor:
        mean, scale = self(z).chunk(2, dim=-1)
        if not self.faithful:
            return _normal_loss(mean, scale, target)
        squares: Tensor = 0.5 * (target - mean).square()
        return squares + _normal_loss(mean.detach(), scale, target)

    def write(self, graph: Graph, z: str, targets: int) -> str:
        mean, scale = self._parts(graph, z, targets)
        return graph.add("Concat", mean, _write_positive(graph, scale), axis=2)


class StudentT(Distribution):
    """Location, scale, and degrees of freedom above 2, so that there is a variance; negative log likelihood."""

    kind = "student_t"
    per_target = (Parameter("", "location"), Parameter("@scale", "spread"), Parameter("@df", "plain"))

    def __init__(self) -> None:
        super().__init__()
        self.begin = (0.0, _inverse_softplus(1.0), _inverse_softplus(8.0))

    def forward(self, z: Tensor) -> Tensor:
        location, scale, df = self._raw(z)
        return torch.cat([location, _positive(scale), 2 + _positive(df)], dim=-1)

    def losses(self, z: Tensor, target: Tensor) -> Tensor:
        # In float64: with many degrees of freedom the two lgamma are large and nearly equal.
        location, scale, df = self(z).double().chunk(3, dim=-1)
        half = (df + 1) / 2
        density = torch.lgamma(half) - torch.lgamma(df / 2) - 0.5 * (df * math.pi).log() - scale.log()
        losses: Tensor = half * torch.log1p(((target - location) / scale).square() / df) - density
        return losses.to(z.dtype)

    def write(self, graph: Graph, z: str, targets: int) -> str:
        location, scale, df = self._parts(graph, z, targets)
        df = graph.add("Add", _write_positive(graph, df), graph.constant(2.0))
        return graph.add("Concat", location, _write_positive(graph, scale), df, axis=2)


class NegativeBinomial(Distribution):
    """Mean and dispersion of counts; the loss is the negative log likelihood of the counts as they are.

    With mean m and dispersion a the variance is m + a m², and 1/a is the number of failures in the textbook's form
    (Salinas et al., DeepAR, 2020, have the same two parameters). Labels are not scaled: the mean is.
    """

    kind = "negative_binomial"
    per_target = (Parameter("", "count"), Parameter("@dispersion", "dispersion"))
    usual: Tensor

    def __init__(self, targets: Sequence[Output]) -> None:
        super().__init__()
        self.begin = (_inverse_softplus(1.0), _inverse_softplus(0.5))
        usual = [target.mean if target.mean > 0 else target.scale for target in targets]
        self.register_buffer("usual", torch.tensor(usual), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        mean, dispersion = self._raw(z)
        return torch.cat([_positive(mean) * self.usual, _positive(dispersion, DISPERSION_FLOOR)], dim=-1)

    def losses(self, z: Tensor, target: Tensor) -> Tensor:
        # In float64, as Student's t.
        mean, dispersion = self(z).double().chunk(2, dim=-1)
        failures, count = 1 / dispersion, target.double()
        ways = torch.lgamma(count + failures) - torch.lgamma(failures) - torch.lgamma(count + 1)
        grown = torch.log1p(dispersion * mean)
        losses: Tensor = failures * grown - count * ((dispersion * mean).log() - grown) - ways
        return losses.to(z.dtype)

    def write(self, graph: Graph, z: str, targets: int) -> str:
        mean, dispersion = self._parts(graph, z, targets)
        mean = graph.add("Mul", _write_positive(graph, mean), graph.constant(self.usual.cpu().numpy()))
        return graph.add("Concat", mean, _write_positive(graph, dispersion, DISPERSION_FLOOR), axis=2)


class Mixture(Distribution):
    """Weights, means and standard deviations of gaussians; the loss is the negative log likelihood.

    (Bishop, Mixture Density Networks, 1994.) The point forecast is the mean of the whole.
    """

    kind = "mixture"

    def __init__(self, components: int) -> None:
        super().__init__()
        self.components = components
        numbers = range(components)
        self.per_target = (
            Parameter("", "location"),
            *(Parameter(f"@weight_{i}", "plain") for i in numbers),
            *(Parameter(f"@mean_{i}", "location") for i in numbers),
            *(Parameter(f"@scale_{i}", "spread") for i in numbers),
        )
        # Means apart: components that begin alike would learn alike, and stay one.
        means = np.linspace(-1.0, 1.0, components)
        self.begin = (*[0.0] * components, *means.tolist(), *[_inverse_softplus(0.7)] * components)

    def _terms(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of the weights, means, and scales, (B, T, M, K) each."""
        logits, means, scales = (part.view(*part.shape[:-1], self.components, -1) for part in z.chunk(3, dim=-1))
        return torch.log_softmax(logits, dim=-2), means, _positive(scales)

    def forward(self, z: Tensor) -> Tensor:
        log_weights, means, scales = self._terms(z)
        weights = log_weights.exp()
        mean = (weights * means).sum(dim=-2, keepdim=True)
        return torch.cat([mean, weights, means, scales], dim=-2).flatten(-2)

    def losses(self, z: Tensor, target: Tensor) -> Tensor:
        log_weights, means, scales = self._terms(z)
        return -torch.logsumexp(log_weights - _normal_loss(means, scales, target[..., None, :]), dim=-2)

    def write(self, graph: Graph, z: str, targets: int) -> str:
        parts = self._parts(graph, z, targets)
        m = self.components
        highest = graph.add("Max", *parts[:m])
        shares = [graph.add("Exp", graph.add("Sub", logit, highest)) for logit in parts[:m]]
        whole = graph.add("Sum", *shares)
        weights = [graph.add("Div", share, whole) for share in shares]
        means = parts[m : 2 * m]
        mean = graph.add("Sum", *(graph.add("Mul", *pair) for pair in zip(weights, means, strict=True)))
        scales = [_write_positive(graph, scale) for scale in parts[2 * m :]]
        return graph.add("Concat", mean, *weights, *means, *scales, axis=2)

    def describe(self, targets: Sequence[Output]) -> Described:
        names = {t.name: tuple(t.name + parameter.suffix for parameter in self.per_target[1:]) for t in targets}
        return Described(kind=self.kind, targets=names)


def _normal_loss(mean: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Minus the logarithm of the normal density."""
    return 0.5 * ((target - mean) / scale).square() + scale.log() + HALF_LOG_TWO_PI


def _positive(z: Tensor, floor: float = SCALE_FLOOR) -> Tensor:
    return F.softplus(z) + floor


def _write_positive(graph: Graph, z: str, floor: float = SCALE_FLOOR) -> str:
    return graph.add("Add", graph.add("Softplus", z), graph.constant(floor))


def _inverse_softplus(value: float) -> float:
    return float(np.log(np.expm1(value)))


def distribution_of(spec: DistributionSpec, targets: Sequence[Output]) -> Distribution:
    """The distribution that a configuration names."""
    match spec:
        case QuantileSpec():
            return Quantiles(spec)
        case GaussianSpec():
            return Gaussian(spec.faithful)
        case NegativeBinomialSpec():
            return NegativeBinomial(targets)
        case MixtureSpec():
            return Mixture(spec.components)
    return StudentT()
