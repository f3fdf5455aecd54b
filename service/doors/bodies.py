"""Bodies: bytes to arrays and back, JSON and msgpack, the same for every door.

JSON numbers are decimal text; msgpack carries arrays as raw little-endian float32 in a `bin`, beside a `shape`. A JSON
null is a missing reading, as NaN is; infinity is refused. What is decoded here is checked: types by msgspec, shapes
against the manifest.
"""

import array
import functools
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from stepcast.errors import InvalidRequest, Malformed, NonFinite, ShapeMismatch, StateMismatch, TooLarge
from stepcast.manifest import Manifest

from ..records import block as sheet
from ..records.record import DIGEST_BYTES

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
State = dict[str, dict[str, npt.NDArray[Any]]]

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
Format = Literal["NWC", "NCW"]
Policy = Literal["pin", "reset", "replay"]
Number = float | None
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Ttl = Annotated[float, msgspec.Meta(ge=0, le=2**31)]


class StepBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a step; inputs [F], [N,F] or [N,T,F]."""

    inputs: msgspec.Raw
    seq: Positive | None = None
    mask: Any = None
    format: Format = "NWC"
    shape: list[int] | None = None
    version_policy: Policy | None = None


class BatchBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a batch step: K sessions, one step each; inputs [K,F]."""

    sessions: msgspec.Raw
    """A list of strings; `session_names` reads it."""
    inputs: msgspec.Raw
    seq: list[Positive | None] | None = None
    shape: list[int] | None = None


class PredictBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of predict; inputs [T,F] or [B,T,F], mask [T] or [B,T]."""

    inputs: msgspec.Raw
    mask: Any = None
    format: Format = "NWC"
    shape: list[int] | None = None


class CreateBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of create; everything is optional."""

    session: str | None = None
    examples: Positive | None = None
    version: Positive | None = None
    ttl_s: Ttl | None = None


class StateBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a state put: what a get answers; only `state` is required."""

    state: dict[str, Any]
    session: str | None = None
    model: str | None = None
    layer: str | None = None
    version: Positive | None = None
    step: Annotated[int, msgspec.Meta(ge=0, le=2**53)] | None = None
    examples: Annotated[int, msgspec.Meta(ge=0)] | None = None
    fingerprint: str | None = None


class ForkBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a fork."""

    to: str | None = None


class CheckpointBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a new checkpoint."""

    name: str | None = None


class RewindBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a rewind."""

    to: str


class RolloutBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a rollout: `steps`, and what is known of the future, [H,F] or [N,H,F] with null where it is not."""

    steps: Positive
    inputs: Any = None
    commit: bool = False
    seq: Positive | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None
    shape: list[int] | None = None


B = TypeVar("B", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Checked inputs of a step or predict call.

    `x` (N, T, F) float32, `mask` (N, T) or None, `rank` of the caller's array, `digest` of the payload.
    """

    x: Floats
    mask: Mask | None
    rank: int
    digest: bytes


