"""Masked metrics: equal to scikit-learn on what is present, however the rows come in, and undefined where undefined."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn import metrics as sk

from stepcast.manifest import Output, Provenance
from training.data.batch import Batch
from training.metrics import (
    ClassificationMetrics,
    ClassificationResult,
    RegressionMetrics,
    RegressionResult,
    metrics_for,
)
from training.report import Forecast, forecast_of, print_report, write_report
from training.train import History

CLASSES = ("a", "b", "c", "d")


def classified(seed: int = 0, rows: int = 60, steps: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities that know a little, one-hot labels (B, T, 4) and a mask (B, T)."""
    rng = np.random.default_rng(seed)
    actual = rng.choice(4, (rows, steps), p=[0.5, 0.3, 0.15, 0.05])
    logits = rng.normal(size=(rows, steps, 4)) + 1.2 * np.eye(4)[actual]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return p, np.eye(4)[actual], rng.random((rows, steps)) < 0.6


def in_parts(metrics: ClassificationMetrics | RegressionMetrics, *arrays: np.ndarray) -> None:
    """Three uneven batches."""
    for part in (slice(0, 1), slice(1, 20), slice(20, None)):
        metrics.update(*(array[part] for array in arrays))


def test_classification_equals_sklearn_on_the_present_steps() -> None:
    """Accuracy, macro precision, recall and F1, confusion, cross entropy, top-n and ROC-AUC, over three batches."""
    p, y, mask = classified()
    metrics = ClassificationMetrics(CLASSES)
    in_parts(metrics, p, y, mask)
    result = metrics.result()
    scores, actual = p[mask], y[mask].argmax(-1)
    predicted = scores.argmax(-1)
    assert result.rows == mask.sum()
    assert result.accuracy == pytest.approx(sk.accuracy_score(actual, predicted))
    assert result.precision == pytest.approx(sk.precision_score(actual, predicted, average="macro"))
    assert result.recall == pytest.approx(sk.recall_score(actual, predicted, average="macro"))
    assert result.f1 == pytest.approx(sk.f1_score(actual, predicted, average="macro"))
    assert [list(row) for row in result.confusion] == sk.confusion_matrix(actual, predicted).tolist()
    assert result.log_loss == pytest.approx(sk.log_loss(actual, scores))
    assert result.bits == pytest.approx(sk.log_loss(actual, scores) / np.log(2))
    assert result.roc_auc == pytest.approx(sk.roc_auc_score(actual, scores, multi_class="ovr"), abs=1e-6)
    for n in (2, 3):
        assert result.top_n[n] == pytest.approx(sk.top_k_accuracy_score(actual, scores, k=n))
    assert set(result.top_n) == {2, 3}
    one = result.classes[2]
    assert one.f1 == pytest.approx(sk.f1_score(actual == 2, predicted == 2))
    assert one.rows == (actual == 2).sum()


def test_values_under_a_mask_change_nothing() -> None:
    """Not even NaN or a label that is all zero."""
    p, y, mask = classified()
    metrics = ClassificationMetrics(CLASSES)
    metrics.update(p, y, mask)
    spoiled = ClassificationMetrics(CLASSES)
    spoiled.update(np.where(mask[..., None], p, np.nan), np.where(mask[..., None], y, 0), mask)
    assert spoiled.result() == metrics.result()
    nothing = ClassificationMetrics(CLASSES)
    nothing.update(p, y, np.zeros_like(mask))
    assert nothing.result().rows == 0
    assert nothing.result().accuracy is nothing.result().roc_auc is nothing.result().log_loss is None


def test_mask_counts_only_where_it_is_exactly_one() -> None:
    """DL4J's evalTimeSeries: 0.5 is absent; no mask means that every step counts; ones are the same as none."""
    p, y, mask = classified()
    half = ClassificationMetrics(CLASSES)
    half.update(p, y, np.where(mask, 1.0, 0.5))
    whole = ClassificationMetrics(CLASSES)
    whole.update(p, y)
    ones = ClassificationMetrics(CLASSES)
    ones.update(p, y, np.ones_like(mask))
    assert half.result().rows == mask.sum()
    assert whole.result() == ones.result()
    assert whole.result().rows == mask.size


