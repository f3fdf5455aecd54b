"""One delimited file to numbers: a line is a time step, a column is a series."""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from stepcast.errors import ConfigError


class Classes(NamedTuple):
    """Names that may stand in some columns (from 0, or -1 for the last) instead of a number: their index."""

    names: Sequence[str]
    columns: Sequence[int]


NO_CLASSES = Classes((), ())


def read_csv(
    path: Path, *, skip_rows: int = 0, delimiter: str = ",", classes: Classes = NO_CLASSES
) -> NDArray[np.float64]:
    """Read one sequence, [T, columns].

    An empty field or `nan` is a missing value, NaN. The delimiter is a literal string (DL4J's is a regular
    expression), there is no quoting, blanks around a number do not matter, and neither do empty lines at the end.

    Args:
        path: UTF-8, with or without a byte order mark.
        skip_rows: Lines to leave out at the top, comments or a header.
        delimiter: Between two fields.
        classes: Whose names are read as their index; a number stays what it is.

    Raises:
        ConfigError: the file cannot be read, has no steps, rows of different length, or a field that is no finite
            float32 number and no class's name. The message has file, line and column, both counted from 1.
    """
    lines = _lines(path)[skip_rows:]
    if not lines:
        raise ConfigError(f"{path}: no steps (a sequence of length zero) after skip_rows {skip_rows}")
    values = _parse(path, lines, delimiter, skip_rows, classes)
    huge = np.abs(values) > np.finfo(np.float32).max
    if huge.any():
        row, column = np.argwhere(huge)[0]
        _refuse(path, skip_rows + row, column, lines[row].split(delimiter)[column])
    return values


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _parse(path: Path, lines: list[str], delimiter: str, skipped: int, classes: Classes) -> NDArray[np.float64]:
    rows = _plain(lines, delimiter)
    if rows is None:
        rows = [_careful(path, line.split(delimiter), skipped + at, classes) for at, line in enumerate(lines)]
    width = len(rows[0])
    for number, row in enumerate(rows):
        if len(row) != width:
            where = f"{path}, line {skipped + number + 1}"
            raise ConfigError(f"{where}: {len(row)} columns, line {skipped + 1} has {width}")
    return np.array(rows, np.float64)


def _plain(lines: list[str], delimiter: str) -> list[list[float]] | None:
    """The fast way; None where only the careful one can tell missing fields from wrong ones."""
    if any("_" in line for line in lines):  # float() takes 1_000 for a number; no other program does
        return None
    try:
        return [list(map(float, line.split(delimiter))) for line in lines]
    except ValueError:
        return None


def _careful(path: Path, fields: list[str], number: int, classes: Classes) -> list[float]:
    values = [_number(field) for field in fields]
    for column in classes.columns:
        if -len(fields) <= column < len(fields) and values[column] is None:
            values[column] = _class(path, number, column % len(fields), fields[column], classes.names)
    for column, value in enumerate(values):
        if value is None:
            _refuse(path, number, column, fields[column])
    return [value for value in values if value is not None]


def _class(path: Path, row: int, column: int, field: str, names: Sequence[str]) -> float:
    """The index of a class by its name."""
    name = field.strip()
    if name in names:
        return float(names.index(name))
    near = get_close_matches(name, names, 1)
    told = f"{name!r} is no class" + (f" (nearest: {near[0]!r})" if near else "")
    raise ConfigError(f"{path}, line {row + 1}, column {column + 1}: {told}, wanted one of {', '.join(names)}")


def _number(field: str) -> float | None:
    """The value of a field, NaN if it is empty, None if it is no number."""
    if not field.strip():
        return math.nan
    try:
        return float(field) if "_" not in field else None
    except ValueError:
        return None


def _refuse(path: Path, row: int, column: int, field: str) -> NoReturn:
    raise ConfigError(f"{path}, line {row + 1}, column {column + 1}: {field!r} is not a finite float32 number")
