"""Steps by name do what steps by position do: through every door, in every shape, with gaps, retries and versions."""

import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from doors import BATCH_DOORS, DOORS, NAMED_DOORS, Array, Call, HttpDoor, NamedWire, Script, WebSocketDoor, step
from hypothesis import given
from hypothesis import strategies as st
from serving import MODELS, ROOT, Running, golden, running

from service.doors import bodies, names
from service.doors.steps import Reader
from service.engine.repository import Repository
from stepcast.errors import InvalidRequest, ShapeMismatch, StateVersionMismatch, StepcastError
from stepcast.features import FeatureNames, likeliest
from stepcast.manifest import Manifest, read_manifest

pytestmark = pytest.mark.service

KINDS = ("lstm", "policies", "rnn_loss_classes", "characters", "conv2d", "embedding", "foreign_lstm", "covariates")
JSON, MSGPACK = bodies.JSON, bodies.MSGPACK
PACKED = {"content-type": MSGPACK, "accept": JSON}
NAN = float("nan")


@pytest.fixture
def name() -> str:
    """A session id that no other test has."""
    return f"n-{Random().getrandbits(48):012x}"


def answered(response: httpx.Response) -> dict[str, Any]:
    """A good answer."""
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """A problem document."""
    problem: dict[str, Any] = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    return problem


# --- every door ---------------------------------------------------------------------------------------------------


def script(door: Script, model: str, name: str, batch: bool) -> list[Array]:
    """Steps of one and of three examples, with gaps and masks where they may be; outputs, then states."""
    x = np.nan_to_num(golden(model)["x"][:3, :4])  # (3, 4, F)
    if model in ("policies", "covariates"):
        x[0, 1, 1] = x[1, 2, 0] = x[2, 0, :3] = np.nan
    found = []
    for t, seq in enumerate((1, None, 3, 4)):
        found.append(door.step(f"{name}-1", x[0, t], seq)[0])
    if not batch:
        found.append(door.step(f"{name}-1", x[:1, :3])[0])
        found.append(door.step(f"{name}-3", x[:, 0])[0])
        found.append(door.step(f"{name}-3", x[:, 1:], seq=4, mask=[[1, 0, 1], [1, 1, 1], [0, 0, 0]])[0])
        found.append(door.step(f"{name}-3", x[:, 1], mask=[0, 1, 1])[0])
        found.append(door.step(f"{name}-1", x[0, 0], mask=0)[0])
        found.append(door.step(f"{name}-1", x[0, 0], seq=8, mask=0)[0])  # a retry: the kept answer, of a masked step
    sessions = [f"{name}-1"] if batch else [f"{name}-1", f"{name}-3"]
    return found + [value for s in sessions for keys in door.state(s).values() for value in keys.values()]


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("opened", NAMED_DOORS)
def test_a_session_by_names_is_that_by_position(memory_server: Running, model: str, opened: str, name: str) -> None:
    """Every output and every bit of the states, through every door, as columns and as records."""
    batch = opened.startswith("batch")
    plain = (BATCH_DOORS if batch else DOORS)[opened.rpartition("-")[0]]
    made = []
    for place, opener in enumerate((plain, NAMED_DOORS[opened])):
        with closing(opener(memory_server.url, model)) as door:
            session = Script(door, read_manifest(MODELS / model / "1"))
            made.append(script(session, model, f"{name}-{place}", batch))
    for by_position, by_name in zip(*made, strict=True):
        np.testing.assert_array_equal(by_position, by_name)


def test_large_batch_steps_by_names_are_those_by_position(memory_server: Running, name: str) -> None:
    """Sessions enough for a batch of their own, which become a roster when they come again."""
    x = np.random.default_rng(3).normal(size=(4, 48, 3)).astype(np.float32)
    opened = {"batch-msgpack": BATCH_DOORS["batch-msgpack"], **NAMED_DOORS}
    made = {}
    for door in [key for key in opened if key.startswith("batch")]:
        with closing(opened[door](memory_server.url, "lstm")) as way:
            calls = [[step(f"{name}-{door}-{s}", x[t, s], t + 1) for s in range(48)] for t in range(4)]
            made[door] = [[answer["outputs"].tolist() for answer in way.together(turn)] for turn in calls]  # type: ignore[index]
    assert len(made) == 5
    for outputs in made.values():
        assert outputs == made["batch-msgpack"]


