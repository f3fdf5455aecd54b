"""import: foreign graphs become models that step, or the import says what it must be told."""

import json
from pathlib import Path
from typing import Any

import foreign
import httpx
import numpy as np
import pytest
from serving import running

from service.__main__ import main
from service.engine.imports.onnx_graphs import import_onnx
from service.engine.imports.roles import stem
from service.engine.model import Runtime
from stepcast.errors import ManifestError

SR = {"name": "sr", "dtype": "int64", "shape": [], "values": [8000]}


def partial(folder: Path, **fields: Any) -> Path:
    """A partial manifest's file."""
    path = folder / "partial.json"
    path.write_text(json.dumps(fields))
    return path


def test_a_torch_lstm_needs_no_help_and_steps_as_numpy_does(tmp_path: Path) -> None:
    """h0 goes to hn, c0 to cn; state batch is on axis 1; a session answers what the mathematics says."""
    made = import_onnx(foreign.torch_lstm(tmp_path / "lstm.onnx"), tmp_path / "models", "foreign")
    manifest = made.manifest
    assert [(s.input, s.output, s.shape, s.batch_axis) for s in manifest.states] == [
        ("h0", "hn", (1, 3), 1),
        ("c0", "cn", (1, 3), 1),
    ]
    assert (manifest.input.batch_axis, manifest.input.time_axis, manifest.lengths) == (0, 1, None)
    assert (manifest.n_features, manifest.n_outputs) == (4, 3)
    assert "recorded from this graph" in manifest.provenance.data
    x = np.random.default_rng(2).normal(size=(2, 5, 4)).astype(np.float32)
    want, h, c = foreign.lstm_numpy(x, np.zeros((2, 3)), np.zeros((2, 3)))
    with running(store="memory://", models=tmp_path / "models") as server:
        at = f"{server.url}/v1/models/foreign/sessions/s"
        first = httpx.post(f"{at}/step", json={"inputs": x[:, :2].tolist()}).json()["outputs"]
        masked = [x[:, 2].tolist(), [[9.0] * 4] * 2]
        inputs = np.stack([np.array(masked[0]), np.array(masked[1])], axis=1).tolist()
        third = httpx.post(f"{at}/step", json={"inputs": inputs, "mask": [[1, 0], [1, 0]]}).json()["outputs"]
        rest = httpx.post(f"{at}/step", json={"inputs": x[:, 3:].tolist()}).json()["outputs"]
        state = httpx.get(f"{at}/state").json()["state"]["state"]
    got = np.concatenate([first, np.array(third, float)[:, :1], rest], axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.squeeze(state["h0"], 1), h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.squeeze(state["c0"], 1), c, rtol=1e-4, atol=1e-5)


