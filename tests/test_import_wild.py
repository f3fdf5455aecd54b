"""import: graphs of the signatures that well-known streaming models have; weights are random, a node or two each.

Each is stepped for three sessions in one batch and compared with a bare onnxruntime that runs the exported graph alone.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
from foreign import save
from onnx import TensorProto as T
from onnx import helper

from service.engine.model import Runtime
from stepcast.__main__ import main

pytestmark = pytest.mark.service
Array = np.ndarray[Any, Any]
node = helper.make_node
F, I = T.FLOAT, T.INT64  # noqa: E741 - as short as in shapes


def weight(*shape: int) -> Array:
    """Random weights of a size at which no activation saturates."""
    return np.random.default_rng(sum(shape)).normal(scale=0.3, size=shape).astype(np.float32)


def whole(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def spectral(path: Path) -> Path:
    """As GTCRN's stream: a spectrum of 5 bins, a cache of a convolution over frames, two GRUs.

    One GRU goes over frames with the bins on its batch axis, so that rows times bins lie there; both caches have an
    axis of layers where a GRU has its batch.
    """
    nodes = [
        node("Transpose", ["mix"], ["x"], perm=[0, 3, 2, 1]),  # (1, 2, 1, 5)
        node("Gather", ["conv_cache", "zero"], ["old"], axis=0),  # (1, 2, 2, 5)
        node("Concat", ["old", "x"], ["frames"], axis=2),
        node("Slice", ["frames", "one", "end", "two"], ["newer"]),
        node("Unsqueeze", ["newer", "first"], ["conv_cache_out"]),
        node("Conv", ["frames", "K"], ["seen"], pads=[0, 1, 0, 1]),  # (1, 4, 1, 5)
        node("ReduceMean", ["seen"], ["energy"], axes=[3], keepdims=0),
        node("Transpose", ["energy"], ["by_time"], perm=[2, 0, 1]),  # (1, 1, 4)
        node("Gather", ["tra_cache", "zero"], ["tra"], axis=0),
        node("GRU", ["by_time", "W", "R", "", "", "tra"], ["", "tra_next"], hidden_size=4),
        node("Unsqueeze", ["tra_next", "first"], ["tra_cache_out"]),
        node("Unsqueeze", ["tra_next", "last"], ["gain"]),  # (1, 1, 4, 1)
        node("Transpose", ["gain"], ["gains"], perm=[0, 2, 1, 3]),
        node("Mul", ["seen", "gains"], ["loud"]),
        node("Transpose", ["loud"], ["by_bin"], perm=[0, 3, 2, 1]),  # (1, 5, 1, 4)
        node("Reshape", ["by_bin", "bins"], ["merged"]),  # (5, 1, 4)
        node("Transpose", ["merged"], ["turned"], perm=[1, 0, 2]),
        node("Gather", ["inter_cache", "zero"], ["inter"], axis=0),  # (1, 5, 4)
        node("GRU", ["turned", "W", "R", "", "", "inter"], ["", "inter_next"], hidden_size=4),
        node("Unsqueeze", ["inter_next", "first"], ["inter_cache_out"]),
        node("Reshape", ["inter_next", "back"], ["split"]),  # (1, 5, 1, 4)
        node("MatMul", ["split", "V"], ["enh"]),  # (1, 5, 1, 2)
    ]
    weights = {"K": weight(4, 2, 3, 3), "W": weight(1, 12, 4), "R": weight(1, 12, 4), "V": weight(4, 2)}
    weights |= {"zero": np.array(0), "one": whole(1), "end": whole(9), "two": whole(2), "first": whole(0)}
    weights |= {"last": whole(3), "bins": whole(5, 1, 4), "back": whole(1, 5, 1, 4)}
    caches = {"conv_cache": [1, 1, 2, 2, 5], "tra_cache": [1, 1, 1, 4], "inter_cache": [1, 1, 5, 4]}
    inputs = [("mix", F, [1, 5, 1, 2]), *((name, F, shape) for name, shape in caches.items())]
    outputs = [("enh", F, [1, 5, 1, 2]), *((f"{name}_out", F, shape) for name, shape in caches.items())]
    return save(path, nodes, inputs, outputs, weights)


def banded(path: Path) -> Path:
    """As FastEnhancer's: a cache (bands, 1, units), which goes into a GRU as (1, bands, units)."""
    nodes = [
        node("Reshape", ["wav_in", "by_band"], ["bands"]),  # (1, 3, 2)
        node("Reshape", ["cache_in_0", "as_state"], ["h"]),
        node("GRU", ["bands", "W", "R", "", "", "h"], ["", "h_next"], hidden_size=4),
        node("Reshape", ["h_next", "as_cache"], ["cache_out_0"]),
        node("MatMul", ["h_next", "V"], ["made"]),
        node("Reshape", ["made", "flat"], ["wav_out"]),
    ]
    weights = {"W": weight(1, 12, 2), "R": weight(1, 12, 4), "V": weight(4, 2), "flat": whole(1, 6)}
    weights |= {"by_band": whole(1, 3, 2), "as_state": whole(1, 3, 4), "as_cache": whole(3, 1, 4)}
    inputs, outputs = [("wav_in", F, [1, 6])], [("wav_out", F, [1, 6])]
    cache = (F, [3, 1, 4])
    return save(path, nodes, [*inputs, ("cache_in_0", *cache)], [*outputs, ("cache_out_0", *cache)], weights)


