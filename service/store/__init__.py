"""Where sessions rest: one small protocol, several stores.

A store keeps opaque records (records/record.py) under keys `<namespace>/<model>/<session>` and knows two things about
them: bytes 8 to 24 are the token that compare-and-set compares, and a session may have side records (its
checkpoints), which live and die with it.
"""

import asyncio
from asyncio import CancelledError
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..records.layout import TOKEN

Bytes = npt.NDArray[np.uint8]


class Write(NamedTuple):
    """One change of one session: all of it or nothing."""

    key: str
    expect: bytes | None
    """Token (16 bytes) of the record that this one replaces; None: there must be no record."""
    record: bytes | None
    """The new record; None: forget the session and its side records."""
    ttl_s: float | None = None
    """Seconds until the session is forgotten unless it is written again; None: never. Side records follow."""
    sides: Mapping[str, bytes] | None = None
    """Side records to set in the same atomic operation."""
    touch_sides: bool = False
    """The session has side records: give them the new time to live too."""


class Rows:
    """Records of many sessions, side by side.

    Attributes:
        keys: Of the sessions.
        records: (B, W) uint8, the present ones.
        ttl_s: As in Write, of all.
        place: What the store has noted of them.
    """

    __slots__ = ("keys", "place", "records", "ttl_s")

    def __init__(self, keys: Sequence[str], records: Bytes, ttl_s: float | None) -> None:
        self.keys, self.records, self.ttl_s = keys, records, ttl_s
        self.place: object = None


Replaced = Callable[[list[bool] | BaseException], None]
"""Takes what `Store.commit` returns or raises."""


def hand_on(done: Replaced, future: "asyncio.Future[list[bool]]") -> None:
    """Tell `done` what has become of a commit; a callback of futures."""
    done(CancelledError() if future.cancelled() else future.exception() or future.result())


def as_records(rows: Bytes) -> list[bytes]:
    """Records that lie side by side (B, W), one by one."""
    made: list[bytes] = rows.view(f"V{rows.shape[1]}")[:, 0].tolist()  # some times as fast as cutting
    return made


def as_writes(
    keys: Sequence[str], old: Sequence[bytes], new: Sequence[bytes], ttls_s: Sequence[float | None]
) -> list[Write]:
    """What Store.replace takes, as Store.commit takes it."""
    each = zip(keys, old, new, ttls_s, strict=True)
    return [Write(key, before[TOKEN], after, ttl_s) for key, before, after, ttl_s in each]


def replace_each(store: "Store", rows: Rows, new: Bytes, done: Replaced) -> None:
    """What Store.replace_rows does, record by record."""
    old, after = as_records(rows.records), as_records(new)
    store.replace(rows.keys, old, after, [rows.ttl_s] * len(old), done)


class Store(Protocol):
    """The protocol of every store. All methods raise errors.StoreUnavailable where the store can not answer.

    After a StoreUnavailable from commit, whether a write was applied is unknown: load before the next try.
    """

    volatile: bool
    """True where a restart of the process forgets everything."""

    async def open(self) -> None:
        """Connect; create what is needed. Raises StoreUnavailable where that fails."""

    async def close(self) -> None:
        """Flush what was accepted, then disconnect. Idempotent."""

    async def ping(self) -> None:
        """Return if the store can take a write now."""

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        """The records under `keys`, in order; None where there is none (or it has expired)."""

    async def commit(self, writes: Sequence[Write]) -> list[bool]:
        """Apply each write whose `expect` holds, each atomically and durably; say which were applied.

        Writes of one call have distinct keys and are independent of each other. Returning True is the
        acknowledgement: the write is there after the configured durability level says so.
        """

    def replace(
        self,
        keys: Sequence[str],
        old: Sequence[bytes],
        new: Sequence[bytes],
        ttls_s: Sequence[float | None],
        done: Replaced,
    ) -> None:
        """Do what `commit` does for plain steps: put `new[i]` where there is the record of `old[i]`'s token.

        The sessions have no side records. `done` is called with the outcome, maybe before this returns; this itself
        raises nothing.
        """

    def replace_rows(self, rows: Rows, new: Bytes, done: Replaced) -> None:
        """The same for all of `rows`, in whose place `new` (B, W) comes.

        Nobody writes to `rows.records` before `done` is called, and to `new` not before the rows have been replaced
        once more, or given up.
        """

    async def list_keys(self, prefix: str, cursor: str, limit: int) -> tuple[list[str], str]:
        """Keys that start with `prefix`, at most about `limit`, and the cursor of the next page ("" : no more).

        Start with cursor "". A page may be short or empty although there is a next one. A key that exists from the
        first page to the last is listed at least once.
        """

    async def load_side(self, key: str, name: str) -> bytes | None:
        """One side record of a session."""

    async def list_sides(self, key: str) -> list[str]:
        """Names of a session's side records, sorted."""
