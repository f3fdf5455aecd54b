"""Door 1 by value: every route, and every error that it documents."""

import gzip
import io
import json
import re
import socket
import zipfile
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import numpy as np
import pytest
import safetensors.numpy
from serving import MODELS, Running, golden, running

from stepcast.errors import every_error
from stepcast.manifest import read_manifest

pytestmark = pytest.mark.service

LSTM = "/v1/models/lstm"
ONES = [1.0, 1.0, 1.0]
PACKED = {"content-type": "application/msgpack"}
AS_JSON = {"content-type": "application/json"}
CODES = {error.code: error.status for error in every_error()}


@pytest.fixture
def name() -> str:
    """A session id that no other test has."""
    return f"s-{uuid4().hex}"


@pytest.fixture
def at(name: str) -> str:
    """The path of a session that no other test has."""
    return f"{LSTM}/sessions/{name}"


def refused(response: httpx.Response, code: str, *words: str) -> dict[str, Any]:
    """Assert that an answer is the problem document of an error; the document."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    problem: dict[str, Any] = response.json()
    assert (problem["code"], response.status_code) == (code, CODES[code]), problem
    assert problem["status"] == response.status_code
    assert problem["type"].endswith(code)
    for word in words:
        assert word in problem["detail"], problem["detail"]
    return problem


def good(response: httpx.Response, status: int = 200) -> dict[str, Any]:
    """Assert that a call went well; its JSON."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    answer: dict[str, Any] = response.json()
    return answer


def pack(x: Any, **fields: Any) -> bytes:
    """A msgpack body with raw float32 inputs."""
    array = np.asarray(x, "<f4")
    return msgspec.msgpack.encode({"inputs": array.tobytes(), "shape": list(array.shape), **fields})


def unpack(response: httpx.Response) -> tuple[np.ndarray, dict[str, Any]]:
    """The outputs of a msgpack answer, and the rest of it."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/msgpack"
    answer = msgspec.msgpack.decode(response.content)
    return np.frombuffer(answer["outputs"], "<f4").reshape(answer["shape"]), answer


def start_as_recorded(http: httpx.Client, at: str, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Give a session the recorded start state of a row; that row's inputs and outputs."""
    arrays = golden("lstm")
    length = int(arrays["lengths"][row])
    state = {"lstm_0": {key: arrays[f"state_in.lstm_0.{key}"][row : row + 1].tolist() for key in "hc"}}
    good(http.put(f"{at}/state", json={"state": state}))
    return arrays["x"][row, :length], arrays["y"][row, :length]


def longest() -> int:
    """The recorded row with most steps."""
    return int(golden("lstm")["lengths"].argmax())


# --- models and operations --------------------------------------------------------------------------------------------


def test_models_lists_what_is_served(http: httpx.Client) -> None:
    """Every directory of tests/models, with version, task and device."""
    listed = {model["name"]: model for model in good(http.get("/v1/models"))["models"]}
    assert sorted(listed) == sorted(path.name for path in MODELS.iterdir() if path.is_dir())
    assert listed["lstm"] == {
        "name": "lstm",
        "version": 1,
        "versions": [1],
        "task": "regression",
        "streaming": True,
        "device": listed["lstm"]["device"],
        "description": "a tiny model for tests",
        "batch_invariance": listed["lstm"]["batch_invariance"],
    }
    assert listed["lstm"]["device"] in ("cpu", "cuda")
    assert listed["characters"]["task"] == "classification"


def test_a_models_manifest_is_the_files_with_versions_and_fingerprint(http: httpx.Client) -> None:
    """GET of a model and of its version answer manifest.json, with what it leaves out."""
    manifest = read_manifest(MODELS / "lstm" / "1")
    live = good(http.get(LSTM))
    assert live.pop("versions") == [1]
    assert live == good(http.get(f"{LSTM}/versions/1"))
    assert live.pop("fingerprint") == manifest.fingerprint
    listed = {model["name"]: model for model in good(http.get("/v1/models"))["models"]}
    assert live.pop("batch_invariance") == listed["lstm"]["batch_invariance"]
    assert live == json.loads(manifest.model_dump_json())


def test_health_metrics_docs(http: httpx.Client, at: str) -> None:
    """Probes, metrics in Prometheus' text with what was counted, and the documentation."""
    assert good(http.get("/healthz/live")) == {"live": True}
    assert good(http.get("/healthz/ready")) == {"ready": True}

    def steps() -> float:
        text = http.get("/metrics").text
        found = re.search(r'^stepcast_steps_total\{model="lstm"\} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    before = steps()
    good(http.post(f"{at}/step", json={"inputs": [[ONES] * 5] * 3}))
    assert steps() == before + 15
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'stepcast_errors_total{code="model_not_found"}' in _after_an_unknown_model(http)
    assert "swagger" in http.get("/docs").text.lower()
    assert http.get("/openapi.json").json()["info"]["title"] == "Stepcast"


def _after_an_unknown_model(http: httpx.Client) -> str:
    refused(http.get("/v1/models/nobody"), "model_not_found")
    return http.get("/metrics").text


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/v1/models/nobody", "model_not_found"),
        ("GET", f"{LSTM}/versions/9", "model_not_found"),
        ("GET", f"{LSTM}/versions/one", "invalid_request"),
        ("GET", f"{LSTM}/versions/" + "9" * 5000, "invalid_request"),
        ("GET", f"{LSTM}/versions/99999999999999999999", "invalid_request"),
        ("DELETE", f"{LSTM}/versions/99999999999999999999", "invalid_request"),
        ("DELETE", f"{LSTM}/versions/9", "model_not_found"),
        ("POST", "/v1/models/nobody/sessions/s/step", "model_not_found"),
        ("POST", "/v1/models/nobody/step", "model_not_found"),
        ("POST", "/v1/models/nobody/predict", "model_not_found"),
        ("POST", "/v1/models/nobody/sessions", "model_not_found"),
        ("GET", "/v1/models/nobody/sessions", "model_not_found"),
        ("GET", "/v1/models/nobody/sessions/s", "model_not_found"),
        ("DELETE", "/v1/models/nobody/sessions/s", "model_not_found"),
        ("GET", "/v1/models/nobody/sessions/s/state", "model_not_found"),
        ("GET", f"{LSTM}/sessions/nobody", "session_not_found"),
        ("DELETE", f"{LSTM}/sessions/nobody", "session_not_found"),
        ("GET", f"{LSTM}/sessions/nobody/state", "session_not_found"),
        ("DELETE", f"{LSTM}/sessions/nobody/state", "session_not_found"),
        ("GET", f"{LSTM}/sessions/nobody/state/lstm_0", "session_not_found"),
        ("POST", f"{LSTM}/sessions/nobody/fork", "session_not_found"),
        ("POST", f"{LSTM}/sessions/nobody/checkpoints", "session_not_found"),
        ("GET", f"{LSTM}/sessions/nobody/checkpoints", "session_not_found"),
        ("GET", "/v1/nothing", "route_not_found"),
        ("POST", f"{LSTM}/elsewhere/s/step", "route_not_found"),
        ("POST", f"{LSTM}/versions/1/step", "route_not_found"),
        ("POST", f"{LSTM}/sessions/s/step/more", "route_not_found"),
        ("GET", f"{LSTM}/sessions/s/step", "method_not_allowed"),
        ("PATCH", f"{LSTM}/sessions/s", "method_not_allowed"),
        ("PUT", "/v1/models", "method_not_allowed"),
    ],
)
def test_what_is_not_there_says_so(http: httpx.Client, method: str, path: str, code: str) -> None:
    """Unknown models, versions, sessions, routes and methods."""
    body = (
        {"inputs": [ONES], "sessions": ["s"]} if path.count("/") == 4 and path.endswith("step") else {"inputs": [ONES]}
    )
    refused(
        http.request(method, path, json=body if path.endswith(("step", "predict")) and method == "POST" else None), code
    )


def test_a_session_that_is_not_there_is_no_end_for_rewind_and_rollout(http: httpx.Client) -> None:
    """404, with the session's name."""
    for call, body in (("rewind", {"to": "k"}), ("rollout", {"steps": 1})):
        problem = refused(http.post(f"{LSTM}/sessions/nobody/{call}", json=body), "session_not_found", "'nobody'")
        assert (problem["model"], problem["session"]) == ("lstm", "nobody")


# --- create, list, info, end ------------------------------------------------------------------------------------------


