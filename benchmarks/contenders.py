"""Who is measured: each contender starts its server and says what one round of load on it has shown."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from . import load, requests
from .bare import Bare, Truth
from .load import Encode, Sample, Traffic
from .machine import pinned
from .servers import ROOT, Park, Process

SESSIONS = 256
LANES = 64
WIDE = 1024
SILERO = ROOT.parent / "shared" / "models" / "onnx" / "silero_vad.onnx"
STORES = ("memory", "sqlite", "redis")


@dataclass
class Measure:
    """One round of one contender."""

    steps_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_step: float
    """Processor time of the server (without Redis) per step."""
    redis_us_per_step: float = 0.0
    generator_busy: float = 0.0
    checked: int = 0
    """Numbers compared with the offline pass."""


Run = Callable[[float], Measure]


@dataclass(frozen=True)
class Contender:
    """A name, what it is, and how to make ready for its rounds."""

    name: str
    kind: str
    """limit, peer or stepcast."""
    what: str
    prepare: Callable[["Bench"], Run]
    package: str | None = None
    """A package that must be installed."""
    versus: bool = False
    """Whether the other checkout's server is measured too, where there is one."""

    def missing(self) -> str | None:
        """Why it is absent, None where it is not."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"package {self.package!r} is not installed (extra `bench`)"
        return None


@dataclass
class Bench:
    """What all contenders share, and whose server they ask."""

    park: Park
    truth: Truth = field(default_factory=lambda: Truth(SESSIONS))
    wide: Truth = field(default_factory=lambda: Truth(WIDE))
    """Session s and s + WIDE have the same inputs: this is enough for any number of sessions."""
    base: bool = False
    """The server is the other checkout's."""
    said: dict[str, float] = field(default_factory=dict)
    """What one side has measured for both."""
    silero: Path = SILERO
    """Silero's graph, which is not in the repository."""

    def sides(self) -> tuple["Bench", ...]:
        """This one, and the same for the other checkout's server where there is one."""
        return (self, replace(self, base=True)) if self.park.against else (self,)

    def stepcast(self, store: str, name: str = "", **settings: object) -> Process:
        """See Park.stepcast."""
        return self.park.stepcast(store, name, base=self.base, **settings)

    def tag(self, name: str) -> str:
        """The beginning of sessions' names; in a Redis Cluster both sides have one database."""
        return f"{name}b" if self.base else f"{name}a"

    def agreed(self, what: str, measure: Callable[[], float]) -> float:
        """A number that both sides take: whoever comes first measures it."""
        if what not in self.said:
            self.said[what] = measure()
        return self.said[what]


@dataclass
class Driver:
    """Loads one server, again and again on the same sessions."""

    bench: Bench
    server: Process
    encode: Encode
    connect: Callable[[int], list[load.Line]]
    verify: Callable[[load.Answers], int]
    sessions: int = SESSIONS
    lanes: int = LANES
    rows: int = 1
    """Steps per request."""
    redis: tuple[Process, ...] = ()
    """The Redis processes that it works with."""

    def __post_init__(self) -> None:
        self.traffic = Traffic(self.encode, self.sessions, self.lanes)

    def __call__(self, seconds: float) -> Measure:
        """One closed-loop round."""
        return self.measured(lambda lines: load.closed_loop(lines, self.traffic, seconds))

    def open(self, rate: float, seconds: float) -> Measure:
        """One open-loop round."""
        return self.measured(lambda lines: load.open_loop(lines, self.traffic, rate, seconds))

    def measured(self, run: Callable[[list[load.Line]], Sample]) -> Measure:
        """Connect, run, check, count."""
        self.bench.park.only(self.server)
        with pinned(self.bench.park.generator_core):
            lines = self.connect(self.server.port)
            try:
                before = self._cpu_s()
                sample = run(lines)
                after = self._cpu_s()
            finally:
                load.close(lines)
            checked = self.verify(sample.answers)
        steps = len(sample.answers) * self.rows
        return Measure(
            sample.rate * self.rows,
            1e3 * sample.percentile_s(50),
            1e3 * sample.percentile_s(99),
            1e6 * (after[0] - before[0]) / steps,
            1e6 * (after[1] - before[1]) / steps,
            sample.generator_busy,
            checked,
        )

    def touch(self) -> None:
        """Step every session at least once, so that none is new when it is measured."""
        self.measured(lambda lines: load.each_once(lines, self.traffic))

    def _cpu_s(self) -> tuple[float, float]:
        return self.server.cpu_s(), sum(process.cpu_s() for process in self.redis)


def http_lines(lanes: int) -> Callable[[int], list[load.Line]]:
    """One keep-alive connection per lane."""
    return lambda port: [load.HttpLine(port, lane) for lane in range(lanes)]


