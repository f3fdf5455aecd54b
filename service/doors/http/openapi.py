"""What /docs and /openapi.json say about each route of /v1. Bodies come from their structs; arrays, whose rank decides
what they are, are written here, and so are the answers."""

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from .. import bodies
from ..bodies import Count, Positive, SessionId

Schema = dict[str, Any]
_SESSION: Final = "/models/{model}/sessions/{session}"
_NUMBER: Final[Schema] = {"anyOf": [{"type": "number"}, {"type": "null"}]}
_FLAG: Final[Schema] = {"anyOf": [{"type": "integer", "enum": [0, 1]}, {"type": "boolean"}]}


def _nested(item: Schema, ranks: tuple[int, ...], what: str) -> Schema:
    """Arrays of some ranks."""
    arrays = []
    for rank in ranks:
        array = item
        for _ in range(rank):
            array = {"type": "array", "items": array}
        arrays.append(array)
    return {"anyOf": arrays, "description": what}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _layers(what: str, depth: int) -> Schema:
    """A state: objects in objects, arrays at the end."""
    schema: Schema = {"type": "array"}
    for _ in range(depth):
        schema = {"type": "object", "additionalProperties": schema}
    return {**schema, "description": what}


def _struct(kind: type[msgspec.Struct], **by_hand: Schema) -> Schema:
    """The schema of a struct; fields whose types do not say what they take are given by hand."""
    _, components = msgspec.json.schema_components(_without_raw(kind), ref_template="{name}")
    schema: Schema = next(iter(components.values()))
    schema["properties"] |= {name: value for name, value in by_hand.items() if name in schema["properties"]}
    return schema


def _without_raw(kind: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    """A struct that msgspec can describe: it cannot describe a Raw."""
    fields: list[Any] = []
    for field in msgspec.structs.fields(kind):
        default = () if field.required else (field.default,)
        fields.append((field.name, Any if field.type is msgspec.Raw else field.type, *default))
    return [msgspec.defstruct(kind.__name__, fields, forbid_unknown_fields=True, namespace={"__doc__": kind.__doc__})]


# --- bodies ---------------------------------------------------------------------------------------------------------

_INPUTS: Final = _nested(_NUMBER, (1, 2, 3), "[F], [N,F] or [N,T,F]; null is a missing reading")
_MASK: Final = _maybe({"anyOf": [_FLAG, _nested(_FLAG, (1, 2), "1 present, 0: the state stays as it is")]})
_SEQUENCES: Final = _nested(_NUMBER, (2, 3), "[T,F] or [B,T,F]; null is a missing reading")
_FUTURE: Final = _maybe(_nested(_NUMBER, (1, 2, 3), "what is known of the future, [H,F] or [N,H,F]"))
_LAYERS: Final = _layers("layer, then key: [N, H]", 2)
_KEYS: Final = _layers("key: [N, H]", 1)
_IDS: Final[Schema] = {"type": "array", "items": {"type": "string", "pattern": bodies.ID_PATTERN}}

_BODIES: Final[dict[tuple[str, str], Schema]] = {
    ("POST", _SESSION + "/step"): _struct(bodies.StepBody, inputs=_INPUTS, mask=_MASK),
    ("POST", "/models/{model}/step"): _struct(bodies.BatchBody, sessions=_IDS, inputs=_nested(_NUMBER, (2,), "[K,F]")),
    ("POST", "/models/{model}/predict"): _struct(
        bodies.PredictBody, inputs=_SEQUENCES, mask=_maybe(_nested(_FLAG, (1, 2), "[T] or [B,T]"))
    ),
    ("POST", "/models/{model}/sessions"): _struct(bodies.CreateBody),
    ("PUT", _SESSION + "/state"): _struct(bodies.StateBody, state=_LAYERS),
    ("PUT", _SESSION + "/state/{layer}"): _struct(bodies.StateBody, state=_KEYS),
    ("POST", _SESSION + "/fork"): _struct(bodies.ForkBody),
    ("POST", _SESSION + "/checkpoints"): _struct(bodies.CheckpointBody),
    ("POST", _SESSION + "/rewind"): _struct(bodies.RewindBody),
    ("POST", _SESSION + "/rollout"): _struct(bodies.RolloutBody, inputs=_FUTURE),
}


# --- answers --------------------------------------------------------------------------------------------------------


class Info(msgspec.Struct):
    """A session; times in s since the epoch, `expires_at` null: never."""

    session: str
    model: str
    version: Positive
    step: Count
    examples: Positive | None
    bytes: int
    created_at: float
    used_at: float
    expires_at: float | None


class Stepped(msgspec.Struct):
    """A step's answer; `outputs` of the rank of the inputs, null where masked."""

    outputs: Any
    step: Positive
    version: Positive


class SteppedMany(msgspec.Struct):
    """A batch step's answer; `outputs` [K,O], a row of null where the item failed; `errors`: item: problem."""

    outputs: Any
    steps: list[Positive | None]
    errors: dict[str, Any]


class Predicted(msgspec.Struct):
    """Outputs of whole sequences."""

    outputs: Any
    version: Positive


class Page(msgspec.Struct):
    """Session ids; `cursor` of the next page, null: no more."""

    sessions: list[str]
    cursor: str | None


class Checkpoint(msgspec.Struct):
    """A checkpoint."""

    name: str
    step: int
    session: str = ""


class Checkpoints(msgspec.Struct):
    """A session's checkpoints, by name."""

    checkpoints: list[dict[str, str | int]]


class State(msgspec.Struct):
    """A session's state."""

    session: str
    model: str
    version: Positive
    step: Count
    examples: Count
    state: Any
    fingerprint: str = ""
    layer: str = ""


class RolledOut(msgspec.Struct):
    """A rollout's answer; `classes` [N,H] of a classifier."""

    outputs: Any
    step: Count
    version: Positive
    classes: list[list[str]] = []


_OUTPUTS: Final = _nested(_NUMBER, (1, 2, 3), "of the rank of the inputs; null where masked")
_INFO: Final = _struct(Info)
_ANSWERS: Final[dict[tuple[str, str], Schema]] = {
    ("POST", _SESSION + "/step"): _struct(Stepped, outputs=_OUTPUTS),
    ("POST", "/models/{model}/step"): _struct(SteppedMany, outputs=_nested(_NUMBER, (2,), "[K,O]")),
    ("POST", "/models/{model}/predict"): _struct(Predicted, outputs=_OUTPUTS),
    ("GET", "/models/{model}/sessions"): _struct(Page),
    ("POST", _SESSION + "/checkpoints"): _struct(Checkpoint),
    ("GET", _SESSION + "/checkpoints"): _struct(Checkpoints),
    ("GET", _SESSION + "/state"): _struct(State, state=_LAYERS),
    ("GET", _SESSION + "/state/{layer}"): _struct(State, state=_KEYS),
    ("POST", _SESSION + "/rollout"): _struct(RolledOut, outputs=_nested(_NUMBER, (3,), "[N,H,O]")),
    **{
        (method, path): _INFO
        for method, path in (
            ("POST", "/models/{model}/sessions"),
            ("GET", _SESSION),
            ("PUT", _SESSION + "/state"),
            ("PUT", _SESSION + "/state/{layer}"),
            ("DELETE", _SESSION + "/state"),
            ("POST", _SESSION + "/fork"),
            ("POST", _SESSION + "/rewind"),
        )
    },
}
PROBLEM_SCHEMA: Final[Schema] = {
    "type": "object",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "description": "one of docs/protocol.md's error codes"},
    },
    "required": ["type", "title", "status", "detail", "code"],
}

