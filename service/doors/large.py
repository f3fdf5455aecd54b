"""Large bodies: read in a thread, piece by piece, so that the event loop goes on meanwhile.

A call of msgspec, json or numpy holds the interpreter until it returns, in a thread too. So an array of numbers is
decoded in pieces, and what can only be decoded whole is weighed first: no single call takes more than some tens of ms.
"""

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from stepcast.errors import InvalidRequest, Malformed, NonFinite, QueueFull, ShapeMismatch, TooLarge

from ..engine.arrays import Floats

LARGE_BYTES: Final = 64 * 1024
"""What is larger is read in the thread."""
WAITING_BYTES: Final = 64 * 2**20
"""Of large bodies that wait for the thread; a single one is always taken."""
MOST_CONTAINERS: Final = 2**18  # lists and objects in a part that is decoded whole,
MOST_VALUES: Final = 2**20  # and values
_PIECE_BYTES: Final = 64 * 1024

_POOL: Final = ThreadPoolExecutor(1, thread_name_prefix="stepcast-read")  # has no thread until it is needed
_OPEN, _CLOSE, _COMMA = b"[],"
_NOT_NUMBERS: Final = re.compile(rb'["{]')
_PLACE: Final = re.compile(r"`\$\[(\d+)\]`")
_CONTAINERS: Final = bytes([*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF])  # first bytes of msgpack's maps and lists
_BINS: Final = frozenset({0xC4, 0xC5, 0xC6})
_TOKEN: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[^"NI]{1,65536}|Infinity|NaN|.', re.DOTALL)
_VALUES: Final[Any] = msgspec.json.Decoder(list[float | None])

P = ParamSpec("P")
T = TypeVar("T")


class _Desk:
    """How much waits for the thread."""

    bytes = 0


async def aside(size: int, work: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
    """What `work` returns, which reads so many bytes: in the thread if they are many.

    Raises:
        QueueFull: too much waits for the thread. And what `work` raises.
    """
    if size <= LARGE_BYTES:
        return work(*args, **more)
    if _Desk.bytes and _Desk.bytes + size > WAITING_BYTES:
        text = f"{_Desk.bytes} bytes of large bodies wait to be read (limit {WAITING_BYTES}), got {size} more"
        raise QueueFull(f"{text}. Retry after 0.5 s.", waiting=_Desk.bytes, limit=WAITING_BYTES, retry_after_s=0.5)
    _Desk.bytes += size
    try:
        return await asyncio.get_running_loop().run_in_executor(_POOL, lambda: work(*args, **more))
    finally:
        _Desk.bytes -= size


def size_of(*parts: Any) -> int:
    """Bytes of those parts of a body that are still to be read."""
    return sum(len(memoryview(part)) for part in parts if isinstance(part, msgspec.Raw))


def weigh(part: bytes | memoryview, packed: bool, path: str) -> None:
    """Refuse a part of a body that is to be decoded whole and is made of too many values; TooLarge.

    Args:
        packed: It is msgpack, whose lists and maps are counted by bytes that might begin one.
    """
    if len(part) <= LARGE_BYTES:
        return
    data = bytes(part)
    if packed:
        if data[0] in _BINS:
            return
        containers, values = len(data) - len(data.translate(None, _CONTAINERS)), len(data)
    else:
        containers, values = data.count(b"[") + data.count(b"{"), data.count(b",")
    for count, limit, what in ((containers, MOST_CONTAINERS, "lists and objects"), (values, MOST_VALUES, "values")):
        if count > limit:
            advice = "Send less at once, or raw numbers in msgpack."
            raise TooLarge(f"{path} has {count} {what} (limit {limit}). {advice}", limit=limit)


def array(part: bytes | memoryview, path: str) -> Floats:
    """The array of float32 that JSON text of nested lists of numbers and nulls is; null is NaN.

    Raises:
        ShapeMismatch: it is ragged, has an empty list, or no rank of 1 to 3. InvalidRequest, NonFinite, Malformed.
    """
    text = bytes(part).translate(None, b" \t\r\n")
    rank = len(text) - len(text.lstrip(b"["))
    if not 1 <= rank <= 3:
        raise ShapeMismatch(f"{path} is not an array of rank 1 to 3")
    if _NOT_NUMBERS.search(text):
        raise InvalidRequest(f"Expected `float | null` - at `{path}`")
    if b"[]" in text:
        raise ShapeMismatch(f"{path} has empty lists")
    shape = _shape(text, rank, path)
    values, size = text.translate(None, b"[]"), int(np.prod(shape))
    made, at, filled = np.empty(size, np.float32), 0, 0
    while at < len(values):
        cut = values.find(b",", at + _PIECE_BYTES)
        end = len(values) if cut < 0 else cut
        piece = _piece(values[at:end], filled, shape, path)
        if filled + len(piece) > size:
            break
        made[filled : filled + len(piece)] = piece
        at, filled = end + 1, filled + len(piece)
    if filled != size or at < len(values):
        raise Malformed(f"{path} is not an array of numbers")
    return made.reshape(shape)


def _shape(text: bytes, rank: int, path: str) -> list[int]:
    """The shape of nested lists of this rank, JSON without white space, text and empty lists."""
    data = np.frombuffer(text, np.uint8)
    brackets = np.flatnonzero((data == _OPEN) | (data == _CLOSE))
    opens = data[brackets] == _OPEN
    depth = np.cumsum(np.where(opens, np.int8(1), np.int8(-1)), dtype=np.int16)  # behind each bracket,
    commas = np.add.reduceat((data == _COMMA).view(np.uint8), brackets, dtype=np.int32)  # and up to the next one
    innermost = opens & (depth == rank)
    between = np.diff(brackets, append=brackets[-1] + 1) != 1 + commas  # there is something else than a comma
    if depth.max() > rank or (between & ~innermost).any():
        raise _ragged(path)
    sizes = [
        _size_of_all(np.cumsum(opens & (depth == at + 1))[~opens & (depth == at - 1)], path) for at in range(1, rank)
    ]
    widths = commas[innermost]
    if (widths != widths[0]).any():
        raise _ragged(path)
    return [*sizes, int(widths[0]) + 1]


def _size_of_all(seen: npt.NDArray[np.intp], path: str) -> int:
    """The size of lists of one depth, given how many items there have been at the end of each."""
    counts = np.diff(seen, prepend=0)
    if (counts != counts[0]).any():
        raise _ragged(path)
    return int(counts[0])


def _ragged(path: str) -> ShapeMismatch:
    return ShapeMismatch(f"{path} is ragged: its rows have different lengths")


def _piece(text: bytes, first: int, shape: list[int], path: str) -> Floats:
    """The values of a piece, the `first` of an array of this shape."""
    try:
        with np.errstate(over="ignore"):
            return np.array(_VALUES.decode(b"[%s]" % text), np.float32)
    except msgspec.ValidationError as error:
        said, found = str(error), _PLACE.search(str(error))
        if found is not None:
            place = np.unravel_index(first + int(found[1]), shape)
            said = said.replace(found[0], f"`{path}{''.join(f'[{at}]' for at in place)}`")
        raise (NonFinite if said.startswith("Number out of range") else InvalidRequest)(said) from error
    except msgspec.MsgspecError as error:
        raise Malformed(f"{path}: {error}") from error


def without_constants(body: bytes) -> bytes:
    """JSON as Python writes it, without its NaN: null takes the place; NonFinite where it has an Infinity."""
    if b"NaN" not in body and b"Infinity" not in body:
        return body
    mended = bytearray()
    for found in _TOKEN.finditer(body):
        token = found[0]
        if token == b"Infinity":
            raise NonFinite("the body has Infinity, inputs are finite numbers or null")
        mended += b"null" if token == b"NaN" else token
    return bytes(mended)
