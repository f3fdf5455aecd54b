"""What is exported is what was trained, or nothing is exported."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from networks import CELLS, OUT, Spoiled, echo_source, network, rich
from serving import MODELS

from stepcast.errors import ManifestError
from stepcast.manifest import MANIFEST_FILE, MODEL_FILE, Manifest, read_manifest, sha256_of
from training.activations import ActivationName
from training.config import Config
from training.data.in_memory import Examples, InMemory
from training.distributions import Kind
from training.evaluate import answers, evaluate
from training.export import describe, next_version, publish, stage, state_tensors
from training.golden import ROWS, STEPS, make_golden
from training.graph import Graph
from training.layers.recurrent import Recurrent
from training.layers.specs import LayerSpec
from training.network import Network
from training.stepper import Stepper

LAYERS: list[dict[str, Any]] = [{"kind": "lstm", "units": 3}, {"kind": "gru", "units": 2}, OUT]


def source(features: Any = None) -> InMemory:
    """Four sequences of random readings, one of them short, with a missing reading."""
    random = np.random.default_rng(0)
    x = [random.normal(size=(steps, 4)).astype(np.float32) for steps in (30, 30, 9, 30)]
    x[0][3, 0] = np.nan
    y = [random.normal(size=(len(v), 3)).astype(np.float32) for v in x]
    made = echo_source()
    return InMemory(
        splits={"test": Examples(x, y)},
        features=tuple(rich() if features is None else features),
        outputs=tuple(made.outputs[0].model_copy(update={"name": f"y{i}"}) for i in range(3)),
        task="regression",
        batch=3,
        seed=0,
        alignment="start",
    )


def config() -> Config:
    data = {"kind": "python", "class": "nowhere:Nothing"}
    return Config.model_validate({"name": "small", "seed": 5, "data": data, "network": LAYERS})


def exported(net: Network, models: Path, version: int = 1) -> Path:
    staged = stage(net, source(), models)
    manifest = describe(
        net, source(), config(), sha256=sha256_of(staged / MODEL_FILE), version=version, metrics={"rmse": 1.5}
    )
    return publish(staged, manifest, models)


def test_export_writes_three_files_that_prove_each_other(tmp_path: Path) -> None:
    """The manifest is readable, names the graph's tensors, and says where the model comes from."""
    net = network(LAYERS, rich())
    directory = exported(net, tmp_path)
    assert directory == tmp_path / "small" / "1"
    assert {p.name for p in directory.iterdir()} == {"model.onnx", "manifest.json", "golden.npz"}
    manifest = read_manifest(directory)
    assert [(s.layer, s.key, s.shape) for s in manifest.states] == [
        ("observed", "last", (2,)),
        ("lstm_0", "h", (3,)),
        ("lstm_0", "c", (3,)),
        ("gru_0", "h", (2,)),
    ]
    graph = onnx.load(directory / "model.onnx").graph
    assert [i.name for i in graph.input] == ["x", "lengths", *(s.input for s in manifest.states)]
    assert {o.name for o in graph.output} == {"y", *(s.output for s in manifest.states)}
    assert [d.dim_param for d in graph.input[0].type.tensor_type.shape.dim][:2] == ["B", "T"]
    assert manifest.streaming
    assert manifest.provenance.seed == 5
    assert manifest.provenance.metrics == {"rmse": 1.5}
    assert Config.model_validate(manifest.provenance.config) == config()
    assert {"torch", "onnx", "onnxruntime"} <= manifest.provenance.libraries.keys()


def test_golden_rows_differ_in_length_start_and_gaps() -> None:
    """Six rows: full, short, empty; from carried states and from zero; readings missing only where allowed."""
    net = network(LAYERS, rich())
    golden = make_golden(net, source())
    assert golden["x"].shape == (ROWS, STEPS, 4)
    assert golden["lengths"].tolist() == [12, 11, 0, 12, 6, 1]
    assert np.isnan(golden["x"]).any()
    assert np.isfinite(golden["y"]).all()
    before, after = golden["state_in.lstm_0.h"], golden["state_out.lstm_0.h"]
    assert before[:3].any(axis=1).all()
    assert not before[3:].any()
    assert np.array_equal(before[2], after[2])
    assert not np.array_equal(before[0], after[0])


class Forgetful(Network):
    """Writes a graph that is not what it computes."""

    def write(self, graph: Graph) -> None:
        layer = self.layers[0]
        assert isinstance(layer, Recurrent)
        with torch.no_grad():
            layer.kernel.bias_ih_l0 += 0.01
        super().write(graph)
        with torch.no_grad():
            layer.kernel.bias_ih_l0 -= 0.01


