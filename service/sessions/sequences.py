"""Sessions that begin and end by flags in their steps: what is remembered of one that has ended, why one is missing.

A step that starts a session is one commit (`Sessions.step`). One that ends it is committed as any other; then the
session gives way to a mark, which names the cause if a later step misses its session, and keeps the last answer: so a
retry of the last step is answered as a retry of any other.
"""

from dataclasses import replace
from typing import Final, Literal

import numpy as np

from stepcast.errors import SequenceNotStarted, SessionBusy

from ..records.digest import same_payload
from ..records.layout import TTL_FOR_EVER
from ..records.record import Record, new_record
from ..store import Write
from .core import Address, Answers, Floats, Mask
from .turns import Sessions

ENDED_S: Final = 300.0
"""How long an ended session is remembered: as long as a client may retry its last step."""
STARTED_S: Final = 86_400.0
"""How long one that expires is remembered after its time to live."""
MARK: Final = "~sequences"
"""Stands behind a tenant's name in the keys of marks: no tenant has such a name."""

Cause = Literal["never_started", "ended", "expired"]
_TRIES: Final = 16


def is_mark(key: str) -> bool:
    """Whether a store's key is that of a mark, not of a session."""
    return key.partition("/")[0].endswith(MARK)


class Sequences:
    """The beginnings and ends of a server's sessions."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions, self._ledger, self._store = sessions, sessions.ledger, sessions.store

    async def started(self, address: Address) -> None:
        """Remember a session that was started, if it may expire: nothing else would tell that it was there."""
        ttl_s = self._sessions.settings.ttl_s
        if ttl_s:
            fresh = new_record(0, bytes(8), ttl_s=TTL_FOR_EVER, clock=self._ledger.clock)
            await self._mark(_mark_of(address), fresh, ttl_s + STARTED_S)

    async def end(self, address: Address, step: int) -> None:
        """Forget a session that ends with this step, and remember that it was ended.

        One that is not there any more, or that somebody has stepped on or started anew since, is left alone.

        Raises StoreUnavailable, or SessionBusy where others kept changing it.
        """
        for _ in range(_TRIES):
            record = await self._ledger.find(address)
            if record is None or record.step != step:
                return
            last = replace(record, state=b"", inputs=b"", answers=record.answers[-1:], flags=0, source=None)
            await self._mark(_mark_of(address), last, ENDED_S)  # first: a crash in between leaves both
            if await self._ledger.forget(address, record):
                self._sessions.quotas.give(address.namespace, 1, record.size)
                return
        raise SessionBusy(f"session {address.session!r} was changed by others {_TRIES} times. Retry.")

    async def _mark(self, mark: Address, record: Record, ttl_s: float) -> None:
        """Put a mark in the place of what was remembered before."""
        for _ in range(_TRIES):
            (before,) = await self._store.load([mark.key])
            expect = None if before is None else self._ledger.decode(mark.key, before).token
            fresh = replace(record, incarnation=new_record(0, bytes(8)).incarnation)  # a token names one record
            (applied,) = await self._store.change([Write(mark.key, expect, fresh.encode(), ttl_s)])
            if applied:
                return
        raise SessionBusy(f"session {mark.session!r} was ended by others {_TRIES} times. Retry.")

    async def missing(
        self, address: Address, what: str, seq: int | None, x: Floats, mask: Mask | None
    ) -> tuple[Answers, int]:
        """The kept answer to a retry of the step that ended a session, and its number.

        Args:
            what: What the caller calls the session.
            x, mask: The call's inputs (N, T, F) and mask (N, T).

        Raises:
            SequenceNotStarted: it is none; the error names the cause.
        """
        found = await self._ledger.find(_mark_of(address))
        kept = None if found is None or seq is None else found.answer(seq)
        if found is None or kept is None or not same_payload(kept, self._sessions.digests.call(x, mask), x, mask):
            raise self._not_started(address, what, found)
        outputs = np.frombuffer(kept.outputs, np.float32).reshape(1, found.examples, kept.steps, -1)
        self._sessions.metrics.retries.labels(address.model).inc()
        return Answers(outputs, found.version), kept.seq

    def _not_started(self, address: Address, what: str, found: Record | None) -> SequenceNotStarted:
        cause: Cause = "never_started" if found is None else "ended" if found.step else "expired"
        told = {
            "never_started": "was never started",
            "ended": "has ended",
            "expired": f"has expired, {self._sessions.settings.ttl_s} s after its last step",
        }
        text = f"{what} of model {address.model!r} {told[cause]}"
        advice = "Send the first request of a sequence with the START flag (sequence_start)."
        return SequenceNotStarted(f"{text}. {advice}", cause=cause, session=address.session, model=address.model)


def _mark_of(address: Address) -> Address:
    return Address(address.namespace + MARK, address.model, address.session)
