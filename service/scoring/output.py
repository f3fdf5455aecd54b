"""What comes out: a row for each row, spooled while the run goes on, a CSV or Parquet file at its end.

The spool is only ever appended to, so a run that was killed cuts it where its last checkpoint ended.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv, ipc, parquet

from stepcast.errors import ConfigError
from stepcast.features import FeatureNames
from stepcast.tables import is_parquet

from ..engine.arrays import Floats
from .files import Table

STEP: Final = "step"
CLASS: Final = "class"
_HEAD: Final = struct.Struct("<Q")


class Shape:
    """Which columns the output has: those that are carried over, `step`, and the outputs by name as a server has them.

    A row without a step (it was left out) has no number and no outputs, one that was masked has a number alone.
    """

    def __init__(self, names: FeatureNames, carried: Sequence[str], prefix: str) -> None:
        self._names, self._prefix = names, prefix
        outputs = names.manifest.classes or tuple(output.name for output in names.manifest.outputs)
        made = [STEP, *([prefix + CLASS] if names.manifest.classes else []), *(prefix + name for name in outputs)]
        for name in carried:
            if name in made:
                raise ConfigError(f"column {name!r} of the table has the name of an output. Say --prefix forecast_")
        if twice := [name for name in made if made.count(name) > 1]:
            raise ConfigError(f"two columns of the output are called {twice[0]!r}. Say --prefix forecast_")

    def table(self, carried: Table, steps: npt.NDArray[np.int64], outputs: Floats) -> Table:
        """The output of rows: steps (R,), 0 where there is none, and outputs (R, O), NaN where there are none."""
        columns: dict[str, Any] = {name: carried[name] for name in carried.column_names}
        columns[STEP] = pa.array(steps, mask=steps == 0)
        labels = self._names.labels(outputs)
        if labels is not None:
            columns[self._prefix + CLASS] = pa.array(labels, pa.string(), mask=labels == "")
        for name, values in self._names.columns(outputs).items():
            columns[self._prefix + name] = pa.array(np.ascontiguousarray(values), mask=np.isnan(values))
        return pa.table(columns).combine_chunks()


class Spool:
    """The rows of a run so far, in a file; `spooled` is how much of it is there for good."""

    def __init__(self, path: Path, final: Path, spooled: int) -> None:
        self._path, self._final, self._is_parquet = path, final, is_parquet(final)
        self._file: BinaryIO = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(spooled)
        self._file.seek(spooled)

    def append(self, table: Table) -> int:
        """Add rows; the bytes that are there now."""
        sink = pa.BufferOutputStream()
        if self._is_parquet:
            with ipc.new_stream(sink, table.schema, options=ipc.IpcWriteOptions(compression="lz4")) as writer:
                writer.write_table(table)
        else:
            options = csv.WriteOptions(include_header=not self._file.tell(), quoting_style="needed")
            csv.write_csv(_printable(table), sink, options)
        data = sink.getvalue()
        if self._is_parquet:
            self._file.write(_HEAD.pack(data.size))
        self._file.write(data)
        return self._file.tell()

    def keep(self) -> None:
        """Have the disk hold all that was added."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Make the file that was asked for, at once: it is whole or not there."""
        self.keep()
        made = self._path
        if self._is_parquet and self._file.tell():
            made = self._path.with_name("finished")
            self._as_parquet(made)
        self._file.close()
        os.replace(made, self._final)

    def _as_parquet(self, path: Path) -> None:
        """A row group for each chunk."""
        self._file.seek(0)
        writer = None
        try:
            while head := self._file.read(_HEAD.size):
                table = ipc.open_stream(self._file.read(_HEAD.unpack(head)[0])).read_all()
                writer = writer or parquet.ParquetWriter(path, table.schema, use_dictionary=_repeated(table.schema))
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()

    def close(self) -> None:
        """Close the file; it stays for a run that goes on."""
        self._file.close()


def _repeated(schema: Any) -> list[str]:
    """The columns whose values repeat: text, but no numbers, of which a dictionary costs more than the numbers."""
    number = pa.types.is_integer, pa.types.is_floating
    return [field.name for field in schema if not any(of(field.type) for of in number)]


def _printable(table: Table) -> Table:
    """Types that a CSV writer does not know as those that it does."""
    for at, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(at, column.name, table.column(at).cast(column.type.value_type))
    return table
