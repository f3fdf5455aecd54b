"""The Open Inference Protocol over HTTP: what its requests do to sessions, by an unmodified client and by hand."""

import asyncio
import gzip
import json
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from doors import DOORS, Array, InferenceDoor, Script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import GRPC_ADDRESSES, MODELS, ROOT, Process, Running, golden, running
from tritonclient.utils import InferenceServerException

from service.doors.oip.requests import flags_of, session_of
from service.doors.oip.tensors import Tensor, numbers, texts
from stepcast.errors import InvalidRequest, InvalidSessionId, ShapeMismatch, StepcastError, from_problem
from stepcast.manifest import MANIFEST_FILE, read_manifest

pytestmark = pytest.mark.service

KIND = "lstm"
LSTM = f"/v2/models/{KIND}"
SESSIONS = f"/v1/models/{KIND}/sessions"
X = np.random.default_rng(13).normal(size=(100, 3)).astype(np.float32)
SEQUENCES, STEPS = 50, 100


@pytest.fixture(scope="module")
def client(memory_server: Running) -> Iterator[triton.InferenceServerClient]:
    """An unmodified client of the server of all models."""
    with triton.InferenceServerClient(memory_server.url.removeprefix("http://"), concurrency=8) as client:
        yield client


@pytest.fixture
def name() -> str:
    """A sequence that no other test has."""
    return f"o-{Random().getrandbits(48):012x}"


def tensor(x: Array, name: str = "x", raw: bool = True, datatype: str = "FP32") -> triton.InferInput:
    """An input."""
    kinds = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "INT32": np.int32, "BYTES": np.object_}
    made = triton.InferInput(name, x.shape, datatype)
    return made.set_data_from_numpy(x.astype(kinds[datatype]), binary_data=raw)


def step(
    client: triton.InferenceServerClient, name: int | str, x: Array, model: str = KIND, **more: Any
) -> tuple[Array, int]:
    """A request of a sequence: its outputs, and the sequence's step."""
    flags = {f"sequence_{flag}": more.pop(flag) for flag in ("start", "end") if flag in more}
    seq = {"stepcast_seq": more.pop("seq")} if "seq" in more else None
    result = client.infer(model, [tensor(x)], sequence_id=name, parameters=seq, **flags, **more)
    return result.as_numpy("y"), result.get_response()["parameters"]["stepcast_step"]


def refused(call: Callable[[], Any], status: int, *said: str) -> str:
    """The text of the error that a call is refused with."""
    with pytest.raises(InferenceServerException) as found:
        call()
    assert found.value.status() == str(status), found.value.message()
    for text in said:
        assert text in found.value.message()
    return str(found.value.message())


# --- what a server tells ----------------------------------------------------------------------------------------------


def test_a_client_reads_health_metadata_and_config(client: triton.InferenceServerClient) -> None:
    """Shapes have the axis of examples; a model that is stepped has sequence_batching, by which tools know it."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(KIND)
    assert client.is_model_ready(KIND, "1")
    assert not client.is_model_ready(KIND, "2")
    assert not client.is_model_ready("nobody")
    server = client.get_server_metadata()
    assert server["name"] == "stepcast"
    assert {"sequence", "sequence(string_id)", "binary_tensor_data", "statistics"} <= set(server["extensions"])
    model = client.get_model_metadata(KIND)
    assert model == client.get_model_metadata(KIND, "1")
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert model["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}]
    assert (model["versions"], model["platform"]) == (["1"], "onnxruntime_onnx")
    config = client.get_model_config(KIND)
    assert config["max_batch_size"] == 65_536
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}]
    states = [(state["input_name"], state["dims"]) for state in config["sequence_batching"]["state"]]
    assert states == [("lstm_0.h", [4]), ("lstm_0.c", [4])]
    assert "sequence_batching" not in client.get_model_config("bidirectional")


def test_the_index_has_what_is_served_and_what_failed(tmp_path: Path) -> None:
    """With `ready` only what is served."""
    shutil.copytree(MODELS / KIND, tmp_path / KIND)
    shutil.copytree(MODELS / KIND / "1", tmp_path / KIND / "2")  # whose manifest says 1
    with running(store="memory://", models=tmp_path) as server, httpx.Client(base_url=server.url) as http:
        address = server.url.removeprefix("http://")
        with triton.InferenceServerClient(address) as client:
            good, bad = client.get_model_repository_index()
        assert good == {"name": KIND, "version": "1", "state": "READY", "reason": ""}
        assert (bad["version"], bad["state"]) == ("2", "UNAVAILABLE")
        assert "is of lstm/1" in bad["reason"]
        assert http.post("/v2/repository/index", content=b'{"ready": true}').json() == [good]


def test_statistics_count_what_was_answered_and_its_parts() -> None:
    """Every field that tools read; the parts of a request's time make up the whole."""
    with (
        running(store="memory://") as server,
        triton.InferenceServerClient(server.url.removeprefix("http://")) as client,
    ):
        for at in range(10):
            step(client, 5, X[at : at + 1], start=at == 0, seq=at + 1)
        step(client, 5, X[9:10], seq=10)  # a retry
        refused(lambda: step(client, 6, X[:1]), 400)
        (one,) = client.get_inference_statistics(KIND, "1")["model_stats"]
        everything = client.get_inference_statistics()["model_stats"]
    assert one in everything
    assert (one["name"], one["version"]) == (KIND, "1")
    assert (one["inference_count"], one["execution_count"]) == (10, 10)
    assert one["last_inference"] > 1.7e12
    stats = one["inference_stats"]
    counts = {part: total["count"] for part, total in stats.items()}
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert counts == {"success": 11, "fail": 1, "cache_hit": 1, "cache_miss": 10, **dict.fromkeys(parts, 10)}
    whole = stats["success"]["ns"] - stats["cache_hit"]["ns"]
    assert sum(stats[part]["ns"] for part in parts) == pytest.approx(whole, abs=200_000)
    assert all(stats[part]["ns"] > 0 for part in parts)


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "INT32"])
@pytest.mark.parametrize("raw", [True, False])
def test_a_request_of_no_sequence_is_a_pass_from_the_initial_state(
    client: triton.InferenceServerClient, datatype: str, raw: bool
) -> None:
    """In every datatype, raw and as JSON, the answer is that of the same numbers through predict; nothing is kept."""
    x = np.array([[0.5, -0.25, 1.0], [2.0, 0.0, -1.5]], np.float32)
    x = np.round(x) if datatype == "INT32" else x
    if datatype == "FP16" and not raw:
        with pytest.raises(InferenceServerException, match="FP16"):
            client.infer(KIND, [json_half(x)])
        return
    want = [predicted(client, row[None])[-1] for row in x]
    for wishes in (None, [triton.InferRequestedOutput("y", binary_data=raw)]):
        result = client.infer(KIND, [tensor(x, raw=raw, datatype=datatype)], outputs=wishes)
        np.testing.assert_allclose(result.as_numpy("y"), want, 1e-5, 1e-6)
    assert "parameters" not in result.get_response()


