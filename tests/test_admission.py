"""What is let in: queues with their ends, deadlines, limits; long calls beside short ones."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import numpy as np
import overload
import pytest
import uvloop
from serving import running

from service.sessions import core

pytestmark = pytest.mark.service

LSTM = "/v1/models/lstm"
ONES = [1.0, 1.0, 1.0]
PACKED = {"content-type": "application/msgpack"}
LONG = np.random.default_rng(3).normal(size=(6, 90_000, 3)).astype("<f4")
"""540,000 rows of a sequence: seconds of work."""


@contextmanager
def serving(**settings: Any) -> Iterator[httpx.Client]:
    """A client of a server with these limits."""
    with (
        running(**{"store": "memory://", **settings}) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def long_body(rows: int = 6, **fields: Any) -> bytes:
    """A body of a long sequence."""
    return msgspec.msgpack.encode({"inputs": LONG[:rows].tobytes(), "shape": list(LONG[:rows].shape), **fields})


def waiting(client: httpx.Client) -> int:
    """Calls that are accepted and not answered."""
    found = re.search(r"^stepcast_waiting_steps (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found
    return int(float(found[1]))


def until(condition: Callable[[], Any]) -> None:
    """Wait for something that comes by itself."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def in_background(call: Callable[[], httpx.Response]) -> Iterator[list[httpx.Response]]:
    """A call that is under way during the block; its response is in the list afterwards."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    try:
        yield answers
    finally:
        thread.join()


def test_a_full_model_queue_is_429_with_a_time_to_retry() -> None:
    """One call waits, the limit is one: the next is told to come back, and is taken when the first is done."""
    with serving(queue_limit=1) as client:
        predict = f"{LSTM}/predict"
        with in_background(lambda: client.post(predict, content=long_body(), headers=PACKED)) as answers:
            until(lambda: waiting(client) == 1)
            refused = client.post(f"{LSTM}/sessions/a/step", json={"inputs": ONES})
            other = client.post("/v1/models/gru/sessions/a/step", json={"inputs": ONES})
        assert answers[0].status_code == 200
        problem = refused.json()
        assert (refused.status_code, problem["code"]) == (429, "queue_full")
        assert (problem["waiting"], problem["limit"], problem["retry_after_s"]) == (1, 1, 0.05)
        assert refused.headers["retry-after"] == "1"
        assert "Retry after 0.05 s" in problem["detail"]
        assert other.status_code == 200  # each model has its own queue
        assert client.post(f"{LSTM}/sessions/a/step", json={"inputs": ONES}).json()["step"] == 1


def test_a_full_session_queue_refuses_that_session_alone() -> None:
    """Ten steps of one session at once, three may wait: seven are refused, each for itself; others are served."""
    with serving(session_queue_limit=3) as client:
        sessions = ["one"] * 10 + ["two"]
        answer = client.post(f"{LSTM}/step", json={"sessions": sessions, "inputs": [ONES] * 11}).json()
        steps = [step for step in answer["steps"][:10] if step is not None]
        assert steps == list(range(1, len(steps) + 1))
        assert 3 <= len(steps) <= 4
        assert {problem["code"] for problem in answer["errors"].values()} == {"queue_full"}
        assert len(answer["errors"]) == 10 - len(steps)
        assert answer["steps"][10] == 1
        assert client.get(f"{LSTM}/sessions/one").json()["step"] == len(steps)


def test_a_step_that_waits_too_long_is_504_and_was_not_applied() -> None:
    """It waits behind a long call of its session beyond its deadline; the state is the long call's alone."""
    with serving(deadline_s=0.03) as client:
        at = f"{LSTM}/sessions/a"
        with in_background(lambda: client.post(f"{at}/step", content=long_body(), headers=PACKED)) as answers:
            until(lambda: waiting(client) == 1)
            late = client.post(f"{at}/step", json={"inputs": [ONES] * 6})
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert "not applied" in late.json()["detail"]
        assert answers[0].status_code == 200
        assert client.get(at).json()["step"] == LONG.shape[1]
        state = client.get(f"{at}/state").json()["state"]
        assert client.post(f"{LSTM}/sessions/b/step", content=long_body(), headers=PACKED).status_code == 200
        for key in "hc":
            want = client.get(f"{LSTM}/sessions/b/state").json()["state"]["lstm_0"][key]
            np.testing.assert_allclose(state["lstm_0"][key], want, rtol=1e-5, atol=1e-6)
        assert client.post(f"{at}/step", json={"inputs": [ONES] * 6}).json()["step"] == LONG.shape[1] + 1


