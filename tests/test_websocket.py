"""Door 2 against a real server: frames, order, errors, hostile peers, heartbeats, drain."""

import base64
import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from serving import Running, running
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

pytestmark = pytest.mark.service

MODEL = "lstm"
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
X = [0.25, -0.5, 1.0]


def url(server: Running, path: str) -> str:
    """A WebSocket's URL."""
    return f"ws{server.url.removeprefix('http')}/v1/models/{path}/stream"


@pytest.fixture
def one(memory_server: Running, request: pytest.FixtureRequest) -> Iterator[ClientConnection]:
    """A socket for one session, named after the test."""
    with connect(url(memory_server, f"{MODEL}/sessions/{request.node.originalname}")) as made:
        yield made


@pytest.fixture
def many(memory_server: Running) -> Iterator[ClientConnection]:
    """A socket for any session."""
    with connect(url(memory_server, MODEL)) as made:
        yield made


def ask(peer: ClientConnection, **frame: Any) -> dict[str, Any]:
    """Send a JSON frame, wait for one."""
    peer.send(json.dumps(frame))
    answer: dict[str, Any] = json.loads(peer.recv(timeout=20))
    return answer


def pack(**frame: Any) -> bytes:
    """A msgpack frame."""
    return msgspec.msgpack.encode(frame)


# --- frames ---------------------------------------------------------------------------------------------------------


def test_steps_of_one_session_are_answered_in_order_with_their_ids(one: ClientConnection, http: Any) -> None:
    """Forty in flight, outputs of the full pass."""
    x = np.random.default_rng(1).standard_normal((40, 3)).astype(np.float32)
    for i, row in enumerate(x.tolist()):
        one.send(json.dumps({"id": f"no {i}", "inputs": row, "seq": i + 1}))
    answers = [json.loads(one.recv(timeout=20)) for _ in x]
    want = http.post(f"/v1/models/{MODEL}/predict", json={"inputs": x.tolist()}).json()["outputs"]
    assert [answer["id"] for answer in answers] == [f"no {i}" for i in range(40)]
    assert [answer["step"] for answer in answers] == list(range(1, 41))
    np.testing.assert_allclose([answer["outputs"] for answer in answers], want, rtol=1e-4, atol=1e-5)


def test_json_and_msgpack_frames_give_equal_numbers(many: ClientConnection) -> None:
    """Raw float32 with a shape of every rank; both kinds on one socket."""
    x = np.random.default_rng(2).standard_normal((2, 5, 3)).astype(np.float32)
    for name, part in (("r1", x[0, 0]), ("r2", x[:, 0]), ("r3", x)):
        text = ask(many, session=f"json-{name}", inputs=part.tolist())
        many.send(pack(session=f"packed-{name}", inputs=part.tobytes(), shape=list(part.shape)))
        packed = msgspec.msgpack.decode(many.recv(timeout=20))
        outputs = np.frombuffer(packed["outputs"], "<f4").reshape(packed["shape"])
        assert packed["session"] == f"packed-{name}"
        np.testing.assert_array_equal(np.array(text["outputs"], np.float32), outputs)
        assert outputs.ndim == part.ndim


