"""The gRPC server in the service's own loop and process: its port, TLS, limits, health, reflection, and its end."""

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from stepcast.errors import ConfigError, Malformed, StepcastError

from ...settings import Settings
from .callers import Callers, Context, Method
from .messages import POOL, SERVICE

KEEPALIVE_MS: Final = 20_000
"""How long a connection may be silent before the server pings it, and how long the answer may take."""
CLIENT_PING_MS: Final = 5_000
"""How often a client may ping."""
STREAMS: Final = 1024
"""Calls under way on one connection; a client's library holds back what is more."""
HEALTH: Final = health.SERVICE_NAME
REFLECTION: Final = reflection.SERVICE_NAME

for _file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
    POOL.Add(FileDescriptorProto.FromString(_file.serialized_pb))


class GrpcServer:
    """A port that speaks gRPC.

    Args:
        settings: Host, port, TLS files, limits.
        callers: Tell errors.
        methods: Of our own service, by name: handlers of grpc.
        ready: Raises a StepcastError while the server takes no steps.

    Attributes:
        port: The one that is open.
    """

    def __init__(
        self, settings: Settings, callers: Callers, methods: dict[str, Any], ready: Callable[[], Awaitable[None]]
    ) -> None:
        self._settings, self._callers, self._methods, self._ready = settings, callers, methods, ready
        self._health = health.aio.HealthServicer()
        self._server: Any = None
        self.port = 0

    async def open(self) -> None:
        """Listen; ConfigError where the port cannot be had, or the TLS files are none."""
        settings = self._settings
        credentials = credentials_of(settings)
        self._server = server = grpc.aio.server(options=_options(settings))
        services = {SERVICE: self._methods, HEALTH: self._health_methods()}
        if settings.docs:
            services[REFLECTION] = self._reflection_methods([*services, REFLECTION])
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(*each) for each in services.items()])
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.grpc_port or 0}"
        try:
            if credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            text = f"cannot listen on {address} for gRPC: the port is taken, or the address not this machine's"
            raise ConfigError(text) from error
        await server.start()
        await self._say(True)

    async def drain(self) -> None:
        """Tell those who watch that this server takes nothing more; calls go on."""
        await self._say(False)

    async def close(self, grace_s: float) -> None:
        """Take no more calls, and end those that are under way after `grace_s` seconds."""
        if self._server is not None:
            await self._server.stop(grace_s)

    async def _say(self, serving: bool) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, _status(serving))

    async def _check(self, request: Any, context: Context) -> Any:
        """Whether the service serves now, its store included; other names are unknown."""
        if request.service not in ("", SERVICE):
            return await self._health.Check(request, context)
        try:
            await self._ready()
        except StepcastError:
            return health_pb2.HealthCheckResponse(status=_status(False))
        return health_pb2.HealthCheckResponse(status=_status(True))

    def _health_methods(self) -> dict[str, Any]:
        read = partial(parsed, health_pb2.HealthCheckRequest)

        async def check(data: bytes, context: Context) -> Any:
            return await self._check(read(data), context)

        async def watch(data: bytes, context: Context) -> None:
            await self._health.Watch(read(data), context)

        stream = grpc.unary_stream_rpc_method_handler(self._callers.answered(watch), response_serializer=written)
        return {"Check": unary(self._callers, check), "Watch": stream}

    def _reflection_methods(self, services: list[str]) -> dict[str, Any]:
        servicer = reflection.aio.ReflectionServicer(services, pool=POOL)

        async def info(data: AsyncIterator[bytes], context: Context) -> None:
            async def requests() -> AsyncIterator[Any]:
                async for each in data:
                    yield parsed(reflection_pb2.ServerReflectionRequest, each)

            async for answer in servicer.ServerReflectionInfo(requests(), context):
                await context.write(answer)

        stream = grpc.stream_stream_rpc_method_handler(self._callers.answered(info), response_serializer=written)
        return {"ServerReflectionInfo": stream}


def unary(callers: Callers, method: Method) -> Any:
    """The handler of a method that takes a message's bytes and gives a message; its errors are told by `callers`."""
    return grpc.unary_unary_rpc_method_handler(callers.answered(method), response_serializer=written)


def parsed(kind: Any, data: bytes) -> Any:
    """A message; Malformed where the bytes are none."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise Malformed(f"the bytes are not a {kind.DESCRIPTOR.full_name}") from error


def written(message: Any) -> bytes:
    """A message's bytes."""
    data: bytes = message.SerializeToString()
    return data


def credentials_of(settings: Settings) -> Any:
    """TLS as the settings say it; None: none. ConfigError where a file cannot be read."""
    if not settings.ssl_certfile:
        return None
    try:
        chain = Path(settings.ssl_certfile).read_bytes()
        key = Path(settings.ssl_keyfile or settings.ssl_certfile).read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS for gRPC: {error}") from error
    return grpc.ssl_server_credentials([(key, chain)])


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.body_limit_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", STREAMS),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", CLIENT_PING_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", int(settings.workers > 1)),
    ]


def _status(serving: bool) -> Any:
    kinds = health_pb2.HealthCheckResponse
    return kinds.SERVING if serving else kinds.NOT_SERVING
