"""Bodies of every content type, WebSocket frames and state files that nobody would write, sent to a real server.

    make fuzz ARGS="--minutes 10 --seed 1"

Hypothesis mutates the corpus (what clients send, and what once did harm: tests/data/fuzz). What must hold: no 5xx but
503 and 504, no traceback in the log, an answer to everything, a close frame before the end of every socket, little
memory, and another client's steps go on meanwhile.
"""

import argparse
import contextlib
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from serving import ROOT, few_models
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

CORPUS = Path(__file__).parent / "data" / "fuzz"
JSON, MSGPACK = "application/json", "application/msgpack"
NPZ, SAFETENSORS = "application/x-npz", "application/x-safetensors"
KINDS = (JSON, MSGPACK, NPZ, SAFETENSORS, "text/plain", "application/x-www-form-urlencoded", "")
MODEL = "/v1/models/lstm"
ANSWER_S = 30.0
"""Longer than this is a hang."""
GROWTH_BYTES = 200 * 2**20
P99_S = 0.25
_TOKENS = (
    *(b"[]", b"[", b"]", b"[[[[", b"{}", b"{", b"}", b",", b":", b'"', b"null", b"true", b"NaN", b"-Infinity", b"\\"),
    *(b"1e999", b"-1e999", b"1e-999", b"-0", b"0", b"-1", b"1.0", b"1.5", b"18446744073709551616", b"9007199254740993"),
    *(b'"\\ud800"', b'"\\udfff"', b"\xff", b"\xc3", b"\x00", b"\xc0", b"\xc1", b"\x80", b"\x90", b"\xd9\xff", b"\xc7"),
    *(b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\x00\x00\xff\xff", b"\xcf" + b"\xff" * 8),
    *(b"\xcb\x7f\xf8", b'"seq":1.0,', b'"mask":[[]],', b'"inputs":{},', b'"shape":[0,4611686018427387904,3],'),
)
X = [0.1, 0.2, 0.3]
_NAMED: tuple[Any, ...] = ({"u": 1, "v": 2, "w": None}, [{"u": 1, "v": 2, "w": 3}], {"u": [1], "v": [2]})
_ROWS: tuple[Any, ...] = (X, [X], [[X, X]], *_NAMED)
_FIELDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *(("POST", "/sessions/a/step", {"inputs": rows}) for rows in _ROWS),
    ("POST", "/sessions/a/step", {"inputs": [[X, X]], "mask": [[1, 0]], "seq": 2, "format": "NWC"}),
    ("POST", "/sessions/a/step", {"inputs": [[[1, 2], [1, 2], [1, 2]]], "format": "NCW", "version_policy": "reset"}),
    ("POST", "/step", {"sessions": ["a", "b", "c"], "inputs": [X, X, X], "seq": [1, None, 2]}),
    ("POST", "/step", {"sessions": [f"s{i}" for i in range(70)], "inputs": [X] * 70}),
    ("POST", "/predict", {"inputs": [[X, X], [X, X]], "mask": [[1, 1], [1, 0]], "version": 1}),
    ("POST", "/sessions", {"session": "n", "examples": 3, "ttl_s": 5.0}),
    ("POST", "/sessions/a/fork", {"to": "f"}),
    ("POST", "/sessions/a/checkpoints", {"name": "c"}),
    ("POST", "/sessions/a/rewind", {"to": "c"}),
    ("POST", "/sessions/a/rollout", {"steps": 2, "inputs": [X, X], "commit": True, "seed": 3, "levels": [0.5]}),
    ("PUT", "/sessions/p/state", {"state": {"lstm_0": {"h": [[0.1] * 4], "c": [[0.1] * 4]}}, "step": 3}),
    ("PUT", "/sessions/p/state/lstm_0", {"state": {"h": [[0.1] * 4], "c": [[0.1] * 4]}}),
)
_FRAMES: tuple[dict[str, Any], ...] = (
    *({"id": 1, "session": "a", "inputs": rows} for rows in _ROWS),
    {"id": "x", "session": "b", "inputs": X, "seq": 1},
    {"id": 2, "op": "create", "session": "w", "examples": 2},
    {"id": 3, "op": "state.set", "session": "w", "state": {"lstm_0": {"h": [[0.1] * 4], "c": [[0.1] * 4]}}},
    {"id": 4, "op": "rollout", "session": "a", "steps": 2, "inputs": [X, X]},
    *({"id": 5, "op": op, "session": "a"} for op in ("info", "state.get", "clear", "fork", "checkpoint", "end")),
    {"id": 6, "op": "marker"},
)


