"""The benchmark measures what it says: answers are checked, and a stall is not hidden."""

import argparse
import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from serving import Running

from benchmarks import __main__ as program
from benchmarks import bare, costs, device, load, machine, model, report, requests, scenarios, sdk
from benchmarks.contenders import Bench, Contender, Measure
from benchmarks.rounds import Results
from benchmarks.servers import Park, StartFailed
from benchmarks.targets import COSTS, PLAIN_AOF, RATIOS, Cost, Target
from stepcast import Client
from stepcast.manifest import read_manifest

Truth = bare.Truth

STALL_S = 0.3


@pytest.fixture
def stalling() -> Iterator[int]:
    """The port of an HTTP server for one connection that answers at once, but stalls before its tenth answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)


def _serve(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        served = 0
        while connection.recv(65536):
            served += 1
            if served == 10:
                time.sleep(STALL_S)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")


def request(_: int, __: int) -> bytes:
    """A request without a body."""
    return b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n"


def test_open_loop_counts_the_requests_that_a_stall_held_up(stalling: int) -> None:
    """At 100 requests a second about 30 are due during a stall of 0.3 s: each waited for what was left of it."""
    line = load.HttpLine(stalling, 0)
    sample = load.open_loop([line], load.Traffic(request, 1, 1), 100.0, 1.0, poisson=False, warm_s=0.0)
    line.sock.close()
    assert len(sample.answers) == 100
    slow = sample.latencies_s[sample.latencies_s > 0.05]
    assert len(slow) >= 20
    assert sample.latencies_s.max() >= 0.9 * STALL_S


def answers(truth: Truth, change: Callable[[np.ndarray], None] = lambda _: None) -> load.Answers:
    """What a server would answer to three sessions by five steps."""
    outputs = truth.outputs(5).copy()
    change(outputs)
    return [(s, k, json.dumps({"outputs": outputs[k, s].tolist()}).encode()) for k in range(5) for s in range(3)]


def test_every_answer_is_compared_with_the_offline_pass() -> None:
    """One number of one answer is off: the benchmark says whose."""
    truth = Truth(3)
    assert requests.check(answers(truth), requests.outputs_json, truth) == 5 * 3 * model.Shape().outputs
    wrong = answers(truth, lambda outputs: outputs.__setitem__((4, 2, 1), outputs[4, 2, 1] + 0.01))
    with pytest.raises(requests.WrongAnswer, match=r"1 of 15 .* session 2 at step 4"):
        requests.check(wrong, requests.outputs_json, truth)


def test_a_ratio_with_an_absent_contender_is_not_made_up() -> None:
    """None, and the JSON says nothing of it."""
    results = Results([], {}, {"mosec-redis": "package 'mosec' is not installed"})
    assert results.ratio(Target("x", "http-json-redis", "mosec-redis", 1.5)) is None
    assert all("median" not in ratio for ratio in results.plain()["ratios"])


def test_the_device_benchmark_compares_equal_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its small form on the CPU: rates and a ratio per number of sessions, or the first wrong output."""
    monkeypatch.setattr(model, "REPOSITORY", tmp_path)
    assert device.main(["--device", "cpu", "--seconds", "0.02"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:5:2]] == [["bench-tiny", "1", "bare"], ["bench-tiny", "3", "bare"]]
    assert "bench-tiny on cpu, 3 sessions: states in the table / bare loop: " in lines[-1]
    step = device.Resident.step
    monkeypatch.setattr(device.Resident, "step", lambda self, x: step(self, x) + 0.01)
    assert device.main(["--device", "cpu", "--seconds", "0.02"]) == 1
    assert "wrong answer: resident outputs differ from the bare loop's by 0.01" in capsys.readouterr().out


def test_the_device_benchmark_is_absent_without_a_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so, and no number is made up."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert device.main([]) == 0
    assert capsys.readouterr().out.startswith("absent: no CUDA device")
    with pytest.raises(StartFailed, match="no CUDA device"):
        scenarios.run("cuda", None, True)  # type: ignore[arg-type]


