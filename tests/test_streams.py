"""`stepcast consume`: entries of a stream are stepped once each, in order, whoever dies; the laws through a stream."""

import json
import re
import signal
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import test_laws as laws
from doors import DOORS, STEP_DOORS, Array, Script
from redis_servers import RedisFactory, RedisServer, SharedRedis, cluster_url, each_redis, eventually
from serving import FEW, MODELS, Running, running
from streams import ConsumerProcess, Letter, StreamDoor, Streams, consuming, repository

from service.engine.model import Runtime
from service.records.record import Record, decode
from service.store.redis.streams import source_name
from stepcast.errors import ConfigError, StepcastError
from stepcast.shares import share_of

pytestmark = pytest.mark.service
pytest_generate_tests = each_redis

KIND = "lstm"
NAMES = ("u", "v", "w")
X = np.random.default_rng(5).normal(size=(64, 40, 3)).astype(np.float32)  # of 64 sessions


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one model."""
    return repository(tmp_path_factory.mktemp("streams"), KIND)


@pytest.fixture(scope="module")
def offline() -> Array:
    """What one pass over X answers, (64, 40, O)."""
    return passed(X)


@pytest.fixture
def name() -> str:
    """A stream that no other test has."""
    return f"readings-{Random().getrandbits(48):012x}"


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """What a test opens, closed at its end."""
    with ExitStack() as stack:
        yield stack


def passed(x: Array, kind: str = KIND) -> Array:
    """Outputs (B, T, O) of one pass over x (B, T, F)."""
    runtime = Runtime(MODELS / kind / "1", device="cpu")
    start = np.frombuffer(runtime.initial(len(x)), np.uint8).reshape(len(x), -1)
    outputs: Array = runtime.run(x, None, start)[0]
    return outputs


def place(
    url: str, name: str, opened: ExitStack, shares: int = 1, apart: str | None = None, namespace: str | None = None
) -> Streams:
    """Streams that are closed at the test's end; their sessions are in a namespace of their own."""
    streams = Streams(url, name, shares, apart)
    streams.namespace = namespace or name
    opened.callback(streams.close)
    return streams


def recorded(streams: Streams, session: str) -> Record:
    """A session's record."""
    data = streams.record(KIND, session)
    assert data is not None
    return decode(data)


def write(streams: Streams, sessions: range, steps: range) -> list[str]:
    """Ask for steps of X, one session after the other in each step."""
    inputs = [(f"s{i}", {"packed": X[i, t].tobytes()}) for t in steps for i in sessions]
    return streams.add_all(inputs)


def by_session(letters: list[Letter]) -> dict[str, list[Letter]]:
    """The letters of each session, doubles dropped by their step."""
    found: dict[str, dict[int, Letter]] = defaultdict(dict)
    for told in letters:
        first = found[told.session].setdefault(told.step, told)
        assert told.entry == first.entry
        np.testing.assert_array_equal(told.outputs, first.outputs)
    return {session: list(steps.values()) for session, steps in found.items()}


def check(letters: list[Letter], sessions: range, steps: int, offline: Array, once: bool = True) -> None:
    """Each session has its steps in order, each once, with the outputs of one pass."""
    assert not once or len(letters) == len(sessions) * steps
    found = by_session(letters)
    assert found.keys() == {f"s{i}" for i in sessions}
    for i in sessions:
        assert [told.step for told in found[f"s{i}"]] == list(range(1, steps + 1))
        got = np.stack([told.outputs for told in found[f"s{i}"]])
        np.testing.assert_allclose(got, offline[i, :steps], rtol=1e-4, atol=1e-5)


