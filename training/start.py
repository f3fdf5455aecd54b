"""What a run begins with, if the recipe says so: the weights of a DL4J network, or of another run.

The layers with weights of both sides are matched from below. Layers named in `fresh` keep the weights that were drawn
for them; behind the last one that is taken, the file may hold more layers. The data's own normalisation stays: that of
a DL4J zip is not looked at.
"""

from difflib import get_close_matches
from itertools import groupby
from pathlib import Path

import torch

from stepcast.errors import ConfigError, ManifestError

from .checkpoint import read_checkpoint
from .config import StartConfig
from .imports.dl4j.saved_network import read_saved
from .network import Network
from .weights import Weights, take_weights, weighted


def begin(network: Network, start: StartConfig, root: Path) -> list[str]:
    """Fill a network's layers.

    Args:
        network: With the weights that were drawn.
        start: Where the others are.
        root: What paths are relative to.

    Returns:
        Names of the layers that were filled.

    Raises:
        ConfigError: the file cannot be read, or its layers are not the network's.
    """
    path = root / start.file
    found = _of_dl4j(path) if start.dl4j is not None else _of_checkpoint(path)
    layers = weighted(network)
    names = [layer.name for layer in layers]
    for name in start.fresh:
        if name not in names:
            near = get_close_matches(name, names, 1)
            told = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(map(repr, names))}."
            raise ConfigError(f"training.start.fresh: no layer {name!r} with weights. {told}")
    taken = [(place, layer) for place, layer in enumerate(layers) if layer.name not in start.fresh]
    if not taken:
        raise ConfigError("training.start.fresh: names every layer with weights, nothing would be taken")
    last = taken[-1][0]
    if len(found) <= last or (len(found) > len(layers) and last == len(layers) - 1):
        advice = "Name the layers in training.start.fresh that shall begin with weights of their own."
        raise ConfigError(f"{path}: has {len(found)} layers with weights, the network has {len(layers)}. {advice}")
    for place, layer in taken:
        take_weights(layer, found[place], f"{path}: layer {place} of those with weights")
    return [layer.name for _, layer in taken]


def _of_dl4j(path: Path) -> list[Weights]:
    try:
        return read_saved(path).weights
    except ManifestError as error:
        raise ConfigError(str(error)) from error


def _of_checkpoint(path: Path) -> list[Weights]:
    """The layers of a best.pt, whose keys are `layers.<number>.<weight>` and `head.<weight>`, in order."""
    saved = read_checkpoint(path, torch.device("cpu"))
    if not isinstance(saved, dict) or not all(isinstance(value, torch.Tensor) for value in saved.values()):
        raise ConfigError(f"{path}: holds more than weights. Give the best.pt of a run.")
    parts = [(_layer_of(key), key) for key in saved]
    return [
        {key.removeprefix(f"{layer}."): saved[key] for _, key in keys}
        for layer, keys in groupby(parts, key=lambda part: part[0])
    ]


def _layer_of(key: str) -> str:
    """The module that a weight belongs to: `layers.0`, `head`, or `head.heads.0` of several output layers."""
    parts = key.split(".")
    depth = next((at + 1 for at, part in enumerate(parts) if part.isdecimal()), 1)
    return ".".join(parts[:depth])
