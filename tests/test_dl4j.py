"""DL4J's zips: their own recorded answers, every layer against DL4J's formulas, and zips that are no good.

Files of DL4J lie in ../shared/models/dl4j, beside the checkout; the tests that need them say so if they are not there.
"""

import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dl4j_zips as dl4j
import httpx
import numpy as np
import pytest
import torch
from dl4j_zips import Array, Draw, Params
from serving import ROOT, running

from stepcast.__main__ import main
from stepcast.errors import ManifestError
from stepcast.manifest import Feature, read_manifest
from training.imports.dl4j.arrays import Stream, read_array
from training.imports.dl4j.saved_network import read_dl4j, read_saved
from training.imports.foreign import Recorded, take_in
from training.stepper import Stepper

FILES = ROOT.parent / "shared" / "models" / "dl4j"
CHARACTERS = "GravesLSTMCharModelingExample_100b4.bin"
recorded = pytest.mark.skipif(not FILES.is_dir(), reason=f"DL4J's own files are not in {FILES}")


def indarray(file: Path) -> Array:
    """A file of one INDArray."""
    stream = Stream(file.read_bytes(), file.name)
    made = read_array(stream)
    stream.end()
    return made


def answers(directory: Path, x: Array, block: int) -> Array:
    """What model.onnx of a directory says of whole rows, `block` steps a call."""
    manifest = read_manifest(directory)
    stepper = Stepper.of(directory, manifest)
    rows = np.ascontiguousarray(x, np.float32)
    lengths = np.full(len(x), x.shape[1], np.int32)
    return stepper.in_blocks(rows, lengths, stepper.initial_states(len(x)), block)[0]


# --- DL4J's own files --------------------------------------------------------------------------------------------