# --- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["redis", "apart", "sqlite", "cluster"])
def test_a_stream_is_stepped_as_one_pass_is(
    store: str, shared_redis: SharedRedis, models: Path, name: str, opened: ExitStack, offline: Array, tmp_path: Path
) -> None:
    """Forty sessions of ten steps: outputs, order and step numbers; nothing is pending, or a dead letter."""
    url = shared_redis.get("redis")[0].url
    streams = place(url, name, opened, apart=f"{url[:-1]}1" if store == "apart" else None)
    where = {"sqlite": f"sqlite:///{tmp_path / 's.db'}"}.get(store)
    if store == "cluster":
        where = cluster_url(shared_redis.get("cluster"))
    opened.enter_context(consuming(streams, KIND, models, where))
    ids = write(streams, range(40), range(10))
    streams.settle()
    check(streams.letters(), range(40), 10, offline)
    assert {told.entry for told in streams.letters()} == set(ids)
    assert not streams.dead()


def test_the_record_has_the_position(redis_server: RedisServer, models: Path, name: str, opened: ExitStack) -> None:
    """The source's name and the last entry's id; clear and rewind leave it, a fork is fed by nobody."""
    streams = place(redis_server.url, name, opened, namespace="default")
    with consuming(streams, KIND, models), running(store=redis_server.url, models=models) as server:
        script = Script(DOORS["http-json"](server.url, KIND), laws.manifest(KIND))
        opened.callback(script.door.close)
        streams.add(name, [1.0, 2.0, 3.0])
        streams.settle()
        script.call("checkpoint", name, name="k")
        ids = [streams.add(name, [1.0, 2.0, 3.0]) for _ in range(2)]
        streams.settle()
        first, second = map(int, ids[-1].split("-"))
        want = (source_name(name), first, second, 3)
        assert recorded(streams, name).source == want
        script.step(name, np.ones(3, np.float32))
        script.call("fork", name, to=f"{name}-child")
        script.call("rewind", name, to="k")
        script.call("clear", name)
        record = recorded(streams, name)
        assert (record.source, record.step) == (want, 1)
        assert recorded(streams, f"{name}-child").source is None


def test_entries_say_what_other_doors_say(
    redis_server: RedisServer, models: Path, name: str, opened: ExitStack, offline: Array
) -> None:
    """By position, by name, packed; with seq, a mask, several examples and several steps."""
    streams = place(redis_server.url, name, opened)
    opened.enter_context(consuming(streams, KIND, models))
    x = X[0]
    streams.add("s0", x[0].tolist())
    streams.add("s0", dict(zip(NAMES, x[1].tolist(), strict=True)))
    streams.add("s0", x[2])
    streams.add("s0", x[3].tolist(), seq="4")
    streams.add("s0", [x[4:6].tolist()])
    streams.add("s0", x[6].tolist(), mask="[0]")
    streams.add("s0", x[6:8], shape="[1, 2, 3]")
    streams.add("three", X[:3, 0], shape="[3, 3]")
    streams.settle()
    assert not streams.dead()
    told = streams.letters()
    assert [letter.step for letter in told if letter.session == "s0"] == [1, 2, 3, 4, 6, 7, 9]
    close = {"rtol": 1e-4, "atol": 1e-5}
    parts = [letter.outputs for letter in told if letter.session == "s0"]
    np.testing.assert_allclose(parts[0], offline[0, 0], **close)
    np.testing.assert_allclose(
        [parts[1]["u"], parts[1]["v"]] if "v" in parts[1] else list(parts[1].values()), offline[0, 1], **close
    )
    np.testing.assert_allclose(parts[2], offline[0, 2], **close)
    np.testing.assert_allclose(parts[3], offline[0, 3], **close)
    np.testing.assert_allclose(parts[4][0], offline[0, 4:6], **close)
    assert parts[5] == [None] * offline.shape[2]
    np.testing.assert_allclose(parts[6].reshape(2, -1), offline[0, 6:8], **close)
    (three,) = [letter.outputs for letter in told if letter.session == "three"]
    np.testing.assert_allclose(three.reshape(3, -1), offline[:3, 0], **close)