@dataclass
class Seen:
    """What came of it."""

    answers: Counter[str] = field(default_factory=Counter)
    waits_s: list[float] = field(default_factory=list)
    growth_bytes: int = 0
    log: str = ""

    @property
    def p99_s(self) -> float:
        """What one of the other client's steps in a hundred exceeds, s."""
        waits = sorted(self.waits_s)
        return waits[int(0.99 * len(waits))] if waits else 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{what} {count}" for what, count in sorted(self.answers.items()))
        others = f"{len(self.waits_s)} steps of another client, p99 {1000 * self.p99_s:.0f} ms"
        return f"{counts}; {others}; grew by {self.growth_bytes >> 20} MB"


# --- what is sent ---------------------------------------------------------------------------------------------------


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds after a few edits; some are then repeated until they are large."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 12)))
        match draw(st.sampled_from(("token", "token", "cut", "twice", "bytes", "seed"))):
            case "token":
                data = data[:at] + draw(st.sampled_from(_TOKENS)) + data[end:]
            case "cut":
                data = data[:at] + data[end:]
            case "twice":
                data = data[:end] + data[at:]
            case "bytes":
                data = data[:at] + draw(st.binary(max_size=8)) + data[end:]
            case _:
                data = data[:at] + draw(st.sampled_from(seeds))
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(1, 12)))
        data = data[:at] + data[at:end] * draw(st.sampled_from((100, 10_000, 100_000))) + data[end:]
    return data[: 2**20]


def seeds_of(prefix: str, *made: bytes) -> list[bytes]:
    """What clients send, and what lies in the corpus under a name that begins so."""
    return [*made, *(path.read_bytes() for path in sorted(CORPUS.glob(f"{prefix}*")))]


def both(fields: Any) -> tuple[bytes, bytes]:
    """As JSON and as msgpack."""
    return json.dumps(fields).encode(), msgspec.msgpack.encode(fields)


# --- the server -----------------------------------------------------------------------------------------------------