def json_half(x: Array) -> triton.InferInput:
    """Half floats as JSON, which the client itself would write."""
    made = triton.InferInput("x", x.shape, "FP16")
    made._data = x.reshape(-1).tolist()
    return made


def predicted(client: triton.InferenceServerClient, x: Array, model: str = KIND) -> Array:
    """The offline pass (T, O) over steps (T, F), by the native API."""
    url = f"http://{client._client_stub.host}:{client._client_stub.port}/v1/models/{model}/predict"
    response = httpx.post(url, json={"inputs": x.tolist()})
    assert response.status_code == 200, response.text
    return np.array(response.json()["outputs"], np.float32)


def test_examples_and_steps_are_axes_of_the_input(client: triton.InferenceServerClient, name: str) -> None:
    """[N, F] are N examples of one sequence, [N, T, F] so many steps of each; the answer has the same axes."""
    x = X[:12].reshape(3, 4, 3)
    whole, last = step(client, name, x, start=True)
    assert (whole.shape, last) == ((3, 4, 2), 4)
    first, _ = step(client, f"{name}-1", x[:, 0], start=True)
    rest, last = step(client, f"{name}-1", x[:, 1:])
    assert (first.shape, rest.shape, last) == ((3, 2), (3, 3, 2), 4)
    np.testing.assert_allclose(np.concatenate([first[:, None], rest], axis=1), whole, 1e-4, 1e-5)
    for row in range(3):
        np.testing.assert_allclose(whole[row], predicted(client, x[row]), 1e-4, 1e-5)
    text = refused(lambda: step(client, name, x[:2, 0]), 400)
    assert "3 examples, got 2" in text


def test_a_mask_leaves_examples_as_they_are(client: triton.InferenceServerClient, name: str) -> None:
    """The input stepcast_mask: an example whose step is absent has no output, and keeps its state."""
    step(client, name, X[:2], start=True)
    present = tensor(np.array([1, 0]), "stepcast_mask", datatype="INT32")
    result = client.infer(KIND, [tensor(X[2:4]), present], sequence_id=name)
    assert np.isnan(result.as_numpy("y")[1]).all()
    as_json = [triton.InferRequestedOutput("y", binary_data=False)]
    result = client.infer(KIND, [tensor(X[4:6]), present], sequence_id=name, outputs=as_json)
    assert result.get_response()["outputs"][0]["data"][2:] == [None, None]
    after, last = step(client, name, X[6:8])
    assert last == 4
    np.testing.assert_allclose(after[0], predicted(client, X[[0, 2, 4, 6]])[-1], 1e-4, 1e-5)
    np.testing.assert_allclose(after[1], predicted(client, X[[1, 7]])[-1], 1e-4, 1e-5)