@pytest.mark.parametrize("model", ["lstm", "policies", "last_step", "conv2d"])
@pytest.mark.parametrize("packed", [False, True], ids=["json", "msgpack"])
def test_predict_by_names_is_that_by_position(memory_server: Running, model: str, packed: bool) -> None:
    """[T] and [B,T] columns, and records as the steps of one sequence; at the last step one object or columns [B]."""
    x = np.nan_to_num(golden(model)["x"][:2, :4])
    mask = [[1, 1, 1, 0], [1, 0, 1, 1]]
    for style in ("columns", "records"):
        url = memory_server.url
        with closing(HttpDoor(url, model, packed)) as plain, closing(HttpDoor(url, model, packed, style)) as by_name:
            for inputs, more in ((x[0], {}), (x[0], {"mask": mask[0]}), (x, {"mask": mask})):
                np.testing.assert_array_equal(
                    by_name.predict(inputs=inputs, **more), plain.predict(inputs=inputs, **more)
                )


@pytest.mark.parametrize("packed", [False, True], ids=["json", "msgpack"])
def test_a_rollout_by_names_is_that_by_position(memory_server: Running, name: str, packed: bool) -> None:
    """Of a known future only what is known is named; its outputs are columns [N,H]. A retry may come by position."""
    url = memory_server.url
    with closing(HttpDoor(url, "lstm", packed)) as plain, closing(HttpDoor(url, "lstm", packed, "columns")) as by_name:
        Script(plain, read_manifest(MODELS / "lstm" / "1")).step(name, np.float32([[1, 2, 3], [3, 2, 1]]))
        at = f"/sessions/{name}/rollout"
        future = np.full((2, 3), NAN, np.float32)
        future[:, 2] = 0.5, -0.5
        wanted = by_position(plain.post(at, {"steps": 2, "inputs": future}), packed)
        for known in ({"w": [0.5, -0.5]}, {"w": [[0.5, -0.5]] * 2}, [{"w": 0.5}, {"w": -0.5}]):
            answer = plain.post(at, {"steps": 2, "inputs": known})
            assert not isinstance(answer, Exception), answer
            np.testing.assert_array_equal(by_name_of(answer, packed), wanted)
        kept = by_name.post(at, {"steps": 2, "inputs": future, "commit": True, "seq": 3})
        again = plain.post(at, {"steps": 2, "inputs": future, "commit": True, "seq": 3})
        assert not isinstance(kept, Exception), kept
        np.testing.assert_array_equal(kept["outputs"], by_position(again, packed))
        with pytest.raises(InvalidRequest, match=r"names 'W' \(nearest: 'w'\)"):
            raise plain.post(at, {"steps": 1, "inputs": {"W": [1.0]}})  # type: ignore[misc]


def by_position(answer: Any, packed: bool) -> Array:
    """Outputs of an answer by position."""
    outputs = answer["outputs"]
    return np.frombuffer(outputs, "<f4").reshape(answer["shape"]) if packed else np.array(outputs, np.float32)


def by_name_of(answer: dict[str, Any], packed: bool) -> Array:
    """Outputs u and v (N, H) of an answer, as columns or as H records for each of N examples."""
    outputs = answer["outputs"]
    if isinstance(outputs, list):
        return np.array([[[record["u"], record["v"]] for record in row] for row in outputs], np.float32)
    assert list(outputs) == ["u", "v"]
    read = (lambda c: np.frombuffer(c, "<f4").reshape(answer["shape"])) if packed else np.float32
    return np.stack([read(column) for column in outputs.values()], axis=-1)


# --- retries --------------------------------------------------------------------------------------------------------

