"""Durability `interval`: steps are acknowledged at once and written to the store behind a little later.

A crash of the process loses what was acknowledged in the last interval at most: what waits is written twice per
interval, and where that takes too long or fails, commits wait or are refused until it is done. Creating and forgetting
a session and its side records are written at once. A session must be stepped by one process at a time: where another
one wrote it, what is waiting here is dropped, and counted.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from typing import Final

from stepcast.errors import StoreUnavailable

from ..records.block import Block
from ..records.layout import TOKEN
from . import Done, Store, Write, as_writes, tell

_log = logging.getLogger(__name__)

_PER_FLUSH_CALL: Final = 256
_KNOWN_TOKENS: Final = 65536


@dataclass(slots=True)
class _Waiting:
    """The newest record of a session, not yet in the store behind."""

    record: bytes
    expires: float
    touch_sides: bool
    replaces: set[bytes]
    """Tokens of records that it may replace; several where it is unknown which one the store has."""

    @property
    def in_doubt(self) -> bool:
        return len(self.replaces) > 1


class BehindStore:
    """A store in front of another one.

    Args:
        base: Where sessions rest.
        interval_s: How long an acknowledged step may wait to be written: the loss window.
        clock: Seconds, monotonic.
    """

    def __init__(self, base: Store, interval_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.volatile = base.volatile
        self.dropped = 0
        """Sessions whose waiting record was dropped because another process had written them."""
        self._base = base
        self._interval_s = interval_s
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}
        self._flushing: dict[str, _Waiting] = {}
        self._since = inf  # when the oldest of what waits came
        self._flushing_since = inf  # and of what is being written
        self._known: OrderedDict[str, tuple[bytes, float]] = OrderedDict()  # token and expiry, as the base has it
        self._passing: set[str] = set()  # keys of writes that go straight to the base
        self._one_writer = asyncio.Lock()
        self._timer: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self._base.open()
        self._timer = asyncio.create_task(self._tick())

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.wait([self._timer])
            self._timer = None
        try:
            await self.flush()
        except StoreUnavailable as error:
            _log.error("%d sessions lost their last steps at the end: %s", len(self._waiting), error)
            self._waiting.clear()
        await self._base.close()

    async def ping(self) -> None:
        await self._keep_promise()
        await self._base.ping()

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        now = self._clock()
        own = [self._waiting.get(key) or self._flushing.get(key) for key in keys]
        records = [waiting.record if waiting and waiting.expires > now else None for waiting in own]
        missing = [i for i, waiting in enumerate(own) if waiting is None]
        if missing:
            for i, record in zip(missing, await self._base.load([keys[i] for i in missing]), strict=True):
                records[i] = record
        return records

    def replace(self, block: Block, done: Done) -> None:
        tell(done, range(len(block)), self.change(as_writes(block)))

    async def change(self, writes: Sequence[Write]) -> list[bool]:
        await self._keep_promise()
        through = {i: write for i, write in enumerate(writes) if self._goes_through(write)}
        applied = [False] * len(writes)
        if through:
            for i, result in zip(through, await self._change_now(list(through.values())), strict=True):
                applied[i] = result
        later = [i for i in range(len(writes)) if i not in through]
        await self._learn([writes[i].key for i in later])
        for i in later:
            applied[i] = self._keep(writes[i])
        return applied

    async def list_keys(self, prefix: str, cursor: str, limit: int) -> tuple[list[str], str]:
        return await self._base.list_keys(prefix, cursor, limit)

    async def load_side(self, key: str, name: str) -> bytes | None:
        return await self._base.load_side(key, name)

    async def list_sides(self, key: str) -> list[str]:
        return await self._base.list_sides(key)

    async def flush(self) -> None:
        """Write all that waits. Raises StoreUnavailable where that fails; it goes on waiting then."""
        async with self._one_writer:
            with self._taken(list(self._waiting)):
                await self._write_out()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s / 2)
            try:
                await self.flush()
            except StoreUnavailable as error:
                _log.warning("%d sessions wait to be stored: %s", len(self._waiting), error)

    async def _keep_promise(self) -> None:
        """Acknowledge no more while something waits longer than promised: write it first, or fail as that fails."""
        while self._clock() - min(self._since, self._flushing_since) > self._interval_s:
            await self.flush()

    def _goes_through(self, write: Write) -> bool:
        """Whether a write is more than a step: only steps wait."""
        return write.expect is None or write.record is None or bool(write.sides) or write.key in self._passing

    async def _change_now(self, writes: Sequence[Write]) -> list[bool]:
        """Write to the base now, after what waits for the same sessions."""
        keys = {write.key for write in writes}
        self._passing |= keys
        try:
            async with self._one_writer:
                with self._taken([key for key in keys if key in self._waiting]):
                    await self._write_out()
                for key in keys:
                    self._known.pop(key, None)
                return await self._base.change(writes)
        finally:
            self._passing -= keys

    async def _learn(self, keys: Sequence[str]) -> None:
        """Read the tokens of sessions that we know nothing of."""
        unknown = [key for key in keys if not self._is_known(key)]
        if not unknown:
            return
        for key, record in zip(unknown, await self._base.load(unknown), strict=True):
            if record is not None and not self._is_known(key):
                self._remember(key, record[TOKEN], inf)

    def _is_known(self, key: str) -> bool:
        return key in self._waiting or key in self._flushing or key in self._known

    def _remember(self, key: str, token: bytes, expires: float) -> None:
        self._known[key] = (token, expires)
        self._known.move_to_end(key)
        if len(self._known) > _KNOWN_TOKENS:
            self._known.popitem(last=False)

    def _token(self, key: str) -> bytes | None:
        """The token of the newest record that we know of, None if it has expired or is unknown."""
        waiting = self._waiting.get(key) or self._flushing.get(key)
        if waiting is not None:
            return waiting.record[TOKEN] if waiting.expires > self._clock() else None
        token, expires = self._known.get(key, (None, inf))
        return token if expires > self._clock() else None

    def _keep(self, write: Write) -> bool:
        """Compare and set in what waits."""
        key, expect, record, ttl_s, _, touch_sides = write
        if expect is None or record is None or self._token(key) != expect:
            self._known.pop(key, None)  # ask the base the next time
            return False
        now = self._clock()
        older = self._waiting.get(key)
        self._waiting[key] = _Waiting(
            record,
            inf if ttl_s is None else now + ttl_s,
            touch_sides or (older is not None and older.touch_sides),
            older.replaces if older is not None else {expect},
        )
        self._since = min(self._since, now)
        return True

    @contextmanager
    def _taken(self, keys: Sequence[str]) -> Iterator[None]:
        """Move sessions from waiting to flushing; those that are still there at the end go back."""
        complete = len(keys) == len(self._waiting)
        self._flushing = {key: self._waiting.pop(key) for key in keys}
        self._flushing_since = since = self._since
        if complete:
            self._since = inf
        try:
            yield
        finally:
            if self._flushing:
                self._since = since
            for key, left in self._flushing.items():
                newer = self._waiting.setdefault(key, left)
                newer.replaces |= left.replaces | {left.record[TOKEN]}  # it may have been written
            self._flushing, self._flushing_since = {}, inf

    async def _write_out(self) -> None:
        """Write what is being flushed, some sessions at a time, and take each out as its fate is known."""
        await self._clear_doubts()
        while self._flushing:
            now = self._clock()
            batch = dict(list(self._flushing.items())[:_PER_FLUSH_CALL])
            results = await self._base.change([_as_write(key, waiting, now) for key, waiting in batch.items()])
            for (key, waiting), applied in zip(batch.items(), results, strict=True):
                self._settle(key, waiting, applied)

    async def _clear_doubts(self) -> None:
        """Find out which record the base has where a flush before had an unknown end."""
        doubtful = [key for key, waiting in self._flushing.items() if waiting.in_doubt]
        if not doubtful:
            return
        for key, record in zip(doubtful, await self._base.load(doubtful), strict=True):
            waiting = self._flushing[key]
            token = record[TOKEN] if record is not None else b""
            if token == waiting.record[TOKEN] or token not in waiting.replaces:
                self._settle(key, waiting, token == waiting.record[TOKEN])
            else:
                waiting.replaces = {token}

    def _settle(self, key: str, waiting: _Waiting, applied: bool) -> None:
        del self._flushing[key]
        if applied:
            self._remember(key, waiting.record[TOKEN], waiting.expires)
            return
        self.dropped += 1
        _log.warning("session %r was written by another process: its steps that waited here are dropped", key)
        with suppress(KeyError):
            del self._waiting[key]
        self._known.pop(key, None)


def _as_write(key: str, waiting: _Waiting, now: float) -> Write:
    (expect,) = waiting.replaces
    ttl_s = None if waiting.expires == inf else max(waiting.expires - now, 0.001)
    return Write(key, expect, waiting.record, ttl_s, None, waiting.touch_sides)
