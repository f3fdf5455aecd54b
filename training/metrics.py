"""Masked metrics, accumulated batch by batch: only what the mask calls present counts (DL4J's evalTimeSeries).

Two accumulators with one shape: `update` with every batch, `result` at the end. A metric that the data does not
define (the precision of a class that was never predicted, the R² of a constant) is None and left out of averages.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcast.manifest import Output, Task

from .probabilistic import DistributionResult
from .roc import Scores, Thresholds

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
TINY = 1e-10
MOST_CLASSES = 40  # Tables and confusion matrices of more classes are no longer read by anybody.


class Metrics(Protocol):
    """What `evaluate` accumulates."""

    def update(self, predicted: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> None:
        """Take in one batch.

        Args:
            predicted: (..., O), in the caller's units; probabilities for classes.
            labels: (..., O); one-hot for classes.
            mask: (...) or (..., O): present where it is exactly 1 (True). None: everything is present.

        Raises:
            ValueError: shapes that do not fit, or a prediction or label at a present place that is NaN.
        """
        ...

    def result(self) -> "Result":
        """The metrics of everything taken in so far."""
        ...


def metrics_for(outputs: Sequence[Output], classes: Sequence[str] | None, task: Task = "regression") -> Metrics:
    """The accumulator for a model: by class if there are classes, by label if there are labels, else by output."""
    names = [output.name for output in outputs]
    if task == "multi_label":
        return MultiLabelMetrics(names)
    return ClassificationMetrics(classes) if classes else RegressionMetrics(names)


@dataclass(frozen=True)
class ClassResult:
    """One class against all others."""

    name: str
    rows: int
    precision: float | None
    recall: float | None
    f1: float | None
    roc_auc: float | None


@dataclass(frozen=True)
class ClassificationResult:
    """Precision, recall, F1 and ROC-AUC are averages over the classes for which they are defined (macro).

    Attributes:
        rows: Steps that counted.
        top_n: Share of rows whose class was among the n most probable, by n.
        log_loss: Cross entropy in nats per row; `bits` is the same in bits. None if predictions are no probabilities.
        confusion: Rows by [actual class][predicted class].
    """

    rows: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    roc_auc: float | None
    top_n: dict[int, float]
    log_loss: float | None
    bits: float | None
    classes: tuple[ClassResult, ...]
    confusion: tuple[tuple[int, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"task": "classification", **asdict(self)}

    def summary(self) -> dict[str, Any]:
        """`as_dict` for a manifest: without what grows with the number of classes where there are many."""
        values = self.as_dict()
        if len(self.classes) > MOST_CLASSES:
            del values["classes"], values["confusion"]
        return values


@dataclass(frozen=True)
class LabelResult:
    """One label of several that may be there together. `there` counts the rows that have it."""

    name: str
    rows: int
    there: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    roc_auc: float | None
    log_loss: float | None


@dataclass(frozen=True)
class MultiLabelResult:
    """Each label, and the averages over the labels for which a metric is defined."""

    average: LabelResult
    labels: tuple[LabelResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"task": "multi_label", **asdict(self)}

    def summary(self) -> dict[str, Any]:
        """`as_dict`: labels are few."""
        return self.as_dict()


@dataclass(frozen=True)
class ColumnResult:
    """One output column. `rse` is the squared error relative to that of the labels' mean; `r2` is 1 - rse."""

    name: str
    rows: int
    mse: float | None
    mae: float | None
    rmse: float | None
    rse: float | None
    r2: float | None
    correlation: float | None


@dataclass(frozen=True)
class RegressionResult:
    """Each column, and the averages over the columns for which a metric is defined.

    Attributes:
        distribution: Of a model that forecasts one.
    """

    average: ColumnResult
    columns: tuple[ColumnResult, ...]
    distribution: DistributionResult | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {"task": "regression", **asdict(self)}
        if self.distribution is None:
            del values["distribution"]
        return values

    def summary(self) -> dict[str, Any]:
        """`as_dict`: outputs are few."""
        return self.as_dict()


Result = ClassificationResult | MultiLabelResult | RegressionResult


