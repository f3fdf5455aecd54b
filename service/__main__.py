"""python -m service serve | consume | check | import | key: the commands of the server; `stepcast` has them too."""

import argparse
import contextlib
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvicorn
from uvicorn.supervisors import Multiprocess

from stepcast import imports
from stepcast.arguments import Parser
from stepcast.errors import ConfigError, ManifestError, StepcastError
from stepcast.rooms import example_models, load

from .app import ConsumerApp, Consuming, Server, create_app
from .doors.http.connection import HttpConnection
from .doors.keys import ROLES, new_key
from .doors.websocket.connection import WebSocketConnection
from .engine.batch_invariance import try_batches
from .engine.golden import placements
from .engine.model import Runtime
from .scoring.options import declare
from .settings import PREFIX, Settings
from .store.streams import StreamPlace
from .telemetry import WORKERS, log

if sys.platform != "win32":
    import resource

# Of `serve`: settings too.
OPTIONS = ("models", "store", "device", "host", "port", "grpc_port", "ssl_certfile", "ssl_keyfile", "workers")
CONSUME_OPTIONS = ("models", "store", "device", "host")
LOOP = "uvloop" if sys.platform != "win32" else "asyncio"
OTHER_FILES = 256
"""Files that a server has open beside its connections: stores, models, libraries."""


class Uvicorn(uvicorn.Server):
    """uvicorn that prints where it serves."""

    example = False
    announced = "stepcast serves on"
    app: Server | None = None  # which may speak gRPC too

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.servers:
            grpc = None if self.app is None else self.app.grpc
            _announce(self.servers[0].sockets[0], None if grpc is None else grpc.port, self.example, self.announced)


class OneLine(logging.Filter):
    """A start that fails for a reason of ours is one line, not the traceback that is logged of it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the last line where it tells our error."""
        _, ours, reason = record.getMessage().rstrip().rpartition("\nstepcast.errors.")
        if ours:
            record.msg, record.args = reason, ()
        return True


def _announce(
    listener: socket.socket, grpc_port: int | None, example: bool, announced: str = Uvicorn.announced
) -> None:
    host, port = listener.getsockname()[:2]
    print(f"{announced} http://{host}:{port}", flush=True)
    if grpc_port is not None:
        print(f"stepcast serves gRPC on {host}:{grpc_port}", flush=True)
    if example:
        print(f"a first step: stepcast step control_charts demo value=30.5 --url http://{host}:{port}", flush=True)


def _room_for(connections: int) -> None:
    """Raise the limit of open files as far as the connections need, if the system allows it."""
    if sys.platform == "win32":
        return
    needed = connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    if needed < connections + OTHER_FILES:
        log.warning(
            "the system allows %d open files, for %d connections %d are needed: raise its limit or lower "
            "STEPCAST_CONNECTIONS_LIMIT",
            *(needed, connections, connections + OTHER_FILES),
        )


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    if arguments.example:
        arguments.models, arguments.store = str(example_models()), arguments.store or "memory://"
    given = {name: getattr(arguments, name) for name in OPTIONS}
    settings = Settings.read(os.environ, **given)
    alone = settings.workers == 1
    if not alone and settings.store.startswith("memory:"):
        raise ConfigError("store 'memory://' is one process's own memory: it cannot serve several workers")
    os.environ.update({PREFIX + name.upper(): text for name, text in given.items() if text is not None})  # for workers
    _log(settings)
    app = create_app(settings, freezes=True) if alone else None
    _room_for(settings.connections_limit)
    config = uvicorn.Config(
        app or f"{__package__}.app:from_environ",
        factory=not alone,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        loop=LOOP,
        http=HttpConnection,
        ws=WebSocketConnection,
        ws_max_size=settings.body_limit_bytes,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        ssl_certfile=settings.ssl_certfile or None,
        ssl_keyfile=settings.ssl_keyfile or None,
        server_header=False,
        date_header=False,
        proxy_headers=False,  # wrong keys are counted by the address of the connection: nobody can write that
    )
    if alone:
        server = Uvicorn(config)
        server.app, server.example = app, arguments.example
        return _run(server)
    listener = config.bind_socket()
    with tempfile.TemporaryDirectory(prefix="stepcast-") as folder, _held_port(settings) as grpc_port:
        os.environ[WORKERS] = folder
        supervisor = Multiprocess(config, sockets=[listener])  # from here on SIGTERM stops it in order
        _announce(listener, grpc_port, arguments.example)
        supervisor.run()
    return 0


