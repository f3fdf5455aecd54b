"""Inputs that are no past readings: moments, categories, what is static or known, by name through every door."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from random import Random
from typing import Any

import httpx
import msgspec
import numpy as np
import pandas as pd
import pytest
from doors import WebSocketDoor
from serving import MODELS, ROOT, Running, running

from service.doors.bodies import JSON
from service.doors.names import Names as NamesOf
from service.doors.steps import Reader
from service.engine.repository import Repository
from stepcast.__main__ import main
from stepcast.calendars import Calendar, describe
from stepcast.client import Client
from stepcast.errors import ConfigError, InvalidRequest, ShapeMismatch, StepcastError
from stepcast.features import FeatureNames
from stepcast.inputs import form
from stepcast.manifest import CalendarChannel, Manifest, read_manifest

pytestmark = pytest.mark.service

NAN = float("nan")
MSGPACK = "application/msgpack"
MANIFEST = read_manifest(MODELS / "covariates" / "1")  # station, u, price, hour_sin, hour_cos, week_sin
AT = "2026-03-08T07:30:00Z"  # a Sunday, 3:30 in New York: half an hour after summer time began


def calendar_at(moment: str) -> list[float]:
    """The calendar features of the test model, by arithmetic on clocks that are read by hand."""
    hour, days = {"2026-03-08T07:30:00Z": (3.5, 6 + 7.5 / 24), "2026-03-08T06:30:00Z": (1.5, 6 + 6.5 / 24)}[moment]
    return [np.sin(2 * np.pi * hour / 24), np.cos(2 * np.pi * hour / 24), np.sin(2 * np.pi * days / 7)]


@pytest.fixture
def name() -> str:
    """A session id that no other test has."""
    return f"c-{Random().getrandbits(48):012x}"


@pytest.fixture(scope="module")
def http(memory_server: Running) -> Iterator[httpx.Client]:
    """The test model over HTTP."""
    with httpx.Client(base_url=f"{memory_server.url}/v1/models/covariates", timeout=20) as client:
        yield client


def answered(response: httpx.Response) -> dict[str, Any]:
    """A good answer."""
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


# --- the calendar ---------------------------------------------------------------------------------------------------


def channel(of: str, wave: str | None = "sin", zone: str = "UTC", **more: Any) -> CalendarChannel:
    """A channel of a calendar."""
    return CalendarChannel.model_validate({"of": of, "wave": wave, "zone": zone, **more})


def seconds(moment: str) -> float:
    """Unix time."""
    return datetime.fromisoformat(moment).timestamp()


@pytest.mark.parametrize(
    ("of", "zone", "moment", "part"),
    [
        ("hour", "UTC", "1970-01-01T03:00:00Z", 1 / 8),
        ("hour", "UTC", "2013-07-01T06:30:36Z", (6.5 + 0.01) / 24),
        ("hour", "America/New_York", "2013-03-10T06:59:00Z", (1 + 59 / 60) / 24),  # a minute later it is 3:00
        ("hour", "America/New_York", "2013-03-10T07:00:00Z", 3 / 24),
        ("hour", "America/New_York", "2013-11-03T05:30:00Z", 1.5 / 24),  # 1:30 comes twice
        ("hour", "America/New_York", "2013-11-03T06:30:00Z", 1.5 / 24),
        ("hour", "Asia/Kathmandu", "2013-11-03T00:00:00Z", 5.75 / 24),
        ("week", "UTC", "2026-03-09T00:00:00Z", 0.0),  # a Monday
        ("week", "Pacific/Auckland", "2026-03-08T11:00:00Z", 0.0),  # whose Monday begins so early
        ("week", "UTC", "2026-03-08T12:00:00Z", 6.5 / 7),
        ("year", "UTC", "2024-12-31T12:00:00Z", 365.5 / 365.25),
        ("season", "UTC", "2026-12-22T00:00:00Z", 365 / 365.25),
    ],
)
def test_a_channel_is_where_a_wall_clock_stands(of: str, zone: str, moment: str, part: float) -> None:
    """In the day, the week and the year of its zone, on the days when clocks change, too."""
    both = Calendar([(channel(of, wave, zone), 0.0) for wave in ("sin", "cos")])
    angle = 2 * np.pi * part
    assert both.row(seconds(moment)) == pytest.approx([np.sin(angle), np.cos(angle)], abs=1e-12)
    assert Calendar([(channel(of, "cos", zone), 3600.0)]).row(seconds(moment) - 3600) == both.row(seconds(moment))[1:]
    assert zone in describe(channel(of, "cos", zone))


def test_holidays_are_those_of_a_part_of_a_country_by_its_own_clock() -> None:
    """Independence Day begins in New York at 4:00 UTC; Epiphany is one in Bavaria only."""
    july = channel("holiday", None, "America/New_York", country="US")
    moments = ["2024-07-04T03:59:59Z", "2024-07-04T04:00:00Z", "2024-07-05T03:59:59Z", "2024-07-05T04:00:00Z"]
    assert [Calendar([(july, 0.0)]).row(seconds(moment)) for moment in moments] == [[0.0], [1.0], [1.0], [0.0]]
    day = channel("holiday", None, country="DE", subdivision="BY"), channel("holiday", None, country="DE")
    assert Calendar([(one, 0.0) for one in day]).row(seconds("2031-01-06T12:00:00Z")) == [1.0, 0.0]
    assert describe(day[0]) == "1 on a public holiday of DE-BY, by UTC"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"of": "hour", "wave": "sin", "zone": "Europe/Atlantis"}, "time zone 'Europe/Atlantis' is not known here"),
        ({"of": "hour", "wave": "sin", "zone": "../etc"}, "time zone '../etc' is not known here"),
        ({"of": "holiday", "country": "XX"}, "Country XX not available. Write ISO 3166 codes"),
        ({"of": "holiday", "country": "DE", "subdivision": "QQ"}, "subdivision QQ. Write ISO 3166 codes"),
    ],
)
def test_a_calendar_that_nobody_knows_is_refused(given: dict[str, Any], told: str) -> None:
    """When it is made."""
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        Calendar([(CalendarChannel.model_validate(given), 0.0)])


# --- moments by name ------------------------------------------------------------------------------------------------

NAMES = FeatureNames(MANIFEST)
NEW_YORK = calendar_at(AT)


@pytest.mark.parametrize(
    "moment",
    [
        AT,
        "2026-03-08T03:30:00-04:00",
        "20260308T073000Z",
        seconds(AT),
        int(seconds(AT)),
        datetime(2026, 3, 8, 7, 30, tzinfo=UTC),
        datetime(2026, 3, 8, 8, 30, tzinfo=timezone(timedelta(hours=1))),
        pd.Timestamp(AT),
        np.datetime64("2026-03-08T07:30"),
        np.float64(seconds(AT)),
    ],
)
def test_a_moment_may_be_written_in_many_ways(moment: Any) -> None:
    """Text with an offset, Unix seconds, datetimes that know their zone; numpy's are UTC."""
    x = NAMES.array({"station": "7", "u": 1.0, "time": moment})
    np.testing.assert_array_equal(x, np.float32([3, 1, NAN, *NEW_YORK]))


