"""Who may open a WebSocket: its address, its key, its page's origin. What comes after it is conversation.py's."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from stepcast.errors import Draining, Forbidden, NotReady, RouteNotFound

from ...sessions.lanes import check_streams
from ...settings import Settings
from ...telemetry import Metrics
from ..answers import Headers, problem
from ..keys import Keys, origins
from ..steps import Steps, Way
from .connection import EXTENSION, WebSocketConnection
from .conversation import Conversation

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Handshake:
    """ASGI, scope type "websocket": admits connections."""

    def __init__(self, steps: Steps, keys: Keys, settings: Settings, metrics: Metrics) -> None:
        self._steps, self._keys, self._settings, self._metrics = steps, keys, settings, metrics
        self._origins = origins(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection from its handshake to its end."""
        await receive()  # websocket.connect
        try:
            conversation, connection = self._admit(scope)
        except Exception as error:
            await self._refuse(send, error)
            return
        await send({"type": "websocket.accept"})
        self._metrics.sockets.inc()
        try:
            connection.open(conversation, self._settings.stall_s)
            await connection.closed()
        finally:
            self._metrics.sockets.dec()

    def _admit(self, scope: Scope) -> tuple[Conversation, WebSocketConnection]:
        """The conversation that the handshake asks for.

        Raises:
            RouteNotFound, Unauthorized, Forbidden, ModelNotFound, NotStreaming, InvalidSessionId, NotReady.
        """
        model, session = _route(scope["path"])
        headers = dict(scope["headers"])
        principal = self._keys.authenticate(_with_key(headers, scope["query_string"]))
        self._check_origin(headers)
        way, sessions = Way(principal.namespace, model), self._steps.states.sessions
        if session is not None:
            way.address(session)
        check_streams(self._steps.look(way).served)
        connection = scope.get("extensions", {}).get(EXTENSION)
        if not isinstance(connection, WebSocketConnection):
            raise NotReady("WebSockets need the server that `python -m service serve` starts")
        if sessions.draining:
            raise Draining("the server is shutting down. Connect again.", retry_after_s=1.0)
        return Conversation(self._steps, connection, principal, way, session, self._metrics), connection

    def _check_origin(self, headers: Headers) -> None:
        """Refuse pages of other sites: a browser sends their Origin, and lets them open any WebSocket."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or self._origins & {origin, "*"}:
            return
        if _host(origin) != headers.get(b"host", b"").decode("latin-1"):
            raise Forbidden(f"pages of {origin!r} may not call this server. Set STEPCAST_CORS_ORIGINS.", origin=origin)

    async def _refuse(self, send: Send, error: Exception) -> None:
        answer = problem(error, self._metrics)
        fields = {"content-type": answer.kind, "content-length": str(len(answer.body)), **answer.fields}
        headers = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
        await send({"type": "websocket.http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": answer.body})


def _route(path: str) -> tuple[str, str | None]:
    """Model and session (None: any) of a path; RouteNotFound where there is no WebSocket."""
    parts = path.split("/")
    if parts[1:3] == ["v1", "models"] and parts[-1] == "stream":
        if len(parts) == 5:
            return parts[3], None
        if len(parts) == 7 and parts[4] == "sessions":
            return parts[3], parts[5]
    raise RouteNotFound(f"there is no WebSocket at {path!r}", path=path)


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # brackets that are no IPv6 address
        return None


def _with_key(headers: Headers, query: bytes) -> Headers:
    """The headers, with the key of ?key= where they have none: browsers can set no headers on a WebSocket."""
    if b"authorization" in headers or b"x-api-key" in headers:
        return headers
    given = parse_qs(query).get(b"key")
    return {**headers, b"x-api-key": given[0]} if given else headers
