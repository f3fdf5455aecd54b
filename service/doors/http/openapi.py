"""What /docs and /openapi.json say about each route of /v1; the handlers take raw requests."""

import re
from typing import Annotated, Any, Final

from fastapi import Path

_NUMBER: Final = {"anyOf": [{"type": "number"}, {"type": "null"}]}
_FLAG: Final = {"anyOf": [{"type": "integer", "enum": [0, 1]}, {"type": "boolean"}]}
_COUNT: Final = {"type": "integer", "minimum": 1, "maximum": 2**53}


def _nested(item: dict[str, Any], ranks: tuple[int, ...], what: str) -> dict[str, Any]:
    arrays = []
    for rank in ranks:
        array: dict[str, Any] = dict(item)
        for _ in range(rank):
            array = {"type": "array", "items": array}
        arrays.append(array)
    return {"anyOf": arrays, "description": what} if len(arrays) > 1 else {**arrays[0], "description": what}


def _object(properties: dict[str, Any], required: tuple[str, ...] = (), closed: bool = True) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(required)
    if closed:
        schema["additionalProperties"] = False
    return schema


def _maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_SHAPE: Final = _maybe({"type": "array", "items": {"type": "integer"}})
_FORMAT: Final = {"type": "string", "enum": ["NWC", "NCW"], "default": "NWC"}
_ID: Final = {"type": "string", "pattern": "^[A-Za-z0-9._:@~-]{1,256}$"}

Model = Annotated[str, Path(description="name of a served model")]
Session = Annotated[str, Path(description="1 to 256 of letters, digits and ._:@~-", json_schema_extra=_ID)]
Layer = Annotated[str, Path(description="name of a state layer, as GET state has it")]
Version = Annotated[int, Path(ge=1)]

_STATE: Final = {
    "type": "object",
    "description": "layer, then key: [N, H]",
    "additionalProperties": {"type": "object", "additionalProperties": {"type": "array"}},
}
_LAYER: Final = {"type": "object", "description": "key: [N, H]", "additionalProperties": {"type": "array"}}
_OUTPUTS: Final = _nested(_NUMBER, (1, 2, 3), "of the rank of the inputs; null where masked")

_INPUTS: Final = _nested(_NUMBER, (1, 2, 3), "[F], [N,F] or [N,T,F]; null is a missing reading")
_SEQUENCES: Final = _nested(_NUMBER, (2, 3), "[T,F] or [B,T,F]; null is a missing reading")
_STATE_FIELDS: Final = {
    "session": _maybe({"type": "string"}),
    "model": _maybe({"type": "string"}),
    "version": _maybe(_COUNT),
    "fingerprint": _maybe({"type": "string"}),
    "step": _maybe({"type": "integer", "minimum": 0, "maximum": 2**53}),
    "examples": _maybe({"type": "integer", "minimum": 0}),
}

