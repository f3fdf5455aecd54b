"""import: foreign graphs become models that step, or the import says what it must be told."""

import json
import shlex
from pathlib import Path
from typing import Any

import foreign
import httpx
import numpy as np
import pytest
from serving import running

from service.__main__ import main
from service.engine.imports.onnx_graphs import import_onnx
from service.engine.imports.questions import OpenQuestions
from service.engine.model import Runtime
from stepcast.errors import ManifestError
from stepcast.manifest import read_manifest

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
    assert "--constant sr=VALUE" in said
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


def test_nodes_say_which_output_continues_which_input_where_names_do_not(tmp_path: Path) -> None:
    """The inputs of an LSTM's h and c, and its outputs, whatever they are called; wrong names do not win."""
    for number, names in enumerate(
        (("data", "a", "b", "result", "p", "q"), ("x", "h_in", "c_in", "y", "c_out", "h_out"))
    ):
        file = foreign.torch_lstm(tmp_path / f"lstm{number}.onnx", names=names)
        made = import_onnx(file, tmp_path / "models", "m")
        assert [(s.input, s.output) for s in made.manifest.states] == [names[1::3], names[2::3]]
        assert (made.manifest.input.name, made.manifest.output.name) == names[::3]


def test_equally_likely_pairings_are_told_apart_by_the_proof(tmp_path: Path) -> None:
    """Both states go through a product, so that nothing but running the graph says which output is whose."""
    made = import_onnx(foreign.hidden_lstm(tmp_path / "g.onnx", ("q", "p")), tmp_path / "models", "m")
    assert [(s.input, s.output) for s in made.manifest.states] == [("a", "p"), ("b", "q")]
    assert sorted(path.name for path in (tmp_path / "models" / "m").iterdir()) == ["1"]


def test_two_readings_that_both_pass_are_asked(tmp_path: Path) -> None:
    """Two states that are alike in every way: one question, and the answer on the command line is enough."""
    file, models = foreign.twins(tmp_path / "g.onnx"), tmp_path / "models"
    with pytest.raises(OpenQuestions) as asked:
        import_onnx(file, models, "m")
    assert "which output continues which of the inputs 'a' float32 [n, 3], 'b' float32 [n, 3]?" in str(asked.value)
    assert asked.value.command == "--state a:p --state b:q"
    assert not models.exists()
    assert main(["import", str(file), "--name", "m", "--models", str(models), "--state", "a:q"]) == 0
    manifest = read_manifest(models / "m" / "1")
    assert [(s.input, s.output) for s in manifest.states] == [("a", "q"), ("b", "p")]


def test_states_and_features_may_be_given_in_a_file(tmp_path: Path) -> None:
    """Names of layers, keys and features come from the partial manifest; the graph is not asked."""
    file = foreign.twins(tmp_path / "g.onnx")
    states = [
        {"layer": "lstm", "key": "h", "input": "a", "output": "p"},
        {"layer": "lstm", "key": "c", "input": "b", "output": "q"},
    ]
    features = [{"name": f"sensor_{i}", "unit": "V"} for i in range(4)]
    made = import_onnx(file, tmp_path / "models", "m", None, partial(tmp_path, states=states, features=features))
    assert list(made.manifest.layers["lstm"]) == ["h", "c"]
    assert made.manifest.features[3].name == "sensor_3"
    assert not [p for p in (tmp_path / "models" / "m").iterdir() if p.name != "1"]


