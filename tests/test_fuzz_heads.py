"""The fuzzer of heads and handshakes, for some seconds."""

import fuzz_heads
import pytest

pytestmark = pytest.mark.service


def test_no_head_does_harm() -> None:
    """The kept corpus and mutants of it; `make fuzz-heads` goes on for minutes."""
    with fuzz_heads.server() as (running, harm):
        fuzz_heads.run(running, harm, seconds=5.0, begin=1)
    assert harm.faults == []
    assert harm.sent > len(fuzz_heads.corpus())
    assert {"200", "101", "400", "401", "408"} <= set(harm.statuses)
    assert harm.grown < fuzz_heads.GROWTH_BYTES


def test_a_fault_would_be_seen() -> None:
    """No answer, a hang, a defect and what is not HTTP are faults; a good answer, and nothing to nothing, are none."""
    seen = fuzz_heads.Seen
    for pieces, got, faulty in (
        ([b"GET"], seen(True, b""), True),
        ([b"GET"], seen(False, b""), True),
        ([b"GET"], seen(True, b"HTTP/1.1 500 Internal Server Error\r\n\r\n"), True),
        ([b"GET"], seen(True, b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 500 Internal Server Error\r\n\r\n"), True),
        ([b"GET"], seen(True, b"Internal"), True),
        ([b"GET"], seen(True, b"HTTP/1.1 400 Bad Request\r\n\r\n"), False),
        ([b"\r\n", b"\n"], seen(True, b""), False),
    ):
        assert (fuzz_heads.judge(pieces, got)[1] is not None) is faulty