def test_inputs_may_come_by_feature_and_outputs_be_asked_for_by_name(client: triton.InferenceServerClient) -> None:
    """A tensor for each feature, its last axis the feature's width; outputs one by one, and the best classes."""
    whole = client.infer(KIND, [tensor(X[:2])]).as_numpy("y")
    columns = [tensor(X[:2, [i]], name) for i, name in enumerate("uvw")]
    wishes = [triton.InferRequestedOutput(name) for name in ("v", "u")]
    result = client.infer(KIND, columns[::-1], outputs=wishes)
    np.testing.assert_array_equal(result.as_numpy("v"), whole[:, 1:])
    np.testing.assert_array_equal(result.as_numpy("u"), whole[:, :1])
    kind, x = "characters", golden("characters")["x"][:1, 0]
    best = client.infer(kind, [tensor(x)], outputs=[triton.InferRequestedOutput("y", class_count=2)]).as_numpy("y")
    y = client.infer(kind, [tensor(x)]).as_numpy("y")[0]
    classes = read_manifest(MODELS / kind / "1").classes
    assert classes is not None
    order = np.argsort(-y)[:2]
    assert [text.decode().split(":", 2)[1:] for text in best[0]] == [[str(i), classes[i]] for i in order]
    assert float(best[0][0].split(b":")[0]) == pytest.approx(y[order[0]], abs=1e-5)


def test_moments_and_categories_come_as_text(client: triton.InferenceServerClient, memory_server: Running) -> None:
    """BYTES by feature, and the moment in place of the calendar's features, mean what they mean in a native step."""
    named = {"station": "Brae", "u": 0.25, "price": 2.0, "time": "2026-03-08T07:30:00Z"}
    url = f"{memory_server.url}/v1/models/covariates/sessions/oip-named/step"
    want = httpx.post(url, json={"inputs": named}).json()["outputs"]
    inputs = [
        tensor(np.array([[named["station"].encode()]], object), "station", datatype="BYTES"),
        tensor(np.array([[named["u"]]]), "u"),
        tensor(np.array([[named["price"]]]), "price"),
    ]
    text = tensor(np.array([[named["time"].encode()]], object), "time", datatype="BYTES")
    seconds = tensor(np.array([[1772955000.0]]), "time", datatype="FP64")
    for time in (text, seconds):
        result = client.infer("covariates", [*inputs, time])
        np.testing.assert_allclose(result.as_numpy("y")[0], list(want.values()), 1e-5)


def test_bytes_behind_the_json_are_the_inputs_in_order(http: httpx.Client) -> None:
    """Raw bodies without a content type; without JSON the whole body is the input of one example."""
    x = X[:1]
    want = http.post(f"{LSTM}/infer", json={"inputs": [document(x)]}).json()["outputs"][0]["data"]
    head = json.dumps({"inputs": [document(x, raw=True)]}).encode()
    for body, length in ((head + x.tobytes(), len(head)), (x.tobytes(), 0)):
        headers = {"inference-header-content-length": str(length)}
        response = http.post(f"{LSTM}/infer", content=body, headers=headers)
        assert response.status_code == 200, response.text
        assert "content-type" not in response.request.headers
        size = int(response.headers.get("inference-header-content-length", len(response.content)))
        (output,) = json.loads(response.content[:size])["outputs"]
        got = np.frombuffer(response.content[size:], "<f4") if length == 0 else output["data"]
        np.testing.assert_allclose(got, want, 1e-6)
    several = http.post(f"{LSTM}/infer", content=X[:5].tobytes(), headers={"inference-header-content-length": "0"})
    size = int(several.headers["inference-header-content-length"])
    assert several.headers["content-type"] == "application/octet-stream"
    assert json.loads(several.content[:size])["outputs"][0]["shape"] == [1, 5, 2]


def document(x: Array, raw: bool = False, name: str = "x") -> dict[str, Any]:
    """An input as it stands in the JSON."""
    said = {"name": name, "datatype": "FP32", "shape": x.shape}
    return said | ({"parameters": {"binary_data_size": x.nbytes}} if raw else {"data": x.tolist()})


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("packed", [None, "gzip"])
def test_large_bodies_are_read_beside_the_steps_of_others(
    client: triton.InferenceServerClient, name: str, raw: bool, packed: str | None
) -> None:
    """Hundreds of kilobytes, raw and as JSON, of a sequence and of none: the offline pass; what is wrong is refused."""
    x = np.random.default_rng(4).normal(size=(1, 8_000, 3)).round(3).astype(np.float32)
    want = predicted(client, x[0])
    as_sent = {"request_compression_algorithm": packed, "response_compression_algorithm": packed}
    for flags in ({}, {"sequence_id": name, "sequence_start": True}):
        got = client.infer(KIND, [tensor(x, raw=raw)], **flags, **as_sent).as_numpy("y")
        np.testing.assert_allclose(got[0], want, 1e-4, 1e-5)
    assert step(client, name, X[:1])[1] == 8_001
    refused(lambda: client.infer(KIND, [tensor(x[:, :, :2], raw=raw)], sequence_id=name, **as_sent), 400, "features")
    x[0, 7_000, 1] = np.inf
    if raw:
        refused(lambda: client.infer(KIND, [tensor(x)], sequence_id=name, **as_sent), 400, "infinite", "step 7000")


