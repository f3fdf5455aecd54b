"""What a CSV of readings is: its time column, its series, its sampling, its numbers and gaps."""

import csv
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from ..arguments import nearest
from ..errors import ConfigError
from ..tables import MISSING

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_UNITS: Final = (("D", 86_400_000_000), ("h", 3_600_000_000), ("min", 60_000_000), ("s", 1_000_000), ("ms", 1000))
_LABELS: Final = 20
_SPARSE: Final = 50
_NUMBER: Final = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


@dataclass
class Column:
    """One column.

    Attributes:
        numeric: Each cell that is not empty is a finite number.
        values: How often each value occurs, while they are few.
    """

    name: str
    numeric: bool = True
    empty: int = 0
    low: float = math.inf
    high: float = -math.inf
    values: Counter[str] = field(default_factory=Counter)

    def add(self, cell: str) -> None:
        """Look at a cell."""
        if cell.strip().lower() in MISSING:
            self.empty += 1
            return
        if len(self.values) <= _LABELS:
            self.values[cell] += 1
        if _NUMBER.fullmatch(cell) and math.isfinite(value := float(cell)):
            self.low, self.high = min(self.low, value), max(self.high, value)
        else:
            self.numeric = False

    @property
    def constant(self) -> bool:
        """It has at most one value."""
        return len(self.values) <= 1

    @property
    def labels(self) -> list[str]:
        """The few values of a column that looks like a label; none where it does not."""
        few = 2 <= len(self.values) <= _LABELS
        whole = all(re.fullmatch(r"\d+", value.strip()) for value in self.values)
        return sorted(self.values) if few and (not self.numeric or whole) else []


@dataclass(frozen=True)
class Look:
    """What was seen.

    Attributes:
        time, series: Names of these columns; no series: there is one.
        every_us: The grid's step, microseconds: all rows lie on it.
        steps: Of the grid, from the first row to the last.
        absent: Steps of the grid, over all series, that have no row.
    """

    path: Path
    rows: int
    time: str
    series: str | None
    keys: tuple[str, ...]
    first: datetime
    every_us: int
    steps: int
    absent: int
    columns: tuple[Column, ...]

    @property
    def every(self) -> str:
        """The grid's step as pandas writes it."""
        return next((f"{self.every_us // us}{unit}" for unit, us in _UNITS if self.every_us % us == 0), self._us)

    @property
    def _us(self) -> str:
        return f"{self.every_us}us"

    def moment(self, step: int) -> datetime:
        """When a step of the grid is."""
        return self.first + timedelta(microseconds=step * self.every_us)


def look(path: Path, time: str | None = None, series: str | None = None) -> Look:
    """Look at a CSV.

    Args:
        path: The file; its first line names the columns.
        time: The time column; by default the first whose cells are all moments in ISO 8601.
        series: The column that tells series apart; by default one is looked for where a moment occurs twice.

    Raises:
        ConfigError: it cannot be read, has no time column, or its rows lie on no grid.
    """
    header, rows = _read(path)
    time_at = _named(header, time, path) if time is not None else _time_column(header, rows, path)
    moments = _moments(rows, time_at, header[time_at], path)
    series_at = _named(header, series, path) if series is not None else _series_column(header, rows, time_at, moments)
    keys = [row[series_at] for row in rows] if series_at is not None else [""] * len(rows)
    _no_twice(keys, moments, header, time_at, path)
    first = min(moments)
    every_us = math.gcd(*((moment - first) // _MICROSECOND for moment in moments))
    if not every_us:
        raise ConfigError(f"{path}: all rows are of one moment, {first.isoformat()}")
    steps = (max(moments) - first) // _MICROSECOND // every_us + 1
    if steps * len(set(keys)) > _SPARSE * len(rows):
        raise ConfigError(
            f"{path}: the {len(rows)} moments of {header[time_at]!r} lie on no grid (the widest that holds all "
            f"has {steps} steps of {timedelta(microseconds=every_us)}). Resample the file first."
        )
    columns = [Column(name) for name in header]
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            column.add(cell)
    readings = tuple(column for at, column in enumerate(columns) if at not in (time_at, series_at))
    absent = steps * len(set(keys)) - len(rows)
    name = None if series_at is None else header[series_at]
    return Look(
        path, len(rows), header[time_at], name, tuple(sorted(set(keys))), first, every_us, steps, absent, readings
    )


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: no CSV ({error})") from error
    if len(rows) < 2:
        raise ConfigError(f"{path}: {len(rows)} lines, wanted a line of names and rows of readings")
    header = rows[0]
    if twice := [name for name, times in Counter(header).items() if times > 1]:
        raise ConfigError(f"{path}:1: column {twice[0]!r} is named twice")
    for at, row in enumerate(rows):
        if len(row) != len(header):
            raise ConfigError(f"{path}:{at + 1}: {len(row)} cells, the first line names {len(header)}")
    return header, rows[1:]


def _named(header: Sequence[str], name: str, path: Path) -> int:
    if name not in header:
        raise ConfigError(f"{path}: no column {name!r} among {', '.join(header)}.{nearest(name, header)}")
    return list(header).index(name)


def moment(cell: str) -> datetime | None:
    """A moment in ISO 8601, in UTC where it names no zone; None: it is none."""
    try:
        at = datetime.fromisoformat(cell.strip())
    except ValueError:
        return None
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _time_column(header: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> int:
    for at in range(len(header)):
        cells = (row[at] for row in rows)
        if all(re.match(r"\s*\d{4}-\d", cell) and moment(cell) is not None for cell in cells):
            return at
    raise ConfigError(
        f"{path}: no column is a time (moments in ISO 8601, as 2026-01-31T18:00) among {', '.join(header)}. "
        "Write the time so, or name its column: --time"
    )


def _moments(rows: Sequence[Sequence[str]], at: int, name: str, path: Path) -> list[datetime]:
    moments = []
    for number, row in enumerate(rows):
        found = moment(row[at])
        if found is None:
            raise ConfigError(f"{path}:{number + 2}: column {name!r} has {row[at]!r}, wanted a moment in ISO 8601")
        moments.append(found)
    return moments


def _series_column(
    header: Sequence[str], rows: Sequence[Sequence[str]], time_at: int, moments: Sequence[datetime]
) -> int | None:
    """The column of fewest values with which no moment occurs twice; None: there is one series, or no such column."""
    if len(set(moments)) == len(moments):
        return None
    found = []
    for at in range(len(header)):
        keys = [row[at] for row in rows]
        kinds = set(keys)
        fractions = any(_NUMBER.fullmatch(kind) and not re.fullmatch(r"\s*\d+\s*", kind) for kind in kinds)
        named = 2 * len(kinds) <= len(rows) and not fractions  # else they are readings
        if at != time_at and named and len(set(zip(keys, moments, strict=True))) == len(rows):
            found.append((all(_NUMBER.fullmatch(kind) for kind in kinds), len(kinds), at))
    return min(found)[2] if found else None


def _no_twice(
    keys: Sequence[str], moments: Sequence[datetime], header: Sequence[str], time_at: int, path: Path
) -> None:
    seen: set[tuple[str, datetime]] = set()
    for number, pair in enumerate(zip(keys, moments, strict=True)):
        if pair in seen:
            of = f" of series {pair[0]!r}" if pair[0] else ""
            raise ConfigError(
                f"{path}:{number + 2}: a second row{of} at {pair[1].isoformat()} in {header[time_at]!r}. "
                "If the file holds several series, name the column that tells them apart: --series"
            )
        seen.add(pair)
