"""A batch step: many sessions by one step each, as columns.

Sessions that are hot, idle and where the caller thinks they are, run and commit together: one job of K rows, one record
and one write each, and nothing else per session. All others, and those whose write was refused, step one by one, as if
each had been asked for alone.
"""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from stepcast.errors import ShapeMismatch, StepcastError

from . import record as records
from .batcher import Job
from .calls import Entry, StepAnswer
from .record import Record
from .store import Write

Floats = npt.NDArray[np.float32]


class ManySteps:
    """The answer to a batch step, as it fills.

    Args:
        count: K sessions.
        n_outputs: O.

    Attributes:
        outputs: (K, O), NaN where there is none (yet).
        steps: Each session's step after this one.
        errors: Why a session was not stepped, by its place.
        done: Resolved with the last of them.
    """

    def __init__(self, count: int, n_outputs: int) -> None:
        self.outputs = np.full((count, n_outputs), np.nan, np.float32)
        self.steps: list[int | None] = [None] * count
        self.errors: dict[int, StepcastError] = {}
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left = count

    def answer(self, places: list[int], outputs: Floats, steps: list[int]) -> None:
        """Some sessions were stepped."""
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
        if not self._left and not self.done.done():  # its caller may be gone
            self.done.set_result(None)


class Cell:
    """Stands for the future of one of many steps that goes its way alone."""

    __slots__ = ("_many", "_place")

    def __init__(self, many: ManySteps, place: int) -> None:
        self._many, self._place = many, place

    def done(self) -> bool:
        """Whether nobody waits any more."""
        return self._many.done.done()

    def set_result(self, answer: StepAnswer) -> None:
        """The session was stepped."""
        many, outputs = self._many, answer.outputs[0]
        if outputs.shape[1] != many.outputs.shape[1]:
            text = f"its version {answer.version} has {outputs.shape[1]} outputs, the live one {many.outputs.shape[1]}"
            many.refuse(self._place, ShapeMismatch(f"the session was stepped, but {text}. Step it alone."))
        else:
            many.answer([self._place], outputs, [answer.step])

    def set_exception(self, error: StepcastError) -> None:
        """The session was not stepped."""
        self._many.refuse(self._place, error)


class Row:
    """One session of a column: where it stands in the call, and what it was asked."""

    __slots__ = ("data", "digest", "entry", "next", "place", "record", "seq", "size")

    def __init__(self, place: int, entry: Entry, record: Record, data: bytes, digest: bytes, seq: int | None) -> None:
        self.place, self.entry, self.record = place, entry, record
        self.data, self.digest, self.seq = data, digest, seq
        self.next = record
        self.size = 0


class Column(Job):
    """Rows of one batch step that run together.

    Args:
        rows: Of sessions that are hot and idle, all of one served version; they stay busy until it is settled.
    """

    __slots__ = ("many", "model", "sessions")

    def __init__(self, many: ManySteps, rows: Sequence[Row], deadline: float) -> None:
        x = np.frombuffer(b"".join([row.data for row in rows]), np.float32).reshape(len(rows), 1, -1)
        super().__init__(x, None, b"".join([row.record.state for row in rows]), deadline)
        self.many, self.sessions, self.model = many, rows, rows[0].entry.address.model

    def writes(self, now: int, ttl_s: Callable[[Record], float | None]) -> list[Write]:
        """What commits them.

        Args:
            now: Wall clock, ms.
            ttl_s: Seconds until a session is forgotten.
        """
        assert self.outputs is not None
        outputs, states = self.outputs.tobytes(), self.state
        width, size = len(outputs) // self.rows, len(states) // self.rows
        made = []
        for i, row in enumerate(self.sessions):
            record = row.record
            answer = records.encode_answer(record.step + 1, row.digest, 1, outputs[i * width : (i + 1) * width])
            state = states[i * size : (i + 1) * size]
            row.next = record.advanced(record.step + 1, 1, state, answer, b"", max(now, record.used_ms))
            data = row.next.encode()
            row.size = len(data)
            touch = bool(record.flags & records.HAS_CHECKPOINTS)
            made.append(Write(row.entry.key, record.token, data, ttl_s(record), None, touch))
        return made