def test_every_operation_works_on_a_socket(many: ClientConnection) -> None:
    """Create, info, get, set, fork, checkpoint, rewind, roll out, clear, end; each named session is echoed."""
    name = "every-operation"

    def do(op: str, session: str = name, **fields: Any) -> dict[str, Any]:
        answer = ask(many, op=op, session=session, id=7, **fields)
        assert (answer["id"], answer["session"], "error" in answer) == (7, session, False), answer
        return answer

    assert do("create", examples=1)["step"] == 0
    first = do("step", inputs=X, seq=1)
    state = do("state.get")
    assert do("state.get", layer="lstm_0")["state"]["h"] == state["state"]["lstm_0"]["h"]
    assert do("checkpoint", name="start")["name"] == "start"
    second = do("step", inputs=X)
    assert do("fork", to=f"{name}-child")["to"] == f"{name}-child"
    assert do("info", f"{name}-child")["step"] == 2
    third = do("step", f"{name}-child", inputs=X)["outputs"]
    assert do("step", inputs=X)["outputs"] == third
    assert do("checkpoints")["checkpoints"] == [{"name": "start", "step": 1}]
    assert do("rewind", to="start")["step"] == 1
    assert do("step", inputs=X)["outputs"] == second["outputs"]
    assert do("state.set", state=state["state"], step=1)["step"] == 1
    assert do("step", inputs=X)["outputs"] == second["outputs"]
    assert len(do("rollout", steps=3, inputs=[X] * 3)["outputs"][0]) == 3
    do("clear")
    assert do("step", inputs=X)["outputs"] == first["outputs"]
    assert do("end")["ended"] is True
    assert ask(many, op="info", session=name)["error"]["code"] == "session_not_found"


def test_marker_comes_after_everything_before_it(many: ClientConnection) -> None:
    """Fifty sessions in flight."""
    for i in range(50):
        many.send(json.dumps({"id": i, "session": f"marked-{i}", "inputs": X}))
    many.send(json.dumps({"op": "marker", "id": "here"}))
    answers = [json.loads(many.recv(timeout=20)) for _ in range(51)]
    assert answers[-1] == {"id": "here", "op": "marker"}
    assert sorted(answer["id"] for answer in answers[:-1]) == list(range(50))


def test_operations_keep_their_place_between_pipelined_steps(one: ClientConnection) -> None:
    """step, get, clear, step without waiting: get sees one step, the last step starts anew."""
    frames: list[dict[str, Any]] = [{"inputs": X}, {"op": "state.get"}, {"op": "clear"}, {"inputs": X}, {"op": "info"}]
    for i, frame in enumerate(frames):
        one.send(json.dumps({"id": i, **frame}))
    answers = [json.loads(one.recv(timeout=20)) for _ in frames]
    assert [answer["id"] for answer in answers] == [0, 1, 2, 3, 4]
    assert [answer["step"] for answer in answers] == [1, 1, 1, 2, 2]
    assert answers[0]["outputs"] == answers[3]["outputs"]


BAD = [
    ("garbage", "malformed"),
    ("[1, 2]", "invalid_request"),
    ('{"inputs": [1, 2', "malformed"),
    ('{"session": "s"}', "invalid_request"),
    ('{"session": "s", "inputs": [1, 2]}', "shape_mismatch"),
    ('{"session": "s", "inputs": [1, 2, Infinity]}', "non_finite"),
    ('{"session": "s", "inputs": [1, 2, 1e99]}', "non_finite"),
    ('{"session": "s", "inputs": [1, 2, "3"]}', "invalid_request"),
    ('{"session": "s", "inputs": [1, 2, 3], "seq": 0}', "invalid_request"),
    ('{"session": "s", "inputs": [1, 2, 3], "seq": 9}', "step_conflict"),
    ('{"session": "s", "inputs": [1, 2, 3], "other": 1}', "invalid_request"),
    ('{"session": "no good", "inputs": [1, 2, 3]}', "invalid_session_id"),
    ('{"session": "", "inputs": [1, 2, 3]}', "invalid_session_id"),
    ('{"session": "", "op": "create"}', "invalid_session_id"),
    ('{"session": "nobody", "op": "fork", "to": ""}', "invalid_session_id"),
    ('{"id": 18446744073709551616, "session": "far", "inputs": [1, 2, 3]}', "invalid_request"),
    ('{"id": 1000000000000000000000000000000, "op": "marker"}', "invalid_request"),
    ('{"id": -9223372036854775809, "session": "far", "inputs": [1]}', "invalid_request"),
    ('{"id": 1e400, "session": "far", "inputs": [1, 2, 3]}', "invalid_request"),
    ('{"id": 1, "session": "far", "inputs": [1e999', "non_finite"),
    ('{"id": 1, "session": "far", "inputs": [1, Infinity', "non_finite"),
    ('{"id": 1, "session": "far", "inputs": [1e999], "mask": ' + "[" * 100_000, "malformed"),
    ('{"id": "\\ud800", "session": "far", "inputs": [1, 2, 3]}', "malformed"),
    ('{"id": 1, "session": "\\udfff", "inputs": [1, 2, 1e999]}', "non_finite"),
    ('{"id": "\\ud83d", "session": "far", "inputs": [1, 2, 1e999]}', "non_finite"),
    ('{"session": 4, "inputs": [1, 2, 3]}', "invalid_request"),
    ('{"inputs": [1, 2, 3]}', "invalid_request"),
    ('{"op": "dance", "session": "s"}', "invalid_request"),
    ('{"op": "info", "session": "s", "inputs": [1, 2, 3]}', "invalid_request"),
    ('{"op": "info", "session": "nobody"}', "session_not_found"),
    ('{"op": "rewind", "session": "s"}', "invalid_request"),
    ('{"op": "state.set", "session": "s", "state": {}}', "state_mismatch"),
    ('{"op": "rollout", "session": "nobody", "steps": 1}', "session_not_found"),
    ("[" * 100_000, "invalid_request"),
    ('{"session": "s", "inputs": [1, 2, 3], "mask": ' + "[" * 100_000, "malformed"),
    ('{"session": "s", "inputs": ' + "[" * 100_000, "malformed"),
]