def test_moments_of_rows_and_of_steps() -> None:
    """One per row, one for all rows, or the first of steps that follow at the model's distance, or at another."""
    before = calendar_at("2026-03-08T06:30:00Z")
    rows = NAMES.array({"u": [1, 2], "time": ["2026-03-08T06:30:00Z", AT]})
    np.testing.assert_array_equal(rows[:, 3:], np.float32([before, NEW_YORK]))
    np.testing.assert_array_equal(NAMES.array({"u": [1, 2], "time": AT})[:, 3:], np.float32([NEW_YORK] * 2))
    steps = np.float32([before, NEW_YORK])
    start, every = "2026-03-08T06:30:00Z", ("1h", 3600, "60min", "3600 s", None)
    times: list[Any] = [start, [[start, AT]], *({"start": start, "every": e} for e in every), {"start": start}]
    for time in times:
        np.testing.assert_array_equal(NAMES.array({"u": [[1, 2]], "time": time})[0, :, 3:], steps)
    np.testing.assert_array_equal(NAMES.array({"u": [1, 2], "time": start}, rows="steps")[:, 3:], steps)
    np.testing.assert_array_equal(NAMES.array({"time": {"start": start}}, future=2)[:, 3:], steps)
    np.testing.assert_array_equal(NAMES.array({"time": start}, future=2)[:, 3:], steps)
    np.testing.assert_array_equal(NAMES.array({"u": [[1, 2]] * 3, "time": start}, future=2)[2, :, 3:], steps)
    np.testing.assert_array_equal(NAMES.array([{"u": 1, "time": start}, {"time": AT}])[:, 3:], steps)
    fast = NAMES.array({"time": {"start": AT, "every": "30min"}}, future=49)
    np.testing.assert_array_equal(fast[0, 3:5], fast[48, 3:5])


