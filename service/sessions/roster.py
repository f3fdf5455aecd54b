"""Sessions that take the same batch step again and again: their records stay side by side between the steps.

Who steps many locations by the hour sends the same sessions each time. When they come for the second time and their
records have stopped growing, they become a roster: one array of records instead of one record each, so that the next
batch step costs nothing per session but its numbers. Any access to a single one splits the roster first: every session
gets its own record back, as if there had been none.
"""

from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

from ..engine.repository import Served
from ..records.block import as_records
from ..records.layout import Advance
from .core import Group, Lane, Session

Bytes = npt.NDArray[np.uint8]

_MOST_ROSTERS: Final = 1024
_MOST_SEEN: Final = 1 << 16


class Roster:
    """Sessions of one served version; they have no record of their own while it is whole.

    Attributes:
        sessions: In order; `keys` are theirs.
        records: (B, W) uint8, and how each changes by a step: `advance`.
        steps: Their steps, and `following` those after the next batch step.
        place: What the store has noted of them (records.Block).
        whole: No session has been touched alone.
        busy: A batch step of all is under way.
        used: Since eviction looked.
    """

    __slots__ = (
        *("_level", "advance", "busy", "following", "keys", "lane", "place", "records", "sessions", "steps", "used"),
        "whole",
    )

    def __init__(self, lane: Lane, sessions: list[Session], records: Bytes, advance: Advance) -> None:
        self.lane, self.sessions, self.records, self.advance = lane, sessions, records, advance
        self.keys = [session.key for session in sessions]
        self.steps = [session.step for session in sessions]
        self.following = [step + 1 for step in self.steps]
        self._level = self.steps.count(self.steps[0]) == len(sessions)
        self.place: object = None
        self.whole = self.used = True
        self.busy = False
        for session in sessions:
            session.forget()
            session.roster = self

    def stepped(self, records: Bytes, place: object) -> None:
        """All have taken a step, and have these records now."""
        self.records, self.place = records, place
        self.steps = self.following
        if self._level:
            self.following = [self.steps[0] + 1] * len(self.steps)
        else:
            self.following = [step + 1 for step in self.steps]
        self.busy, self.used = False, True

    def note_use(self) -> bool:
        """Pass on to the sessions that they were used; whether they were, since the last time."""
        if not self.used:
            return False
        self.used = False
        for session in self.sessions:
            session.used = True
        return True

    def of(self, served: Served) -> bool:
        """Whether its sessions are of that version."""
        return self.lane.served is served

    def split(self) -> None:
        """Give every session its own record; one whose step is under way stays busy until that is settled."""
        if not self.whole:
            return
        self.note_use()
        self.whole = False
        for session, data, step in zip(self.sessions, as_records(self.records), self.steps, strict=True):
            session.data, session.step, session.lane, session.shape = data, step, self.lane, self.advance.before
            session.roster, session.busy = None, self.busy
        if not self.busy:
            self.let_go()

    def let_go(self) -> None:
        """Hold on to nothing: there may be names for it left."""
        self.sessions, self.records, self.keys = [], self.records[:0].copy(), []


class Rosters:
    """The rosters of a server, by what batch steps call their sessions: namespace, model and list, in bytes."""

    def __init__(self) -> None:
        self._rosters: dict[bytes, list[Roster]] = {}
        self._seen: dict[bytes, None] = {}

    def find(self, name: bytes) -> list[Roster] | None:
        """The rosters of these sessions, all whole and idle; None: there are none."""
        rosters = self._rosters.get(name)
        if rosters is None:
            return None
        for roster in rosters:
            if not roster.whole:
                self._drop(name)
                return None
            if roster.busy:
                return None
        return rosters

    def came_before(self, name: bytes) -> bool:
        """Whether these sessions have been asked for before: they may come again."""
        if name in self._seen:
            return True
        if len(self._seen) >= _MOST_SEEN:
            del self._seen[next(iter(self._seen))]
        self._seen[name] = None
        return False

    def enter(self, name: bytes, rosters: list[Roster]) -> None:
        """From now on these are the rosters of that name, in its order."""
        self._drop(name)
        if len(self._rosters) >= _MOST_ROSTERS:
            self._drop(next(iter(self._rosters)))
        self._rosters[name] = rosters

    def retire(self, served: Served) -> None:
        """Split the rosters of a version, and forget them."""
        for name in [name for name, there in self._rosters.items() if any(roster.of(served) for roster in there)]:
            self._drop(name)

    def _drop(self, name: bytes) -> None:
        for roster in self._rosters.pop(name, ()):
            roster.split()


class Forming:
    """The rosters that the sessions of one batch step become, if all do.

    Args:
        name: By which the batch step will be known.
    """

    def __init__(self, rosters: Rosters, name: bytes) -> None:
        self._rosters, self._name = rosters, name
        self._made: dict[int, Roster] = {}

    def add(self, lane: Lane, group: Group, count: int) -> None:
        """Sessions were stepped: they become a roster if their records have stopped growing and nothing has begun.

        Args:
            count: Of all sessions of the batch step.
        """
        sessions, advance = group.sessions, group.block.advance
        stored = zip(sessions, group.block.records(), strict=True)
        if not advance.steady or any(session.busy or session.data is not record for session, record in stored):
            return
        self._made[group.places[0]] = Roster(lane, sessions, group.block.new, advance)
        if sum(len(roster.sessions) for roster in self._made.values()) == count:
            self._rosters.enter(self._name, [self._made[place] for place in sorted(self._made)])


def roster_name(namespace: str, model: str, sessions: bytes) -> bytes:
    """What the sessions of a batch step are called: short, however many they are.

    Args:
        sessions: Their list, as the request has it.
    """
    return blake2b(b"%s/%s/%s" % (namespace.encode(), model.encode(), sessions), digest_size=16).digest()
