"""Answers: content types, encoding, and errors as problem documents. The same for every door."""

from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import orjson

from stepcast.errors import StepcastError, UnsupportedMediaType

from ..telemetry import Metrics, as_ours
from .bodies import JSON, MSGPACK
from .hosts import other_page
from .state_files import NPZ, SAFETENSORS

PROBLEM: Final = "application/problem+json"
FILES: Final = (SAFETENSORS, NPZ)
Headers = dict[bytes, bytes]  # by name in lower case

_SAME: Final = {"": JSON, "application/x-msgpack": MSGPACK, "application/vnd.msgpack": MSGPACK}
_SAME["application/x-www-form-urlencoded"] = JSON  # curl -d without a header
_SIMPLE: Final = frozenset({b"", b"application/x-www-form-urlencoded", b"multipart/form-data", b"text/plain"})


class Answer(NamedTuple):
    """An answer over HTTP; `fields` are its headers beside content type and length."""

    status: int
    body: bytes
    kind: str
    fields: dict[str, str]


def problem(error: BaseException, metrics: Metrics | None = None) -> Answer:
    """An error as an answer. Never fails, whatever the error's facts are."""
    ours = as_ours(error)
    fields = {"www-authenticate": "Bearer"} if ours.status == 401 else {}
    if ours.retry_after_s is not None:
        fields["retry-after"] = str(max(1, round(ours.retry_after_s)))
    return Answer(ours.status, encode(document(ours, metrics), JSON), PROBLEM, fields)


def head_of(answer: Answer, fields: bytes) -> bytes:
    """The head of an answer up to the content length."""
    line = f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}\r\n"
    lines = "".join(f"{name}: {value}\r\n" for name, value in answer.fields.items())
    kind = f"{line}content-type: {answer.kind}\r\n{lines}".encode("latin-1")
    return b"%s%scontent-length: " % (kind, fields)


def document(error: StepcastError, metrics: Metrics | None = None) -> dict[str, Any]:
    """An error's problem document; the metrics count it."""
    if metrics is not None:
        metrics.errors_of(error.code).inc()
    return error.problem()


def request_type(headers: Headers, files: bool = False) -> str:
    """The body's content type, JSON where none is named; UnsupportedMediaType where it is unknown, or no `files`."""
    named = headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
    known = (JSON, MSGPACK, *FILES) if files else (JSON, MSGPACK)
    named = _SAME.get(named, named)
    if named not in known:
        raise UnsupportedMediaType(f"content type {named!r} is none of {', '.join(known)}", supported=list(known))
    return named


def check_page(headers: Headers) -> None:
    """Refuse what pages of other sites can send unasked: the content types of forms, or none.

    For any other type a browser asks first (CORS), and we agree to the origins of the settings alone.

    Raises:
        UnsupportedMediaType: a browser sent this for another site's page, with such a type.
    """
    if other_page(headers) and headers.get(b"content-type", b"").partition(b";")[0].strip().lower() in _SIMPLE:
        known = [JSON, MSGPACK]
        raise UnsupportedMediaType(
            f"pages of other sites must name a content type: {', '.join(known)}", supported=known
        )


def answer_type(headers: Headers, sent: str, files: bool = False) -> str:
    """The answer's content type: what Accept names, else the request's."""
    accept = headers.get(b"accept", b"").decode("latin-1")
    for kind in (MSGPACK, *FILES) if files else (MSGPACK,):
        if kind in accept:
            return kind
    return JSON if JSON in accept or sent not in (JSON, MSGPACK) else sent


def _as_list(value: Any) -> Any:
    if isinstance(value, np.ndarray):  # orjson takes contiguous arrays of the common types by itself
        return np.ascontiguousarray(value) if value.dtype != np.float16 else value.tolist()
    raise TypeError(f"{type(value)} in an answer")


dumps: Final[Callable[[Any], bytes]] = partial(orjson.dumps, default=_as_list, option=orjson.OPT_SERIALIZE_NUMPY)
"""JSON; arrays become nested lists, NaN null."""


def _as_bytes(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value)} in an answer")


pack: Final = msgspec.msgpack.Encoder(enc_hook=_as_bytes).encode  # arrays become little-endian bytes


def encode(answer: dict[str, Any], content_type: str) -> bytes:
    """An answer's bytes; numpy arrays in it become nested lists (NaN: null), or raw float32 in msgpack.

    In msgpack an array under the key `outputs` has its shape beside it, under `shape`; so have arrays by name, which
    have one shape.
    """
    shape = _shape(answer.get("outputs")) if content_type == MSGPACK else []
    if shape:
        answer = {**answer, "shape": shape}
    write = dumps if content_type == JSON else pack
    try:
        return write(answer)
    except (TypeError, ValueError, OverflowError):  # an error repeats what the caller said: text or numbers of any kind
        return write(_sayable(answer))


def _shape(outputs: Any) -> list[int]:
    """The shape of outputs, or of those by name; [] where they are no arrays."""
    while isinstance(outputs, dict) and outputs:
        outputs = next(reversed(outputs.values()))  # of a classifier's the probabilities
    return list(outputs.shape) if isinstance(outputs, np.ndarray) else []


def _sayable(value: Any) -> Any:
    """The same with text that UTF-8 has, and numbers of 64 bits."""
    if isinstance(value, dict):
        return {_sayable(key): _sayable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value
