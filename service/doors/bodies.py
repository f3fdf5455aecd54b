"""Bodies: what may be asked as structs, and how bytes become them. The same for every door.

msgpack carries arrays as raw little-endian float32 in a `bin`, beside a `shape`. A JSON null is a missing reading, as
NaN is; infinity is refused. Types are checked here, numbers against the manifest by service/engine/arrays.py.
"""

import functools
import json
import math
import re
from contextlib import suppress
from typing import Annotated, Any, Final, Literal, TypeVar, cast, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta, Raw

from stepcast.errors import InvalidRequest, Malformed, NonFinite, ShapeMismatch, TooLarge

from ..engine.arrays import Floats, Format
from . import large
from .large import LARGE_BYTES, weigh

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
Policy = Literal["pin", "reset", "replay"]
Number = float | None
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
StepNumber = Annotated[int, Meta(ge=0, le=2**52)]  # the numbers of later steps, too, are exact as floats
ID_PATTERN: Final = "^[A-Za-z0-9._:@~-]{1,256}$"
SessionId = Annotated[str, Meta(extra_json_schema={"pattern": ID_PATTERN})]
FrameId = str | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | float | None
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # what msgspec raises at bad bytes

_NUMBER: Final = {"anyOf": [{"type": "number"}, {"type": "null"}]}
_FLAG: Final = {"anyOf": [{"type": "integer", "enum": [0, 1]}, {"type": "boolean"}]}


def nested(what: str, *ranks: int, item: dict[str, Any] = _NUMBER) -> Meta:
    """The schema of arrays of some ranks; 0: the item itself."""
    schemas = [item]
    for _ in range(max(ranks)):
        schemas.append({"type": "array", "items": schemas[-1]})
    return Meta(description=what, extra_json_schema={"anyOf": [schemas[rank] for rank in ranks]})


_CELL: Final = {"anyOf": [*_NUMBER["anyOf"], {"type": "string"}]}  # text: a category
_WIDE: Final = {"anyOf": [*_CELL["anyOf"], {"type": "array", "items": _NUMBER}]}
_MOMENT: Final = {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "number"}]}
_SPACED: Final = {
    "type": "object",
    "properties": {"start": _MOMENT, "every": {"anyOf": [{"type": "string"}, {"type": "number"}]}},
    "required": ["start"],
    "additionalProperties": False,
}
_AT: Final = "the row's moment, in place of the calendar features: ISO 8601 with its offset, or Unix seconds"
_RECORD: Final = {
    "type": "object",
    "properties": {"time": {**_MOMENT, "description": _AT}},
    "additionalProperties": _WIDE,
}
READINGS: Final[dict[str, Number]] = {
    **{"temp": 39.02, "dewp": 26.06, "humid": 59.37, "wind_speed": 10.36, "pressure": 1012.0},
    **{"wind_dir_sin": -1.0, "wind_dir_cos": 0.0, "wind_gust": None, "precip": 0.0, "visib": 10.0},
    **{"hour_sin": 0.5, "hour_cos": 0.87, "season_cos": 0.98},
}
"""One hour's readings for the weather model, by name in the order of its features: the documents' example."""
_BY_POSITION: Final = list(READINGS.values())
_COLUMNS: Final = {name: [value, value] for name, value in READINGS.items()}


def named(what: str, *ranks: int, examples: list[Any]) -> Meta:
    """The schema of inputs: arrays of some ranks, an object by feature name, or a list of records."""
    columns = nested("", 0, 1, 2, 3, item=_CELL).extra_json_schema
    arrays = nested(what, *ranks).extra_json_schema or {}
    moments = (nested("", 0, 1, 2, item=_MOMENT).extra_json_schema or {})["anyOf"]
    times = {"time": {"anyOf": [*moments, _SPACED], "description": f"{_AT}; of several steps also their start"}}
    by_name = [
        {
            "type": "object",
            "properties": times,
            "additionalProperties": columns,
            "description": "by feature name; a category is text",
        },
        {"type": "array", "items": _RECORD, "minItems": 1, "description": "one record per example"},
    ]
    return Meta(description=what, examples=examples, extra_json_schema={"anyOf": [*arrays["anyOf"], *by_name]})


