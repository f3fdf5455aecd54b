"""Tables on the disk, CSV and Parquet: read in chunks of so many rows, whatever their size."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
from pyarrow import csv, parquet

from stepcast.errors import ConfigError, InvalidRequest
from stepcast.tables import MISSING, in_order, is_parquet, line

Table = Any
"""A pyarrow.Table; pyarrow has no types."""
SPELLINGS: Final = sorted({spelt for word in MISSING for spelt in (word, word.upper(), word.title(), "NaN")})
"""How a missing reading is mostly spelt."""
SUFFIXES: Final = (".csv", ".parquet", ".pq")
BLOCK_BYTES: Final = 2**22
"""Of a CSV that are parsed at a time: no row may be longer."""
_ROW: Final = re.compile(r"Row #(\d+): (.*)", re.DOTALL)


class Position(NamedTuple):
    """How far tables have been read: a file's place in their list, and its next row."""

    file: int = 0
    row: int = 0


class Columns(NamedTuple):
    """The columns that are read; those of numbers may be text in a CSV, if one of their cells is."""

    names: Sequence[str]
    numbers: frozenset[str]


class Piece(NamedTuple):
    """Consecutive rows of one file; `row` is the first one's number in it, from 0, `read` the bytes up to their end."""

    path: Path
    file: int
    row: int
    table: Table
    read: int


class Chunk(NamedTuple):
    """Rows that are stepped together, in the order of the files; and where the next one begins.

    `share`: About how much of all bytes has been read with it.
    """

    pieces: list[Piece]
    end: Position
    share: float

    @property
    def rows(self) -> int:
        """How many."""
        return sum(piece.table.num_rows for piece in self.pieces)

    def line(self, row: int) -> str:
        """Where one of them (from 0) stands."""
        for piece in self.pieces:
            if row < piece.table.num_rows:
                return line(piece.path, piece.row + row)
            row -= piece.table.num_rows
        raise IndexError(row)


def find(data: Path) -> list[Path]:
    """The file, or those below a directory: numbers in their names count as numbers.

    What begins with a dot or an underscore is left out, as writers of Parquet leave marks there.

    Raises:
        ConfigError: there is none.
    """
    if not data.is_dir():
        if not data.exists():
            raise ConfigError(f"{data}: no such file or directory")
        if data.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"{data}: want a file of {', '.join(SUFFIXES)}, or a directory of them")
        return [data]
    found = [path for path in data.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    found = [path for path in found if not any(part[0] in "._" for part in path.relative_to(data).parts)]
    if not found:
        raise ConfigError(f"{data}: no file of {', '.join(SUFFIXES)} in this directory")
    return sorted(found, key=in_order)


def header(path: Path) -> list[str]:
    """The names of a file's columns.

    Raises:
        ConfigError: it cannot be read.
    """
    with _reading(path):
        if is_parquet(path):
            with path.open("rb") as file:
                return [str(name) for name in parquet.read_schema(file).names]
        with csv.open_csv(path, csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES), _parse()) as reader:
            return [str(name) for name in reader.schema.names]


