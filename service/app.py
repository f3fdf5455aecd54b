"""The only place that wires rooms together: settings in, an ASGI application out; lifespan and drain."""

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware

import stepcast
from stepcast.errors import ConfigError, ManifestError, NotReady, StepcastError
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
from .doors.steps import Steps, Way
from .doors.streams.consumer import Consumer
from .doors.websocket.handshake import Handshake, Receive, Scope, Send
from .engine.repository import Repository
from .records.block import Outbox
from .sessions.edits import States
from .sessions.lanes import check_streams
from .sessions.turns import Sessions
from .settings import Settings
from .store.streams import StreamPlace
from .store.urls import StoreOptions, open_sink, open_source, open_store
from .store.write_behind import BehindStore
from .telemetry import CONTENT_TYPE, WORKERS, Metrics, Scrape, log

if TYPE_CHECKING:
    from .doors.grpc.door import GrpcDoor


class Rooms:
    """The rooms that step sessions, wired together, and their life; a door comes on top."""

    def __init__(self, settings: Settings, freezes: bool) -> None:
        self.settings, self._freezes, self.ready = settings, freezes, False
        self.metrics = Metrics()
        self._scrape = Scrape(self.metrics, self._gauge, os.environ.get(WORKERS))
        self.repository = Repository(
            settings.models,
            device=settings.device,
            threads=settings.threads,
            resident_bytes=settings.resident_bytes,
            batch_rows=settings.batch_rows,
        )
        self.store = open_store(settings.store, durability=settings.durability, options=self.options)
        self.sessions = Sessions(self.repository, self.store, settings, self.metrics)
        self.steps = Steps(States(self.sessions))

    @property
    def options(self) -> StoreOptions:
        """What the settings say of stores."""
        settings, timeout = self.settings, self.settings.store_timeout_s
        return StoreOptions(
            interval_s=settings.flush_interval_s,
            replicas=settings.replicas,
            replica_timeout_s=timeout / 2,
            connect_timeout_s=timeout / 2,
            reply_timeout_s=timeout,
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
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
        polls = [asyncio.create_task(poll) for poll in self._polls()]
        if self._freezes:
            gc.collect()
            gc.freeze()
        try:
            async with self._door():
                self._set_ready(True)
                yield
                self._set_ready(False)
        finally:
            self._set_ready(False)
            for poll in polls:
                poll.cancel()
            self._scrape.close()
            drain_s = self.settings.drain_s
            try:
                async with asyncio.timeout(drain_s):
                    await self.sessions.drain()
            except TimeoutError:
                log.error("steps were still waiting after %s s of draining; they were not answered", drain_s)

    def _polls(self) -> list[Coroutine[Any, Any, None]]:
        """What goes on beside."""
        return [self._poll(), self.sessions.quotas.watch()]

    @contextlib.asynccontextmanager
    async def _door(self) -> AsyncIterator[None]:
        """Open what steps come in by, close it before the rooms."""
        yield

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

    def _probes(self, api: FastAPI) -> None:
        """Add the routes of operations."""
        for path, handler, kind, text in (
            ("/healthz/live", self._live, JSON, "Whether the process answers."),
            ("/healthz/ready", self._ready, JSON, "Whether models are proved and the store takes writes."),
            ("/metrics", self._metrics, "text/plain", "Metrics in Prometheus' format."),
        ):
            api.add_api_route(path, handler, **describe_probe(path.strip("/").replace("/", "_"), kind, text))

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


class Server(Rooms):
    """One server: its rooms, its FastAPI application. By `heads`, connections below ASGI find the steps."""

    def __init__(self, settings: Settings, freezes: bool) -> None:
        super().__init__(settings, freezes)
        keys = self._keys = Keys(settings.api_keys, settings.api_keys_file, settings.tries_limit)
        self.inference = Inference(self.steps)
        hosts, intake = Hosts(settings.hosts, keys.needed), Intake(settings.intake_bytes, settings.tenant_intake_bytes)
        self.heads = Heads(self.steps, self.inference, keys, hosts, intake, settings, self.metrics)
        sockets = Handshake(self.steps, keys, intake, settings, self.metrics)
        v2 = InferenceRoutes(self.inference, keys, intake, self.check_ready)
        self.api = self._api(Routes(self.steps, keys, intake, self.metrics), v2)
        self._envelope = Envelope(self.api, sockets, hosts, self.metrics)
        self.grpc: GrpcDoor | None = None
        if settings.grpc_port is not None:
            door = load(f"{__package__}.doors.grpc.door", "service,grpc").GrpcDoor
            self.grpc = door(self.inference, keys, intake, settings, self.metrics, self.check_ready)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._envelope(scope, receive, send)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        try:
            async with super().lifespan(app):
                yield
        finally:
            if self.grpc is not None:
                await self.grpc.close()

    @contextlib.asynccontextmanager
    async def _door(self) -> AsyncIterator[None]:
        if self.grpc is not None:
            await self.grpc.open()
        yield
        if self.grpc is not None:
            await self.grpc.drain()

    def _polls(self) -> list[Coroutine[Any, Any, None]]:
        return [*super()._polls(), self._keys.watch()]

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
        self._probes(api)
        if docs:
            pages.install(api, self._keys.needed)
        return api


@dataclass(frozen=True)
class Consuming:
    """What a consumer reads and tells: streams at `url` and `sink_url` (None: where the sessions are)."""

    model: str
    place: StreamPlace
    url: str | None = None
    sink_url: str | None = None
    namespace: str = "default"
    most: int = 4096  # entries in hand


class ConsumerApp(Rooms):
    """One consumer of a stream: its rooms, and an application of probes and metrics."""

    def __init__(self, settings: Settings, consuming: Consuming, freezes: bool) -> None:
        super().__init__(settings, freezes)
        if self.store.volatile or isinstance(self.store, BehindStore):
            text = "how far a stream was read lies in the sessions' records, which this store can lose"
            raise ConfigError(f"store {settings.store!r} at durability {settings.durability!r}: {text}. Take another.")
        self._consuming, place = consuming, consuming.place
        url = consuming.url or settings.store
        sink_url = consuming.sink_url or url
        self.told_together = self.store.tells and settings.store == url == sink_url
        options = replace(self.options, durability=settings.durability)
        self._source, self._sink = open_source(url, place, options), open_sink(sink_url, place, options)
        outbox = Outbox(place.sink.encode(), place.group.encode(), place.keep, place.deletes)
        self.consumer = Consumer(
            self.steps,
            Way(consuming.namespace, consuming.model),
            self._source,
            self._sink,
            outbox if self.told_together else None,
            min(consuming.most, settings.queue_limit),
            self.metrics,
        )
        self._api = FastAPI(lifespan=self.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        self._probes(self._api)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._api(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _door(self) -> AsyncIterator[None]:
        check_streams(self.repository.live(self._consuming.model))
        try:
            await self._sink.open()
            await self._source.open()
            reading = asyncio.create_task(self.consumer.run())
            reading.add_done_callback(_stop_if_it_failed)
            try:
                yield
            finally:
                reading.cancel()
                await asyncio.wait([reading])
                await self.consumer.stop(self.settings.drain_s)
        finally:
            await self._source.close()
            await self._sink.close()

    async def _metrics(self) -> Response:
        await self.consumer.gauge()
        return await super()._metrics()


def _stop_if_it_failed(reading: asyncio.Task[None]) -> None:
    """A consumer that cannot read any more ends its process: whoever started it starts another."""
    if not reading.cancelled() and (error := reading.exception()) is not None:
        log.critical("the consumer stops reading", exc_info=error)
        signal.raise_signal(signal.SIGTERM)


def create_app(settings: Settings, *, freezes: bool = False) -> Server:
    """A server as an ASGI application; ConfigError where a setting is wrong.

    With `freezes` the process is its own: what was made until it is ready is never looked at by the cycle collector,
    which would stop all steps for some 20 ms each time.
    """
    return Server(settings, freezes)


def from_environ() -> Server:
    """A server configured by STEPCAST_ variables alone; what worker processes start."""
    return create_app(Settings.read(os.environ), freezes=True)
