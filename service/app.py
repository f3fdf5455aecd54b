"""The only place that wires rooms together: settings in, an ASGI application out; lifespan and drain."""

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware

import stepcast
from stepcast.errors import ManifestError, NotReady, StepcastError
from stepcast.rooms import load

from .doors.answers import problem
from .doors.bodies import JSON
from .doors.hosts import Hosts
from .doors.http import pages
from .doors.http.envelope import Envelope, respond
from .doors.http.heads import Heads
from .doors.http.inference import InferenceRoutes
from .doors.http.openapi import describe_probe
from .doors.http.routes import Routes
from .doors.intake import Intake
from .doors.keys import Keys, origins
from .doors.oip.infer import Inference
from .doors.steps import Steps
from .doors.websocket.handshake import Handshake, Receive, Scope, Send
from .engine.repository import Repository
from .sessions.edits import States
from .sessions.turns import Sessions
from .settings import Settings
from .store.urls import StoreOptions, open_store
from .store.write_behind import BehindStore
from .telemetry import CONTENT_TYPE, WORKERS, Metrics, Scrape, log

if TYPE_CHECKING:
    from .doors.grpc.door import GrpcDoor


class Server:
    """One server: its rooms, its FastAPI application, its life. By `heads`, connections below ASGI find the steps."""

    def __init__(self, settings: Settings, freezes: bool) -> None:
        self.settings, self._freezes, self.ready = settings, freezes, False
        self.metrics = Metrics()
        self._scrape = Scrape(self.metrics, self._gauge, os.environ.get(WORKERS))
        keys = self._keys = Keys(settings.api_keys, settings.api_keys_file, settings.tries_limit)
        self.repository = Repository(
            settings.models,
            device=settings.device,
            threads=settings.threads,
            resident_bytes=settings.resident_bytes,
            batch_rows=settings.batch_rows,
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
        steps = Steps(States(self.sessions))
        self.inference = Inference(steps)
        hosts, intake = Hosts(settings.hosts, keys.needed), Intake(settings.intake_bytes, settings.tenant_intake_bytes)
        self.heads = Heads(steps, self.inference, keys, hosts, intake, settings, self.metrics)
        sockets = Handshake(steps, keys, intake, settings, self.metrics)
        v2 = InferenceRoutes(self.inference, keys, intake, self.check_ready)
        self.api = self._api(Routes(steps, keys, intake, self.metrics), v2)
        self._envelope = Envelope(self.api, sockets, hosts, self.metrics)
        self.grpc: GrpcDoor | None = None
        if settings.grpc_port is not None:
            door = load(f"{__package__}.doors.grpc.door", "service,grpc").GrpcDoor
            self.grpc = door(self.inference, keys, intake, settings, self.metrics, self.check_ready)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._envelope(scope, receive, send)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Open the store, prove the models, serve; at the end answer what was accepted, within drain_s.

        Raises ManifestError where there is no model to serve, StoreUnavailable where the store cannot be opened.
        """
        await self.store.open()
        if self.store.volatile:
            log.warning("store %s is volatile: a restart forgets every session", self.settings.store)
        await asyncio.to_thread(self.repository.scan)
        if not self.repository.names():
            raise ManifestError(f"no model in {str(self.settings.models)!r} can be served: {self.repository.failures}")
        await self.sessions.quotas.count()
        await self._scrape.open()
        watches = self._poll(), self._keys.watch(), self.sessions.quotas.watch()
        polls = [asyncio.create_task(watch) for watch in watches]
        if self._freezes:
            gc.collect()
            gc.freeze()
        if self.grpc is not None:
            await self.grpc.open()
        self._set_ready(True)
        try:
            yield
        finally:
            self._set_ready(False)
            if self.grpc is not None:
                await self.grpc.drain()
            for poll in polls:
                poll.cancel()
            self._scrape.close()
            drain_s = self.settings.drain_s
            try:
                async with asyncio.timeout(drain_s):
                    await self.sessions.drain()
            except TimeoutError:
                log.error("steps were still waiting after %s s of draining; they were not answered", drain_s)
            if self.grpc is not None:
                await self.grpc.close()

    def _set_ready(self, ready: bool) -> None:
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

    def _api(self, routes: Routes, v2: InferenceRoutes) -> FastAPI:
        docs = self.settings.docs
        api = FastAPI(
            title="Stepcast",
            version=stepcast.__version__,
            summary="Recurrent networks, one step at a time. A session is data, not a process.",
            lifespan=self.lifespan,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            openapi_url=None,
        )
        allowed = sorted(origins(self.settings.cors_origins))
        if allowed:
            api.add_middleware(CORSMiddleware, allow_origins=allowed, allow_methods=["*"], allow_headers=["*"])
        routes.install(api)
        v2.install(api)
        for path, handler, kind, text in (
            ("/healthz/live", self._live, JSON, "Whether the process answers."),
            ("/healthz/ready", self._ready, JSON, "Whether models are proved and the store takes writes."),
            ("/metrics", self._metrics, "text/plain", "Metrics in Prometheus' format."),
        ):
            api.add_api_route(path, handler, **describe_probe(path.strip("/").replace("/", "_"), kind, text))
        if docs:
            pages.install(api, self._keys.needed)
        return api

    async def _live(self) -> Response:
        return Response(b'{"live":true}', media_type="application/json")

    async def check_ready(self) -> None:
        """Return if the server takes steps now; raises NotReady or StoreUnavailable."""
        if not self.ready:
            raise NotReady("the server is starting or draining", retry_after_s=1.0)
        await self.store.ping()

    async def _ready(self) -> Response:
        try:
            await self.check_ready()
        except StepcastError as error:
            return respond(problem(error))
        return Response(b'{"ready":true}', media_type="application/json")

    async def _metrics(self) -> Response:
        return Response(await self._scrape.text(), media_type=CONTENT_TYPE)

    def _gauge(self) -> None:
        """Bring the gauges up to date."""
        self.sessions.gauge()
        if isinstance(self.store, BehindStore):
            self.metrics.dropped.set(self.store.dropped)


def create_app(settings: Settings, *, freezes: bool = False) -> Server:
    """A server as an ASGI application; ConfigError where a setting is wrong.

    With `freezes` the process is its own: what was made until it is ready is never looked at by the cycle collector,
    which would stop all steps for some 20 ms each time.
    """
    return Server(settings, freezes)


def from_environ() -> Server:
    """A server configured by STEPCAST_ variables alone; what worker processes start."""
    return create_app(Settings.read(os.environ), freezes=True)
