"""The connection under HTTP: uvicorn's, with a short way for single steps.

A keep-alive client sends the same head again and again, only the session and the numbers change. So a head is read
once and remembered, and a step that came whole, on a connection that is otherwise idle, goes from the transport to the
door and back without a parser, an ASGI scope, a task or a queue. Whatever is not exactly that takes uvicorn's way, from
its first byte: httptools stays the judge of everything unusual.
"""

import asyncio
import re
from typing import Any, Final, NamedTuple

from fastapi import Response
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from ...sessions.columns import Answers, ManySteps
from ...sessions.core import StepAnswer
from .. import bodies as wire
from ..bodies import JSON
from .heads import Caller, FastDoor
from .routes import many_answer

KNOWN_HEADS: Final = 1024
LONGEST_HEAD: Final = 4096
AHEAD_BYTES: Final = 64 * 1024
"""What a client may send before its step is answered, until it is not read any more."""

_POST: Final = b"POST /v1/models/"
_VERSION: Final = b" HTTP/1.1\r\n"
_SLASHES_OF_BATCH: Final = 4
_FIELD: Final = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\x20-\x7e\x80-\xff]*)")
_NEVER: Final = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"connection", b"te", b"trailer"})


class Head(NamedTuple):
    """What a head says beside its path."""

    length: int
    caller: Caller


class Turn:
    """Who waits for a step: writes its answer without a turn of the loop."""

    __slots__ = ("_caller", "_done", "_door", "_pipe")

    def __init__(self, pipe: "Pipe", door: FastDoor, caller: Caller) -> None:
        self._pipe, self._door, self._caller = pipe, door, caller
        self._done = False

    def done(self) -> bool:
        """Whether the step is settled; a client that is gone changes nothing, what was accepted is applied."""
        return self._done

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        """The step was made in a column."""
        if self._caller.accepted == JSON:
            body = b'{"outputs":[%s],"step":%d,"version":%d}' % (answers.texts[row], step, answers.version)
            self._answer(body)
        else:
            self._give(answers.outputs[row], step, answers.version)

    def set_result(self, answer: StepAnswer) -> None:
        """The step was made by itself."""
        try:
            self._give(answer.outputs[0, 0], answer.step, answer.version)
        except Exception as error:
            self.set_exception(error)

    def stepped_many(self, many: ManySteps) -> None:
        """All steps of a batch were made or refused."""
        try:
            self._answer(many_answer(many, self._caller.accepted))
        except Exception as error:  # others of the column must not suffer
            self.set_exception(error)

    def _give(self, outputs: wire.Floats, step: int, version: int) -> None:
        self._answer(wire.encode({"outputs": outputs, "step": step, "version": version}, self._caller.accepted))

    def _answer(self, body: bytes) -> None:
        self._done = True
        caller = self._caller
        if self._pipe.last:
            self._pipe.settle(_response(Response(body, 200, None, caller.accepted), last=True))
        else:
            self._pipe.settle(b"%s%d\r\n\r\n%s" % (caller.ok, len(body), body))

    def set_exception(self, error: BaseException) -> None:
        """The step was refused."""
        self._done = True
        self._pipe.settle(_response(self._door.problem(error), self._pipe.last))


