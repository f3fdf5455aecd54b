"""Baselines, errors and tests of significance against formulas; backtests from one origin and from several."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats
from test_horizons import opened, recipe

from stepcast.errors import ConfigError
from stepcast.manifest import Distribution
from training.__main__ import main
from training.backtest import folds, markdown, write_page
from training.baselines import Baselines
from training.comparison import Comparison, as_dict, joined
from training.config import load

NAN = float("nan")


def comparison(ahead: int = 1, rows: int = 60, seed: int = 0, **forecasts: Any) -> Comparison:
    """Two series, two targets; errors of two forecasters by random numbers."""
    random = np.random.default_rng(seed)
    truth = random.normal(size=(2, rows, 2))
    given = {
        "model": truth + 0.5 * random.normal(size=truth.shape),
        "persistence": truth + random.normal(size=truth.shape),
        **forecasts,
    }
    return Comparison(ahead, truth, given, np.array([[1.0, 2.0], [4.0, 0.5]]))


# --- Errors -------------------------------------------------------------------------------------------------------


def test_errors_are_of_the_rows_that_all_forecasters_have() -> None:
    """Literal numbers: a row that one of them does not have counts for none."""
    truth = np.array([[[1.0], [2.0], [NAN], [5.0]]])
    model, naive = np.array([[[2.0], [2.0], [0.0], [NAN]]]), np.array([[[3.0], [0.0], [1.0], [5.0]]])
    one = Comparison(1, truth, {"model": model, "persistence": naive}, np.array([[2.0]]))
    assert one.rows.tolist() == [2]
    assert one.rmse("model").tolist() == [np.sqrt(0.5)]
    assert one.rmse("persistence").tolist() == [2.0]
    assert one.ratio("model").tolist() == [np.sqrt(0.5) / 2]
    assert one.mase("model").tolist() == [0.25]
    assert one.mase("persistence").tolist() == [1.0]
    assert as_dict(one, ["heat"]) == {"heat": {"rmse": 0.7071, "persistence": 2.0, "ratio": 0.3536, "rows": 2}}
    both = joined([one, one])
    assert both.rows.tolist() == [4]
    assert both.rmse("model").tolist() == [np.sqrt(0.5)]


def test_mase_divides_each_series_by_its_own_scale() -> None:
    """Two series, errors 1 and 1, scales 1 and 4: the mean of 1 and a quarter."""
    truth = np.zeros((2, 5, 1))
    one = Comparison(1, truth, {"model": truth + 1}, np.array([[1.0], [4.0]]))
    assert one.mase("model").tolist() == [0.625]


@pytest.mark.parametrize("ahead", [1, 3])
def test_diebold_mariano_is_the_formula_of_harvey_leybourne_and_newbold(ahead: int) -> None:
    """Written out anew: mean loss differential over its long-run deviation, corrected, as Student's t."""
    one = comparison(ahead=ahead)
    losses = [np.square(one.forecasts[n] - one.truth).mean(axis=0) for n in ("model", "persistence")]
    for k, p in enumerate(one.diebold_mariano("model", "persistence")):
        d = losses[0][:, k] - losses[1][:, k]
        n = len(d)
        gamma = [sum((d[t] - d.mean()) * (d[t - lag] - d.mean()) for t in range(lag, n)) / n for lag in range(ahead)]
        dm = d.mean() / np.sqrt((gamma[0] + 2 * sum(gamma[1:])) / n)
        dm *= np.sqrt((n + 1 - 2 * ahead + ahead * (ahead - 1) / n) / n)
        assert p == pytest.approx(2 * stats.t.cdf(-abs(dm), n - 1), rel=1e-9)
    if ahead == 1:  # then it is a paired t-test but for the divisor of the variance
        paired = stats.ttest_rel(losses[0][:, 0], losses[1][:, 0]).pvalue
        assert one.diebold_mariano("model", "persistence")[0] == pytest.approx(paired, rel=1e-6)


def test_diebold_mariano_says_nothing_of_equal_forecasts_or_of_none() -> None:
    """Zero variance, or no row."""
    truth = np.zeros((1, 30, 1))
    same = Comparison(2, truth, {"model": truth + 1, "persistence": truth - 1}, np.ones((1, 1)))
    assert np.isnan(same.diebold_mariano("model", "persistence")).all()
    none = Comparison(2, truth * NAN, {"model": truth, "persistence": truth}, np.ones((1, 1)))
    assert np.isnan(none.diebold_mariano("model", "persistence")).all()