def check_columns(path: Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    """Raises ConfigError where a file has not each of these columns once."""
    for name in wanted:
        if name not in there:
            near = get_close_matches(name, there, 1)
            told = f" (nearest: {near[0]!r})" if near else ""
            raise ConfigError(f"{path}: no column {name!r}{told} among {listed(there)}")
        if there.count(name) > 1:
            raise ConfigError(f"{path}: {there.count(name)} columns are called {name!r}")


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first ones of many."""
    return ", ".join(names[:24]) + (", ..." if len(names) > 24 else "")


def chunks(paths: Sequence[Path], columns: Columns, start: Position, rows: int) -> Iterator[Chunk]:
    """Chunks of `rows` rows with these columns, from a position on; the last one may be shorter.

    Where chunks begin depends on the files alone: who goes on at the end of one gets the same as who never stopped.

    Raises:
        ConfigError: a file cannot be read, or lacks a column.
        InvalidRequest: a row cannot be read; the message has its line.
    """
    waiting: list[Piece] = []
    room, sizes = rows, [path.stat().st_size for path in paths]
    for piece in _pieces(paths, columns, start):
        share = (sum(sizes[: piece.file]) + piece.read) / (sum(sizes) or 1)
        while piece.table.num_rows:
            part = piece._replace(table=piece.table.slice(0, room))
            waiting.append(part)
            room -= part.table.num_rows
            rest = piece.row + part.table.num_rows
            piece = piece._replace(row=rest, table=piece.table.slice(part.table.num_rows))
            if not room:
                yield Chunk(_joined(waiting), Position(piece.file, rest), share)
                waiting, room = [], rows
    if waiting:
        yield Chunk(_joined(waiting), Position(len(paths), 0), 1.0)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Consecutive pieces of one file and of the same types as one."""
    joined = []
    for _, group in groupby(pieces, lambda piece: (piece.file, piece.table.schema)):
        first, *more = group
        table = pa.concat_tables([first.table, *(piece.table for piece in more)])
        joined.append(first._replace(table=table.combine_chunks()))
    return joined


def _pieces(paths: Sequence[Path], columns: Columns, start: Position) -> Iterator[Piece]:
    for place in range(start.file, len(paths)):
        path, row = paths[place], start.row if place == start.file else 0
        check_columns(path, columns.names, header(path))
        with _reading(path, row):
            for batch, read in (_typed if is_parquet(path) else _text)(path, columns, row):
                yield Piece(path, place, row, pa.Table.from_batches([batch]), read)
                row += batch.num_rows


def _text(path: Path, columns: Columns, skipped: int) -> Iterator[tuple[Any, int]]:
    """A CSV's rows: numbers where all are, and from the first cell that is none on text, so that it can be told."""
    try:
        for batch, read in _parsed(path, columns, skipped, pa.float64()):
            yield batch, read
            skipped += batch.num_rows
    except pa.ArrowInvalid as error:
        if "conversion error to double" not in str(error):
            raise
        yield from _parsed(path, columns, skipped, pa.string())


def _parsed(path: Path, columns: Columns, skipped: int, number: Any) -> Iterator[tuple[Any, int]]:
    read = csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, skip_rows_after_names=skipped)
    types = {name: number if name in columns.numbers else pa.string() for name in columns.names}
    convert = csv.ConvertOptions(
        include_columns=list(columns.names),
        column_types=types,
        null_values=SPELLINGS if pa.types.is_floating(number) else [],
        strings_can_be_null=False,
    )
    with pa.OSFile(str(path)) as file, csv.open_csv(file, read, _parse(), convert) as reader:
        for batch in reader:
            yield batch, file.tell()


def _parse() -> Any:
    return csv.ParseOptions(newlines_in_values=True)


def _typed(path: Path, columns: Columns, skipped: int) -> Iterator[tuple[Any, int]]:
    size, row = path.stat().st_size, skipped
    with parquet.ParquetFile(path) as file:
        groups = list(range(file.num_row_groups))
        while groups and skipped >= (count := file.metadata.row_group(groups[0]).num_rows):
            skipped -= count
            groups.pop(0)
        for batch in file.iter_batches(row_groups=groups, columns=list(columns.names)) if groups else ():
            part = batch.slice(min(skipped, batch.num_rows))
            skipped -= batch.num_rows - part.num_rows
            row += part.num_rows
            if part.num_rows:
                yield part, size * row // file.metadata.num_rows


@contextmanager
def _reading(path: Path, skipped: int = 0) -> Iterator[None]:
    """A library's errors in one line of ours."""
    kind = "Parquet file" if is_parquet(path) else "CSV"
    try:
        yield
    except (pa.ArrowException, ValueError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:  # pyarrow raises OSError of bad bytes, too
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
        at = _ROW.search(str(error))
        if at and kind == "CSV":
            what = f"{line(path, int(at[1]) - 2 + skipped)}: {' '.join(at[2].split())[:200]}"
            raise InvalidRequest(f"{what}. Mend this row.") from error
        raise ConfigError(f"{path}: no {kind} that can be read ({' '.join(str(error).split())[:200]})") from error
