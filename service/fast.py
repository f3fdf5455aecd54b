"""Who takes a connection: steps go straight to Rest.step, WebSockets to their door, everything else to FastAPI.

The same handler is registered with FastAPI too, so that OpenAPI knows it; what is saved here is FastAPI's routing,
middleware and dependency machinery, 100 microseconds a request.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from fastapi import Response

from stepcast.errors import Internal, Malformed, StepcastError

from .rest import Rest, problem, too_large
from .telemetry import log

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_START: Final = "http.response.start"
_BODY: Final = "http.response.body"
_GONE: Final = "http.disconnect"


class FastDoor:
    """ASGI: steps by the short way, WebSockets to `sockets`, the rest to `api`."""

    def __init__(self, rest: Rest, sockets: App, api: App) -> None:
        self._rest, self._sockets, self._api = rest, sockets, api
        self._limit = rest.settings.body_limit_bytes
        self._short = not rest.settings.cors_origins  # CORS headers are FastAPI's middleware

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and self._short:
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
        except StepcastError as error:
            await _send(send, problem(error, self._rest.metrics))
            return
        except Exception as error:
            log.error("a step failed", exc_info=error)
            await _send(send, problem(Internal("the server has a defect; its log tells more"), self._rest.metrics))
            return
        lines = [(b"content-type", kind.encode()), (b"content-length", str(len(data)).encode())]
        await send({"type": _START, "status": 200, "headers": lines})
        await send({"type": _BODY, "body": data})

    async def _body(self, receive: Receive) -> bytes:
        message = await receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            parts, size = [body], len(body)
            while message.get("more_body") and size <= self._limit:
                message = await receive()
                parts.append(message.get("body", b""))
                size += len(parts[-1])
            body = b"".join(parts)
        if len(body) > self._limit:
            raise too_large(self._limit)
        if message["type"] == _GONE:
            raise Malformed("the connection was lost in the body")
        return body


async def _send(send: Send, response: Response) -> None:
    await send({"type": _START, "status": response.status_code, "headers": response.raw_headers})
    await send({"type": _BODY, "body": response.body})