def socket_lines(path: str, sockets: int, binary: bool, tagged: bool = True) -> Callable[[int], list[load.Line]]:
    """LANES lanes over some WebSockets."""
    return socket_lines_of(LANES, path, sockets, binary, tagged)


def socket_lines_of(
    lanes: int, path: str, sockets: int, binary: bool, tagged: bool = True
) -> Callable[[int], list[load.Line]]:
    """Any number of lanes over some WebSockets."""
    return lambda port: [load.SocketLine(port, path, range(i, lanes, sockets), binary, tagged) for i in range(sockets)]


# --- limits ---------------------------------------------------------------------------------------------------------


def _bare(batch: int) -> Contender:
    def prepare(bench: Bench) -> Run:
        bare = Bare(batch)

        def run(seconds: float) -> Measure:
            bench.park.only()
            with pinned(bench.park.server_core):
                rate, took = bare.rate(seconds)
            p50, p99 = np.percentile(took, [50, 99]) * 1e3
            return Measure(rate, float(p50), float(p99), 1e6 / rate)

        return run

    return Contender(f"bare-{batch}", "limit", f"bare onnxruntime, batch {batch}", prepare)


def _echo(name: str, what: str, server: str, path: str, kind: str = "limit") -> Contender:
    def prepare(bench: Bench) -> Run:
        encode = requests.http_json(lambda _: path, SESSIONS)
        if path == "/pydantic":
            verify: Callable[[load.Answers], int] = len
        else:

            def verify(answers: load.Answers) -> int:
                return requests.check_echo(answers, encode, strip=True)

        return Driver(bench, bench.park.peer(server), encode, http_lines(LANES), verify)

    return Contender(name, kind, what, prepare)


def _socket_echo(sockets: int, binary: bool) -> Contender:
    def prepare(bench: Bench) -> Run:
        make = requests.frames_msgpack if binary else requests.frames_json
        encode = make("e", SESSIONS, LANES)
        connect = socket_lines("/", sockets, binary, tagged=False)

        def verify(answers: load.Answers) -> int:
            return requests.check_echo(answers, encode, strip=False)

        return Driver(bench, bench.park.peer("websocket"), encode, connect, verify)

    kind = "msgpack" if binary else "json"
    what = f"uvicorn WebSocket echo of {kind} frames, {sockets} sockets x {LANES // sockets} in flight"
    return Contender(f"ws-echo-{kind}-{sockets}x{LANES // sockets}", "limit", what, prepare)


# --- peers ----------------------------------------------------------------------------------------------------------


def _by_hand() -> Contender:
    def prepare(bench: Bench) -> Run:
        server = bench.park.peer("by_hand", "--redis", bench.park.redis_url())
        encode = requests.http_json(lambda s: f"/step/h-{s}", SESSIONS, seq=False)
        return Driver(bench, server, encode, http_lines(LANES), json_answers(bench), redis=bench.park.redis_of("redis"))

    return Contender("by-hand-redis", "peer", "FastAPI + onnxruntime + Redis by hand", prepare, "fastapi")


def body_peer(name: str, what: str, server: str, path: str, store: str) -> Contender:
    """A service whose body names the session."""

    def prepare(bench: Bench) -> Run:
        arguments = ("--redis", bench.park.redis_url(store)) if store != "memory" else ()
        process = bench.park.peer(server, *arguments)
        texts = requests.json_rows()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n".encode()

        def encode(session: int, k: int) -> bytes:
            body = b'{"session":"%d","inputs":%s}' % (session, texts[requests.row(session, k)])
            return head + b"content-length: %d\r\n\r\n" % len(body) + body

        redis = bench.park.redis_of(store)
        return Driver(bench, process, encode, http_lines(LANES), json_answers(bench), redis=redis)

    return Contender(name, "peer", what, prepare, server.partition("_")[0])


# --- Stepcast -------------------------------------------------------------------------------------------------------


def json_answers(bench: Bench) -> Callable[[load.Answers], int]:
    """Checks single steps as JSON."""
    return lambda answers: requests.check(answers, requests.outputs_json, bench.truth)


def msgpack_answers(bench: Bench) -> Callable[[load.Answers], int]:
    """Checks single steps as msgpack."""
    return lambda answers: requests.check(answers, requests.outputs_msgpack, bench.truth)


def wide_answers(bench: Bench, answers: load.Answers) -> int:
    """Checks single steps as JSON of any number of sessions."""
    same = [(s % WIDE, k, body) for s, k, body in answers]
    return requests.check(same, requests.outputs_json, bench.wide)


def http_json(
    bench: Bench, server: Process, tag: str, store: str, *, lanes: int = LANES, sessions: int = SESSIONS
) -> Driver:
    """Single steps over HTTP JSON; `tag` names the sessions."""
    encode = requests.http_json(lambda s: f"/v1/models/bench/sessions/{tag}-{s}/step", sessions)
    verify, redis = partial(wide_answers, bench), bench.park.redis_of(store)
    return Driver(bench, server, encode, http_lines(lanes), verify, sessions, lanes, redis=redis)


