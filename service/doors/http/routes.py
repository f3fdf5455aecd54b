"""Native HTTP: the routes of /v1, made from the verbs; steps that connection.py leaves to FastAPI; errors as problems.

Handlers take the raw request, FastAPI's own machinery stays out of the way. What is HTTP's own is here: paths, status
codes, entity tags, files.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from stepcast.errors import BadRequest, MethodNotAllowed, RouteNotFound, StepcastError

from ...telemetry import Metrics, as_ours, log
from .. import bodies, state_files
from ..answers import FILES, Headers, answer_type, check_page, encode, problem, request_type
from ..bodies import JSON
from ..intake import Intake, Share
from ..keys import Keys, Principal
from ..large import aside
from ..steps import Axes, HttpWaiter, Steps, Way
from ..verbs import VERBS, Call
from . import openapi, received
from .envelope import REQUEST_ID, address_of, respond

Handler = Callable[[Request], Awaitable[Response]]


class Route(NamedTuple):
    """A verb's address; `queries` are the fields of its body that come in the query."""

    method: str
    path: str
    verb: str
    status: int = 200
    queries: tuple[str, ...] = ()


_MODEL: Final = "/models/{model}"
_SESSION: Final = _MODEL + "/sessions/{session}"
ROUTES: Final = (
    Route("GET", "/models", "models"),
    Route("GET", _MODEL, "model"),
    Route("GET", _MODEL + "/versions/{version}", "version"),
    Route("DELETE", _MODEL + "/versions/{version}", "retire", queries=("force",)),
    Route("POST", _MODEL + "/versions/{version}/load", "load"),
    Route("POST", _MODEL + "/predict", "predict", queries=("version",)),
    Route("POST", _MODEL + "/sessions", "create", 201),
    Route("GET", _MODEL + "/sessions", "list", queries=("prefix", "cursor", "limit")),
    Route("GET", _SESSION, "info"),
    Route("DELETE", _SESSION, "end", 204),
    Route("GET", _SESSION + "/state", "state.get"),
    Route("PUT", _SESSION + "/state", "state.set"),
    Route("DELETE", _SESSION + "/state", "clear"),
    Route("GET", _SESSION + "/state/{layer}", "state.get"),
    Route("PUT", _SESSION + "/state/{layer}", "state.set"),
    Route("POST", _SESSION + "/fork", "fork", 201),
    Route("POST", _SESSION + "/checkpoints", "checkpoint", 201),
    Route("GET", _SESSION + "/checkpoints", "checkpoints"),
    Route("POST", _SESSION + "/rewind", "rewind"),
    Route("POST", _SESSION + "/rollout", "rollout"),
)


