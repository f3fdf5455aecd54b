"""Asks the sessions of this process for steps, without a door."""

import asyncio
from typing import Any, NamedTuple

import numpy as np

from service.sessions.core import Address, Answers
from service.sessions.turns import Sessions


class Answer(NamedTuple):
    """Outputs (N, T, O), the session's step and the model's version."""

    outputs: Any
    step: int
    version: int


class Waiter:
    """Waits in a future; a future that is cancelled waits no longer."""

    creates = True

    def __init__(self) -> None:
        self.future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def done(self) -> bool:
        return self.future.done()

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        if not self.future.done():
            self.future.set_result(Answer(answers.outputs[row].copy(), step, answers.version))

    def refused(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


def ask(
    sessions: Sessions,
    address: Address,
    x: Any,
    mask: Any = None,
    seq: int | None = None,
    policy: str | None = None,
    stays: bool = True,
) -> "asyncio.Future[Answer]":
    """Ask for a call of x (N, T, F), as doors do: join first, if it is a single step and its caller stays."""
    waiter, x = Waiter(), np.ascontiguousarray(x, np.float32)
    single = x.shape[1] == 1 and mask is None
    if not (single and stays and sessions.join(address.key, x.tobytes(), seq, waiter)):
        sessions.step(address, x, mask, seq, waiter, policy)
    return waiter.future
