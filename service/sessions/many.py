"""The answer to a batch step, as it fills."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from stepcast.errors import Internal, ShapeMismatch, StepcastError

from ..engine.repository import Served
from .core import Answers, Floats, Group, Lane


@dataclass(frozen=True, slots=True)
class Columns:
    """What a batch step asks of K sessions, by column.

    `x` (K, F) float32, finite or NaN; `seqs` by row, None: the next; `refused`: why a row must not be stepped; `named`:
    the version by whose names `x` was read.
    """

    x: Floats
    seqs: list[int | None] | None = None
    refused: dict[int, StepcastError] = field(default_factory=dict)
    named: Served | None = None


class Many:
    """The answer to a batch step of K sessions, O outputs each; `then` is called when all were stepped or refused."""

    def __init__(self, count: int, n_outputs: int, then: "Callable[[Many], None]") -> None:
        self._count, self._n_outputs, self._then = count, n_outputs, then
        self._outputs: Floats | None = None
        self._left = count
        self.steps: list[int | None] = [None] * count
        self.errors: dict[int, StepcastError] = {}
        """Why a session was not stepped, by its place."""
        self.form: Callable[[Lane, Group], None] | None = None
        """Lets sessions that were stepped together be a roster, if they may."""

    @property
    def outputs(self) -> Floats:
        """(K, O), NaN where there is none (yet)."""
        if self._outputs is None:
            self._outputs = np.full((self._count, self._n_outputs), np.nan, np.float32)
        return self._outputs

    def waiter(self, place: int) -> "Cell":
        """Who waits for one of its sessions."""
        return Cell(self, place)

    def answer(self, places: Sequence[int], outputs: Floats, steps: Sequence[int]) -> None:
        """Sessions at these places were stepped: outputs (B, O)."""
        if outputs.shape[1] != self._n_outputs:
            text = f"its version has {outputs.shape[1]} outputs, the live one {self._n_outputs}"
            for place in places:
                self.refuse(place, ShapeMismatch(f"the session was stepped, but {text}. Step it alone."))
            return
        if len(places) == self._count and isinstance(places, range):
            self._outputs, self.steps = outputs, list(steps)
        else:
            self.outputs[places] = outputs
            for place, step in zip(places, steps, strict=True):
                self.steps[place] = step
        self._settled(len(places))

    def refuse(self, place: int, error: StepcastError) -> None:
        """A session was not stepped."""
        self.errors[place] = error
        self._settled(1)

    def _settled(self, count: int) -> None:
        self._left -= count
        if not self._left:
            self._then(self)


class Cell:
    """One session of a batch step; the waiter of its row."""

    __slots__ = ("_many", "_place")

    creates = True

    def __init__(self, many: Many, place: int) -> None:
        self._many, self._place = many, place

    def done(self) -> bool:
        """A batch step is never given up half-way."""
        return False

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        """The session was stepped."""
        self._many.answer([self._place], answers.outputs[row, :, 0], [step])

    def refused(self, error: BaseException) -> None:
        """The session was not stepped."""
        ours = error if isinstance(error, StepcastError) else Internal(f"the step failed: {type(error).__name__}")
        self._many.refuse(self._place, ours)