def test_create_makes_a_session_once(http: httpx.Client, name: str, at: str) -> None:
    """201 with its info and an entity tag; the second time 409."""
    response = http.post(f"{LSTM}/sessions", json={"session": name, "examples": 3, "version": 1, "ttl_s": 60})
    made = good(response, 201)
    assert response.headers["etag"] == http.get(at).headers["etag"]
    assert made == good(http.get(at))
    assert {k: made[k] for k in ("session", "model", "version", "step", "examples")} == {
        "session": name,
        "model": "lstm",
        "version": 1,
        "step": 0,
        "examples": 3,
    }
    assert made["bytes"] == 72 + 3 * 8 * 4
    assert made["created_at"] == made["used_at"] == made["expires_at"] - 60
    refused(http.post(f"{LSTM}/sessions", json={"session": name}), "session_exists", repr(name))


def test_create_without_a_body_makes_an_id(http: httpx.Client) -> None:
    """The server's ids are new each time; a fresh session has no examples and never expires."""
    made = [good(http.post(f"{LSTM}/sessions"), 201) for _ in range(3)]
    assert len({info["session"] for info in made}) == 3
    assert all(len(info["session"]) == 22 for info in made)
    assert (made[0]["examples"], made[0]["expires_at"], made[0]["step"]) == (None, None, 0)
    body = msgspec.msgpack.encode({"examples": 2})
    answer = http.post(f"{LSTM}/sessions", content=body, headers=PACKED)
    assert answer.status_code == 201
    assert msgspec.msgpack.decode(answer.content)["examples"] == 2


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"session": ""}, "invalid_session_id"),
        ({"session": "a/b"}, "invalid_session_id"),
        ({"session": "x" * 257}, "invalid_session_id"),
        ({"session": "a b"}, "invalid_session_id"),
        ({"session": "ü"}, "invalid_session_id"),
        ({"session": "\n"}, "invalid_session_id"),
        ({"session": 5}, "invalid_request"),
        ({"examples": 0}, "invalid_request"),
        ({"examples": -1}, "invalid_request"),
        ({"examples": 2.5}, "invalid_request"),
        ({"examples": 65_537}, "too_large"),
        ({"version": 9}, "model_not_found"),
        ({"ttl_s": -1}, "invalid_request"),
        ({"unknown": 1}, "invalid_request"),
        ([], "invalid_request"),
    ],
)
def test_create_refuses_what_makes_no_session(http: httpx.Client, body: Any, code: str) -> None:
    """Ids, counts, versions and fields that are none."""
    refused(http.post(f"{LSTM}/sessions", json=body), code)


def test_ids_of_all_allowed_characters_work_everywhere(http: httpx.Client) -> None:
    """256 of letters, digits and ._:@~-, in bodies and in paths."""
    session = ("aZ9._:@~-" * 29)[:256]
    good(http.post(f"{LSTM}/sessions", json={"session": session}), 201)
    assert good(http.post(f"{LSTM}/sessions/{session}/step", json={"inputs": ONES}))["step"] == 1
    for wrong in ("x" * 257, "a b", "a,b", "%C3%BC", "%00", "a%2Fb"):
        response = http.post(f"{LSTM}/sessions/{wrong}/step", json={"inputs": ONES})
        refused(response, "route_not_found" if "%2F" in wrong else "invalid_session_id")


def test_list_pages_by_prefix_and_cursor(http: httpx.Client) -> None:
    """Every session of the prefix once, none of another model, in pages of the limit."""
    prefix = f"p{uuid4().hex}"
    names = [f"{prefix}-{i:02}" for i in range(7)]
    for name in names:
        good(http.post(f"{LSTM}/sessions", json={"session": name}), 201)
    good(http.post("/v1/models/gru/sessions", json={"session": f"{prefix}-gru"}), 201)
    seen, cursor = [], ""
    for _ in range(8):
        page = good(http.get(f"{LSTM}/sessions", params={"prefix": prefix, "limit": 3, "cursor": cursor}))
        assert len(page["sessions"]) <= 3
        seen += page["sessions"]
        cursor = page["cursor"]
        if cursor is None:
            break
    assert sorted(seen) == names
    assert good(http.get(f"{LSTM}/sessions", params={"prefix": f"{prefix}-03"}))["sessions"] == [names[3]]
    assert good(http.get(f"{LSTM}/sessions", params={"prefix": f"{prefix}*"})) == {"sessions": [], "cursor": None}


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1.5", "", "9" * 5000, "²"])
def test_list_refuses_a_limit_that_is_none(http: httpx.Client, limit: str) -> None:
    """A positive integer, or 422."""
    refused(http.get(f"{LSTM}/sessions", params={"limit": limit}), "invalid_request", "'limit'")


def test_info_follows_the_session(http: httpx.Client, at: str) -> None:
    """Step, examples, bytes and times change as the session does."""
    good(http.post(f"{at}/step", json={"inputs": [ONES, ONES]}))
    info = good(http.get(at))
    assert (info["step"], info["examples"], info["version"]) == (1, 2, 1)
    assert info["bytes"] == 72 + 2 * 8 * 4 + (16 + 2 * 2 * 4)
    assert info["used_at"] >= info["created_at"]


def test_end_forgets_the_session(http: httpx.Client, name: str, at: str) -> None:
    """204; then it is not there, and the id is free for a new one that starts at zeros."""
    first = good(http.post(f"{at}/step", json={"inputs": ONES}))
    good(http.post(f"{at}/step", json={"inputs": ONES}))
    response = http.delete(at)
    assert (response.status_code, response.content) == (204, b"")
    refused(http.get(at), "session_not_found")
    refused(http.delete(at), "session_not_found")
    assert good(http.post(f"{at}/step", json={"inputs": ONES})) == first


# --- step -------------------------------------------------------------------------------------------------------------


def test_step_by_ranks_gives_the_recorded_numbers(http: httpx.Client, at: str) -> None:
    """[F], [N,F] and [N,T,F] advance the same session through a recorded sequence."""
    x, y = start_as_recorded(http, at, longest())
    one = good(http.post(f"{at}/step", json={"inputs": x[0].tolist()}))
    assert (one["step"], one["version"]) == (1, 1)
    np.testing.assert_allclose(one["outputs"], y[0], rtol=1e-4, atol=1e-5)
    two = good(http.post(f"{at}/step", json={"inputs": x[1:2].tolist()}))
    assert two["step"] == 2
    np.testing.assert_allclose(two["outputs"], y[1:2], rtol=1e-4, atol=1e-5)
    rest = good(http.post(f"{at}/step", json={"inputs": [x[2:].tolist()]}))
    assert rest["step"] == len(x)
    np.testing.assert_allclose(rest["outputs"], y[None, 2:], rtol=1e-4, atol=1e-5)


def test_ncw_takes_and_returns_what_dl4j_does(http: httpx.Client, at: str) -> None:
    """[N,F,T] in, [N,O,T] out, the numbers of NWC."""
    x, y = start_as_recorded(http, at, longest())
    answer = good(http.post(f"{at}/step", json={"inputs": [x.T.tolist()], "format": "NCW"}))
    np.testing.assert_allclose(answer["outputs"], y.T[None], rtol=1e-4, atol=1e-5)
    x, y = start_as_recorded(http, f"{at}-packed", longest())
    outputs, answer = unpack(http.post(f"{at}-packed/step", content=pack(x.T[None], format="NCW"), headers=PACKED))
    assert answer["step"] == len(x)
    np.testing.assert_allclose(outputs, y.T[None], rtol=1e-4, atol=1e-5)


def test_msgpack_carries_raw_float32_and_any_rank(http: httpx.Client, at: str) -> None:
    """Bodies with shape; without one bytes are [F]; nested lists work as well; Accept chooses the answer's encoding."""
    x, y = start_as_recorded(http, at, longest())
    first, _ = unpack(http.post(f"{at}/step", content=pack(x[0]), headers=PACKED))
    np.testing.assert_allclose(first, y[0], rtol=1e-4, atol=1e-5)
    body = msgspec.msgpack.encode({"inputs": x[1].astype("<f4").tobytes()})
    second, _ = unpack(http.post(f"{at}/step", content=body, headers=PACKED))
    np.testing.assert_allclose(second, y[1], rtol=1e-4, atol=1e-5)
    third, _ = unpack(
        http.post(f"{at}/step", content=msgspec.msgpack.encode({"inputs": x[2:3].tolist()}), headers=PACKED)
    )
    np.testing.assert_allclose(third, y[2:3], rtol=1e-4, atol=1e-5)
    as_json = http.post(f"{at}/step", content=pack(x[3]), headers={**PACKED, "accept": "application/json"})
    np.testing.assert_allclose(good(as_json)["outputs"], y[3], rtol=1e-4, atol=1e-5)
    fifth, answer = unpack(
        http.post(f"{at}/step", json={"inputs": x[4].tolist()}, headers={"accept": "application/msgpack"})
    )
    np.testing.assert_allclose(fifth, y[4], rtol=1e-4, atol=1e-5)
    assert (answer["step"], answer["version"]) == (5, 1)


