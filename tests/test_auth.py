"""Who may do what: keys, roles, namespaces, and no CORS unless asked for."""

import hashlib
import hmac
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from serving import MODELS, Running, running
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from service.doors.keys import ANYBODY, Keys, Principal
from service.doors.tries import Tries
from stepcast.errors import Forbidden, TooManyTries, Unauthorized

pytestmark = pytest.mark.service

KEYS = {
    "reader": ("read", "acme", "key-of-a-reader"),
    "stepper": ("step", "acme", "key-of-a-stepper"),
    "boss": ("admin", "acme", "key-of-a-boss"),
    "rival": ("admin", "rival", "key-of-a-rival"),
}
LSTM = "/v1/models/lstm"
STATE = {"state": {"lstm_0": {"h": [[0.0] * 4], "c": [[0.0] * 4]}}}
ONES = {"inputs": [1, 1, 1]}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    """A server with keys."""
    keys = ",".join(":".join(entry) for entry in KEYS.values())
    with running(store="memory://", api_keys=keys) as server:
        yield server


@pytest.fixture
def calls(guarded: Running) -> Iterator[dict[str, httpx.Client]]:
    """A client per key."""
    made = {
        who: httpx.Client(base_url=guarded.url, headers={"authorization": f"Bearer {key}"}, timeout=10)
        for who, (_, _, key) in KEYS.items()
    }
    yield made
    for client in made.values():
        client.close()


def code(response: httpx.Response) -> str:
    """The code of a problem, "" of a good answer."""
    return "" if response.status_code < 400 else str(response.json()["code"])


def routes(session: str) -> list[tuple[str, str, str, Any]]:
    """(role that is needed, method, path, body) of every route."""
    at = f"{LSTM}/sessions/{session}"
    return [
        ("read", "GET", "/v1/models", None),
        ("read", "GET", LSTM, None),
        ("read", "GET", f"{LSTM}/versions/1", None),
        ("admin", "DELETE", f"{LSTM}/versions/9", None),
        ("admin", "POST", f"{LSTM}/versions/9/load", None),
        ("step", "POST", f"{LSTM}/predict", {"inputs": [[1, 1, 1]]}),
        ("step", "POST", f"{LSTM}/step", {"sessions": [session], "inputs": [[1, 1, 1]]}),
        ("step", "POST", f"{LSTM}/sessions", {}),
        ("read", "GET", f"{LSTM}/sessions", None),
        ("read", "GET", at, None),
        ("step", "POST", f"{at}/step", ONES),
        ("read", "GET", f"{at}/state", None),
        ("step", "PUT", f"{at}/state", STATE),
        ("read", "GET", f"{at}/state/lstm_0", None),
        ("step", "PUT", f"{at}/state/lstm_0", {"state": STATE["state"]["lstm_0"]}),
        ("step", "POST", f"{at}/fork", {}),
        ("step", "POST", f"{at}/checkpoints", {"name": "k"}),
        ("read", "GET", f"{at}/checkpoints", None),
        ("step", "POST", f"{at}/rewind", {"to": "k"}),
        ("step", "POST", f"{at}/rollout", {"steps": 1, "inputs": [[1, 1, 1]]}),
        ("step", "DELETE", f"{at}/state", None),
        ("step", "DELETE", at, None),
    ]


def test_these_are_all_routes(guarded: Running) -> None:
    """The list above leaves none out."""
    document = guarded.app.api.openapi()
    paths = {path: operations for path, operations in document["paths"].items() if path.startswith("/v1/")}
    there = {(method.upper(), path) for path, operations in paths.items() for method in operations}

    def template(path: str) -> str:
        parts = path.split("/")
        names = {3: "{model}", 5: "{session}" if "sessions" in parts else "{version}", 7: "{layer}"}
        return "/".join(names.get(number, part) for number, part in enumerate(parts))

    assert {(method, template(path)) for _, method, path, _ in routes("s")} == there


def test_no_key_and_unknown_keys_are_401_everywhere(guarded: Running) -> None:
    """Whatever the route; the answer says how to send one. Probes, metrics and documents need none."""
    wrong: list[dict[str, str]] = [
        {},
        {"authorization": "Bearer nobody-has-this"},
        {"authorization": "Bearer"},
        {"authorization": "Basic key-of-a-boss"},
        {"x-api-key": "key-of-a-bos"},
        {"x-api-key": "key-of-a-boss2"},
        {"x-api-key": "kéy".encode("latin-1").decode("latin-1")},
    ]
    with httpx.Client(base_url=guarded.url) as client:
        for _, method, path, body in routes("s"):
            response = client.request(method, path, json=body)
            assert (response.status_code, code(response)) == (401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        for headers in wrong[1:]:
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            assert code(client.post(f"{LSTM}/sessions/s/step", json=ONES, headers=encoded)) == "unauthorized", headers
        for path in (
            "/healthz/live",
            "/healthz/ready",
            "/metrics",
            "/docs",
            "/redoc",
            "/openapi.json",
            "/asyncapi.json",
        ):
            assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer {}"}, {"authorization": "bearer {}"}, {"x-api-key": "{}"}]
)
def test_a_key_travels_in_either_header(guarded: Running, headers: dict[str, str]) -> None:
    """Authorization (the scheme's case does not matter) or X-API-Key."""
    sent = {name: text.format("key-of-a-reader") for name, text in headers.items()}
    assert httpx.get(f"{guarded.url}/v1/models", headers=sent).status_code == 200


