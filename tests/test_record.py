"""A session's bytes are what service/records/layout.py's first lines say, by value."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.records import layout
from service.records.block import Block, LoneBlock, Spares, as_records, side_by_side
from service.records.digest import Digests, legacy_call, legacy_named, same_payload
from service.records.layout import DIGEST_BYTES, POSITION, BadRecord, Shapes, answer_mark, facts, source_of
from service.records.record import Answer, Record, Source, blank, decode, encode_answer, new_record, opened

pytestmark = pytest.mark.service

WHOLE = Record(
    version=3,
    fingerprint=bytes.fromhex("0011223344556677"),
    examples=2,
    step=1000,
    state=b"ssssssss",
    answers=(encode_answer(b"digest-one", 1, 1, b"a" * 8), encode_answer(b"digest-two", 2, 1, b"b" * 16)),
    inputs=b"iiii",
    incarnation=b"INCARNAT",
    revision=42,
    created_ms=1_700_000_000_000,
    used_ms=1_700_000_000_001,
    ttl_s=60,
    flags=1,
    source=Source(b"weather1", 1_700_000_000_002, 7, 40),
)
HEAD = (
    struct.pack("<HI", 2, 2)
    + b"INCARNAT"
    + struct.pack("<QQQQ", 42, 1000, 1_700_000_000_000, 1_700_000_000_001)
    + struct.pack("<II", 3, 60)
    + bytes.fromhex("0011223344556677")
    + struct.pack("<II", 8, 4)
)
BYTES = (
    b"\x03\x03"
    + HEAD
    + b"weather1"
    + struct.pack("<QQQ", 1_700_000_000_002, 7, 40)
    + b"ssssssss"
    + b"iiii"
    + b"digest-one\x01\x00\x00\x01\x00\x00"
    + b"a" * 8
    + b"digest-two\x02\x00\x00\x01\x00\x00"
    + b"b" * 16
)


def test_the_layout_is_the_documented_one() -> None:
    """Every field at its offset; the header is 72 bytes; the token is bytes 8 to 24."""
    assert WHOLE.encode() == BYTES
    assert decode(BYTES) == WHOLE
    assert layout.HEADER_BYTES == 72
    assert BYTES[72:80] == b"weather1"
    assert BYTES[layout.TOKEN] == WHOLE.token == b"INCARNAT" + (42).to_bytes(8, "little")


def test_a_record_without_a_source_has_no_room_for_one() -> None:
    """The state follows the header."""
    plain = replace(WHOLE, source=None)
    assert plain.encode() == b"\x03\x01" + HEAD + BYTES[104:]
    assert decode(plain.encode()) == plain


def test_the_documented_offsets_are_those_of_the_layout() -> None:
    """The table in the module's docstring speaks of the struct that packs."""
    lines = [line.split() for line in (layout.__doc__ or "").splitlines() if line.startswith("    ")]
    table = [
        (int(words[0]), int(words[1]))
        for words in lines
        if len(words) > 2 and words[0].isdigit() and words[1].isdigit()
    ]
    offsets = [offset for offset, _ in table if offset < 72]
    sizes = [size for offset, size in table if offset < 72]
    assert offsets == [sum(sizes[:i]) for i in range(len(sizes))]
    assert sum(sizes) == layout.HEADER_BYTES


def test_a_record_that_lies_is_refused() -> None:
    """Another layout, an unknown flag, cut anywhere, longer than it says, more kept steps than it took."""
    for wrong in (
        b"",
        b"\x04" + BYTES[1:],
        b"\x03\x04" + BYTES[2:],
        b"\x01\x02" + BYTES[2:],
        BYTES + b"x",
        BYTES[:2] + b"\xff\xff" + BYTES[4:],
        BYTES[:24] + struct.pack("<Q", 2) + BYTES[32:],
    ):
        with pytest.raises(BadRecord):
            decode(wrong)
    for cut in range(len(BYTES)):
        with pytest.raises(BadRecord):
            decode(BYTES[:cut])


# --- layouts 1 and 2 ------------------------------------------------------------------------------------------------

LISTED = struct.pack("<Q5s3xII", 998, b"dig-1", 1, 8) + b"a" * 8 + struct.pack("<Q5s3xII", 1000, b"dig-2", 2, 16)
OLD = HEAD + b"ssssssss" + b"iiii" + LISTED + b"b" * 16


def old_answer(digest: bytes, steps: int, outputs: bytes) -> bytes:
    """A kept answer of layout 2 as layout 3 keeps it."""
    return digest + bytes(5) + answer_mark(steps | layout.LEGACY, 1) + outputs


