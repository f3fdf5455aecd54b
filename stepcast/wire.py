"""HTTP/1.1 as bytes: a request's, and a reader of responses. No I/O; the sync and the async transport share it.

The SDK speaks to one server in one manner, so it does without a general HTTP client, which takes longer than a step:
httptools (llhttp) parses, a request's head is put together once, and what remains is the body.
"""

import ssl
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httptools

from . import __version__, codec
from .codec import MSGPACK

_DEFAULT_PORT: Final = {"http": 80, "https": 443}


class Call(NamedTuple):
    """One HTTP request.

    `safe`: it may be sent again when it is not known whether it was applied. `applied`: the error code which then means
    that it was. `timeout_s`: the longest wait for the response where it is shorter than the client's.
    """

    method: str
    path: str
    fields: dict[str, Any] | None = None
    safe: bool = True
    applied: str = ""
    timeout_s: float | None = None


class Reply(NamedTuple):
    """One HTTP response."""

    status: int
    content: bytes


class Broken(NamedTuple):
    """There was no response; why."""

    reason: str


BROKEN: Final = (OSError, httptools.HttpParserError)
"""What a connection may raise while a response is awaited."""


def broken(error: Exception) -> Broken:
    """No response, because of an error of `BROKEN`."""
    return Broken(f"{type(error).__name__}: {error}".rstrip(": "))


# --- where to -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A server: its base URL, a key, and the TLS context to use (None: the system's certificates)."""

    url: str
    key: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in _DEFAULT_PORT or not parts.hostname:
            raise ValueError(f"url is {self.url!r}, want http://host:port or https://host:port")

    @cached_property
    def address(self) -> tuple[str, int]:
        """Host and port of the server."""
        parts = urlsplit(self.url)
        return str(parts.hostname), parts.port or _DEFAULT_PORT[parts.scheme]

    @cached_property
    def proxy(self) -> tuple[str, int] | None:
        """Host and port of the proxy that the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY) names for this server."""
        scheme = urlsplit(self.url).scheme
        named = getproxies().get(scheme)
        if not named or proxy_bypass(self._host):
            return None
        parts = urlsplit(named if "//" in named else f"//{named}")
        return str(parts.hostname), parts.port or 80

    @cached_property
    def context(self) -> ssl.SSLContext | None:
        """The TLS context; None for http://."""
        if urlsplit(self.url).scheme == "http":
            return None
        return self.tls or ssl.create_default_context()

    def socket(self, model: str, session: str | None) -> str:
        """The URL of a WebSocket of a model's session, or of any of them."""
        base = "ws" + self.url.removeprefix("http").rstrip("/")
        path = f"/v1/models/{quote(model, safe='')}"
        return f"{base}{path}/stream" if session is None else f"{base}{path}/sessions/{quote(session, safe='')}/stream"

    # --- requests -------------------------------------------------------------------------------------------------

    def request(self, call: Call) -> bytes:
        """A call as bytes."""
        body = b"" if call.fields is None else codec.pack(call.fields)
        head = f"{call.method} {self._base}{call.path}{self._head}{len(body)}\r\n\r\n"
        return head.encode("latin-1") + body

    @cached_property
    def tunnel(self) -> bytes:
        """The request to the proxy for a connection to the server."""
        return f"CONNECT {self._host} HTTP/1.1\r\nhost: {self._host}\r\n\r\n".encode("latin-1")

    @cached_property
    def _host(self) -> str:
        host, port = self.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @cached_property
    def _base(self) -> str:
        """What stands before every path: the URL's own path, for a proxy without a tunnel the whole of it."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/")
        return f"http://{self._host}{path}" if self.proxy and parts.scheme == "http" else path

    @cached_property
    def _head(self) -> str:
        headers = {
            "host": self._host,
            "user-agent": f"stepcast/{__version__}",
            "content-type": MSGPACK,
            "accept": MSGPACK,
        }
        if self.key is not None:
            if not self.key.isprintable() or not self.key.isascii():
                raise ValueError("the key has characters that no HTTP header can have")
            headers["x-api-key"] = self.key
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f" HTTP/1.1\r\n{lines}content-length: "


# --- responses ------------------------------------------------------------------------------------------------------


class Response:
    """Reads one response; llhttp calls its `on_` methods.

    Args:
        only_head: Only the head is awaited: the answer to CONNECT, after which the connection is another's.
    """

    __slots__ = ("_body", "_ends_by_length", "_heads", "_only_head", "_parser", "done", "reusable", "status")

    def __init__(self, only_head: bool = False) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._only_head = only_head
        self._body: list[bytes] = []
        self._heads = self._ends_by_length = False
        self.status = 0
        self.done = False
        self.reusable = False

    @property
    def reply(self) -> Reply:
        """The response, once `done`."""
        return Reply(self.status, b"".join(self._body))

    def feed(self, data: bytes) -> bool:
        """Take what came; nothing: the connection has ended. Whether the response is complete.

        Raises:
            ConnectionError: the connection ended too soon.
            httptools.HttpParserError: this is no HTTP.
        """
        if data:
            self._parser.feed_data(data)
        elif self._heads and not self._ends_by_length:
            self.done = True
        else:
            raise ConnectionError("the connection ended before the response did")
        return self.done

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header line came."""
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._ends_by_length = True

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self.status, self._heads, self.done = self._parser.get_status_code(), True, self._only_head

    def on_body(self, data: bytes) -> None:
        """A part of the body came."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """The response is complete, or was a preliminary one (100 Continue)."""
        if self.status >= 200:
            self.done, self.reusable = True, self._parser.should_keep_alive()
        else:
            self._heads = self._ends_by_length = False
