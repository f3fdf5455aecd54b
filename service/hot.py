"""The hot sessions of this process: copies of records, the least recently used idle ones let go first."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from .calls import Address, Entry

_ENTRY_BYTES: Final = 2400
"""What a hot session with sixteen kept answers costs beside its record, measured (tests/footprint.py)."""
_LOOK_AHEAD: Final = 64
"""Busy sessions passed over in one search for an idle one; keeps eviction short when all are busy."""


class HotSessions:
    """Entries by key, bounded by bytes.

    Args:
        limit_bytes: Memory for entries; busy ones stay, so the bound is exceeded by at most those.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, key: str) -> Entry | None:
        """The entry of a session, None if it is not hot."""
        return self._entries.get(key)

    def enter(self, address: Address) -> Entry:
        """A new entry without a record."""
        entry = self._entries[address.key] = Entry(address)
        return entry

    def used(self, entry: Entry) -> None:
        """Mark an entry as the most recently used."""
        self._entries.move_to_end(entry.key)

    def measure(self, entry: Entry, record_bytes: int) -> None:
        """Take an entry's present size into account: its record's length as the store has it, and the rest."""
        size = _ENTRY_BYTES + record_bytes
        self.bytes += size - entry.size
        entry.size = size

    def evict(self) -> None:
        """Let idle entries go, least recently used first, until the rest fits."""
        passed = 0
        while self.bytes > self._limit_bytes and self._entries and passed < _LOOK_AHEAD:
            entry = next(iter(self._entries.values()))
            if not self.drop(entry):
                self._entries.move_to_end(entry.key)
                passed += 1

    def drop(self, entry: Entry) -> bool:
        """Let an entry go; False: it is busy and stays."""
        if entry.busy or entry.queue:
            return False
        if self._entries.pop(entry.key, None) is not None:
            self.bytes -= entry.size
            entry.size = 0
        return True
