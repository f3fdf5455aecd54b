"""The OpenAPI document. Bodies and answers are structs, msgspec has their schemas; each stands in it once, by name."""

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Annotated, Any, Final

import msgspec
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from msgspec import Meta

from stepcast.manifest import Manifest

from ..answers import PROBLEM
from ..bodies import (
    JSON,
    MSGPACK,
    BatchBody,
    Count,
    Positive,
    SessionId,
    StateFields,
    StepBody,
    nested,
)
from ..verbs import VERBS
from .examples import BODIES
from .examples import PARAMETERS as EXAMPLES

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
_LEVELS: Final = Annotated[list[float], Meta(description="of the quantiles; only with paths")]
_QUANTILES: Final = Annotated[dict[str, Any], Meta(description="of the paths by target, [N,H,L]; only with paths")]
_PATHS: Final = Annotated[dict[str, Any], Meta(description="by target, [N,P,H]; only with keep_paths")]
_SESSION: Final[Schema] = {"session": str, "model": str, "version": Positive, "step": Count}
_TIMES: Final[Schema] = {"created_at": _TIME, "used_at": _TIME, "expires_at": _EXPIRY}
_INFO: Final = _answer("Info", **_SESSION, examples=Positive | None, bytes=int, **_TIMES)
_TRIAL: Final = _answer("Trial", exact=bool, rows=Positive, difference=float)
_BATCHES: Final = _answer("BatchInvariance", steps=_TRIAL | None, calls=_TRIAL | None)
_MODEL: Final = _answer(
    "Model",
    name=str,
    version=Positive,
    versions=list[Positive],
    task=str,
    streaming=bool,
    device=str,
    description=str,
    batch_invariance=_BATCHES,
)
_FAILED: Final = _answer("FailedVersion", name=str, version=Count, reason=str)
_MODELS: Final = _answer("Models", models=list[_MODEL], failed=list[_FAILED])  # type: ignore[valid-type]
ANSWERS: Final[dict[str, Struct]] = {
    "models": _MODELS,
    "retire": _answer("Retired", model=str, version=Positive, sessions=Count),
    "load": _answer("Loaded", model=str, version=Positive, versions=list[Positive]),
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
    "rollout": _answer(
        "RolledOut",
        outputs=_FORECAST,
        step=Count,
        version=Positive,
        classes=(_CLASSES, []),
        levels=(_LEVELS, []),
        quantiles=(_QUANTILES, {}),
        paths=(_PATHS, {}),
    ),
}
PROBLEM_DOCUMENT: Final = _answer("Problem", type=str, title=str, status=int, detail=str, code=str)
_BINARY: Final[Schema] = {"type": "string", "description": "the same fields; arrays as little-endian float32"}
_REQUEST_ID: Final[Schema] = {"schema": {"type": "string"}, "description": "the request's own, or a new one"}
SECURITY: Final[Schema] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "an API key"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "an API key"},
}
_TAGS: Final = {
    "models": "What is served; whole sequences, and one step of many sessions.",
    "sessions": "A session is data: step it, look ahead, fork it, go back.",
    "state": "What a recurrent network remembers, as numbers.",
    "operations": "Probes and metrics; they need no key.",
}
_DESCRIPTION: Final = """\
Each example succeeds as it stands on a server of the committed weather model; a step makes its session.

Bodies are JSON or msgpack, packed by gzip or deflate if you like. Every answer has an `x-request-id`. `HEAD` works
wherever `GET` does. The WebSocket is described at `/asyncapi.json`.
"""
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


