"""What a socket may cost before its requests are understood: bytes of a head, seconds of waiting, a place among others.

uvicorn's connection has no such limits. A head is kept here until it is whole, so that it is read once, however slowly
it comes. The first answer that cannot be followed by another ends the connection; what the client still sends is
dropped for a moment, or the answer would be lost with it.
"""

import asyncio
import re
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from stepcast.errors import (
    AddressTooLong,
    HeadTooLarge,
    Malformed,
    RequestTimeout,
    StepcastError,
    TooManyConnections,
)

from ...settings import Settings
from ..answers import head_of, problem
from ..intake import Share
from ..request_ids import new_id
from .heads import Heads

BODY_RATE: Final = 16 * 1024
"""Bytes of a body that give it a second more."""
LINGER_S: Final = 2.0
"""How long a client that got its last answer is listened to."""
LINGER_BYTES: Final = 16 * 2**20
LINGERERS: Final = 256
"""Connections over the limit that get a moment to read why; the others are closed at once."""

_BLANK: Final = re.compile(rb"\n\r?\n")
_METHOD: Final = re.compile(rb"[A-Z][A-Z-]{0,19}(?: |$)")
_LINE: Final = re.compile(rb"[A-Z][A-Z-]{0,19} [^ \r\n]+ HTTP/1\.[01]\r\n")


