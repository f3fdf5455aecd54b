"""Sessions in Redis: standalone, behind Sentinel, or a Cluster.

    stepcast:{<key>}      string: the record
    stepcast:{<key>}:c    hash: side records by name

The braces put both into one slot of a cluster. One script does compare-and-set for many sessions in one command.
"""

import asyncio
import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha1
from typing import Any, Final, cast

import numpy as np
from hiredis import ReplyError, pack_command

from stepcast.errors import InvalidRequest, StoreUnavailable

from ...records.layout import TOKEN
from .. import Bytes, Replaced, Rows, Write, as_records, as_writes, hand_on, replace_each
from .connection import Command, Wire, error_code, is_elsewhere
from .topology import Job, Node, Nodes, Refused

_log = logging.getLogger(__name__)

_PER_COMMAND: Final = 16
"""Writes per command: one command of 64 records costs more, in allocations here and in a longer pause there."""
_REPLACES_PER_COMMAND: Final = 64
_LOADS_PER_COMMAND: Final = 128
_MOST_FRAMES: Final = 4
_FRAME_BYTES: Final = 4 << 20
"""Of records side by side; more are sent one by one, so that little memory is kept for them."""
_SCANS_PER_PAGE: Final = 10
_CURSOR: Final = re.compile(r"([0-9]{1,4}):([0-9]{1,20})")
_PREFIX: Final = "stepcast:{"

COMMIT: Final = f"""
local at, applied = 1, {{}}
for i = 1, #KEYS, 2 do
  local main, side = KEYS[i], KEYS[i + 1]
  local expect, record, ttl, sides = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  at = at + 4
  if redis.call('GETRANGE', main, {TOKEN.start}, {TOKEN.stop - 1}) ~= expect then
    applied[#applied + 1] = 0
  else
    applied[#applied + 1] = 1
    if record == '' then redis.call('UNLINK', main)
    elseif ttl == '' then redis.call('SET', main, record)
    else redis.call('SET', main, record, 'PX', ttl) end
    if record == '' or expect == '' then redis.call('UNLINK', side) end
    if record ~= '' and sides >= 0 then
      for j = at, at + 2 * sides - 2, 2 do redis.call('HSET', side, ARGV[j], ARGV[j + 1]) end
      if ttl == '' then redis.call('PERSIST', side) else redis.call('PEXPIRE', side, ttl) end
    end
  end
  if sides > 0 then at = at + 2 * sides end
end
return applied
"""
"""Per session two KEYS, and in ARGV: token expected ('': none), record ('': forget), ms to live ('': for ever),
number of side records (-1: none, and none to touch), then name and bytes of each. Returns 1 where it was applied.
SET is the first change, since Redis asks for free memory only at a script's first one."""
REPLACE: Final = f"""
local applied = {{}}
for i = 1, #KEYS do
  local at = 3 * i - 2
  if redis.call('GETRANGE', KEYS[i], {TOKEN.start}, {TOKEN.stop - 1}) ~= ARGV[at] then
    applied[i] = 0
  else
    applied[i] = 1
    if ARGV[at + 2] == '' then redis.call('SET', KEYS[i], ARGV[at + 1])
    else redis.call('SET', KEYS[i], ARGV[at + 1], 'PX', ARGV[at + 2]) end
  end
end
return applied
"""
"""The same for plain steps. Per session one KEY, and in ARGV: token expected, record, ms to live ('': for ever)."""
_SHA: Final = sha1(COMMIT.encode(), usedforsecurity=False).hexdigest()
_REPLACE_SHA: Final = sha1(REPLACE.encode(), usedforsecurity=False).hexdigest().encode()
LOAD_SCRIPT: Final[Command] = ("SCRIPT", "LOAD", COMMIT)
_LOAD_REPLACE: Final = pack_command(cast(Any, ("SCRIPT", "LOAD", REPLACE)))


