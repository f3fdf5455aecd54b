"""Several labels that may be there together: read, learned, measured one by one, exported and answered by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from networks import OUT, echo_source
from serving import running

from stepcast import Client
from stepcast.errors import ConfigError
from stepcast.manifest import read_manifest
from training.__main__ import main
from training.config import load
from training.metrics import MultiLabelMetrics
from training.network import Network

HEAD = {**OUT, "loss": "xent", "activation": "sigmoid"}


def written(folder: Path, **data: Any) -> Path:
    """Forty files of ten steps: two readings, and whether they are above 0 and above 0.5; every ninth is not known."""
    random = np.random.default_rng(4)
    for number in range(40):
        x = random.normal(size=(10, 2))
        labels = np.stack([x[:, 0] > 0, x[:, 1] > 0.5], axis=1).astype(int).astype(object)
        labels.flat[::9] = ""
        lines = [",".join(map(str, row)) for row in np.hstack([x.round(4), labels])]
        (folder / f"{number}.csv").write_text("\n".join(lines) + "\n")
    splits = {
        name: {"features": "%d.csv", "numbers": numbers} for name, numbers in (("train", [0, 29]), ("test", [30, 39]))
    }
    told = {"kind": "csv_sequences", "task": "multi_label", "classes": ["warm", "windy"], "label_columns": [2, 3]}
    recipe = {
        "name": "labels",
        "data": {**told, **splits, **data},
        "network": [{"kind": "gru", "units": 6}, HEAD],
        "training": {"epochs": 15, "learning_rate": 0.05, "batch": 10},
    }
    path = folder / "labels.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_labels_are_learned_measured_and_answered_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, and through a server: each label's own probability, which need not add up to 1."""
    recipe = written(tmp_path)
    told = ["--out", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    assert main(["train", str(recipe), *told]) == 0
    assert "Labels" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "models" / "labels" / "1")
    assert (manifest.task, manifest.classes) == ("multi_label", None)
    assert [output.name for output in manifest.outputs] == ["warm", "windy"]
    measured = manifest.provenance.metrics["test"]
    assert measured["task"] == "multi_label"
    assert [label["name"] for label in measured["labels"]] == ["warm", "windy"]
    assert sum(label["rows"] for label in measured["labels"]) == 200 - 10 * 3
    assert measured["average"]["f1"] > 0.9
    assert main(["evaluate", str(recipe), *told, "--report", str(tmp_path / "report")]) == 0
    assert json.loads((tmp_path / "report" / "metrics.json").read_text()) == measured
    with running(store="memory://", models=tmp_path / "models") as server, Client(server.url) as client:
        session = client.session("labels", "one")
        both = session.step({"x_0": 1.5, "x_1": 2.0}).outputs
        assert both.keys() == {"warm", "windy"}
        assert min(both.values()) > 0.8
        neither = session.step({"x_0": -1.5, "x_1": -1.0}).outputs
        assert max(neither.values()) < 0.2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"classes": ["warm", "windy", "wet"]}, "0.csv: 2 label columns, data.classes names 3 labels"),
        ({"label_columns": [1, 2], "missing": "zero"}, "0.csv, line 1: label 1 is "),
        ({"classes": None}, "data: 'classes' belongs to tasks 'classification' and 'multi_label', and only to them"),
    ],
)
def test_what_is_no_label_is_refused_with_its_place(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before anything is trained."""
    recipe = written(tmp_path, **data)
    with pytest.raises(ConfigError) as caught:
        load(recipe).data.open(batch=4, seed=0, root=tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("head", [OUT, {**OUT, "loss": "xent", "activation": "hardsigmoid"}])
def test_labels_want_probabilities_apart_from_each_other(head: dict[str, Any], tmp_path: Path) -> None:
    """Another loss or activation is a mistake; with the layer's place."""
    config = load(written(tmp_path), [f"network.1={json.dumps(head)}"])
    with pytest.raises(
        ConfigError, match=r"network\[1\]: task multi_label wants loss xent with activation sigmoid, got"
    ):
        Network.of(config.network, config.data.open(batch=4, seed=0, root=tmp_path))
    assert Network.of(config.network, echo_source())  # numbers may have any


def test_every_label_is_measured_by_itself() -> None:
    """By hand: 4 rows, the last one unknown for the first label; 0.5 is not there."""
    metrics = MultiLabelMetrics(["a", "b"])
    p = [[0.9, 0.1], [0.8, 0.5], [0.2, 0.6], [0.7, 0.9]]
    y = [[1, 0], [0, 1], [0, 1], [np.nan, 1]]
    metrics.update(p[:2], y[:2], np.ones((2, 2)))
    metrics.update(p[2:], y[2:], np.array([[1, 1], [0, 1]]))
    result = metrics.result()
    a, b = result.labels
    assert (a.name, a.rows, a.there, a.accuracy, a.precision, a.recall) == ("a", 3, 1, 2 / 3, 0.5, 1.0)
    assert a.f1 == pytest.approx(2 / 3)
    assert a.roc_auc == 1.0
    assert a.log_loss == pytest.approx(-np.log([0.9, 0.2, 0.8]).mean())
    assert (b.rows, b.there, b.accuracy, b.precision, b.recall) == (4, 3, 0.75, 1.0, 2 / 3)
    assert (result.average.rows, result.average.there) == (4, 4)
    assert result.average.accuracy == pytest.approx((2 / 3 + 0.75) / 2)
