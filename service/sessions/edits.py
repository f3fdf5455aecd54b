"""What can be done to a session besides stepping it: create, get, set, clear, fork, checkpoint, rewind, roll out.

Each is a read of the store's record and one compare-and-set write, so it is safe beside steps of any replica.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from secrets import token_bytes
from typing import Any, Final

import numpy as np

from stepcast.errors import (
    CheckpointExists,
    CheckpointNotFound,
    ExamplesMismatch,
    InvalidRequest,
    InvalidSessionId,
    LayerNotFound,
    SessionBusy,
    SessionExists,
    ShapeMismatch,
    StateMismatch,
    StateVersionMismatch,
    TooLarge,
    VersionInUse,
)

from ..doors import bodies as wire
from ..engine.repository import Served
from ..records import record as records
from ..records.record import Record
from .core import Address
from .stored import CHANGE_TRIES, Edit, Overtaken, new_session_id, only_from
from .turns import Sessions

SESSION_ID: Final = re.compile(r"[A-Za-z0-9._:@~-]{1,256}")


@dataclass(frozen=True, slots=True)
class View:
    """A session's record and the model version that its state belongs to."""

    record: Record
    served: Served


def check_id(session: str, what: str = "session") -> str:
    """The id itself.

    Raises:
        InvalidSessionId: it is not 1 to 256 of letters, digits and ._:@~-
    """
    if not SESSION_ID.fullmatch(session):
        raise InvalidSessionId(f"{what} id {session[:64]!r} is not 1 to 256 of letters, digits and ._:@~-")
    return session


