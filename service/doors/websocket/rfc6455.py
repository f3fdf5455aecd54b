"""RFC 6455 frames, the server's side: bytes in, messages out. Pure; knows no socket and no session.

The handshake is uvicorn's and websockets'; this is what comes after it, without extensions. A message costs
about a quarter here of what a general implementation takes (docs/design.md has the numbers); at tens of thousands of
frames a second that decides whether a socket is cheaper than the model.
"""

from functools import cache
from typing import Final

try:
    from websockets.speedups import apply_mask
except ImportError:  # no C compiler where websockets was built
    from websockets.utils import apply_mask

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

NORMAL: Final = 1000
PROTOCOL_ERROR: Final = 1002
NO_STATUS: Final = 1005
INVALID_DATA: Final = 1007
TOO_BIG: Final = 1009

_SINGLE: Final = {0x80 | TEXT: TEXT, 0x80 | BINARY: BINARY}
_MOST_FRAGMENTS: Final = 4096
"""An empty fragment costs the peer nothing and us a list's place."""

Message = tuple[int, bytes]
"""Opcode TEXT, BINARY, CLOSE, PING or PONG, and the payload of the whole message."""


class BadFrame(Exception):
    """The peer broke the protocol; the connection is to be closed with `code`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Framer:
    """Cuts a client's bytes into messages.

    Args:
        max_size: Largest message, bytes; a larger one is refused when its header is seen.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._data = b""
        self._at = 0
        self._later: list[bytes] = []
        self._missing = 0
        self._fragments: list[bytes] = []
        self._size = 0
        self._kind = CONTINUATION

    @property
    def buffered(self) -> int:
        """Bytes that were fed and are not yet part of a message."""
        size = len(self._data) - self._at
        return size + sum(map(len, self._later)) if self._later else size

    def feed(self, data: bytes) -> None:
        """Take bytes from the socket."""
        if self._missing > len(data):  # a large frame comes in pieces: join once, when it is whole
            self._later.append(data)
            self._missing -= len(data)
            return
        if self._at == len(self._data) and not self._later:
            self._data = data
        else:
            self._data = b"".join((self._data[self._at :], *self._later, data))
            self._later.clear()
        self._at, self._missing = 0, 0

    def next(self) -> Message | None:
        """The next whole message; None: more bytes are needed.

        Raises:
            BadFrame: the connection is to be closed.
        """
        usual = self.burst(1)
        return usual[0] if usual else self._any()

    def burst(self, most: int) -> list[Message]:
        """The next messages, up to the first that is not one whole frame of less than 64 KiB, as nearly all are.

        Raises:
            BadFrame: the connection is to be closed.
        """
        found: list[Message] = []
        data, at, have, largest = self._data, self._at, len(self._data), self._max_size
        if self._kind:
            return found
        while len(found) < most and have - at >= 8 and (kind := _SINGLE.get(data[at])):
            size, start = data[at + 1] - 0x80, at + 6
            if size == 126:
                size, start = data[at + 2] << 8 | data[at + 3], at + 8
            end = start + size
            if not 0 <= size <= largest or size == 127 or end > have:
                break
            payload = apply_mask(data[start:end], data[start - 4 : start])
            if kind == TEXT and not payload.isascii():
                if found:
                    break  # it may be bad: those before it first
                _check_utf8(payload)
            self._at = at = end
            found.append((kind, payload))
        return found

    def _any(self) -> Message | None:
        while not self._missing:
            head = self._head()
            if head is None:
                return None
            first, start, size = head
            self._check(first, size)
            end = start + size
            if end > len(self._data):
                self._missing = end - len(self._data)
                return None
            payload = apply_mask(self._data[start:end], self._data[start - 4 : start])
            self._at = end
            message = self._message(first, payload)
            if message is not None:
                return message
        return None

    def _head(self) -> tuple[int, int, int] | None:
        """First byte, where the payload starts, its size; None: more bytes are needed."""
        data, at = self._data, self._at
        have = len(data) - at
        if have < 2:
            return None
        first, second = data[at], data[at + 1]
        if first & 0x70:
            raise BadFrame(PROTOCOL_ERROR, "reserved bits are set, no extension was agreed")
        if not second & 0x80:
            raise BadFrame(PROTOCOL_ERROR, "a client's frame is not masked")
        size = second & 0x7F
        width = {126: 2, 127: 8}.get(size, 0)
        if have < 6 + width:
            return None
        if width:
            size = int.from_bytes(data[at + 2 : at + 2 + width], "big")
        return first, at + 6 + width, size

    def _check(self, first: int, size: int) -> None:
        opcode, final = first & 0x0F, first & 0x80
        if opcode > BINARY:
            if opcode not in (CLOSE, PING, PONG):
                raise BadFrame(PROTOCOL_ERROR, f"unknown opcode {opcode}")
            if size > 125 or not final:
                raise BadFrame(PROTOCOL_ERROR, "a control frame is fragmented or longer than 125 bytes")
            return
        if (opcode == CONTINUATION) != (self._kind != CONTINUATION):
            raise BadFrame(PROTOCOL_ERROR, "a continuation without a start, or a start within a message")
        if self._size + size > self._max_size or len(self._fragments) >= _MOST_FRAGMENTS:
            raise BadFrame(TOO_BIG, f"a message of {self._size + size} bytes or more (limit {self._max_size})")

    def _message(self, first: int, payload: bytes) -> Message | None:
        opcode, final = first & 0x0F, first & 0x80
        if opcode > BINARY:
            return opcode, payload
        self._kind = self._kind or opcode
        self._fragments.append(payload)
        self._size += len(payload)
        if not final:
            return None
        kind, whole = self._kind, b"".join(self._fragments)
        self._kind, self._size = CONTINUATION, 0
        self._fragments.clear()
        if kind == TEXT and not whole.isascii():
            _check_utf8(whole)
        return kind, whole


def _check_utf8(payload: bytes) -> None:
    try:
        payload.decode()
    except UnicodeDecodeError as error:
        raise BadFrame(INVALID_DATA, "a text message is not UTF-8") from error


def frame(opcode: int, payload: bytes) -> bytes:
    """A server's frame: final, not masked."""
    return head(opcode, len(payload)) + payload


@cache
def _short_head(opcode: int, size: int) -> bytes:
    return bytes((0x80 | opcode, size)) if size < 126 else bytes((0x80 | opcode, 126, size >> 8, size & 0xFF))


def head(opcode: int, size: int) -> bytes:
    """What stands before the payload of a server's frame."""
    if size < 1024:
        return _short_head(opcode, size)
    if size < 65536:
        return bytes((0x80 | opcode, 126, size >> 8, size & 0xFF))
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big")


def close_payload(code: int, reason: str = "") -> bytes:
    """The payload of a close frame; the reason is cut to what a control frame holds."""
    return code.to_bytes(2, "big") + reason.encode()[:123].decode(errors="ignore").encode()


def close_code(payload: bytes) -> int:
    """The code to answer a close frame with: the peer's own, if it is a good one.

    Raises:
        BadFrame: the payload is not that of a close frame.
    """
    if not payload:
        return NORMAL
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not (3000 <= code < 5000 or (1000 <= code < 1015 and code not in (1004, 1005, 1006))):
        raise BadFrame(PROTOCOL_ERROR, "a close frame without a valid code")
    _check_utf8(payload[2:])
    return code
