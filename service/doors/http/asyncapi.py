"""The AsyncAPI document of the WebSocket, made of the structs that its frames are read as and of HTTP's answers."""

from typing import Any, Final

from websockets.frames import CloseCode

from stepcast.errors import every_error
from stepcast.protocol import MARKER, STEP

from ..bodies import ID_PATTERN, JSON, MSGPACK, READINGS
from ..websocket.conversation import FRAME_TYPES
from . import examples
from .openapi import ANSWERS, PROBLEM_DOCUMENT, SECURITY, Schema, component, components

_MODEL: Final = "/v1/models/{model}"
_ID: Final[Schema] = {"type": ["integer", "number", "string", "null"], "description": "the frame's own"}
_SESSION: Final[Schema] = {"type": ["string", "null"]}
_CHANNELS: Final = {
    "session": (_MODEL + "/sessions/{session}/stream", "Frames of one session."),
    "model": (_MODEL + "/stream", "Frames of any number of sessions; each names its `session`."),
}
_EXAMPLES: Final[dict[str, Schema]] = {
    STEP: {"id": 1, "session": examples.SESSION, "inputs": READINGS},
    "info": {"id": 2, "session": examples.SESSION, "op": "info"},
    MARKER: {"id": 3, "op": MARKER},
}
CLOSE_CODES: Final = {
    1000: "answer to the client's own close; its code is echoed",
    1002: "a frame that RFC 6455 forbids",
    1007: "a text frame that is not UTF-8",
    1009: "a message of more than STEPCAST_BODY_LIMIT_BYTES",
    1011: "nothing was heard for two ping intervals",
    CloseCode.SERVICE_RESTART.value: "the server is shutting down; all frames accepted before were answered",
}


def document(version: str, guarded: bool) -> dict[str, Any]:
    """The AsyncAPI document; `guarded`: a key is needed."""
    asked = {_title(op, "Frame"): op for op in FRAME_TYPES}
    answered = {_title(op, "Answer"): _answer(op) for op in FRAME_TYPES} | {"Refused": _refused()}
    messages = {title: _message(title, op) for title, op in asked.items()}
    messages |= {title: _message(title) for title in answered}
    shared = components([*ANSWERS.values(), PROBLEM_DOCUMENT])
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Stepcast",
            "version": version,
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": JSON,
        "servers": {
            "this": {
                "host": "{host}",
                "protocol": "ws",
                "variables": {"host": {"default": "localhost:8000", "description": "of the HTTP API"}},
                **(
                    {"security": [{"$ref": f"#/components/securitySchemes/{name}"} for name in SECURITY]}
                    if guarded
                    else {}
                ),
            }
        },
        "channels": {name: _channel(name, list(messages)) for name in _CHANNELS},
        "operations": {
            f"{channel}.{op}": _operation(channel, title, op) for channel in _CHANNELS for title, op in asked.items()
        },
        "components": {
            "schemas": shared | {title: _frame(title, op) for title, op in asked.items()} | answered,
            "messages": messages,
            "securitySchemes": {
                "bearer": SECURITY["bearer"],
                "key": {"type": "httpApiKey", "in": "header", "name": "x-api-key", "description": "an API key"},
            },
        },
    }


def _title(op: str, what: str) -> str:
    """`state.get`: StateGetFrame."""
    return "".join(word.capitalize() for word in op.split(".")) + what


def _frame(title: str, op: str) -> Schema:
    """The schema of the frames of an operation."""
    schema: Schema
    (schema,) = components([FRAME_TYPES[op]]).values()
    schema["title"] = title
    schema["properties"]["op"] = {"const": op}
    if op != STEP:  # what a frame without `op` is
        schema["required"] = ["op", *schema.get("required", [])]
    return schema


def _answer(op: str) -> Schema:
    """The schema of an operation's answers."""
    if op == MARKER:
        return {"type": "object", "properties": {"id": _ID, "op": {"const": MARKER}}, "required": ["id", "op"]}
    own: Schema = {"id": _ID, "session": _SESSION}
    if op == "fork":
        own["to"] = {"type": "string", "description": "the child's id"}
    if op == "end":
        own["ended"] = {"const": True}
        return {"type": "object", "properties": own, "required": list(own)}
    return {"allOf": [{"type": "object", "properties": own, "required": list(own)}, component(ANSWERS[op].__name__)]}


def _refused() -> Schema:
    """The schema of an error's frame."""
    codes = {"type": "string", "enum": sorted(error.code for error in every_error())}
    problem = {"allOf": [component(PROBLEM_DOCUMENT.__name__), {"properties": {"code": codes}}]}
    fields = {"id": _ID, "session": _SESSION, "error": problem}
    return {"type": "object", "properties": fields, "required": list(fields)}


def _message(title: str, op: str = "") -> Schema:
    message: Schema = {"name": title, "payload": component(title)}
    return message | ({"examples": [{"payload": _EXAMPLES[op]}]} if op in _EXAMPLES else {})


def _channel(name: str, messages: list[str]) -> Schema:
    address, what = _CHANNELS[name]
    parameters: Schema = {"model": {"description": "name of a served model", "examples": ["weather"]}}
    if "{session}" in address:
        parameters["session"] = {"description": f"matches {ID_PATTERN}", "examples": [examples.SESSION]}
    key = {
        "type": "object",
        "properties": {"key": {"type": "string", "description": "an API key: browsers set no headers"}},
    }
    return {
        "address": address,
        "description": what,
        "parameters": parameters,
        "messages": {title: {"$ref": f"#/components/messages/{title}"} for title in messages},
        "bindings": {"ws": {"query": key}},
    }


def _operation(channel: str, title: str, op: str) -> Schema:
    """What the server does when such a frame comes."""

    def messages(*titles: str) -> list[Schema]:
        return [{"$ref": f"#/channels/{channel}/messages/{title}"} for title in titles]

    at = {"$ref": f"#/channels/{channel}"}
    reply = {"channel": at, "messages": messages(_title(op, "Answer"), "Refused")}
    return {"action": "receive", "title": op, "channel": at, "messages": messages(title), "reply": reply}


_DESCRIPTION: Final = f"""\
Recurrent networks, one step at a time. Text frames are JSON, binary frames the same fields as `{MSGPACK}`; an answer is
of its frame's kind and echoes its `id`. Keep many frames in flight: answers of one session come in their frames' order.
An error is a frame, `Refused`, and the socket goes on. A handshake is refused with the problem that HTTP would answer.

| close code | when |
|---|---|
""" + "".join(f"| {code} | {when} |\n" for code, when in CLOSE_CODES.items())