@pytest.mark.parametrize(("frame", "code"), BAD, ids=[f"{i}-{code}" for i, (_, code) in enumerate(BAD)])
def test_bad_frame_is_answered_with_its_error_and_the_socket_goes_on(
    many: ClientConnection, frame: str, code: str
) -> None:
    """An error is a frame, not a close."""
    many.send(frame)
    answer = json.loads(many.recv(timeout=20))
    assert answer["error"]["code"] == code, answer
    assert answer["error"]["status"] < 500
    assert ask(many, op="marker", id=1) == {"id": 1, "op": "marker"}


def test_a_frame_whose_id_cannot_be_echoed_steps_nothing(many: ClientConnection) -> None:
    """Its answer could not be told from another's; ids of 64 bits and any text are echoed as they are."""
    far = {"session": "far-id", "inputs": X}
    assert ask(many, id=2**64, **far)["error"]["code"] == "invalid_request"
    many.send(pack(id=2**63, **far))
    assert msgspec.msgpack.decode(many.recv(timeout=20))["error"]["code"] == "invalid_request"
    for step, name in enumerate((-(2**63), 2**63 - 1, "x" * 300, 0.5, None), 1):
        answer = ask(many, id=name, **far)
        assert (answer["id"], answer["step"]) == (name, step)


def test_retiring_the_last_version_is_an_error_frame_on_open_sockets() -> None:
    """A step of a model that is not served any more is refused with its id; the socket goes on."""
    with running(store="memory://") as server, connect(url(server, MODEL)) as peer:
        assert ask(peer, id=1, session="s", inputs=X)["step"] == 1
        assert httpx.delete(f"{server.url}/v1/models/{MODEL}/versions/1", params={"force": "true"}).status_code == 200
        for inputs in (X, [X], [[X, X]]):
            answer = ask(peer, id=2, session="s", inputs=inputs)
            assert (answer["id"], answer["error"]["code"]) == (2, "model_not_found")
        assert ask(peer, op="marker", id=3) == {"id": 3, "op": "marker"}