def parsed(request: bytes) -> dict:
    """The body of a JSON request, whose head says how long it is."""
    head, _, body = request.partition(b"\r\n\r\n")
    assert int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]) == len(body)
    return json.loads(body)


def test_the_three_graphs_give_equal_numbers_when_stepped() -> None:
    """Five steps of three sessions; the graph with gaps has its mean 0 where a reading is missing."""
    wanted, pool = Truth(3).outputs(5), bare.pool()
    filled = requests.pool_without_gaps()
    without = Truth(3, inputs=lambda k: filled[[requests.row(s, k) for s in range(3)]]).outputs(5)
    assert not np.allclose(wanted, without, requests.RTOL, requests.ATOL)
    holes = pool.copy()
    holes[filled == 0.0] = np.nan
    for shape, inputs, outputs in (
        (model.FOREIGN, pool, wanted),
        (model.GAPS, pool, wanted),
        (model.GAPS, holes, without),
    ):
        manifest, session = read_manifest(model.ensure(shape)), bare.session(model.ensure(shape))
        assert [node.name for node in session.get_inputs()] == [
            "x",
            *(["lengths"] if manifest.lengths else []),
            *(state.input for state in manifest.states),
        ]
        sizes = [(1, 3, 128) if state.batch_axis else (3, 128) for state in manifest.states]
        states = [np.zeros(size, np.float32) for size in sizes]
        lengths = {"lengths": np.ones(3, np.int32)} if manifest.lengths else {}
        for k in range(5):
            feeds = dict(zip((state.input for state in manifest.states), states, strict=True))
            x = inputs[[requests.row(s, k) for s in range(3)]][:, None]
            y, *states = session.run(["y", *(s.output for s in manifest.states)], {"x": x, **lengths, **feeds})
            np.testing.assert_allclose(y[:, 0], outputs[k], 1e-4, 1e-5)


def test_a_gap_is_a_null_where_the_truth_has_the_mean() -> None:
    """In single steps, and in one row of a batch in JSON and msgpack."""
    single = parsed(requests.http_json(str, 3, texts=requests.json_gaps())(2, 7))
    row = requests.row(2, 7)
    assert [i for i, value in enumerate(single["inputs"]) if value is None] == [requests.gap_of(row)]
    assert requests.pool_without_gaps()[row, requests.gap_of(row)] == 0.0
    batch = parsed(requests.batch_json("/", "b", 2, 4, gaps=True)(1, 6))
    holes = [(i, at) for i, each in enumerate(batch["inputs"]) for at, value in enumerate(each) if value is None]
    assert holes == [requests.batch_gap(6, 4)] == [(2, 6)]
    packed = msgspec.msgpack.decode(requests.body_of(requests.batch_msgpack("/", "b", 2, 4, gaps=True)(1, 6)))
    raw = np.frombuffer(packed["inputs"], "<f4").reshape(4, -1)
    assert np.argwhere(np.isnan(raw)).tolist() == [[2, 6]]
    truth = requests.batch_inputs(2, 4)(6)
    np.testing.assert_array_equal(truth[4:], np.nan_to_num(raw))
    np.testing.assert_array_equal(truth[4:], np.nan_to_num(np.array(batch["inputs"], np.float32)))


def test_first_steps_are_never_of_the_same_session() -> None:
    """Nor are three rows of one session the same row; the pool's rule says which they are."""
    encode = requests.http_first(lambda n: f"/s-{n}/", 3)
    asked = [encode(s, k) for k in range(4) for s in range(3)]
    assert len({request.split(b" ", 2)[1] for request in asked}) == 12
    assert {parsed(request)["seq"] for request in asked} == {1}
    threes = parsed(requests.http_json(str, 2, texts=requests.json_threes(), stride=39)(1, 5))["inputs"]
    np.testing.assert_array_equal(np.float32(threes), bare.pool()[[requests.row(3 + r, 5) for r in range(3)]])