def test_interval_covers_the_ratio_as_often_as_it_says() -> None:
    """Independent errors of half the size: of 100 data sets at least 88 have 0.5 between their 95 % bounds."""
    covered = 0
    for seed in range(100):
        low, high = comparison(rows=120, seed=seed).interval("model", block=4, seed=seed)
        assert low.shape == high.shape == (3,)
        covered += int(low[2] <= 0.5 <= high[2])
    assert 88 <= covered <= 100


def test_interval_of_dependent_errors_is_wider_with_longer_blocks() -> None:
    """Errors that hold for ten steps: single steps make the interval too narrow."""
    random = np.random.default_rng(4)
    held = np.repeat(random.normal(size=(2, 30, 2)), 10, axis=1)
    truth = np.zeros((2, 300, 2))
    one = Comparison(1, truth, {"model": held, "persistence": truth + random.normal(size=truth.shape)}, np.ones((2, 2)))
    narrow, wide = (one.interval("model", block) for block in (1, 20))
    assert (wide[1] - wide[0])[2] > 1.8 * (narrow[1] - narrow[0])[2]
    whole = one.interval("model", 10_000)
    np.testing.assert_allclose(whole[0], whole[1])  # one block is all there is


def test_crps_and_coverage_are_of_the_models_distribution() -> None:
    """Quantiles by literal numbers; a forecaster of one number has its absolute error; absent rows do not count."""
    truth = np.array([[[1.0], [5.0], [NAN], [0.0]]])
    parameters = np.array([[[[0.0, 2.0, 4.0]], [[1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0]], [[-1.0, 0.0, 2.0]]]])
    described = Distribution(kind="quantile", levels=(0.1, 0.5, 0.9), targets={"heat": ("a", "b", "c")})
    forecasts = {"model": parameters[..., 1], "persistence": truth + 3}
    one = Comparison(1, truth, forecasts, np.array([[1.0]]), described, parameters)
    pinball = [0.1 * 1 + 0.5 * 1 + 0.1 * 3, 0.1 * 4 + 0.5 * 3 + 0.9 * 2, 0.1 * 1 + 0 + 0.1 * 2]
    assert one.crps("model")[0] == pytest.approx(2 * np.mean(pinball) / 3)
    assert one.crps("persistence").tolist() == one.mae("persistence").tolist() == [3.0]
    coverage = one.coverage()
    assert coverage is not None
    assert coverage[0] == pytest.approx(2 / 3)
    assert joined([one, one]).crps("model")[0] == pytest.approx(2 * np.mean(pinball) / 3)
    assert comparison().coverage() is None


# --- Baselines ----------------------------------------------------------------------------------------------------


def test_naive_baselines_follow_the_grid(tmp_path: Path) -> None:
    """The last value; the same hour of the last known day; weeks and years only where training rows have seen one."""
    source = opened(recipe(tmp_path))
    baselines = Baselines(source)
    assert baselines.periods == {"day_before": 24}  # 120 hours of training
    origin, heat = np.array([150, 160]), source.x[0, :, 0].astype(np.float64)
    one, far = baselines.naive(1, origin), baselines.naive(30, origin)
    assert list(one) == ["persistence", "day_before"]
    np.testing.assert_array_equal(one["persistence"][0, :, 0], heat[origin])
    np.testing.assert_array_equal(one["day_before"][0, :, 0], heat[origin + 1 - 24])
    np.testing.assert_array_equal(far["day_before"][0, :, 0], heat[origin + 30 - 48])
    changes = np.abs(source.x[0, 24:120, 1] - source.x[0, :96, 1])
    assert baselines.scale[0, 1] == pytest.approx(changes.mean())


