"""Large bodies: read piece by piece in a thread, so that one call never stops the event loop for long."""

import asyncio
import json
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Process, Running, running
from websockets.sync.client import connect

from service.doors import bodies, large
from stepcast.errors import Malformed, NonFinite, QueueFull, StepcastError, TooLarge

pytestmark = pytest.mark.service

MOST = 8 * 2**20 - 100
BEAT_S = 0.2
"""The longest gap that a test allows; docs/operations.md names 0.1 s, of a machine that nobody else uses."""
STEP, MANY = "/v1/models/lstm/sessions/x/step", "/v1/models/lstm/step"
PACKED = "application/msgpack"


def filled(start: bytes, item: bytes, end: bytes) -> bytes:
    """A body of almost the largest size: the same item again and again."""
    count = (MOST - len(start) - len(end)) // len(item)
    return start + (item * count)[:-1] + end


def packed(byte: bytes, field: bytes = b"inputs") -> bytes:
    """A msgpack body whose field is a list of values of one byte each."""
    count = MOST - 40
    return b"\x82\xa6inputs\x93\x01\x02\x03" + b"\xa4mask\xdd" + count.to_bytes(4, "big") + byte * count


HOSTILE: dict[str, tuple[str, str, bytes, str]] = {
    "floats and a number of steps that is none": (STEP, "POST", filled(b'{"seq":1.0,"inputs":[', b"1.0,", b"]}"), ""),
    "empty lists": (STEP, "POST", filled(b'{"inputs":[', b"[],", b"]}"), ""),
    "rows with NaN": (STEP, "POST", filled(b'{"inputs":[[', b"[1.0,NaN,3.0],", b"]]}"), ""),
    "a mask of empty lists": (STEP, "POST", filled(b'{"inputs":[1,2,3],"mask":[', b"[],", b"]}"), ""),
    "columns of empty lists": (STEP, "POST", filled(b'{"inputs":{"a":[', b"[],", b"]}}"), ""),
    "records": (STEP, "POST", filled(b'{"seq":1.0,"inputs":[', b"{},", b"]}"), ""),
    "packed empty lists": (STEP, "POST", packed(b"\x90"), PACKED),
    "packed empty objects": (STEP, "POST", packed(b"\x80"), PACKED),
    "batch numbers": (MANY, "POST", filled(b'{"sessions":["a"],"inputs":[[1,2,3]],"seq":[', b"1.0,", b"]}"), ""),
    "batch names": (MANY, "POST", filled(b'{"sessions":[', b'"a",', b'],"inputs":[[1,2,3]]}'), ""),
    "batch of 100,000": (
        MANY,
        "POST",
        json.dumps({"sessions": [f"s{i}" for i in range(100_000)], "inputs": [[1.0, 2.0, 3.0]] * 100_000}).encode(),
        "",
    ),
    "a state": ("/v1/models/lstm/sessions/x/state", "PUT", filled(b'{"step":1.0,"state":{"a":[', b"[],", b"]}}"), ""),
    "sequences": ("/v1/models/lstm/predict", "POST", filled(b'{"version":1.0,"inputs":[', b"[1,2,3],", b"]}"), ""),
    "a future": ("/v1/models/lstm/sessions/x/rollout", "POST", filled(b'{"steps":1.0,"inputs":[', b"[1],", b"]}"), ""),
}


