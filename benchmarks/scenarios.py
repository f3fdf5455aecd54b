"""What rates do not show: latency under a schedule, long histories, many sessions, long sequences, several workers.

A scenario is a generator that yields after each of its rounds, and before the first: so the servers of two checkouts
take turns.
"""

import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from . import load, requests
from .bare import POOL, Bare, pool
from .contenders import LANES, SESSIONS, Bench, Driver, Measure, http_json, http_lines
from .load import Traffic
from .machine import memory_bytes, pinned
from .requests import WrongAnswer
from .rounds import spread

Floats = npt.NDArray[np.float32]
Result = dict[str, Any]
Rounds = Generator[None, None, Result]
Scenario = Callable[[Bench, bool], Rounds]


def run(name: str, bench: Bench, quick: bool) -> Result:
    """Run one on this checkout's servers, and in turns on the other's where there is one: its checks then have both.

    Raises:
        StartFailed, LoadFailed, WrongAnswer.
    """
    sides = [SCENARIOS[name](side, quick) for side in (bench.sides() if name in WITH_SERVERS else (bench,))]
    results: dict[int, Result] = {}
    turns = itertools.cycle((range(len(sides)), range(len(sides))[::-1]))
    while len(results) < len(sides):
        for i in next(turns):
            try:
                next(sides[i])
            except StopIteration as end:
                results[i] = end.value
    if len(sides) == 1:
        return results[0]
    for ours, theirs in zip(results[0]["checks"], results[1]["checks"], strict=True):
        each = [a / b for a, b in zip(ours["compared"], theirs["compared"], strict=True)]
        ours["base"] = theirs["value"]
        ours["new_over_base"] = dict(zip(("median", "min", "max"), spread(each), strict=True))
    return {**results[0], "base": results[1]}


def _check(
    what: str,
    values: Sequence[float],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    compared: Sequence[float] | None = None,
) -> Result:
    """The median of some rounds against what is promised.

    Args:
        compared: What two checkouts are compared by, round by round, where it is not the values.
    """
    value = statistics.median(values)
    said: Result = {"what": what, "value": value, "compared": list(compared or values)}
    if at_most is not None:
        return {**said, "at_most": at_most, "holds": value <= at_most}
    return {**said, "at_least": at_least, "holds": value >= (at_least or 0.0)}


def _redis_driver(bench: Bench, tag: str, lanes: int = LANES) -> Driver:
    return http_json(bench, bench.stepcast("redis"), tag, "redis", lanes=lanes)


def open_loop(bench: Bench, quick: bool) -> Rounds:
    """HTTP JSON on Redis by a Poisson schedule: latency against load, the median of some rounds of all loads."""
    driver = _redis_driver(bench, "oc")
    closed = bench.agreed("open-loop", lambda: driver(1.0 if quick else 2.0).steps_per_s)
    seconds, rounds = (1.0, 1) if quick else (2.0, 5)
    drivers = {
        share: _redis_driver(bench, f"o{share}", lanes=SESSIONS)
        for share in ((0.5,) if quick else (0.25, 0.5, 0.75, 0.9))
    }
    measures: dict[float, list[Measure]] = {share: [] for share in drivers}
    yield
    for _ in range(rounds):
        for share, driver in drivers.items():
            measures[share].append(driver.open(share * closed, seconds))
        yield
    curve = [
        {
            "share": share,
            "steps_per_s": share * closed,
            "p50_ms": statistics.median(measure.p50_ms for measure in each),
            "p99_ms": statistics.median(measure.p99_ms for measure in each),
            "p99_ms_rounds": [measure.p99_ms for measure in each],
        }
        for share, each in measures.items()
    ]
    half = next(point for point in curve if point["share"] == 0.5)
    what = "open loop at half the closed-loop rate, HTTP JSON on Redis: p99 ms"
    checks = [_check(what, half["p99_ms_rounds"], at_most=5.0)]
    return {"closed_steps_per_s": closed, "curve": curve, "checks": checks}