def test_undefined_class_is_left_out_of_macro_averages() -> None:
    """Class c is neither predicted nor there; d is predicted but never there; b is there but never predicted."""
    predicted = np.eye(4)[[0, 0, 3, 0]]
    labels = np.eye(4)[[0, 1, 0, 0]]
    metrics = ClassificationMetrics(CLASSES)
    metrics.update(predicted, labels)
    result = metrics.result()
    precisions = [one.precision for one in result.classes]
    recalls = [one.recall for one in result.classes]
    assert precisions == [pytest.approx(2 / 3), None, None, 0.0]
    assert recalls == [pytest.approx(2 / 3), 0.0, None, None]
    assert [one.f1 for one in result.classes] == [pytest.approx(2 / 3), 0.0, None, 0.0]
    assert result.precision == pytest.approx(1 / 3)
    assert result.recall == pytest.approx(1 / 3)
    assert result.f1 == pytest.approx(2 / 9)
    assert result.classes[2].roc_auc is None


def test_single_output_is_two_classes_with_threshold_one_half() -> None:
    """DL4J's nOut = 1: exactly 0.5 is the class 0."""
    p = np.array([[0.5], [0.51], [0.2], [0.9]])
    y = np.array([[0], [0], [1], [1]])
    metrics = ClassificationMetrics(["rain"])
    metrics.update(p, y)
    result = metrics.result()
    assert result.confusion == ((1, 1), (1, 1))
    assert [one.name for one in result.classes] == ["not rain", "rain"]
    assert result.roc_auc == pytest.approx(sk.roc_auc_score(y[:, 0], p[:, 0]))


def test_counted_thresholds_come_close_to_the_exact_area() -> None:
    """And are exact for scores that lie on the thresholds, ties included."""
    p, y, mask = classified(rows=300)
    exact, counted = ClassificationMetrics(CLASSES), ClassificationMetrics(CLASSES, roc_steps=1000)
    for metrics in (exact, counted):
        metrics.update(p, y, mask)
    assert counted.result().roc_auc == pytest.approx(exact.result().roc_auc, abs=2e-4)
    p = np.array([[0.25], [0.25], [0.75], [0.5], [0.25]])
    y = np.array([[0], [1], [1], [0], [1]])
    few = ClassificationMetrics(["x"], roc_steps=4)
    few.update(p, y)
    assert few.result().classes[1].roc_auc == pytest.approx(sk.roc_auc_score(y[:, 0], p[:, 0]))


def test_scores_that_are_no_probabilities_have_no_cross_entropy() -> None:
    """An identity output may be argmax'ed and ranked, but its logarithm means nothing."""
    metrics = ClassificationMetrics(CLASSES)
    metrics.update(np.array([[3.0, -1.0, 0.0, 0.5]]), np.array([[1, 0, 0, 0]]))
    result = metrics.result()
    assert result.accuracy == 1
    assert result.log_loss is result.bits is None


@pytest.mark.parametrize("per_output", [False, True])
def test_regression_equals_sklearn_per_column(per_output: bool) -> None:
    """MSE, MAE, RMSE, RSE, R² and correlation, with a mean a million times the deviation, over three batches."""
    rng = np.random.default_rng(1)
    y = rng.normal([1e6, 0.0, -5.0], [1.0, 10.0, 0.1], (60, 7, 3))
    p = y + rng.normal(0, [0.5, 20.0, 0.05], y.shape)
    mask = rng.random(y.shape if per_output else y.shape[:2]) < 0.7
    metrics = RegressionMetrics(["t", "p", "h"])
    in_parts(metrics, np.where(_wide(mask), p, np.nan), np.where(_wide(mask), y, np.nan), mask)
    result = metrics.result()
    for number, column in enumerate(result.columns):
        there = mask[..., number] if per_output else mask
        actual, predicted = y[..., number][there], p[..., number][there]
        assert column.rows == there.sum()
        assert column.mse == pytest.approx(sk.mean_squared_error(actual, predicted))
        assert column.mae == pytest.approx(sk.mean_absolute_error(actual, predicted))
        assert column.rmse == pytest.approx(sk.root_mean_squared_error(actual, predicted))
        assert column.r2 == pytest.approx(sk.r2_score(actual, predicted))
        assert column.rse == pytest.approx(1 - sk.r2_score(actual, predicted))
        assert column.correlation == pytest.approx(np.corrcoef(actual, predicted)[0, 1])
    assert result.average.mse == pytest.approx(np.mean([column.mse for column in result.columns]))


