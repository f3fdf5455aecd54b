"""What all requests and answers of the general way have in common: request ids, HEAD as GET, a trailing slash."""

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..request_ids import HEADER, given_id, new_id

REQUEST_ID: Final = "stepcast.request_id"  # in the scope
_STARTS: Final = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


class Envelope:
    """ASGI: hands requests to `http` and `websocket`, as they would be if all clients wrote them in the same way."""

    def __init__(self, http: ASGIApp, websocket: ASGIApp) -> None:
        self._http, self._websocket = http, websocket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, a socket, or the server's life."""
        if scope["type"] == "lifespan":
            return await self._http(scope, receive, send)
        name = given_id(dict(scope["headers"]).get(HEADER, b"")) or new_id()

        async def stamped(message: Message) -> None:
            if message["type"] in _STARTS:
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, name)]}
            await send(message)

        # The server below leaves the body away where the method was HEAD.
        plain = {**scope, "path": scope["path"].rstrip("/") or "/", REQUEST_ID: name.decode()}
        if scope["type"] == "websocket":
            return await self._websocket(plain, receive, stamped)
        if scope["method"] == "HEAD":
            plain["method"] = "GET"
        await self._http(plain, receive, stamped)
