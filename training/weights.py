"""Weights that were found elsewhere, layer by layer: what an import and a training run fill a network with.

Layers with weights are matched by their order from below, their weights by the names the layer's module has for them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stepcast.errors import ConfigError

from .network import Network

Weights = Mapping[str, Tensor]  # of one layer, by the names of its module's parameters


class Weighted(NamedTuple):
    """A layer that has weights."""

    name: str
    module: nn.Module


def weighted(network: Network) -> list[Weighted]:
    """The layers that have weights, from below; output layers are the last."""
    return [Weighted(name, layer) for name, _, layer in network.parts() if any(True for _ in layer.parameters())]


@torch.no_grad()
def take_weights(layer: Weighted, weights: Weights, where: str) -> None:
    """Fill a layer with weights; whether they learn stays as it is.

    Args:
        layer: Of the network.
        weights: All of the layer's, of the same shapes.
        where: Names their origin, for the message.

    Raises:
        ConfigError: they are those of another layer.
    """
    own = dict(layer.module.named_parameters())
    found, wanted = ({name: tuple(t.shape) for name, t in each.items()} for each in (weights, own))
    if found != wanted:
        got, want = (", ".join(f"{n} {list(s)}" for n, s in sorted(each.items())) for each in (found, wanted))
        raise ConfigError(f"{where}: has {got}; layer {layer.name!r} has {want}")
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def fill(network: Network, weights: Sequence[Weights]) -> None:
    """Fill every layer of a network.

    Raises:
        ConfigError: there are more or fewer layers with weights, or others.
    """
    layers = weighted(network)
    if len(layers) != len(weights):
        raise ConfigError(f"{len(weights)} layers with weights, the network has {len(layers)}")
    for number, (layer, own) in enumerate(zip(layers, weights, strict=True)):
        take_weights(layer, own, f"layer {number} of those with weights")
