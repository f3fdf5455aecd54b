"""Every operation but stepping, once: which role it needs, what its body is, what it does. The same for every door.

A handler takes a call whose body is checked for types, and gives the fields of the answer. HTTP adds paths, status
codes, entity tags and files; the WebSocket adds order.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, NamedTuple

import msgspec

from stepcast.manifest import Manifest

from ..engine import arrays
from ..engine.arrays import Floats
from ..engine.repository import Repository, Served
from ..records.record import Record
from ..sessions.core import Address
from ..sessions.edits import NewState, States, check_id, new_address
from ..sessions.rollout import Known, Plan, rollout
from ..sessions.stored import etag
from . import bodies
from .bodies import JSON
from .large import aside, size_of
from .names import Naming, check_layout, style_of
from .names import read as read_named


@dataclass
class Call:
    """What is asked: by whom, of which model and session ("": of none), with which body."""

    namespace: str
    model: str
    session: str
    asked: Any  # the struct that the verb names
    kind: str = JSON  # content type of the body that it came in
    if_match: str | None = None  # entity tag that the session's record must have

    @cached_property
    def address(self) -> Address:
        """The session's address; InvalidSessionId where it can have none."""
        return Address(self.namespace, self.model, check_id(self.session))


class Done(NamedTuple):
    """The fields of an answer, and the entity tag of the session that it is about."""

    fields: dict[str, Any]
    etag: str | None = None


class Verb(NamedTuple):
    """An operation."""

    role: str
    body: type[msgspec.Struct]
    run: Callable[[States, Call], Awaitable[Done]]


async def models(states: States, call: Call) -> Done:
    """Served models, and the versions that are not served because they did not prove themselves."""
    repository = states.repository
    served = [_listed(repository, name) for name in repository.names()]
    failed = [{"name": name, "version": version, "reason": why} for name, version, why in repository.failed()]
    return Done({"models": served, "failed": failed})


def _listed(repository: Repository, name: str) -> dict[str, Any]:
    live = repository.live(name)
    return {
        "name": name,
        "version": live.version,
        "versions": repository.versions(name),
        "task": live.manifest.task,
        "streaming": live.manifest.streaming,
        "device": live.runtime.device,
        "description": live.manifest.description,
        "batch_invariance": live.batch_invariance.document(),
    }


async def model(states: States, call: Call) -> Done:
    """The live version's manifest, with the versions there are."""
    live = states.repository.live(call.model)
    return Done({**_plain(live), "versions": states.repository.versions(call.model)})


async def version(states: States, call: Call) -> Done:
    """One version's manifest."""
    return Done(_plain(states.repository.require(call.model, call.asked.version)))


def _plain(served: Served) -> dict[str, Any]:
    """Its manifest, and what was found out about it here."""
    found = {"fingerprint": served.manifest.fingerprint, "batch_invariance": served.batch_invariance.document()}
    return {**served.manifest.model_dump(mode="json"), **found}


async def retire(states: States, call: Call) -> Done:
    """Stop serving a version; refused while sessions hold it, unless ?force=true."""
    return Done(await states.retire(call.model, call.asked.version, call.asked.force))


async def load(states: States, call: Call) -> Done:
    """Load a version now: a new one, one that was retired, or one that failed."""
    repository, name = states.repository, call.model
    await asyncio.to_thread(repository.load, name, call.asked.version)
    return Done({"model": name, "version": call.asked.version, "versions": repository.versions(name)})


async def predict(states: States, call: Call) -> Done:
    """The stateless full forward pass over whole sequences (output())."""
    asked, repository, settings = call.asked, states.repository, states.settings
    served = repository.require(call.model, asked.version) if asked.version else repository.live(call.model)
    limits = arrays.Limits(settings.steps_limit, settings.examples_limit)
    style = style_of(asked.inputs, call.kind)
    naming = None if style is None else Naming(served.manifest)

    def read() -> arrays.Inputs:
        if naming is None or style is None:
            values = bodies.numbers(asked.inputs, asked.shape, call.kind)
        else:
            check_layout(asked.format)
            values = read_named(asked.inputs, asked.shape, call.kind, naming.features, style, rows="steps")
        return arrays.sequences(values, asked.format, bodies.flags(asked.mask, call.kind), served.manifest, limits)

    x, mask, rank = await aside(size_of(asked.inputs, asked.mask), read)
    y = (await states.sessions.run(served, x, mask, served.runtime.initial(len(x)))).reply()
    if served.manifest.readout == "last":
        y = arrays.last_present(y, mask)
    elif asked.format == "NCW":
        y = y.transpose(0, 2, 1)
    y = y[0] if rank == 2 else y
    return Done({"version": served.version, "outputs": naming.outputs(y, style) if naming and style else y})


