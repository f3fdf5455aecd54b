"""The SDK's HTTP: requests and responses as bytes, and both transports through TLS, proxies and bad servers."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import ROOT

from stepcast import AsyncClient, Client, Retry
from stepcast.codec import unpack
from stepcast.errors import StepcastError, Unavailable
from stepcast.wire import Call, Response, Target

pytestmark = pytest.mark.service

CERTIFICATE = ROOT / "tests" / "data" / "localhost.pem"


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_a_request_is_its_head_and_body() -> None:
    """The base URL's path stands before the call's; the key is a header."""
    request = Target("http://h:81/base/", "secret").request(Call("POST", "/v1/x", {"a": 1}))
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /base/v1/x HTTP/1.1"
    assert {b"host: h:81", b"x-api-key: secret", b"accept: application/msgpack", b"content-length: 4"} <= set(lines)
    assert unpack(body) == {"a": 1}
    assert "secret" not in repr(Target("http://h", "secret"))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://h", "http://", ""])
def test_an_url_that_is_none_is_refused(url: str) -> None:
    """When the client is made."""
    with pytest.raises(ValueError, match="want http://"):
        Client(url)


def test_a_key_cannot_smuggle_headers() -> None:
    """A line end in a key never reaches the wire."""
    with pytest.raises(ValueError, match="key"), Client("http://h", "a\r\nx: y") as client:
        client.models()


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("data", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", True),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello", False),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", False),
    ],
)
def test_a_response_is_read_however_it_is_cut(data: bytes, reusable: bool, step: int) -> None:
    """By length, in chunks, after a preliminary one, up to the end of the connection."""
    response = Response()
    for start in range(0, len(data), step):
        response.feed(data[start : start + step])
    if not response.done:
        response.feed(b"")
    assert (response.status, response.reply.content, response.reusable) == (200, b"hello", reusable)


def test_a_response_that_ends_too_soon_is_none() -> None:
    """Half a body is no answer."""
    response = Response()
    response.feed(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel")
    with pytest.raises(ConnectionError, match="ended before the response"):
        response.feed(b"")


# --- servers that are no good ---------------------------------------------------------------------------------------


class Scripted:
    """A server of which each connection runs a function."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.connections = 0
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                self._serve(connection)

    def close(self) -> None:
        """Stop."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[socket.socket], None]], Scripted]]:
    """Makes such servers."""
    made: list[Scripted] = []

    def make(serve: Callable[[socket.socket], None]) -> Scripted:
        made.append(Scripted(serve))
        return made[-1]

    yield make
    for server in made:
        server.close()


def ask(url: str, use_async: bool, **options: Any) -> Any:
    """The models, by either client."""
    options = {"retry": Retry(attempts=1), **options}
    if not use_async:
        with Client(url, **options) as client:
            return client.models()

    async def awaited() -> Any:
        async with AsyncClient(url, **options) as client:
            return await client.models()

    return asyncio.run(awaited())


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "ended before the response did"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 90\r\n\r\nx", "ended before the response did"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "HttpParser|Invalid"),
    ],
)
def test_a_server_that_is_none_is_unavailable(scripted: Any, answer: bytes, told: str, use_async: bool) -> None:
    """Nothing, half a response, another protocol: an error of ours that says so."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(answer)

    with pytest.raises(Unavailable, match=told):
        ask(scripted(serve).url, use_async)


@pytest.mark.parametrize("use_async", [False, True])
def test_a_server_that_is_silent_is_given_up(scripted: Any, use_async: bool) -> None:
    """After the timeout; it counts for the whole response, however slowly that trickles."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n")
        over = threading.Event()
        for _ in range(100):
            try:
                connection.sendall(b"x")
            except OSError:
                return
            over.wait(0.05)

    with pytest.raises(Unavailable, match="timed out"):
        ask(scripted(serve).url, use_async, timeout_s=0.4)


@pytest.mark.parametrize("use_async", [False, True])
def test_a_proxys_answer_is_not_the_servers(scripted: Any, use_async: bool) -> None:
    """HTML with 404 is an error with the status; with 502 it is worth another try."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 %d x\r\ncontent-length: 4\r\nconnection: close\r\n\r\n<p/>" % statuses.pop(0))

    statuses = [404]
    with pytest.raises(StepcastError, match=r"HTTP 404: b'<p/>'"):
        ask(scripted(serve).url, use_async)
    statuses = [502, 502]
    server = scripted(serve)
    with pytest.raises(Unavailable, match="HTTP 502"):
        ask(server.url, use_async, retry=Retry(attempts=2, first_pause_s=0.001))
    assert server.connections == 2


