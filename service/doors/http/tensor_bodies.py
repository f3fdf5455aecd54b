"""Bodies of the Open Inference Protocol over HTTP: JSON, and raw tensors behind it; errors; packed answers."""

import gzip
import zlib
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from stepcast.errors import InvalidRequest, InvalidSessionId, Malformed, ShapeMismatch, TooLarge
from stepcast.manifest import Manifest

from ...telemetry import Metrics
from ..answers import Answer, dumps, encode, problem
from ..bodies import JSON, UNREADABLE, Positive, decode, part
from ..large import LARGE_BYTES, array, weigh
from ..oip.errors import HTTP_STATUS, Failure, failure
from ..oip.infer import Inferred
from ..oip.requests import NO_PARAMETERS, Flags, Request, Wish, session_of
from ..oip.tensors import FP32, Output, Tensor

LENGTH: Final = b"inference-header-content-length"
"""The header that says how long the JSON part of a body is, unpacked; without it there is nothing behind the JSON."""
RAW: Final = "application/octet-stream"
MOST_TENSORS: Final = 4096
"""In one request."""
SMALL_BYTES: Final = 1024
"""Answers below this are packed only for a client that names one encoding: to most it is a habit."""
_LEVEL: Final = 1  # floats hardly shrink: more would take longer for nothing


Parameter = bool | int | float | str | None


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Parameter] | None = None
    data: msgspec.Raw = msgspec.Raw()


class _Wish(msgspec.Struct):
    name: str
    parameters: dict[str, Parameter] | None = None


class _Body(msgspec.Struct):
    inputs: list[_Tensor]
    outputs: list[_Wish] | None = None
    parameters: dict[str, Parameter] | None = None
    id: str | None = None


