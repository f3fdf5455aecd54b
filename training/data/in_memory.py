"""Sequences that fit into memory: what a Python source of independent sequences is made of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from stepcast.manifest import Feature, Feedback, Output, Task

from .align import Alignment, Array, align
from .batch import Batch
from .plan import epoch_order, plan_batches
from .source import SPLITS, Split

Made = TypeVar("Made")


class Looked(Sequence[Array]):
    """Sequences of vectors that are kept as their places in a table, and looked up one by one when they are asked for.

    A text of word vectors takes 4 bytes a word so, instead of 4 for each number of each vector.

    Args:
        places: Of each sequence, [T] of them.
        table: (V, F).
    """

    def __init__(self, places: Sequence[Sequence[int]], table: Array) -> None:
        self.table = table
        self._places = np.concatenate([np.asarray(one, np.int32) for one in places] or [np.zeros(0, np.int32)])
        self.ends = np.cumsum([len(one) for one in places], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> Array:  # type: ignore[override]
        """Vectors [T, F]."""
        number = range(len(self))[number]  # from the end if it is negative; an IndexError beyond
        start = self.ends[number - 1] if number else 0
        return np.asarray(self.table[self._places[start : self.ends[number]]])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of each sequence."""
        return np.diff(self.ends, prepend=0)

    @property
    def nbytes(self) -> int:
        """What the sequences take beside the table."""
        return self._places.nbytes + self.ends.nbytes


@dataclass(frozen=True)
class Examples:
    """Sequences of one split: features [T, F] and labels [T', O] of each, NaN where missing."""

    x: Sequence[Array]
    y: Sequence[Array]

    @cached_property
    def steps(self) -> list[int]:
        """The longer of each example's two sequences."""
        return [int(max(pair)) for pair in zip(_lengths(self.x), _lengths(self.y), strict=True)]


def _lengths(sequences: Sequence[Array]) -> Sequence[int] | NDArray[np.int64]:
    return sequences.lengths if isinstance(sequences, Looked) else [len(one) for one in sequences]


@dataclass(frozen=True)
class InMemory:
    """A `Source` of independent sequences held in memory."""

    splits: Mapping[Split, Examples]
    features: tuple[Feature, ...]
    outputs: tuple[Output, ...]
    task: Task
    batch: int
    seed: int
    classes: tuple[str, ...] | None = None
    readout: Literal["each", "last"] = "each"
    alignment: Alignment = "end"
    bucket: int = 0
    feedback: tuple[Feedback, ...] = ()
    description: str = ""

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        """See `Source.batches`."""
        examples = self.splits.get(split, Examples([], []))
        order = epoch_order(self.seed, epoch) if split == "train" else None
        for indices in plan_batches(examples.steps, self.batch, bucket=self.bucket, order=order):
            yield align([examples.x[i] for i in indices], [examples.y[i] for i in indices], self.alignment)


class Classified(InMemory):
    """A `Source` of one feature and one of several classes, of whole sequences or of each step.

    Args:
        splits: The sequences.
        feature: What stands in them.
        classes: Names, in the order of the labels' columns.
        batch: Sequences per batch.
        seed: Of their order.
        description: Where they come from.
        bucket: See `plan_batches`.
        readout: "each" where every step has a class of its own; "last": one per sequence.
    """

    def __init__(
        self,
        splits: Mapping[Split, Examples],
        feature: Feature,
        classes: Sequence[str],
        *,
        batch: int,
        seed: int,
        description: str,
        bucket: int = 0,
        readout: Literal["each", "last"] = "last",
    ) -> None:
        super().__init__(
            splits=splits,
            features=(feature,),
            outputs=tuple(Output(name=name) for name in classes),
            task="classification",
            classes=tuple(classes),
            readout=readout,
            alignment="end" if readout == "last" else "start",
            batch=batch,
            seed=seed,
            bucket=bucket,
            description=description,
        )


def in_splits(make: Callable[[int], Made], *, train: int, validation: int, test: int) -> dict[Split, Made]:
    """What `make` gives for the number of examples of each split, made in this order."""
    return {split: make(count) for split, count in zip(SPLITS, (train, validation, test), strict=True)}
