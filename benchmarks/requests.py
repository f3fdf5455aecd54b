"""What the contenders are asked, byte by byte, and how their answers are read and checked."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .bare import POOL, Truth, pool
from .load import Answers, Encode
from .model import Shape

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


def json_named() -> list[bytes]:
    """The pool as JSON text, each reading under its feature's name."""
    return [b"{%s}" % b",".join(b'"f%d":%.4f' % (i, v) for i, v in enumerate(each)) for each in pool().tolist()]


def gap_of(number: int) -> int:
    """Which reading of a row of the pool is missing where one is."""
    return number % pool().shape[1]


def json_gaps() -> list[bytes]:
    """The pool as JSON text with one reading of each row missing: null."""
    texts = []
    for number, each in enumerate(pool().tolist()):
        values = [b"%.4f" % v for v in each]
        values[gap_of(number)] = b"null"
        texts.append(b"[" + b",".join(values) + b"]")
    return texts


def json_threes() -> list[bytes]:
    """Three rows of the pool as one session's: those of sessions 3 s, 3 s + 1 and 3 s + 2 of the pool's rule."""
    texts = json_rows()
    return [b"[" + b",".join(texts[(p + 13 * r) % POOL] for r in range(3)) + b"]" for p in range(POOL)]


def pool_without_gaps() -> Floats:
    """What the model makes of json_gaps: the mean 0 where a reading is missing."""
    values = pool()
    values[np.arange(POOL), np.arange(POOL) % values.shape[1]] = 0.0
    return values


