"""What every data source gives to the trainer, and how a configuration opens one.

csv_sequences, table and python are three answers to this one question. The trainer knows nothing else about
data: it reads batches, and the exporter copies the descriptions into the manifest.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from stepcast.manifest import Feature, Feedback, Output, Task

from .batch import Batch

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@runtime_checkable
class Source(Protocol):
    """Sequences, and what they mean.

    Values travel raw, in the units of `features` and `outputs`: their `mean` and `scale` are applied by the
    network (and so end up inside the exported graph), not by the source. A missing reading is NaN.

    Attributes:
        features: What stands in the last axis of `Batch.x`, in order; the widths sum to F.
        outputs: What stands in the last axis of `Batch.y`, in order; O of them.
        task: "classification" has one-hot labels and as many `classes` as outputs; "multi_label" a 0 or 1 per output.
        classes: Names of the classes; None without a choice between them.
        readout: "last" where only the last step of a sequence carries a label (many-to-one).
        feedback: Which outputs become which features when the model runs free.
        every_s: Seconds from one step to the next. A source without a clock has no such attribute.
        description: One line on where the data came from, for the manifest's provenance.
    """

    @property
    def features(self) -> tuple[Feature, ...]: ...

    @property
    def outputs(self) -> tuple[Output, ...]: ...

    @property
    def task(self) -> Task: ...

    @property
    def classes(self) -> tuple[str, ...] | None: ...

    @property
    def readout(self) -> Literal["each", "last"]: ...

    @property
    def feedback(self) -> tuple[Feedback, ...]: ...

    @property
    def description(self) -> str: ...

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        """One pass over a split, from its beginning; may be called again at any time.

        The same (split, epoch) gives the same batches in the same order, in every process: that is what makes
        a resumed run equal to an unbroken one. Only "train" may be shuffled, anew with each epoch. A split
        that was not configured yields nothing.

        Sequences are independent unless a batch says otherwise: in long contiguous series row b continues row
        b of the batch before wherever `Batch.starts[b]` is False (a lane), and the trainer carries its state
        over.
        """
        ...


class SourceConfig(Protocol):
    """The `data:` block of a training configuration: a frozen pydantic class with a literal `kind`."""

    def open(self, *, batch: int, seed: int, root: Path) -> Source:
        """Open the source.

        Args:
            batch: Rows per batch; the last one may be smaller.
            seed: Of the run; shuffling derives from it and from the epoch.
            root: What relative paths are relative to.

        Raises:
            ConfigError: the configuration and the files contradict each other.
        """
        ...
