"""One session as bytes: what a store keeps, the same in every store.

    offset  size  field
         0     1  layout version, 2
         1     1  flags: bit 0, the session has checkpoints; bit 1, its kept answers are a run
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
        72        state, input log, then the kept answers, oldest first, each:
                  8 seq, 5 digest of its payload, 3 zero, 4 steps T, 4 bytes of outputs, outputs float32 [N,T,O]
                  in a run, which ends at this step and has one step T and the same size per answer, only:
                  5 digest of its payload, outputs float32 [N,1,O]

Layout 1 had no runs; it is read, never written. All numbers are little-endian. Bytes 8 to 24 are the token that
compare-and-set compares: an incarnation is never used twice, so a token names one record for ever.
"""

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from secrets import token_bytes
from typing import Final

LAYOUT: Final = 2
HAS_CHECKPOINTS: Final = 1
RUN: Final = 2
DIGEST_BYTES: Final = 5
"""A changed payload under a number that was used goes unnoticed once in 10**12 times."""
TTL_FOR_EVER: Final = 0xFFFFFFFF
TOKEN: Final = slice(8, 24)

_HEADER = struct.Struct("<BBHI8sQQQQII8sII")
_KINDS: Final = {(1, 0): 0, (2, 0): 0, (2, RUN): RUN}
_ANSWER = struct.Struct("<Q5s3xII")
HEADER_BYTES: Final = _HEADER.size
ANSWER_BYTES: Final = _ANSWER.size
_DIGEST: Final = slice(8, 8 + DIGEST_BYTES)

KEPT_ANSWERS: Final = 16
KEPT_ANSWER_BYTES: Final = 64 * 1024


class BadRecord(Exception):
    """Bytes in the store that are not a record of a layout this server knows."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A kept answer: which payload it answered, and its outputs float32 [N,T,O] as bytes."""

    seq: int
    digest: bytes
    steps: int
    outputs: bytes


def encode_answer(seq: int, digest: bytes, steps: int, outputs: bytes) -> bytes:
    """An answer as it lies in a record; `digest` has DIGEST_BYTES."""
    return _ANSWER.pack(seq, digest, steps, len(outputs)) + outputs


def decode_answer(entry: bytes) -> Answer:
    """The inverse of encode_answer."""
    seq, digest, steps, _ = _ANSWER.unpack_from(entry)
    return Answer(seq, digest, steps, entry[ANSWER_BYTES:])


@dataclass(slots=True)
class Record:
    """A session at one moment. Never changed: every change makes the next revision.

    Not declared frozen: one is made at every step, and a frozen one of 13 fields takes five times as long.
    """

    version: int
    fingerprint: bytes
    examples: int
    step: int
    state: bytes
    answers: tuple[bytes, ...]
    inputs: bytes
    incarnation: bytes
    revision: int
    created_ms: int
    used_ms: int
    ttl_s: int
    flags: int

    @property
    def token(self) -> bytes:
        """What compare-and-set compares; 16 bytes."""
        return self.incarnation + self.revision.to_bytes(8, "little")

    def encode(self) -> bytes:
        """The record as the store keeps it."""
        answers, flags = self.answers, self.flags
        if _are_run(answers, self.step):
            answers, flags = tuple(entry[_DIGEST] + entry[ANSWER_BYTES:] for entry in answers), flags | RUN
        header = _HEADER.pack(
            LAYOUT,
            flags,
            len(self.answers),
            self.examples,
            self.incarnation,
            self.revision,
            self.step,
            self.created_ms,
            self.used_ms,
            self.version,
            self.ttl_s,
            self.fingerprint,
            len(self.state),
            len(self.inputs),
        )
        return b"".join((header, self.state, self.inputs, *answers))

    def advanced(self, step: int, examples: int, state: bytes, answer: bytes, inputs: bytes, now_ms: int) -> "Record":
        """The next revision after a step call: `step` is the number of its last step."""
        answers = (*self.answers[1 - KEPT_ANSWERS :], answer)
        if sum(map(len, answers)) > KEPT_ANSWER_BYTES:
            answers = _newest(answers)
        return Record(
            self.version,
            self.fingerprint,
            examples,
            step,
            state,
            answers,
            inputs,
            self.incarnation,
            self.revision + 1,
            self.created_ms,
            now_ms,
            self.ttl_s,
            self.flags,
        )

    def changed(self, now_ms: int, **fields: object) -> "Record":
        """The next revision with other fields (a set, clear, rewind or checkpoint)."""
        return replace(self, revision=self.revision + 1, used_ms=now_ms, **fields)  # type: ignore[arg-type]

    def answer(self, seq: int) -> Answer | None:
        """The kept answer of the call whose last step was `seq`, None if it is no longer kept."""
        for entry in reversed(self.answers):
            if _ANSWER.unpack_from(entry)[0] == seq:
                return decode_answer(entry)
        return None


