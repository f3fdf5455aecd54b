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

    def find(self, name: bytes) -> list[Roster]:
        """The rosters of these sessions, all whole and idle; empty: there are none."""
        rosters = self._rosters.get(name, [])
        if not all(roster.whole for roster in rosters):
            self._drop(name)
            return []
        return [] if any(roster.busy for roster in rosters) else rosters

    def came_before(self, name: bytes) -> bool:
        """Whether these sessions have been asked for before: they may come again."""
        if name in self._seen:
            return True
        if len(self._seen) >= _MOST_SEEN:
            del self._seen[next(iter(self._seen))]
        self._seen[name] = None
        return False

    def form(self, name: bytes, made: dict[int, Roster], count: int, lane: Lane, group: Group) -> None:
        """Let sessions that were stepped together be a roster, if their records stay as long and nothing has begun.

        `made` has those of their batch step by first place; with all its `count` sessions in, they go by `name`.
        """
        sessions, advance = group.rows.sessions, group.block.advance
        stored = zip(sessions, group.block.records(), strict=True)
        if not advance.steady or any(session.busy or session.data is not record for session, record in stored):
            return
        made[group.rows.places[0]] = Roster(lane, sessions, group.block.new, advance)
        if sum(len(roster.sessions) for roster in made.values()) == count:
            self._drop(name)
            if len(self._rosters) >= _MOST_ROSTERS:
                self._drop(next(iter(self._rosters)))
            self._rosters[name] = [made[place] for place in sorted(made)]

    def retire(self, served: Served) -> None:
        """Split the rosters of a version, and forget them."""
        for name, rosters in list(self._rosters.items()):
            if any(roster.lane.served is served for roster in rosters):
                self._drop(name)

    def _drop(self, name: bytes) -> None:
        for roster in self._rosters.pop(name, ()):
            roster.split()


def roster_name(namespace: str, model: str, sessions: bytes) -> bytes:
    """What the sessions of a batch step are called: short, however long their list in the request is."""
    return blake2b(b"%s/%s/%s" % (namespace.encode(), model.encode(), sessions), digest_size=16).digest()
