"""Sessions that are stepped together again and again: the same answers and states, whatever happens to one of them."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from serving import MODELS, Running, running

from service.engine.model import Runtime

pytestmark = pytest.mark.service

KIND = "stacked"
COUNT = 40
"""More than the batch steps that join those of others (BatchSteps.few)."""
FILLED = 18
"""Batch steps until the records are full and the roster has come before."""
Array = np.ndarray[Any, Any]


class Reference:
    """The sessions by themselves: their states, stepped one by one through model.onnx."""

    def __init__(self, names: list[str]) -> None:
        self._runtime = Runtime(MODELS / KIND / "1", device="cpu")
        self.features = self._runtime.manifest.n_features
        first = np.frombuffer(self._runtime.initial(1), np.uint8).reshape(1, -1)
        self.states = dict.fromkeys(names, first)
        self.steps = dict.fromkeys(names, 0)

    def step(self, name: str, x: Array) -> Array:
        """One step; its outputs."""
        y, self.states[name] = self._runtime.run(x[None, None], None, self.states[name])
        self.steps[name] += 1
        return y[0, 0]

    def state(self, name: str) -> dict[str, Any]:
        """As the server answers it."""
        state = self._runtime.unpack(self.states[name].tobytes(), 1)
        return {layer: {key: value.tolist() for key, value in keys.items()} for layer, keys in state.items()}


class Client:
    """Batch steps and what else may come, checked against the reference."""

    def __init__(self, servers: list[Running], prefix: str, seed: int) -> None:
        self.servers, self.random = servers, Random(seed)
        self.names = [f"{prefix}-{i}" for i in range(COUNT)]
        self.reference = Reference(self.names)
        self.http = [httpx.Client(base_url=f"{s.url}/v1/models/{KIND}", timeout=60) for s in servers]
        self.last: tuple[dict[str, Any], dict[str, Any]] | None = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        for http in self.http:
            http.close()

    def inputs(self, rows: int) -> Array:
        return np.array([[self.random.gauss(0, 1) for _ in range(self.reference.features)] for _ in range(rows)], "f4")

    def body(self, names: list[str], x: Array, numbered: bool) -> dict[str, Any]:
        asked: dict[str, Any] = {"sessions": names, "inputs": x.tobytes(), "shape": list(x.shape)}
        if numbered:
            asked["seq"] = [self.reference.steps[name] + 1 for name in names]
        return asked

    def post(self, at: int, asked: dict[str, Any]) -> dict[str, Any]:
        """A batch step in msgpack."""
        kind = {"content-type": "application/msgpack"}
        answer = self.http[at].post("/step", content=msgspec.msgpack.encode(asked), headers=kind)
        assert answer.status_code == 200, answer.text
        fields: dict[str, Any] = msgspec.msgpack.decode(answer.content)
        fields["outputs"] = np.frombuffer(fields["outputs"], "<f4").reshape(fields["shape"])
        return fields

    def batch(self, at: int = 0, numbered: bool = False) -> None:
        """A batch step of all."""
        x = self.inputs(COUNT)
        asked = self.body(self.names, x, numbered)
        answer = self.post(at, asked)
        assert answer["errors"] == {}
        want = np.stack([self.reference.step(name, row) for name, row in zip(self.names, x, strict=True)])
        np.testing.assert_allclose(answer["outputs"], want, 1e-4, 1e-5)
        assert answer["steps"] == [self.reference.steps[name] for name in self.names]
        self.last = (asked, answer) if numbered else None

    def again(self, at: int = 0) -> None:
        """The last batch step once more, where it was numbered: its kept answers, and nothing is applied."""
        if self.last is None:
            return
        asked, before = self.last
        answer = self.post(at, asked)
        assert (answer["steps"], answer["errors"]) == (before["steps"], {})
        assert answer["outputs"].tobytes() == before["outputs"].tobytes()

    def single(self, at: int = 0) -> None:
        """One of them by itself."""
        name, x = self.random.choice(self.names), self.inputs(1)[0]
        seq = self.reference.steps[name] + 1
        answer = self.http[at].post(f"/sessions/{name}/step", json={"inputs": x.tolist(), "seq": seq}).json()
        assert answer["step"] == seq, answer
        np.testing.assert_allclose(answer["outputs"], self.reference.step(name, x), 1e-4, 1e-5)
        self.last = None

    def some(self, at: int = 0) -> None:
        """Another roster: most of them, in another order."""
        names = self.random.sample(self.names, COUNT - 3)
        x = self.inputs(len(names))
        answer = self.post(at, self.body(names, x, numbered=True))
        assert answer["errors"] == {}
        want = np.stack([self.reference.step(name, row) for name, row in zip(names, x, strict=True)])
        np.testing.assert_allclose(answer["outputs"], want, 1e-4, 1e-5)
        self.last = None

    def look(self, at: int = 0) -> None:
        """The state of one, from the store."""
        self.same(self.random.choice(self.names), at)

    def same(self, name: str, at: int) -> None:
        answer = self.http[at].get(f"/sessions/{name}/state").json()
        assert answer["step"] == self.reference.steps[name]
        for layer, keys in self.reference.state(name).items():
            for key, value in keys.items():
                np.testing.assert_allclose(answer["state"][layer][key], value, 1e-4, 1e-5)

    def put(self, at: int = 0) -> None:
        """Set the state of one to that of another."""
        name, other = self.random.sample(self.names, 2)
        state = self.http[at].get(f"/sessions/{other}/state").json()["state"]
        assert self.http[at].put(f"/sessions/{name}/state", json={"state": state}).status_code == 200
        self.reference.states[name] = self.reference.states[other]
        self.reference.steps[name] = self.http[at].get(f"/sessions/{name}").json()["step"]
        self.last = None

    def refused(self, at: int = 0) -> None:
        """One number of one session is wrong: it alone is refused."""
        x = self.inputs(COUNT)
        asked = self.body(self.names, x, numbered=True)
        wrong = self.random.randrange(COUNT)
        asked["seq"][wrong] += 5
        answer = self.post(at, asked)
        assert list(answer["errors"]) == [str(wrong)]
        assert answer["errors"][str(wrong)]["code"] == "step_conflict"
        for i, name in enumerate(self.names):
            if i != wrong:
                np.testing.assert_allclose(answer["outputs"][i], self.reference.step(name, x[i]), 1e-4, 1e-5)
        self.last = None


def rosters(server: Running) -> list[Any]:
    """The rosters that a server has now."""
    known = server.app.sessions._rosters._rosters
    return [roster for there in known.values() for roster in there if roster.whole]


def open_servers(kind: str, request: pytest.FixtureRequest, folder: Path) -> tuple[str, int]:
    """A store's URL, and how many servers may be on it."""
    if kind == "redis":
        return str(request.getfixturevalue("redis_server").url), 2
    return ("memory://", 1) if kind == "memory" else (f"sqlite:///{folder / 'c.db'}", 2)


