"""Heads of requests and WebSocket handshakes that nobody would write, sent to a real server, in pieces.

    make fuzz-heads ARGS="--minutes 10 --seed 1"

Hypothesis mutates the corpus (tests/data/fuzz_heads: what clients send, and what once did harm). What must hold: an
answer to everything, no 500, no traceback in the log, no hang, little memory, and the steps of another client go on.
"""

import argparse
import contextlib
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from serving import ROOT, few_models

CORPUS = Path(__file__).parent / "data" / "fuzz_heads"
KEY = "key-of-a-stepper"
READ_S = 0.5
HANG_S = 10.0
GROWTH_BYTES = 200 * 2**20
P99_S = 0.25
TOGETHER = 16
"""Connections of one example: some of them wait for their time-out."""
_TOKENS = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\r\n\r\n",
        b"\n\n",
        b" ",
        b"\t",
        b"\0",
        b":",
        b": ",
        b",",
        b";",
        b"%",
        b"%00",
        b"%ff",
        b"/",
        b"//",
    ),
    *(
        b"?",
        b"#",
        b"..",
        b"\xff",
        b"\xc3\xa9",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"HTTP/2.0",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"http://[",
    ),
    *(
        b"GET ",
        b"POST ",
        b"PUT ",
        b"DELETE ",
        b"HEAD ",
        b"OPTIONS ",
        b"CONNECT ",
        b"TRACE ",
        b"QUERY ",
        b"GETT ",
        b"get ",
    ),
    *(b"content-length: 0\r\n", b"content-length: 5\r\n", b"content-length: -1\r\n", b"content-length: +5\r\n"),
    *(
        b"content-length: 99999999999999999999\r\n",
        b"content-length: 0x5\r\n",
        b"content-length: 5, 5\r\n",
        b"content-length:\r\n",
    ),
    *(
        b"transfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked, chunked\r\n",
        b"transfer-encoding: gzip\r\n",
        b"te: trailers\r\n",
    ),
    *(
        b"expect: 100-continue\r\n",
        b"expect: x\r\n",
        b"connection: close\r\n",
        b"connection: upgrade\r\n",
        b"upgrade: websocket\r\n",
    ),
    *(
        b"upgrade: h2c\r\n",
        b"sec-websocket-version: 13\r\n",
        b"sec-websocket-version: 8\r\n",
        b"sec-websocket-key: x\r\n",
    ),
    *(
        b"sec-websocket-protocol: a, b\r\n",
        b"sec-websocket-extensions: permessage-deflate\r\n",
        b"host: localhost\r\n",
        b"host: a.example\r\n",
    ),
    *(
        b"host: [::1\r\n",
        b"host:\r\n",
        b"origin: http://[\r\n",
        b"origin: null\r\n",
        b"sec-fetch-site: cross-site\r\n",
        b"cookie: a=b\r\n",
    ),
    *(
        b"content-encoding: gzip\r\n",
        b"content-type: \xff\r\n",
        b"accept: *\r\n",
        b"authorization: Bearer\r\n",
        b"authorization: \xe9\r\n",
    ),
    *(
        b"x-api-key: wrong\r\n",
        b"x-request-id: \x7f\r\n",
        b'if-match: "\r\n',
        b" folded\r\n",
        b"5\r\nhello\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\n",
    ),
)


class Seen(NamedTuple):
    """What one connection got: whether the server closed it, and all its bytes."""

    closed: bool
    data: bytes


@dataclass
class Harm:
    """What came of a run."""

    statuses: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    faults: list[str] = field(default_factory=list)
    p99_s: float = 0.0
    grown: int = 0


def corpus() -> list[bytes]:
    """The kept heads."""
    return [path.read_bytes() for path in sorted(CORPUS.iterdir())]


@st.composite
def hostile(draw: st.DrawFn) -> list[bytes]:
    """A head of the corpus, mutated, as the pieces in which it is sent."""
    data = draw(st.sampled_from(corpus()))
    for _ in range(draw(st.integers(0, 4))):
        at, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        kind = draw(st.sampled_from(("token", "token", "cut", "double", "byte", "other", "long", "lines")))
        if kind == "token":
            data = data[:at] + draw(st.sampled_from(_TOKENS)) + data[at:]
        elif kind == "cut":
            data = data[:at] + data[min(end, at + draw(st.integers(0, 30))) :]
        elif kind == "double":
            data = data[:end] + data[at:]
        elif kind == "byte":
            data = data[:at] + draw(st.binary(min_size=1, max_size=3)) + data[at + 1 :]
        elif kind == "other":
            data = data[:at] + draw(st.sampled_from(corpus()))[at:]
        elif kind == "long":
            data = data[:at] + draw(st.sampled_from((b"a", b"/", b"a: b\r\n", b"\r\n", b"%41"))) * 30_000 + data[at:]
        else:
            lines = data.split(b"\r\n")
            draw(st.randoms()).shuffle(lines)
            data = b"\r\n".join(lines)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def send(address: tuple[str, int], requests: Sequence[Sequence[bytes]]) -> list[Seen]:
    """Send each on a connection of its own, all at once; wait until each is answered and quiet, or closed."""
    socks = [socket.create_connection(address, timeout=HANG_S) for _ in requests]
    found, quiet = [bytearray() for _ in socks], [0.0] * len(socks)
    closed = [False] * len(socks)
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for number, sock in enumerate(socks):
            stack.enter_context(contextlib.closing(sock))
            selector.register(sock, selectors.EVENT_READ, number)
        for turn in range(max(map(len, requests))):
            for sock, pieces in zip(socks, requests, strict=True):
                with contextlib.suppress(OSError):  # it may have refused already
                    sock.sendall(pieces[turn] if turn < len(pieces) else b"")
        deadline = time.monotonic() + HANG_S
        while not all(
            done or (since and time.monotonic() - since > 0.1) for done, since in zip(closed, quiet, strict=True)
        ):
            if time.monotonic() > deadline:
                break
            for key, _ in selector.select(0.05):
                number = key.data
                try:
                    part = socks[number].recv(65536)
                except OSError:
                    part = b""
                if part:
                    found[number] += part
                    quiet[number] = time.monotonic()
                else:
                    closed[number] = True
                    selector.unregister(socks[number])
    return [Seen(end, bytes(data)) for end, data in zip(closed, found, strict=True)]


