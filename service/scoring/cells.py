"""Cells to numbers: columns of text or of types become float64, indices of categories, moments. Bad ones are told.

Text means what it means to the trainer: a cell is stripped, and "", NA, NaN and null are missing readings.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stepcast.calendars import FIRST_S, LAST_S
from stepcast.features import FeatureNames
from stepcast.tables import MISSING

from .files import SPELLINGS

Array = Any
"""A pyarrow.Array."""
Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Micros = npt.NDArray[np.int64]
Say = Callable[[int], str]

US: Final = 1_000_000
_NUMBER: Final = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_MISSING: Final = pa.array(SPELLINGS)
_TOLD: Final = 10


class Faults:
    """Rows of a chunk that cannot be stepped, and why the first ones cannot."""

    def __init__(self, rows: int) -> None:
        self.bad = np.zeros(rows, np.bool_)
        self._said: dict[int, Say] = {}

    def add(self, rows: Sequence[int] | npt.NDArray[np.integer], say: Say) -> None:
        """Note rows; `say` tells what is wrong with one of them."""
        fresh = [int(row) for row in rows[:_TOLD] if not self.bad[row]]
        self.bad[rows] = True
        self._said.update(dict.fromkeys(fresh, say))

    def first(self, count: int = _TOLD) -> list[tuple[int, str]]:
        """The first rows that are told, and what is wrong with them."""
        return [(row, self._said[row](row)) for row in sorted(self._said)[:count]]

    def __len__(self) -> int:
        return int(np.count_nonzero(self.bad))


def plain(column: Array) -> Array:
    """A column's values in one piece, without a dictionary."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # what is too large for one
        array = pa.concat_arrays(array.chunks)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def is_text(array: Array) -> bool:
    """Whether cells are text."""
    return bool(pa.types.is_string(array.type) or pa.types.is_large_string(array.type))


def numbers(array: Array) -> tuple[Doubles, Flags | None]:
    """Numbers, NaN where they are missing; and where a cell is none (None: nowhere). Infinity is none.

    Raises:
        pa.ArrowException: the column's type is not one of numbers.
    """
    if not is_text(array):
        values = _doubles(array.cast(pa.float64()))
        infinite = np.isinf(values)
        return values, infinite if infinite.any() else None
    try:
        values = _doubles(array.cast(pa.float64()))
    except pa.ArrowInvalid:  # an empty cell, most often
        try:
            values = _doubles(_without_missing(array).cast(pa.float64()))
        except pa.ArrowInvalid:
            return _one_by_one(array)
    return _one_by_one(array) if np.isinf(values).any() else (values, None)


def _doubles(array: Array) -> Doubles:
    found: Doubles = array.to_numpy(zero_copy_only=False)  # null: NaN
    return found


def _without_missing(array: Array) -> Array:
    return pc.if_else(pc.is_in(array, _MISSING), pa.scalar(None, array.type), array)


def _one_by_one(array: Array) -> tuple[Doubles, Flags]:
    """The same of text in which there is something else."""
    text = pc.utf8_trim_whitespace(array)
    there = pc.invert(pc.is_in(pc.utf8_lower(text), pa.array(sorted(MISSING))))
    is_number = _flags(pc.match_substring_regex(text, _NUMBER))
    values = np.full(len(array), np.nan)
    values[is_number] = np.array(text.filter(pa.array(is_number)).to_pylist(), np.str_).astype(np.float64)
    bad = (_flags(there) & ~is_number) | np.isinf(values)
    return values, bad


def _flags(array: Array) -> Flags:
    """Booleans, False where there is null."""
    found: Flags = pc.fill_null(array, False).to_numpy(zero_copy_only=False)
    return found


def lists(array: Array, width: int) -> tuple[Doubles, Flags | None]:
    """Numbers (R, width) of a column of lists, NaN where a list is missing; and where a list is none of these."""
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    whole = lengths == width
    values = np.full((len(array), width), np.nan)
    flat, wrong = numbers(plain(pc.list_flatten(array.filter(pa.array(whole)))))
    values[whole] = flat.reshape(-1, width)
    bad = ~whole & ~np.isnan(lengths)
    if wrong is not None:
        bad[np.flatnonzero(whole)[wrong.reshape(-1, width).any(axis=1)]] = True
    return values, bad


def categories(array: Array, name: str, names: FeatureNames) -> Doubles:
    """A category's indices, 0 for a text that the model does not know."""
    coded = array.cast(pa.string()).dictionary_encode(null_encoding="encode")
    indices = names.of_cells(name, coded.dictionary.to_pylist()).astype(np.float64)
    return indices[coded.indices.to_numpy()] if len(indices) else np.full(len(array), np.nan)


def moments(array: Array) -> tuple[Micros, Flags]:
    """Moments in microseconds since 1970, and where there is none.

    Numbers are Unix seconds, text is ISO 8601, or Unix seconds; what has no zone is UTC, as to the trainer.

    Raises:
        pa.ArrowException: the column's type is not one of these.
    """
    if is_text(array):
        return _spelt(array)
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        return _seconds(_doubles(array.cast(pa.float64())))
    stamps = array.cast(pa.timestamp("us", tz=getattr(array.type, "tz", None)), safe=False)
    return _bounded(stamps)


def _spelt(array: Array) -> tuple[Micros, Flags]:
    for kind in (pa.timestamp("us", tz="UTC"), pa.timestamp("us")):  # with offsets, or without
        try:
            array.slice(0, 1).cast(kind)  # a cast that fails takes long
            return _bounded(array.cast(kind))
        except pa.ArrowInvalid:
            continue
    coded = array.dictionary_encode(null_encoding="encode")
    each = np.array([_second(text) for text in coded.dictionary.to_pylist()], np.float64)
    return _seconds(each[coded.indices.to_numpy()])


def _second(text: str | None) -> float:
    """The moment of a cell in seconds since 1970; NaN: there is none."""
    word = (text or "").strip()
    try:
        return float(word)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(word)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return float("nan")


def _seconds(values: Doubles) -> tuple[Micros, Flags]:
    bad = ~((values >= FIRST_S) & (values <= LAST_S))  # NaN too
    return np.round(np.where(bad, 0.0, values) * US).astype(np.int64), bad


def _bounded(stamps: Array) -> tuple[Micros, Flags]:
    """Of timestamps in microseconds."""
    absent = stamps.is_null().to_numpy(zero_copy_only=False)
    micros = pc.fill_null(stamps.cast(pa.int64()), 0).to_numpy()
    bad = absent | (micros < FIRST_S * US) | (micros > LAST_S * US)
    return np.where(bad, 0, micros), bad