@recorded
def test_the_character_model_says_what_dl4j_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through torch and model.onnx as the command proves it, and through a server's steps, all within 1e-6."""
    given, said = (FILES / f"GravesLSTMCharModelingExample_{side}_100b4.bin" for side in ("Input", "Output"))
    line = ["import", str(FILES / CHARACTERS), "--name", "characters", "--features", "character:77"]
    line += ["--recorded-input", str(given), "--recorded-output", str(said), "--atol", "1e-6"]
    assert main([*line, "--models", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "states layer0.h, layer0.c, layer1.h, layer1.c" in told
    assert "DL4J's recorded answers are reproduced: largest difference" in told
    manifest = read_manifest(tmp_path / "characters" / "1")
    assert manifest.provenance.metrics["recorded"]["largest_difference"] < 1e-7
    assert "GravesLSTMCharModelingExample_100b4.bin (DL4J), sha256 " in manifest.provenance.data
    assert [(f.source, f.feature) for f in manifest.feedback] == [("class", "character")]
    x, want = indarray(given).transpose(0, 2, 1), indarray(said).transpose(0, 2, 1)  # (3, 10, 77)
    assert want[0, 0, :4] == pytest.approx([0.01305836, 0.01310873, 0.0129282, 0.0131394], abs=1e-7)
    with running(store="memory://", models=tmp_path) as server:
        at = f"{server.url}/v1/models/characters/sessions/dl4j/step"
        got = [httpx.post(at, json={"inputs": x[:, t].tolist()}).json()["outputs"] for t in range(x.shape[1])]
    assert np.abs(np.stack(got, axis=1) - want).max() < 1e-6


@recorded
def test_the_sequence_classifier_predicts_what_dl4j_recorded(tmp_path: Path) -> None:
    """Ten control charts, standardised as DL4J did, whole and step by step: the answer at the last step."""
    folder = FILES / "RnnCsvSequenceClassification1"
    series = np.loadtxt(ROOT / "tests" / "data" / "uci_control_charts.txt")
    x = ((series - 29.871785) / 10.539398).astype(np.float32)[..., None]  # (10, 60, 1)
    want = indarray(folder / "output_0_0.bin")
    foreign = read_dl4j(folder / "Model_RANDOM_INIT_UNTRAINED.zip")
    directory, manifest = take_in(foreign, tmp_path, "charts", recorded=Recorded(x, want, atol=1e-6))
    assert manifest.readout == "last"
    for block in (60, 7, 1):
        assert np.abs(answers(directory, x, block)[:, -1] - want).max() < 1e-6
    wrong = Recorded(x, want + 1e-4, atol=1e-6)
    with pytest.raises(ManifestError, match=r"torch: answers differ from those recorded by up to 0\.0001"):
        take_in(foreign, tmp_path, "charts", recorded=wrong)
    assert [p.name for p in (tmp_path / "charts").iterdir()] == ["1"]


@recorded
def test_the_zip_of_dl4j_08_has_every_parameter_in_its_place(tmp_path: Path) -> None:
    """Its parameters are 1..477: each of ours is compared with the number that counting gives."""
    saved = read_saved(FILES / "080_ModelSerializer_Regression_LSTM_1.zip")
    lstm, both, out = saved.weights
    flat = np.arange(1, 478, dtype=np.float32)
    w, rw, b = flat[:48].reshape(3, 16, order="F"), flat[48:124].reshape(4, 19, order="F"), flat[124:140]
    assert (rw[0, 0], rw[1, 0], rw[0, 1], b[0]) == (49, 50, 53, 125)
    for block, gate in enumerate((3, 1, 0, 2)):  # torch's i, f, g, o are DL4J's G, F, I, O
        mine, theirs = slice(4 * block, 4 * block + 4), slice(4 * gate, 4 * gate + 4)
        assert (lstm["kernel.weight_ih_l0"][mine].numpy() == w[:, theirs].T).all()
        assert (lstm["kernel.weight_hh_l0"][mine].numpy() == rw[:, theirs].T).all()
        assert (lstm["kernel.bias_ih_l0"][mine].numpy() == b[theirs]).all()
    assert (lstm["peephole"].numpy() == np.stack([rw[:, 18], rw[:, 17], rw[:, 16]])).all()  # i, o, f
    every = torch.cat([t.flatten() for layer in saved.weights for t in layer.values()])
    assert torch.equal(every[every != 0].sort().values, torch.arange(1.0, 478.0))
    assert both["backwards.peephole"].tolist() == [[n, n + 1, n + 2, n + 3] for n in (433, 429, 425)]
    assert out["linear.weight"].tolist() == (453 + np.arange(20).reshape(5, 4)).tolist()
    assert out["linear.bias"].tolist() == [473, 474, 475, 476, 477]
    _, manifest = take_in(read_dl4j(FILES / "080_ModelSerializer_Regression_LSTM_1.zip"), tmp_path, "small")
    assert (manifest.streaming, manifest.states, manifest.n_features, manifest.n_outputs) == (False, (), 3, 5)


@recorded
def test_peepholes_of_the_zip_of_dl4j_08_step_as_the_formula_does(tmp_path: Path) -> None:
    """Its first layer alone, its parameters a thousandth of what they are so that no gate saturates."""
    flat = np.arange(1, 141, dtype=np.float32) / 1000
    params = {"W": flat[:48].reshape(3, 16, order="F"), "RW": flat[48:124].reshape(4, 19, order="F"), "b": flat[124:]}
    layers = [dl4j.layer("GravesLSTM", True, nin=3, nout=4, activationFn="tanh", layerName="layer0")]
    file = dl4j.save(tmp_path / "first.zip", dl4j.chain(layers), [params])
    directory, manifest = take_in(read_dl4j(file), tmp_path / "models", "first")
    assert [f"{s.layer}.{s.key}" for s in manifest.states] == ["layer0.h", "layer0.c"]
    x = np.random.default_rng(1).normal(size=(4, 9, 3))
    for block in (9, 1):
        np.testing.assert_allclose(answers(directory, x, block), dl4j.lstm(x, params), atol=1e-6)


# --- Every layer against DL4J's formulas -------------------------------------------------------------------------

Case = tuple[list[dict[str, Any]], list[Params], Callable[[Array], Array]]


def fields(size: int, n: int, act: str = "tanh", **more: Any) -> dict[str, Any]:
    """What every layer with units has."""
    return {"nin": size, "nout": n, "activationFn": act, **more}


def out(size: int, kind: str = "RnnOutputLayer") -> dict[str, Any]:
    """A softmax of three classes."""
    return dl4j.layer(kind, **fields(size, 3, "softmax"), lossFn={"@class": "org.x.LossMCXENT"})


def _lstm(draw: Draw) -> Case:
    one, two = draw.lstm(4, 5), draw.lstm(5, 3)
    kinds = [
        dl4j.layer("LSTM", **fields(4, 5), gateActivationFn="sigmoid"),
        dl4j.layer("LSTM", **fields(5, 3, "softsign"), gateActivationFn="hardsigmoid"),
    ]
    end = draw.dense(3, 3)
    layers = [*kinds, out(3)]
    return (
        layers,
        [one, two, end],
        lambda x: dl4j.dense(dl4j.lstm(dl4j.lstm(x, one), two, "softsign", "hardsigmoid"), end, "softmax"),
    )


def _graves(draw: Draw) -> Case:
    one, end = draw.lstm(4, 5, peepholes=True), draw.dense(5, 3)
    layers = [dl4j.layer("GravesLSTM", **fields(4, 5), gateActivationFn="sigmoid"), out(5)]
    return layers, [one, end], lambda x: dl4j.dense(dl4j.lstm(x, one), end, "softmax")


def _simple(draw: Draw) -> Case:
    one, end = draw.rnn(4, 5), draw.dense(5, 3)
    layers = [dl4j.layer("recurrent.SimpleRnn", **fields(4, 5, "relu"), hasLayerNorm=False), out(5)]
    return layers, [one, end], lambda x: dl4j.dense(dl4j.simple_rnn(x, one, "relu"), end, "softmax")


def _graves_bidirectional(draw: Draw) -> Case:
    params, end = {**draw.lstm(4, 5, True, "F"), **draw.lstm(4, 5, True, "B")}, draw.dense(5, 3)

    def answer(x: Array) -> Array:
        ahead = dl4j.lstm(x, params, names=("WF", "RWF", "bF"))
        back = dl4j.lstm(x[:, ::-1], params, names=("WB", "RWB", "bB"))[:, ::-1]
        return dl4j.dense(ahead + back, end, "softmax")

    return [dl4j.layer("GravesBidirectionalLSTM", **fields(4, 5)), out(5)], [params, end], answer


def _bidirectional(mode: str) -> Callable[[Draw], Case]:
    def case(draw: Draw) -> Case:
        one, two, end = draw.lstm(4, 2), draw.lstm(4, 2), draw.dense(4 if mode == "CONCAT" else 2, 3)
        cell = dl4j.layer("LSTM", **fields(4, 2))
        both = dl4j.layer("recurrent.Bidirectional", fwd=cell, bwd=cell, mode=mode)
        params = {**{f"f{k}": v for k, v in one.items()}, **{f"b{k}": v for k, v in two.items()}}

        def answer(x: Array) -> Array:
            back = dl4j.lstm(x[:, ::-1], two)[:, ::-1]
            return dl4j.dense(dl4j.merged(dl4j.lstm(x, one), back, mode), end, "softmax")

        return [both, out(len(end["W"]))], [params, end], answer

    return case


def _last_of_both(draw: Draw) -> Case:
    """Bidirectional around LastTimeStep: each direction's own last output."""
    one, two, end = draw.rnn(4, 2), draw.rnn(4, 2), draw.dense(4, 3)
    cell = dl4j.layer("recurrent.SimpleRnn", **fields(4, 2))
    last = dl4j.layer("recurrent.LastTimeStep", underlying=cell)
    params = {**{f"f{k}": v for k, v in one.items()}, **{f"b{k}": v for k, v in two.items()}}

    def answer(x: Array) -> Array:
        ends = [dl4j.simple_rnn(x, one)[:, -1:], dl4j.simple_rnn(x[:, ::-1], two)[:, -1:]]
        return dl4j.dense(np.concatenate(ends, axis=-1), end, "softmax")

    both = dl4j.layer("recurrent.Bidirectional", fwd=last, bwd=last, mode="CONCAT")
    return [both, out(4, "OutputLayer")], [params, end], answer


def _last_time_step(draw: Draw) -> Case:
    """LastTimeStep, a dense layer without bias, dropout, an activation alone, an output layer of one step."""
    one, mid, end = draw.lstm(4, 5), draw(W=(5, 4)), draw.dense(4, 3)
    layers = [
        dl4j.layer("recurrent.LastTimeStep", underlying=dl4j.layer("LSTM", **fields(4, 5))),
        dl4j.layer("DenseLayer", **fields(5, 4, "relu"), hasBias=False),
        dl4j.layer("DropoutLayer", idropout={"@class": "org.x.Dropout", "p": 0.5}),
        dl4j.layer("ActivationLayer", activationFn="cube"),
        out(4, "OutputLayer"),
    ]
    return (
        layers,
        [one, mid, end],
        lambda x: dl4j.dense(dl4j.dense(dl4j.lstm(x, one)[:, -1:], mid, "relu") ** 3, end, "softmax"),
    )


def _pooled(draw: Draw) -> Case:
    one, end = draw.lstm(4, 5), draw.dense(5, 3)
    pool = dl4j.layer("GlobalPoolingLayer", poolingType="PNORM", pnorm=3, poolingDimensions=None)

    def answer(x: Array) -> Array:
        h = (np.abs(dl4j.lstm(x, one)) ** 3).sum(axis=1, keepdims=True) ** (1 / 3)
        return dl4j.dense(h, end, "softmax")

    return [dl4j.layer("LSTM", **fields(4, 5)), pool, out(5, "OutputLayer")], [one, end], answer


def _loss_alone(draw: Draw) -> Case:
    """RnnLossLayer has no weights; a frozen layer is the layer in it, a layer per time step too."""
    one, mid = draw.rnn(4, 5), draw.dense(5, 3)
    layers = [
        dl4j.layer("misc.FrozenLayer", layer=dl4j.layer("recurrent.SimpleRnn", **fields(4, 5))),
        dl4j.layer("recurrent.TimeDistributed", underlying=dl4j.layer("DenseLayer", **fields(5, 3, "identity"))),
        dl4j.layer("RnnLossLayer", activationFn="softmax", lossFn={"@class": "org.x.LossMCXENT"}),
    ]
    return layers, [one, mid], lambda x: dl4j.dense(dl4j.simple_rnn(x, one), mid, "softmax")


CASES = {
    "lstm": _lstm,
    "graves": _graves,
    "simple_rnn": _simple,
    "graves_bidirectional": _graves_bidirectional,
    **{f"bidirectional_{mode.lower()}": _bidirectional(mode) for mode in ("CONCAT", "ADD", "MUL", "AVERAGE")},
    "last_of_both": _last_of_both,
    "last_time_step": _last_time_step,
    "pooled": _pooled,
    "loss_alone": _loss_alone,
}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_computes_what_dl4j_does(case: str, tmp_path: Path) -> None:
    """A zip of random parameters, taken in; the graph's answers, whole and stepped, are those of DL4J's formulas."""
    layers, params, formula = CASES[case](Draw())
    file = dl4j.save(tmp_path / "net.zip", dl4j.chain(layers), params)
    directory, manifest = take_in(read_dl4j(file), tmp_path / "models", "net")
    x = np.random.default_rng(4).normal(size=(3, 6, 4))
    want = formula(x)
    for block in (6, 1) if manifest.streaming else (6,):
        got = answers(directory, x, block)
        np.testing.assert_allclose(got[:, -want.shape[1] :], want, atol=1e-5, err_msg=f"{block} steps a call")
    assert manifest.streaming == ("bidirectional" not in case and case != "last_of_both")
    assert manifest.classes == ("y0", "y1", "y2")


def test_both_dialects_all_array_modes_and_graphs_say_the_same(tmp_path: Path) -> None:
    """GravesLSTM and RnnOutput as 0.5, 0.8, 1.0.0-beta and as a ComputationGraph: equal networks."""
    draw = Draw()
    params = [draw.lstm(4, 5, peepholes=True), draw.dense(5, 3)]
    new = [dl4j.layer("GravesLSTM", **fields(4, 5, "softsign")), out(5)]
    old = [
        dl4j.layer("GravesLSTM", True, **fields(4, 5, "softsign"), gateActivationFn="sigmoid"),
        dl4j.layer("RnnOutputLayer", True, **fields(5, 3, "softmax"), lossFn={"MCXENT": {}}),
    ]
    oldest = [
        {"gravesLSTM": {"nin": 4, "nout": 5, "activationFunction": "softsign"}},
        {"rnnoutput": {"nin": 5, "nout": 3, "activationFunction": "softmax", "lossFunction": "MCXENT"}},
    ]
    row = dl4j.flat(params)
    files = {
        "new": dl4j.save(tmp_path / "new.zip", dl4j.chain(new), params),
        "old": dl4j.save(tmp_path / "old.zip", dl4j.chain(old), coefficients=dl4j.array(row, "JAVACPP")),
        "oldest": dl4j.save(tmp_path / "o.zip", dl4j.chain(oldest), coefficients=dl4j.array(row, "LONG_SHAPE")),
        "graph": dl4j.save(tmp_path / "g.zip", dl4j.graph(new), coefficients=dl4j.array(row, kind="DOUBLE")),
        "old graph": dl4j.save(tmp_path / "h.zip", dl4j.graph(old, True), params),
    }
    first = read_dl4j(files["new"])
    assert first.specs[0]["activation"] == "softsign"
    assert first.specs[1]["loss"] == "mcxent"
    for name, file in files.items():
        other = read_dl4j(file)
        plain = [{k: v for k, v in spec.items() if k != "name"} for spec in other.specs]
        assert plain == first.specs, name
        for mine, theirs in zip(first.weights, other.weights, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in mine | theirs), name
    assert [spec["name"] for spec in read_dl4j(files["graph"]).specs] == ["v0", "v1"]


def branches(draw: Draw) -> tuple[dict[str, Any], dict[str, Params]]:
    """Two recurrent branches that merge, a skip connection around them, half of it scaled; parameters by vertex."""
    params = {
        "left": draw.lstm(4, 3),
        "right": draw.rnn(4, 5),
        "skip": draw.dense(4, 8),
        "end": draw.dense(4, 3),
    }
    layers = {
        "right": dl4j.layer("recurrent.SimpleRnn", **fields(4, 5)),
        "left": dl4j.layer("LSTM", **fields(4, 3)),
        "skip": dl4j.layer("DenseLayer", **fields(4, 8, "identity")),
        "end": out(4),
    }
    graph = "org.deeplearning4j.nn.conf.graph."
    vertices = {n: {"@class": f"{graph}LayerVertex", "layerConf": {"layer": one}} for n, one in layers.items()}
    vertices |= {
        "both": {"@class": f"{graph}MergeVertex"},
        "sum": {"@class": f"{graph}ElementWiseVertex", "op": "Add"},
        "half": {"@class": f"{graph}ScaleVertex", "scaleFactor": 0.5},
        "some": {"@class": f"{graph}SubsetVertex", "from": 2, "to": 5},
    }
    wires = {"left": ["in"], "right": ["in"], "skip": ["in"], "both": ["left", "right"], "sum": ["both", "skip"]}
    wires |= {"half": ["sum"], "some": ["half"], "end": ["some"]}
    ends = {"networkInputs": ["in"], "networkOutputs": ["end"]}
    return {**ends, "vertices": vertices, "vertexInputs": wires}, params


KAHN = ["in", "right", "left", "skip", "both", "sum", "half", "some", "end"]


@pytest.mark.parametrize("stored", [None, ["in", "skip", "left", "right", "both", "sum", "half", "some", "end"]])
def test_a_graph_that_branches_and_merges_computes_what_dl4j_does(stored: list[str] | None, tmp_path: Path) -> None:
    """Parameters lie in the stored order of the vertices, or in the order of the configuration: right before left."""
    configuration, params = branches(Draw())
    order = ["right", "left", "skip", "end"]
    if stored:
        configuration["topologicalOrderStr"] = stored
        order = [vertex for vertex in stored if vertex in params]
    file = dl4j.save(tmp_path / "net.zip", configuration, [params[vertex] for vertex in order])
    directory, manifest = take_in(read_dl4j(file), tmp_path / "models", "net")
    assert {s.layer for s in manifest.states} == {"left", "right"}
    assert [spec["name"] for spec in manifest.provenance.config["network"]] == (stored or KAHN)[1:]
    x = np.random.default_rng(4).normal(size=(3, 6, 4))
    both = np.concatenate([dl4j.lstm(x, params["left"]), dl4j.simple_rnn(x, params["right"])], axis=-1)
    summed = (both + dl4j.dense(x, params["skip"], "identity")) / 2
    want = dl4j.dense(summed[..., 2:6], params["end"], "softmax")
    for block in (6, 1):
        np.testing.assert_allclose(answers(directory, x, block), want, atol=1e-5)


def test_an_array_is_read_by_its_strides_whatever_its_flag_says() -> None:
    """DL4J's recorded outputs are views in Fortran order that say 'c'."""
    value = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for mode in ("JAVACPP", "LONG_SHAPE", "MIXED_DATA_TYPES"):
        for order in ("C", "F"):
            for kind in dl4j.TYPES:
                stream = Stream(dl4j.array(value, mode, kind, order), "x")
                assert (read_array(stream) == value).all()
                stream.end()


def test_a_graph_that_ends_in_a_merge_answers_with_all_of_it(tmp_path: Path) -> None:
    """No output layer, and no layer that says how many numbers there are."""
    configuration, params = branches(Draw())
    configuration["networkOutputs"] = ["both"]
    for vertex in ("skip", "sum", "half", "some", "end"):
        del configuration["vertices"][vertex], configuration["vertexInputs"][vertex]
    file = dl4j.save(tmp_path / "net.zip", configuration, [params["right"], params["left"]])
    directory, manifest = take_in(read_dl4j(file), tmp_path / "models", "net")
    assert manifest.n_outputs == 8
    x = np.random.default_rng(4).normal(size=(3, 6, 4))
    want = np.concatenate([dl4j.lstm(x, params["left"]), dl4j.simple_rnn(x, params["right"])], axis=-1)
    np.testing.assert_allclose(answers(directory, x, 1), want, atol=1e-5)


# --- Normalisers, names, embeddings ------------------------------------------------------------------------------


def normaliser(kind: str, *numbers: bytes) -> bytes:
    """normalizer.bin of a type and what it writes."""
    return dl4j.utf("NORMALIZER") + struct.pack(">i", 1) + dl4j.utf(kind) + b"".join(numbers)


def row(*values: float) -> bytes:
    """An INDArray [1, N]."""
    return dl4j.array(np.array([values], np.float32))


def regression(draw: Draw) -> tuple[list[dict[str, Any]], list[Params]]:
    """SimpleRnn of two inputs, one output."""
    end = dl4j.layer("RnnOutputLayer", **fields(3, 1, "identity"), lossFn={"@class": "org.x.LossMSE"})
    return [dl4j.layer("recurrent.SimpleRnn", **fields(2, 3)), end], [draw.rnn(2, 3), draw.dense(3, 1)]


@pytest.mark.parametrize("kind", ["STANDARDIZE", "MIN_MAX"])
def test_a_stored_normaliser_becomes_part_of_the_graph(kind: str, tmp_path: Path) -> None:
    """Raw values in, labels' units out; a constant column is only shifted."""
    layers, params = regression(Draw())
    mean, scale = np.array([10.0, -2.0]), np.array([4.0, 1.0])
    if kind == "STANDARDIZE":
        parts = [struct.pack(">?", True), row(10, -2), row(4, 0), row(100), row(20)]
        content, label = normaliser(kind, *parts), (100.0, 20.0)
    else:  # to [-1, 1]: 6..14 and the constant -2; labels 80..120
        parts = [struct.pack(">?dd", True, -1.0, 1.0), row(6, -2), row(14, -2), row(80), row(120)]
        content, label = normaliser(kind, *parts), (100.0, 20.0)
        mean, scale = np.array([10.0, -1.5]), np.array([4.0, 0.5])
    file = dl4j.save(tmp_path / "net.zip", dl4j.chain(layers), params, normalizer=content)
    directory, manifest = take_in(read_dl4j(file, outputs=["pressure"]), tmp_path / "models", "net")
    assert [(f.mean, f.scale) for f in manifest.features] == list(zip(mean, scale, strict=True))
    assert [(o.name, o.mean, o.scale) for o in manifest.outputs] == [("pressure", *label)]
    x = np.random.default_rng(4).normal(size=(3, 6, 2)) * scale + mean
    hidden = dl4j.simple_rnn((x - mean) / scale, params[0])
    want = dl4j.dense(hidden, params[1], "identity") * label[1] + label[0]
    np.testing.assert_allclose(answers(directory, x, 1), want, rtol=1e-5)


def test_names_widths_and_classes_are_given_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command finds the kind by content; wrong counts are one line, and leave nothing behind."""
    layers, params = regression(Draw())
    file = str(dl4j.save(tmp_path / "net.zip", dl4j.chain(layers), params))
    models = tmp_path / "models"
    line = ["import", file, "--models", str(models)]
    assert main([*line, "--features", "a,b,c"]) == 1
    assert "the network has 2 inputs, --features are 3 wide" in capsys.readouterr().err
    assert main([*line, "--outputs", "a,b"]) == 1
    assert "the network has 1 outputs, 2 names were given" in capsys.readouterr().err
    assert not models.exists()
    assert main([*line, "--features", "wind:2", "--outputs", "p"]) == 0
    manifest = read_manifest(models / "net" / "1")
    assert manifest.features == (Feature(name="wind", width=2),)
    assert main([*line, "--version", "1"]) == 1
    assert "exists. Take another --version." in capsys.readouterr().err
    assert main([*line, "--recorded-input", file]) == 1
    assert "belong together" in capsys.readouterr().err


def test_an_embedding_reads_tokens_and_a_network_without_an_output_layer_answers_with_its_last(tmp_path: Path) -> None:
    """EmbeddingSequence with its bias, then a LSTM, which is the answer."""
    draw = Draw()
    table, lstm = draw.dense(7, 4), draw.lstm(4, 3)
    layers = [
        dl4j.layer("EmbeddingSequenceLayer", **fields(7, 4, "identity"), hasBias=True),
        dl4j.layer("LSTM", **fields(4, 3), layerName="the lstm"),
    ]
    file = dl4j.save(tmp_path / "net.zip", dl4j.chain(layers), [table, lstm])
    directory, manifest = take_in(read_dl4j(file), tmp_path / "models", "net")
    assert [s.layer for s in manifest.states] == ["the_lstm"] * 2
    tokens = np.array([[[0], [6], [3], [3]]])
    want = dl4j.lstm(table["W"][tokens[..., 0]] + table["b"], lstm)
    np.testing.assert_allclose(answers(directory, tokens, 1), want, atol=1e-6)


# --- Zips that are no good ---------------------------------------------------------------------------------------


def good() -> tuple[dict[str, Any], list[Params]]:
    """A configuration and its parameters."""
    layers, params = regression(Draw())
    return dl4j.chain(layers), params


def altered(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], Path]:
    """A zip whose configuration was changed."""

    def write(file: Path) -> Path:
        configuration, params = good()
        change(configuration)
        return dl4j.save(file, configuration, params)

    return write


def with_entries(**entries: bytes) -> Callable[[Path], Path]:
    """A good zip with other entries in place of its own."""
    return lambda file: dl4j.save(file, *good(), **entries)


def raw(**members: bytes) -> Callable[[Path], Path]:
    """A zip of just these members; `__` stands for a dot, `___` for a slash."""

    def write(file: Path) -> Path:
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name.replace("___", "/").replace("__", "."), content)
        return file

    return write


def patched(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """A good zip whose bytes were changed."""

    def write(file: Path) -> Path:
        file.write_bytes(change(dl4j.save(file, *good()).read_bytes()))
        return file

    return write


def traversing(file: Path) -> Path:
    with zipfile.ZipFile(dl4j.save(file, *good()), "a") as archive:
        archive.writestr("../../evil.sh", "x")
    return file


def twice(file: Path) -> Path:
    with zipfile.ZipFile(dl4j.save(file, *good()), "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("configuration.json", "{}")
    return file


def bomb(file: Path) -> Path:
    """Twenty megabytes of zeros in a few kilobytes, where 22 parameters belong."""
    return dl4j.save(file, *good(), coefficients=bytes(20_000_000))


def misfit(file: Path) -> Path:
    """An output layer of four inputs on three units."""
    draw = Draw()
    layers = [dl4j.layer("recurrent.SimpleRnn", **fields(2, 3)), dl4j.layer("RnnOutputLayer", **fields(4, 1))]
    return dl4j.save(file, dl4j.chain(layers), [draw.rnn(2, 3), draw.dense(4, 1)])


def huge_layers(configuration: dict[str, Any]) -> None:
    configuration["confs"][0]["layer"].update(nin=2**30, nout=2**30)


def layer_of(configuration: dict[str, Any], **fields: Any) -> None:
    configuration["confs"][0]["layer"].update(fields)


def header(*numbers: int, mode: str = "LONG_SHAPE", count: int | None = None, data: bytes = b"") -> bytes:
    """An INDArray with any shape information."""
    shape = np.array(numbers, ">i8")
    begin = dl4j.utf(mode) + struct.pack(">q", len(shape) if count is None else count) + dl4j.utf("LONG")
    return begin + shape.tobytes() + dl4j.utf(mode) + struct.pack(">q", len(data) // 4) + dl4j.utf("FLOAT") + data


def as_graph(configuration: dict[str, Any]) -> dict[str, Any]:
    layers = [held["layer"] for held in configuration.pop("confs")]
    configuration.update(dl4j.graph(layers))
    return configuration


def branching(configuration: dict[str, Any]) -> None:
    as_graph(configuration)["networkOutputs"] = ["v0"]


def ringed(configuration: dict[str, Any]) -> None:
    as_graph(configuration)["vertexInputs"]["v0"] = ["v1"]


def lost(configuration: dict[str, Any]) -> None:
    as_graph(configuration)["vertexInputs"]["v1"] = ["nowhere"]


def misordered(configuration: dict[str, Any]) -> None:
    as_graph(configuration)["topologicalOrderStr"] = ["in", "v1", "v0"]


def strange(configuration: dict[str, Any]) -> None:
    as_graph(configuration)["vertices"]["v1"] = {"@class": "org.x.L2NormalizeVertex"}


ROW26 = np.zeros((1, 26), np.float32)
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (patched(lambda b: b[: len(b) // 2]), "is no zip, or a damaged one"),
    "a flipped byte": (patched(lambda b: b[:60] + bytes([b[60] ^ 255]) + b[61:]), "damaged|is no JSON"),
    "a path out of the archive": (traversing, r"entry '\.\./\.\./evil\.sh' leads out of the archive"),
    "an entry twice": (twice, "'configuration.json' is there twice"),
    "a bomb": (bomb, "coefficients.bin: declares 20000000 bytes, the layers have 22 parameters"),
    "huge layers": (altered(huge_layers), "has 22 parameters, the layers have"),
    "no JSON": (raw(configuration__json=b"{"), "is no JSON"),
    "JSON too deep": (raw(configuration__json=b"[" * 200_000), "is no JSON"),
    "a list": (raw(configuration__json=b"[]"), "is no object"),
    "no network": (raw(configuration__json=b"{}"), "neither 'confs'"),
    "no layer": (raw(configuration__json=b'{"confs": []}'), "has no layer"),
    "layers that are numbers": (raw(configuration__json=b'{"confs": [1]}'), r"confs\[0\]: is no object"),
    "an unknown layer": (altered(lambda c: layer_of(c, **{"@class": "org.x.Yolo2OutputLayer"})), "'Yolo2OutputLayer'"),
    "an unknown activation": (
        altered(lambda c: layer_of(c, activationFn={"@class": "org.x.ActivationRReLU"})),
        "'ActivationRReLU', an activation that Stepcast does not have",
    ),
    "another slope": (
        altered(lambda c: layer_of(c, activationFn={"@class": "org.x.ActivationLReLU", "alpha": 0.3})),
        r"alpha: is 0\.3, Stepcast's leakyrelu has 0\.01",
    ),
    "units that are text": (altered(lambda c: layer_of(c, nout="many")), "nout: is 'many', wanted a number of units"),
    "no units": (altered(lambda c: layer_of(c, nout=0)), "nout: is 0, wanted a number of units"),
    "layers that do not fit": (
        misfit,
        r"zip: layer 1 of those with weights: has linear\.bias \[1\]",
    ),
    "an output from the middle": (altered(branching), "vertex 'v1' does not lead to the output 'v0'"),
    "a ring": (altered(ringed), "vertices wait for each other: v0, v1"),
    "a vertex that is not there": (altered(lost), "vertex 'v1' reads 'nowhere', which is not there"),
    "an order of other vertices": (altered(misordered), "topologicalOrderStr is no order of its vertices"),
    "an unknown vertex": (altered(strange), "'L2NormalizeVertex', which Stepcast does not import"),
    "too few parameters": (with_entries(coefficients=dl4j.array(ROW26[:, :5])), "has 5 parameters, the layers have 22"),
    "no parameters": (lambda f: dl4j.save(f, good()[0]), "coefficients.bin: is not there"),
    "parameters cut short": (with_entries(coefficients=dl4j.array(ROW26)[:-9]), "wants 104 bytes"),
    "bytes behind them": (with_entries(coefficients=dl4j.array(ROW26[:, :22]) + b"x"), "1 bytes too many"),
    "parameters that are none": (with_entries(coefficients=b"PK whatever"), "wants|is no INDArray"),
    "numbers that are not finite": (with_entries(coefficients=dl4j.array(ROW26[:, :22] + np.inf)), "not finite"),
    "a negative count": (with_entries(coefficients=header(count=-4)), "wants -32 bytes"),
    "a huge count": (with_entries(coefficients=header(count=2**60)), "wants"),
    "strides out of the data": (
        with_entries(coefficients=header(2, 1, 22, 1, 10**6, 0, 1, 99, data=bytes(88))),
        r"shape \(1, 22\) with strides \(1, 1000000\) over 22 elements",
    ),
    "a shape beyond the data": (
        with_entries(coefficients=header(2, 2**40, 2**40, 0, 0, 0, 1, 99, data=bytes(88))),
        "over 22 elements",
    ),
    "compressed buffers": (
        with_entries(coefficients=dl4j.array(ROW26).replace(b"FLOAT", b"COMPR")),
        "elements of type 'COMPR'",
    ),
    "a Java object as normaliser": (with_entries(normalizer=b"\xac\xed\x00\x05sr"), "a serialised Java object"),
    "a Java object as preprocessor": (with_entries(preprocessor=b"\xac\xed\x00\x05sr"), "a serialised Java object"),
    "another normaliser": (with_entries(normalizer=normaliser("IMAGE_VGG16")), "is of type 'IMAGE_VGG16'"),
    "a normaliser of other columns": (
        with_entries(normalizer=normaliser("STANDARDIZE", struct.pack(">?", False), row(1, 2, 3), row(1, 1, 1))),
        "has 3 columns, the network has 2 inputs",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_zip_that_is_no_good_ends_in_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its kind's name, so that content decides nothing: status 1, one line that says what is wrong, nothing made."""
    write, says = HOSTILE[what]
    file, models = write(tmp_path / "bad.zip"), tmp_path / "models"
    assert main(["import", "dl4j", str(file), "--name", "bad", "--models", str(models)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("stepcast: ManifestError: ")
    assert re.search(says, said)
    assert not models.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.zip"]


def test_other_files_are_no_zips_of_dl4j(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory, an absent file, text, and a zip of something else."""
    (tmp_path / "text").write_text("PK")
    for name, says in (("", "is a directory"), ("none", "no such file"), ("text", "is no zip")):
        assert main(["import", "dl4j", str(tmp_path / name), "--name", "n", "--models", str(tmp_path / "m")]) == 1
        assert says in capsys.readouterr().err
    other = raw(something__txt=b"x")(tmp_path / "other.zip")
    assert main(["import", "dl4j", str(other), "--models", str(tmp_path / "m")]) == 1
    assert "has no configuration.json" in capsys.readouterr().err