def test_a_moment_may_stand_beside_the_inputs(redis_server: RedisServer, name: str, opened: ExitStack) -> None:
    """`time` is what `$.inputs.time` is: ISO 8601 or Unix seconds; both, or by position, is a dead letter."""
    streams = place(redis_server.url, name, opened)
    models = MODELS.parent.parent / "models"
    dated = [kind for kind in sorted(p.name for p in models.iterdir()) if _is_dated(models / kind)]
    assert dated, "no model with a calendar is committed"
    opened.enter_context(consuming(streams, dated[0], models))
    readings = {f["name"]: 0.5 for f in _features(models / dated[0]) if not f.get("calendar")}
    moment = "2013-11-02T03:00:00Z"
    streams.add("a", {**readings, "time": moment})
    streams.add("b", readings, time=moment)
    streams.add("c", readings, time="1383361200")
    bad = [streams.add("a", {**readings, "time": moment}, time=moment), streams.add("a", [0.5], time=moment)]
    streams.settle()
    told = {letter.session: letter.outputs for letter in streams.letters()}
    assert told["b"] == pytest.approx(told["a"], rel=1e-5)
    assert told["c"] == pytest.approx(told["a"], rel=1e-5)
    assert [at for at, _, _ in streams.dead()] == bad


def _features(path: Path) -> list[dict[str, Any]]:
    manifests = sorted(path.glob("*/manifest.json"))
    found: list[dict[str, Any]] = json.loads(manifests[-1].read_text())["features"] if manifests else []
    return found


def _is_dated(path: Path) -> bool:
    return any(feature.get("calendar") for feature in _features(path))


# --- dead letters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
def test_dead_letters_are_the_bad_entries_exactly(
    apart: bool, redis_server: RedisServer, models: Path, name: str, opened: ExitStack, offline: Array
) -> None:
    """Each with its problem document and its own fields; the others of the same sessions are stepped, in order."""
    url = redis_server.url
    streams = place(url, name, opened, apart=f"{url[:-1]}1" if apart else None)
    wanted: list[tuple[str, dict[str, Any]]] = []
    codes: list[str] = []
    good = {"inputs": json.dumps([0.1, 0.2, 0.3])}
    bad: list[tuple[str, dict[str, Any], str]] = [
        ("s0", {"inputs": "[1, 2]"}, "shape_mismatch"),
        ("s1", {"inputs": "[1, 2"}, "malformed"),
        ("s2", {"inputs": "[1, 2, 1e999]"}, "non_finite"),
        ("s3", {"inputs": '[0.1,0.2,0.3],"seq":9'}, "malformed"),
        ("s4", {"inputs": '{"u":1,"nobody":2}'}, "invalid_request"),
        ("s5", {"packed": b"12345"}, "shape_mismatch"),
        ("s6", {**good, "packed": b"123456789012"}, "invalid_request"),
        ("s7", {**good, "tiem": "2013-11-02T03:00:00Z"}, "invalid_request"),
        ("s8", {**good, "seq": "7"}, "step_conflict"),
        ("s9", {**good, "seq": "x"}, "malformed"),
        ("s10", {"inputs": json.dumps([[0.1, 0.2, 0.3]] * 2)}, "examples_mismatch"),
        ("no id/", good, "invalid_session_id"),
        ("s11", {}, "invalid_request"),
    ]
    for t in range(3):
        wanted += [(f"s{i}", {"packed": X[i, t].tobytes()}) for i in range(12)]
        if t:
            wanted += [(session, fields) for session, fields, _ in bad]
            codes += [code for _, _, code in bad]
    with consuming(streams, KIND, models):
        ids = streams.add_all(wanted)
        streams.settle()
    check(streams.letters(), range(12), 3, offline)
    dead = {at: (problem, fields) for at, problem, fields in streams.dead()}
    assert len(dead) == len(streams.dead())
    want = {at: entry for at, entry in zip(ids, wanted, strict=True) if entry in [(s, f) for s, f, _ in bad]}
    assert dead.keys() == want.keys()
    assert [dead[at][0]["code"] for at in want] == codes
    for at_, (session, fields) in want.items():
        problem, kept = dead[at_]
        assert problem["status"] in range(400, 500)
        assert kept[b"session"].decode() == session
        assert {name.encode(): _bytes(value) for name, value in fields.items()}.items() <= kept.items()


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def test_a_session_is_fed_from_one_source(
    redis_server: RedisServer, models: Path, name: str, opened: ExitStack
) -> None:
    """Entries of another one are dead letters, and leave the session as it was; a fork may be fed from it."""
    one, two = (place(redis_server.url, f"{name}-{i}", opened, namespace="default") for i in (1, 2))
    with consuming(one, KIND, models), consuming(two, KIND, models), running(store=one.url, models=models) as server:
        one.add(name, [1, 2, 3])
        one.settle()
        before = one.record(KIND, name)
        refused = two.add(name, [1, 2, 3])
        two.settle()
        assert [(at, problem["code"]) for at, problem, _ in two.dead()] == [(refused, "source_conflict")]
        assert one.record(KIND, name) == before
        with closing(DOORS["http-json"](server.url, KIND)) as door:
            Script(door, laws.manifest(KIND)).call("fork", name, to=f"{name}-child")
        two.add(f"{name}-child", [1, 2, 3])
        two.settle()
    assert [(told.session, told.step) for told in two.letters()] == [(f"{name}-child", 2)]