class _SingleJson(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The plainest step: one example, one step, no mask."""

    inputs: list[float]
    seq: Positive | None = None


class _SingleMsgpack(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    inputs: bytes
    seq: Positive | None = None


Single = tuple[bytes, int | None]
"""Inputs as float32, and seq."""


class SingleReader:
    """Decodes the plainest steps in one go.

    Args:
        features: F of the model.
    """

    def __init__(self, features: int) -> None:
        self._size = 4 * features
        self._pack = struct.Struct(f"<{features}f").pack
        self._json = msgspec.json.Decoder(_SingleJson).decode
        self._msgpack = msgspec.msgpack.Decoder(_SingleMsgpack).decode

    def read(self, body: bytes, content_type: str) -> Single | None:
        """The step, None where it is not of the plainest kind or not a good one: `decode` and `step_inputs` tell."""
        try:
            if content_type == JSON:
                asked: Any = self._json(body)
                data = self._pack(*asked.inputs)  # refuses another number of them, and what float32 does not hold
            else:
                asked = self._msgpack(body)
                data = asked.inputs
                if len(data) != self._size or not is_finite(data):
                    return None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, struct.error, OverflowError):
            return None
        return data, asked.seq


@functools.cache
def single_reader(features: int) -> SingleReader:
    """The reader for models of F features."""
    return SingleReader(features)


def is_finite(data: bytes) -> bool:
    """Whether float32 numbers are all finite; may say no where their squares are not."""
    return _are_finite(np.frombuffer(data, np.float32))


def _are_finite(flat: Floats) -> bool:
    if flat.size <= 16:  # quicker than numpy, and float64 holds the sum
        return math.isfinite(sum(flat.tolist()))
    return math.isfinite(np.vdot(flat, flat))  # dot would warn of an overflow


# --- decoding -------------------------------------------------------------------------------------------------------

_BY_RANK: Final[dict[int, "msgspec.json.Decoder[Any]"]] = {
    1: msgspec.json.Decoder(list[Number]),
    2: msgspec.json.Decoder(list[list[Number]]),
    3: msgspec.json.Decoder(list[list[list[Number]]]),
}
_NAMES: Final[dict[str, Any]] = {
    JSON: msgspec.json.Decoder(list[str]),
    MSGPACK: msgspec.msgpack.Decoder(list[str]),
}
_TYPES: Final = {1: list[Number], 2: list[list[Number]], 3: list[list[list[Number]]]}


def decode(body: bytes, kind: type[B], content_type: str) -> B:
    """A body as its struct.

    Args:
        content_type: JSON or MSGPACK.

    Raises:
        Malformed: not JSON or msgpack. InvalidRequest: a field is missing, unknown or of the wrong type. NonFinite:
            JSON's Infinity.
    """
    try:
        decoded: B = _decoder(kind, content_type).decode(body)
        return decoded
    except msgspec.ValidationError as error:
        if content_type == JSON and "got `float`" in str(error):
            return _lenient(body, kind, error)
        raise InvalidRequest(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if content_type == JSON:
            return _lenient(body, kind, error)
        raise Malformed(f"the body is not msgpack: {error}") from error


@functools.cache
def _decoder(kind: type[msgspec.Struct], content_type: str) -> Any:
    return msgspec.json.Decoder(kind) if content_type == JSON else msgspec.msgpack.Decoder(kind)


def _lenient(body: bytes, kind: type[B], first: Exception) -> B:
    """JSON with NaN and Infinity, as Python's json writes it, and with integers such as 5.0, as others do.

    NaN is a missing reading, infinity is refused.
    """
    try:
        plain = json.loads(body, parse_constant=_constant, parse_float=_finite)
        return msgspec.json.decode(msgspec.json.encode(plain), type=kind)
    except NonFinite:
        raise
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from error
    except (ValueError, RecursionError, TypeError) as error:
        raise Malformed(f"the body is not JSON: {first}") from error


def head(body: bytes, kind: type[B]) -> B:
    """The fields of `kind` of a JSON body that has infinite numbers elsewhere.

    Raises:
        InvalidRequest: one of them is of the wrong type.
    """
    try:
        return msgspec.convert(json.loads(body), kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from error


def _constant(text: str) -> None:
    if text != "NaN":
        raise NonFinite(f"the body has {text}, inputs are finite numbers or null")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NonFinite(f"the body has {text[:32]}, inputs are finite numbers or null")
    whole = abs(value) <= 2**53 and value.is_integer() and not text.startswith("-")
    return int(value) if whole else value


def step_inputs(body: StepBody, content_type: str, manifest: Manifest, steps_limit: int) -> Inputs:
    """The inputs of a step, checked against the model.

    Raises:
        ShapeMismatch, NonFinite, InvalidRequest, TooLarge.
    """
    values = numbers(body.inputs, body.shape, content_type, "$.inputs")
    rank = values.ndim
    x = _to_ntf(values, rank, body.format)
    _check(x, manifest, rank, steps_limit)
    mask = None if body.mask is None else _mask(body.mask, x.shape[:2], rank)
    return Inputs(x, mask, rank, digest(x, mask))


def predict_inputs(body: PredictBody, content_type: str, manifest: Manifest, steps_limit: int) -> Inputs:
    """The inputs of a predict: [T,F] is one sequence, [B,T,F] are many."""
    values = numbers(body.inputs, body.shape, content_type, "$.inputs")
    if values.ndim not in (2, 3):
        raise ShapeMismatch(f"$.inputs has rank {values.ndim}, want [T,F] or [B,T,F]", got=list(values.shape))
    x = values if values.ndim == 3 else values[None]
    x = np.ascontiguousarray(x.transpose(0, 2, 1)) if body.format == "NCW" else x
    _check(x, manifest, values.ndim, steps_limit)
    mask = None
    if body.mask is not None:
        mask = _mask([body.mask] if values.ndim == 2 else body.mask, x.shape[:2], 3)
    return Inputs(x, mask, values.ndim, b"")


@dataclass(frozen=True, slots=True)
class Columns:
    """Checked columns of a batch step: `x` (K, 1, F) float32; each row is a session's step."""

    x: Floats
    seqs: list[int | None] | None
    manifest: Manifest
    finite: bool

    def row(self, i: int) -> Single:
        """One session's step; NonFinite where inputs are infinite or a reading is missing that must not."""
        if not self.finite:
            check_readings(self.x[i : i + 1], self.manifest)
        return self.x[i].tobytes(), None if self.seqs is None else self.seqs[i]


def session_names(raw: msgspec.Raw, content_type: str) -> list[str]:
    """The sessions of a batch step.

    Raises:
        Malformed, InvalidRequest.
    """
    try:
        names: list[str] = _NAMES[content_type].decode(raw)
        return names
    except msgspec.ValidationError as error:
        raise _refused(error, "$.sessions") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(f"$.sessions: {error}") from error


def batch_inputs(body: BatchBody, count: int, content_type: str, manifest: Manifest) -> Columns:
    """The columns of a batch step of `count` sessions, checked against the model.

    Raises:
        ShapeMismatch: they have different lengths, or the wrong number of features. InvalidRequest.
    """
    shape = [count, manifest.n_features] if body.shape is None else body.shape
    values = numbers(body.inputs, shape, content_type, "$.inputs")
    if values.shape != (count, manifest.n_features) or not count:
        raise ShapeMismatch(
            f"$.inputs has shape {list(values.shape)}, want [{count}, {manifest.n_features}]: one row per session",
            got=list(values.shape),
        )
    if body.seq is not None and len(body.seq) != count:
        raise ShapeMismatch(f"$.seq has {len(body.seq)} numbers for {count} sessions")
    finite = _are_finite(values.reshape(-1))
    return Columns(values.reshape(count, 1, -1), body.seq, manifest, finite)


def state_body(fields: dict[str, Any]) -> StateBody:
    """A state put from the fields of a file.

    Raises:
        InvalidRequest: one is of the wrong type.
    """
    try:
        return msgspec.convert(fields, StateBody)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from error


def numbers(raw: Any, shape: list[int] | None, content_type: str, path: str) -> Floats:
    """An array from JSON text, from a msgpack `bin` with `shape` ([F] if there is none), or from nested lists.

    Args:
        raw: msgspec.Raw of a body, or a decoded value.
    """
    if isinstance(raw, msgspec.Raw):
        if content_type == JSON:
            return _from_json(bytes(raw), path)
        raw = _unpack(raw, path)
    if isinstance(raw, bytes):
        return _from_bytes(raw, shape, path)
    rank = _depth(raw)
    if rank not in _TYPES:
        raise ShapeMismatch(f"{path} is not an array of rank 1 to 3")
    try:
        return _array(msgspec.convert(raw, _TYPES[rank]), path)
    except msgspec.ValidationError as error:
        raise _refused(error, path) from error


def _unpack(raw: msgspec.Raw, path: str) -> Any:
    try:
        return msgspec.msgpack.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"{path} is not msgpack: {error}") from error