@pytest.mark.parametrize("number", [1, 2])
def test_layouts_1_and_2_are_read_and_written_as_3(number: int) -> None:
    """With heads, as both had them: everything but the digests' width is kept."""
    found = decode(bytes([number, 1]) + OLD)
    answers = old_answer(b"dig-1", 1, b"a" * 8), old_answer(b"dig-2", 2, b"b" * 16)
    assert found == replace(WHOLE, source=None, answers=answers)
    assert decode(found.encode()) == found
    assert found.encode()[0] == 3
    assert found.answer(1000) == Answer(1000, b"dig-2" + bytes(5), 2, b"b" * 16, legacy=True)


def test_a_run_of_layout_2_is_read() -> None:
    """Answers of the last single steps, whose heads were left out."""
    run = b"\x02\x03" + struct.pack("<H", 3) + HEAD[2:] + b"ssssssss" + b"iiii"
    found = decode(run + b"dig-0" + b"a" * 8 + b"dig-1" + b"b" * 8 + b"dig-2" + b"c" * 8)
    assert [(kept.seq, kept.digest[:5], kept.outputs) for kept in found.kept()] == [
        (1000, b"dig-2", b"c" * 8),
        (999, b"dig-1", b"b" * 8),
        (998, b"dig-0", b"a" * 8),
    ]
    for wrong in (run + b"dig-0" + b"a" * 8, run + b"dig-0aaa" * 3 + b"x", run[:2] + bytes(2) + run[4:] + b"x"):
        with pytest.raises(BadRecord):
            decode(wrong)


@given(st.sampled_from([b"\x01", b"\x02", b"\x03"]), st.binary(max_size=200))
def test_bytes_of_others_are_refused_or_read(first: bytes, data: bytes) -> None:
    """Whatever lies in a store, decoding ends in a record that is written and read again as it is, or in BadRecord."""
    try:
        found = decode(first + data)
    except BadRecord:
        return
    assert decode(found.encode()) == found


# --- records of one session -----------------------------------------------------------------------------------------


def test_an_advance_is_the_next_revision_with_its_answer() -> None:
    """Step, state and answer change; what a session is stays."""
    answer = encode_answer(b"digest-3..", 3, 1, b"c" * 24)
    after = WHOLE.advanced(3, 2, b"tttttttt", answer, 1_700_000_000_002)
    assert after == replace(
        WHOLE, step=1003, state=b"tttttttt", answers=(*WHOLE.answers, answer), inputs=b"", revision=43,
        used_ms=1_700_000_000_002,
    )  # fmt: skip
    assert after.answer(1003) == Answer(1003, b"digest-3..", 3, b"c" * 24)
    assert after.answer(1000) == Answer(1000, b"digest-two", 2, b"b" * 16)
    assert after.answer(998) == Answer(998, b"digest-one", 1, b"a" * 8)
    assert after.answer(999) is None


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=40))
def test_kept_answers_are_the_newest_within_their_bounds(widths: list[int]) -> None:
    """At most 16, at most 64 KiB of them, the latest always."""
    session = new_record(1, b"f" * 8)
    made = []
    for width in widths:
        made.append(encode_answer(b"d" * DIGEST_BYTES, 1, width, bytes(4 * width)))
        session = session.advanced(1, 1, b"", made[-1], 0)
    kept = session.answers
    assert kept == tuple(made[-len(kept) :])
    assert 1 <= len(kept) <= 16
    assert len(kept) == 1 or sum(map(len, kept)) <= 64 * 1024
    assert decode(session.encode()) == session


def test_incarnations_are_never_used_twice() -> None:
    """A session that is ended and made again has another token at the same revision."""
    assert len({new_record(1, b"f" * 8).token for _ in range(1000)}) == 1000
    assert len({blank(1, b"f" * 8, 0)[layout.TOKEN] for _ in range(1000)}) == 1000


