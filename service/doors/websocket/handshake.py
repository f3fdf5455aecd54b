"""Who may open a WebSocket: its address, its key, its page's origin. What comes after it is conversation.py's."""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import parse_qs

from stepcast.errors import Draining, Forbidden, NotReady, RouteNotFound

from ...sessions.lanes import check_streams
from ...settings import Settings
from ...telemetry import Metrics
from ..answers import Headers, problem
from ..hosts import is_own
from ..http.envelope import address_of, respond
from ..intake import Intake, Share
from ..keys import Keys, origins
from ..steps import Steps, Way
from .connection import EXTENSION, Slices, WebSocketConnection
from .conversation import LATE_SHARE, Conversation

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_PATH: Final = re.compile(r"/v1/models/([^/]*)(?:/sessions/([^/]*))?/stream")


class Handshake:
    """ASGI, scope type "websocket": admits connections."""

    def __init__(self, steps: Steps, keys: Keys, intake: Intake, settings: Settings, metrics: Metrics) -> None:
        self._steps, self._keys, self._settings, self._metrics = steps, keys, settings, metrics
        self._intake, self._slices = intake, Slices()
        self._origins = origins(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection from its handshake to its end."""
        await receive()  # websocket.connect
        try:
            conversation, connection = self._admit(scope)
        except Exception as error:
            await respond(problem(error, self._metrics))(scope, receive, send)
            return
        await send({"type": "websocket.accept"})
        with self._metrics.sockets.track_inprogress():
            share = Share(self._intake, conversation.namespace)
            settings = self._settings
            connection.open(conversation, share, self._slices, settings.stall_s, settings.deadline_s * LATE_SHARE)
            await receive()  # websocket.disconnect: all else goes past ASGI

    def _admit(self, scope: Scope) -> tuple[Conversation, WebSocketConnection]:
        """The conversation that the handshake asks for; StepcastError where it may have none."""
        path, headers = scope["path"], dict(scope["headers"])
        found = _PATH.fullmatch(path)
        if found is None:
            raise RouteNotFound(f"there is no WebSocket at {path!r}", path=path)
        model, session = found.groups()
        principal = self._keys.authenticate(_with_key(headers, scope["query_string"]), address_of(scope))
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
        return Conversation(self._steps, connection, principal, way, session), connection

    def _check_origin(self, headers: Headers) -> None:
        """Refuse pages of other sites: a browser sends their Origin, and lets them open any WebSocket."""
        sent = headers.get(b"origin", b"")
        origin = sent.decode("latin-1")
        if not origin or self._origins & {origin, "*"} or is_own(sent, headers):
            return
        raise Forbidden(f"pages of {origin!r} may not call this server. Set STEPCAST_CORS_ORIGINS.", origin=origin)


def _with_key(headers: Headers, query: bytes) -> Headers:
    """The headers, with the key of ?key= where they have none: browsers can set no headers on a WebSocket."""
    if b"authorization" in headers or b"x-api-key" in headers:
        return headers
    given = parse_qs(query).get(b"key")
    return {**headers, b"x-api-key": given[0]} if given else headers
