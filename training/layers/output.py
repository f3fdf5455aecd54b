"""The last layer of every network: from hidden values to answers in the caller's units, and the loss on the way."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcast.manifest import Feature, Output

from ..activations import ACTIVATIONS, write_activation
from ..distributions import distribution_of
from ..graph import Graph
from ..losses import TAKES, Loss
from .feedforward import write_linear
from .spec import IllegalStack
from .specs import RnnLossSpec, RnnOutputSpec
from .weights import initialise


class Head(nn.Module):
    """y = base + mean + scale * activation(W h + b), at every step.

    `base` is 0, or with `residual` the last reading of the feature that has the name of the output, or of its target:
    then the network only has to say how much will change. RnnLoss has no W and b. A distribution takes the activation's
    place: it makes several outputs of each target, of which the point forecasts come first.

    Attributes:
        targets: How many of the data's outputs it answers.
        raw: Values that `forward` gives.
        outputs: Of the graph, the point forecasts first.
        described: The distribution in words of the manifest, None without one.
        stretch: (targets,) what the spread of each target's distribution is multiplied by; all 1 until it is
            calibrated. No part of the loss, nor of the weights: it follows from them and the data.
    """

    stretch: Tensor
    mean: Tensor
    scale: Tensor
    columns: Tensor
    base_scale: Tensor
    base_mean: Tensor

    def __init__(
        self,
        spec: RnnOutputSpec | RnnLossSpec,
        size: int,
        features: Sequence[Feature],
        targets: Sequence[Output],
        classification: bool,
    ) -> None:
        super().__init__()
        distribution = distribution_of(spec.distribution, targets) if spec.distribution else None
        raw = len(distribution.begin) * len(targets) if distribution else len(targets)
        _check(spec, size, features, targets, classification, raw)
        self.targets, self.raw = len(targets), raw
        self.outputs = distribution.outputs(targets) if distribution else tuple(targets)
        self.described = distribution.describe(targets) if distribution else None
        self.activation = spec.activation or ("softmax" if classification else "identity")
        loss = self.described.kind if self.described else spec.loss or ("mcxent" if classification else "mse")
        self.loss = Loss(loss, self.activation, spec.loss_weights, distribution)
        self.linear = nn.Linear(size, raw) if isinstance(spec, RnnOutputSpec) else None
        if self.linear is not None and isinstance(spec, RnnOutputSpec):
            initialise(self.linear.weight, spec.weight_init, size, raw)
            begin = torch.tensor(distribution.begin if distribution else (0.0,))
            self.linear.bias.data = begin.repeat_interleave(raw // len(begin))
        self.register_buffer("stretch", torch.ones(len(targets)), persistent=False)
        self.register_buffer("mean", torch.tensor([o.mean for o in self.outputs]), persistent=False)
        self.register_buffer("scale", torch.tensor([o.scale for o in self.outputs]), persistent=False)
        self.identity_scale = all(o.mean == 0 and o.scale == 1 for o in self.outputs)
        self.residual = spec.residual
        columns, base_scale, base_mean = _bases(features, distribution.moved(targets) if distribution else targets)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("base_scale", base_scale, persistent=False)
        self.register_buffer("base_mean", base_mean, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values before the activation, (B, T, O), or raw values of a distribution."""
        if self.linear is None:
            return hidden
        distribution = self.loss.distribution
        if distribution is None or not distribution.faithful:
            return self.linear(hidden)  # type: ignore[no-any-return]
        weight, bias, means = self.linear.weight, self.linear.bias, self.targets
        others = F.linear(hidden.detach(), weight[means:], bias[means:])
        return torch.cat([F.linear(hidden, weight[:means], bias[:means]), others], dim=-1)

    def base(self, observed: Tensor) -> Tensor | None:
        """What the answer is relative to, in the caller's units (B, T, O); None: nothing."""
        return observed[..., self.columns] * self.base_scale + self.base_mean if self.residual else None

    def answer(self, z: Tensor, base: Tensor | None) -> Tensor:
        """The answer in the caller's units, (B, T, O)."""
        distribution = self.loss.distribution
        y = ACTIVATIONS[self.activation](z) if distribution is None else distribution(z)
        if distribution is not None and self.stretches:
            y = distribution.stretched(y, self.stretch)
        if not self.identity_scale:
            y = y * self.scale + self.mean
        return y if base is None else y + base

    @property
    def stretches(self) -> bool:
        """Whether any distribution is made wider or narrower."""
        return bool((self.stretch != 1).any())

    @property
    def parts(self) -> int | Tensor:
        """By how many the sum over a step's outputs is divided; see `Loss.parts`."""
        return self.loss.parts(self.targets)

    def tasks(self) -> Iterator[tuple["Head", list[int]]]:
        """Each output layer, and the places of its targets among the data's outputs."""
        yield self, list(range(self.targets))

    def losses(self, z: Tensor, base: Tensor | None, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sum and count of the losses of labels in the caller's units; see `Loss`."""
        total, count = self.loss(z, self.target(base, y), mask)
        return total, count

    def target(self, base: Tensor | None, y: Tensor) -> Tensor:
        """Labels (B, T, K) in the network's scale, relative to `base`."""
        points = slice(self.targets)
        target = y if base is None else y - base[..., points]
        return target if self.identity_scale else (target - self.mean[points]) / self.scale[points]

    def write(self, graph: Graph, observed: str, hidden: str) -> str:
        """Add this layer to a graph: the answer's name."""
        z = hidden if self.linear is None else write_linear(graph, self.linear, hidden)
        distribution, scale = self.loss.distribution, self.scale
        if distribution is None:
            y = write_activation(graph, self.activation, z)
        else:
            y = distribution.write(graph, z, self.targets)
            if self.stretches:
                y, scale = distribution.write_stretched(graph, y, self.stretch, scale)
        if not self.identity_scale or self.stretches:
            scaled = graph.add("Mul", y, graph.constant(scale.cpu().numpy()))
            y = graph.add("Add", scaled, graph.constant(self.mean.cpu().numpy()))
        if not self.residual:
            return y
        picked = graph.add("Gather", observed, graph.ints(*self.columns.tolist()), axis=2)
        base = graph.add("Mul", picked, graph.constant(self.base_scale.cpu().numpy()))
        return graph.add("Add", y, graph.add("Add", base, graph.constant(self.base_mean.cpu().numpy())))


def _check(
    spec: RnnOutputSpec | RnnLossSpec,
    size: int,
    features: Sequence[Feature],
    outputs: Sequence[Output],
    classification: bool,
    raw: int,
) -> None:
    """What only shows when the data is known.

    Raises:
        IllegalStack: the layer does not fit the data's outputs.
    """
    count = len(outputs)
    if spec.distribution is not None and classification:
        raise IllegalStack(f"distribution {spec.distribution.kind} is one of numbers, the data has classes")
    if isinstance(spec, RnnLossSpec) and size != raw:
        each = f", {raw // count} numbers for each" if spec.distribution else ""
        raise IllegalStack(f"{spec.kind} has {size} units, the data has {count} outputs{each}")
    if isinstance(spec, RnnOutputSpec) and spec.units not in (None, count):
        raise IllegalStack(f"{spec.kind} has {spec.units} units, the data has {count} outputs")
    if spec.loss_weights is not None and len(spec.loss_weights) != count:
        raise IllegalStack(f"loss_weights has {len(spec.loss_weights)} numbers, the data has {count} outputs")
    if (spec.activation or ("softmax" if classification else "identity")) == "softmax" and count == 1:
        raise IllegalStack("softmax over one output is always 1. Take activation sigmoid with loss xent.")
    loss = spec.distribution.kind if spec.distribution else spec.loss
    if spec.residual and loss in TAKES:
        raise IllegalStack(f"residual: loss {loss} takes labels {TAKES[loss][1]}, changes are of both signs")
    if spec.residual and not {o.target or o.name for o in outputs} & {f.name for f in features if _moves(f)}:
        raise IllegalStack("residual: no output has the name of a feature")


def _bases(features: Sequence[Feature], moved: Sequence[Output | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Column, scale and mean of the feature that each output moves with; scale and mean 0 where there is none.

    Args:
        features: Of the data.
        moved: Each output's target; None for an output that does not move.
    """
    starts = np.cumsum([0, *(f.width for f in features)])
    places = {f.name: (int(starts[i]), f.scale, f.mean) for i, f in enumerate(features) if _moves(f)}
    names = ((o.target or o.name) if o else "" for o in moved)
    columns, scales, means = zip(*(places.get(name, (0, 0.0, 0.0)) for name in names), strict=True)
    return torch.tensor(columns), torch.tensor(scales), torch.tensor(means)


def _moves(feature: Feature) -> bool:
    """Whether an output can move with a feature: it is a number."""
    return feature.width == 1 and feature.embedding is None
