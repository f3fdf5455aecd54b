"""Records side by side: what a batch of single steps does to all of them, in a few calls instead of some per session.

A sheet is uint8 [B, W], one record (record.py) of equal length per row, its kept answers a run. Only here and
in record.py does anybody know where a record's fields lie.
"""

import struct
from collections.abc import Sequence
from functools import cache
from operator import mul
from typing import Final

import numpy as np
import numpy.typing as npt

from .record import DIGEST_BYTES, HAS_CHECKPOINTS, HEADER_BYTES, KEPT_ANSWER_BYTES, KEPT_ANSWERS, LAYOUT, RUN, TOKEN

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# The header as nine numbers of 64 bits: the first holds layout, flags, number of answers and examples.
_ONE_EXAMPLE: Final = LAYOUT | RUN << 8 | 1 << 32
_ANSWERS_SHIFT: Final = 16
_ONE_MORE: Final = np.array([0, 0, 1, 1, 0, 0, 0, 0, 0], np.uint64)
"""Revision and step."""
_USED: Final = 5
_VERSION: Final = slice(48, 52)
_FACTS: Final = struct.Struct("<BBHI8x8xQ8x8xII8sII")
_WORDS: Final = struct.Struct("<Q8sQQQQ24s")
_FEW_WORDS: Final = 64
"""Up to these, Python's own numbers are faster than numpy's calls."""
_ALL_BITS: Final = (1 << 64) - 1
SPARE_BYTES: Final = 4 << 20
"""A larger array is in no processor's cache and not worth the memory."""


class Spares:
    """Arrays that nobody uses any more, for the next of their shape: they are in the processor's cache.

    Args:
        most: Arrays of one shape, and shapes.
    """

    def __init__(self, most: int = 4) -> None:
        self._most, self._free = most, dict[tuple[int, ...], list[Bytes]]()

    def take(self, shape: tuple[int, ...]) -> Bytes:
        """An array of that shape; its content means nothing."""
        free = self._free.get(shape)
        return free.pop() if free else np.empty(shape, np.uint8)

    def give(self, array: Bytes) -> None:
        """Nobody reads or writes this array any more."""
        if array.nbytes > SPARE_BYTES:
            return
        free = self._free.setdefault(array.shape, [])
        if len(self._free) > self._most:  # others have come into use
            self._free.clear()
        elif len(free) < self._most:
            free.append(array)


class Sheet:
    """The next records of sessions that take a single step each.

    Args:
        old: (B, W) records of equal length, each of a layout and a model version that `fits` said yes to.
        state_bytes: Of one row's state.
        output_bytes: Of one step's outputs.
        now_ms: Wall clock.
        spares: Where the next records' array comes from; None: it is made.

    Attributes:
        new: The next records (B, W').
        full: Whether they have all the kept answers that a record may have: the ones after them are not longer.
        before: The records' states (B, state_bytes), to be read.
        after: The next records' states, to be filled.
        digests, outputs: Of the new kept answer, to be filled: (B, DIGEST_BYTES) and (B, output_bytes).
    """

    __slots__ = ("after", "before", "digests", "full", "new", "outputs", "rows")

    def __init__(
        self, old: Bytes, state_bytes: int, output_bytes: int, now_ms: int, spares: Spares | None = None
    ) -> None:
        (rows, width), entry = old.shape, DIGEST_BYTES + output_bytes
        answers_at = HEADER_BYTES + state_bytes
        kept = min((width - answers_at) // entry, most_kept(output_bytes) - 1)
        shape = rows, answers_at + (kept + 1) * entry
        new = np.empty(shape, np.uint8) if spares is None else spares.take(shape)
        if kept:
            new[:, answers_at:-entry] = old[:, width - kept * entry :]
        header = new[:, :HEADER_BYTES].view(np.uint64)
        np.add(old[:, :HEADER_BYTES].view(np.uint64), _ONE_MORE, out=header)
        header[:, 0] = _ONE_EXAMPLE | (kept + 1) << _ANSWERS_SHIFT
        np.maximum(header[:, _USED], now_ms, out=header[:, _USED])
        self.new, self.full = new, kept + 1 == most_kept(output_bytes)
        self.rows = rows
        self.before = old[:, HEADER_BYTES:answers_at]
        self.after = new[:, HEADER_BYTES:answers_at]
        self.digests = new[:, -entry : width_of(new) - output_bytes]
        self.outputs = new[:, width_of(new) - output_bytes :]

    def records(self) -> list[bytes]:
        """The next records."""
        return as_records(self.new)


def side_by_side(records: Sequence[bytes]) -> Bytes:
    """Records of equal length as (B, W)."""
    return np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)


def width_of(sheet: Bytes) -> int:
    """W of a sheet (B, W)."""
    return int(sheet.shape[1])