@pytest.mark.parametrize("request_by", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_by", [None, "gzip", "deflate"])
def test_bodies_are_packed_both_ways(
    client: triton.InferenceServerClient, request_by: str | None, response_by: str | None
) -> None:
    """The length of the JSON part is that of the unpacked one."""
    packed = {"request_compression_algorithm": request_by, "response_compression_algorithm": response_by}
    got = client.infer(KIND, [tensor(X[:8])], **packed).as_numpy("y")
    np.testing.assert_array_equal(got, client.infer(KIND, [tensor(X[:8])]).as_numpy("y"))


def test_an_answer_says_how_it_is_packed(http: httpx.Client) -> None:
    """By the only encoding that is named; a small one is left as it is for who takes many."""
    body = json.dumps({"inputs": [document(X[:1])]}).encode()
    for accepted, want in (("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate", None), ("gzip;q=0", None)):
        with http.stream("POST", f"{LSTM}/infer", content=body, headers={"accept-encoding": accepted}) as response:
            raw = b"".join(response.iter_raw())
        assert response.headers.get("content-encoding") == want
        plain = gzip.decompress(raw) if want == "gzip" else zlib.decompress(raw) if want else raw
        assert json.loads(plain)["model_name"] == KIND
    large = json.dumps({"inputs": [document(X)]}).encode()
    for content, fields in ((large, {}), (zlib.compress(large), {"content-encoding": "deflate"})):
        response = http.post(f"{LSTM}/infer", content=content, headers={"accept-encoding": "gzip, deflate", **fields})
        assert response.headers["content-encoding"] == "gzip"
        assert response.json()["outputs"][0]["shape"] == [100, 2]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (Tensor("x", "FP32", [1, 3], b"123"), ShapeMismatch),
        (Tensor("x", "FP32", [1, 2], X[:1].tobytes()), ShapeMismatch),
        (Tensor("x", "FP32", [0, 2**62], b""), ShapeMismatch),
        (Tensor("x", "FP32", [-1, 3], X[:1].tobytes()), ShapeMismatch),
        (Tensor("x", "FP128", [1], b"1"), InvalidRequest),
        (Tensor("x", "BYTES", [1], b"\0\0\0\0"), InvalidRequest),
        (Tensor("x", "FP32", [1]), InvalidRequest),
        (Tensor("x", "FP32", [1], values=["1"]), InvalidRequest),
        (Tensor("x", "FP16", [1], values=[1.0]), InvalidRequest),
        (Tensor("x", "INT64", [1], values=[10**400]), InvalidRequest),
    ],
)
def test_tensors_that_are_none_are_refused(given: Tensor, error: type[StepcastError]) -> None:
    """Contents that do not fill the shape, an unknown datatype, values that are no numbers."""
    with pytest.raises(error):
        numbers(given)


def test_tensors_are_read_by_their_datatype() -> None:
    """BF16 is the upper half of float32, BOOL 0 or 1; lists are flat or nested, null is a missing reading."""
    half = (np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16).astype("<u2")
    assert numbers(Tensor("x", "BF16", [2], half.tobytes())).tolist() == [1.5, -2.0]
    assert numbers(Tensor("x", "BOOL", [2], b"\0\1")).tolist() == [0.0, 1.0]
    assert numbers(Tensor("x", "UINT64", [1, 1], struct.pack("<Q", 7))).tolist() == [[7.0]]
    assert numbers(Tensor("x", "FP64", [2, 2], values=[[1, 2.5], [True, -3]])).tolist() == [[1.0, 2.5], [1.0, -3.0]]
    assert np.isnan(numbers(Tensor("x", "FP32", [2], values=[None, 1.0]))).tolist() == [True, False]
    assert texts(Tensor("x", "BYTES", [2], b"\1\0\0\0a\0\0\0\0")).tolist() == ["a", ""]
    for wrong in (b"\2\0\0\0a", b"\1\0", b"\1\0\0\0\xff"):
        with pytest.raises((ShapeMismatch, InvalidRequest)):
            texts(Tensor("x", "BYTES", [1], wrong))


# --- sequences --------------------------------------------------------------------------------------------------------


def test_ids_of_sequences_never_share_a_session_by_accident() -> None:
    """Numbers have a form of their own; text that is a session's id names that session; other text is packed."""
    assert session_of(7) == "oip:7"
    assert session_of("7") == "7"
    assert session_of("pump-7") == "pump-7"
    assert session_of("Pumpe 7/ä") == "oip~UHVtcGUgNy_DpA"
    assert session_of(2**64 - 1) == "oip:18446744073709551615"
    with pytest.raises(InvalidSessionId):
        session_of(" " * 200)
    for wrong in (-1, 2**64, 1.5, True, None, [1]):
        with pytest.raises(InvalidRequest):
            flags_of({"sequence_id": wrong})