def _wide(mask: np.ndarray) -> np.ndarray:
    return mask if mask.ndim == 3 else mask[..., None]


def test_constant_labels_have_no_r2_and_no_correlation() -> None:
    """Undefined, and therefore not part of the average."""
    metrics = RegressionMetrics(["constant", "other"])
    metrics.update(np.array([[1.0, 1.0], [3.0, 2.0]]), np.array([[2.0, 1.0], [2.0, 2.0]]))
    constant, other = metrics.result().columns
    assert (constant.mse, constant.r2, constant.rse, constant.correlation) == (1, None, None, None)
    assert (other.mse, other.r2, other.correlation) == (0, 1, pytest.approx(1))
    assert metrics.result().average.r2 == 1
    assert RegressionMetrics(["x"]).result().average.mse is None


@pytest.mark.parametrize(
    ("predicted", "labels", "mask", "message"),
    [
        ([[[np.nan, 1]]], [[[0, 1]]], None, r"the prediction in row 0, output 0 is nan"),
        ([[[0.0, np.inf]]], [[[0, 1]]], None, r"the prediction in row 0, output 1 is inf"),
        ([[[0.0, 1.0]]], [[[0, np.nan]]], None, r"the label in row 0, output 1 is nan"),
        ([[[0.0, 1.0]]], [[[0, 0]]], None, r"present row 0 has no class, its label is all zero"),
        ([[[0.0, 1.0]]], [[[0, 1]]], [[[1, 0]]], r"a mask per output has no meaning for classes"),
        ([[[0.0, 1.0]]], [[[0, 1], [0, 1]]], None, r"predictions are \[1, 1, 2\], labels \[1, 2, 2\]"),
        ([[[0.0, 1.0, 2.0]]], [[[0, 1, 0]]], None, r"outputs 2"),
        ([[[0.0, 1.0]]], [[[0, 1]]], [1, 1], r"mask is \[2\], predictions are \[1, 1, 2\]"),
    ],
)
def test_wrong_batch_is_refused(predicted: object, labels: object, mask: object, message: str) -> None:
    """What DL4J counts as class 0 or lets through is an error that says where."""
    metrics = ClassificationMetrics(("a", "b"))
    with pytest.raises(ValueError, match=message):
        metrics.update(np.array(predicted), np.array(labels), None if mask is None else np.array(mask))


def test_tensors_are_taken_as_they_are() -> None:
    """The accumulator of a model, and float32 tensors from a batch."""
    metrics = metrics_for((Output(name="t"),), None)
    metrics.update(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[1.0], [4.0]]]), torch.tensor([[True, True]]))
    result = metrics.result()
    assert isinstance(result, RegressionResult)
    assert (result.columns[0].name, result.columns[0].mse) == ("t", 2)
    assert isinstance(metrics_for((Output(name="a"), Output(name="b")), ("a", "b")), ClassificationMetrics)


def _result() -> ClassificationResult:
    p, y, mask = classified()
    metrics = ClassificationMetrics(("up", "down", "\n", "<b>"))
    metrics.update(p, y, mask)
    return metrics.result()


def test_report_prints_what_was_measured() -> None:
    """Every class has a line, a newline is visible, and undefined is a dash."""
    console = Console(width=120, record=True, file=io.StringIO())
    result = _result()
    print_report(result, console)
    text = console.export_text()
    assert f"{result.accuracy:.4g}" in text
    assert "'\\n'" in text
    empty = RegressionMetrics(["t", "u"]).result()
    console = Console(width=120, record=True, file=io.StringIO())
    print_report(empty, console)
    lines = [line for line in console.export_text().splitlines() if line.startswith("│ t ")]
    assert len(lines) == 1
    assert lines[0].count("-") == 6


