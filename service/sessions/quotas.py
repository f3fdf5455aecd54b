"""How much may be stored: bytes of one session; sessions and bytes of one tenant.

What a tenant has is counted in the store at the start and from time to time, and in between by what this server makes
and ends. So several servers of one store together may exceed a tenant's quota by what they make between two counts.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

from stepcast.errors import QuotaExceeded, StoreUnavailable, TooLarge

from ..settings import Settings
from ..store import Store
from ..telemetry import log

COUNT_S: Final = 60.0
"""From the end of one count to the next."""


@dataclass(slots=True)
class Used:
    """What a tenant has."""

    sessions: int = 0
    bytes: int = 0


class Quotas:
    """The quotas of a server."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._session_bytes = store, settings.session_limit_bytes
        self._sessions, self._bytes = settings.tenant_sessions_limit, settings.tenant_limit_bytes
        self.counts = bool(self._sessions or self._bytes)
        self._used: dict[str, Used] = {}
        self._since: dict[str, Used] = {}  # what was made since a count began

    def check(self, session: str, size: int) -> None:
        """Raises TooLarge where a session would have more bytes than it may."""
        if size > self._session_bytes:
            text = f"session {session!r} would take {size} bytes (limit {self._session_bytes}). Give it fewer examples."
            raise TooLarge(text, limit=self._session_bytes)

    def take(self, namespace: str, sessions: int, size: int) -> None:
        """Count what a tenant is about to store; QuotaExceeded where that is more than it may."""
        if not self.counts:
            return
        used = self._used.setdefault(namespace, Used())
        for limit, has, more, what in (
            (self._sessions, used.sessions, sessions, "sessions"),
            (self._bytes, used.bytes, size, "bytes"),
        ):
            if limit and more > 0 and has + more > limit:
                text = f"namespace {namespace!r} has {has} {what} (limit {limit}), got {more} more"
                raise QuotaExceeded(f"{text}. End sessions first.", unit=what, used=has, limit=limit)
        self.give(namespace, -sessions, -size)

    def give(self, namespace: str, sessions: int, size: int) -> None:
        """Count what a tenant does not store any more."""
        if self.counts:
            for used in (self._used, self._since):
                mine = used.setdefault(namespace, Used())
                mine.sessions, mine.bytes = mine.sessions - sessions, mine.bytes - size

    async def count(self) -> None:
        """Count what the store has; nothing where no tenant has a quota."""
        if not self.counts:
            return
        self._since = {}
        found = {namespace: Used(*used) for namespace, used in (await self._store.usage()).items()}
        for namespace, since in self._since.items():
            used = found.setdefault(namespace, Used())
            used.sessions, used.bytes = used.sessions + since.sessions, used.bytes + since.bytes
        self._used = found

    async def watch(self) -> None:
        """Count again and again, until cancelled."""
        while self.counts:
            await asyncio.sleep(COUNT_S)
            try:
                await self.count()
            except StoreUnavailable as error:
                log.warning("what tenants have is not counted: %s", error)