@pytest.mark.parametrize("kind", ["memory", "sqlite", "redis"])
def test_batch_steps_are_steps_whatever_comes_between(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Batch steps of one roster, with retries, single steps, states set, other rosters and a second server between."""
    url, count = open_servers(kind, request, tmp_path)
    with (
        running(store=url) as first,
        running(store=url if count > 1 else "memory://") as second,
        Client([first, second], f"{kind}{id(tmp_path)}", seed=7) as client,
    ):
        for i in range(FILLED):
            client.batch(numbered=bool(i % 2))
        assert len(rosters(first)) == 1
        for numbered in (True, False, True):
            client.batch(numbered=numbered)
            assert len(rosters(first)) == 1
        client.again()
        acts: list[Callable[[int], None]] = [client.single, client.some, client.look, client.put, client.again]
        acts += [client.refused, client.look]
        whole = 0
        for turn in range(120):
            for _ in range(client.random.randrange(4)):
                client.batch(numbered=client.random.random() < 0.5)
            whole += bool(rosters(first))
            client.random.choice(acts)(client.random.randrange(count) if turn % 3 == 0 else 0)
        assert whole > 20  # else nothing was tested
        for name in client.names:
            client.same(name, count - 1)


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_a_single_step_beside_a_batch_step_comes_before_or_after_it(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Both at once, again and again: each session has every step once, in one order or the other."""
    url, _ = open_servers(kind, request, tmp_path)
    with running(store=url) as server, Client([server], f"{kind}b{id(tmp_path)}", seed=11) as client:
        for _ in range(FILLED):
            client.batch()
        assert rosters(server)

        async def both(x: Array, name: str, own: Array) -> tuple[dict[str, Any], dict[str, Any]]:
            kind = {"content-type": "application/msgpack"}
            async with httpx.AsyncClient(base_url=f"{server.url}/v1/models/{KIND}", timeout=60) as http:
                body = msgspec.msgpack.encode(client.body(client.names, x, numbered=False))
                many, one = await asyncio.gather(
                    http.post("/step", content=body, headers=kind),
                    http.post(f"/sessions/{name}/step", json={"inputs": own.tolist()}),
                )
            return msgspec.msgpack.decode(many.content), one.json()

        for _ in range(60):
            x, name, own = client.inputs(COUNT), client.random.choice(client.names), client.inputs(1)[0]
            many, one = asyncio.run(both(x, name, own))
            assert many["errors"] == {}
            at = client.names.index(name)
            before = client.reference.steps[name]
            assert {one["step"], many["steps"][at]} == {before + 1, before + 2}
            got = np.frombuffer(many["outputs"], "<f4").reshape(many["shape"])
            if one["step"] == before + 1:
                np.testing.assert_allclose(one["outputs"], client.reference.step(name, own), 1e-4, 1e-5)
            want = np.stack([client.reference.step(n, row) for n, row in zip(client.names, x, strict=True)])
            if one["step"] == before + 2:
                np.testing.assert_allclose(one["outputs"], client.reference.step(name, own), 1e-4, 1e-5)
            np.testing.assert_allclose(got, want, 1e-4, 1e-5)
            client.batch()
        for name in client.names:
            client.same(name, 0)


def test_hot_sessions_in_rosters_are_let_go_like_others() -> None:
    """A hot cache too small for all: rosters drive each other out, and nothing is lost."""
    with running(store="memory://", hot_bytes=100_000) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client([server], f"r{i}", seed=i)) for i in range(3)]
        for _ in range(FILLED):
            clients[0].batch()
        assert rosters(server)
        for turn in range(60):
            clients[turn % 3].batch(numbered=bool(turn % 2))
            assert server.app.sessions._cache.bytes <= 100_000 + COUNT * 2000
        for client in clients:
            for name in client.names:
                client.same(name, 0)


def test_what_is_not_finite_is_refused_for_its_session_alone() -> None:
    """A roster's run fails as a whole; then each goes by itself, and only the guilty one is refused."""
    with running(store="memory://") as server, Client([server], "n", seed=3) as client:
        for _ in range(FILLED):
            client.batch()
        assert rosters(server)
        x = client.inputs(COUNT)
        x[5] = 3e38  # finite, but its products are not
        answer = client.post(0, client.body(client.names, x, numbered=True))
        for i, name in enumerate(client.names):
            if str(i) not in answer["errors"]:
                np.testing.assert_allclose(answer["outputs"][i], client.reference.step(name, x[i]), 1e-4, 1e-5)
        assert set(answer["errors"]) <= {"5"}
        client.batch(numbered=True)
        for name in client.names:
            client.same(name, 0)