class _PlainFlags(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    sequence_id: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False
    binary_data_output: bool = False
    stepcast_seq: Positive | None = None


class _PlainSize(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    binary_data_size: int


class _PlainTensor(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    name: str
    shape: list[int]
    datatype: str
    parameters: _PlainSize


class _PlainWishFlags(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    binary_data: bool


class _PlainWish(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    name: str
    parameters: _PlainWishFlags | None = None


class _PlainBody(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A request as most are: one raw tensor of a sequence."""

    inputs: Annotated[list[_PlainTensor], msgspec.Meta(min_length=1, max_length=1)]
    parameters: _PlainFlags
    id: str = ""
    outputs: list[_PlainWish] = []


class Asked(msgspec.Struct, gc=False):
    """A request, and which of its outputs are answered raw, in order; of outputs that are not named the first."""

    request: Request
    raw: tuple[bool, ...]


def read(body: bytes, json_bytes: int | None, model: str, version: str, manifest: Manifest) -> Asked:
    """A body whose first `json_bytes` are JSON (None: all of it); 0: it is one raw tensor.

    Raises:
        Malformed: the body is not so. InvalidRequest, ShapeMismatch.
    """
    if json_bytes == 0:
        return _bare(body, model, version, manifest)
    plain = None if json_bytes is None else _plain(body, json_bytes, model, version)
    if plain is not None:
        return plain
    if json_bytes is not None and json_bytes > len(body):
        raise Malformed(f"{LENGTH.decode()} is {json_bytes}, the body has {len(body)} bytes")
    text = body if json_bytes is None else body[:json_bytes]
    if len(text) > LARGE_BYTES and text.count(b'"datatype"') > MOST_TENSORS:
        raise TooLarge(f"the body has more than {MOST_TENSORS} tensors", limit=MOST_TENSORS)
    asked = decode(text, _Body, JSON)
    at = len(body) if json_bytes is None else json_bytes
    inputs = []
    for tensor in asked.inputs:
        raw, given = None, tensor.parameters
        if given:
            size = given.get("binary_data_size")
            if size is not None:
                raw = _part(body, at, size, tensor)
                at += len(raw)
            elif "shared_memory_region" in given:
                raise InvalidRequest(f"input {tensor.name[:64]!r} is in shared memory, which this server does not read")
        values = None if raw is not None else _values(tensor)
        inputs.append(Tensor(tensor.name, tensor.datatype, tensor.shape, raw, values))
    if at < len(body):
        raise Malformed(f"there are {len(body) - at} bytes behind the last input")
    parameters = asked.parameters or {}
    default = _flag(parameters, "binary_data_output", False)
    if not asked.outputs:
        return Asked(Request(model, inputs, (), version, asked.id or "", parameters), (default,))
    wishes, raws = [], []
    for wish in asked.outputs:
        given = wish.parameters or {}
        wishes.append(Wish(wish.name, _count(given, wish.name)))
        raws.append(_flag(given, "binary_data", default))
        if "shared_memory_region" in given:
            raise InvalidRequest(f"output {wish.name[:64]!r} is in shared memory, which this server does not write")
    return Asked(Request(model, inputs, wishes, version, asked.id or "", parameters), tuple(raws))


_PLAIN: Final = msgspec.json.Decoder(_PlainBody).decode


def _plain(body: bytes, json_bytes: int, model: str, version: str) -> Asked | None:
    """A plain request, taken apart in one go; None: it is another, or no good, and goes the general way."""
    try:
        asked = _PLAIN(body[:json_bytes])
        given, tensor = asked.parameters, asked.inputs[0]
        name, size = given.sequence_id, tensor.parameters.binary_data_size
        if not name or (name.__class__ is int and not 0 < name < 2**64) or json_bytes + size != len(body):
            return None
        start, end, seq = given.sequence_start, given.sequence_end, given.stepcast_seq
        flags = Flags(name, session_of(name), start, end, seq)
    except (*UNREADABLE, InvalidSessionId):
        return None
    inputs = [Tensor(tensor.name, tensor.datatype, tensor.shape, body[json_bytes:])]
    default = given.binary_data_output
    if not asked.outputs:
        return Asked(Request(model, inputs, (), version, asked.id, NO_PARAMETERS, flags), (default,))
    wishes = [Wish(wish.name) for wish in asked.outputs]
    raw = [default if wish.parameters is None else wish.parameters.binary_data for wish in asked.outputs]
    return Asked(Request(model, inputs, wishes, version, asked.id, NO_PARAMETERS, flags), tuple(raw))


def _bare(body: bytes, model: str, version: str, manifest: Manifest) -> Asked:
    """A request without JSON: the input of one example, of one step or several."""
    steps, rest = divmod(len(body), 4 * manifest.n_features)
    if rest or not steps:
        takes = f"{manifest.n_features} features of FP32 take {4 * manifest.n_features} for each step"
        raise ShapeMismatch(f"the body has {len(body)} bytes, {takes}", got=len(body))
    shape = [1, manifest.n_features] if steps == 1 else [1, steps, manifest.n_features]
    return Asked(Request(model, [Tensor(manifest.input.name, FP32, shape, body)], (), version), (True,))


def _part(body: bytes, at: int, size: Any, tensor: _Tensor) -> bytes:
    """The raw contents of an input, which begin at `at`."""
    if size.__class__ is not int or not 0 <= size <= len(body) - at:
        text = (
            f"input {tensor.name[:64]!r} has binary_data_size {str(size)[:32]}, there are {len(body) - at} bytes left"
        )
        raise Malformed(f"{text} behind the JSON (header {LENGTH.decode()})")
    if bytes(tensor.data):
        raise InvalidRequest(f"input {tensor.name[:64]!r} has both data and binary_data_size")
    return body[at : at + size]


def _values(tensor: _Tensor) -> Any:
    """The values of an input that stand in the JSON; None: there are none."""
    data, path = bytes(tensor.data), f"the data of input {tensor.name[:64]!r}"
    if not data:
        return None
    if len(data) > LARGE_BYTES and tensor.datatype == FP32:
        return array(data, path)
    weigh(data, False, path)
    return part(Any, tensor.data, JSON, path)


def _flag(given: dict[str, Any], name: str, default: bool) -> bool:
    value = given.get(name, default)
    if value.__class__ is not bool:
        raise InvalidRequest(f"parameter {name!r} is neither true nor false")
    return bool(value)


def _count(given: dict[str, Any], output: str) -> int:
    value = given.get("classification", 0)
    if value.__class__ is not int or not 0 <= value < 2**31:
        raise InvalidRequest(f"parameter 'classification' of output {output[:64]!r} is not a number of classes")
    return int(value)


def write(answer: Inferred, raw: tuple[bool, ...]) -> tuple[bytes, int | None]:
    """The body of an answer, and how long its JSON is; None: there is nothing behind it."""
    if raw == _RAW_ALONE and not answer.id and answer.step is not None:
        (output,) = answer.outputs
        key = answer.model, answer.version, output.name, output.shape
        template = _TEMPLATES.get(key) or _template(key, answer, output)
        head = template % (answer.step, len(output.raw))
        return head + output.raw, len(head)
    said: dict[str, Any] = {"model_name": answer.model, "model_version": str(answer.version)}
    if answer.id:
        said["id"] = answer.id
    if answer.step is not None:
        said["parameters"] = answer.parameters
    outputs, parts = [], []
    for output, is_raw in zip(answer.outputs, raw, strict=True):
        document: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if is_raw:
            parts.append(output.raw)
            document["parameters"] = {"binary_data_size": len(output.raw)}
        else:
            values = output.values
            document["data"] = [item.decode() for item in values] if isinstance(values, list) else values
        outputs.append(document)
    said["outputs"] = outputs
    head = dumps(said)
    return (b"".join((head, *parts)), len(head)) if parts else (head, None)


_RAW_ALONE: Final = (True,)
_MOST_TEMPLATES: Final = 1024
_TEMPLATES: Final[dict[Any, bytes]] = {}
"""The JSON of answers of one raw output, to be filled with the step and the output's size."""


def _template(key: Any, answer: Inferred, output: Output) -> bytes:
    """A new one."""
    named = {"model_name": answer.model, "model_version": str(answer.version)}
    tensor = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
    head, rest = (dumps(part).replace(b"%", b"%%")[:-1] for part in (named, tensor))
    tail = b'%s,"parameters":{"binary_data_size":%%d}}]}' % rest
    if len(_TEMPLATES) >= _MOST_TEMPLATES:
        _TEMPLATES.clear()
    template = _TEMPLATES[key] = b'%s,"parameters":{"stepcast_step":%%d},"outputs":[%s' % (head, tail)
    return template


def refusal(error: BaseException, metrics: Metrics | None) -> Answer:
    """An error as the protocol's clients read it: its text under `error`, code and facts beside it."""
    return failed(failure(error, metrics))


def failed(found: Failure) -> Answer:
    """A failure as an answer."""
    document = {"error": found.text, "code": found.error.code, **found.error.facts}
    fields = problem(found.error).fields
    return Answer(HTTP_STATUS[found.status], encode(document, JSON), JSON, fields)


# --- packed answers -------------------------------------------------------------------------------------------------


class Packing(NamedTuple):
    """How a client wants answers packed: by `coding` ("": not at all) if they have at least so many bytes."""

    coding: str
    least_bytes: int = 0

    def pack(self, body: bytes) -> bytes | None:
        """The packed body; None where it stays as it is."""
        if not self.coding or len(body) < self.least_bytes:
            return None
        return gzip.compress(body, _LEVEL) if self.coding == "gzip" else zlib.compress(body, _LEVEL)


PLAIN: Final = Packing("")


def packing_of(accepted: bytes) -> Packing:
    """What an Accept-Encoding header asks for: gzip or deflate, whichever it likes more."""
    best, weight = "", 0.0
    codings = accepted.decode("latin-1").lower().split(",") if accepted else []
    for coding in codings:
        name, _, parameter = coding.partition(";")
        quality = parameter.strip().removeprefix("q=")
        liked = 1.0 if not parameter else float(quality) if quality.replace(".", "", 1).isdigit() else 0.0
        if name.strip() in ("gzip", "deflate") and liked > weight:
            best, weight = name.strip(), liked
    return Packing(best, 0 if len(codings) == 1 else SMALL_BYTES) if best else PLAIN
