"""Training configurations: what is refused, and the path it is refused with."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Feedback, Output
from training.activations import ACTIVATIONS
from training.config import Config, TrainingConfig, load
from training.data.in_memory import Examples, InMemory
from training.layers.spec import Shape
from training.layers.specs import LayerSpec, LossName
from training.layers.stack import TokenReader, place
from training.network import Network

RECIPES = sorted((Path(__file__).parents[1] / "training" / "recipes").glob("*.yaml"))
LSTM = {"kind": "lstm", "units": 4}
OUT = {"kind": "rnn_output"}
LAST, AGAIN = {"kind": "last_time_step"}, {"kind": "duplicate_to_time_series"}


def configuration(**parts: Any) -> dict[str, Any]:
    data = {"kind": "python", "class": "nowhere:Nothing"}
    return {"name": "test", "data": data, "network": [LSTM, OUT], **parts}


def written(directory: Path, tree: Any) -> Path:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_a_legal_configuration(recipe: Path) -> None:
    """Named after its file's subject, with a description."""
    config = load(recipe)
    assert config.description
    assert config.seed is not None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"network": [LSTM]}, "network[0]: the last layer must be rnn_output or rnn_loss"),
        ({"network": [OUT, LSTM, OUT]}, "network[0].outputs: one of 2 output layers has to say which of the data's"),
        ({"network": [LSTM, {"kind": "lstm", "unit": 3}, OUT]}, "network[1].units: Field required"),
        ({"network": [{"kind": "lstn", "units": 3}, OUT]}, "network[0]: Input tag 'lstn'"),
        ({"network": [{**LSTM, "name": "a"}, {**LSTM, "name": "a"}, OUT]}, "network[1]: layer name 'a' is taken"),
        ({"network": [{"kind": "last_time_step"}, LSTM, OUT]}, "network[1]: a recurrent layer behind the many-to-one"),
        ({"network": [{"kind": "conv2d", "units": 2, "kernel": [3, 3]}, OUT]}, "network[0]: conv2d wants frames. Put"),
        (
            {
                "network": [
                    {"kind": "rnn_to_cnn", "height": 4, "width": 4},
                    {"kind": "conv2d", "units": 2, "kernel": [5, 3]},
                    OUT,
                ]
            },
            "network[1]: a kernel of (5, 3) is larger than frames of (4, 4)",
        ),
        (
            {"network": [{"kind": "bidirectional", "layer": {"kind": "dense", "units": 3}}, OUT]},
            "network[0].layer: Input tag 'dense'",
        ),
        ({"network": [LSTM, {**OUT, "loss": "mcxent", "activation": "sigmoid"}]}, "network[1]: loss mcxent wants"),
        ({"network": [LSTM, {**OUT, "loss": "xent", "activation": "softmax"}]}, "network[1]: loss xent wants"),
        (
            {"network": [LSTM, {"kind": "global_pooling"}, OUT], "training": {"backprop": "truncated"}},
            "network[1]: global_pooling cannot be trained truncated",
        ),
        (
            {"network": [{"kind": "bidirectional", "layer": LSTM}, OUT], "training": {"backprop": "truncated"}},
            "network[0]: bidirectional cannot be trained truncated",
        ),
        (
            {"network": [LSTM, {"kind": "global_pooling"}, OUT], "training": {"masked_steps": "zero"}},
            "network[1]: global_pooling has no meaning",
        ),
        (
            {"network": [LSTM, {"kind": "duplicate_to_time_series"}, LSTM, OUT]},
            "network[1]: duplicate_to_time_series copies the answer of a many-to-one readout, and there is none below",
        ),
        (
            {"network": [LSTM, LAST, AGAIN, AGAIN, OUT]},
            "network[3]: duplicate_to_time_series copies the answer of a many-to-one readout, and there is none below",
        ),
        (
            {"network": [{"kind": "attention", "units": 4, "window": 3, "heads": 3}, OUT]},
            "network[0]: 4 units cannot be shared by 3 heads",
        ),
        (
            {"network": [LSTM, LAST, {"kind": "attention", "units": 4, "window": 3}, OUT]},
            "network[2]: attention behind the many-to-one readout has no steps left to look back on",
        ),
        ({"network": [LSTM, LAST, {"kind": "reverse"}, OUT]}, "network[2]: reverse behind the many-to-one readout"),
        (
            {"network": [{"kind": "reverse"}, LSTM, OUT], "training": {"backprop": "truncated"}},
            "network[0]: reverse cannot be trained truncated",
        ),
        (
            {"network": [{"kind": "reverse"}, LSTM, OUT], "training": {"masked_steps": "zero"}},
            "network[0]: reverse has no meaning under masked_steps 'zero'",
        ),
        (
            {"network": [LSTM, LAST, AGAIN, LSTM, OUT], "training": {"masked_steps": "zero"}},
            "network[2]: duplicate_to_time_series has no meaning under masked_steps 'zero'",
        ),
        (
            {"training": {"backprop": "truncated", "tbptt_forward": 5, "tbptt_backward": 6}},
            "training: tbptt_backward 6 is more than tbptt_forward 5",
        ),
        ({"training": {"tbptt_forward": 5}}, "training: tbptt lengths are set, but backprop is 'standard'"),
        ({"training": {"epochs": 0}}, "training.epochs: Input should be greater than or equal to 1"),
        ({"training": {"lerning_rate": 0.1}}, "training.lerning_rate: unknown. Did you mean learning_rate?"),
        ({"data": {"kind": "tabel"}}, "data: Input tag 'tabel'"),
    ],
)
def test_wrong_configuration_is_refused_with_its_path(parts: dict[str, Any], message: str, tmp_path: Path) -> None:
    """DL4J's illegal stacks, and misspellings."""
    path = written(tmp_path, configuration(**parts))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def source(features: int, classes: int | None = None, outputs: int = 1) -> InMemory:
    names = None if classes is None else tuple(f"c{i}" for i in range(classes))
    return InMemory(
        splits={"train": Examples([], [])},
        features=tuple(Feature(name=f"f{i}") for i in range(features)),
        outputs=tuple(Output(name=f"y{i}") for i in range(classes or outputs)),
        task="regression" if classes is None else "classification",
        classes=names,
        batch=1,
        seed=0,
    )