def _are_run(answers: tuple[bytes, ...], step: int) -> bool:
    """Whether kept answers are of the last single steps, without a gap, and of one size."""
    if not answers:
        return False
    size, first = len(answers[0]), step + 1 - len(answers)
    return all(
        len(entry) == size and _ANSWER.unpack_from(entry)[::2] == (first + i, 1) for i, entry in enumerate(answers)
    )


def _newest(answers: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The newest answers that fit in the budget; the latest always."""
    total, kept = 0, 0
    for entry in reversed(answers):
        total += len(entry)
        if kept and total > KEPT_ANSWER_BYTES:
            break
        kept += 1
    return answers[-kept:]


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
    return Record(version, fingerprint, examples, step, state, (), b"", token_bytes(8), 1, now, now, ttl_s, 0)


def decode(data: bytes) -> Record:
    """The inverse of Record.encode.

    Raises:
        BadRecord: another layout version, or lengths that do not add up.
    """
    kind = _KINDS.get((data[0], data[1] & ~HAS_CHECKPOINTS)) if len(data) >= HEADER_BYTES else None
    if kind is None:
        raise BadRecord(f"record of {len(data)} bytes, layout {data[0] if data else None}; this server reads {LAYOUT}")
    (_, flags, n_answers, examples, incarnation, revision, step, created_ms, used_ms, version, ttl_s, fingerprint,
     n_state, n_inputs) = _HEADER.unpack_from(data)  # fmt: skip
    at = HEADER_BYTES + n_state + n_inputs
    answers = _run(data, at, n_answers, step) if kind == RUN else _listed(data, at, n_answers)
    return Record(
        version=version,
        fingerprint=fingerprint,
        examples=examples,
        step=step,
        state=data[HEADER_BYTES : HEADER_BYTES + n_state],
        answers=tuple(answers),
        inputs=data[HEADER_BYTES + n_state : HEADER_BYTES + n_state + n_inputs],
        incarnation=incarnation,
        revision=revision,
        created_ms=created_ms,
        used_ms=used_ms,
        ttl_s=ttl_s,
        flags=flags & HAS_CHECKPOINTS,
    )


def _listed(data: bytes, at: int, count: int) -> list[bytes]:
    """Kept answers with their heads, from offset `at` to the record's end."""
    answers: list[bytes] = []
    while len(answers) < count and at + ANSWER_BYTES <= len(data):
        end = at + ANSWER_BYTES + _ANSWER.unpack_from(data, at)[3]
        answers.append(data[at:end])
        at = end
    if at != len(data) or len(answers) != count:
        raise BadRecord(f"record of {len(data)} bytes, its header speaks of {at}")
    return answers


def _run(data: bytes, at: int, count: int, step: int) -> list[bytes]:
    """The kept answers of a run, their heads put back."""
    size, rest = divmod(len(data) - at, count) if count and at <= len(data) else (0, 1)
    if rest or size < DIGEST_BYTES or step < count:
        raise BadRecord(f"record of {len(data)} bytes, {len(data) - at} of them for a run of {count} answers")
    cuts = [data[start : start + size] for start in range(at, len(data), size)]
    return [
        encode_answer(step + 1 - count + i, cut[:DIGEST_BYTES], 1, cut[DIGEST_BYTES:]) for i, cut in enumerate(cuts)
    ]