def test_named_steps_are_those_of_the_pool() -> None:
    """The same readings under their features' names; answers by name are read in the order of the outputs."""
    named = parsed(requests.http_json(str, 2, texts=requests.json_named())(1, 5))["inputs"]
    assert named == {f"f{i}": value for i, value in enumerate(parsed(requests.http_json(str, 2)(1, 5))["inputs"])}
    assert requests.outputs_named(b'{"outputs":{"y1":1.5,"y0":2},"step":1,"version":1}') == [1.5, 2.0]


def test_a_header_changes_with_each_request() -> None:
    """And nothing else of equal steps does."""
    for make, start in ((costs._request_id(), b"x-request-id: "), (costs._traceparent(), b"traceparent: 00-")):
        encode = requests.http_json(str, 1, header=make)
        heads = [next(line for line in encode(0, 0).split(b"\r\n") if line.startswith(start)) for _ in range(50)]
        assert len(set(heads)) == 50
        assert len({len(head) for head in heads}) == 1


def measure(rate: float, cpu_us: float) -> Measure:
    """A round."""
    return Measure(rate, 1.0, 2.0, cpu_us)


def test_a_report_has_both_columns_when_two_checkouts_were_measured() -> None:
    """Ratios are made within a round, then their median is taken; who has no base stands for both."""
    who = [Contender(c, "cost", c.upper(), None, versus=True) for c in ("cost-http-gap", "cost-http-gaps")]  # type: ignore[arg-type]
    results = Results(who)
    results.measures = {
        "cost-http-gap": [measure(100, 30), measure(100, 20), measure(100, 60)],
        "cost-http-gaps": [measure(300, 20), measure(300, 20), measure(300, 20)],
        "asgi-echo": [measure(50, 1), measure(50, 1), measure(50, 1)],
    }
    results.base = {
        "cost-http-gap": [measure(50, 60), measure(50, 80), measure(50, 60)],
        "cost-http-gaps": [measure(300, 20), measure(300, 20), measure(300, 20)],
    }
    cost = Cost("a gap", "cost-http-gap", "cost-http-gaps", 1.3)
    assert results.cost(cost) == (1.5, 1.0, 3.0)
    assert results.cost(cost, base=True) == (3.0, 3.0, 4.0)
    assert results.versus("cost-http-gap", "cpu_us_per_step") == (0.5, 0.25, 1.0)
    assert results.ratio(Target("x", "cost-http-gap", "asgi-echo", 1.0), base=True) == (1.0, 1.0, 1.0)
    assert results.versus("asgi-echo") is None
    text = report.markdown({"facts": {"base": "99c289d"}, **results.plain(), "scenarios": []})
    assert (
        "| 30.0 | 20.0 | 1.50 (1.00 to 3.00) | 3.00 (3.00 to 4.00) | 0.50 (0.25 to 1.00) | at most 1.3, missed |"
        in text
    )
    assert "| COST-HTTP-GAP | 100 | 50 | 2.00 (2.00 to 2.00) | 0.50 (0.25 to 1.00) |" in text
    alone = report.markdown({"facts": {}, **results.plain(), "scenarios": []})
    assert "| a gap in every step, HTTP JSON | 30.0 | 20.0 | 1.50 (1.00 to 3.00) | at most 1.3, missed |" in alone


def test_two_checkouts_take_turns_when_a_scenario_has_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Now one first, now the other; each check then has the other's value and the ratio by round."""
    turns: list[bool] = []

    def scenario(bench: Bench, quick: bool) -> scenarios.Rounds:
        yield
        for _ in range(3):
            turns.append(bench.base)
            yield
        values = [4.0, 8.0, 6.0] if bench.base else [2.0, 2.0, 6.0]
        return {"checks": [scenarios._check("ms", values, at_most=5.0)]}

    monkeypatch.setitem(scenarios.SCENARIOS, "lone", scenario)
    park = argparse.Namespace(against=Path())
    found = scenarios.run("lone", Bench(park), True)  # type: ignore[arg-type]
    assert turns == [True, False, False, True, True, False]
    (check,) = found["checks"]
    assert (check["value"], check["base"], check["holds"]) == (2.0, 6.0, True)
    assert check["new_over_base"] == {"median": 0.5, "min": 0.25, "max": 1.0}