FORMS_OF_ONE: dict[str, tuple[str, Any]] = {
    "array": (JSON, {"inputs": [1.5, None, 3]}),
    "object": (JSON, {"inputs": {"w": 3, "u": 1.5, "v": None}}),
    "object that leaves one out": (JSON, {"inputs": {"u": 1.5, "w": 3.0}}),
    "raw": (MSGPACK, {"inputs": np.array([1.5, NAN, 3], "<f4").tobytes()}),
    "packed object": (MSGPACK, {"inputs": {"u": 1.5, "v": None, "w": 3}}),
    "records": (JSON, {"inputs": [{"u": 1.5, "w": 3}]}),
    "columns": (JSON, {"inputs": {"u": [1.5], "w": [3], "v": None}}),
    "packed columns": (MSGPACK, {"inputs": {"u": np.array([1.5], "<f4").tobytes(), "w": [3.0]}}),
    "packed records": (MSGPACK, {"inputs": [{"u": 1.5, "v": NAN, "w": 3}]}),
    "steps": (JSON, {"inputs": {"u": [[1.5]], "w": [[3]]}}),
    "packed steps": (MSGPACK, {"inputs": {"u": np.array([1.5], "<f4").tobytes(), "w": 3.0}, "shape": [1, 1]}),
}


def numbers_of(outputs: Any) -> list[float]:
    """The two outputs of one example, in whatever form."""
    if isinstance(outputs, list) and len(outputs) == 1:
        return numbers_of(outputs[0])
    return [float(np.ravel(value)[0]) for value in (outputs.values() if isinstance(outputs, dict) else outputs)]


def test_a_retry_may_come_in_any_form(http: httpx.Client, name: str) -> None:
    """The payload is the values: whichever form a step had, each other is its retry; a masked one is not."""
    kinds = list(FORMS_OF_ONE.values())
    for first, (kind, body) in FORMS_OF_ONE.items():
        at = f"/v1/models/policies/sessions/{name}-{first.replace(' ', '-')}/step"
        made = []
        for content, fields in [(kind, body), *kinds]:
            send = msgspec.msgpack.encode if content == MSGPACK else msgspec.json.encode
            headers = {"content-type": content, "accept": JSON}
            answer = answered(http.post(at, content=send({**fields, "seq": 1}), headers=headers))
            assert answer["step"] == 1
            made.append(numbers_of(answer["outputs"]))
        assert made == [made[0]] * len(made)
        refused(http.post(at, json={"inputs": {"u": 1.5, "v": 0, "w": 3}, "seq": 1}), 409, "step_conflict")


# --- shapes ---------------------------------------------------------------------------------------------------------


def made_of(widths: list[int], classes: int = 0) -> Manifest:
    """A manifest with features of these widths, all of which may be missing; two outputs, or so many classes."""
    features = [{"name": f"f {i} %é", "width": width, "missing": "mean"} for i, width in enumerate(widths)]
    labels = [f"class {i}" for i in range(classes)]
    outputs = [{"name": label} for label in labels or ["p %", "q"]]
    given = {"features": features, "outputs": outputs, "classes": labels or None, "sha256": "0" * 64}
    task = "classification" if classes else "regression"
    return Manifest.model_validate({"name": "m", "version": 1, "task": task, **given})


class Parts(msgspec.Struct):
    """Inputs as a body has them."""

    inputs: msgspec.Raw
    shape: list[int] | None = None