def next_record(
    old: bytes, state: bytes, named: bytes, outputs: bytes, state_bytes: int, output_bytes: int, now_ms: int
) -> bytes:
    """What a Sheet of one record makes, by hand: numpy's calls would cost more than the model's run.

    Args:
        state, named, outputs: Of the step: the new state, the digest of its inputs, its outputs.
    """
    entry, answers_at = DIGEST_BYTES + output_bytes, HEADER_BYTES + state_bytes
    kept = min((len(old) - answers_at) // entry, most_kept(output_bytes) - 1)
    _, incarnation, revision, step, created_ms, used_ms, rest = _WORDS.unpack_from(old)
    first = _ONE_EXAMPLE | (kept + 1) << _ANSWERS_SHIFT
    head = _WORDS.pack(first, incarnation, revision + 1, step + 1, created_ms, max(used_ms, now_ms), rest)
    return b"".join((head, state, old[len(old) - kept * entry :], named, outputs))


def most_kept(output_bytes: int) -> int:
    """How many kept answers of single steps a record has at most."""
    return max(1, min(KEPT_ANSWERS, KEPT_ANSWER_BYTES // (24 + output_bytes)))


def fits(
    record: bytes, fingerprint: bytes, version: int, state_bytes: int, output_bytes: int
) -> tuple[int, int] | None:
    """Step and time to live (as in the record) of a session that a Sheet takes, None: it takes the long way.

    That is one example without checkpoints or input log, whose kept answers are a run, on the version asked for.
    """
    if len(record) < HEADER_BYTES:
        return None
    layout, flags, answers, examples, step, made_by, ttl_s, made_as, n_state, n_inputs = _FACTS.unpack_from(record)
    if layout != LAYOUT or flags & HAS_CHECKPOINTS or examples != 1 or n_inputs or n_state != state_bytes:
        return None
    if (made_by, made_as) != (version, fingerprint) or (answers and not flags & RUN):
        return None
    if len(record) != HEADER_BYTES + state_bytes + answers * (DIGEST_BYTES + output_bytes):
        return None
    return step, ttl_s


def version(record: bytes) -> int:
    """The model version that made a record's state; 0 where it is too short to be a record."""
    return int.from_bytes(record[_VERSION], "little")


# --- digests --------------------------------------------------------------------------------------------------------


def digests(x: Floats) -> Bytes:
    """DIGEST_BYTES per row (B, F) that name the inputs of a single step.

    The upper bits of a multilinear hash modulo 2**64 over the numbers' 32-bit words (Dietzfelbinger 1996; Lemire and
    Kaser 2014). It tells payloads apart, it is no defence: whoever may step a session gains nothing from a collision.
    """
    words = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    named: Bytes = (words @ _keys(x.shape[1])).astype("<u8", copy=False).view(np.uint8).reshape(len(x), 8)
    return named[:, -DIGEST_BYTES:]


def digest(data: bytes) -> bytes:
    """The same of one row, given as bytes."""
    count = len(data) // 4
    if count > _FEW_WORDS:
        return digests(np.frombuffer(data, np.float32)[None]).tobytes()
    words, keys = _few(count)
    total: int = sum(map(mul, words.unpack(data), keys)) & _ALL_BITS
    return total.to_bytes(8, "little")[-DIGEST_BYTES:]


@cache
def _few(count: int) -> tuple[struct.Struct, list[int]]:
    """How to read `count` words, and their keys."""
    return struct.Struct(f"<{count}I"), _keys(count).tolist()


@cache
def _keys(count: int) -> npt.NDArray[np.uint64]:
    """`count` odd numbers of splitmix64 (Steele, Lea and Flood 2014), started at 0."""
    z: npt.NDArray[np.uint64] = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def as_records(rows: Bytes) -> list[bytes]:
    """Records that lie side by side (B, W), one by one."""
    made: list[bytes] = rows.view(f"V{rows.shape[1]}")[:, 0].tolist()  # some times as fast as cutting
    return made


class Block:
    """The next records of sessions that are stepped together, side by side."""

    def __init__(
        self,
        keys: Sequence[str],
        old: Bytes | Sequence[bytes] | None,
        new: Bytes | Sequence[bytes],
        ttl_s: float | None,
        stays: bool = False,
    ) -> None:
        self.keys, self.ttl_s, self.stays, self.touch_sides = keys, ttl_s, stays, False
        self.old = old if isinstance(old, np.ndarray) else None
        self._old, self._new = old, new
        self.place: object = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def new(self) -> Bytes:
        """The next records (B, W)."""
        return self._new if isinstance(self._new, np.ndarray) else side_by_side(self._new)

    @property
    def tokens(self) -> Bytes | None:
        """The tokens expected (B, 16)."""
        if self.old is not None:
            return self.old[:, TOKEN]
        return None if self._old is None else side_by_side(self.expected())

    def records(self) -> list[bytes]:
        """The next records one by one."""
        return as_records(self._new) if isinstance(self._new, np.ndarray) else list(self._new)

    def expected(self) -> list[bytes]:
        """The tokens expected one by one."""
        if isinstance(self._old, np.ndarray):
            return as_records(np.ascontiguousarray(self._old[:, TOKEN]))
        return [b""] * len(self) if self._old is None else [record[TOKEN] for record in self._old]
