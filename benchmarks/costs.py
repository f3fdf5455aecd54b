"""What steps cost that are not of the plainest kind, each beside its plain twin: same door, same store, same round.

The cost is the server's processor time per step. Names begin with `cost`; with `aof` on Redis as it is on any machine.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from . import load, requests
from .bare import Truth
from .contenders import (
    GROUPS,
    LANES,
    SESSIONS,
    WIDE,
    Bench,
    Contender,
    Driver,
    Run,
    batch_steps,
    body_peer,
    http_lines,
    json_answers,
    socket_lines,
    wide_answers,
)
from .load import Encode
from .servers import Process
from .targets import COSTS

MANY = 5_000
CORS = "https://stepcast.example"
Verify = Callable[[load.Answers], int]


def _step(tag: str, name: str = "bench") -> Callable[[int], str]:
    return lambda s: f"/v1/models/{name}/sessions/{tag}-{s}/step"


def _stream(name: str, sockets: int) -> Callable[[int], list[load.Line]]:
    return socket_lines(f"/v1/models/{name}/stream", sockets, False)


def _gap_answers() -> Verify:
    values = requests.pool_without_gaps()
    truth = Truth(SESSIONS, inputs=lambda k: values[[requests.row(s, k) for s in range(SESSIONS)]])
    return lambda answers: requests.check(answers, requests.outputs_json, truth)


def _named_answers(bench: Bench) -> Verify:
    return lambda answers: requests.check(answers, requests.outputs_named, bench.truth)


def _three_answers() -> Verify:
    truth = Truth(3 * SESSIONS)
    return lambda answers: requests.check(answers, requests.outputs_rows, truth, 3)


def _first_answers(bench: Bench, answers: load.Answers) -> int:
    """Every answer is that of a session's first step."""
    first = [(requests.number_of(s, k, SESSIONS) % WIDE, 0, body) for s, k, body in answers]
    return requests.check(first, requests.outputs_json, bench.wide)


def _request_id() -> Callable[[], bytes]:
    numbers = itertools.count(0xA5_0000_0000)
    return lambda: b"x-request-id: %032x\r\n" % (next(numbers) * 0x9E3779B97F4A7C15 % 2**128)


def _traceparent() -> Callable[[], bytes]:
    numbers = itertools.count(0xA5_0000_0000)

    def line() -> bytes:
        number = next(numbers) * 0x9E3779B97F4A7C15
        return b"traceparent: 00-%032x-%016x-01\r\n" % (number % 2**128, number * 31 % 2**64)

    return line


# --- one step per request -------------------------------------------------------------------------------------------


def _driver(bench: Bench, server: Process, store: str, encode: Encode, connect: object, verify: Verify) -> Driver:
    return Driver(bench, server, encode, connect, verify, redis=bench.park.redis_of(store))  # type: ignore[arg-type]


def _http(
    bench: Bench,
    store: str,
    tag: str,
    *,
    served: str = "bench",
    seq: bool = True,
    header: Callable[[], bytes] | None = None,
    server: Process | None = None,
) -> Driver:
    encode = requests.http_json(_step(bench.tag(tag), served), SESSIONS, seq, header=header)
    return _driver(bench, server or bench.stepcast(store), store, encode, http_lines(LANES), json_answers(bench))


def _http_gap(bench: Bench) -> Run:
    encode = requests.http_json(_step("cg", "bench-gaps"), SESSIONS, texts=requests.json_gaps())
    return _driver(bench, bench.stepcast("memory"), "memory", encode, http_lines(LANES), _gap_answers())


def _http_named(bench: Bench) -> Run:
    encode = requests.http_json(_step("cw"), SESSIONS, texts=requests.json_named())
    return _driver(bench, bench.stepcast("memory"), "memory", encode, http_lines(LANES), _named_answers(bench))


def _http_three(bench: Bench) -> Run:
    encode = requests.http_json(_step("c3"), SESSIONS, texts=requests.json_threes(), stride=39)
    return _driver(bench, bench.stepcast("memory"), "memory", encode, http_lines(LANES), _three_answers())