@pytest.mark.parametrize("sequence", [41, "text", "a b"])
def test_a_sequence_is_a_session_of_all_doors(
    client: triton.InferenceServerClient, http: httpx.Client, name: str, sequence: int | str
) -> None:
    """A step that one door takes is seen by the other, and ended by either."""
    sequence = sequence + Random(name).getrandbits(40) if isinstance(sequence, int) else f"{sequence}-{name}"
    at = f"{SESSIONS}/{session_of(sequence)}"
    want = predicted(client, X[:4])
    got = [step(client, sequence, X[:1], start=True)[0][0]]
    got.append(http.post(f"{at}/step", json={"inputs": X[1].tolist(), "seq": 2}).json()["outputs"])
    y, number = step(client, sequence, X[2:3], seq=3)
    got.append(y[0])
    assert (number, http.get(at).json()["step"]) == (3, 3)
    y, number = step(client, sequence, X[3:4], end=True)
    got.append(y[0])
    np.testing.assert_allclose(got, want, 1e-4, 1e-5)
    assert http.get(at).status_code == 404
    http.post(f"{at}/step", json={"inputs": X[0].tolist()})
    assert step(client, sequence, X[1:2])[1] == 2  # a native session is a sequence that was started


def test_start_takes_a_live_sequence_back_to_its_initial_state(
    client: triton.InferenceServerClient, http: httpx.Client, name: str
) -> None:
    """Its step number too; examples may be others than before; both flags make a sequence of one step."""
    first, _ = step(client, name, X[:1], start=True)
    step(client, name, X[1:2])
    again, number = step(client, name, X[:1], start=True)
    np.testing.assert_array_equal(again, first)
    assert number == 1
    several, number = step(client, name, X[:3], start=True)
    assert (several.shape, number) == ((3, 2), 1)
    alone, number = step(client, name, X[:1], start=True, end=True)
    np.testing.assert_array_equal(alone, first)
    assert number == 1
    assert http.get(f"{SESSIONS}/{name}").status_code == 404


def test_a_start_that_fails_leaves_the_sequence_as_it_was(
    client: triton.InferenceServerClient, http: httpx.Client, name: str
) -> None:
    """The step from the initial state and what it replaces are one commit: the state stays bit for bit."""
    kind = "lstm_normed"
    at, x = f"/v1/models/{kind}/sessions/{name}", golden(kind)["x"][0, :3]
    step(client, name, x[:1], kind, start=True)
    step(client, name, x[1:2], kind, seq=2)
    before = http.get(f"{at}/state").json()
    endless = np.full_like(x[:1], 3e38)  # finite, but its products are not
    assert "finite" in refused(lambda: step(client, name, endless, kind, start=True), 400)
    refused(lambda: step(client, name, x[:1], kind, start=True, seq=2), 400, "Send seq 1")
    assert http.get(f"{at}/state").json() == before
    y, number = step(client, name, x[2:3], kind, seq=3)
    assert number == 3
    np.testing.assert_allclose(y[0], predicted(client, x, kind)[-1], 1e-4, 1e-5)


def test_a_missing_start_names_the_cause(client: triton.InferenceServerClient, http: httpx.Client, name: str) -> None:
    """Never started, ended by a flag: the words that clients know, and the cause as a field."""
    text = refused(lambda: step(client, name, X[:1]), 400, "START flag", "was never started")
    assert repr(name) in text
    step(client, name, X[:1], start=True, end=True)
    refused(lambda: step(client, name, X[:1]), 400, "START flag", "has ended")
    body = {"inputs": [document(X[:1])], "parameters": {"sequence_id": name}}
    problem = http.post(f"{LSTM}/infer", json=body).json()
    assert (problem["code"], problem["cause"], problem["session"]) == ("sequence_not_started", "ended", name)
    body["parameters"] = {"sequence_start": True}
    assert "non-zero or non-empty correlation ID" in http.post(f"{LSTM}/infer", json=body).json()["error"]


def test_a_sequence_that_has_expired_says_so() -> None:
    """After the server's time to live."""
    with (
        running(store="memory://", ttl_s=1) as server,
        httpx.Client(base_url=server.url) as http,
        triton.InferenceServerClient(server.url.removeprefix("http://")) as client,
    ):
        step(client, 1, X[:1], start=True)
        config = client.get_model_config(KIND)
        assert config["sequence_batching"]["max_sequence_idle_microseconds"] == 1_000_000
        while http.get(f"{SESSIONS}/oip:1").status_code == 200:
            pass
        refused(lambda: step(client, 1, X[:1]), 400, "START flag", "has expired, 1 s after its last step")


def test_numbered_steps_are_made_exactly_once(
    client: triton.InferenceServerClient, http: httpx.Client, name: str
) -> None:
    """The parameter stepcast_seq: retries of the first, a middle and the last step are answered, not applied."""
    y: list[Array] = []
    for at, flags in enumerate(({"start": True}, {}, {"end": True}), 1):
        sent = [step(client, name, X[at : at + 1], seq=at, **flags) for _ in range(3)]
        assert [number for _, number in sent] == [at] * 3
        for again, _ in sent[1:]:
            np.testing.assert_array_equal(again, sent[0][0])
        y.append(sent[0][0][0])
        if at < 3:
            assert http.get(f"{SESSIONS}/{name}").json()["step"] == at
            text = refused(lambda at=at: step(client, name, X[:1], seq=at), 400)
            assert "another payload" in text
            refused(lambda at=at: step(client, name, X[:1], seq=at + 2), 400, f"Send seq {at + 1}")
    np.testing.assert_allclose(y, predicted(client, X[1:4]), 1e-4, 1e-5)
    refused(lambda: step(client, name, X[:1], seq=3), 400, "has ended")