class RedisStore:
    """Sessions on the servers that `nodes` stands for; see service.store.urls for how it comes from a URL."""

    volatile = False

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._taught: Wire | None = None  # the connection whose server knows REPLACE
        self._frames: dict[tuple[int, int, bytes], _Frame] = {}

    async def open(self) -> None:
        try:
            await self.ping()
            for node in await self._nodes.primaries():
                await _warn_of_loss(node)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        await self._nodes.close()

    async def ping(self) -> None:
        await self._nodes.run([Job("ping", ("SET", "stepcast:ping:{ping}", "", "PX", 1))])

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        wire = self._nodes.wire()
        if wire is not None and len(keys) <= _LOADS_PER_COMMAND:
            (found,) = await wire.call([("MGET", *map(_main, keys))])
            if not isinstance(found, ReplyError):
                return list(found)
        parts = list(self._parts(keys, _LOADS_PER_COMMAND))
        jobs = [Job(keys[part[0]], ("MGET", *(_main(keys[i]) for i in part))) for part in parts]
        return await self._gather(parts, jobs, len(keys))

    async def commit(self, writes: Sequence[Write]) -> list[bool]:
        keys = [write.key for write in writes]
        parts = list(self._parts(keys, _PER_COMMAND))
        jobs = [Job(keys[part[0]], _evalsha([writes[i] for i in part])) for part in parts]
        return [applied == 1 for applied in await self._gather(parts, jobs, len(keys))]

    def replace(
        self,
        keys: Sequence[str],
        old: Sequence[bytes],
        new: Sequence[bytes],
        ttls_s: Sequence[float | None],
        done: Replaced,
    ) -> None:
        wire = self._nodes.wire()
        if wire is None:
            self._commit_for(done, as_writes(keys, old, new, ttls_s))
            return
        commands = []
        for at in range(0, len(keys), _REPLACES_PER_COMMAND):
            end = at + _REPLACES_PER_COMMAND
            commands.append(_replacing(keys[at:end], old[at:end], new[at:end], ttls_s[at:end]))
        self._send(wire, commands, len(commands), lambda: as_writes(keys, old, new, ttls_s), done)

    def replace_rows(self, rows: Rows, new: Bytes, done: Replaced) -> None:
        wire = self._nodes.wire()
        if wire is None or new.nbytes > _FRAME_BYTES:
            replace_each(self, rows, new, done)
            return
        heads = rows.place
        if not isinstance(heads, _Heads):
            heads = rows.place = _Heads(rows.keys)
        shape = (*new.shape, _ttl(rows.ttl_s))
        frame = self._frames.get(shape)
        if frame is None:
            if len(self._frames) >= _MOST_FRAMES:
                self._frames.clear()
            frame = self._frames[shape] = _Frame(*shape)
        frame.fill(rows.records, new)
        parts: list[bytes | memoryview] = []
        for i, head in enumerate(heads.texts):
            parts += (head, frame.rows(i * _REPLACES_PER_COMMAND, (i + 1) * _REPLACES_PER_COMMAND))

        def writes() -> list[Write]:
            old = as_records(rows.records)
            return as_writes(rows.keys, old, as_records(new), [rows.ttl_s] * len(old))

        self._send(wire, parts, len(heads.texts), writes, done)

    def _send(
        self,
        wire: Wire,
        parts: Sequence[bytes | memoryview],
        commands: int,
        writes: Callable[[], list[Write]],
        done: Replaced,
    ) -> None:
        """Send REPLACE commands; `writes` says the same where the server turns out not to know the script."""
        lesson = [] if wire is self._taught else [_LOAD_REPLACE]
        lessons, self._taught = len(lesson), wire

        def replied(replies: list[Any] | StoreUnavailable) -> None:
            if isinstance(replies, StoreUnavailable):
                done(replies)
                return
            refusals = [reply for reply in replies if isinstance(reply, ReplyError)]
            if not refusals:
                done([applied == 1 for reply in replies[lessons:] for applied in reply])
                return
            self._taught = None
            if len(refusals) == commands and error_code(refusals[0]) == "NOSCRIPT":
                self._commit_for(done, writes())  # nothing was applied
                return
            if is_elsewhere(refusals[0]):
                wire.close(str(refusals[0]), refusals[0])
            done(Refused(wire.server, refusals[0]).error)

        wire.send(b"".join((*lesson, *parts)), lessons + commands, replied)

    def _commit_for(self, done: Replaced, writes: Sequence[Write]) -> None:
        asyncio.ensure_future(self.commit(writes)).add_done_callback(functools.partial(hand_on, done))

    async def list_keys(self, prefix: str, cursor: str, limit: int) -> tuple[list[str], str]:
        """A key may be listed twice, and missed if a failover happens between the pages."""
        nodes = await self._nodes.primaries()
        index, place = _place(cursor)
        found: dict[str, None] = {}
        for _ in range(_SCANS_PER_PAGE):
            if index >= len(nodes) or len(found) >= limit:
                break
            place, keys = await _scan(nodes[index], prefix, place, limit)
            found.update(dict.fromkeys(keys))
            if place == "0":
                index += 1
        return list(found), f"{index}:{place}" if index < len(nodes) else ""

    async def load_side(self, key: str, name: str) -> bytes | None:
        side: bytes | None = await self._of_live(key, ("HGET", _side(key), name))
        return side

    async def list_sides(self, key: str) -> list[str]:
        names = await self._of_live(key, ("HKEYS", _side(key)))
        return sorted(name.decode() for name in names or [])

    def _parts(self, keys: Sequence[str], size: int) -> Iterator[Sequence[int]]:
        """Indices of keys that one command may have: of one group, at most `size`."""
        for group in self._nodes.groups(keys):
            for start in range(0, len(group), size):
                yield group[start : start + size]

    async def _gather(self, parts: Sequence[Sequence[int]], jobs: Sequence[Job], total: int) -> list[Any]:
        """Run the jobs, one per part, and put their replies where the parts say."""
        if not jobs:
            return []
        results: list[Any] = [None] * total
        for part, replies in zip(parts, await self._nodes.run(jobs), strict=True):
            for i, reply in zip(part, replies, strict=True):
                results[i] = reply
        return results

    async def _of_live(self, key: str, command: Command) -> Any:
        """The reply to `command` if the session is there, else None."""
        exists, reply = await self._nodes.run([Job(key, ("EXISTS", _main(key))), Job(key, command)])
        return reply if exists else None


