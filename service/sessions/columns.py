"""Single steps in columns: many sessions by one step each, as arrays from the door to the store.

Sessions that are hot, idle, of the plainest kind (records/block.py) and where the caller thinks they are join the
column that is open for their model version, or make one of their own (a batch step). A column is one run and one write
of many records; nothing is made per session but its next record. Whatever does not fit, or is refused, steps by itself.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt

from stepcast.errors import Internal, ShapeMismatch, StepcastError

from ..engine.batcher import Batcher, Job
from ..engine.repository import Served
from ..records.block import Sheet, Spares, digest, digests, next_record, side_by_side
from ..records.record import HEADER_BYTES
from .core import Entry, StepAnswer

if TYPE_CHECKING:
    from .roster import Cohort

Floats = npt.NDArray[np.float32]

OPEN_S: Final = 0.02
"""How long steps may join a column: its deadline is that of the first."""


class Load:
    """How many steps of a model wait, of all its versions."""

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting = 0


class Track:
    """One served version: where its single steps go.

    Attributes:
        open: The column that steps may join now.
        until: When it is closed to them, monotonic.
        made: Steps made in columns that are not in the metrics yet.
        spares: For the records of cohorts.
    """

    __slots__ = (
        *("batcher", "input_bytes", "load", "made", "open", "output_bytes", "served", "spares", "state_bytes"),
        "until",
    )

    def __init__(self, served: Served, batcher: Batcher[Job], load: Load) -> None:
        self.served, self.batcher, self.load = served, batcher, load
        self.input_bytes = served.input_bytes
        self.state_bytes = served.manifest.state_row_bytes
        self.output_bytes = 4 * served.manifest.n_outputs
        self.open: Column | None = None
        self.until = 0.0
        self.made = 0
        self.spares = Spares()


class Answers:
    """The outputs (B, N, T, O) of B sessions, and in `made` what a door has made of all of them."""

    def __init__(self, outputs: Floats, version: int) -> None:
        self.outputs, self.version = outputs, version
        self.made: dict[str, list[bytes]] = {}


class Waiter(Protocol):
    """Who asked for a step. It answers at once, without a turn of the loop; and stands for a future elsewhere."""

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        """The step was made: row `row` of the answers."""

    def done(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, answer: StepAnswer) -> None:
        """The step was made by itself, or its kept answer is here."""

    def set_exception(self, error: BaseException) -> None:
        """The step was refused."""


class Column(Job):
    """Single steps that run and commit together; their sessions stay busy until it is settled.

    Args:
        x: All inputs (B, F), of a column that nobody joins.

    Attributes:
        entries, inputs, seqs, waiters: By row. `inputs` is empty where x was given.
        many, places: Of a batch step, instead of waiters: whose answer it is part of, and where.
        cohort: All its sessions, where their records lie side by side (service/sessions/roster.py).
        next: The sessions' next records, once it ran and they are needed one by one.
        sheet: The same side by side, where they are of one length.
        answers: Once it ran.
        tags: Of the new states, where a device holds them (Runtime.run_resident).
    """

    __slots__ = (
        *("answers", "cohort", "entries", "inputs", "many", "next", "now_ms", "places", "seqs", "sheet", "tags"),
        *("track", "waiters"),
    )

    whole = True

    def __init__(self, track: Track, deadline: float, now_ms: int, x: Floats | None = None) -> None:
        self.track, self.deadline, self.now_ms = track, deadline, now_ms
        self.entries: list[Entry] = []
        self.inputs: list[bytes] = []
        self.seqs: list[int | None] = []
        self.waiters: list[Waiter] = []
        self.many: ManySteps | None = None
        self.places: Sequence[int] = ()
        self.tags: npt.NDArray[np.int64] | None = None
        self.next: list[bytes] = []
        self.cohort: Cohort | None = None
        self.sheet: Sheet | None = None
        self.answers: Answers | None = None
        self.steps, self.at, self.lengths, self.error = 1, 0, None, None
        self.rows = 0
        if x is not None:
            self.x = x

    def count(self) -> int:
        """Rows so far."""
        return len(self.entries)

    def begin(self) -> None:
        """Nobody may join any more."""
        if self.track.open is self:
            self.track.open = None
        self.rows = len(self.entries)

    def waiter(self, row: int) -> Waiter:
        """Who waits for a row."""
        return self.waiters[row] if self.many is None else Cell(self.many, self.places[row])

    def input(self, row: int) -> bytes:
        """One row's inputs."""
        return self.inputs[row] if self.inputs else self.x[row].tobytes()

    def go(self) -> None:
        """Run: inputs and records in, outputs and next records out. Nothing changes if the run raises."""
        cohort = self.cohort
        if cohort is not None and cohort.whole:
            self._go_together(cohort)
            return
        if self.rows == 1 and self.inputs and self._go_alone():
            return
        track, entries = self.track, self.entries
        x = np.frombuffer(b"".join(self.inputs), np.float32).reshape(self.rows, -1) if self.inputs else self.x
        old: list[bytes] = [entry.data for entry in entries]  # type: ignore[misc]  # they have a track
        order, parts = _by_length(old), [old]
        if order is not None:
            parts, x = _parts([old[i] for i in order]), x[order]
        sheets = [Sheet(side_by_side(part), track.state_bytes, track.output_bytes, self.now_ms) for part in parts]
        runtime = track.served.runtime
        if runtime.resident is not None:
            self.tags = np.array([entry.tag for entry in entries], np.int64)
            if order is not None:
                self.tags = self.tags[order]
        outputs = runtime.step(x, [sheet.before for sheet in sheets], [sheet.after for sheet in sheets], self.tags)
        named, raw, made, at = digests(x), outputs.view(np.uint8), [], 0
        for sheet in sheets:
            end = at + sheet.rows
            sheet.digests[:] = named[at:end]
            sheet.outputs[:] = raw[at:end]
            made += sheet.records()
            at = end
        if order is not None:
            back = np.argsort(order)
            made, outputs = [made[i] for i in back], outputs[back]
            self.tags = None if self.tags is None else self.tags[back]
        self.next, self.answers, self.at = made, Answers(outputs[:, None, None], track.served.version), 1
        self.sheet = sheets[0] if order is None else None

    def _go_alone(self) -> bool:
        """The same for a single row, if the model takes the short way: a lone caller waits for every microsecond."""
        track, data, old = self.track, self.inputs[0], self.entries[0].data
        assert old is not None  # it has a track
        made = track.served.runtime.step_one(data, old, HEADER_BYTES)
        if made is None:
            return False
        outputs, state = made
        facts = track.state_bytes, track.output_bytes, self.now_ms
        self.next = [next_record(old, state, digest(data), outputs.tobytes(), *facts)]
        self.answers, self.at = Answers(outputs[:, None, None], track.served.version), 1
        return True

    def _go_together(self, cohort: "Cohort") -> None:
        """The same for records that lie side by side already."""
        track, x = self.track, self.x
        sheet = Sheet(cohort.records, track.state_bytes, track.output_bytes, self.now_ms, track.spares)
        outputs = track.served.runtime.step(x, [sheet.before], [sheet.after])
        sheet.digests[:] = digests(x)
        sheet.outputs[:] = outputs.view(np.uint8)
        self.sheet, self.answers, self.at = sheet, Answers(outputs[:, None, None], track.served.version), 1

    def part(self) -> None:
        """From here on each session goes by itself."""
        if self.cohort is not None:
            self.cohort.dissolve()
            self.cohort.let_go()
            self.cohort = None
            if self.sheet is not None and not self.next:
                self.next = self.sheet.records()