def test_all_questions_come_at_once_and_one_file_answers_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused import writes the file to edit; with the null filled in it is all that the import needs."""
    file, models, draft = foreign.puzzle(tmp_path / "g.onnx"), tmp_path / "models", tmp_path / "draft.json"
    command = ["import", str(file), "--name", "m", "--models", str(models)]
    assert main([*command, "--questions", str(draft)]) == 1
    said = capsys.readouterr().err
    assert "5 questions are open" in said
    for part in (
        "--input v",
        "--output u",
        "--state a:p",
        "--constant rate=16000",
        "--constant gain=VALUE",
        "'gain' float32 []",
    ):
        assert part in said, part
    assert "Likely:" not in said  # nobody but the user knows the gain
    assert not models.exists()
    fields = json.loads(draft.read_text())
    constants = {constant["name"]: constant for constant in fields["constants"]}
    assert constants["gain"] == {"name": "gain", "dtype": "float32", "shape": [], "values": None}
    constants["gain"]["values"] = [2]
    draft.write_text(json.dumps(fields))
    assert main([*command, "--manifest", str(draft)]) == 0
    manifest = read_manifest(models / "m" / "1")
    assert {c.name: c.values for c in manifest.constants} == {"rate": (16000.0,), "gain": (2.0,)}
    assert [(s.input, s.output) for s in manifest.states] == [("a", "p"), ("b", "q")]


def test_the_likely_command_works_as_it_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate that the graph compares its input with is suggested, not set; pasting the last line imports."""
    file, models = foreign.rated(tmp_path / "g.onnx"), tmp_path / "models"
    assert main(["import", str(file), "--name", "m", "--models", str(models)]) == 1
    *_, likely = capsys.readouterr().err.splitlines()
    _, found, line = likely.partition("Likely: python -m service ")
    assert found
    assert line.endswith("--constant rate=16000")
    assert main(shlex.split(line)) == 0


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
    """A sentence, not a traceback."""
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ManifestError, match="is no ONNX graph"):
        import_onnx(tmp_path / "x.onnx", tmp_path / "models", "m")
    assert main(["import-onnx", str(tmp_path / "none.onnx"), "--name", "m", "--models", str(tmp_path)]) == 1


