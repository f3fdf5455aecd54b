"""Door 2: carries frames between a socket and the sessions; the conversation's rules are stepcast.protocol's.

Text frames are JSON, binary frames are msgpack, the fields are those of the HTTP bodies plus `id`, `session`, `op`.
A step costs no task and no await of its own: the reply is made when its future is done, and leaves with whatever else
is ready in that tick.
"""

import asyncio
import functools
import struct
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, Literal, cast
from urllib.parse import parse_qs, urlsplit

import msgspec

from stepcast.errors import (
    Draining,
    Forbidden,
    Internal,
    InvalidRequest,
    Malformed,
    NonFinite,
    NotReady,
    RouteNotFound,
    StepcastError,
)
from stepcast.protocol import MARKER, STEP, ServerConversation, Ticket

from ...engine.repository import Repository
from ...sessions.columns import Answers
from ...sessions.core import Address, StepAnswer
from ...sessions.edits import States, check_id
from ...sessions.rollout import rollout
from ...telemetry import log
from .. import bodies as wire
from ..bodies import JSON, MSGPACK
from ..http.routes import Headers, Rest, problem
from ..keys import ROLES, Principal
from . import rfc6455 as framing
from .connection import EXTENSION, Link

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Id = str | int | float | None

RESTARTING: Final = 1012
SLOW_OPERATIONS: Final = 8
"""Operations other than steps that one socket may have under way; with it the answers waiting in memory are bounded."""
KNOWN_SESSIONS: Final = 4096
"""Addresses kept ready per socket."""
DRAIN_SHARE: Final = 0.8
"""The share of drain_s that sockets have; the rest is for the close frames and the store."""


# --- frames ---------------------------------------------------------------------------------------------------------


class Head(msgspec.Struct):
    """What every frame may have; read alone where a frame is no good step."""

    id: Id = None
    session: str | None = None
    op: str = STEP


class StepFrame(wire.StepBody, forbid_unknown_fields=True):
    """A step."""

    id: Id = None
    session: str | None = None
    op: str = STEP


class _Plain(msgspec.Struct, forbid_unknown_fields=True):
    """An operation that has no fields of its own."""

    id: Id = None
    session: str | None = None
    op: str = STEP


class _LayerFrame(_Plain, forbid_unknown_fields=True):
    layer: str | None = None


class _StateFrame(wire.StateBody, forbid_unknown_fields=True):
    id: Id = None
    op: str = STEP


class _CreateFrame(wire.CreateBody, forbid_unknown_fields=True):
    id: Id = None
    op: str = STEP


class _ForkFrame(wire.ForkBody, forbid_unknown_fields=True):
    id: Id = None
    session: str | None = None
    op: str = STEP


class _CheckpointFrame(wire.CheckpointBody, forbid_unknown_fields=True):
    id: Id = None
    session: str | None = None
    op: str = STEP


class _RewindFrame(wire.RewindBody, forbid_unknown_fields=True):
    id: Id = None
    session: str | None = None
    op: str = STEP


class _RolloutFrame(wire.RolloutBody, forbid_unknown_fields=True):
    id: Id = None
    session: str | None = None
    op: str = STEP


_FRAMES: Final[dict[str, type[msgspec.Struct]]] = {
    STEP: StepFrame,
    MARKER: _Plain,
    "info": _Plain,
    "clear": _Plain,
    "end": _Plain,
    "checkpoints": _Plain,
    "state.get": _LayerFrame,
    "state.set": _StateFrame,
    "create": _CreateFrame,
    "fork": _ForkFrame,
    "checkpoint": _CheckpointFrame,
    "rewind": _RewindFrame,
    "rollout": _RolloutFrame,
}
_READS: Final = frozenset({"info", "state.get", "checkpoints", MARKER})


