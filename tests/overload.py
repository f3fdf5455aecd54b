"""Frames at a multiple of what a server can do: how long a step that is accepted takes, seen from its client.

python tests/overload.py [--load 3] [--seconds 15] [--sockets 64]

Each client writes on schedule, whatever the answers do, as a device does that has one reading after the other. A step's
time begins when it was due. What the server refuses (429, 504) is counted; a step that is never answered is a fault.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import uvloop
from serving import few_models

ROWS = json.dumps([[1, 2, 3]] * 32, separators=(",", ":")).encode()
"""The readings of a frame: thirty-two examples, so that the server is at its end long before the clients are."""
GRACE_S = 30.0
"""How long answers may come after the last frame was written."""


class Seen(NamedTuple):
    """What became of the frames: seconds of accepted steps, number of refusals by code, frames without an answer."""

    offered: float
    accepted_s: np.ndarray
    refused: dict[str, int]
    lost: int


class Peer(asyncio.Protocol):
    """A client's socket: a handshake by hand, masked frames out, answers in."""

    def __init__(self, host: str, path: str) -> None:
        self._head = f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        self._head += f"sec-websocket-version: 13\r\nsec-websocket-key: {'A' * 22}==\r\n\r\n"
        self.open = asyncio.get_running_loop().create_future()
        self.due: dict[int, float] = {}
        self.accepted: list[float] = []
        self.refused: dict[str, int] = {}
        self._data = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self._head.encode())

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self.open.done():
            head, blank, self._data = self._data.partition(b"\r\n\r\n")
            assert blank, "the handshake came in pieces"
            assert b" 101 " in head, head
            self.open.set_result(None)
        now, data, at = time.perf_counter(), self._data, 0
        while len(data) - at >= 4:
            size, start = data[at + 1], at + 2
            if size == 126:
                (size,), start = struct.unpack_from(">H", data, at + 2), at + 4
            if len(data) < start + size:
                break
            if data[at] & 15 == 9:
                self.transport.write(b"\x8a\x80\0\0\0\0")
            elif data[at] & 15 == 1:
                self._take(data[start : start + size], now)
            at = start + size
        self._data = data[at:]

    def _take(self, frame: bytes, now: float) -> None:
        answer = json.loads(frame)
        began = self.due.pop(answer["id"])
        if "error" in answer:
            code = answer["error"]["code"]
            self.refused[code] = self.refused.get(code, 0) + 1
        else:
            self.accepted.append(now - began)

    def ask(self, number: int, session: str, due: float) -> None:
        """Write a step."""
        body = b'{"id":%d,"session":"%s","inputs":%s}' % (number, session.encode(), ROWS)
        self.due[number] = due
        self.transport.write(b"\x81\xfe%s\0\0\0\0%s" % (len(body).to_bytes(2), body))


async def load(url: str, sockets: int, rate: float, seconds: float, sessions: int = 16) -> Seen:
    """So many steps a second, spread over so many sockets, each with sessions of its own."""
    loop, (host, _, port) = asyncio.get_running_loop(), url.removeprefix("http://").partition(":")
    made = [
        await loop.create_connection(lambda: Peer(f"{host}:{port}", "/v1/models/lstm/stream"), host, int(port))
        for _ in range(sockets)
    ]
    peers = [peer for _, peer in made]
    await asyncio.gather(*(peer.open for peer in peers))
    began, sent, total = time.perf_counter(), 0, int(rate * seconds)
    while sent < total:
        until = min(total, int((time.perf_counter() - began) * rate))
        for number in range(sent, until):
            which, turn = number % sockets, number // sockets
            peers[which].ask(number, f"o{which}-{turn % sessions}", began + number / rate)
        sent = until
        await asyncio.sleep(0.002)
    offered = sent / (time.perf_counter() - began)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE_S):
            while any(peer.due for peer in peers):  # noqa: ASYNC110 - an event would cost the client time per answer
                await asyncio.sleep(0.02)
    refused: dict[str, int] = {}
    for peer in peers:
        peer.transport.abort()
        for code, count in peer.refused.items():
            refused[code] = refused.get(code, 0) + count
    accepted = np.concatenate([np.array(peer.accepted) for peer in peers])
    return Seen(offered, accepted, refused, sum(len(peer.due) for peer in peers))


@contextlib.contextmanager
def served(**settings: str) -> Iterator[str]:
    """A server process in memory; its URL."""
    environ = {**os.environ, **{f"STEPCAST_{name.upper()}": value for name, value in settings.items()}}
    environ["STEPCAST_LOG_LEVEL"] = "error"
    command = [sys.executable, "-m", "service", "serve", "--models", str(few_models()), "--store", "memory://"]
    with subprocess.Popen([*command, "--port", "0"], env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield line[line.index("http://") :].strip()
        process.send_signal(signal.SIGTERM)


def measure(url: str, times: float, sockets: int, seconds: float) -> tuple[float, Seen]:
    """What the server can do, found by doubling, and what becomes of a multiple of it."""
    rate = 500.0
    while True:
        seen = uvloop.run(load(url, sockets, rate, 1.5))
        late = float(np.percentile(seen.accepted_s, 99)) if len(seen.accepted_s) else 99.0
        if late > 0.5 or seen.refused:
            break
        rate *= 1.5
    return rate / 1.5, uvloop.run(load(url, sockets, rate / 1.5 * times, seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=float, default=3.0, help="the multiple of what the server can do")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--sockets", type=int, default=64)
    parser.add_argument("--rate", type=float, help="what the server can do, in steps per second, where it is known")
    parser.add_argument("--url", help="a server that runs; without: one in memory")
    asked = parser.parse_args()
    with served() if asked.url is None else contextlib.nullcontext(asked.url) as url:
        if asked.rate:
            can, seen = asked.rate, uvloop.run(load(url, asked.sockets, asked.rate * asked.load, asked.seconds))
        else:
            can, seen = measure(url, asked.load, asked.sockets, asked.seconds)
    taken = seen.accepted_s
    p50, p99, most = np.percentile(taken, [50, 99, 100]) if len(taken) else [np.nan] * 3
    print(f"it can {can:.0f} steps/s; offered {seen.offered:.0f}/s for {asked.seconds:g} s on {asked.sockets} sockets")
    print(f"accepted {len(taken)}: p50 {p50:.3f} s, p99 {p99:.3f} s, most {most:.3f} s")
    print(f"refused {seen.refused}, without an answer {seen.lost}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
