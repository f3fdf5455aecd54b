"""One long CSV with a series key and a time column, such as hourly weather of three airports.

Every series is put on a regular grid of time. A grid step without a row is absent (mask 0); an empty cell is a
missing reading (NaN); nothing is invented. The label of a step is the target columns `horizon` steps later (of several
horizons: of each one in turn), or the class that stands in the label column.
"""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from datetime import datetime
from difflib import get_close_matches
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stepcast.errors import ConfigError
from stepcast.manifest import Change, Feature, Feedback, Output

from .batch import Batch
from .moments import check_resolution
from .source import Split

Floats = NDArray[np.float32]
Calendar = Literal["hour", "week", "year", "season"]
# Names of the channels a calendar entry makes, and what they are: a client has to make them the same way.
CALENDAR: dict[Calendar, dict[str, str]] = {
    "hour": {f: f"{f}(2 pi hours since 0:00 UTC / 24)" for f in ("sin", "cos")},
    "week": {f: f"{f}(2 pi days since Monday 0:00 UTC / 7)" for f in ("sin", "cos")},
    "year": {f: f"{f}(2 pi days since 1 January 0:00 UTC / 365.25)" for f in ("sin", "cos")},
    "season": {"cos": "cos(2 pi days since 22 December 0:00 UTC / 365.25)"},
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ColumnConfig(_Strict):
    """One column of the file."""

    unit: str = ""
    target: bool = Field(default=False, description="its value `horizon` steps later is to be forecast")
    range: tuple[float, float] | None = Field(default=None, description="readings outside are taken as missing")
    turn: float | None = Field(default=None, gt=0, description="a direction: this much is one full turn")
    missing: Literal["refuse", "mean", "zero", "hold"] = "hold"
    indicator: bool = False
    changes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="steps: a channel for each says how much the reading has changed over so many"
    )

    @model_validator(mode="after")
    def _direction(self) -> Self:
        if self.turn is not None and self.changes:
            raise ValueError("a direction (turn) has no changes")
        if self.turn is not None and self.target:
            raise ValueError("a direction (turn) cannot be a target")
        return self


class TableConfig(_Strict):
    """`data: {kind: table}`."""

    kind: Literal["table"]
    path: Path = Field(description="the CSV file; relative to the configuration file, or inside `package`")
    package: str | None = Field(default=None, description="an installed Python package that carries the file")
    series: str | None = Field(default=None, description="column that tells the series apart; None: there is one")
    time: str
    every: str = Field(description="the grid's step, as pandas writes it: 1h, 15min, 1D")
    columns: dict[str, ColumnConfig] = Field(min_length=1)
    calendar: tuple[Calendar, ...] = Field(
        default=(),
        description="sine and cosine of where the step's time stands in the day, the week, the year; season is the "
        "cosine alone, counted from midwinter: the same in November as in February, so that a model trained on "
        "part of a year meets nothing new in the rest",
    )
    label: str | None = Field(default=None, description="a column of class names; instead of targets")
    classes: tuple[str, ...] | None = Field(
        default=None, min_length=2, description="the classes that `label` may name; default: those it has, sorted"
    )
    horizon: int | tuple[int, ...] = Field(
        default=1, description="how many steps ahead the label of a step is (of a class 0), or a list: a label for each"
    )
    target_scale: Literal["value", "change"] = Field(
        default="value",
        description="what outputs are scaled by; change belongs to `residual: true` in the network",
    )
    validation: datetime = Field(description="first moment of the validation rows; training is all before; UTC")
    test: datetime = Field(description="first moment of the test rows")
    warm_up: int = Field(default=168, ge=0, description="unscored steps before validation and test rows")

    @model_validator(mode="before")
    @classmethod
    def _class_of_now(cls, given: Any) -> Any:
        """A class is told of the step that it stands beside, unless a horizon is set."""
        return {"horizon": 0, **given} if isinstance(given, dict) and given.get("label") else given

    @model_validator(mode="after")
    def _targets(self) -> Self:
        targets = [name for name, column in self.columns.items() if column.target]
        if self.label is None and not targets:
            raise ValueError("columns: none of them has target: true, and there is no label")
        ahead = self.horizons
        if not ahead or ahead[0] < 0 or any(b <= a for a, b in pairwise(ahead)):
            raise ValueError(f"horizon: got {_listed(ahead)}, wanted steps ahead, each more than the one before")
        if self.label is None and (self.classes is not None or not ahead[0]):
            raise ValueError("classes, and a horizon of 0, belong to a label")
        if self.label is not None and isinstance(self.horizon, tuple):
            raise ValueError(f"horizon: got {_listed(ahead)}, but a label has one. Give a number.")
        if self.label is not None and (targets or self.label in self.columns or self.target_scale == "change"):
            raise ValueError(f"label: {self.label!r} stands alone: it is no column, and there are no targets beside it")
        names = [name for name, _, _ in feature_columns(self)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"columns: {', '.join(map(repr, twice))} is also a channel of a turn or of the calendar")
        return self

    @property
    def horizons(self) -> tuple[int, ...]:
        """Steps ahead of the labels, ascending."""
        return self.horizon if isinstance(self.horizon, tuple) else (self.horizon,)

    def open(self, *, batch: int, seed: int, root: Path) -> "TableSource":
        """Read the file; see `SourceConfig.open`."""
        return TableSource(self, batch=batch, seed=seed, root=root)


