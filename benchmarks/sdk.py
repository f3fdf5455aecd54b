"""What a step through the SDK costs beside bare clients that post the same bytes, made before, in the same rounds.

    python -m benchmarks.sdk [--rounds 40] [--steps 100]

Synchronous: `http.client` of the standard library, httpx, and a bare socket that reads no more of an answer than its
status. On asyncio: httpx, and bare streams in the same manner. One connection each, server and client each on a core
of its own. The figures are medians over rounds; ratios are taken round by round.
"""

import argparse
import asyncio
import http.client
import itertools
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import numpy as np

from stepcast import AsyncClient, Client

from .machine import ROOT, cores
from .servers import Process, free_port

MODEL, FEATURES = "lstm", 3
HEADERS = {"content-type": "application/msgpack", "accept": "application/msgpack"}
X = np.ones(FEATURES, np.float32)
ROW = dict.fromkeys("uvw", 1.0)
Times = dict[str, list[float]]


def path(session: str) -> str:
    """Where a session is stepped."""
    return f"/v1/models/{MODEL}/sessions/{session}/step"


def bodies(number: int) -> Iterator[bytes]:
    """Bodies of a session's steps, numbered as the SDK numbers them."""
    fields = {"inputs": X.tobytes(), "shape": [FEATURES]}
    return iter([msgspec.msgpack.encode({**fields, "seq": seq + 1}) for seq in range(number)])


def requests(session: str, number: int) -> Iterator[bytes]:
    """The same with their heads."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"host": "x", **HEADERS}.items())
    head = f"POST {path(session)} HTTP/1.1\r\n{lines}content-length: ".encode()
    return iter([b"%s%d\r\n\r\n%s" % (head, len(body), body) for body in bodies(number)])


def good(answer: bytes) -> None:
    """Refuse what is no 200."""
    if answer[9:12] != b"200":
        raise SystemExit(f"wrong answer: {answer!r}")


def synchronous(url: str, rounds: int, steps: int) -> Times:
    """Seconds per step and round."""
    host, port = url.removeprefix("http://").split(":")
    number = rounds * steps
    bare, sent = socket.create_connection((host, int(port))), requests("bare", number)
    bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    standard, standard_bodies = http.client.HTTPConnection(host, int(port)), bodies(number)

    def by_socket() -> None:
        bare.sendall(next(sent))
        good(bare.recv(65536))

    def by_http_client() -> None:
        standard.request("POST", path("standard"), next(standard_bodies), HEADERS)
        response = standard.getresponse()
        good(b"HTTP/1.1 %d" % response.status)
        response.read()

    with Client(url) as client, httpx.Client(base_url=url, headers=HEADERS) as other:
        session, named, other_bodies = client.session(MODEL, "sdk"), client.session(MODEL, "named"), bodies(number)
        ways: dict[str, Callable[[], object]] = {
            "bare socket": by_socket,
            "http.client": by_http_client,
            "httpx": lambda: other.post(path("httpx"), content=next(other_bodies)).raise_for_status(),
            "Client": lambda: session.step(X),
            "Client, named": lambda: named.step(ROW),
        }
        times: Times = {name: [] for name in ways}
        for _, (name, way) in itertools.product(range(rounds), ways.items()):
            started = time.perf_counter()
            for _ in range(steps):
                way()
            times[name].append((time.perf_counter() - started) / steps)
    bare.close()
    standard.close()
    return times


async def on_asyncio(url: str, rounds: int, steps: int) -> Times:
    """The same."""
    host, port = url.removeprefix("http://").split(":")
    number = rounds * steps
    reader, writer = await asyncio.open_connection(host, int(port))
    sent = requests("bare-async", number)

    async def by_streams() -> None:
        writer.write(next(sent))
        good(await reader.read(65536))

    async with AsyncClient(url) as client, httpx.AsyncClient(base_url=url, headers=HEADERS) as other:
        session, named = client.session(MODEL, "async"), client.session(MODEL, "async-named")
        other_bodies = bodies(number)
        ways: dict[str, Callable[[], Awaitable[object]]] = {
            "bare streams": by_streams,
            "httpx, async": lambda: other.post(path("httpx-async"), content=next(other_bodies)),
            "AsyncClient": lambda: session.step(X),
            "AsyncClient, named": lambda: named.step(ROW),
        }
        times: Times = {name: [] for name in ways}
        for _, (name, way) in itertools.product(range(rounds), ways.items()):
            started = time.perf_counter()
            for _ in range(steps):
                await way()
            times[name].append((time.perf_counter() - started) / steps)
    writer.close()
    return times


def table(times: Times, beside: list[str]) -> str:
    """Microseconds per step, and the ratios to some of the ways."""
    lines = [f"{'':20}{'µs':>8}" + "".join(f"{'/ ' + name:>16}" for name in beside)]
    for name, taken in times.items():
        ratios = [statistics.median(a / b for a, b in zip(taken, times[other], strict=True)) for other in beside]
        cells = "".join(f"{ratio:16.2f}" for ratio in ratios)
        lines.append(f"{name:20}{1e6 * statistics.median(taken):8.0f}{cells}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sdk", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=100, help="per way and round")
    arguments = parser.parse_args()
    server_core, own_core = cores()
    os.sched_setaffinity(0, {own_core})
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "service", "serve", "--models", str(ROOT / "tests" / "models"), "--store", "memory://"]
        program = [sys.executable, *command, "--port", str(port)]
        server = Process(program, server_core, port, Path(folder) / "log")
        try:
            server.wait_up()
            url = f"http://127.0.0.1:{port}"
            with Client(url) as client:
                client.wait_ready()
            print(table(synchronous(url, arguments.rounds, arguments.steps), ["http.client", "bare socket"]))
            print(table(asyncio.run(on_asyncio(url, arguments.rounds, arguments.steps)), ["bare streams"]))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