@pytest.mark.parametrize(
    ("inputs", "error", "told"),
    [
        ({"time": "2026-03-08T07:30"}, InvalidRequest, "which has no time zone. Add Z, or an offset such as +01:00."),
        ({"time": "2026-03-08"}, InvalidRequest, "which has no time zone"),
        ({"time": "noon"}, InvalidRequest, "$.inputs.time is 'noon', want a moment: ISO 8601 such as"),
        ({"time": "2026-02-30T00:00:00Z"}, InvalidRequest, "want a moment"),
        ({"time": True}, InvalidRequest, "$.inputs.time is True, want a moment"),
        ({"time": None}, InvalidRequest, "$.inputs.time is None, want a moment"),
        ({"time": NAN}, InvalidRequest, "want a moment of the years 2 to 9998."),
        ({"time": 1.77e12}, InvalidRequest, "Unix time here is in seconds, not milliseconds."),
        ({"time": "0001-01-01T00:00:00+00:00"}, InvalidRequest, "want a moment of the years 2 to 9998."),
        ({"u": [1, 2], "time": [AT]}, ShapeMismatch, "$.inputs.time has shape [1], the other inputs [2]"),
        ({"u": [1, 2], "time": [AT, "x"]}, InvalidRequest, "$.inputs.time[1] is 'x'"),
        ({"u": [1, 2], "time": [[AT], [AT, AT]]}, InvalidRequest, "$.inputs.time[0] is ['2026"),
        ({"u": [1, 2], "time": {"start": AT}}, InvalidRequest, "has a start, but these inputs are of one step"),
        ({"u": [[1, 2]], "time": {}}, InvalidRequest, "has no fields, want 'start'"),
        ({"u": [[1, 2]], "time": {"start": AT, "evry": 1}}, InvalidRequest, "has 'start', 'evry', want 'start'"),
        ({"u": [[1, 2]], "time": {"start": AT, "every": "fast"}}, InvalidRequest, "$.inputs.time.every is 'fast'"),
        ({"u": [[1, 2]], "time": {"start": AT, "every": 0}}, InvalidRequest, "$.inputs.time.every is 0, want seconds"),
        ({"u": [[1, 2]], "time": {"start": AT, "every": 2.52e11}}, InvalidRequest, "end after the year 9998"),
        ({"time": AT, "hour_sin": 0, "week_sin": 0}, InvalidRequest, "follows from it: 'hour_sin', 'week_sin'. Leave"),
        (
            {"u": 1},
            InvalidRequest,
            "leaves out 'hour_sin', 'hour_cos', 'week_sin'; model 'covariates' needs them. Give",
        ),
        ({"tiem": AT}, InvalidRequest, "$.inputs names 'tiem'"),
        ({"time": AT, "station": 2.5}, InvalidRequest, "$.inputs.station has '2.5', want a category's text, or null"),
        ({"time": AT, "station": True}, InvalidRequest, "$.inputs.station has 'True', want a category's text"),
        ({"time": AT, "u": "fast"}, InvalidRequest, "$.inputs.u: want numbers"),
    ],
)
def test_wrong_moments_and_categories_are_told(inputs: Any, error: type[StepcastError], told: str) -> None:
    """Where they stand, what they are, what is wanted."""
    with pytest.raises(error) as caught:
        NAMES.array(inputs)
    assert told in str(caught.value)


