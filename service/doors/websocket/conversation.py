"""A WebSocket's frames: to the sessions and back; the order of the conversation is stepcast.protocol's.

Text frames are JSON, binary frames are msgpack, the fields are those of the HTTP bodies plus `id`, `session`, `op`.
A step costs no task and no await: its answer is written when it is there, and leaves with what else is ready then.
"""

import asyncio
import contextlib
import json
from collections.abc import Coroutine
from typing import Any, Final, cast

import msgspec
from websockets.frames import CloseCode

from stepcast.errors import DeadlineExceeded, Draining, InvalidRequest, StepcastError
from stepcast.protocol import MARKER, STEP, ServerConversation, Ticket

from ...sessions.core import Answers
from ...telemetry import as_ours
from .. import bodies
from ..answers import document, encode
from ..bodies import JSON, MSGPACK, FrameId
from ..keys import ROLES, Principal
from ..large import LARGE_BYTES, aside
from ..steps import Axes, Steps, Way, packed, text
from ..verbs import VERBS, Call
from .connection import WebSocketConnection
from .rfc6455 import BINARY, TEXT

SLOW_OPERATIONS: Final = 8
"""Operations other than steps that one socket may have under way; with it the answers waiting in memory are bounded."""
DRAIN_SHARE: Final = 0.8
"""The share of drain_s that sockets have; the rest is for the close frames and the store."""

LATE_SHARE: Final = 0.8
"""The share of deadline_s that a frame may wait, for its turn and for its run; who would wait longer is refused."""
RETRY_S: Final = 0.5
_LATE: Final = "the frame waited too long behind others of its socket; it was not applied. Send fewer, or retry later."
_SHUTTING_DOWN: Final = "the server is shutting down"
_BESIDE: Final = frozenset({"models", "model", "version", "retire", "load", "predict", "list"})
"""Verbs that are about no session: HTTP alone has them."""


class Head(msgspec.Struct):
    """What every frame may have: what it is, and where its answer belongs."""

    id: FrameId = None
    session: str | None = None
    op: str = STEP


FRAME_TYPES: Final[dict[str, Any]] = {
    STEP: bodies.frame(bodies.StepBody),
    MARKER: bodies.frame(bodies.Nothing),
    **{op: bodies.frame(verb.body) for op, verb in VERBS.items() if op not in _BESIDE},
}

Asked = tuple[Head, Any]
"""A frame's head, and its struct or what is wrong with it."""
Answer = tuple[int, bytes]
"""Opcode and payload of a frame that is ready to be sent."""
Taken = tuple[Any, bytes | None, Axes]
"""A frame's struct; the inputs of a step that was taken apart in one go (None: another frame), and their axes."""


class Frame(Ticket[None, Answer]):
    """A frame on its way: its own ticket in the conversation, and who waits for its step."""

    __slots__ = ("_conversation", "_done", "asked", "data", "form", "kind", "session")
    stays = True

    def __init__(self, conversation: "Conversation", taken: Taken, kind: str, session: str, step: bool) -> None:
        self.request = self.answer = None
        self.answered, self._done, self.step = False, False, step
        self.asked, self.data, self.form = taken
        self._conversation, self.kind, self.session = conversation, kind, session

    def done(self) -> bool:
        """Whether it is settled; a client that is gone changes nothing, what was accepted is applied."""
        return self._done

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        self._done = True
        name = self.asked.id
        try:
            if self.kind == JSON:
                said = b"%d" % name if name.__class__ is int else msgspec.json.encode(name)
                rest = text(answers, row, step, self.form)
                answer = TEXT, b'{"id":%s,"session":"%s",%s' % (said, self.session.encode(), rest)
            else:
                fields = {"id": name, "session": self.session}
                answer = BINARY, packed(answers, row, step, self.form, fields)
        except StepcastError as error:  # it has no names for the outputs
            self.refused(error)
        else:
            self._conversation.answered(self, *answer)

    def refused(self, error: BaseException) -> None:
        self._done = True
        self._conversation.finish(self, self._conversation.problem(self.asked.id, self.session, error, self.kind))


class LargeFrame(Frame):
    """One of many bytes: until it is answered its socket takes no other frame."""

    __slots__ = ()

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        super().stepped(answers, row, step)
        self._conversation.lighter()

    def refused(self, error: BaseException) -> None:
        super().refused(error)
        self._conversation.lighter()


