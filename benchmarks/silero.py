"""Silero's voice activity detector: how many voices one core follows in real time, beside a bare onnxruntime loop.

A voice sends a frame of 512 samples (32 ms) every 32 ms through a WebSocket. Frames leave by a schedule, spread evenly;
the lag counts from the scheduled time to the answer. A number of voices is held if 99 % of the frames lag at most
10 ms. The bare loop does what Silero's own wrapper does, for a whole batch at a time: nothing is sent or kept.
"""

import contextlib
import io
import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from stepcast.imports import run as take_in

from . import load, requests
from .contenders import Bench, Driver, Measure, socket_lines_of
from .load import Encode
from .machine import pinned
from .model import REPOSITORY
from .requests import WrongAnswer
from .servers import StartFailed

Floats = npt.NDArray[np.float32]
RATE: Final = 31.25  # frames a second of one voice
_FRAME, _CONTEXT, _HZ = 512, 64, 16_000
_FRAMES: Final = 1024  # different ones
_SOCKETS: Final = 16
_LAG_MS: Final = 10.0
_SHARES: Final = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # of what the closed loop does
_BATCHES: Final = (16, 64, 256)
_CHECKED: Final = 6  # voices whose answers are compared with the bare loop's
_ATOL: Final = 1e-5


def silero(bench: Bench, quick: bool) -> Generator[None, None, dict[str, Any]]:
    """Voices per core over the WebSocket in memory and on Redis.

    Raises:
        StartFailed: there is no graph of Silero.
    """
    if not bench.silero.is_file():
        raise StartFailed(f"there is no {bench.silero}. Give --silero FILE.")
    models, seconds = _imported(bench.silero), 1.5 if quick else 4.0
    yield
    with pinned(bench.park.server_core):
        bench.park.only()
        bare = {batch: _bare_rate(bench.silero, batch, seconds / 2) for batch in _BATCHES}
    best = max(bare.values()) / RATE
    yield
    found: dict[str, Any] = {"bare_voices": {str(batch): rate / RATE for batch, rate in bare.items()}}
    checks = []
    for store, least in (("memory", None), ("redis", 0.4)):
        server = bench.stepcast(store, "-silero", models=models)
        closed = _driver(bench, server, store, "c", 64)(seconds / 2)
        voices, measure = _held(bench, server, store, closed.steps_per_s / RATE, seconds)
        found[store] = {"voices": voices, "p99_ms": measure.p99_ms, "cpu_us_per_frame": measure.cpu_us_per_step}
        found[store]["closed_frames_per_s"] = closed.steps_per_s
        what = f"silero voices per core over the WebSocket, {store} / bare batched loop"
        said = {"what": what, "value": voices / best, "compared": [voices]}
        checks += [] if least is None else [{**said, "at_least": least, "holds": voices / best >= least}]
        bench.park.end(server)
        yield
    return {**found, "checks": checks}


def _imported(file: Path) -> Path:
    """A repository with the graph as `stepcast import silero` makes it."""
    models = REPOSITORY.parent / f"silero-{file.stat().st_mtime_ns:x}-{file.stat().st_size:x}"
    if not (models / "silero" / "1").is_dir():
        with contextlib.redirect_stdout(io.StringIO()):
            take_in(["silero", str(file), "--name", "silero", "--version", "1", "--models", str(models)], "stepcast")
    return models


def _held(bench: Bench, server: Any, store: str, most: float, seconds: float) -> tuple[int, Measure]:
    """The largest number of voices that is held, and how."""
    for share in _SHARES:
        voices = int(share * most)
        driver = _driver(bench, server, store, f"o{voices}", voices)
        measure = driver.measured(
            lambda lines, to=driver, n=voices: load.open_loop(lines, to.traffic, n * RATE, seconds, poisson=False)
        )
        if measure.p99_ms <= _LAG_MS:
            return voices, measure
    raise load.LoadFailed(
        f"not even {voices} voices are held on {store}: 1 % of the frames lag {measure.p99_ms:.0f} ms"
    )