_NAMES: Final = {"type": "array", "items": {"type": "string", "pattern": ID_PATTERN}}
_LAYER: Final = {"anyOf": [{"type": "array"}, {"type": "object", "additionalProperties": {"type": "array"}}]}
_STATE: Final = "layer, then key: [N, H]; of one layer, key: [N, H]"
_Mask = Annotated[Raw, nested("1 present, 0: the state stays as it is", 0, 1, 2, item=_FLAG)]
_Future = Annotated[
    Raw,
    named(
        "[H,F] or [N,H,F], null where nothing is known, or by feature name [H] or [N,H] of what is known",
        *(1, 2, 3),
        examples=[{"time": "2013-11-02T03:00:00Z"}, {"hour_sin": [0.71], "hour_cos": [0.71], "season_cos": [0.98]}],
    ),
]
StateFields = Annotated[dict[str, Raw], Meta(description=_STATE, extra_json_schema={"additionalProperties": _LAYER})]


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """No fields."""


class StepBody(msgspec.Struct, forbid_unknown_fields=True):
    """A step."""

    inputs: Annotated[
        Raw,
        named(
            "[F], [N,F] or [N,T,F], or by feature name numbers, [N] or [N,T]; null is a missing reading",
            *(1, 2, 3),
            examples=[READINGS, _BY_POSITION, _COLUMNS, [READINGS, READINGS]],
        ),
    ]
    seq: Positive | None = None
    mask: _Mask = msgspec.field(default_factory=Raw)
    format: Format = "NWC"
    shape: list[int] | None = None
    version_policy: Policy | None = None


class BatchBody(msgspec.Struct, forbid_unknown_fields=True):
    """A batch step: K sessions, one step each."""

    sessions: Annotated[Raw, Meta(description="one per row", extra_json_schema=_NAMES)]
    inputs: Annotated[
        Raw,
        named(
            "[K,F], or [K] by feature name; null is a missing reading",
            2,
            examples=[_COLUMNS, [READINGS, READINGS], [_BY_POSITION] * 2],
        ),
    ]
    seq: list[Positive | None] | None = None
    shape: list[int] | None = None


class PredictBody(msgspec.Struct, forbid_unknown_fields=True):
    """Whole sequences, without a session."""

    inputs: Annotated[
        Raw,
        named(
            "[T,F] or [B,T,F], or [T] or [B,T] by feature name; null is a missing reading",
            *(2, 3),
            examples=[_COLUMNS, [READINGS, READINGS], [_BY_POSITION] * 2],
        ),
    ]
    mask: _Mask = msgspec.field(default_factory=Raw)
    format: Format = "NWC"
    shape: list[int] | None = None
    version: Positive | None = None


class CreateBody(msgspec.Struct, forbid_unknown_fields=True):
    """A new session."""

    session: SessionId | None = None
    examples: Positive | None = None
    version: Positive | None = None
    ttl_s: Annotated[float, Meta(ge=0, le=2**31)] | None = None


class ListBody(msgspec.Struct, forbid_unknown_fields=True):
    """A page of session ids."""

    prefix: str = ""
    cursor: str = ""
    limit: Positive = 100


class GetBody(msgspec.Struct, forbid_unknown_fields=True):
    """A state; `layer` None: of all layers."""

    layer: str | None = None


class StateBody(msgspec.Struct, forbid_unknown_fields=True):
    """A state to be set: what a get answers; only `state` is required."""

    state: StateFields
    session: str | None = None
    model: str | None = None
    layer: str | None = None
    version: Positive | None = None
    step: StepNumber | None = None
    examples: Count | None = None
    fingerprint: str | None = None


class ForkBody(msgspec.Struct, forbid_unknown_fields=True):
    """A fork; the server makes the child's id where there is none."""

    to: SessionId | None = None


class CheckpointBody(msgspec.Struct, forbid_unknown_fields=True):
    """A new checkpoint."""

    name: SessionId | None = None


class RewindBody(msgspec.Struct, forbid_unknown_fields=True):
    """A rewind to a checkpoint."""

    to: SessionId


class RolloutBody(msgspec.Struct, forbid_unknown_fields=True):
    """A rollout: `inputs` are what is known of the future, null where it is not; `paths`: how many are drawn."""

    steps: Positive
    inputs: _Future = msgspec.field(default_factory=Raw)
    commit: bool = False
    seq: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    paths: Count = 0
    levels: Annotated[list[Annotated[float, Meta(ge=0, le=1)]], Meta(max_length=99)] = []
    keep_paths: bool = False
    shape: list[int] | None = None