class Pending(HttpWaiter):
    """One that waits in a coroutine: `future` gets the body."""

    __slots__ = ("future",)

    stays = False

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.form: Axes = "F"
        self.future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def done(self) -> bool:
        return self.future.done()

    def answered(self, body: bytes) -> None:
        if not self.future.done():
            self.future.set_result(body)

    def refused(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Routes:
    """The handlers of /v1."""

    def __init__(self, steps: Steps, keys: Keys, intake: Intake, metrics: Metrics) -> None:
        self._steps, self._states, self._metrics = steps, steps.states, metrics
        self._keys, self._intake = keys, intake
        self._limit = steps.states.settings.body_limit_bytes

    def install(self, api: FastAPI) -> None:
        """Add the routes with their OpenAPI to an application, and answer every error with a problem document."""

        def add(route: Route, body: type[msgspec.Struct], handler: Handler, text: str | None) -> None:
            described = openapi.describe(*route, body, text or "")
            api.add_api_route("/v1" + route.path, handler, methods=[route.method], **described)

        for route in ROUTES:
            verb = VERBS[route.verb]
            add(route, verb.body, self._handler(route), verb.run.__doc__)
        one, many = Route("POST", _SESSION + "/step", "step"), Route("POST", _MODEL + "/step", "batch")
        add(one, bodies.StepBody, self._step, "Advance a session by one or more steps (rnnTimeStep).")
        add(many, bodies.BatchBody, self._step, "Advance many sessions by one step each.")
        api.add_exception_handler(StepcastError, self._on_error)
        api.add_exception_handler(HTTPException, self._on_http)
        api.add_exception_handler(Exception, self._on_error)

    def _handler(self, route: Route) -> Handler:
        verb, files = VERBS[route.verb], route.verb in ("state.get", "state.set") and "{layer}" not in route.path
        sent = route.method in ("POST", "PUT")

        async def handle(request: Request) -> Response:
            headers: Headers = dict(request.scope["headers"])
            principal = self._admit(request, headers, verb.role)
            kind = request_type(headers, files and sent)
            if not sent:
                return await answer(request, headers, principal, kind, b"")
            check_page(headers)
            with Share(self._intake, principal.namespace) as share:
                body = await received.read(request, self._limit, share)
                return await answer(request, headers, principal, kind, body)

        async def answer(request: Request, headers: Headers, principal: Principal, kind: str, body: bytes) -> Response:
            path = request.path_params
            if kind in FILES:
                asked = await aside(len(body), _from_file, body, kind, self._limit, verb.body)
            else:
                asked = await aside(len(body), bodies.decode, body or b"{}", verb.body, kind if body else JSON)
            _fill(asked, request, route.queries)
            match = request.headers.get("if-match")
            call = Call(principal.namespace, path.get("model", ""), path.get("session", ""), asked, kind, match)
            if verb.role == "admin":
                log.info("%s by key %r", _told(request), principal.name)
            fields, tag = await verb.run(self._states, call)
            if route.status == 204:
                return Response(status_code=204)
            accepted = answer_type(headers, kind, files)
            data = state_files.export(fields, accepted) if accepted in FILES else encode(fields, accepted)
            return Response(data, route.status, {} if tag is None else {"etag": tag}, accepted)

        return handle

    async def _step(self, request: Request) -> Response:
        headers: Headers = dict(request.scope["headers"])
        principal = self._admit(request, headers, "step")
        kind, path = request_type(headers), request.path_params
        check_page(headers)
        way, pending = Way(principal.namespace, path["model"]), Pending(answer_type(headers, kind))
        with Share(self._intake, principal.namespace) as share:
            body = await received.read(request, self._limit, share)
            if "session" in path:
                self._steps.take(way, path["session"], body, kind, pending)
            else:
                self._steps.take_many(way, body, kind, pending)
            return Response(await pending.future, 200, None, pending.kind)

    def _admit(self, request: Request, headers: Headers, role: str) -> Principal:
        """The caller, before anything of the body is read; raises what it is refused with."""
        return self._keys.authenticate(headers, address_of(request.scope)).require(role)

    async def _on_error(self, request: Request, error: Exception) -> Response:
        ours = as_ours(error, f"the server has a defect at {_told(request)}; its log tells more")
        return respond(problem(ours, self._metrics))

    async def _on_http(self, request: Request, error: Any) -> Response:
        path = request.url.path
        ours: StepcastError = BadRequest(str(error.detail))
        if error.status_code == 404:
            ours = RouteNotFound(f"there is nothing at {path!r}", path=path)
        elif error.status_code == 405:
            ours = MethodNotAllowed(f"{path!r} does not take {request.method}")
        response = await self._on_error(request, ours)
        response.headers.update(error.headers or {})
        return response


def _from_file(body: bytes, kind: str, limit: int, struct: type[msgspec.Struct]) -> msgspec.Struct:
    """The body of a state put that a file stands for."""
    fields = state_files.read(body, kind, limit)
    state = fields.pop("state")
    asked = bodies.convert({**fields, "state": {}}, struct, "the file")
    asked.state = state  # type: ignore[attr-defined]  # arrays, not parts of a body
    return asked


def _told(request: Request) -> str:
    """What logs say of a request."""
    return f"{request.method} {quote(request.url.path)} (request {request.scope.get(REQUEST_ID)})"


def _fill(asked: Any, request: Request, queries: tuple[str, ...]) -> None:
    """Fields that come in the path or the query; they are text."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(type(asked))}
    path, query = request.path_params, request.query_params
    for where, given, names in (("path", path, ("layer", "version")), ("query", query, queries)):
        for name in names:
            if name in given:
                what = f"{where} parameter {name!r}"
                setattr(asked, name, bodies.convert(given[name], kinds[name], what, strict=False))
