"""Steps below ASGI, and in batches, do what they do by FastAPI's route; every form of a body, every kind of a head."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import numpy as np
import pytest
from serving import Running, running

pytestmark = pytest.mark.service

LSTM = "/v1/models/lstm"
RAMP = [[i / 8, 1 - i / 8, i / 4] for i in range(6)]


@pytest.fixture
def name() -> str:
    """A session id that no other test has."""
    return f"s-{uuid4().hex}"


@pytest.fixture
def line(memory_server: Running) -> Iterator[socket.socket]:
    """A bare connection."""
    host, port = memory_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        yield sock


def request(session: str, body: bytes, *fields: str, path: str = "step") -> bytes:
    """A step as bytes."""
    head = [f"POST {LSTM}/sessions/{session}/{path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *fields]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def body(x: Any, **fields: Any) -> bytes:
    """A step's JSON."""
    return json.dumps({"inputs": x, **fields}).encode()


def answers(sock: socket.socket, count: int) -> list[tuple[int, dict[str, Any]]]:
    """The next answers: status and JSON."""
    found, data = [], b""
    while len(found) < count:
        head, blank, rest = data.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next((int(field[15:]) for field in lines if field.startswith(b"content-length:")), 0)
        if blank and len(rest) >= length:
            found.append((int(lines[0].split()[1]), json.loads(rest[:length])))
            data = rest[length:]
            continue
        part = sock.recv(65536)
        assert part, data
        data += part
    assert not data
    return found


def offline(http: httpx.Client, rows: list[list[float]]) -> list[list[float]]:
    """What the model gives for a sequence."""
    outputs: list[list[float]] = http.post(f"{LSTM}/predict", json={"inputs": rows}).json()["outputs"]
    return outputs


