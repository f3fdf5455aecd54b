"""Records side by side: what a call does to all of them, in a few array operations instead of some per session.

A block is what engine and store hand to each other: the next records of sessions of one shape (layout.py).
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .layout import ANSWER_BYTES, DIGEST_BYTES, HAS_CHECKPOINTS, HEADER_BYTES, POSITION, SOURCE, STEP, TOKEN, Advance

Bytes = npt.NDArray[np.uint8]

# The header as nine numbers of 64 bits: the first holds layout, flags, number of answers and examples.
_USED_WORD: Final = 5
_WORDS: Final = struct.Struct("<Q8sQQQQ16s")
_WORDS_BYTES: Final = _WORDS.size
_MOST_SPARES: Final = 4  # of one shape, and shapes
SPARE_BYTES: Final = 4 << 20  # a larger array is in no processor's cache and not worth the memory


@lru_cache(64)
def _counted(steps: int) -> npt.NDArray[np.uint64]:
    """What is added to a header: one revision, T steps."""
    return np.array([0, 0, 1, steps, 0, 0, 0, 0, 0], np.uint64)


class Letter(NamedTuple):
    """What is told of a step: the entry of a stream that it came from, and the fields of one for another stream."""

    stream: bytes
    entry: bytes
    fields: tuple[bytes, ...]  # names and values in turn; all letters have as many


class Outbox(NamedTuple):
    """Where letters go together with records: appended to `sink`, of which about the last `keep` stay (0: all).

    What they were made from is acknowledged for `group`, and deleted if `deletes`.
    """

    sink: bytes
    group: bytes
    keep: int
    deletes: bool


class Spares:
    """Arrays that nobody uses any more, for the next of their shape: they are in the processor's cache."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[Bytes]] = {}

    def take(self, shape: tuple[int, ...]) -> Bytes:
        """An array of that shape; its content means nothing."""
        free = self._free.get(shape)
        return free.pop() if free else np.empty(shape, np.uint8)

    def give(self, array: Bytes) -> None:
        """Nobody reads or writes this array any more."""
        if array.nbytes > SPARE_BYTES:
            return
        free = self._free.setdefault(array.shape, [])
        if len(self._free) > _MOST_SPARES:  # others have come into use
            self._free.clear()
        elif len(free) < _MOST_SPARES:
            free.append(array)


class Block:
    """The next records of sessions that are stepped together, of B distinct keys, in an array from `spares`, if any.

    Attributes:
        advance: How each record changes.
        ttl_s: Seconds until they are forgotten unless written again; None: never.
        old, new: (B, W) the records that they replace, (B, W') the next.
        before, after: The states (B, N x row bytes) of both, to be read and to be filled.
        log: (B, bytes) the inputs that are appended to the log, to be filled; None: none are.
        digests, outputs: Of the new kept answer, to be filled: (B, 2, DIGEST_BYTES / 2) and (B, bytes).
        stays: The caller keeps the block and replaces it whole again: a store may keep `new` itself, and note
            something in `place`, which the caller carries to the next block of these keys. Nobody writes to `old`
            before the store has answered, nor to `new` before it was replaced in turn or given up.
        outbox, letters: What the store tells of each row in the same operation (Outbox); None: nothing.
    """

    __slots__ = (
        *("_records", "advance", "after", "before", "digests", "keys", "letters", "log", "new", "old", "outbox"),
        *("outputs", "place", "stays", "ttl_s"),
    )

    def __init__(
        self, advance: Advance, keys: Sequence[str], old: Bytes, now_ms: int, spares: Spares | None = None
    ) -> None:
        self.advance, self.keys, self.old, self.ttl_s = advance, keys, old, advance.after.ttl_s
        self.stays = False
        self.place: object = None
        self.outbox: Outbox | None = None
        self.letters: Sequence[Letter] = ()
        self._records: list[bytes] | None = None
        before, after, entry = advance.before, advance.after, advance.entry
        size = len(old), after.width
        self.new = new = np.empty(size, np.uint8) if spares is None else spares.take(size)
        named_at = after.width - entry
        if after.answers_at < named_at:
            new[:, after.answers_at : named_at] = old[:, advance.answers_from :]
        if before.state_at > HEADER_BYTES:
            new[:, HEADER_BYTES : before.state_at] = old[:, HEADER_BYTES : before.state_at]
        header = new[:, :HEADER_BYTES].view(np.uint64)
        np.add(old[:, :HEADER_BYTES].view(np.uint64), _counted(advance.steps), out=header)
        header[:, 0] = after.first_word
        np.maximum(header[:, _USED_WORD], now_ms, out=header[:, _USED_WORD])
        self.log = self._keep_log(advance)
        self.before = old[:, before.state_at : before.log_at]
        self.after = new[:, after.state_at : after.log_at]
        new[:, named_at + DIGEST_BYTES : named_at + ANSWER_BYTES] = np.frombuffer(advance.mark, np.uint8)
        self.digests = new[:, named_at : named_at + DIGEST_BYTES].reshape(len(old), 2, -1)
        self.outputs = new[:, named_at + ANSWER_BYTES :]

    def _keep_log(self, advance: Advance) -> Bytes | None:
        """Take over what is kept of the input log; where the new inputs go."""
        after, kept = advance.after, advance.before.answers_at - advance.log_from
        if kept:
            self.new[:, after.log_at : after.log_at + kept] = self.old[:, advance.log_from : advance.before.answers_at]
        log_bytes = after.answers_at - after.log_at
        if log_bytes != advance.before.answers_at - advance.before.log_at:
            self.new[:, HEADER_BYTES - 4 : HEADER_BYTES] = np.frombuffer(log_bytes.to_bytes(4, "little"), np.uint8)
        return self.new[:, after.log_at + kept : after.answers_at] if advance.log_new else None

    def feed(self, positions: bytes) -> None:
        """Fill in where the inputs of each row came from (layout.POSITION); its step is that of the new record."""
        source = self.new[:, HEADER_BYTES : HEADER_BYTES + SOURCE.size]
        source[:, : POSITION.size] = np.frombuffer(positions, np.uint8).reshape(-1, POSITION.size)
        source[:, POSITION.size :] = self.new[:, STEP]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def touch_sides(self) -> bool:
        """Whether the sessions have side records, which get the new time to live too."""
        return bool(self.advance.after.flags & HAS_CHECKPOINTS)

    @property
    def tokens(self) -> Bytes | None:
        """The tokens (B, 16) that the stored records must have; None: there must be no records."""
        return None if self.advance.before.fresh else self.old[:, TOKEN]

    def records(self) -> list[bytes]:
        """The next records, one by one."""
        if self._records is None:
            self._records = as_records(self.new)
        return self._records

    def expected(self) -> list[bytes]:
        """The tokens, one by one; b"" where there must be no record."""
        if self.advance.before.fresh:
            return [b""] * len(self.keys)
        return as_records(np.ascontiguousarray(self.old[:, TOKEN]))


