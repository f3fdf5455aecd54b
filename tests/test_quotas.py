"""How much may be stored: bytes of a session, sessions and bytes of a tenant, over every store."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from redis_servers import SharedRedis, cluster_url
from serving import running

from service.records.record import new_record
from service.sessions.quotas import Quotas
from service.settings import Settings
from service.store import Write
from service.store.memory import MemoryStore
from stepcast.client import Client
from stepcast.errors import QuotaExceeded

pytestmark = pytest.mark.service

KEYS = "admin:measured:acme-key,admin:beside:other-key"  # namespaces that no other test fills
ROW_BYTES = 32  # of lstm's state
STORES = ("memory", "sqlite", "redis", "cluster")
X = [0.1, 0.2, 0.3]


class Tenant:
    """Calls of one tenant to one model."""

    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/v1/models/lstm/sessions", headers={"x-api-key": key}, timeout=20)

    def __enter__(self) -> "Tenant":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def create(self, name: str, **fields: Any) -> httpx.Response:
        return self.http.post("", json={"session": name, **fields})

    def step(self, name: str, inputs: Any = X) -> httpx.Response:
        return self.http.post(f"/{name}/step", json={"inputs": inputs})


def test_every_step_number_that_can_come_can_be_sent() -> None:
    """JSON's numbers are exact up to 2^53 in most languages; a session cannot be put near to it."""
    with running(store="memory://") as server, Tenant(server.url, "nobody's") as tenant:
        assert tenant.step("a").status_code == 200
        state = tenant.http.get("/a/state").json()["state"]
        assert tenant.http.put("/a/state", json={"state": state, "step": 2**52}).json()["step"] == 2**52
        conflict = tenant.http.post("/a/step", json={"inputs": X, "seq": 7}).json()
        assert conflict["expected_seq"] == 2**52 + 1
        assert tenant.http.post("/a/step", json={"inputs": X, "seq": conflict["expected_seq"]}).status_code == 200
        refused = tenant.http.put("/a/state", json={"state": state, "step": 2**53})
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Any, shared_redis: SharedRedis) -> str:
    match request.param:
        case "memory":
            return "memory://"
        case "sqlite":
            return f"sqlite:///{tmp_path}/s.db"
        case "redis":
            return str(shared_redis.get("redis")[0].url)
        case _:
            return cluster_url(shared_redis.get("cluster"))


def cleared(tenant: Tenant) -> None:
    """End all sessions; where others have many, a page may be empty and not the last."""
    cursor: str | None = ""
    while cursor is not None:
        page = tenant.http.get("", params={"cursor": cursor} if cursor else {}).json()
        for name in page["sessions"]:
            tenant.http.delete(f"/{name}")
        cursor = page["cursor"] or None


@pytest.fixture
def bounded(store: str) -> Iterator[tuple[Tenant, Tenant]]:
    """Two tenants of a server that lets each have five sessions and 4,000 bytes."""
    quotas = {"tenant_sessions_limit": 5, "tenant_limit_bytes": 4000, "session_limit_bytes": 2048}
    with (
        running(store=store, api_keys=KEYS, **quotas) as server,
        Tenant(server.url, "acme-key") as acme,
        Tenant(server.url, "other-key") as other,
    ):
        for tenant in (acme, other):
            cleared(tenant)
        yield acme, other
        for tenant in (acme, other):
            cleared(tenant)


def test_a_tenant_has_so_many_sessions(bounded: tuple[Tenant, Tenant]) -> None:
    """However they are made; steps of those that are there go on, and so do other tenants."""
    acme, other = bounded
    assert [acme.create(name).status_code for name in "abc"] == [201] * 3
    assert acme.create("a").status_code == 409, "which takes no room"
    assert acme.step("d").status_code == 200
    assert acme.http.post("/d/fork", json={"to": "e"}).status_code == 201
    state = {"state": acme.http.get("/d/state").json()["state"]}
    for refused in (
        acme.create("f"),
        acme.step("f"),
        acme.http.post("/d/fork", json={"to": "f"}),
        acme.http.put("/f/state", json=state),
    ):
        assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded"), refused.text
        assert {"unit": "sessions", "used": 5, "limit": 5}.items() <= refused.json().items()
        assert "retry-after" not in refused.headers
    assert acme.http.get("/f").status_code == 404
    assert acme.step("d").json()["step"] == 2
    assert other.create("f").status_code == 201
    assert acme.http.delete("/c").status_code == 204
    assert acme.step("f").status_code == 200


