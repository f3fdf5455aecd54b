"""Sessions as the store has them: read, create, and change by compare-and-set."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from stepcast.errors import PreconditionFailed, SessionBusy, SessionExists, SessionNotFound

from ..records import record as records
from ..records.record import Record
from ..store import Store, Write
from ..telemetry import log
from .core import Address

CHANGE_TRIES: Final = 16


@dataclass(frozen=True, slots=True)
class Edit:
    """What `Sessions.change` writes: the next record (None: forget the session) and side records with it."""

    record: Record | None
    sides: dict[str, bytes] | None = None


class Overtaken(Exception):
    """The session is not what it was; see only_from. Never leaves this room's callers."""


def only_from(base: Record, edit: Edit) -> Callable[[Record | None], Edit]:
    """An edit for Ledger.change that raises Overtaken where the session is not `base` any more."""

    def decide(found: Record | None) -> Edit:
        if found is None or found.token != base.token:
            raise Overtaken
        return edit

    return decide


def etag(record: Record) -> str:
    """The entity tag of a record: another one after every change."""
    return f'"{record.token.hex()}"'


def _matches(if_match: str, record: Record | None) -> bool:
    """RFC 9110's If-Match: a list of entity tags, or * for whatever there is."""
    tags = [tag.strip() for tag in if_match.split(",")]
    return record is not None and ("*" in tags or etag(record) in tags)


def new_session_id() -> str:
    """An id for a session whose client made none: 22 characters, not to be guessed."""
    return secrets.token_urlsafe(16)


class Ledger:
    """The records of all sessions.

    Args:
        ttl_s: The server's time to live, s; 0: for ever.
        clock: Wall clock in ms.
        replaced: Called with the key of a session that was written here.
    """

    def __init__(self, store: Store, ttl_s: int, clock: Callable[[], int], replaced: Callable[[str], None]) -> None:
        self.store, self.clock = store, clock
        self._ttl_s, self._replaced = ttl_s, replaced

    async def read(self, address: Address) -> Record:
        """The session's record as the store has it.

        Raises:
            SessionNotFound, StoreUnavailable.
        """
        (data,) = await self.store.load([address.key])
        if data is None:
            raise self.not_found(address)
        return self.decode(address.key, data)

    def not_found(self, address: Address) -> SessionNotFound:
        """The error for a session that is not there."""
        return SessionNotFound(
            f"model {address.model!r} has no session {address.session!r} (never created, ended or expired)",
            model=address.model,
            session=address.session,
        )

    async def create(self, address: Address, fresh: Record) -> Record:
        """Store a new session.

        Raises:
            SessionExists: there is one of that id.
        """
        (made,) = await self.store.change([Write(address.key, None, fresh.encode(), self.ttl_s(fresh))])
        if not made:
            raise SessionExists(
                f"model {address.model!r} has a session {address.session!r} already", session=address.session
            )
        self._replaced(address.key)
        return fresh

    async def change(
        self,
        address: Address,
        edit: "Callable[[Record | None], Edit]",
        if_match: str | None = None,
    ) -> Record | None:
        """Change a session by compare-and-set; the store's record decides, not a copy.

        Args:
            edit: Takes the record (None: no session), returns what is to be written. May run several times.
            if_match: Entity tag that the record must have.

        Raises:
            PreconditionFailed: the record has another entity tag. SessionBusy: others kept changing it.
        """
        for _ in range(CHANGE_TRIES):
            (data,) = await self.store.load([address.key])
            found = None if data is None else self.decode(address.key, data)
            if if_match is not None and not _matches(if_match, found):
                raise PreconditionFailed(
                    f"session {address.session!r} has entity tag {etag(found) if found else None}, If-Match was "
                    f"{if_match}. Read it again.",
                    session=address.session,
                )
            edited = edit(found)
            after = edited.record
            write = Write(
                address.key,
                found.token if found else None,
                after.encode() if after else None,
                self.ttl_s(after) if after else None,
                edited.sides,
                bool(after and after.flags & records.HAS_CHECKPOINTS),
            )
            (applied,) = await self.store.change([write])
            if applied:
                self._replaced(address.key)
                return after
        raise SessionBusy(f"session {address.session!r} was changed by others {CHANGE_TRIES} times. Retry.")

    def decode(self, key: str, data: bytes) -> Record:
        """A record from the store's bytes; SessionBusy where this server can not read them."""
        try:
            return records.decode(data)
        except records.BadRecord as error:
            log.error("session %s: %s", key, error)
            raise SessionBusy(f"the stored session can not be read by this server: {error}") from error

    def ttl_s(self, record: Record) -> float | None:
        """Seconds until the session is forgotten, None: never."""
        return self.seconds(record.ttl_s)

    def seconds(self, ttl_s: int) -> float | None:
        """The same of a record's field."""
        return None if ttl_s == records.TTL_FOR_EVER else float(ttl_s or self._ttl_s) or None
