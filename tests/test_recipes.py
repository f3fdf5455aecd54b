"""Every recipe reaches the figure that its file states, and what it exports is what the server proves and serves.

The quick tests train a shortened version of each recipe to a figure of its own, and measure the committed models on
their whole test split, one step at a time. The slow ones run each recipe as it is.
"""

import json
import operator
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from serving import running

from service.engine.model import Runtime
from stepcast.manifest import Manifest, read_manifest
from training.__main__ import main
from training.config import load
from training.evaluate import evaluate
from training.stepper import Stepper

pytestmark = pytest.mark.timeout(300)  # seconds on an idle machine, more where other tests run beside

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "training" / "recipes"
FIGURE = re.compile(r"^# Reaches: (\w+) (>=|<=) ([\d.]+)", re.MULTILINE)
MOST_PROCESSOR_S = 300  # of training, export and proof together: five minutes even on one core
COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Figure:
    """What a recipe promises: metric, comparison, number."""

    metric: str
    sign: str
    value: float

    @classmethod
    def of(cls, recipe: str) -> "Figure":
        """The figure in a recipe's comment."""
        found = FIGURE.findall((RECIPES / f"{recipe}.yaml").read_text())
        assert len(found) == 1, f"{recipe}.yaml has to state one figure"
        metric, sign, value = found[0]
        return cls(metric, sign, float(value))

    def check(self, metrics: dict[str, float]) -> None:
        """Fail unless the metric is as promised."""
        got = metrics[self.metric]
        assert COMPARE[self.sign](got, self.value), f"{self.metric} is {got}, promised {self.sign} {self.value}"


def trained(recipe: str, out: Path, overrides: Sequence[str] = ()) -> Manifest:
    """Run the recipe's one command and prove the model as the server does."""
    sets = [argument for override in overrides for argument in ("--set", override)]
    where = ["--out", str(out / "models"), "--runs", str(out / "runs")]
    assert main(["train", str(RECIPES / f"{recipe}.yaml"), *where, *sets]) == 0
    directory = out / "models" / recipe / "1"
    Runtime(directory, device="cpu").prove()
    return read_manifest(directory)


QUICK = {
    "control_charts": (
        Figure("accuracy", ">=", 0.75),  # of six kinds; a trend and a shift are told apart last
        ["training.epochs=15", "data.options.train=60", "data.options.validation=10", "data.options.test=30"],
    ),
    "reviews": (
        Figure("accuracy", ">=", 0.9),
        ["training.epochs=3", "data.options.validation=100", "data.options.test=200"],
    ),
    "moving_shapes": (
        Figure("accuracy", ">=", 0.5),  # of four shapes, and of frames that are hidden now and then
        ["training.epochs=6", "data.options.train=250", "data.options.validation=10", "data.options.test=40"],
    ),
    "characters": (
        Figure("bits", "<=", 3.3),  # letters by their frequency alone take 4.6
        ["training.epochs=1", "network.0.units=24", "network.1.units=64", "network.2.units=64", "training.threads=1"],
    ),
}


def shortened(recipe: str, out: Path) -> Manifest:
    """Train the shortened version of a recipe and check its figure."""
    figure, overrides = QUICK[recipe]
    manifest = trained(recipe, out, overrides)
    figure.check(manifest.provenance.metrics["test"])
    assert manifest.streaming
    assert manifest.provenance.data.strip()
    assert len(json.dumps(manifest.model_dump(mode="json"))) < 30_000
    return manifest


@pytest.mark.parametrize("recipe", ["control_charts", "moving_shapes", "reviews"])
def test_shortened_recipe_learns_and_is_proved(tmp_path: Path, recipe: str) -> None:
    """Far better than chance after seconds; the full figure is the slow test's."""
    shortened(recipe, tmp_path)


@pytest.mark.parametrize("recipe", ["control_charts", "moving_shapes", "reviews"])
def test_committed_model_reaches_the_figure_of_its_recipe(recipe: str) -> None:
    """The whole test split, stepped through onnxruntime; and it is the recipe of today that made the model."""
    directory = ROOT / "models" / recipe / "1"
    manifest = read_manifest(directory)
    config = load(RECIPES / f"{recipe}.yaml")
    source = config.data.open(batch=config.training.batch, seed=config.seed, root=RECIPES)
    assert manifest.provenance.config == config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    result = evaluate(Stepper.of(directory, manifest), source, "test", summary=manifest.readout == "last")
    Figure.of(recipe).check(result.as_dict())
    assert result.as_dict()["accuracy"] == pytest.approx(manifest.provenance.metrics["test"]["accuracy"], abs=2e-3)
    Runtime(directory, device="cpu").prove()
    assert sum(path.stat().st_size for path in directory.iterdir()) < 200_000