class Target:
    """A server process of its own, with its log, and another client beside us."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        command = [sys.executable, "-m", "service", "serve", "--models", str(few_models()), "--port", "0"]
        store = ["--store", f"sqlite:///{folder}/s.db"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *store], cwd=ROOT, env=_environ(), stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert "http://" in line, self.log()
        self.url = line[line.index("http://") :].strip()
        self.seen, self._done = Seen(), threading.Event()
        self._other = threading.Thread(target=self._step_on)

    def __enter__(self) -> "Target":
        with httpx.Client(base_url=self.url + MODEL, timeout=ANSWER_S) as client:
            assert client.post("/sessions/a/step", json={"inputs": X}).is_success
            files = [client.get("/sessions/a/state", headers={"accept": kind}) for kind in (NPZ, SAFETENSORS)]
        self.files = [file.content for file in files]
        self._before = self._peak_bytes()
        self._other.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._other.join()
        self.seen.growth_bytes = self._peak_bytes() - self._before
        self._process.terminate()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self.seen.log = self.log()

    def log(self) -> str:
        """What the server has logged."""
        return self._log.read_text(errors="replace")

    def _peak_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def _step_on(self) -> None:
        with httpx.Client(base_url=self.url + MODEL, timeout=ANSWER_S) as client:
            while not self._done.wait(0.005):
                started = time.monotonic()
                answer = client.post("/sessions/other/step", json={"inputs": X})
                self.seen.waits_s.append(time.monotonic() - started)
                assert answer.is_success, answer.text


def _environ() -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if not k.startswith("STEPCAST_")}, "PYTHONUNBUFFERED": "1"}


# --- the fuzzers ----------------------------------------------------------------------------------------------------


class Fuzzers:
    """What is tried against one server, a case at a time; each raises AssertionError where something does not hold."""

    def __init__(self, target: Target) -> None:
        self._target, self._seen = target, target.seen
        self._http = httpx.Client(base_url=target.url + MODEL, timeout=ANSWER_S)
        made = [both(fields) for _, _, fields in _FIELDS]
        bodies = seeds_of("body-", *(body for pair in made for body in pair))
        self._paths = sorted({(method, path) for method, path, _ in _FIELDS})
        frames = seeds_of("frame-", *(frame for fields in _FRAMES for frame in both(fields)))
        files = seeds_of("file-", *target.files)
        self.all: dict[str, Callable[[], Any]] = {
            "bodies": lambda: self._given(self.body, self._requests(mutated(bodies), KINDS[:2], KINDS)),
            "files": lambda: self._given(self.file, st.tuples(mutated(files), st.sampled_from((NPZ, SAFETENSORS)))),
            "frames": lambda: self._given(self.frame, st.tuples(mutated(frames), st.booleans())),
            "bytes": lambda: self._given(self.bytes, st.lists(_ws_frames(mutated(frames)), min_size=1, max_size=4)),
        }
        self._socket: Any = None
        self._opened = contextlib.ExitStack()
        self._marks = 0

    def close(self) -> None:
        """Give connections back."""
        self._http.close()
        self._opened.close()

    def _requests(self, bodies: st.SearchStrategy[bytes], usual: Any, kinds: Any) -> st.SearchStrategy[Any]:
        kind = st.one_of(st.sampled_from(usual), st.sampled_from(kinds))
        packing = st.sampled_from(("", "", "", "gzip", "deflate", "broken"))
        fitting = [
            st.tuples(st.just((method, path)), mutated([body]), st.just(own), st.just(""))
            for method, path, fields in _FIELDS
            for own, body in zip((JSON, MSGPACK), both(fields), strict=True)
        ]
        return st.one_of(*fitting, st.tuples(st.sampled_from(self._paths), bodies, kind, packing))

    def _given(self, check: Callable[[Any], None], cases: st.SearchStrategy[Any]) -> Any:
        return given(cases)(check)

    def body(self, case: tuple[tuple[str, str], bytes, str, str]) -> None:
        """A request is answered, a refusal by a problem document."""
        (method, path), body, kind, packing = case
        headers = {"content-type": kind}
        if packing:
            packed = {"gzip": gzip.compress, "deflate": zlib.compress}.get(packing, bytes)(body)
            body, headers = packed, {**headers, "content-encoding": packing if packing != "broken" else "gzip"}
        answer = self._http.request(method, path, content=body, headers=headers)
        self._seen.answers[f"{answer.status_code}"] += 1
        assert answer.status_code < 500 or answer.status_code in (503, 504), answer.text
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["status"] == answer.status_code

    def file(self, case: tuple[bytes, str]) -> None:
        """A state file is taken or refused."""
        body, kind = case
        self.body((("PUT", "/sessions/file/state"), body, kind, ""))

    def frame(self, case: tuple[bytes, bool]) -> None:
        """A frame has exactly one answer, and the socket goes on; only text that is not UTF-8 closes it."""
        payload, text = case
        self._marks += 1
        mark = f"mark-{self._marks}"
        if self._socket is None:
            url = self._target.url.replace("http", "ws") + MODEL + "/stream"
            opened = connect(url, max_size=None, compression=None, ping_interval=None)
            self._socket = self._opened.enter_context(opened)
        answers, ended = list[dict[str, Any]](), None
        try:
            self._socket.send(payload, text=text)
            self._socket.send(json.dumps({"op": "marker", "id": mark}))
            while not answers or answers[-1].get("id") != mark:
                answers.append(self._answer())
        except ConnectionClosed as closed:
            ended = closed
        if ended is not None:
            self._opened.close()
            self._socket = None
            assert ended.rcvd is not None, f"dropped without a close frame: {payload[:100]!r}"
            self._seen.answers[f"close {ended.rcvd.code}"] += 1
            assert (ended.rcvd.code, text) == (1007, True)
            return
        assert len(answers) == 2, answers
        error = answers[0].get("error", {"code": "ok", "status": 200})
        self._seen.answers[f"frame {error['code']}"] += 1
        assert error["status"] < 500 or error["status"] in (503, 504), error

    def _answer(self) -> dict[str, Any]:
        said = self._socket.recv(timeout=ANSWER_S)
        found: dict[str, Any] = json.loads(said) if isinstance(said, str) else msgspec.msgpack.decode(said)
        return found

    def bytes(self, frames: list[bytes]) -> None:
        """Whatever the bytes of a socket are, it ends with a close frame, or stays."""
        host, port = self._target.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), ANSWER_S) as line:
            head = "GET /v1/models/lstm/stream HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            key = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
            line.sendall(head.encode() + key.encode())
            said = b""
            while b"\r\n\r\n" not in said:
                said += line.recv(2**16)
            assert b" 101 " in said, said
            with contextlib.suppress(ConnectionError):  # it may have closed in the middle of it
                for frame in (*frames, _ws_frame(0x88, b"\x03\xe8")):  # our close, which is answered where all was well
                    line.sendall(frame)
            line.settimeout(0.3)  # a frame that is not whole may still be waited for
            said = said.partition(b"\r\n\r\n")[2]
            ended = False
            with contextlib.suppress(TimeoutError, ConnectionError):
                while not ended:
                    got = line.recv(2**16)
                    said, ended = said + got, not got
                    if _closes(said):
                        break
            self._seen.answers["socket closed" if _closes(said) else "socket dropped" if ended else "socket waits"] += 1
            assert not ended or _closes(said), (frames, said[-100:])


def _ws_frame(first: int, payload: bytes) -> bytes:
    """A masked frame; the mask is zero."""
    size = len(payload)
    wide = b"\xfe" + size.to_bytes(2, "big") if size < 2**16 else b"\xff" + size.to_bytes(8, "big")
    return bytes([first]) + (bytes([0x80 | size]) if size < 126 else wide) + bytes(4) + payload


def _ws_frames(payloads: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Frames: mostly well-formed, of any first byte, some with another length than they say, or without a mask."""
    first = st.sampled_from((0x81, 0x82, 0x01, 0x80, 0x02, 0x89, 0x8A, 0x88, 0x83, 0xC1, 0x00, 0x8F))
    good = st.builds(_ws_frame, first, payloads.map(lambda payload: payload[:200_000]))
    return st.one_of(good, good, good.map(lambda frame: frame[: len(frame) // 2]), st.binary(max_size=20))


def _closes(said: bytes) -> bool:
    """Whether a server's bytes end with a close frame."""
    at = 0
    while at + 2 <= len(said):
        opcode, size, head = said[at] & 15, said[at + 1], 2
        if size > 125:
            head = 4 if size == 126 else 10
            size = int.from_bytes(said[at + 2 : at + head], "big")
        if opcode == 8:
            return True
        at += head + size
    return False


def rounds(fuzzers: Fuzzers, seconds: float, first: int, examples: int) -> Iterator[str]:
    """Run all fuzzers in turn, each with some examples and a seed of its own, until the time is over."""
    until, number = time.monotonic() + seconds, first
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    how = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=health,
        phases=(Phase.generate, Phase.shrink),
    )
    while True:
        for name, make in fuzzers.all.items():
            how(seed(number)(make()))()
            yield f"{name}, seed {number}"
            if time.monotonic() > until:
                return
        number += 1


def corpus(fuzzers: Fuzzers) -> None:
    """Everything that once did harm, through the door that its name says."""
    for path in sorted(CORPUS.glob("*")):
        data, kind = path.read_bytes(), MSGPACK if path.suffix == ".msgpack" else JSON
        if path.name.startswith("frame-"):
            fuzzers.frame((data, kind == JSON))
        elif path.name.startswith("file-"):
            fuzzers.file((data, NPZ if path.suffix == ".npz" else SAFETENSORS))
        else:
            for at in (("POST", "/sessions/a/step"), ("POST", "/step"), ("PUT", "/sessions/a/state")):
                fuzzers.body((at, data, kind, ""))


def judge(seen: Seen) -> None:
    """What must hold at the end."""
    tracebacks = re.findall(r"Traceback.*?\n(?=\S)", seen.log, re.DOTALL)
    assert not tracebacks, tracebacks[0][-3000:]
    assert seen.growth_bytes < GROWTH_BYTES, str(seen)
    assert seen.p99_s < P99_S, str(seen)


def main() -> None:
    """Run for some minutes and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with Target(Path(folder)) as target:
            fuzzers = Fuzzers(target)
            corpus(fuzzers)
            for done in rounds(fuzzers, 60 * arguments.minutes, arguments.seed, 300):
                print(f"{done}: {target.seen}", flush=True)
            fuzzers.close()
        judge(target.seen)
    print(target.seen)


if __name__ == "__main__":
    main()
