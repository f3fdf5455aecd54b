"""The connection under a WebSocket: uvicorn's handshake, then messages straight between the transport and the door.

It hands whole bursts to the door, writes together what is ready in one tick, and has the door drain before it closes.
"""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode

from stepcast.errors import IntakeFull, Malformed, StepcastError

from ..answers import head_of, problem
from ..intake import Share
from ..request_ids import new_id
from . import rfc6455 as framing
from .rfc6455 import BadFrame, Framer, Message

if TYPE_CHECKING:
    from .conversation import Conversation

EXTENSION: Final = "stepcast.link"
"""Where the door finds a connection in its ASGI scope."""
CLOSE_S: Final = 5.0
"""How long the peer may take to answer our close frame."""
BURST: Final = 64
"""Messages taken from one socket before the others have their turn."""
AHEAD_BYTES: Final = 64 * 1024
"""What is read beyond what the door takes, so that pings behind waiting messages are answered."""
BEHIND_BYTES: Final = 2**20
"""What is read at most of messages that wait: how long they do is known here, not in the system's buffers."""
SLICE_S: Final = 0.002
LEAST_SHARE: Final = 0.1
"""The share of its time that a message may always wait, however long those before it are under way."""


class Slices:
    """Divides the loop's time: sockets that are behind have SLICE_S, then all else has as long.

    Else a server that is asked too much would read and refuse, and step no more.
    """

    def __init__(self) -> None:
        self._waiting: deque[WebSocketConnection] = deque()
        self._armed = False

    def add(self, connection: "WebSocketConnection") -> None:
        """Have a socket pumped when it is its turn."""
        self._waiting.append(connection)
        if not self._armed:
            self._armed = True
            connection.loop.call_soon(self._run)

    def _run(self) -> None:
        waiting, loop = self._waiting, self._waiting[0].loop
        end = loop.time() + SLICE_S
        for _ in range(len(waiting)):
            waiting.popleft().take_turn()
            if loop.time() > end:
                break
        self._armed = bool(waiting)
        if not waiting:
            return
        if loop.time() > end:
            loop.call_later(SLICE_S, self._run)
        else:
            loop.call_soon(self._run)