def test_a_model_that_does_not_know_its_step_asks_for_the_distance() -> None:
    """One moment of several steps needs it."""
    names = FeatureNames(MANIFEST.model_copy(update={"every_s": None}))
    with pytest.raises(
        InvalidRequest, match=r'does not say how far apart they are\. Give {"start": ..., "every": "1h"}'
    ):
        names.array({"u": [[1, 2]], "time": AT})
    assert names.array({"u": [[1, 2]], "time": {"start": AT, "every": "1h"}}).shape == (1, 2, 6)


def test_categories_become_indices() -> None:
    """In columns, records and tables; unknown ones are 0, missing ones NaN, whole numbers the text of that number."""
    x = NAMES.array({"station": ["Brae", "Cape Wrath", "7", 7, 7.0, "brae", None, NAN], "time": AT})[:, 0]
    np.testing.assert_array_equal(x, np.float32([1, 2, 3, 3, 3, 0, NAN, NAN]))
    assert NAMES.array([{"station": "7", "time": AT}])[0, 0] == 3
    frame = pd.DataFrame({"station": ["7", "Brae"], "u": [1.0, None], "time": pd.to_datetime([AT, AT])})
    np.testing.assert_array_equal(form(frame).array(NAMES), NAMES.array(frame.to_dict("records")))
    frame["station"] = frame["station"].astype("category")
    np.testing.assert_array_equal(form(frame).array(NAMES)[:, :2], np.float32([[3, 1], [1, NAN]]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"features": [{"name": "a", "categories": ["x", "x"]}]}, "categories named twice: 'x'"),
        ({"features": [{"name": "a", "categories": ["x"], "width": 2}]}, "a feature of categories has width 1"),
        ({"features": [{"name": "a", "embedding": 2}]}, "embedding belongs to categories"),
        ({"features": [{"name": "a", "calendar": {"of": "hour"}}]}, "everything else a wave"),
        (
            {"features": [{"name": "a", "calendar": {"of": "hour", "wave": "sin"}}, {"name": "time"}]},
            "Rename the feature",
        ),
        ({"features": [{"name": "a", "calendar": {"of": "hour", "wave": "sin"}, "ahead": 1}]}, "which needs every_s"),
    ],
)
def test_a_manifest_says_what_can_be(change: dict[str, Any], told: str) -> None:
    """What contradicts itself is no manifest."""
    given = {"name": "m", "version": 1, "outputs": [{"name": "y"}], "task": "regression", "sha256": "0" * 64}
    with pytest.raises(ValueError, match=told):
        Manifest.model_validate({**given, **change})


# --- every door -----------------------------------------------------------------------------------------------------


def positional(*rows: tuple[float, float, float]) -> list[list[float | None]]:
    """Rows (F) at AT, of station, u and price."""
    return [[None if value != value else value for value in (*row, *np.float32(NEW_YORK).tolist())] for row in rows]


BY_TIME = {"station": "Cape Wrath", "u": 0.5, "price": 2.0, "time": AT}
Sender = Callable[[httpx.Client, str, Any, int], list[float]]


def send_http(http: httpx.Client, session: str, inputs: Any, seq: int) -> list[float]:
    body = {"inputs": inputs, "seq": seq}
    return said(answered(http.post(f"/sessions/{session}/step", json=body)))


def send_msgpack(http: httpx.Client, session: str, inputs: Any, seq: int) -> list[float]:
    body, kind = msgspec.msgpack.encode({"inputs": inputs, "seq": seq}), {"content-type": MSGPACK}
    headers = {**kind, "accept": "application/json"}
    return said(answered(http.post(f"/sessions/{session}/step", content=body, headers=headers)))


def send_batch(http: httpx.Client, session: str, inputs: Any, seq: int) -> list[float]:
    body = {"sessions": [session], "inputs": [inputs], "seq": [seq]}
    answer = answered(http.post("/step", json=body))
    assert answer["errors"] == {}
    return said({"outputs": answer["outputs"][0]})


def send_columns(http: httpx.Client, session: str, inputs: Any, seq: int) -> list[float]:
    columns = {name: [value] for name, value in inputs.items()} if isinstance(inputs, dict) else [inputs]
    body = {"sessions": [session], "inputs": columns, "seq": [seq]}
    return said(answered(http.post("/step", json=body)))


