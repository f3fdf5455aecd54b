"""A training run at rest: everything that makes a resumed run equal to an unbroken one, bit for bit on a CPU."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from stepcast.errors import ConfigError

from .data.source import Source

LAST_FILE, BEST_FILE = "last.pt", "best.pt"


def save_checkpoint(directory: Path, everything: dict[str, Any], *, best: bool) -> None:
    """Write last.pt, and best.pt with the weights alone if they are the best so far; each appears whole or not."""
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / LAST_FILE, everything)
    if best:
        _write(directory / BEST_FILE, everything["best"])


def _write(path: Path, content: Any) -> None:
    half = path.with_suffix(".half")
    torch.save(content, half)
    os.replace(half, path)


def load_checkpoint(directory: Path, device: torch.device) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote last; None if there is nothing yet.

    Tensors and plain values only are read (`weights_only`): a checkpoint from elsewhere runs no code here.
    """
    path = directory / LAST_FILE
    return read_checkpoint(path, device) if path.exists() else None


def load_weights(network: nn.Module, path: Path) -> None:
    """Take the weights of a best.pt.

    Raises:
        ConfigError: it is no checkpoint, or one of another network.
    """
    saved = read_checkpoint(path, torch.device("cpu"))
    with fitting(path):
        network.load_state_dict(saved)


def read_checkpoint(path: Path, device: torch.device) -> Any:
    """What a file holds: tensors and plain values, nothing else is unpickled.

    Raises:
        ConfigError: it is no checkpoint.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        raise ConfigError(f"{path}: not a checkpoint ({str(error).splitlines()[0]})") from error


def meaning_of(source: Source) -> dict[str, list[str]]:
    """What the numbers of a source stand for, which the sizes of weights do not tell: names, in their order."""
    named = {f"categories of {f.name!r}": list(f.categories) for f in source.features if f.categories is not None}
    features, outputs = ([one.name for one in some] for some in (source.features, source.outputs))
    return {"features": features, "outputs": outputs, "classes": list(source.classes or ()), **named}


def check_meaning(saved: Mapping[str, Any], source: Source) -> None:
    """See that a checkpoint was trained on data with the same names.

    Args:
        saved: What `load_checkpoint` gave; one of an older version says nothing.
        source: What it is to be used with.

    Raises:
        ValueError: a name is another, or stands elsewhere; for `fitting`.
    """
    here = meaning_of(source)
    for what, names in saved.get("meaning", {}).items():
        for number, (before, now) in enumerate(zip_longest(names, here.get(what, ()))):
            if before != now:
                raise ValueError(f"number {number} of the {what} was {before!r}, is {now!r}")


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """What is taken from a checkpoint has to fit: another network, optimiser or version left something else there."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{path}: is of another configuration ({reason}). Go back to that one, or train anew."
        ) from error