def _about(states: States, address: Address, record: Record) -> Done:
    return Done(states.info(address, record), etag(record))


async def create(states: States, call: Call) -> Done:
    """Create a session."""
    asked, address = call.asked, new_address(call.namespace, call.model, call.asked.session)
    return _about(states, address, await states.create(address, asked.examples or 0, asked.version, asked.ttl_s))


async def list_sessions(states: States, call: Call) -> Done:
    """Ids of sessions, a page at a time."""
    asked, limit = call.asked, min(1000, call.asked.limit)
    found, cursor = await states.list_sessions(call.namespace, call.model, asked.prefix, asked.cursor, limit)
    return Done({"sessions": found, "cursor": cursor or None})


async def info(states: States, call: Call) -> Done:
    """A session's step, examples, version, size and times."""
    return _about(states, call.address, await states.exists(call.address))


async def end(states: States, call: Call) -> Done:
    """End and forget a session."""
    await states.end(call.address, call.if_match)
    return Done({"ended": True})


async def get_state(states: States, call: Call) -> Done:
    """The state of all layers, or of one (rnnGetPreviousState)."""
    view = await states.view(call.address)
    return Done(states.state(call.address, view, call.asked.layer), etag(view.record))


async def set_state(states: States, call: Call) -> Done:
    """Set the state of all layers, or of one (rnnSetPreviousState)."""
    asked = call.asked
    state = await aside(size_of(*asked.state.values()), bodies.tensors, asked.state, call.kind)
    given = {name: getattr(asked, name) for name in NewState.__slots__}
    new = NewState(**{**given, "state": state})
    return _about(states, call.address, await states.put(call.address, new, call.if_match))


async def clear(states: States, call: Call) -> Done:
    """Forget the state (rnnClearPreviousState)."""
    return _about(states, call.address, await states.clear(call.address, call.if_match))


async def fork(states: States, call: Call) -> Done:
    """A child with the same state."""
    return _about(states, *await states.fork(call.address, call.asked.to))


async def checkpoint(states: States, call: Call) -> Done:
    """Name the session as it is now."""
    return Done(await states.checkpoint(call.address, call.asked.name))


async def checkpoints(states: States, call: Call) -> Done:
    """A session's checkpoints."""
    return Done({"checkpoints": await states.checkpoints(call.address)})


async def rewind(states: States, call: Call) -> Done:
    """Go back to a checkpoint."""
    return _about(states, call.address, await states.rewind(call.address, call.asked.to, call.if_match))


async def run_free(states: States, call: Call) -> Done:
    """Run free, feeding predictions back."""
    asked, future = call.asked, bodies.said(call.asked.inputs)
    style = None if future is None else style_of(future, call.kind)
    naming: Naming | None = None

    async def by_name(manifest: Manifest) -> Floats:
        nonlocal naming
        naming = Naming(manifest)  # of the version that rolls out
        how = style or "columns"
        read = partial(read_named, future, asked.shape, call.kind, naming.features, how, future=asked.steps)
        return await aside(size_of(future), read)

    known: Floats | Known | None = None
    if style is not None:
        known = by_name
    elif future is not None:
        known = await aside(size_of(future), bodies.numbers, future, asked.shape, call.kind)
    plan = Plan(
        asked.steps,
        known,
        asked.commit,
        asked.seq,
        asked.temperature,
        asked.seed,
        asked.paths,
        tuple(asked.levels),
        asked.keep_paths,
    )
    answer = await rollout(states, call.address, plan)
    if naming is not None and style is not None:
        answer["outputs"] = naming.outputs(answer["outputs"], style)
    return Done(answer)


VERBS: Final[dict[str, Verb]] = {
    "models": Verb("read", bodies.Nothing, models),
    "model": Verb("read", bodies.Nothing, model),
    "version": Verb("read", bodies.VersionBody, version),
    "retire": Verb("admin", bodies.VersionBody, retire),
    "load": Verb("admin", bodies.LoadBody, load),
    "predict": Verb("step", bodies.PredictBody, predict),
    "list": Verb("read", bodies.ListBody, list_sessions),
    "create": Verb("step", bodies.CreateBody, create),
    "info": Verb("read", bodies.Nothing, info),
    "end": Verb("step", bodies.Nothing, end),
    "state.get": Verb("read", bodies.GetBody, get_state),
    "state.set": Verb("step", bodies.StateBody, set_state),
    "clear": Verb("step", bodies.Nothing, clear),
    "fork": Verb("step", bodies.ForkBody, fork),
    "checkpoint": Verb("step", bodies.CheckpointBody, checkpoint),
    "checkpoints": Verb("read", bodies.Nothing, checkpoints),
    "rewind": Verb("step", bodies.RewindBody, rewind),
    "rollout": Verb("step", bodies.RolloutBody, run_free),
}