def test_characters_learn_and_write_on_in_a_rollout(tmp_path: Path) -> None:
    """Generation through the server: the most probable character is fed back, as a loop over the graph does it."""
    manifest, models = shortened("characters", tmp_path), tmp_path / "models"
    classes = manifest.classes or ()
    prompt = [[[float(classes.index(character))] for character in "The statement"]]
    with running(store="memory://", models=models) as server:
        base = f"{server.url}/v1/models/characters/sessions/writer"
        httpx.post(f"{base}/step", json={"inputs": prompt}).raise_for_status()
        answer = httpx.post(f"{base}/rollout", json={"steps": 30, "temperature": 0}).raise_for_status().json()
        drawn = [
            httpx.post(f"{base}/rollout", json={"steps": 30, "temperature": 1.0, "seed": seed}).json()["classes"]
            for seed in (1, 1, 2)
        ]
    assert "".join(np.ravel(answer["classes"])) == _greedy(models / "characters" / "1", manifest, prompt, 30)
    assert drawn[0] == drawn[1] != drawn[2]


def _greedy(directory: Path, manifest: Manifest, prompt: list[list[list[float]]], count: int) -> str:
    """The prompt in one call, then one character at a time."""
    stepper = Stepper.of(directory, manifest)
    x = np.array(prompt, np.float32)
    y, states = stepper.run(x, np.array([x.shape[1]], np.int32), stepper.initial_states(1))
    text = ""
    for _ in range(count):
        y, states = stepper.run(y[:, -1:].argmax(2).astype(np.float32)[..., None], np.ones(1, np.int32), states)
        text += (manifest.classes or ())[int(y[0, -1].argmax())]
    return text


def test_numbered_files_are_trained_on_exported_and_reported(tmp_path: Path) -> None:
    """The documents' many-to-one layout from end to end: a label file of one row beside each series, a header each."""
    rng = np.random.default_rng(0)
    for number in range(60):
        slope = rng.uniform(-1, 1)
        values = slope * np.arange(rng.integers(5, 12)) + 100
        (tmp_path / f"x_{number}.csv").write_text("value\n" + "".join(f"{value:.4f}\n" for value in values))
        (tmp_path / f"y_{number}.csv").write_text(f"slope\n{slope:.4f}\n")
    files = {"features": "x_%d.csv", "labels": "y_%d.csv"}
    recipe = {
        "name": "slopes",
        "data": {
            "kind": "csv_sequences",
            "task": "regression",
            "alignment": "end",
            "skip_rows": 1,
            "output_names": ["slope"],
            "bucket": 2,
            "train": {**files, "numbers": [0, 39]},
            "validation": {**files, "numbers": [40, 49]},
            "test": {**files, "numbers": [50, 59]},
        },
        "network": [{"kind": "lstm", "units": 12}, {"kind": "rnn_output"}],
        "training": {"epochs": 40, "batch": 8, "learning_rate": 0.02, "threads": 1},
    }
    path = tmp_path / "slopes.yaml"
    path.write_text(yaml.safe_dump(recipe))
    where = ["--out", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    assert main(["train", str(path), *where]) == 0
    manifest = read_manifest(tmp_path / "models" / "slopes" / "1")
    assert manifest.readout == "last"
    assert manifest.provenance.metrics["test"]["average"]["r2"] > 0.8
    Runtime(tmp_path / "models" / "slopes" / "1", device="cpu").prove()
    assert main(["evaluate", str(path), *where, "--report", str(tmp_path / "report")]) == 0
    training = manifest.provenance.metrics["training"]
    assert training["updates"] == 40 * 5
    assert len(training["loss"]) == len(training["validation_loss"]) == 40
    assert min(training["validation_loss"]) == training["validation_loss"][training["best_epoch"] - 1]
    assert training["loss"][-1] < training["loss"][0] / 4
    plots = {"forecast.png", "learning_curve.png"}
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"metrics.json", "report.html", *plots}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "name: slopes" in page
    assert f"<td>python</td><td>{platform.python_version()}</td>" in page
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["columns"][0]["rows"] == 10
    assert metrics["average"]["r2"] == pytest.approx(manifest.provenance.metrics["test"]["average"]["r2"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", QUICK)
def test_recipe_reaches_the_figure_it_states_in_minutes(tmp_path: Path, recipe: str) -> None:
    """The recipe as it is, with nothing overridden; its time is the processor's, which neighbours leave alone."""
    started = time.process_time()
    manifest = trained(recipe, tmp_path)
    spent = time.process_time() - started
    Figure.of(recipe).check(manifest.provenance.metrics["test"])
    assert spent < MOST_PROCESSOR_S, f"{recipe} took {spent:.0f} s of processor time"
