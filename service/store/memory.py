"""Sessions in the memory of this process: for tests, trials and state that may be lost.

A restart forgets everything and no other process sees it. No method ever suspends.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from heapq import nsmallest
from math import inf
from typing import Final

from ..records.layout import TOKEN
from . import Bytes, Replaced, Rows, Write, replace_each

_GONE: Final[tuple[bytes, float]] = (b"", inf)


class _Block:
    """Records side by side; whole until one of their sessions is written by itself."""

    __slots__ = ("applied", "records", "whole")

    def __init__(self, records: Bytes) -> None:
        self.records, self.whole = records, True
        self.applied = [True] * len(records)


class _Member:
    """A record in a block."""

    __slots__ = ("_at", "block")

    def __init__(self, block: _Block, at: int) -> None:
        self.block, self._at = block, at

    def __bytes__(self) -> bytes:
        record: bytes = self.block.records[self._at].tobytes()
        return record


class MemoryStore:
    """A dict with compare-and-set and expiry.

    Expired sessions vanish for readers at once; their memory is freed by a sweep that goes round the sessions: every
    commit looks at one, and at two more for each session that it creates. So a commit does bounded work, and at most
    about as many expired sessions are held as live ones.

    Args:
        clock: Seconds, monotonic.
    """

    volatile = True

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: OrderedDict[str, tuple[bytes | _Member, float]] = OrderedDict()  # key: (record, expires)
        self._sides: dict[str, dict[str, bytes]] = {}

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to flush."""

    async def ping(self) -> None:
        """Memory can always take a write."""

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        now = self._clock()
        return [self._live(key, now) for key in keys]

    async def commit(self, writes: Sequence[Write]) -> list[bool]:
        now, records, visits = self._clock(), self._records, 1
        applied = []
        for write in writes:
            key, expect, record, ttl_s, sides, _ = write
            held, expires = records.get(key, _GONE)
            old = held if isinstance(held, bytes) else bytes(held)
            if (old[TOKEN] if expires > now else b"") != (expect or b""):
                applied.append(False)
                continue
            if isinstance(held, _Member):
                held.block.whole = False
            if expect is None or record is None:
                self._forget(key)
                visits += 2
            if record is not None:
                records[key] = (record, inf if ttl_s is None else now + ttl_s)
                if sides:
                    self._sides.setdefault(key, {}).update(sides)
            applied.append(True)
        self._sweep(visits, now)
        return applied

    def replace(
        self,
        keys: Sequence[str],
        old: Sequence[bytes],
        new: Sequence[bytes],
        ttls_s: Sequence[float | None],
        done: Replaced,
    ) -> None:
        now, records, applied = self._clock(), self._records, []
        for key, before, after, ttl_s in zip(keys, old, new, ttls_s, strict=True):
            there, expires = records.get(key, _GONE)
            if isinstance(there, _Member):
                there.block.whole = False
                there = bytes(there)
            if expires <= now or (there is not before and there[TOKEN] != before[TOKEN]):
                applied.append(False)
            else:
                records[key] = (after, inf if ttl_s is None else now + ttl_s)
                applied.append(True)
        self._sweep(1, now)
        done(applied)

    def replace_rows(self, rows: Rows, new: Bytes, done: Replaced) -> None:
        block = rows.place
        if isinstance(block, _Block) and block.whole and block.records is rows.records:
            block.records = new
            self._sweep(1, self._clock())
            done(block.applied)
            return

        def replaced(outcome: list[bool] | BaseException) -> None:
            if isinstance(outcome, list) and all(outcome) and rows.ttl_s is None:
                block = rows.place = _Block(new)
                for at, key in enumerate(rows.keys):
                    self._records[key] = (_Member(block, at), inf)
            done(outcome)

        replace_each(self, rows, new, replaced)

    async def list_keys(self, prefix: str, cursor: str, limit: int) -> tuple[list[str], str]:
        now = self._clock()
        found = (
            key
            for key, (_, expires) in self._records.items()
            if key > cursor and key.startswith(prefix) and expires > now
        )
        keys = nsmallest(limit, found)
        return keys, keys[-1] if len(keys) == limit else ""

    async def load_side(self, key: str, name: str) -> bytes | None:
        return self._live_sides(key).get(name)

    async def list_sides(self, key: str) -> list[str]:
        return sorted(self._live_sides(key))

    def _live(self, key: str, now: float) -> bytes | None:
        record, expires = self._records.get(key, _GONE)
        if expires <= now or record is _GONE[0]:
            return None
        return record if isinstance(record, bytes) else bytes(record)

    def _live_sides(self, key: str) -> dict[str, bytes]:
        if self._live(key, self._clock()) is None:
            return {}
        return self._sides.get(key, {})

    def _forget(self, key: str) -> None:
        self._records.pop(key, None)
        self._sides.pop(key, None)

    def _sweep(self, visits: int, now: float) -> None:
        """Look at the next `visits` sessions of the round: drop the expired, send the others to its end."""
        records = self._records
        for _ in range(min(visits, len(records))):
            key = next(iter(records))
            if records[key][1] <= now:
                self._forget(key)
            else:
                records.move_to_end(key)