class VersionBody(msgspec.Struct, forbid_unknown_fields=True):
    """A version of a model; `force`: although sessions hold it."""

    version: Positive = 1
    force: bool = False


class LoadBody(msgspec.Struct, forbid_unknown_fields=True):
    """A version of a model that is to be loaded; it stands in the path."""

    version: Positive = 1


B = TypeVar("B")


def frame(body: type[msgspec.Struct], op: Any = str, gc: bool = True) -> type[msgspec.Struct]:
    """A WebSocket's frame: the fields of a body, and `id`, `session`, `op`."""
    fields = [("id", FrameId, None), ("session", str | None, None), ("op", op, "step")]
    name = body.__name__.replace("Body", "Frame")
    return msgspec.defstruct(name, fields, bases=(body,), forbid_unknown_fields=True, gc=gc)


@functools.cache
def decoder(kind: Any, content_type: str) -> Any:
    """The decoder of a type, by content type."""
    return msgspec.json.Decoder(kind) if content_type == JSON else msgspec.msgpack.Decoder(kind)


def decode(body: bytes, kind: type[B], content_type: str) -> B:
    """A body as its struct; Malformed, NonFinite (JSON's Infinity), or InvalidRequest of a missing or wrong field."""
    try:
        return cast(B, decoder(cast(Any, kind), content_type).decode(body))
    except UNREADABLE as error:
        wrong_type = isinstance(error, msgspec.ValidationError)
        if content_type == JSON and (not wrong_type or "got `float`" in str(error)):
            return _lenient(body, kind, error)
        if wrong_type:
            raise InvalidRequest(str(error)) from error
        raise Malformed(f"the body is not msgpack: {error}") from error


def _lenient(body: bytes, kind: type[B], first: Exception) -> B:
    """JSON with NaN and Infinity, as Python's json writes it, and with integers such as 5.0, as others do."""
    try:
        plain = _plain(body) if len(body) <= LARGE_BYTES else _plain_fields(body, kind)
        return msgspec.json.decode(msgspec.json.encode(plain), type=kind)
    except (NonFinite, TooLarge):
        raise
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from error
    except (ValueError, RecursionError, TypeError, msgspec.MsgspecError) as error:
        raise Malformed(f"the body is not JSON: {first}") from error


def _plain(body: Any) -> Any:
    return json.loads(bytes(body), parse_constant=_number, parse_float=_number)


def _plain_fields(body: bytes, kind: Any) -> dict[str, Any]:
    """The fields of a large body; those that the struct takes as they are stay so, without NaN."""
    fields: dict[str, Any] = decoder(dict[str, Raw], JSON).decode(large.without_constants(body))
    raw = {name for name, hint in get_type_hints(kind).items() if hint in (Raw, dict[str, Raw])}
    for name in fields.keys() - raw:
        weigh(memoryview(fields[name]), False, f"$.{name[:64]}")
        fields[name] = _plain(fields[name])
    return fields


def _number(text: str) -> Number:
    value = float(text)
    if math.isinf(value):
        raise NonFinite(f"the body has {text[:32]}, inputs are finite numbers or null")
    if math.isnan(value):
        return None
    whole = abs(value) <= 2**53 and value.is_integer() and not text.startswith("-")
    return int(value) if whole else value


def convert(value: Any, kind: type[B], what: str, strict: bool = True) -> B:
    """A value that came otherwise than in a body, as a type; InvalidRequest, which says `what`, where it is none."""
    try:
        return msgspec.convert(value, kind, strict=strict)  # not strict: numbers and flags are text, as in a query
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{what}: {error}") from error


def part(kind: Any, raw: Any, content_type: str, path: str) -> Any:
    """A part of a body, Raw or decoded, as a type; the errors (as of `decode`) say where it stands.

    Raises TooLarge where it is too much to be decoded whole.
    """
    try:
        if isinstance(raw, Raw):
            weigh(memoryview(raw), content_type != JSON, path)
        return decoder(kind, content_type).decode(raw) if isinstance(raw, Raw) else msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("`$", f"`{path}") if "`$" in str(error) else f"{error} - at `{path}`"
        refusal = NonFinite if text.startswith("Number out of range") else InvalidRequest
        raise refusal(text) from error
    except UNREADABLE as error:
        raise Malformed(f"{path}: {error}") from error