def _http(path: str, kind: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: */*\r\ncontent-type: {kind}\r\n".encode()


def _middles(texts: Sequence[bytes], seq: bool) -> list[bytes]:
    """Head's end and body up to the number of the step; JSON allows blanks, so that the length is constant."""
    found = []
    for text in texts:
        body = b'{"inputs":' + text + (b',"seq":' if seq else b"}")
        found.append(b"content-length: %d\r\n\r\n" % (len(body) + (9 if seq else 0)) + body)
    return found


def http_json(
    path: Callable[[int], str],
    sessions: int,
    seq: bool = True,
    texts: Sequence[bytes] | None = None,
    stride: int = 13,
    header: Callable[[], bytes] | None = None,
) -> Encode:
    """One step per request: {"inputs": [...], "seq": n}.

    Args:
        texts: Inputs by row of the pool, where they are others than json_rows.
        stride: Session s begins at row `stride` s.
        header: Makes a line of each request's head.
    """
    heads = [_http(path(s), "application/json") for s in range(sessions)]
    middles = _middles(texts or json_rows(), seq)
    if header is not None:
        return lambda s, k: heads[s] + header() + middles[(stride * s + k) % POOL] + b"%8d}" % (k + 1)
    if not seq:
        return lambda s, k: heads[s] + middles[(stride * s + k) % POOL]
    return lambda s, k: heads[s] + middles[(stride * s + k) % POOL] + b"%8d}" % (k + 1)


def http_first(path: Callable[[int], str], sessions: int) -> Encode:
    """First steps: every request is of a session that is new; see number_of."""
    middles = _middles(json_rows(), True)

    def encode(session: int, k: int) -> bytes:
        number = number_of(session, k, sessions)
        return _http(path(number), "application/json") + middles[13 * number % POOL] + b"%8d}" % 1

    return encode


def number_of(session: int, k: int, sessions: int) -> int:
    """Which new session a first step makes: its inputs are those of that session's first step by the pool's rule."""
    return k * sessions + session


def http_msgpack(path: Callable[[int], str], sessions: int) -> Encode:
    """The same as msgpack: inputs as raw float32."""
    heads = [_http(path(s), "application/msgpack") for s in range(sessions)]
    middles = []
    for each in pool():
        body = b"\x82\xa6inputs" + msgspec.msgpack.encode(each.tobytes()) + b"\xa3seq\xce"
        middles.append(b"content-length: %d\r\n\r\n" % (len(body) + 4) + body)
    return lambda s, k: heads[s] + middles[(13 * s + k) % POOL] + (k + 1).to_bytes(4, "big")


def inference_raw(tag: str, sessions: int) -> Encode:
    """The same by the Open Inference Protocol, as its clients ask: a raw tensor behind the JSON, the answer raw too."""
    rows = pool()
    head = b"POST /v2/models/bench/infer HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    tensor = b'{"name":"x","shape":[1,%d],"datatype":"FP32","parameters":{"binary_data_size":%d}}'
    inputs = b'},"inputs":[' + tensor % (rows.shape[1], rows[0].nbytes) + b"]}"
    flags = [b'{"parameters":{"sequence_id":"%s-%d","sequence_start":' % (tag.encode(), s) for s in range(sessions)]
    raws = [row.tobytes() for row in rows]

    def encode(session: int, k: int) -> bytes:
        start = b"true " if k == 0 else b"false"
        said = b'%s%s,"sequence_end":false,"binary_data_output":true,"stepcast_seq":%8d%s'
        text = said % (flags[session], start, k + 1, inputs)
        raw = raws[(13 * session + k) % POOL]
        lengths = b"inference-header-content-length: %d\r\ncontent-length: %d\r\n\r\n" % (
            len(text),
            len(text) + len(raw),
        )
        return b"".join((head, lengths, text, raw))

    return encode


def frames_json(tag: str, sessions: int, lanes: int, texts: Sequence[bytes] | None = None, stride: int = 13) -> Encode:
    """WebSocket frames {"id", "session", "inputs", "seq"}; the id is the lane."""
    heads = [b'{"id":%d,"session":"%s-%d","inputs":' % (s % lanes, tag.encode(), s) for s in range(sessions)]
    parts = [text + b',"seq":' for text in texts or json_rows()]
    return lambda s, k: heads[s] + parts[(stride * s + k) % POOL] + b"%8d}" % (k + 1)


def frames_first(tag: str, sessions: int, lanes: int) -> Encode:
    """First steps as frames: see http_first."""
    texts = [text + b',"seq":       1}' for text in json_rows()]

    def encode(session: int, k: int) -> bytes:
        number = number_of(session, k, sessions)
        head = b'{"id":%d,"session":"%s-%d","inputs":' % (session % lanes, tag.encode(), number)
        return head + texts[13 * number % POOL]

    return encode


def frames_msgpack(tag: str, sessions: int, lanes: int) -> Encode:
    """The same as msgpack."""
    pack = msgspec.msgpack.encode
    heads = [
        b"\x84\xa2id" + pack(s % lanes) + b"\xa7session" + pack(f"{tag}-{s}") + b"\xa6inputs" for s in range(sessions)
    ]
    raws = [pack(each.tobytes()) + b"\xa3seq\xce" for each in pool()]
    return lambda s, k: heads[s] + raws[(13 * s + k) % POOL] + (k + 1).to_bytes(4, "big")


def batch_msgpack(path: str, tag: str, groups: int, size: int, gaps: bool = False) -> Encode:
    """One step of `size` sessions per request; here a "session" of the traffic is a group of them.

    Args:
        gaps: One reading of one session is missing in each request (batch_gap).
    """
    pack, rows = msgspec.msgpack.encode, pool()
    head = _http(path, "application/msgpack")
    names = [
        b"\x83\xa8sessions" + pack([f"{tag}-{g * size + i}" for i in range(size)]) + b"\xa6inputs"
        for g in range(groups)
    ]
    starts = [13 * np.arange(g * size, (g + 1) * size) for g in range(groups)]

    def encode(group: int, k: int) -> bytes:
        x = rows[(starts[group] + k) % POOL]
        if gaps:
            x[batch_gap(k, size)] = np.nan
        raw = x.tobytes()
        seqs = b"\xdc" + size.to_bytes(2, "big") + (b"\xce" + (k + 1).to_bytes(4, "big")) * size
        body = names[group] + b"\xc5" + len(raw).to_bytes(2, "big") + raw + b"\xa3seq" + seqs
        return head + b"content-length: %d\r\n\r\n" % len(body) + body

    return encode


def batch_json(path: str, tag: str, groups: int, size: int, gaps: bool = False) -> Encode:
    """The same as JSON; a missing reading is null."""
    head, texts = _http(path, "application/json"), json_rows()
    names = [
        b'{"sessions":[' + b",".join(b'"%s-%d"' % (tag.encode(), g * size + i) for i in range(size)) + b'],"inputs":['
        for g in range(groups)
    ]

    def encode(group: int, k: int) -> bytes:
        rows = [texts[row(group * size + i, k)] for i in range(size)]
        if gaps:
            i, column = batch_gap(k, size)
            values = rows[i][1:-1].split(b",")
            values[column] = b"null"
            rows[i] = b"[" + b",".join(values) + b"]"
        seqs = b",".join([b"%d" % (k + 1)] * size)
        body = names[group] + b",".join(rows) + b'],"seq":[' + seqs + b"]}"
        return head + b"content-length: %d\r\n\r\n" % len(body) + body

    return encode


def batch_gap(k: int, size: int) -> tuple[int, int]:
    """Which session of a batch has a gap at its k-th step, and in which reading."""
    return k % size, gap_of(k)


def batch_inputs(groups: int, size: int) -> Callable[[int], Floats]:
    """What the model makes of batches with gaps: (groups * size, F) at the k-th step."""
    rows, starts = pool(), 13 * np.arange(groups * size)

    def inputs(k: int) -> Floats:
        x = rows[(starts + k) % POOL]
        i, column = batch_gap(k, size)
        x[i::size, column] = 0.0
        return x

    return inputs


def body_of(request: bytes) -> bytes:
    """What an echo must answer to an HTTP request."""
    return request.partition(b"\r\n\r\n")[2]


# --- checking -------------------------------------------------------------------------------------------------------


class _JsonAnswer(msgspec.Struct):
    outputs: list[float]


class _PackedAnswer(msgspec.Struct):
    outputs: bytes


class _NamedAnswer(msgspec.Struct):
    outputs: dict[str, float]


class _RowsAnswer(msgspec.Struct):
    outputs: list[list[float]]


class _BatchRows(msgspec.Struct):
    outputs: list[list[float] | None]
    steps: list[int | None]
    errors: dict[str, Any]


class _BatchAnswer(msgspec.Struct):
    outputs: bytes
    steps: list[int | None]
    errors: dict[str, Any]


_JSON = msgspec.json.Decoder(_JsonAnswer)
_NAMED = msgspec.json.Decoder(_NamedAnswer)
_ROWS = msgspec.json.Decoder(_RowsAnswer)
_BATCH_JSON = msgspec.json.Decoder(_BatchRows)
_PACKED = msgspec.msgpack.Decoder(_PackedAnswer)
_BATCH = msgspec.msgpack.Decoder(_BatchAnswer)


def outputs_json(body: bytes) -> Any:
    """The outputs of a JSON answer."""
    return _JSON.decode(body).outputs


def outputs_named(body: bytes) -> Any:
    """The outputs of a JSON answer by name, in the order of the model's outputs."""
    return list(_NAMED.decode(body).outputs.values())


def outputs_rows(body: bytes) -> Any:
    """The outputs of a JSON answer for a session of several rows, one after the other."""
    return [value for row in _ROWS.decode(body).outputs for value in row]


def outputs_batch_json(body: bytes) -> Any:
    """As outputs_batch."""
    answer = _BATCH_JSON.decode(body)
    if answer.errors:
        raise WrongAnswer(f"{len(answer.errors)} sessions were refused: {next(iter(answer.errors.values()))}")
    return [value for row in answer.outputs for value in row or ()]


def outputs_msgpack(body: bytes) -> Any:
    """The outputs of a msgpack answer."""
    return np.frombuffer(_PACKED.decode(body).outputs, "<f4")


def outputs_raw(body: bytes) -> Any:
    """The outputs of a raw answer by the Open Inference Protocol, behind its JSON."""
    return np.frombuffer(body[-4 * Shape().outputs :], "<f4")


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
