"""What can be done to a session besides stepping it: create, get, set, clear, fork, checkpoint, rewind, end.

Each is a read of the store's record and one compare-and-set write, so it is safe beside steps of any replica.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from secrets import token_bytes
from typing import Any, Final

from stepcast.errors import (
    CheckpointExists,
    CheckpointNotFound,
    InvalidRequest,
    InvalidSessionId,
    LayerNotFound,
    SessionExists,
    ShapeMismatch,
    StateMismatch,
    StateVersionMismatch,
    TooLarge,
    VersionInUse,
)

from ..engine import arrays
from ..engine.repository import Served
from ..records.layout import HAS_CHECKPOINTS, TTL_FOR_EVER
from ..records.record import Record, new_record
from .core import Address, another_n
from .lanes import check_streams
from .sequences import is_mark
from .stored import Edit, new_session_id
from .turns import Sessions

SESSION_ID: Final = re.compile(r"[A-Za-z0-9._:@~-]{1,256}")


@dataclass(frozen=True, slots=True)
class NewState:
    """A state to be set, and what its caller says about it; None: nothing."""

    state: dict[str, Any]  # {layer: {key: [N, *shape]}}, of `layer` alone {key: ...}: nested lists, bytes or arrays
    layer: str | None = None
    model: str | None = None  # which model made it
    version: int | None = None
    fingerprint: str | None = None
    step: int | None = None  # the session's step number from now on; None: it stays
    examples: int | None = None  # N


@dataclass(frozen=True, slots=True)
class View:
    """A session's record and the model version that its state belongs to."""

    record: Record
    served: Served


def check_id(session: str, what: str = "session") -> str:
    """The id itself; InvalidSessionId where it is not 1 to 256 of letters, digits and ._:@~-"""
    if not SESSION_ID.fullmatch(session):
        raise InvalidSessionId(f"{what} id {session[:64]!r} is not 1 to 256 of letters, digits and ._:@~-")
    return session


def new_address(namespace: str, model: str, session: str | None) -> Address:
    """The address of a session that is to be made; the server makes its id where the caller has none."""
    return Address(namespace, model, new_session_id() if session is None else check_id(session))


