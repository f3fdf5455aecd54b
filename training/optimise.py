"""From gradients to new weights: l1 and l2, DL4J's gradient normalisations, optimisers and their schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stepcast.errors import ConfigError

from .config import TrainingConfig
from .network import Network


def make_optimiser(network: Network, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser over all weights that learn, each at its layer's rate. l1 and l2 are not its business: `penalise`.

    Raises:
        ConfigError: no weight learns.
    """
    groups = _groups(network, config)
    if not groups:
        raise ConfigError("network: every layer with weights is frozen, nothing can be learned")
    rate = config.learning_rate
    match config.optimiser:
        case "adam":
            return torch.optim.Adam(groups, rate)
        case "adamw":
            return torch.optim.AdamW(groups, rate)
        case "rmsprop":
            return torch.optim.RMSprop(groups, rate, alpha=0.95)
        case "adagrad":
            return torch.optim.Adagrad(groups, rate)
        case "sgd":
            return torch.optim.SGD(groups, rate, momentum=config.momentum)
        case "nesterov":
            return torch.optim.SGD(groups, rate, momentum=config.momentum, nesterov=True)


def _groups(network: Network, config: TrainingConfig) -> list[dict[str, Any]]:
    """Weights that learn at one rate, and under adamw decay alike, side by side in the order of the network."""
    pulled = {id(p) for p in decayed(network)} if config.optimiser == "adamw" else set()
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for _, learning, layer in network.parts():
        rate = (learning and learning.learning_rate) or config.learning_rate
        for weight in layer.parameters():
            if weight.requires_grad:
                groups.setdefault((rate, id(weight) in pulled), []).append(weight)
    decay = {True: config.weight_decay, False: 0.0}
    return [{"params": some, "lr": rate, "weight_decay": decay[pull]} for (rate, pull), some in groups.items()]


def rate_factor(config: TrainingConfig, epoch: int) -> float:
    """What the learning rate is multiplied with in an epoch (from 0): 1, or a half cosine down to 1 %."""
    if config.schedule == "constant":
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))


def layers_of(network: Network) -> list[nn.Module]:
    """What counts as one layer for penalties and per-layer clipping."""
    return [layer for _, _, layer in network.parts()]


def decayed(network: Network) -> list[nn.Parameter]:
    """The weights l1, l2 and weight decay pull on: matrices and peepholes, not biases and gains."""
    named = [item for layer in layers_of(network) for item in layer.named_parameters()]
    return [p for name, p in named if p.requires_grad and p.ndim > 1 and "bias" not in name and "gains" not in name]


@torch.no_grad()
def penalise(network: Network, config: TrainingConfig) -> None:
    """Add l2 w + l1 sign(w) to the gradients, after clipping as DL4J does."""
    if not (config.l1 or config.l2):
        return
    for weight in decayed(network):
        if weight.grad is not None:
            weight.grad.add_(weight, alpha=config.l2).add_(weight.sign(), alpha=config.l1)


def normalise_gradients(network: Network, config: TrainingConfig) -> None:
    """Apply the configured gradient normalisation in place."""
    groups = [[p.grad for p in layer.parameters() if p.grad is not None] for layer in layers_of(network)]
    everything = [g for group in groups for g in group]
    each = [[g] for g in everything]
    limit = config.gradient_threshold
    match config.gradient:
        case "clip_global_norm":
            _for_each([everything], lambda norm: (limit / norm.clamp(min=1e-12)).clamp(max=1.0))
        case "clip_l2_per_layer":
            _for_each(groups, lambda norm: (limit / norm.clamp(min=1e-12)).clamp(max=1.0))
        case "clip_l2_per_parameter":
            _for_each(each, lambda norm: (limit / norm.clamp(min=1e-12)).clamp(max=1.0))
        case "renormalize_l2_per_layer":
            _for_each(groups, lambda norm: 1.0 / norm.clamp(min=1e-12))
        case "renormalize_l2_per_parameter":
            _for_each(each, lambda norm: 1.0 / norm.clamp(min=1e-12))
        case "clip_elementwise":
            for gradient in everything:
                gradient.clamp_(-limit, limit)


def _for_each(groups: Iterable[list[Tensor]], factor: Callable[[Tensor], Tensor]) -> None:
    """Multiply each group of gradients with a function of its common l2 norm."""
    for group in groups:
        if group:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(group)))
            torch._foreach_mul_(group, factor(norm))
