"""Sessions that take the same batch step again and again: their records stay side by side between the steps.

Who steps many locations by the hour sends the same sessions each time. When a roster comes for the second time, its
sessions become a cohort: one array of records instead of one record each, so that the next batch step of them all
costs nothing per session but its numbers. Whoever touches one of them by itself dissolves the cohort first: each
session gets its record back, as if there had been none.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from ..records.block import as_records
from .columns import Track
from .core import Entry

Bytes = npt.NDArray[np.uint8]

_MOST_ROSTERS: Final = 1024
_MOST_SEEN: Final = 1 << 16


class Cohort:
    """Sessions of one served version; members have no record of their own while it is whole.

    Attributes:
        entries: The members.
        steps: Their steps, and `following` those after the next batch step.
        whole: No member has been touched by itself.
        busy: A batch step of all is under way.
        used: Since eviction looked.
    """

    __slots__ = (
        "_level",
        "busy",
        "entries",
        "following",
        "keys",
        "place",
        "records",
        "steps",
        "track",
        "ttl_s",
        "used",
        "whole",
    )

    def __init__(self, track: Track, entries: list[Entry], records: Bytes) -> None:
        self.keys, self.records, self.ttl_s = [entry.key for entry in entries], records, entries[0].ttl_s
        self.place: object = None
        self.track, self.entries = track, entries
        self.steps = [entry.step for entry in entries]
        self.following = [step + 1 for step in self.steps]
        self._level = self.steps.count(self.steps[0]) == len(entries)
        self.whole = self.used = True
        self.busy = False
        for entry in entries:
            entry.keep(None)
            entry.cohort = self

    def stepped(self, records: Bytes) -> None:
        """All have taken a step, and have these records now."""
        self.records, self.steps = records, self.following
        if self._level:
            self.following = [self.steps[0] + 1] * len(self.steps)
        else:
            self.following = [step + 1 for step in self.steps]
        self.busy, self.used = False, True

    def note_use(self) -> bool:
        """Pass on to the members that they were used; whether they were, since the last time."""
        if not self.used:
            return False
        self.used = False
        for entry in self.entries:
            entry.used = True
        return True

    def dissolve(self) -> None:
        """Give each member its record; one whose step is under way stays busy until that is settled."""
        if not self.whole:
            return
        self.note_use()
        self.whole = False
        for entry, data, step in zip(self.entries, as_records(self.records), self.steps, strict=True):
            entry.data, entry.step, entry.track, entry.cohort, entry.busy = data, step, self.track, None, self.busy
        if not self.busy:
            self.let_go()

    def let_go(self) -> None:
        """Hold on to nothing: there may be names for it left (Rosters)."""
        self.entries, self.records = [], self.records[:0].copy()


class Rosters:
    """The cohorts of a server, by what batch steps call their sessions: namespace, model and list, in bytes."""

    def __init__(self) -> None:
        self._cohorts: dict[bytes, list[Cohort]] = {}
        self._seen: dict[int, None] = {}

    def find(self, roster: bytes) -> list[Cohort] | None:
        """A roster's cohorts, whole and idle; None: there are none."""
        cohorts = self._cohorts.get(roster)
        if cohorts is None:
            return None
        for cohort in cohorts:
            if not cohort.whole:
                del self._cohorts[roster]
                return None
            if cohort.busy:
                return None
        return cohorts

    def came_before(self, roster: bytes) -> bool:
        """Whether a roster has been asked about before: it may come again."""
        key = hash(roster)
        if key in self._seen:
            return True
        if len(self._seen) >= _MOST_SEEN:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = None
        return False

    def enter(self, roster: bytes, cohorts: list[Cohort]) -> None:
        """From now on these are a roster's, in its order."""
        self._drop(roster)
        if len(self._cohorts) >= _MOST_ROSTERS:
            self._drop(next(iter(self._cohorts)))
        self._cohorts[roster] = cohorts

    def _drop(self, roster: bytes) -> None:
        for cohort in self._cohorts.pop(roster, ()):
            cohort.dissolve()
