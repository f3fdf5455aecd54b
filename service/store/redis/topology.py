"""Which Redis server answers for a key: one primary (fixed, or named by sentinels), or a cluster of them."""

import asyncio
from binascii import crc_hqx
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

from hiredis import ReplyError

from stepcast.errors import StoreUnavailable

from .connection import (
    Command,
    Server,
    Timeouts,
    Wire,
    connect,
    error_code,
    is_elsewhere,
    refusal,
    unavailable,
)

SLOTS: Final = 16384
_ROUNDS: Final = 5
_TRYAGAIN_S: Final = 0.05
_LINES_THAT_WAIT: Final = 4

_T = TypeVar("_T")


class Job(NamedTuple):
    """A command about one key, or about several of one group."""

    key: str
    command: Command


@dataclass(frozen=True, slots=True)
class Replication:
    """How many replicas must have a write before it counts, and how long to wait for them; 0: do not wait."""

    replicas: int = 0
    timeout_s: float = 0.5


class Nodes(Protocol):
    """The servers of one store."""

    def groups(self, keys: Sequence[str]) -> Iterable[Sequence[int]]:
        """Indices of `keys`, grouped so that one command may touch all keys of a group."""

    async def run(self, jobs: Sequence[Job]) -> list[Any]:
        """The replies to `jobs`, in order. Raises StoreUnavailable if one is an error."""

    async def primaries(self) -> "list[Node]":
        """All servers that take writes, in an order that outlives a failover."""

    def wire(self) -> Wire | None:
        """The connection that plain commands about any key may take now; None: `run` has more to do than to send."""

    async def close(self) -> None:
        """Disconnect."""


class Node:
    """One server: connects when first needed, and again after a failure.

    Args:
        locate: Makes a connection to where the server is now.
        load_script: What to send to a server that does not know our script.
        replication: With replicas, several connections take turns, since one that waits for replicas stands still.
    """

    def __init__(self, locate: Callable[[], Awaitable[Wire]], load_script: Command, replication: Replication) -> None:
        self._load_script = load_script
        self._replication = replication
        lines = _LINES_THAT_WAIT if replication.replicas else 1
        self._lines = [_Line(locate) for _ in range(lines)]
        self._turn = cycle(self._lines)

    async def run(self, commands: Sequence[Command], *, replicated: bool = False) -> list[Any]:
        """The replies, an error among them as a Refused.

        Args:
            commands: Sent together.
            replicated: What the replies tell must be on the replicas that the level asks for. That holds for reads
                too: an answer that was refused for lack of replicas and then read back could still be lost.
        """
        wire = await next(self._turn).wire()
        call = self._call_and_wait if replicated and self._replication.replicas else self._call
        replies = await call(wire, commands)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, Refused) and reply.code == "NOSCRIPT"]
        if unknown:
            again = await call(wire, [self._load_script, *(commands[i] for i in unknown)])
            for i, reply in zip(unknown, again[1:], strict=True):
                replies[i] = reply
        return replies

    async def close(self) -> None:
        """Disconnect."""
        for line in self._lines:
            await line.close()

    def wire(self) -> Wire | None:
        """The connection, where there is one and its replies count as they come."""
        return None if self._replication.replicas else self._lines[0].open_wire

    async def _call(self, wire: Wire, commands: Sequence[Command], patience_s: float = 0.0) -> list[Any]:
        replies = await wire.call(commands, patience_s)
        for i, reply in enumerate(replies):
            if isinstance(reply, ReplyError):
                replies[i] = Refused(wire.server, reply)
                if is_elsewhere(reply):
                    wire.close(str(reply), reply)
        return replies

    async def _call_and_wait(self, wire: Wire, commands: Sequence[Command]) -> list[Any]:
        need, limit_s = self._replication.replicas, self._replication.timeout_s
        wait = ("WAIT", need, max(1, int(limit_s * 1000)))
        *replies, reached = await self._call(wire, [*commands, wait], limit_s)
        if isinstance(reached, Refused):
            raise reached.error
        if reached < need:
            raise unavailable(wire.server, f"{reached} of {need} replicas have it after {limit_s:g} s", 1.0)
        return replies


class Refused:
    """An error that a server replied."""

    def __init__(self, server: Server, error: ReplyError) -> None:
        self.code = error_code(error)
        self.text = str(error)
        self.error = refusal(server, error)


