"""Rows that are the same bits alone and beside others: what is found when a version is loaded, and that it holds."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import pytest
from doors import STEP_DOORS, Script, outputs_of, step
from serving import MODELS, running

from service.__main__ import main
from service.engine import batch_invariance
from service.engine.batch_invariance import Trial, try_batches
from service.engine.model import Runtime
from service.engine.repository import Repository
from stepcast.manifest import GOLDEN_FILE, MODEL_FILE, Manifest, sha256_of, write_manifest

pytestmark = pytest.mark.service

SHARES = {
    "batch-msgpack": 60_000,
    "batch-json": 32_000,
    "websocket-msgpack": 4_000,
    "websocket-json": 2_000,
    "http-msgpack": 1_000,
    "http-json": 1_000,
}
"""How many of 100,000 steps go through each door."""


def sizes(random: np.random.Generator, door: str, share: int) -> Iterator[int]:
    """Random sizes of batches, up to what a door sends at once; their sum is the share."""
    while share:
        size = min(share, int(random.integers(1, 301 if door.startswith("batch") else 21)))
        share -= size
        yield size


def added_up(folder: Path, answer: str, start: float) -> Path:
    """A model directory: total_out = total * 1e15 + sum of x, y = an expression of x and the batch's size."""
    directory = folder / "added" / "1"
    directory.mkdir(parents=True)
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    graph (float[b, t, 1] x, float[b] total) => (float[b, t, 1] y, float[b] total_out) {
        grow = Constant <value: tensor = float {1e15}> ()
        milli = Constant <value: tensor = float {0.0009765625}> ()
        flat_axes = Constant <value: tensor = int64[2] {1, 2}> ()
        now = ReduceSum <keepdims: int = 0> (x, flat_axes)
        grown = Mul (total, grow)
        total_out = Add (grown, now)
        sizes = Shape <start: int = 0, end: int = 1> (x)
        rows = Cast <to: int = 1> (sizes)
        more = Mul (rows, milli)
        y = ANSWER
    }"""
    onnx.save(onnx.parser.parse_model(text.replace("ANSWER", answer)), directory / MODEL_FILE)
    fields = {"name": "added", "version": 1, "features": [{"name": "x"}], "outputs": [{"name": "y"}]}
    states = [{"layer": "sum", "key": "total", "input": "total", "output": "total_out", "shape": []}]
    more = {"task": "regression", "lengths": None, "states": states, "sha256": sha256_of(directory / MODEL_FILE)}
    write_manifest(directory, Manifest.model_validate({**fields, **more}))
    x, total = np.zeros((1, 1, 1), np.float32), np.array([start], np.float32)
    recorded = {"state_in.sum.total": total, "state_out.sum.total": total * np.float32(1e15)}
    np.savez(directory / GOLDEN_FILE, x=x, lengths=np.array([1], np.int32), y=x, **recorded)
    return directory


def test_rows_that_depend_on_their_number_are_found_out(tmp_path: Path) -> None:
    """y = x + B / 1024: of 256 rows each is off by 255 / 1024."""
    found = try_batches(Runtime(added_up(tmp_path, "Add (x, more)", 0.0), device="cpu"), 256)
    assert found.steps == Trial(False, 256, 255 / 1024)
    assert found.calls is not None
    assert not found.calls.exact  # this graph runs rows of equal length together, which are fewer
    assert 0 < found.calls.difference < 255 / 1024
    assert str(found).startswith("steps are equal within 0.25 in batches of up to 256 rows, calls are equal within")


def test_rows_that_do_not_are_exact(tmp_path: Path) -> None:
    """The largest batch is the one that was asked for, also where it is no Fibonacci number, or 1."""
    runtime = Runtime(added_up(tmp_path, "Identity (x)", 0.0), device="cpu")
    assert try_batches(runtime, 100) == (Trial(True, 100, 0.0), Trial(True, 100, 0.0))
    assert try_batches(runtime, 1) == (Trial(True, 1, 0.0), Trial(True, 1, 0.0))


def test_nothing_is_claimed_where_nothing_is_finite(tmp_path: Path) -> None:
    """One step more than was recorded, and the state overflows."""
    found = try_batches(Runtime(added_up(tmp_path, "Identity (x)", 1e15), device="cpu"), 256)
    assert found.document() == {"steps": None, "calls": None}
    assert "not finite" in str(found)


def test_the_time_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any time only the smallest batches are tried, and that is what is claimed."""
    monkeypatch.setattr(batch_invariance, "_BUDGET_S", 0.0)
    found = try_batches(Runtime(added_up(tmp_path, "Identity (x)", 0.0), device="cpu"), 256)
    assert found.steps == Trial(True, 3, 0.0)


def test_what_reads_from_both_ends_has_calls_only() -> None:
    """A model that is not stepped."""
    found = try_batches(Runtime(MODELS / "bidirectional" / "1", device="cpu"), 16)
    assert found.steps is None
    assert found.calls is not None
    assert found.calls.rows == 16


def test_it_is_said_in_the_log_and_by_check(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a version that is served; batches are as large as the server makes them."""
    (tmp_path / "lstm").symlink_to(MODELS / "lstm")
    with caplog.at_level(logging.INFO):
        repository = Repository(tmp_path, device="cpu", threads=1, batch_rows=20)
        (served,) = repository.scan()
    assert served.batch_invariance.steps is not None
    assert served.batch_invariance.steps.rows == 20
    assert f"serving lstm version 1 on cpu: {served.batch_invariance}" in caplog.text
    assert main(["check", str(MODELS / "lstm" / "1"), "--device", "cpu"]) == 0
    assert "on this machine steps are " in capsys.readouterr().out


def test_law2_is_exact_where_steps_are_certified() -> None:
    """100,000 random steps of 300 sessions, through all doors, in random batches, have the bits of rows alone."""
    random = np.random.default_rng(3)
    with running(store="memory://", device="cpu") as server, ExitStack() as opened:
        served = [server.app.repository.live(name) for name in ("lstm", "gru", "graves_lstm", "characters")]
        model = next(one for one in served if one.batch_invariance.steps and one.batch_invariance.steps.exact)
        manifest, alone = model.manifest, Runtime(model.runtime.directory, device="cpu")
        assert alone.quicken() == model.runtime.quick
        doors = {name: STEP_DOORS[name](server.url, manifest.name) for name in SHARES}
        for door in doors.values():
            opened.callback(door.close)
        states = [alone.initial(1)] * 300
        turns = [(name, size) for name, share in SHARES.items() for size in sizes(random, name, share)]
        for turn in random.permutation(len(turns)):
            name, size = turns[turn]
            pick = random.permutation(len(states))[:size]
            x = random.normal(size=(size, manifest.n_features)).astype(np.float32)
            want = np.empty((size, manifest.n_outputs), np.float32)
            for place, row in enumerate(pick):
                made = alone.step_one(x[place].tobytes(), states[row], 0)
                assert made is not None
                want[place], states[row] = made
            answers = doors[name].together([step(f"s-{row}", x[place]) for place, row in enumerate(pick)])
            assert b"".join(outputs_of(answer)[0].tobytes() for answer in answers) == want.tobytes(), name
        script = Script(doors["websocket-msgpack"], manifest)
        for row, state in enumerate(states):
            got = script.state(f"s-{row}")
            for layer, keys in alone.unpack(state, 1).items():
                for key, value in keys.items():
                    assert got[layer][key].tobytes() == value.tobytes()
