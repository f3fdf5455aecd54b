"""Whose turn it is in a chunk: each session's rows in order, each later than the last and on the model's grid."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import numpy as np
import numpy.typing as npt

from stepcast.manifest import Manifest

from .cells import US, Micros
from .layout import Layout
from .rows import Rows
from .states import BEFORE

Ints = npt.NDArray[np.int64]

_OFF: Final = 1e-6
"""Of the grid's step: a row that lies farther from the grid is not on it, as in training."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def grid_us(manifest: Manifest, layout: Layout, any_time: bool) -> int | None:
    """Microseconds between the steps of a session, or a whole number of times as many; None: whatever lies between."""
    if layout.time is None or manifest.every_s is None or any_time:
        return None
    return round(manifest.every_s * US)


@dataclass(frozen=True, eq=False)
class Segments:
    """The good rows of a chunk by session.

    Attributes:
        rows: (R,) those of one session together, each session's in the table's order.
        whose: (S,) the sessions' places among the chunk's keys, ascending.
        starts: (S,) where each one's rows begin.
        slots: (S,) where their states are; to be filled in.
    """

    rows: Ints
    whose: Ints
    starts: Ints
    slots: Ints

    @classmethod
    def of(cls, rows: Rows) -> "Segments":
        """By the keys alone, so that it is the same in a run that was interrupted."""
        good = np.flatnonzero(~rows.faults.bad)
        good = good[np.argsort(rows.of[good], kind="stable")]
        whose, starts = np.unique(rows.of[good], return_index=True)
        return cls(good, whose, starts.astype(np.int64), np.zeros(len(whose), np.int64))

    def sums(self, values: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Ints:
        """(S,) of values (R,) in the order of `rows`."""
        added: Ints = np.add.reduceat(values.astype(np.int64), self.starts)
        return added

    def ranks(self, counts: npt.NDArray[np.bool_]) -> Ints:
        """(R,) how many rows of its session up to this one count."""
        running = np.cumsum(counts, dtype=np.int64)
        before = running[self.starts] - counts[self.starts]
        return running - np.repeat(before, self.sizes)

    @property
    def sizes(self) -> Ints:
        """(S,) how many rows each has."""
        return np.diff(self.starts, append=len(self.rows))


def check_moments(rows: Rows, segments: Segments, last: Micros, every_us: int | None) -> None:
    """Note rows that are not later than the last good one of their session, or not on its grid.

    Args:
        last: (S,) the sessions' last moments before this chunk, BEFORE where they have none.
    """
    if rows.moments is None or not len(segments.rows):
        return
    moments = rows.moments[segments.rows]
    before = np.empty_like(moments)
    before[1:], before[segments.starts] = moments[:-1], last
    wrong = (before != BEFORE) & _wrong(moments, np.where(before == BEFORE, moments, before), every_us)
    ends = np.append(segments.starts[1:], len(moments))
    for at in np.unique(np.searchsorted(segments.starts, np.flatnonzero(wrong), side="right") - 1).tolist():
        _one_by_one(rows, segments.rows[segments.starts[at] : ends[at]], int(last[at]), every_us)


def _wrong(moments: Micros, before: Micros, every_us: int | None) -> npt.NDArray[np.bool_]:
    gone = moments - before
    wrong = gone <= 0
    if every_us is not None:
        rest = gone % every_us
        wrong |= np.minimum(rest, every_us - rest) > _OFF * every_us
    return wrong


def _one_by_one(rows: Rows, own: Ints, last: int, every_us: int | None) -> None:
    """The same for one session, where a row that is left out does not count for the next."""
    assert rows.moments is not None
    for row in own.tolist():
        moment = int(rows.moments[row])
        if last != BEFORE and _wrong(np.array([moment]), np.array([last]), every_us)[0]:
            told = f"session {rows.keys[rows.of[row]]!r} at {_shown(moment)}"
            if moment <= last:
                told += f", which is not later than its row before ({_shown(last)}). Sort the table by time"
            else:
                step = timedelta(microseconds=every_us or 0)
                told += (
                    f", which is not on its grid of {step} from {_shown(last)}. Say --any-time to step it all the same"
                )
            rows.faults.add([row], lambda at, told=told: f"{rows.chunk.line(at)}: {told}")  # type: ignore[misc]
        else:
            last = moment


def _shown(micros: int) -> str:
    return (_EPOCH + timedelta(microseconds=micros)).isoformat().replace("+00:00", "Z")
