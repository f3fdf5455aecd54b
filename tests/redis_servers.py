"""Real Redis servers on free ports of the loopback interface, each ended by its process id; fixtures for them."""

import os
import re
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


def _version(path: str) -> str:
    """What a redis-server is called by, its first two numbers."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"v=(\d+\.\d+)", said)
    assert found, said
    return found[1]


def _programs() -> dict[str, str]:
    """Every redis-server that can be found, by version: beside this Python and on the PATH."""
    found = {}
    for folder in (str(Path(sys.executable).parent), None):
        path = shutil.which("redis-server", path=folder)
        if path is not None:
            found.setdefault(_version(path), path)
    return found


PROGRAMS = _programs()
VERSIONS = tuple(PROGRAMS)
GIVEN = {"given": os.environ["REDIS_URL"]} if "REDIS_URL" in os.environ else {}
"""A server that runs already and is to be tested too, as `make test-redis` does; keep to keys of your own."""


def program(name: str) -> str:
    """A program on the PATH, or beside this Python."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is missing. Run make install."
    return found


def each_redis(metafunc: pytest.Metafunc) -> None:
    """Tests that start a Redis of their own run with every version, where a file calls this `pytest_generate_tests`."""
    if "redis_version" in metafunc.fixturenames:
        metafunc.parametrize("redis_version", VERSIONS, indirect=True)


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
        version: One of VERSIONS; None: the first.
    """

    def __init__(self, folder: Path, *settings: str, sentinel: bool = False, version: str | None = None) -> None:
        self.port = free_port()
        self.folder = folder
        self.config = folder / "redis.conf"
        folder.mkdir(parents=True)
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {folder}", f"logfile {folder}/log", *settings]
        if not sentinel:  # Redis 7 would wait 5 s for more replicas before it sends the first its data
            lines = ['save ""', "appendonly yes", "repl-diskless-sync-delay 0", *lines]
        self.config.write_text("\n".join([*lines, ""]))
        self._command = [PROGRAMS[version or VERSIONS[0]], str(self.config), *(["--sentinel"] if sentinel else [])]
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

    def lose_files(self) -> None:
        """What an empty disk after a crash looks like; Redis 7 keeps its append-only file in a folder of its own."""
        shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)
        for file in self.folder.glob("*.aof"):
            file.unlink()

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


def _factory(stack: ExitStack, folder: Path, version: str | None = None) -> RedisFactory:
    def start(*settings: str, sentinel: bool = False) -> RedisServer:
        place = folder / f"redis{len(list(folder.iterdir()))}"
        server = RedisServer(place, *settings, sentinel=sentinel, version=version)
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


class SharedRedis:
    """Servers for all tests that do them no harm, each kind started when first asked for; keep to keys of your own.

    Args:
        folder: Where their files go.
    """

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack, self._folder = stack, folder
        self._started: dict[tuple[str, str], list[RedisServer]] = {}

    def get(self, kind: str, version: str = VERSIONS[0]) -> list[RedisServer]:
        """`redis`: one. `cluster`: see start_cluster. `sentinel`: one that watches a pair, see start_sentinel."""
        if (kind, version) not in self._started:
            folder = self._folder / f"{kind}-{version}"
            folder.mkdir()
            self._started[kind, version] = self._start(kind, _factory(self._stack, folder, version))
        return self._started[kind, version]

    def _start(self, kind: str, factory: RedisFactory) -> list[RedisServer]:
        if kind == "cluster":
            return start_cluster(factory)
        return [start_sentinel(factory, start_pair(factory)[0]) if kind == "sentinel" else factory()]


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedRedis]:
    """See SharedRedis."""
    with ExitStack() as stack:
        yield SharedRedis(stack, tmp_path_factory.mktemp("redis"))


@pytest.fixture(scope="session")
def redis_server(shared_redis: SharedRedis) -> RedisServer:
    """A Redis server for all tests that do it no harm."""
    return shared_redis.get("redis")[0]


@pytest.fixture(scope="session")
def redis_cluster(shared_redis: SharedRedis) -> list[RedisServer]:
    """A Redis Cluster for all tests that do it no harm."""
    return shared_redis.get("cluster")


@pytest.fixture(scope="session")
def redis_watched(shared_redis: SharedRedis) -> RedisServer:
    """A sentinel of a primary and a replica, for all tests that do them no harm."""
    return shared_redis.get("sentinel")[0]


@pytest.fixture
def redis_version(request: pytest.FixtureRequest) -> str:
    """The version of the servers that a test starts; see each_redis."""
    return str(getattr(request, "param", VERSIONS[0]))


@pytest.fixture
def redis_factory(tmp_path: Path, redis_version: str) -> Iterator[RedisFactory]:
    """Starts Redis servers that this test may break: redis_factory("maxmemory 5mb", ..., sentinel=False)."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with ExitStack() as stack:
        yield _factory(stack, folder, redis_version)


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
