"""What a socket may cost: long heads, slow ones, bodies of strangers, many connections, many bytes at once."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest
from serving import ROOT, Running, running
from uvicorn.server import ServerState

from service.doors.http import guard
from service.doors.intake import Intake, Share
from stepcast.errors import IntakeFull

pytestmark = pytest.mark.service

LSTM = "/v1/models/lstm"
STREAM = f"{LSTM}/stream"
ONES = b'{"inputs":[1,1,1]}'
LIMIT = 2**16
READ_S = 0.4
KEY = "key-of-a-stepper"
UPGRADE = (
    "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: " + "A" * 22 + "=="
)


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    """A server with keys that waits shortly, holds little, and takes five connections and two more."""
    limits: dict[str, Any] = {"read_s": READ_S, "intake_bytes": 3 * 2**20, "tenant_intake_bytes": 2**21}
    keys = f"step:acme:{KEY},read:acme:key-of-a-reader,step:other:key-of-another"
    with running(store="memory://", api_keys=keys, **limits) as server:
        yield server


def connect(server: Running) -> socket.socket:
    """A bare connection."""
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def heard(sock: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    while part := sock.recv(65536):
        found += part
    return found


def told(sock: socket.socket) -> tuple[int, str, dict[str, Any]]:
    """Status and code of the one problem that comes before the server closes, and the document."""
    head, _, body = heard(sock).partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    document = json.loads(body)
    status = int(head.split()[1])
    assert document["status"] == status
    return status, document["code"], document


def step(length: int | None, *fields: str, session: str = "s") -> bytes:
    """The head of a step."""
    lines = [f"POST {LSTM}/sessions/{session}/step HTTP/1.1", "host: localhost", *fields]
    lines += ["transfer-encoding: chunked"] if length is None else [f"content-length: {length}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def settles(server: Running) -> None:
    """Nothing is left of it all: no bytes held, a step is answered."""
    deadline = time.monotonic() + 10
    while server.app.heads.intake.held:
        assert time.monotonic() < deadline
        time.sleep(0.005)


LONG = {
    "address": (f"GET /{'a' * LIMIT} HTTP/1.1\r\nhost: localhost", 414, "address_too_long"),
    "value": (f"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-long: {'a' * LIMIT}", 431, "head_too_large"),
    "fields": ("GET /v1/models HTTP/1.1\r\n" + "a: b\r\n" * (LIMIT // 6 + 1), 431, "head_too_large"),
    "step": (f"POST {LSTM}/sessions/s/step HTTP/1.1\r\nx: {'a' * LIMIT}", 431, "head_too_large"),
    "socket": (f"GET {STREAM} HTTP/1.1\r\nhost: localhost\r\n{UPGRADE}\r\nx: {'a' * LIMIT}", 431, "head_too_large"),
    "query": (f"GET {STREAM}?key={'a' * LIMIT} HTTP/1.1\r\nhost: localhost\r\n{UPGRADE}", 414, "address_too_long"),
}


@pytest.mark.parametrize("whole", [False, True], ids=["endless", "whole"])
@pytest.mark.parametrize("kind", LONG)
def test_a_head_longer_than_the_limit_is_refused_before_any_key(hasty: Running, kind: str, whole: bool) -> None:
    """For its address 414, for its fields 431; whether its end has come or not. The server then closes."""
    text, status, code = LONG[kind]
    with connect(hasty) as sock:
        sock.sendall(text.encode() + (b"\r\n\r\n" if whole else b""))
        assert told(sock)[:2] == (status, code)


def test_a_head_that_is_just_short_enough_is_served(hasty: Running) -> None:
    """One byte more is one too many."""
    lines = "GET /healthz/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: {}\r\n\r\n"
    for more, wanted in ((0, b"200"), (1, b"431")):
        with connect(hasty) as sock:
            sock.sendall(lines.format("a" * (LIMIT - len(lines) + 2 + more)).encode())
            assert heard(sock).split()[1] == wanted


def test_a_long_head_behind_another_request_is_refused_in_its_turn(hasty: Running) -> None:
    """The first is answered, then the second is refused, in one piece or in two."""
    first = b"GET /healthz/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
    for text, status, code in LONG.values():
        for cut in (len(text), 70_000, 100):
            with connect(hasty) as sock:
                sock.sendall(first + text.encode()[:cut])
                sock.sendall(text.encode()[cut:] + b"\r\n\r\n")
                answers = heard(sock)
            assert answers.startswith(b"HTTP/1.1 200")
            assert b'{"live":true}HTTP/1.1 %d' % status in answers
            assert b'"code":"%s"' % code.encode() in answers


def test_a_head_in_single_bytes_is_what_it_is_in_one_piece() -> None:
    """A step, another request and a handshake: all are taken."""
    with running(store="memory://") as server:
        for text, wanted in (
            (step(len(ONES)) + ONES, b"HTTP/1.1 200"),
            (b"\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n", b"HTTP/1.1 200"),
            (f"GET {STREAM} HTTP/1.1\r\nhost: localhost\r\n{UPGRADE}\r\n\r\n".encode(), b"HTTP/1.1 101"),
        ):
            with connect(server) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for byte in text:
                    sock.sendall(bytes((byte,)))
                assert sock.recv(65536).startswith(wanted)


def test_a_long_head_that_trickles_costs_time_in_proportion_to_its_length() -> None:
    """Twice the limit takes about twice as long, not four times; the server's own processor time is counted."""
    with running(store="memory://", head_limit_bytes=2**20) as server:

        def costs(size: int) -> float:
            made = guard.GuardedConnection(server.uvicorn_config, ServerState(), {}, server.loop)
            made._expect = lambda: None  # type: ignore[method-assign]  # it has no transport
            made._keep(b"GET / HTTP/1.1\r\nx:")
            started = time.process_time()
            for number in range(size):
                assert made._more(b"a\r\n" if number % 9 == 0 else b"abc") is None
            took = time.process_time() - started
            made._forget()
            return took

        costs(1000)
        small, large = min(costs(20_000) for _ in range(3)), min(costs(80_000) for _ in range(3))
        assert large < 8 * small


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /v1/mod",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n",
        step(20)[:60],
        f"GET {STREAM} HTTP/1.1\r\n{UPGRADE}".encode(),
    ],
)
def test_a_head_that_does_not_end_is_408(hasty: Running, begun: bytes) -> None:
    """After read_s, and however often a byte more comes."""
    started = time.monotonic()
    with connect(hasty) as sock:
        sock.sendall(begun)
        sock.settimeout(READ_S / 8)
        answer = b""
        while not answer:
            try:
                answer = sock.recv(65536)
            except TimeoutError:
                sock.sendall(b"x")
        sock.settimeout(20)
        answer += heard(sock)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"request_timeout"' in answer
    assert READ_S * 0.9 < time.monotonic() - started < READ_S + 5