def send_socket(http: httpx.Client, session: str, inputs: Any, seq: int, packed: bool = False) -> list[float]:
    with closing(WebSocketDoor(server_of(http), "covariates", packed)) as socket:
        return said(socket.call("step", session, inputs=inputs, seq=seq))


def send_packed_socket(http: httpx.Client, session: str, inputs: Any, seq: int) -> list[float]:
    return send_socket(http, session, inputs, seq, packed=True)


def send_sdk(http: httpx.Client, session: str, inputs: Any, seq: int) -> list[float]:
    with Client(server_of(http)) as client:
        asked = client.session("covariates", session)
        asked.calls._step = seq - 1  # what a client believes that lost the answer
        return said({"outputs": asked.step(inputs).outputs})


def server_of(http: httpx.Client) -> str:
    return str(http.base_url).partition("/v1/")[0]


def said(answer: dict[str, Any]) -> list[float]:
    """The two outputs of one example, in whatever form, as float32."""
    outputs = answer["outputs"]
    if isinstance(outputs, bytes):
        return np.frombuffer(outputs, "<f4").tolist()
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [
        float(np.float32(np.ravel(value)[0])) for value in (np.ravel(values) if isinstance(values, list) else values)
    ]


SENDERS = [send_http, send_msgpack, send_batch, send_columns, send_socket, send_packed_socket, send_sdk]


@pytest.mark.parametrize("first", SENDERS, ids=lambda sender: sender.__name__)
def test_a_step_by_its_moment_is_the_step_by_position(http: httpx.Client, name: str, first: Sender) -> None:
    """Bit for bit, and each is the other's retry through every door; another moment, or station, is another payload."""
    (row,) = positional((2, 0.5, 2.0))
    wanted = send_http(http, f"{name}-plain", row, 1)
    assert first(http, name, BY_TIME, 1) == wanted
    again = {**BY_TIME, "time": seconds(AT)}
    for sender in SENDERS:
        assert sender(http, name, BY_TIME, 1) == wanted, sender
        if sender is not send_sdk and sender is not send_columns:
            assert sender(http, name, row, 1) == wanted, sender
    assert first(http, name, again, 1) == wanted
    at = f"/sessions/{name}/step"
    for change in ({"time": "2026-03-08T08:30:00Z"}, {"station": "Brae"}, {"station": "brae"}):
        response = http.post(at, json={"inputs": {**BY_TIME, **change}, "seq": 1})
        assert (response.status_code, response.json()["code"]) == (409, "step_conflict")
    assert http.get(at.removesuffix("/step")).json()["step"] == 1


def test_a_step_by_its_moment_is_taken_apart_in_one_go() -> None:
    """As a body and as a frame, in JSON and msgpack: what is wrong, or of several rows, goes the general way."""
    repository = Repository(MODELS, device="cpu", threads=1)
    repository.scan()
    reader = Reader(repository.live("covariates"), 1024, NamesOf(repository, "covariates"), renamed=False)
    encoders = {JSON: msgspec.json.encode, MSGPACK: msgspec.msgpack.encode}
    for inputs in (
        BY_TIME,
        {"time": seconds(AT)},
        {"time": AT, "station": None, "u": None},
        {"time": int(seconds(AT)), "station": 7, "price": 3},
        {"time": AT, "station": "no such place"},
    ):
        wanted = NAMES.array(inputs).tobytes()
        for kind, encode in encoders.items():
            read = reader.read(encode({"inputs": inputs, "seq": 3}), kind, reader.bodies)
            framed = reader.read(encode({"inputs": inputs, "seq": 3, "id": 1, "session": "a"}), kind, reader.frames)
            assert read is not None
            assert framed is not None
            assert (read[0].seq, framed[0].session) == (3, "a")
            assert read[1] == framed[1] == wanted
    wrong: list[Any] = [
        {**BY_TIME, key: value} for key, value in (("time", "noon"), ("w", 1.0), ("u", "x"), ("station", 1.5))
    ]
    wrong += [{"u": 1.0}, {**BY_TIME, "u": [1.0]}, {**BY_TIME, "u": 1e39}, {**BY_TIME, "hour_sin": 0.0}, [BY_TIME]]
    for inputs in wrong:
        for kind, encode in encoders.items():
            assert reader.read(encode({"inputs": inputs}), kind, reader.bodies) is None, inputs
    for value in (NAN, float("inf")):
        assert reader.read(encoders[MSGPACK]({"inputs": {**BY_TIME, "u": value}}), MSGPACK, reader.bodies) is None
    plain = encoders[JSON]({"inputs": positional((2, 0.5, 2.0))[0]})
    assert reader.read(plain, JSON, reader.bodies) is not None


