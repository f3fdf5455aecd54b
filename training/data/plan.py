"""Which sequences go together into which batch: shuffled anew each epoch, and by length where that saves padding."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def plan_batches(
    lengths: Sequence[int], batch: int, *, bucket: int = 0, order: np.random.Generator | None = None
) -> Iterator[NDArray[np.int64]]:
    """Cut the indices 0..len(lengths)-1 into batches; every index comes exactly once.

    Bucketing sorts by length only inside pools of `bucket` batches, and then shuffles the batches: sequences of
    one length stay together (little padding) while each epoch still has other batches in another order.

    Args:
        lengths: Steps of each sequence.
        batch: Sequences per batch; the last one may be smaller.
        bucket: Batches per pool; 0 keeps the order as it is.
        order: Shuffles; None keeps the given order (pools are then sorted, but stay where they are).
    """
    steps = np.asarray(lengths, np.int64)
    indices = np.arange(len(steps)) if order is None else order.permutation(len(steps))
    if bucket:
        pools = _cut(indices, bucket * batch)
        indices = np.concatenate([pool[np.argsort(steps[pool], kind="stable")] for pool in pools] or [indices])
    batches = _cut(indices, batch)
    if bucket and order is not None:
        batches = [batches[number] for number in order.permutation(len(batches))]
    yield from batches


def _cut(indices: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def epoch_order(seed: int, epoch: int) -> np.random.Generator:
    """The generator that shuffles one epoch: the same for the same seed and epoch, in every process."""
    return np.random.default_rng([seed, epoch])
