"""A gRPC stream for the load generator: just enough of HTTP/2 for the server to be measured, and no client library."""

import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from .load import LoadFailed

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK: Final = 0x1
_END_HEADERS: Final = 0x4
_PADDED: Final = 0x8
_STREAM: Final = 1
_WIDE: Final = 2**31 - 1
_RECV: Final = 1 << 18
_INITIAL_WINDOW: Final = 0x4  # a setting's number
_FIRST_WINDOW: Final = 65_535  # what HTTP/2 grants before anything is said


class GrpcLine:
    """One stream of a gRPC method, with one lane or more.

    Args:
        port: Of 127.0.0.1.
        method: `/package.Service/Method`.
        lanes: Whose requests it sends.
        lane_of: The lane of an answer; None: answers come in the order of the requests.
    """

    def __init__(
        self, port: int, method: str, lanes: Sequence[int], lane_of: Callable[[bytes], int] | None = None
    ) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=20.0)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.lanes = lanes
        self._lane_of = lane_of
        self._turns: deque[int] = deque()
        self._frames, self._messages = b"", b""  # what came of frames, and of messages, that are not whole yet
        self._window = self._stream_window = self._granted = _FIRST_WINDOW
        self._held = b""  # what the server has no window for yet
        self._taken = 0
        head = b"\x83\x86" + b"".join(
            (_field(4, method.encode()), _field(1, b"127.0.0.1"), _field(31, b"application/grpc"))
        )
        head += b"\x00" + _text(b"te") + _text(b"trailers")
        wide = _INITIAL_WINDOW.to_bytes(2, "big") + _WIDE.to_bytes(4, "big")
        opening = (
            PREFACE + frame(SETTINGS, 0, 0, wide) + frame(WINDOW_UPDATE, 0, 0, (_WIDE - 65_535).to_bytes(4, "big"))
        )
        self.sock.sendall(opening + frame(HEADERS, _END_HEADERS, _STREAM, head))

    def send(self, requests: list[tuple[int, bytes]]) -> None:
        """Send the requests of lanes, as far as the server's windows allow; the rest when they open."""
        parts = []
        for lane, payload in requests:
            self._turns.append(lane)
            parts.append(b"\0" + len(payload).to_bytes(4, "big") + payload)
        self._held += b"".join(parts)
        self._push()

    def receive(self) -> list[tuple[int, bytes]]:
        """The answers that have come, with their lanes."""
        data = self.sock.recv(_RECV)
        if not data:
            raise LoadFailed("the server closed the connection")
        data = self._frames + data
        at = 0
        while len(data) - at >= 9:
            size = int.from_bytes(data[at : at + 3], "big")
            end = at + 9 + size
            if end > len(data):
                break
            self._frame(data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big"), data[at + 9 : end])
            at = end
        self._frames = data[at:]
        return self._whole()

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA:
            self._messages += payload[1 : len(payload) - payload[0]] if flags & _PADDED else payload
            self._taken += len(payload)
            if self._taken > _WIDE // 2:
                more = self._taken.to_bytes(4, "big")
                self.sock.sendall(frame(WINDOW_UPDATE, 0, 0, more) + frame(WINDOW_UPDATE, 0, _STREAM, more))
                self._taken = 0
        elif kind == WINDOW_UPDATE:
            more_bytes = int.from_bytes(payload, "big")
            if stream:
                self._stream_window += more_bytes
            else:
                self._window += more_bytes
            self._push()
        elif kind == SETTINGS and not flags & _ACK:
            for at in range(0, len(payload), 6):
                if int.from_bytes(payload[at : at + 2], "big") == _INITIAL_WINDOW:
                    granted = int.from_bytes(payload[at + 2 : at + 6], "big")
                    self._stream_window += granted - self._granted
                    self._granted = granted
            self.sock.sendall(frame(SETTINGS, _ACK, 0, b""))
            self._push()
        elif kind == PING and not flags & _ACK:
            self.sock.sendall(frame(PING, _ACK, 0, payload))
        elif kind in (RST_STREAM, GOAWAY) or (kind == HEADERS and flags & 0x1):
            raise LoadFailed(f"the server ended the stream: frame {kind}, {payload[:200]!r}")

    def _push(self) -> None:
        room = min(self._window, self._stream_window, len(self._held))
        if room <= 0:
            return
        now, self._held = self._held[:room], self._held[room:]
        self._window -= room
        self._stream_window -= room
        pieces = [now[at : at + 16_384] for at in range(0, room, 16_384)]
        self.sock.sendall(b"".join(frame(DATA, 0, _STREAM, piece) for piece in pieces))

    def _whole(self) -> list[tuple[int, bytes]]:
        """The messages that are whole."""
        data, at, found = self._messages, 0, []
        while len(data) - at >= 5:
            end = at + 5 + int.from_bytes(data[at + 1 : at + 5], "big")
            if end > len(data):
                break
            payload = data[at + 5 : end]
            lane = self._turns.popleft()
            found.append((lane if self._lane_of is None else self._lane_of(payload), payload))
            at = end
        self._messages = data[at:]
        return found


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _text(text: bytes) -> bytes:
    """A string of HPACK, shorter than 127 bytes, without Huffman's code."""
    return bytes((len(text),)) + text


def _field(number: int, value: bytes) -> bytes:
    """A header whose name is in HPACK's table; it is not to be remembered."""
    name = bytes((number,)) if number < 15 else bytes((15, number - 15))
    return name + _text(value)