def test_another_number_of_examples_is_refused_with_both_numbers_until_the_state_is_cleared(
    http: httpx.Client, at: str
) -> None:
    """N is fixed by the first step, or by create; clearing frees it, and the step number goes on."""
    good(http.post(f"{at}/step", json={"inputs": [ONES] * 3}))
    problem = refused(http.post(f"{at}/step", json={"inputs": [ONES] * 2}), "examples_mismatch", "3 examples", "got 2")
    assert (problem["examples"], problem["got"]) == (3, 2)
    cleared = good(http.delete(f"{at}/state"))
    assert (cleared["examples"], cleared["step"]) == (None, 1)
    assert good(http.post(f"{at}/step", json={"inputs": [ONES] * 2}))["step"] == 2
    made = good(http.post(f"{LSTM}/sessions", json={"examples": 2}), 201)["session"]
    refused(
        http.post(f"{LSTM}/sessions/{made}/step", json={"inputs": ONES}), "examples_mismatch", "2 examples", "got 1"
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "malformed"),
        (b"{", "malformed"),
        (b"\xff\xfe{}", "malformed"),
        (b'{"inputs":[1,2,3]', "malformed"),
        (b'{"inputs":[1,2,3}', "malformed"),
        (b'{"inputs":[1,,3]}', "malformed"),
        (b'{"inputs":' + b"[" * 100_000, "malformed"),
        (b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed"),
        (b'{"inputs":[1,2,3],"mask":' + b"[" * 500 + b"]" * 500 + b"}", "shape_mismatch"),
        (b"null", "invalid_request"),
        (b"[]", "invalid_request"),
        (b"{}", "invalid_request"),
        (b'{"inputs":[1,2,3],"unknown":1}', "invalid_request"),
        (b'{"inputs":null}', "shape_mismatch"),
        (b'{"inputs":"1,2,3"}', "shape_mismatch"),
        (b'{"inputs":{"u":1}}', "invalid_request"),
        (b'{"inputs":7}', "shape_mismatch"),
        (b'{"inputs":[]}', "shape_mismatch"),
        (b'{"inputs":[[]]}', "shape_mismatch"),
        (b'{"inputs":[[[]]]}', "shape_mismatch"),
        (b'{"inputs":[[],[]]}', "shape_mismatch"),
        (b'{"inputs":[[[[1,2,3]]]]}', "shape_mismatch"),
        (b'{"inputs":[1,2]}', "shape_mismatch"),
        (b'{"inputs":[1,2,3,4]}', "shape_mismatch"),
        (b'{"inputs":[[1,2,3],[1,2]]}', "shape_mismatch"),
        (b'{"inputs":[[[1,2,3]],[[1,2,3],[1,2,3]]]}', "shape_mismatch"),
        (b'{"inputs":[[1,2,3],4]}', "invalid_request"),
        (b'{"inputs":[1,[2],3]}', "invalid_request"),
        (b'{"inputs":[1,"2",3]}', "invalid_request"),
        (b'{"inputs":["\xff",1,1]}', "invalid_request"),
        (b'{"inputs":[1,true,3]}', "invalid_request"),
        (b'{"inputs":[null,1,1]}', "non_finite"),
        (b'{"inputs":[NaN,1,1]}', "non_finite"),
        (b'{"inputs":[Infinity,1,1]}', "non_finite"),
        (b'{"inputs":[1,-Infinity,1]}', "non_finite"),
        (b'{"inputs":[1e400,1,1]}', "non_finite"),
        (b'{"inputs":[NaN,1e400,1]}', "non_finite"),
        (b'{"inputs":[-1e39,1,1]}', "non_finite"),
        (b'{"inputs":[1' + b"0" * 5000 + b",1,1]}", "non_finite"),
        (b'{"inputs":[1,2,3],"seq":0}', "invalid_request"),
        (b'{"inputs":[1,2,3],"seq":-1}', "invalid_request"),
        (b'{"inputs":[1,2,3],"seq":1.5}', "invalid_request"),
        (b'{"inputs":[1,2,3],"seq":"1"}', "invalid_request"),
        (b'{"inputs":[1,2,3],"seq":99999999999999999999}', "invalid_request"),
        (b'{"inputs":[1,2,3],"format":"CNW"}', "invalid_request"),
        (b'{"inputs":[1,2,3],"mask":2}', "invalid_request"),
        (b'{"inputs":[1,2,3],"mask":"1"}', "invalid_request"),
        (b'{"inputs":[1,2,3],"mask":{"a":1}}', "invalid_request"),
        (b'{"inputs":[1,2,3],"mask":[1,1]}', "shape_mismatch"),
        (b'{"inputs":[[1,2,3]],"mask":[[1]]}', "shape_mismatch"),
        (b'{"inputs":[[[1,2,3]]],"mask":[[1,1]]}', "shape_mismatch"),
        (b'{"inputs":[[[1,2,3]]],"mask":[[1],[1,1]]}', "shape_mismatch"),
    ],
    ids=lambda value: value[:44].decode("latin-1") if isinstance(value, bytes) else value,
)
def test_step_refuses_what_is_no_step(http: httpx.Client, at: str, body: bytes, code: str) -> None:
    """Broken JSON, wrong shapes, wrong types and numbers that are none; no session comes of it."""
    refused(http.post(f"{at}/step", content=body, headers=AS_JSON), code)
    refused(http.get(at), "session_not_found")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (b"\x91" * 100_000, "invalid_request"),
        (b"\x81\xa6inputs" + b"\x91" * 100_000, "malformed"),
        (b"\x81\xa6inputs\x91\xa1\xff", "malformed"),
        (b"\x81\xa6inputs\xa1\xff", "malformed"),
        (b"\x81\xa6inputs\xc4\x04ab", "malformed"),
        (msgspec.msgpack.encode({"inputs": b"123"}), "shape_mismatch"),
        (msgspec.msgpack.encode({"inputs": b""}), "shape_mismatch"),
        (msgspec.msgpack.encode({"inputs": b"0" * 16}), "shape_mismatch"),
        (msgspec.msgpack.encode({"inputs": b"0" * 12, "shape": [4]}), "shape_mismatch"),
        (msgspec.msgpack.encode({"inputs": b"0" * 12, "shape": [-1, -3]}), "shape_mismatch"),
        (msgspec.msgpack.encode({"inputs": b"0" * 12, "shape": [1, 1, 1, 3]}), "shape_mismatch"),
        (msgspec.msgpack.encode({"inputs": b"0" * 12, "shape": [2**62, 3]}), "shape_mismatch"),
        (msgspec.msgpack.encode({"inputs": b"", "shape": [0, 3]}), "shape_mismatch"),
        (msgspec.msgpack.encode({"inputs": b"", "shape": [0, 2**64 - 1]}), "shape_mismatch"),
        (msgspec.msgpack.encode({"inputs": b"", "shape": [2**63, 0, 2**63]}), "shape_mismatch"),
        (msgspec.msgpack.encode({"inputs": b"0" * 12, "shape": "3"}), "invalid_request"),
        (msgspec.msgpack.encode({"inputs": msgspec.msgpack.Ext(5, b"abc")}), "shape_mismatch"),
        (msgspec.msgpack.encode({"inputs": [1, "2", 3]}), "invalid_request"),
        (msgspec.msgpack.encode({"inputs": [1.0, float("inf"), 3]}), "non_finite"),
        (pack([1.0, float("nan"), 1.0]), "non_finite"),
        (pack([1.0, float("inf"), 1.0]), "non_finite"),
    ],
    ids=lambda value: repr(value[:32]) if isinstance(value, bytes) else value,
)
def test_step_refuses_broken_msgpack(http: httpx.Client, at: str, body: bytes, code: str) -> None:
    """The same for msgpack."""
    refused(http.post(f"{at}/step", content=body, headers=PACKED), code)
    refused(http.get(at), "session_not_found")