@pytest.mark.parametrize("packed", [False, True])
def test_sessions_of_several_examples_and_gaps_step_on_a_socket(many: ClientConnection, packed: bool) -> None:
    """Every rank, again and again, gives what the sequence gives; a reading that is needed is missed by name."""
    x = np.random.default_rng(4).standard_normal((3, 4, 3)).astype(np.float32)

    def send(session: str, part: np.ndarray) -> Any:
        if not packed:
            return ask(many, session=session, inputs=part.tolist())
        many.send(pack(session=session, inputs=part.tobytes(), shape=list(part.shape)))
        answer = msgspec.msgpack.decode(many.recv(timeout=20))
        return {**answer, "outputs": np.frombuffer(answer["outputs"], "<f4").reshape(answer["shape"])}

    want = np.array(send(f"ranks-{packed}", x)["outputs"])
    for t in range(4):
        rows = send(f"rows-{packed}", x[:, t] if t % 2 else x[:, t : t + 1])
        assert rows["step"] == t + 1
        np.testing.assert_allclose(np.reshape(rows["outputs"], (3, -1)), want[:, t], rtol=1e-4, atol=1e-5)
        one = send(f"one-{packed}", x[0, t] if t % 2 else x[:1, t])
        np.testing.assert_allclose(np.ravel(one["outputs"]), want[0, t], rtol=1e-4, atol=1e-5)
    for gap in ([1, None, 3], [[1, None, 3]], [[1, 2, 3], [1, None, 3]]):
        error = ask(many, session="gap", inputs=gap)["error"]
        assert (error["code"], error["feature"]) == ("non_finite", "v")


def test_error_has_the_frames_id_and_session(many: ClientConnection) -> None:
    """Also where the frame is of no known form, but has them."""
    assert ask(many, id="x", session="s", inputs=[1]) | {"error": 0} == {"id": "x", "session": "s", "error": 0}
    assert ask(many, id=3, session="s", op="nothing") | {"error": 0} == {"id": 3, "session": "s", "error": 0}
    many.send(b"\xc1")
    assert msgspec.msgpack.decode(many.recv(timeout=20))["error"]["code"] == "malformed"


def test_socket_of_one_session_refuses_another(one: ClientConnection) -> None:
    """Its own name may be said."""
    assert ask(one, inputs=X, session="other")["error"]["code"] == "invalid_request"
    name = test_socket_of_one_session_refuses_another.__name__
    assert ask(one, inputs=X, session=name)["step"] == 1


def test_retried_step_gets_the_stored_answer(one: ClientConnection) -> None:
    """On the same socket or the next."""
    first = ask(one, inputs=X, seq=1)
    assert ask(one, inputs=X, seq=1) == first
    assert ask(one, inputs=[0, 0, 0], seq=1)["error"]["expected_seq"] == 2


# --- handshakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/models/nothing/stream", 404, "model_not_found"),
        ("/v1/nothing", 404, "route_not_found"),
        (f"/v1/models/{MODEL}/sessions/no%20good/stream", 422, "invalid_session_id"),
        ("/v1/models/bidirectional/stream", 422, "not_streaming"),
    ],
)
def test_handshake_is_refused_with_a_problem(memory_server: Running, path: str, status: int, code: str) -> None:
    """As HTTP does."""
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws{memory_server.url.removeprefix('http')}{path}")
    response = refused.value.response
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert json.loads(response.body or b"")["code"] == code


def test_pages_of_other_sites_are_refused(memory_server: Running) -> None:
    """A browser sends its page's Origin; ours, or one of the settings, may come."""
    target = url(memory_server, MODEL)
    with pytest.raises(InvalidStatus, match="403"):
        connect(target, origin="https://evil.example")
    with connect(target, origin=memory_server.url) as peer:
        assert ask(peer, op="marker")["op"] == "marker"
    with running(store="memory://", cors_origins="https://good.example") as server:
        with connect(url(server, MODEL), origin="https://good.example") as peer:
            assert ask(peer, op="marker")["op"] == "marker"
        with pytest.raises(InvalidStatus, match="403"):
            connect(url(server, MODEL), origin="https://evil.example")