def test_a_static_feature_is_sent_once(http: httpx.Client, name: str) -> None:
    """What holds its last reading holds the station, too: across steps, forks and rollouts; another one is another."""
    steps = [{"u": 0.1 * t, "price": 1.0, "time": seconds(AT) + 3600 * t} for t in range(4)]
    made = {}
    for told, station in (("each", "7"), ("once", "7"), ("other", "Brae"), ("unknown", "9"), ("never", None)):
        at = f"/sessions/{name}-{told}"
        for t, step in enumerate(steps):
            given = {"station": station} if told == "each" or (t == 0 and station) else {}
            answered(http.post(f"{at}/step", json={"inputs": {**step, **given}}))
        known = {"price": [2.0, 3.0], "time": seconds(AT) + 4 * 3600}
        made[told] = answered(http.post(f"{at}/rollout", json={"steps": 2, "inputs": known}))["outputs"]
    assert made["each"] == made["once"]
    assert made["unknown"] == made["never"]
    assert made["other"] != made["each"] != made["never"] != made["other"]


@pytest.mark.parametrize("door", ["http", "socket", "packed"])
def test_a_rollout_by_its_start_is_that_by_position(http: httpx.Client, name: str, door: str) -> None:
    """A day at the model's distance, and at another; a committed one's retry may come by position."""
    send_http(http, name, BY_TIME, 1)
    moments = seconds(AT) + 3600 * np.arange(1, 25)
    x = np.full((24, 6), NAN, np.float32)
    x[:, 2] = prices = np.linspace(0, 3, 24).tolist()
    x[:, 3:] = Calendar.of(MANIFEST).columns(moments)
    plain = [[None if value != value else value for value in row] for row in x.tolist()]
    with closing(WebSocketDoor(server_of(http), "covariates", door == "packed")) as socket:

        def ask(**fields: Any) -> Any:
            if door == "http":
                return answered(http.post(f"/sessions/{name}/rollout", json={"steps": 24, **fields}))["outputs"]
            return socket.call("rollout", name, steps=24, **fields)["outputs"]

        def columns(outputs: Any) -> np.ndarray[Any, Any]:
            if isinstance(outputs, bytes):
                return np.frombuffer(outputs, "<f4").reshape(24, 2)
            if isinstance(outputs, dict):
                values = [np.frombuffer(v, "<f4") if isinstance(v, bytes) else v for v in outputs.values()]
                return np.stack([np.ravel(value) for value in values], axis=-1).astype(np.float32)
            return np.array(outputs, np.float32)[0]

        wanted = columns(ask(inputs=plain))
        first = datetime.fromtimestamp(moments[0], UTC).isoformat()
        for time in (first, {"start": first}, {"start": float(moments[0]), "every": "60min"}, moments.tolist()):
            np.testing.assert_array_equal(columns(ask(inputs={"price": prices, "time": time})), wanted)
        slow = columns(ask(inputs={"price": prices, "time": {"start": first, "every": "1D"}}))
        assert not np.array_equal(slow, wanted)
        kept = columns(ask(inputs={"price": prices, "time": first}, commit=True, seq=25))
        np.testing.assert_array_equal(columns(ask(inputs=plain, commit=True, seq=25)), kept)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"inputs": {"time": AT}}, "is given what is known of its steps: $.inputs lack 'price'"),
        ({}, "is given what is known of its steps: $.inputs lack 'price'"),
        (
            {"inputs": {"price": [1.0, 2.0]}},
            "'hour_sin' has a missing reading; this model was not trained with any. Give",
        ),
        ({"inputs": {"price": [1.0, 2.0], "time": [AT]}}, "$.inputs.time has shape [1], the other inputs [2]"),
        ({"inputs": {"price": [1.0, 2.0], "time": "soon"}}, "$.inputs.time is 'soon', want a moment"),
        ({"inputs": {"price": [1.0], "time": AT}}, "$.inputs has shape [1, 6], want [2, 6]"),
    ],
)
def test_a_rollout_says_what_it_lacks(http: httpx.Client, name: str, fields: dict[str, Any], told: str) -> None:
    """What is known of the future, and the moment; a gap in a known series is a gap."""
    at = f"/sessions/{name}"
    answered(http.post(f"{at}/step", json={"inputs": BY_TIME}))
    problem = http.post(f"{at}/rollout", json={"steps": 2, **fields})
    assert (problem.status_code, told in problem.json()["detail"]) == (422, True), problem.text
    answered(http.post(f"{at}/rollout", json={"steps": 2, "inputs": {"price": [1.0, None], "time": AT}}))