def _driver(bench: Bench, server: Any, store: str, tag: str, voices: int) -> Driver:
    """Loads a server with so many voices, each a session, over some sockets."""

    def verify(answers: load.Answers) -> int:
        return _verify(bench.silero, answers, voices)

    lines = socket_lines_of(voices, "/v1/models/silero/stream", min(_SOCKETS, voices), binary=True)
    redis = bench.park.redis_of(store)
    return Driver(bench, server, _frames(bench.tag(tag), voices), lines, verify, voices, voices, redis=redis)


def _frames(tag: str, voices: int) -> Encode:
    """WebSocket frames in msgpack: {"id", "session", "inputs", "seq"}; voice v begins at frame 13 v of the audio."""
    pack = msgspec.msgpack.encode
    heads = [b"\x84\xa2id" + pack(v) + b"\xa7session" + pack(f"{tag}-{v}") + b"\xa6inputs" for v in range(voices)]
    raws = [pack(frame.tobytes()) + b"\xa3seq\xce" for frame in _audio()]
    return lambda v, k: heads[v] + raws[(13 * v + k) % _FRAMES] + (k + 1).to_bytes(4, "big")


@cache
def _audio() -> Floats:
    """Something like speech, in frames (_FRAMES, 512): a gliding voice in syllables, and noise."""
    t = np.arange(_FRAMES * _FRAME) / _HZ
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * t + 4)) / _HZ
    voice = np.sum([np.sin(k * phase) / k for k in range(1, 13)], axis=0) * (0.6 + 0.4 * np.sin(8 * np.pi * t))
    noise = np.random.default_rng(4).normal(size=len(t))
    audio = 0.15 * voice * (np.sin(2 * np.pi * 1.3 * t) > -0.2) + 0.01 * noise
    return audio.astype(np.float32).reshape(_FRAMES, _FRAME)


def _wrapped(file: Path, frames: Iterator[Floats], rows: int) -> Iterator[Floats]:
    """Silero's wrapper for a batch: speech (B,) of each of the frames (B, 512)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    rate = {"sr": np.array(_HZ, np.int64)} if "sr" in {port.name for port in session.get_inputs()} else {}
    state, old = np.zeros((2, rows, 128), np.float32), np.zeros((rows, _CONTEXT), np.float32)
    for frame in frames:
        x = np.concatenate([old, frame], axis=1)
        y, state = session.run(["output", "stateN"], {"input": x, "state": state, **rate})
        old = x[:, -_CONTEXT:]
        yield y[:, 0]


def _of(voices: Sequence[int], k: int) -> Floats:
    """The frames (B, 512) of some voices at their k-th step."""
    return _audio()[(13 * np.array(voices) + k) % _FRAMES]


def _bare_rate(file: Path, batch: int, seconds: float) -> float:
    """Frames per second of the bare loop."""
    steps = (_of(range(batch), k) for k in range(1 << 30))
    loop = _wrapped(file, steps, batch)
    next(loop)
    took: list[float] = []
    stop = time.perf_counter() + seconds
    while (before := time.perf_counter()) < stop:
        next(loop)
        took.append(time.perf_counter() - before)
    return batch / statistics.median(took)


def _verify(file: Path, answers: load.Answers, voices: int) -> int:
    """Compare some voices' answers with the bare loop; raises WrongAnswer."""
    chosen = sorted({v * voices // _CHECKED for v in range(_CHECKED)})
    mine = [(v, k, requests.outputs_msgpack(body)[0]) for v, k, body in answers if v in chosen]
    last = max(k for _, k, _ in mine)
    steps = (_of(chosen, k) for k in range(last + 1))
    want = np.stack(list(_wrapped(file, steps, len(chosen))))  # (K, B)
    for v, k, got in mine:
        if not abs(got - want[k, chosen.index(v)]) <= _ATOL:
            raise WrongAnswer(f"voice {v} at frame {k}: got {got}, want {want[k, chosen.index(v)]}")
    return len(mine)
