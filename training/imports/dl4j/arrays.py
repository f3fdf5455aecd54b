"""INDArrays as DL4J writes them (`Nd4j.write`, `Nd4j.saveBinary`): a buffer of shape information, then the data.

All numbers are big-endian, as Java's DataOutputStream writes them. A buffer is the name of an allocation mode, the
count of its elements, the name of their type, and the elements. Modes before 1.0.0-beta count with 32 bits, LONG_SHAPE
and MIXED_DATA_TYPES with 64. The shape information is rank, shape, strides, extras, element-wise stride, order.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stepcast.errors import ManifestError

COUNT_FORMATS: Final = {"JAVACPP": ">i", "DIRECT": ">i", "HEAP": ">i", "LONG_SHAPE": ">q", "MIXED_DATA_TYPES": ">q"}
DTYPES: Final = {"FLOAT": ">f4", "DOUBLE": ">f8", "HALF": ">f2", "INT": ">i4", "LONG": ">i8"}
MOST_AXES: Final = 32  # ND4J's own limit


class Stream:
    """Reads Java's DataOutputStream from bytes.

    Args:
        content: All of it.
        name: What it is, for messages.
    """

    def __init__(self, content: bytes, name: str) -> None:
        self._content, self._at, self.name = content, 0, name

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            ManifestError: there are fewer.
        """
        left = len(self._content) - self._at
        if not 0 <= count <= left:
            raise ManifestError(f"{self.name}: wants {count} bytes at byte {self._at}, {left} are left")
        self._at += count
        return self._content[self._at - count : self._at]

    def number(self, form: str) -> Any:
        """One number in `struct`'s format."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """A UTF string: two bytes of length, then the text. Every text of these files is ASCII."""
        return self.take(self.number(">H")).decode("ascii", "replace")

    def end(self) -> None:
        """See that nothing is left."""
        if self._at != len(self._content):
            raise ManifestError(f"{self.name}: has {len(self._content) - self._at} bytes too many at its end")


def read_array(stream: Stream) -> NDArray[Any]:
    """The next INDArray.

    Elements lie in the order of the strides, whatever the order flag says: DL4J writes a view's strides with the flag
    of the array it was.

    Raises:
        ManifestError: the bytes are no INDArray.
    """
    header = _buffer(stream)
    rank = int(header[0]) if len(header) else -1
    if not 0 <= rank <= MOST_AXES or len(header) != 2 * rank + 4:
        raise ManifestError(f"{stream.name}: shape information of {len(header)} numbers, rank {rank}")
    shape, strides = (tuple(int(n) for n in part) for part in (header[1 : 1 + rank], header[1 + rank : 1 + 2 * rank]))
    data = _buffer(stream)
    if min(shape, default=0) < 0 or math.prod(shape) != len(data) or not _within(shape, strides, len(data)):
        raise ManifestError(f"{stream.name}: shape {shape} with strides {strides} over {len(data)} elements")
    steps = [stride * data.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(data, shape, steps).astype(data.dtype.newbyteorder("="), order="C")


def _within(shape: Sequence[int], strides: Sequence[int], count: int) -> bool:
    """Whether every element of a strided view lies among `count` elements."""
    if not count:
        return True
    return min(strides, default=0) >= 0 and sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) < count


def _buffer(stream: Stream) -> NDArray[Any]:
    mode = stream.text()
    if mode not in COUNT_FORMATS:
        raise ManifestError(f"{stream.name}: is no INDArray (buffer of mode {mode[:40]!r})")
    count, kind = stream.number(COUNT_FORMATS[mode]), stream.text()
    if kind not in DTYPES:
        raise ManifestError(f"{stream.name}: elements of type {kind[:40]!r}, known are {', '.join(DTYPES)}")
    dtype = np.dtype(DTYPES[kind])
    return np.frombuffer(stream.take(count * dtype.itemsize), dtype)
