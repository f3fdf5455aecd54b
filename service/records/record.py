"""One session's record as an object: for everything that is done to a session besides stepping it."""

import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from secrets import token_bytes
from typing import Any, Final, NamedTuple

from . import layout
from .layout import ANSWER_BYTES, DIGEST_BYTES, HAS_CHECKPOINTS, HAS_SOURCE, HEADER, HEADER_BYTES, MOST_STEPS, BadRecord

_RUN: Final = 2
_FLAGS: Final = {1: HAS_CHECKPOINTS, 2: HAS_CHECKPOINTS | _RUN, 3: HAS_CHECKPOINTS | HAS_SOURCE}  # by layout version
_OLD_ANSWER: Final = struct.Struct("<Q5s3xII")
_OLD_DIGEST_BYTES: Final = 5


class Source(NamedTuple):
    """How far a source has been taken in: 8 bytes that name it, and a position of two numbers (an entry's id, say).

    `step` is the session's step that the entry there became.
    """

    name: bytes
    first: int
    second: int
    step: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A kept answer: which payload it answered, and its outputs float32 [N,T,O] as bytes."""

    seq: int
    digest: bytes
    steps: int
    outputs: bytes
    legacy: bool = False  # the digest is one of layout 2 (records/digest.py)


def encode_answer(digest: bytes, steps: int, width: int, outputs: bytes) -> bytes:
    """An answer of T steps as it lies in a record: O is `width`, outputs are float32 [N,T,O]."""
    return digest + layout.answer_mark(steps, width) + outputs


@dataclass(slots=True)
class Record:
    """A session at one moment. Never changed: every change makes the next revision."""

    flags: int  # as they lie in the header, then the rest
    examples: int
    incarnation: bytes
    revision: int
    step: int
    created_ms: int
    used_ms: int
    version: int
    ttl_s: int
    fingerprint: bytes
    state: bytes
    inputs: bytes
    answers: tuple[bytes, ...]
    source: Source | None = None

    @property
    def token(self) -> bytes:
        """What compare-and-set compares; 16 bytes."""
        return self.incarnation + self.revision.to_bytes(8, "little")

    @property
    def size(self) -> int:
        """Bytes of the record."""
        parts = len(self.state) + len(self.inputs) + sum(map(len, self.answers))
        return HEADER_BYTES + (layout.SOURCE.size if self.source else 0) + parts

    def encode(self) -> bytes:
        """The record as the store keeps it."""
        flags = self.flags | (HAS_SOURCE if self.source else 0)
        fixed = self.examples, self.incarnation, self.revision, self.step, self.created_ms, self.used_ms
        sizes = self.version, self.ttl_s, self.fingerprint, len(self.state), len(self.inputs)
        header = HEADER.pack(layout.LAYOUT, flags, len(self.answers), *fixed, *sizes)
        source = layout.SOURCE.pack(*self.source) if self.source else b""
        return b"".join((header, source, self.state, self.inputs, *self.answers))

    def advanced(self, steps: int, examples: int, state: bytes, answer: bytes, now_ms: int) -> "Record":
        """The next revision after a call of `steps` steps whose inputs are not kept."""
        answers, used_ms, step = (*self.answers, answer), max(now_ms, self.used_ms), self.step + steps
        answers = answers[-layout.newest(tuple(map(len, answers))) :]
        return self.changed(used_ms, step=step, examples=examples, state=state, answers=answers, inputs=b"")

    def changed(self, now_ms: int, **fields: object) -> "Record":
        """The next revision with other fields (a set, clear, rewind or checkpoint)."""
        return replace(self, revision=self.revision + 1, used_ms=now_ms, **fields)  # type: ignore[arg-type]

    def kept(self) -> list[Answer]:
        """The kept answers, newest first; each one's seq is the number of its call's last step."""
        found, seq = [], self.step
        for entry in reversed(self.answers):
            mark = int.from_bytes(entry[DIGEST_BYTES:ANSWER_BYTES], "little")
            steps = mark & MOST_STEPS
            found.append(Answer(seq, entry[:DIGEST_BYTES], steps, entry[ANSWER_BYTES:], bool(mark & layout.LEGACY)))
            seq -= steps
        return found

    def answer(self, seq: int) -> Answer | None:
        """The kept answer of the call whose last step was `seq`, None if it is no longer kept."""
        return next((answer for answer in self.kept() if answer.seq == seq), None)


def wall_clock_ms() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def new_record(
    version: int,
    fingerprint: bytes,
    *,
    examples: int = 0,
    state: bytes = b"",
    step: int = 0,
    ttl_s: int = 0,
    clock: Callable[[], int] = wall_clock_ms,
) -> Record:
    """A session that has not been stored yet, at revision 1 of a new incarnation."""
    now = clock()
    return Record(0, examples, token_bytes(8), 1, step, now, now, version, ttl_s, fingerprint, state, b"", ())


def blank(version: int, fingerprint: bytes, now_ms: int) -> bytes:
    """The record that a session's first step replaces: no state, and revision 0, which no store has."""
    return HEADER.pack(layout.LAYOUT, 0, 0, 0, token_bytes(8), 0, 0, now_ms, now_ms, version, 0, fingerprint, 0, 0)


