"""Durability `interval`: steps are acknowledged at once and written to the store behind a little later.

A crash loses what was acknowledged in the last interval at most: what waits is written twice per interval, and where
that takes too long or fails, commits wait or are refused until it is done. Creating and forgetting a session and its
side records are written at once. A session must be stepped by one process at a time: where another one wrote it, what
is waiting here is dropped, and counted.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
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
    replaces: set[bytes]  # tokens of records that it may replace; several where it is unknown which one the store has


class BehindStore:
    """A store in front of `base`, where sessions rest.

    An acknowledged step waits `interval_s` at most to be written: the loss window. The clock is monotonic, in seconds.
    """

    def __init__(self, base: Store, interval_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.volatile, self.tells = base.volatile, False
        self.dropped = 0  # sessions whose waiting record was dropped because another process had written them
        self._base, self._interval_s, self._clock = base, interval_s, clock
        self._waiting: dict[str, _Waiting] = {}
        self._flushing: dict[str, _Waiting] = {}
        self._since = self._flushing_since = inf  # when the oldest of what waits, and of what is being written, came
        self._known: OrderedDict[str, tuple[bytes, float]] = OrderedDict()  # token and expiry, as the base has it
        self._passing: set[str] = set()  # keys of writes that go straight to the base
        self._one_writer = asyncio.Lock()
        self._timer: asyncio.Task[None] | None = None
        # Only steps wait, so the base knows all of these.
        self.list_keys, self.load_side, self.list_sides = base.list_keys, base.load_side, base.list_sides
        self.apart, self.usage = base.apart, base.usage

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
        now, own = self._clock(), {key: self._newest(key) for key in keys}
        missing = [key for key, waiting in own.items() if waiting is None]
        records = dict(zip(missing, await self._base.load(missing), strict=True)) if missing else {}
        for key, waiting in own.items():
            if waiting is not None:
                records[key] = waiting.record if waiting.expires > now else None
        return [records[key] for key in keys]

    def replace(self, block: Block, done: Done) -> None:
        tell(done, range(len(block)), self.change(as_writes(block)))

    async def change(self, writes: Sequence[Write]) -> list[bool]:
        await self._keep_promise()
        at_once: dict[str, Write] = {}
        for write in writes:  # only steps wait
            if not write.expect or not write.record or write.sides or write.key in self._passing:
                at_once[write.key] = write
        applied = dict(zip(at_once, await self._change_now(list(at_once.values())), strict=True)) if at_once else {}
        await self._learn([write.key for write in writes if write.key not in at_once])
        return [applied[write.key] if write.key in at_once else self._keep(write) for write in writes]

    async def flush(self) -> None:
        """Write all that waits. Raises StoreUnavailable where that fails; it goes on waiting then."""
        async with self._one_writer:
            await self._write_out(list(self._waiting))

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

    async def _change_now(self, writes: Sequence[Write]) -> list[bool]:
        """Write to the base now, after what waits for the same sessions."""
        keys = {write.key for write in writes}
        self._passing |= keys
        try:
            async with self._one_writer:
                await self._write_out([key for key in keys if key in self._waiting])
                for key in keys:
                    self._known.pop(key, None)
                return await self._base.change(writes)
        finally:
            self._passing -= keys

    async def _learn(self, keys: Sequence[str]) -> None:
        """Read the tokens of sessions that we know nothing of."""
        unknown = [key for key in keys if not self._newest(key) and key not in self._known]
        for key, record in zip(unknown, await self._base.load(unknown) if unknown else (), strict=True):
            if record is not None and not self._newest(key) and key not in self._known:
                self._remember(key, record[TOKEN], inf)

    def _newest(self, key: str) -> _Waiting | None:
        return self._waiting.get(key) or self._flushing.get(key)

    def _remember(self, key: str, token: bytes, expires: float) -> None:
        self._known[key] = (token, expires)
        self._known.move_to_end(key)
        if len(self._known) > _KNOWN_TOKENS:
            self._known.popitem(last=False)

    def _keep(self, write: Write) -> bool:
        """Compare and set in what waits."""
        key, expect, record, ttl_s, _, touch_sides = write
        now, newest = self._clock(), self._newest(key)
        token, expires = (newest.record[TOKEN], newest.expires) if newest else self._known.get(key, (None, inf))
        if expect is None or record is None or token != expect or expires <= now:
            self._known.pop(key, None)  # ask the base the next time
            return False
        kept = self._waiting.setdefault(key, _Waiting(record, inf, False, {expect}))
        kept.record, kept.expires = record, inf if ttl_s is None else now + ttl_s
        kept.touch_sides |= touch_sides
        self._since = min(self._since, now)
        return True

    async def _write_out(self, keys: Sequence[str]) -> None:
        """Write what waits for some sessions, and take each out as its fate is known; the rest goes on waiting."""
        since, is_all = self._since, len(keys) == len(self._waiting)
        self._flushing = {key: self._waiting.pop(key) for key in keys}
        self._flushing_since, self._since = since, inf if is_all else since
        try:
            await self._clear_doubts()
            while self._flushing:
                now, batch, writes = self._clock(), list(self._flushing.items())[:_PER_FLUSH_CALL], []
                for key, waiting in batch:
                    (expect,) = waiting.replaces
                    ttl_s = None if waiting.expires == inf else max(waiting.expires - now, 0.001)
                    writes.append(Write(key, expect, waiting.record, ttl_s, None, waiting.touch_sides))
                for (key, waiting), applied in zip(batch, await self._base.change(writes), strict=True):
                    self._settle(key, waiting, applied)
        finally:
            if self._flushing:
                self._since = since
            for key, left in self._flushing.items():
                newer = self._waiting.setdefault(key, left)
                newer.replaces |= left.replaces | {left.record[TOKEN]}  # it may have been written
            self._flushing, self._flushing_since = {}, inf

    async def _clear_doubts(self) -> None:
        """Find out which record the base has where a flush before had an unknown end."""
        doubtful = [key for key, waiting in self._flushing.items() if len(waiting.replaces) > 1]
        for key, record in zip(doubtful, await self._base.load(doubtful) if doubtful else (), strict=True):
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
        self._waiting.pop(key, None)
        self._known.pop(key, None)