_BODIES: Final[dict[tuple[str, str], dict[str, Any]]] = {
    ("POST", "/models/{model}/sessions/{session}/step"): _object(
        {
            "inputs": _INPUTS,
            "seq": _maybe(_COUNT),
            "mask": _maybe({"anyOf": [_FLAG, _nested(_FLAG, (1, 2), "1 present, 0: the state stays as it is")]}),
            "format": _FORMAT,
            "shape": _SHAPE,
            "version_policy": _maybe({"type": "string", "enum": ["pin", "reset", "replay"]}),
        },
        ("inputs",),
    ),
    ("POST", "/models/{model}/step"): _object(
        {
            "sessions": {"type": "array", "items": _ID},
            "inputs": _nested(_NUMBER, (2,), "[K,F]"),
            "seq": _maybe({"type": "array", "items": _maybe(_COUNT)}),
            "shape": _SHAPE,
        },
        ("sessions", "inputs"),
    ),
    ("POST", "/models/{model}/predict"): _object(
        {
            "inputs": _SEQUENCES,
            "mask": _maybe(_nested(_FLAG, (1, 2), "[T] or [B,T]")),
            "format": _FORMAT,
            "shape": _SHAPE,
        },
        ("inputs",),
    ),
    ("POST", "/models/{model}/sessions"): _object(
        {
            "session": _maybe(_ID),
            "examples": _maybe(_COUNT),
            "version": _maybe(_COUNT),
            "ttl_s": _maybe({"type": "number", "minimum": 0, "maximum": 2**31}),
        }
    ),
    ("PUT", "/models/{model}/sessions/{session}/state"): _object(
        {"state": _STATE, "layer": _maybe({"type": "string"}), **_STATE_FIELDS}, ("state",)
    ),
    ("PUT", "/models/{model}/sessions/{session}/state/{layer}"): _object(
        {"state": _LAYER, "layer": _maybe({"type": "string"}), **_STATE_FIELDS}, ("state",)
    ),
    ("POST", "/models/{model}/sessions/{session}/fork"): _object({"to": _maybe(_ID)}),
    ("POST", "/models/{model}/sessions/{session}/checkpoints"): _object({"name": _maybe(_ID)}),
    ("POST", "/models/{model}/sessions/{session}/rewind"): _object({"to": _ID}, ("to",)),
    ("POST", "/models/{model}/sessions/{session}/rollout"): _object(
        {
            "steps": _COUNT,
            "inputs": _maybe(_nested(_NUMBER, (1, 2, 3), "what is known of the future, [H,F] or [N,H,F]")),
            "commit": {"type": "boolean", "default": False},
            "seq": _maybe(_COUNT),
            "temperature": {"type": "number", "minimum": 0, "maximum": 100, "default": 0},
            "seed": _maybe({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}),
            "shape": _SHAPE,
        },
        ("steps",),
    ),
}

_INFO: Final = _object(
    {
        "session": {"type": "string"},
        "model": {"type": "string"},
        "version": _COUNT,
        "step": {"type": "integer", "minimum": 0},
        "examples": _maybe(_COUNT),
        "bytes": {"type": "integer"},
        "created_at": {"type": "number", "description": "s since the epoch"},
        "used_at": {"type": "number", "description": "s since the epoch"},
        "expires_at": _maybe({"type": "number", "description": "s since the epoch; null: never"}),
    },
    ("session", "model", "version", "step", "examples", "bytes", "created_at", "used_at", "expires_at"),
)
_STEPPED: Final = _object(
    {"outputs": _OUTPUTS, "step": {"type": "integer", "minimum": 1}, "version": _COUNT}, ("outputs", "step", "version")
)
_CHECKPOINT: Final = _object(
    {"session": {"type": "string"}, "name": {"type": "string"}, "step": {"type": "integer"}}, ("name", "step")
)
_ANSWERS: Final[dict[tuple[str, str], dict[str, Any]]] = {
    ("POST", "/models/{model}/sessions/{session}/step"): _STEPPED,
    ("POST", "/models/{model}/step"): _object(
        {
            "outputs": _nested(_NUMBER, (2,), "[K,O]; a row of null where the item failed"),
            "steps": {"type": "array", "items": _maybe(_COUNT)},
            "errors": {"type": "object", "description": "item: problem document", "additionalProperties": {}},
        },
        ("outputs", "steps", "errors"),
    ),
    ("POST", "/models/{model}/predict"): _object({"outputs": _OUTPUTS, "version": _COUNT}, ("outputs", "version")),
    ("POST", "/models/{model}/sessions"): _INFO,
    ("GET", "/models/{model}/sessions"): _object(
        {"sessions": {"type": "array", "items": {"type": "string"}}, "cursor": _maybe({"type": "string"})},
        ("sessions", "cursor"),
    ),
    ("GET", "/models/{model}/sessions/{session}"): _INFO,
    ("PUT", "/models/{model}/sessions/{session}/state"): _INFO,
    ("DELETE", "/models/{model}/sessions/{session}/state"): _INFO,
    ("PUT", "/models/{model}/sessions/{session}/state/{layer}"): _INFO,
    ("POST", "/models/{model}/sessions/{session}/fork"): _INFO,
    ("POST", "/models/{model}/sessions/{session}/rewind"): _INFO,
    ("POST", "/models/{model}/sessions/{session}/checkpoints"): _CHECKPOINT,
    ("GET", "/models/{model}/sessions/{session}/checkpoints"): _object(
        {"checkpoints": {"type": "array", "items": _CHECKPOINT}}, ("checkpoints",)
    ),
    ("GET", "/models/{model}/sessions/{session}/state"): _object(
        {**_STATE_FIELDS, "state": _STATE}, ("session", "model", "version", "step", "examples", "state")
    ),
    ("GET", "/models/{model}/sessions/{session}/state/{layer}"): _object(
        {**_STATE_FIELDS, "layer": {"type": "string"}, "state": _LAYER}, ("layer", "step", "examples", "state")
    ),
    ("POST", "/models/{model}/sessions/{session}/rollout"): _object(
        {
            "outputs": _nested(_NUMBER, (3,), "[N,H,O]"),
            "classes": _nested({"type": "string"}, (2,), "[N,H]"),
            "step": {"type": "integer", "minimum": 0},
            "version": _COUNT,
        },
        ("outputs", "step", "version"),
    ),
}