def test_a_step_never_creates_a_sequence_that_another_replica_has_ended(tmp_path: Path) -> None:
    """Though this one keeps the session ready, and finds out at the commit only; the cause is known here, too."""
    store = f"sqlite:///{tmp_path / 'sessions.db'}"
    with running(store=store) as here, running(store=store) as there:
        addresses = [server.url.removeprefix("http://") for server in (here, there)]
        with triton.InferenceServerClient(addresses[0]) as one, triton.InferenceServerClient(addresses[1]) as two:
            step(one, 1, X[:1], start=True)
            step(one, 1, X[1:2])
            y, number = step(two, 1, X[2:3], seq=3, end=True)
            refused(lambda: step(one, 1, X[2:3]), 400, "START flag", "has ended")
            again, same = step(one, 1, X[2:3], seq=3)
            assert (number, same) == (3, 3)
            np.testing.assert_array_equal(again, y)
            assert httpx.get(f"{here.url}{SESSIONS}/oip:1").status_code == 404


def test_a_retry_of_an_end_leaves_a_sequence_that_went_on(
    client: triton.InferenceServerClient, http: httpx.Client, name: str
) -> None:
    """It gets its stored answer; what came after that step stays."""
    for at in (1, 2):
        step(client, name, X[at : at + 1], start=at == 1, seq=at)
    assert step(client, name, X[1:2], seq=1, end=True)[1] == 1
    assert http.get(f"{SESSIONS}/{name}").json()["step"] == 2


def test_a_request_may_name_the_version(tmp_path: Path) -> None:
    """A sequence starts on it, stays on it, and is refused by the name of another."""
    for version, kind in ((1, "lstm"), (2, "gru")):
        folder = shutil.copytree(MODELS / kind / "1", tmp_path / "m" / str(version))
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, "name": "m", "version": version}))
    with (
        running(store="memory://", models=tmp_path) as server,
        triton.InferenceServerClient(server.url.removeprefix("http://")) as client,
    ):
        inputs = [tensor(X[:1])]
        old = client.infer("m", inputs, model_version="1", sequence_id=1, sequence_start=True)
        assert old.get_response()["model_version"] == "1"
        assert client.infer("m", inputs, sequence_id=1).get_response()["model_version"] == "1"
        assert client.infer("m", inputs).get_response()["model_version"] == "2"
        refused(lambda: client.infer("m", inputs, model_version="2", sequence_id=1), 400, "is on version 1, not 2")
        refused(lambda: client.infer("m", inputs, model_version="3", sequence_id=1), 404)
        again = client.infer("m", inputs, sequence_id=1, sequence_start=True)
        assert again.get_response()["model_version"] == "2"
        assert client.get_model_metadata("m")["versions"] == ["1", "2"]
        client.infer("m", inputs, sequence_id=1, sequence_end=True)
        retired = httpx.delete(f"{server.url}/v1/models/m/versions/2")
        assert (retired.status_code, retired.json()["sessions"]) == (200, 0)  # the mark of an end holds no version


def test_fifty_interleaved_sequences_are_the_offline_pass_of_each(memory_server: Running) -> None:
    """A hundred steps of each, all under way at once: outputs and step numbers; half of the ids are text."""
    x = np.random.default_rng(3).normal(size=(SEQUENCES, STEPS, 3)).astype(np.float32)
    base = Random().getrandbits(40)

    async def sequence(client: triton_aio.InferenceServerClient, row: int) -> list[Array]:
        y, name = [], base + row if row % 2 else f"{base}-{row}"
        for at in range(STEPS):
            flags = {"sequence_start": at == 0, "sequence_end": at == STEPS - 1}
            result = await client.infer(KIND, [tensor(x[row, at : at + 1])], sequence_id=name, **flags)
            assert result.get_response()["parameters"]["stepcast_step"] == at + 1
            y.append(result.as_numpy("y")[0])
        return y

    async def all_of_them() -> list[list[Array]]:
        url = memory_server.url.removeprefix("http://")
        async with triton_aio.InferenceServerClient(url, conn_limit=SEQUENCES) as client:
            return await asyncio.gather(*[sequence(client, row) for row in range(SEQUENCES)])

    body = {"inputs": x.tolist()}
    want = httpx.post(f"{memory_server.url}/v1/models/{KIND}/predict", json=body, timeout=20).json()["outputs"]
    np.testing.assert_allclose(asyncio.run(all_of_them()), want, 1e-4, 1e-5)


