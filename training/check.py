"""What can be known before the first epoch: labels a loss can not take, names a manifest can not hold."""

import torch
from pydantic import ValidationError
from torch import Tensor

from stepcast.errors import ConfigError

from .config import Config
from .data.batch import Batch
from .data.source import Source, Split
from .export import describe
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


def check_labels(network: Network, source: Source) -> None:
    """See that every label which counts in training or validation is one the loss is defined for.

    Only losses that do not take every number, and classes, need the pass over the data.

    Raises:
        ConfigError: one is not; with output, split, batch, row and step.
    """
    if network.head.loss.name not in TAKES and source.classes is None:
        return
    fillable = torch.zeros(source_width(source), dtype=torch.bool)
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        for number, batch in enumerate(source.batches(split)):
            settled = settle(batch, fillable=fillable, summary=network.summary)
            _check_batch(network, source, settled, f"batch {number} of {split}")


def source_width(source: Source) -> int:
    """F: values per step."""
    return sum(feature.width for feature in source.features)


def _check_batch(network: Network, source: Source, batch: Batch, where: str) -> None:
    mask = torch.ones(batch.y.shape[:2], dtype=torch.bool) if batch.y_mask is None else batch.y_mask
    counts = (mask if mask.ndim == 3 else mask[..., None]).expand(batch.y.shape)
    if source.classes is not None:
        highest = batch.y.amax(dim=2, keepdim=True)
        rivals = ((batch.y == highest) & (highest > 0) & counts).sum(dim=2)
        if (place := _first(rivals > 1)) is not None:
            row, step = place
            raise ConfigError(
                f"data: {int(rivals[row, step])} classes at step {step} of row {row} of {where}, wanted one"
            )
    if network.head.loss.name not in TAKES:
        return
    takes, wanted = TAKES[network.head.loss.name]
    target = _on_cpu(network, batch.y)
    if (place := _first(counts & ~takes(target))) is None:
        return
    row, step, column = place
    got, given = float(target[row, step, column]), float(batch.y[row, step, column])
    scaled = "" if network.head.identity_scale else f" ({given:g} in the data)"
    advice = "" if network.head.identity_scale else " Take labels as they are (data.normalise_labels: none)."
    raise ConfigError(
        f"data: loss {network.head.loss.name} takes labels {wanted}, output {source.outputs[column].name!r} is "
        f"{got:g}{scaled} at step {step} of row {row} of {where}.{advice}"
    )


def _on_cpu(network: Network, y: Tensor) -> Tensor:
    """Labels in the network's scale, wherever the network is."""
    return network.head.target(None, y.to(network.head.mean.device)).cpu()


def _first(flags: Tensor) -> tuple[int, ...] | None:
    places = flags.nonzero()
    return tuple(places[0].tolist()) if len(places) else None