def filtered(path: Path) -> Path:
    """As FSMN-VAD: one row of any number of frames, caches (1, units, frames, 1) of convolutions over time."""
    nodes = [
        node("MatMul", ["speech", "A"], ["seen"]),
        node("Unsqueeze", ["seen", "first"], ["four"]),
        node("Transpose", ["four"], ["turned"], perm=[0, 3, 2, 1]),
        node("Concat", ["in_cache0", "turned"], ["frames"], axis=2),
        node("Slice", ["frames", "from", "end", "two"], ["out_cache0"]),
        node("Conv", ["frames", "K"], ["sum"], group=3),
        node("Transpose", ["sum"], ["back"], perm=[0, 3, 2, 1]),
        node("Squeeze", ["back", "first"], ["by_time"]),
        node("Softmax", ["by_time"], ["logits"]),
    ]
    weights = {"A": weight(4, 3), "K": weight(3, 1, 3, 1), "first": whole(1)}
    weights |= {"from": whole(-2), "end": whole(2**62), "two": whole(2)}
    cache = (F, [1, 3, 2, 1])
    inputs, outputs = [("speech", F, [1, "feats_length", 4])], [("logits", F, [1, "logits_length", 3])]
    return save(path, nodes, [*inputs, ("in_cache0", *cache)], [*outputs, ("out_cache0", *cache)], weights)


def chunked(path: Path) -> Path:
    """As NeMo's cache-aware encoders: `length` says how much of a chunk is valid; `encoded_lengths` follows from it."""
    nodes = [
        node("ReduceSum", ["audio_signal", "time"], ["sum"], keepdims=0),
        node("Cast", ["length"], ["many"], to=F),
        node("Unsqueeze", ["many", "time1"], ["each"]),
        node("Mul", ["sum", "each"], ["seen"]),
        node("MatMul", ["cache_last_channel", "U"], ["old"]),
        node("Add", ["seen", "old"], ["both"]),
        node("Tanh", ["both"], ["cache_last_channel_next"]),
        node("Identity", ["cache_last_channel_next"], ["outputs"]),
        node("Identity", ["length"], ["encoded_lengths"]),
        node("Add", ["cache_last_channel_len", "length"], ["cache_last_channel_next_len"]),
    ]
    weights = {"time": whole(2), "time1": whole(1), "U": weight(3, 3)}
    cache, number = (F, ["b", 3]), (I, ["b"])
    inputs = [("audio_signal", F, ["b", 3, 4]), ("length", *number), ("cache_last_channel", *cache)]
    outputs = [("outputs", *cache), ("encoded_lengths", *number), ("cache_last_channel_next", *cache)]
    inputs.append(("cache_last_channel_len", *number))
    outputs.append(("cache_last_channel_next_len", *number))
    return save(path, nodes, inputs, outputs, weights)


