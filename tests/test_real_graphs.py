"""Graphs that others published, imported and stepped as their projects' own wrappers do it around a bare onnxruntime.

The files lie in ../shared/models/onnx, beside the checkout; the tests that need them say so if they are not there.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import onnxruntime as ort
import pytest
from pages import reading
from redis_servers import RedisServer
from serving import ROOT, Process, free_port, running

from service.engine.model import Runtime
from stepcast import Client
from stepcast.errors import ManifestError
from stepcast.imports import run

FILES = ROOT.parent / "shared" / "models" / "onnx"
pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(not FILES.is_dir(), reason=f"NOT PROVED ON REAL GRAPHS: there is no {FILES}"),
]
Array = np.ndarray[Any, Any]
FRAMES, SPEAKERS = 300, (4, 5, 6)  # seeds of speech


def speech(samples: int, rate: int, seed: int) -> Array:
    """Something like speech, float32: a gliding voice of twelve harmonics in syllables, pauses, and noise."""
    random, t = np.random.default_rng(seed), np.arange(samples) / rate
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * t + seed)) / rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 13)) * (0.6 + 0.4 * np.sin(8 * np.pi * t))
    spoken = np.sin(2 * np.pi * 1.3 * t + seed) > -0.2
    return (0.15 * voice * spoken + 0.01 * random.normal(size=samples)).astype(np.float32)


def imported(models: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> Runtime:
    """A model as `stepcast import` makes it, as a server loads it."""
    assert run([*arguments, "--models", str(models), "--name", "m"], "stepcast") == 0
    said = capsys.readouterr().out
    directory = Path(re.match(r"(.*): \d+ features", said)[1])  # type: ignore[index]
    runtime = Runtime(directory, device="cpu")
    runtime.prove()
    runtime.quicken()
    assert runtime.manifest.rows == "many", said
    return runtime


def bare(file: str) -> ort.InferenceSession:
    """The published graph, untouched."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(FILES / file, options, providers=["CPUExecutionProvider"])


def silero_wrapped(file: str, audio: Array, rate: int) -> Iterator[float]:
    """Silero's OnnxWrapper: 64 old samples (32 at 8 kHz) before 512 new ones (256), the state handed on."""
    session, frame, context = bare(file), (512 if rate == 16_000 else 256), (64 if rate == 16_000 else 32)
    old, state = np.zeros((1, context), np.float32), np.zeros((2, 1, 128), np.float32)
    takes_rate = "sr" in {port.name for port in session.get_inputs()}
    for start in range(0, len(audio), frame):
        x = np.concatenate([old, audio[None, start : start + frame]], axis=1)
        feeds = {"input": x, "state": state, **({"sr": np.array(rate, np.int64)} if takes_rate else {})}
        y, state = session.run(["output", "stateN"], feeds)
        old = x[:, -context:]
        yield float(y[0, 0])


@pytest.mark.parametrize(
    ("file", "rate"),
    [
        ("silero_vad.onnx", 16_000),
        ("silero_vad.onnx", 8_000),
        ("silero_vad_half.onnx", 16_000),
        ("silero_vad_op18_ifless.onnx", 16_000),
        ("silero_vad_op18_ifless.onnx", 8_000),
        ("silero_vad_openvino_16k.onnx", 16_000),
    ],
)
def test_silero_is_its_own_wrapper(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, rate: int) -> None:
    """300 raw frames of three speakers in one batch: not a bit of difference, and both silence and speech are heard."""
    runtime = imported(tmp_path, capsys, "silero", str(FILES / file), "--rate", str(rate))
    frame = runtime.manifest.n_features
    assert frame == (512 if rate == 16_000 else 256)
    audio = np.stack([speech(FRAMES * frame, rate, seed) for seed in SPEAKERS])
    want = np.array([list(silero_wrapped(file, row, rate)) for row in audio], np.float32)
    got = foreign.stepped(runtime, audio.reshape(len(SPEAKERS), FRAMES, frame))
    assert want.min() < 0.1 < 0.7 < want.max()
    np.testing.assert_array_equal(got[:, :, 0], want)


@pytest.mark.parametrize(
    ("file", "answers"),
    [
        ("silero_vad.onnx", ["--constant", "sr=16000", "--features", "512", "--context", "input:64"]),
        ("silero_vad_openvino_16k.onnx", ["--context", "64"]),
    ],
)
def test_the_recipe_by_hand_is_the_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, answers: list[str]
) -> None:
    """Options of the kind onnx make the same model as `import silero`."""
    by_hand = imported(tmp_path, capsys, str(FILES / file), *answers)
    preset = imported(tmp_path, capsys, "silero", str(FILES / file))
    audio = speech(20 * 512, 16_000, 5).reshape(1, 20, 512)
    np.testing.assert_array_equal(foreign.stepped(by_hand, audio), foreign.stepped(preset, audio))


def test_the_recipes_page_shows_what_happens(tmp_path: Path) -> None:
    """Its program, against a server of Silero's detector."""
    models = tmp_path / "models"
    assert run(["silero", str(FILES / "silero_vad.onnx"), "--models", str(models)], "stepcast") == 0
    with (
        running(store="memory://", models=models) as server,
        reading(ROOT / "docs" / "recipes.md", tmp_path, server.url) as reader,
    ):
        assert reader.read() >= 1