class WebSocketConnection(WebSocketsSansIOProtocol):
    """A WebSocket connection; the class for uvicorn's `ws` setting."""

    def __init__(self, config: Config, *rest: Any, **more: Any) -> None:
        super().__init__(config, *rest, **more)
        self.conn.available_extensions = None  # compressing small frames of floats costs more than it saves
        self._conversation: Conversation | None = None
        self._framer = Framer(config.ws_max_size)
        self._unread: deque[tuple[float, bytes]] = deque()  # what came while the door took nothing, and when
        self._unread_bytes = 0
        self._held: deque[tuple[float, Message]] = deque()
        self._held_bytes = 0
        self._arrived = self._now = 0.0  # when the framer's bytes came; the time of this pumping
        self._behind = False  # messages wait for the door
        self._late_s = self._patience_s = 0.0  # how long a message may wait and be under way; wait, as things stand
        self._slices: Slices | None = None
        self._queued = False  # a turn is wanted there
        self._share: Share | None = None
        self._out: list[bytes] = []
        self._pumping = self._deaf = self._stopped = self._closing = False
        self._heard = True
        self._stall_s = 0.0
        self._stall: asyncio.TimerHandle | None = None
        self._beats: asyncio.TimerHandle | None = None
        self._end: asyncio.TimerHandle | None = None

    def open(self, conversation: "Conversation", share: Share, slices: "Slices", stall_s: float, late_s: float) -> None:
        """Hand the connection to the door after websocket.accept.

        Args:
            conversation: The door. It refuses messages that would wait and be under way for longer than `late_s`.
            share: Counts what is held of messages that have not come whole, or wait.
            slices: When sockets that are behind have their turns.
            stall_s: Who leaves answers unread for so long is cut off.
        """
        self._conversation, self._share, self._slices = conversation, share, slices
        self._stall_s, self._late_s = stall_s, late_s
        self.stop_keepalive()  # uvicorn's own: it does not know when reading is paused
        if self.ping_interval:
            self._beats = self.loop.call_later(self.ping_interval, self._beat)
        self.transport.resume_reading()

    def reply(self, opcode: int, payload: bytes, last: bool = False) -> None:
        """Send a message; what is sent in one tick goes out together, unless this is the last that is expected."""
        out = self._out
        if not (out or last):
            self.loop.call_soon(self._flush)
        out.append(framing.head(opcode, len(payload)))
        out.append(payload)
        if last:
            self._flush()

    def close(self, code: int, reason: str = "") -> None:
        """Send what is ready and a close frame; the peer has CLOSE_S to answer it."""
        if self._closing or self.disconnected:
            return
        self._out.append(framing.frame(framing.CLOSE, framing.close_payload(code, reason)))
        self._flush()
        self._closing = True
        self._drop()
        self._end = self.loop.call_later(CLOSE_S, self.transport.abort)
        self._read(True)

    def pump(self, going_on: bool = False) -> None:
        """Hand on the messages that came, as far as the door takes them, BURST at a time."""
        conversation = self._conversation
        if conversation is None or self.disconnected or (self._pumping and not going_on):
            return
        self._pumping = True  # the door may call from within
        self._now = self.loop.time()
        self._patience_s = max(self._late_s - conversation.wait_s(), self._late_s * LEAST_SHARE)
        try:
            self._pumping = self._take()
        except BadFrame as bad:
            self._deaf = True
            self.close(*bad.args)
            if not self.transport.is_closing() and self.transport.can_write_eof():
                self.transport.write_eof()  # what the peer answers is not read: let it see the end at once
            return
        if self._pumping:
            self.want()
        self._behind = self._pumping or self._blocked()
        ahead = self._held_bytes + self._framer.buffered + self._unread_bytes
        fits = self._fits(ahead)
        if not (fits or self._behind):
            self._deaf = True
            self.close(CloseCode.TRY_AGAIN_LATER, "too many bytes of unfinished messages. Connect again later")
            return
        self._read(not self._behind or (fits and ahead < BEHIND_BYTES))

    def want(self) -> None:
        """Pump soon: there is room, or more to read, and others want their turn, too."""
        if self._slices is not None and not self._queued:
            self._queued = True
            self._slices.add(self)

    def take_turn(self) -> None:
        """The turn that was wanted."""
        self._queued = False
        self.pump(True)

    def _fits(self, ahead: int) -> bool:
        """Whether so many bytes may be held for the messages of this socket; what it reads ahead anyway is free."""
        share = cast(Share, self._share)
        try:
            share.hold(ahead if ahead > AHEAD_BYTES else 0)
        except IntakeFull:
            return False
        return True

    def _drop(self) -> None:
        """Forget what was not taken."""
        self._held.clear()
        self._unread.clear()
        self._held_bytes = self._unread_bytes = 0
        if self._share is not None:
            self._share.hold(0)

    def data_received(self, data: bytes) -> None:
        """Bytes from the peer: the handshake, then frames."""
        self._heard = True
        if self._conversation is not None:
            if self._deaf:
                return
            if self._behind:
                self._unread.append((self.loop.time(), data))
                self._unread_bytes += len(data)
                if self._unread_bytes > BEHIND_BYTES:
                    self._read(False)
                self.want()
                return
            self._framer.feed(data)
            if not self._take_usual(self._conversation):
                self._arrived = self.loop.time()
                self.pump()
        elif self.handshake_initiated:
            self._framer.feed(data)
        else:
            super().data_received(data)
            if not self.handshake_initiated:  # the head is whole, but the library gave it up without an answer
                self._refuse(
                    Malformed(f"the handshake is no WebSocket's: {self.conn.handshake_exc or 'it ends early'}")
                )
            elif not self.transport.is_closing():
                self.transport.pause_reading()  # until the door has the connection

    def _refuse(self, error: StepcastError) -> None:
        """Refuse a handshake that reaches no application."""
        answer = problem(error)
        fields = b"connection: close\r\nx-request-id: %s\r\n" % new_id()
        self.transport.write(b"%s%d\r\n\r\n%s" % (head_of(answer, fields), len(answer.body), answer.body))
        self.transport.close()

    def _take_usual(self, conversation: "Conversation") -> bool:
        """Hand on whole messages where nothing stands in the way; whether that was all, and all is as it was."""
        if self._held or self._pumping or self._closing or self._stopped or not self.writable.is_set():
            return False
        self._pumping = True  # the door may call from within
        try:
            for opcode, payload in self._framer.burst(min(BURST, conversation.room())):
                if not self._closing:
                    conversation.message(opcode, payload)
        except BadFrame:
            pass  # found again, and answered, by pump
        self._pumping = False
        return not self._framer.buffered and conversation.room() > 0

    def _take(self) -> bool:
        """Take up to BURST messages; whether there may be more to take now."""
        conversation, held = cast("Conversation", self._conversation), self._held
        for _ in range(BURST):
            if not held or self._blocked():  # then read on, for pings that wait behind
                message = self._next() if self._held_bytes < AHEAD_BYTES else None
                if message is None and not (held and self._is_late()):
                    return False
                if message is None:
                    pass
                elif message[0] > framing.BINARY:
                    self._control(*message)
                elif not self._closing:
                    held.append((self._arrived, message))
                    self._held_bytes += len(message[1])
            if not held:
                continue
            late = self._is_late()
            if late or not self._blocked():
                opcode, payload = held.popleft()[1]
                self._held_bytes -= len(payload)
                (conversation.late if late else conversation.message)(opcode, payload)
        return True

    def _next(self) -> Message | None:
        """The next message of what was read."""
        while (message := self._framer.next()) is None and self._unread:
            self._arrived, data = self._unread.popleft()
            self._unread_bytes -= len(data)
            self._framer.feed(data)
        return message

    def _is_late(self) -> bool:
        """Whether the oldest message has waited too long, and is refused; but not to a client that does not read."""
        late = self._now - self._held[0][0] > self._patience_s
        return late and self.writable.is_set() and cast("Conversation", self._conversation).refuses

    def _blocked(self) -> bool:
        return cast("Conversation", self._conversation).room() <= 0 or not self.writable.is_set()

    def _read(self, wanted: bool) -> None:
        if self._stopped == wanted and not self.transport.is_closing():
            self._stopped = not wanted
            (self.transport.resume_reading if wanted else self.transport.pause_reading)()

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == framing.PING:
            self.transport.write(framing.frame(framing.PONG, payload))
        elif opcode == framing.CLOSE:
            if not self._closing:
                self.close(framing.close_code(payload))
            self.transport.close()

    def _flush(self) -> None:
        if self._out and not self._closing and not self.transport.is_closing():
            self.transport.write(b"".join(self._out))
        self._out.clear()

    def pause_writing(self) -> None:
        """The peer does not read as fast as it asks."""
        super().pause_writing()
        self._stall = self.loop.call_later(self._stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The peer has read."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
        if self._conversation is not None:
            self.pump()

    def _beat(self) -> None:
        """Ping; cut off a peer that was not heard of since the last one (but not where we do not listen)."""
        if self._closing:
            return
        if not self._heard and not self._stopped:
            self.close(CloseCode.INTERNAL_ERROR, "nothing was heard, not even a pong")
            return
        self._heard = False
        self.transport.write(framing.frame(framing.PING, b""))
        self._beats = self.loop.call_later(cast(float, self.ping_interval), self._beat)

    def shutdown(self) -> None:
        """uvicorn stops: drain."""
        if self._conversation is None:
            super().shutdown()
        else:
            self._conversation.drain()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, whoever ended it."""
        for timer in filter(None, (self._stall, self._beats, self._end)):
            timer.cancel()
        self._drop()
        super().connection_lost(exc)

    async def send(self, message: Any) -> None:
        """ASGI's send, used for the handshake alone."""
        await super().send(message)
        if self.close_sent:  # the door refused with a response: that completes the handshake, too
            self.handshake_complete = True

    def handle_connect(self, event: Any) -> None:
        """Let the door find this connection."""
        super().handle_connect(event)
        scope = getattr(self, "scope", None)
        if scope is not None:
            cast(dict[str, Any], scope["extensions"])[EXTENSION] = self