@pytest.mark.parametrize(
    ("every", "steps", "names"),
    [("1D", 30, ["week_before"]), ("1D", 800, ["week_before", "year_before"]), ("15min", 600, ["day_before"])],
)
def test_periods_are_more_than_a_step_and_less_than_the_training_rows(
    every: str, steps: int, names: list[str], tmp_path: Path
) -> None:
    """Of a daily table a day before is the last value."""
    times = pd.date_range("2015-01-01", periods=steps, freq=every, tz="UTC")
    (tmp_path / "heat.csv").write_text("\n".join(["when,heat", *(f"{t.isoformat()},{t.day}" for t in times)]))
    split = {"validation": times[steps - 20].isoformat(), "test": times[steps - 10].isoformat()}
    path = recipe(tmp_path, every=every, columns={"heat": {"target": True}}, **split)
    (tmp_path / "heat.csv").write_text("\n".join(["when,heat", *(f"{t.isoformat()},{t.day}" for t in times)]))
    found = Baselines(opened(path)).periods
    assert list(found) == names
    assert found.get("day_before", 96) == 96
    assert found.get("week_before", 7) == 7


@pytest.mark.parametrize("kind", ["linear", "trees"])
def test_fitted_baselines_find_what_can_be_known(kind: Any, tmp_path: Path) -> None:
    """A sine and a ramp that starts anew every week day: far better than the last value, and finite everywhere."""
    source = opened(recipe(tmp_path, (1, 3)))
    baselines = Baselines(source)
    forecast = baselines.fitted(kind, 3)
    assert forecast.shape == (1, 200, 2)
    origin = np.arange(144, 197)
    truth, last = source.x[0, origin + 3, :2], source.x[0, origin, :2]
    errors, naive = (np.sqrt(np.square(f - truth).mean(axis=0)) for f in (forecast[0, origin], last))
    assert (errors < 0.5 * naive).all()
    assert baselines.fitted(kind, 3) is forecast  # fitted once


def test_fitted_baselines_do_not_see_what_comes(tmp_path: Path) -> None:
    """Other test rows change no forecast made before them."""
    path = recipe(tmp_path, (1, 3))
    before = Baselines(opened(path)).fitted("linear", 3)
    lines = (tmp_path / "heat.csv").read_text().splitlines()
    lines[151:] = [line.rsplit(",", 3)[0] + ",5.5,5,5" for line in lines[151:]]
    (tmp_path / "heat.csv").write_text("\n".join(lines))
    after = Baselines(opened(path)).fitted("linear", 3)
    np.testing.assert_array_equal(before[:, :150], after[:, :150])
    assert not np.array_equal(before[:, 150:], after[:, 150:])


# --- Origins ------------------------------------------------------------------------------------------------------


def test_folds_follow_one_another_and_end_with_the_table(tmp_path: Path) -> None:
    """Training grows, or slides; without a refit it stays; every test row is in one fold."""
    source = opened(recipe(tmp_path))
    assert source.bounds == {"train": (0, 120), "validation": (120, 144), "test": (144, 200)}
    expanding = [f.bounds for f in folds(source, 2, refit=True, window="expanding")]
    assert expanding == [
        {"train": (0, 120), "validation": (120, 144), "test": (144, 172)},
        {"train": (0, 148), "validation": (148, 172), "test": (172, 200)},
    ]
    sliding = [f.bounds["train"] for f in folds(source, 2, refit=True, window="sliding")]
    assert sliding == [(0, 120), (28, 148)]
    fixed = [(f.bounds["train"], f.bounds["test"]) for f in folds(source, 2, refit=False, window="expanding")]
    assert fixed == [((0, 120), (144, 172)), ((0, 120), (172, 200))]
    second = list(folds(source, 2, refit=True, window="sliding"))[1]
    heat = source.x[0, 28:148, 0].astype(np.float64)
    assert second.features[0].mean == pytest.approx(heat.mean())
    assert second.outputs[0].scale == pytest.approx((heat[1:] - heat[:-1]).std(), rel=1e-5)
    assert source.features[0].mean != second.features[0].mean
    with pytest.raises(ConfigError, match="--origins 57: there are 56 test steps"):
        list(folds(source, 57, refit=True, window="expanding"))


def run(path: Path, *arguments: str) -> int:
    return main(["backtest", str(path), "--out", str(path.parent / "m"), *arguments])


def crps_of(test: dict[str, Any], target: str) -> float:
    """What the report of the training says."""
    (found,) = (one["crps"] for one in test["distribution"]["targets"] if one["name"] == target)
    return float(found)


