"""One connection to one Redis server, shared by all calls in flight.

A client of our own on top of hiredis, for two reasons. Nothing may be sent twice: a general client's retry after a
lost reply would turn an applied compare-and-set into a refused one. And calls in flight share one connection, in
order, at half the processor time of redis-py's pool, which would give each a connection of its own.
"""

import asyncio
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, cast

from hiredis import HiredisError, Reader, ReplyError, pack_command

from stepcast.errors import StoreUnavailable

Command = tuple[Any, ...]  # of str, bytes and int

_SEND_BYTES: Final = 1 << 20
"""Room in the kernel for a whole batch, so that it leaves in one go."""
_LOST_RETRY_S: Final = 1.0
_SLOW_RETRY_S: Final = 0.5
_RETRY_S: Final = {"OOM": 5.0, "MISCONF": 5.0, "TRYAGAIN": 0.1}
_IN_SCRIPT: Final = re.compile(r"-([A-Z]+) ")
_ELSEWHERE: Final = frozenset({"READONLY", "MASTERDOWN", "LOADING"})


@dataclass(frozen=True, slots=True)
class Server:
    """Where a Redis server is and how to enter."""

    host: str = "localhost"
    port: int = 6379
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def greeting(self) -> list[Command]:
        """What to say first."""
        commands: list[Command] = [("CLIENT", "SETNAME", "stepcast")]
        if self.db:
            commands.insert(0, ("SELECT", self.db))
        if self.password is not None:
            user = (self.username,) if self.username else ()
            commands.insert(0, ("AUTH", *user, self.password))
        return commands


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long to wait for a connection and for a reply, in seconds."""

    connect_s: float = 1.0
    reply_s: float = 1.0


Replied = Callable[[list[Any] | StoreUnavailable], None]


class _Call(NamedTuple):
    replies: list[Any]
    wanted: int
    done: Replied
    until: float
    """When the replies must be there, by the loop's clock."""
    limit_s: float


class Wire(asyncio.Protocol):
    """A connection; made by connect()."""

    def __init__(self, server: Server, reply_s: float) -> None:
        self.server = server
        self.broken: str | None = None
        """Why it can not be used any more."""
        self._reply_s = reply_s
        self._reader = Reader()
        self._calls: deque[_Call] = deque()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.TimerHandle | None = None

    async def call(self, commands: Sequence[Command], patience_s: float = 0.0) -> list[Any]:
        """The replies to `commands`, sent together; an error reply is a ReplyError among them.

        Args:
            commands: Not empty.
            patience_s: How long Redis may take on purpose, beyond the usual time.

        Raises:
            StoreUnavailable: no reply, or not in time; what was done is unknown.
        """
        if self.broken or self._transport is None:
            raise unavailable(self.server, self.broken or "not connected", _LOST_RETRY_S)
        future: asyncio.Future[list[Any]] = self._loop.create_future()

        def done(replies: list[Any] | StoreUnavailable) -> None:
            if future.done():  # its caller is gone
                return
            if isinstance(replies, list):
                future.set_result(replies)
            else:
                future.set_exception(replies)

        self.send(b"".join(map(pack_command, commands)), len(commands), done, patience_s)
        return await future

    def send(self, packed: bytes, wanted: int, done: Replied, patience_s: float = 0.0) -> None:
        """The same with commands that are bytes already; the connection must not be broken.

        Args:
            wanted: How many commands these are.
            done: Called with the replies as soon as they are read, or with what became of them instead.
        """
        assert self._transport is not None
        loop, limit_s = self._loop, self._reply_s + patience_s
        self._calls.append(_Call([], wanted, done, loop.time() + limit_s, limit_s))
        self._transport.write(packed)
        if self._watch is None:
            self._watch = loop.call_later(limit_s, self._look)

    def _look(self) -> None:
        """End the connection where the oldest call waits too long; one timer serves all calls."""
        self._watch = None
        if not self._calls:
            return
        oldest = self._calls[0]
        rest_s = oldest.until - self._loop.time()
        if rest_s > 0:
            self._watch = self._loop.call_later(rest_s, self._look)
        else:
            self.close(f"no reply within {oldest.limit_s:g} s", retry_after_s=_SLOW_RETRY_S)

    def close(self, why: str, cause: Exception | None = None, retry_after_s: float = _LOST_RETRY_S) -> None:
        """End the connection, so that a late reply is never taken for another call's; tell whoever waits why."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self.broken = self.broken or why
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
        try:
            self._reader.feed(data)
            while self._calls and (reply := self._reader.gets()) is not False:
                self._give(reply)
        except HiredisError as error:
            self.close(f"not a reply of Redis: {error}", error)

    def _give(self, reply: Any) -> None:
        call = self._calls[0]
        call.replies.append(reply)
        if len(call.replies) == call.wanted:
            self._calls.popleft()
            call.done(call.replies)


async def connect(server: Server, timeouts: Timeouts) -> Wire:
    """Open a connection and enter.

    Raises:
        StoreUnavailable: nobody there, or a wrong password.
    """
    wire = Wire(server, timeouts.reply_s)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeouts.connect_s):
            await loop.create_connection(lambda: wire, server.host, server.port, ssl=server.tls)
            replies = await wire.call(server.greeting())
    except OSError as error:
        wire.close("not connected")
        why = str(error) or f"no connection within {timeouts.connect_s:g} s"
        raise unavailable(server, why, _LOST_RETRY_S) from error
    for reply in replies[:-1]:  # the last one only sets a name
        if isinstance(reply, ReplyError):
            wire.close("refused at the door")
            raise refusal(server, reply)
    return wire


def unavailable(server: Server, why: str, retry_after_s: float) -> StoreUnavailable:
    """The error for a server that can not answer."""
    return StoreUnavailable(f"Redis at {server}: {why.rstrip('.')}.", retry_after_s=retry_after_s)


def refusal(server: Server, error: ReplyError) -> StoreUnavailable:
    """The error for a server that answered with an error."""
    refused = unavailable(server, str(error), _RETRY_S.get(error_code(error), 1.0))
    refused.__cause__ = error
    return refused


def error_code(error: ReplyError) -> str:
    """Redis' word for an error (OOM, READONLY, ...), also where Redis 6 wraps it in a script's error."""
    code = str(error).split(" ", 1)[0]
    wrapped = _IN_SCRIPT.search(str(error)) if code == "ERR" else None
    return wrapped.group(1) if wrapped else code


def is_elsewhere(error: ReplyError) -> bool:
    """Whether this server is not the one to talk to (any more): a replica, or one that is starting."""
    return error_code(error) in _ELSEWHERE
