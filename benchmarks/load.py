"""The load generator: raw sockets and epoll, requests built beforehand, answers kept and looked at afterwards.

Closed loop: each lane sends its next request when its answer has come. Open loop: requests leave by a schedule, and
latency counts from the scheduled time: a slow answer does not hide the requests that should have left meanwhile.
"""

import contextlib
import gc
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

Encode = Callable[[int, int], bytes]
Answers = list[tuple[int, int, bytes]]
_RECV: Final = 1 << 18
_PATIENCE_S: Final = 20.0


class LoadFailed(Exception):
    """The server answered something else than an answer, or nothing."""


class Traffic:
    """Who asks what: sessions dealt out to lanes, each lane going round its sessions.

    Args:
        encode: (session, k) -> the request for that session's k-th step, counted from 0.
        shuffled: Each lane visits its sessions in random order.
    """

    def __init__(self, encode: Encode, sessions: int, lanes: int, shuffled: bool = False) -> None:
        self._encode = encode
        rounds = [list(range(lane, sessions, lanes)) for lane in range(lanes)]
        if shuffled:
            random = np.random.default_rng(5)
            rounds = [random.permutation(each).tolist() for each in rounds]
        self._rounds = [deque(each) for each in rounds]
        self.lanes, self.sessions = lanes, sessions
        self.taken = [0] * sessions
        self.tags: list[tuple[int, int]] = [(0, 0)] * lanes

    def next(self, lane: int) -> bytes:
        """The lane's next request."""
        turn = self._rounds[lane]
        session = turn[0]
        turn.rotate(-1)
        k = self.taken[session]
        self.taken[session] = k + 1
        self.tags[lane] = (session, k)
        return self._encode(session, k)


class Line(Protocol):
    """A connection with one lane or more."""

    sock: socket.socket
    lanes: Sequence[int]

    def send(self, requests: list[tuple[int, bytes]]) -> None:
        """Send the requests of lanes."""

    def receive(self) -> list[tuple[int, bytes]]:
        """The answers that have come, with their lanes."""


@dataclass
class Sample:
    """What one load has shown."""

    seconds: float
    answered: int
    latencies_s: npt.NDArray[np.float64]
    answers: Answers = field(repr=False, default_factory=list)
    generator_busy: float = 0.0
    """Share of the time that the generator's processor worked: near 1, it is the generator that was measured."""

    @property
    def rate(self) -> float:
        """Answers per second."""
        return self.answered / self.seconds

    def percentile_s(self, q: float) -> float:
        """A percentile of the latencies."""
        return float(np.percentile(self.latencies_s, q)) if len(self.latencies_s) else float("nan")


class HttpLine:
    """A keep-alive connection with one lane."""

    def __init__(self, port: int, lane: int) -> None:
        self.sock = _connect(port)
        self.lanes: Sequence[int] = (lane,)
        self._rest = b""
        self._lengths: dict[bytes, int] = {}

    def send(self, requests: list[tuple[int, bytes]]) -> None:
        for _, request in requests:
            self.sock.sendall(request)

    def receive(self) -> list[tuple[int, bytes]]:
        data = self.sock.recv(_RECV)
        if not data:
            raise LoadFailed("the server closed the connection")
        if self._rest:
            data = self._rest + data
        end = data.find(b"\r\n\r\n")
        if end >= 0:
            head = data[:end]
            length = self._lengths.get(head)
            if length is None:
                length = self._lengths[head] = _content_length(head, data)
            if len(data) == end + 4 + length:
                self._rest = b""
                return [(self.lanes[0], data[end + 4 :])]
        self._rest = data
        return []


class _Id(msgspec.Struct):
    id: int