def test_an_entry_in_the_wrong_share_is_a_dead_letter(
    redis_server: RedisServer, models: Path, name: str, opened: ExitStack
) -> None:
    """Its session's others are in another stream: their order would be nobody's."""
    streams = place(redis_server.url, name, opened, shares=3)
    wrong = streams.names[(share_of("s1", 3) + 1) % 3]
    with consuming(streams, KIND, models):
        entry = streams.redis.xadd(wrong, {"session": "s1", "inputs": "[1,2,3]"}).decode()
        streams.add("s1", [1, 2, 3])
        eventually(lambda: len(streams.dead()) == 1 and len(streams.letters()) == 1)
    ((bad, problem, fields),) = streams.dead()
    assert (bad, problem["code"], fields[b"stream"].decode()) == (entry, "invalid_request", wrong)


# --- given again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_given_again_is_never_stepped_again(
    apart: bool, redis_server: RedisServer, models: Path, name: str, opened: ExitStack, offline: Array
) -> None:
    """The group is set back to the first entry, thrice; a sink apart hears the last letters again."""
    url = redis_server.url
    streams = place(url, name, opened, apart=f"{url[:-1]}1" if apart else None)
    for turn in range(3):
        with consuming(streams, KIND, models):
            write(streams, range(8), range(5 * turn, 5 * turn + 5))
            streams.settle()
        streams.redis.xgroup_setid(name, "stepcast", "0")
    with consuming(streams, KIND, models) as metrics:
        streams.settle()
        text = urllib.request.urlopen(f"{metrics}/metrics", timeout=10).read().decode()
    check(streams.letters(), range(8), 15, offline, once=not apart)
    found = dict(re.findall(r'^stepcast_stream_entries_total\{outcome="(\w+)"\} ([0-9.]+)', text, re.MULTILINE))
    assert (found["stepped"], found["redelivered"]) == ("0.0", "120.0")
    assert not streams.dead()


def test_a_sink_that_was_away_is_told_once_it_is_back(
    redis_factory: RedisFactory, models: Path, name: str, opened: ExitStack, offline: Array
) -> None:
    """No more is read than may be in hand; what was stepped and not told is told by the next reader."""
    source, sink = redis_factory(), redis_factory()
    streams = place(source.url, name, opened, apart=sink.url)
    with consuming(streams, KIND, models, most=16, drain_s=0.2, store_timeout_s=0.5):
        write(streams, range(8), range(1))
        streams.settle()
        sink.kill()
        write(streams, range(8), range(1, 10))
        eventually(lambda: recorded(streams, "s7").step == 2)
        assert streams.pending() <= 16
    assert recorded(streams, "s7").step == 2  # not told: the next one waits
    sink.start()
    with consuming(streams, KIND, models):
        streams.settle()
    check(streams.letters(), range(8), 10, offline, once=False)
    assert not streams.dead()


