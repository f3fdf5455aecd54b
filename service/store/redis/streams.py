"""Redis Streams as a source and a sink.

    <source> or <source>:<i>                      stream: what is to be stepped
    stepcast:{<stream>}:<group>:reader            string: which consumer reads it, until its lease ends
    stepcast:{<source>}:<group>:consumers         sorted set: who is alive, by the end of its lease (ms, Redis' clock)

A reader of a stream has its lease, and every read checks the lease in the same script. A new reader first claims what
others left pending, in order. So whoever reads has every entry before it that is not done with. A reader that slept
through its lease may still step what it has in hand: that is in order too, and a session's record takes each position
once.
"""

import os
import socket
import time
from asyncio import CancelledError, Task, create_task, sleep, wait
from collections.abc import Sequence
from hashlib import blake2b
from itertools import chain
from secrets import token_hex
from typing import Any, Final

from stepcast.errors import ConfigError, StoreUnavailable
from stepcast.shares import share_of

from ...records.block import Letter
from ...telemetry import as_ours, log
from ..streams import Entry, Lag, Share, StreamPlace
from .commands import pack
from .connection import Refused, Replies, ask
from .topology import Nodes

_BELL_MS: Final = 500  # how long Redis keeps us waiting for the next entry, at most
_IDLE_S: Final = 0.05  # between two looks where there is no share to read
_NEW: Final = b""
_BEGIN: Final = b"0-0"

_READ: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
local group, count, cursor = ARGV[3], ARGV[4], ARGV[5]
if cursor == '' then
  local found = redis.call('XREADGROUP', 'GROUP', group, ARGV[1], 'COUNT', count, 'STREAMS', KEYS[2], '>')
  if found then return {'', found[1][2], ''} end
  for _, facts in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
    if facts[2] == group then return {'', {}, facts[8]} end
  end
end
local found = redis.call('XAUTOCLAIM', KEYS[2], group, ARGV[1], 0, cursor, 'COUNT', count)
if found[1] == '0-0' then
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[2], group)) do
    local name, pending, idle = consumer[2], consumer[4], consumer[6]
    if pending == 0 and name ~= ARGV[1] and idle > 10 * tonumber(ARGV[2]) then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[2], group, name)
    end
  end
  return {'', found[2], ''}
end
return {found[1], found[2], ''}
"""
"""Entries for who has the lease, and lengthens it: new ones, or from a cursor on those that are pending, claimed.
False: the lease is another's. The new cursor ('': all are claimed), the entries, and where there is no new one the id
of the last. Once all are claimed, consumers that are long gone are forgotten."""

_HOLD: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '' then return redis.call('UNLINK', KEYS[1]) end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
"""Lengthen a lease, or give it back. 0: it is another's."""

_BEAT: Final = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
return redis.call('ZCARD', KEYS[1])
"""
"""How many consumers are alive, this one among them."""

_BURY: Final = """
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 4))
if ARGV[3] == '1' then redis.call('XDEL', KEYS[1], ARGV[2]) end
return 1
"""
"""Acknowledge an entry and put it among the dead letters, unless another has."""


def source_name(name: str) -> bytes:
    """What a record keeps of a source's name."""
    return blake2b(name.encode(), digest_size=8, person=b"source").digest()


class _Held(Share):
    """A stream that we have the lease of; its pending entries are claimed from `cursor` on, "": they all are."""

    __slots__ = ("cursor", "last", "lease", "leaving")

    def __init__(self, index: int, name: bytes, lease: str) -> None:
        super().__init__(index, name)
        self.lease, self.cursor, self.last = lease, _BEGIN, _BEGIN
        self.leaving = False  # it has more consumers now than when we took it: read on by another, once it is empty


