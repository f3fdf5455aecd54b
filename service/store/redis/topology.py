"""Which Redis server answers for a key: one primary (fixed, or named by sentinels), or a cluster of them.

redis-py is asked who is where; what is asked of those servers then goes over connections of our own.
"""

import asyncio
from binascii import crc_hqx
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from math import inf
from typing import Any, Final, cast
from urllib.parse import SplitResult, urlencode, urlunsplit

from redis.asyncio import ConnectionPool, Redis, SSLConnection
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from stepcast.errors import ConfigError, StoreUnavailable

from .. import StoreOptions, tell
from .commands import LESSONS, pack
from .connection import Line, Refused, Replies, Server, Wire, ask, connect, unavailable

_SLOTS: Final = 16384
_PAUSE_S: Final = 0.05  # before a command that was not done is sent for the third time, and so on: its slot may move
_LOOK_S: Final = 0.1  # between two looks at who has which slots
_LINES_THAT_WAIT: Final = 4
_ASKING: Final = pack("ASKING")
_ONCE: Final = Retry(NoBackoff(), 0)

Told = Callable[[Sequence[int], Replies | BaseException], None]
"""Takes places of commands, and their replies; or why there are none, a StoreUnavailable or a cancellation."""


class Node:
    """One server; where replicas are waited for, several connections take turns, since one that waits stands still."""

    def __init__(self, server: Server, locate: Callable[[], Awaitable[Wire]], options: StoreOptions) -> None:
        self.server = server  # where it is if it stays there; `locate` makes a connection to where it is now
        lines = range(_LINES_THAT_WAIT if options.awaited else 1)
        self._lines = [Line(locate, options.awaited, options.replica_timeout_s) for _ in lines]
        self._turn = cycle(self._lines)

    @property
    def line(self) -> Line:
        """The connection whose turn it is."""
        return next(self._turn)

    async def close(self) -> None:
        """Disconnect."""
        for line in self._lines:
            await line.close()


class Nodes:
    """The servers of one store: one primary."""

    most = 1 << 30  # sessions that one command may name
    one_key = False  # whether a command of a step names one key: two cannot be had while their slot moves
    not_done = frozenset({"NOSCRIPT"})  # what a server says that has done nothing, which another try may mend

    def __init__(self, node: Node | None, options: StoreOptions) -> None:
        self._node, self._options = node, options

    async def open(self) -> None:
        """Find the servers. Raises StoreUnavailable."""

    def send(self, keys: Sequence[str], commands: Sequence[bytes], told: Told) -> None:
        """Send commands, each to the server that has the session that `keys` says, all of a server together.

        Every command is told once, some at a time: a server that hangs holds up its own only.
        """
        self._send(self._node, range(len(commands)), keys, commands, told)

    def apart(self, keys: Sequence[str]) -> Sequence[Sequence[int]]:
        """Places of keys by the server that has them."""
        return [range(len(keys))]

    async def run(self, keys: Sequence[str], commands: Sequence[bytes]) -> Replies:
        """The replies to commands. Raises StoreUnavailable where one is missing or an error."""
        if not commands:
            return []
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        replies: Replies = [None] * len(commands)
        left, failure = len(commands), None

        def told(places: Sequence[int], found: Replies | BaseException) -> None:
            nonlocal left, failure
            if isinstance(found, BaseException):
                failure, found = found, [None] * len(places)
            for place, reply in zip(places, found, strict=True):
                replies[place] = reply
            left -= len(places)
            if not left and not future.done():  # else the caller is gone
                future.set_result(None)

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
                if isinstance(reply, Refused) and reply.reason in self.not_done:
                    tell(told, [i], self._again(keys[i], commands[i], reply))
                else:
                    told([i], reply.error if isinstance(reply, Refused) else [reply])

        if node is None:
            replied(_nowhere())
        else:
            node.line.send(commands if len(mine) == len(commands) else [commands[i] for i in mine], replied)

    async def _again(self, key: str, command: bytes, refused: Refused) -> Replies:
        """The reply to a command that was not done, sent until it is or the time is over."""
        clock, pause_s = asyncio.get_running_loop().time, 0.0
        until = clock() + self._options.reply_timeout_s
        while refused.reason in self.not_done and clock() < until:
            await asyncio.sleep(pause_s)
            pause_s = _PAUSE_S
            node, first = self._next(key, refused)
            if node is None:
                raise _nowhere()
            *_, reply = await ask(node.line, *first, command)
            if not isinstance(reply, Refused):
                return [reply]
            refused = reply
        raise refused.error

    def _next(self, key: str, refused: Refused) -> tuple[Node | None, Sequence[bytes]]:
        """Where a command goes that was not done, and what must be said before it."""
        return self._node, LESSONS


def _nowhere() -> StoreUnavailable:
    return StoreUnavailable("Redis: no server of the cluster is known to have the session.", retry_after_s=1.0)