@given(
    widths=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    axes=st.lists(st.integers(1, 3), max_size=2),
    packed=st.booleans(),
    style=st.sampled_from(["columns", "records"]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_every_shape_by_names_is_the_array(
    widths: list[int], axes: list[int], packed: bool, style: str, seed: int, data: st.DataObject
) -> None:
    """Numbers, columns and records, wide features, gaps, left out names, in any order, as JSON and as msgpack."""
    manifest = made_of(widths)
    x = np.random.default_rng(seed).normal(size=(*axes, sum(widths))).astype(np.float32)
    x[x > 1] = NAN
    wire = NamedWire(packed, manifest.model_dump(), style)
    fields: dict[str, Any] = msgspec.msgpack.decode(wire.encode({"inputs": x})) if packed else {"inputs": wire.named(x)}
    kept = data.draw(st.permutations(manifest.features)) if isinstance(fields["inputs"], dict) else manifest.features
    if isinstance(fields["inputs"], dict):
        left_out = data.draw(st.sampled_from([None, *range(len(widths))])) if len(widths) > 1 else None
        fields["inputs"] = {f.name: fields["inputs"][f.name] for i, f in enumerate(kept) if i != left_out}
        if left_out is not None:
            x[..., manifest.feature_slices()[kept[left_out].name]] = NAN
    kind, encode = (MSGPACK, msgspec.msgpack.encode) if packed else (JSON, msgspec.json.encode)
    body = bodies.decode(encode(fields), Parts, kind)
    found = names.style_of(body.inputs, kind)
    assert found == ("records" if style == "records" and len(axes) == 1 else "columns")
    got = names.read(body.inputs, body.shape, kind, FeatureNames(manifest), found)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, x)


def test_a_number_beside_columns_holds_for_all_rows() -> None:
    """Beside [N] and [N,T]; so does a wide feature's one row."""
    feature_names = FeatureNames(made_of([1, 1, 2]))
    a, b, c = (f.name for f in feature_names.manifest.features)
    np.testing.assert_array_equal(
        feature_names.array({a: [1, 2], b: 3, c: [4, 5]}), np.float32([[1, 3, 4, 5], [2, 3, 4, 5]])
    )
    np.testing.assert_array_equal(feature_names.array({a: [[1, 2]], b: None})[..., :2], [[[1, NAN], [2, NAN]]])
    with pytest.raises(ShapeMismatch, match="features of different shapes"):
        feature_names.array({a: [1, 2], b: [3]})


@given(outputs=st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), masked=st.booleans())
def test_the_class_is_the_first_of_the_likeliest(outputs: list[float], masked: bool) -> None:
    """In an answer's text as in its arrays; null where the step was masked."""
    naming = names.Naming(made_of([1], classes=3))
    y = np.array([[[NAN if masked else value for value in outputs]]], np.float32)[None]
    texts = [b"null" if masked else b"%r" % value for value in outputs]
    body = json.loads(b"{" + naming.step % (naming.label(y[0, 0, 0]), *texts, 2, 7))
    wanted = None if masked else f"class {outputs.index(max(outputs))}"
    assert (body["outputs"]["class"], body["step"], body["version"]) == (wanted, 2, 7)
    assert naming.outputs(y[0, 0, 0], "columns")["class"] == wanted
    assert naming.outputs(y[0], "columns")["class"] == [[wanted]]
    assert likeliest(y).tolist() == [[[-1 if masked else outputs.index(max(outputs))]]]


# --- the usual way --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository() -> Repository:
    """The test models."""
    found = Repository(MODELS, device="cpu", threads=1)
    found.scan()
    return found


@pytest.mark.parametrize("model", ["lstm", "policies", "embedding"])
def test_a_step_of_named_numbers_goes_the_usual_way(repository: Repository, model: str) -> None:
    """It is taken apart in one go, as a body and as a frame, in JSON and msgpack; gaps where they may be."""
    served = repository.live(model)
    reader = Reader(served, 64, names.Names(repository, model).learn(), False)
    features = [feature.name for feature in served.manifest.features]
    record: dict[str, float | None] = {name: i + 0.5 for i, name in reversed(list(enumerate(features)))}
    wanted = np.arange(len(features), dtype=np.float32) + np.float32(0.5)
    if model == "policies":
        record[features[1]], wanted[1] = None, NAN
        del record[features[2]]
        wanted[2] = NAN
    for kind, encode in ((JSON, msgspec.json.encode), (MSGPACK, msgspec.msgpack.encode)):
        for decoders, more in ((reader.bodies, {}), (reader.frames, {"id": 1, "session": "s", "op": "step"})):
            plain = reader.read(encode({"inputs": record, "seq": 4, **more}), kind, decoders)
            assert plain is not None
            asked, data, form = plain
            np.testing.assert_array_equal(np.frombuffer(data, np.float32), wanted)
            assert asked.seq == 4
            assert isinstance(form, names.Named)
    for bad in ({**record, "other": 1}, {}, {**record, features[0]: [1]}, {**record, features[0]: True}):
        body = msgspec.json.encode({"inputs": bad})
        plain = reader.read(body, JSON, reader.bodies)
        assert (plain is None) == (model != "policies" or bad != {})


