"""What travels from a reader to the loss: padded sequences and what of them is real."""

from dataclasses import dataclass

from torch import Tensor


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
