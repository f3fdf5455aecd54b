"""What /asyncapi.json says is what the socket does."""

import gzip
import json
from contextlib import ExitStack
from typing import Any

import httpx
import jsonschema
import pytest
from serving import ROOT, running
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from service.doors.http.asyncapi import CLOSE_CODES, document
from service.doors.websocket.conversation import FRAME_TYPES
from stepcast.errors import every_error

pytestmark = pytest.mark.service

DOCUMENT = document("1", guarded=False)
MESSAGES = DOCUMENT["components"]["messages"]
SCRIPT: list[dict[str, Any]] = [
    {"op": "create", "examples": 1},
    {},  # the example of a step
    {"op": "info"},
    {"op": "checkpoint", "name": "k"},
    {"op": "checkpoints"},
    {"op": "state.get"},
    {"op": "state.get", "layer": "lstm_0"},
    {"op": "state.set", "layer": "lstm_0", "state": {"h": [[0.0] * 128], "c": [[0.0] * 128]}},
    {"op": "fork"},
    {"op": "rollout", "steps": 1, "inputs": [[*[None] * 10, 0.71, 0.71, 0.98]]},
    {"op": "rewind", "to": "k"},
    {"op": "clear"},
    {"op": "end"},
    {"op": "marker"},
]


def title(op: str, what: str) -> str:
    return "".join(part.capitalize() for part in op.split(".")) + what


def schema(name: str) -> jsonschema.Draft202012Validator:
    """The validator of a message's payload."""
    return jsonschema.Draft202012Validator({**MESSAGES[name]["payload"], "components": DOCUMENT["components"]})


def test_the_document_is_valid_asyncapi() -> None:
    """By the specification's own JSON schema; every reference leads somewhere."""
    with gzip.open(ROOT / "tests" / "data" / "asyncapi-3.0.0.schema.json.gz") as file:
        jsonschema.Draft7Validator(json.load(file)).validate(DOCUMENT)
    for reference in {part.split('"')[0] for part in json.dumps(DOCUMENT).split('"$ref": "#/')[1:]}:
        found = DOCUMENT
        for key in reference.split("/"):
            found = found[key]


def test_the_document_names_what_there_is() -> None:
    """Every operation on both addresses, every error's code, every close code."""
    assert {name for name in DOCUMENT["operations"]} == {
        f"{at}.{op}" for at in ("session", "model") for op in FRAME_TYPES
    }
    (_, extra) = DOCUMENT["components"]["schemas"]["Refused"]["properties"]["error"]["allOf"]
    assert set(extra["properties"]["code"]["enum"]) == {error.code for error in every_error()}
    page = (ROOT / "docs" / "protocol.md").read_text().split("### Handshake and close codes")[1].split("## ")[0]
    assert [code for code in CLOSE_CODES if f"| {code} |" not in page] == []
    assert all(f"| {code} |" in DOCUMENT["info"]["description"] for code in CLOSE_CODES)


def test_frames_and_answers_are_as_described() -> None:
    """Each operation once, by the document's address and example: frame and answer fit their schemas."""
    assert {frame.get("op", "step") for frame in SCRIPT} == set(FRAME_TYPES)
    (example,) = MESSAGES["StepFrame"]["examples"]
    with running(store="memory://", models=ROOT / "models") as server:
        channel = DOCUMENT["channels"]["session"]
        address = channel["address"].format(**{name: p["examples"][0] for name, p in channel["parameters"].items()})
        with connect(f"ws{server.url.removeprefix('http')}{address}") as socket:
            for number, sent in enumerate(SCRIPT):
                op = sent.get("op", "step")
                frame = {**(example["payload"] if op == "step" else sent), "id": number}
                schema(title(op, "Frame")).validate(frame)
                socket.send(json.dumps(frame))
                answer = json.loads(socket.recv(timeout=20))
                assert "error" not in answer, answer
                assert answer["id"] == number
                schema(title(op, "Answer")).validate(answer)
            socket.send(json.dumps({"id": "wrong", "inputs": [1.0]}))
            refusal = json.loads(socket.recv(timeout=20))
            schema("Refused").validate(refusal)
            assert not schema("StepAnswer").is_valid(refusal)


def test_frames_that_the_document_does_not_allow_are_refused() -> None:
    """Unknown fields, missing ones, wrong types: the schema says no, and so does the server."""
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("step", {"op": "step"}),
        ("step", {"inputs": [1.0], "seq": 0}),
        ("step", {"inputs": [1.0], "sequence": 1}),
        ("create", {"op": "create", "examples": "many"}),
        ("rewind", {"op": "rewind"}),
        ("rollout", {"op": "rollout", "steps": 0}),
        ("end", {"op": "end", "now": True}),
    ]
    with (
        running(store="memory://") as server,
        connect(f"ws{server.url.removeprefix('http')}/v1/models/lstm/sessions/s/stream") as socket,
    ):
        for op, frame in wrong:
            assert not schema(title(op, "Frame")).is_valid(frame), frame
            socket.send(json.dumps(frame))
            assert json.loads(socket.recv(timeout=20))["error"]["code"] == "invalid_request"


def closed_with(socket: ClientConnection) -> int | None:
    """The code that the server closes a socket with."""
    with pytest.raises(ConnectionClosed) as closed:
        socket.recv(timeout=20)
    return closed.value.rcvd.code if closed.value.rcvd else None


def test_close_codes_are_those_of_the_document() -> None:
    """A text that is none, and a server that stops."""
    with ExitStack() as sockets:
        with running(store="memory://") as server:
            at = f"ws{server.url.removeprefix('http')}/v1/models/lstm/stream"
            wrong, waiting = (sockets.enter_context(connect(at)) for _ in range(2))
            wrong.send(b"\xff", text=True)
            assert closed_with(wrong) == 1007
        assert closed_with(waiting) == 1012
    assert {1007, 1012} <= set(CLOSE_CODES)


def test_the_server_gives_this_document(http: httpx.Client) -> None:
    """/asyncapi.json is the document that is tested here, but for its version."""
    given = http.get("/asyncapi.json").json()
    assert {**given, "info": {**given["info"], "version": "1"}} == json.loads(json.dumps(DOCUMENT))
    assert given["info"]["version"] == http.get("/openapi.json").json()["info"]["version"]