def test_steps_on_one_connection_are_those_of_the_offline_pass(
    http: httpx.Client, line: socket.socket, name: str
) -> None:
    """The same head again and again, with and without seq, as JSON, and once by the long way in between."""
    wanted = offline(http, RAMP)
    for k, x in enumerate(RAMP):
        text = body(x) if k % 2 else body(x, seq=k + 1)
        line.sendall(request(name, body([x]) if k == 3 else text))
        ((status, answer),) = answers(line, 1)
        outputs = answer["outputs"][0] if k == 3 else answer["outputs"]
        assert (status, answer["step"]) == (200, k + 1)
        np.testing.assert_allclose(outputs, wanted[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("field", [None, "x-request-id: {}", "traceparent: 00-{}", "connection: keep-alive", "te: x"])
def test_heads_that_change_are_read_line_by_line(line: socket.socket, name: str, field: str | None) -> None:
    """What a proxy adds to each request changes nothing, nor does the order of the lines."""
    for k in range(4):
        fields = [] if field is None else [field.format(uuid4().hex)]
        fields = ["accept: */*", *fields] if k % 2 else [*fields, "content-type: application/json"]
        line.sendall(request(name, body(RAMP[k], seq=k + 1), *fields))
        assert answers(line, 1)[0][1]["step"] == k + 1


def test_every_rank_of_a_step_gives_the_offline_numbers(http: httpx.Client, line: socket.socket, name: str) -> None:
    """One example and three, as [F], [N,F] and [N,T,F] by turns, through one connection, with known and new heads."""
    wanted = offline(http, RAMP)
    for k, x in enumerate(RAMP):
        one = (x, [x], [[x]])[k % 3]
        line.sendall(request(f"{name}-1", body(one)) + request(f"{name}-3", body([x] * 3 if k % 2 else [[x]] * 3)))
        (_, single), (_, three) = answers(line, 2)
        assert (single["step"], three["step"]) == (k + 1, k + 1)
        assert np.ndim(single["outputs"]) == 1 + k % 3
        assert np.shape(three["outputs"]) == ((3, 2) if k % 2 else (3, 1, 2))
        np.testing.assert_allclose(np.ravel(single["outputs"]), wanted[k], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.reshape(three["outputs"], (3, -1)), [wanted[k]] * 3, rtol=1e-4, atol=1e-5)


def test_missing_readings_are_named_alike_in_json_and_msgpack(http: httpx.Client, name: str) -> None:
    """Whatever bits a NaN has, a retry in another encoding is the same payload."""
    at = f"/v1/models/stacked/sessions/{name}/step"
    packed = {"content-type": "application/msgpack", "accept": "application/json"}
    odd = np.array([1, 0, 3], "<f4")
    odd.view(np.uint32)[1] = 0xFFC12345
    for seq, shape in ((1, [3]), (2, [1, 3]), (3, [1, 1, 3])):
        inputs: Any = [1, None, 3]
        for _ in shape[1:]:
            inputs = [inputs]
        first = http.post(at, json={"inputs": inputs, "seq": seq})
        assert first.json()["step"] == seq
        for data in (odd, np.array([1, np.nan, 3], "<f4")):
            content = msgspec.msgpack.encode({"inputs": data.tobytes(), "shape": shape, "seq": seq})
            assert http.post(at, content=content, headers=packed).content == first.content
        lists = msgspec.msgpack.encode({"inputs": inputs, "seq": seq})
        assert http.post(at, content=lists, headers=packed).content == first.content


def test_a_gap_in_one_row_of_a_batch_step_is_that_rows_alone(http: httpx.Client, name: str) -> None:
    """Where the model takes gaps all rows step; the row with the gap equals the same step made alone."""
    names, at = [f"{name}-{i}" for i in range(3)], "/v1/models/stacked"
    for k in range(3):
        rows: Any = [[1.0, 2.0, 3.0], [1.0, None, 3.0] if k else [1.0, 2.0, 3.0], [2.0, 2.0, 2.0]]
        found = http.post(f"{at}/step", json={"sessions": names, "inputs": rows}).json()
        assert (found["errors"], found["steps"]) == ({}, [k + 1] * 3)
        alone = http.post(f"{at}/sessions/{name}-alone/step", json={"inputs": rows[1]}).json()
        np.testing.assert_allclose(found["outputs"][1], alone["outputs"], rtol=1e-4, atol=1e-5)


def test_requests_sent_ahead_are_answered_in_order(http: httpx.Client, line: socket.socket, name: str) -> None:
    """Pipelined in one segment, and a request that comes while a step is under way."""
    wanted = offline(http, RAMP)
    line.sendall(b"".join(request(name, body(x)) for x in RAMP[:3]))
    line.sendall(request(name, body(RAMP[3])))
    found = answers(line, 4)
    assert [answer["step"] for _, answer in found] == [1, 2, 3, 4]
    np.testing.assert_allclose([answer["outputs"] for _, answer in found], wanted[:4], rtol=1e-4, atol=1e-5)


def test_a_request_in_pieces_is_a_step(line: socket.socket, name: str) -> None:
    """Cut at every byte of interest; the next whole one goes the short way again."""
    whole = request(name, body(RAMP[0]))
    for cut in (1, 20, whole.index(b"\r\n") + 1, whole.index(b"\r\n\r\n") + 2, len(whole) - 1):
        line.sendall(whole[:cut])
        assert not _readable(line)
        line.sendall(whole[cut:])
        assert answers(line, 1)[0][0] == 200
        line.sendall(whole)
        assert answers(line, 1)[0][0] == 200


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b'{"inputs":[1,2]}', "shape_mismatch"),
        (b'{"inputs":[1,2,1e39]}', "non_finite"),
        (b'{"inputs":[1,2,null]}', "non_finite"),
        (b'{"inputs":[1,2,3],"seq":7}', "step_conflict"),
        (b'{"inputs":[1,2,3],"what":7}', "invalid_request"),
        (b'{"inputs":[1,2,3]', "malformed"),
        (b'{"inputs":[[1,2,3],[1,2,3]]}', "examples_mismatch"),
        (b'{"inputs":[[1,2,3],[1,2]]}', "shape_mismatch"),
        (b'{"inputs":[[1,2,3],4]}', "invalid_request"),
        (b'{"inputs":[[1,2,null]]}', "non_finite"),
        (b'{"inputs":[3e38,-3e38,3e38]}', None),
        (b'{"inputs":[[3e38,-3e38,3e38]]}', None),
    ],
)
def test_errors_are_those_of_the_long_way(line: socket.socket, name: str, text: bytes, code: str | None) -> None:
    """Bodies that are no good, on a connection whose head is known; it lives on."""
    line.sendall(request(name, body(RAMP[0])))
    answers(line, 1)
    line.sendall(request(name, text))
    ((status, answer),) = answers(line, 1)
    assert answer.get("code") == code
    line.sendall(request(name, body(RAMP[1])))
    ((status, answer),) = answers(line, 1)
    assert (status, answer["step"]) == (200, 3 if code is None else 2)


@pytest.mark.parametrize("field", ["expect: 100-continue", "connection: close", "transfer-encoding: chunked"])
def test_unusual_heads_are_what_http_says(line: socket.socket, name: str, field: str) -> None:
    """Chunks and 100-continue go FastAPI's way; a connection that is to be closed is, after the answer."""
    text = body(RAMP[0])
    if "chunked" in field:
        lines = request(name, b"", field).replace(b"content-length: 0\r\n", b"")
        line.sendall(lines + b"%x\r\n%s\r\n0\r\n\r\n" % (len(text), text))
    else:
        line.sendall(request(name, text, field))
    if "expect" in field:
        assert line.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answers(line, 1)[0][1]["step"] == 1
    if "close" in field:
        assert line.recv(1) == b""


