"""The store's part: where sessions begin that it has, and their final records, so that a server goes on from there."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from typing import Final, TypeVar

from stepcast.errors import SessionExists, StateVersionMismatch

from ..engine.repository import Served
from ..records.record import Record, new_record, wall_clock_ms
from ..sessions.core import Address
from ..sessions.edits import check_id
from ..sessions.stored import Ledger
from ..settings import Settings
from ..store import Store, Write
from ..store.urls import StoreOptions, open_store
from .scratch import Saved
from .states import BEFORE

_AT_ONCE: Final = 256

T = TypeVar("T")


class Landing:
    """A store, open.

    Args:
        nonce: The run's own: final records are known by it, so that a run that was killed lands none twice.
        goes_on: Sessions that the store has go on from there; else they are refused.
    """

    def __init__(self, settings: Settings, served: Served, namespace: str, nonce: bytes, goes_on: bool) -> None:
        self._served, self._namespace, self._nonce, self._goes_on = served, namespace, nonce, goes_on
        self._runner = asyncio.Runner()
        timeout = settings.store_timeout_s
        options = StoreOptions(
            replicas=settings.replicas,
            replica_timeout_s=timeout / 2,
            connect_timeout_s=timeout / 2,
            reply_timeout_s=timeout,
        )
        durability = "commit" if settings.durability == "interval" else settings.durability
        self._store: Store = open_store(settings.store, durability=durability, options=options)
        self._ledger = Ledger(self._store, settings.ttl_s, wall_clock_ms, lambda _: None)
        try:
            self._runner.run(self._store.open())
        except BaseException:
            self._runner.close()
            raise

    def close(self) -> None:
        """Close the store."""
        self._runner.run(self._store.close())
        self._runner.close()

    def _address(self, key: str) -> Address:
        return Address(self._namespace, self._served.name, check_id(key))

    def begun(self, keys: Sequence[str]) -> list[Saved]:
        """Where sessions begin that the store has.

        Raises:
            InvalidSessionId, SessionExists, StateVersionMismatch.
        """
        return self._runner.run(self._begun(keys))

    async def _begun(self, keys: Sequence[str]) -> list[Saved]:
        found = []
        for some in _batched(keys):
            addresses = [self._address(key) for key in some]
            for key, address, data in zip(
                some, addresses, await self._store.load([address.key for address in addresses]), strict=True
            ):
                if data is not None:
                    found.append(self._taken(key, self._ledger.decode(address.key, data)))
        return found

    def _taken(self, key: str, record: Record) -> Saved:
        """A session that the store has, as it stands there."""
        if not self._goes_on:
            raise SessionExists(
                f"the store has a session {key!r} of model {self._served.name!r} already, at step {record.step}. Go on "
                "from it with --continue, or end it."
            )
        if record.fingerprint != self._served.fingerprint or record.examples > 1:
            was = f"version {record.version}" + (f" with {record.examples} examples" if record.examples > 1 else "")
            raise StateVersionMismatch(
                f"session {key!r} has a state of {was}, this run steps version {self._served.version}. Take --version "
                f"{record.version}, or clear the state."
            )
        state = record.state or self._served.runtime.initial(1)
        return Saved(key, record.step, BEFORE, record.token, state)

    def land(self, sessions: Iterable[Saved]) -> list[str]:
        """Write final records; the sessions that others have changed meanwhile, which stay as they are."""
        return self._runner.run(self._land(sessions))

    async def _land(self, sessions: Iterable[Saved]) -> list[str]:
        changed: list[str] = []
        for some in _batched(sessions):
            addresses = [self._address(saved.key) for saved in some]
            found = await self._store.load([address.key for address in addresses])
            writes, keys = [], []
            for saved, address, data in zip(some, addresses, found, strict=True):
                before = None if data is None else self._ledger.decode(address.key, data)
                if before is not None and before.incarnation == self._incarnation(saved.key):
                    continue  # it was written before the run was killed, and may have been stepped since
                record = self._record(saved, before)
                writes.append(Write(address.key, saved.replaces or None, record.encode(), self._ledger.ttl_s(record)))
                keys.append(saved.key)
            applied = await self._store.change(writes) if writes else []
            changed += [key for key, done in zip(keys, applied, strict=True) if not done]
        return changed

    def _incarnation(self, key: str) -> bytes:
        return blake2b(key.encode(), digest_size=8, key=self._nonce).digest()

    def _record(self, saved: Saved, before: Record | None) -> Record:
        """The session's record from now on, of an incarnation of its own: a server's copy of the old one is stale."""
        served = self._served
        fresh = new_record(served.version, served.fingerprint, examples=1, state=saved.state, step=saved.step)
        fresh.incarnation = self._incarnation(saved.key)
        if before is None:
            return fresh
        kept = {name: getattr(before, name) for name in ("flags", "created_ms", "ttl_s", "source")}
        return replace(fresh, **kept)


def _batched(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while some := list(islice(rest, _AT_ONCE)):
        yield some
