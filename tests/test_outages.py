"""A server whose Redis hangs, dies, is full, read-only, slow or empty: 503 in time, nothing wrong, back by itself.

Steps are sent with seq and compared with one unbroken run; docs/operations.md says what each case means.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from redis_servers import RedisFactory, RedisServer, each_redis, eventually
from serving import MODELS, Running, running

from service.engine.model import Runtime

pytestmark = pytest.mark.service
pytest_generate_tests = each_redis

KIND = "lstm"
DEADLINE_S = 2.0
TIMEOUT_S = 0.4
SESSIONS = [f"s{i}" for i in range(8)]


@pytest.fixture
def redis(redis_factory: RedisFactory) -> RedisServer:
    """A Redis server to be broken."""
    return redis_factory("appendfsync always")


@pytest.fixture
def server(redis: RedisServer) -> Iterator[Running]:
    """A server on it."""
    with running(store=redis.url, store_timeout_s=TIMEOUT_S, deadline_s=DEADLINE_S) as server:
        yield server


class Clients:
    """Eight sessions, each at the same step, stepped at once."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=f"{url}/v1/models/{KIND}/sessions", timeout=20, verify=False)
        self.pool = ThreadPoolExecutor(len(SESSIONS))
        self.x = np.random.default_rng(5).normal(size=(len(SESSIONS), 50, 3)).astype(np.float32)
        runtime = Runtime(MODELS / KIND / "1", device="cpu")
        start = np.frombuffer(runtime.initial(len(SESSIONS)), np.uint8).reshape(len(SESSIONS), -1)
        self.y = runtime.run(self.x, None, start)[0]

    def step(self, i: int, seq: int) -> httpx.Response:
        """Session i's step number `seq`."""
        body = {"inputs": self.x[i, seq - 1].tolist(), "seq": seq}
        return self.http.post(f"/{SESSIONS[i]}/step", json=body)

    def all_step(self, seq: int) -> list[httpx.Response]:
        return list(self.pool.map(lambda i: self.step(i, seq), range(len(SESSIONS))))

    def answered(self, seq: int) -> None:
        """Each session's step `seq` is answered as in an unbroken run."""
        for i, response in enumerate(self.all_step(seq)):
            self.right(i, seq, response)

    def right(self, i: int, seq: int, response: httpx.Response) -> None:
        assert response.status_code == 200, response.text
        assert response.json()["step"] == seq
        np.testing.assert_allclose(response.json()["outputs"], self.y[i, seq - 1], rtol=1e-4, atol=1e-5)

    def refused(self, seq: int, *retry_after_s: float) -> None:
        """Each session's step `seq` is refused within the deadline, and told when to come again."""
        started = time.monotonic()
        responses = self.all_step(seq)
        assert time.monotonic() - started < DEADLINE_S
        for response in responses:
            unavailable(response, *retry_after_s)

    def recovered(self, seq: int) -> None:
        """Step `seq` is answered rightly as soon as the store is back; until then it is refused."""

        def back() -> bool:
            responses = self.all_step(seq)
            for i, response in enumerate(responses):
                if response.status_code == 200:
                    self.right(i, seq, response)
                else:
                    assert response.status_code == 503, response.text
            return all(response.status_code == 200 for response in responses)

        eventually(back)
        self.steps_are(seq)

    def steps_are(self, steps: int) -> None:
        """No session has lost or doubled a step."""
        assert {self.http.get(f"/{name}").json()["step"] for name in SESSIONS} == {steps}

    def ready(self) -> bool:
        assert httpx.get(f"{self.url}/healthz/live", verify=False).status_code == 200
        return httpx.get(f"{self.url}/healthz/ready", verify=False).status_code == 200


@pytest.fixture
def clients(server: Running) -> Iterator[Clients]:
    """Clients whose sessions have taken three steps."""
    clients = Clients(server.url)
    for seq in (1, 2, 3):
        clients.answered(seq)
    yield clients
    clients.pool.shutdown()
    clients.http.close()