def test_a_good_answer_and_an_error_close_the_connection_that_asks_for_it(memory_server: Running, name: str) -> None:
    """The answer says so, too."""
    host, port = memory_server.url.removeprefix("http://").split(":")
    for text, status in ((body(RAMP[0]), b"200"), (b"{", b"400")):
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(request(name, text, "Connection: Close"))
            data = b""
            while part := sock.recv(65536):
                data += part
        assert data.split()[1] == status
        assert b"\r\nconnection: close\r\n" in data


def test_an_id_in_percent_signs_and_a_query_are_the_long_way(line: socket.socket, name: str) -> None:
    """A path that has to be decoded means the session that it means."""
    line.sendall(request(name.replace("s-", "s%2D"), body(RAMP[0])))
    assert answers(line, 1)[0][1]["step"] == 1
    line.sendall(request(name, body(RAMP[1]), path="step?x=1"))
    assert answers(line, 1)[0][1]["step"] == 2


def test_keys_hold_on_the_short_way() -> None:
    """A head that is known speaks for its key only."""
    with running(store="memory://", api_keys="step:a:key-of-tenant-a,step:b:key-of-tenant-b") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            for key, status, step in (("a", 200, 1), ("a", 200, 2), ("b", 200, 1), ("c", 401, None), ("a", 200, 3)):
                sock.sendall(request("s", body(RAMP[0]), f"x-api-key: key-of-tenant-{key}"))
                ((got, answer),) = answers(sock, 1)
                assert (got, answer.get("step")) == (status, step)


def test_columns_give_what_single_steps_give(http: httpx.Client, name: str) -> None:
    """Cold, then hot, then hot with other sessions between them."""
    names = [f"{name}-{i}" for i in range(5)]
    wanted = [offline(http, [RAMP[(i + k) % 6] for k in range(6)]) for i in range(5)]
    for k in range(6):
        asked = [*names, f"{name}-new-{k}"] if k == 4 else names
        inputs = [RAMP[(i + k) % 6] for i in range(len(asked))]
        answer = http.post(
            f"{LSTM}/step", json={"sessions": asked, "inputs": inputs, "seq": [k + 1] * 5 + [1] * (k == 4)}
        )
        found = answer.json()
        assert found["errors"] == {}
        assert found["steps"][:5] == [k + 1] * 5
        np.testing.assert_allclose(found["outputs"][:5], [w[k] for w in wanted], rtol=1e-4, atol=1e-5)


def test_a_column_repeated_gets_the_kept_answers(http: httpx.Client, name: str) -> None:
    """The same seq and payload are not applied twice; another payload is refused by itself."""
    names = [f"{name}-{i}" for i in range(3)]
    calls = [{"sessions": names, "inputs": RAMP[k : k + 3], "seq": [k + 1] * 3} for k in range(3)]
    first = [http.post(f"{LSTM}/step", json=call).json() for call in calls]
    assert http.post(f"{LSTM}/step", json=calls[2]).json() == first[2]
    calls[2]["inputs"] = [RAMP[2], RAMP[0], RAMP[4]]
    again = http.post(f"{LSTM}/step", json=calls[2]).json()
    assert again["steps"] == [3, None, 3]
    assert again["errors"]["1"]["code"] == "step_conflict"


def test_one_row_of_a_column_fails_alone(http: httpx.Client, name: str) -> None:
    """Inputs that are not finite are refused; the other rows are stepped once."""
    names = [f"{name}-{i}" for i in range(3)]
    for k in range(2):
        http.post(f"{LSTM}/step", json={"sessions": names, "inputs": RAMP[k : k + 3]})
    found = http.post(f"{LSTM}/step", json={"sessions": names, "inputs": [RAMP[2], [1, 2, None], RAMP[4]]}).json()
    assert found["steps"] == [3, None, 3]
    assert found["errors"]["1"]["code"] == "non_finite"
    assert http.post(f"{LSTM}/step", json={"sessions": names, "inputs": RAMP[:3]}).json()["steps"] == [4, 3, 4]


def test_columns_of_two_replicas_never_lose_a_step(tmp_path: Path, name: str) -> None:
    """Each replica's hot copies are stale after the other's step: the rows are loaded and stepped again."""
    with ExitStack() as stack:
        servers = [stack.enter_context(running(store=f"sqlite:///{tmp_path}/s.db")) for _ in range(2)]
        clients = [stack.enter_context(httpx.Client(base_url=server.url, timeout=10)) for server in servers]
        names = [f"{name}-{i}" for i in range(4)]
        wanted = [offline(clients[0], [RAMP[(i + k) % 6] for k in range(6)]) for i in range(4)]
        for k in range(6):
            rows = [RAMP[(i + k) % 6] for i in range(4)]
            found = clients[k % 2].post(f"{LSTM}/step", json={"sessions": names, "inputs": rows}).json()
            assert (found["errors"], found["steps"]) == ({}, [k + 1] * 4)
            np.testing.assert_allclose(found["outputs"], [w[k] for w in wanted], rtol=1e-4, atol=1e-5)


def _readable(sock: socket.socket) -> bool:
    sock.settimeout(0.05)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        sock.settimeout(10)
