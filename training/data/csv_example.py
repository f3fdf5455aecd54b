"""One example out of one or two delimited files: features and labels, classes as one-hot."""

from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stepcast.errors import ConfigError
from stepcast.manifest import Task

from .align import one_hot
from .csv_file import NO_CLASSES, Classes, read_csv

Numbers = NDArray[np.float64]


class ExampleFormat(BaseModel):
    """How the files of an example are to be read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Task
    classes: tuple[str, ...] | Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="names, or how many; a label is an index into them, or one of the names. "
        "Of multi_label the names of the labels, which have a column of 0 and 1 each",
    )
    label_columns: tuple[int, ...] | None = Field(
        default=None, description="labels are in the feature files, in these columns; from 0, or -1 for the last"
    )
    skip_rows: int = Field(default=0, ge=0)
    label_skip_rows: int | None = Field(default=None, ge=0, description="default: skip_rows")
    delimiter: str = Field(default=",", min_length=1, description="a literal string, no regular expression")
    missing: Literal["refuse", "mean", "zero", "hold"] = "refuse"

    @model_validator(mode="after")
    def _classes_fit(self) -> Self:
        if (self.task == "regression") != (self.classes is None):
            raise ValueError("'classes' belongs to tasks 'classification' and 'multi_label', and only to them")
        if self.task == "classification" and self.label_columns is not None and len(self.label_columns) != 1:
            raise ValueError(f"'label_columns' has {len(self.label_columns)} columns, a class index is one")
        return self

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes; their numbers if only a count was given."""
        if isinstance(self.classes, int):
            return tuple(str(number) for number in range(self.classes))
        return self.classes

    def read(self, path: Path, label_path: Path | None) -> tuple[Numbers, Numbers]:
        """Read one example: features [T, F] and labels [T', O], NaN where missing; float64, for their statistics.

        Args:
            path: The features, and the labels too if there is no other file.
            label_path: The labels.

        Raises:
            ConfigError: see `read_csv`; or a missing reading that is not allowed, columns that are not there, or a
                class that is not one.
        """
        named = self._named_labels(self.label_columns or ()) if label_path is None else NO_CLASSES
        values = read_csv(path, skip_rows=self.skip_rows, delimiter=self.delimiter, classes=named)
        columns = self._label_columns(values, path) if label_path is None else []
        self._check_missing(values, columns, path)
        features = np.delete(values, columns, axis=1)
        if label_path is None:
            return features, self._labels(values[:, columns], path, self.skip_rows)
        skip = self.skip_rows if self.label_skip_rows is None else self.label_skip_rows
        labels = read_csv(label_path, skip_rows=skip, delimiter=self.delimiter, classes=self._named_labels((0,)))
        return features, self._labels(labels, label_path, skip)

    def _named_labels(self, columns: tuple[int, ...]) -> Classes:
        """What may stand in label columns beside numbers."""
        indexed = self.task == "classification"
        return Classes(self.classes, columns) if indexed and isinstance(self.classes, tuple) else NO_CLASSES

    def _label_columns(self, values: Numbers, path: Path) -> list[int]:
        """Where the labels are, counted from 0."""
        width, wanted = values.shape[1], self.label_columns or ()
        if not all(-width <= column < width for column in wanted):
            raise ConfigError(f"{path}: {width} columns, data.label_columns is {list(wanted)}")
        columns = [column % width for column in wanted]
        if len(set(columns)) != len(columns):
            raise ConfigError(f"{path}: data.label_columns {list(wanted)} names a column twice")
        if len(columns) == width:
            raise ConfigError(f"{path}: {width} columns, data.label_columns {list(wanted)} leaves no features")
        return columns

    def _check_missing(self, values: Numbers, label_columns: list[int], path: Path) -> None:
        if self.missing != "refuse":
            return
        missing = np.isnan(values)
        missing[:, label_columns] = False
        if missing.any():
            row, column = np.argwhere(missing)[0]
            where = f"{path}, line {self.skip_rows + row + 1}, column {column + 1}"
            raise ConfigError(f"{where}: a missing value. Set data.missing to mean, zero or hold.")

    def _labels(self, labels: Numbers, path: Path, skipped: int) -> Numbers:
        """Numbers as they are; class indices [T, 1] as one-hot [T, O], a missing one as a row of NaN."""
        names = self.class_names
        if names is None:
            return labels
        if self.task == "multi_label":
            self._check_labels(labels, len(names), path, skipped)
            return labels
        if labels.shape[1] != 1:
            raise ConfigError(f"{path}: {labels.shape[1]} label columns, a class index is one")
        column = labels[:, 0]
        there = ~np.isnan(column)
        wrong = np.flatnonzero(there & ((column != np.round(column)) | (column < 0) | (column >= len(names))))
        if wrong.size:
            where = f"{path}, line {skipped + wrong[0] + 1}"
            raise ConfigError(f"{where}: class {column[wrong[0]]:g}, wanted an index in 0..{len(names) - 1}")
        rows = one_hot(np.where(there, column, 0).astype(np.int64), len(names))
        return np.where(there[:, None], rows, np.nan)

    def _check_labels(self, labels: Numbers, count: int, path: Path, skipped: int) -> None:
        """A column for each label, and nothing but 0 and 1 in it where it is known."""
        if labels.shape[1] != count:
            raise ConfigError(f"{path}: {labels.shape[1]} label columns, data.classes names {count} labels")
        wrong = np.argwhere(~np.isin(labels, (0, 1)) & ~np.isnan(labels))
        if len(wrong):
            row, column = wrong[0]
            where = f"{path}, line {skipped + row + 1}"
            raise ConfigError(f"{where}: label {column + 1} is {labels[row, column]:g}, wanted 0 or 1")