def test_odd_handshakes_are_no_defects(memory_server: Running, http: Any) -> None:
    """A query of many fields is taken; an origin that is none is another site's."""
    with connect(url(memory_server, MODEL) + "?" + "&".join(f"{c}=1" for c in "abcdefghijkl")) as peer:
        assert ask(peer, op="marker")["op"] == "marker"
    for origin in ("http://[", "http://[::1", "//", "null"):
        with pytest.raises(InvalidStatus, match="403"):
            connect(url(memory_server, MODEL), origin=origin)  # type: ignore[arg-type]
    assert 'code="internal"' not in http.get("/metrics").text


def test_key_comes_in_a_header_or_in_the_query() -> None:
    """Its role and namespace hold for every frame."""
    with running(store="memory://", api_keys="step:a:key-of-a-1,read:a:key-of-a-2,step:b:key-of-b-1") as server:
        target = url(server, MODEL)
        for wrong in (target, f"{target}?key=wrong"):
            with pytest.raises(InvalidStatus, match="401"):
                connect(wrong)
        with connect(target, additional_headers={"Authorization": "Bearer key-of-a-1"}) as peer:
            assert ask(peer, session="s", inputs=X)["step"] == 1
        with connect(f"{target}?key=key-of-a-2") as peer:
            assert ask(peer, session="s", op="info")["step"] == 1
            assert ask(peer, session="s", inputs=X)["error"]["code"] == "forbidden"
        with connect(f"{target}?key=key-of-b-1") as peer:
            assert ask(peer, session="s", op="info")["error"]["code"] == "session_not_found"


# --- peers that break the rules -------------------------------------------------------------------------------------


class Raw:
    """A socket past its handshake, for bytes that no WebSocket library would send."""

    def __init__(self, server: Running, path: str = MODEL) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = ["Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13"]
        head = "\r\n".join([f"GET /v1/models/{path}/stream HTTP/1.1", f"Host: {host}:{port}", *lines, "", ""])
        self.socket.sendall(head.encode())
        self._reader = self.socket.makefile("rb")
        assert b" 101 " in self._reader.readline()
        while self._reader.readline() != b"\r\n":
            pass

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.socket.sendall(data)

    def receive(self) -> tuple[int, bytes]:
        """The next frame's opcode and payload; (-1, b"") at the end."""
        head = self._reader.read(2)
        if len(head) < 2:
            return -1, b""
        more = {126: 2, 127: 8}.get(head[1], 0)
        size = int.from_bytes(self._reader.read(more), "big") if more else head[1]
        return head[0] & 0x0F, self._reader.read(size)

    def close_code(self) -> int:
        """The code of the close frame that comes next."""
        opcode, payload = self.receive()
        assert opcode == CLOSE, (opcode, payload)
        return int(struct.unpack("!H", payload[:2])[0])

    def close(self) -> None:
        """Close."""
        self._reader.close()
        self.socket.close()


@pytest.fixture
def raw(memory_server: Running) -> Iterator[Raw]:
    """A raw socket."""
    made = Raw(memory_server)
    yield made
    made.close()


def client_frame(first: int, payload: bytes, size: int | None = None) -> bytes:
    """A masked frame; `first` is its first byte, `size` what its header says."""
    n = len(payload) if size is None else size
    if n < 126:
        length = bytes([0x80 | n])
    elif n < 65536:
        length = bytes([0x80 | 126]) + struct.pack("!H", n)
    else:
        length = bytes([0x80 | 127]) + struct.pack("!Q", n)
    mask = b"\x01\x02\x03\x04"
    return bytes([first]) + length + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload))


