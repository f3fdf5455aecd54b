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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final, TypeVar

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
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, token BLOB NOT NULL, expires_ms INTEGER NOT NULL,
    record BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS sides (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, name TEXT NOT NULL, record BLOB NOT NULL, UNIQUE (key, name)
);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""
_BEGIN: Final = "BEGIN IMMEDIATE"  # takes the write lock at once, so that two processes never deadlock
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
_USAGE: Final = """
SELECT substr(key, 1, instr(key, '/') - 1), count(*), sum(length(record)) FROM sessions WHERE expires_ms > ? GROUP BY 1
"""
_LIST: Final = "SELECT key FROM sessions WHERE key > ? AND key >= ? AND key < ? AND expires_ms > ? ORDER BY key LIMIT ?"
_SIDE: Final = "SELECT sides.record FROM sides JOIN sessions USING (key) WHERE key = ? AND name = ? AND expires_ms > ?"
_SIDES: Final = "SELECT name FROM sides JOIN sessions USING (key) WHERE key = ? AND expires_ms > ? ORDER BY name"
_ROUND: Final = "SELECT id, key, expires_ms FROM sessions WHERE id > ? ORDER BY id LIMIT ?"

_T = TypeVar("_T")
_Lane = tuple[ThreadPoolExecutor, Connection]  # a thread, and the connection that it uses
_Steps = list[tuple[bytes, int, bytes, str, bytes, int]]  # a block, as _REPLACE takes its rows
_Call = tuple[Sequence[Write], _Steps]  # one of them is empty


class SqliteStore:
    """One SQLite file, made if it is not there; its directory is not.

    `full_sync` waits for the disk at every transaction (synchronous=FULL), `busy_timeout_s` is how long a commit waits
    for another process's transaction, `clock_ms` a wall clock in ms since the epoch: expiry outlives the process.
    """

    volatile = False
    tells = False

    def __init__(
        self,
        path: str | Path,
        *,
        full_sync: bool = False,
        busy_timeout_s: float = 2.0,
        clock_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._path, self._full_sync = Path(path), full_sync
        self._busy_timeout_s, self._clock_ms = busy_timeout_s, clock_ms
        self._writer: _Lane | None = None
        self._reader: _Lane | None = None
        self._waiting: list[tuple[_Call, asyncio.Future[list[bool]]]] = []
        self._drainer: asyncio.Task[None] | None = None
        self._sweep_at = self._swept_ms = 0

    async def open(self) -> None:
        await self.close()
        try:
            with _translated(self._path, str(self._path)):
                self._writer = await self._lane("store-write")
                await _run(self._writer, self._prepare)
                self._reader = await self._lane("store-read")
                await _run(self._reader, self._set_up)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        while self._drainer is not None:
            await asyncio.wait([self._drainer])
        lanes = self._reader, self._writer
        self._reader = self._writer = None
        for lane in filter(None, lanes):
            await _run(lane, Connection.close)
            lane[0].shutdown(wait=False)

    async def ping(self) -> None:
        await self._on(self._writer, _touch)

    def apart(self, keys: Sequence[str]) -> Sequence[Sequence[int]]:
        return [range(len(keys))]

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        return await self._on(self._reader, _load, keys, self._clock_ms())

    def replace(self, block: Block, done: Done) -> None:
        now_ms, expected = self._clock_ms(), block.expected()
        if not expected[0]:  # new sessions
            call: _Call = as_writes(block), []
        else:
            expires_ms, rows = _expires_ms(block.ttl_s, now_ms), zip(block.keys, expected, block.records(), strict=True)
            call = [], [(record[TOKEN], expires_ms, record, key, token, now_ms) for key, token, record in rows]
        tell(done, range(len(block)), self._accept(call))

    async def change(self, writes: Sequence[Write]) -> list[bool]:
        return await self._accept((writes, []))

    async def list_keys(self, prefix: str, cursor: str, limit: int) -> tuple[list[str], str]:
        bounds = cursor, prefix, prefix + _LAST, self._clock_ms(), limit
        keys = await self._on(self._reader, _column, _LIST, *bounds)
        return keys, keys[-1] if len(keys) == limit else ""

    async def usage(self) -> dict[str, tuple[int, int]]:
        return await self._on(self._reader, _usage, self._clock_ms())

    async def load_side(self, key: str, name: str) -> bytes | None:
        found = await self._on(self._reader, _column, _SIDE, key, name, self._clock_ms())
        return found[0] if found else None

    async def list_sides(self, key: str) -> list[str]:
        return await self._on(self._reader, _column, _SIDES, key, self._clock_ms())

    async def _lane(self, name: str) -> _Lane:
        """A connection that any thread may use, and the one that will."""
        connect = partial(sqlite3.connect, timeout=self._busy_timeout_s, isolation_level=None, cached_statements=32)
        return ThreadPoolExecutor(1, name), await asyncio.to_thread(connect, self._path, check_same_thread=False)

    async def _on(self, lane: _Lane | None, work: Callable[..., _T], *args: object) -> _T:
        """Do `work` with a lane's connection on its thread; sqlite3's errors become ours."""
        if lane is None:
            raise _unavailable("the store is closed")
        with _translated(self._path):
            return await _run(lane, work, *args)

    def _accept(self, call: _Call) -> "asyncio.Future[list[bool]]":
        """Let writes wait for the next transaction."""
        done: asyncio.Future[list[bool]] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, done))
        if self._drainer is None:
            self._drainer = asyncio.create_task(self._drain())
        return done

    async def _drain(self) -> None:
        """Apply what waits, one transaction after the other until nothing waits; its fate is the fate of each call."""
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                results: Sequence[list[bool] | Exception]
                try:
                    results = await self._on(self._writer, self._apply, [call for call, _ in group])
                except Exception as error:
                    results = [error] * len(group)
                for (_, done), result in zip(group, results, strict=True):
                    if done.done():  # its caller is gone
                        continue
                    if isinstance(result, Exception):
                        done.set_exception(result)
                    else:
                        done.set_result(result)
        finally:
            self._drainer = None

    # What follows runs on the lanes' threads.

    def _set_up(self, connection: Connection) -> None:
        connection.execute(f"PRAGMA synchronous = {'FULL' if self._full_sync else 'NORMAL'}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")

    def _prepare(self, connection: Connection) -> None:
        """Make the tables, or check that they are of a version we know."""
        self._set_up(connection)
        version, tables = connection.execute(_LOOK).fetchone()
        if version > SCHEMA_VERSION:
            raise _unavailable(f"{self._path} has schema {version}, this server knows up to {SCHEMA_VERSION}")
        if not version and tables:
            raise _unavailable(f"{self._path} is a SQLite file of another program")
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            self._switch_to_wal(connection)
        if not version:
            connection.executescript(_SCHEMA)
        _touch(connection)

    def _switch_to_wal(self, connection: Connection) -> None:
        """For a new file, or one that was copied by a tool that leaves the write-ahead log out."""
        deadline, mode = time.monotonic() + self._busy_timeout_s, ""
        while not mode:
            try:
                mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            except sqlite3.OperationalError as error:  # here SQLite refuses without asking its busy handler
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise _unavailable(f"{self._path} cannot have a write-ahead log. Put it on a local disk")

    def _apply(self, connection: Connection, calls: Sequence[_Call], one_by_one: bool = False) -> list[list[bool]]:
        """One transaction for several commits; where a plain step is refused, all of it again, step by step."""
        now_ms, created, results = self._clock_ms(), 0, []
        try:
            with connection:
                connection.execute(_BEGIN)
                for writes, steps in calls:
                    others = [_write(connection, write, now_ms) for write in writes]
                    results.append(_replace(connection, steps, one_by_one) if steps else others)
                    created += sum(write.expect is None for write in writes)
                self._sweep(connection, created, now_ms)
        except _SomeRefused:
            return self._apply(connection, calls, one_by_one=True)
        return results

    def _sweep(self, connection: Connection, created: int, now_ms: int) -> None:
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


