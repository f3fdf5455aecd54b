"""What pages of other sites can make a browser send: nothing that steps, by no name of theirs."""

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from serving import MODELS, Running, running
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from service.doors.hosts import Hosts
from stepcast.errors import UnknownHost

pytestmark = pytest.mark.service

LSTM = "/v1/models/lstm"
ONES = b'{"inputs":[1,1,1]}'
FORM = "application/x-www-form-urlencoded"
SIMPLE = [
    None,
    "",
    FORM,
    f"{FORM}; charset=utf-8",
    "text/plain",
    "text/plain;charset=UTF-8",
    "multipart/form-data; boundary=x",
]
OTHER_PAGES = [
    {"sec-fetch-site": "cross-site", "origin": "https://evil.example"},
    {"sec-fetch-site": "same-site", "origin": "http://localhost:1"},
    {"sec-fetch-site": "cross-site"},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://["},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server without keys."""
    with running(store="memory://") as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    """A client that is no browser."""
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.mark.parametrize("page", OTHER_PAGES, ids=lambda page: "-".join(page.values()))
@pytest.mark.parametrize("kind", SIMPLE)
def test_a_page_of_another_site_steps_and_forks_nothing(
    client: httpx.Client, kind: str | None, page: dict[str, str]
) -> None:
    """With the content types that a browser sends without asking first; each call alone is tried."""
    headers = page if kind is None else {**page, "content-type": kind}
    at = f"{LSTM}/sessions/victim"
    for path, body in (
        (f"{at}/step", ONES),
        (f"{LSTM}/step", b'{"sessions":["victim"],"inputs":[[1,1,1]]}'),
        (f"{LSTM}/sessions", b'{"session":"victim"}'),
        (f"{LSTM}/sessions", b""),
        (f"{at}/fork", b""),
        (f"{at}/checkpoints", b""),
        (f"{at}/rollout", b'{"steps":1,"inputs":[[1,1,1]],"commit":true}'),
        (f"{LSTM}/predict", b'{"inputs":[[1,1,1]]}'),
    ):
        answer = client.post(path, content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type"), path
    assert client.get(at).json()["code"] == "session_not_found"


def test_what_no_other_page_sends_is_taken(server: Running, client: httpx.Client) -> None:
    """Our own pages, types that a browser asks for first, callers that are no browser, and addresses that are typed."""
    own = {"origin": server.url}
    kinds: tuple[dict[str, str], ...] = (
        {},
        {"content-type": FORM},
        {"sec-fetch-site": "same-origin", **own},
        {"sec-fetch-site": "none"},
        own,
        {**own, "content-type": FORM},
        {**OTHER_PAGES[0], "content-type": "application/json"},
        {**OTHER_PAGES[3], "content-type": "application/json; charset=utf-8"},
        {"origin": "null", "content-type": "application/json"},
    )
    for number, headers in enumerate(kinds, 1):
        answer = client.post(f"{LSTM}/sessions/taken/step", content=ONES, headers=headers)
        assert (answer.status_code, answer.json()["step"]) == (200, number), headers
        assert client.post(f"{LSTM}/predict", content=b'{"inputs":[[1,1,1]]}', headers=headers).status_code == 200
        assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.get("/v1/models", headers=OTHER_PAGES[0]).status_code == 200, "CORS keeps it from the page"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "x@localhost", "é"])