STEP = json.dumps({"id": 1, "session": "raw", "inputs": X}).encode()
BROKEN = {
    "not masked": (b"\x81\x02{}", 1002),
    "reserved bits": (client_frame(0xC1, STEP), 1002),
    "unknown opcode": (client_frame(0x83, b""), 1002),
    "unknown control opcode": (client_frame(0x8B, b""), 1002),
    "fragmented ping": (client_frame(0x09, b""), 1002),
    "long ping": (client_frame(0x89, b"x" * 126), 1002),
    "continuation of nothing": (client_frame(0x80, STEP), 1002),
    "start within a message": (client_frame(0x01, b"{") + client_frame(0x81, b"}"), 1002),
    "no UTF-8": (client_frame(0x81, b'{"id": "\xff"}'), 1007),
    "no UTF-8 in fragments": (client_frame(0x01, b"\xff") + client_frame(0x80, b"{}"), 1007),
    "100 MB": (client_frame(0x82, b"", 100 * 2**20), 1009),
    "2^63 bytes": (client_frame(0x82, b"", 2**63), 1009),
    "endless fragments": (client_frame(0x01, b"") + client_frame(0x00, b"") * 5000, 1009),
    "close without a code": (client_frame(0x88, b"\x03"), 1002),
    "close with a wrong code": (client_frame(0x88, struct.pack("!H", 1005)), 1002),
    "close with a reason that is no UTF-8": (client_frame(0x88, struct.pack("!H", 1000) + b"\xff"), 1007),
}


@pytest.mark.parametrize(("data", "code"), BROKEN.values(), ids=BROKEN)
def test_broken_frame_closes_its_socket_alone(raw: Raw, many: ClientConnection, data: bytes, code: int) -> None:
    """With the code of RFC 6455; the neighbour goes on."""
    with contextlib.suppress(ConnectionError):
        raw.send(data)
    assert raw.close_code() == code
    assert ask(many, op="marker")["op"] == "marker"


def test_message_may_come_in_fragments_and_single_bytes(raw: Raw) -> None:
    """With a ping between two fragments, answered at once."""
    fragments = [client_frame(0x01, STEP[:10]), client_frame(0x89, b"hello"), client_frame(0x80, STEP[10:])]
    for byte in b"".join(fragments):
        raw.send(bytes([byte]))
    assert raw.receive() == (PONG, b"hello")
    opcode, payload = raw.receive()
    assert (opcode, json.loads(payload)["id"]) == (TEXT, 1)
    raw.send(client_frame(0x82, pack(session="raw-big", inputs=b"\0" * 12 * 20_000, shape=[1, 20_000, 3])))
    opcode, payload = raw.receive()
    assert (opcode, msgspec.msgpack.decode(payload)["step"]) == (BINARY, 20_000)


def test_close_is_answered_with_its_code(raw: Raw) -> None:
    """And the connection ends."""
    raw.send(client_frame(0x88, struct.pack("!H", 3456) + b"done"))
    assert raw.close_code() == 3456
    assert raw.receive() == (-1, b"")


def test_peer_that_vanishes_in_mid_frame_harms_nobody(memory_server: Running, many: ClientConnection) -> None:
    """Twenty of them, with steps in flight and half a frame, reset."""
    for _ in range(20):
        peer = Raw(memory_server)
        peer.send(client_frame(0x81, STEP) * 30 + client_frame(0x81, STEP)[:9])
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
    assert ask(many, session="survivor", inputs=X)["step"] == 1


def test_peer_that_does_not_read_stalls_itself_and_is_cut_off() -> None:
    """It floods until the server reads no more; others go on; after stall_s it is gone."""
    with running(store="memory://", stall_s=1.0, frames_limit=32) as server, connect(url(server, MODEL)) as other:
        peer = Raw(server)
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.socket.settimeout(0.5)
        flood = client_frame(0x81, json.dumps({"op": "state.get", "session": "x" * 200}).encode()) * 1000
        assert flooded(peer, flood), "the server reads on and on"
        started = time.monotonic()
        assert ask(other, session="beside", inputs=X)["step"] == 1
        assert time.monotonic() - started < 2
        peer.socket.settimeout(20)
        with pytest.raises(ConnectionError):
            peer.send(flood * 2000)
        peer.close()
        assert ask(other, session="beside", inputs=X)["step"] == 2