def test_a_wrong_shape_is_answered_with_what_is_wanted(http: httpx.Client, at: str) -> None:
    """The message names the model's features and what came."""
    problem = refused(
        http.post(f"{at}/step", json={"inputs": [[1, 2]]}), "shape_mismatch", "[1, 2]", "3 features", "u, v, w"
    )
    assert (problem["got"], problem["features"]) == ([1, 2], 3)


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "application/x-npz", "application/jsonx", "*/*"])
def test_other_content_types_are_refused(http: httpx.Client, at: str, kind: str) -> None:
    """415 that says which are known."""
    problem = refused(
        http.post(f"{at}/step", content=b'{"inputs":[1,1,1]}', headers={"content-type": kind}), "unsupported_media_type"
    )
    assert problem["supported"] == ["application/json", "application/msgpack"]


def test_content_types_that_mean_json(http: httpx.Client, at: str) -> None:
    """None at all, with parameters, in capitals, and what curl -d sends."""
    for number, kind in enumerate(
        (None, "application/json; charset=utf-8", "Application/JSON", "application/x-www-form-urlencoded")
    ):
        headers = {} if kind is None else {"content-type": kind}
        answer = http.post(f"{at}/step", content=b'{"inputs":[1,1,1]}', headers=headers)
        assert good(answer)["step"] == number + 1