def _run(lane: _Lane, work: Callable[..., _T], *args: object) -> "asyncio.Future[_T]":
    thread, connection = lane
    return asyncio.get_running_loop().run_in_executor(thread, work, connection, *args)


def _touch(connection: Connection) -> None:
    """Write something, as only that shows whether the file can be written."""
    with connection:
        connection.execute(_BEGIN)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _load(connection: Connection, keys: Sequence[str], now_ms: int) -> list[bytes | None]:
    rows = [connection.execute(_LOAD, (key, now_ms)).fetchone() for key in keys]
    return [row[0] if row else None for row in rows]


def _column(connection: Connection, query: str, *values: str | int) -> list[Any]:
    return [row[0] for row in connection.execute(query, values)]


def _usage(connection: Connection, now_ms: int) -> dict[str, tuple[int, int]]:
    return {namespace: (count, size) for namespace, count, size in connection.execute(_USAGE, (now_ms,))}


def _expires_ms(ttl_s: float | None, now_ms: int) -> int:
    return _NEVER if ttl_s is None else now_ms + int(ttl_s * 1000)


class _SomeRefused(Exception):
    """A plain step found another record than its own: the transaction must not be kept."""


def _replace(connection: Connection, steps: _Steps, one_by_one: bool) -> list[bool]:
    """Plain steps; by one statement, which says how many were applied, but not which."""
    if one_by_one:
        return [connection.execute(_REPLACE, step).rowcount == 1 for step in steps]
    if connection.executemany(_REPLACE, steps).rowcount != len(steps):
        raise _SomeRefused
    return [True] * len(steps)


def _write(connection: Connection, write: Write, now_ms: int) -> bool:
    """One compare-and-set; says whether it was applied."""
    key, expect, record, ttl_s, sides, _ = write
    if record is None and expect is None:
        applied = connection.execute(_LOAD, (key, now_ms)).fetchone() is None
    elif record is None:
        applied = connection.execute(_FORGET, (key, expect, now_ms)).rowcount == 1
    else:
        new = record[TOKEN], _expires_ms(ttl_s, now_ms), record
        query, values = (_CREATE, (key, *new, now_ms)) if expect is None else (_REPLACE, (*new, key, expect, now_ms))
        applied = connection.execute(query, values).rowcount == 1
    if applied and (expect is None or record is None):
        connection.execute(_FORGET_SIDES, (key,))
    if applied and sides and record is not None:
        connection.executemany(_SET_SIDE, [(key, name, side) for name, side in sides.items()])
    return applied


def _unavailable(facts: str, retry_after_s: float = 1.0) -> StoreUnavailable:
    return StoreUnavailable(f"{facts}.", retry_after_s=retry_after_s)


@contextmanager
def _translated(path: Path, told: str = "SQLite") -> Iterator[None]:
    """sqlite3's errors become StoreUnavailable; retry soon where another process writes, late on a full disk."""
    try:
        yield
    except sqlite3.Error as error:
        _log.warning("%s: %s", path, error)  # who steps a session need not know where its file is, the log does
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        retry_after_s = {sqlite3.SQLITE_BUSY: 0.1, sqlite3.SQLITE_FULL: 5.0}.get(code, 1.0)
        raise _unavailable(f"{told}: {error}", retry_after_s) from error
