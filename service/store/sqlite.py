"""Sessions in one SQLite file: durable, embedded, shared by the processes of one machine.

Write-ahead log, one transaction per group of commits: calls that arrive while a transaction runs share the next one.
With synchronous=NORMAL (the default) a killed process loses nothing that was acknowledged; a power failure may lose
the last transactions but never damages the file. With synchronous=FULL a power failure loses nothing either.

All of sqlite3 happens on two threads, one that writes and one that reads; the event loop never waits for a disk.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from stepcast.errors import StoreUnavailable

from ..records.block import Block
from ..records.layout import TOKEN
from ..records.record import wall_clock_ms
from . import Done, Write, as_writes, tell

_log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
_NEVER: Final = 2**63 - 1
_LAST: Final = "\U0010ffff"
_CHECKPOINT_PAGES: Final = 4000
_SWEEP_PER_S: Final = 64

_SCHEMA: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS sessions (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    token BLOB NOT NULL,
    expires_ms INTEGER NOT NULL,
    record BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS sides (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    name TEXT NOT NULL,
    record BLOB NOT NULL,
    UNIQUE (key, name)
);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""
_LOOK: Final = "SELECT user_version, (SELECT count(*) FROM sqlite_master) FROM pragma_user_version"
_LOAD: Final = "SELECT record FROM sessions WHERE key = ? AND expires_ms > ?"
_CREATE: Final = """
INSERT INTO sessions (key, token, expires_ms, record) VALUES (?, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET token = excluded.token, expires_ms = excluded.expires_ms, record = excluded.record
WHERE sessions.expires_ms <= ?
"""
_REPLACE: Final = (
    "UPDATE sessions SET token = ?, expires_ms = ?, record = ? WHERE key = ? AND token = ? AND expires_ms > ?"
)
_FORGET: Final = "DELETE FROM sessions WHERE key = ? AND token = ? AND expires_ms > ?"
_FORGET_SIDES: Final = "DELETE FROM sides WHERE key = ?"
_SET_SIDE: Final = "INSERT OR REPLACE INTO sides (key, name, record) VALUES (?, ?, ?)"
_LIST: Final = """
SELECT key FROM sessions WHERE key > ? AND key >= ? AND key < ? AND expires_ms > ? ORDER BY key LIMIT ?
"""
_SIDE: Final = """
SELECT sides.record FROM sides JOIN sessions USING (key) WHERE key = ? AND name = ? AND expires_ms > ?
"""
_SIDES: Final = """
SELECT name FROM sides JOIN sessions USING (key) WHERE key = ? AND expires_ms > ? ORDER BY name
"""
_ROUND: Final = "SELECT id, key, expires_ms FROM sessions WHERE id > ? ORDER BY id LIMIT ?"

_T = TypeVar("_T")
_Steps = list[tuple[bytes, int, bytes, str, bytes, int]]
"""A block, as _REPLACE takes its rows."""
_Asked = Sequence[Write] | _Steps
_Waiting = tuple[_Asked, asyncio.Future[list[bool]]]


class SqliteStore:
    """One SQLite file.

    Args:
        path: The file; made if it is not there, its directory is not.
        full_sync: Wait for the disk at every transaction (synchronous=FULL).
        busy_timeout_s: How long a commit waits for another process's transaction.
        clock_ms: Wall clock in ms since the epoch; expiry outlives the process.
    """

    volatile = False

    def __init__(
        self,
        path: str | Path,
        *,
        full_sync: bool = False,
        busy_timeout_s: float = 2.0,
        clock_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._path = Path(path)
        self._full_sync = full_sync
        self._busy_timeout_s = busy_timeout_s
        self._clock_ms = clock_ms
        self._waiting: list[_Waiting] = []
        self._drainer: asyncio.Task[None] | None = None
        self._writer = self._reader = _Lane(None)
        self._sweep_at = 0
        self._swept_ms = 0

    async def open(self) -> None:
        await self.close()
        self._writer = _Lane("store-write")
        self._reader = _Lane("store-read")
        try:
            with _translated(self._path, str(self._path)):
                await self._writer.run(self._prepare)
                await self._reader.run(self._connect, self._reader)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        while self._drainer is not None:
            await asyncio.wait([self._drainer])
        writer, reader = self._writer, self._reader
        self._writer = self._reader = _Lane(None)
        await reader.close()
        await writer.close()

    async def ping(self) -> None:
        await self._on(self._writer, self._touch)

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        return await self._on(self._reader, self._load, keys)

    def replace(self, block: Block, done: Done) -> None:
        now_ms, expected = self._clock_ms(), block.expected()
        if not expected[0]:  # new sessions
            asked: _Asked = as_writes(block)
        else:
            expires_ms, rows = _expires_ms(block.ttl_s, now_ms), zip(block.keys, expected, block.records(), strict=True)
            asked = [(record[TOKEN], expires_ms, record, key, token, now_ms) for key, token, record in rows]
        tell(done, range(len(block)), self._accept(asked))

    async def change(self, writes: Sequence[Write]) -> list[bool]:
        return await self._accept(writes)

    def _accept(self, asked: _Asked) -> "asyncio.Future[list[bool]]":
        """Let writes wait for the next transaction."""
        done: asyncio.Future[list[bool]] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, done))
        if self._drainer is None:
            self._drainer = asyncio.create_task(self._drain())
        return done

    async def list_keys(self, prefix: str, cursor: str, limit: int) -> tuple[list[str], str]:
        keys = await self._on(
            self._reader, self._column, _LIST, cursor, prefix, prefix + _LAST, self._clock_ms(), limit
        )
        return keys, keys[-1] if len(keys) == limit else ""

    async def load_side(self, key: str, name: str) -> bytes | None:
        found = await self._on(self._reader, self._column, _SIDE, key, name, self._clock_ms())
        return found[0] if found else None

    async def list_sides(self, key: str) -> list[str]:
        return await self._on(self._reader, self._column, _SIDES, key, self._clock_ms())

    async def _on(self, lane: "_Lane", work: Callable[..., _T], *args: object) -> _T:
        """Run `work` on a lane's thread; sqlite3's errors become ours."""
        with _translated(self._path):
            return await lane.run(work, *args)

    async def _drain(self) -> None:
        """Apply what waits, one transaction after the other, until nothing waits."""
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                await self._apply_group(group)
        finally:
            self._drainer = None

    async def _apply_group(self, group: list[_Waiting]) -> None:
        """One transaction for a group of commits; its fate is the fate of each."""
        try:
            results = await self._on(self._writer, self._apply, [writes for writes, _ in group])
        except Exception as error:
            for _, done in group:
                if not done.done():
                    done.set_exception(error)
            return
        for (_, done), applied in zip(group, results, strict=True):
            if not done.done():
                done.set_result(applied)

    # What follows runs on the lanes' threads.

    def _connect(self, lane: "_Lane") -> sqlite3.Connection:
        lane.connection = connection = sqlite3.connect(
            self._path, timeout=self._busy_timeout_s, isolation_level=None, cached_statements=32
        )
        connection.execute(f"PRAGMA synchronous = {'FULL' if self._full_sync else 'NORMAL'}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        return connection

    def _prepare(self) -> None:
        """Connect the writer; make the tables, or check that they are of a version we know."""
        connection = self._connect(self._writer)
        version, tables = connection.execute(_LOOK).fetchone()
        if version > SCHEMA_VERSION:
            raise _unavailable(f"{self._path} has schema {version}, this server knows up to {SCHEMA_VERSION}")
        if not version and tables:
            raise _unavailable(f"{self._path} is a SQLite file of another program")
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            self._switch_to_wal(connection)
        if not version:
            connection.executescript(_SCHEMA)
        self._touch()

    def _switch_to_wal(self, connection: sqlite3.Connection) -> None:
        """A new file, or one that was copied by a tool that leaves the write-ahead log out."""
        mode = _patiently(lambda: connection.execute("PRAGMA journal_mode = WAL"), self._busy_timeout_s)
        if mode.fetchone()[0] != "wal":
            raise _unavailable(f"{self._path} cannot have a write-ahead log. Put it on a local disk")

    def _touch(self) -> None:
        """Write something, as only that shows whether the file can be written."""
        connection = self._writer.use()
        with _transaction(connection):
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _load(self, keys: Sequence[str]) -> list[bytes | None]:
        now_ms, execute = self._clock_ms(), self._reader.use().execute
        rows = [execute(_LOAD, (key, now_ms)).fetchone() for key in keys]
        return [row[0] if row else None for row in rows]

    def _column(self, query: str, *values: str | int) -> list[Any]:
        return [row[0] for row in self._reader.use().execute(query, values)]

    def _apply(self, calls: Sequence[_Asked]) -> list[list[bool]]:
        """One transaction for several commits; where a plain step is refused, all of it again, step by step."""
        try:
            return self._transact(calls, _replace_all)
        except _SomeRefused:
            return self._transact(calls, _replace_each)

    def _transact(
        self,
        calls: Sequence[_Asked],
        replace_steps: Callable[[sqlite3.Connection, _Steps], list[bool]],
    ) -> list[list[bool]]:
        connection, now_ms = self._writer.use(), self._clock_ms()
        results: list[list[bool]] = []
        created = 0
        with _transaction(connection):
            for asked in calls:
                if asked and not isinstance(asked[0], Write):
                    results.append(replace_steps(connection, cast(_Steps, asked)))
                else:
                    writes = cast(Sequence[Write], asked)
                    results.append([_write(connection, write, now_ms) for write in writes])
                    created += sum(write.expect is None for write in writes)
            self._sweep(connection, created, now_ms)
        return results

    def _sweep(self, connection: sqlite3.Connection, created: int, now_ms: int) -> None:
        """Look at the next sessions of the round and delete the expired: some per second, two per creation."""
        visits = 2 * created
        if abs(now_ms - self._swept_ms) >= 1000:
            visits, self._swept_ms = visits + _SWEEP_PER_S, now_ms
        if not visits:
            return
        rows = connection.execute(_ROUND, (self._sweep_at, visits)).fetchall()
        self._sweep_at = rows[-1][0] if len(rows) == visits else 0
        for row, key, expires_ms in rows:
            if expires_ms <= now_ms:
                connection.execute("DELETE FROM sessions WHERE id = ?", (row,))
                connection.execute(_FORGET_SIDES, (key,))


class _Lane:
    """A thread with a connection of its own; without a name it is closed."""

    def __init__(self, name: str | None) -> None:
        self._executor = ThreadPoolExecutor(1, name) if name else None
        self.connection: sqlite3.Connection | None = None

    def run(self, work: Callable[..., _T], *args: object) -> Awaitable[_T]:
        if self._executor is None:
            raise _unavailable("the store is closed")
        return asyncio.get_running_loop().run_in_executor(self._executor, work, *args)

    def use(self) -> sqlite3.Connection:
        if self.connection is None:
            raise _unavailable("the store is closed")
        return self.connection

    async def close(self) -> None:
        """Close the connection on its thread, then end the thread."""
        if self._executor is None:
            return
        if self.connection is not None:
            await self.run(self.connection.close)
            self.connection = None
        self._executor.shutdown(wait=False)


def _expires_ms(ttl_s: float | None, now_ms: int) -> int:
    return _NEVER if ttl_s is None else now_ms + int(ttl_s * 1000)


class _SomeRefused(Exception):
    """A plain step found another record than its own: the transaction must not be kept."""


def _replace_all(connection: sqlite3.Connection, steps: _Steps) -> list[bool]:
    """Plain steps by one statement, which says how many were applied, but not which."""
    if connection.executemany(_REPLACE, steps).rowcount != len(steps):
        raise _SomeRefused
    return [True] * len(steps)


def _replace_each(connection: sqlite3.Connection, steps: _Steps) -> list[bool]:
    return [connection.execute(_REPLACE, step).rowcount == 1 for step in steps]


def _write(connection: sqlite3.Connection, write: Write, now_ms: int) -> bool:
    """One compare-and-set; says whether it was applied."""
    key, expect, record, ttl_s, sides, _ = write
    expires_ms = _expires_ms(ttl_s, now_ms)
    if record is None:
        applied = _forget(connection, key, expect, now_ms)
    elif expect is None:
        created = connection.execute(_CREATE, (key, record[TOKEN], expires_ms, record, now_ms))
        applied = created.rowcount == 1
    else:
        replaced = connection.execute(_REPLACE, (record[TOKEN], expires_ms, record, key, expect, now_ms))
        applied = replaced.rowcount == 1
    if applied and (expect is None or record is None):
        connection.execute(_FORGET_SIDES, (key,))
    if applied and sides and record is not None:
        connection.executemany(_SET_SIDE, [(key, name, side) for name, side in sides.items()])
    return applied


def _forget(connection: sqlite3.Connection, key: str, expect: bytes | None, now_ms: int) -> bool:
    """Delete a record; with `expect` None there must be none."""
    if expect is None:
        return connection.execute(_LOAD, (key, now_ms)).fetchone() is None
    return connection.execute(_FORGET, (key, expect, now_ms)).rowcount == 1


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing; takes the write lock at once, so that two processes never deadlock."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite has rolled back by itself after a full disk
            connection.execute("ROLLBACK")
        raise


def _patiently(work: Callable[[], _T], timeout_s: float) -> _T:
    """Retry where SQLite refuses without asking its busy handler (the first change to a write-ahead log)."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _unavailable(facts: str, retry_after_s: float = 1.0) -> StoreUnavailable:
    return StoreUnavailable(f"{facts}.", retry_after_s=retry_after_s)


@contextmanager
def _translated(path: Path, told: str = "SQLite") -> Iterator[None]:
    """sqlite3's errors become StoreUnavailable; retry soon where another process writes, late on a full disk.

    Args:
        told: What the error names; who steps a session need not know where its file is, the log does.
    """
    try:
        yield
    except sqlite3.Error as error:
        _log.warning("%s: %s", path, error)
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        retry_after_s = {sqlite3.SQLITE_BUSY: 0.1, sqlite3.SQLITE_FULL: 5.0}.get(code, 1.0)
        raise _unavailable(f"{told}: {error}", retry_after_s) from error
