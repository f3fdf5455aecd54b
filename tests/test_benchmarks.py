"""The benchmark measures what it says: answers are checked, and a stall is not hidden."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import device, load, model, requests
from benchmarks.bare import Truth
from benchmarks.rounds import Results
from benchmarks.scenarios import SCENARIOS
from benchmarks.servers import StartFailed
from benchmarks.targets import Target

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
        SCENARIOS["cuda"](None, True)  # type: ignore[arg-type]