@pytest.mark.parametrize(
    ("layers", "data", "message"),
    [
        (
            [{"kind": "rnn_to_cnn", "height": 3, "width": 2}, OUT],
            source(5),
            "network[0]: frames of 1 x 3 x 2 need 6 values",
        ),
        ([{"kind": "embedding", "vocabulary": 3, "units": 2}, OUT], source(2), "network[0]: embedding takes one token"),
        (
            [LSTM, {**OUT, "units": 3}],
            source(1, outputs=2),
            "network[1]: rnn_output has 3 units, the data has 2",
        ),
        (
            [LSTM, {"kind": "rnn_loss"}],
            source(1, outputs=3),
            "network[1]: rnn_loss has 4 units, the data has 3",
        ),
        ([LSTM, OUT], source(1, classes=1), "network[1]: softmax over one output is always 1"),
        ([LSTM, {**OUT, "residual": True}], source(1), "network[1]: residual: no output has the name of a feature"),
        ([LSTM, {**OUT, "loss_weights": [1, 2]}], source(1), "network[1]: loss_weights has 2 numbers"),
    ],
)
def test_stack_that_does_not_fit_the_data_is_refused(
    layers: list[dict[str, Any]], data: InMemory, message: str, tmp_path: Path
) -> None:
    """What only shows when the data is open, still before anything is trained."""
    config = load(written(tmp_path, configuration(network=layers)))
    with pytest.raises(ConfigError) as caught:
        Network.of(config.network, data)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("below", [[], [{"kind": "mask"}, {"kind": "reverse"}]], ids=["alone", "moved"])
def test_embedding_knows_every_class_that_is_fed_back(below: list[dict[str, Any]]) -> None:
    """A rollout would step with a token that has no vector; without feedback more classes than tokens are no harm."""
    layers = [*below, {"kind": "embedding", "vocabulary": 5, "units": 2}, LSTM, OUT]
    specs = Config.model_validate(configuration(network=layers)).network
    feedback = (Feedback(source="class", feature="f0"),)
    with pytest.raises(ConfigError) as caught:
        Network.of(specs, replace(source(1, classes=6), feedback=feedback))
    assert str(caught.value) == (
        f"network[{len(below)}]: embedding has a vocabulary of 5, the data feeds 6 classes back as 'f0'. "
        "Set vocabulary: 6."
    )
    for fine in (source(1, classes=6), replace(source(1, classes=5), feedback=feedback)):
        assert Network.of(specs, fine).reads_tokens == (TokenReader(len(below), 5),)


def test_only_an_embedding_of_the_data_itself_reads_tokens() -> None:
    """Behind a layer that computes something, what comes in is no token of the data."""
    embedding = {"kind": "embedding", "vocabulary": 5, "units": 2}
    specs = Config.model_validate(configuration(network=[{"kind": "dense", "units": 1}, embedding, OUT])).network
    assert Network.of(specs, source(1)).reads_tokens == ()


def test_overrides_reach_into_lists_and_are_checked(tmp_path: Path) -> None:
    """`--set key=value`, as YAML."""
    path = written(tmp_path, configuration())
    config = load(path, ["network.0.units=9", "training.epochs=2", "seed=4"])
    assert config.network[0].model_dump()["units"] == 9
    assert (config.training.epochs, config.seed) == (2, 4)
    for wrong in ("seed", "network.7.units=1", "name.x=1"):
        with pytest.raises(ConfigError, match="--set"):
            load(path, [wrong])
    with pytest.raises(ConfigError, match=r"training\.epochs"):
        load(path, ["training.epochs=many"])


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """Missing, and not YAML."""
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="no YAML"):
        load(tmp_path / "broken.yaml")


def test_documentation_names_every_kind_activation_and_loss() -> None:
    """docs/models.md is complete."""
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    kinds = {k for spec in get_args(get_args(LayerSpec)[0]) for k in get_args(spec.model_fields["kind"].annotation)}
    names = kinds | set(ACTIVATIONS) | set(get_args(LossName)) | set(TrainingConfig.model_fields)
    assert not [name for name in sorted(names) if not re.search(rf"\b{name}\b", text)]


def test_adapters_are_put_in_where_shapes_change() -> None:
    """Frames become values before a recurrent, dense or output layer; DL4J's named adapters are welcome."""
    config = configuration(
        network=[
            {"kind": "rnn_to_cnn", "height": 6, "width": 5, "channels": 2},
            {"kind": "conv2d", "units": 3, "kernel": [3, 3]},
            {"kind": "pool2d", "kernel": [2, 2], "stride": [2, 1]},
            LSTM,
            OUT,
        ]
    )
    placed = place(Config.model_validate(config).network, Shape(size=60))
    assert [(p.index, p.spec.kind) for p in placed] == [
        (0, "rnn_to_cnn"),
        (1, "conv2d"),
        (2, "pool2d"),
        (3, "cnn_to_rnn"),
        (3, "lstm"),
        (4, "rnn_output"),
    ]
    assert [p.shape.size for p in placed] == [60, 60, 3 * 4 * 3, 3 * 2 * 2, 12, 4]
    assert [p.name for p in placed][-2:] == ["lstm_0", "rnn_output_0"]
