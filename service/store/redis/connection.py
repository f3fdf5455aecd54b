"""One connection to one Redis server, shared by all calls in flight.

A client of our own on top of hiredis. Nothing may be sent twice: a general client's retry after a lost reply would turn
an applied compare-and-set into a refused one. And calls in flight share one connection, in order, at a fraction of the
processor time of redis-py's pool, which would give each a connection of its own.
"""

import asyncio
import re
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, cast

from hiredis import HiredisError, Reader, ReplyError

from stepcast.errors import StoreUnavailable

from .. import StoreOptions
from .commands import LESSONS, pack

_SEND_BYTES: Final = 1 << 20  # room in the kernel for a whole batch, so that it leaves in one go
_SLOW_RETRY_S: Final = 0.5
_RETRY_S: Final = {"OOM": 5.0, "MISCONF": 5.0, "TRYAGAIN": 0.1}
_IN_SCRIPT: Final = re.compile(r"-([A-Z]+) ")
_ELSEWHERE: Final = frozenset({"READONLY", "MASTERDOWN", "LOADING"})  # said by a replica, and by who is starting


@dataclass(frozen=True, slots=True)
class Server:
    """Where a Redis server is and how to enter: what redis-py's parse_url gave, and what its options of TLS make."""

    host: str
    port: int
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    context: ssl.SSLContext | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def greeting(self) -> list[bytes]:
        """What to say first, to enter."""
        user, password, db = (self.options.get(name) for name in ("username", "password", "db"))
        commands = [pack("AUTH", *((user,) if user else ()), password)] if password is not None else []
        return [*commands, pack("SELECT", db)] if db else commands


class Refused:
    """An error that a server replied, in the place of the reply.

    `text` is all that it said, `reason` its word for it (OOM, MOVED, ...), also where Redis 6 wraps it in a script's.
    """

    def __init__(self, server: Server, error: ReplyError) -> None:
        self.server, self.text = server, str(error)
        self.reason = self.text.split(" ", 1)[0]
        if self.reason == "ERR" and (wrapped := _IN_SCRIPT.search(self.text)):
            self.reason = wrapped[1]

    @property
    def error(self) -> StoreUnavailable:
        """The same for a caller."""
        return unavailable(self.server, self.text, _RETRY_S.get(self.reason, 1.0))


Replies = list[Any]  # one per command; a Refused where the server replied with an error
Replied = Callable[[Replies | StoreUnavailable], None]


class _Call(NamedTuple):
    replies: Replies
    wanted: int
    done: Replied
    until: float  # the replies must be there, by the loop's clock
    limit_s: float


class Wire(asyncio.Protocol):
    """A connection; made by connect(). `broken` says why it cannot be used any more."""

    def __init__(self, server: Server, reply_s: float) -> None:
        self.server, self._reply_s = server, reply_s
        self.broken: str | None = None
        self._reader, self._loop = Reader(), asyncio.get_running_loop()
        self._calls: deque[_Call] = deque()
        self._transport: asyncio.Transport | None = None
        self._watch: asyncio.TimerHandle | None = None

    def send(self, commands: Sequence[bytes], done: Replied, patience_s: float = 0.0) -> None:
        """Send commands together, at least one; Redis may take `patience_s` on purpose, beyond the usual time.

        `done` is called with the replies as soon as they are read, or with what became of them instead: then it is
        unknown which commands were done.
        """
        if self.broken or self._transport is None:
            done(unavailable(self.server, self.broken or "not connected"))
            return
        loop, limit_s = self._loop, self._reply_s + patience_s
        self._calls.append(_Call([], len(commands), done, loop.time() + limit_s, limit_s))
        self._transport.writelines(commands)
        if self._watch is None:
            self._watch = loop.call_later(limit_s, self._look)

    def _look(self) -> None:
        """End the connection where the oldest call waits too long; one timer serves all calls."""
        self._watch = None
        if not self._calls:
            return
        oldest = self._calls[0]
        if (rest_s := oldest.until - self._loop.time()) > 0:
            self._watch = self._loop.call_later(rest_s, self._look)
        else:
            self.close(f"no reply within {oldest.limit_s:g} s", retry_after_s=_SLOW_RETRY_S)

    def close(self, why: str, cause: Exception | None = None, retry_after_s: float = 1.0) -> None:
        """End the connection, so that a late reply is never taken for another call's; tell whoever waits why."""
        if self._watch is not None:
            self._watch.cancel()
        self.broken, self._watch = self.broken or why, None
        if self._transport is not None:
            self._transport.abort()
        while self._calls:
            error = unavailable(self.server, why, retry_after_s)
            error.__cause__ = cause
            self._calls.popleft().done(error)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(f"connection lost: {exc or 'closed by the server'}", exc)

    def data_received(self, data: bytes) -> None:
        """Give each reply to the oldest call that still lacks one."""
        calls, read = self._calls, self._reader.gets
        try:
            self._reader.feed(data)
            while calls:
                replies, wanted, done, _, _ = calls[0]
                while len(replies) < wanted:
                    if (reply := read()) is False:  # the rest is still on its way
                        return
                    replies.append(reply)
                calls.popleft()
                done(self._judged(replies) if ReplyError in map(type, replies) else replies)
        except HiredisError as error:
            self.close(f"not a reply of Redis: {error}", error)

    def _judged(self, replies: Replies) -> Replies:
        """Replies with errors among them."""
        judged = [Refused(self.server, reply) if isinstance(reply, ReplyError) else reply for reply in replies]
        for reply in judged:
            if isinstance(reply, Refused) and reply.reason in _ELSEWHERE:
                self.close(reply.text)
        return judged