class States:
    """The operations on sessions, for every door."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.ledger, self.repository, self.settings = sessions.ledger, sessions.repository, sessions.settings

    # --- whole sessions -----------------------------------------------------------------------------------------

    async def create(self, namespace: str, model: str, body: wire.CreateBody) -> tuple[Address, Record]:
        """Create a session; the server makes the id where the body has none.

        Raises:
            SessionExists, InvalidSessionId, ModelNotFound, NotStreaming, TooLarge.
        """
        address = Address(namespace, model, check_id(body.session) if body.session else new_session_id())
        served = self.repository.require(model, body.version) if body.version else self.repository.live(model)
        self.sessions.check_streams(served)
        examples = body.examples or 0
        self._check_examples(examples)
        fresh = records.new_record(
            served.version,
            served.fingerprint,
            examples=examples,
            state=served.runtime.initial(examples),
            ttl_s=_ttl(body.ttl_s),
            clock=self.ledger.clock,
        )
        return address, await self.ledger.create(address, fresh)

    async def end(self, address: Address, if_match: str | None = None) -> None:
        """End and forget a session, its checkpoints with it.

        Raises:
            SessionNotFound, PreconditionFailed.
        """
        self.repository.live(address.model)

        def edit(found: Record | None) -> Edit:
            self._found(address, found)
            return Edit(None)

        await self.ledger.change(address, edit, if_match)

    async def list_sessions(
        self, namespace: str, model: str, prefix: str, cursor: str, limit: int
    ) -> tuple[list[str], str]:
        """Ids of a model's sessions that start with `prefix`, and the cursor of the next page ("": no more)."""
        self.repository.live(model)
        start = f"{namespace}/{model}/"
        keys, following = await self.sessions.store.list_keys(start + prefix, cursor, limit)
        return [key[len(start) :] for key in keys], following

    async def view(self, address: Address) -> View:
        """The session as the store has it."""
        self.repository.live(address.model)
        record = await self.ledger.read(address)
        return View(record, self._served(address, record))

    def info(self, address: Address, record: Record) -> dict[str, Any]:
        """What GET on a session answers."""
        ttl = self.ledger.ttl_s(record)
        return {
            "session": address.session,
            "model": address.model,
            "version": record.version,
            "step": record.step,
            "examples": record.examples or None,
            "bytes": len(record.encode()),
            "created_at": record.created_ms / 1000,
            "used_at": record.used_ms / 1000,
            "expires_at": None if ttl is None else record.used_ms / 1000 + ttl,
        }

    # --- state: get, set, clear ---------------------------------------------------------------------------------

    def state(self, address: Address, view: View, layer: str | None = None) -> dict[str, Any]:
        """What GET state answers: the arrays of all layers, or of one."""
        record, served = view.record, view.served
        arrays: dict[str, Any] = served.runtime.unpack(record.state, record.examples)
        answer: dict[str, Any] = {
            "session": address.session,
            "model": address.model,
            "version": record.version,
            "fingerprint": record.fingerprint.hex(),
            "step": record.step,
            "examples": record.examples,
        }
        if layer is not None:
            self._layer(served, layer)
            answer["layer"], arrays = layer, arrays.get(layer, {})
        return {**answer, "state": arrays}

    async def put(self, address: Address, body: wire.StateBody, if_match: str | None = None) -> Record:
        """Set all layers (rnnSetPreviousState); creates the session if need be.

        Kept answers stay as long as the step number stays, so that putting back what get answered changes nothing.

        Raises:
            StateMismatch, ShapeMismatch, NonFinite, StateVersionMismatch, PreconditionFailed.
        """

        def edit(found: Record | None) -> Edit:
            served = self._target(address, body, found)
            state, examples = wire.state_arrays(body.state, served.manifest)
            if not served.manifest.states:  # then no tensor says it
                examples = body.examples or (found.examples if found else 0)
            return Edit(self._with_state(found, served, served.runtime.pack(state), examples, body))

        return await self._changed(address, edit, if_match)

    async def put_layer(
        self, address: Address, layer: str, body: wire.StateBody, if_match: str | None = None
    ) -> Record:
        """Set one layer; the others stay, or have their initial value in a session without a state.

        Raises:
            LayerNotFound, ExamplesMismatch, and what put raises.
        """

        def edit(found: Record | None) -> Edit:
            served = self._target(address, body, found)
            self._layer(served, layer)
            arrays, examples = wire.layer_arrays(body.state, served.manifest, layer)
            before = found.examples if found else 0
            if found is not None and before and found.fingerprint != served.fingerprint:
                raise StateVersionMismatch(
                    f"session {address.session!r} has a state of version {found.version}, got layer {layer!r} of "
                    f"version {served.version}. Put all layers, or clear the state.",
                    session=address.session,
                    version=found.version,
                )
            if before not in (0, examples):
                raise ExamplesMismatch(
                    f"session {address.session!r} has {before} examples, got {examples} for layer {layer!r}. "
                    "Clear the state to change the number.",
                    examples=before,
                    got=examples,
                )
            state = found.state if found and before else served.runtime.initial(examples)
            whole = served.runtime.unpack(state, examples)
            whole[layer] = arrays
            return Edit(self._with_state(found, served, served.runtime.pack(whole), examples, body))

        return await self._changed(address, edit, if_match)

    async def clear(self, address: Address, if_match: str | None = None) -> Record:
        """Forget the state (rnnClearPreviousState): zeros, any N next. The step number goes on.

        A session whose model version is gone continues on the live one.

        Raises:
            SessionNotFound, PreconditionFailed.
        """
        live = self.repository.live(address.model)

        def edit(found: Record | None) -> Edit:
            record = self._found(address, found)
            served = self.repository.get(address.model, record.version)
            if served is None or served.fingerprint != record.fingerprint:
                served = live
            return Edit(
                record.changed(
                    self.ledger.clock(),
                    state=b"",
                    examples=0,
                    answers=(),
                    inputs=b"",
                    version=served.version,
                    fingerprint=served.fingerprint,
                )
            )

        return await self._changed(address, edit, if_match)

    # --- fork, checkpoint, rewind -------------------------------------------------------------------------------

    async def fork(self, address: Address, to: str | None) -> tuple[Address, Record]:
        """A new session with the same state, step number and kept answers; checkpoints stay with the parent.

        Raises:
            SessionNotFound, SessionExists, InvalidSessionId.
        """
        child = Address(address.namespace, address.model, check_id(to) if to else new_session_id())
        if child == address:
            raise SessionExists(f"session {address.session!r} can not be forked to itself", session=address.session)
        view = await self.view(address)
        now = self.ledger.clock()
        record = replace(view.record, incarnation=token_bytes(8), revision=1, created_ms=now, used_ms=now, flags=0)
        return child, await self.ledger.create(child, record)

    async def checkpoint(self, address: Address, name: str | None) -> dict[str, Any]:
        """Name the session as it is now; the default name is step-<step>.

        Raises:
            SessionNotFound, CheckpointExists, TooLarge: there are as many as a session may have.
        """
        self.repository.live(address.model)
        if name is not None:
            check_id(name, "checkpoint")
        for _ in range(CHANGE_TRIES):
            record = await self.exists(address)
            chosen = await self._free_name(address, name or f"step-{record.step}")
            after = record.changed(self.ledger.clock(), flags=record.flags | records.HAS_CHECKPOINTS)
            try:
                await self._changed(address, only_from(record, Edit(after, {chosen: record.encode()})), None)
            except Overtaken:  # perhaps by a checkpoint of that name: look again
                continue
            return {"session": address.session, "name": chosen, "step": record.step}
        raise SessionBusy(f"session {address.session!r} was changed by others {CHANGE_TRIES} times. Retry.")

    async def _free_name(self, address: Address, name: str) -> str:
        """A checkpoint's name, if the session has room for one of that name."""
        names = await self.sessions.store.list_sides(address.key)
        if name in names:
            raise CheckpointExists(f"session {address.session!r} has a checkpoint {name!r}", checkpoint=name)
        limit = self.settings.checkpoints_limit
        if len(names) >= limit:
            raise TooLarge(f"session {address.session!r} has {len(names)} checkpoints (limit {limit})", limit=limit)
        return name

    async def checkpoints(self, address: Address) -> list[dict[str, Any]]:
        """A session's checkpoints, by name."""
        await self.exists(address)
        found = []
        for name in await self.sessions.store.list_sides(address.key):
            data = await self.sessions.store.load_side(address.key, name)
            if data is not None:
                found.append({"name": name, "step": self.ledger.decode(address.key, data).step})
        return found

    async def rewind(self, address: Address, to: str, if_match: str | None = None) -> Record:
        """Make a session what it was at a checkpoint: state, step number, kept answers.

        Raises:
            SessionNotFound, CheckpointNotFound, PreconditionFailed.
        """
        before = await self.exists(address)
        data = await self.sessions.store.load_side(address.key, check_id(to, "checkpoint"))
        missing = CheckpointNotFound(f"session {address.session!r} has no checkpoint {to!r}", checkpoint=to)
        if data is None:
            raise missing
        then = self.ledger.decode(address.key, data)

        def edit(found: Record | None) -> Edit:
            record = self._found(address, found)
            if record.incarnation != before.incarnation:  # ended and created anew meanwhile
                raise missing
            return Edit(
                replace(
                    then,
                    incarnation=record.incarnation,
                    revision=record.revision + 1,
                    created_ms=record.created_ms,
                    used_ms=self.ledger.clock(),
                    ttl_s=record.ttl_s,
                    flags=record.flags,
                )
            )

        return await self._changed(address, edit, if_match)

    async def exists(self, address: Address) -> Record:
        """The record; SessionNotFound where there is none."""
        self.repository.live(address.model)
        return await self.ledger.read(address)

    # --- versions -----------------------------------------------------------------------------------------------

    async def retire(self, model: str, version: int, force: bool) -> dict[str, Any]:
        """Stop serving a version.

        Raises:
            VersionInUse: sessions hold it, with their number; not where `force`.
        """
        served = self.repository.require(model, version)
        holding = await self._holding(model, version)
        if holding and not force:
            raise VersionInUse(
                f"{holding} sessions hold version {version} of model {model!r}. End or clear them, or force.",
                model=model,
                version=version,
                sessions=holding,
            )
        self.repository.retire(model, version)
        self.sessions.retired(served)
        return {"model": model, "version": version, "sessions": holding}

    async def _holding(self, model: str, version: int) -> int:
        """How many sessions of any tenant have a state of a version."""
        count, cursor = 0, ""
        while True:
            keys, cursor = await self.sessions.store.list_keys("", cursor, 1000)
            mine = [key for key in keys if key.split("/", 2)[1] == model]
            for key, data in zip(mine, await self.sessions.store.load(mine), strict=True):
                count += data is not None and self.ledger.decode(key, data).version == version
            if not cursor:
                return count

    # --- helpers ------------------------------------------------------------------------------------------------

    async def _changed(self, address: Address, edit: Callable[[Record | None], Edit], if_match: str | None) -> Record:
        self.repository.live(address.model)
        record = await self.ledger.change(address, edit, if_match)
        assert record is not None
        return record

    def _found(self, address: Address, found: Record | None) -> Record:
        if found is None:
            raise self.ledger.not_found(address)
        return found

    def _served(self, address: Address, record: Record) -> Served:
        served = self.repository.get(address.model, record.version)
        if served is None or served.fingerprint != record.fingerprint:
            raise self.sessions.version_mismatch(address, record)
        return served

    def _target(self, address: Address, body: wire.StateBody, found: Record | None) -> Served:
        """The version that a put state belongs to: the body's, else the session's, else the live one."""
        live = self.repository.live(address.model)
        number = body.version or (found.version if found else live.version)
        served = self.repository.get(address.model, number)
        if served is None:
            raise StateVersionMismatch(
                f"the state is of version {number} of model {address.model!r}, which is not served (there are "
                f"{self.repository.versions(address.model)})",
                version=number,
                versions=self.repository.versions(address.model),
            )
        self.sessions.check_streams(served)
        if body.fingerprint not in (None, served.manifest.fingerprint):
            raise StateMismatch(
                f"the state was made by a model of fingerprint {body.fingerprint!r}, version {number} has "
                f"{served.manifest.fingerprint!r}",
                fingerprint=served.manifest.fingerprint,
            )
        if body.model not in (None, address.model):
            raise InvalidRequest(f"$.model is {body.model!r}, the path says {address.model!r}")
        return served

    def _with_state(
        self, found: Record | None, served: Served, state: bytes, examples: int, body: wire.StateBody
    ) -> Record:
        self._check_examples(examples)
        if body.examples not in (None, examples):
            raise ShapeMismatch(f"$.examples is {body.examples}, the state has {examples}")
        if found is None:
            return records.new_record(
                served.version,
                served.fingerprint,
                examples=examples,
                state=state,
                step=body.step or 0,
                clock=self.ledger.clock,
            )
        step = found.step if body.step is None else body.step
        same = (step, examples, served.fingerprint) == (found.step, found.examples, found.fingerprint)
        return found.changed(
            self.ledger.clock(),
            version=served.version,
            fingerprint=served.fingerprint,
            examples=examples,
            state=state,
            step=step,
            answers=found.answers if same else (),
            inputs=found.inputs if state == found.state else b"",
        )

    def _layer(self, served: Served, layer: str) -> None:
        layers = list(served.manifest.layers)
        if layer not in layers:
            raise LayerNotFound(f"model {served.name!r} has no state layer {layer!r}, it has {layers}", layers=layers)

    def _check_examples(self, examples: int) -> None:
        limit = self.settings.examples_limit
        if examples > limit:
            raise TooLarge(f"{examples} examples in one session (limit {limit})", limit=limit)


def _ttl(ttl_s: float | None) -> int:
    if ttl_s is None:
        return 0
    return int(np.ceil(ttl_s)) or records.TTL_FOR_EVER