class GuardedConnection(HttpToolsProtocol):
    """uvicorn's connection within the limits of our settings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heads = _heads(self.app) if self.limit_concurrency is None and not self.root_path else None
        self.metrics = None if self._heads is None else self._heads.metrics
        settings = self._settings = Settings() if self._heads is None else self._heads.settings
        self._head_limit, self._read_s = settings.head_limit_bytes, settings.read_s
        self._between = True  # no message has begun in the parser
        self._in_head = False  # one has, whose head is not whole there: it came behind another message
        self._head_size = self._fed = 0  # of that head so far; of the bytes among which it begins, too
        self._keeps = True  # whether the connection stays open behind the message in the parser
        self._stepping = False  # a step of ours is under way
        self._parts: list[bytes] = []  # of a request that is kept until its head, or its body, is whole,
        self._tail = b""  # the last of them,
        self._size = self._missing = 0  # how much there is, and how much of a body is still to come
        self._has_line = False  # whether its first line has come
        self._share: Share | None = None  # what the bytes of a body count
        self._fault: StepcastError | None = None  # ends the connection when what came before it is answered
        self._due = 0.0  # when what is waited for must be there
        self._watch: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._answered_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        over = len(self.connections) - self._settings.connections_limit
        if over > 0:
            text = f"the server has {self._settings.connections_limit} connections open (limit). Retry after 1 s."
            self.end(TooManyConnections(text, retry_after_s=1.0), lingers=over <= LINGERERS)
            return
        self._answered_at = self.loop.time() + self._read_s - self.timeout_keep_alive
        first_s = min(self._read_s, self.timeout_keep_alive)
        self.timeout_keep_alive_task = self.loop.call_later(first_s, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or we are."""
        self._forget()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    @property
    def address(self) -> str:
        """Where the client is; empty where it has none."""
        return self.client[0] if self.client else ""

    def pause_writing(self) -> None:
        """The client does not read its answers."""
        super().pause_writing()
        self._stall = self.loop.call_later(self._settings.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    # --- what has not come whole ------------------------------------------------------------------------------------

    def _keep(self, data: bytes, missing: int = 0) -> None:
        """Keep the beginning of a request until its head, or that much more of its body, has come."""
        self._parts.append(data)
        self._tail, self._size, self._missing, self._has_line = data[-3:], len(data), missing, b"\n" in data
        self._expect()

    def _more(self, data: bytes) -> bytes | None:
        """What was kept and what came now, if that is whole, or too much for a head."""
        if self._fault is not None:
            return None
        self._parts.append(data)
        if self._missing:
            self._missing -= len(data)
            self._due += len(data) / BODY_RATE
            if self._missing > 0:
                return None
        else:
            end = self._tail + data
            self._tail = end[-3:]
            self._size += len(data)
            if self._size <= self._head_limit and _BLANK.search(end) is None and (b"\n" not in data or self._lined()):
                return None
        whole, self._missing = b"".join(self._parts), 0
        self._parts.clear()
        return whole

    def _lined(self) -> bool:
        """Whether the first line of what was kept is that of a request; it is looked at once."""
        if not self._has_line:
            self._parts[:] = [b"".join(self._parts)]
            self._has_line = _begins(self._parts[0])
        return self._has_line

    def parse(self, data: bytes) -> None:
        """Hand bytes to uvicorn's parser, heads whole."""
        if self._share is not None:
            self._share.hold(0)
        if self._between:
            data = data.lstrip(b"\r\n")  # empty lines before a request mean nothing
            limit = self._head_limit
            if not data:
                return
            if _BLANK.search(data, 0, limit) is None:
                if len(data) > limit:
                    self.end(_too_long(data, limit))
                    return
                if _begins(data):
                    self._keep(data)
                    return
        if self._in_head:
            self._head_size += len(data)
            self._fed += len(data)
        else:
            self._fed = len(data)
        super().data_received(data)
        if self._in_head and self._head_size > self._head_limit:
            self.end(_too_long(self.url, self._head_limit))
        elif not self._between and self._watch is None:
            self._expect()

    def on_message_begin(self) -> None:
        """The parser begins a message."""
        self._between, self._in_head, self._head_size = False, True, 0
        self._due = self.loop.time() + self._read_s
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The parser has a head. Until the body is there, too, an answer ends the connection: it refuses the body."""
        self._in_head = False
        self._due = self.loop.time() + self._read_s
        if self._fed > self._head_limit:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self._head_limit:
                self._fault = _too_long(self.url, self._head_limit)
                raise self._fault
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self._keeps, self.cycle.keep_alive = self.cycle.keep_alive, False
            self.cycle.transport = cast(asyncio.Transport, _Ending(self))

    def on_body(self, body: bytes) -> None:
        """The parser has a part of a body."""
        self._due += len(body) / BODY_RATE
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The parser has a whole message."""
        self._between = True
        cycle = self.cycle
        if cycle is not None and isinstance(cycle.transport, _Ending) and not cycle.response_started:
            cycle.keep_alive, cycle.transport = self._keeps, self.transport
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer of the general way is written."""
        self._answered_at = self.loop.time()
        super().on_response_complete()
        if self._fault is not None and not self._busy():
            fault, self._fault = self._fault, None
            self.end(fault)

    def handle_websocket_upgrade(self) -> None:
        """The connection is a WebSocket's from here on."""
        self._forget()
        super().handle_websocket_upgrade()

    # --- time -------------------------------------------------------------------------------------------------------

    def _expect(self) -> None:
        """From now on something is waited for, if the connection is still ours: not a WebSocket's, and not let go."""
        if self.transport.get_protocol() is not self:
            return
        self._due = self.loop.time() + self._read_s
        if self._watch is None:
            self._watch = self.loop.call_later(self._read_s, self._late)

    def _late(self) -> None:
        """A timer of what is waited for: it is not set again when that has come, so it may be early."""
        self._watch = None
        if self._between and not self._parts:
            return
        rest_s = self._due - self.loop.time()
        if self.flow.read_paused or self._busy():  # it is we who make it wait
            rest_s = max(rest_s, self._read_s)
        if rest_s > 0:
            self._watch = self.loop.call_later(rest_s, self._late)
            return
        what = "body" if self._missing or not (self._between or self._in_head) else "head"
        text = f"the {what} of the request had not come whole after {self._read_s} s. Send it faster, or in parts."
        self.end(RequestTimeout(text, limit_s=self._read_s))

    def timeout_keep_alive_handler(self) -> None:
        """A timer of an idle connection: it is not set again at every step, so it may be early."""
        self.timeout_keep_alive_task = None
        if self._stepping or self._parts or not self._between:
            return
        rest_s = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if rest_s > 0:
            self.timeout_keep_alive_task = self.loop.call_later(rest_s, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    # --- the end ----------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """The parser refuses what came."""
        fault, self._fault = self._fault, None
        self.end(fault or Malformed(f"the bytes are not HTTP: {msg}"))

    def end(self, error: StepcastError, fields: bytes = b"", name: bytes | None = None, lingers: bool = True) -> None:
        """Answer with a problem, in its turn, and end the connection."""
        if self.transport.is_closing():
            return
        if self._busy():
            self._fault = error
            self._parts.append(b"")  # what comes now goes nowhere
            return
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            answer = problem(error, self.metrics)
            head = head_of(answer, fields + b"connection: close\r\n")
            self.transport.write(
                b"%s%d\r\nx-request-id: %s\r\n\r\n%s" % (head, len(answer.body), name or new_id(), answer.body)
            )
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if lingers:
            self.let_go()
        else:
            self.transport.close()

    def let_go(self) -> None:
        """The last answer is written: hear the client out for a moment, then close."""
        self._forget()
        if not self.transport.is_closing():
            self.transport.set_protocol(_Lingering(self))

    def _forget(self) -> None:
        """Nothing is waited for any more."""
        for timer in (self._watch, self._stall):
            if timer is not None:
                timer.cancel()
        self._watch = self._stall = None
        self._parts.clear()
        if self._share is not None:
            self._share.hold(0)

    def _busy(self) -> bool:
        """Whether a request that came whole is still to be answered on the general way."""
        cycle = self.cycle
        return bool(self.pipeline) or (cycle is not None and not cycle.response_complete and not cycle.more_body)


class _Ending:
    """The transport of an answer that is given before the body has come: when it closes, the client is heard out."""

    __slots__ = ("_connection", "is_closing", "write")

    def __init__(self, connection: GuardedConnection) -> None:
        self._connection = connection
        self.write, self.is_closing = connection.transport.write, connection.transport.is_closing

    def close(self) -> None:
        self._connection.let_go()


class _Lingering(asyncio.Protocol):
    """What is left of a connection: it drops what comes until the client closes it, or for LINGER_S."""

    def __init__(self, ended: GuardedConnection) -> None:
        self._ended, self._transport, self._dropped = ended, ended.transport, 0
        ended.flow.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._timer = ended.loop.call_later(LINGER_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        """Bytes that nobody wants."""
        self._dropped += len(data)
        if self._dropped > LINGER_BYTES:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has closed it."""
        self._timer.cancel()
        self._ended.connection_lost(exc)


def _begins(data: bytes) -> bool:
    """Whether bytes without a blank line may be the beginning of a head."""
    return (_LINE if b"\n" in data else _METHOD).match(data) is not None


def _too_long(data: bytes, limit: int) -> StepcastError:
    """The error for a head that is over the limit: for its address, if that alone is."""
    if b"\n" in data[:limit] or len(data) <= limit:
        return HeadTooLarge(f"the head of the request has more than {limit} bytes. Send fewer headers.", limit=limit)
    return AddressTooLong(f"the address of the request has more than {limit} bytes", limit=limit)


def _heads(app: Any) -> Heads | None:
    """The heads of our application, which uvicorn may have wrapped."""
    while app is not None and not hasattr(app, "heads"):
        app = getattr(app, "app", None)
    return cast("Heads | None", getattr(app, "heads", None))