class Pipe(HttpToolsProtocol):
    """An HTTP connection; the class for uvicorn's `http` setting."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._door = _door(self.app) if self.limit_concurrency is None and not self.root_path else None
        self._between = True  # no message has begun in the parser
        self._stepping = False  # a step of ours is under way
        self._ahead = b""  # what came meanwhile
        self.last = False  # the server stops: close after this answer
        self._answered_at = 0.0

    # --- uvicorn's protocol -------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._stepping or self._ahead:
            self._ahead += data
            if len(self._ahead) > AHEAD_BYTES:
                self.flow.pause_reading()
        elif not (self._between and self._door is not None and self._step(self._door, data)):
            super().data_received(data)

    def on_message_begin(self) -> None:
        """The parser begins a message."""
        self._between = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """The parser has a whole message."""
        self._between = True
        super().on_message_complete()

    def shutdown(self) -> None:
        """The server stops: answer what was accepted, then close."""
        if self._stepping:
            self.last = True
        else:
            super().shutdown()

    def timeout_keep_alive_handler(self) -> None:
        """A timer of an idle connection: it is not set anew at every step, so it may be early."""
        self.timeout_keep_alive_task = None
        if self._stepping:
            return
        rest_s = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if rest_s > 0:
            self.timeout_keep_alive_task = self.loop.call_later(rest_s, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    # --- the short way ------------------------------------------------------------------------------------------

    def _step(self, door: FastDoor, data: bytes) -> bool:
        """Take a step, if this is one that came whole and nothing else is under way."""
        if not data.startswith(_POST) or self.flow.write_paused:
            return False
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        path_end = data.find(_VERSION)
        end = data.find(b"\r\n\r\n", path_end, path_end + LONGEST_HEAD)
        if path_end < 0 or end < 0:
            return False
        head = door.heads.get(lines := data[path_end + 11 : end + 2]) or _learn(door, lines)
        if head is None or len(data) != end + 4 + head.length:
            return False
        path = data[5:path_end]
        if path.count(b"/") == _SLASHES_OF_BATCH:
            return self._step_many(door, head.caller, path, data[end + 4 :])
        self._stepping = True  # before the step: its answer may be there at once
        if door.step(head.caller, path, data[end + 4 :], Turn(self, door, head.caller)):
            return True
        self._stepping = False
        return False

    def _step_many(self, door: FastDoor, caller: Caller, path: bytes, body: bytes) -> bool:
        """Take a batch step."""
        model = door.batch(path)
        if model is None:
            return False
        turn = Turn(self, door, caller)
        self._stepping = True
        if door.step_many(caller, model, body, turn.stepped_many):
            return True
        self._stepping = False
        return False

    def settle(self, answer: bytes) -> None:
        """Write the answer, then go on with what came meanwhile."""
        self._stepping = False
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.transport.write(answer)
        if self.last:
            self.transport.close()
            return
        self._answered_at = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        if self._ahead:
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        data, self._ahead = self._ahead, b""
        if data and not self.transport.is_closing():
            self.flow.resume_reading()
            self.data_received(data)


def _response(response: Response, last: bool) -> bytes:
    """A response as bytes; the last one of its connection says so."""
    lines = [STATUS_LINE[response.status_code]]
    lines += [b"%s: %s\r\n" % field for field in response.raw_headers]
    if last:
        lines.append(b"connection: close\r\n")
    return b"".join((*lines, b"\r\n", response.body))


def _door(app: Any) -> FastDoor | None:
    """The door of our application, which uvicorn may have wrapped; None where steps may not go the short way."""
    while app is not None and not hasattr(app, "door"):
        app = getattr(app, "app", None)
    door: FastDoor | None = app.door if app is not None else None
    return door if door is not None and door.short else None


def _learn(door: FastDoor, lines: bytes) -> Head | None:
    """Read a head, request line left out, and remember it; None where it asks for anything unusual."""
    fields: dict[bytes, bytes] = {}
    for line in lines[:-2].split(b"\r\n"):
        found = _FIELD.fullmatch(line)
        if found is None:
            return None
        name = found[1].lower()
        if name in _NEVER and (name, found[2].lower()) != (b"connection", b"keep-alive"):
            return None
        if name in fields:
            return None
        fields[name] = found[2].rstrip(b" \t")
    length = fields.get(b"content-length", b"")
    if not length.isdigit() or len(length) > 9 or int(length) > door.limit:
        return None
    caller = door.caller(fields)
    if caller is None:
        return None
    if len(door.heads) >= KNOWN_HEADS:
        door.heads.clear()
    head = door.heads[lines] = Head(int(length), caller)
    return head
