"""Which Redis server answers for a key: one primary (fixed, or named by sentinels), or a cluster of them.

redis-py is asked who is where; what is asked of those servers then goes over connections of our own.
"""

import asyncio
import functools
from asyncio import CancelledError
from binascii import crc_hqx
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, Final, cast

from redis.asyncio import ConnectionPool, Redis, SSLConnection
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from stepcast.errors import StoreUnavailable

from .commands import LESSON, pack
from .connection import Line, Refused, Replies, Server, Timeouts, Wire, ask, connect, unavailable

_SLOTS: Final = 16384
_PAUSE_S: Final = 0.05
"""Before a command that was not done is sent for the third time, and so on: its slot may be on its way."""
_LOOK_S: Final = 0.1
"""Between two looks at who has which slots."""
_LINES_THAT_WAIT: Final = 4
_ASKING: Final = pack("ASKING")
_ONCE: Final = Retry(NoBackoff(), 0)


@dataclass(frozen=True, slots=True)
class Replication:
    """How many replicas must have a write before it counts, and how long to wait for them; 0: do not wait."""

    replicas: int = 0
    timeout_s: float = 0.5


class Node:
    """One server; where replicas are waited for, several connections take turns, since one that waits stands still."""

    def __init__(self, locate: Callable[[], Awaitable[Wire]], level: Replication) -> None:
        count = _LINES_THAT_WAIT if level.replicas else 1
        self._lines = [Line(locate, level.replicas, level.timeout_s) for _ in range(count)]
        self._turn = cycle(self._lines)

    @property
    def line(self) -> Line:
        """The connection whose turn it is."""
        return next(self._turn)

    async def close(self) -> None:
        """Disconnect."""
        for line in self._lines:
            await line.close()


Told = Callable[[Sequence[int], Replies | BaseException], None]
"""Takes places of commands, and their replies; or why there are none, a StoreUnavailable or a cancellation."""


