"""A table's file on its grid of time: which row stands where, numbers and names out of cells, errors with their row."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import is_datetime64_any_dtype, is_numeric_dtype

from stepcast.errors import ConfigError
from stepcast.tables import MISSING, is_parquet, line, within

from .table_config import ColumnConfig, TableConfig

MOST_CATEGORIES: Final = 1000
"""That a column may have without listing them: more are rather numbers, or keys."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The file on its grid: S series, L steps, C columns; directions still one column, names as indices from 1.

    Attributes:
        rows: The file's row (from 0) of each step, -1 where it has none.
        categories: The names of each column that has names.
    """

    series: tuple[str, ...]
    times: pd.DatetimeIndex  # (L,)
    values: NDArray[np.float64]  # (S, L, C), NaN where missing; behind them the class's index where there are classes
    rows: NDArray[np.int64]  # (S, L)
    classes: tuple[str, ...] | None = None
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def present(self) -> NDArray[np.bool_]:
        """(S, L), False where the file has no row."""
        return self.rows >= 0


@dataclass(frozen=True)
class _Cells:
    """A column, and how to say where one of its cells stands.

    Attributes:
        column: Text of a CSV; numbers, moments or text of a Parquet file, which keeps types.
    """

    name: str
    column: "pd.Series[Any]"
    where: Callable[[int], str]

    @cached_property
    def text(self) -> "pd.Series[str]":
        """Stripped, and "" where nothing stands."""
        there = self.column.notna()
        return self.column.astype(object).map(str).where(there, "").astype(str).str.strip()

    @cached_property
    def empty(self) -> "pd.Series[bool]":
        if is_numeric_dtype(self.column) or is_datetime64_any_dtype(self.column):
            return self.column.isna()
        return self.text.str.lower().isin(MISSING)

    @cached_property
    def numbers(self) -> NDArray[np.float64]:
        """NaN where nothing stands, or no number."""
        column = self.column if is_numeric_dtype(self.column) else self.text.mask(self.empty)
        return pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)

    def wrong(self, row: int, wanted: str) -> ConfigError:
        """What is wrong with a cell."""
        return ConfigError(f"{self.where(row)} has {self.text.iloc[row]!r}, wanted {wanted}")


def moment(at: datetime) -> pd.Timestamp:
    """A moment of a configuration, in UTC if it does not say."""
    stamp = pd.Timestamp(at)
    return stamp.tz_localize("UTC") if stamp.tzinfo is None else stamp.tz_convert("UTC")


def find(config: TableConfig, root: Path) -> Path:
    """The file; a package is located without importing it."""
    if config.package is None:
        return _below(root, config.path)
    spec = importlib.util.find_spec(config.package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"data.package: {config.package!r} is not installed. pip install {config.package}")
    return Path(next(iter(spec.submodule_search_locations))) / config.path


def read(config: TableConfig, path: Path, root: Path) -> Grid:
    """Read the file, and the second ones of static columns, which are relative to `root`.

    Raises:
        ConfigError: it cannot be read, lacks a column, has a wrong cell, or rows that are not on the grid.
    """
    in_file = [name for name, column in config.columns.items() if column.values is None]
    frame = _frame(path, [config.time, *in_file, *filter(None, [config.series, config.label])])
    times = _times(_cells(frame, config.time, path))
    keys = frame[config.series].astype(str).to_numpy(dtype=str) if config.series else np.full(len(frame), "")
    series = np.unique(keys)
    columns: list[NDArray[np.float64]] = []
    statics: dict[int, NDArray[np.float64]] = {}  # (S,) by column
    categories: dict[str, tuple[str, ...]] = {}
    for place, (name, column) in enumerate(config.columns.items()):
        by_series = column.values is not None
        cells = _by_series(config, name, series, root) if by_series else _cells(frame, name, path)
        if column.named:
            among = np.ones(len(cells.text), np.bool_) if by_series else np.asarray(times < moment(config.validation))
            categories[name] = _categories(cells, column, among)
            values = _indices(cells, categories[name])
        else:
            values = _numbers(cells, column)
        if column.static:
            statics[place] = values if by_series else _constant(cells, values, keys)
        columns.append(np.full(len(frame), np.nan) if column.static else values)
    classes = None
    if config.label is not None:
        indices, classes = _class_indices(_cells(frame, config.label, path), config.classes, path)
        columns.append(indices)
    grid = _on_grid(config, path, keys, times, np.column_stack(columns))
    for place, each in statics.items():
        grid.values[:, :, place] = each[:, None]
    return replace(grid, classes=classes, categories=categories)


def _below(root: Path, path: Path) -> Path:
    return path if path.is_absolute() else root / path


def _frame(path: Path, wanted: Sequence[str]) -> pd.DataFrame:
    """A table with the columns that are wanted: of a CSV as text, of a Parquet file by their types."""
    return _typed(path, wanted) if is_parquet(path) else _text(path, wanted)


def _text(path: Path, wanted: Sequence[str]) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no CSV ({error})") from error
    _check_columns(path, wanted, [str(name) for name in frame.columns])
    return frame


def _typed(path: Path, wanted: Sequence[str]) -> pd.DataFrame:
    parquet = _parquet()
    try:
        with path.open("rb") as file:
            _check_columns(path, wanted, parquet.read_schema(file).names)
            table = parquet.read_table(file, columns=list(wanted))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, NotImplementedError) as error:  # of which pyarrow's are made
        raise ConfigError(f"{path}: no Parquet file ({error})") from error
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    for name in frame.select_dtypes("category"):  # names that the file keeps once
        frame[name] = frame[name].astype(object)
    return frame


def _parquet() -> Any:
    try:
        from pyarrow import parquet  # an extra of its own: CSV needs none of it
    except ImportError as error:
        raise ConfigError("a Parquet table needs pyarrow. pip install 'stepcast[parquet]'") from error
    return parquet


def _check_columns(path: Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    if absent := [name for name in wanted if name not in there]:
        near = get_close_matches(absent[0], there, 1)
        told = f" (nearest: {near[0]!r})" if near else ""
        raise ConfigError(f"{path}: no column {', '.join(map(repr, absent))}{told} among {', '.join(there)}")


def _cells(frame: pd.DataFrame, name: str, path: Path) -> _Cells:
    return _Cells(name, frame[name], lambda row: f"{line(path, row)}: column {name!r}")


def _by_series(config: TableConfig, name: str, series: NDArray[np.str_], root: Path) -> _Cells:
    """What a static column has for each series, from the recipe or a file of its own."""
    given = config.columns[name].values
    if isinstance(given, Path):
        path = _below(root, given)
        frame = _frame(path, [str(config.series), name])
        known = [str(key) for key in frame[str(config.series)]]
        if twice := sorted({key for key in known if known.count(key) > 1}):
            raise ConfigError(f"{path}: a second row of series {twice[0]!r}")
        cells, place = _cells(frame, name, path), {key: row for row, key in enumerate(known)}
    else:
        told = {str(key): value for key, value in (given or {}).items()}
        texts = pd.Series([str(value) for value in told.values()], dtype=str)
        inside, keys = f"data.columns.{name}.values", list(told)
        cells, place = _Cells(name, texts, lambda row: f"{inside}.{keys[row]}"), {key: i for i, key in enumerate(keys)}
        path = Path(inside)
    if absent := [str(key) for key in series if key not in place]:
        raise ConfigError(f"{path}: nothing of series {', '.join(map(repr, absent[:8]))}. Say what {name!r} is there.")
    rows = [place[str(key)] for key in series]
    return _Cells(name, cells.column.iloc[rows].reset_index(drop=True), lambda at: cells.where(rows[at]))


def _times(cells: _Cells) -> pd.DatetimeIndex:
    typed = is_datetime64_any_dtype(cells.column)
    times = pd.to_datetime(cells.column if typed else cells.text, utc=True, errors="coerce", format="ISO8601")
    if times.isna().any():
        raise cells.wrong(int(times.isna().to_numpy().argmax()), "a moment in ISO 8601")
    return pd.DatetimeIndex(times)


def _numbers(cells: _Cells, config: ColumnConfig) -> NDArray[np.float64]:
    numbers = cells.numbers
    wrong = (np.isnan(numbers) & ~cells.empty.to_numpy()) | np.isinf(numbers)
    if wrong.any():
        raise cells.wrong(int(wrong.argmax()), "a number")
    if config.range is not None:
        numbers = within(numbers, config.range)
    return numbers


def _constant(cells: _Cells, values: NDArray[np.float64], keys: NDArray[np.str_]) -> NDArray[np.float64]:
    """What a static column has for each series (S,), NaN where all of its cells are empty."""
    by_series = pd.Series(values).groupby(keys, sort=True)
    first = by_series.transform("first").to_numpy()
    if (other := ~np.isnan(values) & (values != first)).any():
        row = int(other.argmax())
        before = int(np.argmax((keys == keys[row]) & ~np.isnan(values)))
        first_at = cells.where(before).rpartition(": column")[0].rpartition("/")[2]  # the file's name and its line
        told = f"{cells.text.iloc[before]!r} as in {first_at}: it is static, and of series {str(keys[row])!r}"
        raise cells.wrong(row, told)
    return np.asarray(by_series.first(), np.float64)


def _categories(cells: _Cells, config: ColumnConfig, among: NDArray[np.bool_]) -> tuple[str, ...]:
    """The names of a column: those that are listed, or those that the training rows have."""
    met = set(cells.text[among & ~cells.empty.to_numpy()])
    if config.categories is not None:
        if not met & {*config.categories}:
            got = ", ".join(map(repr, sorted(met)[:8])) or "none"
            raise ConfigError(f"data.columns.{cells.name}.categories: the training rows have none of them, but {got}")
        return config.categories
    if not met:
        raise ConfigError(f"data.columns.{cells.name}: no category in the training rows")
    if len(met) > MOST_CATEGORIES:
        raise ConfigError(
            f"data.columns.{cells.name}: {len(met)} categories in the training rows (limit {MOST_CATEGORIES}). If it "
            "is no column of numbers, list those that matter: categories: [..]."
        )
    return tuple(sorted(met))


def _indices(cells: _Cells, categories: Sequence[str]) -> NDArray[np.float64]:
    """Names as indices from 1, 0 for one that is none of them, NaN where the cell is empty."""
    places = {name: float(index) for index, name in enumerate(categories, 1)}
    found = cells.text.map(places).fillna(0.0).to_numpy(dtype=np.float64)
    empty = cells.empty.to_numpy() & ~cells.text.isin(categories).to_numpy()
    return np.where(empty, np.nan, found)


def _class_indices(
    cells: _Cells, given: tuple[str, ...] | None, path: Path
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Which class each row names, NaN where its cell is empty; and the classes."""
    text = cells.text
    empty = cells.empty & ~text.isin(given or ())
    names = given or tuple(sorted(set(text[~empty])))
    if len(names) < 2:
        raise ConfigError(f"{path}: column {cells.name!r} names {len(names)} classes, wanted at least 2")
    indices = np.array([names.index(name) if name in names else np.nan for name in text], np.float64)
    wrong = np.isnan(indices) & ~empty.to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        near = get_close_matches(text[row], names, 1)
        told = f"{text[row]!r}" + (f" (nearest: {near[0]!r})" if near else "")
        raise ConfigError(f"{cells.where(row)} has {told}, wanted one of {', '.join(names)}")
    return indices, names


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
        raise ConfigError(f"{line(path, row)}: {times[row]} is not on the grid of {config.every} from {first}")
    series, which = np.unique(keys, return_inverse=True)
    twice = pd.DataFrame({"series": which, "at": at}).duplicated().to_numpy()
    if twice.any():
        row = int(twice.argmax())
        raise ConfigError(f"{line(path, row)}: a second row of series {str(keys[row])!r} at {times[row]}")
    n_steps = int(at.max()) + 1
    grid = np.full((len(series), n_steps, values.shape[1]), np.nan)
    rows = np.full((len(series), n_steps), -1, np.int64)
    grid[which, at], rows[which, at] = values, np.arange(len(at))
    return Grid(tuple(map(str, series)), pd.date_range(first, periods=n_steps, freq=step), grid, rows)
