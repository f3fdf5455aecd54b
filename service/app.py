"""The only place that wires rooms together: settings in, an ASGI application out; lifespan and drain."""

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

import stepcast
from stepcast.errors import (
    BadRequest,
    Internal,
    InvalidRequest,
    ManifestError,
    MethodNotAllowed,
    NotReady,
    RouteNotFound,
    StepcastError,
)

from . import telemetry
from .doors.http.heads import FastDoor
from .doors.http.routes import Rest, problem
from .doors.keys import Keys
from .doors.websocket.conversation import WebSocketDoor
from .engine.repository import Repository
from .sessions.edits import States
from .sessions.turns import Sessions
from .settings import Settings
from .store.urls import StoreOptions, open_store
from .store.write_behind import BehindStore
from .telemetry import Metrics, log

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Server:
    """One server: its rooms, its FastAPI application, its life. Call it as an ASGI application."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.keys = Keys(settings.api_keys)
        self.repository = Repository(
            settings.models,
            device=settings.device,
            threads=settings.threads,
            resident_bytes=settings.resident_bytes,
        )
        timeout = settings.store_timeout_s
        options = StoreOptions(
            interval_s=settings.flush_interval_s,
            replicas=settings.replicas,
            replica_timeout_s=timeout / 2,
            connect_timeout_s=timeout / 2,
            reply_timeout_s=timeout,
        )
        self.store = open_store(settings.store, durability=settings.durability, options=options)
        self.sessions = Sessions(self.repository, self.store, settings, self.metrics)
        self.states = States(self.sessions)
        self.rest = Rest(self.states, self.keys)
        self.ready = False
        self.freezes = False
        self.api = self._api()
        self.door = FastDoor(self.rest, WebSocketDoor(self.rest), self.api)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.door(scope, receive, send)

    # --- life ---------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Open the store, prove the models, serve; at the end drain.

        Raises:
            ManifestError: there is no model to serve. StoreUnavailable: the store can not be opened.
        """
        await self.store.open()
        if self.store.volatile:
            log.warning("store %s is volatile: a restart forgets every session", self.settings.store)
        await asyncio.to_thread(self.repository.scan)
        if not self.repository.names():
            raise ManifestError(f"no model in {str(self.settings.models)!r} can be served: {self.repository.failures}")
        poll = asyncio.create_task(self._poll())
        if self.freezes:
            gc.collect()
            gc.freeze()
        self.set_ready(True)
        try:
            yield
        finally:
            self.set_ready(False)
            poll.cancel()
            await self.drain()

    async def drain(self) -> None:
        """Unready; answer what was accepted, within drain_s; close the store. Idempotent."""
        self.set_ready(False)
        try:
            async with asyncio.timeout(self.settings.drain_s):
                await self.sessions.drain()
        except TimeoutError:
            log.error("steps were still waiting after %s s of draining; they were not answered", self.settings.drain_s)

    def set_ready(self, ready: bool) -> None:
        """What /healthz/ready answers from now on."""
        self.ready = ready
        self.metrics.ready.set(ready)

    async def _poll(self) -> None:
        """Look for new versions."""
        while self.settings.repository_poll_s:
            await asyncio.sleep(self.settings.repository_poll_s)
            try:
                await asyncio.to_thread(self.repository.scan)
            except ManifestError as error:
                log.error("%s", error)

    # --- the FastAPI application --------------------------------------------------------------------------------

    def _api(self) -> FastAPI:
        docs = self.settings.docs
        api = FastAPI(
            title="Stepcast",
            version=stepcast.__version__,
            summary="Recurrent networks, one step at a time. A session is data, not a process.",
            lifespan=self.lifespan,
            docs_url="/docs" if docs else None,
            redoc_url=None,
            redirect_slashes=False,
            openapi_url="/openapi.json" if docs else None,
        )
        origins = [origin for origin in self.settings.cors_origins.split(",") if origin]
        if origins:
            api.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        api.include_router(self.rest.router())
        api.add_api_route("/healthz/live", self._live, methods=["GET"], include_in_schema=False)
        api.add_api_route("/healthz/ready", self._ready, methods=["GET"], include_in_schema=False)
        api.add_api_route("/metrics", self._metrics, methods=["GET"], include_in_schema=False)
        api.add_exception_handler(StepcastError, self._on_ours)
        api.add_exception_handler(HTTPException, self._on_http)
        api.add_exception_handler(RequestValidationError, self._on_validation)
        api.add_exception_handler(Exception, self._on_defect)
        return api

    async def _live(self) -> Response:
        return Response(b'{"live":true}', media_type="application/json")

    async def _ready(self) -> Response:
        if not self.ready:
            return problem(NotReady("the server is starting or draining", retry_after_s=1.0))
        try:
            await self.store.ping()
        except StepcastError as error:
            return problem(error)
        return Response(b'{"ready":true}', media_type="application/json")

    async def _metrics(self) -> Response:
        self.sessions.gauge()
        if isinstance(self.store, BehindStore):
            self.metrics.dropped.set(self.store.dropped)
        return Response(self.metrics.text(), media_type=telemetry.CONTENT_TYPE)

    async def _on_ours(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, StepcastError)
        return problem(error, self.metrics)

    async def _on_http(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 404:
            return problem(RouteNotFound(f"there is nothing at {path!r}", path=path), self.metrics)
        if error.status_code == 405:
            response = problem(MethodNotAllowed(f"{path!r} does not take {request.method}"), self.metrics)
            response.headers.update(error.headers or {})
            return response
        return problem(BadRequest(str(error.detail)), self.metrics)

    async def _on_validation(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return problem(InvalidRequest(f"{where}: {first['msg']}"), self.metrics)

    async def _on_defect(self, request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(Internal("the server has a defect; its log tells more"), self.metrics)


def create_app(settings: Settings, *, freezes: bool = False) -> Server:
    """A server as an ASGI application.

    Args:
        freezes: The process is its own: what was made until it is ready is never looked at by the cycle collector,
            which would stop all steps for some 20 ms each time.

    Raises:
        ConfigError: a setting is wrong.
    """
    server = Server(settings)
    server.freezes = freezes
    return server


def from_environ() -> Server:
    """A server configured by STEPCAST_ variables alone; what worker processes start."""
    return create_app(Settings.read(os.environ), freezes=True)
