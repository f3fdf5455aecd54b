"""Sessions in Redis: standalone, behind Sentinel, or a Cluster."""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Final, cast

from stepcast.errors import InvalidRequest

from ...records.block import Block
from .. import Done, Write, namespace_of
from .commands import PREFIX, ROWS, WRITES, Frames, change, main, pack, side, touch
from .connection import Refused, Replies, ask
from .topology import Node, Nodes

_log = logging.getLogger(__name__)

_LOADS_PER_COMMAND: Final = 128
_SCANS_PER_PAGE: Final = 10
_COUNTED_PER_CALL: Final = 500
_CURSOR: Final = re.compile(r"([0-9]{1,4}):([0-9]{1,20})")


class RedisStore:
    """Sessions on the servers that `nodes` stands for; see service/store/urls.py for how it comes from a URL."""

    volatile = False

    def __init__(self, nodes: Nodes) -> None:
        self._nodes, self._frames = nodes, Frames()
        self.tells = nodes.most > 1  # a cluster has the streams elsewhere

    async def open(self) -> None:
        try:
            await self._nodes.open()
            await self.ping()
            for node in self._nodes.primaries():
                await _warn_of_loss(node)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        await self._nodes.close()

    async def ping(self) -> None:
        await self._nodes.run(["ping"], [pack("SET", "stepcast:ping:{ping}", "", "PX", 1)])

    def apart(self, keys: Sequence[str]) -> Sequence[Sequence[int]]:
        return self._nodes.apart(keys)

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        parts = _parts(len(keys), min(_LOADS_PER_COMMAND, self._nodes.most))
        commands = [pack("MGET", *map(main, keys[part.start : part.stop])) for part in parts]
        found = await self._nodes.run([keys[part.start] for part in parts], commands)
        return list(chain(*found))

    def replace(self, block: Block, done: Done) -> None:
        parts = _parts(len(block), min(ROWS, self._nodes.most))

        def told(places: Sequence[int], replies: Replies | BaseException) -> None:
            rows = places if len(parts) == len(block) else [row for place in places for row in parts[place]]
            done(rows, replies if isinstance(replies, BaseException) else [flag == 1 for flag in chain(*replies)])

        keys, touches = [block.keys[part.start] for part in parts], block.touch_sides
        if touches and self._nodes.one_key:
            self._touch(keys, block.ttl_s)
            touches = False
        self._nodes.send(keys, self._frames.commands(block, parts, touches), told)

    def _touch(self, keys: Sequence[str], ttl_s: float | None) -> None:
        """Give side records their time to live by commands of their own; what fails is made good by the next step."""
        self._nodes.send(keys, [touch(key, ttl_s) for key in keys], _heard)

    async def change(self, writes: Sequence[Write]) -> list[bool]:
        if self._nodes.one_key:
            for key, _, record, ttl_s, sides, touch_sides in writes:
                if record and touch_sides and not sides:
                    self._touch([key], ttl_s)
            writes = [
                write if write.sides or not write.record else write._replace(touch_sides=False) for write in writes
            ]
        parts = _parts(len(writes), min(WRITES, self._nodes.most))
        commands = [change(writes[part.start : part.stop]) for part in parts]
        replies = await self._nodes.run([writes[part.start].key for part in parts], commands)
        return [flag == 1 for flag in chain(*replies)]

    async def list_keys(self, prefix: str, cursor: str, limit: int) -> tuple[list[str], str]:
        """A key may be listed twice, and missed if a failover happens between the pages."""
        (index, place), nodes = _place(cursor), self._nodes.primaries()
        found: dict[str, None] = {}
        for _ in range(_SCANS_PER_PAGE):
            if index >= len(nodes) or len(found) >= limit:
                break
            place, keys = await _scan(nodes[index], prefix, place, limit)
            found |= dict.fromkeys(keys)
            index += place == "0"
        return list(found), f"{index}:{place}" if index < len(nodes) else ""

    async def usage(self) -> dict[str, tuple[int, int]]:
        used: dict[str, tuple[int, int]] = {}
        cursor = ""
        while True:
            keys, cursor = await self.list_keys("", cursor, _COUNTED_PER_CALL)
            sizes = await self._nodes.run(keys, [pack("STRLEN", main(key)) for key in keys])
            for key, size in zip(keys, sizes, strict=True):
                if size:
                    sessions, total = used.get(namespace_of(key), (0, 0))
                    used[namespace_of(key)] = sessions + 1, total + size
            if not cursor:
                return used

    async def load_side(self, key: str, name: str) -> bytes | None:
        return cast(bytes | None, await self._of_live(key, pack("HGET", side(key), name)))

    async def list_sides(self, key: str) -> list[str]:
        names = await self._of_live(key, pack("HKEYS", side(key)))
        return sorted(name.decode() for name in names or [])

    async def _of_live(self, key: str, command: bytes) -> Any:
        """The reply to `command` if the session is there, else None."""
        exists, reply = await self._nodes.run([key, key], [pack("EXISTS", main(key)), command])
        return reply if exists else None


def _heard(places: Sequence[int], replies: Replies | BaseException) -> None:
    """Nobody waits for these."""


@lru_cache(1024)
def _parts(count: int, size: int) -> Sequence[range]:
    """Places of sessions, as many as one command may name."""
    return [range(at, min(at + size, count)) for at in range(0, count, size)]


def _place(cursor: str) -> tuple[int, str]:
    """The node's index and its own cursor, a number of 64 bits."""
    match = _CURSOR.fullmatch(cursor or "0:0")
    if match is None or int(match[2]) >> 64:
        raise InvalidRequest(f"cursor {cursor[:64]!r} was not given by this server. Start without one.")
    return int(match[1]), match[2]


async def _scan(node: Node, prefix: str, place: str, limit: int) -> tuple[str, list[str]]:
    """One SCAN: the next place ("0" after the last) and the sessions found."""
    escaped = "".join(f"\\{c}" if c in "*?[]\\^" else c for c in prefix)
    (reply,) = await ask(node.line, pack("SCAN", place, "MATCH", f"{PREFIX}{escaped}*}}", "COUNT", max(limit, 100)))
    if isinstance(reply, Refused):
        raise reply.error
    return reply[0].decode(), [key[len(PREFIX) : -1].decode() for key in reply[1]]


async def _warn_of_loss(node: Node) -> None:
    """Say what in the server's settings can make sessions vanish."""
    replies = await ask(node.line, pack("INFO", "memory"), pack("INFO", "persistence"))
    lines = [line for text in replies if isinstance(text, bytes) for line in text.decode().splitlines()]
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    if (policy := facts.get("maxmemory_policy", "noeviction")) != "noeviction":
        _log.warning("Redis evicts under maxmemory-policy %r: sessions can vanish. Set it to noeviction.", policy)
    if facts.get("aof_enabled") == "0":
        _log.warning("Redis runs without appendonly: its restart loses all since the last snapshot. Set it to yes.")