def policy(path: Path) -> Path:
    """As a recurrent agent's: an observation, the last action, a flag of a first step; the answer is an int64."""
    nodes = [
        node("Sub", ["unit", "is_first"], ["goes_on"]),
        node("Unsqueeze", ["goes_on", "last"], ["keep"]),
        node("Mul", ["deter", "keep"], ["kept"]),
        node("Flatten", ["obs"], ["seen"]),
        node("Concat", ["seen", "prev_action", "kept"], ["all"], axis=1),
        node("MatMul", ["all", "A"], ["sum"]),
        node("Tanh", ["sum"], ["deter_next"]),
        node("ArgMax", ["deter_next"], ["action"], axis=1, keepdims=0),
        node("ReduceMean", ["deter_next"], ["value"], axes=[1]),
    ]
    weights = {"A": weight(6 + 2 + 3, 3), "unit": np.ones(1, np.float32), "last": whole(1)}
    inputs = [("obs", F, [1, 2, 3]), ("prev_action", F, [1, 2]), ("is_first", F, [1]), ("deter", F, [1, 3])]
    return save(path, nodes, inputs, [("value", F, [1, 1]), ("action", I, [1]), ("deter_next", F, [1, 3])], weights)


def echo(path: Path) -> Path:
    """As DTLN-aec: near and far end have equal axes, and the answer the shape of both; names say nothing."""
    nodes = [
        node("Concat", ["input_3", "input_4"], ["both"], axis=2),
        node("Squeeze", ["both", "first"], ["flat"]),
        node("MatMul", ["flat", "A"], ["new"]),
        node("Mul", ["input_5", "half"], ["kept"]),
        node("Add", ["kept", "new"], ["Identity_1"]),
        node("MatMul", ["Identity_1", "B"], ["made"]),
        node("Unsqueeze", ["made", "first"], ["Identity"]),
    ]
    weights = {"A": weight(8, 3), "B": weight(3, 4), "half": np.full(1, 0.5, np.float32), "first": whole(1)}
    inputs = [("input_3", F, [1, 1, 4]), ("input_4", F, [1, 1, 4]), ("input_5", F, [1, 3])]
    return save(path, nodes, inputs, [("Identity", F, [1, 1, 4]), ("Identity_1", F, [1, 3])], weights)


class Case(NamedTuple):
    """A graph, what the import is told, and how it is read: data in and out, states, the time axis."""

    make: Callable[[Path], Path]
    told: str
    data: tuple[str, str]
    states: str
    time: int | None = None


CASES = {
    "a spectrum with caches": Case(
        spectral,
        "",
        ("mix", "enh"),
        "conv_cache:conv_cache_out tra_cache:tra_cache_out inter_cache:inter_cache_out",
    ),
    "a cache by bands": Case(banded, "", ("wav_in", "wav_out"), "cache_in_0:cache_out_0"),
    "one row of any length": Case(filtered, "", ("speech", "logits"), "in_cache0:out_cache0", 1),
    "a chunk with its length": Case(
        chunked,
        "--constant length=4",
        ("audio_signal", "outputs"),
        "cache_last_channel:cache_last_channel_next cache_last_channel_len:cache_last_channel_next_len",
    ),
    "an agent": Case(
        policy,
        "--input obs,prev_action --constant is_first=0",
        ("obs,prev_action", "action"),
        "deter:deter_next",
    ),
    "two microphones": Case(echo, "--input input_3,input_4", ("input_3,input_4", "Identity"), "input_5:Identity_1"),
}