def test_a_socket_that_is_open_is_not_waited_for(hasty: Running) -> None:
    """Its handshake was whole; it may be silent for longer than read_s."""
    with connect(hasty) as sock:
        sock.sendall(f"GET {STREAM}?key={KEY} HTTP/1.1\r\nhost: localhost\r\n{UPGRADE}\r\n\r\n".encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 101")
        sock.settimeout(3 * READ_S)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.sendall(b"\x81\x8f\0\0\0\0" + b'{"op":"marker"}')
        sock.settimeout(20)
        assert b'"op":"marker"' in sock.recv(65536)


@pytest.mark.parametrize(
    "head",
    [
        f"POST {STREAM} HTTP/1.1\r\nhost: localhost\r\n{UPGRADE}\r\ncontent-length: 3\r\n\r\nabc",
        f"GET {STREAM} HTTP/1.1\r\nhost: localhost\r\n{UPGRADE}\r\n" + "a: b\r\n" * 200 + "\r\n",
        f"GET {STREAM} HTTP/1.1\r\nhost: localhost\r\n{UPGRADE}\r\na: {'b' * 9000}\r\n\r\n",
    ],
    ids=["body", "many", "long"],
)
def test_a_handshake_that_the_library_gives_up_is_answered(hasty: Running, head: str) -> None:
    """It has limits of its own, and would leave the client waiting."""
    with connect(hasty) as sock:
        sock.sendall(head.encode())
        assert told(sock)[:2] == (400, "malformed")


def test_a_connection_on_which_nothing_comes_is_closed_without_an_answer(hasty: Running) -> None:
    """It has asked nothing."""
    with connect(hasty) as sock:
        assert heard(sock) == b""


@pytest.mark.parametrize("path", ["step", "fork"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_does_not_come_is_408_and_steps_nothing(hasty: Running, path: str, chunked: bool) -> None:
    """By either way through the server; what was held of it is given back."""
    head = step(None if chunked else 20_000, f"x-api-key: {KEY}", session="slow").replace(b"/step", f"/{path}".encode())
    with connect(hasty) as sock:
        sock.sendall(head + (b"5\r\n[1,2," if chunked else b"[1,2,"))
        assert told(sock)[:2] == (408, "request_timeout")
    settles(hasty)
    found = httpx.get(f"{hasty.url}{LSTM}/sessions/slow", headers={"x-api-key": KEY})
    assert found.json()["code"] == "session_not_found"


@pytest.mark.parametrize("path", ["step", "fork"])
def test_a_slow_body_that_goes_on_coming_is_taken(hasty: Running, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of it gives it more time: here half a megabyte in three times read_s."""
    monkeypatch.setattr(guard, "BODY_RATE", 2**17)
    size = 2**19
    head = step(size, f"x-api-key: {KEY}").replace(b"/step", f"/{path}".encode())
    with connect(hasty) as sock:
        sock.sendall(head)
        for _ in range(12):
            time.sleep(READ_S / 4)  # the client's slowness, not a wait for anything
            sock.sendall(b" " * (size // 12))
        sock.sendall(b" " * (size - size // 12 * 12))
        assert sock.recv(65536).startswith(b"HTTP/1.1 400")  # nothing but blanks


@pytest.mark.parametrize(
    ("key", "status", "code"), [("", 401, "unauthorized"), ("key-of-a-reader", 403, "forbidden")], ids=["none", "read"]
)
@pytest.mark.parametrize("path", ["step", "rollout", "state"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_strangers_body_is_not_waited_for(
    hasty: Running, key: str, status: int, code: str, path: str, chunked: bool
) -> None:
    """The head alone is answered, and the connection ends; nothing of the body is held, though all of it may come."""
    field = [f"x-api-key: {key}"] if key else []
    head = step(None if chunked else 2**23, *field).replace(b"/step", f"/{path}".encode())
    if path == "state":
        head = head.replace(b"POST", b"PUT")
    with connect(hasty) as sock:
        sock.sendall(head)
        assert told(sock)[:2] == (status, code)
    with connect(hasty) as sock:
        sock.sendall(head)
        sent = 0
        try:
            for _ in range(16):
                sent += sock.send((b"10000\r\n" if chunked else b"") + b"x" * 65536 + (b"\r\n" if chunked else b""))
        except (BrokenPipeError, ConnectionResetError):
            pytest.fail(f"the answer was cut off after {sent} bytes")
        assert told(sock)[:2] == (status, code)
    assert hasty.app.heads.intake.held == 0


def test_a_small_body_in_a_packet_of_its_own_keeps_the_connection(hasty: Running) -> None:
    """A good answer does not end it, by either way, though head and body came apart."""
    with connect(hasty) as sock:
        for path in ("step", "rollout") * 2:
            body = ONES if path == "step" else b'{"steps":1,"inputs":[[1,1,1]]}'
            sock.sendall(step(len(body), f"x-api-key: {KEY}").replace(b"/step", f"/{path}".encode()))
            time.sleep(0.02)  # the packets must be two
            sock.sendall(body)
            answer = sock.recv(65536)
            while not answer.endswith(b"}"):  # the general way writes head and body one after the other
                answer += sock.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"connection: close" not in answer.lower()


def test_bytes_in_flight_are_bounded_for_a_namespace_and_in_all(hasty: Running) -> None:
    """2 MiB for one, 3 MiB for all: the next body is 429 until others are gone, of which nothing is left then."""
    large, mine, others = 2**20 - 2**10, f"x-api-key: {KEY}", "x-api-key: key-of-another"
    for path in ("step", "rollout"):
        heads = [step(large, key).replace(b"/step", f"/{path}".encode()) for key in (mine, others)]
        with ExitStack() as stack:

            def begin(head: bytes, stack: ExitStack = stack) -> socket.socket:
                sock = stack.enter_context(closing(connect(hasty)))
                sock.sendall(head + b"[" * (large - 1))
                return sock

            def begin_and_wait(head: bytes, held: int) -> None:
                begin(head)
                deadline = time.monotonic() + 10
                while hasty.app.heads.intake.held < held * (large - 1):
                    assert time.monotonic() < deadline
                    time.sleep(0.002)

            for held in (1, 2):
                begin_and_wait(heads[0], held)
            status, code, problem = told(begin(heads[0]))
            assert (status, code, problem["limit"]) == (429, "intake_full", 2**21)
            begin_and_wait(heads[1], 3)
            status, code, problem = told(begin(heads[1]))
            assert (status, code, problem["limit"]) == (429, "intake_full", 3 * 2**20)
        settles(hasty)
        with httpx.Client(base_url=hasty.url, headers={"x-api-key": KEY}) as client:
            assert client.post(f"{LSTM}/sessions/after/step", content=ONES).status_code == 200


def test_connections_are_bounded() -> None:
    """One too many is told so, and the next is taken when another has gone."""
    with running(store="memory://", connections_limit=3) as server, ExitStack() as stack:
        socks = [stack.enter_context(closing(connect(server))) for _ in range(3)]
        for sock in socks:
            sock.sendall(step(len(ONES)) + ONES)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        with connect(server) as sock:
            status, code, problem = told(sock)
        assert (status, code, problem["retry_after_s"]) == (503, "too_many_connections", 1.0)
        socks[0].close()
        deadline = time.monotonic() + 10
        while True:
            with connect(server) as sock:
                sock.sendall(step(len(ONES)) + ONES)
                if sock.recv(65536).startswith(b"HTTP/1.1 200"):
                    break
            assert time.monotonic() < deadline


def test_a_client_that_does_not_read_its_answer_is_cut_off() -> None:
    """After stall_s, with what was to be written."""
    with running(store="memory://", stall_s=0.2) as server, connect(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 200)
        deadline = time.monotonic() + 10
        connections = server._uvicorn.server_state.connections
        while connections:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_share_is_counted_and_given_back() -> None:
    """By tenant and in all; a refusal counts nothing."""
    intake = Intake(10, 6)
    with Share(intake, "a") as a, Share(intake, "b") as b:
        a.add(4)
        a.hold(6)
        with pytest.raises(IntakeFull, match="namespace 'a'"):
            a.add(1)
        b.add(4)
        with pytest.raises(IntakeFull, match="the server"):
            b.hold(5)
        assert (intake.held, a.held, b.held) == (10, 6, 4)
        a.hold(2)
        b.hold(6)
    assert (intake.held, intake._by_tenant) == (0, {})


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no such limit")
def test_a_server_raises_its_limit_of_open_files_as_far_as_it_may() -> None:
    """For its connections, and warns where the hard limit is too low."""
    program = (
        "import resource, sys; from service.__main__ import _room_for; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, int(sys.argv[1]))); _room_for(400); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    for hard, soft, warns in ((1000, 656, False), (600, 600, True)):
        ran = subprocess.run([sys.executable, "-c", program, str(hard)], cwd=ROOT, capture_output=True, text=True)
        assert ran.stdout.strip() == str(soft), ran.stderr
        assert ("for 400 connections 656 are needed" in ran.stderr) is warns