class Single:
    """One primary."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def groups(self, keys: Sequence[str]) -> Iterable[Sequence[int]]:
        return [range(len(keys))]

    async def run(self, jobs: Sequence[Job]) -> list[Any]:
        replies = await self._node.run([job.command for job in jobs], replicated=True)
        for reply in replies:
            if isinstance(reply, Refused):
                raise reply.error
        return replies

    async def primaries(self) -> list[Node]:
        return [self._node]

    def wire(self) -> Wire | None:
        return self._node.wire()

    async def close(self) -> None:
        await self._node.close()


class Cluster:
    """Many primaries, each with some of the 16384 slots.

    The map of slots is read when first needed, and again after a redirection or a failure.

    Args:
        seeds: Servers to ask for the map; any one that answers will do.
        node_at: Makes the Node for a server.
    """

    def __init__(self, seeds: Sequence[Server], node_at: Callable[[Server], Node]) -> None:
        self._seeds = seeds
        self._node_at = node_at
        self._nodes: dict[Server, Node] = {}
        self._owners: dict[int, Server] = {}  # by slot
        self._stale = True
        self._refresh = _Once(self._read_map)

    def groups(self, keys: Sequence[str]) -> Iterable[Sequence[int]]:
        by_slot: dict[int, list[int]] = {}
        for i, key in enumerate(keys):
            by_slot.setdefault(slot_of(key), []).append(i)
        return by_slot.values()

    async def run(self, jobs: Sequence[Job]) -> list[Any]:
        if self._stale:
            await self._refresh()
        replies: list[Any] = [None] * len(jobs)
        todo: Sequence[int] = range(len(jobs))
        for _ in range(_ROUNDS):
            todo = await self._round(jobs, todo, replies)
            if not todo:
                return replies
        raise unavailable(self._seeds[0], f"the cluster redirected {_ROUNDS} times", 0.5)

    async def primaries(self) -> list[Node]:
        if self._stale:
            await self._refresh()
        servers = dict.fromkeys(self._owners[slot] for slot in sorted(self._owners))
        return [self._node(server) for server in servers]

    def wire(self) -> Wire | None:
        return None

    async def close(self) -> None:
        await self._refresh.close()
        for node in self._nodes.values():
            await node.close()

    async def _round(self, jobs: Sequence[Job], todo: Sequence[int], replies: list[Any]) -> list[int]:
        """Ask each node once; fill in `replies` and return the jobs that must be sent again."""
        by_server: dict[Server, list[int]] = {}
        for i in todo:
            by_server.setdefault(self._owner(jobs[i].key), []).append(i)
        outcomes = await asyncio.gather(
            *(
                self._node(server).run([jobs[i].command for i in mine], replicated=True)
                for server, mine in by_server.items()
            ),
            return_exceptions=True,  # hear all of them, then judge
        )
        again = []
        for (server, mine), outcome in zip(by_server.items(), outcomes, strict=True):
            if isinstance(outcome, BaseException):
                self._stale = True
                raise outcome
            for i, reply in zip(mine, outcome, strict=True):
                replies[i] = await self._redirected(server, jobs[i], reply)
                if replies[i] is _AGAIN:
                    again.append(i)
        return again

    async def _redirected(self, server: Server, job: Job, reply: Any) -> Any:
        """The reply itself, or _AGAIN where the job was not done and has another place now."""
        if not isinstance(reply, Refused):
            return reply
        if reply.code == "MOVED":
            self._stale = True
            self._owners[slot_of(job.key)] = self._named(server, reply.text)
            return _AGAIN
        if reply.code == "ASK":
            there = self._node(self._named(server, reply.text))
            _, reply = await there.run([("ASKING",), job.command], replicated=True)
        if isinstance(reply, Refused) and reply.code in ("TRYAGAIN", "MOVED"):
            await asyncio.sleep(_TRYAGAIN_S)  # the slot is on its way to another server
            return _AGAIN
        if isinstance(reply, Refused):
            self._stale = True
            raise reply.error
        return reply

    def _owner(self, key: str) -> Server:
        slot = slot_of(key)
        if slot not in self._owners:
            self._stale = True
            raise unavailable(self._seeds[0], f"no server has slot {slot} of the cluster", 1.0)
        return self._owners[slot]

    def _node(self, server: Server) -> Node:
        if server not in self._nodes:
            self._nodes[server] = self._node_at(server)
        return self._nodes[server]

    def _named(self, server: Server, redirection: str) -> Server:
        """The server that "MOVED 123 host:port" names; no host means the same host."""
        host, _, port = redirection.split(" ")[2].rpartition(":")
        return replace(server, host=host or server.host, port=int(port))

    async def _read_map(self) -> None:
        """Ask one server after the other which has which slots."""
        failure: StoreUnavailable | None = None
        for server in dict.fromkeys([*self._owners.values(), *self._seeds]):
            try:
                (reply,) = await self._node(server).run([("CLUSTER", "SLOTS")])
            except StoreUnavailable as error:
                failure = error
                continue
            if isinstance(reply, Refused):
                failure = reply.error
                continue
            self._owners = dict(_owners(server, reply))
            self._stale = False
            return
        assert failure is not None  # there is at least one seed
        raise failure


_AGAIN: Final = object()


def slot_of(key: str) -> int:
    """The cluster's slot of a session: of what stands between the braces of its Redis keys."""
    return crc_hqx(key.encode(), 0) % SLOTS


