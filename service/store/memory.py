"""Sessions in the memory of this process: for tests, trials and state that may be lost.

A restart forgets everything and no other process sees it. No method ever suspends.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from heapq import nsmallest
from math import inf
from typing import Final

from ..records.block import Block
from ..records.layout import TOKEN
from . import Bytes, Done, Write

_GONE: Final[tuple[bytes, float]] = (b"", inf)


class _Roster:
    """Records (B, W) of a block that stays; whole until one of its sessions is written by itself."""

    __slots__ = ("applied", "records", "whole")

    def __init__(self, records: Bytes) -> None:
        self.records, self.whole = records, True
        self.applied = [True] * len(records)


class _Member:
    """A record in a roster."""

    __slots__ = ("_at", "roster")

    def __init__(self, roster: _Roster, at: int) -> None:
        self.roster, self._at = roster, at

    def __bytes__(self) -> bytes:
        record: bytes = self.roster.records[self._at].tobytes()
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

    def replace(self, block: Block, done: Done) -> None:
        now, roster = self._clock(), block.place
        lasts = block.stays and block.ttl_s is None  # a record in a roster cannot expire by itself
        if lasts and isinstance(roster, _Roster) and roster.whole and roster.records is block.old:
            roster.records, applied = block.new, roster.applied
            self._sweep(1, now)
        else:
            applied = self._put_each(block, now)
            if lasts and all(applied):
                roster = block.place = _Roster(block.new)
                for at, key in enumerate(block.keys):
                    self._records[key] = (_Member(roster, at), inf)
        done(range(len(applied)), applied)

    async def change(self, writes: Sequence[Write]) -> list[bool]:
        now, created, applied = self._clock(), 0, []
        for key, expect, record, ttl_s, sides, _ in writes:
            applied.append(self._holds(key, expect or b"", now))
            if not applied[-1]:
                continue
            if expect is None or record is None:
                self._forget(key)
                created += 1
            if record is not None:
                self._records[key] = (record, inf if ttl_s is None else now + ttl_s)
                if sides:
                    self._sides.setdefault(key, {}).update(sides)
        self._sweep(1 + 2 * created, now)
        return applied

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

    def _put_each(self, block: Block, now: float) -> list[bool]:
        """Put the records of a block one by one."""
        expires, records, holds = inf if block.ttl_s is None else now + block.ttl_s, self._records, self._holds
        applied, created = [], 0
        for key, token, record in zip(block.keys, block.expected(), block.records(), strict=True):
            applied.append(fits := holds(key, token, now))
            if fits:
                if not token:
                    self._forget(key)  # what is left of one that has expired
                    created += 1
                records[key] = (record, expires)
        self._sweep(1 + 2 * created, now)
        return applied

    def _holds(self, key: str, token: bytes, now: float) -> bool:
        """Whether this is the token of the record under `key` (b"": there is none), which will be changed then."""
        held, expires = self._records.get(key, _GONE)
        if expires <= now:
            return not token
        if isinstance(held, bytes):
            return held[TOKEN] == token
        if fits := bytes(held)[TOKEN] == token:
            held.roster.whole = False
        return fits

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
