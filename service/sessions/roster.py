"""Sessions that take the same batch step again and again: their records stay side by side between the steps.

Who steps many locations by the hour sends the same sessions each time. When they come for the second time and their
records have stopped growing, they become a roster: one array of records instead of one record each, so that the next
batch step costs nothing per session but its numbers. Any access to a single one splits the roster first: every session
gets its own record back, as if there had been none.
"""

from hashlib import blake2b
from typing import Final

from ..engine.repository import Served
from .core import Group, Lane, Roster

_MOST_ROSTERS: Final = 1024
_MOST_SEEN: Final = 1 << 16


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
        for name, rosters in list(self._rosters.items()):
            if any(roster.lane.served is served for roster in rosters):
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
        sessions, advance = group.rows.sessions, group.block.advance
        stored = zip(sessions, group.block.records(), strict=True)
        if not advance.steady or any(session.busy or session.data is not record for session, record in stored):
            return
        self._made[group.rows.places[0]] = Roster(lane, sessions, group.block.new, advance)
        if sum(len(roster.sessions) for roster in self._made.values()) == count:
            self._rosters.enter(self._name, [self._made[place] for place in sorted(self._made)])


def roster_name(namespace: str, model: str, sessions: bytes) -> bytes:
    """What the sessions of a batch step are called: short, however many they are.

    Args:
        sessions: Their list, as the request has it.
    """
    return blake2b(b"%s/%s/%s" % (namespace.encode(), model.encode(), sessions), digest_size=16).digest()