# --- many records side by side --------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_steps", [0, 5])
@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize(("examples", "outputs"), [(1, 1), (1, 4), (3, 4), (1, 2000)])
def test_a_block_is_what_is_made_by_hand_and_what_a_record_says(
    examples: int, outputs: int, source: bool, log_steps: int
) -> None:
    """From a session's first step on, single steps and calls of five; kept answers and the log fill and go on."""
    shapes, random = Shapes(40, 12, outputs, log_steps), np.random.default_rng(outputs)
    start = blank(3, b"fprint01", 5000)
    if source:
        start = replace(decode(start), source=Source(b"weather1", 8, 9, 1)).encode()
    olds = [opened(start, examples, random.bytes(40 * examples)) for _ in range(4)]
    wants = [decode(old) for old in olds]
    log = b""
    for number in range(40):
        steps, now_ms = (5 if number % 7 == 3 else 1), 4000 + 100 * number
        shape = shapes.of(olds[0], facts(olds[0]))
        assert all(shapes.of(old, facts(old)) is shape for old in olds)
        assert shape.fresh == (number == 0)
        advance = shape.following() if steps == 1 else shape.advance(steps, logs=True)
        block = Block(advance, list("abcd"), side_by_side(olds), now_ms)
        inputs = random.bytes(12 * examples * steps)
        log = (log + inputs)[-60:] if log_steps and examples == 1 else b""
        lones = []
        for row, old in enumerate(olds):
            state, digest, y = (
                random.bytes(40 * examples),
                random.bytes(10),
                random.bytes(4 * examples * steps * outputs),
            )
            block.after[row] = np.frombuffer(state, np.uint8)
            block.digests[row] = np.frombuffer(digest, np.uint8).reshape(2, 5)
            block.outputs[row] = np.frombuffer(y, np.uint8)
            new_log = inputs[len(inputs) - advance.log_new :]
            if block.log is not None:
                block.log[row] = np.frombuffer(new_log, np.uint8)
            lones.append(LoneBlock(advance, "x", old, now_ms, (state, digest, y), new_log))
            answer = encode_answer(digest, steps, outputs, y)
            wants[row] = replace(wants[row].advanced(steps, examples, state, answer, now_ms), inputs=log)
        assert [lone.records() for lone in lones] == [[record] for record in block.records()]
        assert [lone.expected() for lone in lones] == [[token] for token in block.expected()]
        olds = block.records()
        assert [decode(new) for new in olds] == wants
        assert decode(olds[0]).used_ms == max(5000, now_ms)
    assert shape.sizes != ()
    assert decode(olds[0]).source == (Source(b"weather1", 8, 9, 1) if source else None)


@pytest.mark.parametrize("examples", [1, 3])
def test_a_fed_step_leaves_its_position_in_the_record(examples: int) -> None:
    """From the first step of a session on; by hand too. A plain step between two of a source leaves it as it was."""
    shapes, random, want = Shapes(40, 12, 2), np.random.default_rng(examples), None
    olds = [opened(blank(3, b"fprint01", 5000), examples, random.bytes(40 * examples)) for _ in range(2)]
    for number in range(1, 8):
        shape, fed = shapes.of(olds[0], facts(olds[0])), number % 3 > 0
        advance = shape.feeding() if fed else shape.following()
        block = Block(advance, ["a", "b"], side_by_side(olds), 6000)
        block.after[:], block.digests[:], block.outputs[:] = 7, 8, 9
        positions = [POSITION.pack(b"weather1", 1000 + number, row) for row in range(2)] if fed else [b"", b""]
        if fed:
            block.feed(b"".join(positions))
            want = number
        parts = bytes(block.after[0]), bytes(block.digests[0].reshape(-1)), bytes(block.outputs[0])
        lone = LoneBlock(advance, "a", olds[0], 6000, parts, position=positions[0])
        assert lone.records()[0] == block.records()[0]
        olds = block.records()
        assert [decode(old).step for old in olds] == [number, number]
        assert [source_of(old) for old in olds] == [(b"weather1", 1000 + want, row, want) for row in range(2)]
        assert decode(olds[1]).source == source_of(olds[1])
        assert decode(olds[1]).state == b"\x07" * 40 * examples
    assert shapes.of(olds[0], facts(olds[0])).answers_at == 72 + 32 + 40 * examples


def test_a_block_expects_what_it_replaces() -> None:
    """New sessions expect no record; others the tokens of those they had."""
    shapes = Shapes(4, 4, 1)
    olds = [opened(blank(1, b"f" * 8, 0), 1, bytes(4)) for _ in range(3)]
    first = Block(shapes.of(olds[0], facts(olds[0])).following(), list("abc"), side_by_side(olds), 0)
    assert first.expected() == [b""] * 3
    assert first.tokens is None
    then = Block(first.advance.after.following(), list("abc"), first.new, 0)
    assert then.expected() == [record[8:24] for record in first.records()]
    assert then.tokens is not None
    assert as_records(np.ascontiguousarray(then.tokens)) == then.expected()
    assert [decode(record).revision for record in then.records()] == [2, 2, 2]