def test_report_files_hold_the_numbers_and_need_no_others(tmp_path: Path) -> None:
    """JSON comes back as the result; the page escapes names and carries its plot; the same numbers, the same bytes."""
    result = _result()
    metrics, plot, page = write_report(tmp_path / "a", result)
    assert json.loads(metrics.read_text())["confusion"] == [list(row) for row in result.confusion]
    assert plot.name == "confusion.png"
    text = page.read_text()
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "data:image/png;base64," in text
    again = write_report(tmp_path / "b", result)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in (metrics, plot, page)]


def test_forecast_is_drawn_with_gaps(tmp_path: Path) -> None:
    """A regression report has one panel per output; NaN is a gap, not an error."""
    values = np.array([[1.0, 2.0], [np.nan, 3.0], [2.0, 4.0]])
    metrics = RegressionMetrics(["t", "u"])
    metrics.update(values[::2], values[::2])
    paths = write_report(tmp_path, metrics.result(), Forecast(("t [°C]", "u"), values, values))
    assert [path.name for path in paths] == ["metrics.json", "forecast.png", "report.html"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert json.loads(paths[0].read_text())["average"]["mae"] == 0


def test_report_tells_how_the_model_was_made(tmp_path: Path) -> None:
    """Its learning curve, a gap where the loss was not finite; its recipe, escaped; where and with what."""
    history = History(epoch=3, updates=9, best_epoch=1, losses=[(2.0, 3.00000004), (1.0, 1.5), (math.nan, math.inf)])
    assert history.as_dict() == {
        "updates": 9,
        "best_epoch": 2,
        "loss": [2.0, 1.0, None],
        "validation_loss": [3.0, 1.5, None],
    }
    provenance = Provenance(
        data="a<b", config={"name": "m<n"}, metrics={"training": history.as_dict()}, environment={"python": "3.99"}
    )
    paths = write_report(tmp_path, _result(), provenance=provenance)
    assert [path.name for path in paths] == ["metrics.json", "confusion.png", "learning_curve.png", "report.html"]
    text = paths[-1].read_text()
    for told in ("name: m&lt;n", "a&lt;b", "3.99", 'alt="learning_curve"'):
        assert told in text
    assert not any("curve" in path.name for path in write_report(tmp_path / "b", _result(), provenance=Provenance()))


@pytest.mark.parametrize("per_output", [False, True])
def test_forecast_is_the_longest_row_with_gaps_where_nothing_counts(per_output: bool) -> None:
    """Row 1 has two labels, row 0 has one; masks per step and per output."""
    y = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[True, False, False], [True, False, True]])
    batch = Batch(y, y, y_mask=mask[..., None].expand(2, 3, 2) if per_output else mask)
    forecast = forecast_of((Output(name="t", unit="K"), Output(name="u")), batch, y.numpy() + 1)
    assert forecast.names == ("t [K]", "u")
    np.testing.assert_array_equal(forecast.actual, [[6, 7], [np.nan, np.nan], [10, 11]])
    np.testing.assert_array_equal(forecast.predicted, [[7, 8], [np.nan, np.nan], [11, 12]])


def test_many_classes_are_told_in_numbers_only(tmp_path: Path) -> None:
    """Characters: no table of a hundred rows in the terminal, none in a manifest, no plot; metrics.json has them."""
    names = [f"class {number}" for number in range(100)]
    metrics = ClassificationMetrics(names)
    metrics.update(np.eye(100), np.eye(100))
    result = metrics.result()
    console = Console(width=120, record=True, file=io.StringIO())
    print_report(result, console)
    assert "class 1" not in console.export_text()
    assert result.summary() == {k: v for k, v in result.as_dict().items() if k not in ("classes", "confusion")}
    paths = write_report(tmp_path, result)
    assert [path.name for path in paths] == ["metrics.json", "report.html"]
    assert len(json.loads(paths[0].read_text())["classes"]) == 100
    assert _result().summary() == _result().as_dict()
