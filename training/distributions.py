"""What an output layer says of each target besides one number: parameters of a distribution, and the loss they have.

A distribution turns raw values of the layer into parameters in the network's scale; the head takes them to the caller's
units. Raw values and parameters lie parameter by parameter, (P, K) in one axis: the K point forecasts come first.

Shape letters: B rows, T steps, K targets, R raw values and P parameters per target.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcast.manifest import Distribution as Described
from stepcast.manifest import Output

from .graph import Graph
from .layers.distribution_specs import DistributionSpec, QuantileSpec


@dataclass(frozen=True)
class Parameter:
    """One output of each target.

    Attributes:
        suffix: Behind the target's name; "" is the point forecast.
        role: A location is scaled and moved as the target is, a spread is scaled, a plain number stays as it is.
    """

    suffix: str
    role: Literal["location", "spread", "plain"]

    def of(self, target: Output) -> Output:
        """The output of a target."""
        name = target.name + self.suffix
        if self.role == "location":
            return target.model_copy(update={"name": name})
        if self.role == "spread":
            return Output(name=name, unit=target.unit, scale=target.scale)
        return Output(name=name)


class Distribution(nn.Module, ABC):
    """What every kind answers.

    Attributes:
        per_target: P outputs for each target, the point forecast first.
        begin: R raw values that stand for a target of mean 0 and deviation 1: where training starts.
    """

    per_target: tuple[Parameter, ...]
    begin: tuple[float, ...]

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """Raw values (B, T, R * K) to parameters (B, T, P * K), both in the network's scale."""

    @abstractmethod
    def losses(self, z: Tensor, target: Tensor) -> Tensor:
        """The loss of every target (B, T, K) given raw values (B, T, R * K)."""

    @abstractmethod
    def write(self, graph: Graph, z: str, targets: int) -> str:
        """Write `forward` into a graph: the name of the parameters."""

    @abstractmethod
    def describe(self, targets: Sequence[Output]) -> Described:
        """The manifest's description."""

    def outputs(self, targets: Sequence[Output]) -> tuple[Output, ...]:
        """The graph's outputs, P * K of them."""
        return tuple(parameter.of(target) for parameter in self.per_target for target in targets)

    def moved(self, targets: Sequence[Output]) -> tuple[Output | None, ...]:
        """The target that each output moves with, None for those that do not move."""
        return tuple(t if parameter.role == "location" else None for parameter in self.per_target for t in targets)

    def _parts(self, graph: Graph, z: str, targets: int) -> list[str]:
        """Names of the R raw values (B, T, K)."""
        return graph.add_many("Split", len(self.begin), z, graph.ints(*[targets] * len(self.begin)), axis=2)


class Quantiles(Distribution):
    """Quantiles at fixed levels that cannot cross: the median, and softplus gaps added up away from it.

    The loss is the pinball loss, averaged over the levels (Koenker and Bassett, Regression Quantiles, 1978).
    """

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
        return Described(kind="quantile", levels=self.ascending, targets=names)


def _running(graph: Graph, terms: Sequence[str]) -> list[str]:
    """Names of the sums of the first one, two, ... terms."""
    sums = list(terms[:1])
    for term in terms[1:]:
        sums.append(graph.add("Add", sums[-1], term))
    return sums


def _inverse_softplus(value: float) -> float:
    return float(np.log(np.expm1(value)))


def distribution_of(spec: DistributionSpec) -> Distribution:
    """The distribution that a configuration names."""
    return Quantiles(spec)
