"""One long CSV to a grid, features, labels, splits and lanes: by literal values."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_horizons import recipe

from stepcast.errors import ConfigError
from stepcast.manifest import read_manifest
from training.__main__ import main
from training.config import load
from training.data.source import Source
from training.data.table import TableSource
from training.data.table_config import TableConfig

NAN = float("nan")
ROWS = """place,when,heat,wind,gust
b,2020-01-01T00:00:00Z,1,90,
a,2020-01-01T00:00:00Z,10,0,5
a,2020-01-01T02:00:00Z,14,180,
a,2020-01-01T01:00:00Z,,NA,7
b,2020-01-01T03:00:00Z,999,270,3
a,2020-01-01T03:00:00Z,12,90,6
b,2020-01-01T01:00:00Z,2,0,8
a,2020-01-01T04:00:00Z,20,0,6
b,2020-01-01T04:00:00Z,5,0,6
"""


def table(directory: Path, text: str = ROWS, **changes: Any) -> TableSource:
    (directory / "data.csv").write_text(text)
    settings: dict[str, Any] = {
        "kind": "table",
        "path": "data.csv",
        "series": "place",
        "time": "when",
        "every": "1h",
        "columns": {
            "heat": {"unit": "K", "target": True, "range": [-100, 100]},
            "wind": {"turn": 360},
            "gust": {"missing": "zero", "indicator": True},
        },
        "validation": "2020-01-01T03:00",
        "test": "2020-01-01T04:00",
        "warm_up": 2,
    }
    return TableConfig.model_validate(settings | changes).open(batch=2, seed=0, root=directory)


def test_rows_come_onto_the_grid_and_gaps_stay_gaps(tmp_path: Path) -> None:
    """Any order of rows; an absent hour is absent, an empty cell and one out of range are missing."""
    source = table(tmp_path)
    assert isinstance(source, Source)
    assert source.series == ("a", "b")
    assert source.grid.present.tolist() == [[True] * 5, [True, True, False, True, True]]
    np.testing.assert_array_equal(source.x[..., 0], [[10, NAN, 14, 12, 20], [1, 2, NAN, NAN, 5]])
    np.testing.assert_array_equal(source.x[..., 3], [[5, 7, NAN, 6, 6], [NAN, 8, NAN, 3, 6]])
    np.testing.assert_allclose(source.x[0, :, 1], [0, NAN, 0, 1, 0], atol=1e-6)  # sine of the direction
    np.testing.assert_allclose(source.x[0, :, 2], [1, NAN, -1, 0, 1], atol=1e-6)  # its cosine


def test_labels_are_the_targets_one_step_later_and_masked_where_unknown(tmp_path: Path) -> None:
    """Never across the end of a split, never at an absent step, never where the reading is missing."""
    source = table(tmp_path)
    np.testing.assert_array_equal(source.y[..., 0], [[NAN, 14, 12, 20, NAN], [2, NAN, NAN, 5, NAN]])
    batch = source._cut(0, 4, 4)
    assert batch.x_mask is not None
    assert batch.y_mask is not None
    assert batch.x_mask.tolist() == [[True] * 4, [True, True, False, True]]
    assert batch.y_mask[..., 0].tolist() == [[False, True, True, False], [True, False, False, False]]
    assert not torch.isnan(batch.y[batch.y_mask]).any()


def test_statistics_are_of_the_training_rows_alone(tmp_path: Path) -> None:
    """Three hours: 10, 14, 1, 2 for heat; sines, cosines and the calendar stay as they are."""
    features = {f.name: f for f in table(tmp_path, calendar=["hour"]).features}
    assert list(features) == ["heat", "wind_sin", "wind_cos", "gust", "hour_sin", "hour_cos"]
    assert (features["heat"].mean, features["heat"].scale) == (6.75, pytest.approx(np.std([10, 14, 1, 2])))
    assert (features["heat"].unit, features["heat"].missing) == ("K", "hold")
    assert (features["wind_sin"].mean, features["wind_sin"].scale) == (0, 1)
    assert features["hour_sin"].missing == "refuse"
    assert (features["gust"].missing, features["gust"].indicator) == ("zero", True)
    (output,) = table(tmp_path, target_scale="change").outputs
    assert (output.name, output.mean, output.scale) == ("heat", 0.0, 1.0)  # the one change there is, 1 to 2
    (output,) = table(tmp_path).outputs
    assert (output.mean, output.scale) == (8.0, 6.0)  # of the labels 14 and 2


def test_usual_changes_are_of_the_training_rows_alone(tmp_path: Path) -> None:
    """Of 10, -, 14 and 1, 2 in three hours: one change of an hour, one of two hours; a direction has none."""
    columns = {"heat": {"target": True, "range": [-100, 100], "changes": [1, 2]}, "wind": {"turn": 360}}
    heat = table(tmp_path, columns=columns).features[0]
    assert [(c.steps, c.scale) for c in heat.changes] == [(1, 1.0), (2, 1.0)]  # single changes do not deviate
    rows = ROWS.replace("a,2020-01-01T01:00:00Z,,", "a,2020-01-01T01:00:00Z,20,")
    heat = table(tmp_path, rows, columns=columns).features[0]
    assert heat.changes[0].scale == pytest.approx(np.std([10, -6, 1]))
    with pytest.raises(ConfigError, match=r"columns\.heat\.changes: 3 steps, the training rows are 3"):
        table(tmp_path, columns={"heat": {"target": True, "changes": [3]}})
    with pytest.raises(ValueError, match="has no changes"):
        table(tmp_path, columns={"heat": {"target": True}, "wind": {"turn": 360, "changes": [1]}})


def test_splits_follow_in_time_behind_a_warm_up_that_is_not_scored(tmp_path: Path) -> None:
    """The test split starts two hours early; labels there are masked."""
    source = table(tmp_path, test="2020-01-01T03:00")
    assert source.bounds == {"train": (0, 3), "validation": (3, 3), "test": (3, 5)}
    assert list(source.batches("validation")) == []
    (batch,) = source.batches("test")
    assert batch.x.shape == (2, 4, 4)
    assert batch.y_mask is not None
    assert batch.y_mask[..., 0].tolist() == [[False, False, True, False], [False, False, True, False]]


def test_training_rows_are_cut_into_lanes_anew_each_epoch(tmp_path: Path) -> None:
    """Every lane is a contiguous stretch; the same epoch gives the same cut, another one another."""
    hours = "\n".join(f"2020-01-{1 + h // 24:02}T{h % 24:02}:00:00Z,{h}" for h in range(240))
    text = f"when,heat\n{hours}\n"
    settings = {"series": None, "columns": {"heat": {"target": True}}, "validation": "2020-01-09", "test": "2020-01-10"}
    source = table(tmp_path, text, **settings)
    source.lanes = 4
    starts = set()
    for epoch in range(5):
        (batch,), (again,) = source.batches("train", epoch), source.batches("train", epoch)
        assert torch.equal(batch.x, again.x)
        assert batch.x.shape[0] == 4
        assert batch.x.shape[1] >= 36
        lanes = batch.x[..., 0]
        assert torch.equal(lanes - lanes[:, :1], torch.arange(batch.x.shape[1]).float().expand(4, -1))
        assert lanes.max() < 192
        starts.add(float(lanes[0, 0]))
    assert len(starts) > 1


def test_calendar_is_where_the_time_stands(tmp_path: Path) -> None:
    """Midnight is angle 0, 3 o'clock an eighth; Wednesday two sevenths; season counts from midwinter."""
    source = table(tmp_path, calendar=["hour", "week", "year", "season"])
    names = [f.name for f in source.features]
    values = dict(zip(names, source.x[0, 3], strict=True))
    assert values["hour_sin"] == pytest.approx(np.sin(2 * np.pi * 3 / 24))
    assert values["week_cos"] == pytest.approx(np.cos(2 * np.pi * (2 + 3 / 24) / 7), abs=1e-6)
    assert values["year_cos"] == pytest.approx(np.cos(2 * np.pi * (3 / 24) / 365.25))
    assert values["season_cos"] == pytest.approx(np.cos(2 * np.pi * (10 + 3 / 24) / 365.25))


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (
            ROWS.replace("a,2020-01-01T02:00:00Z,14", "a,2020-01-01T02:00:00Z,hot"),
            {},
            "data.csv:4: column 'heat' has 'hot'",
        ),
        (
            ROWS.replace("T02:00:00Z,14", "T02:30:00Z,14"),
            {},
            "data.csv:4: 2020-01-01 02:30:00+00:00 is not on the grid",
        ),
        (ROWS.replace("T02:00:00Z,14", "T01:00:00Z,14"), {}, "data.csv:5: a second row of series 'a'"),
        (ROWS.replace("2020-01-01T02:00:00Z,14", "yesterday,14"), {}, "data.csv:4: column 'when' has 'yesterday'"),
        (ROWS, {"columns": {"cold": {"target": True}}}, "no column 'cold' among place, when"),
        (ROWS, {"validation": "2021-01-01", "test": "2021-01-01"}, "must lie in this order"),
        (ROWS, {"package": "no_such_package"}, "data.package: 'no_such_package' is not installed"),
        (ROWS, {"path": "none.csv"}, "none.csv: cannot be read"),
        ("", {}, "no CSV"),
    ],
)
def test_wrong_files_are_refused_with_line_and_column(
    text: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Before anything is trained."""
    with pytest.raises(ConfigError) as caught:
        table(tmp_path, text, **changes)
    assert message in str(caught.value)


STATES = """when,load,state
2020-01-01T00:00:00Z,1,idle
2020-01-01T01:00:00Z,9, busy
2020-01-01T02:00:00Z,8,
2020-01-01T04:00:00Z,2,NA
2020-01-01T05:00:00Z,0,idle
2020-01-01T06:00:00Z,7,off
"""


def classes_of(directory: Path, text: str = STATES, **changes: Any) -> TableSource:
    settings = {"series": None, "columns": {"load": {}}, "label": "state", "test": "2020-01-01T05:00"}
    return table(directory, text, **{**settings, "validation": "2020-01-01T04:00", "warm_up": 1, **changes})


def test_a_label_column_names_the_class_of_its_step(tmp_path: Path) -> None:
    """One-hot beside its own step; masked where the cell is empty or the step is absent; classes are sorted."""
    source = classes_of(tmp_path)
    assert isinstance(source, Source)
    assert (source.task, source.classes, source.feedback) == ("classification", ("busy", "idle", "off"), ())
    assert [(output.name, output.mean, output.scale) for output in source.outputs] == [
        (name, 0.0, 1.0) for name in ("busy", "idle", "off")
    ]
    assert [feature.name for feature in source.features] == ["load"]
    nothing = [NAN] * 3
    np.testing.assert_array_equal(source.y[0], [[0, 1, 0], [1, 0, 0], nothing, nothing, nothing, [0, 1, 0], [0, 0, 1]])
    batch = source.window(2, 7)
    assert batch.y_mask is not None
    assert batch.y_mask.tolist() == [[False, False, False, False, True, True]]
    assert batch.x_mask is not None
    assert batch.x_mask.tolist() == [[True, True, False, True, True, True]]


def test_a_class_may_be_told_ahead_and_classes_may_be_given(tmp_path: Path) -> None:
    """In the given order, of which some may not be met; `NA` is a class where it is named; text may be a number."""
    source = classes_of(tmp_path, classes=["off", "idle", "NA", "busy"], horizon=1)
    assert source.classes == ("off", "idle", "NA", "busy")
    assert np.nan_to_num(source.y[0]).argmax(axis=1).tolist() == [3, 0, 0, 2, 1, 0, 0]
    assert np.isnan(source.y[0]).all(axis=1).tolist() == [False, True, True, False, False, False, True]
    numbered = classes_of(tmp_path, STATES.replace("idle", "1").replace(" busy", "2").replace("off", "1"))
    assert numbered.classes == ("1", "2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["idle", "Off", "busy"]}, "data.csv:7: column 'state' has 'off' (nearest: 'Off'), wanted one of"),
        ({"label": "none"}, "no column 'none'"),
        ({"label": "flat"}, "column 'flat' names 1 classes, wanted at least 2"),
    ],
)
def test_labels_that_name_no_classes_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With line and column."""
    text = "\n".join(f"{line},{'flat' if at == 0 else 'same'}" for at, line in enumerate(STATES.splitlines()))
    with pytest.raises(ConfigError) as caught:
        classes_of(tmp_path, text, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"load": {"target": True}}}, "label: 'state' stands alone"),
        ({"label": "load"}, "label: 'load' stands alone"),
        ({"target_scale": "change"}, "label: 'state' stands alone"),
        ({"label": None, "columns": {"load": {"target": True}}, "classes": ["a", "b"]}, "belong to a label"),
        ({"label": None, "columns": {"load": {"target": True}}, "horizon": 0}, "belong to a label"),
    ],
)
def test_a_label_stands_alone(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """No targets beside it, no classes without it."""
    with pytest.raises(ValueError, match=message):
        classes_of(tmp_path, **changes)


def test_a_table_of_classes_trains_and_serves_by_their_names(tmp_path: Path) -> None:
    """From the CSV to an exported manifest: what a level's direction is called is learnt."""
    level = np.cumsum(np.random.default_rng(4).normal(size=600)).round(3)
    states = np.where(np.diff(level, prepend=0) > 0, "rising", "falling")
    times = [f"2020-01-{1 + h // 24:02}T{h % 24:02}:00:00Z" for h in range(600)]
    rows = "\n".join(f"{t},{x},{s}" for t, x, s in zip(times, level, states, strict=True))
    (tmp_path / "data.csv").write_text(f"when,level,state\n{rows}\n")
    data = {"kind": "table", "path": "data.csv", "time": "when", "every": "1h", "columns": {"level": {"unit": "m"}}}
    data |= {"label": "state", "validation": "2020-01-20", "test": "2020-01-22", "warm_up": 5}
    head = {"kind": "rnn_output", "loss": "mcxent", "activation": "softmax"}
    config = {
        "name": "direction",
        "data": data,
        "network": [{"kind": "simple_rnn", "units": 8}, head],
        "training": {"epochs": 120, "batch": 8, "learning_rate": 0.02, "threads": 1},
    }
    (tmp_path / "direction.yaml").write_text(json.dumps(config))
    places = ["--out", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    assert main(["train", str(tmp_path / "direction.yaml"), *places]) == 0
    manifest = read_manifest(tmp_path / "models" / "direction" / "1")
    assert (manifest.task, manifest.classes) == ("classification", ("falling", "rising"))
    assert manifest.provenance.metrics["test"]["accuracy"] > 0.9


@pytest.mark.parametrize("every", ["h", "an hour", "", "0h", "-1h"])
def test_every_wants_a_number_and_a_unit(every: str, tmp_path: Path) -> None:
    """In our words, with the key; not by pandas when the file is open already."""
    path, told = recipe(tmp_path), "is no step of time. Write a number and a unit: 1h, 15min, 1D."
    with pytest.raises(ConfigError, match=re.escape(f"{path}: data.every: {every!r} {told}")):
        load(path, [f"data.every={every!r}"])


def test_table_without_a_target_is_refused() -> None:
    """By pydantic, when the configuration is read."""
    with pytest.raises(ValueError, match="none of them has target: true"):
        TableConfig.model_validate(
            {
                "kind": "table",
                "path": "x",
                "time": "t",
                "every": "1h",
                "columns": {"a": {}},
                "validation": "2020-01-01",
                "test": "2020-01-02",
            }
        )


# --- Parquet -----------------------------------------------------------------------------------------------------


def typed(directory: Path, **columns: Any) -> Path:
    """ROWS as a Parquet file of typed columns: moments, floats, dictionary-coded names; `columns` replace them."""
    frame = pd.read_csv(io.StringIO(ROWS), parse_dates=["when"])
    frame["place"] = frame["place"].astype("category")
    file = directory / "data.parquet"
    frame.assign(**columns).to_parquet(file, row_group_size=4)
    return file


def test_a_parquet_file_is_the_same_table(tmp_path: Path) -> None:
    """Grid, features, labels, statistics and batches, whatever the types and the zone of its moments."""
    want = table(tmp_path)
    moments = pd.read_csv(io.StringIO(ROWS), parse_dates=["when"])["when"]
    kinds: dict[str, dict[str, Any]] = {
        "typed": {},
        "another zone": {"when": moments.dt.tz_convert("America/New_York")},
        "no zone": {"when": moments.dt.tz_localize(None)},
        "text": {
            "when": moments.map(lambda at: at.isoformat()),
            "heat": [str(x) for x in (1, 10, 14, "", 999, 12, 2, 20, 5)],
        },
        "narrow": {"wind": pd.array([90, 0, 180, None, 270, 90, 0, 0, 0], dtype="Int16")},
    }
    for kind, columns in kinds.items():
        typed(tmp_path, **columns)
        got = table(tmp_path, path="data.parquet")
        assert got.series == want.series, kind
        assert got.times.equals(want.times), kind
        for a, b in ((got.x, want.x), (got.y, want.y), (got.grid.rows, want.grid.rows)):
            np.testing.assert_array_equal(a, b, err_msg=kind)
        assert (got.features, got.outputs) == (want.features, want.outputs), kind


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path) -> None:
    """A column that nobody names may be of any type, lists too."""
    typed(tmp_path, nested=[[1, 2]] * 9)
    assert table(tmp_path, path="data.parquet").series == ("a", "b")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            {"heat": [1, 10, 14, np.inf, 999, 12, 2, 20, 5]},
            "data.parquet: row 3: column 'heat' has 'inf', wanted a number",
        ),
        ({"heat": ["1", "x", "14", "", "9", "12", "2", "20", "5"]}, "row 1: column 'heat' has 'x', wanted a number"),
        ({"when": ["soon"] * 9}, "row 0: column 'when' has 'soon', wanted a moment"),
        ({"when": pd.to_datetime(["2020-01-01T00:00Z"] * 9)}, "row 2: a second row of series 'a'"),
    ],
)
def test_a_wrong_value_in_a_parquet_file_is_named_by_its_row(
    columns: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """Rows are numbered from 0: there is no header."""
    typed(tmp_path, **columns)
    with pytest.raises(ConfigError, match=re.escape(says)):
        table(tmp_path, path="data.parquet")


def test_a_file_that_is_no_parquet_is_one_line(tmp_path: Path) -> None:
    """Text, nothing at all, or a file that lacks a column."""
    (tmp_path / "data.parquet").write_text(ROWS)
    with pytest.raises(ConfigError, match=r"data\.parquet: no Parquet file"):
        table(tmp_path, path="data.parquet")
    with pytest.raises(ConfigError, match=r"none\.parquet: cannot be read"):
        table(tmp_path, path="none.parquet")
    typed(tmp_path)
    with pytest.raises(ConfigError, match=r"no column 'heats' \(nearest: 'heat'\) among place, when, heat, wind, gust"):
        table(tmp_path, path="data.parquet", columns={"heats": {"target": True}})
