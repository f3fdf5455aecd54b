"""Calls of T steps or with a mask, and rows of no session: runs of their own. Masks are compaction."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import numpy.typing as npt

from ..engine.batcher import Run
from .core import Ask, Floats, Lane, Mask, Session


class Masked(Run):
    """A run that knows its mask: present steps go to the front, as training does it.

    Args:
        x: (N, T, F).
        mask: (N, T), True where present; None: everywhere.
    """

    def __init__(self, x: Floats, mask: Mask | None, state: bytes, deadline: float) -> None:
        self.mask, lengths = mask, None
        if mask is not None:
            x, lengths = compact(x, mask)
        super().__init__(x, lengths, state, deadline)

    def reply(self) -> Floats:
        """Outputs (N, T, O), NaN where the mask is False."""
        return self.outputs if self.mask is None else scatter(self.outputs, self.mask)


class Beside(Masked):
    """Rows of no session; `future` is done when they have run."""

    def __init__(
        self, x: Floats, mask: Mask | None, state: bytes, deadline: float, future: "asyncio.Future[None]"
    ) -> None:
        super().__init__(x, mask, state, deadline)
        self.future = future

    def abandoned(self) -> bool:
        return self.future.done()

    def finished(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class Call(Masked):
    """A session's call of T steps, or with a mask, on its way.

    Args:
        lane: Of the session's version.
        state: Packed, of its N rows.
        then: Takes the call when it has run.
    """

    def __init__(
        self, session: Session, lane: Lane, ask: Ask, state: bytes, then: "Callable[[Call], Awaitable[None] | None]"
    ) -> None:
        super().__init__(ask.x, ask.mask, state, ask.deadline)
        self.session, self.lane, self.ask, self.then = session, lane, ask, then

    def abandoned(self) -> bool:
        return self.ask.waiter.done()

    def finished(self) -> Awaitable[None] | None:
        return self.then(self)


class Replay(Run):
    """The kept inputs of a session on their way through another model version.

    Args:
        then: Takes the run when it has ended.
    """

    def __init__(self, x: Floats, state: bytes, deadline: float, then: "Callable[[Replay], None]") -> None:
        super().__init__(x, None, state, deadline)
        self.then = then

    def finished(self) -> None:
        self.then(self)


def compact(x: Floats, mask: Mask) -> tuple[Floats, npt.NDArray[np.int32]]:
    """Gather each row's present steps to the front.

    Args:
        x: (N, T, F); mask: (N, T), True where present.

    Returns:
        x (N, T', F), T' the most present steps of a row (at least 1), and lengths (N,).
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