def test_async_infer_steps(client: triton.InferenceServerClient, name: str) -> None:
    """Several sequences under way at once."""
    for at in range(3):
        flags = {"sequence_start": at == 0, "sequence_end": at == 2}
        asked = [
            client.async_infer(KIND, [tensor(X[at + row : at + row + 1])], sequence_id=f"{name}-{row}", **flags)
            for row in range(4)
        ]
        y = [answer.get_result().as_numpy("y")[0] for answer in asked]
    np.testing.assert_allclose(y, [predicted(client, X[row : row + 3])[-1] for row in range(4)], 1e-4, 1e-5)


def test_the_asyncio_client_steps(memory_server: Running, name: str) -> None:
    """Which accepts packed answers by habit."""

    async def converse() -> list[Array]:
        async with triton_aio.InferenceServerClient(memory_server.url.removeprefix("http://")) as client:
            assert await client.is_model_ready(KIND)
            flags = [{"sequence_start": at == 0, "sequence_end": at == 2} for at in range(3)]
            results = [
                await client.infer(KIND, [tensor(X[at : at + 1])], sequence_id=name, **flags[at]) for at in range(3)
            ]
            with pytest.raises(InferenceServerException, match="START flag"):
                await client.infer(KIND, [tensor(X[:1])], sequence_id=name)
        return [result.as_numpy("y")[0] for result in results]

    y = asyncio.run(converse())
    response = httpx.post(f"{memory_server.url}/v1/models/{KIND}/predict", json={"inputs": X[:3].tolist()})
    np.testing.assert_allclose(y, response.json()["outputs"], 1e-4, 1e-5)


def test_one_conversation_is_the_same_through_all_doors(memory_server: Running, name: str) -> None:
    """Steps with and without numbers, a retry, a gap, several steps at once: equal outputs and step numbers."""
    ways = {**DOORS, "inference-json": lambda url, model: InferenceDoor(url, model, raw=False)}
    manifest = read_manifest(MODELS / KIND / "1")
    said: dict[str, list[Any]] = {}
    for way, opened in ways.items():
        door = opened(memory_server.url, KIND)
        script, session = Script(door, manifest), f"{name}-{way}"
        heard = said[way] = []
        for x, seq in ((X[:1], 1), (X[1:2], 2), (X[1:2], 2), (X[:1], 9), (X[2:3], None), (X[None, 3:7], 7)):
            try:
                heard.append(script.step(session, x, seq=seq))
            except StepcastError as error:
                heard.append((np.array([]), error.code, error.facts["expected_seq"]))
        door.close()
    first = said["http-json"]
    assert [heard[1] for heard in first] == [1, 2, 2, "step_conflict", 3, 7]
    for heard in said.values():
        assert [one[1:] for one in heard] == [one[1:] for one in first]
        for one, other in zip(heard, first, strict=True):
            np.testing.assert_allclose(one[0], other[0], 1e-5, 1e-6)


# --- who, and what is wrong -------------------------------------------------------------------------------------------


def test_tenants_are_apart_and_keys_come_by_header() -> None:
    """One sequence id names a sequence of each tenant; without a key, or with too small a role, nothing is done."""
    keys = "step:acme:key-of-acme,step:rival:key-of-rival,read:acme:key-of-reader"
    with (
        running(store="memory://", api_keys=keys) as server,
        triton.InferenceServerClient(server.url.removeprefix("http://")) as client,
    ):
        acme, rival, reader = ({"X-Api-Key": f"key-of-{who}"} for who in ("acme", "rival", "reader"))
        assert client.is_server_ready()
        assert [step(client, 1, X[:1], start=at == 0, headers=acme)[1] for at in range(3)] == [1, 2, 3]
        refused(lambda: step(client, 1, X[:1], headers=rival), 400, "was never started")
        assert step(client, 1, X[:1], start=True, headers=rival)[1] == 1
        assert step(client, 1, X[:1], headers={"Authorization": "Bearer key-of-acme"})[1] == 4
        refused(lambda: step(client, 1, X[:1]), 401, "API key")
        refused(lambda: step(client, 1, X[:1], headers=reader), 403, "'step' is needed")
        assert client.get_model_metadata(KIND, headers=reader)["name"] == KIND
        refused(lambda: client.get_model_metadata(KIND), 401)


def test_what_is_not_there_is_an_error_that_clients_can_read(
    client: triton.InferenceServerClient, http: httpx.Client
) -> None:
    """Unknown models, versions, outputs and inputs; what other servers have and this one has not."""
    inputs = [tensor(X[:1])]
    refused(lambda: client.infer("nobody", inputs), 404, "is not served")
    refused(lambda: client.infer(KIND, inputs, model_version="7"), 404, "no version 7")
    refused(lambda: client.get_model_metadata("nobody"), 404)
    refused(lambda: client.get_inference_statistics("nobody"), 404)
    unknown = [triton.InferRequestedOutput("z")]
    refused(lambda: client.infer(KIND, inputs, outputs=unknown), 400, "no output 'z', it has 'y', 'u', 'v'")
    refused(lambda: client.infer(KIND, [tensor(X[:1], "z")]), 400, "'z'")
    refused(lambda: client.infer(KIND, inputs, parameters={"stepcast_sec": 1}), 400, "stepcast_sec")
    refused(lambda: client.infer("bidirectional", inputs, sequence_id=1, sequence_start=True), 501, "Use predict")
    refused(client.get_system_shared_memory_status, 501)
    refused(lambda: client.load_model(KIND), 501)
    refused(client.get_trace_settings, 501)
    for response in (http.get("/v2/nothing"), http.get(f"{LSTM}/infer"), http.put("/v2")):
        assert response.status_code == 404
        assert response.json()["error"]
        assert from_problem({**response.json(), "detail": response.json()["error"]}).code == "route_not_found"