def _by_length(records: Sequence[bytes]) -> list[int] | None:
    """The order in which records of one length stand together, None where all have the same."""
    lengths = list(map(len, records))
    if lengths.count(lengths[0]) == len(lengths):
        return None
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def _parts(records: list[bytes]) -> list[list[bytes]]:
    """Cut where the length changes."""
    cuts = [i for i in range(1, len(records)) if len(records[i]) != len(records[i - 1])]
    return [records[start:end] for start, end in zip([0, *cuts], [*cuts, len(records)], strict=True)]


# --- a batch step ---------------------------------------------------------------------------------------------------


class ManySteps:
    """The answer to a batch step, as it fills.

    Args:
        count: K sessions.
        n_outputs: O.
        then: Called when every session was stepped or refused.

    Attributes:
        steps: Each session's step after this one.
        errors: Why a session was not stepped, by its place.
        roster: Of its sessions (service/sessions/roster.py); empty: they form no cohorts.
        cohorts: What they have formed, by the place of their first.
    """

    def __init__(self, count: int, n_outputs: int, then: "Callable[[ManySteps], None]") -> None:
        self._count, self._n_outputs, self._then = count, n_outputs, then
        self._outputs: Floats | None = None
        self.steps: list[int | None] = [None] * count
        self.errors: dict[int, StepcastError] = {}
        self._left = count
        self.roster = b""
        self.cohorts: dict[int, Cohort] = {}

    @property
    def outputs(self) -> Floats:
        """(K, O), NaN where there is none (yet)."""
        if self._outputs is None:
            self._outputs = np.full((self._count, self._n_outputs), np.nan, np.float32)
        return self._outputs

    def done(self) -> bool:
        """Whether every session was stepped or refused."""
        return not self._left

    def answer(self, place: int, outputs: Floats, step: int) -> None:
        """A session was stepped."""
        self.outputs[place] = outputs
        self.steps[place] = step
        self._settled(1)

    def answer_all(self, places: Sequence[int], outputs: Floats, steps: list[int]) -> None:
        """Some sessions were stepped, at these places in order."""
        if len(places) == self._count:
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
    """One of many steps; the waiter of its row."""

    __slots__ = ("_many", "_place")

    def __init__(self, many: ManySteps, place: int) -> None:
        self._many, self._place = many, place

    def done(self) -> bool:
        """Whether nobody waits any more."""
        return self._many.done()

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        """The session was stepped in a column."""
        self._answer(answers.outputs[row, 0, 0], step, answers.version)

    def set_result(self, answer: StepAnswer) -> None:
        """The session was stepped."""
        self._answer(answer.outputs[0, 0], answer.step, answer.version)

    def set_exception(self, error: BaseException) -> None:
        """The session was not stepped."""
        ours = error if isinstance(error, StepcastError) else Internal(f"the step failed: {type(error).__name__}")
        self._many.refuse(self._place, ours)

    def _answer(self, outputs: Floats, step: int, version: int) -> None:
        width = self._many.outputs.shape[1]
        if len(outputs) != width:
            text = f"its version {version} has {len(outputs)} outputs, the live one {width}"
            self._many.refuse(self._place, ShapeMismatch(f"the session was stepped, but {text}. Step it alone."))
        else:
            self._many.answer(self._place, outputs, step)
