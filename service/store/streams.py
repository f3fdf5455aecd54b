"""Where steps come from and go to besides callers: two small protocols, for Redis Streams and for what may follow.

A source is cut into shares (Redis: streams, Kafka: partitions). One consumer at a time reads a share, and all entries
of a session lie in one, so their order is that of the share. A position never goes back in a share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..records.block import Letter


class Share:
    """A part of a source while this consumer reads it; another term of reading it is another object.

    Attributes:
        lost: Somebody else may read it: what waits in this process is theirs now.
        in_hand: The entries that were read and are not done with, oldest first.
    """

    __slots__ = ("in_hand", "index", "lost", "name")

    def __init__(self, index: int, name: bytes) -> None:
        self.index, self.name, self.lost = index, name, False
        self.in_hand: dict[bytes, Entry] = {}


class Entry(NamedTuple):
    """A step that a source asks for."""

    share: Share
    id: bytes
    first: int  # its position, two numbers
    second: int
    fields: dict[bytes, bytes]


class Lag(NamedTuple):
    """How far behind a share is: entries that are not acknowledged (None: unknown), and the age of the oldest, s."""

    entries: int | None
    seconds: float


class Source(Protocol):
    """Gives entries at least once. Every coroutine raises errors.StoreUnavailable where the source cannot answer."""

    name: bytes
    """8 bytes that no other source has, and that stay the same however it is cut."""

    async def open(self) -> None:
        """Connect, create what is needed, and begin to take shares of it."""

    async def close(self) -> None:
        """Give the shares back at once, then disconnect. Idempotent."""

    async def read(self, room: int) -> list[Entry]:
        """At most about `room` entries, in order in each share, first those that a reader before left; may wait.

        Empty: nothing came for a while.
        """

    async def acknowledge(self, entries: Sequence[Entry]) -> None:
        """Never give these again."""

    async def bury(self, entry: Entry, problem: bytes) -> None:
        """Put an entry among the dead letters with the reason, and never give it again; all of it or nothing."""

    def shares(self) -> Sequence[Share]:
        """The shares that this consumer reads."""

    def share_of(self, session: bytes) -> int | None:
        """The share that a session's entries must be in; None: whichever."""

    async def lags(self) -> dict[bytes, Lag]:
        """How far behind each of them is, by its name."""


class Sink(Protocol):
    """Takes letters, at least once: who reads them tells doubles by session and step."""

    async def open(self) -> None:
        """Connect, and see that it can take letters."""

    async def append(self, letters: Sequence[Letter]) -> None:
        """Keep letters, in order. Raises errors.StoreUnavailable: some may have been kept."""

    async def close(self) -> None:
        """Disconnect. Idempotent."""


@dataclass(frozen=True, slots=True)
class StreamPlace:
    """Which streams of a Redis are read and written, and as whom.

    With one share the source's stream has its name; with several they are `name:0`, `name:1`, ...
    """

    source: str
    sink: str
    dead: str
    group: str = "stepcast"
    shares: int = 1
    lease_s: float = 5.0  # until the shares of a consumer that is gone are read by others
    keep: int = 0  # letters in the sink, about; 0: all
    deletes: bool = False  # entries that are done with are deleted

    def streams(self) -> list[bytes]:
        """The source's streams."""
        if self.shares == 1:
            return [self.source.encode()]
        return [f"{self.source}:{index}".encode() for index in range(self.shares)]