@contextlib.contextmanager
def _held_port(settings: Settings) -> Iterator[int | None]:
    """Keep the port of gRPC for the workers, who share it; None: there is none.

    Raises:
        ConfigError: it is taken (workers alone would not notice: they would share it with whoever has it), or gRPC is
            not installed.
    """
    if settings.grpc_port is None:
        yield None
        return
    load("grpc", "service,grpc")
    host, port = settings.host, settings.grpc_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as held:
        try:
            with socket.create_server((host, port), family=family) as probe:
                port = probe.getsockname()[1]
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind((host, port))  # it does not listen: connections go to the workers
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port} for gRPC: {error}") from error
        os.environ[f"{PREFIX}GRPC_PORT"] = str(port)
        yield port


def consume(arguments: argparse.Namespace) -> int:
    """Step what a stream gives until SIGTERM or SIGINT."""
    given = {name: getattr(arguments, name) for name in CONSUME_OPTIONS}
    settings = Settings.read(os.environ, **given, port=str(arguments.port), workers="1")
    place = StreamPlace(
        arguments.source,
        arguments.sink,
        arguments.dead_letters or f"{arguments.source}:dead",
        arguments.group,
        arguments.shares,
        arguments.lease_s,
        arguments.keep,
        arguments.delete,
    )
    streams = arguments.url, arguments.sink_url
    consuming = Consuming(arguments.model, place, *streams, arguments.namespace, arguments.in_hand)
    _log(settings)
    app = ConsumerApp(settings, consuming, freezes=True)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop=LOOP,
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
    )
    server = Uvicorn(config)
    once = "exactly once" if app.told_together else "at least once"
    server.announced = f"stepcast consumes {place.source!r}, tells {place.sink!r} {once}, metrics on"
    return _run(server)


def _log(settings: Settings) -> None:
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")


def _run(server: Uvicorn) -> int:
    """Run until a signal; the exit status."""
    logging.getLogger("uvicorn.error").addFilter(OneLine())
    with contextlib.suppress(SystemExit):  # uvicorn's own way out of a start that failed
        server.run()
    return 0 if server.started else 1


def check(arguments: argparse.Namespace) -> int:
    """Prove golden.npz and say where each recurrent node runs."""
    with tempfile.TemporaryDirectory() as folder:
        runtime = Runtime(arguments.directory, device=arguments.device, profile=Path(folder) / "profile")
        proof = runtime.prove()
        places = placements(runtime.end_profile())
    runtime.quicken()
    manifest = runtime.manifest
    print(f"{manifest.name} version {manifest.version}: fingerprint {manifest.fingerprint}, on {runtime.device}")
    print(f"golden.npz: {proof.rows} rows of {proof.steps} steps, outputs within {proof.output_error:.2e}, ", end="")
    print(f"states within {proof.state_error:.2e}, " + ("also step by step" if proof.stepped else "one call only"))
    found = try_batches(runtime, Settings.model_fields["batch_rows"].default)
    print(f"on this machine {found}")
    for node, provider in places.items():
        print(f"{node}: {provider}")
    return 0


def score(arguments: argparse.Namespace) -> int:
    """Step a table; see scoring/command.py, which needs pyarrow."""
    try:
        command = load(f"{__package__}.scoring.command", "parquet")
    except ConfigError as error:  # what is not installed is no wrong setting
        print(error, file=sys.stderr)
        return 1
    return int(command.run(arguments))


