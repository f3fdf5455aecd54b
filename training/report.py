"""Metrics for people and for programs: tables in the terminal, metrics.json, plots, and one HTML page with both."""

import base64
import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from stepcast.manifest import Output, Provenance
from stepcast.predictive import Predictive

from .data.batch import Batch
from .metrics import (
    MOST_CLASSES,
    ClassificationResult,
    ClassResult,
    ColumnResult,
    LabelResult,
    MultiLabelResult,
    RegressionResult,
    Result,
)
from .probabilistic import DistributionResult, band

COLUMN_FIELDS = ("rows", "mse", "mae", "rmse", "rse", "r2", "correlation")
LABEL_FIELDS = ("rows", "there", "accuracy", "precision", "recall", "f1", "roc_auc", "log_loss")
CLASS_FIELDS = ("rows", "precision", "recall", "f1", "roc_auc")
BAND = 0.8
MOST_STEPS = 500  # of a forecast; more cannot be told apart on a page


@dataclass(frozen=True)
class Forecast:
    """A stretch of one series, to be drawn: what was predicted and what came.

    Attributes:
        names: Of the outputs, with units.
        predicted: (T, O), NaN where absent.
        actual: (T, O), NaN where absent.
        band: (2, T, O), the ends of the central intervals with the share `BAND`; None: no distribution was forecast.
    """

    names: tuple[str, ...]
    predicted: NDArray[np.float64]
    actual: NDArray[np.float64]
    band: NDArray[np.float64] | None = None


def forecast_of(
    outputs: Sequence[Output], batch: Batch, predicted: NDArray[np.float32], predictive: Predictive | None = None
) -> Forecast:
    """The stretch of a batch's longest row, at most `MOST_STEPS` of it, with gaps where nothing counts.

    Args:
        outputs: The targets, for their names and units.
        batch: As the source gave it.
        predicted: (B, T, O), the targets first.
        predictive: What distributions stand in `predicted`.
    """
    shape = (*batch.y.shape[:2], 1)
    present = np.ones(shape, np.bool_) if batch.y_mask is None else batch.y_mask.numpy().reshape(*shape[:2], -1)
    row = int(present.any(axis=2).sum(axis=1).argmax())
    names = tuple(f"{output.name} [{output.unit}]" if output.unit else output.name for output in outputs)
    there = present[row, :MOST_STEPS]  # (T, O) or (T, 1)
    points, actual = (
        np.where(there, values[row, :MOST_STEPS, : len(outputs)], np.nan).astype(np.float64)
        for values in (predicted, batch.y.numpy())
    )
    ends = None
    if predictive is not None:  # only of steps that are there: outputs of 0 are no distribution
        ends = np.full((2, *actual.shape), np.nan)
        some = there.any(axis=1)
        ends[:, some] = band(predictive, predicted[row, :MOST_STEPS][some], BAND)
        ends = np.where(there, ends, np.nan)
    return Forecast(names, points, actual, ends)


def print_report(result: Result, console: Console) -> None:
    """Print the tables of a result."""
    for title, header, rows in _tables(result):
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def write_report(
    directory: Path, result: Result, forecast: Forecast | None = None, provenance: Provenance | None = None
) -> list[Path]:
    """Write metrics.json, plots as PNG, and report.html, which needs no other file.

    Args:
        directory: Where to.
        result: What was measured.
        forecast: To be drawn.
        provenance: Of the model: how its loss went, its recipe and where it was made are told too.

    Returns:
        The paths that were written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    metrics = directory / "metrics.json"
    metrics.write_text(json.dumps(result.as_dict(), indent=2, allow_nan=False) + "\n")
    drawn = (_confusion(directory, result), _forecast(directory, forecast), _learning_curve(directory, provenance))
    plots = [path for path in drawn if path]
    page = directory / "report.html"
    page.write_text(_page(result, plots, provenance), encoding="utf-8")
    return [metrics, *plots, page]


def _tables(result: Result) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, header and rows of each table."""
    if isinstance(result, RegressionResult):
        columns = [*result.columns, result.average] if len(result.columns) > 1 else [*result.columns]
        yield "Outputs", ("output", *COLUMN_FIELDS), [_row(column, COLUMN_FIELDS) for column in columns]
        if result.distribution is not None:
            yield from _distribution_tables(result.distribution)
        return
    if isinstance(result, MultiLabelResult):
        yield "Labels", ("label", *LABEL_FIELDS), [_row(one, LABEL_FIELDS) for one in (*result.labels, result.average)]
        return
    yield "Classification", ("metric", "value"), list(_summary(result))
    if len(result.classes) <= MOST_CLASSES:  # metrics.json has them all
        yield "Classes", ("class", *CLASS_FIELDS), [_row(one, CLASS_FIELDS) for one in result.classes]