def unavailable(response: httpx.Response, *retry_after_s: float) -> None:
    problem = response.json()
    assert (response.status_code, problem["code"]) == (503, "store_unavailable"), response.text
    assert problem["retry_after_s"] in retry_after_s
    assert int(response.headers["retry-after"]) == max(1, round(problem["retry_after_s"]))


def test_redis_down_is_503_in_time_and_over_when_it_is_back(redis: RedisServer, clients: Clients) -> None:
    """Steps, reads and readiness say so; liveness does not; nobody restarts the server."""
    redis.kill()
    clients.refused(4, 1.0)
    unavailable(clients.http.get("/s0/state"), 1.0)
    unavailable(clients.http.post("/new/step", json={"inputs": [0.0, 0.0, 0.0]}), 1.0)
    unavailable(clients.http.delete("/s0/state"), 1.0)
    assert not clients.ready()
    redis.start()
    clients.recovered(4)
    clients.answered(5)
    assert clients.ready()


def test_redis_hanging_is_503_in_time_and_steps_are_there_once(redis: RedisServer, clients: Clients) -> None:
    """What was sent before it hung may be applied afterwards: the retry with seq finds out."""
    redis.pause()
    clients.refused(4, 0.5, 1.0)
    clients.refused(4, 0.5, 1.0)
    assert not clients.ready()
    redis.resume()
    clients.recovered(4)
    clients.answered(4)  # again: the stored answers
    clients.answered(5)
    clients.steps_are(5)


def test_redis_slow_is_waited_for_within_the_time_out(redis: RedisServer, clients: Clients) -> None:
    """Slower than usual: late answers. Slower than the time-out: 503, then as if nothing had been."""
    assert redis.cli("CLIENT", "PAUSE", str(int(TIMEOUT_S * 500))) == "OK"
    clients.answered(4)
    assert redis.cli("CLIENT", "PAUSE", str(int(TIMEOUT_S * 2500))) == "OK"
    clients.refused(5, 0.5, 1.0)
    clients.recovered(5)
    clients.answered(6)
    clients.steps_are(6)


def test_redis_full_refuses_steps_and_still_reads(redis: RedisServer, clients: Clients) -> None:
    """Sessions can be read and ended, and answered steps asked for again; steps wait for room."""
    assert redis.cli("CONFIG", "SET", "maxmemory", "1") == "OK"
    clients.refused(4, 5.0)
    assert clients.http.get("/s0/state").json()["step"] == 3
    clients.answered(3)
    assert not clients.ready()
    assert redis.cli("CONFIG", "SET", "maxmemory", "0") == "OK"
    clients.recovered(4)
    clients.answered(5)


def test_redis_read_only_refuses_steps_until_it_is_primary_again(
    redis: RedisServer, redis_factory: RedisFactory, clients: Clients
) -> None:
    """A primary that was made a replica: by mistake, or by a failover that the URL does not follow."""
    other = redis_factory()
    other.stop()  # so that what redis has is not replaced by what other has
    assert redis.cli("REPLICAOF", "127.0.0.1", str(other.port)) == "OK"
    clients.refused(4, 1.0)
    assert not clients.ready()
    assert redis.cli("REPLICAOF", "NO", "ONE") == "OK"
    clients.recovered(4)
    clients.answered(5)


def test_redis_restarted_empty_is_told_to_those_who_count(redis: RedisServer, clients: Clients) -> None:
    """With seq: 409, never a wrong answer, and a client that kept the state goes on. Without: a new session."""
    kept: dict[str, Any] = clients.http.get("/s0/state").json()
    redis.kill()
    redis.lose_files()
    redis.start()
    eventually(clients.ready)
    for response in clients.all_step(4):
        problem = response.json()
        assert (response.status_code, problem["code"], problem["expected_seq"]) == (409, "step_conflict", 1)
        assert "does not exist" in problem["detail"]
    assert clients.http.get("/s1").status_code == 404
    assert clients.http.put("/s0/state", json={"state": kept["state"], "step": kept["step"]}).status_code == 200
    clients.right(0, 4, clients.step(0, 4))
    new = clients.http.post("/s1/step", json={"inputs": clients.x[1, 0].tolist()})
    clients.right(1, 1, new)