def _from_json(text: bytes, path: str) -> Floats:
    rank = _rank(text)
    if rank not in _BY_RANK:
        raise ShapeMismatch(f"{path} is not an array of rank 1 to 3")
    try:
        values = _BY_RANK[rank].decode(text)
    except msgspec.ValidationError as error:
        raise _refused(error, path) from error
    except msgspec.DecodeError as error:
        raise Malformed(f"{path}: {error}") from error
    if rank == 1:
        try:
            return np.frombuffer(array.array("f", values), np.float32)
        except TypeError:  # a null
            pass
    return _array(values, path)


def _array(values: Sequence[Any], path: str) -> Floats:
    try:
        with np.errstate(over="ignore"):
            return np.array(values, np.float32)
    except ValueError as error:
        raise ShapeMismatch(f"{path} is ragged: its rows have different lengths") from error


def _from_bytes(raw: bytes, shape: list[int] | None, path: str) -> Floats:
    if len(raw) % 4:
        raise ShapeMismatch(f"{path} has {len(raw)} bytes, float32 takes 4 each")
    values = np.frombuffer(raw, "<f4")
    if shape is None:
        return values
    if len(shape) not in (1, 2, 3) or any(n < 0 for n in shape) or math.prod(shape) != values.size:
        raise ShapeMismatch(f"{path} has {values.size} numbers, 'shape' is {shape}", shape=shape, got=values.size)
    return values.reshape(shape)