@pytest.mark.parametrize("use_async", [False, True])
def test_a_connection_that_the_server_closed_is_not_used_again(scripted: Any, use_async: bool) -> None:
    """The next call opens another, without an attempt lost."""
    server = scripted(serve_models)
    if use_async:

        async def twice() -> None:
            async with AsyncClient(server.url, retry=Retry(attempts=1)) as client:
                for _ in range(3):
                    assert await client.models() == []
                    await asyncio.sleep(0.05)

        asyncio.run(twice())
    else:
        pause = threading.Event()
        with Client(server.url, retry=Retry(attempts=1)) as client:
            for _ in range(3):
                assert client.models() == []
                pause.wait(0.05)
    assert server.connections == 3


def serve_models(connection: socket.socket) -> None:
    """One good answer, then the end."""
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n\x81\xa6models\x90")


# --- TLS and proxies ------------------------------------------------------------------------------------------------


class Tunnels:
    """A proxy that makes tunnels, and counts them."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.asked: list[bytes] = []

    def __call__(self, connection: socket.socket) -> None:
        """One connection: CONNECT, then bytes both ways."""
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(1)
        self.asked.append(head.split(b"\r\n")[0])
        with socket.create_connection(("127.0.0.1", self.port)) as there:
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_copy, args=(there, connection))
            back.start()
            _copy(connection, there)
            back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one end is gone


def serve_models_by_tls(connection: socket.socket) -> None:
    """The same behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    try:
        with context.wrap_socket(connection, server_side=True) as secured:
            serve_models(secured)
    except OSError:
        pass  # the client did not trust it


@pytest.mark.parametrize("use_async", [False, True])
def test_tls_is_verified(scripted: Any, use_async: bool) -> None:
    """A certificate that the context knows is taken, another is not."""
    server = scripted(serve_models_by_tls)
    url = server.url.replace("http://127.0.0.1", "https://localhost")
    assert ask(url, use_async, tls=ssl.create_default_context(cafile=str(CERTIFICATE))) == []
    with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
        ask(url, use_async)


@pytest.mark.parametrize("use_async", [False, True])
def test_a_proxy_makes_a_tunnel_for_tls(scripted: Any, monkeypatch: pytest.MonkeyPatch, use_async: bool) -> None:
    """HTTPS_PROXY is asked to CONNECT; what goes through is between us and the server."""
    tunnels = Tunnels(int(scripted(serve_models_by_tls).url.rpartition(":")[2]))
    monkeypatch.setenv("https_proxy", scripted(tunnels).url)
    monkeypatch.setenv("no_proxy", "")
    tls = ssl.create_default_context(cafile=str(CERTIFICATE))
    assert ask("https://localhost:7", use_async, tls=tls) == []
    assert tunnels.asked == [b"CONNECT localhost:7 HTTP/1.1"]


@pytest.mark.parametrize("use_async", [False, True])
def test_a_proxy_that_makes_no_tunnel_is_told(scripted: Any, monkeypatch: pytest.MonkeyPatch, use_async: bool) -> None:
    """With its status."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 407 no\r\ncontent-length: 0\r\n\r\n")

    monkeypatch.setenv("https_proxy", scripted(serve).url)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(Unavailable, match="answered CONNECT with 407"):
        ask("https://localhost:7", use_async)


@pytest.mark.parametrize("use_async", [False, True])
def test_a_plain_proxy_is_asked_for_the_whole_url(
    scripted: Any, monkeypatch: pytest.MonkeyPatch, use_async: bool
) -> None:
    """HTTP_PROXY is heeded, NO_PROXY too."""
    asked: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        asked.append(connection.recv(65536).split(b"\r\n")[0])
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n\x81\xa6models\x90")

    proxy = scripted(serve).url
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert ask("http://nowhere.invalid:81/base", use_async) == []
    assert ask(scripted(serve).url, use_async) == []
    assert asked == [b"GET http://nowhere.invalid:81/base/v1/models HTTP/1.1", b"GET /v1/models HTTP/1.1"]
