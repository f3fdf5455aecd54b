"""Servers and stores are killed at random moments while sessions step; at the end every answer and state is checked.

    make chaos ARGS="--seconds 30 --sessions 200 --seed 1"

Three server processes share one Redis primary with a replica at level `replicated`; then one server has an SQLite
file. A client goes round the servers, drops answers, sends twice and out of order. What must hold: each session's
answers and final state are those of one offline forward pass over its inputs.
"""

import argparse
import asyncio
import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import orjson
from redis_servers import RedisServer, eventually
from serving import MODELS, Process

from service.engine.model import Runtime

KINDS = ("lstm", "gru", "graves_lstm", "stacked")
PATIENCE_S = 60.0
KEPT = 16
Array = np.ndarray[Any, Any]


@dataclass
class Count:
    """What happened."""

    steps: int = 0
    calls: int = 0
    requests: int = 0
    retries: int = 0
    dropped: int = 0
    repeated: int = 0
    ahead: int = 0
    refused: int = 0
    unavailable: int = 0
    kills: int = 0
    failovers: int = 0
    conflicts: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0

    def __str__(self) -> str:
        return (
            f"steps {self.steps}, calls {self.calls}, requests {self.requests}, retries {self.retries}, "
            f"answers dropped {self.dropped}, sent again {self.repeated}, sent ahead {self.ahead}, "
            f"refused (409) {self.refused}, unavailable (503, 504) {self.unavailable}, "
            f"store conflicts {self.conflicts}, servers killed {self.kills}, primaries killed {self.failovers}; "
            f"lost = {self.lost}, doubled = {self.doubled}, different = {self.different}"
        )


# --- the servers ----------------------------------------------------------------------------------------------------