def _owners(asked: Server, reply: Sequence[Any]) -> Iterable[tuple[int, Server]]:
    """Slot and server, from the reply to CLUSTER SLOTS."""
    for first, last, (host, port, *_), *_ in reply:
        server = replace(asked, host=host.decode() if host else asked.host, port=port)
        yield from ((slot, server) for slot in range(first, last + 1))


async def ask_sentinels(sentinels: Sequence[Server], service: str, entry: Server, timeouts: Timeouts) -> Wire:
    """A connection to the server that the first sentinel that answers calls primary, and that says so itself.

    Args:
        sentinels: Asked in order.
        service: The name that the sentinels know the primary by.
        entry: Database, user and TLS of the primary; its host and port do not count.
        timeouts: Of each connection.
    """
    failure = unavailable(sentinels[0], f"no sentinel knows a primary {service!r}", 1.0)
    for sentinel in sentinels:
        try:
            found = await _ask(sentinel, timeouts, ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service))
        except StoreUnavailable as error:
            failure = error
            continue
        if found is not None:
            return await _connect_primary(replace(entry, host=found[0].decode(), port=int(found[1])), timeouts)
    raise failure


async def _ask(server: Server, timeouts: Timeouts, command: Command) -> Any:
    wire = await connect(server, timeouts)
    (reply,) = await wire.call([command])
    wire.close("asked")
    if isinstance(reply, ReplyError):
        raise refusal(server, reply)
    return reply


async def _connect_primary(server: Server, timeouts: Timeouts) -> Wire:
    wire = await connect(server, timeouts)
    (role,) = await wire.call([("ROLE",)])
    if isinstance(role, ReplyError):
        wire.close("not a primary")
        raise refusal(server, role)
    if role[0] != b"master":
        wire.close("not a primary")
        raise unavailable(server, "the sentinels call it primary, it is not one yet", 1.0)
    return wire


class _Once(Generic[_T]):
    """Work that all who ask for it at the same time share."""

    def __init__(self, work: Callable[[], Awaitable[_T]]) -> None:
        self._work = work
        self._task: asyncio.Task[_T] | None = None

    async def __call__(self) -> _T:
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(_look_at)
        return await asyncio.shield(self._task)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> _T:
        try:
            return await self._work()
        finally:
            self._task = None


def _look_at(task: asyncio.Task[Any]) -> None:
    """Take the outcome of a task, since all who wanted it may be gone."""
    if not task.cancelled():
        task.exception()


class _Line:
    """A connection that comes back."""

    def __init__(self, locate: Callable[[], Awaitable[Wire]]) -> None:
        self._locate = locate
        self._closed = False
        self._wire: Wire | None = None
        self._reconnect = _Once(self._connect)

    @property
    def open_wire(self) -> Wire | None:
        """The connection, if it is open."""
        wire = self._wire
        return None if wire is None or wire.broken or self._closed else wire

    async def wire(self) -> Wire:
        """The connection, made anew where it is broken."""
        if self._closed:
            raise StoreUnavailable("The store is closed.", retry_after_s=1.0)
        if self._wire is None or self._wire.broken:
            await self._reconnect()
        assert self._wire is not None
        return self._wire

    async def close(self) -> None:
        self._closed = True
        await self._reconnect.close()
        if self._wire is not None:
            self._wire.close("the store is closed")

    async def _connect(self) -> None:
        self._wire = await self._locate()