@pytest.mark.parametrize("path", ["/step", "/state", "/fork"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_ten_megabytes_is_refused(http: httpx.Client, at: str, path: str, chunked: bool) -> None:
    """413 with the limit, with and without a content-length."""
    body = b'{"inputs":[' + b"1," * 5_000_000 + b"1]}"

    def parts() -> Iterator[bytes]:
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    method = "PUT" if path == "/state" else "POST"
    response = http.request(method, at + path, content=parts() if chunked else body, headers=AS_JSON)
    problem = refused(response, "too_large")
    assert problem["limit"] == 8 * 2**20
    assert good(http.get("/healthz/live"))


def test_a_client_that_vanishes_in_mid_body_steps_nothing(memory_server: Running, http: httpx.Client, at: str) -> None:
    """Half a request is none, even where the half is good JSON; and it is no defect of ours."""
    host, port = memory_server.url.removeprefix("http://").split(":")
    state = b'{"state":{"lstm_0":{"h":[[0,0,0,0]],"c":[[0,0,0,0]]}}}'
    for call, body in ((b"POST %b/step", b'{"inputs":[1,1,1]}'), (b"PUT %b/state", state), (b"PUT %b/state", b'{"st')):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(call % at.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n" + body)
    good(http.post(f"{at}-other/step", json={"inputs": ONES}))
    refused(http.get(at), "session_not_found")
    assert 'code="internal"' not in http.get("/metrics").text


def test_many_steps_beyond_the_limit_are_refused(http: httpx.Client, at: str) -> None:
    """100,001 steps in one call are one too many."""
    x = np.zeros((1, 100_001, 3), np.float32)
    refused(http.post(f"{at}/step", content=pack(x), headers=PACKED), "too_large", "100001 steps", "limit 100000")
    x = np.zeros((65_537, 3), np.float32)
    refused(http.post(f"{at}/step", content=pack(x), headers=PACKED), "too_large", "65537 examples", "limit 65536")


def test_a_missing_reading_means_what_it_meant_in_training(http: httpx.Client) -> None:
    """A model trained with gaps holds the last reading; null, NaN and msgpack's NaN are the same."""
    at = f"/v1/models/stacked/sessions/{uuid4().hex}"
    good(http.post(f"{at}-0/step", json={"inputs": [1, 2, 3]}))
    for number in (1, 2, 3):
        good(http.post(f"{at}-0/fork", json={"to": f"{at.rsplit('/', 1)[1]}-{number}"}), 201)
    null = good(http.post(f"{at}-1/step", json={"inputs": [1, None, 3]}))["outputs"]
    literal = http.post(f"{at}-2/step", content=b'{"inputs":[1,NaN,3]}', headers=AS_JSON)
    packed, _ = unpack(http.post(f"{at}-3/step", content=pack([1, np.nan, 3]), headers=PACKED))
    held = good(http.post(f"{at}-0/step", json={"inputs": [1, 2, 3]}))["outputs"]
    assert null == good(literal)["outputs"]
    np.testing.assert_array_equal(np.float32(null), packed)
    assert null != held  # the indicator channel tells a held reading from a new one
    assert np.isfinite(null).all()


# --- seq --------------------------------------------------------------------------------------------------------------


def test_seq_applies_once_and_answers_again(http: httpx.Client, at: str) -> None:
    """A retry is answered byte for byte from what is kept; the session has not moved."""
    first = http.post(f"{at}/step", json={"inputs": ONES, "seq": 1})
    again = http.post(f"{at}/step", json={"inputs": ONES, "seq": 1})
    assert first.content == again.content
    assert good(again)["step"] == 1
    assert good(http.get(at))["step"] == 1
    retried, _ = unpack(http.post(f"{at}/step", content=pack(ONES, seq=1), headers=PACKED))
    np.testing.assert_array_equal(retried, np.float32(first.json()["outputs"]))


def test_seq_refuses_a_gap_and_another_payload(http: httpx.Client, at: str) -> None:
    """409 with the number that is expected; nothing moves."""
    problem = refused(http.post(f"{at}/step", json={"inputs": ONES, "seq": 5}), "step_conflict", "does not exist")
    assert (problem["expected_seq"], problem["step"], problem["seq"]) == (1, 0, 5)
    refused(http.get(at), "session_not_found")
    good(http.post(f"{at}/step", json={"inputs": ONES, "seq": 1}))
    gap = refused(http.post(f"{at}/step", json={"inputs": ONES, "seq": 3}), "step_conflict", "a gap")
    other = refused(http.post(f"{at}/step", json={"inputs": [2, 2, 2], "seq": 1}), "step_conflict", "another payload")
    masked = refused(http.post(f"{at}/step", json={"inputs": ONES, "seq": 1, "mask": 0}), "step_conflict")
    assert gap["expected_seq"] == other["expected_seq"] == masked["expected_seq"] == 2
    assert good(http.get(at))["step"] == 1


def test_seq_of_many_steps_is_the_last_ones(http: httpx.Client, at: str) -> None:
    """A call of T steps has the number of its last; a retry gives all T outputs."""
    x = [[ONES] * 5]
    refused(http.post(f"{at}/step", json={"inputs": x, "seq": 4}), "step_conflict")
    first = http.post(f"{at}/step", json={"inputs": x, "seq": 5})
    assert good(first)["step"] == 5
    assert http.post(f"{at}/step", json={"inputs": x, "seq": 5}).content == first.content
    problem = refused(http.post(f"{at}/step", json={"inputs": x, "seq": 9}), "step_conflict")
    assert problem["expected_seq"] == 10
    refused(http.post(f"{at}/step", json={"inputs": ONES, "seq": 5}), "step_conflict")  # one step of that number
    assert good(http.post(f"{at}/step", json={"inputs": ONES}))["step"] == 6


def test_the_last_sixteen_answers_are_kept(http: httpx.Client, at: str) -> None:
    """Of twenty, 5 to 20 are answered again, 4 is not."""
    answers = [http.post(f"{at}/step", json={"inputs": [i, 0, 0], "seq": i}).content for i in range(1, 21)]
    for i in range(5, 21):
        assert http.post(f"{at}/step", json={"inputs": [i, 0, 0], "seq": i}).content == answers[i - 1]
    problem = refused(http.post(f"{at}/step", json={"inputs": [4, 0, 0], "seq": 4}), "step_conflict", "no kept answer")
    assert problem["expected_seq"] == 21


def test_an_answer_larger_than_all_that_is_kept_is_kept_while_it_is_the_last(http: httpx.Client, at: str) -> None:
    """10,000 steps answer 80 kB, more than the 64 KiB of the rest."""
    body = pack(np.ones((1, 10_000, 3)), seq=10_000)
    first = http.post(f"{at}/step", content=body, headers=PACKED)
    assert http.post(f"{at}/step", content=body, headers=PACKED).content == first.content
    good(http.post(f"{at}/step", json={"inputs": ONES}))
    refused(http.post(f"{at}/step", content=body, headers=PACKED), "step_conflict", "no kept answer")


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masked_rows_keep_their_state_and_answer_null(http: httpx.Client, at: str) -> None:
    """Masks of each rank: a number, [N], [N,T]; true and false as well as 1 and 0."""
    good(http.post(f"{at}/step", json={"inputs": [ONES, ONES]}))
    before = good(http.get(f"{at}/state"))["state"]
    answer = good(http.post(f"{at}/step", json={"inputs": [ONES, ONES], "mask": [0, 1]}))
    assert (answer["step"], answer["outputs"][0]) == (2, [None, None])
    after = good(http.get(f"{at}/state"))["state"]
    assert after["lstm_0"]["h"][0] == before["lstm_0"]["h"][0]
    assert after["lstm_0"]["h"][1] != before["lstm_0"]["h"][1]
    body = {"inputs": [[ONES, ONES, ONES]] * 2, "mask": [[True, False, True], [False, False, False]]}
    answer = good(http.post(f"{at}/step", json=body))
    assert answer["step"] == 5
    assert [[row[0] is None for row in rows] for rows in answer["outputs"]] == [[False, True, False], [True] * 3]
    assert good(http.get(f"{at}/state"))["state"]["lstm_0"]["h"][1] == after["lstm_0"]["h"][1]
    single = good(http.post(f"{at}-1/step", json={"inputs": ONES, "mask": 0}))
    assert single == {"outputs": [None, None], "step": 1, "version": 1}
    assert good(http.get(f"{at}-1/state"))["state"]["lstm_0"] == {"h": [[0.0] * 4], "c": [[0.0] * 4]}


# --- state ------------------------------------------------------------------------------------------------------------


def test_state_get_set_and_clear(http: httpx.Client, name: str, at: str) -> None:
    """Put creates a session, get answers the same numbers, clear forgets them and keeps the step number."""
    h, c = [[0.25, -0.5, 0.125, 1.0]], [[2.0, 0.0, -0.75, 0.5]]
    info = good(http.put(f"{at}/state", json={"state": {"lstm_0": {"h": h, "c": c}}, "step": 7}))
    assert (info["step"], info["examples"]) == (7, 1)
    got = good(http.get(f"{at}/state"))
    assert got == {
        "session": name,
        "model": "lstm",
        "version": 1,
        "fingerprint": read_manifest(MODELS / "lstm" / "1").fingerprint,
        "step": 7,
        "examples": 1,
        "state": {"lstm_0": {"h": h, "c": c}},
    }
    assert good(http.put(f"{at}-copy/state", json=got))["step"] == 7
    first, copy = (good(http.post(f"{path}/step", json={"inputs": ONES})) for path in (at, f"{at}-copy"))
    assert first == copy
    assert first["step"] == 8
    good(http.delete(f"{at}/state"))
    cleared = good(http.get(f"{at}/state"))
    assert (cleared["examples"], cleared["step"], cleared["state"]) == (0, 8, {"lstm_0": {"h": [], "c": []}})
    good(http.put(f"{at}/state", json=cleared))  # what get answered can always be put back
    assert good(http.get(f"{at}/state")) == cleared
    fresh = good(http.post(f"{at}-fresh/step", json={"inputs": ONES}))["outputs"]
    assert good(http.post(f"{at}/step", json={"inputs": ONES}))["outputs"] == fresh


def test_state_of_one_layer(http: httpx.Client) -> None:
    """Get and set one layer; the others keep theirs; in a new session they are initial."""
    at = f"/v1/models/stacked/sessions/{uuid4().hex}"
    layers = list(read_manifest(MODELS / "stacked" / "1").layers)
    good(http.post(f"{at}/step", json={"inputs": [1, 2, 3]}))
    whole = good(http.get(f"{at}/state"))["state"]
    recurrent = next(layer for layer in layers if set(whole[layer]) == {"h", "c"})
    one = good(http.get(f"{at}/state/{recurrent}"))
    assert (one["layer"], one["state"], one["step"]) == (recurrent, whole[recurrent], 1)
    new = {"h": [[0.5] * 4], "c": [[0.25] * 4]}
    good(http.put(f"{at}/state/{recurrent}", json={"state": new}))
    assert good(http.get(f"{at}/state"))["state"] == {**whole, recurrent: new}
    good(http.put(f"{at}-new/state/{recurrent}", json={"state": new}))
    made = good(http.get(f"{at}-new/state"))["state"]
    assert made[recurrent] == new
    assert all(not np.any(v) for layer in layers if layer != recurrent for v in made[layer].values() if v[0][0] == 0)
    problem = refused(http.get(f"{at}/state/nope"), "layer_not_found", "'nope'")
    assert problem["layers"] == layers
    refused(http.put(f"{at}/state/nope", json={"state": new}), "layer_not_found")
    refused(
        http.put(f"{at}/state/{recurrent}", json={"state": {"h": [[0.5] * 4] * 2, "c": [[0.25] * 4] * 2}}),
        "examples_mismatch",
    )


ROW = [[0.0] * 4]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid_request"),
        ({"state": []}, "invalid_request"),
        ({"state": {}}, "state_mismatch"),
        ({"state": {"lstm_0": {"h": ROW}}}, "state_mismatch"),
        ({"state": {"lstm_0": {"h": ROW, "c": ROW, "x": ROW}}}, "state_mismatch"),
        ({"state": {"lstm_0": {"h": ROW, "c": ROW}, "gru_0": {"h": ROW}}}, "state_mismatch"),
        ({"state": {"lstm_0": []}}, "state_mismatch"),
        ({"state": {"lstm_0": {"h": ROW, "c": ROW * 2}}}, "state_mismatch"),
        ({"state": {"lstm_0": {"h": [[0.0] * 3], "c": ROW}}}, "shape_mismatch"),
        ({"state": {"lstm_0": {"h": [0.0] * 4, "c": ROW}}}, "shape_mismatch"),
        ({"state": {"lstm_0": {"h": [[0.0], [0.0, 1.0]], "c": ROW}}}, "shape_mismatch"),
        ({"state": {"lstm_0": {"h": 5, "c": ROW}}}, "shape_mismatch"),
        ({"state": {"lstm_0": {"h": None, "c": ROW}}}, "shape_mismatch"),
        ({"state": {"lstm_0": {"h": {}, "c": ROW}}}, "shape_mismatch"),
        ({"state": {"lstm_0": {"h": [["0"] * 4], "c": ROW}}}, "shape_mismatch"),
        ({"state": {"lstm_0": {"h": [[None] * 4], "c": ROW}}}, "shape_mismatch"),
        ({"state": {"lstm_0": {"h": [[1e39] * 4], "c": ROW}}}, "non_finite"),
        ({"state": {"lstm_0": {"h": ROW, "c": ROW}}, "version": 9}, "state_version_mismatch"),
        ({"state": {"lstm_0": {"h": ROW, "c": ROW}}, "fingerprint": "0" * 16}, "state_mismatch"),
        ({"state": {"lstm_0": {"h": ROW, "c": ROW}}, "model": "gru"}, "invalid_request"),
        ({"state": {"lstm_0": {"h": ROW, "c": ROW}}, "examples": 2}, "shape_mismatch"),
        ({"state": {"lstm_0": {"h": ROW, "c": ROW}}, "step": -1}, "invalid_request"),
        ({"state": {"lstm_0": {"h": ROW, "c": ROW}}, "other": 1}, "invalid_request"),
    ],
    ids=str,
)
def test_put_state_refuses_what_does_not_fit(http: httpx.Client, at: str, body: dict[str, Any], code: str) -> None:
    """Layers, keys, shapes, numbers, version and fingerprint; no session comes of it."""
    refused(http.put(f"{at}/state", json=body), code)
    refused(http.get(at), "session_not_found")


def test_state_in_msgpack_is_raw_float32(http: httpx.Client, at: str) -> None:
    """Bytes out, the same bytes in."""
    good(http.post(f"{at}/step", json={"inputs": [ONES, ONES]}))
    response = http.get(f"{at}/state", headers={"accept": "application/msgpack"})
    answer = msgspec.msgpack.decode(response.content)
    plain = good(http.get(f"{at}/state"))["state"]["lstm_0"]
    for key in "hc":
        np.testing.assert_array_equal(
            np.frombuffer(answer["state"]["lstm_0"][key], "<f4").reshape(2, 4), np.float32(plain[key])
        )
    assert http.put(f"{at}-copy/state", content=response.content, headers=PACKED).status_code == 200
    assert good(http.get(f"{at}-copy/state"))["state"]["lstm_0"] == plain
    wrong = {"state": {"lstm_0": {"h": b"123", "c": b"123"}}}
    refused(http.put(f"{at}/state", content=msgspec.msgpack.encode(wrong), headers=PACKED), "shape_mismatch")


def test_entity_tags_guard_changes(http: httpx.Client, at: str) -> None:
    """If-Match takes the tag that a read gave, a list, or *; another one is 412, and nothing changes."""
    good(http.post(f"{at}/step", json={"inputs": ONES}))
    response = http.get(f"{at}/state")
    old, body = response.headers["etag"], response.json()
    assert http.get(at).headers["etag"] == old
    good(http.post(f"{at}/step", json={"inputs": ONES}))
    stale = {"if-match": old}
    for method, path, content in (
        ("PUT", "/state", body),
        ("PUT", "/state/lstm_0", {"state": body["state"]["lstm_0"]}),
        ("DELETE", "/state", None),
        ("DELETE", "", None),
        ("POST", "/rewind", {"to": "k"}),
    ):
        if path == "/rewind":
            good(http.post(f"{at}/checkpoints", json={"name": "k"}), 201)
        refused(http.request(method, at + path, json=content, headers=stale), "precondition_failed", "Read it again")
    now = http.get(at).headers["etag"]
    assert http.put(f"{at}/state", json=body, headers={"if-match": f'"x", {now}'}).status_code == 200
    assert http.delete(f"{at}/state", headers={"if-match": "*"}).status_code == 200
    refused(
        http.put(f"{at}-none/state", json={"state": body["state"]}, headers={"if-match": "*"}), "precondition_failed"
    )
    refused(http.get(f"{at}-none"), "session_not_found")


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_state_travels_as_a_file(http: httpx.Client, at: str, kind: str) -> None:
    """Export, look into it with the format's own library, import: the same state, step and examples."""
    media = f"application/x-{kind}"
    good(http.post(f"{at}/step", json={"inputs": [ONES, [2, 2, 2]]}))
    response = http.get(f"{at}/state", headers={"accept": media})
    assert (response.headers["content-type"], response.status_code) == (media, 200)
    assert response.headers["etag"] == http.get(at).headers["etag"]
    want = good(http.get(f"{at}/state"))
    if kind == "npz":
        with np.load(io.BytesIO(response.content), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    else:
        arrays = safetensors.numpy.load(response.content)
    np.testing.assert_array_equal(arrays["lstm_0.h"], np.float32(want["state"]["lstm_0"]["h"]))
    info = good(http.put(f"{at}-copy/state", content=response.content, headers={"content-type": media}))
    assert (info["step"], info["examples"]) == (1, 2)
    assert good(http.get(f"{at}-copy/state"))["state"] == want["state"]


def test_state_files_made_by_others(http: httpx.Client, at: str) -> None:
    """Tensors alone are enough; float64 is taken, other shapes, names and numbers are not."""
    h, c = np.full((1, 4), 0.5), np.full((1, 4), -0.25)

    def put(kind: str, **arrays: np.ndarray) -> httpx.Response:
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        content = file.getvalue() if kind == "npz" else safetensors.numpy.save(arrays)
        return http.put(f"{at}/state", content=content, headers={"content-type": f"application/x-{kind}"})

    for kind in ("npz", "safetensors"):
        good(put(kind, **{"lstm_0.h": h, "lstm_0.c": c}))
        assert good(http.get(f"{at}/state"))["state"]["lstm_0"] == {"h": h.tolist(), "c": c.tolist()}
        refused(put(kind, **{"lstm_0.h": h}), "state_mismatch")
        refused(put(kind, **{"lstm_0.h": h[:, :3], "lstm_0.c": c}), "shape_mismatch")
        refused(put(kind, **{"lstm_0.h": np.array(1.0), "lstm_0.c": c}), "shape_mismatch")
        refused(put(kind, **{"lstm_0.h": h * np.inf, "lstm_0.c": c}), "non_finite")
        refused(put(kind, **{"lstm_0.h": h * 1e300, "lstm_0.c": c}), "non_finite")
    refused(put("npz", **{"lstm_0.h": h.astype("<U3"), "lstm_0.c": c}), "shape_mismatch")


def _zip(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as folder:
        for member, data in members.items():
            folder.writestr(member, data)
    return file.getvalue()


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "malformed"),
        (b"abc", "malformed"),
        (_npy(), "malformed"),
        (b"PK\x03\x04" + b"\xff" * 60, "malformed"),
        (_zip(**{"a.npy": b"\x93NUMPY garbage"}), "malformed"),
        (_zip(**{"a.npy": b"\x93NUMPY\x01\x00\x10\x00{'descr': 'O'}   "}), "malformed"),
        (_zip(a=b"no array"), "state_mismatch"),
        (_zip(**{"__stepcast__.npy": _npy()}), "malformed"),
        (_zip(**{"a.npy": bytes(9 * 2**20)}), "too_large"),
        (b"\x80\x04\x95pickled", "malformed"),
        (gzip.compress(b"{}"), "malformed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",  # zip and gzip write the time into theirs
)
def test_broken_npz_is_refused(http: httpx.Client, at: str, content: bytes, code: str) -> None:
    """Neither archives that lie nor zip bombs nor pickles do more than a 4xx."""
    refused(http.put(f"{at}/state", content=content, headers={"content-type": "application/x-npz"}), code)


def _safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "malformed"),
        (b"\xff" * 8, "malformed"),
        (_safetensors(b"{"), "malformed"),
        (_safetensors(b"[]"), "malformed"),
        (_safetensors({}), "state_mismatch"),
        (_safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]}}), "malformed"),
        (_safetensors({"lstm_0.h": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}, b"\0\0"), "malformed"),
        (_safetensors({"__metadata__": {"stepcast": "[]"}}), "malformed"),
        (_safetensors({"__metadata__": {"stepcast": "{"}}), "malformed"),
        (_safetensors({"__metadata__": {"stepcast": '{"step": "x"}'}}), "invalid_request"),
    ],
    ids=lambda value: repr(value[:48]) if isinstance(value, bytes) else value,
)
def test_broken_safetensors_are_refused(http: httpx.Client, at: str, content: bytes, code: str) -> None:
    """The same for safetensors."""
    refused(http.put(f"{at}/state", content=content, headers={"content-type": "application/x-safetensors"}), code)


