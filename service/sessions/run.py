"""Calls of T steps or with a mask: runs of their own. Masks are compaction."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..engine.batcher import Run, Then
from .core import Floats, Mask


class MaskedRun(Run):
    """A run of x (N, T, F) that knows its mask (N, T), True where present; None: everywhere.

    Present steps go to the front, as training does it.
    """

    def __init__(
        self, x: Floats, mask: Mask | None, state: bytes, deadline: float, then: Then, gone: Callable[[], bool]
    ) -> None:
        self.mask, lengths = mask, None
        if mask is not None:
            x, lengths = compact(x, mask)
        super().__init__(x, lengths, state, deadline, then, gone)

    def reply(self) -> Floats:
        """Outputs (N, T, O), NaN where the mask is False."""
        return self.outputs if self.mask is None else scatter(self.outputs, self.mask)


def compact(x: Floats, mask: Mask) -> tuple[Floats, npt.NDArray[np.int32]]:
    """Gather each row's present steps of x (N, T, F) to the front; the mask (N, T) is True where they are present.

    Gives x (N, T', F), T' the most present steps of a row (at least 1), and lengths (N,).
    """
    lengths = mask.sum(axis=1, dtype=np.int32)
    order = np.argsort(~mask, axis=1, kind="stable")
    front = np.take_along_axis(x, order[:, :, None], axis=1)[:, : max(1, int(lengths.max(initial=0)))]
    return np.ascontiguousarray(front), lengths


def scatter(y: Floats, mask: Mask) -> Floats:
    """The inverse of compact for outputs (N, T', O): (N, T, O), NaN where the mask is False."""
    out = np.full((*mask.shape, y.shape[2]), np.nan, np.float32)
    valid = np.arange(y.shape[1]) < mask.sum(axis=1)[:, None]
    out[mask] = y[valid]
    return out