def test_a_tenant_has_so_many_bytes(bounded: tuple[Tenant, Tenant]) -> None:
    """Counted by what examples take."""
    acme, _ = bounded
    many = 1500 // ROW_BYTES
    assert acme.create("a", examples=many).status_code == 201
    assert acme.step("b", [X] * many).status_code == 200
    assert acme.create("c").status_code == 201
    refused = acme.step("c", [X] * many)
    assert (refused.status_code, refused.json()["code"], refused.json()["unit"]) == (429, "quota_exceeded", "bytes")
    assert acme.step("c").status_code == 200, "of fewer examples"


def test_a_session_has_so_many_bytes(bounded: tuple[Tenant, Tenant]) -> None:
    """A create of 40 bytes made 66 MB; with its checkpoints, by a step and by a put too."""
    acme, _ = bounded
    many = 2048 // ROW_BYTES + 1
    for refused in (acme.create("a", examples=65_536), acme.create("a", examples=many), acme.step("a", [X] * many)):
        assert (refused.status_code, refused.json()["code"]) == (413, "too_large"), refused.text
        assert refused.json()["limit"] == 2048
    assert acme.create("a", examples=20).status_code == 201
    state = acme.http.get("/a/state").json()["state"]
    wide = {layer: {key: rows * 4 for key, rows in keys.items()} for layer, keys in state.items()}
    assert acme.http.put("/a/state", json={"state": wide}).status_code == 413
    assert acme.http.post("/a/checkpoints", json={"name": "1"}).status_code == 201
    for number in (2, 3):
        answer = acme.http.post("/a/checkpoints", json={"name": str(number)})
    assert (answer.status_code, answer.json()["limit"]) == (413, 2048)
    assert acme.http.get("/a/checkpoints").json()["checkpoints"] == [{"name": "1", "step": 0}]


def test_a_new_server_counts_what_is_there(store: str) -> None:
    """And the SDK does not ask again."""
    if store == "memory://":
        return
    with running(store=store, api_keys=KEYS) as server, Tenant(server.url, "acme-key") as tenant:
        cleared(tenant)
        assert [tenant.step(name).status_code for name in "abc"] == [200] * 3
    quotas = {"tenant_sessions_limit": 3}
    with running(store=store, api_keys=KEYS, **quotas) as server, Tenant(server.url, "acme-key") as tenant:
        assert tenant.step("d").json()["used"] == 3
        with Client(server.url, key="acme-key") as client, pytest.raises(QuotaExceeded, match="has 3 sessions"):
            client.session("lstm", "d").step(X)
        cleared(tenant)


@pytest.mark.anyio
async def test_a_count_puts_right_what_has_expired_meanwhile() -> None:
    """What is made while it runs is not lost."""
    store, now = MemoryStore(), 0.0
    store._clock = lambda: now
    quotas = Quotas(store, Settings.read({}, tenant_sessions_limit=3))
    for name in "abc":
        quotas.take("acme", 1, 100)
        await store.change([Write(f"acme/lstm/{name}", None, new_record(1, b"fprint01").encode(), 1.0)])
    with pytest.raises(QuotaExceeded):
        quotas.take("acme", 1, 100)
    await quotas.count()
    with pytest.raises(QuotaExceeded):
        quotas.take("acme", 1, 100)
    now = 2.0
    counting = asyncio.ensure_future(quotas.count())
    await asyncio.sleep(0)
    await counting
    quotas.take("acme", 3, 300)
    with pytest.raises(QuotaExceeded):
        quotas.take("acme", 1, 100)
    quotas.give("acme", 1, 100)
    quotas.take("acme", 1, 100)
