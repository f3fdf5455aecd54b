"""A WebSocket's frames: to the sessions and back; the order of the conversation is stepcast.protocol's.

Text frames are JSON, binary frames are msgpack, the fields are those of the HTTP bodies plus `id`, `session`, `op`.
A step costs no task and no await of its own: its answer is written when it is there, and leaves with whatever else
is ready in that tick.
"""

import asyncio
import json
from typing import Any, Final, cast

import msgspec

from stepcast.errors import Draining, InvalidRequest, StepcastError
from stepcast.protocol import MARKER, STEP, ServerConversation, Ticket

from ...engine.arrays import Form
from ...sessions.core import Answers
from ...telemetry import Metrics, as_ours
from .. import bodies
from ..answers import document, encode
from ..bodies import JSON, MSGPACK, FrameId
from ..keys import ROLES, Principal
from ..steps import FRAMES, Steps, Way, packed, text
from ..verbs import VERBS, Call
from .connection import WebSocketConnection
from .rfc6455 import BINARY, TEXT

RESTARTING: Final = 1012
SLOW_OPERATIONS: Final = 8
"""Operations other than steps that one socket may have under way; with it the answers waiting in memory are bounded."""
DRAIN_SHARE: Final = 0.8
"""The share of drain_s that sockets have; the rest is for the close frames and the store."""

_SHUTTING_DOWN: Final = "the server is shutting down"
_BESIDE: Final = frozenset({"models", "model", "version", "retire", "load", "predict", "list"})
"""Verbs that are about no session: HTTP alone has them."""


class Head(msgspec.Struct):
    """What every frame may have; read alone where a frame is no good."""

    id: FrameId = None
    session: str | None = None
    op: str = STEP


FRAME_TYPES: Final[dict[str, Any]] = {
    STEP: bodies.frame(bodies.StepBody),
    MARKER: bodies.frame(bodies.Nothing),
    **{op: bodies.frame(verb.body) for op, verb in VERBS.items() if op not in _BESIDE},
}

Answer = tuple[int, bytes]
"""Opcode and payload of a frame that is ready to be sent."""


class Frame(Ticket[None, Answer]):
    """A frame on its way: its own ticket in the conversation, and who waits for its step.

    Args:
        asked: Its struct.
        session: Its own, or the socket's.
        data, form: Inputs of a step that was taken apart in one go, and their axes; None: of another frame.
    """

    __slots__ = ("_conversation", "_done", "asked", "data", "form", "kind", "session")

    stays = True

    def __init__(
        self,
        conversation: "Conversation",
        asked: Any,
        kind: str,
        session: str,
        step: bool,
        data: bytes | None = None,
        form: Form = "F",
    ) -> None:
        self.request = self.answer = None
        self.answered, self._done, self.step = False, False, step
        self._conversation, self.asked, self.kind, self.session = conversation, asked, kind, session
        self.data, self.form = data, form

    def done(self) -> bool:
        """Whether it is settled; a client that is gone changes nothing, what was accepted is applied."""
        return self._done

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        self._done = True
        name = self.asked.id
        if self.kind == JSON:
            said = b"%d" % name if name.__class__ is int else msgspec.json.encode(name)
            rest = text(answers, row, step, self.form)
            payload = b'{"id":%s,"session":"%s",%s' % (said, self.session.encode(), rest)
            self._conversation.answered(self, TEXT, payload)
        else:
            fields = {"id": name, "session": self.session}
            self._conversation.answered(self, BINARY, packed(answers, row, step, self.form, fields))

    def refused(self, error: BaseException) -> None:
        self._done = True
        self._conversation.failed(self, error)


