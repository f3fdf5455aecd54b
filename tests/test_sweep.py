"""train --sweep: trials with other values, the best of them exported; real trainings of a few milliseconds each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stepcast.errors import ConfigError
from stepcast.manifest import read_manifest
from training.__main__ import main
from training.sweep import load_sweep

RATES = {"training.learning_rate": {"choices": [1e-7, 0.05]}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """y is twice x, in numbered files."""
    random = np.random.default_rng(6)
    for number in range(6):
        x = random.normal(size=(8, 1))
        for letter, values in (("x", x), ("y", 2 * x)):
            np.savetxt(tmp_path / f"{letter}_{number}.csv", values, fmt="%.5f")
    files = {"features": "x_%d.csv", "labels": "y_%d.csv"}
    numbers = {"train": [0, 3], "validation": [4, 4], "test": [5, 5]}
    data = {"kind": "csv_sequences", "task": "regression", **{s: {**files, "numbers": n} for s, n in numbers.items()}}
    made = {"name": "swept", "data": data, "network": [{"kind": "simple_rnn", "units": 2}, {"kind": "rnn_output"}]}
    path = tmp_path / "swept.yaml"
    path.write_text(yaml.safe_dump({**made, "training": {"epochs": 3, "batch": 2, "threads": 1}}))
    return path


def swept(recipe: Path, content: dict[str, Any], *more: str) -> int:
    """Run a sweep; its exit status."""
    folder = recipe.parent
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    where = ["--out", str(folder / "models"), "--runs", str(folder / "runs")]
    return main(["train", str(recipe), "--sweep", str(folder / "sweep.yaml"), *where, *more])


def test_the_best_trial_is_exported_with_its_values(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole numbers, logarithms, choices and steps; what learns beats what does not; the values are in the manifest."""
    parameters = {
        **RATES,
        "network.0.units": {"low": 2, "high": 4},
        "training.l2": {"low": 1e-6, "high": 1e-3, "log": True},
        "training.momentum": {"low": 0.5, "high": 0.9, "step": 0.2},
    }
    assert swept(recipe, {"trials": 5, "prune": False, "parameters": parameters}) == 0
    told = capsys.readouterr().out
    config = read_manifest(recipe.parent / "models" / "swept" / "1").provenance.config
    training = config["training"]
    assert training["learning_rate"] == 0.05
    assert config["network"][0]["units"] in (2, 3, 4)
    assert 1e-6 <= training["l2"] <= 1e-3
    assert round(training["momentum"], 6) in (0.5, 0.7, 0.9)
    assert told.count("trial ") >= 5
    assert "--set training.learning_rate=0.05 --set network.0.units=" in told
    checkpoints = recipe.parent / "runs" / "swept" / "sweep"
    assert len(list(checkpoints.glob("*/swept/best.pt"))) == 5
    losses = [float(line.rpartition(" ")[2]) for line in told.splitlines() if line.startswith("trial ")]
    best = int(told.partition("best: trial ")[2].partition(",")[0])
    assert min(losses) == losses[best]


def test_a_study_goes_on_where_it_ended(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--resume makes the trials that are missing; without it the study begins anew, with the same values."""
    parameters = {"training.learning_rate": {"low": 0.001, "high": 0.1, "log": True}}
    assert swept(recipe, {"trials": 2, "parameters": parameters}) == 0
    first = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ")]
    assert swept(recipe, {"trials": 3, "parameters": parameters}, "--resume") == 0
    more = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ")]
    assert [line.split(":")[0] for line in more] == ["trial 2"]
    assert swept(recipe, {"trials": 2, "parameters": parameters}) == 0
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ")]
    assert again == first


def test_a_trial_that_is_worse_than_the_median_ends_early(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After five that are whole, one that learns nothing is not trained to its end."""
    content = {"trials": 12, "parameters": RATES}
    assert swept(recipe, content) == 0
    told = capsys.readouterr().out
    assert "learning_rate=1.0e-07: worse than the median, ended early" in told
    assert "learning_rate=0.05: worse" not in told


def test_values_that_the_recipe_refuses_cost_a_trial_only(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is told with its reason; if none is left, the command fails."""
    wrong = {"training.batch": {"choices": [0]}}
    assert swept(recipe, {"trials": 2, "parameters": wrong}) == 2
    told = capsys.readouterr()
    assert "trial 0: training.batch=0: " in told.out.replace("\n", " ")
    assert "none of 2 trials came to its end" in told.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"trials": 3}, "parameters: Field required"),
        ({"parameters": {}}, "parameters: Dictionary should have at least 1 item"),
        ({"parameters": {"a": {"low": 2, "high": 1}}}, "low 2 is not below high 1"),
        ({"parameters": {"a": {"low": 0, "high": 1, "log": True}}}, "log wants low above 0 and no step"),
        ({"parameters": {"a": {"choices": []}}}, "at least 1 item"),
        ({"parameters": {"a": {"choices": [1]}}, "runs": 3}, "runs: Extra inputs"),
    ],
)
def test_a_wrong_file_is_one_line(content: dict[str, Any], says: str, tmp_path: Path) -> None:
    """With the path of the value."""
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=says) as raised:
        load_sweep(file)
    assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_sweep(tmp_path / "none.yaml")