class Beats:
    """The longest gap between two turns of an event loop, in wall time or in the process's own, whichever is less."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop, self._on, self.worst = loop, True, 0.0
        loop.call_soon_threadsafe(self._beat, time.monotonic(), time.process_time())

    def _beat(self, wall: float, own: float) -> None:
        now, used = time.monotonic(), time.process_time()
        self.worst = max(self.worst, min(now - wall, used - own))
        if self._on:
            self._loop.call_later(0.005, self._beat, now, used)

    def stop(self) -> None:
        self._on = False


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(store="memory://") as found:
        yield found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_does_not_stop_the_event_loop(server: Running, name: str) -> None:
    """Up to 9 s each before large bodies were read in pieces."""
    path, method, body, kind = HOSTILE[name]
    beats = Beats(server.loop)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answer = client.request(method, path, content=body, headers={"content-type": kind or "application/json"})
    beats.stop()
    assert 400 <= answer.status_code < 500, answer.text
    assert beats.worst < BEAT_S, f"{beats.worst:.3f} s"


def test_sixty_long_frames_are_taken_two_at_a_time(spawn: Callable[..., Process], tmp_path: Path) -> None:
    """In order, with little memory, and the steps of another client go on."""
    process = spawn(f"sqlite:///{tmp_path}/s.db")
    address = process.url.replace("http", "ws") + "/v1/models/lstm/stream"
    before, waits, done = _peak_bytes(process), [], threading.Event()

    def other() -> None:
        with httpx.Client(base_url=process.url, timeout=60) as client:
            while not done.is_set():
                started = time.monotonic()
                assert client.post("/v1/models/lstm/sessions/other/step", json={"inputs": [1, 2, 3]}).is_success
                waits.append(time.monotonic() - started)

    thread = threading.Thread(target=other)
    thread.start()
    long = filled(b'{"id":%d,"session":"s","inputs":[', b"1.0,", b"]}")
    with connect(address, max_size=None, compression=None, ping_interval=None) as socket:
        for number in range(60):
            size = len(long) if number % 20 == 0 else 2**19  # few of the largest: they take half a second each
            numbers = long[:size].rpartition(b",")[0]
            socket.send(numbers.replace(b"%d", b"%d" % number) + b"]}", text=True)
        socket.send(json.dumps({"id": "last", "session": "s", "inputs": [1, 2, 3]}))
        answers = [json.loads(socket.recv(timeout=60)) for _ in range(61)]
    done.set()
    thread.join()
    assert [answer["id"] for answer in answers] == [*range(60), "last"]
    assert {answer["error"]["code"] for answer in answers[:-1]} == {"shape_mismatch"}
    assert answers[-1]["step"] == 1
    assert _peak_bytes(process) - before < 200 * 2**20
    assert sorted(waits)[int(0.99 * len(waits))] < 0.25


def _peak_bytes(process: Process) -> int:
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_large_step_equals_the_same_in_small_calls(server: Running) -> None:
    """By value, through every door and kind of body, with gaps, a mask and the number of the step."""
    x = np.random.default_rng(1).normal(size=(1, 9000, 3)).astype(np.float32)
    mask = np.ones((1, 9000), bool)
    mask[0, ::7] = False
    plain = {"inputs": x.tolist(), "mask": mask.tolist(), "seq": 9000}
    raw = {"inputs": x.tobytes(), "shape": list(x.shape), "mask": mask.tolist(), "seq": 9000}
    floats = json.dumps({**plain, "seq": 9000.0})
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def stepped(session: str, **body: Any) -> dict[str, Any]:
            answer = client.post(f"/v1/models/lstm/sessions/{session}/step", **body)
            assert answer.is_success, answer.text
            found: dict[str, Any] = answer.json()
            return found

        def last(session: str) -> Any:
            return client.get(f"/v1/models/lstm/sessions/{session}/state").json()["state"]

        whole = stepped("json", json=plain)
        assert len(json.dumps(plain)) > large.LARGE_BYTES
        assert stepped("floats", content=floats) == whole
        packed = stepped(
            "raw", content=msgspec.msgpack.encode(raw), headers={"content-type": PACKED, "accept": "application/json"}
        )
        assert packed == whole
        assert stepped("json", json=plain) == whole, "a retry is known"
        outputs: list[Any] = []
        for at in range(0, 9000, 500):
            part = slice(at, at + 500)
            small = {"inputs": x[:, part].tolist(), "mask": mask[:, part].tolist()}
            assert len(json.dumps(small)) < large.LARGE_BYTES
            outputs += stepped("small", json=small)["outputs"][0]
        np.testing.assert_array_equal(np.array(outputs, float), np.array(whole["outputs"][0], float))
        assert last("small") == last("json") == last("floats") == last("raw")
    with connect(server.url.replace("http", "ws") + "/v1/models/lstm/sessions/ws/stream", max_size=None) as socket:
        socket.send(json.dumps({"id": 1, **plain}))
        socket.send(json.dumps({"id": 2, "inputs": [1, 2, 3]}))
        first, second = (json.loads(socket.recv(timeout=60)) for _ in range(2))
    assert first["outputs"] == whole["outputs"]
    assert (first["id"], second["id"], second["step"]) == (1, 2, 9001)


def test_large_batch_equals_single_steps(server: Running) -> None:
    """By value, with numbers of steps as floats."""
    x = np.random.default_rng(2).normal(size=(3000, 3)).astype(np.float32)
    body = {"sessions": [f"b{i}" for i in range(3000)], "inputs": x.tolist(), "seq": [1.0] * 3000}
    assert len(json.dumps(body)) > large.LARGE_BYTES
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answer = client.post(MANY, json=body).json()
        assert answer["steps"] == [1] * 3000
        assert not answer["errors"]
        for row in (0, 1234, 2999):
            alone = client.post(f"/v1/models/lstm/sessions/alone{row}/step", json={"inputs": x[row].tolist()}).json()
            np.testing.assert_allclose(answer["outputs"][row], alone["outputs"], atol=1e-6)
        body["sessions"] = ["b0", "no good", *body["sessions"][2:]]
        again = client.post(MANY, json=body).json()
        assert [*again["errors"]] == ["1"]
        assert again["outputs"][0] == answer["outputs"][0], "a retry is known"


def test_large_state_is_put_as_it_was_got(server: Running) -> None:
    """In JSON, by layer, and from a file."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        x = np.random.default_rng(3).normal(size=(2000, 3)).tolist()
        assert client.post(STEP.replace("/x/", "/wide/"), json={"inputs": x}).is_success
        address = "/v1/models/lstm/sessions/wide/state"
        got = client.get(address).json()
        assert len(json.dumps(got)) > large.LARGE_BYTES
        assert (
            client.put(address.replace("wide", "copy"), json={"state": got["state"], "step": 7.0}).json()["step"] == 7
        )
        assert client.get(address.replace("wide", "copy")).json()["state"] == got["state"]
        (layer,) = got["state"]
        assert client.put(f"{address}/{layer}", json={"state": got["state"][layer]}).is_success
        file = client.get(address, headers={"accept": "application/x-safetensors"}).content
        kind = {"content-type": "application/x-safetensors"}
        assert client.put(address.replace("wide", "filed"), content=file, headers=kind).is_success
        assert client.get(address.replace("wide", "filed")).json()["state"] == got["state"]
        ragged = {key: [*rows[:-1], [1.0]] for key, rows in got["state"][layer].items()}
        assert client.put(address, json={"state": {layer: ragged}}).json()["code"] == "shape_mismatch"


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_arrays_in_pieces_equal_arrays_at_once(data: st.DataObject) -> None:
    """Any nesting, ragged or not: the same numbers, or an error of the same kind."""
    number = st.one_of(st.none(), st.integers(-9, 9), st.floats(-1e30, 1e30), st.just(1e39))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    value: Any = [data.draw(number) for _ in range(int(np.prod(shape)))]
    for size in reversed(shape[1:]):
        value = [value[at : at + size] for at in range(0, len(value), size)]
    if data.draw(st.booleans()):
        spoiled = data.draw(st.sampled_from([[], [1], [[1]], [1, 2], None, True, 3.5]))
        value[data.draw(st.integers(0, len(value) - 1))] = spoiled
    text = json.dumps(value, indent=data.draw(st.sampled_from([None, 1]))).encode()
    usual, pieces = (_outcome(read, text) for read in (_at_once, lambda raw: large.array(raw, "$.inputs")))
    if isinstance(usual, np.ndarray) and usual.size:
        np.testing.assert_array_equal(usual, pieces)
    elif isinstance(usual, np.ndarray):
        assert pieces == "shape_mismatch"  # of no numbers: refused later
    else:
        assert pieces in ("shape_mismatch", "invalid_request")
        assert usual in ("shape_mismatch", "invalid_request")


