"""The area under each class's ROC curve, exact from all scores or nearly so from counts."""

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

Floats = NDArray[np.float64]


class Scores:
    """Every score, for the exact area under each class's ROC curve: 4 bytes per row and class."""

    def __init__(self, classes: int) -> None:
        self._p: list[NDArray[np.float32]] = [np.zeros((0, classes), np.float32)]
        self._actual: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]

    def update(self, p: Floats, actual: NDArray[np.int64]) -> None:
        """Take in probabilities (R, O) and class indices (R,)."""
        self._p.append(p.astype(np.float32))
        self._actual.append(actual)

    def area(self, number: int) -> float | None:
        """ROC-AUC of one class against the rest; None unless there are rows of both."""
        own = np.concatenate(self._actual) == number
        if own.all() or not own.any():
            return None
        return float(roc_auc_score(own, np.concatenate([p[:, number] for p in self._p])))


class Thresholds:
    """Scores counted between equidistant thresholds, as DL4J's ROC with steps: constant memory, nearly exact."""

    def __init__(self, classes: int, steps: int) -> None:
        self._steps = steps
        self._counts = np.zeros((2, classes, steps + 1), np.int64)  # (rest or own, class, bin)

    def update(self, p: Floats, actual: NDArray[np.int64]) -> None:
        """Take in probabilities (R, O) and class indices (R,)."""
        bins = np.floor(p.clip(0, 1) * self._steps).astype(np.int64)
        for number in range(p.shape[1]):
            np.add.at(self._counts, ((actual == number).astype(np.int64), number, bins[:, number]), 1)

    def area(self, number: int) -> float | None:
        """ROC-AUC of one class against the rest: scores in one bin count as equal."""
        rest, own = self._counts[:, number].astype(np.float64)
        below = np.cumsum(rest) - rest
        pairs = float(own.sum() * rest.sum())
        return float((own * (below + rest / 2)).sum()) / pairs if pairs else None
