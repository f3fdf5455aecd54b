"""What the contenders are asked, byte by byte, and how their answers are read and checked."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .bare import POOL, Truth, pool
from .load import Answers, Encode

Floats = npt.NDArray[np.float32]
Decode = Callable[[bytes], Any]
RTOL, ATOL = 1e-4, 1e-5


class WrongAnswer(Exception):
    """A server's answer is not what the offline pass gives."""


def row(session: int, k: int) -> int:
    """Which row of the pool is the session's input at its k-th step."""
    return (13 * session + k) % POOL


def json_rows() -> list[bytes]:
    """The pool as JSON text."""
    return [b"[" + b",".join(b"%.4f" % v for v in each) + b"]" for each in pool().tolist()]


def _http(path: str, kind: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: */*\r\ncontent-type: {kind}\r\n".encode()


def http_json(path: Callable[[int], str], sessions: int, seq: bool = True) -> Encode:
    """One step per request: {"inputs": [...], "seq": n}; JSON allows blanks, so that the length is constant."""
    heads = [_http(path(s), "application/json") for s in range(sessions)]
    middles = []
    for text in json_rows():
        body = b'{"inputs":' + text + (b',"seq":' if seq else b"}")
        middles.append(b"content-length: %d\r\n\r\n" % (len(body) + (9 if seq else 0)) + body)
    if not seq:
        return lambda s, k: heads[s] + middles[(13 * s + k) % POOL]
    return lambda s, k: heads[s] + middles[(13 * s + k) % POOL] + b"%8d}" % (k + 1)


def http_msgpack(path: Callable[[int], str], sessions: int) -> Encode:
    """The same as msgpack: inputs as raw float32."""
    heads = [_http(path(s), "application/msgpack") for s in range(sessions)]
    middles = []
    for each in pool():
        body = b"\x82\xa6inputs" + msgspec.msgpack.encode(each.tobytes()) + b"\xa3seq\xce"
        middles.append(b"content-length: %d\r\n\r\n" % (len(body) + 4) + body)
    return lambda s, k: heads[s] + middles[(13 * s + k) % POOL] + (k + 1).to_bytes(4, "big")


def frames_json(tag: str, sessions: int, lanes: int) -> Encode:
    """WebSocket frames {"id", "session", "inputs", "seq"}; the id is the lane."""
    heads = [b'{"id":%d,"session":"%s-%d","inputs":' % (s % lanes, tag.encode(), s) for s in range(sessions)]
    texts = [text + b',"seq":' for text in json_rows()]
    return lambda s, k: heads[s] + texts[(13 * s + k) % POOL] + b"%8d}" % (k + 1)


def frames_msgpack(tag: str, sessions: int, lanes: int) -> Encode:
    """The same as msgpack."""
    pack = msgspec.msgpack.encode
    heads = [
        b"\x84\xa2id" + pack(s % lanes) + b"\xa7session" + pack(f"{tag}-{s}") + b"\xa6inputs" for s in range(sessions)
    ]
    raws = [pack(each.tobytes()) + b"\xa3seq\xce" for each in pool()]
    return lambda s, k: heads[s] + raws[(13 * s + k) % POOL] + (k + 1).to_bytes(4, "big")


def batch_msgpack(path: str, tag: str, groups: int, size: int) -> Encode:
    """One step of `size` sessions per request; here a "session" of the traffic is a group of them."""
    pack, rows = msgspec.msgpack.encode, pool()
    head = _http(path, "application/msgpack")
    names = [
        b"\x83\xa8sessions" + pack([f"{tag}-{g * size + i}" for i in range(size)]) + b"\xa6inputs"
        for g in range(groups)
    ]
    starts = [13 * np.arange(g * size, (g + 1) * size) for g in range(groups)]

    def encode(group: int, k: int) -> bytes:
        raw = rows[(starts[group] + k) % POOL].tobytes()
        seqs = b"\xdc" + size.to_bytes(2, "big") + (b"\xce" + (k + 1).to_bytes(4, "big")) * size
        body = names[group] + b"\xc5" + len(raw).to_bytes(2, "big") + raw + b"\xa3seq" + seqs
        return head + b"content-length: %d\r\n\r\n" % len(body) + body

    return encode


def body_of(request: bytes) -> bytes:
    """What an echo must answer to an HTTP request."""
    return request.partition(b"\r\n\r\n")[2]


# --- checking -------------------------------------------------------------------------------------------------------


class _JsonAnswer(msgspec.Struct):
    outputs: list[float]


class _PackedAnswer(msgspec.Struct):
    outputs: bytes


class _BatchAnswer(msgspec.Struct):
    outputs: bytes
    steps: list[int | None]
    errors: dict[str, Any]


_JSON = msgspec.json.Decoder(_JsonAnswer)
_PACKED = msgspec.msgpack.Decoder(_PackedAnswer)
_BATCH = msgspec.msgpack.Decoder(_BatchAnswer)


def outputs_json(body: bytes) -> Any:
    """The outputs of a JSON answer."""
    return _JSON.decode(body).outputs


def outputs_msgpack(body: bytes) -> Any:
    """The outputs of a msgpack answer."""
    return np.frombuffer(_PACKED.decode(body).outputs, "<f4")


def outputs_batch(body: bytes) -> Any:
    """The outputs (K * O) of a batch step; refused where one of its sessions was."""
    answer = _BATCH.decode(body)
    if answer.errors:
        raise WrongAnswer(f"{len(answer.errors)} sessions were refused: {next(iter(answer.errors.values()))}")
    return np.frombuffer(answer.outputs, "<f4")


def check(answers: Answers, decode: Decode, truth: Truth, size: int = 1) -> int:
    """Compare every answer with the offline pass; how many numbers were compared.

    Args:
        size: Sessions per answer.

    Raises:
        WrongAnswer.
    """
    if not answers:
        raise WrongAnswer("there was no answer")
    try:
        got = np.array([decode(body) for _, _, body in answers], np.float32)
    except (msgspec.MsgspecError, ValueError) as error:
        raise WrongAnswer(f"{error}: {answers[0][2][:300]!r}") from error
    which = np.array([session for session, _, _ in answers])
    steps = np.array([k for _, k, _ in answers])
    wanted = truth.outputs(int(steps.max()) + 1)
    sessions = which[:, None] * size + np.arange(size)
    expected = wanted[steps[:, None], sessions].reshape(len(answers), -1)
    bad = ~np.isclose(got.reshape(expected.shape), expected, RTOL, ATOL).all(axis=1)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise WrongAnswer(
            f"{int(bad.sum())} of {len(answers)} answers are wrong, the first of session {which[first]} at step "
            f"{steps[first]}: got {got[first].tolist()[:4]}, want {expected[first].tolist()[:4]}"
        )
    return int(expected.size)


def check_echo(answers: Answers, encode: Encode, strip: bool) -> int:
    """Whether an echo gave back what it got; strip: the HTTP head is not part of it."""
    for session, k, body in answers:
        sent = encode(session, k)
        if body != (body_of(sent) if strip else sent):
            raise WrongAnswer(f"the echo of session {session} at step {k} differs")
    return len(answers)


def merge(answers: Sequence[Answers]) -> Answers:
    """Answers of several samples as one list."""
    return [each for part in answers for each in part]