class _PlainJson(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The plainest step: one example, one step, no reading missing."""

    inputs: list[float]
    seq: wire.Positive | None = None
    id: Id = None
    session: str | None = None
    op: Literal["step"] = STEP


class _PlainMsgpack(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The same with its inputs as bytes."""

    inputs: bytes
    seq: wire.Positive | None = None
    id: Id = None
    session: str | None = None
    op: Literal["step"] = STEP


_plain_json: Final = msgspec.json.Decoder(_PlainJson).decode
_plain_msgpack: Final = msgspec.msgpack.Decoder(_PlainMsgpack).decode


Answer = tuple[int, bytes]
"""Opcode and payload of a frame that is ready to be sent."""
_pack_reply: Final = msgspec.msgpack.Encoder().encode


class Single(Ticket["Asked | None", Answer]):
    """The plainest step on its way: its own ticket, and who waits for it, answering without a turn of the loop."""

    __slots__ = ("_connection", "_done", "address", "data", "frame", "kind")

    def __init__(self, connection: "Connection", frame: Any, data: bytes, kind: str, address: Address) -> None:
        self.request = self.answer = None
        self.answered = self._done = False
        self.step = True
        self._connection, self.frame, self.data, self.kind, self.address = connection, frame, data, kind, address

    def done(self) -> bool:
        """Whether it is settled; a client that is gone changes nothing, what was accepted is applied."""
        return self._done

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        """The step was made in a column."""
        self._done = True
        if self.kind == JSON:
            name = self.frame.id
            said = b"%d" % name if type(name) is int else msgspec.json.encode(name)
            text = b'{"id":%s,"session":"%s","outputs":[%s],"step":%d,"version":%d}'
            named = self.address.session.encode()
            self._connection.answered(
                self, framing.TEXT, text % (said, named, answers.texts[row], step, answers.version)
            )
        else:
            self._connection.answered(self, framing.BINARY, self._packed(answers, row, step))

    def _packed(self, answers: Answers, row: int, step: int) -> bytes:
        return _pack_reply(
            {
                "id": self.frame.id,
                "session": self.address.session,
                "outputs": answers.raw[row],
                "step": step,
                "version": answers.version,
                "shape": answers.shape,
            }
        )

    def set_result(self, made: StepAnswer) -> None:
        """The step was made by itself."""
        self._done = True
        answer = {
            "id": self.frame.id,
            "session": self.address.session,
            "outputs": made.outputs[0, 0],
            "step": made.step,
            "version": made.version,
        }
        self._connection.answered(self, *_encode(answer, self.kind))

    def set_exception(self, error: BaseException) -> None:
        """The step was refused."""
        self._done = True
        self._connection.refused(self, error)


class Asked:
    """A decoded frame of any other kind: what is asked, in which encoding, of which session."""

    __slots__ = ("address", "alone", "frame", "kind", "rank")

    def __init__(self, frame: Any, kind: str, address: Address, alone: bool) -> None:
        self.frame, self.kind, self.address, self.alone = frame, kind, address, alone
        self.rank = 0  # of a step's inputs, once they are looked at


def _encode(answer: dict[str, Any], kind: str) -> Answer:
    return (framing.TEXT if kind == JSON else framing.BINARY), wire.encode(answer, kind)


# --- one connection -------------------------------------------------------------------------------------------------


class Connection:
    """One socket: the Handler of its Link.

    Args:
        session: The session of all frames; None: each frame names its own.
    """

    def __init__(self, rest: Rest, link: Link, principal: Principal, model: str, session: str | None) -> None:
        self._rest, self._link, self._principal = rest, link, principal
        self._model, self._session = model, session
        self._talk: ServerConversation[Asked | None, Answer] = ServerConversation(rest.settings.frames_limit)
        self._slow = asyncio.Semaphore(SLOW_OPERATIONS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._addresses: dict[str | None, Address] = {}
        features = rest.repository.live(model).n_features
        self._pack, self._inputs_bytes = struct.Struct(f"<{features}f").pack, 4 * features
        self._seen, self._usual = -1, False  # of the repository, and whether plain steps fit its live version
        self._may_step = ROLES.index(principal.role) >= ROLES.index("step")
        self._alive = True

    # --- for the link -------------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many more frames may be in flight."""
        return self._talk.room

    def message(self, opcode: int, payload: bytes) -> None:
        """Take a frame."""
        kind = JSON if opcode == framing.TEXT else MSGPACK
        if self._take_plain(payload, kind):
            return
        try:
            self._take(self._decode(payload, kind), kind)
        except _Refused as refused:
            self._refuse(refused, kind)
        self._go_on()

    def drain(self) -> None:
        """Answer what was accepted, then close; refuse what comes."""
        if self._talk.draining:
            return
        self._talk.drain()
        limit_s = self._rest.settings.drain_s * DRAIN_SHARE
        asyncio.get_running_loop().call_later(limit_s, self._link.close, RESTARTING, "the server is shutting down")
        self._go_on()

    def lost(self) -> None:
        """The client is gone: what was started is finished, what was held back is forgotten."""
        self._alive = False

    # --- frames in ----------------------------------------------------------------------------------------------

    def _take_plain(self, payload: bytes, kind: str) -> bool:
        """Take a step of the plainest kind; False: it is none, or not a good one, and goes the long way."""
        try:
            if kind == JSON:
                frame: Any = _plain_json(payload)
                data = self._pack(*frame.inputs)  # refuses another number of them, and what float32 does not hold
            else:
                frame = _plain_msgpack(payload)
                data = frame.inputs
                if len(data) != self._inputs_bytes or not wire.is_finite(data):
                    return False
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, struct.error, OverflowError):
            return False
        address = self._addresses.get(frame.session)
        if address is None or not self._may_step or self._talk.draining:
            return False
        repository = self._rest.repository
        if self._seen != repository.changes:
            self._look(repository)
        if not self._usual:
            return False
        single = Single(self, frame, data, kind, address)
        if self._talk.begin(address.session, single):
            self._step_plainly(single)
        return True

    def _look(self, repository: Repository) -> None:
        """Find out whether the live version still takes the inputs that it took when the socket was opened."""
        self._seen = repository.changes
        fits = repository.live(self._model).input_bytes == self._inputs_bytes
        self._usual = fits and not repository.mixed(self._model)

    def _decode(self, payload: bytes, kind: str) -> Any:
        try:
            frame = wire.decode(payload, StepFrame, kind)
        except StepcastError as error:
            return self._decode_other(payload, kind, error)
        if frame.op == STEP:
            return frame
        return self._decode_other(payload, kind, InvalidRequest("Object contains unknown field `inputs`"))

    def _decode_other(self, payload: bytes, kind: str, first: StepcastError) -> Any:
        """A frame that is no good step: another operation, or an error with the frame's id where it has one."""
        if isinstance(first, Malformed):
            raise _Refused(Head(), first)
        try:
            head = wire.head(payload, Head) if isinstance(first, NonFinite) else wire.decode(payload, Head, kind)
        except StepcastError as error:
            raise _Refused(Head(), error) from error
        if head.op == STEP:
            raise _Refused(head, first)
        body = _FRAMES.get(head.op)
        if body is None:
            raise _Refused(head, InvalidRequest(f"$.op is {head.op!r}, want one of {', '.join(_FRAMES)}"))
        try:
            return wire.decode(payload, body, kind)
        except StepcastError as error:
            raise _Refused(head, error) from error

    def _take(self, frame: Any, kind: str) -> None:
        """Hand a frame to the conversation.

        Raises:
            _Refused: it is answered with an error.
        """
        if frame.op == MARKER:
            self._talk.mark(_encode({"id": frame.id, "op": MARKER}, kind))
            return
        try:
            if self._talk.draining:
                raise Draining("the server is shutting down. Connect again.", retry_after_s=1.0)
            if frame.op not in _READS:
                self._principal.require("step")
            address = self._addresses.get(frame.session) or self._address(frame.session)
        except StepcastError as error:
            raise _Refused(frame, error) from error
        # Where versions take different features, a step has to look at its session first: it waits for earlier frames.
        alone = frame.op != STEP or self._rest.repository.mixed(self._model)
        self._talk.ask(address.session, Asked(frame, kind, address, alone), not alone)

    def _address(self, session: str | None) -> Address:
        """The address that a frame's `session` means."""
        if self._session is not None and session not in (None, self._session):
            raise InvalidRequest(f"$.session is {session!r}, this socket is for {self._session!r}")
        name = session or self._session
        if name is None:
            raise InvalidRequest("Object missing required field `session`: this socket is for any of them")
        address = Address(self._principal.namespace, self._model, check_id(name))
        if len(self._addresses) >= KNOWN_SESSIONS:
            self._addresses.clear()
        self._addresses[session] = address
        return address

    def _refuse(self, refused: "_Refused", kind: str) -> None:
        head, error = refused.head, refused.error
        session = head.session if self._session is None else self._session
        answer = {"id": head.id, "session": session, "error": self._problem(error)}
        self._talk.refuse(session, _encode(answer, kind))

    # --- work ---------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Start what may start, send what is ready."""
        talk, link = self._talk, self._link
        while talk.ready:
            ticket = talk.ready.popleft()
            asked = ticket.request
            if asked is None:
                self._step_plainly(cast(Single, ticket))
            elif not asked.alone:
                self._step(ticket, asked)
            elif self._alive:
                task = asyncio.get_running_loop().create_task(self._operate(ticket, asked))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        for opcode, payload in talk.answers:
            link.reply(opcode, payload)
        talk.answers.clear()
        if talk.close_due:
            link.close(RESTARTING, "the server is shutting down")

    def _done(self, ticket: "_Ticket", answer: Answer) -> None:
        if not self._alive:
            return
        if self._talk.room <= 0:  # there is room now; but first let the caller go on
            asyncio.get_running_loop().call_soon(self._link.pump)
        self._talk.finish(ticket, answer)
        self._go_on()

    def _step_plainly(self, single: Single) -> None:
        sessions, address, seq = self._rest.sessions, single.address, single.frame.seq
        if sessions.join(address.key, single.data, seq, single):
            return
        try:
            sessions.single_step(address, single.data, seq, single)
        except Exception as error:
            self._done(single, self._failed(single, error))

    def answered(self, single: Single, opcode: int, payload: bytes) -> None:
        """The answer of the plainest step."""
        talk = self._talk
        if not self._alive or talk.draining or talk.room <= 0 or not talk.end(single):
            self._done(single, (opcode, payload))
        else:
            self._link.reply(opcode, payload, not talk.in_flight)

    def refused(self, single: Single, error: BaseException) -> None:
        """What became of the plainest step instead of an answer."""
        self._done(single, self._failed(single, error))

    def _step(self, ticket: "_Ticket", asked: Asked) -> None:
        """Queue a step; its answer comes by _stepped."""
        rest, frame = self._rest, asked.frame
        try:
            manifest = rest.repository.live(self._model).manifest
            inputs = wire.step_inputs(frame, asked.kind, manifest, rest.settings.steps_limit)
            rest.check_examples(len(inputs.x))
            future = self._queue(asked, inputs)
        except Exception as error:
            self._talk.finish(ticket, self._failed(asked, error))
            return
        asked.rank = inputs.rank
        future.add_done_callback(functools.partial(self._stepped, ticket, asked))

    def _stepped(self, ticket: "_Ticket", asked: Asked, future: "asyncio.Future[StepAnswer]") -> None:
        error = future.exception()
        if error is not None:
            self._done(ticket, self._failed(asked, error))
            return
        self._done(ticket, self._answer(asked, future.result()))

    def _queue(self, asked: Asked, inputs: wire.Inputs) -> "asyncio.Future[StepAnswer]":
        x, mask, frame = inputs.x, inputs.mask, asked.frame
        return self._rest.sessions.step(asked.address, x, mask, inputs.digest, frame.seq, policy=frame.version_policy)

    async def _step_alone(self, asked: Asked) -> Answer:
        """A step whose inputs may be another version's than the live one's."""
        rest, frame = self._rest, asked.frame
        inputs = await rest.inputs(asked.address, frame, asked.kind)
        rest.check_examples(len(inputs.x))
        asked.rank = inputs.rank
        return self._answer(asked, await self._queue(asked, inputs))

    def _answer(self, asked: Asked, made: StepAnswer) -> Answer:
        answer = {
            "id": asked.frame.id,
            "session": asked.address.session,
            "outputs": wire.by_rank(made.outputs, asked.rank, asked.frame.format),
            "step": made.step,
            "version": made.version,
        }
        return _encode(answer, asked.kind)

    async def _operate(self, ticket: "_Ticket", asked: Asked) -> None:
        """Do an operation other than a step; not before the client has read what is ready."""
        async with self._slow:
            await self._link.drained()
            if not self._alive:
                return
            try:
                if asked.frame.op == STEP:
                    answer = await self._step_alone(asked)
                else:
                    fields = await _OPERATIONS[asked.frame.op](self._rest.states, asked)
                    answer = _encode({"id": asked.frame.id, **fields, "session": asked.address.session}, asked.kind)
            except Exception as error:
                answer = self._failed(asked, error)
        self._done(ticket, answer)

    def _failed(self, asked: Asked | Single, error: BaseException) -> Answer:
        if not isinstance(error, StepcastError):
            log.error("a frame failed", exc_info=error)
            error = Internal("the server has a defect; its log tells more")
        answer = {"id": asked.frame.id, "session": asked.address.session, "error": self._problem(error)}
        return _encode(answer, asked.kind)

    def _problem(self, error: StepcastError) -> dict[str, Any]:
        self._rest.metrics.errors.labels(error.code).inc()
        return error.problem()


class _Refused(Exception):
    """A frame that is answered with an error before it reaches a session."""

    def __init__(self, head: Any, error: StepcastError) -> None:
        super().__init__(error.message)
        self.head, self.error = head, error


_Ticket = Ticket[Asked | None, Answer]


# --- operations other than steps ------------------------------------------------------------------------------------


async def _info(states: States, asked: Asked) -> dict[str, Any]:
    return states.info(asked.address, await states.exists(asked.address))


async def _create(states: States, asked: Asked) -> dict[str, Any]:
    address = asked.address
    body = msgspec.structs.replace(asked.frame, session=address.session)
    return states.info(*await states.create(address.namespace, address.model, body))


async def _get(states: States, asked: Asked) -> dict[str, Any]:
    return states.state(asked.address, await states.view(asked.address), asked.frame.layer)


async def _set(states: States, asked: Asked) -> dict[str, Any]:
    address, frame = asked.address, asked.frame
    if frame.layer is None:
        return states.info(address, await states.put(address, frame))
    return states.info(address, await states.put_layer(address, frame.layer, frame))


async def _clear(states: States, asked: Asked) -> dict[str, Any]:
    return states.info(asked.address, await states.clear(asked.address))


async def _end(states: States, asked: Asked) -> dict[str, Any]:
    await states.end(asked.address)
    return {"ended": True}


async def _fork(states: States, asked: Asked) -> dict[str, Any]:
    child, record = await states.fork(asked.address, asked.frame.to)
    return {**states.info(child, record), "to": child.session}


async def _checkpoint(states: States, asked: Asked) -> dict[str, Any]:
    return await states.checkpoint(asked.address, asked.frame.name)


async def _checkpoints(states: States, asked: Asked) -> dict[str, Any]:
    return {"checkpoints": await states.checkpoints(asked.address)}


async def _rewind(states: States, asked: Asked) -> dict[str, Any]:
    return states.info(asked.address, await states.rewind(asked.address, asked.frame.to))


async def _rollout(states: States, asked: Asked) -> dict[str, Any]:
    return await rollout(states, asked.address, asked.frame, asked.kind)


_OPERATIONS: Final[dict[str, Callable[[States, Asked], Awaitable[dict[str, Any]]]]] = {
    "info": _info,
    "create": _create,
    "state.get": _get,
    "state.set": _set,
    "clear": _clear,
    "end": _end,
    "fork": _fork,
    "checkpoint": _checkpoint,
    "checkpoints": _checkpoints,
    "rewind": _rewind,
    "rollout": _rollout,
}


# --- the door -------------------------------------------------------------------------------------------------------


class WebSocketDoor:
    """ASGI, scope type "websocket": admits connections."""

    def __init__(self, rest: Rest) -> None:
        self._rest = rest
        self._origins = {origin.strip() for origin in rest.settings.cors_origins.split(",")} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection from its handshake to its end."""
        await receive()  # websocket.connect
        try:
            connection, link = self._admit(scope)
        except StepcastError as error:
            await self._refuse(send, error)
            return
        await send({"type": "websocket.accept"})
        gauge = self._rest.metrics.sockets
        gauge.inc()
        try:
            link.open(connection, self._rest.settings.stall_s)
            await link.closed()
        finally:
            gauge.dec()

    def _admit(self, scope: Scope) -> tuple[Connection, Link]:
        """The connection that the handshake asks for.

        Raises:
            RouteNotFound, Unauthorized, Forbidden, ModelNotFound, NotStreaming, InvalidSessionId, NotReady.
        """
        model, session = _route(scope["path"])
        headers = dict(scope["headers"])
        principal = self._rest.keys.authenticate(_with_key(headers, scope["query_string"]))
        self._check_origin(headers)
        self._rest.sessions.check_streams(self._rest.repository.live(model))
        link = scope.get("extensions", {}).get(EXTENSION)
        if not isinstance(link, Link):
            raise NotReady("WebSockets need the server that `python -m service serve` starts")
        if self._rest.sessions.draining:
            raise Draining("the server is shutting down. Connect again.", retry_after_s=1.0)
        return Connection(self._rest, link, principal, model, session), link

    def _check_origin(self, headers: Headers) -> None:
        """Refuse pages of other sites: a browser sends their Origin, and lets them open any WebSocket."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or self._origins & {origin, "*"}:
            return
        if urlsplit(origin).netloc != headers.get(b"host", b"").decode("latin-1"):
            raise Forbidden(f"pages of {origin!r} may not call this server. Set STEPCAST_CORS_ORIGINS.", origin=origin)

    async def _refuse(self, send: Send, error: StepcastError) -> None:
        response = problem(error, self._rest.metrics)
        start = {"type": "websocket.http.response.start", "status": response.status_code}
        await send({**start, "headers": response.raw_headers})
        await send({"type": "websocket.http.response.body", "body": bytes(response.body)})


def _route(path: str) -> tuple[str, str | None]:
    """Model and session (None: any) of a path.

    Raises:
        RouteNotFound, InvalidSessionId.
    """
    parts = path.split("/")
    if parts[1:3] == ["v1", "models"] and parts[-1] == "stream":
        if len(parts) == 5:
            return parts[3], None
        if len(parts) == 7 and parts[4] == "sessions":
            return parts[3], check_id(parts[5])
    raise RouteNotFound(f"there is no WebSocket at {path!r}", path=path)


def _with_key(headers: Headers, query: bytes) -> Headers:
    """The headers, with the key of ?key= where they have none: browsers can not set headers on a WebSocket."""
    if b"authorization" in headers or b"x-api-key" in headers:
        return headers
    given = parse_qs(query, max_num_fields=8).get(b"key")
    return {**headers, b"x-api-key": given[0]} if given else headers