def _http_first(bench: Bench, store: str) -> Run:
    encode, server = requests.http_first(_step(bench.tag("cn")), SESSIONS), bench.stepcast(store, "-new")
    return _driver(bench, server, store, encode, http_lines(LANES), partial(_first_answers, bench))


def _http_cors(bench: Bench, header: Callable[[], bytes] | None = None) -> Run:
    server = bench.stepcast("memory", "-cors", cors_origins=CORS)
    return _http(bench, "memory", "co" if header else "cc", header=header, server=server)


def _socket(bench: Bench, store: str, tag: str, sockets: int = 4, served: str = "bench") -> Driver:
    encode = requests.frames_json(bench.tag(tag), SESSIONS, LANES)
    return _driver(bench, bench.stepcast(store), store, encode, _stream(served, sockets), json_answers(bench))


def _socket_gap(bench: Bench) -> Run:
    encode = requests.frames_json("kg", SESSIONS, LANES, requests.json_gaps())
    return _driver(bench, bench.stepcast("memory"), "memory", encode, _stream("bench-gaps", 4), _gap_answers())


def _socket_three(bench: Bench) -> Run:
    encode = requests.frames_json("k3", SESSIONS, LANES, requests.json_threes(), 39)
    return _driver(bench, bench.stepcast("memory"), "memory", encode, _stream("bench", 4), _three_answers())


def _socket_first(bench: Bench) -> Run:
    encode, server = requests.frames_first("kn", SESSIONS, LANES), bench.stepcast("memory", "-new")
    return _driver(bench, server, "memory", encode, _stream("bench", 4), partial(_first_answers, bench))


def _socket_of(bench: Bench, sessions: int) -> Run:
    """All sessions on one socket."""
    encode, verify = requests.frames_json(f"s{sessions}", sessions, LANES), partial(wide_answers, bench)
    driver = Driver(bench, bench.stepcast("memory"), encode, _stream("bench", 1), verify, sessions)
    driver.touch()
    return driver


# --- batch steps ----------------------------------------------------------------------------------------------------


def _batch(bench: Bench, store: str, tag: str, served: str = "bench") -> Run:
    encode = requests.batch_msgpack(f"/v1/models/{served}/step", bench.tag(tag), GROUPS, SESSIONS)
    return batch_steps(bench, bench.stepcast(store), encode, bench.wide, store)


def _batch_gap(bench: Bench) -> Run:
    encode = requests.batch_msgpack("/v1/models/bench-gaps/step", "bg", GROUPS, SESSIONS, gaps=True)
    truth = Truth(GROUPS * SESSIONS, inputs=requests.batch_inputs(GROUPS, SESSIONS))
    return batch_steps(bench, bench.stepcast("memory"), encode, truth, "memory")


def _batch_json(bench: Bench, gaps: bool) -> Run:
    encode = requests.batch_json("/v1/models/bench-gaps/step", f"bj{gaps:d}", GROUPS, SESSIONS, gaps)
    inputs = requests.batch_inputs(GROUPS, SESSIONS) if gaps else None
    truth, decode = Truth(GROUPS * SESSIONS, inputs=inputs), requests.outputs_batch_json
    return batch_steps(bench, bench.stepcast("memory"), encode, truth, "memory", decode)


# --- everyone -------------------------------------------------------------------------------------------------------


def _one(name: str, what: str, prepare: Callable[..., Run], **how: object) -> Contender:
    return Contender(name, "cost", what, partial(prepare, **how), versus=True)