class RedisSource:
    """The source's streams in one Redis.

    Args:
        nodes: Where they are. bell: The same server, by a connection that may be kept waiting.
    """

    def __init__(self, nodes: Nodes, bell: Nodes, place: StreamPlace) -> None:
        self._nodes, self._bell, self._place = nodes, bell, place
        self.name = source_name(place.source)
        self._streams = place.streams()
        self._me = f"{socket.gethostname()}-{os.getpid()}-{token_hex(4)}"
        self._held: dict[int, _Held] = {}
        self._lease_ms = max(1, int(place.lease_s * 1000))
        self._beating: Task[None] | None = None
        self._closed = False

    # --- life ---------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Raises ConfigError where a key is there that is no stream, StoreUnavailable."""
        await _check(self._nodes, *self._streams, self._place.dead.encode())
        await self._make_groups()
        await self._beat()
        self._beating = create_task(self._keep_beating())

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._beating is not None:
            self._beating.cancel()
            await wait([self._beating])
            try:
                await self._give_back(list(self._held.values()))
                await self._ask(pack("ZREM", self._consumers, self._me))
            except StoreUnavailable as error:
                log.warning("the shares could not be given back, others wait for their leases to end: %s", error)
        await self._bell.close()
        await self._nodes.close()

    async def _make_groups(self) -> None:
        """From the first entry on: positions in the records keep apart what was stepped before."""
        make = [pack("XGROUP", "CREATE", name, self._place.group, 0, "MKSTREAM") for name in self._streams]
        for reply in await self._replies(make):
            if isinstance(reply, Refused) and reply.reason != "BUSYGROUP":
                raise reply.error

    # --- the source ---------------------------------------------------------------------------------------------

    async def read(self, room: int) -> list[Entry]:
        held = [share for share in self._held.values() if not share.leaving]
        if not held:
            await sleep(_IDLE_S)
            return []
        count = max(1, room // len(held))
        replies = await self._replies([self._read_command(share, count) for share in held])
        found = list(chain.from_iterable(map(self._entries, held, replies)))
        if not found and all(share.cursor == _NEW and not share.lost for share in held):
            await self._wait(held)
        elif any(isinstance(reply, Refused) for reply in replies):
            await self._make_groups()
        return found

    def _read_command(self, share: _Held, count: int) -> bytes:
        to = self._me, str(self._lease_ms), self._place.group, str(count), share.cursor
        return pack("EVAL", _READ, 2, share.lease, share.name, *to)

    def _entries(self, share: _Held, reply: Any) -> list[Entry]:
        """The entries of a read; a share that is another's is let go."""
        if isinstance(reply, Refused):
            if reply.reason != "NOGROUP":
                raise reply.error
            log.warning("stream %s has no group %s: made again", share.name.decode(), self._place.group)
            return []
        if reply is None:
            log.warning("stream %s is read by another consumer now", share.name.decode())
            self._let_go(share)
            return []
        share.cursor, listed, last = reply
        found = []
        for item in listed:
            if item is None:  # deleted while it was pending; Redis before 7
                continue
            at, fields = item
            found.append(Entry(share, at, *_at(at), _pairs(fields)))
        share.last = last or (found[-1].id if found else share.last)
        return found

    async def _wait(self, held: Sequence[_Held]) -> None:
        """Return when one of the streams has an entry that was not read, or after a while."""
        names, lasts = [share.name for share in held], [share.last for share in held]
        node = self._bell.primaries()[0]
        (reply,) = await ask(node.line, pack("XREAD", "COUNT", 1, "BLOCK", _BELL_MS, "STREAMS", *names, *lasts))
        if isinstance(reply, Refused):
            raise reply.error

    async def acknowledge(self, entries: Sequence[Entry]) -> None:
        by_stream: dict[bytes, list[bytes]] = {}
        for entry in entries:
            by_stream.setdefault(entry.share.name, []).append(entry.id)
        commands = [pack("XACK", name, self._place.group, *ids) for name, ids in by_stream.items()]
        if self._place.deletes:
            commands += [pack("XDEL", name, *ids) for name, ids in by_stream.items()]
        await self._ask(*commands)

    async def bury(self, entry: Entry, problem: bytes) -> None:
        said = [b"stream", entry.share.name, b"entry", entry.id, b"problem", problem, *chain(*entry.fields.items())]
        to = self._place.group, entry.id, str(int(self._place.deletes))
        await self._ask(pack("EVAL", _BURY, 2, entry.share.name, self._place.dead, *to, *said))

    # --- shares -------------------------------------------------------------------------------------------------

    def shares(self) -> Sequence[Share]:
        return list(self._held.values())

    def share_of(self, session: bytes) -> int | None:
        return share_of(session, len(self._streams))

    @property
    def _consumers(self) -> str:
        return f"stepcast:{{{self._place.source}}}:{self._place.group}:consumers"

    async def _keep_beating(self) -> None:
        while True:
            await sleep(self._place.lease_s / 4)
            try:
                await self._beat()
            except CancelledError:
                raise
            except Exception as error:
                log.warning("the leases could not be lengthened: %s", as_ours(error, "a beat failed"))

    async def _beat(self) -> None:
        """Lengthen the leases, take shares up to our part of them, give back what is beyond it."""
        (alive,) = await self._ask(pack("EVAL", _BEAT, 1, self._consumers, self._me, self._lease_ms))
        held = list(self._held.values())
        replies = await self._ask(*(pack("EVAL", _HOLD, 1, s.lease, self._me, self._lease_ms) for s in held))
        for share, mine in zip(held, replies, strict=True):
            if not mine:
                self._let_go(share)
        part = -(-len(self._streams) // max(1, alive))
        held = sorted(self._held.values(), key=lambda share: share.index)
        for place, share in enumerate(held):
            share.leaving = place >= part
        await self._give_back([share for share in held if share.leaving and not share.in_hand])
        if len(self._held) < part:
            await self._take(part - len(self._held))

    async def _take(self, count: int) -> None:
        """Take up to so many shares whose leases have ended; each consumer begins elsewhere."""
        total = len(self._streams)
        start = int.from_bytes(blake2b(self._me.encode(), digest_size=4).digest()) % total
        for index in ((start + i) % total for i in range(total)):
            if not count:
                return
            if index in self._held:
                continue
            name = self._streams[index]
            lease = f"stepcast:{{{name.decode()}}}:{self._place.group}:reader"
            (taken,) = await self._ask(pack("SET", lease, self._me, "NX", "PX", self._lease_ms))
            if taken is not None:
                self._held[index] = _Held(index, name, lease)
                count -= 1

    async def _give_back(self, shares: Sequence[_Held]) -> None:
        await self._ask(*(pack("EVAL", _HOLD, 1, share.lease, self._me, "") for share in shares))
        for share in shares:
            self._let_go(share)

    def _let_go(self, share: _Held) -> None:
        share.lost = True
        if self._held.get(share.index) is share:
            del self._held[share.index]

    async def lags(self) -> dict[bytes, Lag]:
        held = list(self._held.values())
        infos = await self._ask(*(pack("XINFO", "GROUPS", share.name) for share in held))
        lasts = await self._ask(*(pack("XREVRANGE", share.name, "+", "-", "COUNT", 1) for share in held))
        found, now_ms = {}, time.time_ns() // 1_000_000
        for share, groups, last in zip(held, infos, lasts, strict=True):
            facts: dict[bytes, Any] = next(
                (f for f in map(_pairs, groups) if f[b"name"].decode() == self._place.group), {}
            )
            delivered, behind = facts.get(b"last-delivered-id", _BEGIN), facts.get(b"lag")
            newest = last[0][0] if last else _BEGIN
            waits_ms = next(iter(share.in_hand.values())).first if share.in_hand else 0
            if not waits_ms and _at(newest) > _at(delivered):
                waits_ms = _at(delivered)[0] or _at(newest)[0]
            entries = None if behind is None else int(behind) + int(facts.get(b"pending", 0))
            found[share.name] = Lag(entries, max(0, now_ms - waits_ms) / 1000 if waits_ms else 0.0)
        return found

    # --- commands -----------------------------------------------------------------------------------------------

    async def _replies(self, commands: Sequence[bytes]) -> Replies:
        return await ask(self._nodes.primaries()[0].line, *commands) if commands else []

    async def _ask(self, *commands: bytes) -> Replies:
        """The replies to commands, none of them an error."""
        return await _ask(self._nodes, *commands)


class RedisSink:
    """A stream in one Redis, of which about the last `keep` letters stay (0: all)."""

    def __init__(self, nodes: Nodes, name: str, keep: int) -> None:
        self._nodes, self._name = nodes, name.encode()
        self._keep = ("MAXLEN", "~", keep) if keep else ()

    async def open(self) -> None:
        """Raises ConfigError where the key is no stream, StoreUnavailable."""
        await _check(self._nodes, self._name)

    async def append(self, letters: Sequence[Letter]) -> None:
        await _ask(self._nodes, *(pack("XADD", self._name, *self._keep, "*", *letter.fields) for letter in letters))

    async def close(self) -> None:
        await self._nodes.close()


async def _check(nodes: Nodes, *keys: bytes) -> None:
    """Raises ConfigError where a key is no stream."""
    kinds = await _ask(nodes, *(pack("TYPE", key) for key in keys))
    for key, kind in zip(keys, kinds, strict=True):
        if kind not in (b"none", b"stream"):
            raise ConfigError(f"key {key.decode()!r} of Redis is a {kind.decode()}, not a stream. Name another.")


async def _ask(nodes: Nodes, *commands: bytes) -> Replies:
    """The replies to commands, none of them an error."""
    replies = await ask(nodes.primaries()[0].line, *commands) if commands else []
    for reply in replies:
        if isinstance(reply, Refused):
            raise reply.error
    return replies


def _pairs(listed: Sequence[Any]) -> dict[bytes, Any]:
    words = iter(listed)
    return dict(zip(words, words, strict=True))


def _at(entry: bytes) -> tuple[int, int]:
    first, _, second = entry.partition(b"-")
    return int(first), int(second)
