"""Sequences in delimited files, one file each: DL4J's CSVSequenceRecordReader, NumberedFileInputSplit and
SequenceRecordReaderDataSetIterator in one block of configuration.

Nothing is kept but file names and lengths: each batch is read from disk when its turn comes, so that the data may be
larger than memory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Feedback, Output, Task

from .align import Alignment, align
from .batch import Batch
from .csv_example import ExampleFormat
from .moments import Moments, Normalisation, check_resolution
from .numbered import check_pairs, globbed_files, numbered_files
from .plan import epoch_order, plan_batches
from .source import SPLITS, Split

Files = tuple[Path, Path | None]  # of one sequence: features, and labels if they are in a file of their own


class SequenceFiles(BaseModel):
    """The files of one split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: str = Field(description="with numbers: a path with %d, or %03d; without: a glob")
    labels: str | None = Field(default=None, description="the same for label files; None: labels are columns")
    numbers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="first and last number, both inclusive"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.numbers and self.numbers[0] > self.numbers[1]:
            raise ValueError(f"numbers {list(self.numbers)} run backwards")
        return self

    def pairs(self, root: Path) -> list[Files]:
        """Feature file and label file of each sequence; None where one file has both."""
        features = self._files(self.features, root)
        if self.labels is None:
            return [(path, None) for path in features]
        labels = self._files(self.labels, root)
        if self.numbers is None:
            check_pairs(features, labels, (self.features, self.labels))
        return list(zip(features, labels, strict=True))

    def _files(self, pattern: str, root: Path) -> list[Path]:
        return globbed_files(pattern, root) if self.numbers is None else numbered_files(pattern, self.numbers, root)


class CsvSequencesConfig(ExampleFormat):
    """`data: {kind: csv_sequences, ...}`."""

    kind: Literal["csv_sequences"]
    train: SequenceFiles
    validation: SequenceFiles | None = None
    test: SequenceFiles | None = None
    alignment: Alignment = "equal_length"
    feature_names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = Field(default=None, description="regression only")
    normalise: Normalisation = "standard"
    normalise_labels: Normalisation = Field(default="standard", description="regression only")
    indicator: bool = Field(default=False, description="a channel per feature that says: was missing")
    bucket: int = Field(default=0, ge=0, description="batches whose sequences are sorted by length together")
    feedback: tuple[Feedback, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.classes is not None and self.output_names is not None:
            raise ValueError("'output_names' belongs to task 'regression'; outputs of classes are named by 'classes'")
        for split, files in self.splits.items():
            if (files.labels is None) == (self.label_columns is None):
                raise ValueError(f"{split}: give either 'labels' or 'label_columns', and not both")
        return self

    @property
    def splits(self) -> dict[Split, SequenceFiles]:
        """The splits that were configured."""
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: files for split in SPLITS if (files := given[split]) is not None}

    def open(self, *, batch: int, seed: int, root: Path) -> "CsvSequences":
        """Open the files; see `SourceConfig.open`."""
        return CsvSequences(self, batch=batch, seed=seed, root=root)


class CsvSequences:
    """A `Source` of independent sequences, streamed from disk.

    Opening reads every file once: errors come before training starts, and normalisation and lengths from that pass.
    """

    def __init__(self, config: CsvSequencesConfig, *, batch: int, seed: int, root: Path) -> None:
        self._config = config
        self._batch = batch
        self._seed = seed
        self._files = {split: files.pairs(root) for split, files in config.splits.items()}
        first = self._files["train"][0]
        self._widths = [values.shape[1] for values in config.read(*first)]
        self._moments = [Moments(width) for width in self._widths]
        self._steps = {split: [self._scan(split, pair) for pair in pairs] for split, pairs in self._files.items()}
        self._check_equal()
        self.features = self._features()
        self.outputs = self._outputs()

    @property
    def task(self) -> Task:
        return self._config.task

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self._config.class_names if self.task == "classification" else None

    @property
    def readout(self) -> Literal["each", "last"]:
        """Many-to-one: labels are aligned with the end, and every sequence has a single one."""
        single = all(y_steps == 1 for steps in self._steps.values() for _, y_steps in steps)
        return "last" if self._config.alignment == "end" and single else "each"

    @property
    def feedback(self) -> tuple[Feedback, ...]:
        return self._config.feedback

    @property
    def description(self) -> str:
        counts = ", ".join(f"{len(files)} {split}" for split, files in self._files.items())
        return f"csv_sequences {self._config.train.features}: {counts}"

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        """See `Source.batches`; only one batch is in memory at a time."""
        order = epoch_order(self._seed, epoch) if split == "train" else None
        lengths = [max(steps) for steps in self._steps.get(split, [])]
        for indices in plan_batches(lengths, self._batch, bucket=self._config.bucket, order=order):
            examples = [self._config.read(*self._files[split][index]) for index in indices]
            x, y = zip(*examples, strict=True)
            yield align(x, y, self._config.alignment)

    def _scan(self, split: Split, pair: Files) -> tuple[int, int]:
        """Check one example against the first, take its statistics in, and return its lengths."""
        arrays = self._config.read(*pair)
        for path, values, wanted, first in zip(pair, arrays, self._widths, self._files["train"][0], strict=True):
            if values.shape[1] != wanted:
                raise ConfigError(f"{path or pair[0]}: {values.shape[1]} columns, {first or pair[0]} has {wanted}")
        if split == "train":
            for moments, values in zip(self._moments, arrays, strict=True):
                moments.update(values)
        return len(arrays[0]), len(arrays[1])

    def _check_equal(self) -> None:
        """`equal_length` holds for a whole split: else it would depend on the shuffling who meets whom."""
        if self._config.alignment != "equal_length":
            return
        for split, steps in self._steps.items():
            wanted = steps[0][0]
            for pair, lengths in zip(self._files[split], steps, strict=True):
                for path, got in zip(pair, lengths, strict=True):
                    if got != wanted:
                        raise ConfigError(
                            f"{path or pair[0]}: {got} steps, {self._files[split][0][0]} has {wanted}. "
                            "Set data.alignment to start or end for sequences of different lengths."
                        )

    def _features(self) -> tuple[Feature, ...]:
        names = _names("feature_names", self._config.feature_names, "x", self._widths[0])
        for name, column in zip(
            names, zip(self._moments[0].mean, self._moments[0].deviation, strict=True), strict=True
        ):
            check_resolution(f"feature {name!r}", *map(float, column))
        numbers = self._moments[0].normalisation(self._config.normalise)
        config = self._config
        return tuple(
            Feature(name=name, mean=mean, scale=scale, missing=config.missing, indicator=config.indicator)
            for name, (mean, scale) in zip(names, numbers, strict=True)
        )

    def _outputs(self) -> tuple[Output, ...]:
        if (names := self._config.class_names) is not None:  # of classes, or of labels
            return tuple(Output(name=name) for name in names)
        names = _names("output_names", self._config.output_names, "y", self._widths[1])
        numbers = self._moments[1].normalisation(self._config.normalise_labels)
        return tuple(Output(name=n, mean=mean, scale=scale) for n, (mean, scale) in zip(names, numbers, strict=True))


def _names(key: str, given: tuple[str, ...] | None, letter: str, width: int) -> tuple[str, ...]:
    if given is None:
        return tuple(f"{letter}_{number}" for number in range(width))
    if len(given) != width:
        raise ConfigError(f"data.{key} has {len(given)} names, the files have {width} columns")
    return given