class Conversation:
    """One socket: the Handler of its connection.

    Args:
        session: The session of all frames; None: each frame names its own.
    """

    def __init__(
        self,
        steps: Steps,
        connection: WebSocketConnection,
        principal: Principal,
        way: Way,
        session: str | None,
        metrics: Metrics,
    ) -> None:
        self._steps, self._states, self._connection = steps, steps.states, connection
        self._principal, self._way, self._session, self._metrics = principal, way, session, metrics
        self._settings = steps.states.settings
        self._talk: ServerConversation[None, Answer] = ServerConversation(self._settings.frames_limit)
        self._slow = asyncio.Semaphore(SLOW_OPERATIONS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._mixed = False  # whether versions take different features
        self._may_step = ROLES.index(principal.role) >= ROLES.index("step")
        self._alive = True

    # --- for the connection -------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many more frames may be in flight."""
        return self._talk.room

    def message(self, opcode: int, payload: bytes) -> None:
        """Take a frame."""
        kind = JSON if opcode == TEXT else MSGPACK
        if not self._take_plain(payload, kind):
            self._take(payload, kind)

    def drain(self) -> None:
        """Answer what was accepted, then close; refuse what comes."""
        if self._talk.draining:
            return
        self._talk.drain()
        limit_s = self._settings.drain_s * DRAIN_SHARE
        asyncio.get_running_loop().call_later(limit_s, self._connection.close, RESTARTING, _SHUTTING_DOWN)
        self._go_on()

    def lost(self) -> None:
        """The client is gone: what was started is finished, what was held back is forgotten."""
        self._alive = False

    # --- frames in ----------------------------------------------------------------------------------------------

    def _take_plain(self, payload: bytes, kind: str) -> bool:
        """Take a step that is taken apart in one go; False: it is none, or no good, and goes the general way."""
        way, own = self._way, self._session
        if way.seen != self._steps.repository.changes and not self._look():
            return False
        plain = way.reader.read(payload, kind, FRAMES)
        if plain is None or not self._may_step or self._mixed or self._talk.draining:
            return False
        asked, data, form = plain
        session = own or asked.session
        if session is None or (own and asked.session not in (None, own)):
            return False
        frame = Frame(self, asked, kind, session, True, data, form)
        if self._talk.begin(session, frame):
            self._step(frame)
        return True

    def _look(self) -> bool:
        """Find out what the live version takes now; whether there is one."""
        try:
            self._steps.look(self._way)
        except StepcastError:
            return False
        self._mixed = self._steps.repository.mixed(self._way.model)
        return True

    def _take(self, payload: bytes, kind: str) -> None:
        """Take any frame."""
        asked: Any = Head()
        try:
            asked, error = _read(payload, kind)
            if error is not None:
                raise error
            if asked.op == MARKER:
                self._talk.mark(_encode({"id": asked.id, "op": MARKER}, kind))
            else:
                self._take_asked(asked, kind)
        except Exception as error:
            self._refuse(asked, error, kind)
        self._go_on()

    def _take_asked(self, asked: Any, kind: str) -> None:
        """Hand a frame to the conversation.

        Raises:
            StepcastError: it is answered with an error.
        """
        if self._talk.draining:
            raise Draining(f"{_SHUTTING_DOWN}. Connect again.", retry_after_s=1.0)
        self._principal.require("step" if asked.op == STEP else VERBS[asked.op].role)
        session = self._way.address(self._named(asked.session)).session
        # Where versions take different features, a step has to look at its session first: it waits for earlier frames.
        alone = asked.op != STEP or self._steps.repository.mixed(self._way.model)
        frame = Frame(self, asked, kind, session, not alone)
        if self._talk.begin(session, frame):
            self._start(frame)

    def _named(self, session: str | None) -> str:
        """The session that a frame's `session` means."""
        own = self._session
        if own is not None and session not in (None, own):
            raise InvalidRequest(f"$.session is {session!r}, this socket is for {own!r}")
        name = own if session is None else session
        if name is None:
            raise InvalidRequest("Object missing required field `session`: this socket is for any of them")
        return name

    def _refuse(self, head: Any, error: Exception, kind: str) -> None:
        """Answer a frame that reaches no session, in its turn."""
        session = head.session if self._session is None else self._session
        self._talk.refuse(session, self._failed(head.id, session, error, kind))

    # --- work ---------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Start what may start, send what is ready."""
        talk, connection = self._talk, self._connection
        while talk.ready:
            self._start(cast(Frame, talk.ready.popleft()))
        for opcode, payload in talk.answers:
            connection.reply(opcode, payload)
        talk.answers.clear()
        if talk.close_due:
            connection.close(RESTARTING, _SHUTTING_DOWN)

    def _start(self, frame: Frame) -> None:
        if frame.step:
            self._step(frame)
        elif self._alive:
            task = asyncio.get_running_loop().create_task(self._operate(frame))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _step(self, frame: Frame) -> None:
        """Queue a step."""
        asked, data, steps, way = frame.asked, frame.data, self._steps, self._way
        try:
            if data is None:
                steps.start(way, frame.session, asked, frame.kind, frame)
            elif not steps.turns.join(way.prefix + frame.session, data, asked.seq, frame):
                steps.queue(way, frame.session, data, asked.seq, frame)
        except Exception as error:
            frame.refused(error)

    async def _operate(self, frame: Frame) -> None:
        """Do an operation other than a step; not before the client has read what is ready."""
        async with self._slow:
            await self._connection.drained()
            if not self._alive:
                return
            asked, way = frame.asked, self._way
            try:
                if asked.op == STEP:
                    await self._steps.start_own(way, frame.session, asked, frame.kind, frame)
                    return
                asked.session = frame.session
                call = Call(way.namespace, way.model, frame.session, asked, frame.kind)
                fields = (await VERBS[asked.op].run(self._states, call)).fields
                other = {} if fields.get("session", frame.session) == frame.session else {"to": fields["session"]}
                answer = {"id": asked.id, **fields, **other, "session": frame.session}
            except Exception as error:
                frame.refused(error)
                return
        self.finish(frame, _encode(answer, frame.kind))

    def answered(self, frame: Frame, opcode: int, payload: bytes) -> None:
        """A step has its answer."""
        talk = self._talk
        if not self._alive or talk.draining or talk.room <= 0 or not talk.end(frame):
            self.finish(frame, (opcode, payload))
        else:
            self._connection.reply(opcode, payload, not talk.in_flight)

    def finish(self, frame: Frame, answer: Answer) -> None:
        """A frame has its answer, which may have to wait for its turn."""
        if not self._alive:
            return
        if self._talk.room <= 0:  # there is room now; but first let the caller go on
            asyncio.get_running_loop().call_soon(self._connection.pump)
        self._talk.finish(frame, answer)
        self._go_on()

    def failed(self, frame: Frame, error: BaseException) -> None:
        """A frame has an error as its answer."""
        self.finish(frame, self._failed(frame.asked.id, frame.session, error, frame.kind))

    def _failed(self, name: Any, session: str | None, error: BaseException, kind: str) -> Answer:
        return _encode({"id": name, "session": session, "error": document(as_ours(error), self._metrics)}, kind)


def _encode(answer: dict[str, Any], kind: str) -> Answer:
    return TEXT if kind == JSON else BINARY, encode(answer, kind)


def _read(payload: bytes, kind: str) -> tuple[Any, StepcastError | None]:
    """A frame's struct, the most likely one tried first; or its head, and why it is none."""
    refusal: StepcastError = InvalidRequest("Object contains unknown field `inputs`")
    try:
        asked: Any = bodies.decode(payload, FRAME_TYPES[STEP], kind)
        if asked.op == STEP:
            return asked, None
    except StepcastError as error:
        refusal = error
    head = _head(payload, kind)
    if head.op == STEP:
        return head, refusal
    if head.op not in FRAME_TYPES:
        return head, InvalidRequest(f"$.op is {head.op!r}, want one of {', '.join(FRAME_TYPES)}")
    try:
        return bodies.decode(payload, FRAME_TYPES[head.op], kind), None
    except StepcastError as error:
        return head, error


def _head(payload: bytes, kind: str) -> Head:
    """What can be read of a frame that is otherwise no good."""
    try:
        head: Head = bodies.decoder(Head, kind).decode(payload)
        return head
    except bodies.UNREADABLE:
        pass
    try:
        return msgspec.convert(json.loads(payload), Head)
    except (ValueError, RecursionError, msgspec.MsgspecError):  # not even that
        return Head()