def lone(bench: Bench, quick: bool) -> Rounds:
    """One client, one request at a time: its p50 beside what it is made of."""
    seconds, rounds, found = 0.5 if quick else 1.0, 2 if quick else 4, []
    stepcast = _redis_driver(bench, "lone", lanes=1)
    encode = requests.http_json(lambda _: "/", SESSIONS)
    echo = Driver(bench, bench.park.peer("asgi"), encode, http_lines(1), len, lanes=1)
    yield
    for _ in range(rounds):
        bench.park.only()
        with pinned(bench.park.server_core):
            run_ms = 1e3 * statistics.median(Bare(1).rate(seconds / 2)[1])
            redis_ms = 1e3 * _redis_round_trip_s(bench, seconds / 2)
        echo_ms, ours_ms = echo(seconds).p50_ms, stepcast(seconds).p50_ms
        found.append({"run_ms": run_ms, "redis_ms": redis_ms, "echo_ms": echo_ms, "stepcast_ms": ours_ms})
        yield
    ours = [parts.pop("stepcast_ms") for parts in found]
    ratios = [ms / sum(parts.values()) for ms, parts in zip(ours, found, strict=True)]
    what = "lone client: p50 / (bare run + ASGI echo + Redis round trip)"
    checks = [_check(what, ratios, at_most=2.0, compared=ours)]
    return {"ratios": ratios, "last": {**found[-1], "stepcast_ms": ours[-1]}, "checks": checks}


def _redis_round_trip_s(bench: Bench, seconds: float) -> float:
    """The median time of one PING."""
    took, stop = [], time.perf_counter() + seconds
    with socket.create_connection(("127.0.0.1", bench.park.redis().port)) as redis:
        redis.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before = time.perf_counter()
        while before < stop:
            redis.sendall(b"PING\r\n")
            redis.recv(64)
            now = time.perf_counter()
            took.append(now - before)
            before = now
    return statistics.median(took)