def test_an_answer_that_is_not_kept_any_more_is_a_dead_letter(
    redis_factory: RedisFactory, models: Path, name: str, opened: ExitStack
) -> None:
    """The sink was away, and the session went on by another door for longer than answers are kept."""
    source, sink = redis_factory(), redis_factory()
    streams = place(source.url, name, opened, apart=sink.url, namespace="default")
    with consuming(streams, KIND, models, drain_s=0.2, store_timeout_s=0.5):
        streams.add("warm", [1, 2, 3])
        streams.settle()
        sink.kill()
        entry = streams.add("s0", [1, 2, 3])
        eventually(lambda: streams.record(KIND, "s0") is not None)
    with running(store=source.url, models=models) as server, closing(DOORS["http-json"](server.url, KIND)) as door:
        for _ in range(17):
            Script(door, laws.manifest(KIND)).step("s0", np.ones(3, np.float32))
    sink.start()
    with consuming(streams, KIND, models):
        streams.settle()
    ((at_, problem, _),) = streams.dead()
    assert (at_, problem["code"], problem["step"]) == (entry, "step_conflict", 1)
    assert recorded(streams, "s0").step == 18


# --- who dies ---------------------------------------------------------------------------------------------------------


def test_killed_another_consumer_goes_on(
    redis_server: RedisServer, models: Path, name: str, opened: ExitStack, offline: Array
) -> None:
    """kill -9 in the midst, twice: what was pending is claimed, and nothing is lost or stepped twice."""
    streams = place(redis_server.url, name, opened)
    sessions, lease = range(64), ("--lease-s", "0.6", "--in-hand", "8")
    write(streams, sessions, range(30))
    for goal in (100, 500):
        process = ConsumerProcess(streams, KIND, models, *lease)
        eventually(lambda goal=goal: streams.other.xlen(f"{name}:out") >= goal)  # type: ignore[misc]
        process.kill()
        assert streams.other.xlen(f"{name}:out") < 1920
    write(streams, sessions, range(30, 40))
    process = ConsumerProcess(streams, KIND, models, *lease)
    streams.settle()
    assert process.terminate() in (0, -15)
    check(streams.letters(), sessions, 40, offline)
    assert not streams.dead()
    assert streams.redis.get(f"stepcast:{{{name}}}:stepcast:reader") is None  # given back


def test_a_consumer_that_slept_through_its_lease_does_no_harm(
    redis_server: RedisServer, models: Path, name: str, opened: ExitStack, offline: Array
) -> None:
    """SIGSTOP in the midst; another takes over; the first one wakes with entries in hand."""
    streams = place(redis_server.url, name, opened)
    sleeper = ConsumerProcess(streams, KIND, models, "--lease-s", "0.5", "--in-hand", "8")
    write(streams, range(64), range(30))
    eventually(lambda: streams.other.xlen(f"{name}:out") >= 100)
    sleeper.send(signal.SIGSTOP)
    assert streams.other.xlen(f"{name}:out") < 1920
    with consuming(streams, KIND, models, lease_s=0.5):
        eventually(lambda: streams.other.xlen(f"{name}:out") >= 1900)
        sleeper.send(signal.SIGCONT)
        write(streams, range(64), range(30, 40))
        streams.settle()
        assert sleeper.terminate() in (0, -15)
    check(streams.letters(), range(64), 40, offline)
    assert not streams.dead()


def test_redis_restarts_in_the_midst(
    redis_factory: RedisFactory, models: Path, name: str, opened: ExitStack, offline: Array
) -> None:
    """kill -9 of a Redis with an append-only file: the consumer waits for it and goes on."""
    server = redis_factory()
    streams = place(server.url, name, opened)
    with consuming(streams, KIND, models, store_timeout_s=0.5):
        write(streams, range(64), range(20))
        eventually(lambda: streams.other.xlen(f"{name}:out") >= 200)
        server.kill()
        server.start()
        streams.redis.connection_pool.disconnect()
        write(streams, range(64), range(20, 40))
        streams.settle()
    check(streams.letters(), range(64), 40, offline)
    assert not streams.dead()