def test_a_name_that_was_rebound_reaches_nothing(server: Running, client: httpx.Client, host: str) -> None:
    """As a page of that name it would be of the same origin; every route and the WebSocket refuse it, probes do not."""
    headers = {"host": host.encode(), "sec-fetch-site": "same-origin", "content-type": "application/json"}
    for method, path in (
        ("POST", f"{LSTM}/sessions/rebound/step"),
        ("POST", f"{LSTM}/sessions/rebound/fork"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("DELETE", f"{LSTM}/sessions/rebound"),
    ):
        answer = client.request(method, path, content=ONES, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (421, "unknown_host"), path
        assert "STEPCAST_HOSTS" in answer.json()["detail"]
    assert client.get("/healthz/live", headers=headers).status_code == 200
    target = f"{server.url}{LSTM}/stream".replace("http", "ws")
    if host.isascii() and "@" not in host:
        address, port = server.url.removeprefix("http://").split(":")
        with (
            socket.create_connection((address, int(port))) as sock,
            pytest.raises(InvalidStatus) as refused,
        ):
            connect(target.replace(f"{address}:{port}", host), sock=sock)
        assert refused.value.response.status_code == 421
        assert json.loads(refused.value.response.body or b"")["code"] == "unknown_host"


GOOD = (
    "localhost",
    "LOCALHOST:80",
    "localhost.",
    "a.localhost",
    "127.0.0.1:8000",
    "[::1]:8000",
    "192.168.7.1",
    "stepcast:8000",
)
GOOD += ("stepcast.default.svc", "stepcast.default.svc.cluster.local:80", "pi.local", "x.internal")
BAD = (
    "a.example",
    "a.example:8000",
    "127.0.0.1.a.example",
    "localhost.a.example",
    "[",
    ".",
    "é",
    "x@localhost",
    "[::1",
)


def accepts(hosts: Hosts, name: str) -> bool:
    try:
        hosts.check(name.encode())
    except UnknownHost:
        return False
    return True


def test_names_without_keys_are_those_that_nobody_else_can_own() -> None:
    """Loopback, addresses, names without a dot and of reserved endings; a Host that is not there is no browser's."""
    hosts = Hosts("", guarded=False)
    assert [name for name in GOOD if not accepts(hosts, name)] == []
    assert [name for name in BAD if accepts(hosts, name)] == []
    assert accepts(hosts, "")


def test_names_with_keys_are_all_unless_some_are_listed() -> None:
    """A key guards against rebinding, too: proxies and containers go on as they are."""
    guarded, listed = Hosts("", guarded=True), Hosts("a.example, .b.example,", guarded=True)
    assert [name for name in (*GOOD, *BAD) if not accepts(guarded, name)] == []
    for name, wanted in (
        *(("a.example:443", True), ("A.Example.", True), ("x.a.example", False), ("x.b.example", True)),
        *(("b.example", False), ("stepcast", False), ("localhost", True), ("10.0.0.1", True), ("xb.example", False)),
    ):
        assert accepts(listed, name) is wanted, name
    assert accepts(Hosts("*", guarded=False), "a.example")


def test_listed_names_are_served_on_the_short_way_and_the_long_one() -> None:
    """A step, another call, and with keys any name."""
    for settings, host, status in (
        ({"hosts": "a.example"}, "a.example", 200),
        ({"hosts": "a.example"}, "b.example", 421),
        ({"api_keys": "step:a:key-of-tenant-a"}, "b.example", 200),
        ({"hosts": "a.example", "api_keys": "step:a:key-of-tenant-a"}, "b.example", 421),
    ):
        with running(store="memory://", **settings) as server, httpx.Client(base_url=server.url) as client:
            headers = {"host": host, "x-api-key": "key-of-tenant-a"}
            for _ in range(2):
                answer = client.post(f"{LSTM}/sessions/s/step", content=ONES, headers=headers)
                assert answer.status_code == status
                assert client.get("/v1/models", headers=headers).status_code == status


def test_pages_that_the_settings_name_step() -> None:
    """As before: a browser asks first, then sends JSON."""
    with running(store="memory://", models=MODELS, cors_origins="https://good.example") as server:
        page = {"origin": "https://good.example", "sec-fetch-site": "cross-site"}
        ask = {**page, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        asked = httpx.options(f"{server.url}{LSTM}/sessions/s/step", headers=ask)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, page["origin"])
        at = f"{server.url}{LSTM}/sessions/s/step"
        answer = httpx.post(at, content=ONES, headers={**page, "content-type": "application/json"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page["origin"])
        assert httpx.post(at, content=ONES, headers=page).status_code == 415
