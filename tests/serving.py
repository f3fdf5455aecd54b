"""Real servers and processes, and the doors that speak to them; shared by the tests."""

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from service.app import create_app
from service.doors.http.connection import HttpConnection
from service.doors.websocket.connection import WebSocketConnection
from service.settings import Settings

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "tests" / "models"
FEW = ("bidirectional", "characters", "graves_lstm", "gru", "lstm", "stacked")


@cache
def few_models() -> Path:
    """A repository of the FEW kinds: a server proves them in a tenth of the time that all of MODELS take."""
    folder = Path(tempfile.mkdtemp(prefix="stepcast-few-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for kind in FEW:
        (folder / kind).symlink_to(MODELS / kind)
    return folder


GRPC_ADDRESSES: dict[str, str] = {}
"""Where the servers speak gRPC that were started with a port for it, by their URLs."""


class Running:
    """A server that runs in a thread of this process, and what it is made of; it serves `few_models`, if not told."""

    def __init__(self, **settings: Any) -> None:
        self.app = create_app(Settings.read({}, **{"models": few_models(), "port": 0, **settings}))
        doors = {"http": HttpConnection, "ws": WebSocketConnection}
        config = uvicorn.Config(self.app, port=0, log_level="critical", lifespan="on", **doors)
        self.uvicorn_config = config
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)

    def start(self) -> str:
        """Start; the base URL."""
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._uvicorn.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        self.loop = self._uvicorn.servers[0].get_loop()
        port = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        if self.app.grpc is not None:
            GRPC_ADDRESSES[self.url] = f"127.0.0.1:{self.app.grpc.port}"
        return self.url

    def stop(self) -> None:
        """Stop as SIGTERM does."""
        self._uvicorn.should_exit = True
        self._thread.join(30)


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[Running]:
    """A server in a thread, for as long as the block lasts."""
    server = Running(**settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Process:
    """`python -m service serve` as a process of its own, to be killed; it serves `few_models`, if not told."""

    def __init__(self, store: str, *arguments: str, models: Path | None = None, port: int = 0, **env: str) -> None:
        models = models or few_models()
        command = [sys.executable, "-m", "service", "serve", "--models", str(models), "--store", store]
        environ = {**os.environ, **{f"STEPCAST_{k.upper()}": v for k, v in env.items()}, "PYTHONUNBUFFERED": "1"}
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the process writes to it as long as it lives
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *arguments],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "http://" not in line:
            self.kill()
            errors.seek(0)
            said = errors.read()[-2000:]
            errors.close()
            raise RuntimeError(f"the server did not start: {said}")
        errors.close()
        self.url = line[line.index("http://") :].strip()
        if "--grpc-port" in arguments:
            line = self.process.stdout.readline()
            assert line.startswith("stepcast serves gRPC on "), line
            GRPC_ADDRESSES[self.url] = line.split()[-1]

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Wait for the end; the exit status."""
        status = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@pytest.fixture
def spawn() -> Iterator[Callable[..., Process]]:
    """Starts server processes; those that still run at the end are killed."""
    started: list[Process] = []

    def start(store: str, *arguments: str, **more: Any) -> Process:
        started.append(Process(store, *arguments, **more))
        return started[-1]

    yield start
    for process in started:
        if process.process.poll() is None:
            process.kill()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def memory_server() -> Iterator[Running]:
    """One server of all MODELS on the memory store, for all tests that need no store of their own."""
    with running(store="memory://", models=MODELS, grpc_port=0) as server:
        yield server


@pytest.fixture
def http(memory_server: Running) -> Iterator[httpx.Client]:
    """An HTTP client of that server."""
    with httpx.Client(base_url=memory_server.url, timeout=10, verify=False) as client:
        yield client


def golden(name: str, version: int = 1, root: Path = MODELS) -> dict[str, np.ndarray]:
    """What torch recorded when a model was exported."""
    with np.load(root / name / str(version) / "golden.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