def test_a_long_call_does_not_stall_single_steps() -> None:
    """While 540,000 cells run, another session's steps are answered one by one, each soon."""
    with serving() as client:
        took = []
        with in_background(lambda: client.post(f"{LSTM}/predict", content=long_body(), headers=PACKED)) as answers:
            until(lambda: waiting(client) == 1)
            while not answers:
                started = time.perf_counter()
                assert client.post(f"{LSTM}/sessions/a/step", json={"inputs": ONES}).status_code == 200
                took.append(time.perf_counter() - started)
        assert answers[0].status_code == 200
        assert len(took) > 10
        assert np.median(took) < 0.25


def test_limits_are_the_settings() -> None:
    """Body, steps, examples and checkpoints: 413 with the limit, and the session as it was."""
    with serving(body_limit_bytes=2048, steps_limit=5, examples_limit=2, checkpoints_limit=1) as client:
        at = f"{LSTM}/sessions/a"
        assert client.post(f"{at}/step", json={"inputs": [[ONES] * 5] * 2}).json()["step"] == 5
        assert client.post(f"{at}/checkpoints").status_code == 201
        before = client.get(f"{at}/state").json()
        row = {"h": [[0.0] * 4] * 3, "c": [[0.0] * 4] * 3}
        for method, path, body, limit in (
            ("POST", f"{at}/step", {"inputs": [[ONES] * 6] * 2}, 5),
            ("POST", f"{at}/step", {"inputs": [ONES] * 3}, None),
            ("POST", f"{at}/step", {"inputs": [[0.123456789] * 3] * 200}, 2048),
            ("POST", f"{at}/rollout", {"steps": 6}, 5),
            ("POST", f"{at}/checkpoints", {"name": "two"}, 1),
            ("PUT", f"{at}/state", {"state": {"lstm_0": row}}, 2),
            ("PUT", f"{at}/state", {"state": {"lstm_0": [[0.123456789] * 3] * 200}}, 2048),
            ("POST", f"{LSTM}/sessions", {"examples": 3}, 2),
            ("POST", f"{LSTM}/predict", {"inputs": [[ONES]] * 3}, None),
            ("POST", f"{LSTM}/predict", {"inputs": [ONES] * 6}, 5),
        ):
            response = client.request(method, path, json=body)
            problem = response.json()
            assert (response.status_code, problem["code"]) == (413, "too_large"), (path, problem)
            assert limit is None or problem.get("limit") == limit or f"limit {limit}" in problem["detail"]
        assert client.get(f"{at}/state").json() == before


def test_a_client_that_goes_away_leaves_the_session_whole() -> None:
    """A call whose client is gone is applied whole or not at all, and the next one is answered."""
    with serving() as client:
        at = f"{LSTM}/sessions/a"
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{at}/step", content=long_body(1), headers=PACKED, timeout=0.02)
        step = client.post(f"{at}/step", json={"inputs": ONES}).json()["step"]
        assert step in (1, LONG.shape[1] + 1)


def test_no_more_may_wait_than_leave_in_the_time_that_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long queue's limit follows its pace; a short one has that of the settings, and a draining server none."""
    now = [100.0]
    monkeypatch.setattr(core, "time", SimpleNamespace(monotonic=lambda: now[0]))
    load = core.Load(8192, patience_s=2.0)
    load.waiting = 4000
    for _ in range(9):  # 100 leave every sixteenth of a second
        now[0] += 0.0625
        load.leave(100)
    assert (load.pace, load.limit, load.wait_s()) == (1600.0, 3200, 3100 / 1600)
    for _ in range(4):  # ten times as slow
        now[0] += 0.0625
        load.leave(10)
    assert (load.pace, load.limit) == (160.0, core.LONG_QUEUE)
    load.leave(load.waiting - core.LONG_QUEUE)
    assert (load.limit, load.wait_s()) == (8192, 0.0)
    load.waiting = 4000
    load.limit = 0
    for _ in range(12):
        now[0] += 0.05
        load.leave(100)
    assert load.limit == 0


def test_a_server_that_is_asked_three_times_too_much_answers_what_it_accepts_in_time() -> None:
    """Frames on schedule over many sockets: each is answered or refused, and the accepted ones within deadline_s."""
    deadline_s = 2.0
    with overload.served(deadline_s=str(deadline_s), batch_rows="32") as url:
        seen = uvloop.run(overload.load(url, sockets=16, rate=4500, seconds=4, sessions=64))
    assert seen.lost == 0
    assert len(seen.accepted_s) > 500
    assert set(seen.refused) <= {"queue_full", "deadline_exceeded"}
    assert np.percentile(seen.accepted_s, 99) < deadline_s * 1.5, "the client's own lateness counts, too"
