"""The last layer of every network: from hidden values to answers in the caller's units, and the loss on the way."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stepcast.manifest import Feature, Output

from ..activations import ACTIVATIONS, write_activation
from ..graph import Graph
from ..losses import TAKES, Loss
from .feedforward import write_linear
from .specs import IllegalStack, RnnLossSpec, RnnOutputSpec
from .weights import initialise


class Head(nn.Module):
    """y = base + mean + scale * activation(W h + b), at every step.

    `base` is 0, or with `residual` the last reading of the feature that has the output's name: then the network only
    has to say how much will change. RnnLoss has no W and b.
    """

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
        outputs: Sequence[Output],
        classification: bool,
    ) -> None:
        super().__init__()
        _check(spec, size, features, outputs, classification)
        self.activation = spec.activation or ("softmax" if classification else "identity")
        self.loss = Loss(spec.loss or ("mcxent" if classification else "mse"), self.activation, spec.loss_weights)
        self.linear = nn.Linear(size, len(outputs)) if isinstance(spec, RnnOutputSpec) else None
        if self.linear is not None and isinstance(spec, RnnOutputSpec):
            initialise(self.linear.weight, spec.weight_init, size, len(outputs))
            nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.tensor([o.mean for o in outputs]), persistent=False)
        self.register_buffer("scale", torch.tensor([o.scale for o in outputs]), persistent=False)
        self.identity_scale = all(o.mean == 0 and o.scale == 1 for o in outputs)
        self.residual = spec.residual
        columns, base_scale, base_mean = _bases(features, outputs)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("base_scale", base_scale, persistent=False)
        self.register_buffer("base_mean", base_mean, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values before the activation, (B, T, O)."""
        return hidden if self.linear is None else self.linear(hidden)

    def base(self, observed: Tensor) -> Tensor | None:
        """What the answer is relative to, in the caller's units (B, T, O); None: nothing."""
        return observed[..., self.columns] * self.base_scale + self.base_mean if self.residual else None

    def answer(self, z: Tensor, base: Tensor | None) -> Tensor:
        """The answer in the caller's units, (B, T, O)."""
        y = ACTIVATIONS[self.activation](z)
        if not self.identity_scale:
            y = y * self.scale + self.mean
        return y if base is None else y + base

    def losses(self, z: Tensor, base: Tensor | None, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sum and count of the losses of labels in the caller's units; see `Loss`."""
        total, count = self.loss(z, self.target(base, y), mask)
        return total, count

    def target(self, base: Tensor | None, y: Tensor) -> Tensor:
        """Labels in the network's scale, relative to `base`."""
        target = y if base is None else y - base
        return target if self.identity_scale else (target - self.mean) / self.scale

    def write(self, graph: Graph, hidden: str, observed: str) -> str:
        """Add this layer to a graph: the answer's name."""
        z = hidden if self.linear is None else write_linear(graph, self.linear, hidden)
        y = write_activation(graph, self.activation, z)
        if not self.identity_scale:
            scaled = graph.add("Mul", y, graph.constant(self.scale.cpu().numpy()))
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
) -> None:
    """What only shows when the data is known.

    Raises:
        IllegalStack: the layer does not fit the data's outputs.
    """
    count = len(outputs)
    units = size if isinstance(spec, RnnLossSpec) else spec.units
    if units not in (None, count):
        raise IllegalStack(f"{spec.kind} has {units} units, the data has {count} outputs")
    if spec.loss_weights is not None and len(spec.loss_weights) != count:
        raise IllegalStack(f"loss_weights has {len(spec.loss_weights)} numbers, the data has {count} outputs")
    if (spec.activation or ("softmax" if classification else "identity")) == "softmax" and count == 1:
        raise IllegalStack("softmax over one output is always 1. Take activation sigmoid with loss xent.")
    if spec.residual and spec.loss in TAKES:
        raise IllegalStack(f"residual: loss {spec.loss} takes labels {TAKES[spec.loss][1]}, changes are of both signs")
    if spec.residual and not {o.name for o in outputs} & {f.name for f in features if f.width == 1 and not f.embedding}:
        raise IllegalStack("residual: no output has the name of a feature")


def _bases(features: Sequence[Feature], outputs: Sequence[Output]) -> tuple[Tensor, Tensor, Tensor]:
    """Column, scale and mean of the feature each output is named after; scale and mean 0 where there is none."""
    starts = np.cumsum([0, *(0 if f.embedding else f.width for f in features)])  # vectors stand behind the readings
    readings = [(i, f) for i, f in enumerate(features) if f.width == 1 and not f.embedding]
    places = {f.name: (int(starts[i]), f.scale, f.mean) for i, f in readings}
    columns, scales, means = zip(*(places.get(o.name, (0, 0.0, 0.0)) for o in outputs), strict=True)
    return torch.tensor(columns), torch.tensor(scales), torch.tensor(means)