# --- fork, checkpoints, rewind ----------------------------------------------------------------------------------------


def test_fork_makes_a_child_with_the_same_state(http: httpx.Client, name: str, at: str) -> None:
    """State, step and kept answers; named by the caller or by the server."""
    answer = http.post(f"{at}/step", json={"inputs": ONES, "seq": 1})
    child = good(http.post(f"{at}/fork", json={"to": f"{name}-child"}), 201)
    assert (child["session"], child["step"], child["examples"]) == (f"{name}-child", 1, 1)
    assert good(http.get(f"{at}-child/state"))["state"] == good(http.get(f"{at}/state"))["state"]
    assert http.post(f"{at}-child/step", json={"inputs": ONES, "seq": 1}).content == answer.content
    assert len(good(http.post(f"{at}/fork"), 201)["session"]) == 22
    refused(http.post(f"{at}/fork", json={"to": f"{name}-child"}), "session_exists")
    refused(http.post(f"{at}/fork", json={"to": name}), "session_exists")
    for wrong in ("no/good", ""):
        refused(http.post(f"{at}/fork", json={"to": wrong}), "invalid_session_id")
    refused(http.post(f"{at}/fork", json={"too": "x"}), "invalid_request")


def test_checkpoints_and_rewind(http: httpx.Client, name: str, at: str) -> None:
    """Named or numbered; a rewind brings back state, step number and kept answers."""
    good(http.post(f"{at}/step", json={"inputs": ONES, "seq": 1}))
    assert good(http.post(f"{at}/checkpoints", json={"name": "k"}), 201) == {"session": name, "name": "k", "step": 1}
    then = good(http.get(f"{at}/state"))
    after = good(http.post(f"{at}/step", json={"inputs": [2, 2, 2], "seq": 2}))
    assert good(http.post(f"{at}/checkpoints"), 201)["name"] == "step-2"
    listed = good(http.get(f"{at}/checkpoints"))["checkpoints"]
    assert listed == [{"name": "k", "step": 1}, {"name": "step-2", "step": 2}]
    assert good(http.post(f"{at}/rewind", json={"to": "k"}))["step"] == 1
    assert good(http.get(f"{at}/state")) == then
    assert good(http.post(f"{at}/step", json={"inputs": [2, 2, 2], "seq": 2})) == after
    assert good(http.get(f"{at}/checkpoints"))["checkpoints"] == listed
    refused(http.post(f"{at}/checkpoints", json={"name": "k"}), "checkpoint_exists")
    refused(http.post(f"{at}/checkpoints", json={"name": "no good"}), "invalid_session_id")
    refused(http.post(f"{at}/rewind", json={"to": "nope"}), "checkpoint_not_found")
    refused(http.post(f"{at}/rewind", json={"to": "no good"}), "invalid_session_id")
    refused(http.post(f"{at}/rewind", json={}), "invalid_request")


