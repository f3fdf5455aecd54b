"""A running average of the weights: quieter than the last update's, and less fitted to the batches seen last."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class AveragedWeights:
    """An exponential moving average of a network's weights (Polyak and Juditsky 1992; as in Kingma and Ba 2015, 7.2).

    After update n it is d * average + (1 - d) * weights with d = min(decay, (1 + n) / (10 + n)), so that the first
    weights do not linger.

    Args:
        network: Whose weights are averaged; trained on as if there were no average.
        decay: Below 1: about 1 / (1 - decay) updates are averaged.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay, self.updates = network, decay, 0
        self.weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an update."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, weight in self.network.state_dict().items():
            self.weights[name].lerp_(weight, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the network has the average weights."""
        own = {name: weight.detach().clone() for name, weight in self.network.state_dict().items()}
        self.network.load_state_dict(self.weights)
        try:
            yield
        finally:
            self.network.load_state_dict(own)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"updates": self.updates, "weights": self.weights}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state`."""
        self.updates = saved["updates"]
        for name, weight in self.weights.items():
            weight.copy_(saved["weights"][name])
