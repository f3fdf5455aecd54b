"""What HTTP's users expect of any server: request ids, HEAD, trailing slashes, packed bodies."""

import gzip
import json
import logging
import socket
import zlib
from collections.abc import Callable

import httpx
import pytest
from serving import Running, running

pytestmark = pytest.mark.service

LSTM = "/v1/models/lstm"
STEP = f"{LSTM}/sessions/manners/step"
BODY = json.dumps({"inputs": [1.0, 1.0, 1.0]}).encode()


def bare_deflate(body: bytes) -> bytes:
    """Deflate without zlib's head, as many clients send it."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


PACKERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", bare_deflate),
    "identity": ("identity", bytes),
}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", STEP),  # below ASGI
        ("POST", f"{LSTM}/step"),  # a refusal below ASGI: no sessions
        ("POST", STEP + "/"),  # through FastAPI
        ("GET", "/v1/models"),
        ("GET", "/v1/models/nobody"),
        ("GET", "/nowhere"),
        ("GET", "/healthz/live"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("PATCH", "/v1/models"),
        ("DELETE", f"{LSTM}/sessions/nobody"),
    ],
)
def test_every_answer_has_a_request_id(http: httpx.Client, method: str, path: str) -> None:
    """The caller's own where it gives one, else a new one each time."""
    body = BODY if method == "POST" else None
    ids = [http.request(method, path, content=body).headers["x-request-id"] for _ in range(2)]
    assert len(set(ids)) == 2
    given = http.request(method, path, content=body, headers={"X-Request-Id": "req-7:a/b"})
    assert given.headers.get_list("x-request-id") == ["req-7:a/b"]
    after = http.request(method, path, content=body)
    assert after.headers["x-request-id"] not in (*ids, "req-7:a/b")


@pytest.mark.parametrize("wrong", [b"", b"two words", b"x" * 129, "é".encode()])
@pytest.mark.parametrize("path", [STEP, STEP + "/"])
def test_a_request_id_that_is_none_is_replaced(http: httpx.Client, path: str, wrong: bytes) -> None:
    """Too long, or with characters that logs do not take: a new one, and the step is taken."""
    answer = http.post(path, content=BODY, headers={b"x-request-id": wrong})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"].encode() not in (wrong, b"")


def test_bytes_that_are_not_http_are_a_problem(memory_server: Running) -> None:
    """A problem document with a request id, then the connection ends."""
    host, port = memory_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"not http at all\r\n\r\n")
        said = b""
        while part := line.recv(65536):
            said += part
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"x-request-id: " in head
    assert json.loads(body)["code"] == "malformed"


def test_a_defect_is_logged_with_its_request(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has the answer's request id finds the log line."""
    with running(store="memory://") as server, caplog.at_level(logging.ERROR, "stepcast"):
        monkeypatch.setattr(server.app.repository, "names", lambda: 1 / 0)
        answer = httpx.get(f"{server.url}/v1/models", headers={"x-request-id": "find-me"})
    assert answer.status_code == 500
    assert [record for record in caplog.records if "GET /v1/models (request find-me)" in record.getMessage()]


@pytest.mark.parametrize(
    "path",
    ["/v1/models", LSTM, f"{LSTM}/versions/1", "/healthz/live", "/metrics", "/docs", "/openapi.json", "/nowhere"],
)
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    """The same status and headers, and the connection goes on."""
    got, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.content))
    assert http.get("/healthz/live").status_code == 200


def test_head_where_there_is_no_get_is_refused(http: httpx.Client) -> None:
    """405, as GET."""
    assert http.head(STEP).status_code == http.get(STEP).status_code == 405


@pytest.mark.parametrize(
    "path", ["/v1/models", LSTM, f"{LSTM}/sessions", "/docs", "/redoc", "/openapi.json", "/metrics"]
)
def test_a_trailing_slash_changes_nothing(http: httpx.Client, path: str) -> None:
    """The same answer, without a redirect."""
    slashed = http.get(path + "/")
    assert slashed.status_code == 200
    if path != "/metrics":
        assert slashed.content == http.get(path).content


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("path", [STEP, f"{LSTM}/predict"])
def test_a_packed_body_is_what_it_was(http: httpx.Client, path: str, name: str) -> None:
    """gzip, and deflate with and without zlib's head; the answer is that of the plain body."""
    encoding, pack = PACKERS[name]
    body = json.dumps({"inputs": [[0.5, -0.25, 1.0]] * 3}).encode()
    want = http.post(f"{LSTM}/sessions/plain-{name}/step".replace(" ", "-") if path == STEP else path, content=body)
    path = path.replace("manners", f"packed-{name}".replace(" ", "-"))
    got = http.post(path, content=pack(body), headers={"content-encoding": encoding})
    assert got.status_code == 200, got.text
    assert got.json() == want.json()


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "nonsense"])
def test_another_encoding_is_415(http: httpx.Client, encoding: str) -> None:
    """The answer names those that are known; nothing is applied."""
    answer = http.post(f"{LSTM}/sessions/encoded/step", content=BODY, headers={"content-encoding": encoding})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert answer.json()["encodings"] == ["gzip", "x-gzip", "deflate"]
    assert http.get(f"{LSTM}/sessions/encoded").status_code == 404


@pytest.mark.parametrize(
    "body",
    [BODY, gzip.compress(BODY)[:-4], gzip.compress(BODY) + b"more", gzip.compress(BODY) * 2, b"\x1f\x8b"],
    ids=["not packed", "cut off", "more behind it", "two members", "its magic alone"],
)
def test_a_body_that_is_not_packed_as_it_says_is_malformed(http: httpx.Client, body: bytes) -> None:
    """400; nothing is applied."""
    answer = http.post(f"{LSTM}/sessions/broken/step", content=body, headers={"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")
    assert http.get(f"{LSTM}/sessions/broken").status_code == 404


@pytest.mark.parametrize("name", ["gzip", "deflate", "bare deflate"])
def test_the_limit_of_bodies_holds_for_what_is_unpacked(name: str) -> None:
    """A bomb is 413, and never unpacked beyond the limit; what just fits is taken."""
    encoding, pack = PACKERS[name]
    limit = 2048
    with running(store="memory://", body_limit_bytes=limit) as server, httpx.Client(base_url=server.url) as client:

        def sent(size: int) -> httpx.Response:
            padded = BODY + b" " * (size - len(BODY))
            return client.post(STEP, content=pack(padded), headers={"content-encoding": encoding})

        assert sent(limit).status_code == 200
        for size in (limit + 1, 10_000_000):
            answer = sent(size)
            assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
            assert answer.json()["limit"] == limit