def test_checkpoints_are_limited(http: httpx.Client, at: str) -> None:
    """64 per session."""
    good(http.post(f"{at}/step", json={"inputs": ONES}))
    for i in range(64):
        good(http.post(f"{at}/checkpoints", json={"name": f"k{i}"}), 201)
    refused(http.post(f"{at}/checkpoints", json={"name": "one-more"}), "too_large", "64 checkpoints", "limit 64")


# --- rollout ----------------------------------------------------------------------------------------------------------


def test_rollout_feeds_predictions_back_and_leaves_the_session(http: httpx.Client, name: str, at: str) -> None:
    """Three free steps equal three steps made by hand with u and v from the answer before; the session stays."""
    last = good(http.post(f"{at}/step", json={"inputs": [1, 2, 3]}))["outputs"]
    before = good(http.get(f"{at}/state"))
    etag = http.get(at).headers["etag"]
    future = [[None, None, 0.5], [None, None, -0.5], [9.0, None, 0.25]]
    free = good(http.post(f"{at}/rollout", json={"steps": 3, "inputs": future}))
    assert (free["step"], free["version"]) == (1, 1)
    assert "classes" not in free
    assert good(http.get(f"{at}/state")) == before
    assert http.get(at).headers["etag"] == etag
    good(http.post(f"{at}/fork", json={"to": f"{name}-hand"}), 201)
    for want, (u, v, w) in zip(free["outputs"][0], future, strict=True):
        fed = [last[0] if u is None else u, last[1] if v is None else v, w]
        last = good(http.post(f"{at}-hand/step", json={"inputs": fed}))["outputs"]
        np.testing.assert_allclose(last, want, rtol=1e-5, atol=1e-6)
    packed = http.post(
        f"{at}/rollout",
        content=pack(np.array(future, np.float32), steps=3),
        headers=PACKED,
    )
    np.testing.assert_allclose(unpack(packed)[0], free["outputs"], rtol=1e-6)


def test_rollout_of_many_examples(http: httpx.Client, at: str) -> None:
    """[H,F] is known for all N, [N,H,F] for each; outputs are [N,H,O]."""
    good(http.post(f"{at}/step", json={"inputs": [ONES, [2, 2, 2]]}))
    shared = good(http.post(f"{at}/rollout", json={"steps": 2, "inputs": [[None, None, 1.0]] * 2}))["outputs"]
    each = good(http.post(f"{at}/rollout", json={"steps": 2, "inputs": [[[None, None, 1.0]] * 2] * 2}))["outputs"]
    assert shared == each
    assert np.shape(shared) == (2, 2, 2)
    assert shared[0] != shared[1]


def test_rollout_commits_once_with_seq(http: httpx.Client, at: str) -> None:
    """With commit the session is there afterwards; the same seq again is answered, another payload is 409."""
    good(http.post(f"{at}/step", json={"inputs": ONES}))
    body = {"steps": 3, "inputs": [[None, None, 1.0]] * 3, "commit": True, "seq": 4}
    preview = good(http.post(f"{at}/rollout", json={"steps": 3, "inputs": body["inputs"]}))
    first = http.post(f"{at}/rollout", json=body)
    assert good(first) == {**preview, "step": 4}
    assert http.post(f"{at}/rollout", json=body).content == first.content
    assert good(http.get(at))["step"] == 4
    other = refused(http.post(f"{at}/rollout", json={**body, "inputs": [[None, None, 2.0]] * 3}), "step_conflict")
    gap = refused(http.post(f"{at}/rollout", json={**body, "seq": 9}), "step_conflict")
    assert other["expected_seq"] == gap["expected_seq"] == 7
    assert good(http.post(f"{at}/step", json={"inputs": ONES}))["step"] == 5


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid_request"),
        ({"steps": 0}, "invalid_request"),
        ({"steps": 100_001}, "too_large"),
        ({"steps": 2, "inputs": [[1, 1, 1]]}, "shape_mismatch"),
        ({"steps": 1, "inputs": [[1, 1]]}, "shape_mismatch"),
        ({"steps": 1, "inputs": "x"}, "shape_mismatch"),
        ({"steps": 1, "inputs": [["x", 1, 1]]}, "invalid_request"),
        ({"steps": 1, "inputs": [[None, None, 1e39]]}, "non_finite"),
        ({"steps": 1, "seq": 2}, "invalid_request"),
        ({"steps": 1, "commit": 1}, "invalid_request"),
        ({"steps": 1, "temperature": -1}, "invalid_request"),
        ({"steps": 1, "seed": -1}, "invalid_request"),
        ({"steps": 1, "commit": True, "seq": 2, "temperature": 1.0}, "invalid_request"),
        ({"steps": 1}, "non_finite"),  # w is not fed back, and this model takes no missing reading
    ],
    ids=str,
)
def test_rollout_refuses_what_is_none(http: httpx.Client, at: str, body: dict[str, Any], code: str) -> None:
    """Counts, shapes, numbers; the session stays."""
    good(http.post(f"{at}/step", json={"inputs": ONES}))
    refused(http.post(f"{at}/rollout", json=body), code)
    assert good(http.get(at))["step"] == 1


def test_rollout_needs_something_to_start_from(http: httpx.Client, name: str, at: str) -> None:
    """A session that never stepped has no last answer: the first inputs must be given."""
    good(http.post(f"{LSTM}/sessions", json={"session": name}), 201)
    refused(
        http.post(f"{at}/rollout", json={"steps": 1, "inputs": [[None, None, 1.0]]}), "no_feedback", "Step the session"
    )
    given = good(http.post(f"{at}/rollout", json={"steps": 1, "inputs": [[1.0, 1.0, 1.0]]}))
    assert given["outputs"][0][0] == pytest.approx(
        good(http.post(f"{at}/step", json={"inputs": ONES}))["outputs"], rel=1e-5
    )


def test_rollout_samples_classes_with_temperature_and_seed(http: httpx.Client) -> None:
    """At temperature 0 the likeliest class; else drawn, the same by the same seed, each class as often as likely."""
    at = f"/v1/models/characters/sessions/{uuid4().hex}"
    p = good(http.post(f"{at}/step", json={"inputs": [1, 0, 0]}))["outputs"]
    greedy = good(http.post(f"{at}/rollout", json={"steps": 4}))
    assert [greedy["classes"][0][t] for t in range(4)] == ["abc"[int(np.argmax(row))] for row in greedy["outputs"][0]]
    by_hand = good(http.post(f"{at}/rollout", json={"steps": 1, "inputs": [list(np.eye(3)[int(np.argmax(p))])]}))
    np.testing.assert_allclose(greedy["outputs"][0][0], by_hand["outputs"][0][0], rtol=1e-5)
    drawn = [
        good(http.post(f"{at}/rollout", json={"steps": 200, "temperature": 1.0, "seed": seed})) for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0]["classes"] != drawn[2]["classes"]
    outputs, classes = np.array(drawn[0]["outputs"][0]), np.array(drawn[0]["classes"][0])
    for number, letter in enumerate("abc"):
        assert (classes == letter).mean() == pytest.approx(outputs[:, number].mean(), abs=0.12)
    body = {"steps": 5, "temperature": 1.0, "seed": 3, "commit": True, "seq": 6}
    first = http.post(f"{at}/rollout", json=body)
    assert http.post(f"{at}/rollout", json=body).content == first.content
    assert first.json()["step"] == 6


# --- predict ----------------------------------------------------------------------------------------------------------


def test_predict_is_the_whole_forward_pass(http: httpx.Client) -> None:
    """[B,T,F], [T,F], NCW, JSON and msgpack give what stepping from zeros gives."""
    x = golden("lstm")["x"][:2, :6].astype(np.float32)
    want = [
        good(http.post(f"{LSTM}/sessions/{uuid4().hex}/step", json={"inputs": [row.tolist()]}))["outputs"][0]
        for row in x
    ]
    answer = good(http.post(f"{LSTM}/predict", json={"inputs": x.tolist()}))
    assert answer["version"] == 1
    np.testing.assert_allclose(answer["outputs"], want, rtol=1e-5, atol=1e-6)
    one = good(http.post(f"{LSTM}/predict", params={"version": 1}, json={"inputs": x[0].tolist()}))["outputs"]
    np.testing.assert_allclose(one, want[0], rtol=1e-5, atol=1e-6)
    ncw, _ = unpack(http.post(f"{LSTM}/predict", content=pack(x.transpose(0, 2, 1), format="NCW"), headers=PACKED))
    np.testing.assert_allclose(ncw, np.transpose(want, (0, 2, 1)), rtol=1e-5, atol=1e-6)