def test_backtest_of_an_exported_model_is_one_table_per_horizon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's RMSE is that of its manifest, beside every baseline; the page is made of the same numbers."""
    path = recipe(tmp_path, (1, 3))
    head = {"kind": "rnn_output", "residual": True, "distribution": {"kind": "quantile", "levels": [0.1, 0.5, 0.9]}}
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**settings, "network": [{"kind": "lstm", "units": 4}, head]}))
    assert main(["train", str(path), "--out", str(tmp_path / "m"), "--runs", str(tmp_path / "r")]) == 0
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- backtest -->\nold\n<!-- end of backtest -->\nAfter\n")
    capsys.readouterr()
    assert run(path, "--without", "trees", "--json", str(tmp_path / "scores.json"), "--page", str(page)) == 0
    printed = capsys.readouterr().out
    assert "3 x 1h ahead" in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["horizons"]) == ["1", "3"]
    three = scores["horizons"]["3"]["forecasters"]
    assert list(three) == ["model", "rollout", "persistence", "day_before", "linear"]
    skill = json.loads((tmp_path / "m" / "heat" / "1" / "manifest.json").read_text())["provenance"]["metrics"]["skill"]
    assert three["model"]["heat"]["rmse"] == skill["3 ahead"]["heat"]["rmse"]
    assert three["persistence"]["mean"]["ratio"] == 1
    assert three["linear"]["heat"]["p_against_model"] is not None
    assert "p_against_model" not in three["model"]["heat"]
    test = json.loads((tmp_path / "m" / "heat" / "1" / "manifest.json").read_text())["provenance"]["metrics"]["test"]
    assert 0 <= three["model"]["heat"]["coverage_80"] <= 1
    assert three["model"]["heat"]["crps"] == pytest.approx(crps_of(test, "heat+3h"), rel=1e-3)
    assert "Within the model's 80 % interval" in page.read_text()
    low, high = three["model"]["mean"]["ratio_low"], three["model"]["mean"]["ratio_high"]
    assert 0 < low < high
    text = page.read_text()
    assert text.startswith("Before\n<!-- backtest -->\n\n**1 x 1h ahead**")
    assert text.endswith("<!-- end of backtest -->\nAfter\n")
    assert "old" not in text
    assert markdown(scores) in text
    row = next(line for line in text.splitlines() if line.startswith("| model"))
    assert f"{scores['horizons']['1']['forecasters']['model']['mean']['ratio']:.3f}" in row


def test_backtest_from_several_origins_trains_before_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three origins, their rows together; without a refit the first model forecasts all, and other numbers come."""
    path = recipe(tmp_path, (1, 3))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    assert run(path, "--origins", "3", "--without", "trees", "--json", str(files[0])) == 0
    printed = capsys.readouterr().out
    assert printed.count("best epoch") == 3
    assert run(path, "--origins", "3", "--no-refit", "--without", "trees", "--json", str(files[1])) == 0
    assert capsys.readouterr().out.count("best epoch") == 1
    refitted, fixed = (json.loads(file.read_text()) for file in files)
    assert [span[0][:13] for span in refitted["origins"]] == ["2021-01-07 00", "2021-01-07 18", "2021-01-08 13"]
    assert refitted["horizons"]["3"]["rows"] == {"heat": 53, "load": 53}  # 56 test hours, the last three are not known
    assert list(refitted["horizons"]["1"]["forecasters"]) == ["model", "persistence", "day_before", "linear"]
    ratios = [s["horizons"]["1"]["forecasters"]["persistence"]["heat"]["rmse"] for s in (refitted, fixed)]
    assert ratios[0] == ratios[1]
    models = [s["horizons"]["1"]["forecasters"]["model"]["heat"]["rmse"] for s in (refitted, fixed)]
    assert models[0] != models[1]


def test_what_cannot_be_backtested_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No model yet, a page without marks, a class."""
    path = recipe(tmp_path, (1, 3))
    assert run(path) == 1
    assert "manifest.json: no such file" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="has no <!-- backtest --> and <!-- end of backtest -->"):
        write_page(tmp_path / "none.md", None)  # type: ignore[arg-type]
    classes = recipe(tmp_path, 0, columns={"heat": {}}, target_scale="value", label="load")
    assert load(classes).data.kind == "table"
    text = classes.read_text().replace("residual: true", "residual: false")
    classes.write_text(text)
    assert run(classes) == 2
    assert "a backtest needs a table with targets" in capsys.readouterr().err
