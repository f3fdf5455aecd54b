"""Where the fields of a session's record lie: the only offsets there are.

    offset  size  field
         0     1  layout version, 3
         1     1  flags: bit 0, the session has checkpoints; bit 1, it has a source position
         2     2  number of kept answers
         4     4  N, examples; 0: not fixed yet (no stored state)
         8     8  incarnation: random, chosen when the session is created
        16     8  revision: +1 at every change of the record
        24     8  step: steps taken so far
        32     8  created, ms since the epoch
        40     8  last used, ms since the epoch
        48     4  model version that made the state
        52     4  time to live, s; 0: the server's; 0xffffffff: for ever
        56     8  fingerprint of graph and state layout (manifest)
        64     4  bytes of state (N rows of all state tensors in manifest order)
        68     4  bytes of the input log
        72        the source position, if it has one: 8 bytes that name the source, two unsigned numbers of 8 bytes, and
                  the step that the entry there became;
                  then state, input log and the kept answers, oldest first, each:
                  10 digest of its payload, 3 steps T, 3 outputs O, outputs float32 [N,T,O]

Kept answers are consecutive and end at the record's step, so their numbers follow from it. A digest of layout 2 is
its 5 bytes and 5 zeros, with the top bit of T set. All numbers are little-endian. Bytes 8 to 24 are the token that
compare-and-set compares: an incarnation is never used twice, so a token names one record for ever.

Layout 2 gave each answer 8 bytes seq, 5 digest, 3 zero, 4 T, 4 bytes of outputs, outputs; or, as a run (flag bit 1),
5 digest and outputs alone. Layout 1 had no runs. Both are read and never written.
"""

import struct
from functools import cache
from typing import Final, NamedTuple

LAYOUT: Final = 3
HAS_CHECKPOINTS: Final = 1
HAS_SOURCE: Final = 2
TTL_FOR_EVER: Final = 0xFFFFFFFF
TOKEN: Final = slice(8, 24)
HEADER: Final = struct.Struct("<BBHI8sQQQQII8sII")
HEADER_BYTES: Final = HEADER.size
SOURCE: Final = struct.Struct("<8sQQQ")
POSITION: Final = struct.Struct("<8sQQ")  # of it, what a source says
STEP: Final = slice(24, 32)

DIGEST_BYTES: Final = 10
ANSWER_BYTES: Final = 16  # of a kept answer, before its outputs
KEPT_ANSWERS: Final = 16
KEPT_ANSWER_BYTES: Final = 64 * 1024
MOST_STEPS: Final = (1 << 23) - 1  # of one call: T has 23 bits
LEGACY: Final = 1 << 23

_FACTS: Final = struct.Struct("<xBHI8xQQ16xII8sII")
_SHAPES: Final = 4096  # remembered per model version; sessions keep theirs when these are forgotten

Sizes = tuple[int, ...]


class BadRecord(Exception):
    """Bytes in the store that are not a record of a layout this server knows."""


class Facts(NamedTuple):
    """What stepping needs of a header."""

    flags: int
    answers: int
    examples: int
    revision: int
    step: int
    version: int
    ttl_s: int
    fingerprint: bytes
    state_bytes: int
    log_bytes: int


def facts(record: bytes) -> Facts:
    """Read a record's header; BadRecord where it is not of the present layout, or too short."""
    if len(record) < HEADER_BYTES or record[0] != LAYOUT:
        raise BadRecord(f"record of {len(record)} bytes, layout {record[0] if record else None}, want {LAYOUT}")
    return Facts._make(_FACTS.unpack_from(record))


def source_of(record: bytes) -> tuple[bytes, int, int, int] | None:
    """A record's source position: the source's name, its two numbers, and the step; None: it has none."""
    return SOURCE.unpack_from(record, HEADER_BYTES) if record[1] & HAS_SOURCE else None


def answer_mark(steps: int, outputs: int) -> bytes:
    """What follows the digest in a kept answer: T and O."""
    return (steps | outputs << 24).to_bytes(6, "little")


def state_offset(flags: int) -> int:
    """Where the state of a record with these flags begins."""
    return HEADER_BYTES + (SOURCE.size if flags & HAS_SOURCE else 0)


@cache
def _marks(count: int, size: int) -> struct.Struct:
    """Reads what follows the digests of `count` kept answers of `size` bytes each."""
    return struct.Struct("<" + f"{DIGEST_BYTES}x6s{size - ANSWER_BYTES}x" * count)


def seconds(ttl_s: int, default_s: int) -> float | None:
    """A record's time to live, None for ever; `default_s` is the server's, 0 for ever."""
    return None if ttl_s == TTL_FOR_EVER else float(ttl_s or default_s) or None