class Cluster(Nodes):
    """Many primaries, each with some of the 16384 slots; any of `seeds` that answers says who has which.

    One command names one session: sessions rarely share a slot, and a command about several is refused while their
    slot moves.
    """

    most = 1
    one_key = True
    not_done = frozenset({"NOSCRIPT", "MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"})

    def __init__(self, seeds: Sequence[Server], options: StoreOptions) -> None:
        super().__init__(None, options)
        self._seeds = seeds
        self._nodes: dict[Server, Node] = {}
        self._owners: list[Node | None] = [None] * _SLOTS
        self._looking: asyncio.Task[None] | None = None
        self._look_after = 0.0

    async def open(self) -> None:
        """Ask one server after the other who has which slots."""
        failure, cause = _nowhere(), None
        for asked in dict.fromkeys([*(node.server for node in self.primaries()), *self._seeds]):
            try:
                async with _client(asked, self._options) as client:
                    found = await client.execute_command("CLUSTER SLOTS")
            except (RedisError, OSError) as error:
                failure, cause = unavailable(asked, str(error)), error
                continue
            owners: list[Node | None] = [None] * _SLOTS
            for first, last, (host, port, *_), *_ in found:
                owners[first : last + 1] = [self._at(asked, (host or b"").decode(), port)] * (last + 1 - first)
            self._owners = owners
            return
        raise failure from cause

    def send(self, keys: Sequence[str], commands: Sequence[bytes], told: Told) -> None:
        for node, mine in self._by_node(keys).items():
            self._send(node, mine, keys, commands, told)

    def apart(self, keys: Sequence[str]) -> Sequence[Sequence[int]]:
        return list(self._by_node(keys).values())

    def _by_node(self, keys: Sequence[str]) -> dict[Node | None, list[int]]:
        by_node: dict[Node | None, list[int]] = {}
        for i, key in enumerate(keys):
            by_node.setdefault(self._owners[slot_of(key)], []).append(i)
        return by_node

    def primaries(self) -> list[Node]:
        return [node for node in dict.fromkeys(self._owners) if node]

    def doubt(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._look_after and (self._looking is None or self._looking.done()):
            self._look_after = now + _LOOK_S
            self._looking = asyncio.create_task(self.open())
            self._looking.add_done_callback(lambda look: look.cancelled() or look.exception())  # the next looks again

    async def close(self) -> None:
        self._look_after = inf  # calls that fail by this start no other look
        if self._looking is not None:
            await asyncio.wait([self._looking])  # cut off while it connects, it would leave a socket open
        for node in self._nodes.values():
            await node.close()

    def _next(self, key: str, refused: Refused) -> tuple[Node | None, Sequence[bytes]]:
        slot = slot_of(key)
        if refused.reason in ("MOVED", "ASK"):  # 123 host:port
            host, _, port = refused.text.split(" ")[2].rpartition(":")
            node = self._at(refused.server, host, int(port))
            if refused.reason == "ASK":
                return node, (_ASKING,)
            self._owners[slot] = node
        return self._owners[slot], LESSONS if refused.reason == "NOSCRIPT" else ()

    def _at(self, asked: Server, host: str, port: int) -> Node:
        """The server that another one names; one without a name has the same host."""
        server = replace(asked, host=asked.host if host in ("", "?") else host, port=port)
        if server not in self._nodes:
            self._nodes[server] = Node(server, lambda: connect(server, self._options), self._options)
        return self._nodes[server]


def slot_of(key: str) -> int:
    """The cluster's slot of a session: of what stands between the braces of its Redis keys."""
    return crc_hqx(key.encode(), 0) % _SLOTS


# --- redis-py -------------------------------------------------------------------------------------------------------


def servers_of(parts: SplitResult, scheme: str, db: str, query: Mapping[str, str], port: int) -> list[Server]:
    """The servers of host:port,host:port, who share user, password, database and options; `port` where none is given.

    Raises ConfigError: not a URL of this form, or its certificates cannot be read.
    """
    if db and not db.isdecimal():
        raise ConfigError(f"store URL asks for database {db!r}. Give its number.")
    entry, at, hosts = parts.netloc.rpartition("@")
    found = []
    for host in hosts.split(","):
        try:
            url = urlunsplit((scheme, entry + at + host, db, urlencode(query), ""))
            options: dict[str, Any] = {**parse_url(url)}
            context = None
            if "connection_class" in options:  # of TLS
                options.setdefault("ssl_check_hostname", True)  # redis-py before 6 leaves the name unchecked
                tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
                context = SSLConnection(**tls).ssl_context.get()
        except OSError as error:
            raise ConfigError(f"store URL has certificates that cannot be read: {error}.") from error
        except ValueError as error:
            raise ConfigError(f"store URL has the host {host!r}: {error}.") from error
        found.append(Server(options.get("host", "localhost"), options.get("port", port), options, context))
    return found


def _client(server: Server, options: StoreOptions) -> Any:
    """One of redis-py that asks once: whether to ask again is for who calls us to say."""
    waits = {"socket_connect_timeout": options.connect_timeout_s, "socket_timeout": options.reply_timeout_s}
    where = {"host": server.host, "port": server.port, "protocol": 2, "retry": _ONCE}
    return Redis.from_pool(ConnectionPool(**{**server.options, **waits, **where}))


async def connect_primary(sentinels: Sequence[Server], service: str, entry: Server, options: StoreOptions) -> Wire:
    """A connection to the server that the first sentinel that answers calls primary, and that says so itself.

    `service` is the primary's name there; database, user and TLS are those of `entry`.
    """
    asked = cast(Any, Sentinel)([])
    asked.sentinels = [_client(sentinel, options) for sentinel in sentinels]
    try:
        host, port = await asked.discover_master(service)
    except (RedisError, OSError) as error:
        raise unavailable(sentinels[0], f"no sentinel knows a primary {service!r}, or none answers") from error
    finally:
        for client in asked.sentinels:
            await client.aclose()
    wire = await connect(replace(entry, host=host, port=int(port)), options)
    (role,) = await ask(wire, pack("ROLE"))
    if isinstance(role, Refused) or role[0] != b"master":
        wire.close("not a primary")
        why = role.text if isinstance(role, Refused) else "the sentinels call it primary, it is not one yet"
        raise unavailable(wire.server, why)
    return wire