def _distribution_tables(
    result: DistributionResult,
) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """CRPS and central intervals of each target, and how often labels lay below each quantile."""
    shares = [f"{interval.share:.0%}" for interval in result.targets[0].intervals]
    header = [f"{column} {share}" for share in shares for column in ("in", "width")]
    rows = [
        (
            _visible(t.name),
            _text(t.rows),
            _text(t.crps),
            *(_text(value) for i in t.intervals for value in (i.coverage, i.width)),
        )
        for t in result.targets
    ]
    yield f"Distribution: {result.kind}", ("target", "rows", "crps", *header), rows
    levels = tuple(result.targets[0].calibration)
    below = [(_visible(t.name), *(_text(share) for share in t.calibration.values())) for t in result.targets]
    yield "Share of labels at or below each quantile", ("target", *levels), below


def _summary(result: ClassificationResult) -> Iterator[tuple[str, str]]:
    for field in ("rows", "accuracy", "precision", "recall", "f1", "roc_auc", "log_loss", "bits"):
        yield field, _text(getattr(result, field))
    for n, share in result.top_n.items():
        yield f"top {n}", _text(share)


def _row(item: ColumnResult | ClassResult | LabelResult, fields: Sequence[str]) -> tuple[str, ...]:
    return (_visible(item.name), *(_text(getattr(item, field)) for field in fields))


def _text(value: float | int | None) -> str:
    """Undefined is a dash: a number there would be made up."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _visible(name: str) -> str:
    """A class may be a newline or a blank."""
    return name if name.isprintable() and name.strip() else repr(name)


def _confusion(directory: Path, result: Result) -> Path | None:
    if not isinstance(result, ClassificationResult) or len(result.classes) > MOST_CLASSES:
        return None
    counts = np.array(result.confusion, np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [_visible(one.name) for one in result.classes]
    size = 2.5 + 0.45 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="actual", title=f"Confusion, {result.rows} rows")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="share of the actual class")
    return _save(figure, directory / "confusion.png")


def _forecast(directory: Path, forecast: Forecast | None) -> Path | None:
    if forecast is None:
        return None
    count = len(forecast.names)
    figure = Figure(figsize=(10, 0.6 + 2.2 * count), layout="constrained")
    for number, name in enumerate(forecast.names):
        axes = figure.add_subplot(count, 1, number + 1, ylabel=name)
        axes.plot(forecast.actual[:, number], color="0.4", linewidth=1, label="actual")
        axes.plot(forecast.predicted[:, number], color="tab:blue", linewidth=1, label="predicted")
        if forecast.band is not None:
            low, high = forecast.band[..., number]
            axes.fill_between(range(len(low)), low, high, alpha=0.25, linewidth=0, label=f"{BAND:.0%} interval")
        if number == 0:
            axes.legend(loc="upper right")
    figure.supxlabel("step")
    return _save(figure, directory / "forecast.png")


def _learning_curve(directory: Path, provenance: Provenance | None) -> Path | None:
    """Both losses by epoch, and the epoch whose weights were taken; None if the model does not tell."""
    history = provenance.metrics.get("training") if provenance else None
    if not history:
        return None
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss")
    epochs = range(1, len(history["loss"]) + 1)
    for key, colour in (("loss", "0.4"), ("validation_loss", "tab:blue")):
        axes.plot(
            epochs,
            np.array(history[key], np.float64),
            color=colour,
            linewidth=1,
            marker=".",
            label=key.replace("_", " "),
        )
    axes.axvline(history["best_epoch"], color="tab:green", linewidth=1, linestyle=":", label="best epoch")
    axes.legend(loc="upper right")
    return _save(figure, directory / "learning_curve.png")


def _save(figure: Figure, path: Path) -> Path:
    # No date or version in the file: the same numbers give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _page(result: Result, plots: Sequence[Path], provenance: Provenance | None) -> str:
    """Tables, plots and the recipe in one self-contained page."""
    parts = [_html_table(*table) for table in _tables(result)]
    for path in plots:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<img alt="{path.stem}" src="data:image/png;base64,{data}">')
    if provenance is not None:
        parts += _origin(provenance)
    return PAGE.replace("BODY", "\n".join(parts))


def _origin(provenance: Provenance) -> Iterator[str]:
    """The recipe, and where the model was made."""
    if provenance.config:
        recipe = yaml.safe_dump(provenance.config, sort_keys=False, allow_unicode=True)
        yield f"<h2>Recipe</h2>\n<pre>{html.escape(recipe)}</pre>"
    told = {"data": provenance.data, "created": provenance.created, **provenance.environment, **provenance.libraries}
    rows = [(name, value) for name, value in told.items() if value]
    yield _html_table("Made", ("what", "value"), rows)


def _html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_html_row("th", header), *(_html_row("td", row) for row in rows)]
    return f"<h2>{html.escape(title)}</h2>\n<table>\n" + "\n".join(lines) + "\n</table>"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>Stepcast report</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } img { max-width: 100%; }
</style></head>
<body>
<h1>Report</h1>
BODY
</body>
</html>
"""
