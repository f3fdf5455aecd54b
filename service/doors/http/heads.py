"""Who takes a connection: steps go straight to Rest.step, WebSockets to their door, everything else to FastAPI.

The same handler is registered with FastAPI too, so that OpenAPI knows it; what is saved here is FastAPI's routing,
middleware and dependency machinery, 100 microseconds a request.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, NamedTuple

from fastapi import Response

from stepcast.errors import Internal, Malformed, StepcastError

from ...sessions.columns import ManySteps, Waiter
from ...sessions.core import Address
from ...sessions.edits import check_id
from ...telemetry import log
from .. import bodies as wire
from ..keys import Principal
from .routes import Headers, Rest, answer_type, problem, request_type, too_large

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_START: Final = "http.response.start"
_BODY: Final = "http.response.body"
_GONE: Final = "http.disconnect"

KNOWN_WAYS: Final = 1024
_STEP: Final = b"/step"
_STEP_CHARS: Final = len(_STEP)


class Caller(NamedTuple):
    """What a request's headers say."""

    principal: Principal
    kind: str
    """Content type of the body."""
    accepted: str
    """Content type of the answer."""
    ok: bytes
    """The head of a good answer, up to the content length."""


class Way(NamedTuple):
    """What the path of a step says before the session's id."""

    namespace: str
    model: str
    prefix: str
    """Of the sessions' keys."""


class FastDoor:
    """ASGI: steps by the short way, WebSockets to `sockets`, the rest to `api`.

    Below ASGI, `caller`, `batch` and the steps serve the connection itself (connection.py): None or False from
    any of them says that the request is not of the plainest kind, or not a good one, and has to come through ASGI.

    Attributes:
        short: Whether steps go the short way.
        heads: What connections remember of heads; they bound it.
    """

    def __init__(self, rest: Rest, sockets: App, api: App) -> None:
        self._rest, self._sockets, self._api = rest, sockets, api
        self.limit = rest.settings.body_limit_bytes
        self.short = not rest.settings.cors_origins  # CORS headers are FastAPI's middleware
        self.heads: dict[bytes, Any] = {}
        self._ways: dict[tuple[str, bytes], Way] = {}

    def caller(self, headers: Headers) -> Caller | None:
        """Who asks, and in which encoding."""
        try:
            principal = self._rest.keys.authenticate(headers)
            principal.require("step")
            kind = request_type(headers)
        except StepcastError:
            return None
        accepted = answer_type(headers, kind)
        ok = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: " % accepted.encode()
        return Caller(principal, kind, accepted, ok)

    def _way(self, caller: Caller, start: bytes) -> Way | None:
        """What a path up to the session's id says, /v1/models/<model>/sessions/; None where it says anything else."""
        parts = start.split(b"/")
        if len(parts) != 6 or parts[1:3] != [b"v1", b"models"] or parts[4] != b"sessions" or not parts[3].isascii():
            return None
        namespace, model = caller.principal.namespace, parts[3].decode()
        try:
            self._rest.repository.live(model)
        except StepcastError:
            return None
        if len(self._ways) >= KNOWN_WAYS:
            self._ways.clear()
        way = self._ways[namespace, start] = Way(namespace, model, f"{namespace}/{model}/")
        return way

    def batch(self, path: bytes) -> str | None:
        """The model that the path of a batch step is about, where it is plainly written and served."""
        parts = path.split(b"/")
        if len(parts) != 5 or parts[1:3] != [b"v1", b"models"] or parts[4] != b"step" or not parts[3].isascii():
            return None
        model = parts[3].decode()
        try:
            self._rest.repository.live(model)
        except StepcastError:
            return None
        return model

    def step_many(self, caller: Caller, model: str, body: bytes, then: Callable[[ManySteps], None]) -> bool:
        """Queue a batch step, as `step` does."""
        try:
            self._rest.queue_many(caller.principal.namespace, model, body, caller.kind, then)
        except StepcastError:
            return False
        return True

    def step(self, caller: Caller, path: bytes, body: bytes, waiter: Waiter) -> bool:
        """Queue a step of the session that the path says; the waiter gets its answer.

        A hot session is found by its key, put together from the path: among 100,000 sessions that is cheaper than to
        remember an address for each path.

        Returns:
            False: it has to come through ASGI.
        """
        if not path.endswith(_STEP):
            return False
        sessions, cut = self._rest.sessions, path.rfind(b"/", 0, -_STEP_CHARS) + 1
        start = path[:cut]
        way = self._ways.get((caller.principal.namespace, start)) or self._way(caller, start)
        if way is None:
            return False
        try:
            session = str(path[cut:-_STEP_CHARS], "ascii")
            features = sessions.repository.live(way.model).n_features
            single = wire.single_reader(features).read(body, caller.kind)
            if single is None:
                return False
            if not sessions.join(way.prefix + session, *single, waiter):
                sessions.single_step(Address(way.namespace, way.model, check_id(session)), *single, waiter)
        except (StepcastError, UnicodeDecodeError):
            return False
        return True

    def problem(self, error: BaseException) -> Response:
        """An error as a response."""
        if not isinstance(error, StepcastError):
            log.error("a step failed", exc_info=error)
            error = Internal("the server has a defect; its log tells more")
        return problem(error, self._rest.metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and self.short:
            parts = scope["path"].split("/")
            known = len(parts) == 5 or (len(parts) == 7 and parts[4] == "sessions")
            if known and parts[-1] == "step" and parts[1:3] == ["v1", "models"]:
                await self._step(parts, scope, receive, send)
                return
        if scope["type"] == "websocket":
            await self._sockets(scope, receive, send)
            return
        await self._api(scope, receive, send)

    async def _step(self, parts: list[str], scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = dict(scope["headers"])
            body = await self._body(receive)
            if len(parts) == 7:
                data, kind = await self._rest.step(parts[3], parts[5], headers, body)
            else:
                data, kind = await self._rest.step_many(parts[3], headers, body)
        except Exception as error:
            await _send(send, self.problem(error))
            return
        lines = [(b"content-type", kind.encode()), (b"content-length", str(len(data)).encode())]
        await send({"type": _START, "status": 200, "headers": lines})
        await send({"type": _BODY, "body": data})

    async def _body(self, receive: Receive) -> bytes:
        message = await receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            parts, size = [body], len(body)
            while message.get("more_body") and size <= self.limit:
                message = await receive()
                parts.append(message.get("body", b""))
                size += len(parts[-1])
            body = b"".join(parts)
        if len(body) > self.limit:
            raise too_large(self.limit)
        if message["type"] == _GONE:
            raise Malformed("the connection was lost in the body")
        return body


async def _send(send: Send, response: Response) -> None:
    await send({"type": _START, "status": response.status_code, "headers": response.raw_headers})
    await send({"type": _BODY, "body": response.body})
