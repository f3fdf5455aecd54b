"""A consumer of a stream beside a WebSocket, on one Redis with many sessions: steps per second and core."""

import json
import time
from collections.abc import Generator
from functools import partial
from typing import Any

from redis import Redis

from . import requests
from .bare import POOL
from .contenders import LANES, WIDE, Bench, Driver, Measure, socket_lines, wide_answers
from .load import LoadFailed
from .machine import pinned
from .servers import Process

Result = dict[str, Any]
SESSIONS = 10_000
AIM = 0.8
_PATIENCE_S = 120.0


class Consumed:
    """Writes steps of all sessions to a stream while its consumer stands still, then lets it go."""

    def __init__(self, bench: Bench, consumer: Process, url: str, name: str, sessions: int) -> None:
        self._bench, self._consumer, self._name, self._sessions = bench, consumer, name, sessions
        self._redis = Redis.from_url(url)
        self._texts = requests.json_rows()
        self._steps = 0

    def __call__(self, steps: int) -> Measure:
        """One round of so many steps of every session; the letters of its first 2000 entries are checked."""
        park, count, (redis,) = self._bench.park, steps * self._sessions, self._bench.park.redis_of("redis")
        park.only()
        with pinned(park.generator_core):
            last = self._write(steps)
        before, begun = (self._consumer.cpu_s(), redis.cpu_s()), time.perf_counter()
        park.only(self._consumer)
        while not self._done(last):
            if time.perf_counter() - begun > _PATIENCE_S:
                raise LoadFailed(f"the consumer has not stepped {count} entries in {_PATIENCE_S:g} s")
            time.sleep(0.01)
        took = time.perf_counter() - begun
        cpu = [
            1e6 * (now - then) / count
            for now, then in zip((self._consumer.cpu_s(), redis.cpu_s()), before, strict=True)
        ]
        checked = self._check()
        return Measure(count / took, 0.0, 0.0, *cpu, checked=checked)

    def _write(self, steps: int) -> bytes:
        """The last entry's id."""
        last = b""
        for k in range(self._steps, self._steps + steps):
            for start in range(0, self._sessions, 1000):
                with self._redis.pipeline(transaction=False) as pipe:
                    for s in range(start, min(self._sessions, start + 1000)):
                        inputs = self._texts[(13 * s + k) % POOL]
                        pipe.xadd(self._name, {"session": f"st-{s}", "inputs": inputs})
                    last = pipe.execute()[-1]
        self._steps += steps
        return last

    def _done(self, last: bytes) -> bool:
        (group,) = self._redis.xinfo_groups(self._name)
        return bool(group["last-delivered-id"] == last and not group["pending"])

    def _check(self) -> int:
        """Compare letters, the newest ones, with the offline pass; then empty both streams."""
        answers = []
        for _, fields in self._redis.xrevrange(f"{self._name}-out", count=2000):
            body = b'{"outputs":%s}' % fields[b"outputs"]
            answers.append((int(fields[b"session"][3:]) % WIDE, int(fields[b"step"]) - 1, body))
        for name in (self._name, f"{self._name}-out"):
            self._redis.xtrim(name, maxlen=0, approximate=False)
        return requests.check(answers, lambda body: json.loads(body)["outputs"], self._bench.wide)


def stream(bench: Bench, quick: bool) -> Generator[None, None, Result]:
    """JSON steps of 10,000 sessions from a stream and over a WebSocket, both on Redis, in turn."""
    sessions, rounds, steps = (1000, 2, 4) if quick else (SESSIONS, 4, 4)
    url = f"{bench.park.redis_url()}/{int(bench.base)}"
    name = bench.tag("stream-")
    consumer = bench.park.consumer(name, f"{name}-out", url)
    consumed = Consumed(bench, consumer, url, name, sessions)
    encode, verify = requests.frames_json("sw", sessions, LANES), partial(wide_answers, bench)
    connect, redis = socket_lines("/v1/models/bench/stream", 4, binary=False), bench.park.redis_of("redis")
    socket = Driver(bench, bench.stepcast("redis"), encode, connect, verify, sessions, redis=redis)
    consumed(1)  # which makes the sessions
    socket.touch()
    found: dict[str, list[Measure]] = {"stream": [], "socket": []}
    yield
    for _ in range(rounds):
        found["stream"].append(consumed(steps))
        found["socket"].append(socket(0.3 if quick else 1.0))
        yield
    pairs = zip(found["stream"], found["socket"], strict=True)
    shares = [over.cpu_us_per_step / of.cpu_us_per_step for of, over in pairs]
    rows = {kind: _row(each) for kind, each in found.items()}
    what = f"stream consumer, {sessions:,} sessions on Redis: steps per second and core / WebSocket 4 x 16"
    value = sorted(shares)[len(shares) // 2]
    check = {"what": what, "value": value, "compared": shares, "at_least": AIM, "holds": value >= AIM}
    return {"sessions": sessions, **rows, "checks": [check]}


def _row(measures: list[Measure]) -> Result:
    """The medians of some rounds."""
    middle = len(measures) // 2
    names = "steps_per_s", "cpu_us_per_step", "redis_us_per_step"
    return {name: sorted(getattr(measure, name) for measure in measures)[middle] for name in names}
