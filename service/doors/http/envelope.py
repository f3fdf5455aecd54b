"""What all requests and answers of the general way have in common: request ids, HEAD as GET, a trailing slash, and a
name of ours that they were sent to."""

from typing import Final

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepcast.errors import UnknownHost

from ...telemetry import Metrics
from ..answers import Answer, problem
from ..hosts import Hosts
from ..request_ids import HEADER, given_id, new_id

REQUEST_ID: Final = "stepcast.request_id"  # in the scope
_PROBES: Final = "/healthz/"
"""What balancers ask by any name, and pages learn nothing from."""
_STARTS: Final = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


class Envelope:
    """ASGI: hands requests to `http` and `websocket`, as they would be if all clients wrote them in the same way."""

    def __init__(self, http: ASGIApp, websocket: ASGIApp, hosts: Hosts, metrics: Metrics) -> None:
        self._http, self._websocket, self._hosts, self._metrics = http, websocket, hosts, metrics

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
        try:
            if not plain["path"].startswith(_PROBES):
                for field, value in scope["headers"]:
                    if field == b"host":
                        self._hosts.check(value)
        except UnknownHost as error:
            return await respond(problem(error, self._metrics))(scope, receive, stamped)
        if scope["type"] == "websocket":
            return await self._websocket(plain, receive, stamped)
        if scope["method"] == "HEAD":
            plain["method"] = "GET"
        await self._http(plain, receive, stamped)


def respond(answer: Answer) -> Response:
    """An answer for FastAPI."""
    return Response(answer.body, answer.status, answer.fields, answer.kind)


def address_of(scope: Scope) -> str:
    """The address that a request came from."""
    client = scope.get("client")
    return client[0] if client else ""