def test_the_shape_of_steady_records_does_not_change() -> None:
    """After as many kept answers as there may be; a shape that was odd becomes steady too."""
    shapes = Shapes(4, 4, 1)
    record = opened(blank(1, b"f" * 8, 0), 1, bytes(4))
    shape = shapes.of(record, facts(record)).advance(9, logs=True).after
    seen = 0
    while not shape.following().steady:
        shape, seen = shape.following().after, seen + 1
    assert seen == 16
    assert len(shape.sizes) == 16


def test_spare_arrays_are_given_once() -> None:
    """Who takes one has it alone; large ones are not kept."""
    spares = Spares()
    array = spares.take((4, 8))
    spares.give(array)
    assert spares.take((4, 8)) is array
    assert spares.take((4, 8)) is not array
    large = np.empty((5, 1 << 20), np.uint8)
    spares.give(large)
    assert spares.take(large.shape) is not large


# --- names of payloads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [1, 16, 64, 65])
def test_one_digest_is_that_of_its_row(words: int) -> None:
    """By Python's numbers and by numpy's: the same bytes; another secret gives others."""
    x = np.random.default_rng(words).normal(size=(20, words)).astype(np.float32)
    digests = Digests(b"secret")
    named = [bytes(row.tobytes()) for row in digests.rows(x)]
    assert [digests.row(row.tobytes()) for row in x] == named
    assert [len(name) for name in named] == [DIGEST_BYTES] * 20
    assert len(set(named)) == 20
    assert digests.call(x[:1].reshape(1, 1, words), None) == named[0]
    assert Digests(b"other").row(x[0].tobytes()) != named[0]


def test_digests_are_the_same_on_every_server() -> None:
    """Their keys follow from the secret alone: these bytes were written down once."""
    digests = Digests()
    assert digests.row(np.array([1, 2, 3], np.float32).tobytes()).hex() == ROW
    assert digests.call(np.ones((1, 2, 3), np.float32), None).hex() == CALL


def test_payloads_that_differ_in_one_bit_have_other_names() -> None:
    """Every bit of every word, the sign included, changes both halves of the name."""
    base = np.array([0.5, -1.25, 3.0], np.float32)
    digests = Digests()
    name = digests.row(base.tobytes())
    for word in range(3):
        for bit in range(32):
            other = base.copy()
            other.view(np.uint32)[word] ^= np.uint32(1 << bit)
            changed = digests.row(other.tobytes())
            assert changed[:5] != name[:5]
            assert changed[5:] != name[5:]


def test_no_two_of_two_million_readings_have_one_name() -> None:
    """Temperatures in tenths of a degree and pressures, as sensors send them."""
    grid = np.stack(np.meshgrid(np.arange(-400, 600) / 10, 900 + np.arange(2000) / 10), axis=-1).reshape(-1, 2)
    named = np.ascontiguousarray(Digests().rows(grid.astype(np.float32))).reshape(len(grid), 10)
    assert len(np.unique(named.view("V10"))) == len(grid)


def test_masks_shapes_and_kinds_have_names_of_their_own() -> None:
    """The same numbers in another shape, with a mask, or in a rollout are another payload."""
    x, digests = np.ones((2, 3, 2), np.float32), Digests()
    mask = np.array([[True, True, False], [True, True, True]])
    names = {
        digests.call(x, None),
        digests.call(x.reshape(3, 2, 2), None),
        digests.call(x, mask),
        digests.named(b"rollout", x.tobytes()),
    }
    assert len(names) == 4


def test_a_retry_across_the_upgrade_is_known() -> None:
    """An answer that a server of layout 2 kept is told by the name that it gave the payload."""
    x = np.array([[[1, 2, 3]]], np.float32)
    # by the server of layout 2: the upper five bytes of the multilinear hash; BLAKE2b of values and shape
    assert legacy_call(x, None).hex() == OLD_ROW
    assert legacy_call(np.ones((1, 2, 3), np.float32), None).hex() == OLD_CALL
    digests = Digests()
    kept = Answer(4, legacy_call(x, None) + bytes(5), 1, b"", legacy=True)
    assert same_payload(kept, digests.call(x, None), x, None)
    assert not same_payload(kept, digests.call(x + 1, None), x + 1, None)
    now = Answer(4, digests.call(x, None), 1, b"")
    assert same_payload(now, digests.call(x, None), x, None)
    assert not same_payload(now, digests.call(x + 1, None), x + 1, None)
    assert len(legacy_named(b"rollout", b"x")) == 5


ROW = "c0c09a9f24aa9f49a7cc"
CALL = "e58487908b2ba3205948"
OLD_ROW = "3ca7919a50"
OLD_CALL = "0227c65482"