def test_every_promise_is_of_contenders_that_there_are() -> None:
    """And a chosen cost brings its plain twin."""
    names = {c.name for c in program._contenders("")}
    assert {name for cost in COSTS for name in (cost.name, cost.twin)} <= names
    assert {name for target in (*RATIOS, *PLAIN_AOF) for name in (target.above, target.below)} <= names
    assert [c.name for c in program._contenders("cost-ws-many")] == ["cost-ws-few", "cost-ws-many"]
    with pytest.raises(argparse.ArgumentTypeError, match="is no checkout of Stepcast"):
        program._checkout("/")


def test_processor_time_is_counted_finer_than_a_tick() -> None:
    """Of another process as of this one."""
    before = time.process_time()
    assert before - 1e-4 <= machine._cpu_s(os.getpid()) <= time.process_time() + 1e-4


def test_a_cluster_has_three_primaries_when_it_is_asked_for() -> None:
    """Once; the plain Redis keeps its file where no pages are dropped."""
    park = Park()
    try:
        nodes = park.cluster()
        assert nodes == park.cluster()
        with socket.create_connection(("127.0.0.1", nodes[1].port)) as redis:
            redis.sendall(b"CLUSTER INFO\r\n")
            said = redis.recv(65536)
        assert b"cluster_state:ok" in said
        assert b"cluster_size:3" in said
        park.plain_redis()
        assert not list(park.folder.glob("*.aof"))
    finally:
        park.stop()
    assert not park.folder.exists()


def test_a_run_against_another_checkout_measures_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real servers of this checkout and of the other one, which is this one too; every answer is right."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    arguments = ["--only", "cost-http-gap,cost-http-three", "--against", str(machine.ROOT)]
    assert program.main([*arguments, "--rounds", "1", "--seconds", "0.2", "--name", "both"]) == 0
    content = json.loads((tmp_path / "both.json").read_text())
    assert list(content["contenders"]) == ["cost-http", "cost-http-three", "cost-http-gaps", "cost-http-gap"]
    for each in content["contenders"].values():
        assert len(each["rounds"]) == len(each["base_rounds"]) == 2
        assert each["rounds"][0]["checked"] > 0
        assert each["base_rounds"][0]["checked"] > 0
        assert each["base_rounds"][0]["cpu_us_per_step"] > 1
    gap = next(cost for cost in content["costs"] if cost["name"] == "cost-http-gap")
    assert gap["median"] > 0.5
    assert 0.1 < gap["new_over_base"]["median"] < 10
    assert "| a gap in every step, HTTP JSON |" in (tmp_path / "both.md").read_text()
    assert "| µs | twin, µs | cost | base: cost | µs, now / base | aim |" in capsys.readouterr().out


def test_the_cost_of_the_sdk_is_measured_beside_bare_clients(memory_server: Running) -> None:
    """Every way steps, in the same rounds; how large the ratios are is the benchmark's affair."""
    times = sdk.synchronous(memory_server.url, rounds=2, steps=3)
    times |= asyncio.run(sdk.on_asyncio(memory_server.url, rounds=2, steps=3))
    assert {len(taken) for taken in times.values()} == {2}
    with Client(memory_server.url) as client:
        for session in (
            "bare",
            "standard",
            "httpx",
            "sdk",
            "named",
            "bare-async",
            "httpx-async",
            "async",
            "async-named",
        ):
            assert client.session("lstm", session).info()["step"] == 6
    lines = sdk.table(times, ["http.client", "bare socket"]).splitlines()
    assert len(lines) == 1 + len(times)
    assert lines[2].split()[:1] == ["http.client"]
    assert lines[2].split()[2] == "1.00"


def test_voices_are_left_out_where_there_is_no_graph(tmp_path: Path) -> None:
    """The scenario says which file it looked for."""
    bench = Bench(None, silero=tmp_path / "none.onnx")  # type: ignore[arg-type]
    with pytest.raises(StartFailed, match=r"none\.onnx. Give --silero FILE"):
        scenarios.run("silero", bench, True)