class _Client:
    """A blocking client for long calls; msgpack."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def call(self, path: str, x: Floats) -> tuple[Floats, float]:
        """Outputs, and seconds from before the sending to the last byte."""
        body = msgspec.msgpack.encode({"inputs": x.tobytes(), "shape": list(x.shape)})
        before = time.perf_counter()
        self._connection.request("POST", path, body, {"content-type": "application/msgpack"})
        answer = self._connection.getresponse()
        data = answer.read()
        took = time.perf_counter() - before
        if answer.status != 200:
            raise load.LoadFailed(f"{path}: {answer.status} {data[:300]!r}")
        fields = msgspec.msgpack.decode(data)
        return np.frombuffer(fields["outputs"], "<f4").reshape(fields["shape"]), took


def history(bench: Bench, quick: bool) -> Rounds:
    """One more step after 100 and after 100,000 steps, beside running the whole history again."""
    server = bench.stepcast("memory")
    bench.park.only(server)
    client = _Client(server.port)
    short, long = 100, 10_000 if quick else 100_000
    rows = pool()[np.arange(long) % POOL]
    path = "/v1/models/bench/sessions/{}/step"
    for name, steps in (("short", short), ("long", long)):
        for at in range(0, steps, 10_000):
            client.call(path.format(name), rows[None, at : min(steps, at + 10_000)])
    again = {str(n): 1e3 * client.call("/v1/models/bench/predict", rows[:n])[1] for n in (short, long)}
    found: dict[str, list[float]] = {"short": [], "long": []}
    yield
    for _ in range(2 if quick else 4):
        bench.park.only(server)
        took: dict[str, list[float]] = {"short": [], "long": []}
        for i in range(100 if quick else 150):
            for name in took:
                took[name].append(client.call(path.format(name), rows[i % POOL])[1])
        for name in found:
            found[name].append(1e3 * statistics.median(took[name]))
        yield
    ratios = [late / early for late, early in zip(found["long"], found["short"], strict=True)]
    checks = [_check(f"one more step after {long:,} steps / after {short}", ratios, at_most=1.1)]
    medians = [statistics.median(found[name]) for name in ("short", "long")]
    return {"one_step_ms": {str(short): medians[0], str(long): medians[1]}, "whole_history_ms": again, "checks": checks}


def growth(bench: Bench, quick: bool) -> Rounds:
    """100 to 100,000 sessions in random order on Redis; the hot cache holds all, then one in ten."""
    sizes = (100, 5_000) if quick else (100, 1_000, 10_000, 100_000)
    rounds, checks, rates = (1 if quick else 4), [], {}
    small = sizes[-1] * 4096 // 10
    for label, hot_bytes in (("all hot", 2 * 2**30), ("one in ten hot", small)):
        server = bench.stepcast("redis", f"-{label.replace(' ', '-')}", hot_bytes=hot_bytes)
        drivers = {size: _touched(bench, server, f"{label[:2].strip()}{size}", size) for size in sizes}
        measures: dict[int, list[Measure]] = {size: [] for size in sizes}
        yield
        for _ in range(rounds):
            for size, driver in drivers.items():
                driver(0.5)  # its sessions have been cold for a while
                measures[size].append(driver(1.0))
            yield
        rows = [
            {
                "sessions": size,
                "steps_per_s": statistics.median(m.steps_per_s for m in each),
                "p99_ms": statistics.median(m.p99_ms for m in each),
                "cpu_us_per_step": statistics.median(m.cpu_us_per_step for m in each),
                "redis_us_per_step": statistics.median(m.redis_us_per_step for m in each),
            }
            for size, each in measures.items()
        ]
        rates[label] = {"hot_bytes": hot_bytes, "resident_bytes": memory_bytes(server.pid), "rates": rows}
        few, many = ([m.steps_per_s for m in measures[size]] for size in (sizes[0], sizes[-1]))
        fall = 1 - statistics.median(many) / statistics.median(few)
        kept = [a / b for a, b in zip(many, few, strict=True)]
        what = f"{sizes[0]} to {sizes[-1]:,} sessions, {label}: fall of the rate"
        limit = 0.2 if label == "all hot" else 0.5
        checks.append(_check(what, [fall], at_most=limit, compared=kept))
        bench.park.end(server)
    return {"growth": rates, "checks": checks}


def _touched(bench: Bench, server: Any, tag: str, size: int) -> Driver:
    """Loads `size` sessions that all exist, each lane going round its own in random order."""
    driver = http_json(bench, server, tag, "redis", sessions=size)
    driver.traffic = Traffic(driver.encode, size, LANES, shuffled=True)
    driver.touch()
    return driver


def long_sequences(bench: Bench, quick: bool) -> Rounds:
    """A call of [1, 10000, F] beside one bare run, and what it does to the single steps of others."""
    steps, rounds = 10_000, 2 if quick else 4
    x = pool()[np.arange(steps) % POOL][None]
    server = bench.stepcast("memory")
    bench.park.only(server)
    client = _Client(server.port)
    path = "/v1/models/bench/sessions/seq-{}/step"
    shares, bare_s, call_s = [], 0.0, 0.0
    yield
    for i in range(rounds):
        bench.park.only(server)
        with pinned(bench.park.server_core):
            bare = Bare(1)
            before = time.perf_counter()
            expected = bare.step(x)
            bare_s = time.perf_counter() - before
        with pinned(bench.park.generator_core):
            got, call_s = client.call(path.format(i), x)
        if not np.allclose(got, expected, requests.RTOL, requests.ATOL):
            raise WrongAnswer("the long call's outputs differ from the bare run's")
        shares.append(bare_s / call_s)
        yield
    p99_ms = yield from _interference(bench, server, path, x, 1 if quick else 7)
    ratio = statistics.median(p99_ms["beside"]) / statistics.median(p99_ms["without"])
    what = "p99 of single steps at half load, during long calls / without"
    checks = [
        _check("[1, 10000, F] call: bare run's time / its time", shares, at_least=0.9),
        _check(what, [ratio], at_most=2.0, compared=p99_ms["beside"]),
    ]
    return {"shares": shares, "last": {"bare_s": bare_s, "call_s": call_s}, "p99_ms": p99_ms, "checks": checks}


def _interference(
    bench: Bench, server: Any, path: str, x: Floats, rounds: int
) -> Generator[None, None, dict[str, list[float]]]:
    """p99 (ms) of single steps at half load without and with long calls one after the other, by round."""
    closed = http_json(bench, server, "lh", "memory")
    half = bench.agreed("long", lambda: closed(1.0).steps_per_s / 2)
    driver = http_json(bench, server, "lo", "memory", lanes=SESSIONS)
    found: dict[str, list[float]] = {"without": [], "beside": []}
    for _ in range(rounds):
        found["without"].append(driver.open(half, 1.5).p99_ms)
        with _long_calls(bench, server.port, path.format("beside"), x):
            found["beside"].append(driver.open(half, 1.5).p99_ms)
        yield
    return found


@contextlib.contextmanager
def _long_calls(bench: Bench, port: int, path: str, x: Floats) -> Iterator[None]:
    """Calls one after the other, from a process of their own: a thread here would hold up the generator."""
    context = multiprocessing.get_context("spawn")
    first, stop = context.Event(), context.Event()
    with pinned(bench.park.generator_core):
        caller = context.Process(target=_keep_calling, args=(port, path, x, first, stop), daemon=True)
        caller.start()
    try:
        if not first.wait(60):
            raise load.LoadFailed("no long call was answered within 60 s")
        yield
    finally:
        stop.set()
        caller.join()


def _keep_calling(port: int, path: str, x: Floats, first: Any, stop: Any) -> None:
    if hasattr(os, "SCHED_IDLE"):  # the generator, on the same core, does not wait for this one's 640 kB
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    client = _Client(port)
    while not stop.is_set():
        client.call(path, x)
        first.set()


def workers(bench: Bench, quick: bool) -> Rounds:
    """Two workers on one Redis beside one: processor time per step at equal load, and the throughput of each."""
    seconds, rounds, found = 1.0 if quick else 3.0, 1 if quick else 3, []
    servers = {n: bench.stepcast("redis", f"-{n}-workers", workers=n) for n in (1, 2)}
    drivers = {n: http_json(bench, server, f"k{n}", "redis") for n, server in servers.items()}
    rates = {n: driver(seconds).steps_per_s for n, driver in drivers.items()}
    rate = bench.agreed("workers", lambda: 0.5 * min(rates.values()))
    yield
    for _ in range(rounds):
        cpu = {n: driver.open(rate, seconds).cpu_us_per_step for n, driver in drivers.items()}
        found.append(cpu[2] / cpu[1])
        yield
    for server in servers.values():
        bench.park.end(server)
    checks = [_check("two workers on one Redis: processor time per step / one worker's", found, at_most=1.15)]
    return {"steps_per_s": rates, "at_steps_per_s": rate, "ratios": found, "checks": checks}


def cuda(_: Bench, quick: bool) -> Rounds:
    """See device.cuda, which asks no server."""
    from . import device

    yield
    return device.cuda(None, quick)


def silero(bench: Bench, quick: bool) -> Rounds:
    """See silero.silero."""
    from . import silero

    return (yield from silero.silero(bench, quick))


def stream(bench: Bench, quick: bool) -> Rounds:
    """See streams.stream."""
    from . import streams

    return (yield from streams.stream(bench, quick))


def exports(bench: Bench, quick: bool) -> Rounds:
    """See exports.exports."""
    from . import exports

    return (yield from exports.exports(bench, quick))


SCENARIOS: dict[str, Scenario] = {
    "open-loop": open_loop,
    "lone": lone,
    "history": history,
    "long": long_sequences,
    "growth": growth,
    "workers": workers,
    "stream": stream,
    "silero": silero,
    "exports": exports,
    "cuda": cuda,
}
WITH_SERVERS = SCENARIOS.keys() - {"cuda", "silero", "exports", "stream"}  # whose servers may be another checkout's too


def plain(result: Result) -> str:
    """A result without its checks and without the other checkout's, for the eye."""
    shown = {k: v for k, v in result.items() if k not in ("checks", "base")}
    return json.dumps(shown, default=lambda v: round(float(v), 4))