def opened(record: bytes, examples: int, state: bytes) -> bytes:
    """A record without a state (blank, or cleared) with one; its token stays."""
    data = bytearray(record)
    struct.pack_into("<I", data, 4, examples)
    struct.pack_into("<I", data, 64, len(state))
    at = layout.state_offset(record[1])
    data[at:at] = state
    return bytes(data)


def restarted(record: bytes, version: int, fingerprint: bytes) -> bytes:
    """A record at step 0 of a version, without a state; its token stays."""
    fresh = {"examples": 0, "step": 0, "state": b"", "inputs": b"", "answers": ()}
    return replace(decode(record), version=version, fingerprint=fingerprint, **fresh).encode()  # type: ignore[arg-type]


def decode(data: bytes) -> Record:
    """The inverse of Record.encode, also for layouts 1 and 2; BadRecord for another, or lengths that do not add up."""
    number, flags = data[:2] if len(data) >= HEADER_BYTES else (0, 0)
    if number not in _FLAGS or flags & ~_FLAGS[number]:
        found = f"record of {len(data)} bytes, layout {data[0] if data else None}"
        raise BadRecord(f"{found}; this server reads up to {layout.LAYOUT}")
    _, _, count, *fixed, state_bytes, input_bytes = HEADER.unpack_from(data)
    has_source = number == layout.LAYOUT and flags & HAS_SOURCE
    state_at = layout.state_offset(flags) if has_source else HEADER_BYTES
    inputs_at = state_at + state_bytes
    at = inputs_at + input_bytes
    if at > len(data):
        raise BadRecord(f"record of {len(data)} bytes, its header speaks of {at}")
    fields: list[Any] = [flags & HAS_CHECKPOINTS, *fixed, data[state_at:inputs_at], data[inputs_at:at], ()]
    record = Record(*fields)
    if has_source:
        record.source = Source(*layout.SOURCE.unpack_from(data, HEADER_BYTES))
    record.answers = (_answers if number == layout.LAYOUT else _old_answers)(record, data, at, count)
    return record


def _answers(record: Record, data: bytes, at: int, count: int) -> tuple[bytes, ...]:
    answers, steps = [], 0
    for size in layout.answer_sizes(data, at, count, record.examples):
        answers.append(data[at : at + size])
        steps += int.from_bytes(answers[-1][DIGEST_BYTES:ANSWER_BYTES], "little") & MOST_STEPS
        at += size
    if steps > record.step:
        raise BadRecord(f"kept answers of {steps} steps in a record at step {record.step}")
    return tuple(answers)


def _old_answers(record: Record, data: bytes, at: int, count: int) -> tuple[bytes, ...]:
    """The kept answers as layout 3 keeps them."""
    read, expected = _run if data[1] & _RUN else _listed, record.step
    answers: list[bytes] = []
    for seq, digest, steps, outputs in reversed([*read(data, at, count, record.step)]):
        cells = 4 * record.examples * steps
        if seq != expected or not cells or len(outputs) % cells or not 0 < steps <= MOST_STEPS:
            break  # kept answers are consecutive; what is not is none of ours
        name = digest + bytes(DIGEST_BYTES - _OLD_DIGEST_BYTES)
        answers.insert(0, encode_answer(name, steps | layout.LEGACY, len(outputs) // cells, outputs))
        expected -= steps
    return tuple(answers)


def _listed(data: bytes, at: int, count: int, _: int) -> Iterator[tuple[int, bytes, int, bytes]]:
    """seq, digest, T and outputs of kept answers with their heads, from offset `at` to the record's end."""
    while count and at + _OLD_ANSWER.size <= len(data):
        seq, digest, steps, size = _OLD_ANSWER.unpack_from(data, at)
        start, at, count = at + _OLD_ANSWER.size, at + _OLD_ANSWER.size + size, count - 1
        yield seq, digest, steps, data[start:at]
    if at != len(data) or count:
        raise BadRecord(f"record of {len(data)} bytes, its header speaks of {at}")


def _run(data: bytes, at: int, count: int, step: int) -> Iterator[tuple[int, bytes, int, bytes]]:
    """The same of single steps up to `step`, whose heads were left out."""
    size, rest = divmod(len(data) - at, count) if count else (0, 1)
    if rest or size < _OLD_DIGEST_BYTES or step < count:
        raise BadRecord(f"record of {len(data)} bytes, {len(data) - at} of them for a run of {count} answers")
    for seq, start in enumerate(range(at, len(data), size), step + 1 - count):
        outputs_at = start + _OLD_DIGEST_BYTES
        yield seq, data[start:outputs_at], 1, data[outputs_at : start + size]