def make_key(arguments: argparse.Namespace) -> int:
    """Print a new key, which is kept nowhere, and the line for the key file that knows it by its hash."""
    key, line = new_key(arguments.name, arguments.role, arguments.namespace)
    print(f"key, shown this once: {key}")
    print(f"line for the file that STEPCAST_API_KEYS_FILE names: {line}")
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fields = Settings.model_fields
    run = commands.add_parser("serve", help="serve models until SIGTERM")
    for name in OPTIONS:
        default = "none" if fields[name].default in (None, "") else fields[name].default
        option = f"--{name.replace('_', '-')}"
        run.add_argument(option, dest=name, help=f"{fields[name].description} Default: {default}")
    run.add_argument("--example", action="store_true", help="serve the model that comes with Stepcast, in memory")
    run.set_defaults(run=serve)
    _add_consume(commands.add_parser("consume", help="step the entries of a Redis Stream until SIGTERM"))
    prove = commands.add_parser("check", help="prove a model directory")
    prove.add_argument("directory", type=Path, metavar="MODEL_DIR")
    prove.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    prove.set_defaults(run=check)
    tables = commands.add_parser("score", help="step a table of any size, without a server")
    declare(tables)
    tables.set_defaults(run=score)
    commands.add_parser("import", aliases=["import-onnx"], add_help=False, help="take in a model made by others")
    make = commands.add_parser("key", help="make an API key, and its line for STEPCAST_API_KEYS_FILE")
    make.add_argument("name", metavar="NAME", help="whose key it is: logs show it")
    make.add_argument("--role", default="step", choices=ROLES, help="default: step")
    make.add_argument("--namespace", default="default", help="whose sessions it reaches; default: default")
    make.set_defaults(run=make_key)
    return parser


def _add_consume(parser: argparse.ArgumentParser) -> None:
    fields = Settings.model_fields
    parser.add_argument("model", metavar="MODEL", help="whose sessions are stepped")
    parser.add_argument("--source", required=True, help="stream of entries: session, inputs, ...")
    parser.add_argument("--sink", required=True, help="stream that gets the outputs")
    parser.add_argument("--dead-letters", help="stream of entries that cannot be stepped; default: SOURCE:dead")
    parser.add_argument("--group", default="stepcast", help="consumer group; default: stepcast")
    parser.add_argument(
        "--shares",
        type=_at_least(1),
        default=1,
        help="streams that the source is cut into, SOURCE:0, SOURCE:1, ..., each read by one consumer; default: 1",
    )
    parser.add_argument("--url", help="Redis of source and dead letters; default: the store")
    parser.add_argument("--sink-url", help="Redis of the sink; default: that of the source")
    parser.add_argument("--namespace", default="default", help="whose sessions they are; default: default")
    parser.add_argument("--keep", type=_at_least(0), default=0, help="about how many letters stay in the sink; 0: all")
    parser.add_argument("--delete", action="store_true", help="delete entries from the source that are done with")
    parser.add_argument("--in-hand", type=_at_least(1), default=4096, help="most entries in memory; default: 4096")
    parser.add_argument(
        "--lease-s",
        type=float,
        default=5.0,
        help="until the streams of a dead consumer are read by another; default: 5",
    )
    parser.add_argument("--port", type=int, default=0, help="of metrics and probes; default: a free one")
    for name in CONSUME_OPTIONS:
        parser.add_argument(f"--{name}", help=f"{fields[name].description} Default: {fields[name].default}")
    parser.set_defaults(run=consume)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def main(argv: Sequence[str] | None = None, prog: str = "python -m service") -> int:
    """Run a command; its exit status: 2 for a wrong setting, 1 for a failure."""
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        if given[:1] in (["import"], ["import-onnx"]):
            return imports.run(given[1:], prog)
        arguments = _parser(prog).parse_args(given)
        return int(arguments.run(arguments))
    except (ConfigError, ManifestError, StepcastError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    raise SystemExit(main())