class Fleet:
    """Server processes on one store."""

    def __init__(self, store: str, size: int, count: Count, **settings: str) -> None:
        self.store, self.settings, self.count = store, settings, count
        self.processes: list[Process | None] = [None] * size

    async def start(self) -> None:
        """Start all of them at once."""
        await asyncio.gather(*(self._start(i) for i in range(len(self.processes))))

    async def _start(self, index: int) -> None:
        """Start one, again and again while its store is away, as a pod is."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.processes[index] = await asyncio.to_thread(Process, self.store, **self.settings)
                return
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise

    async def kill_one(self, random: Random) -> None:
        """kill -9 for one of them, then start it again."""
        index = random.randrange(len(self.processes))
        process = self.processes[index]
        assert process is not None
        self.count.conflicts += await _conflicts(process.url)
        await asyncio.to_thread(process.kill)
        self.count.kills += 1
        await self._start(index)

    async def stop(self) -> None:
        """Count the conflicts, then SIGTERM: a drain must end well."""
        for process in self.processes:
            assert process is not None
            self.count.conflicts += await _conflicts(process.url)
            status = await asyncio.to_thread(process.terminate)
            assert status in (0, -15), status

    def kill_all(self) -> None:
        """Whatever is left."""
        for process in self.processes:
            if process is not None and process.process.poll() is None:
                process.kill()

    def url(self, turn: int) -> str:
        """The servers in turn."""
        process = self.processes[turn % len(self.processes)]
        assert process is not None
        return process.url


async def _conflicts(url: str) -> int:
    """How often a server computed a step again because another one had been first."""
    wire = Wire()
    _, body = await wire.ask(url, "GET", "/metrics")
    await wire.close()
    found = re.findall(rb"^stepcast_store_conflicts_total\{[^}]*\} ([0-9.e+]+)$", body, re.MULTILINE)
    return int(sum(map(float, found)))


class Pair:
    """A Redis primary, its replica, and a sentinel that makes the replica primary."""

    def __init__(self, folder: Path, count: Count) -> None:
        self.count = count
        self.primary = RedisServer(folder / "one")
        self.replica = RedisServer(folder / "two", f"replicaof 127.0.0.1 {self.primary.port}")
        self.sentinel = RedisServer(
            folder / "sentinel",
            f"sentinel monitor pump 127.0.0.1 {self.primary.port} 1",
            "sentinel down-after-milliseconds pump 500",
            "sentinel failover-timeout pump 2000",
            sentinel=True,
        )
        self.url = f"redis+sentinel://{self.sentinel.name}/pump"

    def start(self, stack: ExitStack) -> "Pair":
        """Start all three, the replica in step."""
        for server in (self.primary, self.replica, self.sentinel):
            stack.callback(server.kill)
            server.start()
        eventually(lambda: ",state=online," in self.primary.cli("INFO", "replication"))
        eventually(lambda: "num-slaves\n1" in self.sentinel.cli("SENTINEL", "MASTER", "pump"))
        return self

    def fail_over(self) -> None:
        """Kill the primary; once its replica has its place, the killed one comes back as a replica of that."""
        old, new = self.primary, self.replica
        old.kill()
        address = f"127.0.0.1\n{new.port}"
        eventually(lambda: self.sentinel.cli("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "pump") == address)
        eventually(lambda: "role:master" in new.cli("INFO", "replication"))
        lines = [line for line in old.config.read_text().splitlines() if not line.startswith("replicaof")]
        old.config.write_text("\n".join([*lines, f"replicaof 127.0.0.1 {new.port}", ""]))
        old.start()
        eventually(lambda: ",state=online," in new.cli("INFO", "replication"))
        self.primary, self.replica = new, old
        self.count.failovers += 1


# --- the client -----------------------------------------------------------------------------------------------------


class Wire:
    """HTTP/1.1 with kept connections; as lean as it gets."""

    def __init__(self) -> None:
        self._idle: dict[str, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}
        self._opened: list[asyncio.StreamWriter] = []

    async def ask(self, url: str, method: str, path: str, body: bytes = b"", drop: bool = False) -> tuple[int, bytes]:
        """Status and body. With `drop` the connection is cut before the answer is read: (0, b"").

        Raises:
            OSError, EOFError: no answer.
        """
        idle = self._idle.setdefault(url, [])
        host, port = url.removeprefix("http://").split(":")
        reader, writer = idle.pop() if idle else await self._open(host, int(port))
        try:
            head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            if drop:
                writer.close()
                return 0, b""
            async with asyncio.timeout(20):
                answer_head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"(?i)content-length: (\d+)", answer_head)[1])  # type: ignore[index]
                answer = await reader.readexactly(length)
        except BaseException:
            writer.close()
            raise
        idle.append((reader, writer))
        return int(answer_head[9:12]), answer

    async def _open(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(host, port)
        self._opened.append(writer)
        return reader, writer

    async def close(self) -> None:
        """Cut all connections."""
        for writer in self._opened:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


class Violation(Exception):
    """A law is broken."""


@dataclass
class Call:
    """A step call and, once it is acknowledged, its answer."""

    seq: int
    body: bytes
    x: Array  # (N, T, F)
    mask: Array  # (N, T)
    outputs: Any = None


@dataclass
class Session:
    """One session of the client: sends its steps in order, again and again until each is acknowledged."""

    name: str
    model: str
    random: Random
    runtime: Runtime
    fleet: Fleet
    wire: Wire
    count: Count
    progress: "Progress"
    calls: list[Call] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        self.examples = self.random.choice((1, 1, 1, 3))
        self.numbers = np.random.default_rng(self.random.getrandbits(32))
        self.turn = self.random.randrange(100)
        self.path = f"/v1/models/{self.model}/sessions/{self.name}"

    async def live(self, stop: asyncio.Event, most: int) -> None:
        """Step until told to stop, or until there are `most` steps."""
        ahead: Call | None = None
        while ahead is not None or (not stop.is_set() and self.step < most):
            sent, call = ahead is not None, ahead or self.make(self.step)
            ahead = None
            chance = self.random.random()
            if chance < 0.06:
                await self.drop(call)
            elif chance < 0.10:
                ahead = self.make(call.seq)
                await asyncio.gather(self.send_ahead(ahead), self.settle(call))
            elif chance < 0.16:
                await asyncio.gather(self.settle(call), self.settle(call))
            elif chance < 0.18 and not sent:  # what was sent ahead may have been applied: the step is not known then
                await self.falsify()
            await self.settle(call)
            self.calls.append(call)
            self.step = call.seq
            if chance > 0.9:
                await self.settle(self.random.choice(self.calls[-KEPT:]))
                self.count.repeated += 1
            self.count.calls += 1
            self.progress.made(call.x.shape[1])

    def make(self, step: int) -> Call:
        """The next call after `step` steps."""
        steps = self.random.choice((1, 1, 1, 1, 2, 5))
        x = self.numbers.normal(size=(self.examples, steps, self.runtime.manifest.n_features)).astype(np.float32)
        mask = np.ones((self.examples, steps), bool)
        if self.random.random() < 0.1:
            mask = self.numbers.random((self.examples, steps)) < 0.6
        if self.model == "stacked" and self.random.random() < 0.2:
            x[0, -1, 0] = np.nan  # a missing reading; null on the wire
        plain = x.shape[:2] == (1, 1) and bool(mask.all()) and self.random.random() < 0.7
        inputs = x[0, 0] if plain else x  # the shortest form has a short way through the server
        body = {"inputs": inputs, "seq": step + steps, **({} if mask.all() else {"mask": mask.astype(int)})}
        return Call(step + steps, orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), x, mask)

    async def drop(self, call: Call) -> None:
        """Send and be gone before the answer."""
        with suppress(OSError, EOFError):
            await self.wire.ask(self.next_url(), "POST", self.path + "/step", call.body, drop=True)
        self.count.dropped += 1

    async def send_ahead(self, call: Call) -> None:
        """Send a step before the one before it is acknowledged: applied if that was there first, else refused."""
        self.count.ahead += 1
        with suppress(OSError, EOFError, TimeoutError):
            status, body = await self.wire.ask(self.next_url(), "POST", self.path + "/step", call.body)
            if status == 200:
                call.outputs = orjson.loads(body)["outputs"]
            elif status == 409:
                self.count.refused += 1

    async def falsify(self) -> None:
        """The last acknowledged seq with another payload must be refused."""
        if not self.calls or self.calls[-1].x.shape[1] > 1:
            return
        false = {"inputs": (np.nan_to_num(self.calls[-1].x) + 1).astype(np.float32), "seq": self.step}
        body = orjson.dumps(false, option=orjson.OPT_SERIALIZE_NUMPY)
        with suppress(OSError, EOFError, TimeoutError):
            status, answer = await self.wire.ask(self.next_url(), "POST", self.path + "/step", body)
            self.count.refused += status == 409
            if status not in (409, 503, 504) or (status == 409 and orjson.loads(answer)["step"] != self.step):
                raise Violation(f"{self.name}: another payload for seq {self.step}: {status} {answer!r}")

    async def settle(self, call: Call) -> None:
        """Send until acknowledged; each acknowledgement must be the same."""
        deadline = time.monotonic() + PATIENCE_S
        for attempt in range(1000):
            self.count.requests += 1
            self.count.retries += attempt > 0
            try:
                status, body = await self.wire.ask(self.next_url(), "POST", self.path + "/step", call.body)
            except (OSError, EOFError, TimeoutError):
                status, body = 0, b""
            if status == 200:
                self.acknowledge(call, orjson.loads(body))
                return
            self.count.unavailable += status in (503, 504)
            if status not in (0, 429, 503, 504):
                self.blame(call, body)
                raise Violation(f"{self.name}: seq {call.seq} after {self.step} steps: {status} {body!r}")
            if time.monotonic() > deadline:
                raise Violation(f"{self.name}: no answer to seq {call.seq} within {PATIENCE_S} s: {status} {body!r}")
            await asyncio.sleep(self.random.uniform(0.5, 1.0) * min(0.8, 0.05 * 2**attempt))

    def acknowledge(self, call: Call, answer: dict[str, Any]) -> None:
        """Take an answer; a second one must be equal to the first."""
        if answer["step"] != call.seq or (call.outputs is not None and answer["outputs"] != call.outputs):
            self.count.different += 1
            raise Violation(f"{self.name}: seq {call.seq} was answered differently: {answer}")
        call.outputs = answer["outputs"]

    def blame(self, call: Call, body: bytes) -> None:
        """A step in its turn was refused: the server's count is behind the client's, or before it."""
        step = orjson.loads(body).get("step")
        if step is not None:
            self.count.lost += max(0, self.step - step)
            self.count.doubled += max(0, step - call.seq)

    async def check(self) -> None:
        """Compare all answers and the final state with one forward pass over the inputs."""
        document = await self.document()
        self.count.lost += max(0, self.step - document["step"])
        self.count.doubled += max(0, document["step"] - self.step)
        x = np.concatenate([call.x for call in self.calls], axis=1)
        mask = np.concatenate([call.mask for call in self.calls], axis=1)
        outputs = [np.array(call.outputs, np.float32).reshape(*call.x.shape[:2], -1) for call in self.calls]
        got = np.concatenate(outputs, axis=1)
        tolerance = self.runtime.manifest.tolerance
        same = np.isnan(got[~mask]).all()
        for n in range(self.examples):
            y, state = self.offline(x[n, mask[n]])
            same &= np.allclose(got[n, mask[n]], y, rtol=tolerance.rtol, atol=tolerance.atol)
            for layer, keys in state.items():
                for key, want in keys.items():
                    have = np.array(document["state"][layer][key][n], np.float32)
                    same &= np.allclose(have, want[0], rtol=tolerance.rtol, atol=tolerance.atol)
        self.count.different += not same

    def offline(self, x: Array) -> tuple[Array, dict[str, dict[str, Array]]]:
        """Outputs (T, O) and final state of one row's present steps in one pass."""
        start = np.frombuffer(self.runtime.initial(1), np.uint8).reshape(1, -1)
        if not len(x):
            return np.empty((0, self.runtime.manifest.n_outputs)), self.runtime.unpack(start.tobytes(), 1)
        y, state = self.runtime.run(x[None], None, start)
        return y[0], self.runtime.unpack(state.tobytes(), 1)

    async def document(self) -> dict[str, Any]:
        """The session's state, from any server."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                status, body = await self.wire.ask(self.next_url(), "GET", self.path + "/state")
            except (OSError, EOFError, TimeoutError):
                status, body = 0, b""
            if status == 200:
                document: dict[str, Any] = orjson.loads(body)
                return document
            if status not in (0, 503) or time.monotonic() > deadline:
                self.count.lost += self.step if status == 404 else 0
                raise Violation(f"{self.name}: the state cannot be read: {status} {body!r}")
            await asyncio.sleep(0.1)

    def next_url(self) -> str:
        self.turn += 1
        return self.fleet.url(self.turn)


class Progress:
    """Lets the faults wait for steps instead of for time."""

    def __init__(self, count: Count) -> None:
        self.count = count
        self._goal = 0
        self._reached = asyncio.Event()

    def made(self, steps: int) -> None:
        """So many steps were acknowledged."""
        self.count.steps += steps
        if self.count.steps >= self._goal:
            self._reached.set()

    async def more(self, steps: int) -> None:
        """Return when so many more steps were acknowledged."""
        self._goal = self.count.steps + steps
        self._reached.clear()
        async with asyncio.timeout(PATIENCE_S):
            await self._reached.wait()


# --- the runs -------------------------------------------------------------------------------------------------------

Fault = Callable[[], Awaitable[None]]


async def run(fleet: Fleet, faults: Sequence[Fault], *, sessions: int, seed: int, seconds: float, most: int) -> Count:
    """Step `sessions` sessions while the faults happen one after the other, in turns until `seconds` are over.

    Returns:
        What happened; lost, doubled and different are 0 where every law held.

    Raises:
        Violation: an answer that no unbroken run would have given.
    """
    count, random, wire = fleet.count, Random(seed), Wire()
    progress, stop = Progress(count), asyncio.Event()
    runtimes = {kind: Runtime(MODELS / kind / "1", device="cpu") for kind in KINDS}
    clients = [
        Session(f"chaos-{seed}-{i}", kind, Random(f"{seed}-{i}"), runtimes[kind], fleet, wire, count, progress)
        for i in range(sessions)
        for kind in [KINDS[i % len(KINDS)]]
    ]
    try:
        await fleet.start()
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.live(stop, most))
            await progress.more(sessions)
            for turn in range(10_000):
                if turn >= len(faults) and time.monotonic() > until:
                    break
                await faults[turn % len(faults)]()
                await progress.more(random.randrange(sessions, 2 * sessions))
            stop.set()
        for client in clients:
            await client.check()
        await fleet.stop()
    finally:
        await wire.close()
        fleet.kill_all()
    return count


async def redis_run(folder: Path, seed: int, **limits: Any) -> Count:
    """Three servers on a Redis pair at level `replicated`; servers and primaries are killed."""
    count, random = Count(), Random(seed)
    with ExitStack() as stack:
        pair = await asyncio.to_thread(Pair(folder, count).start, stack)
        fleet = Fleet(pair.url, 3, count, durability="replicated", store_timeout_s="1.0")

        async def kill() -> None:
            await fleet.kill_one(random)

        async def fail_over() -> None:
            await asyncio.to_thread(pair.fail_over)

        async def both() -> None:
            await asyncio.gather(fail_over(), kill())

        return await run(fleet, [both], seed=seed, **limits)


async def sqlite_run(folder: Path, seed: int, **limits: Any) -> Count:
    """One server on an SQLite file; it is killed."""
    count, random = Count(), Random(seed)
    fleet = Fleet(f"sqlite:///{folder / 'chaos.db'}", 1, count)

    async def kill() -> None:
        await fleet.kill_one(random)

    return await run(fleet, [kill], seed=seed, **limits)


def main() -> None:
    """Both runs; exit status 1 if anything was lost, doubled or different."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=30, help="of each of the two runs, starts and checks not counted"
    )
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    bad = 0
    for name, start in (("three servers, Redis, replicated", redis_run), ("one server, SQLite", sqlite_run)):
        with tempfile.TemporaryDirectory() as folder:
            limits = {"sessions": arguments.sessions, "seconds": arguments.seconds, "most": 100_000}
            count = asyncio.run(start(Path(folder), arguments.seed, **limits))
        print(f"{name}: {count}", flush=True)
        bad += count.lost + count.doubled + count.different
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
