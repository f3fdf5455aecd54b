"""A session's bytes are what service/records/record.py's first lines say, by value."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.records import block as sheet
from service.records import record as records
from service.records.record import DIGEST_BYTES, BadRecord, Record, decode, encode_answer, new_record

pytestmark = pytest.mark.service

WHOLE = Record(
    version=3,
    fingerprint=bytes.fromhex("0011223344556677"),
    examples=2,
    step=1000,
    state=b"ssssssss",
    answers=(encode_answer(999, b"dig-1", 1, b"aaaa"), encode_answer(1000, b"dig-2", 2, b"bbbbbbbb")),
    inputs=b"iiii",
    incarnation=b"INCARNAT",
    revision=42,
    created_ms=1_700_000_000_000,
    used_ms=1_700_000_000_001,
    ttl_s=60,
    flags=1,
)
BYTES = (
    b"\x02\x01"
    + struct.pack("<HI", 2, 2)
    + b"INCARNAT"
    + struct.pack("<QQQQ", 42, 1000, 1_700_000_000_000, 1_700_000_000_001)
    + struct.pack("<II", 3, 60)
    + bytes.fromhex("0011223344556677")
    + struct.pack("<II", 8, 4)
    + b"ssssssss"
    + b"iiii"
    + struct.pack("<Q5s3xII", 999, b"dig-1", 1, 4)
    + b"aaaa"
    + struct.pack("<Q5s3xII", 1000, b"dig-2", 2, 8)
    + b"bbbbbbbb"
)


def test_the_layout_is_the_documented_one() -> None:
    """Every field at its offset; the header is 72 bytes; the token is bytes 8 to 24."""
    assert WHOLE.encode() == BYTES
    assert decode(BYTES) == WHOLE
    assert records.HEADER_BYTES == 72
    assert BYTES[72:80] == b"ssssssss"
    assert BYTES[records.TOKEN] == WHOLE.token == b"INCARNAT" + (42).to_bytes(8, "little")


def test_the_documented_offsets_are_those_of_the_layout() -> None:
    """The table in the module's docstring speaks of the struct that packs."""
    lines = [line.split() for line in (records.__doc__ or "").splitlines() if line.startswith("    ")]
    table = [
        (int(words[0]), int(words[1]))
        for words in lines
        if len(words) > 2 and words[0].isdigit() and words[1].isdigit()
    ]
    offsets = [offset for offset, _ in table if offset < 72]
    sizes = [size for offset, size in table if offset < 72]
    assert offsets == [sum(sizes[:i]) for i in range(len(sizes))]
    assert sum(sizes) == records.HEADER_BYTES


def test_a_record_that_lies_is_refused() -> None:
    """Another layout, cut anywhere, longer than it says."""
    for wrong in (
        b"",
        b"\x03" + BYTES[1:],
        b"\x02\x04" + BYTES[2:],
        b"\x01\x02" + BYTES[2:],
        BYTES + b"x",
        BYTES[:2] + b"\xff\xff" + BYTES[4:],
    ):
        with pytest.raises(BadRecord):
            decode(wrong)
    for cut in range(len(BYTES)):
        with pytest.raises(BadRecord):
            decode(BYTES[:cut])


RUN = replace(WHOLE, answers=tuple(encode_answer(998 + i, b"dig-%d" % i, 1, b"aaaa") for i in range(3)))
RUN_BYTES = b"\x02\x03" + struct.pack("<H", 3) + BYTES[4:80] + b"iiii" + b"dig-0aaaa" + b"dig-1aaaa" + b"dig-2aaaa"


def test_answers_of_the_last_single_steps_are_a_run() -> None:
    """Seq, T and size are not written where they follow from the header; else they are."""
    assert RUN.encode() == RUN_BYTES
    assert decode(RUN_BYTES) == RUN
    others = [
        replace(RUN, step=1001),
        replace(RUN, answers=RUN.answers[::2]),
        replace(RUN, answers=(*RUN.answers[:2], encode_answer(1000, b"dig-2", 1, b"aaaaaaaa"))),
        replace(RUN, answers=(*RUN.answers[:2], encode_answer(1000, b"dig-2", 2, b"aaaa"))),
        replace(RUN, answers=()),
    ]
    for other in others:
        assert other.encode()[1] & records.RUN == 0
        assert decode(other.encode()) == other