def judge(pieces: Sequence[bytes], seen: Seen) -> tuple[str, str | None]:
    """The status that came, and what is wrong about it."""
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", seen.data)
    if found is None:
        if seen.data:
            return "?", f"the answer is not HTTP: {seen.data[:80]!r}"
        if seen.closed and not b"".join(pieces).strip(b"\r\n"):
            return "none", None
        return "none", "it was closed without an answer" if seen.closed else "it hangs"
    every = re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", seen.data)
    return found[1].decode(), "the server has a defect" if b"500" in every else None


class Server:
    """A server process with keys, and a client that steps all the while."""

    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the server
        env = {
            **{**os.environ, "PYTHONUNBUFFERED": "1", "STEPCAST_API_KEYS": f"step:acme:{KEY}"},
            **{"STEPCAST_READ_S": str(READ_S), "STEPCAST_TRIES_LIMIT": "0"},
        }
        command = [sys.executable, "-m", "service", "serve", "--models", str(few_models()), "--store", "memory://"]
        self.process = subprocess.Popen(
            [*command, "--port", "0"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        assert self.process.stdout is not None
        host, _, port = self.process.stdout.readline().rpartition("http://")[2].strip().partition(":")
        self.address = host, int(port)
        self.took: list[float] = []
        self._stop = threading.Event()
        self._witness = threading.Thread(target=self._step, daemon=True)
        self._witness.start()

    def rss(self) -> int:
        """Resident bytes."""
        return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[0]) * 1024

    def _step(self) -> None:
        body = b'{"inputs":[1,2,3]}'
        head = f"POST /v1/models/lstm/sessions/witness/step HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\n"
        with socket.create_connection(self.address, timeout=HANG_S) as sock:
            while not self._stop.wait(0.02):
                began = time.perf_counter()
                sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                assert sock.recv(65536).startswith(b"HTTP/1.1 200")
                self.took.append(time.perf_counter() - began)

    def close(self) -> str:
        """Stop; what it logged."""
        self._stop.set()
        self._witness.join(HANG_S)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(40)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.seek(0)
        with self.log:
            return self.log.read()


@contextlib.contextmanager
def server() -> Iterator[tuple[Server, Harm]]:
    """A server, and what came of the block: told at its end."""
    running, harm = Server(), Harm()
    try:
        before = running.rss()
        yield running, harm
        harm.grown = running.rss() - before
        harm.p99_s = float(np.percentile(running.took, 99)) if running.took else float("inf")
    finally:
        log = running.close()
    harm.faults += re.findall(r"Traceback.*|.* ERROR .*|.*Exception in.*", log)


def attack(running: Server, harm: Harm, requests: Sequence[Sequence[bytes]]) -> None:
    """Send some, and count what comes."""
    for pieces, seen in zip(requests, send(running.address, requests), strict=True):
        status, fault = judge(pieces, seen)
        harm.statuses[status] += 1
        harm.sent += 1
        if fault is not None:
            harm.faults.append(f"{fault}: {list(pieces)!r:.600}")


def run(running: Server, harm: Harm, seconds: float, begin: int) -> None:
    """The corpus as it is, then mutants of it for so long."""
    end, number, kept = time.monotonic() + seconds, begin, corpus()
    for at in range(0, len(kept), TOGETHER):
        attack(running, harm, [[data] for data in kept[at : at + TOGETHER]])
    while time.monotonic() < end and not harm.faults:

        @seed(number)
        @settings(
            max_examples=20,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(hostile(), min_size=TOGETHER, max_size=TOGETHER))
        def one(requests: list[list[bytes]]) -> None:
            if time.monotonic() < end:
                attack(running, harm, requests)

        one()
        number += 1


def main() -> int:
    """Attack for some minutes; 1 if something broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with server() as (running, harm):
        run(running, harm, asked.minutes * 60, asked.seed)
    print(f"{harm.sent} connections: {dict(harm.statuses.most_common())}")
    print(f"grown by {harm.grown / 2**20:.1f} MiB; the other client's p99 {harm.p99_s * 1000:.0f} ms")
    for fault in harm.faults:
        print(fault)
    return int(bool(harm.faults) or harm.grown > GROWTH_BYTES or harm.p99_s > P99_S)


if __name__ == "__main__":
    raise SystemExit(main())