def flooded(peer: Raw, flood: bytes) -> bool:
    """Send until the other end takes no more; whether it comes to that."""
    try:
        for _ in range(2000):
            peer.send(flood)
    except OSError:
        return True
    return False


def test_pings_are_answered_while_the_socket_waits_for_compute() -> None:
    """Behind more frames than may be in flight, and a rollout that takes a while."""
    with running(store="memory://", frames_limit=2) as server:
        peer = Raw(server)
        peer.send(client_frame(0x81, STEP))
        assert peer.receive()[0] == TEXT
        slow = {"op": "rollout", "session": "raw", "steps": 3000, "inputs": [X] * 3000}
        peer.send(client_frame(0x81, json.dumps(slow).encode()) + client_frame(0x81, STEP) * 20)
        peer.send(client_frame(0x89, b"are you there"))
        assert peer.receive() == (PONG, b"are you there")
        answers = [peer.receive() for _ in range(21)]
        assert len(json.loads(answers[0][1])["outputs"][0]) == 3000
        assert [json.loads(payload)["step"] for _, payload in answers[1:]] == list(range(2, 22))
        peer.close()


def test_peer_that_is_not_heard_of_is_closed_and_one_that_answers_pings_stays() -> None:
    """Pings go out all the time; silence for two intervals ends the connection with 1011."""
    server = Running(store="memory://")
    server.uvicorn_config.ws_ping_interval = 0.2
    server.start()
    try:
        with connect(url(server, MODEL)) as lively:
            silent = Raw(server)
            frames = [silent.receive() for _ in range(2)]
            assert frames[0] == (PING, b"")
            assert frames[1][0] == CLOSE
            assert struct.unpack("!H", frames[1][1][:2]) == (1011,)
            silent.close()
            time.sleep(0.6)
            assert ask(lively, session="lively", inputs=X)["step"] == 1
    finally:
        server.stop()


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.builds(client_frame, st.integers(0, 255), st.binary(max_size=150)),
            st.builds(client_frame, st.sampled_from([0x81, 0x82]), st.binary(max_size=150)),
            st.builds(
                lambda value: client_frame(0x82, msgspec.msgpack.encode(value)),
                st.dictionaries(
                    st.sampled_from(["id", "op", "session", "inputs", "seq", "shape", "mask", "state", "steps"]),
                    st.one_of(st.none(), st.integers(-5, 5), st.binary(max_size=24), st.text(max_size=8)),
                ),
            ),
        ),
        max_size=8,
    )
)
def test_any_bytes_are_answered_with_an_error_or_a_close(memory_server: Running, chunks: list[bytes]) -> None:
    """Fuzz: every text or binary answer is a frame without a 5xx, and the server lives."""
    peer = Raw(memory_server)
    with contextlib.suppress(ConnectionError):
        peer.send(b"".join(chunks) + client_frame(0x88, b""))
        peer.socket.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionError):
        while (frame := peer.receive())[0] != -1:
            opcode, payload = frame
            if opcode in (TEXT, BINARY):
                answer = json.loads(payload) if opcode == TEXT else msgspec.msgpack.decode(payload)
                assert answer.get("error", {}).get("status", 0) < 500, answer
    peer.close()
    with connect(url(memory_server, MODEL)) as other:
        assert ask(other, op="marker")["op"] == "marker"


# --- drain ----------------------------------------------------------------------------------------------------------


def test_drain_answers_what_was_accepted_then_closes_with_1012() -> None:
    """Steps and a held-back operation in flight when the server stops; an idle socket closes at once."""
    with (
        running(store="memory://") as server,
        connect(url(server, MODEL)) as idle,
        connect(url(server, MODEL)) as busy,
    ):
        x = np.zeros((1, 20_000, 3), np.float32)
        busy.send(pack(id=0, session="drained", inputs=x.tobytes(), shape=list(x.shape)))
        for i in range(1, 20):
            busy.send(pack(id=i, session="drained", inputs=x[0, 0].tobytes()))
        busy.send(pack(id=20, session="drained", op="state.get"))
        assert ask(idle, op="marker")["op"] == "marker"
        stop = threading.Thread(target=server.stop)
        stop.start()
        answers, code = until_closed(busy)
        assert code == 1012
        assert [answer["id"] for answer in answers] == list(range(21))
        assert [answer["step"] for answer in answers] == [20_000 + i for i in range(20)] + [20_019]
        assert until_closed(idle) == ([], 1012)
        stop.join()


