"""Tensors of the Open Inference Protocol: between their bytes or lists and numpy."""

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from stepcast.errors import InvalidRequest, ShapeMismatch

Texts = npt.NDArray[np.object_]

FP32: Final = "FP32"
BYTES: Final = "BYTES"
BF16: Final = "BF16"
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    **{f"UINT{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"INT{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    BF16: np.dtype("<u2"),  # the upper half of a float32
}
"""Numbers by datatype, as they lie in raw contents: little-endian, row-major."""
_HALVES: Final = ("FP16", BF16)
_LENGTH: Final = struct.Struct("<I")
_PLAIN: Final = frozenset({int, float, bool, type(None)})


class Tensor(msgspec.Struct, gc=False):
    """A tensor of a request: raw contents, or values in row-major order, as a list, flat or nested, or an array."""

    name: str
    datatype: str
    shape: list[int]
    raw: bytes | None = None
    values: Any = None

    @property
    def bytes(self) -> int:
        """About how many it takes."""
        return 8 * len(self.values) if self.raw is None and hasattr(self.values, "__len__") else len(self.raw or b"")


class Output(msgspec.Struct, gc=False):
    """A tensor of an answer: FP32, NaN where a step was masked, or BYTES; its raw contents."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def values(self) -> npt.NDArray[np.float32] | list[bytes]:
        """Its elements in row-major order."""
        return _items(self) if self.datatype == BYTES else np.frombuffer(self.raw, "<f4")


def numbers(tensor: Tensor, into: Any = np.float32) -> npt.NDArray[Any]:
    """A tensor's numbers in its shape, as float32 or `into`; a value that is null is a missing reading, NaN.

    Raises:
        InvalidRequest: the datatype is none of numbers, or values are not. ShapeMismatch: they do not fill the shape.
    """
    dtype = DTYPES.get(tensor.datatype)
    if dtype is None:
        known = ", ".join(DTYPES)
        raise InvalidRequest(f"input {tensor.name!r} has datatype {tensor.datatype!r}, want one of {known}")
    if tensor.raw is None:
        return _shaped(tensor, _from_values(tensor, into))
    count, rest = divmod(len(tensor.raw), dtype.itemsize)
    if rest:
        takes = f"{tensor.datatype} takes {dtype.itemsize} each"
        raise ShapeMismatch(f"input {tensor.name!r} has {len(tensor.raw)} bytes, {takes}")
    array = np.frombuffer(tensor.raw, dtype, count)
    if tensor.datatype == BF16:
        return _shaped(tensor, (array.astype(np.uint32) << 16).view(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        return _shaped(tensor, array.astype(into))


def texts(tensor: Tensor) -> Texts:
    """The texts of a BYTES tensor in its shape.

    Raises:
        InvalidRequest: it is none, or not UTF-8. ShapeMismatch: it has another number of texts than its shape.
    """
    if tensor.datatype != BYTES:
        raise InvalidRequest(f"input {tensor.name!r} has datatype {tensor.datatype!r}, want {BYTES}")
    found = _flat(tensor.values) if tensor.raw is None else _items(tensor)
    try:
        decoded = [item.decode() if isinstance(item, bytes) else item for item in found]
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input {tensor.name!r} has text that is not UTF-8") from error
    if not all(isinstance(item, str) for item in decoded):
        raise InvalidRequest(f"input {tensor.name!r} has values that are not text")
    array = np.empty(len(decoded), object)
    array[:] = decoded
    return _shaped(tensor, array)


def bytes_output(name: str, shape: tuple[int, ...], items: Sequence[bytes]) -> Output:
    """A tensor of BYTES."""
    return Output(name, BYTES, shape, b"".join(_LENGTH.pack(len(item)) + item for item in items))


def _items(tensor: Tensor | Output) -> list[bytes]:
    """The elements of raw BYTES: each its length, then itself."""
    raw, at, items = tensor.raw or b"", 0, []
    while at < len(raw):
        size = _LENGTH.unpack_from(raw, at)[0] if at + _LENGTH.size <= len(raw) else len(raw)
        at += _LENGTH.size + size
        if at > len(raw):
            raise ShapeMismatch(f"input {tensor.name!r} ends within an element")
        items.append(raw[at - size : at])
    return items


def _flat(values: Any) -> list[Any]:
    """The values of a list, flat or nested."""
    if not isinstance(values, list | tuple):
        return [values]
    flat: list[Any] = []
    todo = [iter(values)]
    while todo:
        for value in todo[-1]:
            if isinstance(value, list | tuple):
                todo.append(iter(value))
                break
            flat.append(value)
        else:
            todo.pop()
    return flat


def _from_values(tensor: Tensor, into: Any) -> npt.NDArray[Any]:
    if tensor.datatype in _HALVES:
        raise InvalidRequest(f"input {tensor.name!r} is {tensor.datatype}, which has no values. Send raw contents.")
    if tensor.values is None:
        raise InvalidRequest(f"input {tensor.name!r} has no data")
    if isinstance(tensor.values, np.ndarray):
        return tensor.values.reshape(-1).astype(into, copy=False)
    flat = tensor.values if isinstance(tensor.values, list) else list(tensor.values)
    if not _PLAIN.issuperset(map(type, flat)):
        flat = _flat(flat)
        if not _PLAIN.issuperset(map(type, flat)):
            raise InvalidRequest(f"input {tensor.name!r} has values that are not numbers")
    try:
        with np.errstate(over="ignore"):
            return np.array(flat, into)
    except OverflowError as error:
        raise InvalidRequest(f"input {tensor.name!r} has values that {tensor.datatype} does not hold") from error


def _shaped(tensor: Tensor, flat: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values in the tensor's shape."""
    shape: Sequence[int] = tensor.shape
    # The product alone is no proof: a 0 in it hides numbers that numpy cannot take.
    small = len(shape) <= 8 and all(0 <= n <= max(1, flat.size) for n in shape)
    if not small or math.prod(shape) != flat.size:
        text = f"input {tensor.name!r} has {flat.size} elements, its shape is {list(shape)[:8]}"
        raise ShapeMismatch(text, got=flat.size)
    return flat.reshape(tuple(shape))