def test_layout_1_is_read() -> None:
    """What a server before wrote; it had no runs."""
    old = b"\x01" + BYTES[1:]
    assert decode(old) == WHOLE
    assert decode(old).encode() == BYTES


def test_a_run_that_lies_is_refused() -> None:
    """Sizes that do not divide, more answers than steps, none at all."""
    few = struct.pack("<Q", 2)
    for wrong in (RUN_BYTES + b"x", RUN_BYTES[:-1], RUN_BYTES[:2] + bytes(2) + RUN_BYTES[4:], RUN_BYTES[:88]):
        with pytest.raises(BadRecord):
            decode(wrong)
    with pytest.raises(BadRecord):
        decode(RUN_BYTES[:24] + few + RUN_BYTES[32:])


@given(st.sampled_from([b"\x01", b"\x02"]), st.binary(max_size=200))
def test_bytes_of_others_are_refused_or_read(layout: bytes, data: bytes) -> None:
    """Whatever lies in a store, decoding ends in a record that is written and read again as it is, or in BadRecord."""
    try:
        found = decode(layout + data)
    except BadRecord:
        return
    assert decode(found.encode()) == found


def test_an_advance_is_the_next_revision_with_its_answer() -> None:
    """Step, state and answer change; what a session is stays."""
    answer = encode_answer(1001, b"dig-3", 1, b"cccc")
    after = WHOLE.advanced(1001, 2, b"tttttttt", answer, b"", 1_700_000_000_002)
    assert after == replace(
        WHOLE, step=1001, state=b"tttttttt", answers=(*WHOLE.answers, answer), inputs=b"", revision=43,
        used_ms=1_700_000_000_002,
    )  # fmt: skip
    assert after.answer(1001) == records.Answer(1001, b"dig-3", 1, b"cccc")
    assert after.answer(7) is None


@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=40))
def test_kept_answers_are_the_newest_within_their_bounds(sizes: list[int]) -> None:
    """At most 16, at most 64 KiB of them, the latest always."""
    session = records.new_record(1, b"f" * 8)
    made = []
    for number, size in enumerate(sizes, 1):
        made.append(encode_answer(number, b"d" * 5, 1, bytes(size)))
        session = session.advanced(number, 1, b"", made[-1], b"", 0)
    kept = session.answers
    assert kept == tuple(made[-len(kept) :])
    assert 1 <= len(kept) <= 16
    assert len(kept) == 1 or sum(map(len, kept)) <= 64 * 1024
    assert decode(session.encode()) == session


def test_incarnations_are_never_used_twice() -> None:
    """A session that is ended and made again has another token at the same revision."""
    assert len({records.new_record(1, b"f" * 8).token for _ in range(1000)}) == 1000


@pytest.mark.parametrize("features", [1, 16, 64, 65])
def test_one_digest_is_that_of_its_row(features: int) -> None:
    """By Python's numbers and by numpy's: the same bytes."""
    x = np.random.default_rng(features).normal(size=(20, features)).astype(np.float32)
    named = sheet.digests(x)
    assert [sheet.digest(row.tobytes()) for row in x] == [bytes(row) for row in named]


@pytest.mark.parametrize("outputs", [1, 4, 2000])
def test_a_record_made_by_hand_is_that_of_a_sheet(outputs: int) -> None:
    """From a session's first step until its kept answers are full, and some more."""
    state_bytes, output_bytes, random = 40, 4 * outputs, np.random.default_rng(outputs)
    first = new_record(3, b"fprint01", step=7, state=bytes(state_bytes), clock=lambda: 5000)
    record = replace(first, examples=1).encode()
    assert sheet.fits(record, b"fprint01", 3, state_bytes, output_bytes) == (7, 0)
    for now_ms in (4000, *range(6000, 6020)):
        state, named, answer = random.bytes(state_bytes), random.bytes(DIGEST_BYTES), random.bytes(output_bytes)
        made = sheet.Sheet(sheet.side_by_side([record]), state_bytes, output_bytes, now_ms)
        made.after[0] = np.frombuffer(state, np.uint8)
        made.digests[0] = np.frombuffer(named, np.uint8)
        made.outputs[0] = np.frombuffer(answer, np.uint8)
        (want,) = made.records()
        record = sheet.next_record(record, state, named, answer, state_bytes, output_bytes, now_ms)
        assert record == want
        assert decode(record).used_ms == max(5000, now_ms)
    assert decode(record).step == 28