_QUERIES: Final[dict[tuple[str, str], list[tuple[str, dict[str, Any], str]]]] = {
    ("GET", "/models/{model}/sessions"): [
        ("prefix", {"type": "string"}, "only ids that start with this"),
        ("cursor", {"type": "string"}, "of the page before"),
        ("limit", {"type": "integer", "minimum": 1, "maximum": 1000}, "about how many; default 100"),
    ],
    ("POST", "/models/{model}/predict"): [("version", {"type": "integer", "minimum": 1}, "default: the live one")],
    ("DELETE", "/models/{model}/versions/{version}"): [("force", {"type": "boolean"}, "although sessions hold it")],
}

_TAGGED: Final = ("PUT", "DELETE")
PROBLEM_SCHEMA: Final = _object(
    {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "description": "one of docs/protocol.md's error codes"},
    },
    ("type", "title", "status", "detail", "code"),
    closed=False,
)


def operation_id(method: str, path: str) -> str:
    """A stable id of a route: `post_models_sessions_step`."""
    words = [word for word in re.split(r"[/{}]+", path) if word and f"{{{word}}}" not in path]
    tail = "_one" if path.endswith("}") else ""
    return "_".join([method.lower(), *words]) + tail


def describe(method: str, path: str, text: str) -> dict[str, Any]:
    """Keyword arguments for add_api_route: body, answers, errors, query and header parameters of a route.

    Path parameters are in the handlers' signatures, as Model, Session, Layer and Version.
    """
    extra: dict[str, Any] = {}
    body = _BODIES.get((method, path))
    if body is not None:
        content = {"application/json": {"schema": body}, "application/msgpack": {"schema": {"type": "string"}}}
        extra["requestBody"] = {"required": bool(body.get("required")), "content": content}
    extra["parameters"] = [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": what}
        for name, schema, what in _QUERIES.get((method, path), [])
    ]
    if method in _TAGGED and "session" in path:
        tag = {"type": "string"}
        extra["parameters"].append({"name": "if-match", "in": "header", "required": False, "schema": tag})
    status = _status(method, path)
    answer = _ANSWERS.get((method, path), {"type": "object"})
    good: dict[str, Any] = {"description": "done"}
    if status != 204:
        good["content"] = {"application/json": {"schema": answer}, "application/msgpack": {"schema": {}}}
    bad = {"description": "an error", "content": {"application/problem+json": {"schema": PROBLEM_SCHEMA}}}
    return {
        "summary": text.strip().splitlines()[0] if text else "",
        "openapi_extra": extra,
        "status_code": status,
        "response_model": None,
        "responses": {status: good, **{code: bad for code in ("4XX", "5XX")}},
    }


def _status(method: str, path: str) -> int:
    if method == "DELETE" and path.endswith("{session}"):
        return 204
    created = ("/sessions", "/fork", "/checkpoints")
    return 201 if method == "POST" and path.endswith(created) else 200