# --- what is refused ------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, str, str]] = {
    "unknown": ({"u": 1, "vv": 2, "w": 3}, "invalid_request", "$.inputs names 'vv' (nearest: 'v'); model 'lstm' has"),
    "left out": ({"v": 2}, "invalid_request", "$.inputs leaves out 'u', 'w'; model 'lstm' needs them"),
    "empty": ({}, "invalid_request", "$.inputs leaves out 'u', 'v', 'w'"),
    "null": ({"u": 1, "v": None, "w": 3}, "non_finite", "feature 'v' has a missing reading"),
    "text": ({"u": "1", "v": 2, "w": 3}, "invalid_request", "`$.inputs.u`"),
    "flag": ({"u": 1, "v": True, "w": 3}, "invalid_request", "`$.inputs.v`"),
    "object": ({"u": 1, "v": {}, "w": 3}, "invalid_request", "`$.inputs.v`"),
    "infinite": ({"u": 1e39, "v": 2, "w": 3}, "non_finite", "infinite (in float32) at example 0, step 0, feature 0"),
    "too large": ({"u": 10**400, "v": 2, "w": 3}, "non_finite", "out of range"),
    "shapes": ({"u": [1, 2], "v": [1], "w": 3}, "shape_mismatch", "different shapes: 'u' [2], 'v' [1]"),
    "ragged": ({"u": [[1, 2], [1]], "v": 2, "w": 3}, "shape_mismatch", "$.inputs.u is ragged"),
    "deep": ({"u": [[[1]]], "v": 2, "w": 3}, "shape_mismatch", "want numbers, [N] or [N,T]"),
    "no rows": ({"u": [], "v": 2, "w": 3}, "shape_mismatch", "at least one example"),
    "record": ([{"u": 1, "v": 2, "w": 3}, {"u": 1}], "invalid_request", "$.inputs[1] leaves out 'v', 'w'"),
    "no record": ([{"u": 1, "v": 2, "w": 3}, 7], "invalid_request", "`$.inputs[1]`"),
    "columns in a record": ([{"u": [1], "v": [2], "w": [3]}], "shape_mismatch", "want records of numbers"),
}


