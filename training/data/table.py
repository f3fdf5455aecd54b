"""One long CSV or Parquet file with a series key and a time column, such as hourly weather of three airports.

Every series is put on a regular grid of time. A grid step without a row is absent (mask 0); an empty cell is a
missing reading (NaN); nothing is invented. The label of a step is the target columns `horizon` steps later (of several
horizons: of each one in turn), or the class that stands in the label column.
"""

import math
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from stepcast.calendars import Calendar
from stepcast.errors import ConfigError
from stepcast.manifest import CalendarChannel, Change, Feature, Feedback, Output
from stepcast.tables import line, of_direction

from .batch import Batch
from .moments import check_resolution
from .source import Split
from .table_config import Channel, TableConfig, channels, output_name
from .table_file import Grid, find, moment, read

Floats = NDArray[np.float32]


class TableSource:
    """See `Source`. `batch` is the number of lanes the training rows are cut into, over all series together."""

    readout: Literal["each"] = "each"

    def __init__(self, config: TableConfig, *, batch: int, seed: int, root: Path) -> None:
        self.config, self.seed = config, seed
        path = find(config, root)
        self.grid = read(config, path, root)
        self.times, self.series = self.grid.times, self.grid.series
        self.lanes = max(1, batch // len(self.series))
        names = list(config.columns)
        self.targets = tuple(name for name, column in config.columns.items() if column.target)
        self.bounds = self._bounds()
        self.every_s = pd.Timedelta(config.every).total_seconds()
        self.channels = channels(config)
        self.x = _features(config, self.grid, self.channels, self.every_s)  # (S, L, F)
        self.present = self._runnable(path)
        self.classes = self.grid.classes
        self.task: Literal["regression", "classification"] = "classification" if self.classes else "regression"
        labels = [names.index(t) for t in self.targets] if self.classes is None else [len(names)]
        self.horizons = config.horizons
        values = self.grid.values[..., labels]
        self.y = np.concatenate([_ahead(values, ahead) for ahead in self.horizons], axis=-1)  # (S, L, O)
        if self.classes is not None:
            self.y = _one_hot(self.y[..., 0], len(self.classes))
        self.ahead = np.repeat(self.horizons, self.y.shape[-1] // len(self.horizons))  # (O,) steps, of every label
        self.description = f"{path.name}: {len(self.series)} series, {len(self.times)} steps of {config.every}"
        self.features = self._describe_features()
        self.outputs = self._describe_outputs()
        self.feedback = tuple(Feedback(source=t, feature=t) for t in self.targets if 1 in self.horizons)

    def between(self, bounds: dict[Split, tuple[int, int]]) -> "TableSource":
        """The same table with other splits, and what is described by its training rows described anew."""
        other = copy(self)
        other.bounds = bounds
        other.features = other._describe_features()
        other.outputs = other._describe_outputs()
        return other

    def folds(self, count: int) -> Iterator[tuple["TableSource", "TableSource"]]:
        """The training rows without one of `count` stretches of time, and a source whose test rows it is, in turn.

        Without it means without its labels, those of steps before it included. Its readings are still read.

        Raises:
            ConfigError: there are fewer training steps.
        """
        start, stop = self.bounds["train"]
        cuts = np.linspace(start, stop, count + 1).astype(int).tolist()
        if len(set(cuts)) <= count:
            raise ConfigError(f"training.folds: {count}, there are {stop - start} training steps")
        for first, last in pairwise(cuts):
            rest = copy(self)
            rest.y = self.y.copy()
            for index, ahead in enumerate(self.ahead):
                rest.y[:, max(0, first - ahead) : last, index] = np.nan
            yield rest, self.between({**self.bounds, "test": (first, last)})

    def _bounds(self) -> dict[Split, tuple[int, int]]:
        """First and last + 1 grid step of each split."""
        validation, test = (int(self.times.searchsorted(moment(m))) for m in (self.config.validation, self.config.test))
        if not 0 < validation <= test < len(self.times):
            raise ConfigError(
                f"data: validation {self.config.validation} and test {self.config.test} must lie in this order "
                f"between {self.times[0]} and {self.times[-1]}"
            )
        return {"train": (0, validation), "validation": (validation, test), "test": (test, len(self.times))}

    def _runnable(self, path: Path) -> NDArray[np.bool_]:
        """(S, L), where a step has a row, and what is known of its future lies in the file.

        Raises:
            ConfigError: a reading that may not be missing is.
        """
        present = self.grid.present.copy()
        for place, channel in enumerate(self.channels):
            if channel.source is None or channel.source[1].missing != "refuse":
                continue
            steps = len(self.times) - channel.ahead
            present[:, steps:] = False
            if (lacking := present & np.isnan(self.x[..., place])).any():
                series, step = np.argwhere(lacking)[0]
                later = f" {channel.ahead} steps later" if channel.ahead else ""
                where = line(path, int(self.grid.rows[series, step]))
                raise ConfigError(
                    f"{where}: column {channel.source[0]!r} is empty{later}, and may not "
                    "be missing. Fill it, or set missing: hold."
                )
        return present

    def _describe_features(self) -> tuple[Feature, ...]:
        """Features with statistics of the training rows."""
        return tuple(self._describe(place, channel) for place, channel in enumerate(self.channels))

    def _describe(self, place: int, channel: Channel) -> Feature:
        given: dict[str, Any] = {"name": channel.name, "unit": channel.unit, "ahead": channel.ahead}
        if channel.source is None:
            return Feature(**given, calendar=channel.calendar)
        name, column = channel.source
        given |= {"missing": column.missing, "known": column.known, "static": column.static}
        if column.named:
            categories = self.grid.categories[name]
            size = column.embedding or usual_size(len(categories))
            given |= {"categories": categories, "embedding": size, "indicator": column.indicator}
        elif column.turn is None:  # sines and cosines stay as they are
            start, stop = self.bounds["train"]
            exact = self.grid.values[:, start:stop, list(self.config.columns).index(name)]
            there = exact[~np.isnan(exact)]
            if there.size:
                check_resolution(f"feature {name!r}", float(there.mean()), float(there.std()))
            rows = self.x[:, start:stop, place]
            mean, scale = _statistics(rows, name)
            changes = tuple(_usual_change(rows, steps, name) for steps in column.changes)
            given |= {"mean": mean, "scale": scale, "indicator": column.indicator, "changes": changes}
        return Feature(**given)

    def _describe_outputs(self) -> tuple[Output, ...]:
        if self.classes is not None:
            return tuple(Output(name=name) for name in self.classes)
        names, changes = [f.name for f in self.features], self.config.target_scale == "change"
        outputs = []
        for index, (ahead, target) in enumerate(product(self.horizons, self.targets)):
            start, stop = self.bounds["train"]
            stop = max(start, stop - ahead)  # the last labels of training are training rows themselves
            labels = self.y[:, start:stop, index]
            now = self.x[:, start:stop, names.index(target)]
            mean, scale = _statistics(labels - now if changes else labels, target)
            outputs.append(
                Output(
                    name=output_name(self.config, target, ahead),
                    unit=self.config.columns[target].unit,
                    mean=0.0 if changes else mean,
                    scale=scale,
                    target=None if isinstance(self.config.horizon, int) else target,
                    ahead=None if isinstance(self.config.horizon, int) else ahead,
                )
            )
        return tuple(outputs)

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        """One batch: the lanes of the training rows, or one row per series behind a warm-up without labels."""
        start, stop = self.bounds[split]
        if stop - start <= self.horizons[0]:
            return
        yield self._lanes(start, stop, epoch) if split == "train" else self.window(start, stop)

    def window(self, start: int, stop: int) -> Batch:
        """Grid steps [start, stop) of every series, the warm-up before them; labels beyond `stop` are not used."""
        first = max(0, start - self.config.warm_up)
        batch = self._cut(first, stop, stop)
        assert batch.y_mask is not None
        batch.y_mask[:, : start - first] = False
        return batch

    def _lanes(self, start: int, stop: int, epoch: int) -> Batch:
        """Contiguous lanes side by side, (series * lanes, steps, F); where they are cut moves with every epoch."""
        steps = (stop - start) // self.lanes
        shift = int(np.random.default_rng([self.seed, epoch]).integers(0, max(1, steps // 4)))
        steps = (stop - start - shift) // self.lanes
        cuts = [self._cut(at, at + steps, stop) for at in range(start + shift, stop - steps + 1, steps)]
        return Batch(
            torch.cat([c.x for c in cuts]),
            torch.cat([c.y for c in cuts]),
            torch.cat([c.x_mask for c in cuts if c.x_mask is not None]),
            torch.cat([c.y_mask for c in cuts if c.y_mask is not None]),
        )

    def _cut(self, start: int, stop: int, end: int) -> Batch:
        """Grid steps [start, stop) of every series; labels at or behind step `end` are of the next split."""
        y = torch.from_numpy(self.y[:, start:stop].copy())  # (S, T, O)
        beyond = np.arange(start, stop)[:, None] + self.ahead >= end  # (T, O)
        y[:, torch.from_numpy(beyond)] = torch.nan
        present = torch.from_numpy(self.present[:, start:stop].copy())
        known = ~torch.isnan(y) & present[..., None]
        mask = known if self.classes is None else known[..., 0]  # of a class all outputs are known, or none
        return Batch(torch.from_numpy(self.x[:, start:stop].copy()), y, present, mask)


def usual_size(categories: int) -> int:
    """Values of a category's vector: fastai's rule, round(1.6 n^0.56) and at most 100, of n with the unknown one."""
    return min(100, round(1.6 * math.pow(categories + 1, 0.56)))


def _features(config: TableConfig, grid: Grid, features: tuple[Channel, ...], every_s: float) -> Floats:
    """Everything that stands in `x`, (S, L, F)."""
    names = list(config.columns)
    x = np.empty((*grid.rows.shape, len(features)), np.float32)
    dated = [(channel.calendar, channel.ahead * every_s) for channel in features if channel.calendar is not None]
    x[..., len(features) - len(dated) :] = _calendar(dated, grid.times)
    for place, channel in enumerate(features):
        if channel.source is None:
            continue
        name, column = channel.source
        values = grid.values[..., names.index(name)]  # (S, L)
        if column.turn is not None:
            values = of_direction(values, column.turn, channel.wave or "sin")
        x[..., place] = _ahead(values, channel.ahead)
    return x


def _calendar(dated: Sequence[tuple[CalendarChannel, float]], times: pd.DatetimeIndex) -> Floats:
    """What the calendar says of every step, (L, C): by the function that the service has it from."""
    try:
        calendar = Calendar(dated)
    except ConfigError as error:
        raise ConfigError(f"data.calendar: {error}") from error
    seconds = np.asarray((times - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1), np.float64)
    return calendar.columns(seconds)


def _ahead(values: NDArray[np.float64], horizon: int) -> Floats:
    """(S, L, ...): what the values are `horizon` steps later; NaN at the end."""
    ahead = np.full_like(values, np.nan)
    ahead[:, : values.shape[1] - horizon] = values[:, horizon:]
    return ahead.astype(np.float32)


def _one_hot(indices: Floats, count: int) -> Floats:
    """(..., O) of class indices (...); a row of NaN where there is none."""
    known = ~np.isnan(indices)
    rows = np.eye(count, dtype=np.float32)[np.where(known, indices, 0).astype(np.int64)]
    return np.where(known[..., None], rows, np.float32(np.nan))


def _usual_change(rows: Floats, steps: int, name: str) -> Change:
    """How much a reading (S, L) deviates from the one so many steps before."""
    if steps >= rows.shape[1]:
        raise ConfigError(f"data.columns.{name}.changes: {steps} steps, the training rows are {rows.shape[1]}")
    return Change(steps=steps, scale=_statistics(rows[:, steps:] - rows[:, :-steps], name)[1])


def _statistics(values: Floats, name: str) -> tuple[float, float]:
    """Mean and population standard deviation of what is there."""
    there = values[~np.isnan(values)].astype(np.float64)
    if there.size == 0:
        raise ConfigError(f"data.columns.{name}: no reading in the training rows")
    return float(there.mean()), float(there.std()) or 1.0