def test_shares_go_from_one_consumer_to_others_and_back(
    redis_server: RedisServer, models: Path, name: str, opened: ExitStack, offline: Array
) -> None:
    """Four streams: one consumer has them all, two have two each, the last one all again; no step is out of order."""
    streams = place(redis_server.url, name, opened, shares=4)

    def readers() -> dict[bytes, int]:
        found: dict[bytes, int] = defaultdict(int)
        for stream in streams.names:
            found[streams.redis.get(f"stepcast:{{{stream}}}:stepcast:reader")] += 1
        return found

    with consuming(streams, KIND, models, lease_s=0.4):
        write(streams, range(64), range(10))
        eventually(lambda: sorted(readers().values()) == [4])
        with consuming(streams, KIND, models, lease_s=0.4):
            write(streams, range(64), range(10, 20))
            eventually(lambda: sorted(readers().values()) == [2, 2])
            write(streams, range(64), range(20, 30))
        eventually(lambda: sorted(readers().values()) == [4])
        write(streams, range(64), range(30, 40))
        streams.settle()
    check(streams.letters(), range(64), 40, offline)
    assert not streams.dead()


# --- settings and metrics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"store": "memory://"}, "this store can lose"),
        ({"durability": "interval"}, "this store can lose"),
    ],
)
def test_a_store_that_forgets_is_refused(
    more: dict[str, Any], says: str, redis_server: RedisServer, models: Path, name: str, opened: ExitStack
) -> None:
    """Refuse to start rather than to lose entries."""
    streams = place(redis_server.url, name, opened)
    with pytest.raises(ConfigError, match=says), consuming(streams, KIND, models, **more):
        pass


def test_a_start_that_cannot_be_is_one_line(
    redis_server: RedisServer, models: Path, name: str, opened: ExitStack
) -> None:
    """A key that is no stream, a source in a cluster."""
    streams = place(redis_server.url, name, opened)
    streams.redis.set(f"{name}:out", "taken")
    with pytest.raises(RuntimeError, match=rf"ConfigError: key '{name}:out' of Redis is a string, not a stream"):
        ConsumerProcess(streams, KIND, models)
    streams.url = "redis+cluster://127.0.0.1:1"
    with pytest.raises(ConfigError, match="streams lie in one Redis, got 'redis\\+cluster'"):
        opened.enter_context(consuming(streams, KIND, models))


def test_metrics_tell_the_lag(redis_server: RedisServer, models: Path, name: str, opened: ExitStack) -> None:
    """While the store stands still entries wait and grow old; then nothing waits."""
    streams = place(redis_server.url, name, opened)
    with consuming(streams, KIND, models) as url:

        def gauge(metric: str, labels: str = "") -> float:
            text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
            found = re.search(rf"^stepcast_{metric}{re.escape(labels)} ([0-9.e+-]+)$", text, re.MULTILINE)
            assert found, text
            return float(found[1])

        write(streams, range(4), range(3))
        streams.settle()
        label = f'{{stream="{name}"}}'
        assert gauge("stream_lag", label) == 0 if "lag" in streams.redis.xinfo_groups(name)[0] else True
        assert gauge("stream_lag_seconds", label) == 0
        assert gauge("stream_shares") == 1
        assert gauge("stream_in_hand") == 0
        assert gauge("stream_entries_total", '{outcome="stepped"}') == 12
        assert urllib.request.urlopen(f"{url}/healthz/ready", timeout=10).status == 200


def test_what_is_done_with_may_be_deleted_and_the_sink_kept_short(
    redis_server: RedisServer, models: Path, name: str, opened: ExitStack
) -> None:
    """--delete and --keep, in one Redis and apart."""
    for suffix, apart in (("", None), ("-apart", f"{redis_server.url[:-1]}1")):
        streams = place(redis_server.url, name + suffix, opened, apart=apart)
        with consuming(streams, KIND, models, keep=100, deletes=True):
            write(streams, range(64), range(20))
            eventually(lambda streams=streams: streams.redis.xlen(streams.name) == 0)  # type: ignore[misc]
        assert 100 <= streams.other.xlen(f"{streams.name}:out") <= 400  # whole nodes of the stream are dropped