def test_a_manifest_of_another_graph_is_refused(tmp_path: Path) -> None:
    """Two graphs swapped: the first name that is not the graph's is named, with those that it has."""
    fields = partial(tmp_path, states=[{"input": "state", "output": "stateN"}], constants=[SR])
    with pytest.raises(ManifestError, match=r"no input 'sr', it has \['c0', 'h0', 'x'\]"):
        import_onnx(foreign.torch_lstm(tmp_path / "g.onnx"), tmp_path / "models", "m", None, fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"constants": [{"name": "sr", "values": None}]}, r"\$\.constants\[0\]\.values is null. Fill it in"),
        ({"features": [{"name": "audio", "width": None}]}, r"\$\.features\.0\.width"),
        ({"features": 5}, r"\$\.features"),
        ({"input": {"batch_axis": "first"}}, r"\$\.input\.batch_axis"),
        ({"states": "h"}, r"\$\.states"),
        ({"states": [{"input": "h0", "shape": "wide"}]}, r"\$\.states\[0\]\.shape"),
        ({"states": [{"input": "h0", "wide": 1}]}, r"\$\.states\[0\]\.wide"),
        ({"constants": [{"values": [1]}]}, "no input None"),
    ],
)
def test_a_field_of_a_wrong_type_is_named(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    """Whatever stands in the file: a path and a sentence."""
    with pytest.raises(ManifestError, match=words):
        import_onnx(foreign.torch_lstm(tmp_path / "g.onnx"), tmp_path / "m", "m", None, partial(tmp_path, **fields))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--state", "h0"], "is not INPUT:OUTPUT"),
        (["--state", "h0:cn", "--state", "nope:hn"], "no free tensor 'nope'"),
        (["--constant", "sr"], "is not NAME=NUMBER"),
        (["--batch-axis", "first"], "is not an axis"),
        (["--time-axis", "h0=1"], "a state has no time axis"),
        (["--features", "5"], "no step of 5 numbers"),
    ],
)
def test_an_option_that_cannot_be_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    """One line."""
    file, models = foreign.torch_lstm(tmp_path / "g.onnx"), tmp_path / "models"
    assert main(["import", str(file), "--models", str(models), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not models.exists()


def test_options_say_what_a_manifest_says(tmp_path: Path) -> None:
    """Features by name, axes, states: as fields of the manifest that is written; the name is the file's."""
    file, models = foreign.torch_lstm(tmp_path / "pump.onnx"), tmp_path / "models"
    given = "--features flow,pressure,speed,heat --outputs 3 --input x --output y --state h0:hn"
    axes = "--batch-axis 0 --batch-axis h0=1 --time-axis input=1"
    assert main(["import", "onnx", *given.split(), *axes.split(), "--models", str(models), str(file)]) == 0
    manifest = read_manifest(models / "pump" / "1")
    assert [feature.name for feature in manifest.features] == ["flow", "pressure", "speed", "heat"]
    assert [state.batch_axis for state in manifest.states] == [1, 1]


def test_how_many_features_there_are_is_asked_with_an_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A size that the graph leaves open, and a file whose null cannot be overlooked."""
    file, draft = foreign.unsized(tmp_path / "g.onnx"), tmp_path / "draft.json"
    command = ["import", str(file), "--models", str(tmp_path / "models")]
    assert main([*command, "--questions", str(draft)]) == 1
    said = capsys.readouterr().err
    assert (
        "how many features has a step? Input 'x' float32 [n, width] has no fixed size for them. Give --features N"
        in said
    )
    assert "Likely" not in said
    assert main([*command, "--manifest", str(draft)]) == 1
    assert "width" in capsys.readouterr().err


def test_sizes_that_were_only_the_examples_become_free(tmp_path: Path) -> None:
    """Declared with two rows of five steps, none of its nodes depends on it: sessions step and batch, as numpy does."""
    file = foreign.torch_lstm(tmp_path / "g.onnx", dims=(2, 5), rows=2)
    made = import_onnx(file, tmp_path / "models", "m")
    manifest = made.manifest
    assert (manifest.rows, manifest.input.batch_axis, manifest.input.time_axis, manifest.n_features) == (
        "many",
        0,
        1,
        4,
    )
    assert [(state.batch_axis, state.shape) for state in manifest.states] == [(1, (1, 3)), (1, (1, 3))]
    assert "2 rows along axis 0" in manifest.provenance.data
    assert "5 steps along axis 1" in manifest.provenance.data
    x = np.random.default_rng(4).normal(size=(3, 4, 4)).astype(np.float32)
    runtime = Runtime(made.directory, device="cpu")
    y, _ = runtime.run(x, None, np.frombuffer(runtime.initial(3), np.uint8).reshape(3, -1))
    np.testing.assert_allclose(y, foreign.lstm_numpy(x, np.zeros((3, 3)), np.zeros((3, 3)))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", ["seq", 5])
def test_a_reshape_that_holds_the_examples_steps_is_freed(tmp_path: Path, steps: Any) -> None:
    """Whether the exporter declares any number of steps or the example's: single steps answer as numpy does."""
    made = import_onnx(foreign.reshaped_lstm(tmp_path / "g.onnx", steps), tmp_path / "models", "m")
    assert (made.manifest.input.batch_axis, made.manifest.input.time_axis, made.manifest.n_features) == (1, 0, 4)
    x = np.random.default_rng(4).normal(size=(3, 7, 4)).astype(np.float32)
    runtime = Runtime(made.directory, device="cpu")
    y, _ = runtime.run(x, None, np.frombuffer(runtime.initial(3), np.uint8).reshape(3, -1))
    np.testing.assert_allclose(y, foreign.lstm_numpy(x, np.zeros((3, 3)), np.zeros((3, 3)))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "mixed", "rows", "step"),
    [
        (["n", 5, 4], 1, "many", (5, 4)),  # a step needs the others of its chunk
        ([1, 2, 4], 2, "many", (2, 4)),  # channels behind a row
        ([2, 4], 0, "one", (2, 4)),  # rows that need each other
    ],
)
def test_a_size_that_the_graph_needs_stays(
    tmp_path: Path, shape: list[Any], mixed: int, rows: str, step: tuple[int, ...]
) -> None:
    """What cannot be proved stays as it was declared."""
    made = import_onnx(foreign.framed(tmp_path / "g.onnx", shape, mixed), tmp_path / "models", "m").manifest
    assert (made.rows, made.input.time_axis, made.input.shape) == (rows, None, step)