class Nodes:
    """The servers of one store: one primary.

    Args:
        node: The primary.
        timeout_s: For how long a command that was not done is sent again.

    Attributes:
        most: How many sessions one command may name.
        not_done: What a server says that has done nothing of a command, which another try may mend.
    """

    most = 1 << 30
    not_done = frozenset({"NOSCRIPT"})

    def __init__(self, node: Node | None, timeout_s: float) -> None:
        self._node, self._timeout_s = node, timeout_s

    def send(self, keys: Sequence[str], commands: Sequence[bytes], told: Told) -> None:
        """Send commands, each to the server that has the session `keys` say, all of a server together.

        Args:
            told: Called once or several times, so that every command is told once; a server that hangs holds up its
                own ones only.
        """
        self._send(self._node, range(len(commands)), keys, commands, told)

    async def run(self, keys: Sequence[str], commands: Sequence[bytes]) -> Replies:
        """The replies to commands. Raises StoreUnavailable where one is missing or an error."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        replies: Replies = [None] * len(commands)
        left, failure = len(commands), None

        def told(places: Sequence[int], found: Replies | BaseException) -> None:
            nonlocal left, failure
            if isinstance(found, BaseException):
                failure = found
            else:
                for place, reply in zip(places, found, strict=True):
                    replies[place] = reply
            left -= len(places)
            if not left and not future.done():  # else the caller is gone
                future.set_result(None)

        if commands:
            self.send(keys, commands, told)
            await future
        if failure is not None:
            raise failure
        return replies

    def primaries(self) -> list[Node]:
        """All servers that take writes, in an order that outlives a failover."""
        return [self._node] if self._node else []

    def doubt(self) -> None:
        """A server has failed: look who is where, and let nobody wait for it."""

    async def close(self) -> None:
        """Disconnect."""
        for node in self.primaries():
            await node.close()

    def _send(
        self, node: Node | None, mine: Sequence[int], keys: Sequence[str], commands: Sequence[bytes], told: Told
    ) -> None:
        """Send a server some of the commands."""

        def replied(replies: Replies | StoreUnavailable) -> None:
            if isinstance(replies, list) and Refused not in map(type, replies):
                told(mine, replies)
                return
            self.doubt()
            if not isinstance(replies, list):
                told(mine, replies)
                return
            for i, reply in zip(mine, replies, strict=True):
                if not isinstance(reply, Refused):
                    told([i], [reply])
                elif reply.reason in self.not_done:
                    again = asyncio.create_task(self._try_again(keys[i], commands[i], reply))
                    again.add_done_callback(functools.partial(_tell, told, i))
                else:
                    told([i], reply.error)

        if node is None:
            replied(StoreUnavailable("Redis: no server of the cluster has the session's slot.", retry_after_s=1.0))
        else:
            node.line.send(commands if len(mine) == len(commands) else [commands[i] for i in mine], replied)

    async def _try_again(self, key: str, command: bytes, refused: Refused) -> Any:
        """The reply to a command that was not done, sent until it is or the time is over."""
        clock, pause_s, reply = asyncio.get_running_loop().time, 0.0, refused
        until = clock() + self._timeout_s
        while isinstance(reply, Refused) and reply.reason in self.not_done and clock() < until:
            await asyncio.sleep(pause_s)
            pause_s = _PAUSE_S
            node, first = self._next(key, reply)
            if node is None:
                break
            *_, reply = await ask(node.line, *first, command)
        if isinstance(reply, Refused):
            raise reply.error
        return reply

    def _next(self, key: str, refused: Refused) -> tuple[Node | None, Sequence[bytes]]:
        """Where a command goes that was not done, and what must be said before it."""
        return self._node, (LESSON,)


def _tell(told: Told, place: int, again: "asyncio.Task[Any]") -> None:
    failure = CancelledError() if again.cancelled() else again.exception()
    told([place], failure or [again.result()])


class Cluster(Nodes):
    """Many primaries, each with some of the 16384 slots.

    One command names one session: sessions rarely share a slot, and a command about several is refused while their
    slot moves.

    Args:
        seeds: Servers to ask who has which slots; any one that answers will do.
        timeouts: Of each server.
        level: Of all.
    """

    most = 1
    not_done = frozenset({"NOSCRIPT", "MOVED", "ASK", "TRYAGAIN"})

    def __init__(self, seeds: Sequence[Server], timeouts: Timeouts, level: Replication) -> None:
        super().__init__(None, timeouts.reply_s)
        self._seeds, self._timeouts, self._level = seeds, timeouts, level
        self._nodes: dict[Server, Node] = {}
        self._owners: list[Server | None] = []  # by slot; empty: nobody was asked yet
        self._unplaced: list[tuple[Sequence[str], Sequence[bytes], Told]] = []
        self._looking: asyncio.Task[None] | None = None
        self._look_after = 0.0

    def send(self, keys: Sequence[str], commands: Sequence[bytes], told: Told) -> None:
        if not self._owners:
            self._unplaced.append((keys, commands, told))
            self.doubt()
            return
        by_node: dict[Node | None, list[int]] = {}
        for i, key in enumerate(keys):
            by_node.setdefault(self._node_of(key), []).append(i)
        for node, mine in by_node.items():
            self._send(node, mine, keys, commands, told)

    def primaries(self) -> list[Node]:
        return [self._nodes[owner] for owner in dict.fromkeys(self._owners) if owner]

    def doubt(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._looking is None and (self._unplaced or now >= self._look_after):
            self._look_after = now + _LOOK_S
            self._looking = asyncio.create_task(self._look())

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        for node in self._nodes.values():
            await node.close()

    async def _look(self) -> None:
        """Read who has which slots, then send what waited for that."""
        failure: StoreUnavailable | CancelledError | None = None
        try:
            self._owners = await self._read_slots()
            for owner in filter(None, dict.fromkeys(self._owners)):
                self._at(owner)
        except (StoreUnavailable, CancelledError) as error:
            failure = error
        self._looking, unplaced, self._unplaced = None, self._unplaced, []
        for keys, commands, told in unplaced:
            if failure is None:
                self.send(keys, commands, told)
            else:
                told(range(len(keys)), failure)

    async def _read_slots(self) -> list[Server | None]:
        """The server of each slot, as the first server says that answers."""
        failure: StoreUnavailable | None = None
        owners: list[Server | None] = [None] * _SLOTS
        for asked in dict.fromkeys([*filter(None, self._owners), *self._seeds]):
            try:
                found = await _look_up(asked, self._timeouts, "CLUSTER SLOTS")
            except StoreUnavailable as error:
                failure = error
                continue
            for first, last, (host, port, *_), *_ in found:
                owners[first : last + 1] = [_known(asked, (host or b"").decode(), port)] * (last + 1 - first)
            return owners
        raise failure or unavailable(self._seeds[0], "asked nobody")

    def _next(self, key: str, refused: Refused) -> tuple[Node | None, Sequence[bytes]]:
        first: Sequence[bytes] = (LESSON,) if refused.reason == "NOSCRIPT" else ()
        if refused.reason in ("MOVED", "ASK"):  # MOVED 123 host:port
            host, _, port = refused.text.split(" ")[2].rpartition(":")
            there = _known(refused.server, host, int(port))
            if refused.reason == "ASK":
                return self._at(there), (_ASKING,)
            self._at(there)
            self._owners[slot_of(key)] = there
        return self._node_of(key), first

    def _node_of(self, key: str) -> Node | None:
        """The server that has a session; None: there is none."""
        owner = self._owners[slot_of(key)]
        return None if owner is None else self._nodes[owner]

    def _at(self, server: Server) -> Node:
        if server not in self._nodes:
            self._nodes[server] = Node(lambda: connect(server, self._timeouts), self._level)
        return self._nodes[server]


def slot_of(key: str) -> int:
    """The cluster's slot of a session: of what stands between the braces of its Redis keys."""
    return crc_hqx(key.encode(), 0) % _SLOTS