def dtln_alone(file: str, x: Array) -> Array:
    """One graph of DTLN, block by block (T, F), its state handed on."""
    session, state, outputs = bare(file), np.zeros((1, 2, 128, 2), np.float32), []
    data, memory = (port.name for port in session.get_inputs())
    for block in x:
        y, state = session.run(None, {data: block[None, None], memory: state})
        outputs.append(y[0, 0])
    return np.stack(outputs)


@pytest.mark.parametrize(("file", "data"), [("dtln_1.onnx", "input_2"), ("dtln_2.onnx", "input_4")])
def test_a_graph_of_dtln_is_itself_in_a_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, data: str
) -> None:
    """Magnitudes to masks: not a bit of difference, by the graph for single steps too; blocks within 1e-6."""
    runtime = imported(tmp_path, capsys, str(FILES / file), "--input", data)
    plain = Runtime(runtime.directory, device="cpu")
    audio = np.stack([speech(FRAMES * 128 + 384, 16_000, seed) for seed in SPEAKERS])
    x = np.lib.stride_tricks.sliding_window_view(audio, 512, axis=1)[:, ::128].copy()
    if file == "dtln_1.onnx":
        x = np.abs(np.fft.rfft(x.astype(np.float64))).astype(np.float32)
    want = np.stack([dtln_alone(file, row) for row in x])
    assert np.abs(want).max() > 0.1
    assert runtime.quick == (file == "dtln_1.onnx")
    for steps in (foreign.stepped(plain, x), foreign.stepped(runtime, x)):
        np.testing.assert_allclose(steps, want, rtol=0, atol=0 if file == "dtln_1.onnx" else 1e-6)


def dtln_wrapped(audio: Array) -> Array:
    """DTLN's real_time_processing_onnx.py: both graphs, a Fourier transform between them, blocks that overlap."""
    first, second = bare("dtln_1.onnx"), bare("dtln_2.onnx")
    (x1, h1), (x2, h2) = ([port.name for port in session.get_inputs()] for session in (first, second))
    state_1 = state_2 = np.zeros((1, 2, 128, 2), np.float32)
    block, clean, outputs = np.zeros(512, np.float32), np.zeros(512, np.float32), []
    for start in range(0, len(audio), 128):
        block = np.concatenate([block[128:], audio[start : start + 128]])
        spectrum = np.fft.rfft(block.astype(np.float64))
        magnitude, phase = np.abs(spectrum).astype(np.float32), np.angle(spectrum)
        mask, state_1 = first.run(None, {x1: magnitude[None, None], h1: state_1})
        masked = np.fft.irfft(magnitude * mask[0, 0] * np.exp(1j * phase)).astype(np.float32)
        y, state_2 = second.run(None, {x2: masked[None, None], h2: state_2})
        clean = np.concatenate([clean[128:], np.zeros(128, np.float32)]) + y[0, 0]
        outputs.append(clean[:128])
    return np.stack(outputs)


def test_dtln_is_its_own_wrapper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """128 raw samples in and 128 clean ones out, both graphs in one; within 1e-6."""
    runtime = imported(tmp_path, capsys, "dtln", str(FILES / "dtln_1.onnx"))
    assert (runtime.manifest.n_features, runtime.manifest.n_outputs) == (128, 128)
    audio = np.stack([speech(FRAMES * 128, 16_000, seed) for seed in SPEAKERS])
    want = np.stack([dtln_wrapped(row) for row in audio])
    got = foreign.stepped(runtime, audio.reshape(len(SPEAKERS), FRAMES, 128))
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_a_voice_goes_on_where_its_server_was_killed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    redis_server: RedisServer,
    spawn: Callable[..., Process],
) -> None:
    """Raw frames through a WebSocket, on Redis; kill -9 in mid-stream; every frame is answered as if unbroken."""
    imported(tmp_path, capsys, "silero", str(FILES / "silero_vad.onnx"))
    audio = speech(FRAMES * 512, 16_000, SPEAKERS[0])
    want = np.array(list(silero_wrapped("silero_vad.onnx", audio, 16_000)), np.float32)
    port, answers = free_port(), []
    server = spawn(redis_server.url, "--port", str(port), models=tmp_path)
    with Client(server.url) as client, client.session("m", "voice").stream() as stream:
        for answer in stream.map(audio.reshape(FRAMES, 512)):
            answers.append(answer)
            if len(answers) == 150:
                server.kill()
                server = spawn(redis_server.url, "--port", str(port), models=tmp_path)
    assert [answer.step for answer in answers] == list(range(1, FRAMES + 1))
    np.testing.assert_array_equal(np.array([answer.outputs for answer in answers])[:, 0], want)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["silero", "dtln_1.onnx"], "dtln_1.onnx is not Silero VAD of version 5 or later"),
        (["silero", "silero_vad_half.onnx", "--rate", "8000"], "is for 16000 Hz alone"),
        (["dtln", "silero_vad.onnx"], "Give --second"),
        (["dtln", "dtln_1.onnx", "--second", "{}/dtln_1.onnx"], "are not the two graphs of DTLN"),
        (["dtln", "dtln_1.onnx", "--second", "{}/silero_vad.onnx"], "silero_vad.onnx is not a graph of DTLN"),
    ],
)
def test_a_preset_names_what_is_another_graph(tmp_path: Path, arguments: list[str], words: str) -> None:
    """One sentence, and nothing is written."""
    kind, file, *rest = (argument.format(FILES) for argument in arguments)
    with pytest.raises(ManifestError, match=words):
        run([kind, str(FILES / file), *rest, "--models", str(tmp_path / "models")], "stepcast")
    assert not (tmp_path / "models").exists()