def test_predict_honours_masks(http: httpx.Client) -> None:
    """Masked steps answer null and count for nothing."""
    x = golden("lstm")["x"][0, :4].tolist()
    gapped = [x[0], [7, 7, 7], x[1], x[2], x[3]]
    want = good(http.post(f"{LSTM}/predict", json={"inputs": x}))["outputs"]
    got = good(http.post(f"{LSTM}/predict", json={"inputs": gapped, "mask": [1, 0, 1, 1, 1]}))["outputs"]
    assert got.pop(1) == [None, None]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "params", "code"),
    [
        ({"inputs": ONES}, {}, "shape_mismatch"),
        ({"inputs": [[1, 2]]}, {}, "shape_mismatch"),
        ({"inputs": [[]]}, {}, "shape_mismatch"),
        ({"inputs": []}, {}, "shape_mismatch"),
        ({"inputs": [ONES], "mask": [1, 1]}, {}, "shape_mismatch"),
        ({"inputs": [ONES], "version": 9}, {}, "model_not_found"),
        ({"inputs": [ONES], "mask": [2]}, {}, "invalid_request"),
        ({"inputs": [ONES], "seq": 1}, {}, "invalid_request"),
        ({"inputs": [[None, 1, 1]]}, {}, "non_finite"),
        ({"inputs": [ONES]}, {"version": "9"}, "model_not_found"),
        ({"inputs": [ONES]}, {"version": "x"}, "invalid_request"),
    ],
)
def test_predict_refuses(http: httpx.Client, body: dict[str, Any], params: dict[str, str], code: str) -> None:
    """Shapes, masks, numbers, versions."""
    refused(http.post(f"{LSTM}/predict", json=body, params=params), code)


# --- batch-step -------------------------------------------------------------------------------------------------------


def test_batch_step_advances_new_and_old_sessions_alike(http: httpx.Client, name: str) -> None:
    """Each row answers as a step alone does; JSON and msgpack."""
    old, new, alone = (f"{LSTM}/sessions/{name}-{kind}" for kind in ("old", "new", "alone"))
    good(http.post(f"{old}/step", json={"inputs": [3, 2, 1]}))
    good(http.post(f"{old}/fork", json={"to": f"{name}-alone"}), 201)
    body = {"sessions": [f"{name}-old", f"{name}-new"], "inputs": [ONES, ONES], "seq": [2, None]}
    answer = good(http.post(f"{LSTM}/step", json=body))
    assert (answer["steps"], answer["errors"]) == ([2, 1], {})
    np.testing.assert_allclose(
        answer["outputs"][0], good(http.post(f"{alone}/step", json={"inputs": ONES}))["outputs"], rtol=1e-5
    )
    assert good(http.get(new))["step"] == 1
    again = good(http.post(f"{LSTM}/step", json={**body, "seq": [2, 1]}))
    assert again["outputs"] == answer["outputs"]
    fields = {"sessions": [f"{name}-old", f"{name}-new"], "seq": [2, 1]}
    packed, rest = unpack(http.post(f"{LSTM}/step", content=pack([ONES, ONES], **fields), headers=PACKED))
    np.testing.assert_array_equal(packed, np.float32(answer["outputs"]))
    assert (rest["steps"], rest["errors"]) == ([2, 1], {})
    flat = msgspec.msgpack.encode({"inputs": np.ones(6, "<f4").tobytes(), **fields})
    np.testing.assert_array_equal(unpack(http.post(f"{LSTM}/step", content=flat, headers=PACKED))[0], packed)


def test_batch_step_reports_errors_per_item(http: httpx.Client, name: str) -> None:
    """A bad id, a gap, another N and an infinite row fail alone; the others advance."""
    good(http.post(f"{LSTM}/sessions", json={"session": f"{name}-wide", "examples": 3}), 201)
    body = {
        "sessions": [f"{name}-a", "no good", f"{name}-gap", f"{name}-wide", f"{name}-inf", f"{name}-nan", f"{name}-b"],
        "inputs": [ONES, ONES, ONES, ONES, [1e39, 1, 1], [None, 1, 1], ONES],
        "seq": [1, 1, 7, None, None, None, 1],
    }
    answer = good(http.post(f"{LSTM}/step", json=body))
    codes = {int(i): problem["code"] for i, problem in answer["errors"].items()}
    assert codes == {
        1: "invalid_session_id",
        2: "step_conflict",
        3: "examples_mismatch",
        4: "non_finite",
        5: "non_finite",
    }
    assert answer["errors"]["2"]["expected_seq"] == 1
    assert answer["steps"] == [1, None, None, None, None, None, 1]
    assert [row[0] is None for row in answer["outputs"]] == [step is None for step in answer["steps"]]
    assert answer["outputs"][0] == answer["outputs"][6]


def test_batch_step_takes_a_session_twice_in_order(http: httpx.Client, name: str) -> None:
    """Duplicates within a call are two steps, in the order of the rows."""
    body = {"sessions": [name, name, name], "inputs": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}
    answer = good(http.post(f"{LSTM}/step", json=body))
    assert answer["steps"] == [1, 2, 3]
    x = [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]
    want = good(http.post(f"{LSTM}/sessions/{name}-alone/step", json={"inputs": x}))["outputs"][0]
    np.testing.assert_allclose(answer["outputs"], want, rtol=1e-5, atol=1e-6)


def test_batch_step_of_two_thousand_sessions(http: httpx.Client, name: str) -> None:
    """One call, two thousand sessions, each with its own numbers."""
    count = 2000
    x = np.random.default_rng(1).normal(size=(count, 3)).astype(np.float32)
    sessions = [f"{name}-{i}" for i in range(count)]
    for step in (1, 2):
        outputs, rest = unpack(http.post(f"{LSTM}/step", content=pack(x, sessions=sessions), headers=PACKED))
        assert rest["steps"] == [step] * count
    twice = np.repeat(x[:50, None], 2, axis=1)
    want, _ = unpack(http.post(f"{LSTM}/predict", content=pack(twice), headers=PACKED))
    np.testing.assert_allclose(outputs[:50], want[:, 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"sessions": [], "inputs": []}, "shape_mismatch"),
        ({"sessions": ["a"], "inputs": [ONES, ONES]}, "shape_mismatch"),
        ({"sessions": ["a", "b"], "inputs": [ONES]}, "shape_mismatch"),
        ({"sessions": ["a"], "inputs": [[1, 2]]}, "shape_mismatch"),
        ({"sessions": ["a"], "inputs": ONES}, "shape_mismatch"),
        ({"sessions": ["a"], "inputs": [[ONES]]}, "shape_mismatch"),
        ({"sessions": ["a"], "inputs": [ONES], "seq": [1, 2]}, "shape_mismatch"),
        ({"sessions": ["a"], "inputs": [ONES], "seq": 1}, "invalid_request"),
        ({"sessions": "a", "inputs": [ONES]}, "invalid_request"),
        ({"sessions": ["a"] * 9000, "inputs": []}, "queue_full"),
        ({"sessions": [1], "inputs": [ONES]}, "invalid_request"),
        ({"inputs": [ONES]}, "invalid_request"),
    ],
    ids=str,
)
def test_batch_step_refuses_columns_that_do_not_fit(http: httpx.Client, body: dict[str, Any], code: str) -> None:
    """Different lengths, ranks and types; and more sessions than may wait, before anybody looks at their inputs."""
    refused(http.post(f"{LSTM}/step", json=body), code)


def test_cors_headers_of_steps_and_of_other_routes_are_the_same(name: str) -> None:
    """A step is answered below FastAPI, whose middleware writes the headers of all else; preflights are its own."""
    with running(store="memory://", cors_origins="https://a.example") as server:
        for path, body in ((f"/sessions/{name}/step", {"inputs": ONES}), ("/sessions", {})):
            for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
                response = httpx.post(f"{server.url}{LSTM}{path}", json=body, headers={"origin": origin})
                assert response.headers.get("access-control-allow-origin") == allowed
                assert response.headers["vary"] == "Origin"
        asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
        assert httpx.options(f"{server.url}{LSTM}/sessions/{name}/step", headers=asked).status_code == 200
        response = httpx.post(f"{server.url}{LSTM}/sessions/{name}/step", json={"inputs": [1]})
        refused(response, "shape_mismatch")
