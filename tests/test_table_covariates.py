"""Columns of a table that are no past readings: known, static, names, holidays; and that the service has the same."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import holidays
import httpx
import numpy as np
import pytest
import torch
from networks import OUT, network, readings
from serving import running

from stepcast.errors import ConfigError
from stepcast.features import FeatureNames
from stepcast.manifest import Feature, Manifest, read_manifest
from training.__main__ import main
from training.data.batch import Batch
from training.data.table import TableSource, usual_size
from training.data.table_config import TableConfig
from training.export import stage
from training.layers.observed import Observed

NAN = float("nan")
ROWS = """place,when,heat,price,height,mood
a,2020-01-01T00:00:00Z,1,10,4,calm
a,2020-01-01T01:00:00Z,2,11,4,wild
a,2020-01-01T02:00:00Z,3,12,,
a,2020-01-01T04:00:00Z,5,14,4.0,odd
b,2020-01-01T00:00:00Z,7,20,9,wild
b,2020-01-01T01:00:00Z,8,21,9,calm
b,2020-01-01T03:00:00Z,9,,9,wild
"""
KNOWN: dict[str, Any] = {"heat": {"target": True}, "price": {"known": True}}


def config(**changes: Any) -> TableConfig:
    """A table of two places."""
    settings = {"series": "place", "time": "when", "every": "1h", "columns": KNOWN, "warm_up": 1}
    splits = {"validation": "2020-01-01T03:00", "test": "2020-01-01T04:00"}
    return TableConfig.model_validate({"kind": "table", "path": "data.csv", **settings, **splits, **changes})


def table(directory: Path, text: str = ROWS, **changes: Any) -> TableSource:
    (directory / "data.csv").write_text(text)
    return config(**changes).open(batch=2, seed=0, root=directory)


def columns_of(source: TableSource, name: str) -> list[list[float]]:
    place = [feature.name for feature in source.features].index(name)
    return source.x[..., place].tolist()


def same(got: list[list[float]], wanted: list[list[float]]) -> None:
    np.testing.assert_array_equal(np.float32(got), np.float32(wanted))


# --- known ----------------------------------------------------------------------------------------------------------


def test_a_known_column_is_that_of_the_moment_that_is_forecast(tmp_path: Path) -> None:
    """`horizon` steps later, of several horizons one feature for each; statistics are of what the network sees."""
    source = table(tmp_path)
    same(columns_of(source, "price"), [[11, 12, NAN, 14, NAN], [21, NAN, NAN, NAN, NAN]])
    price = source.features[1]
    assert (price.known, price.ahead, price.missing, price.mean) == (True, 1, "hold", pytest.approx((11 + 12 + 21) / 3))
    two = table(tmp_path, horizon=[1, 2])
    assert [(f.name, f.ahead) for f in two.features] == [("heat", 0), ("price", 1), ("price+2h", 2)]
    same(columns_of(two, "price+2h"), [[12, NAN, 14, NAN, NAN], [NAN, NAN, NAN, NAN, NAN]])
    turned = table(tmp_path, columns={**KNOWN, "price": {"known": True, "turn": 40}})
    same(
        columns_of(turned, "price_sin"),
        np.sin(2 * np.pi * np.array([[11, 12, NAN, 14, NAN], [21] + [NAN] * 4]) / 40).tolist(),
    )


def test_a_known_column_that_may_not_be_missing_ends_the_series_before_the_file(tmp_path: Path) -> None:
    """The last step knows nothing of what comes; a hole before is told with its line."""
    whole = "\n".join(["place,when,heat,price", *(f"a,2020-01-01T0{h}:00:00Z,{h},{10 + h}" for h in range(6))])
    columns = {**KNOWN, "price": {"known": True, "missing": "refuse"}}
    source = table(tmp_path, whole + "\n", columns=columns)
    assert source.present.tolist() == [[True] * 5 + [False]]
    (batch,) = source.batches("test")
    assert batch.x_mask is not None
    assert batch.x_mask.tolist() == [[True, True, False]]
    assert not torch.isnan(batch.x[batch.x_mask]).any()
    with pytest.raises(
        ConfigError, match=r"data\.csv:4: column 'price' is empty 1 steps later, and may not be missing"
    ):
        table(tmp_path, whole.replace(",3,13", ",3,") + "\n", columns=columns)
    with pytest.raises(ConfigError, match=r"data\.csv:5: column 'heat' is empty, and may not be missing\. Fill it"):
        table(tmp_path, whole.replace(",3,13", ",,13") + "\n", columns={"heat": {"target": True, "missing": "refuse"}})


# --- static ---------------------------------------------------------------------------------------------------------


def test_a_static_column_is_there_at_every_step(tmp_path: Path) -> None:
    """From the file, from the recipe, from a file of its own: also where the grid has no row or the cell is empty."""
    (tmp_path / "places.csv").write_text("place,height\nc,1\nb,9\na,4\n")
    ways: list[dict[str, Any]] = [{}, {"values": {"a": 4, "b": "9"}}, {"values": "places.csv"}]
    for way in ways:
        source = table(tmp_path, columns={**KNOWN, "height": {"static": True, "unit": "m", **way}})
        same(columns_of(source, "height"), [[4] * 5, [9] * 5])
        assert (source.features[2].static, source.features[2].missing, source.features[2].mean) == (True, "hold", 6.5)
    mood = {"static": True, "values": {"a": "calm", "b": "wild"}, "category": True}
    same(columns_of(table(tmp_path, columns={**KNOWN, "mood": mood}), "mood"), [[1] * 5, [2] * 5])
    by_key = {"static": True, "category": True, "embedding": 3}
    key = table(tmp_path, columns={**KNOWN, "place": by_key})
    same(columns_of(key, "place"), [[1] * 5, [2] * 5])
    assert (key.features[2].categories, key.features[2].embedding) == (("a", "b"), 3)


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (
            {"height": {"static": True}},
            "data.csv:5: column 'height' has '5', wanted '4' as in data.csv:2: it is static, and of",
        ),
        ({"heigth": {}}, "data.csv: no column 'heigth' (nearest: 'height') among place, when"),
        (
            {"height": {"static": True, "values": {"a": 1}}},
            "data.columns.height.values: nothing of series 'b'. Say what",
        ),
        (
            {"height": {"static": True, "values": {"a": 1, "b": "x"}}},
            "data.columns.height.values.b has 'x', wanted a num",
        ),
        ({"height": {"static": True, "values": "no.csv"}}, "no.csv: cannot be read"),
        ({"height": {"static": True, "values": "twice.csv"}}, "twice.csv: a second row of series 'a'"),
        (
            {"height": {"static": True, "values": "wrong.csv"}},
            "wrong.csv:3: column 'height' has 'tall', wanted a number",
        ),
        ({"height": {"static": True, "values": "other.csv"}}, "other.csv: no column 'height' (nearest: 'heights')"),
    ],
)
def test_wrong_static_columns_are_told_with_their_line(column: dict[str, Any], told: str, tmp_path: Path) -> None:
    """Before anything is trained."""
    for name, text in {
        "twice.csv": "place,height\na,1\na,2\nb,1\n",
        "wrong.csv": "place,height\na,1\nb,tall\n",
        "other.csv": "place,heights\na,1\n",
    }.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        table(tmp_path, ROWS.replace("4.0", "5"), columns={**KNOWN, **column})
    assert told in str(caught.value)


# --- names ----------------------------------------------------------------------------------------------------------


def test_categories_are_those_of_the_training_rows(tmp_path: Path) -> None:
    """Sorted; later ones are unknown (0), an empty cell is missing; listed ones have the order of the list."""
    source = table(tmp_path, columns={**KNOWN, "mood": {"category": True}})
    mood = source.features[2]
    assert (mood.categories, mood.embedding, mood.mean, mood.scale) == (("calm", "wild"), 3, 0.0, 1.0)
    same(columns_of(source, "mood"), [[1, 2, NAN, NAN, 0], [2, 1, NAN, 2, NAN]])
    listed = table(tmp_path, columns={**KNOWN, "mood": {"categories": ["wild", "odd"], "embedding": 7, "known": True}})
    same(columns_of(listed, "mood"), [[1, NAN, NAN, 2, NAN], [0, NAN, 1, NAN, NAN]])
    assert (listed.features[2].categories, listed.features[2].embedding) == (("wild", "odd"), 7)
    assert [usual_size(count) for count in (1, 2, 20, 200, 10_000)] == [2, 3, 9, 31, 100]


@pytest.mark.parametrize(
    ("text", "column", "told"),
    [
        (ROWS, {"categories": ["Calm"]}, "mood.categories: the training rows have none of them, but 'calm', 'wild'"),
        (ROWS.replace("calm", "").replace("wild", "NA"), {"category": True}, "mood: no category in the training rows"),
    ],
)
def test_wrong_categories_are_told(text: str, column: dict[str, Any], told: str, tmp_path: Path) -> None:
    """None in the rows, none that is listed."""
    with pytest.raises(ConfigError) as caught:
        table(tmp_path, text, columns={**KNOWN, "mood": column})
    assert told in str(caught.value)


def test_numbers_are_not_taken_for_categories(tmp_path: Path) -> None:
    """More than a thousand have to be listed."""
    lines = [f"2019-12-{1 + m // 1440:02}T{m // 60 % 24:02}:{m % 60:02}:00Z,1,{m / 7:.4f}" for m in range(1100)]
    text = "\n".join(["when,heat,mood", *lines])
    settings = {"series": None, "every": "1min", "validation": "2019-12-01T18:00", "test": "2019-12-01T18:10"}
    columns = {"heat": {"target": True}, "mood": {"category": True}}
    with pytest.raises(ConfigError, match=r"mood: 1080 categories in the training rows \(limit 1000\)\. If it is no"):
        table(tmp_path, text, **settings, columns=columns)
    listed = {**columns, "mood": {"categories": ["0.1429"]}}
    assert table(tmp_path, text, **settings, columns=listed).x[0, :3, 1].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"columns": {"heat": {"target": True, "known": True}}}, "a target cannot be known, static or a category"),
        ({"columns": {"heat": {"target": True, "category": True}}}, "a target cannot be known, static or a category"),
        ({"columns": {**KNOWN, "a": {"known": True, "static": True}}}, "Say one of them"),
        ({"columns": {**KNOWN, "a": {"values": {"a": 1}}}}, "values are of a series. Set static: true."),
        ({"columns": {**KNOWN, "a": {"category": True, "turn": 7}}}, "a category has no turn, no range and no mean"),
        ({"columns": {**KNOWN, "a": {"category": True, "missing": "mean"}}}, "a category has no turn, no range and no"),
        ({"columns": {**KNOWN, "a": {"embedding": 7}}}, "embedding belongs to a category"),
        (
            {"columns": {"price": {"known": True}}, "label": "mood"},
            "columns.price: known is of the moment that is fore",
        ),
        (
            {"columns": {**KNOWN, "h": {"static": True, "values": {"a": 1}}}, "series": None},
            "columns.h: values are by ser",
        ),
        ({"calendar": ["holiday"]}, "calendar: holiday belongs to holidays"),
        ({"holidays": {"country": "US"}}, "calendar: holiday belongs to holidays"),
        ({"columns": {**KNOWN, "time": {}}, "calendar": ["hour"]}, "'time' is what the service calls the calendar's"),
        (
            {"columns": {**KNOWN, "holiday": {}}, "calendar": ["holiday"], "holidays": {"country": "US"}},
            "also a channel",
        ),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes: dict[str, Any], told: str) -> None:
    """When they are read."""
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"zone": "Europe/Atlantis"}, "data.calendar: time zone 'Europe/Atlantis' is not known here"),
        ({"calendar": ["holiday"], "holidays": {"country": "XX"}}, "data.calendar: holidays: Country XX not available"),
    ],
)
def test_a_calendar_that_nobody_knows_is_refused_before_training(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """With the key it stands under."""
    with pytest.raises(ConfigError, match=told):
        table(tmp_path, **{"calendar": ["hour"], **changes})


# --- the calendar of both sides -------------------------------------------------------------------------------------


def test_training_and_service_read_the_same_calendar_over_two_years(tmp_path: Path) -> None:
    """Every hour of 2023 and 2024, four days on which clocks change among them: bit for bit, by name and by start."""
    start, hours = datetime(2023, 1, 1, tzinfo=UTC), 24 * 731
    lines = [f"{(start + timedelta(hours=h)).isoformat()},{h % 7}" for h in range(hours)]
    source = table(
        tmp_path,
        "\n".join(["when,heat", *lines]),
        series=None,
        columns={"heat": {"target": True}},
        calendar=["hour", "week", "year", "season", "holiday"],
        zone="America/New_York",
        holidays={"country": "US", "subdivision": "NY"},
        validation="2024-11-01",
        test="2024-12-01",
    )
    names = [feature.name for feature in source.features]
    assert names[1:] == [
        "hour_sin",
        "hour_cos",
        "week_sin",
        "week_cos",
        "year_sin",
        "year_cos",
        "season_cos",
        "holiday",
    ]
    given = {"name": "m", "version": 1, "outputs": source.outputs, "task": "regression", "sha256": "0" * 64}
    manifest = Manifest.model_validate({**given, "features": source.features, "every_s": source.every_s})
    served = FeatureNames(manifest).array({"time": start.isoformat()}, future=hours)
    np.testing.assert_array_equal(served[:, 1:], source.x[0, :, 1:])
    picked = [0, 1680, 1681, 1682, 1683, 7397, 7398, 7399, 10415, 16133, hours - 1]
    moments = [lines[hour].partition(",")[0] for hour in picked]
    rows = FeatureNames(manifest).array([{"heat": 0, "time": moment} for moment in moments])
    np.testing.assert_array_equal(rows[:, 1:], source.x[0, picked, 1:])
    midnight = np.flatnonzero(source.x[0, :, names.index("hour_cos")] == 1)
    assert len(midnight) == 731  # one per day on the wall clock, the first at 5:00 UTC
    assert {int(hour) % 24 for hour in midnight} == {4, 5}
    holiday = source.x[0, :, names.index("holiday")]
    assert holiday.sum() == 24 * len(holidays.country_holidays("US", subdiv="NY", years=[2023, 2024]))
    assert source.features[-1].ahead == 1
    christmas = (datetime(2023, 12, 25, 5, tzinfo=UTC) - start) // timedelta(hours=1)
    assert holiday[christmas - 2 : christmas + 25].tolist() == [0] + [1] * 24 + [0, 0]  # of the hour that is forecast


# --- vectors --------------------------------------------------------------------------------------------------------

CATEGORIES = [
    Feature(name="kind", categories=("x", "y"), embedding=3, missing="hold"),
    Feature(name="u", mean=1.0, scale=2.0, missing="mean", indicator=True),
    Feature(name="place", categories=("a", "b", "c"), embedding=1),
]


def test_a_vector_stands_for_each_category() -> None:
    """Its first value where the index stood, the others behind the flags; whatever is no index is unknown."""
    observed = Observed(CATEGORIES)
    kind, place = (table.weight.detach() for table in observed.vectors.tables)  # type: ignore[union-attr]
    assert (kind.shape, place.shape, observed.size) == ((3, 3), (4, 1), 1 + 1 + 1 + 1 + 2)
    assert kind[0].tolist() == [0, 0, 0]
    x = torch.tensor([[[1, 5, 3], [NAN, NAN, 0], [2, 3, 7], [-1, 3, NAN], [1.4, 1, 3.6]]])
    y, state = observed(x, None, {"last": torch.full((1, 1), 2.0)})
    kinds, places = [1, 1, 2, 0, 1], [3, 0, 0, 0, 0]
    wanted = [
        torch.cat([kind[k, :1], torch.tensor([u]), place[p], torch.tensor([flag]), kind[k, 1:]])
        for k, u, p, flag in zip(kinds, [2.0, 0, 1, 1, 0], places, [0.0, 1, 0, 0, 0], strict=True)
    ]
    torch.testing.assert_close(y[0], torch.stack(wanted), rtol=0, atol=0)
    assert state["last"].shape == (1, 1)
    assert observed.columns == {"kind": [0, 4, 5], "u": [1, 3], "place": [2]}
    (loss,) = [y[0, :, 0].sum()]
    loss.backward()
    assert observed.vectors.tables[0].weight.grad[:, 0].tolist() == [1, 3, 1]  # type: ignore[union-attr,index]


@pytest.mark.parametrize("features", [CATEGORIES, CATEGORIES[2:], CATEGORIES[:1]], ids=["mixed", "alone", "held"])
def test_the_graph_gives_the_same_vectors(features: list[Feature], tmp_path: Path) -> None:
    """onnxruntime computes what torch does, for indices, gaps and numbers that are none."""
    net = network([{"kind": "gru", "units": 3}, OUT], features, spread=0.5)
    x = readings(features, rows=6, steps=7).mul(2).round()

    class Read:
        """A source whose readings these are."""

        def __init__(self) -> None:
            self.features = tuple(features)

        def batches(self, split: str, epoch: int = 0) -> Any:
            yield Batch(x, torch.zeros(6, 7, 3))

    staged = stage(net, Read(), tmp_path)  # type: ignore[arg-type]  # proved against torch there
    assert {path.name for path in staged.iterdir()} == {"model.onnx", "golden.npz"}


def test_a_residual_output_moves_with_its_reading_beside_categories() -> None:
    """The base is the feature's own channel, wherever vectors stand."""
    features = [CATEGORIES[0], Feature(name="y0", mean=3.0, scale=2.0), CATEGORIES[2]]
    net = network([{"kind": "gru", "units": 2}, {**OUT, "residual": True}], features, outputs=1, spread=0.0)
    assert net.head.linear is not None
    torch.nn.init.zeros_(net.head.linear.weight)
    x = torch.tensor([[[1.0, 5.0, 2.0], [2.0, -4.0, 1.0]]])
    torch.testing.assert_close(net(x)[0][0, :, 0], torch.tensor([5.0, -4.0]))