@dataclass(frozen=True, slots=True)
class Grid:
    """The file on its grid: S series, L steps, C columns; directions still one column."""

    series: tuple[str, ...]
    times: pd.DatetimeIndex  # (L,)
    values: NDArray[np.float64]  # (S, L, C), NaN where missing; behind them the class's index where there are classes
    present: NDArray[np.bool_]  # (S, L), False where the file has no row
    classes: tuple[str, ...] | None = None


class TableSource:
    """See `Source`. `batch` is the number of lanes the training rows are cut into, over all series together."""

    readout: Literal["each"] = "each"

    def __init__(self, config: TableConfig, *, batch: int, seed: int, root: Path) -> None:
        self.config, self.seed = config, seed
        path = _find(config, root)
        self.grid = _read(config, path)
        self.times, self.series = self.grid.times, self.grid.series
        self.lanes = max(1, batch // len(self.series))
        names = list(config.columns)
        self.targets = tuple(name for name, column in config.columns.items() if column.target)
        self.bounds = self._bounds()
        self.x = _features(config, self.grid)  # (S, L, F)
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

    def _bounds(self) -> dict[Split, tuple[int, int]]:
        """First and last + 1 grid step of each split."""
        validation, test = (
            int(self.times.searchsorted(_moment(m))) for m in (self.config.validation, self.config.test)
        )
        if not 0 < validation <= test < len(self.times):
            raise ConfigError(
                f"data: validation {self.config.validation} and test {self.config.test} must lie in this order "
                f"between {self.times[0]} and {self.times[-1]}"
            )
        return {"train": (0, validation), "validation": (validation, test), "test": (test, len(self.times))}

    def _describe_features(self) -> tuple[Feature, ...]:
        """Features with statistics of the training rows."""
        start, stop = self.bounds["train"]
        rows = self.x[:, start:stop]
        features = []
        for index, (name, unit, column) in enumerate(feature_columns(self.config)):
            if column is None or column.turn is not None:  # sines and cosines stay as they are
                missing: Literal["refuse", "mean", "zero", "hold"] = "refuse" if column is None else column.missing
                features.append(Feature(name=name, unit=unit, missing=missing))
            else:
                exact = self.grid.values[:, start:stop, list(self.config.columns).index(name)]
                there = exact[~np.isnan(exact)]
                if there.size:
                    check_resolution(f"feature {name!r}", float(there.mean()), float(there.std()))
                mean, scale = _statistics(rows[..., index], name)
                features.append(
                    Feature(
                        name=name,
                        unit=unit,
                        mean=mean,
                        scale=scale,
                        missing=column.missing,
                        indicator=column.indicator,
                        changes=tuple(_usual_change(rows[..., index], steps, name) for steps in column.changes),
                    )
                )
        return tuple(features)

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
        present = torch.from_numpy(self.grid.present[:, start:stop].copy())
        known = ~torch.isnan(y) & present[..., None]
        mask = known if self.classes is None else known[..., 0]  # of a class all outputs are known, or none
        return Batch(torch.from_numpy(self.x[:, start:stop].copy()), y, present, mask)


def feature_columns(config: TableConfig) -> list[tuple[str, str, ColumnConfig | None]]:
    """Name, unit and column of every feature, in the order of `x`; the calendar, which has no column, comes last."""
    columns: list[tuple[str, str, ColumnConfig | None]] = []
    for name, column in config.columns.items():
        if column.turn is None:
            columns.append((name, column.unit, column))
        else:
            columns += [(f"{name}_{f}", f"{f}(2 pi {name} / {column.turn:g})", column) for f in ("sin", "cos")]
    for period in config.calendar:
        columns += [(f"{period}_{f}", unit, None) for f, unit in CALENDAR[period].items()]
    return columns


def output_name(config: TableConfig, target: str, ahead: int) -> str:
    """What a forecast is called: as its target, unless it is a further one of several, as `temp+6h` is."""
    if isinstance(config.horizon, int) or ahead == 1:
        return target
    step = re.fullmatch(r"(\d+)([A-Za-z]+)", config.every)
    return f"{target}+{ahead * int(step[1])}{step[2]}" if step else f"{target}+{ahead}x{config.every}"


def calendar_angles(times: pd.DatetimeIndex, period: Calendar) -> NDArray[np.float64]:
    """Where moments stand in the day, the week or the year, in radians."""
    day = (times.hour + times.minute / 60 + times.second / 3600) / 24
    part = {
        "hour": day,
        "week": (times.day_of_week + day) / 7,
        "year": (times.day_of_year - 1 + day) / 365.25,
        "season": (times.day_of_year + 9 + day) / 365.25,
    }[period]
    return np.asarray(2 * np.pi * part, dtype=np.float64)


def _features(config: TableConfig, grid: Grid) -> Floats:
    """Everything that stands in `x`, (S, L, F)."""
    parts: list[NDArray[np.float64]] = []
    for index, column in enumerate(config.columns.values()):
        values = grid.values[..., index]
        if column.turn is None:
            parts.append(values)
        else:
            angle = 2 * np.pi * values / column.turn
            parts += [np.sin(angle), np.cos(angle)]
    for period in config.calendar:
        angle = np.broadcast_to(calendar_angles(grid.times, period), grid.present.shape)
        parts += [np.sin(angle) if f == "sin" else np.cos(angle) for f in CALENDAR[period]]
    return np.stack(parts, axis=-1).astype(np.float32)


def _ahead(values: NDArray[np.float64], horizon: int) -> Floats:
    """(S, L, O): what the values are `horizon` steps later; NaN at the end."""
    ahead = np.full_like(values, np.nan)
    ahead[:, : values.shape[1] - horizon] = values[:, horizon:]
    return ahead.astype(np.float32)


def _one_hot(indices: Floats, count: int) -> Floats:
    """(..., O) of class indices (...); a row of NaN where there is none."""
    known = ~np.isnan(indices)
    rows = np.eye(count, dtype=np.float32)[np.where(known, indices, 0).astype(np.int64)]
    return np.where(known[..., None], rows, np.float32(np.nan))


def _listed(numbers: Sequence[int]) -> str:
    return f"[{', '.join(map(str, numbers))}]"


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


def _moment(at: datetime) -> pd.Timestamp:
    moment = pd.Timestamp(at)
    return moment.tz_localize("UTC") if moment.tzinfo is None else moment.tz_convert("UTC")


def _find(config: TableConfig, root: Path) -> Path:
    """The file; a package is located without importing it."""
    if config.package is None:
        return config.path if config.path.is_absolute() else root / config.path
    spec = importlib.util.find_spec(config.package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"data.package: {config.package!r} is not installed. pip install {config.package}")
    return Path(next(iter(spec.submodule_search_locations))) / config.path


def _read(config: TableConfig, path: Path) -> Grid:
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no CSV ({error})") from error
    wanted = [config.time, *config.columns, *filter(None, [config.series, config.label])]
    if absent := [name for name in wanted if name not in frame.columns]:
        raise ConfigError(f"{path}: no column {', '.join(map(repr, absent))} among {', '.join(frame.columns)}")
    times = _times(frame[config.time], path)
    keys = frame[config.series] if config.series else pd.Series([""] * len(frame))
    columns, classes = [_numbers(frame[name], column, path) for name, column in config.columns.items()], None
    if config.label is not None:
        indices, classes = _class_indices(frame[config.label], config.classes, path)
        columns.append(indices)
    grid = _on_grid(config, path, keys.to_numpy(dtype=str), times, np.column_stack(columns))
    return replace(grid, classes=classes)


def _times(column: "pd.Series[str]", path: Path) -> pd.DatetimeIndex:
    times = pd.to_datetime(column, utc=True, errors="coerce", format="ISO8601")
    if times.isna().any():
        row = int(times.isna().to_numpy().argmax())
        raise ConfigError(f"{path}:{row + 2}: column {column.name!r} has {column[row]!r}, wanted a moment in ISO 8601")
    return pd.DatetimeIndex(times)


def _class_indices(
    column: "pd.Series[str]", given: tuple[str, ...] | None, path: Path
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Which class each row names, NaN where its cell is empty; and the classes."""
    text = column.str.strip()
    empty = _empty(text) & ~text.isin(given or ())
    names = given or tuple(sorted(set(text[~empty])))
    if len(names) < 2:
        raise ConfigError(f"{path}: column {column.name!r} names {len(names)} classes, wanted at least 2")
    indices = np.array([names.index(name) if name in names else np.nan for name in text], np.float64)
    wrong = np.isnan(indices) & ~empty.to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        near = get_close_matches(text[row], names, 1)
        told = f"{text[row]!r}" + (f" (nearest: {near[0]!r})" if near else "")
        raise ConfigError(f"{path}:{row + 2}: column {column.name!r} has {told}, wanted one of {', '.join(names)}")
    return indices, names


def _empty(text: "pd.Series[str]") -> "pd.Series[bool]":
    return text.str.lower().isin(["", "na", "nan", "null"])


def _numbers(column: "pd.Series[str]", config: ColumnConfig, path: Path) -> NDArray[np.float64]:
    text = column.str.strip()
    empty = _empty(text)
    numbers = pd.to_numeric(text.mask(empty), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = (np.isnan(numbers) & ~empty.to_numpy()) | np.isinf(numbers)
    if wrong.any():
        row = int(wrong.argmax())
        raise ConfigError(f"{path}:{row + 2}: column {column.name!r} has {column[row]!r}, wanted a number")
    if config.range is not None:
        low, high = config.range
        numbers = np.where((numbers < low) | (numbers > high), np.nan, numbers)
    return numbers


def _on_grid(
    config: TableConfig,
    path: Path,
    keys: NDArray[np.str_],
    times: pd.DatetimeIndex,
    values: NDArray[np.float64],
) -> Grid:
    """Scatter the rows onto the grid; a row between two grid steps or a second row for one step is an error."""
    step = pd.Timedelta(config.every)
    first = times.min()
    offsets = (times - first) / step
    at = np.asarray(np.round(offsets), dtype=np.int64)
    if (off := np.abs(offsets - at) > 1e-6).any():
        row = int(np.argmax(off))
        raise ConfigError(f"{path}:{row + 2}: {times[row]} is not on the grid of {config.every} from {first}")
    series, which = np.unique(keys, return_inverse=True)
    twice = pd.DataFrame({"series": which, "at": at}).duplicated().to_numpy()
    if twice.any():
        row = int(twice.argmax())
        raise ConfigError(f"{path}:{row + 2}: a second row of series {str(keys[row])!r} at {times[row]}")
    n_steps = int(at.max()) + 1
    grid = np.full((len(series), n_steps, values.shape[1]), np.nan)
    present = np.zeros((len(series), n_steps), dtype=np.bool_)
    grid[which, at], present[which, at] = values, True
    return Grid(tuple(map(str, series)), pd.date_range(first, periods=n_steps, freq=step), grid, present)
