"""`stepcast new`: what is seen of a CSV, and that its recipe is one the trainer takes as it is."""

import argparse
import csv
import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml

from stepcast.__main__ import main
from stepcast.cli.look import look
from stepcast.errors import ConfigError
from stepcast.manifest import read_manifest
from training.__main__ import _parser
from training.config import load
from training.data.table import TableSource

START = datetime(2026, 1, 1)


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def pumps(path: Path, steps: int = 80) -> Path:
    """Two pumps, a reading every quarter of an hour: step 7 of pump a has no row, one cell in ten is empty."""
    rows = [
        [
            (START + timedelta(minutes=15 * step)).isoformat(),
            pump,
            round(3 + math.sin(step / 6 + number), 3),
            "" if step % 10 == 3 else step,
            "on" if step % 4 else "off",
            "same",
        ]
        for step in range(steps)
        for number, pump in enumerate("ab")
        if (step, pump) != (7, "a")
    ]
    return write(path, ["when", "pump", "flow (l/s)", "on", "state", "note"], rows)


def opened(recipe: Path) -> TableSource:
    config = load(recipe)
    source = config.data.open(batch=config.training.batch, seed=config.seed, root=recipe.parent)
    assert isinstance(source, TableSource)
    return source


def test_look_finds_time_series_sampling_and_gaps(tmp_path: Path) -> None:
    """Every fact by value."""
    seen = look(pumps(tmp_path / "pumps.csv"))
    assert (seen.time, seen.series, seen.keys, seen.every) == ("when", "pump", ("a", "b"), "15min")
    assert (seen.rows, seen.steps, seen.absent) == (159, 80, 1)
    columns = {column.name: column for column in seen.columns}
    assert [name for name, column in columns.items() if column.numeric] == ["flow (l/s)", "on"]
    assert (columns["on"].empty, columns["on"].low, columns["on"].high) == (16, 0, 79)
    assert columns["state"].labels == ["off", "on"]
    assert columns["note"].constant


@pytest.mark.parametrize(
    ("step", "every"),
    [
        (timedelta(days=1), "1D"),
        (timedelta(hours=36), "36h"),
        (timedelta(minutes=1), "1min"),
        (timedelta(seconds=90), "90s"),
        (timedelta(milliseconds=20), "20ms"),
        (timedelta(microseconds=125), "125us"),
    ],
)
def test_new_writes_a_grid_that_the_trainer_reads(tmp_path: Path, step: timedelta, every: str) -> None:
    """The grid is the sampling, however fine, with moments of a zone; the trainer has every row on it."""
    rows = [[f"{(START + n * step).isoformat()}+02:00", n % 7] for n in range(60) if n not in (5, 6)]
    file = write(tmp_path / "one.csv", ["t", "v"], rows)
    assert main(["new", str(file), "--out", str(tmp_path / "one.yaml")]) == 0
    assert yaml.safe_load((tmp_path / "one.yaml").read_text())["data"]["every"] == every
    source = opened(tmp_path / "one.yaml")
    assert source.grid.present.sum() == 58
    np.testing.assert_array_equal(source.grid.values[0, :5, 0], [0, 1, 2, 3, 4])
    assert source.bounds == {"train": (0, 42), "validation": (42, 51), "test": (51, 60)}


def test_new_describes_the_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers become targets with the unit in their name, text is left out with a word why; series are kept."""
    file = pumps(tmp_path / "my pumps.csv")
    recipe = tmp_path / "recipe.yaml"
    assert main(["new", str(file), "--out", str(recipe)]) == 0
    assert "2 series by 'pump', a step every 15min, 1 steps without a row" in capsys.readouterr().out
    text = recipe.read_text()
    assert "# state: left out, looks like a label (off, on)" in text
    assert "# note: left out, one value" in text
    tree = yaml.safe_load(text)
    assert tree["name"] == "my_pumps"
    assert tree["data"]["columns"] == {
        "flow (l/s)": {"unit": "l/s", "target": True},
        "on": {"unit": "", "target": True, "indicator": True},
    }
    source = opened(recipe)
    assert source.series == ("a", "b")
    assert source.targets == ("flow (l/s)", "on")


def test_new_takes_the_targets_that_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Others stay features; one that is not there is answered with the nearest."""
    file, recipe = pumps(tmp_path / "pumps.csv"), tmp_path / "recipe.yaml"
    assert main(["new", str(file), "--out", str(recipe), "--target", "flow"]) == 1
    assert "no column of numbers 'flow'" in capsys.readouterr().err
    assert main(["new", str(file), "--out", str(recipe), "--target", "flow (l/s"]) == 1
    assert "The nearest is 'flow (l/s)'." in capsys.readouterr().err
    assert not recipe.exists()
    assert main(["new", str(file), "--out", str(recipe), "--target", "flow (l/s)"]) == 0
    assert opened(recipe).targets == ("flow (l/s)",)


