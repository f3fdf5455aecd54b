"""Where sessions rest: one small protocol, several stores.

A store keeps opaque records under keys `<namespace>/<model>/<session>` and knows two things about them: bytes 8 to 24
are the token that compare-and-set compares, and a session may have side records (its checkpoints), which live and
die with it.
"""

import asyncio
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..records.block import Block


class Write(NamedTuple):
    """One change of one session: all of it or nothing."""

    key: str
    expect: bytes | None  # token (16 bytes) of the record that this one replaces; None: there must be no record
    record: bytes | None  # the new record; None: forget the session and its side records
    ttl_s: float | None = None  # until the session is forgotten unless written again; None: never. Side records follow
    sides: Mapping[str, bytes] | None = None  # side records to set in the same atomic operation
    touch_sides: bool = False  # the session has side records: they get the new time to live, or are forgotten with it


Done = Callable[[Sequence[int], list[bool] | BaseException], None]
"""Takes places of rows in a block, and for each whether it was applied; or why that is unknown for all of them."""


class Store(Protocol):
    """The protocol of every store. Its coroutines raise errors.StoreUnavailable where the store cannot answer.

    Whether a write was applied is unknown then: load before the next try.
    """

    volatile: bool  # a restart of the process forgets everything
    tells: bool  # `replace` takes a block with an outbox: its letters go with the records, or not at all

    async def open(self) -> None:
        """Connect; create what is needed. Raises StoreUnavailable where that fails."""

    async def close(self) -> None:
        """Flush what was accepted, then disconnect. Idempotent."""

    async def ping(self) -> None:
        """Return if the store can take a write now."""

    def apart(self, keys: Sequence[str]) -> Sequence[Sequence[int]]:
        """Places of keys in groups: one that is slow or lost should not hold up the load of another."""

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        """The records under `keys`, in order; None where there is none (or it has expired)."""

    def replace(self, block: Block, done: Done) -> None:
        """Put each next record of a block where its expected token is, each atomically and durably.

        Nobody writes to the block's arrays before `done` has been called for all rows, and to `new` of one that stays
        not before a later block of its keys was applied whole. `done` is called once or several times, maybe before
        this returns, so that every row is told exactly once; rows that are slow or lost do not hold up the others.
        This itself raises nothing.
        """

    async def change(self, writes: Sequence[Write]) -> list[bool]:
        """Apply each write whose `expect` holds, each atomically and durably; say which were applied.

        Writes of one call have distinct keys and are independent of each other. Returning True is the
        acknowledgement: the write is there after the configured durability level says so.
        """

    async def list_keys(self, prefix: str, cursor: str, limit: int) -> tuple[list[str], str]:
        """Keys that start with `prefix`, at most about `limit`, and the cursor of the next page ("" : no more).

        Start with cursor "". A page may be short or empty although there is a next one. A key that exists from the
        first page to the last is listed at least once.
        """

    async def usage(self) -> dict[str, tuple[int, int]]:
        """How many sessions, and bytes of records, each namespace has; about, while they change."""

    async def load_side(self, key: str, name: str) -> bytes | None:
        """One side record of a session."""

    async def list_sides(self, key: str) -> list[str]:
        """Names of a session's side records, sorted."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What a URL does not say."""

    durability: str = "commit"
    """A commit is acknowledged when the store has it; `replicated`: and so have replicas; `interval`: at once."""
    interval_s: float = 1.0  # until the store has it too: the loss window of `interval`
    replicas: int = 1  # how many `replicated` waits for, and how long
    replica_timeout_s: float = 0.5
    connect_timeout_s: float = 1.0  # until a server counts as gone (Redis)
    reply_timeout_s: float = 1.0  # until a reply counts as lost (Redis), or another process's lock as stuck (SQLite)

    @property
    def awaited(self) -> int:
        """How many replicas a commit waits for."""
        return self.replicas if self.durability == "replicated" else 0


def namespace_of(key: str) -> str:
    """Whose session it is."""
    return key.partition("/")[0]


def as_writes(block: Block) -> list[Write]:
    """What Store.replace takes, as Store.change takes it."""
    rows = zip(block.keys, block.expected(), block.records(), strict=True)
    ttl_s, touch_sides = block.ttl_s, block.touch_sides
    return [Write(key, token or None, record, ttl_s, None, touch_sides) for key, token, record in rows]


def tell(done: Done, rows: Sequence[int], work: Awaitable[list[bool]]) -> None:
    """Call `done` for some rows of a block as soon as `work` (as by Store.change) has ended."""

    def ended(future: "asyncio.Future[list[bool]]") -> None:
        done(rows, CancelledError() if future.cancelled() else future.exception() or future.result())

    asyncio.ensure_future(work).add_done_callback(ended)