class Line:
    """A connection that comes back: opened by `locate` when first needed, and again after a failure.

    `replicas` must have what a command did, within `replicas_s`, before its reply counts. That goes for reads too: an
    answer that was refused for lack of replicas and then read back could still be lost.
    """

    def __init__(self, locate: Callable[[], Awaitable[Wire]], replicas: int = 0, replicas_s: float = 0.0) -> None:
        self._locate, self._replicas, self._replicas_s = locate, replicas, replicas_s
        self._wait = pack("WAIT", replicas, max(1, int(replicas_s * 1000)))
        self._wire: Wire | None = None
        self._opening: asyncio.Task[None] | None = None
        self._waiting: list[tuple[Sequence[bytes], Replied]] = []
        self._closed = False

    def send(self, commands: Sequence[bytes], done: Replied) -> None:
        """Send commands as Wire.send does, once there is a connection."""
        if self._wire is not None and not self._wire.broken:
            self._send(self._wire, commands, done)
        elif self._closed:
            done(_closed())
        else:
            self._waiting.append((commands, done))
            if self._opening is None:
                self._opening = asyncio.create_task(self._open())

    async def close(self) -> None:
        """Disconnect for ever."""
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._wire is not None:
            self._wire.close("the store is closed")

    async def _open(self) -> None:
        """Connect, then send what waits for it, or tell why that cannot be."""
        made: Wire | StoreUnavailable
        try:
            made = self._wire = await self._locate()
        except asyncio.CancelledError:
            made = _closed()
        except Exception as error:  # whatever it is, who waits must hear of it
            made = error if isinstance(error, StoreUnavailable) else StoreUnavailable(f"Redis: {error!r}.")
        self._opening, waiting, self._waiting = None, self._waiting, []
        for commands, done in waiting:
            if isinstance(made, Wire):
                self._send(made, commands, done)
            else:
                done(made)

    def _send(self, wire: Wire, commands: Sequence[bytes], done: Replied) -> None:
        if not self._replicas:
            wire.send(commands, done)
            return

        def waited(replies: Replies | StoreUnavailable) -> None:
            if isinstance(replies, list):
                *replies, reached = replies
                if isinstance(reached, Refused):
                    replies = reached.error
                elif reached < self._replicas:
                    facts = f"{reached} of {self._replicas} replicas have it after {self._replicas_s:g} s"
                    replies = unavailable(wire.server, facts)
            done(replies)

        wire.send([*commands, self._wait], waited, self._replicas_s)


async def ask(line: Wire | Line, *commands: bytes) -> Replies:
    """The replies to commands. Raises StoreUnavailable: none, or not in time; what was done is unknown."""
    future: asyncio.Future[Replies | StoreUnavailable] = asyncio.get_running_loop().create_future()

    def done(replies: Replies | StoreUnavailable) -> None:
        if not future.done():  # else its caller is gone
            future.set_result(replies)

    line.send(commands, done)
    if isinstance(replies := await future, list):
        return replies
    raise replies


async def connect(server: Server, options: StoreOptions) -> Wire:
    """Open a connection, enter, and teach the server our scripts. Raises StoreUnavailable."""
    wire, limit_s = Wire(server, options.reply_timeout_s), options.connect_timeout_s
    named = pack("CLIENT", "SETNAME", "stepcast")  # for who looks at Redis' list of clients; it may be forbidden
    try:
        async with asyncio.timeout(limit_s):
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: wire, server.host, server.port, ssl=server.context)
            *replies, _ = await ask(wire, *server.greeting(), *LESSONS, named)
    except BaseException as error:
        wire.close("not connected")
        if isinstance(error, OSError | ValueError):
            raise unavailable(server, str(error) or f"no connection within {limit_s:g} s") from error
        raise
    if refused := [reply for reply in replies if isinstance(reply, Refused)]:
        wire.close("refused at the door")
        raise refused[0].error
    return wire


def unavailable(server: Server, why: str, retry_after_s: float = 1.0) -> StoreUnavailable:
    """The error for a server that cannot answer."""
    return StoreUnavailable(f"Redis at {server}: {why.rstrip('.')}.", retry_after_s=retry_after_s)


def _closed() -> StoreUnavailable:
    return StoreUnavailable("The store is closed.", retry_after_s=1.0)
