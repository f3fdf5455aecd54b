"""The two ways to carry the SDK's calls: by waiting, on blocking sockets, and by awaiting, on asyncio.

Both keep connections open between calls, and lend each to one call at a time.
"""

import asyncio
import socket
import ssl
import time
from collections import deque
from typing import Any, TypeVar

from .calls import Pause, Steps
from .wire import BROKEN, Broken, Call, Reply, Response, Target, broken

T = TypeVar("T")

_READ_BYTES = 256 * 1024


# --- by waiting -----------------------------------------------------------------------------------------------------


class Transport:
    """Carries calls on blocking sockets. Threads may share it: each call has a connection to itself."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._idle: deque[socket.socket] = deque()  # append and pop are atomic
        self._closed = False

    def run(self, steps: Steps[T]) -> T:
        """Ask what is to be asked until there is a result."""
        try:
            asked = next(steps)
            while True:
                asked = steps.send(self._carry(asked))
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close all idle connections; those in use close when their call is answered."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _carry(self, asked: Call | Pause) -> Reply | Broken | None:
        if isinstance(asked, Pause):
            time.sleep(asked.seconds)
            return None
        if self._closed:
            raise RuntimeError("the client is closed")
        request = self.target.request(asked)
        deadline = time.monotonic() + min(self._timeout_s, asked.timeout_s or self._timeout_s)
        try:
            return self._exchange(request, deadline)
        except BROKEN as error:
            return broken(error)

    def _exchange(self, request: bytes, deadline: float) -> Reply:
        connection = self._connection(deadline)
        try:
            response = _ask(connection, request, deadline)
        except BaseException:
            connection.close()
            raise
        if response.reusable and not self._closed:
            self._idle.append(connection)
        else:
            connection.close()
        return response.reply

    def _connection(self, deadline: float) -> socket.socket:
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if _is_quiet(connection):
                return connection
            connection.close()
        return _connected(self.target, deadline)


def _is_quiet(connection: socket.socket) -> bool:
    """Whether an idle connection is open still: nothing comes, not even its end."""
    connection.settimeout(0)
    try:
        connection.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        pass  # reset
    return False


def _connected(target: Target, deadline: float) -> socket.socket:
    connection = socket.create_connection(target.proxy or target.address, _left(deadline))
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if target.context is None:
            return connection
        if target.proxy is not None and (status := _ask(connection, target.tunnel, deadline, True).status) != 200:
            raise ConnectionError(f"the proxy {target.proxy} answered CONNECT with {status}")
        return target.context.wrap_socket(connection, server_hostname=target.address[0])
    except BaseException:
        connection.close()
        raise


def _ask(connection: socket.socket, request: bytes, deadline: float, only_head: bool = False) -> Response:
    response = Response(only_head)
    connection.settimeout(_left(deadline))
    connection.sendall(request)
    while not response.feed(connection.recv(_READ_BYTES)):
        connection.settimeout(_left(deadline))
    return response


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


# --- by awaiting ----------------------------------------------------------------------------------------------------


class AsyncTransport:
    """Carries calls on asyncio. Tasks of one event loop may share it: each call has a connection to itself."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._closed = False

    async def run(self, steps: Steps[T]) -> T:
        """Ask what is to be asked until there is a result."""
        try:
            asked = next(steps)
            while True:
                asked = steps.send(await self._carry(asked))
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def close(self) -> None:
        """Close all idle connections; those in use close when their call is answered."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # their transports close in the loop's next round

    async def _carry(self, asked: Call | Pause) -> Reply | Broken | None:
        if isinstance(asked, Pause):
            await asyncio.sleep(asked.seconds)
            return None
        if self._closed:
            raise RuntimeError("the client is closed")
        request = self.target.request(asked)
        timeout_s = min(self._timeout_s, asked.timeout_s or self._timeout_s)
        try:
            return await self._exchange(request, asyncio.get_running_loop().time() + timeout_s)
        except BROKEN as error:
            return broken(error)

    async def _exchange(self, request: bytes, deadline: float) -> Reply:
        connection = await self._connection(deadline)
        try:
            response = await connection.ask(request, deadline)
        except BaseException:
            connection.close()
            raise
        if response.reusable and not self._closed:
            self._idle.append(connection)
        else:
            connection.close()
        return response.reply

    async def _connection(self, deadline: float) -> "_Connection":
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        async with asyncio.timeout_at(deadline):
            return await _connected_async(self.target, deadline)


class _Connection(asyncio.Protocol):
    """One connection, which carries one request at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._waiter: asyncio.Future[Response] | None = None

    @property
    def is_open(self) -> bool:
        """Whether a request may be sent on it."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, deadline: float, only_head: bool = False) -> Response:
        """Send a request; its response."""
        assert self._transport is not None
        self._response = Response(only_head)
        self._waiter = self._loop.create_future()
        alarm = self._loop.call_at(deadline, self._fail, TimeoutError("timed out"))
        try:
            self._transport.write(request)
            return await self._waiter
        finally:
            alarm.cancel()
            self._response = self._waiter = None

    async def start_tls(self, target: Target) -> None:
        """Go on with TLS."""
        assert self._transport is not None
        assert target.context is not None
        name = target.address[0]
        upgraded = await self._loop.start_tls(self._transport, self, target.context, server_hostname=name)
        self._transport = upgraded

    def close(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    # --- called by asyncio ----------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """There is a connection."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes came; such as nobody asked for end the connection."""
        if self._response is None or self._waiter is None or self._waiter.done():
            self.close()
            return
        try:
            if self._response.feed(data):
                self._waiter.set_result(self._response)
        except BROKEN as error:
            self._fail(error)

    def connection_lost(self, error: Exception | None) -> None:
        """The connection has ended."""
        self._transport = None
        if error is not None:
            self._fail(error)
        elif self._response is not None:
            self.data_received(b"")

    def _fail(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


async def _connected_async(target: Target, deadline: float) -> _Connection:
    loop = asyncio.get_running_loop()
    host, port = target.proxy or target.address
    tunnel = target.proxy is not None and target.context is not None
    _, connection = await loop.create_connection(_Connection, host, port, ssl=None if tunnel else target.context)
    if tunnel:
        status = (await connection.ask(target.tunnel, deadline, True)).status
        if status != 200:
            connection.close()
            raise ConnectionError(f"the proxy {target.proxy} answered CONNECT with {status}")
        await connection.start_tls(target)
    return connection