# --- routes ---------------------------------------------------------------------------------------------------------

_PARAMETERS: Final[dict[str, tuple[Any, str]]] = {
    "model": (str, "name of a served model"),
    "session": (SessionId, "1 to 256 of letters, digits and ._:@~-"),
    "layer": (str, "name of a state layer, as GET state has it"),
    "version": (Positive, "of the model; in a query by default the live one"),
    "prefix": (str, "only ids that start with this"),
    "cursor": (str, "of the page before"),
    "limit": (Positive, "about how many; default 100, most 1000"),
    "force": (bool, "although sessions hold it"),
    "if-match": (str, "entity tag that the session must have"),
}


def _parameter(name: str, where: str) -> Schema:
    kind, what = _PARAMETERS[name]
    schema = msgspec.json.schema(kind)
    return {"name": name, "in": where, "required": where == "path", "schema": schema, "description": what}


def operation_id(method: str, path: str) -> str:
    """A stable id of a route: `post_models_sessions_step`."""
    words = [word for word in re.split(r"[/{}]+", path) if word and f"{{{word}}}" not in path]
    tail = "_one" if path.endswith("}") else ""
    return "_".join([method.lower(), *words]) + tail


def describe(method: str, path: str, status: int, queries: Sequence[str], text: str) -> dict[str, Any]:
    """Keyword arguments for add_api_route: body, answers, errors and parameters of a route."""
    parameters = [_parameter(name, "path") for name in re.findall(r"{(\w+)}", path)]
    parameters += [_parameter(name, "query") for name in queries]
    if (method in ("PUT", "DELETE") and "{session}" in path) or path.endswith("/rewind"):
        parameters.append(_parameter("if-match", "header"))
    extra: dict[str, Any] = {"parameters": parameters}
    body = _BODIES.get((method, path))
    if body is not None:
        content = {bodies.JSON: {"schema": body}, bodies.MSGPACK: {"schema": {"type": "string"}}}
        extra["requestBody"] = {"required": bool(body.get("required")), "content": content}
    good: dict[str, Any] = {"description": "done"}
    if status != 204:
        answer = _ANSWERS.get((method, path), {"type": "object"})
        good["content"] = {bodies.JSON: {"schema": answer}, bodies.MSGPACK: {"schema": {}}}
    bad = {"description": "an error", "content": {"application/problem+json": {"schema": PROBLEM_SCHEMA}}}
    return {
        "summary": text.strip().splitlines()[0] if text else "",
        "openapi_extra": extra,
        "status_code": status,
        "response_model": None,
        "responses": {status: good, **{code: bad for code in ("4XX", "5XX")}},
    }