def component(name: str) -> Schema:
    """A schema that stands in the document under its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def components(structs: Iterable[Struct]) -> Schema:
    """The schemas of structs, and of what they are made of, by name.

    A default is told in words: makers of clients take a field that has one for a field that is always there.
    """
    schemas: Schema = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")[1]
    for field in chain.from_iterable(schema.get("properties", {}).values() for schema in schemas.values()):
        default = field.pop("default", None)
        if default not in (None, "", [], {}):
            field["description"] = ", ".join(filter(None, [field.get("description"), f"by default {default}"]))
    return schemas


def _manifest() -> Schema:
    """The schemas of a manifest as it is answered, and of its parts."""
    schema = Manifest.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    parts: Schema = schema.pop("$defs")
    versions = {"type": "array", "items": {"type": "integer"}, "description": "served ones; not of a single version"}
    schema["properties"] |= {"fingerprint": {"type": "string"}, "versions": versions}
    schema["properties"]["batch_invariance"] = component(_BATCHES.__name__)
    return {**parts, "Manifest": schema}


def _parameter(name: str, where: str) -> Schema:
    kind, what = _PARAMETERS[name]
    schema = msgspec.json.schema(kind)
    parameter = {"name": name, "in": where, "required": where == "path", "schema": schema, "description": what}
    return parameter | ({"example": EXAMPLES[name]} if name in EXAMPLES else {})


def _answered(content: Schema, what: str, **headers: Schema) -> Schema:
    return {"description": what, "headers": {"x-request-id": _REQUEST_ID, **headers}, "content": content}


_BAD: Final = _answered({PROBLEM: {"schema": component("Problem")}}, "a problem (RFC 9457)")


def describe(
    method: str, path: str, verb: str, status: int, queries: Sequence[str], body: Struct, text: str
) -> dict[str, Any]:
    """Keyword arguments for add_api_route: body, answers, errors and parameters of a route."""
    named = re.findall(r"{(\w+)}", path)
    parameters = [_parameter(name, "path") for name in named] + [_parameter(name, "query") for name in queries]
    if verb in ("end", "state.set", "clear", "rewind"):
        parameters.append(_parameter("if-match", "header"))
    extra: Schema = {"parameters": parameters}
    fields = msgspec.structs.fields(body)
    if method in ("POST", "PUT") and {field.name for field in fields} - set(named):
        example = BODIES["layer" if "layer" in named else verb]
        content = {JSON: {"schema": component(body.__name__), "example": example}, MSGPACK: {"schema": _BINARY}}
        extra["requestBody"] = {"required": any(field.required for field in fields), "content": content}
    good = {"description": "done", "headers": {"x-request-id": _REQUEST_ID}}
    if status != 204:
        schema = component("Manifest" if verb in ("model", "version") else ANSWERS[verb].__name__)
        # In msgpack arrays are bytes, which no schema can say; another one would spoil the types of generated clients.
        good = _answered({JSON: {"schema": schema}, MSGPACK: {"schema": schema}}, "done; in msgpack arrays are bytes")
    # the id is stable: post_models_sessions_step
    words = [word for word in re.split(r"[/{}]+", path) if word and word not in named]
    return {
        "operation_id": "_".join([method.lower(), *words]) + ("_one" if path.endswith("}") else ""),
        "summary": text.strip().splitlines()[0],
        "tags": ["state" if "/state" in path else "sessions" if "/sessions" in path else "models"],
        "openapi_extra": extra,
        "status_code": status,
        "response_model": None,
        "responses": {status: good, "4XX": _BAD, "5XX": _BAD},
    }


def describe_probe(name: str, kind: str, text: str) -> dict[str, Any]:
    """Keyword arguments for add_api_route: a route of operations, which needs no key."""
    schema: Schema = {"type": "object" if kind == JSON else "string"}
    return {
        "operation_id": name,
        "summary": text,
        "tags": ["operations"],
        "openapi_extra": {"security": []},
        "response_class": Response,
        "responses": {200: _answered({kind: {"schema": schema}}, "done"), "5XX": _BAD},
    }


def document(api: FastAPI, guarded: bool) -> Schema:
    """The OpenAPI document of an application; `guarded`: a key is needed."""
    found = get_openapi(
        title=api.title,
        version=api.version,
        summary=api.summary,
        description=_DESCRIPTION,
        routes=api.routes,
        tags=[{"name": name, "description": what} for name, what in _TAGS.items()],
        servers=[{"url": "/", "description": "this server"}],
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    bodies: list[Struct] = [StepBody, BatchBody, *(VERBS[name].body for name in BODIES if name in VERBS)]
    schemas = components([*bodies, *ANSWERS.values(), PROBLEM_DOCUMENT]) | _manifest()
    found["components"] = {"schemas": schemas, "securitySchemes": SECURITY}
    found["security"] = [{name: []} for name in SECURITY] if guarded else [{}, *({name: []} for name in SECURITY)]
    return found
