"""What travels from a reader to the loss: padded sequences and what of them is real."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from stepcast.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences of T steps.

    A step is absent (x_mask 0: padding, a gap) or present; a reading inside a present step may still be missing, then
    it is NaN in `x`. Labels have a mask of their own, per step or per output. Without x_mask all steps are present;
    labels without y_mask are present wherever their step is. Rows are independent sequences, unless `starts` is
    False: such a row goes on where the same row of the batch before ended (a lane of a long series), and the trainer
    carries its state over.
    """

    x: Tensor  # (B, T, F) float32
    y: Tensor  # (B, T, O) float32; classification: one-hot
    x_mask: Tensor | None = None  # (B, T) bool
    y_mask: Tensor | None = None  # (B, T) or (B, T, O) bool
    starts: Tensor | None = None  # (B,) bool; None: every row starts a sequence
    # States that rows start from, by layer and key, (B, ...); zeros for all that is not there.
    begin: Mapping[str, Mapping[str, Tensor]] | None = field(default=None, kw_only=True)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor changed: moved to a device, or some rows of it."""
        masks = (None if t is None else change(t) for t in (self.x_mask, self.y_mask, self.starts))
        begin = {name: {key: change(t) for key, t in layer.items()} for name, layer in (self.begin or {}).items()}
        return Batch(change(self.x), change(self.y), *masks, begin=begin or None)


def check_lanes(before: int, batch: Batch) -> None:
    """See that the rows of a batch which goes on are those of the batch before.

    Args:
        before: Rows of that one.
        batch: With `starts`.

    Raises:
        ConfigError: another number of rows: which of them goes on is not known.
    """
    if batch.starts is not None and not batch.starts.all() and batch.x.shape[0] != before:
        got = f"{before} rows, the next one has {batch.x.shape[0]}"
        raise ConfigError(f"data: lanes of {got}. Give every batch of a split the same rows, masked where a lane ends.")
