"""Sessions that take the same batch step again and again: their records stay side by side between the steps.

Who steps many locations by the hour sends the same sessions each time. When a roster comes for the second time, its
sessions become a cohort: one array of records instead of one record each, so that the next batch step of them all
costs nothing per session but its numbers. Whoever touches one of them by itself dissolves the cohort first: each
session gets its record back, as if there had been none.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from .calls import Entry
from .columns import Track
from .store import Rows, as_records

Bytes = npt.NDArray[np.uint8]

_MOST_ROSTERS: Final = 1024
_SEEN: Final[list["Cohort"]] = []


class Cohort(Rows):
    """Sessions of one served version; members have no record of their own while it is whole.

    Attributes:
        entries: The members.
        sessions: Their ids.
        steps: Their steps, and `following` those after the next batch step.
        whole: No member has been touched by itself.
        busy: A batch step of all is under way.
        used: Since eviction looked.
    """

    __slots__ = ("busy", "entries", "following", "sessions", "steps", "track", "used", "whole")

    def __init__(self, track: Track, entries: list[Entry], records: Bytes) -> None:
        super().__init__([entry.key for entry in entries], records, entries[0].ttl_s)
        self.track, self.entries = track, entries
        self.sessions = [entry.address.session for entry in entries]
        self.stepped([entry.step for entry in entries])
        self.whole = self.used = True
        self.busy = False
        for entry in entries:
            entry.keep(None)
            entry.cohort = self

    def stepped(self, steps: list[int]) -> None:
        """All have taken a step, and are where `steps` says."""
        self.steps, self.following = steps, [step + 1 for step in steps]

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


class Rosters:
    """The cohorts of a server, by the sessions that batch steps name, in order."""

    def __init__(self) -> None:
        self._known: dict[int, list[Cohort]] = {}

    def find(self, prefix: str, sessions: Sequence[str]) -> tuple[int, list[Cohort] | None]:
        """The roster's number, and its cohorts: whole, idle, and together exactly its sessions. None: there are none.

        The number is 0 where the roster has not been seen before: it may not come again.
        """
        roster = hash((prefix, *sessions)) or 1
        cohorts = self._known.get(roster)
        if cohorts is None:
            if len(self._known) >= _MOST_ROSTERS:
                self._drop(next(iter(self._known)))
            self._known[roster] = _SEEN
            return 0, None
        at = 0
        for cohort in cohorts:
            end = at + len(cohort.sessions)
            if not cohort.whole or cohort.busy or cohort.sessions != sessions[at:end]:
                return roster, None
            if not cohort.keys[0].startswith(prefix):
                return roster, None
            at = end
        return roster, cohorts if at == len(sessions) else None

    def enter(self, roster: int, cohorts: list[Cohort]) -> None:
        """From now on these are a roster's, in its order."""
        self._drop(roster)
        self._known[roster] = cohorts

    def _drop(self, roster: int) -> None:
        for cohort in self._known.pop(roster, ()):
            cohort.dissolve()
