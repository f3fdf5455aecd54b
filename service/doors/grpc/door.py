"""The methods of the Open Inference Protocol over gRPC, on the sessions of every other door."""

import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import grpc
from google.protobuf.json_format import ParseDict

from stepcast.errors import NotFound, StepcastError

from ...settings import Settings
from ...telemetry import Metrics
from ..intake import Intake, Share
from ..keys import Keys
from ..oip import describe
from ..oip.infer import Inference
from ..steps import Way
from . import requests
from .burst import Burst
from .callers import Callers, Context, Method
from .messages import STREAM, InferResponse, message
from .server import GrpcServer, parsed, unary
from .stream import LARGE_BYTES, Stream

KNOWN_WAYS: Final = 1024

Document = Callable[[Any], dict[str, Any]]


class GrpcDoor:
    """The door: its methods, and the server that they are called by.

    Args:
        ready: Raises a StepcastError while the server takes no steps.
    """

    def __init__(
        self,
        inference: Inference,
        keys: Keys,
        intake: Intake,
        settings: Settings,
        metrics: Metrics,
        ready: Callable[[], Awaitable[None]],
    ) -> None:
        self._inference, self._settings, self._metrics, self._ready = inference, settings, metrics, ready
        self._intake = intake
        self._callers, self._burst = Callers(keys, metrics), Burst(inference)
        self._ways: dict[tuple[str, str], Way] = {}
        self._streams: set[Stream] = set()
        self._draining = False
        self._server = GrpcServer(settings, self._callers, self._methods(), ready)

    @property
    def port(self) -> int:
        """The port that is open."""
        return self._server.port

    async def open(self) -> None:
        """Listen; ConfigError where that cannot be."""
        await self._server.open()

    async def drain(self) -> None:
        """Let streams answer what they have taken, and end; refuse new steps."""
        self._draining = True
        await self._server.drain()
        for stream in self._streams:
            stream.drain()

    async def close(self) -> None:
        """End all calls; those that are under way have a moment for their last message."""
        await self._server.close(min(1.0, self._settings.drain_s))

    def _methods(self) -> dict[str, Any]:
        repository, settings = self._inference.repository, self._settings
        documents: dict[str, Document] = {
            "ServerMetadata": lambda _: describe.server(),
            "ModelMetadata": lambda asked: describe.metadata(repository, asked.name, asked.version),
            "ModelConfig": lambda asked: {"config": describe.config(repository, settings, asked.name, asked.version)},
            "ModelStatistics": lambda asked: describe.statistics(self._inference, asked.name, asked.version),
            "RepositoryIndex": lambda asked: {"models": describe.index(repository, {"ready": asked.ready})},
        }
        methods: dict[str, Method] = {
            "ServerLive": self._live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ModelInfer": self._infer,
            **{name: partial(self._document, name, document) for name, document in documents.items()},
        }
        handlers = {name: unary(self._callers, method) for name, method in methods.items()}
        handlers[STREAM] = grpc.stream_stream_rpc_method_handler(self._callers.answered(self._stream))
        return handlers

    async def _document(self, name: str, document: Document, data: bytes, context: Context) -> Any:
        """Answer a method that describes something to who may read."""
        asked = parsed(message(f"{name}Request"), data)
        self._callers.of(context, "read")
        return ParseDict(document(asked), message(f"{name}Response")())

    async def _live(self, data: bytes, _: Context) -> Any:
        parsed(message("ServerLiveRequest"), data)
        return message("ServerLiveResponse")(live=True)

    async def _server_ready(self, data: bytes, _: Context) -> Any:
        parsed(message("ServerReadyRequest"), data)
        return message("ServerReadyResponse")(ready=await self._is_ready())

    async def _model_ready(self, data: bytes, _: Context) -> Any:
        """Whether a model, or one of its versions, takes steps now."""
        asked = parsed(message("ModelReadyRequest"), data)
        with contextlib.suppress(NotFound):
            describe.metadata(self._inference.repository, asked.name, asked.version)
            return message("ModelReadyResponse")(ready=await self._is_ready())
        return message("ModelReadyResponse")(ready=False)

    async def _is_ready(self) -> bool:
        try:
            await self._ready()
        except StepcastError:
            return False
        return True

    async def _infer(self, data: bytes, context: Context) -> Any:
        principal = self._callers.of(context, "step")
        request = requests.read(data)
        key = principal.namespace, request.model
        way = self._ways.get(key)
        if way is None:
            if len(self._ways) >= KNOWN_WAYS:
                self._ways.clear()
            way = self._ways[key] = Way(*key)
        response = InferResponse()
        with Share(self._intake, principal.namespace) as share:
            if len(data) > LARGE_BYTES:
                share.hold(len(data))
            requests.write(response, await self._burst.infer(way, request))
        return response

    async def _stream(self, _: Any, context: Context) -> None:
        principal = self._callers.of(context, "step")
        repository, settings = self._inference.repository, self._settings
        share = Share(self._intake, principal.namespace)
        stream = Stream(self._burst, repository, principal.namespace, share, context, settings, self._metrics)
        self._streams.add(stream)
        if self._draining:
            stream.drain()
        try:
            with share, self._metrics.grpc_streams.track_inprogress():
                await stream.run()
        finally:
            self._streams.discard(stream)
