"""Sessions kept ready in this process: copies of their records; evicts idle sessions by second chance."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

from .core import Address, Session

_SESSION_BYTES: Final = 800
"""What a hot session costs beside its record, measured (tests/footprint.py)."""
_LOOKS: Final = 8192
"""Sessions looked at in one go, where all were used since the last time; 2 ms of them."""
_BUSY: Final = 64
"""Busy sessions passed over in one go; keeps eviction short when all are."""


class SessionCache:
    """Entries by key, bounded by bytes; busy ones stay, so the bound is exceeded by at most those."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self.get: Callable[[str], Session | None] = self._sessions.get
        """The session of a key, None if that session is not hot."""
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def enter(self, address: Address) -> Session:
        """A new session without a record."""
        session = self._sessions[address.key] = Session(address, address.key)
        return session

    def measure(self, session: Session, record_bytes: int) -> None:
        """Take a session's present size into account: its record's length as the store has it, and the rest."""
        size = _SESSION_BYTES + record_bytes
        self.bytes += size - session.size
        session.size = size

    def evict(self) -> None:
        """Let idle sessions go until the rest fits, in the order they came; one used since it was looked at stays.

        That is "second chance": as good as the least recently used for a cache, and a use costs a flag.
        """
        sessions, passed = self._sessions, 0
        for _ in range(_LOOKS):
            if self.bytes <= self.limit_bytes or not sessions or passed >= _BUSY:
                return
            session = next(iter(sessions.values()))
            if session.used or (session.roster is not None and session.roster.note_use()):
                session.used = False
                sessions.move_to_end(session.key)
            elif not self.drop(session):
                passed += 1
                sessions.move_to_end(session.key)

    def drop(self, session: Session) -> bool:
        """Let a session go; False: it is busy and stays."""
        if session.roster is not None:
            session.roster.split()
        if session.busy or session.queue:
            return False
        if self._sessions.pop(session.key, None) is not None:
            self.bytes -= session.size
            session.size = 0
        return True
