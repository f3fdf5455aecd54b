"""Sequences that fit into memory: what a Python source of independent sequences is made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from stepcast.manifest import Feature, Feedback, Output

from .align import Alignment, Array, align
from .batch import Batch
from .plan import epoch_order, plan_batches
from .source import Split


@dataclass(frozen=True)
class Examples:
    """Sequences of one split: features [T, F] and labels [T', O] of each, NaN where missing."""

    x: list[Array]
    y: list[Array]


@dataclass(frozen=True)
class InMemory:
    """A `Source` of independent sequences held in memory."""

    splits: Mapping[Split, Examples]
    features: tuple[Feature, ...]
    outputs: tuple[Output, ...]
    task: Literal["regression", "classification"]
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
        lengths = [max(len(x), len(y)) for x, y in zip(examples.x, examples.y, strict=True)]
        order = epoch_order(self.seed, epoch) if split == "train" else None
        for indices in plan_batches(lengths, self.batch, bucket=self.bucket, order=order):
            yield align([examples.x[i] for i in indices], [examples.y[i] for i in indices], self.alignment)