_LISTS: Final[dict[int, Any]] = {1: list[Number], 2: list[list[Number]], 3: list[list[list[Number]]]}
_OPENING: Final = re.compile(rb"[\[ \t\r\n]*")
_MAP: Final = re.compile(rb"[ \t\r\n]*\{|[\x80-\x8f\xde\xdf]")  # in JSON, and in msgpack
_NOTHING: Final = (b"", b"null", b"\xc0")


def numbers(raw: Any, shape: list[int] | None, content_type: str, path: str = "$.inputs") -> Floats:
    """An array from a part of a body: lists, or in msgpack a `bin` with a `shape` ([F] if there is none).

    Raises:
        ShapeMismatch, and what `part` raises.
    """
    if isinstance(raw, Raw) and content_type == MSGPACK:
        raw = part(Any, raw, MSGPACK, path)
    if isinstance(raw, bytes):
        return _from_bytes(raw, shape, path)
    if isinstance(raw, Raw) and len(memoryview(raw)) > LARGE_BYTES:
        return large.array(memoryview(raw), path)
    rank = _rank(raw)
    if rank not in _LISTS:
        raise ShapeMismatch(f"{path} is not an array of rank 1 to 3")
    values = part(_LISTS[rank], raw, JSON, path)
    try:
        with np.errstate(over="ignore"):
            return np.array(values, np.float32)
    except ValueError as error:
        raise ShapeMismatch(f"{path} is ragged: its rows have different lengths") from error


def said(raw: Raw) -> Raw | None:
    """A part of a body that may be left out; None: it is, or null."""
    return None if bytes(memoryview(raw)[:5]) in _NOTHING else raw


def flags(raw: Any, content_type: str, path: str = "$.mask") -> Any:
    """A mask: a flag, nested lists of flags, or an array of numbers; None: there is none."""
    raw = said(raw)
    if raw is not None and content_type == JSON and len(memoryview(raw)) > LARGE_BYTES:
        return large.array(bytes(raw).replace(b"true", b"1").replace(b"false", b"0"), path)
    return None if raw is None else part(Any, raw, content_type, path)


def tensors(state: dict[str, Any], content_type: str) -> dict[str, Any]:
    """A state's layers, or one layer's keys: arrays, lists or bytes; what comes from a file is there already."""
    found: dict[str, Any] = {}
    for name, raw in state.items():
        where = f"$.state.{name[:64]}"
        if isinstance(raw, Raw) and _MAP.match(raw):
            keys = part(dict[str, Raw], raw, content_type, where)
            found[name] = {key: _tensor(keys[key], content_type, f"{where}.{key[:64]}") for key in keys}
        else:
            found[name] = _tensor(raw, content_type, where) if isinstance(raw, Raw) else raw
    return found


def _tensor(raw: Raw, content_type: str, path: str) -> Any:
    value = part(Any, raw, content_type, path)
    if isinstance(value, list) and len(memoryview(raw)) > LARGE_BYTES:
        with suppress(ValueError):  # a ragged one is refused by its reader
            return np.array(value)
    return value


def _rank(value: Any) -> int:
    """How many lists open at the start of JSON text, or of what was decoded."""
    if isinstance(value, Raw):
        opening = _OPENING.match(value)
        return opening[0].count(b"[") if opening else 0
    rank = 0
    while isinstance(value, list):
        rank, value = rank + 1, value[0] if value else None
    return rank


def _from_bytes(raw: bytes, shape: list[int] | None, path: str) -> Floats:
    if len(raw) % 4:
        raise ShapeMismatch(f"{path} has {len(raw)} bytes, float32 takes 4 each")
    values = np.frombuffer(raw, "<f4")
    if shape is None:
        return values
    # The product alone is no proof: a 0 in it hides numbers that numpy cannot take.
    small = len(shape) in (1, 2, 3) and all(0 <= n <= max(1, values.size) for n in shape)
    if not small or math.prod(shape) != values.size:
        raise ShapeMismatch(f"{path} has {values.size} numbers, 'shape' is {shape}", shape=shape, got=values.size)
    return values.reshape(shape)
