"""The hot sessions of this process: copies of records; idle ones that were not used of late are let go."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

from .core import Address, Entry

_ENTRY_BYTES: Final = 800
"""What a hot session costs beside its record, measured (tests/footprint.py)."""
_LOOKS: Final = 8192
"""Sessions looked at in one go, where all were used since the last time; 2 ms of them."""
_BUSY: Final = 64
"""Busy sessions passed over in one go; keeps eviction short when all are."""


class HotSessions:
    """Entries by key, bounded by bytes.

    Args:
        limit_bytes: Memory for entries; busy ones stay, so the bound is exceeded by at most those.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self.get: Callable[[str], Entry | None] = self._entries.get
        """The entry of a key, None if that session is not hot."""
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def enter(self, address: Address) -> Entry:
        """A new entry without a record."""
        entry = self._entries[address.key] = Entry(address)
        return entry

    def measure(self, entry: Entry, record_bytes: int) -> None:
        """Take an entry's present size into account: its record's length as the store has it, and the rest."""
        size = _ENTRY_BYTES + record_bytes
        self.bytes += size - entry.size
        entry.size = size

    def evict(self) -> None:
        """Let idle entries go until the rest fits, in the order they came; one used since it was looked at stays.

        That is "second chance": as good as the least recently used for a cache, and a use costs a flag.
        """
        entries, passed = self._entries, 0
        for _ in range(_LOOKS):
            if self.bytes <= self._limit_bytes or not entries or passed >= _BUSY:
                return
            entry = next(iter(entries.values()))
            if entry.used or (entry.cohort is not None and entry.cohort.note_use()):
                entry.used = False
                entries.move_to_end(entry.key)
            elif not self.drop(entry):
                passed += 1
                entries.move_to_end(entry.key)

    def drop(self, entry: Entry) -> bool:
        """Let an entry go; False: it is busy and stays."""
        if entry.cohort is not None:
            entry.cohort.dissolve()
        if entry.busy or entry.queue:
            return False
        if self._entries.pop(entry.key, None) is not None:
            self.bytes -= entry.size
            entry.size = 0
        return True
