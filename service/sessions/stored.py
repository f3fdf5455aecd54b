"""Sessions as the store has them: read, create, and change by compare-and-set."""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from stepcast.errors import PreconditionFailed, SessionBusy, SessionExists, SessionNotFound

from ..records.layout import HAS_CHECKPOINTS, BadRecord, seconds
from ..records.record import Record, decode
from ..store import Store, Write
from ..telemetry import log
from .core import Address

_TRIES: Final = 16


@dataclass(frozen=True, slots=True)
class Edit:
    """What `Ledger.change` writes: the next record (None: forget the session) and side records with it."""

    record: Record | None
    sides: dict[str, bytes] | None = None


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

    Args: `ttl_s`: the server's time to live, s, 0 for ever. `clock`: wall clock in ms. `replaced`: called with the key
    of a session that was written here.
    """

    def __init__(self, store: Store, ttl_s: int, clock: Callable[[], int], replaced: Callable[[str], None]) -> None:
        self.store, self.clock = store, clock
        self._ttl_s, self._replaced = ttl_s, replaced

    async def find(self, address: Address) -> Record | None:
        """The session's record as the store has it."""
        (data,) = await self.store.load([address.key])
        return None if data is None else self.decode(address.key, data)

    def there(self, address: Address, found: Record | None) -> Record:
        """The record of a session that has to be there, else SessionNotFound."""
        if found is None:
            text = f"model {address.model!r} has no session {address.session!r} (never created, ended or expired)"
            raise SessionNotFound(text, model=address.model, session=address.session)
        return found

    async def create(self, address: Address, fresh: Record) -> Record:
        """Store a new session; SessionExists where there is one of that id."""
        (made,) = await self.store.change([Write(address.key, None, fresh.encode(), self.ttl_s(fresh))])
        if not made:
            text = f"model {address.model!r} has a session {address.session!r} already"
            raise SessionExists(text, session=address.session)
        self._replaced(address.key)
        return fresh

    async def change(
        self, address: Address, edit: Callable[[Record | None], Awaitable[Edit | None]], if_match: str | None = None
    ) -> Record | None:
        """Change a session by compare-and-set; the store's record decides, not a copy. Its record from now on.

        Args:
            edit: Takes the record (None: no session), returns what is to be written (None: nothing). It is called
                again where others change the session meanwhile.

        Raises PreconditionFailed where `if_match` names another record, SessionBusy where others kept changing it.
        """
        for _ in range(_TRIES):
            found = await self.find(address)
            if if_match is not None and not _matches(if_match, found):
                text = f"entity tag {etag(found) if found else None}, If-Match was {if_match}. Read it again."
                raise PreconditionFailed(f"session {address.session!r} has {text}", session=address.session)
            edited = await edit(found)
            if edited is None:
                return found
            token, after = found.token if found else None, edited.record
            has_sides = found is not None and bool(found.flags & HAS_CHECKPOINTS)
            if after is None:
                write = Write(address.key, token, None, touch_sides=has_sides)
            else:
                write = Write(address.key, token, after.encode(), self.ttl_s(after), edited.sides, has_sides)
            (applied,) = await self.store.change([write])
            if applied:
                self._replaced(address.key)
                return after
        raise SessionBusy(f"session {address.session!r} was changed by others {_TRIES} times. Retry.")

    async def forget(self, address: Address, record: Record) -> bool:
        """Forget a session whose record this is; False: it has another one by now."""
        (applied,) = await self.store.change([Write(address.key, record.token, None)])
        if applied:
            self._replaced(address.key)
        return applied

    def decode(self, key: str, data: bytes) -> Record:
        """A record from the store's bytes; SessionBusy where this server cannot read them."""
        try:
            return decode(data)
        except BadRecord as error:
            log.error("session %s: %s", key, error)
            raise SessionBusy(f"the stored session cannot be read by this server: {error}") from error

    def ttl_s(self, record: Record) -> float | None:
        """Seconds until the session is forgotten, None: never."""
        return seconds(record.ttl_s, self._ttl_s)