def test_export_refuses_a_graph_that_disagrees(tmp_path: Path) -> None:
    """And leaves nothing behind."""
    net = network(LAYERS, rich())
    net.__class__ = Forgetful
    with pytest.raises(ManifestError, match=r"onnxruntime and torch differ by up to .* Nothing was exported"):
        stage(net, source(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_publish_replaces_a_version_whole_and_counts_on(tmp_path: Path) -> None:
    """The next version is one more than the highest; an old one may be replaced."""
    assert next_version(tmp_path, "small") == 1
    exported(network(LAYERS, rich(), seed=1), tmp_path)
    first = (tmp_path / "small" / "1" / "model.onnx").read_bytes()
    (tmp_path / "small" / "notes").mkdir()
    assert next_version(tmp_path, "small") == 2
    exported(network(LAYERS, rich(), seed=2), tmp_path, version=1)
    assert (tmp_path / "small" / "1" / "model.onnx").read_bytes() != first
    read_manifest(tmp_path / "small" / "1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_bidirectional_is_exported_without_state_and_does_not_stream(tmp_path: Path) -> None:
    """Even over readings that are held, and beside layers that could be stepped alone."""
    cell = {"kind": "bidirectional", "layer": {"kind": "lstm", "units": 3}}
    net = network([{"kind": "gru", "units": 3}, cell, OUT], rich())
    manifest = read_manifest(exported(net, tmp_path))
    assert not manifest.streaming
    assert manifest.states == ()
    assert manifest.feedback == ()


@pytest.mark.parametrize("pooling", [None, "max"])
def test_evaluation_steps_one_by_one_and_equals_the_full_pass(pooling: str | None, tmp_path: Path) -> None:
    """onnxruntime, a step at a time, against torch on whole batches with masks: within 1e-4."""
    layers = [LAYERS[0], *([{"kind": "global_pooling", "pooling": pooling}] if pooling else []), OUT]
    net = network(layers, rich())
    staged = stage(net, source(), tmp_path)
    stepper = Stepper(staged, state_tensors(net))
    for batch, y in answers(stepper, source(), "test", summary=net.summary):
        with torch.no_grad():
            expected, _ = net(batch.x, batch.x_mask)
        np.testing.assert_allclose(y, expected.numpy(), rtol=1e-4, atol=1e-5)
    rows = 4 if pooling else 30 + 30 + 9 + 30
    result = evaluate(stepper, source(), "test", summary=net.summary).as_dict()
    assert result["average"]["rows"] == rows


@pytest.mark.parametrize("streaming", [True, False])
def test_evaluation_does_not_see_what_stands_under_masks(streaming: bool, tmp_path: Path) -> None:
    """The same metrics of the exported model, to the last bit, whatever the padding holds."""
    both = {"kind": "bidirectional", "layer": LAYERS[0]}
    net = network(LAYERS if streaming else [both, OUT], rich())
    stepper = Stepper(stage(net, source(), tmp_path), state_tensors(net))
    clean, other = (evaluate(stepper, one, "test", streaming=streaming) for one in (source(), Spoiled(source(), 1e3)))
    assert clean == other


def test_manifest_json_is_indented_and_ends_with_a_newline(tmp_path: Path) -> None:
    """It is committed beside the model and read by people."""
    text = (exported(network(LAYERS, rich()), tmp_path) / MANIFEST_FILE).read_text()
    assert text.startswith('{\n  "schema_version": 1')
    assert text.endswith("}\n")
    assert Manifest.model_validate_json(text)


def specs_of_the_test_models() -> Iterator[Any]:
    """Every layer of tests/models, those around which others stand included."""
    for path in sorted(MODELS.glob(f"*/1/{MANIFEST_FILE}")):
        if written := read_manifest(path.parent).provenance.config:  # a foreign graph has none
            for spec in Config.model_validate(written).network:
                yield spec
                if hasattr(spec, "layer"):
                    yield spec.layer


def test_the_test_models_have_everything_that_makes_another_graph() -> None:
    """Each layer kind, activation, mode and pooling, and each cell with layer norm: the laws hold for them all."""
    there = [
        (spec.kind, field, getattr(spec, field))
        for spec in specs_of_the_test_models()
        for field in type(spec).model_fields
    ]
    wanted = {
        (kind, field, value)
        for spec in get_args(get_args(LayerSpec)[0])
        for kind in get_args(spec.model_fields["kind"].annotation)
        for field in ("kind", "mode", "pooling")
        if field in spec.model_fields
        for value in ([kind] if field == "kind" else get_args(spec.model_fields[field].annotation))
    }
    wanted |= {("dense", "activation", name) for name in get_args(ActivationName)}
    wanted |= {(cell, "layer_norm", True) for cell in CELLS}
    wanted |= {("bidirectional", "last", True), ("rnn_output", "residual", True)}
    there += [(kind, "distribution", said.kind) for kind, field, said in there if field == "distribution" and said]
    wanted |= {("rnn_output", "distribution", kind) for kind in get_args(Kind)}
    assert [each for each in sorted(wanted, key=str) if each not in there] == []