def _http(store: str, kind: str) -> Contender:
    def prepare(bench: Bench) -> Run:
        server = bench.stepcast(store)
        if kind == "json":
            return http_json(bench, server, "j", store)
        encode = requests.http_msgpack(lambda s: f"/v1/models/bench/sessions/m-{s}/step", SESSIONS)
        redis = bench.park.redis_of(store)
        return Driver(bench, server, encode, http_lines(LANES), msgpack_answers(bench), redis=redis)

    name, what = f"http-{kind}-{store}", f"Stepcast, HTTP {kind}, {store}"
    return Contender(name, "stepcast", what, prepare, versus=kind == "json")


def _inference(store: str) -> Contender:
    def prepare(bench: Bench) -> Run:
        encode, redis = requests.inference_raw("i", SESSIONS), bench.park.redis_of(store)

        def verify(answers: load.Answers) -> int:
            return requests.check(answers, requests.outputs_raw, bench.truth)

        return Driver(bench, bench.stepcast(store), encode, http_lines(LANES), verify, redis=redis)

    what = f"Stepcast, Open Inference Protocol over HTTP, raw tensors, {store}"
    return Contender(f"inference-raw-{store}", "stepcast", what, prepare)


def socket_json(bench: Bench, server: Process, tag: str, store: str, sockets: int) -> Driver:
    """Single steps as JSON frames, LANES in flight over some sockets."""
    encode = requests.frames_json(tag, SESSIONS, LANES)
    connect = socket_lines("/v1/models/bench/stream", sockets, False)
    return Driver(bench, server, encode, connect, json_answers(bench), redis=bench.park.redis_of(store))


def _socket(store: str, kind: str, sockets: int) -> Contender:
    def prepare(bench: Bench) -> Run:
        server, tag = bench.stepcast(store), f"w{kind[0]}{sockets}"
        if kind == "json":
            return socket_json(bench, server, tag, store, sockets)
        encode = requests.frames_msgpack(tag, SESSIONS, LANES)
        connect = socket_lines("/v1/models/bench/stream", sockets, True)
        return Driver(bench, server, encode, connect, msgpack_answers(bench), redis=bench.park.redis_of(store))

    name = f"ws-{kind}-{sockets}x{LANES // sockets}-{store}"
    what = f"Stepcast, WebSocket {kind}, {sockets} sockets x {LANES // sockets} in flight, {store}"
    return Contender(name, "stepcast", what, prepare, versus=kind == "json" and store != "sqlite")


GROUPS = 2


def batch_steps(
    bench: Bench,
    server: Process,
    encode: Encode,
    truth: Truth,
    store: str,
    decode: requests.Decode = requests.outputs_batch,
) -> Driver:
    """Batch steps of SESSIONS over GROUPS connections."""

    def verify(answers: load.Answers) -> int:
        return requests.check(answers, decode, truth, SESSIONS)

    redis = bench.park.redis_of(store)
    return Driver(bench, server, encode, http_lines(GROUPS), verify, GROUPS, GROUPS, rows=SESSIONS, redis=redis)


def _batch(store: str) -> Contender:
    def prepare(bench: Bench) -> Run:
        encode = requests.batch_msgpack("/v1/models/bench/step", "b", GROUPS, SESSIONS)
        return batch_steps(bench, bench.stepcast(store), encode, bench.wide, store)

    what = f"Stepcast, batch-step of {SESSIONS} sessions, msgpack, {GROUPS} connections, {store}"
    return Contender(f"batch-{store}", "stepcast", what, prepare, versus=store != "sqlite")


def everyone() -> list[Contender]:
    """All contenders, those of one kind of transport next to their limit."""
    found = [_bare(1), _bare(64), _bare(256)]
    found += [_echo("asgi-echo", "uvicorn, plain ASGI echo", "asgi", "/")]
    found += [_http(store, "json") for store in STORES]
    found += [_http(store, "msgpack") for store in STORES]
    found += [_inference(store) for store in STORES]
    found += [
        _echo("fastapi-request", "FastAPI echo, Request", "fastapi_echo", "/request"),
        _echo("fastapi-pydantic", "FastAPI echo, pydantic", "fastapi_echo", "/pydantic"),
        _by_hand(),
        body_peer("mosec-redis", "mosec + Redis MGET / MSET by hand", "mosec_app", "/inference", "redis"),
        body_peer("litserve", "LitServe, states in memory", "litserve_app", "/predict", "memory"),
    ]
    found += [_batch(store) for store in STORES]
    for kind, sockets in (("json", 64), ("json", 4), ("msgpack", 64), ("msgpack", 4)):
        found.append(_socket_echo(sockets, kind == "msgpack"))
        found += [_socket(store, kind, sockets) for store in STORES]
    return found
