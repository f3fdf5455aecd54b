"""From gradients to new weights: l1 and l2, DL4J's gradient normalisations, optimisers and their schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainingConfig
from .network import Network


def make_optimiser(network: Network, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser over all weights that learn. l1 and l2 are not its business, see `penalise`."""
    weights = [p for p in network.parameters() if p.requires_grad]
    rate = config.learning_rate
    match config.optimiser:
        case "adam":
            return torch.optim.Adam(weights, rate)
        case "adamw":
            pulled = {id(p) for p in decayed(network)}
            others = [p for p in weights if id(p) not in pulled]
            groups: list[dict[str, Any]] = [{"params": decayed(network)}, {"params": others, "weight_decay": 0.0}]
            return torch.optim.AdamW(groups, rate, weight_decay=config.weight_decay)
        case "rmsprop":
            return torch.optim.RMSprop(weights, rate, alpha=0.95)
        case "adagrad":
            return torch.optim.Adagrad(weights, rate)
        case "sgd":
            return torch.optim.SGD(weights, rate, momentum=config.momentum)
        case "nesterov":
            return torch.optim.SGD(weights, rate, momentum=config.momentum, nesterov=True)


def rate_factor(config: TrainingConfig, epoch: int) -> float:
    """What the learning rate is multiplied with in an epoch (from 0): 1, or a half cosine down to 1 %."""
    if config.schedule == "constant":
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))


def layers_of(network: Network) -> list[nn.Module]:
    """What counts as one layer for penalties and per-layer clipping."""
    return [*network.stack(), *(head for head, _ in network.head.tasks())]


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
