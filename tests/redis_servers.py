"""Real Redis servers on free ports of the loopback interface, each ended by its process id; fixtures for them."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import randrange

import pytest


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Return as soon as `condition` holds; fail if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)


def program(name: str) -> str:
    """A program on the PATH, or beside this Python."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is missing. Run make install."
    return found


def free_port() -> int:
    """A port that is free now, and so is the one 10,000 above it (a cluster's bus)."""
    while True:
        port = randrange(20000, 32000)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            return port


class RedisServer:
    """A redis-server process, or a sentinel, with a folder of its own.

    Args:
        folder: Where its files go; they outlive stop() and kill().
        settings: Lines of redis.conf.
        sentinel: Run as a sentinel.
    """

    def __init__(self, folder: Path, *settings: str, sentinel: bool = False) -> None:
        self.port = free_port()
        self.folder = folder
        self.config = folder / "redis.conf"
        folder.mkdir(parents=True)
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {folder}", f"logfile {folder}/log", *settings]
        if not sentinel:
            lines = ['save ""', "appendonly yes", *lines]
        self.config.write_text("\n".join([*lines, ""]))
        self._command = [program("redis-server"), str(self.config), *(["--sentinel"] if sentinel else [])]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"redis://{self.name}/0"

    def start(self, wait: bool = True) -> "RedisServer":
        """Start it, again if need be; return when it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        if wait:
            eventually(lambda: self.cli("PING") in ("PONG", "NOAUTH Authentication required."))
        return self

    def stop(self) -> None:
        """End it kindly; its files stay."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would; its files stay."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Let it hang: connections stay, answers do not come."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """The end of a pause."""
        self._signal(signal.SIGCONT)

    def cli(self, *command: str) -> str:
        """What redis-cli prints."""
        line = [program("redis-cli"), "-p", str(self.port), *command]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        return (done.stdout + done.stderr).strip()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "not started"
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._signal(number)
            self._signal(signal.SIGCONT)
            self._process.wait(20)
            self._process = None


RedisFactory = Callable[..., RedisServer]


def _factory(stack: ExitStack, folder: Path) -> RedisFactory:
    def start(*settings: str, sentinel: bool = False) -> RedisServer:
        server = RedisServer(folder / f"redis{len(list(folder.iterdir()))}", *settings, sentinel=sentinel)
        stack.callback(server.kill)
        return server.start()

    return start


def start_cluster(factory: RedisFactory) -> list[RedisServer]:
    """Three primaries (first in the list), then a replica of each; they fail over within about two seconds."""
    servers = [factory("cluster-enabled yes", "cluster-node-timeout 1000") for _ in range(6)]
    names = [server.name for server in servers]
    made = servers[0].cli("--cluster", "create", *names, "--cluster-replicas", "1", "--cluster-yes")
    assert "[OK] All 16384 slots covered" in made, made
    eventually(lambda: all("cluster_state:ok" in server.cli("CLUSTER", "INFO") for server in servers))
    eventually(lambda: all(",state=online," in s.cli("INFO", "replication") for s in servers[:3]))
    return servers


def start_pair(factory: RedisFactory) -> tuple[RedisServer, RedisServer]:
    """A primary and its replica, in step."""
    primary = factory()
    replica = factory(f"replicaof 127.0.0.1 {primary.port}")
    eventually(lambda: ",state=online," in primary.cli("INFO", "replication"))
    return primary, replica


def start_sentinel(factory: RedisFactory, primary: RedisServer) -> RedisServer:
    """A sentinel that watches a primary with a replica under the name pump, and acts after half a second."""
    sentinel = factory(
        f"sentinel monitor pump 127.0.0.1 {primary.port} 1",
        "sentinel down-after-milliseconds pump 500",
        "sentinel failover-timeout pump 3000",
        sentinel=True,
    )
    eventually(lambda: "num-slaves\n1" in sentinel.cli("SENTINEL", "MASTER", "pump"))
    return sentinel


def cluster_url(servers: list[RedisServer]) -> str:
    """The URL of a cluster, as a user would write it."""
    return "redis+cluster://" + ",".join(server.name for server in servers[:3])


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis server for all tests that do it no harm; keep to keys of your own."""
    with ExitStack() as stack:
        yield _factory(stack, tmp_path_factory.mktemp("redis"))()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """A Redis Cluster for all tests that do it no harm; see start_cluster."""
    with ExitStack() as stack:
        yield start_cluster(_factory(stack, tmp_path_factory.mktemp("cluster")))


@pytest.fixture(scope="session")
def redis_watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A sentinel of a primary and a replica, for all tests that do them no harm; see start_sentinel."""
    with ExitStack() as stack:
        factory = _factory(stack, tmp_path_factory.mktemp("watched"))
        yield start_sentinel(factory, start_pair(factory)[0])


@pytest.fixture
def redis_factory(tmp_path: Path) -> Iterator[RedisFactory]:
    """Starts Redis servers that this test may break: redis_factory("maxmemory 5mb", ..., sentinel=False)."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with ExitStack() as stack:
        yield _factory(stack, folder)


@pytest.fixture
def own_cluster(redis_factory: RedisFactory) -> list[RedisServer]:
    """A Redis Cluster that this test may break; see start_cluster."""
    return start_cluster(redis_factory)


@pytest.fixture
def redis_pair(redis_factory: RedisFactory) -> tuple[RedisServer, RedisServer]:
    """A primary and its replica, in step; this test may break them."""
    return start_pair(redis_factory)


@pytest.fixture
def redis_sentinel(redis_pair: tuple[RedisServer, RedisServer], redis_factory: RedisFactory) -> RedisServer:
    """A sentinel that watches `redis_pair` under the name pump."""
    return start_sentinel(redis_factory, redis_pair[0])