def test_new_overwrites_nothing_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, recipe = pumps(tmp_path / "pumps.csv"), tmp_path / "recipe.yaml"
    recipe.write_text("mine")
    assert main(["new", str(file), "--out", str(recipe)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert recipe.read_text() == "mine"
    assert main(["new", str(file), "--out", str(recipe), "--force"]) == 0
    assert recipe.read_text().startswith("# Written by `stepcast new` from pumps.csv")


def test_new_trains_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shortest file that `new` takes, with a reading that never changes in the test rows, makes a model."""
    rows = [[(START + timedelta(hours=n)).isoformat(), n % 5, min(n, 20)] for n in range(40)]
    file = write(tmp_path / "short.csv", ["t", "v", "still"], rows)
    recipe = tmp_path / "short.yaml"
    assert main(["new", str(file), "--out", str(recipe)]) == 0
    where = ["--out", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    assert main(["train", str(recipe), *where, "--set", "training.epochs=1"]) == 0
    assert [f.name for f in read_manifest(tmp_path / "models" / "short" / "1").features] == ["v", "still"]
    assert main(["check", str(tmp_path / "models" / "short" / "1")]) == 0
    capsys.readouterr()


def test_new_copies_a_worked_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it reads; it is opened as it is."""
    monkeypatch.chdir(tmp_path)
    assert main(["new", "--example", "list"]) == 0
    assert {"reviews", "weather"} <= set(capsys.readouterr().out.split())
    assert main(["new", "--example", "reviews"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"reviews.yaml", "reviews.vec"}
    config = load(tmp_path / "reviews.yaml")
    assert config.data.open(batch=4, seed=1, root=tmp_path).classes == ("negative", "positive")
    assert main(["new", "--example", "wether"]) == 1
    assert "The nearest is 'weather'." in capsys.readouterr().err


def test_a_class_of_ours_is_found_by_both_names(tmp_path: Path) -> None:
    """A recipe may name a class of the trainer as it lies in a checkout, or as it lies in the wheel."""
    text = "{name: m, data: {kind: python, class: 'PREFIXtraining.examples.control_charts:ControlCharts'}, network: "
    text += "[{kind: lstm, units: 2}, {kind: rnn_output}]}"
    made = set()
    for prefix in ("", "stepcast."):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text.replace("PREFIX", prefix))
        made.add(type(load(recipe).data.open(batch=4, seed=1, root=tmp_path)))
    assert [kind.__module__ for kind in made] == ["training.examples.control_charts"]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (["t", "v"], [], "1 lines, wanted a line of names and rows of readings"),
        (["a", "b"], [[1, 2], [3, 4]], "no column is a time"),
        (["t", "t"], [["2026-01-01", 1]], "column 't' is named twice"),
        (["t", "v"], [["2026-01-01", 1], ["2026-01-02"]], ":3: 1 cells, the first line names 2"),
        (["t", "v"], [["2026-01-01", 1], ["2026-01-01", 2]], "name the column that tells them apart: --series"),
        (["t", "v"], [["2026-01-01", 1]], "all rows are of one moment"),
        (["t", "v"], [["2026-01-01", 1], ["2026-01-02T00:00:00.000001", 2], ["2026-01-03", 2]], "lie on no grid"),
    ],
)
def test_look_says_why_a_file_is_none(
    tmp_path: Path, header: list[str], rows: list[list[object]], message: str
) -> None:
    """Each in one line that begins with the file."""
    file = write(tmp_path / "bad.csv", header, rows)
    with pytest.raises(ConfigError) as error:
        look(file)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{file}:")
    assert "\n" not in str(error.value)


def test_look_takes_named_columns_or_the_nearest(tmp_path: Path) -> None:
    """A wrong name is answered with the nearest; a column that holds no moments says where."""
    file = pumps(tmp_path / "pumps.csv")
    assert look(file, time="when", series="pump").series == "pump"
    with pytest.raises(ConfigError, match=r"no column 'whn' among .*The nearest is 'when'"):
        look(file, time="whn")
    with pytest.raises(ConfigError, match=r":2: column 'pump' has 'a', wanted a moment"):
        look(file, time="pump")


def test_command_page_names_the_options_of_the_trainer() -> None:
    """docs/command.md has each of them, beside its command."""
    page = (Path(__file__).parents[1] / "docs" / "command.md").read_text()
    (commands,) = (action for action in _parser("x")._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name} "))
        assert [o for o in command._option_string_actions if o.startswith("--") and o not in row + "--help"] == []