# --- the laws ---------------------------------------------------------------------------------------------------------

# Behind the reader and the letters a stream's steps go the way of all others: few kinds, one store.
FEW_STREAMING = [kind for kind in FEW if kind in laws.STREAMING]


@pytest.fixture(scope="module")
def server(shared_redis: SharedRedis) -> Iterator[Running]:
    """A server on the Redis of the streams."""
    with running(store=shared_redis.get("redis")[0].url, batch_rows=32, grpc_port=0) as server:
        yield server


Through = Callable[[str, bool], Script]


@pytest.fixture
def through(
    redis_server: RedisServer, server: Running, name: str, opened: ExitStack, tmp_path_factory: pytest.TempPathFactory
) -> Through:
    """Opens a stream of a kind, packed or as JSON, and its consumer."""

    def through(kind: str, packed: bool) -> Script:
        streams = place(redis_server.url, name, opened, namespace="default")
        models = repository(tmp_path_factory.mktemp("one"), kind)
        opened.enter_context(consuming(streams, kind, models))
        door = opened.enter_context(closing(StreamDoor(streams, server.url, kind, packed)))
        return Script(door, laws.manifest(kind))

    return through


@pytest.mark.parametrize(("kind", "packed"), [*((kind, False) for kind in FEW_STREAMING), (KIND, True)])
def test_law1_through_a_stream(through: Through, kind: str, packed: bool, name: str) -> None:
    """One step an entry, three an entry, and all in one give torch's outputs and final states."""
    script = through(kind, packed)
    for block in (1, 3, None):
        laws.in_blocks_it_is_as_recorded(script, kind, block, f"{name}-{block}")


@pytest.mark.parametrize("kind", FEW_STREAMING)
def test_laws_2_3_and_5_through_a_stream(through: Through, kind: str, name: str) -> None:
    """Batch mates change nothing, masked and refused entries no state; a fork goes its own way."""
    script, x = through(kind, False), laws.readings(kind)
    laws.test_law2_an_answer_does_not_depend_on_batch_mates(lambda _: script, kind, f"{name}-mates")
    laws.test_law3_a_masked_step_leaves_the_state_bit_for_bit(lambda _: script, kind, f"{name}-masked")
    laws.test_law5_a_fork_is_its_parent_and_then_goes_its_own_way(lambda _: script, kind, f"{name}-fork")
    script.step(name, x, seq=1)
    before = script.document(name)
    infinite = x.copy()
    infinite[0, 0] = np.inf
    narrow = x[:, :-1] if x.shape[1] > 1 else np.tile(x, 2)
    for attempt, seq in ((narrow, None), (infinite, None), (x, 7), (x + 1, 1)):
        with pytest.raises(StepcastError):
            script.step(name, attempt, seq=seq)
        assert script.document(name) == before


def test_one_conversation_has_the_same_numbers_through_every_door(
    through: Through, server: Running, opened: ExitStack, name: str
) -> None:
    """Twelve steps, some with a number: through each door alone, and through all in turn on one session."""
    scripts = {"stream": through(KIND, False)}
    for door, opener in STEP_DOORS.items():
        made = opened.enter_context(closing(opener(server.url, KIND)))  # type: ignore[type-var]
        scripts[door] = Script(made, laws.manifest(KIND))
    x = X[0, :12]
    said = {
        door: [script.step(f"{name}-{door}", x[t], seq=t + 1 if t % 3 == 0 else None) for t in range(12)]
        for door, script in scripts.items()
    }
    turns = list(scripts.values())
    said["in turn"] = [turns[t % len(turns)].step(name, x[t]) for t in range(12)]
    for conversation in said.values():
        assert [number for _, number in conversation] == list(range(1, 13))
        for (got, _), (want, _) in zip(conversation, said["http-json"], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