class Conversation:
    """What is said on one connection. `session` is that of all frames; None: each names its own."""

    def __init__(
        self, steps: Steps, connection: WebSocketConnection, principal: Principal, way: Way, session: str | None
    ) -> None:
        self._steps, self._connection, self._principal = steps, connection, principal
        self._way, self._session = way, session
        self._settings = steps.states.settings
        self._late = DeadlineExceeded(_LATE, retry_after_s=RETRY_S)
        self._talk: ServerConversation[None, Answer] = ServerConversation(self._settings.frames_limit)
        self._slow = asyncio.Semaphore(SLOW_OPERATIONS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._load = steps.turns.load(way.model)
        self._loaded = False  # a large frame is read, or waits for its answer
        self._may_step = ROLES.index(principal.role) >= ROLES.index("step")
        self._look()

    @property
    def namespace(self) -> str:
        """Whose socket it is."""
        return self._principal.namespace

    def wait_s(self) -> float:
        """How long a step that is accepted now waits for its run, as far as that is known."""
        return self._load.wait_s()

    def room(self) -> int:
        """How many more frames may be in flight; when there is room again, `WebSocketConnection.pump` is called."""
        return 0 if self._loaded else self._talk.room

    def message(self, opcode: int, payload: bytes) -> None:
        """Take a frame: a step that is taken apart in one go starts here, everything else goes the general way."""
        kind = JSON if opcode == TEXT else MSGPACK
        if len(payload) > LARGE_BYTES:
            self._loaded = True
            self._soon(self._take_large(payload, kind))
            return
        way, own = self._way, self._session
        if way.seen != self._steps.repository.changes:
            self._look()
        load = self._load
        if load.waiting >= load.limit and not self._talk.draining:
            self._take_when_full(payload, kind)
            return
        plain = way.reader.read(payload, kind, way.reader.frames) if self._plain and not self._talk.draining else None
        if plain is not None:
            named = plain[0].session
            session = own or named
            if session is not None and named in (None, session):
                frame = Frame(self, plain, kind, session, True)
                if self._talk.begin(session, frame):
                    self._step(frame)
                return
        self._take(payload, kind)

    def late(self, opcode: int, payload: bytes) -> None:
        """Refuse a frame that waited too long for its turn; a marker steps nothing and is taken all the same."""
        kind = JSON if opcode == TEXT else MSGPACK
        head = _head(payload, kind)
        if head.op == MARKER:
            self._take(payload, kind)
        else:
            self._turn_away(head, kind, self._late)

    @property
    def refuses(self) -> bool:
        """Whether frames may be refused in their turn: not while one before them is read aside."""
        return not self._loaded

    def _take_when_full(self, payload: bytes, kind: str) -> None:
        """Take a frame while no step may come: one is refused before its readings are read."""
        head = _head(payload, kind)
        try:
            if head.op == STEP:
                self._steps.turns.admit(self._way.model)
        except StepcastError as error:
            self._turn_away(head, kind, error)
        else:
            self._take(payload, kind)

    def _turn_away(self, head: Head, kind: str, error: StepcastError) -> None:
        """Answer a frame of which nothing but the head was read."""
        session = head.session if self._session is None else self._session
        self._talk.refuse(session, self.problem(head.id, session, error, kind))
        self._go_on()

    def drain(self) -> None:
        """Answer what was accepted, then close; refuse what comes."""
        if self._talk.draining:
            return
        self._talk.drain()
        loop, limit_s = asyncio.get_running_loop(), self._settings.drain_s * DRAIN_SHARE
        loop.call_later(limit_s, self._connection.close, CloseCode.SERVICE_RESTART, _SHUTTING_DOWN)
        self._go_on()

    def _look(self) -> None:
        """Find out what the live version takes now, and whether steps may be taken apart for it alone."""
        self._plain = False
        with contextlib.suppress(StepcastError):  # the general way tells it
            self._steps.look(self._way)
            self._plain = self._may_step and not self._steps.repository.mixed(self._way.model)

    def _take(self, payload: bytes, kind: str) -> None:
        """Take any frame; one that reaches no session is answered with its error, in its turn."""
        self._take_read(_read(payload, kind), kind, Frame)

    async def _take_large(self, payload: bytes, kind: str) -> None:
        """The same of a frame that would hold up others; no other one is taken meanwhile, so all keep their order."""
        try:
            read: Asked = await aside(len(payload), _read, payload, kind)
        except StepcastError as error:
            read = Head(), error
        if self._connection.disconnected or not self._take_read(read, kind, LargeFrame):
            self.lighter()

    def lighter(self) -> None:
        """A large frame is answered: others may come."""
        self._loaded = False
        self._connection.want()

    def _take_read(self, read: Asked, kind: str, frame: type[Frame]) -> bool:
        """Take a frame that was read; whether it waits for an answer now."""
        (head, asked), own, begun = read, self._session, False
        try:
            if isinstance(asked, Exception):
                raise asked
            if head.op == MARKER:
                self._talk.mark(_encode({"id": head.id, "op": MARKER}, kind))
            else:
                self._begin(asked, kind, frame)
                begun = True
        except Exception as error:
            session = head.session if own is None else own
            self._talk.refuse(session, self.problem(head.id, session, error, kind))
        self._go_on()
        return begun

    def _begin(self, asked: Any, kind: str, made: type[Frame]) -> None:
        """Hand a frame to the conversation, or raise the StepcastError that is its answer."""
        if self._talk.draining:
            raise Draining(f"{_SHUTTING_DOWN}. Connect again.", retry_after_s=1.0)
        self._principal.require("step" if asked.op == STEP else VERBS[asked.op].role)
        own = self._session
        session = own if asked.session is None else asked.session
        if session is None:
            raise InvalidRequest("Object missing required field `session`: this socket is for any of them")
        if own not in (None, session):
            raise InvalidRequest(f"$.session is {session!r}, this socket is for {own!r}")
        self._way.address(session)
        # A large step, and where versions differ in features one that may have to look at its session first, wait for
        # earlier frames.
        alone = asked.op != STEP or made is LargeFrame or self._steps.looks_first(self._way.model, asked, kind)
        frame = made(self, (asked, None, "F"), kind, session, not alone)
        if self._talk.begin(session, frame):
            self._start(frame)

    def _go_on(self) -> None:
        """Start what may start, send what is ready."""
        talk, connection = self._talk, self._connection
        while talk.ready:
            self._start(cast(Frame, talk.ready.popleft()))
        for opcode, payload in talk.answers:
            connection.reply(opcode, payload)
        talk.answers.clear()
        if talk.close_due:
            connection.close(CloseCode.SERVICE_RESTART, _SHUTTING_DOWN)

    def _start(self, frame: Frame) -> None:
        if frame.step:
            self._step(frame)
        elif not self._connection.disconnected:  # what a client that is gone still held back is forgotten
            self._soon(self._operate(frame))

    def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
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
            await self._connection.writable.wait()
            if self._connection.disconnected:
                return
            asked, way = frame.asked, self._way
            try:
                if asked.op == STEP:
                    await self._steps.start_own(way, frame.session, asked, frame.kind, frame)
                    return
                asked.session = frame.session
                call = Call(way.namespace, way.model, frame.session, asked, frame.kind)
                fields = (await VERBS[asked.op].run(self._steps.states, call)).fields
                other = {} if fields.get("session", frame.session) == frame.session else {"to": fields["session"]}
                answer = {"id": asked.id, **fields, **other, "session": frame.session}
            except Exception as error:
                frame.refused(error)
                return
        self.finish(frame, _encode(answer, frame.kind))
        if isinstance(frame, LargeFrame):
            self.lighter()

    def answered(self, frame: Frame, opcode: int, payload: bytes) -> None:
        """A step has its answer."""
        talk, connection = self._talk, self._connection
        if connection.disconnected or talk.draining or talk.room <= 0 or not talk.end(frame):
            self.finish(frame, (opcode, payload))
        else:
            connection.reply(opcode, payload, not talk.in_flight)

    def finish(self, frame: Frame, answer: Answer) -> None:
        """A frame has its answer, which may have to wait for its turn."""
        if self._connection.disconnected:
            return
        if self._talk.room <= 0:  # there is room now; but first let the caller go on
            self._connection.want()
        self._talk.finish(frame, answer)
        self._go_on()

    def problem(self, name: Any, session: str | None, error: BaseException, kind: str) -> Answer:
        """An error as the answer to the frame `name`."""
        return _encode(
            {"id": name, "session": session, "error": document(as_ours(error), self._steps.turns.metrics)}, kind
        )


def _encode(answer: dict[str, Any], kind: str) -> Answer:
    return TEXT if kind == JSON else BINARY, encode(answer, kind)


def _read(payload: bytes, kind: str) -> Asked:
    """What a frame asks; in any thread."""
    head = _head(payload, kind)
    try:
        if head.op not in FRAME_TYPES:
            raise InvalidRequest(f"$.op is {head.op!r}, want one of {', '.join(FRAME_TYPES)}")
        return head, bodies.decode(payload, FRAME_TYPES[head.op], kind)
    except Exception as error:
        return head, error


def _head(payload: bytes, kind: str) -> Head:
    """What can be read of a frame's head, even if the frame is no good."""
    try:
        head: Head = bodies.decoder(Head, kind).decode(payload)
    except bodies.UNREADABLE:
        if len(payload) > LARGE_BYTES:
            return Head()
        try:
            head = msgspec.convert(json.loads(payload, parse_constant=lambda _: None), Head)
        except (ValueError, RecursionError, msgspec.MsgspecError):  # not even that
            head = Head()
    return head
