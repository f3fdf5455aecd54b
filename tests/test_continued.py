"""An encoder and a decoder as two models: the decoder is trained, measured and served from the encoder's state."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from networks import OUT, network, plain
from serving import running

from stepcast import Client
from stepcast.errors import ConfigError
from stepcast.manifest import read_manifest
from training.__main__ import main
from training.config import load
from training.data.batch import Batch
from training.data.continued import Continued
from training.evaluate import evaluate
from training.network import restarted
from training.parallel import rows_of
from training.stepper import Stepper

CONTEXT, STEPS = 12, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Waves in files, an encoder that forecasts them, and a decoder that goes on; both trained by the command."""
    folder = tmp_path_factory.mktemp("waves")
    random = np.random.default_rng(3)
    for number in range(60):
        phase, speed = random.uniform(0, 2 * np.pi), random.uniform(0.3, 0.9)
        wave = np.sin(phase + speed * np.arange(STEPS + 1))
        np.savetxt(folder / f"{number}.csv", np.stack([wave[:-1], wave[1:]], axis=1), delimiter=",", fmt="%.5f")
    files = {"features": str(folder / "%d.csv")}
    data = {
        "kind": "csv_sequences",
        "task": "regression",
        "label_columns": [1],
        "feature_names": ["now"],
        "output_names": ["next"],
        "feedback": [{"source": "next", "feature": "now"}],
        "train": {**files, "numbers": [0, 39]},
        "test": {**files, "numbers": [40, 59]},
    }
    training = {"epochs": 25, "learning_rate": 0.03, "batch": 20}
    gru = {"kind": "gru", "units": 12}
    options = {"encoder": "models/encoder/1", "data": data, "context": CONTEXT, "layers": {"decoder": "gru_0"}}
    continued = {"kind": "python", "class": "training.data.continued:Continued", "options": options}
    recipes: dict[str, dict[str, Any]] = {
        "encoder": {"name": "encoder", "data": data, "network": [gru, OUT]},
        "decoder": {"name": "decoder", "data": continued, "network": [{**gru, "name": "decoder"}, OUT]},
    }
    for name, recipe in recipes.items():
        recipe["training"] = training
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        told = ["--out", str(folder / "models"), "--runs", str(folder / "runs")]
        assert main(["train", str(folder / f"{name}.yaml"), *told]) == 0
    return folder


def opened(folder: Path, **options: Any) -> Continued:
    """The decoder's data."""
    config = load(folder / "decoder.yaml", [f"data.options.{key}={value}" for key, value in options.items()])
    source = config.data.open(batch=20, seed=0, root=folder)
    assert isinstance(source, Continued)
    return source


def test_decoder_begins_with_the_encoders_state(folder: Path) -> None:
    """What is behind the context, and the state that the encoder ends the context in: its own golden graph's."""
    source = opened(folder)
    (whole,) = source._source.batches("test")
    (batch,) = source.batches("test")
    assert torch.equal(batch.x, whole.x[:, CONTEXT:])
    assert torch.equal(batch.y, whole.y[:, CONTEXT:])
    _, states = source._stepper.in_blocks(
        whole.x[:, :CONTEXT].numpy(), np.full(20, CONTEXT, np.int32), source._stepper.initial_states(20), 1
    )
    assert batch.begin is not None
    np.testing.assert_allclose(batch.begin["decoder"]["h"].numpy(), states["gru_0.h"], atol=1e-5)


def test_decoder_is_better_for_it(folder: Path) -> None:
    """Its first answer knows how the wave goes; the same weights without the state do not."""
    manifest = read_manifest(folder / "models" / "decoder" / "1")
    rmse = manifest.provenance.metrics["test"]["average"]["rmse"]
    source = opened(folder)
    stepper = Stepper.of(folder / "models" / "decoder" / "1", manifest)
    told = evaluate(stepper, source, "test")
    source._begin = lambda batch: {}  # type: ignore[method-assign]
    untold = evaluate(stepper, source, "test")
    assert told.as_dict()["average"]["rmse"] == pytest.approx(rmse)
    assert rmse < 0.6 * untold.as_dict()["average"]["rmse"]


def test_state_is_handed_over_between_sessions_and_runs_free(folder: Path) -> None:
    """Step the encoder, get its state, set it as the decoder's, roll out: as the two graphs do by hand."""
    source = opened(folder)
    (whole,) = source._source.batches("test")
    context, last = whole.x[0, :CONTEXT].numpy(), float(whole.x[0, CONTEXT, 0])
    with running(store="memory://", models=folder / "models") as server, Client(server.url) as client:
        encoder, decoder = client.session("encoder", "a"), client.session("decoder", "a")
        encoder.step(context[None])
        decoder.set_state({"decoder": encoder.get_state().state["gru_0"]})
        free = [float(decoder.step(np.array([last], np.float32)).outputs.item())]
        free += np.asarray(decoder.rollout(4).outputs).ravel().tolist()
    (batch,) = source.batches("test")
    assert batch.begin is not None
    graph = Stepper.of(folder / "models" / "decoder" / "1", read_manifest(folder / "models" / "decoder" / "1"))
    state = {"decoder.h": batch.begin["decoder"]["h"][:1].numpy()}
    x, wanted = np.full((1, 1, 1), last, np.float32), []
    for _ in range(5):
        x, state = graph.run(x, np.ones(1, np.int32), state)
        wanted.append(x.item())
    np.testing.assert_allclose(free, wanted, rtol=1e-4, atol=1e-5)
    assert free[0] == pytest.approx(whole.y[0, CONTEXT, 0].item(), abs=0.2)  # a zero state cannot know the wave's speed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "{decoder: lstm_0}"}, "data.options.layers: the encoder has no state of 'lstm_0', only of gru_0"),
        ({"context": STEPS}, f"data.options.context: {STEPS}, a sequence has {STEPS} steps"),
        ({"data.feature_names": "[x]"}, "data.options.encoder: it takes now, the data gives x"),
    ],
)
def test_what_cannot_be_continued_is_refused(options: dict[str, Any], message: str, folder: Path) -> None:
    """In one line."""
    with pytest.raises(ConfigError) as caught:
        next(opened(folder, **options).batches("train"))
    assert str(caught.value) == message


def test_state_that_the_network_does_not_have_is_refused() -> None:
    """With both shapes."""
    net = network([{"kind": "gru", "units": 3}, OUT], plain(1), outputs=1)
    for begin, told in (
        ({"gru_0": {"h": torch.zeros(2, 4)}}, r"state gru_0.h \[2, 4\], the network has \[2, 3\]"),
        ({"lstm_0": {"h": torch.zeros(2, 3)}}, r"state lstm_0.h \[2, 3\], the network has none"),
    ):
        with pytest.raises(ConfigError, match=told):
            net.opening_state(2, begin)


def test_rows_take_their_state_along_and_lanes_restart_from_it() -> None:
    """Some rows of a batch; of two lanes, the one that starts."""
    begin = {"a": {"h": torch.tensor([[1.0], [2.0], [3.0]])}}
    batch = Batch(torch.zeros(3, 2, 1), torch.zeros(3, 2, 1), begin=begin)
    picked = rows_of(batch, torch.tensor([2, 0]))
    assert picked.begin is not None
    assert picked.begin["a"]["h"].tolist() == [[3.0], [1.0]]
    assert replace(picked, begin=None).begin is None
    old = {"a": {"h": torch.tensor([[7.0], [8.0], [9.0]])}}
    assert restarted(old, torch.tensor([True, False, True]), begin)["a"]["h"].tolist() == [[1.0], [8.0], [3.0]]