class States:
    """The operations on sessions, for every door."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.ledger, self.repository, self.settings = sessions.ledger, sessions.repository, sessions.settings

    # --- whole sessions -----------------------------------------------------------------------------------------

    async def create(
        self, address: Address, examples: int = 0, version: int | None = None, ttl_s: float | None = None
    ) -> Record:
        """Create a session of N examples (0: the first step says), on a version (None: the live one).

        Raises SessionExists, ModelNotFound, NotStreaming or TooLarge.
        """
        live, require = self.repository.live, self.repository.require
        served = live(address.model) if version is None else require(address.model, version)
        check_streams(served)
        self._check_examples(examples, served, address.session)
        state, ttl = served.runtime.initial(examples), 0 if ttl_s is None else math.ceil(ttl_s) or TTL_FOR_EVER
        return await self._create(address, self._fresh(served, examples, state, ttl_s=ttl))

    async def _create(self, address: Address, fresh: Record) -> Record:
        """Store a new session, which its tenant must have room for."""
        size, quotas = fresh.size, self.sessions.quotas
        quotas.take(address.namespace, 1, size)
        try:
            return await self.ledger.create(address, fresh)
        except SessionExists:
            quotas.give(address.namespace, 1, size)
            raise

    async def end(self, address: Address, if_match: str | None = None) -> None:
        """End and forget a session, its checkpoints with it; raises SessionNotFound or PreconditionFailed."""
        self.repository.live(address.model)
        size = 0

        async def edit(found: Record | None) -> Edit:
            nonlocal size
            size = self.ledger.there(address, found).size
            return Edit(None)

        await self.ledger.change(address, edit, if_match)
        self.sessions.quotas.give(address.namespace, 1, size)

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
        return self.viewed(address, await self.exists(address))

    def viewed(self, address: Address, record: Record) -> View:
        """The session with the version that its state belongs to; StateVersionMismatch where that is not served."""
        served = self._maker(address, record)
        if served is None:
            raise self.sessions.version_mismatch(address, record)
        return View(record, served)

    def info(self, address: Address, record: Record) -> dict[str, Any]:
        """What GET on a session answers."""
        ttl = self.ledger.ttl_s(record)
        return {
            "session": address.session,
            "model": address.model,
            "version": record.version,
            "step": record.step,
            "examples": record.examples or None,
            "bytes": record.size,
            "created_at": record.created_ms / 1000,
            "used_at": record.used_ms / 1000,
            "expires_at": None if ttl is None else record.used_ms / 1000 + ttl,
        }

    # --- state: get, set, clear ---------------------------------------------------------------------------------

    def state(self, address: Address, view: View, layer: str | None = None) -> dict[str, Any]:
        """What GET state answers: the arrays of all layers, or of one."""
        record, served = view.record, view.served
        tensors: dict[str, Any] = served.runtime.unpack(record.state, record.examples)
        answer: dict[str, Any] = {"session": address.session, "model": address.model, "version": record.version}
        answer |= {"fingerprint": record.fingerprint.hex(), "step": record.step, "examples": record.examples}
        if layer is not None:
            self._check_layer(served, layer)
            answer["layer"], tensors = layer, tensors.get(layer, {})
        return {**answer, "state": tensors}

    async def put(self, address: Address, new: NewState, if_match: str | None = None) -> Record:
        """Set all layers or one (rnnSetPreviousState); creates the session if need be.

        Where one is set, the others stay, or have their initial value in a session without a state. Kept answers stay
        as long as the step number stays, so that putting back what get answered changes nothing.

        Raises StateMismatch, ShapeMismatch, NonFinite, StateVersionMismatch, PreconditionFailed, LayerNotFound or
        ExamplesMismatch.
        """

        def edit(found: Record | None) -> Record:
            served = self._target(address, new, found)
            if new.layer is not None:
                state, examples = self._with_layer(address, served, found, new.layer, new.state)
            else:
                state, examples = arrays.state_arrays(new.state, served.manifest)
                if not served.manifest.states:  # then no tensor says it
                    examples = new.examples or (found.examples if found else 0)
            self._check_examples(examples, served, address.session)
            after = self._with_state(found, served, served.runtime.pack(state), examples, new)
            grows = after.size - (found.size if found else 0)
            self.sessions.quotas.take(address.namespace, int(found is None), grows)
            return after

        return await self._write(address, edit, if_match)

    def _with_layer(
        self, address: Address, served: Served, found: Record | None, layer: str, given: dict[str, Any]
    ) -> tuple[arrays.State, int]:
        """The session's whole state with one layer exchanged, and its N."""
        self._check_layer(served, layer)
        tensors, examples = arrays.layer_arrays(given, served.manifest, layer)
        if found is None or not found.examples:
            state = served.runtime.initial(examples)
        elif found.fingerprint != served.fingerprint:
            text = f"a state of version {found.version}, got layer {layer!r} of version {served.version}"
            advice = "Put all layers, or clear the state."
            facts = {"session": address.session, "version": found.version}
            raise StateVersionMismatch(f"session {address.session!r} has {text}. {advice}", **facts)
        elif found.examples != examples:
            raise another_n(address, found.examples, examples, f" for layer {layer!r}")
        else:
            state = found.state
        return {**served.runtime.unpack(state, examples), layer: tensors}, examples

    async def clear(self, address: Address, if_match: str | None = None) -> Record:
        """Forget the state (rnnClearPreviousState): zeros, any N next. The step number goes on.

        A session whose model version is gone continues on the live one. Raises SessionNotFound or PreconditionFailed.
        """

        def edit(found: Record | None) -> Record:
            record = self.ledger.there(address, found)
            served = self._maker(address, record) or self.repository.live(address.model)
            return self._on(served, record, examples=0, state=b"", answers=(), inputs=b"")

        return await self._write(address, edit, if_match)

    # --- fork, checkpoint, rewind -------------------------------------------------------------------------------

    async def fork(self, address: Address, to: str | None) -> tuple[Address, Record]:
        """A new session with the same state, step number and kept answers; checkpoints stay with the parent.

        Raises SessionNotFound, SessionExists or InvalidSessionId.
        """
        child = new_address(address.namespace, address.model, to)
        if child == address:
            raise SessionExists(f"session {address.session!r} cannot be forked to itself", session=address.session)
        view, now = await self.view(address), self.ledger.clock()
        record = replace(
            view.record, incarnation=token_bytes(8), revision=1, created_ms=now, used_ms=now, flags=0, source=None
        )
        return child, await self._create(child, record)

    async def checkpoint(self, address: Address, name: str | None) -> dict[str, Any]:
        """Name the session as it is now; the default name is step-<step>.

        Raises SessionNotFound, CheckpointExists, or TooLarge: there are as many as a session may have.
        """
        if name is not None:
            check_id(name, "checkpoint")

        async def edit(found: Record | None) -> Edit:
            record = self.ledger.there(address, found)
            chosen = await self._free_name(address, record, name or f"step-{record.step}")
            answer.update(session=address.session, name=chosen, step=record.step)
            after = record.changed(self.ledger.clock(), flags=record.flags | HAS_CHECKPOINTS)
            return Edit(after, {chosen: record.encode()})

        answer: dict[str, Any] = {}
        self.repository.live(address.model)
        await self.ledger.change(address, edit)
        return answer

    async def _names(self, address: Address, record: Record) -> list[str]:
        """Names of a session's checkpoints; its record says whether there are any."""
        return await self.sessions.store.list_sides(address.key) if record.flags & HAS_CHECKPOINTS else []

    async def _free_name(self, address: Address, record: Record, name: str) -> str:
        """A checkpoint's name, if the session has room for one of that name."""
        names = await self._names(address, record)
        if name in names:
            raise CheckpointExists(f"session {address.session!r} has a checkpoint {name!r}", checkpoint=name)
        limit = self.settings.checkpoints_limit
        if len(names) >= limit:
            raise TooLarge(f"session {address.session!r} has {len(names)} checkpoints (limit {limit})", limit=limit)
        self.sessions.quotas.check(address.session, record.size * (len(names) + 2))
        return name

    async def checkpoints(self, address: Address) -> list[dict[str, Any]]:
        """A session's checkpoints, by name."""
        found = []
        for name in await self._names(address, await self.exists(address)):
            data = await self.sessions.store.load_side(address.key, name)
            if data is not None:
                found.append({"name": name, "step": self.ledger.decode(address.key, data).step})
        return found

    async def rewind(self, address: Address, to: str, if_match: str | None = None) -> Record:
        """Make a session what it was at a checkpoint: state, step number, kept answers.

        Raises SessionNotFound, CheckpointNotFound or PreconditionFailed.
        """
        before = await self.exists(address)
        data = None
        if before.flags & HAS_CHECKPOINTS:
            data = await self.sessions.store.load_side(address.key, check_id(to, "checkpoint"))
        missing = CheckpointNotFound(f"session {address.session!r} has no checkpoint {to!r}", checkpoint=to)
        if data is None:
            raise missing
        then = self.ledger.decode(address.key, data)

        def edit(found: Record | None) -> Record:
            record = self.ledger.there(address, found)
            if record.incarnation != before.incarnation:  # ended and created again meanwhile
                raise missing
            made = {"version": then.version, "fingerprint": then.fingerprint, "examples": then.examples}
            taken = {"step": then.step, "state": then.state, "answers": then.answers, "inputs": then.inputs}
            return record.changed(self.ledger.clock(), **made, **taken)

        return await self._write(address, edit, if_match)

    async def exists(self, address: Address) -> Record:
        """The record; SessionNotFound where there is none."""
        self.repository.live(address.model)
        return self.ledger.there(address, await self.ledger.find(address))

    # --- versions -----------------------------------------------------------------------------------------------

    async def retire(self, model: str, version: int, force: bool) -> dict[str, Any]:
        """Stop serving a version; VersionInUse where sessions hold it, unless `force`."""
        served = self.repository.require(model, version)
        said = {"model": model, "version": version, "sessions": await self._holding(model, version)}
        if said["sessions"] and not force:
            text = f"{said['sessions']} sessions hold version {version} of model {model!r}"
            raise VersionInUse(f"{text}. End or clear them, or force.", **said)
        self.repository.retire(model, version)
        self.sessions.retired(served)
        return said

    async def _holding(self, model: str, version: int) -> int:
        """How many sessions of any tenant have a state of a version."""
        count, cursor = 0, ""
        while True:
            keys, cursor = await self.sessions.store.list_keys("", cursor, 1000)
            mine = [key for key in keys if key.split("/", 2)[1] == model and not is_mark(key)]
            for key, data in zip(mine, await self.sessions.store.load(mine), strict=True):
                count += data is not None and self.ledger.decode(key, data).version == version
            if not cursor:
                return count

    # --- helpers ------------------------------------------------------------------------------------------------

    async def _write(
        self, address: Address, edit: Callable[[Record | None], Record], if_match: str | None = None
    ) -> Record:
        """Exchange the record of a session."""
        self.repository.live(address.model)

        async def write(found: Record | None) -> Edit:
            return Edit(edit(found))

        return self.ledger.there(address, await self.ledger.change(address, write, if_match))

    def _maker(self, address: Address, record: Record) -> Served | None:
        """The version that made a session's state, None where it is not served."""
        served = self.repository.get(address.model, record.version)
        return served if served is not None and served.fingerprint == record.fingerprint else None

    def _target(self, address: Address, new: NewState, found: Record | None) -> Served:
        """The version that a put state belongs to: the body's, else the session's, else the live one."""
        live = self.repository.live(address.model)
        number = new.version or (found.version if found else live.version)
        served = self.repository.get(address.model, number)
        if served is None:
            versions = self.repository.versions(address.model)
            text = f"the state is of version {number} of model {address.model!r}, which is not served"
            raise StateVersionMismatch(f"{text} (there are {versions})", version=number, versions=versions)
        check_streams(served)
        if new.fingerprint not in (None, made := served.manifest.fingerprint):
            text = f"the state was made by a model of fingerprint {new.fingerprint!r}, version {number} has {made!r}"
            raise StateMismatch(text, fingerprint=made)
        if new.model not in (None, address.model):
            raise InvalidRequest(f"$.model is {new.model!r}, the path says {address.model!r}")
        return served

    def _with_state(self, found: Record | None, served: Served, state: bytes, examples: int, new: NewState) -> Record:
        if new.examples not in (None, examples):
            raise ShapeMismatch(f"$.examples is {new.examples}, the state has {examples}")
        if found is None:
            return self._fresh(served, examples, state, step=new.step or 0)
        step = found.step if new.step is None else new.step
        same = (step, examples, served.fingerprint) == (found.step, found.examples, found.fingerprint)
        answers = found.answers if same else ()
        inputs = found.inputs if state == found.state else b""
        return self._on(served, found, examples=examples, state=state, step=step, answers=answers, inputs=inputs)

    def _on(self, served: Served, record: Record, **fields: Any) -> Record:
        """The next record of a session, on a version."""
        return record.changed(self.ledger.clock(), version=served.version, fingerprint=served.fingerprint, **fields)

    def _fresh(self, served: Served, examples: int, state: bytes, step: int = 0, ttl_s: int = 0) -> Record:
        made, clock = (served.version, served.fingerprint), self.ledger.clock
        return new_record(*made, examples=examples, state=state, step=step, ttl_s=ttl_s, clock=clock)

    def _check_layer(self, served: Served, layer: str) -> None:
        layers = list(served.manifest.layers)
        if layer not in layers:
            raise LayerNotFound(f"model {served.name!r} has no state layer {layer!r}, it has {layers}", layers=layers)

    def _check_examples(self, examples: int, served: Served, session: str) -> None:
        """Raises TooLarge where a session may not have so many examples of a version."""
        self.sessions.quotas.check(session, examples * served.manifest.state_row_bytes)
        limit = self.settings.examples_limit
        if examples > limit:
            raise TooLarge(f"{examples} examples in one session (limit {limit})", limit=limit)