def test_a_server_that_cannot_answer_says_unavailable() -> None:
    """Its wait for the run was too long: 503, the same step may be sent again; nothing was applied."""
    with (
        running(store="memory://", deadline_s=1e-9) as server,
        triton.InferenceServerClient(server.url.removeprefix("http://")) as client,
    ):
        refused(lambda: step(client, 1, X[:1], start=True), 503, "it was not applied")
        assert httpx.get(f"{server.url}{SESSIONS}/oip:1").status_code == 404


def test_a_request_may_limit_its_wait(client: triton.InferenceServerClient, name: str) -> None:
    """The parameter timeout, in microseconds: a step that waited longer for its run is not applied."""
    step(client, name, X[:1], start=True, timeout=5_000_000)
    refused(lambda: step(client, name, X[1:2], timeout=1), 503, "it was not applied")
    assert step(client, name, X[1:2], priority=3)[1] == 2


@pytest.fixture(scope="module")
def fuzzing(memory_server: Running) -> Iterator[httpx.Client]:
    """A client for many requests."""
    with httpx.Client(base_url=memory_server.url, timeout=20) as client:
        yield client


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
_PARAMETERS = st.dictionaries(
    st.sampled_from(
        ["sequence_id", "sequence_start", "sequence_end", "stepcast_seq", "timeout", "priority", "binary_data_output"]
    )
    | st.text(max_size=12),
    st.booleans() | st.integers(-2, 2**65) | st.text(max_size=8) | _JSON,
    max_size=4,
)
_TENSOR = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "u", "v", "w", "stepcast_mask"]) | st.text(max_size=4),
        "datatype": st.sampled_from(["FP16", "FP32", "FP64", "BF16", "BOOL", "INT8", "UINT64", "BYTES"]) | st.text(),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**40]), max_size=4) | _JSON,
    },
    optional={
        "data": st.lists(st.floats(width=32) | st.none() | st.integers(), max_size=6) | _JSON,
        "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "a"]), st.integers(-1, 40), max_size=2),
    },
)
_REQUEST = st.fixed_dictionaries(
    {"inputs": st.lists(_TENSOR, max_size=3) | _JSON},
    optional={
        "outputs": st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(["y", "u", "z"])}, optional={"parameters": _PARAMETERS}),
            max_size=2,
        ),
        "parameters": _PARAMETERS,
        "id": _JSON,
    },
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    asked=_REQUEST | _JSON,
    behind=st.binary(max_size=40),
    length=st.sampled_from(["right", "right", "none", "0", "7", "-1", "99999999999999999999", "a"]),
    cut=st.integers(0, 3),
)
def test_no_request_whatever_is_a_defect(
    fuzzing: httpx.Client, asked: Any, behind: bytes, length: str, cut: int
) -> None:
    """Good and bad fields in all mixtures, wrong lengths, bodies that end too early: an answer or an error, no 500."""
    said = json.dumps(asked).encode()
    headers = {} if length == "none" else {"inference-header-content-length": length}
    if length == "right":
        headers = {"inference-header-content-length": str(len(said))}
    body = said + behind
    body = body[: len(body) - cut]
    response = fuzzing.post(f"{LSTM}/infer", content=body, headers=headers)
    assert response.status_code in (200, 400, 404, 503), (body, response.text)
    if response.status_code != 200:
        assert response.json()["error"]


# --- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.perf_analyzer
@pytest.mark.parametrize("way", ["http", "grpc"])
def test_perf_analyzer_drives_sequences(way: str) -> None:
    """The page's commands: sixteen sequences at once over HTTP and gRPC, and a report without an error."""
    program = shutil.which("perf_analyzer")
    assert program is not None, "perf_analyzer is not on the PATH: docs/inference-protocol.md says how to get it"
    process = Process("memory://", "--grpc-port", "0")
    try:
        page = (ROOT / "docs" / "inference-protocol.md").read_text()
        (command,) = [line for line in page.splitlines() if line.startswith("perf_analyzer ") and f" -i {way} " in line]
        here = {
            "localhost:8000": process.url.removeprefix("http://"),
            "localhost:8001": GRPC_ADDRESSES[process.url],
            "control_charts": KIND,
        }
        arguments = [here.get(word, word) for word in command.split()[1:]]
        quick = ["--measurement-interval", "1000", "--max-trials", "5", "--stability-percentage", "999"]
        run = subprocess.run([program, *arguments, *quick], capture_output=True, text=True, timeout=60)
    finally:
        process.kill()
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Sequence count" in run.stdout
    assert "Throughput" in run.stdout
    assert "compute infer" in run.stdout