# --- from the recipe to the service ---------------------------------------------------------------------------------


def test_covariates_are_learned_and_served_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What decides the next value is known, static and a name: a model that learns them is right, and serves them."""
    random, hours = np.random.default_rng(6), 500
    heights, effects = {"low": 0.0, "high": 4.0}, {"up": 2.0, "down": -2.0, "flat": 0.0}
    lines = ["place,when,heat,price,mood"]
    start = datetime(2026, 1, 1, tzinfo=UTC)
    truth: dict[str, list[float]] = {}
    for place, height in heights.items():
        prices, moods = random.normal(size=hours), random.choice(list(effects), hours)
        heat = [0.0, *(height + prices[t + 1] + effects[moods[t]] for t in range(hours - 1))]
        truth[place] = heat
        for t in range(hours):
            moment = (start + timedelta(hours=t)).isoformat()
            lines.append(f"{place},{moment},{heat[t]:.5f},{prices[t]:.5f},{moods[t]}")
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    data = {
        "kind": "table", "path": "data.csv", "series": "place", "time": "when", "every": "1h", "warm_up": 5,
        "columns": {
            "heat": {"target": True},
            "price": {"known": True},
            "mood": {"category": True, "embedding": 2},
            "height": {"static": True, "values": heights},
        },
        "calendar": ["hour"], "zone": "Europe/Berlin", "validation": "2026-01-17", "test": "2026-01-19",
    }  # fmt: skip
    layers = [{"kind": "dense", "units": 8}, {"kind": "rnn_output"}]
    training = {"epochs": 60, "batch": 8, "learning_rate": 0.03, "threads": 1}
    recipe = {"name": "covered", "seed": 1, "data": data, "network": layers, "training": training}
    (tmp_path / "covered.yaml").write_text(json.dumps(recipe))
    places = ["--out", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    assert main(["train", str(tmp_path / "covered.yaml"), *places]) == 0
    manifest = read_manifest(tmp_path / "models" / "covered" / "1")
    assert manifest.every_s == 3600.0
    assert manifest.provenance.metrics["test"]["average"]["rmse"] < 0.3  # of a deviation of 2.8
    features = {feature.name: feature for feature in manifest.features}
    assert (features["price"].known, features["height"].static) == (True, True)
    assert features["mood"].categories == ("down", "flat", "up")
    assert features["hour_sin"].calendar is not None
    assert features["hour_sin"].calendar.zone == "Europe/Berlin"
    for change, told in (
        (
            "data.columns.mood.categories=[up,down]",
            "feature 'mood' has the categories 'up', 'down', in covered/1 'down', 'f",
        ),
        (
            "data.zone=Asia/Tokyo",
            "is sin(2 pi hours since 0:00 Asia/Tokyo / 24), in covered/1 sin(2 pi hours since 0:00 E",
        ),
    ):
        assert main(["evaluate", str(tmp_path / "covered.yaml"), *places[:2], "--set", change]) == 2
        assert told in capsys.readouterr().err
    with (
        running(store="memory://", models=tmp_path / "models") as server,
        httpx.Client(base_url=f"{server.url}/v1/models/covered/sessions", timeout=20) as http,
    ):
        for place, height in heights.items():
            for t, mood in enumerate(["up", "down", "flat"]):
                told = {"height": height} if t == 0 else {}
                moment = (start + timedelta(hours=400 + t)).isoformat()
                inputs = {"heat": 1.0, "price": 0.5, "mood": mood, "time": moment, **told}
                answer = http.post(f"/{place}/step", json={"inputs": inputs}).json()
                assert answer["outputs"]["heat"] == pytest.approx(height + 0.5 + effects[mood], abs=0.8)
            known = {"price": [0.0, 1.0, -1.0], "mood": ["flat", "up", "down"], "time": start.isoformat()}
            free = http.post(f"/{place}/rollout", json={"steps": 3, "inputs": known}).json()["outputs"]["heat"][0]
            assert free == pytest.approx([height, height + 3, height - 3], abs=0.8)
            lacking = http.post(f"/{place}/rollout", json={"steps": 1, "inputs": {"time": start.isoformat()}})
            assert "lack 'price'" in lacking.json()["detail"]
