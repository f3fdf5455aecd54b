"""Sequences of different lengths to padded arrays with masks: equal_length, start and end alignment.

The arrays and masks are those of DL4J's SequenceRecordReaderDataSetIterator, except that what it pads silently or
finds out by an index error is refused here.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch import Batch

Alignment = Literal["equal_length", "start", "end"]
Array = NDArray[np.float32]
Values = NDArray[np.float32] | NDArray[np.float64]  # of a file; a batch is float32
Mask = NDArray[np.bool_]


def align(features: Sequence[Values], labels: Sequence[Values], alignment: Alignment) -> Batch:
    """Pad B examples to one length and say what of it is real.

    With L_i the longer of an example's two sequences and T the longest of all, padding from L_i to T always goes at
    the end; the shorter of the two starts with the longer one (`start`) or ends with it (`end`). A side whose
    sequences all have length T gets no mask; labels beside masked features get ones, for without a mask they would
    count where features are only. A label that is NaN is absent too: its step if all of the step's labels are
    missing, else only that output, and then `y_mask` is per output.

    Args:
        features: B arrays [T_i, F].
        labels: B arrays [T'_i, O].
        alignment: `equal_length` wants one length everywhere.

    Raises:
        ValueError: nothing to align, a sequence without steps, or different lengths under `equal_length`.
    """
    if not features or len(features) != len(labels):
        raise ValueError(f"{len(features)} feature sequences, but {len(labels)} label sequences")
    x_steps, y_steps = [len(one) for one in features], [len(one) for one in labels]
    _check_lengths(x_steps, y_steps, alignment)
    ends = [max(pair) for pair in zip(x_steps, y_steps, strict=True)]
    x, x_mask = _pad(features, ends, alignment)
    y, y_mask = _pad(labels, ends, alignment)
    if y_mask is None and x_mask is not None:
        y_mask = np.ones_like(x_mask)
    missing = np.isnan(y)
    if missing.any():
        y, y_mask = np.where(missing, np.float32(0), y), _without(missing, y_mask)
    return Batch(torch.from_numpy(x), torch.from_numpy(y), _mask(x_mask), _mask(y_mask))


def _check_lengths(x_steps: list[int], y_steps: list[int], alignment: Alignment) -> None:
    for row, pair in enumerate(zip(x_steps, y_steps, strict=True)):
        if 0 in pair:
            raise ValueError(f"example {row} has no steps")
        if alignment == "equal_length" and pair != (x_steps[0], x_steps[0]):
            raise ValueError(
                f"example {row} has {pair[0]} feature and {pair[1]} label steps, "
                f"wanted {x_steps[0]} of both. Use alignment start or end for lengths that differ."
            )


def _pad(sequences: Sequence[Values], ends: list[int], alignment: Alignment) -> tuple[Array, Mask | None]:
    steps = max(ends)
    padded = np.zeros((len(sequences), steps, sequences[0].shape[1]), np.float32)  # (B, T, F)
    mask = np.zeros((len(sequences), steps), np.bool_)  # (B, T)
    for row, (sequence, end) in enumerate(zip(sequences, ends, strict=True)):
        start = end - len(sequence) if alignment == "end" else 0
        padded[row, start : start + len(sequence)] = sequence
        mask[row, start : start + len(sequence)] = True
    return padded, None if mask.all() else mask


def _without(missing: Mask, mask: Mask | None) -> Mask:
    """The mask with missing labels taken out: (B, T) if whole steps are missing, (B, T, O) if single outputs are."""
    step: Mask = np.all(missing, axis=-1)  # (B, T)
    present = ~step if mask is None else mask & ~step
    if np.array_equal(np.any(missing, axis=-1), step):
        return present
    return present[..., None] & ~missing


def _mask(mask: Mask | None) -> Tensor | None:
    return None if mask is None else torch.from_numpy(mask)


def one_hot(classes: NDArray[np.int64], count: int) -> Array:
    """Class indices [T] to rows [T, count] with a single 1: 2 of 4 becomes [0, 0, 1, 0].

    Raises:
        ValueError: an index is negative or not below `count`.
    """
    outside = np.flatnonzero((classes < 0) | (classes >= count))
    if outside.size:
        raise ValueError(f"class index {classes[outside[0]]} at step {outside[0]} is not in 0..{count - 1}")
    return np.eye(count, dtype=np.float32)[classes]