def alone(file: Path, case: Case, runtime: Runtime, x: Array) -> Array:
    """What the exported graph answers to steps x (T, F) of one session, in a bare loop from zeros: (T, O)."""
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    ports = {port.name: [s if isinstance(s, int) else 1 for s in port.shape] for port in session.get_inputs()}
    kinds = {p.name: np.int64 if "int64" in p.type else np.float32 for p in session.get_inputs()}
    pairs = dict(pair.split(":") for pair in case.states.split())
    feeds = {name: np.zeros(ports[name], kinds[name]) for name in pairs}
    feeds |= {c.name: np.array(c.values, c.dtype).reshape(ports[c.name]) for c in runtime.manifest.constants}
    answers = []
    for row in x:
        at = 0
        for name in case.data[0].split(","):
            size = int(np.prod(ports[name]))
            feeds[name] = row[at : at + size].reshape(ports[name])
            at += size
        made = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
        answers.append(made[case.data[1]].ravel())
        feeds |= {before: made[after] for before, after in pairs.items()}
    return np.stack(answers)


@pytest.mark.parametrize("name", CASES)
def test_a_graph_of_the_wild_is_taken_in_one_round_and_batches(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it needs to be told is what a first try asks; sessions step together as the graph does for each alone."""
    case = CASES[name]
    file, models = case.make(tmp_path / "g.onnx"), tmp_path / "models"
    command = ["import", str(file), "--name", "m", "--models", str(models)]
    if case.told:
        assert main(command) == 1
        asked = capsys.readouterr().err
        known = [word for word in shlex.split(case.told) if not word.startswith("length=")]
        assert all(word in asked for word in known), asked
        if known == shlex.split(case.told):
            assert re.search(f"Likely: .*{re.escape(case.told)}$", asked, re.MULTILINE), asked
    assert main([*command, *shlex.split(case.told)]) == 0, capsys.readouterr().err
    runtime = Runtime(models / "m" / "1", device="cpu")
    runtime.quicken()
    manifest = runtime.manifest
    assert (manifest.input.name, manifest.output.name) == case.data
    assert [f"{s.input}:{s.output}" for s in manifest.states] == case.states.split()
    assert (manifest.rows, manifest.input.time_axis) == ("many", case.time)
    x = np.random.default_rng(8).normal(size=(3, 5, manifest.n_features)).astype(np.float32)
    states, got = np.frombuffer(runtime.initial(3), np.uint8).reshape(3, -1).copy(), []
    for step in range(x.shape[1]):
        after = np.empty_like(states)
        got.append(runtime.step(np.ascontiguousarray(x[:, step]), [states], [after]))
        states = after
    want = np.stack([alone(file, case, runtime, row) for row in x])
    np.testing.assert_allclose(np.stack(got, axis=1), want, 1e-5, 1e-6)
    assert np.ptp(want) > 0.01


def test_joined_inputs_are_features_by_name(tmp_path: Path) -> None:
    """Each part is a feature of its own width, in the order that was asked for."""
    file = echo(tmp_path / "g.onnx")
    told = ["--input", "input_4,input_3"]
    assert main(["import", str(file), "--name", "m", "--models", str(tmp_path / "models"), *told]) == 0
    features = Runtime(tmp_path / "models" / "m" / "1", device="cpu").manifest.features
    assert [(feature.name, feature.width) for feature in features] == [("input_4", 4), ("input_3", 4)]


@pytest.mark.parametrize(
    ("told", "words"),
    [("input_3,nothing", "'nothing'"), ("input_3,input_3", "twice")],
)
def test_inputs_that_cannot_be_joined_are_named(
    told: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that the graph lacks, and one that is given twice."""
    file = echo(tmp_path / "g.onnx")
    assert main(["import", str(file), "--name", "m", "--models", str(tmp_path / "models"), "--input", told]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
