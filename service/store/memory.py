"""Sessions in the memory of this process: for tests, trials and state that may be lost.

A restart forgets everything and no other process sees it. No method ever suspends.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf
from typing import Final

from ..records.block import Block, Bytes
from ..records.layout import TOKEN
from . import Done, Write, namespace_of

_PER_TURN: Final = 10_000  # sessions that are counted before others have their turn
_GONE: Final[tuple[bytes, float]] = (b"", inf)


class _Roster:
    """Records (B, W) of a block that stays; whole until one of its sessions is written by itself."""

    def __init__(self, records: Bytes) -> None:
        self.records, self.applied, self.whole = records, [True] * len(records), True


@dataclass(slots=True)
class _Member:
    """A record in a roster."""

    roster: _Roster
    at: int

    def __bytes__(self) -> bytes:
        return self.roster.records[self.at].tobytes()  # type: ignore[no-any-return]


class MemoryStore:
    """A dict with compare-and-set and expiry.

    Expired sessions vanish for readers at once; their memory is freed by a sweep that goes round the sessions: every
    commit looks at one, and at two more for each session that it creates. So a commit does bounded work, and at most
    about as many expired sessions are held as live ones. The clock is monotonic, in seconds.
    """

    volatile = True
    tells = False

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: OrderedDict[str, tuple[bytes | _Member, float]] = OrderedDict()  # key: (record, expires)
        self._sides: dict[str, dict[str, bytes]] = {}
        self._visits = 1  # of the next sweep

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to flush."""

    async def ping(self) -> None:
        """Memory can always take a write."""

    def apart(self, keys: Sequence[str]) -> Sequence[Sequence[int]]:
        return [range(len(keys))]

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        now = self._clock()
        return [self._live(key, now) for key in keys]

    def replace(self, block: Block, done: Done) -> None:
        now, roster = self._clock(), block.place
        lasts = block.stays and block.ttl_s is None  # a record in a roster cannot expire by itself
        if lasts and isinstance(roster, _Roster) and roster.whole and roster.records is block.old:
            roster.records, applied = block.new, roster.applied
        else:
            expires, applied = inf if block.ttl_s is None else now + block.ttl_s, []
            for key, token, record in zip(block.keys, block.expected(), block.records(), strict=True):
                applied.append(self._put(key, token, record, expires, now))
            if lasts and all(applied):
                roster = block.place = _Roster(block.new)
                for at, key in enumerate(block.keys):
                    self._records[key] = (_Member(roster, at), inf)
        self._sweep(now)
        done(range(len(applied)), applied)

    async def change(self, writes: Sequence[Write]) -> list[bool]:
        now, applied = self._clock(), []
        for key, expect, record, ttl_s, sides, _ in writes:
            applied.append(self._put(key, expect or b"", record, inf if ttl_s is None else now + ttl_s, now))
            if applied[-1] and record is not None and sides:
                self._sides.setdefault(key, {}).update(sides)
        self._sweep(now)
        return applied

    async def list_keys(self, prefix: str, cursor: str, limit: int) -> tuple[list[str], str]:
        now = self._clock()
        live = (key for key, (_, expires) in self._records.items() if expires > now)
        keys = nsmallest(limit, (key for key in live if key > cursor and key.startswith(prefix)))
        return keys, keys[-1] if len(keys) == limit else ""

    async def usage(self) -> dict[str, tuple[int, int]]:
        now, used = self._clock(), dict[str, tuple[int, int]]()
        for at, key in enumerate(list(self._records)):
            record = self._live(key, now)
            if record is not None:
                sessions, size = used.get(namespace_of(key), (0, 0))
                used[namespace_of(key)] = sessions + 1, size + len(record)
            if not at % _PER_TURN:
                await asyncio.sleep(0)
        return used

    async def load_side(self, key: str, name: str) -> bytes | None:
        return self._live_sides(key).get(name)

    async def list_sides(self, key: str) -> list[str]:
        return sorted(self._live_sides(key))

    def _put(self, key: str, token: bytes, record: bytes | None, expires: float, now: float) -> bool:
        """Compare and set (token b"", record None: there is none); says whether it was applied."""
        held, until = self._records.get(key, _GONE)
        if until <= now:
            fits = not token
        elif isinstance(held, bytes):
            fits = held[TOKEN] == token
        elif fits := bytes(held)[TOKEN] == token:
            held.roster.whole = False
        if not fits:
            return False
        if not token or record is None:
            self._forget(key)  # also what is left of one that has expired
            self._visits += 2
        if record is not None:
            self._records[key] = (record, expires)
        return True

    def _live(self, key: str, now: float) -> bytes | None:
        record, expires = self._records.get(key, _GONE)
        if expires <= now or record is _GONE[0]:
            return None
        return record if isinstance(record, bytes) else bytes(record)

    def _live_sides(self, key: str) -> dict[str, bytes]:
        return self._sides.get(key, {}) if self._live(key, self._clock()) is not None else {}

    def _forget(self, key: str) -> None:
        self._records.pop(key, None)
        self._sides.pop(key, None)

    def _sweep(self, now: float) -> None:
        """Look at the next sessions of the round: drop the expired, send the others to its end."""
        records, visits, self._visits = self._records, self._visits, 1
        for _ in range(min(visits, len(records))):
            key = next(iter(records))
            if records[key][1] <= now:
                self._forget(key)
            else:
                records.move_to_end(key)