class Shape:
    """Where the parts of a record lie; one object for all sessions whose records are alike.

    Attributes:
        fresh: No store has such a record: the session is new.
        ttl_s: Seconds until it is forgotten unless written again; None: never.
        examples, sizes: N; bytes of each kept answer, oldest first.
        input_bytes: Of one step's inputs [N,F].
        state_at, log_at, answers_at, width: Offsets; `width` is the record's length.
        first_word: The header's first eight bytes, as a number.
        single: What `following` made, once it was asked; `fed`: what `feeding` made.
    """

    def __init__(
        self, shapes: "Shapes", fresh: bool, ttl_s: int, flags: int, examples: int, log_bytes: int, sizes: Sizes
    ) -> None:
        self._shapes, self.fresh, self._ttl_s = shapes, fresh, ttl_s
        self.flags, self.examples, self.sizes = flags, examples, sizes
        self.ttl_s = seconds(ttl_s, shapes.default_ttl_s)
        self.input_bytes = examples * shapes.input_bytes
        self.state_at = state_offset(flags)
        self.log_at = self.state_at + examples * shapes.row_bytes
        self.answers_at = self.log_at + log_bytes
        self.width = self.answers_at + sum(sizes)
        self.first_word = LAYOUT | flags << 8 | len(sizes) << 16 | examples << 32
        self.single: Advance | None = None
        self.fed: Advance | None = None

    def following(self) -> "Advance":
        """The change that a single step makes."""
        if self.single is None:
            self.single = self.advance(1, logs=True)
        return self.single

    def feeding(self) -> "Advance":
        """The change that a single step makes whose inputs came from a source."""
        if self.fed is None:
            self.fed = self.advance(1, logs=True, fed=True)
        return self.fed

    def advance(self, steps: int, *, logs: bool, fed: bool = False) -> "Advance":
        """The change that a call of T steps makes; its inputs may be kept if `logs`: no mask, and none left out.

        `fed`: they came from a source, whose position the next record has.
        """
        shapes = self._shapes
        entry = answer_bytes(self.examples, steps, shapes.outputs)
        sizes = *self.sizes, entry
        dropped = len(sizes) - newest(sizes)
        log_bytes = new_log = 0
        if logs and self.examples == 1 and shapes.log_steps:
            new_log = min(steps, shapes.log_steps) * shapes.input_bytes
            log_bytes = min(self.answers_at - self.log_at, shapes.log_steps * shapes.input_bytes - new_log)
        flags = self.flags | HAS_SOURCE if fed else self.flags
        after = shapes.shape(False, self._ttl_s, flags, self.examples, log_bytes + new_log, sizes[dropped:])
        log_from, answers_from = self.answers_at - log_bytes, self.answers_at + sum(self.sizes[:dropped])
        mark = answer_mark(steps, shapes.outputs)
        return Advance(self, after, log_from, new_log, answers_from, entry, mark, steps, steady=after is self)


class Advance(NamedTuple):
    """How a record changes by one call: what is kept of the old one, and what comes new.

    `log_from` and `answers_from` are offsets of what is kept of the old record's input log and kept answers; `log_new`
    bytes of inputs are appended to the log, and one answer of `entry` bytes, with `mark` after its digest, is the last.
    `steady`: the record's shape does not change any more.
    """

    before: Shape
    after: Shape
    log_from: int
    log_new: int
    answers_from: int
    entry: int
    mark: bytes
    steps: int
    steady: bool


class Shapes:
    """The shapes of one model version's records, with the inputs of the last `log_steps` steps.

    Args:
        row_bytes, input_bytes: Of one row's state, and of its inputs by one step.
        outputs: O.
        default_ttl_s: The server's time to live, s; 0: for ever.
    """

    def __init__(
        self, row_bytes: int, input_bytes: int, outputs: int, log_steps: int = 0, default_ttl_s: int = 0
    ) -> None:
        self.row_bytes, self.input_bytes, self.outputs, self.log_steps = row_bytes, input_bytes, outputs, log_steps
        self.default_ttl_s = default_ttl_s
        self._mark = answer_mark(1, outputs)
        self._known: dict[tuple[bool, int, int, int, int, Sizes], Shape] = {}

    def shape(self, fresh: bool, ttl_s: int, flags: int, examples: int, log_bytes: int, sizes: Sizes) -> Shape:
        """The shape of these parts."""
        key = fresh, ttl_s, flags, examples, log_bytes, sizes
        if (known := self._known.get(key)) is None:
            if len(self._known) >= _SHAPES:
                self._known.clear()
            known = self._known[key] = Shape(self, *key)
        return known

    def of(self, record: bytes, found: Facts) -> Shape:
        """The shape of a record of this version; BadRecord where its lengths do not add up."""
        flags, count, examples, revision, _, _, ttl_s, _, state_bytes, log_bytes = found
        if state_bytes != examples * self.row_bytes:
            raise BadRecord(f"a state of {state_bytes} bytes for {examples} rows of {self.row_bytes}")
        at = state_offset(flags) + state_bytes + log_bytes
        single = ANSWER_BYTES + 4 * examples * self.outputs
        sizes: Sizes = (single,) * count
        fits = len(record) == at + count * single
        if not fits or _marks(count, single).unpack_from(record, at).count(self._mark) < count:
            sizes = answer_sizes(record, at, count, examples)
        return self.shape(not revision, ttl_s, flags, examples, log_bytes, sizes)


def answer_bytes(examples: int, steps: int, outputs: int) -> int:
    """Bytes of a kept answer."""
    return ANSWER_BYTES + 4 * examples * steps * outputs


def answer_sizes(record: bytes, at: int, count: int, examples: int) -> Sizes:
    """Bytes of each kept answer; BadRecord where they do not begin at offset `at` and end with the record."""
    sizes: list[int] = []
    start = at
    while len(sizes) < count and start + ANSWER_BYTES <= len(record):
        mark = int.from_bytes(record[start + DIGEST_BYTES : start + ANSWER_BYTES], "little")
        sizes.append(answer_bytes(examples, mark & MOST_STEPS, mark >> 24))
        start += sizes[-1]
    if start != len(record) or len(sizes) != count:
        raise BadRecord(f"record of {len(record)} bytes, its header speaks of {start}")
    return tuple(sizes)


def newest(sizes: Sizes) -> int:
    """How many of the newest kept answers of these sizes fit in the bounds; the latest always does."""
    total = kept = 0
    for size in reversed(sizes[-KEPT_ANSWERS:]):
        total += size
        if kept and total > KEPT_ANSWER_BYTES:
            break
        kept += 1
    return kept