def test_a_silero_like_graph_needs_its_sample_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command names the constant that it must be told; then a combined state [2,B,H] and no time axis are read."""
    file, models = foreign.silero(tmp_path / "vad.onnx"), tmp_path / "models"
    command = ["import", str(file), "--name", "vad", "--models", str(models)]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "'sr' int64 []" in said
    assert "$.constants" in said
    assert not list(models.glob("*/*"))
    assert main([*command, "--manifest", str(partial(tmp_path, constants=[SR]))]) == 0
    assert "state state.state: 'state' -> 'stateN', [2, 3], axis 1" in capsys.readouterr().out
    assert main(["check", str(models / "vad" / "1")]) == 0
    runtime = Runtime(models / "vad" / "1", device="cpu")
    assert runtime.manifest.input.time_axis is None
    x = np.random.default_rng(3).normal(size=(3, 6, 4)).astype(np.float32)
    start = np.frombuffer(runtime.initial(3), np.uint8).reshape(3, -1)
    y, states = runtime.run(x, np.array([6, 2, 0], np.int32), start)
    for row, length in enumerate((6, 2, 0)):
        zeros = np.zeros((1, 2, 3))
        if length:
            want, end = foreign.silero_numpy(x[row : row + 1, :length], zeros, 8000)
            np.testing.assert_allclose(y[row, :length], want[0], rtol=1e-4, atol=1e-5)
        else:
            end = zeros
        np.testing.assert_allclose(
            runtime.unpack(states.tobytes(), 3)["state"]["state"][row], end[0], rtol=1e-4, atol=1e-5
        )


def test_versions_count_up_and_are_never_overwritten(tmp_path: Path) -> None:
    """The next free version, or the one that is asked for and is not there."""
    file = foreign.torch_lstm(tmp_path / "lstm.onnx")
    numbers = [import_onnx(file, tmp_path / "m", "a", version).directory.name for version in (None, 5, None)]
    assert numbers == ["1", "5", "6"]
    with pytest.raises(ManifestError, match="exists"):
        import_onnx(file, tmp_path / "m", "a", 5)


def test_names_that_say_nothing_are_refused_until_states_are_given(tmp_path: Path) -> None:
    """Two state inputs and two outputs of one shape: which goes with which is not guessed."""
    file = foreign.torch_lstm(tmp_path / "lstm.onnx", names=("data", "a", "b", "result", "p", "q"))
    with pytest.raises(ManifestError, match=r"Give \$\.states"):
        import_onnx(file, tmp_path / "models", "m")
    states = [
        {"layer": "lstm", "key": "h", "input": "a", "output": "p"},
        {"layer": "lstm", "key": "c", "input": "b", "output": "q"},
    ]
    features = [{"name": f"sensor_{i}", "unit": "V"} for i in range(4)]
    made = import_onnx(file, tmp_path / "models", "m", None, partial(tmp_path, states=states, features=features))
    assert list(made.manifest.layers["lstm"]) == ["h", "c"]
    assert made.manifest.features[3].name == "sensor_3"
    assert not [p for p in (tmp_path / "models" / "m").iterdir() if p.name != "1"]


def test_swapped_axes_are_found_out(tmp_path: Path) -> None:
    """A wrong axis in the partial manifest is refused by the proof, and nothing is left behind."""
    file = foreign.torch_lstm(tmp_path / "lstm.onnx")
    wrong = {"batch_axis": 1, "time_axis": 0}
    with pytest.raises(ManifestError):
        import_onnx(file, tmp_path / "models", "m", None, partial(tmp_path, input=wrong, output=wrong))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("build", "known", "words"),
    [
        (foreign.torch_lstm, {"sha256": "0"}, "Leave them out"),
        (foreign.torch_lstm, {"nonsense": 1}, "unknown fields"),
        (foreign.torch_lstm, {"input": {"name": "z"}}, "no free tensor 'z'"),
        (foreign.torch_lstm, {"states": [{"input": "h0", "output": "nope"}]}, r"\$\.states\[0\]\.output"),
        (foreign.torch_lstm, {"features": [{"name": "one"}]}, "no step of 1 numbers"),
        (foreign.torch_lstm, {"features": [{"name": "one", "nonsense": 1}]}, r"\$\.features"),
        (foreign.silero, {"constants": [{**SR, "dtype": "float32"}]}, "'sr'"),
    ],
)
def test_what_cannot_be_read_says_what_would_help(
    tmp_path: Path, build: Any, known: dict[str, Any], words: str
) -> None:
    """Each refusal names the tensor or the field; nothing is written."""
    with pytest.raises(ManifestError, match=words):
        import_onnx(build(tmp_path / "g.onnx"), tmp_path / "models", "m", None, partial(tmp_path, **known))
    assert not list((tmp_path / "models").glob("*/*"))


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    """onnxruntime's complaint, not a traceback."""
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ManifestError, match="cannot load"):
        import_onnx(tmp_path / "x.onnx", tmp_path / "models", "m")
    assert main(["import-onnx", str(tmp_path / "none.onnx"), "--name", "m", "--models", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("h_in", "h_out"),
        ("h0", "hn"),
        ("h_0", "h_n"),
        ("state", "stateN"),
        ("past_h", "present_h"),
        ("prev_cell", "next_cell"),
        ("hidden_in", "hidden_out"),
        ("input_h", "output_h"),
    ],
)
def test_names_of_a_state_have_one_stem(one: str, other: str) -> None:
    """What exporters call the value before and after."""
    assert stem(one) == stem(other) != ""


@pytest.mark.parametrize(
    ("one", "other"), [("h0", "cn"), ("x", "y"), ("h_1_in", "h_2_out"), ("h0_in", "h1_out"), ("lstm0_h", "lstm2_h")]
)
def test_names_of_different_tensors_have_not(one: str, other: str) -> None:
    """Others stay apart."""
    assert stem(one) != stem(other)