def everyone() -> list[Contender]:
    """All, in turn: who has a twin stands next to it."""
    memory, gaps, foreign = {"store": "memory"}, {"served": "bench-gaps"}, {"served": "bench-imported"}
    http, socket, batch = "HTTP JSON", "WebSocket 4 x 16", f"batch step of {SESSIONS}"
    plain = "Redis, append-only file as it is"
    return [
        _one("cost-http", f"{http}, memory", _http, **memory, tag="cp"),
        _one("cost-http-named", f"{http}, named", _http_named),
        _one("cost-http-request-id", f"{http}, x-request-id", _http, **memory, tag="cx", header=_request_id()),
        _one("cost-http-traceparent", f"{http}, traceparent", _http, **memory, tag="ct", header=_traceparent()),
        _one("cost-http-cors", f"{http}, CORS on", _http_cors),
        _one("cost-http-cors-origin", f"{http}, CORS on, Origin sent", _http_cors, header=_origin),
        _one("cost-http-foreign", f"{http}, imported graph", _http, **memory, **foreign, tag="cf"),
        _one("cost-http-three", f"{http}, sessions of three rows", _http_three),
        _one("cost-http-new", f"{http}, first steps", _http_first, **memory),
        _one("cost-http-gaps", f"{http}, model that takes gaps", _http, **memory, **gaps, tag="cq"),
        _one("cost-http-gap", f"{http}, a gap in every step", _http_gap),
        _one("cost-ws", f"{socket}, memory", _socket, **memory, tag="kp"),
        _one("cost-ws-foreign", f"{socket}, imported graph", _socket, **memory, **foreign, tag="kf"),
        _one("cost-ws-three", f"{socket}, sessions of three rows", _socket_three),
        _one("cost-ws-new", f"{socket}, first steps", _socket_first),
        _one("cost-ws-gaps", f"{socket}, model that takes gaps", _socket, **memory, **gaps, tag="kq"),
        _one("cost-ws-gap", f"{socket}, a gap in every step", _socket_gap),
        _one("cost-ws-few", f"one WebSocket, {LANES} sessions", _socket_of, sessions=LANES),
        _one("cost-ws-many", f"one WebSocket, {MANY:,} sessions", _socket_of, sessions=MANY),
        _one("cost-batch", f"{batch}, memory", _batch, **memory, tag="bp"),
        _one("cost-batch-foreign", f"{batch}, imported graph", _batch, **memory, **foreign, tag="bf"),
        _one("cost-batch-gaps", f"{batch}, model that takes gaps", _batch, **memory, **gaps, tag="bq"),
        _one("cost-batch-gap", f"{batch}, one gap", _batch_gap),
        _one("cost-batch-json-gaps", f"{batch}, JSON", _batch_json, gaps=False),
        _one("cost-batch-json-gap", f"{batch}, JSON, one gap", _batch_json, gaps=True),
        _one("cost-redis-http", f"{http}, Redis", _http, store="redis", tag="rh"),
        _one("cost-cluster-http", f"{http}, Redis Cluster", _http, store="cluster", tag="rh"),
        _one("cost-redis-new", f"{http}, Redis, first steps", _http_first, store="redis"),
        _one("cost-redis-ws-64", "WebSocket 64 x 1, Redis", _socket, store="redis", tag="r6", sockets=64),
        _one("cost-cluster-ws-64", "WebSocket 64 x 1, Redis Cluster", _socket, store="cluster", tag="r6", sockets=64),
        _one("cost-redis-ws-4", f"{socket}, Redis", _socket, store="redis", tag="r4"),
        _one("cost-cluster-ws-4", f"{socket}, Redis Cluster", _socket, store="cluster", tag="r4"),
        _one("aof-http", f"{http} without seq, {plain}", _http, store="plain", tag="ah", seq=False),
        body_peer("aof-mosec", f"mosec, {plain}", "mosec_app", "/inference", "plain"),
        _one(
            "aof-foreign",
            f"{http} without seq, {plain}, imported graph",
            _http,
            store="plain",
            **foreign,
            tag="af",
            seq=False,
        ),
        body_peer("aof-mosec-foreign", f"mosec, {plain}, imported graph", "mosec_foreign", "/inference", "plain"),
        _one("aof-batch", f"{batch}, {plain}", _batch, store="plain", tag="ab"),
    ]


def _origin() -> bytes:
    return b"origin: %s\r\n" % CORS.encode()


def with_twins(names: Sequence[str]) -> set[str]:
    """These and their plain twins."""
    return {*names, *(cost.twin for cost in COSTS if cost.name in names)}