@pytest.mark.parametrize(("inputs", "code", "told"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("framed", [False, True], ids=["http", "websocket"])
def test_what_is_wrong_with_names_is_told(
    http: httpx.Client, memory_server: Running, name: str, framed: bool, inputs: Any, code: str, told: str
) -> None:
    """With its path, and nothing is stepped."""
    at = f"/v1/models/lstm/sessions/{name}"
    if framed:
        with closing(WebSocketDoor(memory_server.url, "lstm", packed=False)) as socket:
            (error,) = socket.together([Call("step", name, {"inputs": inputs})])
        assert isinstance(error, StepcastError)
        assert (error.code, told in str(error)) == (code, True), error
    else:
        problem = refused(http.post(f"{at}/step", content=json.dumps({"inputs": inputs})), 422, code)
        assert told in problem["detail"]
    assert http.get(at).status_code == 404


@pytest.mark.parametrize(
    ("inputs", "code", "told"),
    [
        ({"u": [1], "v": [2], "W": [3]}, "invalid_request", "$.inputs names 'W' (nearest: 'w')"),
        ([{"u": 1}], "invalid_request", "$.inputs[0] leaves out 'v', 'w'"),
        ({"u": [1], "v": [2]}, "invalid_request", "$.inputs leaves out 'w'"),
        ({"u": 1, "v": 2, "w": 3}, "shape_mismatch", "$.inputs has shape [3], want"),
        ({"u": [1, 2, 3], "v": 2, "w": 3}, "shape_mismatch", "$.inputs has shape [3, 3], want"),
    ],
)
def test_other_calls_refuse_wrong_names_too(http: httpx.Client, name: str, inputs: Any, code: str, told: str) -> None:
    """The batch step as a whole; predict, where [3] is no sequence but [3, 3] is."""
    body = {"sessions": [name], "inputs": inputs}
    assert told in refused(http.post("/v1/models/lstm/step", json=body), 422, code)["detail"]
    response = http.post("/v1/models/lstm/predict", json={"inputs": inputs})
    if code == "invalid_request":
        assert told in refused(response, 422, code)["detail"]
    assert (response.status_code == 200) == (inputs == {"u": [1, 2, 3], "v": 2, "w": 3})


def test_a_row_of_a_batch_step_that_misses_a_reading_is_refused_alone(http: httpx.Client, name: str) -> None:
    """Its outputs are null, by name too."""
    body = {"sessions": [f"{name}-a", f"{name}-b"], "inputs": [{"u": 1, "v": None, "w": 3}, {"u": 1, "v": 2, "w": 3}]}
    answer = answered(http.post("/v1/models/rnn_loss_classes/step", json=body))
    bad, good = answer["outputs"]
    assert bad == {"class": None, "probabilities": {"calm": None, "gust": None, "storm": None}}
    assert good["class"] == max(good["probabilities"], key=good["probabilities"].get)
    assert (answer["steps"], answer["errors"]["0"]["code"]) == ([None, 1], "non_finite")


def test_an_unknown_name_is_answered_with_the_facts(http: httpx.Client, name: str) -> None:
    """As fields too; and a format, which names have none of, is refused."""
    at = f"/v1/models/lstm/sessions/{name}/step"
    problem = refused(http.post(at, json={"inputs": {"U": 1, "vw": 1}}), 422, "invalid_request")
    assert problem["unknown"] == ["U", "vw"]
    assert problem["nearest"] == {"U": "u", "vw": "w"}
    long = {"x" * 10_000 + str(i): 1 for i in range(40)}
    problem = refused(http.post(at, json={"inputs": long}), 422, "invalid_request")
    assert problem["unknown"] == ["x" * 128] * 12  # what is told is bounded
    assert refused(http.post(at, json={"inputs": {}}), 422, "invalid_request")["missing"] == ["u", "v", "w"]
    body = {"inputs": {"u": [[1]], "v": [[1]], "w": [[1]]}, "format": "NCW"}
    assert "$.format is 'NCW'" in refused(http.post(at, json=body), 422, "invalid_request")["detail"]
    for shape in ([0], [-1], [2**62, 4], [3], [1, 1, 1, 1]):
        packed = {"inputs": {"u": b"\0" * 4, "v": 1, "w": 1}, "shape": shape}
        response = http.post(at, content=msgspec.msgpack.encode(packed), headers=PACKED)
        refused(response, 422, "shape_mismatch")


@pytest.mark.parametrize(
    ("path", "more", "body"),
    [
        ("/sessions/{}/step", {}, bodies.StepBody),
        ("/step", {"sessions": ["a", "b"]}, bodies.BatchBody),
        ("/predict", {}, bodies.PredictBody),
        ("/sessions/one/rollout", {"steps": 1}, bodies.RolloutBody),
    ],
)
def test_the_documents_examples_succeed(weather: str, path: str, more: dict[str, Any], body: type) -> None:
    """Those of `inputs`, by position and by name, on the committed weather model."""
    (schema,) = msgspec.json.schema_components([body], ref_template="{name}")[1].values()
    examples = schema["properties"]["inputs"]["examples"]
    assert any(isinstance(example, dict) for example in examples)
    with httpx.Client(base_url=f"{weather}/v1/models/weather", timeout=20) as http:
        answered(http.post("/sessions/one/step", json={"inputs": bodies.READINGS}))
        for number, inputs in enumerate(examples):
            outputs = answered(http.post(path.format(f"new-{number}"), json={"inputs": inputs, **more}))["outputs"]
            assert type(outputs) is type(inputs)


@pytest.fixture(scope="module")
def weather() -> Iterator[str]:
    """A server of the committed models."""
    with running(store="memory://", models=ROOT / "models") as server:
        yield server.url


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf"), 1e39])
def test_packed_numbers_that_are_none_are_refused(http: httpx.Client, name: str, value: float) -> None:
    """msgpack has NaN, which is a missing reading, and infinity: as a number, in columns, in records."""
    at = f"/v1/models/lstm/sessions/{name}"
    for v in (value, [value], [[value]]):
        record: Any = {"u": 1.0, "v": v, "w": 2.0}
        for inputs in (record, [record]) if v is value else (record,):
            body = msgspec.msgpack.encode({"inputs": inputs})
            refused(http.post(f"{at}/step", content=body, headers=PACKED), 422, "non_finite")
    assert http.get(at).status_code == 404


def test_a_packed_gap_is_one_payload_whatever_its_bits(http: httpx.Client, name: str) -> None:
    """A NaN of other bits is the same missing reading: its step is a retry."""
    at = f"/v1/models/policies/sessions/{name}/step"
    odd = msgspec.msgpack.encode({"inputs": {"u": 1.0, "v": NAN, "w": 2.0}, "seq": 1})
    odd = odd.replace(struct.pack(">d", NAN), bytes.fromhex("fff8246800000001"))
    first = answered(http.post(at, json={"inputs": {"u": 1, "w": 2}, "seq": 1}))
    assert answered(http.post(at, content=odd, headers=PACKED)) == first


# --- versions -------------------------------------------------------------------------------------------------------


def publish(models: Path, version: int, kind: str, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """A test model as a version of `m`, its manifest changed."""
    target = models / "m" / str(version)
    shutil.copytree(MODELS / kind / "1", target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest.update(name="m", version=version)
    change(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest))


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that comes by itself."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def turned(manifest: dict[str, Any]) -> None:
    """The same numbers, of which the first feature and output are called what the second were, and the other way."""
    for kind in ("features", "outputs"):
        first, second = manifest[kind][:2]
        first["name"], second["name"] = second["name"], first["name"]


def test_a_session_is_stepped_by_the_names_of_its_own_version(tmp_path: Path) -> None:
    """Version 2 has the names of u and v the other way round: a session of version 1 keeps to those of version 1."""
    publish(tmp_path, 1, "lstm")
    record = {"u": 1.0, "v": 2.0, "w": 3.0}
    with (
        running(store="memory://", models=tmp_path, repository_poll_s=0.05) as server,
        httpx.Client(base_url=server.url, timeout=20) as http,
    ):
        at = "/v1/models/m/sessions"
        for session in ("old", "old-socket", "old-batch", "plain"):
            answered(http.post(f"{at}/{session}/step", json={"inputs": record}))
        publish(tmp_path, 2, "lstm", turned)
        until(lambda: http.get("/v1/models/m").json()["version"] == 2)
        plain = answered(http.post(f"{at}/plain/step", json={"inputs": [1, 2, 3]}))
        old = answered(http.post(f"{at}/old/step", json={"inputs": record}))
        assert (plain["version"], old["version"]) == (1, 1)
        assert old["outputs"] == dict(zip("uv", plain["outputs"], strict=True))
        columns = {key: [value] for key, value in record.items()}
        both = answered(http.post(f"{at}/old/step", json={"inputs": columns}))["outputs"]
        assert list(both) == ["u", "v"]
        fresh = answered(http.post(f"{at}/new/step", json={"inputs": record}))
        same = answered(http.post(f"{at}/new-plain/step", json={"inputs": [2, 1, 3]}))
        assert fresh["version"] == 2
        assert fresh["outputs"] == dict(zip("vu", same["outputs"], strict=True))
        with closing(WebSocketDoor(server.url, "m", packed=False)) as socket:
            assert socket.call("step", "old-socket", inputs=record)["outputs"] == old["outputs"]
            assert socket.call("step", "new-socket", inputs=record)["outputs"] == fresh["outputs"]
        batch = {"sessions": ["old-batch", "new-batch"], "inputs": {k: [v, v] for k, v in record.items()}}
        many = answered(http.post("/v1/models/m/step", json=batch))
        assert "whose names are others than version 2's. Send the step alone." in many["errors"]["0"]["detail"]
        assert many["outputs"] == {k: [None, v] for k, v in fresh["outputs"].items()}
        assert http.get(f"{at}/old-batch").json()["step"] == 1
        known = {"steps": 1, "inputs": {"u": [1.0], "v": [2.0], "w": [3.0]}}
        free = answered(http.post(f"{at}/old-batch/rollout", json=known))
        assert free["outputs"] == {key: [[value]] for key, value in old["outputs"].items()}


def test_an_answer_whose_version_is_gone_says_that_it_has_no_names(tmp_path: Path) -> None:
    """A kept answer of three classes, in a session that was moved to a version of two outputs."""
    publish(tmp_path, 1, "rnn_loss_classes")
    publish(tmp_path, 2, "lstm")
    record = {"u": 1.0, "v": 2.0, "w": 3.0}
    with (
        running(store="memory://", models=tmp_path, version_policy="reset") as server,
        httpx.Client(base_url=server.url, timeout=20) as http,
    ):
        at = "/v1/models/m/sessions/a"
        assert http.post("/v1/models/m/sessions", json={"session": "a", "version": 1}).status_code == 201
        first = answered(http.post(f"{at}/step", json={"inputs": record, "seq": 1}))
        assert list(first["outputs"]) == ["class", "probabilities"]
        assert http.delete("/v1/models/m/versions/1?force=true").status_code == 200
        second = answered(http.post(f"{at}/step", json={"inputs": record, "seq": 2}))
        assert (second["version"], list(second["outputs"])) == (2, ["u", "v"])
        problem = refused(http.post(f"{at}/step", json={"inputs": record, "seq": 1}), 409, StateVersionMismatch.code)
        assert problem["detail"] == (
            "step 1 was made, but its outputs have no names here: version 2 of model 'm' has 2 outputs, the answer "
            "3. Send seq 1 again with inputs by position."
        )
        with closing(WebSocketDoor(server.url, "m", packed=False)) as socket:
            with pytest.raises(StateVersionMismatch):
                socket.call("step", "a", inputs=record, seq=1)
            assert socket.call("step", "a", inputs=record, seq=2)["outputs"] == second["outputs"]
        kept = answered(http.post(f"{at}/step", json={"inputs": [1, 2, 3], "seq": 1}))
        assert kept["outputs"] == list(first["outputs"]["probabilities"].values())


def test_a_version_that_is_loaded_again_changed_answers_by_its_names(tmp_path: Path) -> None:
    """Retired, replaced by one whose names are the other way round, loaded: the number alone says nothing."""
    publish(tmp_path, 1, "lstm")
    record = {"u": 1.0, "v": 2.0, "w": 3.0}
    with (
        running(store="memory://", models=tmp_path, repository_poll_s=0) as server,
        httpx.Client(base_url=server.url, timeout=20) as http,
    ):
        version, at = "/v1/models/m/versions/1", "/v1/models/m/sessions"
        assert list(answered(http.post(f"{at}/a/step", json={"inputs": record}))["outputs"]) == ["u", "v"]
        assert http.delete(f"{version}?force=true").status_code == 200
        shutil.rmtree(tmp_path / "m")
        publish(tmp_path, 1, "lstm", turned)
        assert http.post(f"{version}/load").status_code == 200
        named = answered(http.post(f"{at}/b/step", json={"inputs": record}))["outputs"]
        plain = answered(http.post(f"{at}/c/step", json={"inputs": [2, 1, 3]}))["outputs"]
        assert named == dict(zip("vu", plain, strict=True))
