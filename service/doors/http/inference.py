"""The Open Inference Protocol over HTTP: the routes of /v2. Plain requests for inference come by connection.py."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request, Response

from stepcast.errors import Malformed, RouteNotFound

from ..answers import Headers, check_page, dumps
from ..bodies import JSON, decode
from ..intake import Intake, Share
from ..keys import Keys, Principal
from ..large import aside
from ..oip import describe
from ..oip.errors import Failure
from ..oip.infer import Inference
from ..oip.requests import served_of
from ..steps import Way
from . import received, tensor_bodies
from .envelope import address_of, respond
from .tensor_bodies import LENGTH, RAW

Handle = Callable[[Request, Principal], Awaitable[Response]]

_MODEL: Final = "/v2/models/{model}"
_VERSION: Final = _MODEL + "/versions/{version}"
_ELSEWHERE: Final = {
    "repository/models": "models are loaded and retired by DELETE /v1/models/.../versions/... and POST .../load",
    "logging": "logs are set by STEPCAST_LOG_LEVEL",
    "trace": "there is no tracing",
    "systemsharedmemory": "there is no shared memory",
    "cudasharedmemory": "there is no shared memory",
}
"""What other servers of the protocol have, and this one has not, by the beginning of its path."""
_METHODS: Final = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


class _Index(msgspec.Struct):
    ready: bool = False


class InferenceRoutes:
    """The handlers of /v2; `ready` raises where the server takes no steps."""

    def __init__(self, inference: Inference, keys: Keys, intake: Intake, ready: Callable[[], Awaitable[None]]) -> None:
        self._inference, self._keys, self._intake, self._check_ready = inference, keys, intake, ready
        self._repository, self._settings = inference.repository, inference.turns.settings
        self._metrics = inference.turns.metrics

    def install(self, api: FastAPI) -> None:
        """Add the routes to an application."""

        def add(path: str, handle: Handle, role: str | None = "read", method: str = "GET") -> None:
            api.add_api_route(path, self._handler(handle, role), methods=[method], include_in_schema=False)

        add("/v2", self._server)
        add("/v2/health/live", self._live, None)
        add("/v2/health/ready", self._ready, None)
        add("/v2/models/stats", self._stats)
        add("/v2/repository/index", self._index, method="POST")
        for path in (_MODEL, _VERSION):
            add(path, self._model)
            add(path + "/ready", self._model_ready, None)
            add(path + "/config", self._config)
            add(path + "/stats", self._stats)
            add(path + "/infer", self._infer, "step", "POST")
        rest = self._handler(self._nothing, None)
        for path in ("/v2", "/v2/{rest:path}"):
            api.add_api_route(path, rest, methods=_METHODS, include_in_schema=False)

    def _handler(self, handle: Handle, role: str | None) -> Callable[[Request], Awaitable[Response]]:
        """A handler behind the check of the key, `role` None: nobody needs one; errors as the protocol has them."""

        async def handler(request: Request) -> Response:
            try:
                headers: Headers = dict(request.scope["headers"])
                principal = _NOBODY
                if role is not None:
                    principal = self._keys.authenticate(headers, address_of(request.scope)).require(role)
                if request.method == "POST":
                    check_page(headers)
                return await handle(request, principal)
            except Exception as error:
                return respond(tensor_bodies.refusal(error, self._metrics))

        return handler

    async def _server(self, _: Request, __: Principal) -> Response:
        return _json(describe.server())

    async def _live(self, _: Request, __: Principal) -> Response:
        return _json({"live": True})

    async def _ready(self, _: Request, __: Principal) -> Response:
        await self._check_ready()
        return _json({"ready": True})

    async def _model(self, request: Request, _: Principal) -> Response:
        return _json(describe.metadata(self._repository, *_named(request)))

    async def _model_ready(self, request: Request, _: Principal) -> Response:
        served = served_of(self._repository, *_named(request))
        await self._check_ready()
        return _json({"name": served.name, "ready": True})

    async def _config(self, request: Request, _: Principal) -> Response:
        return _json(describe.config(self._repository, self._settings, *_named(request)))

    async def _stats(self, request: Request, _: Principal) -> Response:
        return _json(describe.statistics(self._inference, *_named(request)))

    async def _index(self, request: Request, principal: Principal) -> Response:
        with Share(self._intake, principal.namespace) as share:
            body = await received.read(request, min(4096, self._settings.body_limit_bytes), share)
        asked = decode(body or b"{}", _Index, JSON)
        return _json(await asyncio.to_thread(describe.index, self._repository, {"ready": asked.ready}))

    async def _infer(self, request: Request, principal: Principal) -> Response:
        headers: Headers = dict(request.scope["headers"])
        model, version = _named(request)
        served = served_of(self._repository, model, version)
        manifest, json_bytes = served.manifest, _length(headers.get(LENGTH))
        with Share(self._intake, principal.namespace) as share:
            body = await received.read(request, self._settings.body_limit_bytes, share)
            asked = await aside(len(body), tensor_bodies.read, body, json_bytes, model, version, manifest)
            answer = await self._inference.infer(Way(principal.namespace, model), asked.request)
        said, json_bytes = tensor_bodies.write(answer, asked.raw)
        fields = {} if json_bytes is None else {LENGTH.decode(): str(json_bytes)}
        packing = tensor_bodies.packing_of(headers.get(b"accept-encoding", b""))
        packed = packing.pack(said)
        if packed is not None:
            said, fields["content-encoding"] = packed, packing.coding
        return Response(said, 200, fields, JSON if json_bytes is None else RAW)

    async def _nothing(self, request: Request, _: Principal) -> Response:
        path = request.url.path
        rest = path.removeprefix("/v2/")
        why = next((why for start, why in _ELSEWHERE.items() if rest.startswith(start)), None)
        if why is not None:
            return respond(tensor_bodies.failed(Failure("UNIMPLEMENTED", why, RouteNotFound(why))))
        raise RouteNotFound(f"there is nothing at {request.method} {path!r}", path=path)


_NOBODY: Final = Principal("", "read")


def _named(request: Request) -> tuple[str, str]:
    """The model and the version of a path; "": none."""
    path = request.path_params
    return path.get("model", ""), path.get("version", "")


def _json(document: Any) -> Response:
    return Response(dumps(document), media_type=JSON)


def _length(value: bytes | None) -> int | None:
    """The length of the JSON part by its header."""
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise Malformed(f"header {LENGTH.decode()} is not a number of bytes")
    return int(value)
