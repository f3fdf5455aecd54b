"""The connection under a WebSocket: uvicorn's handshake, then messages straight between the transport and the door.

It hands whole bursts to the door, writes together what is ready in one tick, and has the door drain before it closes.
"""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode

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


class WebSocketConnection(WebSocketsSansIOProtocol):
    """A WebSocket connection; the class for uvicorn's `ws` setting."""

    def __init__(self, config: Config, *rest: Any, **more: Any) -> None:
        super().__init__(config, *rest, **more)
        self.conn.available_extensions = None  # compressing small frames of floats costs more than it saves
        self._conversation: Conversation | None = None
        self._framer = Framer(config.ws_max_size)
        self._held: deque[Message] = deque()
        self._held_bytes = 0
        self._out: list[bytes] = []
        self._pumping = self._deaf = self._stopped = self._closing = False
        self._heard = True
        self._stall_s = 0.0
        self._stall: asyncio.TimerHandle | None = None
        self._beats: asyncio.TimerHandle | None = None
        self._end: asyncio.TimerHandle | None = None

    def open(self, conversation: "Conversation", stall_s: float) -> None:
        """Hand the connection to the door after websocket.accept; who leaves answers unread for stall_s is cut off."""
        self._conversation, self._stall_s = conversation, stall_s
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
        self._held.clear()
        self._held_bytes = 0
        self._end = self.loop.call_later(CLOSE_S, self.transport.abort)
        self._read(True)

    def pump(self, going_on: bool = False) -> None:
        """Hand on the messages that came, as far as the door takes them, BURST at a time."""
        if self.disconnected or (self._pumping and not going_on):
            return
        self._pumping = True  # the door may call from within
        try:
            self._pumping = self._take()
        except BadFrame as bad:
            self._deaf = True
            self.close(*bad.args)
            if not self.transport.is_closing() and self.transport.can_write_eof():
                self.transport.write_eof()  # what the peer answers is not read: let it see the end at once
            return
        if self._pumping:
            self.loop.call_soon(self.pump, True)
        ahead = self._held_bytes + self._framer.buffered
        self._read(not (self._pumping or self._blocked()) or ahead < AHEAD_BYTES)

    def data_received(self, data: bytes) -> None:
        """Bytes from the peer: the handshake, then frames."""
        self._heard = True
        if self._conversation is not None:
            if not self._deaf:
                self._framer.feed(data)
                if not self._take_usual(self._conversation):
                    self.pump()
        elif self.handshake_initiated:
            self._framer.feed(data)
        else:
            super().data_received(data)
            if self.handshake_initiated and not self.transport.is_closing():
                self.transport.pause_reading()  # until the door has the connection

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
                message = self._framer.next() if self._held_bytes < AHEAD_BYTES else None
                if message is None:
                    return False
                if message[0] > framing.BINARY:
                    self._control(*message)
                elif not self._closing:
                    held.append(message)
                    self._held_bytes += len(message[1])
            if held and not self._blocked():
                opcode, payload = held.popleft()
                self._held_bytes -= len(payload)
                conversation.message(opcode, payload)
        return True

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