class MultiLabelMetrics:
    """Every label by itself, there above a probability of 0.5 (DL4J: EvaluationBinary); masks may be per label."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = {label: ClassificationMetrics([label]) for label in labels}

    def update(self, predicted: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> None:
        """See `Metrics.update`; labels are 0 or 1."""
        p, y, present = _entries(predicted, labels, mask, len(self._labels))
        for column, metrics in enumerate(self._labels.values()):
            there = present[:, column]
            metrics.update(p[there, column, None], y[there, column, None])

    def result(self) -> MultiLabelResult:
        """See `Metrics.result`."""
        labels = tuple(_label(metrics.result()) for metrics in self._labels.values())
        fields = ("accuracy", "precision", "recall", "f1", "roc_auc", "log_loss")
        average = {field: _mean([getattr(label, field) for label in labels]) for field in fields}
        rows = max(label.rows for label in labels)
        return MultiLabelResult(LabelResult("average", rows, sum(label.there for label in labels), **average), labels)


def _label(result: ClassificationResult) -> LabelResult:
    """One label, of what was measured as two classes: not there, and there."""
    there = result.classes[1]
    return LabelResult(
        name=there.name,
        rows=result.rows,
        there=there.rows,
        accuracy=result.accuracy,
        precision=there.precision,
        recall=there.recall,
        f1=there.f1,
        roc_auc=there.roc_auc,
        log_loss=result.log_loss,
    )


class ClassificationMetrics:
    """Confusion counts, ranks and scores.

    Args:
        classes: Names. A single one is DL4J's single output: its probability, threshold 0.5, two classes.
        top_n: The n of the top-n accuracies; those not below the number of classes are left out.
        roc_steps: 0 keeps every score and is exact; n counts scores between n + 1 thresholds and needs no memory.
    """

    def __init__(self, classes: Sequence[str], *, top_n: Sequence[int] = (2, 3, 5), roc_steps: int = 0) -> None:
        self.classes = (f"not {classes[0]}", classes[0]) if len(classes) == 1 else tuple(classes)
        count = len(self.classes)
        self._given = len(classes)
        self._confusion = np.zeros((count, count), np.int64)  # (actual, predicted)
        self._top = dict.fromkeys((n for n in top_n if n < count), 0)
        self._log_loss = 0.0
        self._probabilities = True
        self._scores = Thresholds(count, roc_steps) if roc_steps else Scores(count)

    def update(self, predicted: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> None:
        """See `Metrics.update`; masks per output are refused, a class is one answer."""
        p, y, present = _entries(predicted, labels, mask, self._given)
        if not np.array_equal(present.any(axis=1), present.all(axis=1)):
            raise ValueError("a mask per output has no meaning for classes. Give one value per step.")
        p, y = p[present[:, 0]], y[present[:, 0]]  # (R, O)
        if self._given == 1:
            p, y = np.hstack([1 - p, p]), np.hstack([1 - y, y])
        empty = np.flatnonzero(y.max(axis=1, initial=0) <= 0)
        if empty.size:
            raise ValueError(f"present row {empty[0]} has no class, its label is all zero. Mask it.")
        rivals = (y == y.max(axis=1, keepdims=True, initial=0)).sum(axis=1)
        several = np.flatnonzero(rivals > 1)
        if several.size:
            raise ValueError(f"present row {several[0]} has {rivals[several[0]]} classes. Give one, or mask it.")
        self._count(p, y.argmax(axis=1))

    def _count(self, p: Floats, actual: NDArray[np.int64]) -> None:
        count = len(self.classes)
        # The single output is class 1 only above 0.5, and argmax gives a tie to class 0: the same rule.
        pairs = actual * count + p.argmax(axis=1)
        self._confusion += np.bincount(pairs, minlength=count * count).reshape(count, count)
        own = p[np.arange(len(p)), actual]
        # Equal scores stand in the order of the classes, as argmax has them.
        earlier = np.arange(p.shape[1]) < actual[:, None]
        above = ((p > own[:, None]) | ((p == own[:, None]) & earlier)).sum(axis=1)
        for n in self._top:
            self._top[n] += int((above < n).sum())
        self._probabilities &= bool(((p >= 0) & (p <= 1 + 1e-6)).all())
        self._log_loss -= float(np.log(own.clip(TINY, 1)).sum())
        self._scores.update(p, actual)

    def result(self) -> ClassificationResult:
        """See `Metrics.result`."""
        rows = int(self._confusion.sum())
        classes = tuple(self._class(number) for number in range(len(self.classes)))
        log_loss = _ratio(self._log_loss, rows) if self._probabilities else None
        return ClassificationResult(
            rows=rows,
            accuracy=_ratio(float(np.trace(self._confusion)), rows),
            precision=_mean([one.precision for one in classes]),
            recall=_mean([one.recall for one in classes]),
            f1=_mean([one.f1 for one in classes]),
            roc_auc=_mean([one.roc_auc for one in classes]),
            top_n={n: hits / rows for n, hits in self._top.items() if rows},
            log_loss=log_loss,
            bits=None if log_loss is None else log_loss / float(np.log(2)),
            classes=classes,
            confusion=tuple(tuple(map(int, row)) for row in self._confusion),
        )

    def _class(self, number: int) -> ClassResult:
        hits = float(self._confusion[number, number])
        predicted, actual = float(self._confusion[:, number].sum()), float(self._confusion[number].sum())
        return ClassResult(
            name=self.classes[number],
            rows=int(actual),
            precision=_ratio(hits, predicted),
            recall=_ratio(hits, actual),
            f1=_ratio(2 * hits, predicted + actual),
            roc_auc=self._scores.area(number),
        )


class RegressionMetrics:
    """Errors, deviations and co-deviations per column, merged so that large means cost no digits."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        size = len(self.columns)
        self._rows = np.zeros(size)
        self._absolute = np.zeros(size)
        self._squared = np.zeros(size)
        self._means = np.zeros((2, size))  # (predicted or label, column)
        self._deviations = np.zeros((3, size))  # sums of products around the means: pp, yy, py

    def update(self, predicted: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> None:
        """See `Metrics.update`."""
        p, y, present = _entries(predicted, labels, mask, len(self.columns))
        rows = present.sum(axis=0)
        error = p - y  # 0 where absent, as both are
        self._absolute += np.abs(error).sum(axis=0)
        self._squared += (error**2).sum(axis=0)
        means = np.stack([p.sum(axis=0), y.sum(axis=0)]) / np.maximum(rows, 1)
        dp, dy = (np.where(present, v - m, 0.0) for v, m in zip((p, y), means, strict=True))
        self._merge(rows, means, np.stack([(dp * dp).sum(0), (dy * dy).sum(0), (dp * dy).sum(0)]))

    def _merge(self, rows: NDArray[np.int64], means: Floats, deviations: Floats) -> None:
        """Chan, Golub and LeVeque (1983), for covariances too."""
        total = np.maximum(self._rows + rows, 1)
        shift = means - self._means
        between = np.stack([shift[0] ** 2, shift[1] ** 2, shift[0] * shift[1]])
        self._deviations += deviations + between * self._rows * rows / total
        self._means += shift * rows / total
        self._rows += rows

    def result(self) -> RegressionResult:
        """See `Metrics.result`."""
        columns = tuple(self._column(number) for number in range(len(self.columns)))
        average = {
            field: _mean([getattr(column, field) for column in columns])
            for field in ("mse", "mae", "rmse", "rse", "r2", "correlation")
        }
        rows = max((column.rows for column in columns), default=0)
        return RegressionResult(ColumnResult(name="average", rows=rows, **average), columns)

    def _column(self, number: int) -> ColumnResult:
        rows = float(self._rows[number])
        pp, yy, py = map(float, self._deviations[:, number])
        squared = float(self._squared[number])
        mse, rse = _ratio(squared, rows), _ratio(squared, yy)
        return ColumnResult(
            name=self.columns[number],
            rows=int(rows),
            mse=mse,
            mae=_ratio(float(self._absolute[number]), rows),
            rmse=None if mse is None else mse**0.5,
            rse=rse,
            r2=None if rse is None else 1 - rse,
            correlation=_ratio(py, (pp * yy) ** 0.5),
        )


def _entries(
    predicted: ArrayLike, labels: ArrayLike, mask: ArrayLike | None, size: int
) -> tuple[Floats, Floats, Bools]:
    """Predictions, labels and presence as (R, O); NaN is allowed only where nothing is present."""
    p, y = np.asarray(predicted, np.float64), np.asarray(labels, np.float64)
    if p.shape != y.shape or p.shape[-1] != size:
        raise ValueError(f"predictions are {list(p.shape)}, labels {list(y.shape)}, outputs {size}")
    present = presence(mask, p.shape)
    p, y, present = p.reshape(-1, size), y.reshape(-1, size), present.reshape(-1, size)
    for what, values in (("prediction", p), ("label", y)):
        wrong = np.argwhere(present & ~np.isfinite(values))
        if len(wrong):
            row, column = wrong[0]
            raise ValueError(f"the {what} in row {row}, output {column} is {values[row, column]}")
    return np.where(present, p, 0.0), np.where(present, y, 0.0), present


def presence(mask: ArrayLike | None, shape: tuple[int, ...]) -> Bools:
    """Which entries (..., O) count: all without a mask, else where a mask (...) or (..., O) is exactly 1."""
    if mask is None:
        return np.ones(shape, np.bool_)
    mask = np.asarray(mask)
    if mask.shape not in (shape, shape[:-1]):
        raise ValueError(f"mask is {list(mask.shape)}, predictions are {list(shape)}")
    present: Bools = mask == 1
    return present if mask.shape == shape else np.repeat(present[..., None], shape[-1], axis=-1)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
