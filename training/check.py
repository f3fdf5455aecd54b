"""What can be known before the first epoch: labels a loss cannot take, names a manifest cannot hold."""

from collections.abc import Sequence

import torch
from pydantic import ValidationError
from torch import Tensor

from stepcast.errors import ConfigError

from .config import Config
from .data.batch import Batch
from .data.source import SPLITS, Source
from .data.table import TableSource
from .export import describe
from .layers.output import Head
from .losses import TAKES
from .network import Network
from .segments import settle


def check_names(network: Network, source: Source, config: Config) -> None:
    """See that a manifest can be written of what will be trained.

    Raises:
        ConfigError: names that stand there twice, feedback from or to what is not there.
    """
    classes = source.classes or ()
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise ConfigError(f"data: classes named twice: {', '.join(map(repr, twice))}")
    try:
        describe(network, source, config, sha256="0" * 64, version=1, metrics={})
    except ValidationError as error:
        problems = (problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise ConfigError("data: " + "; ".join(problems)) from error


def check_held_out(network: Network, source: Source, config: Config) -> None:
    """See that there will be rows to calibrate distributions with.

    Raises:
        ConfigError: an output has no label among the validation rows, or the data cannot be cut into folds.
    """
    if config.training.calibrate == "folds":
        if not isinstance(source, TableSource):
            raise ConfigError("training.calibrate: folds are stretches of time, of data.kind table. Take validation.")
        next(source.folds(config.training.folds))
    if config.training.calibrate != "validation":
        return
    found = torch.zeros(len(source.outputs), dtype=torch.bool)
    for batch in source.batches("validation"):
        found |= _counting(batch, network).flatten(0, -2).any(dim=0)
    for output, there in zip(source.outputs, found.tolist(), strict=True):
        if not there:
            raise ConfigError(f"training.calibrate: output {output.name!r} has no label in the validation split")


def check_labels(network: Network, source: Source) -> None:
    """See that every label which counts can be learned from, or measured with in the test split.

    Only losses that do not take every number, and classes, need the pass over the data.

    Raises:
        ConfigError: one cannot; with output, split, batch, row and step.
    """
    picky = [(head, places) for head, places in network.head.tasks() if head.loss.name in TAKES]
    if not picky and source.classes is None:
        return
    for split in SPLITS:
        for number, batch in enumerate(source.batches(split)):
            counts, where = _counting(batch, network), f"batch {number} of {split}"
            if source.classes is not None:
                _check_classes(batch.y, counts, where, measured=split == "test")
            for head, places in picky if split != "test" else ():
                names = [source.outputs[place].name for place in places]
                _check_numbers(head, names, batch.y[..., places], counts[..., places], where)


def _counting(batch: Batch, network: Network) -> Tensor:
    """Which labels (B, T, O) of a batch count."""
    fillable = torch.zeros(batch.x.shape[2], dtype=torch.bool)
    mask = settle(batch, fillable=fillable, summary=network.summary).y_mask
    mask = torch.ones(batch.y.shape[:2], dtype=torch.bool) if mask is None else mask
    return (mask if mask.ndim == 3 else mask[..., None]).expand(batch.y.shape)


def _check_classes(y: Tensor, counts: Tensor, where: str, *, measured: bool) -> None:
    """One class per row; in a split that is only measured, not less than one either."""
    highest = y.amax(dim=2, keepdim=True)
    found = ((y == highest) & (highest > 0) & counts).sum(dim=2)
    wrong = found > 1
    if measured and y.shape[2] > 1:  # a single output of 0 is the other class
        wrong |= counts.all(dim=2) & (found == 0)
    if (place := _first(wrong)) is not None:
        row, step = place
        raise ConfigError(f"data: {int(found[row, step])} classes at step {step} of row {row} of {where}, wanted one")


def _check_numbers(head: Head, names: Sequence[str], y: Tensor, counts: Tensor, where: str) -> None:
    """Labels for which the loss is defined."""
    takes, wanted = TAKES[head.loss.name]
    target = head.target(None, y.to(head.mean.device)).cpu()
    if (place := _first(counts & ~takes(target))) is None:
        return
    row, step, column = place
    got, given = float(target[row, step, column]), float(y[row, step, column])
    scaled = "" if head.identity_scale else f" ({given:g} in the data)"
    advice = "" if head.identity_scale else " Take labels as they are (data.normalise_labels: none)."
    raise ConfigError(
        f"data: loss {head.loss.name} takes labels {wanted}, output {names[column]!r} is "
        f"{got:g}{scaled} at step {step} of row {row} of {where}.{advice}"
    )


def _first(flags: Tensor) -> tuple[int, ...] | None:
    places = flags.nonzero()
    return tuple(places[0].tolist()) if len(places) else None