class LoneBlock(Block):
    """The next record of one session, made by hand: numpy's calls would cost more than the model's run.

    `parts` of the call: new state, name of its payload, outputs float32 [N,T,O]; `log`: inputs appended to the log;
    `position`: where they came from (layout.POSITION), "" where that is no source.
    """

    __slots__ = ("_old_record",)

    def __init__(
        self,
        advance: Advance,
        key: str,
        old: bytes,
        now_ms: int,
        parts: tuple[bytes, bytes, bytes],
        log: bytes = b"",
        position: bytes = b"",
    ) -> None:
        self.advance, self.keys, self.ttl_s = advance, (key,), advance.after.ttl_s
        self.stays, self.place, self._old_record = False, None, old
        self.outbox, self.letters = None, ()
        state, digest, outputs = parts
        before, after = advance.before, advance.after
        _, incarnation, revision, step, created_ms, used_ms, versions = _WORDS.unpack_from(old)
        step, used_ms = step + advance.steps, max(used_ms, now_ms)
        head = _WORDS.pack(after.first_word, incarnation, revision + 1, step, created_ms, used_ms, versions)
        rest, source = old[_WORDS_BYTES : HEADER_BYTES - 4], old[HEADER_BYTES : before.state_at]
        if position:
            source = position + step.to_bytes(8, "little")
        log_bytes = (after.answers_at - after.log_at).to_bytes(4, "little")
        kept_log, kept = old[advance.log_from : before.answers_at], old[advance.answers_from :]
        made = head, rest, log_bytes, source, state, kept_log, log, kept, digest, advance.mark, outputs
        self._records = [b"".join(made)]

    def __getattr__(self, name: str) -> Bytes:
        """The arrays, where somebody asks for them."""
        if name not in ("old", "new"):
            raise AttributeError(name)
        array: Bytes = side_by_side([self._old_record] if name == "old" else self.records())
        setattr(self, name, array)
        return array

    def expected(self) -> list[bytes]:
        return [b"" if self.advance.before.fresh else self._old_record[TOKEN]]


def side_by_side(records: Sequence[bytes]) -> Bytes:
    """Records of equal length as (B, W)."""
    return np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)


def as_records(rows: Bytes) -> list[bytes]:
    """Records that lie side by side (B, W), one by one."""
    made: list[bytes] = rows.view(f"V{rows.shape[1]}")[:, 0].tolist()  # some times as fast as cutting
    return made
