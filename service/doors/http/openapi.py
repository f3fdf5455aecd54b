"""What /docs and /openapi.json say of each route of /v1: bodies and answers are structs, msgspec has their schemas."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from ..answers import PROBLEM
from ..bodies import JSON, MSGPACK, Count, Positive, SessionId, StateFields, nested

Schema = dict[str, Any]
Struct = type[msgspec.Struct]


def _answer(title: str, /, **fields: Any) -> Struct:
    """An answer; fields given as (type, default) may be missing."""
    given = [(key, *kind) if isinstance(kind, tuple) else (key, kind) for key, kind in fields.items()]
    return msgspec.defstruct(title, given)


def _outputs(what: str, *ranks: int) -> Meta:
    """The schema of outputs: arrays of some ranks; of named inputs, an object by output name or a list of those."""
    arrays = nested(what, *ranks).extra_json_schema or {}
    columns: Schema = {"type": "object", "description": "by output name; of a classifier, class and probabilities"}
    by_name = [columns, {"type": "array", "items": {"type": ["object", "array"]}, "description": "of records"}]
    return Meta(description=what, extra_json_schema={"anyOf": [*arrays["anyOf"], *by_name]})


_OUTPUTS: Final = Annotated[Any, _outputs("of the form of the inputs; null where masked", 1, 2, 3)]
_TIME: Final = Annotated[float, Meta(description="s since the epoch")]
_EXPIRY: Final = Annotated[float | None, Meta(description="s since the epoch; null: never")]
_ROWS: Final = Annotated[Any, _outputs("[K,O], or of the form of the inputs; null where the item failed", 2)]
_ERRORS: Final = Annotated[dict[str, Any], Meta(description="item: problem document")]
_FORECAST: Final = Annotated[Any, _outputs("[N,H,O], or by output name [N,H]", 3)]
_CLASSES: Final = Annotated[list[list[str]], Meta(description="[N,H]")]
_SESSION: Final[Schema] = {"session": str, "model": str, "version": Positive, "step": Count}
_TIMES: Final[Schema] = {"created_at": _TIME, "used_at": _TIME, "expires_at": _EXPIRY}
_INFO: Final = _answer("Info", **_SESSION, examples=Positive | None, bytes=int, **_TIMES)
_ANSWERS: Final[dict[str, Struct]] = {
    **dict.fromkeys(("create", "info", "state.set", "clear", "fork", "rewind"), _INFO),
    "step": _answer("Stepped", outputs=_OUTPUTS, step=Positive, version=Positive),
    "batch": _answer("SteppedMany", outputs=_ROWS, steps=list[Positive | None], errors=_ERRORS),
    "predict": _answer("Predicted", outputs=_OUTPUTS, version=Positive),
    "list": _answer("Page", sessions=list[str], cursor=str | None),
    "state.get": _answer(
        "State", **_SESSION, examples=Count, state=StateFields, fingerprint=(str, ""), layer=(str, "")
    ),
    "checkpoint": _answer("Checkpoint", name=str, step=int, session=(str, "")),
    "checkpoints": _answer("Checkpoints", checkpoints=list[dict[str, str | int]]),
    "rollout": _answer("RolledOut", outputs=_FORECAST, step=Count, version=Positive, classes=(_CLASSES, [])),
}
_PROBLEM: Final = _answer("Problem", type=str, title=str, status=int, detail=str, code=str)
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


def _schema(kind: Struct) -> Schema:
    _, components = msgspec.json.schema_components([kind], ref_template="{name}")
    return next(iter(components.values()))


def _parameter(name: str, where: str) -> Schema:
    kind, what = _PARAMETERS[name]
    schema = msgspec.json.schema(kind)
    return {"name": name, "in": where, "required": where == "path", "schema": schema, "description": what}


def describe(
    method: str, path: str, verb: str, status: int, queries: Sequence[str], body: Struct, text: str
) -> dict[str, Any]:
    """Keyword arguments for add_api_route: body, answers, errors and parameters of a route."""
    named = re.findall(r"{(\w+)}", path)
    parameters = [_parameter(name, "path") for name in named] + [_parameter(name, "query") for name in queries]
    if verb in ("end", "state.set", "clear", "rewind"):
        parameters.append(_parameter("if-match", "header"))
    extra: Schema = {"parameters": parameters}
    if method in ("POST", "PUT"):
        schema = _schema(body)
        content = {JSON: {"schema": schema}, MSGPACK: {"schema": {"type": "string"}}}
        extra["requestBody"] = {"required": bool(schema.get("required")), "content": content}
    good: Schema = {"description": "done"}
    if status != 204:
        answer = _schema(_ANSWERS[verb]) if verb in _ANSWERS else {"type": "object"}
        good["content"] = {JSON: {"schema": answer}, MSGPACK: {"schema": {}}}
    bad = {"description": "an error", "content": {PROBLEM: {"schema": _schema(_PROBLEM)}}}
    # the id is stable: post_models_sessions_step
    words = [word for word in re.split(r"[/{}]+", path) if word and word not in named]
    return {
        "operation_id": "_".join([method.lower(), *words]) + ("_one" if path.endswith("}") else ""),
        "summary": text.strip().splitlines()[0],
        "openapi_extra": extra,
        "status_code": status,
        "response_model": None,
        "responses": {status: good, "4XX": bad, "5XX": bad},
    }