def _known(asked: Server, host: str, port: int) -> Server:
    """A server that another one names; one without a name has the same host."""
    return replace(asked, host=asked.host if host in ("", "?") else host, port=port)


# --- redis-py -------------------------------------------------------------------------------------------------------


def server_of(url: str, port: int) -> Server:
    """The server that redis:// or rediss:// names, with one host.

    Args:
        port: Where the URL has none.

    Raises:
        ValueError: not a URL of this form. OSError: its certificates cannot be read.
    """
    options: dict[str, Any] = {**parse_url(url)}
    tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
    context = None
    if "connection_class" in options:  # of TLS; redis-py < 6 leaves the name unchecked
        options["ssl_check_hostname"] = tls["ssl_check_hostname"] = tls.get("ssl_check_hostname", True)
        context = SSLConnection(**tls).ssl_context.get()
    return Server(options.get("host", "localhost"), options.get("port", port), options, context)


def _asking(server: Server, timeouts: Timeouts) -> dict[str, Any]:
    """How redis-py asks a server: by the protocol's second version and once, as a lost reply is our callers' matter."""
    waits = {"socket_connect_timeout": timeouts.connect_s, "socket_timeout": timeouts.reply_s}
    return {**server.options, **waits, "host": server.host, "port": server.port, "protocol": 2, "retry": _ONCE}


async def _look_up(server: Server, timeouts: Timeouts, command: str) -> Any:
    """What a server says to redis-py."""
    client = Redis.from_pool(ConnectionPool(**_asking(server, timeouts)))
    try:
        return await cast(Any, client).execute_command(command)
    except (RedisError, OSError) as error:
        raise unavailable(server, str(error)) from error
    finally:
        await client.aclose()


async def connect_primary(sentinels: Sequence[Server], service: str, entry: Server, timeouts: Timeouts) -> Wire:
    """A connection to the server that the first sentinel that answers calls primary, and that says so itself.

    Args:
        sentinels: Asked in order.
        service: The name that the sentinels know the primary by.
        entry: Database, user and TLS of the primary; its host and port do not count.
        timeouts: Of each connection.
    """
    asked = cast(Any, Sentinel)([])
    asked.sentinels = [Redis.from_pool(ConnectionPool(**_asking(sentinel, timeouts))) for sentinel in sentinels]
    try:
        host, port = await asked.discover_master(service)
    except (RedisError, OSError) as error:
        why = f"no sentinel knows a primary {service!r}, or none answers"
        raise unavailable(sentinels[0], why) from error
    finally:
        for client in asked.sentinels:
            await client.aclose()
    wire = await connect(replace(entry, host=host, port=int(port)), timeouts)
    (role,) = await ask(wire, pack("ROLE"))
    if isinstance(role, Refused) or role[0] != b"master":
        wire.close("not a primary")
        failed = isinstance(role, Refused)
        raise unavailable(wire.server, role.text if failed else "the sentinels call it primary, it is not one yet")
    return wire
