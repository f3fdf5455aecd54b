"""What an unfinished run knows: how far it is, and every session's state, in one SQLite file beside its output.

A checkpoint is one transaction, so a run that was killed goes on where its last one ended. States that do not fit into
memory rest here, too.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from stepcast.errors import ConfigError

from .files import Position

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS run (id INTEGER PRIMARY KEY CHECK (id = 0), plan TEXT NOT NULL, nonce BLOB NOT NULL,
    file INTEGER NOT NULL, row INTEGER NOT NULL, spooled INTEGER NOT NULL, rows INTEGER NOT NULL,
    skipped INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (key TEXT PRIMARY KEY, step INTEGER NOT NULL, moment INTEGER NOT NULL,
    replaces BLOB NOT NULL, state BLOB NOT NULL);
"""
_SAVE: Final = "INSERT OR REPLACE INTO sessions (key, step, moment, replaces, state) VALUES (?, ?, ?, ?, ?)"
_LOAD: Final = "SELECT key, step, moment, replaces, state FROM sessions WHERE key IN ({})"
_AT_ONCE: Final = 500  # parameters of a query


class Saved(NamedTuple):
    """A session between two chunks.

    `moment` is that of its last row, microseconds since 1970; `replaces` the store's token of the record that it began
    with, empty without one; `state` one packed row.
    """

    key: str
    step: int
    moment: int
    replaces: bytes
    state: bytes


class Reached(NamedTuple):
    """How far a run is: the tables' next row, bytes of output, rows so far, and how many were left out."""

    position: Position = Position()
    spooled: int = 0
    rows: int = 0
    skipped: int = 0


class Scratch:
    """The file of one run.

    Args:
        plan: What the run is of; a file of another plan is refused.
        nonce: Random bytes for a run that begins.

    Raises:
        ConfigError: it is another run's, or another process has it.
    """

    def __init__(self, path: Path, plan: str, nonce: bytes) -> None:
        self._path = path
        self._data = sqlite3.connect(path, isolation_level=None, timeout=0.2)
        try:
            self._data.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._data.execute("PRAGMA journal_mode = WAL")
            self._data.execute("BEGIN EXCLUSIVE")
            for statement in _SCHEMA.split(";"):
                self._data.execute(statement)
            self._data.execute("INSERT OR IGNORE INTO run VALUES (0, ?, ?, 0, 0, 0, 0, 0)", (plan, nonce))
            (found,) = self._data.execute("SELECT plan FROM run").fetchone()
            self._data.execute("COMMIT")
        except sqlite3.Error as error:
            self._data.close()
            raise ConfigError(f"{path}: cannot be used ({error}). Is the same run under way elsewhere?") from error
        if found != plan:
            self._data.close()
            raise ConfigError(
                f"{path.parent}: is of an unfinished run with other files, options or another model. Finish that one, "
                "or begin anew with --force."
            )

    @property
    def nonce(self) -> bytes:
        """Random bytes that are the run's own."""
        return bytes(self._data.execute("SELECT nonce FROM run").fetchone()[0])

    def reached(self) -> Reached:
        """How far the run is."""
        file, row, *rest = self._data.execute("SELECT file, row, spooled, rows, skipped FROM run").fetchone()
        return Reached(Position(file, row), *rest)

    def save(self, reached: Reached, sessions: Iterable[Saved]) -> None:
        """A checkpoint.

        Raises:
            ConfigError: it cannot be written; the last one holds.
        """
        try:
            self._data.execute("BEGIN")
            self._data.executemany(_SAVE, sessions)
            values = (*reached.position, *reached[1:])
            self._data.execute("UPDATE run SET file = ?, row = ?, spooled = ?, rows = ?, skipped = ?", values)
            self._data.execute("COMMIT")
        except sqlite3.Error as error:
            raise ConfigError(f"{self._path}: cannot be written ({error})") from error

    def load(self, keys: Sequence[str]) -> Iterator[Saved]:
        """Those of these sessions that are there."""
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            for row in self._data.execute(_LOAD.format(",".join("?" * len(some))), some):
                yield Saved(*row)

    def everyone(self) -> Iterator[Saved]:
        """All sessions, in the order of their keys."""
        for row in self._data.execute("SELECT key, step, moment, replaces, state FROM sessions ORDER BY key"):
            yield Saved(*row)

    def close(self) -> None:
        """Close the file."""
        self._data.close()