def _rank(text: bytes) -> int:
    """How many brackets the text opens before anything else."""
    rank = 0
    for byte in text:
        if byte == 0x5B:
            rank += 1
        elif byte not in b" \t\r\n":
            break
    return rank


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list):
        depth += 1
        value = value[0] if value else None
    return depth


def _refused(error: msgspec.ValidationError, path: str) -> InvalidRequest | NonFinite:
    text = str(error).replace("`$", f"`{path}") if "`$" in str(error) else f"{error} - at `{path}`"
    return NonFinite(text) if text.startswith("Number out of range") else InvalidRequest(text)


def _to_ntf(values: Floats, rank: int, layout: Format) -> Floats:
    if rank == 3:
        return np.ascontiguousarray(values.transpose(0, 2, 1)) if layout == "NCW" else values
    return values.reshape(-1, 1, values.shape[-1]) if values.size else values.reshape(*values.shape[:-1], 1, 0)


def _check(x: Floats, manifest: Manifest, rank: int, steps_limit: int) -> None:
    want = manifest.n_features
    if x.ndim != 3 or x.shape[2] != want or not x.shape[0] or not x.shape[1]:
        names = ", ".join(f.name for f in manifest.features[:8]) + (", ..." if len(manifest.features) > 8 else "")
        got = list(x.shape) if rank == 3 else list(x.shape[1:] if rank == 1 and len(x) == 1 else x.shape[::2])
        raise ShapeMismatch(
            f"inputs have shape {got} (NWC), model {manifest.name!r} takes {want} features ({names}), "
            "at least one example and one step",
            got=got,
            features=want,
        )
    if x.shape[1] > steps_limit:
        raise TooLarge(f"{x.shape[1]} steps in one call (limit {steps_limit}). Send fewer.", limit=steps_limit)
    if not _are_finite(x.reshape(-1)):  # cheap, and false alarms are looked at
        check_readings(x, manifest)


def check_infinite(x: Floats) -> None:
    """Raises NonFinite where inputs (N, T, F) are infinite."""
    if np.isinf(x).any():
        n, t, f = (int(i) for i in np.argwhere(np.isinf(x))[0])
        raise NonFinite(f"inputs are infinite (in float32) at example {n}, step {t}, feature {f}")


def check_readings(x: Floats, manifest: Manifest) -> None:
    """Raises NonFinite where inputs (N, T, F) are infinite, or missing although the model was not trained so."""
    check_infinite(x)
    for name, cut in manifest.feature_slices().items():
        feature = next(f for f in manifest.features if f.name == name)
        if feature.missing == "refuse" and np.isnan(x[:, :, cut]).any():
            raise NonFinite(
                f"feature {name!r} has a missing reading; this model was not trained with any", feature=name
            )


def _mask(value: Any, shape: tuple[int, ...], rank: int) -> Mask | None:
    """The mask as bool (N, T); None where every step is present."""
    try:
        given = np.array(value)
    except ValueError as error:
        raise ShapeMismatch("$.mask is ragged") from error
    want: tuple[int, ...] = shape if rank == 3 else shape[:1]
    if rank == 1 and given.ndim == 0:
        given = given.reshape(1)
    if given.shape != want:
        raise ShapeMismatch(f"$.mask has shape {list(given.shape)}, want {list(want)}", got=list(given.shape))
    if given.dtype.kind not in "biuf" or not np.isin(given, (0, 1)).all():
        raise InvalidRequest("$.mask has values other than 0, 1, true, false")
    mask = given.astype(bool).reshape(shape)
    return None if mask.all() else mask


def digest(x: Floats, mask: Mask | None) -> bytes:
    """DIGEST_BYTES that name a payload: sheet.digest of a single step, else BLAKE2b over shape, values and mask."""
    if x.shape[:2] == (1, 1) and mask is None:
        return sheet.digest(x.tobytes())
    data = x.tobytes() if mask is None else x.tobytes() + mask.tobytes()
    data += struct.pack("<QQ", *x.shape[:2])
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def state_arrays(given: dict[str, Any], manifest: Manifest) -> tuple[State, int]:
    """A whole state, checked against the model.

    Args:
        given: {layer: {key: [N, *shape] nested lists, or bytes}}.

    Returns:
        The arrays, and N.

    Raises:
        StateMismatch: layers or keys are missing or unknown, or have different N. ShapeMismatch, NonFinite.
    """
    _same_names("state", given, manifest.layers)
    state = {layer: layer_arrays(given[layer], manifest, layer)[0] for layer in manifest.layers}
    counts = {len(value) for keys in state.values() for value in keys.values()}
    if len(counts) > 1:
        raise StateMismatch(f"the tensors of the state have different numbers of examples: {sorted(counts)}")
    return state, counts.pop() if counts else 0