def _at_once(text: bytes) -> Any:
    return bodies.numbers(msgspec.Raw(text), None, bodies.JSON)


def _outcome(read: Callable[[bytes], Any], text: bytes) -> Any:
    try:
        return read(text)
    except StepcastError as error:
        return error.code


def test_an_array_of_several_pieces_is_whole() -> None:
    """Numbers at the seams, gaps, and where an error stands."""
    x = np.random.default_rng(4).normal(size=(40, 1000, 3)).astype(np.float32)
    x[7, 13, 2] = np.nan
    text = json.dumps(x.tolist()).replace("NaN", "null").encode()
    assert len(text) > 10 * large.LARGE_BYTES
    np.testing.assert_array_equal(large.array(text, "$.inputs"), x)
    with pytest.raises(NonFinite, match=r"out of range - at `\$\.inputs\[7\]\[13\]\[2\]`"):
        large.array(text.replace(b"null", b"1e999"), "$.inputs")
    with pytest.raises(StepcastError, match=r"got `bool` - at `\$\.inputs\[7\]\[13\]\[2\]`"):
        large.array(text.replace(b"null", b"true"), "$.inputs")


def test_constants_are_replaced_outside_of_text_alone() -> None:
    """As Python's json reads them; -Infinity too."""
    body = rb'{"a": [NaN, -1, NaN], "NaN": "Infinity \" NaN \\", "b": "\\"}'
    assert json.loads(large.without_constants(body)) == {"a": [None, -1, None], "NaN": 'Infinity " NaN \\', "b": "\\"}
    with pytest.raises(NonFinite):
        large.without_constants(b'["", -Infinity]')
    filler = b'"' + b"a" * large.LARGE_BYTES + b'"'
    asked = bodies.decode(
        b'{"inputs": [1, NaN, 3], "seq": 2.0, "mask": null, "format": %s}' % filler, dict, bodies.JSON
    )
    assert asked["inputs"] == [1, None, 3]
    with pytest.raises(Malformed):
        bodies.decode(b'{"inputs": [1, NaN, nan], "format": %s}' % filler, bodies.StepBody, bodies.JSON)