class SocketLine:
    """A WebSocket with one lane or more; a frame's id is its lane.

    Client frames are masked with the key 0, which costs the server what any key costs.
    """

    def __init__(self, port: int, path: str, lanes: Sequence[int], binary: bool, tagged: bool = True) -> None:
        self.sock = _connect(port)
        self.lanes = lanes
        self._opcode = 0x82 if binary else 0x81
        self._id = (msgspec.msgpack.Decoder(_Id) if binary else msgspec.json.Decoder(_Id)) if tagged else None
        self._turns: deque[int] = deque()
        self._rest = self._shake_hands(port, path)

    def _shake_hands(self, port: int, path: str) -> bytes:
        self.sock.sendall(
            f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        data = b""
        while b"\r\n\r\n" not in data:
            part = self.sock.recv(_RECV)
            data += part
            if not part or (len(data) > 12 and not data.startswith(b"HTTP/1.1 101")):
                raise LoadFailed(f"no WebSocket at {path}: {data[:100]!r}")
        return data.partition(b"\r\n\r\n")[2]

    def send(self, requests: list[tuple[int, bytes]]) -> None:
        parts = []
        for lane, payload in requests:
            self._turns.append(lane)
            size = len(payload)
            if size < 126:
                parts.append(bytes((self._opcode, 0x80 | size, 0, 0, 0, 0)))
            elif size < 65536:
                parts.append(bytes((self._opcode, 0xFE, size >> 8, size & 255, 0, 0, 0, 0)))
            else:
                parts.append(bytes((self._opcode, 0xFF)) + size.to_bytes(8, "big") + bytes(4))
            parts.append(payload)
        self.sock.sendall(b"".join(parts))

    def receive(self) -> list[tuple[int, bytes]]:
        data = self.sock.recv(_RECV)
        if not data:
            raise LoadFailed("the server closed the WebSocket")
        if self._rest:
            data = self._rest + data
        at, found = 0, []
        while len(data) - at >= 2:
            opcode, size, start = data[at] & 15, data[at + 1], at + 2
            if size == 126:
                size, start = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
            elif size == 127:
                size, start = int.from_bytes(data[at + 2 : at + 10], "big"), at + 10
            if len(data) < start + size or start > len(data):
                break
            at = start + size
            if opcode in (1, 2):
                found.append(self._lane_of(data[start:at]))
            elif opcode == 8:
                raise LoadFailed(f"the server closed the WebSocket: {data[start:at]!r}")
        self._rest = data[at:]
        return found

    def _lane_of(self, payload: bytes) -> tuple[int, bytes]:
        if self._id is None:
            return self._turns.popleft(), payload
        try:
            return self._id.decode(payload).id, payload
        except msgspec.MsgspecError as error:
            raise LoadFailed(f"a frame without an id: {payload[:300]!r}") from error


def closed_loop(lines: Sequence[Line], traffic: Traffic, seconds: float, warm_s: float = 0.2) -> Sample:
    """Load for `warm_s` + `seconds`; answers of the first `warm_s` are kept, not counted."""
    with _no_collection(), _Poll(lines) as poll:
        clock, tags = time.perf_counter, traffic.tags
        sent: list[float] = [0.0] * traffic.lanes
        answers: Answers = []
        latencies: list[float] = []
        begin = clock()
        start, stop = begin + warm_s, begin + warm_s + seconds
        cpu = time.process_time()
        pending = 0
        for line in lines:
            for lane in line.lanes:
                sent[lane] = clock()
            line.send([(lane, traffic.next(lane)) for lane in line.lanes])
            pending += len(line.lanes)
        while pending:
            for line in poll.ready(_PATIENCE_S):
                found = line.receive()
                now = clock()
                follow = []
                for lane, body in found:
                    answers.append((*tags[lane], body))
                    if start < now < stop:
                        latencies.append(now - sent[lane])
                    if now < stop:
                        sent[lane] = now
                        follow.append((lane, traffic.next(lane)))
                    else:
                        pending -= 1
                if follow:
                    line.send(follow)
        busy = (time.process_time() - cpu) / (clock() - begin)
    return Sample(seconds, len(latencies), np.array(latencies), answers, busy)


def each_once(lines: Sequence[Line], traffic: Traffic) -> Sample:
    """Closed loops until every session has been asked."""
    samples: list[Sample] = []
    while not samples or not all(traffic.taken):
        samples.append(closed_loop(lines, traffic, max(0.2, traffic.sessions / 40_000), 0.0))
    return Sample(
        sum(s.seconds for s in samples),
        sum(s.answered for s in samples),
        np.concatenate([s.latencies_s for s in samples]),
        [answer for s in samples for answer in s.answers],
    )


def open_loop(
    lines: Sequence[Line], traffic: Traffic, rate: float, seconds: float, *, poisson: bool = True, warm_s: float = 0.3
) -> Sample:
    """Requests leave at a rate whatever the answers do; latency counts from the scheduled time.

    A request takes any free lane; where none is free it waits, and its latency grows.
    """
    lane_line = {lane: line for line in lines for lane in line.lanes}
    random = np.random.default_rng(3)
    count = int(rate * (seconds + warm_s))
    gaps = random.exponential(1 / rate, count) if poisson else np.full(count, 1 / rate)
    with _no_collection(), _Poll(lines) as poll:
        clock, tags = time.perf_counter, traffic.tags
        begin, cpu = clock() + 0.01, time.process_time()
        due = deque((begin + np.cumsum(gaps)).tolist())
        free, waiting = deque(lane_line), deque[float]()
        scheduled: list[float] = [0.0] * traffic.lanes
        answers: Answers = []
        latencies: list[float] = []
        pending = 0
        while due or waiting or pending:
            now = clock()
            while due and due[0] <= now:
                waiting.append(due.popleft())
            while waiting and free:
                lane = free.popleft()
                scheduled[lane] = waiting.popleft()
                lane_line[lane].send([(lane, traffic.next(lane))])
                pending += 1
            for line in poll.ready(min(_PATIENCE_S, due[0] - clock()) if due else _PATIENCE_S, bool(due)):
                for lane, body in line.receive():
                    answers.append((*tags[lane], body))
                    if scheduled[lane] > begin + warm_s:
                        latencies.append(clock() - scheduled[lane])
                    free.append(lane)
                    pending -= 1
        busy = (time.process_time() - cpu) / (clock() - begin)
    return Sample(seconds, len(latencies), np.array(latencies), answers, busy)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's cycle collector, which would stop the generator for 15 ms to go through the answers so far."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Poll:
    """epoll over lines; waits with a microsecond's resolution where asked to."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = {line.sock.fileno(): line for line in lines}

    def __enter__(self) -> "_Poll":
        self._epoll = select.epoll()
        for number in self._lines:
            self._epoll.register(number, select.EPOLLIN)
        return self

    def __exit__(self, *_: object) -> None:
        self._epoll.close()

    def ready(self, timeout_s: float, short: bool = False) -> list[Line]:
        """Lines with something to read; at least one unless `short`."""
        if short:
            select.select([self._epoll], [], [], max(0.0, timeout_s))  # epoll itself counts in milliseconds
            timeout_s = 0.0
        found = self._epoll.poll(timeout_s)
        if not found and not short:
            raise LoadFailed(f"no answer within {timeout_s:g} s")
        return [self._lines[number] for number, _ in found]


def close(lines: Sequence[Any]) -> None:
    """Close the connections."""
    for line in lines:
        line.sock.close()


def _connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _content_length(head: bytes, data: bytes) -> int:
    if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201")):
        raise LoadFailed(f"refused: {data[:600]!r}")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    raise LoadFailed(f"no content-length: {head!r}")
