"""RFC 6455 frames without extensions, the server's side: bytes in, messages out. Pure; knows no socket, no session."""

from functools import lru_cache
from typing import Final

from websockets.frames import CloseCode

try:
    from websockets.speedups import apply_mask
except ImportError:  # no C compiler where websockets was built
    from websockets.utils import apply_mask

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_SINGLE: Final = {0x80 | TEXT: TEXT, 0x80 | BINARY: BINARY}
_MOST_FRAGMENTS: Final = 4096
"""An empty fragment costs the peer nothing and us a list's place."""

Message = tuple[int, bytes]
"""Opcode TEXT, BINARY, CLOSE, PING or PONG, and the payload of the whole message."""


class BadFrame(Exception):
    """The peer broke the protocol; the arguments are the code and the reason to close the connection with."""


class Framer:
    """Cuts a client's bytes into messages of at most `max_size` bytes; a header that says more is refused."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._data, self._at = b"", 0  # what came, and where the next frame starts in it
        self._later: list[bytes] = []  # what came then of a large frame,
        self._missing = 0  # and how much of it did not
        self._fragments: list[bytes] = []  # of a message,
        self._kind, self._size = CONTINUATION, 0  # its opcode, and how large it is already

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
        """The next whole message; None: more bytes are needed. BadFrame where they break the protocol."""
        usual = self.burst(1)
        return usual[0] if usual else self._any()

    def burst(self, most: int) -> list[Message]:
        """The next messages, up to the first that is not one whole frame of less than 64 KiB, as nearly all are."""
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
        """The next whole message, in frames of any kind."""
        data = self._data
        while not self._missing and (head := self._head()):
            first, start, end = head
            if end > len(data):
                self._missing = end - len(data)
                break
            payload = apply_mask(data[start:end], data[start - 4 : start])
            self._at = end
            opcode = first & 0x0F
            if opcode > BINARY:
                return opcode, payload
            self._kind = self._kind or opcode
            self._fragments.append(payload)
            self._size += len(payload)
            if first & 0x80:
                kind, whole = self._kind, b"".join(self._fragments)
                self._kind, self._size = CONTINUATION, 0
                self._fragments.clear()
                if kind == TEXT:
                    _check_utf8(whole)
                return kind, whole
        return None

    def _head(self) -> tuple[int, int, int] | None:
        """The next frame's first byte, where its payload starts and ends; None: more bytes are needed."""
        data, at = self._data, self._at
        have = len(data) - at
        if have < 2:
            return None
        first, size = data[at], data[at + 1] & 0x7F
        opcode, width = first & 0x0F, {126: 2, 127: 8}.get(size, 0)
        if first & 0x70:
            raise BadFrame(CloseCode.PROTOCOL_ERROR, "reserved bits are set, no extension was agreed")
        if not data[at + 1] & 0x80:
            raise BadFrame(CloseCode.PROTOCOL_ERROR, "a client's frame is not masked")
        start = at + 6 + width
        if start > len(data):
            return None
        if width:
            size = int.from_bytes(data[at + 2 : at + 2 + width], "big")
        if opcode in (CLOSE, PING, PONG):
            if size > 125 or not first & 0x80:
                raise BadFrame(CloseCode.PROTOCOL_ERROR, "a control frame is fragmented or longer than 125 bytes")
        elif opcode > BINARY:
            raise BadFrame(CloseCode.PROTOCOL_ERROR, f"unknown opcode {opcode}")
        elif (opcode == CONTINUATION) != (self._kind != CONTINUATION):
            raise BadFrame(CloseCode.PROTOCOL_ERROR, "a continuation without a start, or a start within a message")
        elif self._size + size > self._max_size or len(self._fragments) >= _MOST_FRAGMENTS:
            reason = f"a message of {self._size + size} bytes or more (limit {self._max_size})"
            raise BadFrame(CloseCode.MESSAGE_TOO_BIG, reason)
        return first, start, start + size


def _check_utf8(payload: bytes) -> None:
    try:
        payload.decode()
    except UnicodeDecodeError as error:
        raise BadFrame(CloseCode.INVALID_DATA, "a text message is not UTF-8") from error


def frame(opcode: int, payload: bytes) -> bytes:
    """A server's frame: final, not masked."""
    return head(opcode, len(payload)) + payload


@lru_cache(4096)
def head(opcode: int, size: int) -> bytes:
    """What stands before the payload of a server's frame."""
    if size < 126:
        return bytes((0x80 | opcode, size))
    if size < 65536:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big")
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big")


def close_payload(code: int, reason: str = "") -> bytes:
    """The payload of a close frame; the reason is cut to what a control frame holds."""
    return code.to_bytes(2, "big") + reason.encode()[:123].decode(errors="ignore").encode()


def close_code(payload: bytes) -> int:
    """The code to answer a close frame with: the peer's own; BadFrame where it has a bad one or no proper reason."""
    if not payload:
        return CloseCode.NORMAL_CLOSURE
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not (3000 <= code < 5000 or (1000 <= code < 1015 and code not in (1004, 1005, 1006))):
        raise BadFrame(CloseCode.PROTOCOL_ERROR, "a close frame without a valid code")
    _check_utf8(payload[2:])
    return code