def test_predict_takes_the_moment_of_the_first_step(http: httpx.Client) -> None:
    """[T] of one sequence, [B,T] of many, records with a moment each."""
    times = [AT, "2026-03-08T08:30:00Z"]
    records = [{"station": "7", "u": 1.0, "price": 2.0, "time": time} for time in times]
    columns = {"station": ["7", "7"], "u": [1.0, 1.0], "price": 2.0}
    wanted = answered(http.post("/predict", json={"inputs": records}))["outputs"]
    wanted = {key: [record[key] for record in wanted] for key in "uv"}
    for time in (AT, times, {"start": AT}):
        assert answered(http.post("/predict", json={"inputs": {**columns, "time": time}}))["outputs"] == wanted
    many = {"station": "7", "u": [[1.0, 1.0]] * 2, "price": 2.0, "time": AT}
    assert answered(http.post("/predict", json={"inputs": many}))["outputs"] == {k: [v, v] for k, v in wanted.items()}


def test_the_wire_says_where_a_packed_moment_or_category_is_wrong(http: httpx.Client, name: str) -> None:
    """float32 holds no moment; msgpack's own timestamps do."""
    at = f"/sessions/{name}/step"
    headers = {"content-type": MSGPACK, "accept": "application/json"}
    for wrong in ({"time": np.float32([1]).tobytes()}, {"station": np.float32([1]).tobytes()}):
        body = msgspec.msgpack.encode({"inputs": {**BY_TIME, **wrong}})
        problem = http.post(at, content=body, headers=headers)
        assert "is a bin of float32, want text" in problem.json()["detail"], problem.text
    body = msgspec.msgpack.encode({"inputs": {**BY_TIME, "time": datetime(2026, 3, 8, 7, 30, tzinfo=UTC)}, "seq": 1})
    first = answered(http.post(at, content=body, headers=headers))
    assert answered(http.post(at, json={"inputs": BY_TIME, "seq": 1})) == first


# --- versions, and what a server needs ------------------------------------------------------------------------------


