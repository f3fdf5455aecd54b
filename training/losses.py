"""Losses by DL4J's names, masked: a sum and a count, kept apart until the whole batch (of all processes) is known.

Where DL4J divides by the number of examples, the average here is over what is unmasked: a batch with few labels has
the same weight per label as one with many. docs/models.md has both rules side by side, and `training.average` chooses.
"""

from collections.abc import Callable, Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcast.errors import ConfigError

from .activations import ACTIVATIONS
from .distributions import Distribution, Kind
from .layers.specs import CLASS_LOSSES

# These average over outputs as well as steps; the others sum over the outputs of a step, then average over steps.
MEAN_LOSSES = ("mse", "squared_loss", "mae", "huber", "mape", "msle", "wasserstein", *get_args(Kind))
# These look at all outputs of a step together, so a mask per output means nothing to them.
WHOLE_STEP_LOSSES = (*CLASS_LOSSES, "cosine_proximity", "kl_divergence")

TINY = 1e-10

# Labels that a loss is defined for, in the network's scale; every number is one to the losses that are not here.
TAKES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "msle": (lambda t: t > -1, "more than -1"),
    "mape": (lambda t: t != 0, "other than 0"),
    "poisson": (lambda t: t >= 0, "at least 0"),
    "kl_divergence": (lambda t: t >= 0, "at least 0"),
    "xent": (lambda t: (t >= 0) & (t <= 1), "between 0 and 1"),
    "negative_binomial": (lambda t: (t >= 0) & (t == t.round()), "that are whole and at least 0"),
}


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=TINY).log()


def _sum(entries: Tensor) -> Tensor:
    """The sum in one order, however the entries lie in memory: masks of ones have to give the bits of none."""
    return entries.contiguous().sum()


def _cosine(p: Tensor, t: Tensor) -> Tensor:
    p, t = (F.normalize(v, dim=-1, eps=TINY) for v in (p, t))
    return -p * t


def _xent(p: Tensor, t: Tensor) -> Tensor:
    p = p.clamp(1e-5, 1 - 1e-5)
    return -(t * p.log() + (1 - t) * (1 - p).log())


# Each takes the activated output and the target (B, T, O) and gives a loss per entry.
FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mcxent": lambda p, t: -t * _log(p),
    "xent": _xent,
    "mse": lambda p, t: (p - t).square(),
    "l2": lambda p, t: (p - t).square(),
    "mae": lambda p, t: (p - t).abs(),
    "l1": lambda p, t: (p - t).abs(),
    "huber": lambda p, t: F.huber_loss(p, t, reduction="none"),
    "mape": lambda p, t: 100.0 * ((p - t) / t).abs(),
    "msle": lambda p, t: (torch.log1p(p.clamp(min=-1 + TINY)) - torch.log1p(t)).square(),
    "poisson": lambda p, t: p - t * _log(p),
    "hinge": lambda p, t: (1 - t * p).clamp(min=0),
    "squared_hinge": lambda p, t: (1 - t * p).clamp(min=0).square(),
    "cosine_proximity": _cosine,
    "kl_divergence": lambda p, t: t * (_log(t) - _log(p)),
    "wasserstein": lambda p, t: t * p,
}
ALIASES = {"negativeloglikelihood": "mcxent", "sparse_mcxent": "mcxent", "squared_loss": "mse"}


class Loss(nn.Module):
    """A loss on top of an output activation.

    Args:
        name: One of DL4J's names.
        activation: The output activation; softmax and sigmoid are fused with their cross entropies.
        weights: One factor per output, None for ones.
        distribution: What has the loss of this name, in place of an activation.
    """

    weights: Tensor | None

    def __init__(
        self,
        name: str,
        activation: str,
        weights: Sequence[float] | None = None,
        distribution: Distribution | None = None,
    ) -> None:
        super().__init__()
        self.name, self.activation, self.distribution = ALIASES.get(name, name), activation, distribution
        self.register_buffer("weights", None if weights is None else torch.tensor(weights), persistent=False)

    def parts(self, outputs: int) -> int:
        """By how many the sum over a step's outputs is divided: all of them, or 1 where a loss sums."""
        return outputs if self.name in MEAN_LOSSES else 1

    def entries(self, z: Tensor, target: Tensor) -> Tensor:
        """Loss of every entry (B, T, O) for the values `z` before the activation, or a distribution's raw values."""
        if self.distribution is not None:
            losses = self.distribution.losses(z, target)
        elif self.name == "mcxent" and self.activation == "softmax":
            losses = -target * torch.log_softmax(z, dim=-1)
        elif self.name == "xent" and self.activation == "sigmoid":
            losses = F.binary_cross_entropy_with_logits(z, target, reduction="none")
        else:
            losses = FORMULAS[self.name](ACTIVATIONS[self.activation](z), target)
        return losses if self.weights is None else losses * self.weights

    def forward(self, z: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sum of the unmasked losses and how many there were.

        Args:
            z: (B, T, O) before the activation; (B, T, R * O) raw values of a distribution.
            target: (B, T, O); may be NaN under the mask.
            mask: bool, (B, T) or (B, T, O); None: everything counts.

        Raises:
            ConfigError: a mask per output for a loss that knows whole steps only.
        """
        if mask is None:
            everything = target.shape[:2].numel() * self.parts(target.shape[2])
            return _sum(self.entries(z, target)), torch.tensor(everything, device=target.device)
        if mask.ndim == 3 and self.name in WHOLE_STEP_LOSSES:
            raise ConfigError(f"data: a mask per output, but loss {self.name} takes a step's outputs together")
        per_entry = (mask if mask.ndim == 3 else mask[..., None]).expand(target.shape)
        # `where` on the way in as well: 0 * NaN would come back through the gradient. 1 is harmless in every formula.
        clean = torch.where(per_entry, target, 1.0)
        total = _sum(torch.where(per_entry, self.entries(z, clean), 0.0))
        counted = per_entry if self.name in MEAN_LOSSES else per_entry.any(dim=2)
        return total, counted.sum()