def layer_arrays(given: Any, manifest: Manifest, layer: str) -> tuple[dict[str, npt.NDArray[Any]], int]:
    """One layer's state, checked against the model; and its N."""
    tensors = manifest.layers[layer]
    if not isinstance(given, dict):
        raise StateMismatch(f"$.state.{layer} is not an object of keys {sorted(tensors)}")
    _same_names(f"state.{layer}", given, tensors)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for key, tensor in tensors.items():
        arrays[key] = _tensor(given[key], tensor.dtype, tensor.shape, f"$.state.{layer}.{key}")
    counts = {len(value) for value in arrays.values()}
    if len(counts) > 1:
        raise StateMismatch(f"the keys of layer {layer!r} have different numbers of examples: {sorted(counts)}")
    return arrays, counts.pop()


def _same_names(what: str, given: dict[str, Any], want: dict[str, Any]) -> None:
    missing, unknown = sorted(set(want) - set(given)), sorted(map(str, set(given) - set(want)))
    if missing or unknown:
        raise StateMismatch(f"$.{what}: missing {missing}, unknown {unknown}", missing=missing, unknown=unknown)


def _tensor(value: Any, dtype: str, shape: tuple[int, ...], path: str) -> npt.NDArray[Any]:
    try:
        if isinstance(value, np.ndarray):
            with np.errstate(over="ignore"):
                tensor = value.astype(dtype, casting="same_kind")
        elif isinstance(value, bytes):
            flat: npt.NDArray[Any] = np.frombuffer(value, np.dtype(dtype).newbyteorder("<")).astype(dtype)
            tensor = flat.reshape(-1, *shape)
        else:
            tensor = _plain_numbers(value, dtype, path)
    except (ValueError, TypeError) as error:
        raise ShapeMismatch(f"{path} is not an array [N, {', '.join(map(str, shape))}] of {dtype}") from error
    if tensor.shape == (0,):  # of no examples: what a session without a state answers
        tensor = tensor.reshape(0, *shape)
    if tensor.ndim != len(shape) + 1 or tensor.shape[1:] != shape:
        raise ShapeMismatch(f"{path} has shape {list(tensor.shape)}, want [N, {', '.join(map(str, shape))}]")
    if dtype.startswith("float") and not np.isfinite(tensor).all():
        raise NonFinite(f"{path} has values that are not finite")
    return tensor


def _plain_numbers(value: Any, dtype: str, path: str) -> npt.NDArray[Any]:
    """Nested lists as an array of a dtype that holds their values."""
    given = np.array(value)
    if given.dtype.kind not in "biuf":
        raise ShapeMismatch(f"{path} is ragged, or has values that are not numbers of {dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        tensor = given.astype(dtype)
    if not dtype.startswith("float") and not np.array_equal(tensor, given):
        raise ShapeMismatch(f"{path} has values that {dtype} does not hold")
    return tensor


# --- encoding -------------------------------------------------------------------------------------------------------


def by_rank(y: Floats, rank: int, layout: Format) -> Floats:
    """Outputs (N, T, O) in the shape of the caller's inputs."""
    if rank < 3:
        return y[:, 0] if rank == 2 else y[0, 0, :]
    return y.transpose(0, 2, 1) if layout == "NCW" else y


def encode(answer: dict[str, Any], content_type: str) -> bytes:
    """An answer's bytes; numpy arrays in it become nested lists (NaN: null), or raw float32 in msgpack.

    In msgpack an array under the key `outputs` has its shape beside it, under `shape`.
    """
    if content_type == JSON:
        return orjson.dumps(answer, default=_as_list, option=orjson.OPT_SERIALIZE_NUMPY)
    outputs = answer.get("outputs")
    if isinstance(outputs, np.ndarray):
        answer = {**answer, "shape": list(outputs.shape)}
    return msgspec.msgpack.encode(answer, enc_hook=_as_bytes)


def row_texts(values: Floats) -> list[bytes]:
    """The rows of (B, F) as JSON without the brackets, as `encode` writes them."""
    text: bytes = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)
    return text[2:-2].split(b"],[")


def _as_list(value: Any) -> Any:
    if isinstance(value, np.ndarray):  # orjson takes contiguous arrays of the common types by itself
        return np.ascontiguousarray(value) if value.dtype != np.float16 else value.tolist()
    raise TypeError(f"{type(value)} in an answer")


def _as_bytes(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value)} in an answer")
