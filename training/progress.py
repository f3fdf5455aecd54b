"""What a training run tells while it runs: a bar with the time left in the terminal, curves in TensorBoard."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from stepcast.errors import ConfigError


class Progress:
    """Reports epochs; use as a context manager.

    Args:
        epochs: Of the whole run.
        done: Epochs an earlier run has done.
        console: Where to; None: nowhere.
        tensorboard: Directory for event files; None: none.
    """

    def __init__(
        self, epochs: int, *, done: int = 0, console: Console | None = None, tensorboard: Path | None = None
    ) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._console = console or Console(quiet=True)
        self._bars = Bars(*columns, console=self._console, disable=console is None, transient=True)
        self._task = self._bars.add_task("training", total=epochs, completed=done)
        self._writer = _writer(tensorboard) if tensorboard else None
        self._segments = 0

    @classmethod
    def silent(cls) -> "Progress":
        """Reports nothing."""
        return cls(0)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if self._writer is not None:
            self._writer.close()

    def segment(self, epoch: int) -> None:
        """One more segment of an epoch (from 0) is done."""
        self._segments += 1
        self._bars.update(self._task, description=f"epoch {epoch + 1}, segment {self._segments}")

    def epoch(self, number: int, train_loss: float, validation_loss: float | None, seconds: float) -> None:
        """Epoch `number` (from 1) is done."""
        self._segments = 0
        validation = "" if validation_loss is None else f"  validation {validation_loss:.4f}"
        self._console.print(
            f"epoch {number:3d}  training {train_loss:.4f}{validation}  {seconds:.1f} s", highlight=False
        )
        self._bars.update(self._task, completed=number)
        if self._writer is not None:
            self._writer.add_scalar("loss/training", train_loss, number)
            if validation_loss is not None:
                self._writer.add_scalar("loss/validation", validation_loss, number)


def _writer(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("--tensorboard needs TensorBoard. pip install 'stepcast[tensorboard]'") from error
    return SummaryWriter(str(directory))