def test_a_part_that_is_decoded_whole_is_weighed() -> None:
    """What a bin has in it is not counted."""
    large.weigh(b"[1]" * 9, False, "$.mask")
    for part in (b"[" * (large.MOST_CONTAINERS + 1), b"1," * (large.MOST_VALUES + 1)):
        with pytest.raises(TooLarge, match=r"\$\.mask has \d+"):
            large.weigh(part, False, "$.mask")
    large.weigh(b"\xc6" + b"\x90" * 2**20, True, "$.inputs")
    with pytest.raises(TooLarge):
        large.weigh(b"\xdd" + b"\x90" * 2**20, True, "$.inputs")


@pytest.mark.anyio
async def test_more_than_the_thread_may_have_waiting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One body is always taken; what waits is bounded in bytes, and given back."""
    monkeypatch.setattr(large, "WAITING_BYTES", 3 * large.LARGE_BYTES)
    begun, go_on = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        assert go_on.wait(20)
        return "read"

    first = asyncio.ensure_future(large.aside(2 * large.LARGE_BYTES, work))
    await asyncio.to_thread(begun.wait, 20)
    with pytest.raises(QueueFull, match="bytes of large bodies wait"):
        await large.aside(2 * large.LARGE_BYTES, str)
    assert await large.aside(large.LARGE_BYTES, lambda: "small") == "small"
    go_on.set()
    assert await first == "read"
    assert await large.aside(9 * large.LARGE_BYTES, lambda: "alone") == "alone"