def _replacing(
    keys: Sequence[str], old: Sequence[bytes], new: Sequence[bytes], ttls_s: Sequence[float | None]
) -> bytes:
    """One command for several plain steps, in Redis' protocol; see REPLACE."""
    parts = [_head(keys)]
    for before, after, ttl_s in zip(old, new, ttls_s, strict=True):
        ttl = _ttl(ttl_s)
        parts.append(b"$16\r\n%s\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (before[TOKEN], len(after), after, len(ttl), ttl))
    return b"".join(parts)


def _head(keys: Sequence[str]) -> bytes:
    """How a REPLACE command begins."""
    count = len(keys)
    mains = [_main(key).encode() for key in keys]
    return b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n%s\r\n$%d\r\n%d\r\n%s" % (
        *(3 + 4 * count, _REPLACE_SHA, len(str(count)), count),
        b"".join([b"$%d\r\n%s\r\n" % (len(main), main) for main in mains]),
    )


def _ttl(ttl_s: float | None) -> bytes:
    return b"" if ttl_s is None else b"%d" % max(1, int(ttl_s * 1000))


class _Heads:
    """How the commands for many sessions begin, _REPLACES_PER_COMMAND of them each."""

    def __init__(self, keys: Sequence[str]) -> None:
        size = _REPLACES_PER_COMMAND
        self.texts = [_head(keys[at : at + size]) for at in range(0, len(keys), size)]


class _Frame:
    """The arguments of REPLACE for B records of W bytes, side by side in Redis' protocol."""

    def __init__(self, count: int, width: int, ttl: bytes) -> None:
        texts = b"$16\r\n", b"\r\n$%d\r\n" % width, b"\r\n$%d\r\n%s\r\n" % (len(ttl), ttl)
        token_at = len(texts[0])
        token_end = token_at + TOKEN.stop - TOKEN.start
        record_at = token_end + len(texts[1])
        self._rows = np.empty((count, record_at + width + len(texts[2])), np.uint8)
        self._tokens = self._rows[:, token_at:token_end]
        self._records = self._rows[:, record_at : record_at + width]
        for at, text in zip((0, token_end, record_at + width), texts, strict=True):
            self._rows[:, at : at + len(text)] = np.frombuffer(text, np.uint8)

    def fill(self, old: Bytes, new: Bytes) -> None:
        """Put records in."""
        self._tokens[:] = old[:, TOKEN]
        self._records[:] = new

    def rows(self, start: int, end: int) -> memoryview:
        """The arguments of some."""
        return self._rows[start:end].data.cast("B")


def _place(cursor: str) -> tuple[int, str]:
    """The node's index and its own cursor."""
    match = _CURSOR.fullmatch(cursor or "0:0")
    if match is None:
        raise InvalidRequest(f"cursor {cursor[:64]!r} was not given by this server. Start without one.")
    return int(match[1]), match[2]


def _main(key: str) -> str:
    return f"{_PREFIX}{key}}}"


def _side(key: str) -> str:
    return f"{_PREFIX}{key}}}:c"


def _evalsha(writes: Sequence[Write]) -> Command:
    """One command for several writes; see COMMIT."""
    keys: list[str] = []
    values: list[bytes | str | int] = []
    for key, expect, record, ttl_s, sides, touch_sides in writes:
        main = _main(key)
        keys += (main, main + ":c")
        ttl = "" if ttl_s is None else max(1, int(ttl_s * 1000))
        count = len(sides) if sides else 0 if touch_sides else -1
        values += (expect or b"", record or b"", ttl, count)
        for name, side in (sides or {}).items():
            values += (name, side)
    return ("EVALSHA", _SHA, len(keys), *keys, *values)


async def _scan(node: Node, prefix: str, place: str, limit: int) -> tuple[str, list[str]]:
    """One SCAN: the next place ("0" after the last) and the sessions found."""
    escaped = "".join(f"\\{c}" if c in "*?[]\\^" else c for c in prefix)
    (reply,) = await node.run([("SCAN", place, "MATCH", f"{_PREFIX}{escaped}*}}", "COUNT", max(limit, 100))])
    if isinstance(reply, Refused):
        raise reply.error
    following, keys = reply
    return following.decode(), [key[len(_PREFIX) : -1].decode() for key in keys]


async def _warn_of_loss(node: Node) -> None:
    """Say what in the server's settings can make sessions vanish."""
    replies = await node.run([("INFO", "memory"), ("INFO", "persistence")])
    facts = dict(line.split(":", 1) for text in replies if isinstance(text, bytes) for line in _lines(text))
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        _log.warning("Redis evicts under maxmemory-policy %r: sessions can vanish. Set it to noeviction.", policy)
    if facts.get("aof_enabled") == "0":
        _log.warning("Redis runs without appendonly: its restart loses all since the last snapshot. Set it to yes.")


def _lines(info: bytes) -> list[str]:
    return [line for line in info.decode().splitlines() if ":" in line]
