"""A training run at rest: everything that makes a resumed run equal to an unbroken one, bit for bit on a CPU."""

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from stepcast.errors import ConfigError

LAST_FILE, BEST_FILE = "last.pt", "best.pt"


def save_checkpoint(directory: Path, everything: dict[str, Any], *, best: bool) -> None:
    """Write last.pt, and best.pt with the weights alone if they are the best so far; each appears whole or not."""
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / LAST_FILE, everything)
    if best:
        _write(directory / BEST_FILE, everything["network"])


def _write(path: Path, content: Any) -> None:
    half = path.with_suffix(".half")
    torch.save(content, half)
    os.replace(half, path)


def load_checkpoint(directory: Path, device: torch.device) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote last; None if there is nothing yet.

    Tensors and plain values only are read (`weights_only`): a checkpoint from elsewhere runs no code here.
    """
    path = directory / LAST_FILE
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)  # type: ignore[no-any-return]
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        raise ConfigError(f"{path}: not a checkpoint ({str(error).splitlines()[0]})") from error
