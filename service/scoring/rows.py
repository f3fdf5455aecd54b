"""A chunk of a table as what a model takes: inputs, whose they are, of which moment, present or not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stepcast.errors import ConfigError
from stepcast.features import FeatureNames
from stepcast.manifest import Feature, Manifest
from stepcast.tables import Origin, of_direction, within

from ..engine import arrays
from ..engine.arrays import Floats
from . import cells
from .cells import US, Array, Doubles, Faults, Flags, Micros
from .files import Chunk, Piece, Table
from .layout import Layout

Ints = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(eq=False)
class Rows:
    """R rows of a chunk. What stands in those that have faults means nothing."""

    chunk: Chunk
    x: Floats  # (R, F), finite or NaN
    keys: list[str]  # the sessions,
    of: Ints  # (R,) and whose row each is: its place among them
    moments: Micros | None  # (R,) microseconds since 1970; None: the table has none
    present: Flags | None  # (R,) False: masked; None: all are present
    carried: Table  # columns that the output has, too
    faults: Faults


class RowReader:
    """Reads chunks of one layout.

    Args:
        session: What all rows are of, where the layout has no key.
        allowed: Whether a key can be a session's id.
    """

    def __init__(
        self,
        manifest: Manifest,
        names: FeatureNames,
        layout: Layout,
        session: str,
        allowed: Callable[[str], object],
    ) -> None:
        self._manifest, self._names, self._layout, self._session = manifest, names, layout, session
        self._allowed = allowed
        self._slices = manifest.feature_slices()
        self._features = [(f, layout.sources[f.name]) for f in manifest.features if f.name in layout.sources]

    def read(self, chunk: Chunk) -> Rows:
        """A chunk's rows.

        Raises:
            ConfigError: a column's type is none that its cells can have.
        """
        count, layout = chunk.rows, self._layout
        places: dict[str, int] = {}
        rows = Rows(
            chunk,
            np.full((count, self._manifest.n_features), np.nan, np.float32),
            [],
            np.zeros(count, np.int64),
            None if layout.time is None else np.zeros(count, np.int64),
            None if layout.mask is None else np.ones(count, np.bool_),
            _together([piece.table.select(layout.carried) for piece in chunk.pieces]),
            Faults(count),
        )
        start = 0
        for piece in chunk.pieces:
            end = start + piece.table.num_rows
            self._read(piece, rows, slice(start, end), places)
            start = end
        rows.keys = list(places)
        if not arrays.are_finite(rows.x.reshape(-1)):
            self._check(rows)
        return rows

    def _read(self, piece: Piece, rows: Rows, cut: slice, places: dict[str, int]) -> None:
        layout = self._layout
        rows.of[cut] = self._keys(piece, rows, cut, places)
        if layout.time is not None and rows.moments is not None:
            rows.moments[cut], bad = _read(cells.moments, piece, layout.time)
            self._note(rows, cut, piece, layout.time, bad, "a moment: ISO 8601, or Unix seconds")
        if layout.mask is not None and rows.present is not None:
            values, wrong = _read(cells.numbers, piece, layout.mask)
            bad = ~np.isin(values, (0, 1))
            self._note(rows, cut, piece, layout.mask, bad if wrong is None else bad | wrong, "0 or 1")
            rows.present[cut] = values == 1
        for feature, origin in self._features:
            self._feature(feature, origin, piece, rows, cut, list(places))
        if layout.dated and rows.moments is not None:
            each, where = np.unique(rows.moments[cut], return_inverse=True)
            columns = self._names.of_moments(each / US)[where]
            for place, name in enumerate(self._names.dated):
                rows.x[cut, self._slices[name].start] = columns[:, place]

    def _keys(self, piece: Piece, rows: Rows, cut: slice, places: dict[str, int]) -> Ints:
        """Whose rows these are."""
        key = self._layout.key
        if key is None:
            places.setdefault(self._session, 0)
            return np.zeros(cut.stop - cut.start, np.int64)
        coded = _read(_coded, piece, key)
        known = ["" if text is None else text for text in coded.dictionary.to_pylist()]
        of: Ints = np.array([places.setdefault(text, len(places)) for text in known], np.int64)
        of = of[coded.indices.to_numpy()]
        wrong = [places[text] for text in known if not self._allowed(text)]
        if wrong:
            wanted = "a session's id" if "" in known else "a session's id: 1 to 256 of letters, digits and ._:@~-"
            self._note(rows, cut, piece, key, np.isin(of, wrong), wanted)
        return of

    def _feature(
        self, feature: Feature, origin: Origin, piece: Piece, rows: Rows, cut: slice, keys: Sequence[str]
    ) -> None:
        where = self._slices[feature.name]
        if origin.values is not None:
            values = self._by_series(feature, origin, keys)[rows.of[cut]]
            lacking = np.isnan(values) & np.array([key not in origin.values for key in keys])[rows.of[cut]]
            say = f"nothing of its series for {origin.column!r}"
            rows.faults.add(cut.start + np.flatnonzero(lacking), lambda row: f"{rows.chunk.line(row)}: {say}")
        elif feature.categories is not None:
            values = _read(lambda array: cells.categories(array, feature.name, self._names), piece, origin.column)
        else:
            read = cells.numbers if feature.width == 1 else (lambda array: cells.lists(array, feature.width))
            values, bad = _read(read, piece, origin.column)
            if bad is not None:
                wanted = "a number" if feature.width == 1 else f"a list of {feature.width} numbers"
                self._note(rows, cut, piece, origin.column, bad, wanted)
                values = np.where(bad if values.ndim == 1 else bad[:, None], np.nan, values)
            if origin.range is not None:
                values = within(values, origin.range)
            if origin.turn is not None:
                values = of_direction(values, origin.turn, origin.wave)
        with np.errstate(over="ignore"):  # infinite in float32: refused below
            rows.x[cut, where] = values[:, None] if values.ndim == 1 else values

    def _by_series(self, feature: Feature, origin: Origin, keys: Sequence[str]) -> Doubles:
        """What a static column is, by session."""
        given = [(origin.values or {}).get(key) for key in keys]
        if feature.categories is not None:
            texts = [None if value is None else str(value) for value in given]
            return self._names.of_cells(feature.name, texts).astype(np.float64)
        return np.array([np.nan if value is None else float(value) for value in given])

    def _note(self, rows: Rows, cut: slice, piece: Piece, name: str, bad: Flags, wanted: str) -> None:
        """Note cells that are not what they should be."""
        if not bad.any():
            return

        def say(row: int) -> str:
            cell = piece.table[name][row - cut.start].as_py()
            told = "nothing" if cell is None or cell == "" else _shown(cell)
            return f"{rows.chunk.line(row)}: column {name!r} has {told}, wanted {wanted}"

        rows.faults.add(cut.start + np.flatnonzero(bad), say)

    def _check(self, rows: Rows) -> None:
        """Note readings that a model does not take: infinite in float32, or missing where it was trained with all."""
        infinite = np.isinf(rows.x)
        lacking = np.isnan(rows.x) & arrays.needed(self._manifest)
        for wrong, what in ((infinite, "is infinite in float32"), (lacking, "is missing, and must not be")):
            found = np.flatnonzero(wrong.any(axis=1))

            def say(row: int, wrong: npt.NDArray[np.bool_] = wrong, what: str = what) -> str:
                at = int(wrong[row].argmax())
                name = next(name for name, where in self._slices.items() if at < where.stop)
                return f"{rows.chunk.line(row)}: feature {name!r} {what}"

            rows.faults.add(found, say)
        rows.x = arrays.canonical(rows.x)


def _coded(array: Array) -> Array:
    return array.cast(pa.string()).dictionary_encode(null_encoding="encode")


def _read(read: Callable[[Array], T], piece: Piece, name: str) -> T:
    """What `read` makes of a column; ConfigError where its type does not allow that."""
    array = cells.plain(piece.table[name])
    try:
        return read(array)
    except pa.ArrowException as error:
        raise ConfigError(f"{piece.path}: column {name!r} is {array.type}, which does not fit: {error}") from error


def _together(tables: Sequence[Table]) -> Table:
    """Columns of several files, by the types of the first."""
    try:
        return pa.concat_tables([table.cast(tables[0].schema) for table in tables]).combine_chunks()
    except pa.ArrowException as error:
        raise ConfigError(f"columns of the files have different types: {error}") from error


def _shown(cell: object) -> str:
    text = repr(cell)
    return text if len(text) <= 64 else text[:60] + " ..."