def until_closed(peer: ClientConnection) -> tuple[list[Any], int | None]:
    """All that still comes, and the code of the close."""
    answers = []
    try:
        while True:
            answers.append(msgspec.msgpack.decode(peer.recv(timeout=20)))
    except ConnectionClosed as closed:
        return answers, closed.rcvd.code if closed.rcvd else None


def test_metrics_count_open_sockets_and_errors(memory_server: Running, http: Any, wait: Callable[..., None]) -> None:
    """The gauge goes up and down again."""

    def open_sockets() -> float:
        line = next(n for n in http.get("/metrics").text.splitlines() if n.startswith("stepcast_open_websockets "))
        return float(line.split()[1])

    before = open_sockets()
    with connect(url(memory_server, MODEL)) as peer:
        assert ask(peer, op="marker")["op"] == "marker"
        assert open_sockets() == before + 1
    wait(lambda: open_sockets() == before)


@pytest.fixture
def wait() -> Callable[[Callable[[], bool]], None]:
    """Waits until something is so."""

    def until(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return until


def test_a_frame_that_waited_too_long_for_its_turn_is_refused_and_a_marker_is_not() -> None:
    """Behind a rollout that takes longer than the deadline: what came meanwhile steps nothing; the next frame does."""
    with running(store="memory://", frames_limit=2, deadline_s=0.2) as server:
        peer = Raw(server)
        peer.send(client_frame(0x81, STEP))
        assert peer.receive()[0] == TEXT
        slow = {"op": "rollout", "session": "raw", "steps": 40_000, "inputs": [X] * 40_000}
        peer.send(client_frame(0x81, json.dumps(slow).encode()))
        late = [{"id": number, "session": "raw", "inputs": X} for number in range(20)] + [{"id": "m", "op": "marker"}]
        peer.send(b"".join(client_frame(0x81, json.dumps(frame).encode()) for frame in late))
        answers = [json.loads(peer.receive()[1]) for _ in range(22)]
        assert "error" not in answers[0]
        codes = [answer["error"]["code"] for answer in answers[1:21] if "error" in answer]
        assert codes, "the rollout was too quick"
        assert set(codes) == {"deadline_exceeded"}
        assert [answer["id"] for answer in answers[1:21]] == list(range(20))
        assert answers[21] == {"id": "m", "op": "marker"}
        peer.send(client_frame(0x81, STEP))
        assert json.loads(peer.receive()[1])["step"] == 22 - len(codes)
        peer.close()


def test_unfinished_messages_of_all_sockets_are_bounded_together() -> None:
    """Beyond tenant_intake_bytes the next one is told to come again later; what is finished is given back."""
    size = 2**20 - 100
    with running(store="memory://", tenant_intake_bytes=2**21, intake_bytes=2**21) as server:
        begun = client_frame(0x82, bytes(size))
        peers = [Raw(server) for _ in range(3)]
        intake = server.app.heads.intake
        for count, peer in enumerate(peers[:2], 1):
            peer.send(begun[:-1])
            deadline = time.monotonic() + 10
            while intake.held < count * size:
                assert time.monotonic() < deadline
                time.sleep(0.002)
        peers[2].send(begun[:-1])
        assert peers[2].close_code() == 1013
        peers[0].send(begun[-1:])
        assert peers[0].receive()[0] == BINARY
        peers[1].close()
        deadline = time.monotonic() + 10
        while intake.held:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        for peer in peers:
            peer.close()