def publish(models: Path, version: int, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """The test model as a version of `m`, its manifest changed."""
    target = models / "m" / str(version)
    shutil.copytree(MODELS / "covariates" / "1", target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest.update(name="m", version=version)
    change(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest))


def test_a_session_is_read_by_the_categories_and_the_zone_of_its_own_version(tmp_path: Path) -> None:
    """Version 2 counts the stations in another order, and reads the hour off another clock."""

    def changed(manifest: dict[str, Any]) -> None:
        station, _, _, hour, *_ = manifest["features"]
        station["categories"].reverse()
        hour["calendar"]["zone"] = "Asia/Tokyo"

    publish(tmp_path, 1)
    publish(tmp_path, 2, changed)
    with (
        running(store="memory://", models=tmp_path) as server,
        httpx.Client(base_url=f"{server.url}/v1/models/m/sessions", timeout=20) as http,
    ):
        made = {}
        for version in (1, 2):
            assert http.post("", json={"session": f"v{version}", "version": version}).status_code == 201
            answer = answered(http.post(f"/v{version}/step", json={"inputs": BY_TIME}))
            assert answer["version"] == version
            names = FeatureNames(read_manifest(tmp_path / "m" / str(version)))
            x = [None if value != value else value for value in names.array(BY_TIME).tolist()]
            assert http.post("", json={"session": f"p{version}", "version": version}).status_code == 201
            assert said(answered(http.post(f"/p{version}/step", json={"inputs": x}))) == said(answer)
            made[version] = said(answer)
        assert made[1] != made[2]


@pytest.mark.parametrize(
    ("calendar", "told"),
    [
        ({"of": "hour", "wave": "sin", "zone": "Europe/Atlantis"}, "time zone 'Europe/Atlantis' is not known here"),
        ({"of": "holiday", "country": "US"}, "'holidays' is not installed. pip install \"stepcast[calendar]\""),
    ],
)
def test_a_version_whose_calendar_is_not_known_here_is_not_served(
    calendar: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason names the model, and what to install; versions beside it are served."""

    def changed(manifest: dict[str, Any]) -> None:
        manifest["features"][3]["calendar"] = calendar

    publish(tmp_path, 1)
    publish(tmp_path, 2, changed)
    monkeypatch.setitem(sys.modules, "holidays", None)
    repository = Repository(tmp_path, device="cpu", threads=1)
    assert [served.version for served in repository.scan()] == [1]
    ((_, _, reason),) = repository.failed()
    assert reason.startswith("the calendar of model 'm': ")
    assert told in reason


# --- the command ----------------------------------------------------------------------------------------------------


def test_commands_take_moments_and_categories(
    http: httpx.Client, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with time=..., a rollout with --start and --every; each is what HTTP answers."""
    monkeypatch.setenv("STEPCAST_URL", server_of(http))
    words = [f"{key}={value}" for key, value in BY_TIME.items()]
    assert main(["step", "covariates", name, *words]) == 0
    assert main(["step", "covariates", f"{name}-unix", *words[:-1], f"time={seconds(AT):.0f}"]) == 0
    first, second = (json.loads(line)["outputs"] for line in capsys.readouterr().out.splitlines())
    assert first == second
    assert list(first.values()) == pytest.approx(send_http(http, f"{name}-http", BY_TIME, 1), rel=1e-6)
    prices = json.dumps({"price": [1.0, 2.0]})
    asked = ["rollout", "covariates", name, "2", "--known", prices, "--start", "2026-03-08T08:30:00Z"]
    assert main(asked) == 0
    assert main([*asked, "--every", "2h"]) == 0
    rows = [json.loads(line)["outputs"]["u"] for line in capsys.readouterr().out.splitlines()]
    for every, got in (("1h", rows[:2]), ("2h", rows[2:])):
        time = {"start": "2026-03-08T08:30:00Z", "every": every}
        body = {"steps": 2, "inputs": {"price": [1.0, 2.0], "time": time}}
        assert answered(http.post(f"/sessions/{name}/rollout", json=body))["outputs"]["u"][0] == pytest.approx(
            got, rel=1e-6
        )
    for wrong, told in (
        (["--every", "1h"], "Give --start."),
        (["--known", "[[1]]", "--start", AT], "--known is an array"),
        (["--start", "soon"], "$.inputs.time.start is 'soon'"),
    ):
        assert main(["rollout", "covariates", name, "2", *wrong]) == 1
        assert told in capsys.readouterr().err


def test_the_committed_weather_model_runs_a_day_from_its_start(tmp_path: Path) -> None:
    """Its calendar is by UTC: a rollout by its start equals the one by sines of the hour."""
    names = FeatureNames(read_manifest(ROOT / "models" / "weather" / "1"))
    start = datetime(2013, 11, 2, 3, tzinfo=UTC)
    x = names.array({"time": start.isoformat()}, future=24)
    hours = 3 + np.arange(24)
    np.testing.assert_allclose(x[:, -3], np.sin(2 * np.pi * hours / 24), atol=1e-7)
    np.testing.assert_allclose(x[:, -2], np.cos(2 * np.pi * hours / 24), atol=1e-7)
    days = 306 + 9 + hours / 24  # 2 November is day 306
    np.testing.assert_allclose(x[:, -1], np.cos(2 * np.pi * days / 365.25), atol=1e-7)
