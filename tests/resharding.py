"""Slots of a Redis Cluster that move back and forth while a server steps sessions in it: what is answered, and when.

    make reshard ARGS="--seconds 60 --seed 1"

Everybody's steps are numbered, some sessions have checkpoints, new ones begin in the very slot that moves, and one move
is interrupted for longer than the store's time-out. What must hold: every step is answered, and no session lost or
doubled one.
"""

import argparse
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random

import httpx
from redis_servers import RedisServer, _factory, cluster_url, start_cluster
from serving import running

from service.store.redis.topology import slot_of

KIND = "lstm"
TIMEOUT_S = 2.0
MOVES = 4
READINGS = [0.1, 0.2, 0.3]


@dataclass
class Seen:
    """What clients saw."""

    steps: int = 0
    failed: list[str] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    moves: int = 0

    def __str__(self) -> str:
        return (
            f"{self.steps} steps, {len(self.failed)} failed, p99 {1000 * self.p99_s:.0f} ms, {self.moves} slots moved"
        )

    @property
    def p99_s(self) -> float:
        """The wait that one step in a hundred exceeds, s."""
        waits = sorted(self.waits_s)
        return waits[int(0.99 * len(waits))] if waits else 0.0


class Load:
    """Clients of a server, each with a connection and sessions of its own."""

    def __init__(self, url: str, names: list[list[str]]) -> None:
        self.url, self.seen, self._names = url, Seen(), names
        self.names = [name for some in names for name in some]
        self.steps = dict.fromkeys(self.names, 0)
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(names,)) for names in self._names]

    def __enter__(self) -> "Load":
        with httpx.Client(base_url=self.url, timeout=20) as http:
            for name in self.names:
                self.step(http, name)
            for name in self.names[::5]:
                path = f"/v1/models/{KIND}/sessions/{name}/checkpoints"
                assert http.post(path, json={"name": "first"}).status_code == 201
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, names: list[str]) -> None:
        with httpx.Client(base_url=self.url, timeout=20) as http:
            while not self._stop.is_set():
                for name in names:
                    self.step(http, name)

    def step(self, http: httpx.Client, name: str) -> bool:
        """One numbered step; whether it was answered."""
        seq, started = self.steps.get(name, 0) + 1, time.monotonic()
        body = {"inputs": READINGS, "seq": seq}
        response = http.post(f"/v1/models/{KIND}/sessions/{name}/step", json=body)
        good = response.status_code == 200 and response.json()["step"] == seq
        with self._lock:
            self.seen.steps += 1
            self.seen.waits_s.append(time.monotonic() - started)
            if good:
                self.steps[name] = seq
            else:
                self.seen.failed.append(f"{name}: {response.text}")
        return good

    def wrong(self) -> list[str]:
        """Sessions that are at another step than was answered."""
        with httpx.Client(base_url=self.url, timeout=20) as http:
            found = {name: http.get(f"/v1/models/{KIND}/sessions/{name}").json().get("step") for name in self.steps}
        return [f"{name}: {found[name]}, answered {step}" for name, step in self.steps.items() if found[name] != step]


class Mover:
    """Moves slots between the primaries of a cluster, in the steps of Redis' own tool."""

    def __init__(self, servers: list[RedisServer]) -> None:
        self._primaries = servers[:3]
        self._ids = {server: server.cli("CLUSTER", "MYID") for server in self._primaries}

    def move(self, slot: int, pause_s: float) -> None:
        """Move a slot to another primary; it stands open, without its keys and with some, for `pause_s` each."""
        source = self.owner(slot)
        target = self._primaries[(self._primaries.index(source) + 1) % 3]
        target.cli("CLUSTER", "SETSLOT", str(slot), "IMPORTING", self._ids[source])
        source.cli("CLUSTER", "SETSLOT", str(slot), "MIGRATING", self._ids[target])
        time.sleep(pause_s / 2)
        keys = source.cli("CLUSTER", "GETKEYSINSLOT", str(slot), "100").split("\n")
        for at, key in enumerate(filter(None, keys)):
            if at == 1:
                time.sleep(pause_s / 2)  # of a session with checkpoints one key is here, one there
            source.cli("MIGRATE", "127.0.0.1", str(target.port), key, "0", "1000")
        while left := source.cli("CLUSTER", "GETKEYSINSLOT", str(slot), "100"):
            for key in left.split("\n"):
                source.cli("MIGRATE", "127.0.0.1", str(target.port), key, "0", "1000")
        for server in (target, source, *self._primaries):
            server.cli("CLUSTER", "SETSLOT", str(slot), "NODE", self._ids[target])

    def owner(self, slot: int) -> RedisServer:
        """The primary that has a slot, by the first one's own view."""
        for server in self._primaries:
            lines = server.cli("CLUSTER", "NODES").split("\n")
            (mine,) = [line.split() for line in lines if "myself" in line]
            ranges = [part.split("-") for part in mine[8:] if not part.startswith("[")]
            if any(int(part[0]) <= slot <= int(part[-1]) for part in ranges):
                return server
        raise AssertionError(f"nobody has slot {slot}")


def newcomer(slot: int, numbers: "count[int]") -> str:
    """The name of a new session in a slot."""
    return next(name for name in (f"new-{n}" for n in numbers) if slot_of(f"default/{KIND}/{name}") == slot)


def reshard(servers: list[RedisServer], seconds: float, seed: int = 1) -> tuple[Seen, list[str]]:
    """Step sessions while slots move; what was seen, and the sessions that are at a wrong step."""
    random, numbers = Random(seed), count()
    with running(store=cluster_url(servers), store_timeout_s=TIMEOUT_S) as server:
        mover, until = Mover(servers), time.monotonic() + seconds
        names = [[f"r{client}-{i}" for i in range(10)] for client in range(4)]
        with Load(server.url, names) as load, httpx.Client(base_url=server.url, timeout=20) as http:
            while time.monotonic() < until or load.seen.moves < MOVES:
                interrupted = not load.seen.moves
                slot = slot_of(f"default/{KIND}/{random.choice(load.names[::5] if interrupted else load.names)}")
                pause_s = 1.5 * TIMEOUT_S if interrupted else 0.1
                moving = threading.Thread(target=mover.move, args=(slot, pause_s))
                moving.start()
                time.sleep(pause_s / 4)
                fresh = newcomer(slot, numbers)
                while moving.is_alive():
                    load.step(http, fresh)
                moving.join()
                load.step(http, fresh)
                load.seen.moves += 1
        return load.seen, load.wrong()


def main() -> None:
    """Run for some time and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = start_cluster(_factory(stack, Path(folder)))
        seen, wrong = reshard(servers, arguments.seconds, arguments.seed)
    print(f"{seen}; at a wrong step: {wrong}")
    if seen.failed or wrong:
        raise SystemExit("\n".join(seen.failed[:5]))


if __name__ == "__main__":
    main()