def test_roles_allow_what_they_say(calls: dict[str, httpx.Client]) -> None:
    """read reads, step steps too, admin retires too; a refusal names both roles and changes nothing."""
    session = f"s-{uuid4().hex}"
    order = ["read", "step", "admin"]
    assert code(calls["boss"].post(f"{LSTM}/sessions/{session}/step", json=ONES)) == ""
    before = calls["boss"].get(f"{LSTM}/sessions/{session}/state").content
    for who in ("reader", "stepper", "boss"):
        role = KEYS[who][0]
        for needed, method, path, body in routes(session):
            allowed = order.index(role) >= order.index(needed)
            response = calls[who].request(method, path, json=body)
            assert (code(response) == "forbidden") is not allowed, (who, method, path)
            if not allowed:
                assert (response.json()["role"], response.json()["needed"]) == (role, needed)
        if who == "reader":
            assert calls["boss"].get(f"{LSTM}/sessions/{session}/state").content == before


def test_a_namespace_does_not_see_anothers_sessions(calls: dict[str, httpx.Client]) -> None:
    """On every route the session of another namespace is not there, and what is done under its name is one's own."""
    session = f"s-{uuid4().hex}"
    acme, rival = calls["boss"], calls["rival"]
    at = f"{LSTM}/sessions/{session}"
    for _ in range(3):
        assert code(acme.post(f"{at}/step", json=ONES)) == ""
    acme.post(f"{at}/checkpoints", json={"name": "k"})
    before = acme.get(f"{at}/state").json()
    for _, method, path, body in routes(session):
        made_by_the_call = method == "PUT" or path.endswith(("/step", "/predict", f"{LSTM}/sessions"))
        if "/sessions/" in path and not made_by_the_call:
            assert code(rival.request(method, path, json=body)) == "session_not_found", (method, path)
    assert rival.get(f"{LSTM}/sessions", params={"prefix": session}).json()["sessions"] == []
    cursor = acme.get(f"{LSTM}/sessions", params={"limit": 1}).json()["cursor"]
    listed = rival.get(f"{LSTM}/sessions", params={"cursor": cursor or "acme/lstm/"}).json()
    assert session not in listed["sessions"]
    for prefix in ("../acme/lstm/", "acme/lstm/", f"{session}"):
        assert rival.get(f"{LSTM}/sessions", params={"prefix": prefix}).json()["sessions"] == []
    stepped = rival.post(f"{LSTM}/step", json={"sessions": [session], "inputs": [[1, 1, 1]], "seq": [4]}).json()
    assert stepped["errors"]["0"]["code"] == "step_conflict"
    assert stepped["errors"]["0"]["expected_seq"] == 1
    own = rival.post(f"{at}/step", json=ONES).json()
    assert own["step"] == 1
    assert rival.post(f"{at}/fork", json={"to": f"{session}-2"}).json()["step"] == 1
    assert rival.get(f"{at}/checkpoints").json() == {"checkpoints": []}
    assert rival.delete(at).status_code == 204
    assert acme.get(f"{at}/state").json() == before
    assert acme.get(f"{LSTM}/sessions", params={"prefix": session}).json()["sessions"] == [session]


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configured key is compared, by hmac.compare_digest, also after one was found."""
    seen: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def watch(one: bytes, other: bytes) -> bool:
        seen.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watch)
    keys = Keys("read:a:first-key,step:b:second-key,admin:c:third-key")
    assert keys.authenticate({b"x-api-key": b"first-key"}, "1.2.3.4") == Principal("a", "read")
    want = [hashlib.sha256(key).digest() for key in (b"first-key", b"second-key", b"third-key")]
    assert [one for one, _ in seen] == want
    with pytest.raises(Unauthorized):
        keys.authenticate({b"x-api-key": b"fourth-key"}, "1.2.3.4")


def test_without_keys_everybody_is_admin_of_one_namespace() -> None:
    """No key needed, none looked at."""
    assert Keys("").authenticate({b"x-api-key": b"whatever"}, "1.2.3.4") == ANYBODY
    ANYBODY.require("admin")
    with pytest.raises(Forbidden):
        Principal("a", "read").require("step")


def test_cors_is_off_by_default(http: httpx.Client) -> None:
    """No answer allows another origin, a preflight is refused."""
    origin = {"origin": "https://evil.example"}
    for response in (
        http.get("/v1/models", headers=origin),
        http.post(f"{LSTM}/sessions/cors/step", json=ONES, headers=origin),
        http.options(f"{LSTM}/sessions", headers={**origin, "access-control-request-method": "POST"}),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_cors_allows_the_origins_that_are_named() -> None:
    """Those, and no others."""
    with running(store="memory://", models=MODELS, cors_origins="https://a.example,https://b.example") as server:
        for origin, allowed in (("https://a.example", True), ("https://evil.example", False)):
            response = httpx.post(f"{server.url}{LSTM}/sessions/s/step", json=ONES, headers={"origin": origin})
            assert ("access-control-allow-origin" in response.headers) is allowed


def test_wrong_keys_are_limited_by_address() -> None:
    """After that many every key from there is refused, also by the short way, but those that were right from there."""
    keys = "step:acme:key-of-a-stepper,step:acme:key-of-another"
    with (
        running(store="memory://", api_keys=keys, tries_limit=3) as server,
        httpx.Client(base_url=server.url) as client,
    ):

        def step(key: str | None) -> tuple[int, str]:
            headers = {} if key is None else {"x-api-key": key}
            answer = client.post(f"{LSTM}/sessions/s/step", json=ONES, headers=headers)
            return answer.status_code, code(answer)

        assert step("key-of-a-stepper") == (200, "")
        for _ in range(5):
            assert step(None) == (401, "unauthorized"), "who sends no key guesses none"
        for number in range(3):
            assert step(f"guess-{number}") == (401, "unauthorized")
        for key in ("guess-4", "key-of-another"):
            refused = client.post(f"{LSTM}/sessions/s/step", json=ONES, headers={"x-api-key": key})
            problem = refused.json()
            assert (refused.status_code, problem["code"], problem["limit"]) == (429, "too_many_tries", 3)
            assert 1 <= problem["retry_after_s"] <= 20
            assert refused.headers["retry-after"] == str(round(problem["retry_after_s"]))
        assert step("key-of-a-stepper") == (200, "")
        with pytest.raises(InvalidStatus, match="429"):
            connect(f"{server.url}{LSTM}/stream?key=key-of-another".replace("http", "ws"))
        with connect(f"{server.url}{LSTM}/stream?key=key-of-a-stepper".replace("http", "ws")):
            pass


def test_a_known_head_does_not_speak_for_an_address_that_guesses() -> None:
    """A key in use elsewhere is remembered with its head; from an address that is blocked it is refused, too."""
    with running(store="memory://", api_keys="step:acme:key-of-a-stepper", tries_limit=2) as server:
        local = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(base_url=server.url) as user, httpx.Client(base_url=server.url, transport=local) as thief:
            for client, key, wanted in (
                *((user, "key-of-a-stepper", 200), (thief, "guess-1", 401), (thief, "guess-2", 401)),
                *((thief, "key-of-a-stepper", 429), (user, "key-of-a-stepper", 200)),
            ):
                answer = client.post(f"{LSTM}/sessions/s/step", json=ONES, headers={"x-api-key": key})
                assert answer.status_code == wanted


def test_tries_come_back_and_are_counted_by_network() -> None:
    """One each 60 s / limit; an IPv6 network of 64 bits counts as one address; what is remembered is bounded."""
    now = [0.0]
    tries = Tries(3, lambda: now[0])
    for address in ("2001:db8::1", "2001:db8::2:3", "2001:db8::ffff%eth0"):
        tries.check(address, b"k")
        tries.wrong(address)
    with pytest.raises(TooManyTries, match=r"limit 3.*Retry after 20 s"):
        tries.check("2001:db8::4", b"k")
    tries.check("2001:db8:1::4", b"k")
    now[0] = 10.0
    with pytest.raises(TooManyTries, match="Retry after 10 s"):
        tries.check("2001:db8::4", b"k")
    now[0] = 20.0
    tries.check("2001:db8::4", b"k")
    assert not tries.blocked
    tries.wrong("2001:db8::4")
    with pytest.raises(TooManyTries):
        tries.check("2001:db8::4", b"k")
    tries.right("2001:db8::4", b"good")
    tries.check("2001:db8::5", b"good")
    tries.forget()
    with pytest.raises(TooManyTries):
        tries.check("2001:db8::5", b"good")
    for number in range(10_000):
        for _ in range(3):
            tries.wrong(f"10.0.{number >> 8}.{number & 255}")
    assert len(tries._spent) == len(tries.blocked) <= 4096
    off = Tries(0)
    for _ in range(100):
        off.wrong("1.2.3.4")
    off.check("1.2.3.4", b"k")
