"""Checks what a source gave, settles which steps run and which labels count, and cuts batches into segments."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from stepcast.errors import ConfigError
from stepcast.manifest import Feature

from .data.batch import Batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return batch.each(lambda tensor: tensor.to(device, non_blocking=True))


def settle(batch: Batch, *, fillable: Tensor, summary: bool) -> Batch:
    """Make the masks say exactly what runs and what counts.

    A step with a label is a step, even if its input is absent (one-to-many): it runs on missing readings, or on zeros
    where a feature has no policy for missing ones. In a many-to-one network only the label at a row's last present
    step counts.

    Args:
        batch: As the source gave it.
        fillable: (F,) bool, features that may be missing.
        summary: Is the network many-to-one?

    Raises:
        ConfigError: features and labels have different numbers of rows or steps.
    """
    if batch.x.shape[:2] != batch.y.shape[:2]:
        got = f"features of {tuple(batch.x.shape[:2])} rows and steps, labels of {tuple(batch.y.shape[:2])}"
        raise ConfigError(f"data: {got}. Pad them to one length and mask what is not there.")
    x, x_mask, y_mask = batch.x, batch.x_mask, batch.y_mask
    if x_mask is not None:
        labelled = torch.ones_like(x_mask) if y_mask is None else y_mask if y_mask.ndim == 2 else y_mask.any(dim=2)
        if y_mask is None:
            y_mask = x_mask  # labels without a mask of their own count where the input is
        elif not summary and (extra := labelled & ~x_mask).any():
            x = torch.where(extra[..., None], torch.where(fillable, torch.nan, 0.0), x)
            x_mask = x_mask | extra
    if summary:
        last = last_steps(x_mask, x.shape[0], x.shape[1], x.device)
        y_mask = last if y_mask is None else y_mask & (last if y_mask.ndim == 2 else last[..., None])
    return replace(batch, x=x, x_mask=x_mask, y_mask=y_mask)


def check_tokens(batch: Batch, *, vocabulary: int, feature: Feature, column: int = 0) -> None:
    """See that every token that is there is one the embedding has a vector for.

    The network itself takes the nearest token, so that no request can make it fail; in training data another number
    is a mistake.

    Args:
        batch: As the source gave it.
        vocabulary: Tokens are 0 to `vocabulary` - 1.
        feature: The manifest's description of the token.
        column: Where it stands among the features.

    Raises:
        ConfigError: a token of a present step is none, with row and step.
    """
    given = batch.x[..., column]
    token = ((given - feature.mean) / feature.scale).round()
    wrong = ~((token >= 0) & (token < vocabulary))  # NaN too
    if feature.missing != "refuse":
        wrong &= ~torch.isnan(given)
    if batch.x_mask is not None:
        wrong &= batch.x_mask
    if wrong.any():
        row, step = wrong.nonzero()[0].tolist()
        scaled = feature.mean != 0 or feature.scale != 1
        advice = "Do not normalise tokens." if scaled else "Enlarge vocabulary, or correct the data."
        got = f"{given[row, step]:g}, to the network {token[row, step]:g}" if scaled else f"{given[row, step]:g}"
        raise ConfigError(
            f"data: feature {feature.name!r} is {got} at step {step} of row {row} of a batch, "
            f"the embedding's tokens are 0 to {vocabulary - 1}. {advice}"
        )


def last_steps(mask: Tensor | None, rows: int, n_steps: int, device: torch.device) -> Tensor:
    """True at each row's last present step, (B, T)."""
    if mask is None:
        mask = torch.ones(rows, n_steps, dtype=torch.bool, device=device)
    steps = torch.arange(n_steps, device=device)
    latest = torch.where(mask, steps, -1).amax(dim=1, keepdim=True)
    return mask & (steps == latest)


def cut(batch: Batch, length: int) -> Iterator[Batch]:
    """Segments of `length` steps; the last one may be shorter. `starts` is left to the caller."""
    for start in range(0, batch.x.shape[1], length):
        masks = [None if m is None else m[:, start : start + length] for m in (batch.x_mask, batch.y_mask)]
        yield Batch(batch.x[:, start : start + length], batch.y[:, start : start + length], *masks)


def labelled(batch: Batch) -> bool:
    """Is there any label that counts?"""
    return batch.y_mask is None or bool(batch.y_mask.any())
