"""Names of payloads: a retry is told from another payload by DIGEST_BYTES kept beside the answer.

A single step is named by two multilinear hashes modulo 2**64 over its 32-bit words (Dietzfelbinger 1996; Lemire and
Kaser 2014), of each of which the upper 40 bits are kept. For words that differ by d, whose lowest set bit is at most
bit 31, one of them agrees with a chance of 2**-33 at most over its random keys, so both do with 2**-66 at most. They
are made for all rows of a batch by one product. Everything else is named by keyed BLAKE2b.
"""

import struct
from functools import lru_cache
from hashlib import blake2b
from operator import mul
from typing import Final

import numpy as np
import numpy.typing as npt

from .block import Bytes
from .layout import DIGEST_BYTES
from .record import Answer

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_LANES: Final = 2
_LANE_BYTES: Final = DIGEST_BYTES // _LANES
_CUT: Final = 8 - _LANE_BYTES
_FEW_WORDS: Final = 64  # up to these, Python's own numbers are faster than numpy's calls
_ALL_BITS: Final = (1 << 64) - 1
_LANE_SHIFT: Final = 192  # of the second key in the number that holds both: sums of the first stay below it
_OLD_BYTES: Final = 5


class Digests:
    """Names payloads; all servers of a store need one secret, and who knows it can make payloads of one name."""

    def __init__(self, secret: bytes = b"") -> None:
        self._secret = blake2b(secret, digest_size=32, person=b"stepcast").digest()
        self._keys = lru_cache(64)(self._make_keys)
        self._few = lru_cache(64)(self._make_few)

    def rows(self, x: Floats) -> Bytes:
        """The names (B, 2, DIGEST_BYTES / 2) of single steps (B, words), each row all inputs of one session."""
        words = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
        sums = words @ self._keys(x.shape[1])
        named: Bytes = sums.astype("<u8", copy=False).view(np.uint8).reshape(len(x), _LANES, 8)
        return named[:, :, _CUT:]

    def row(self, data: bytes) -> bytes:
        """The name of one single step, its inputs as bytes: the same as that of `rows`."""
        count = len(data) // 4
        if count > _FEW_WORDS:
            return self.rows(np.frombuffer(data, np.float32)[None]).tobytes()
        words, keys = self._few(count)
        total: int = sum(map(mul, words.unpack(data), keys))
        first, second = total & _ALL_BITS, total >> _LANE_SHIFT & _ALL_BITS
        return first.to_bytes(8, "little")[_CUT:] + second.to_bytes(8, "little")[_CUT:]

    def call(self, x: Floats, mask: Mask | None) -> bytes:
        """The name of a call of inputs (N, T, F) and a mask (N, T); of a single step without a mask, as `row`."""
        if x.shape[1] == 1 and mask is None:
            return self.row(x.tobytes())
        return self.named(b"call", *_call_parts(x, mask))

    def named(self, kind: bytes, *parts: bytes) -> bytes:
        """The name of anything else; `kind` keeps its names apart from other kinds'."""
        return blake2b(b"".join(parts), digest_size=DIGEST_BYTES, key=self._secret, person=kind).digest()

    def _make_keys(self, count: int) -> npt.NDArray[np.uint64]:
        """Random keys (count, lanes)."""
        seed = int.from_bytes(self._secret, "little") & ((1 << 128) - 1)
        return np.random.Philox(key=seed).random_raw(_LANES * count).reshape(count, _LANES)

    def _make_few(self, count: int) -> tuple[struct.Struct, list[int]]:
        """How to read `count` words, and their keys, both lanes in one number."""
        keys = [first | second << _LANE_SHIFT for first, second in self._keys(count).tolist()]
        return struct.Struct(f"<{count}I"), keys


def _call_parts(x: Floats, mask: Mask | None) -> tuple[bytes, ...]:
    return x.tobytes(), b"" if mask is None else mask.tobytes(), struct.pack("<QQ", *x.shape[:2])


def same_payload(kept: Answer, named: bytes, x: Floats, mask: Mask | None) -> bool:
    """Whether a kept answer is that of a call of inputs (N, T, F), which has the name `named`."""
    if not kept.legacy:
        return kept.digest == named
    return kept.digest[:_OLD_BYTES] == legacy_call(x, mask)


def legacy_call(x: Floats, mask: Mask | None) -> bytes:
    """The five bytes that servers of layout 2 named a call by."""
    if x.shape[:2] == (1, 1) and mask is None:
        words = np.ascontiguousarray(x).view(np.uint32).reshape(-1).astype(np.uint64)
        return int(words @ _legacy_keys(len(words))).to_bytes(8, "little")[-_OLD_BYTES:]
    return blake2b(b"".join(_call_parts(x, mask)), digest_size=_OLD_BYTES).digest()


def legacy_named(kind: bytes, *parts: bytes) -> bytes:
    """The five bytes that servers of layout 2 named anything else by."""
    return blake2b(b"".join((kind, *parts)), digest_size=_OLD_BYTES).digest()


def _legacy_keys(count: int) -> npt.NDArray[np.uint64]:
    """`count` odd numbers of splitmix64 (Steele, Lea and Flood 2014), started at 0."""
    z: npt.NDArray[np.uint64] = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)
