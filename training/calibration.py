"""Recalibration: distributions become as wide as the network's errors on rows that it has not learned from.

A network is surer of what it has seen. After training, the spread of each output's distribution, so of each target at
each horizon, is multiplied by the factor with the least mean CRPS on held-out rows (Gneiting et al., Calibrated
Probabilistic Forecasting Using Ensemble Model Output Statistics and Minimum CRPS Estimation, 2005). The factors become
part of the graph, so that server, golden file, rollouts and backtests know nothing of them. Point forecasts stay.

Letters: R rows, K targets, P parameters of a target.
"""

import tempfile
from collections.abc import Callable
from math import log
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stepcast.errors import ConfigError
from stepcast.predictive import Predictive

from .config import Config
from .data.source import Source, Split
from .data.table import TableSource
from .evaluate import answers
from .export import stage, state_tensors
from .job import fit_anew
from .layers.output import Head
from .metrics import presence
from .network import Network
from .probabilistic import crps
from .stepper import Floats, Stepper

Doubles = NDArray[np.float64]
Rows = tuple[Floats, Floats, NDArray[np.bool_]]  # outputs (R, O), labels (R, K), which of them count (R, K)

WIDEST = 32.0
"""A factor lies between this and its inverse."""
TURNS = 30
"""Of the search: each leaves 0.618 of the interval, all of them four parts in a million of a factor."""
GOLDEN = 0.5 * (5**0.5 - 1)
PLACES = 4  # of a factor, in the graph as in the manifest


def calibrate(
    network: Network, source: Source, config: Config, told: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """Stretch a network's distributions as `training.calibrate` says; without it nothing is done.

    Args:
        network: Trained, on the CPU; its factors are set in place, whatever they were before.
        source: What it was trained on.
        config: Of the run.
        told: Takes a line on what is being done.

    Returns:
        The factor of each target, by its name.

    Raises:
        ConfigError: a target has no label on the held-out rows.
    """
    if config.training.calibrate is None:
        return {}
    if config.training.calibrate == "validation":
        parts = [_held_out(network, source, "validation")]
    else:
        assert isinstance(source, TableSource)  # see check_held_out
        parts = [_by_another(config, *fold, told) for fold in source.folds(config.training.folds)]
    outputs, labels, there = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    names = [output.name for output in network.head.outputs]
    factors: dict[str, float] = {}
    for head, places in network.head.tasks():
        columns = [names.index(output.name) for output in head.outputs]
        found = fitted(head, outputs[:, columns], labels[:, places], there[:, places])
        head.stretch = torch.from_numpy(found).to(head.stretch)
        factors |= zip([source.outputs[place].name for place in places], found.tolist(), strict=True)
    told(f"spread of distributions times {min(factors.values()):.3g} to {max(factors.values()):.3g}")
    return factors


def fitted(head: Head, outputs: Floats, labels: Floats, there: NDArray[np.bool_]) -> Doubles:
    """The factors (K,) between 1 / `WIDEST` and `WIDEST` with the least mean CRPS.

    Of a distribution that is stretched about its point forecast, CRPS is a convex function of the factor: a mean of
    |k x - e| over draws x, minus k times a constant. So golden sections find the least.

    Args:
        head: Whose distributions they are.
        outputs: (R, P * K) of the head, not stretched.
        labels: (R, K).
        there: (R, K), which of them count.

    Raises:
        ConfigError: of a target none does.
    """
    distribution, described = head.loss.distribution, head.described
    assert distribution is not None
    assert described is not None
    count = there.sum(axis=0)
    if not count.all():
        name = head.outputs[int(count.argmin())].name
        raise ConfigError(f"training.calibrate: output {name!r} has no label on the held-out rows")
    predictive, truth = Predictive(head.outputs, described), np.where(there, labels, 0.0)
    given = torch.from_numpy(outputs.astype(np.float64))

    def cost(factors: Doubles) -> Doubles:
        stretched = distribution.stretched(given, torch.from_numpy(factors)).numpy()
        scores = crps(described, predictive.parameters(stretched), truth)
        return np.asarray(np.where(there, scores, 0.0).sum(axis=0) / count)

    low, high = np.full(len(count), -log(WIDEST)), np.full(len(count), log(WIDEST))
    for _ in range(TURNS):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        falls = cost(np.exp(left)) > cost(np.exp(right))
        low, high = np.where(falls, left, low), np.where(falls, high, right)
    return np.asarray(np.exp((low + high) / 2).round(PLACES))


def _by_another(config: Config, rest: TableSource, block: TableSource, told: Callable[[str], None]) -> Rows:
    """What a network that has not learned from a block of the training rows says of it."""
    network, history = fit_anew(config, rest)
    start, stop = block.bounds["test"]
    told(f"held out {block.times[start]} to {block.times[stop - 1]}: best epoch {history.best_epoch + 1}")
    return _held_out(network, block, "test")


def _held_out(network: Network, source: Source, split: Split) -> Rows:
    """The labelled rows of a split and what the network says of them, not stretched and as it is served."""
    for head, _ in network.head.tasks():
        head.stretch = torch.ones_like(head.stretch)
    summary = network.summary or source.readout == "last"
    parts: list[Rows] = []
    with tempfile.TemporaryDirectory(prefix="stepcast-calibrate-") as scratch:
        stepper = Stepper(stage(network, source, Path(scratch)), state_tensors(network))
        for batch, y in answers(stepper, source, split, streaming=network.streaming, summary=summary):
            mask = None if batch.y_mask is None else batch.y_mask.numpy()
            there = presence(mask, tuple(batch.y.shape))
            rows = there.any(axis=-1)
            parts.append((y[rows], batch.y.numpy()[rows], there[rows]))
    outputs, labels, there = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return outputs, labels, there
