"""The connection under HTTP: uvicorn's, with a way of its own for steps and batch steps.

A step goes from the transport to the door and back without a parser, an ASGI scope, a task or a queue. Whatever is not
a step behind a plain head takes uvicorn's way, from its first byte: httptools stays the judge of everything unusual.
"""

import re
from typing import Any, Final

from stepcast.errors import StepcastError

from ..answers import head_of, problem
from ..intake import Share
from ..request_ids import PREFIX, RequestId, next_number
from ..steps import Axes, HttpWaiter
from ..tries import network
from .guard import GuardedConnection
from .heads import Caller, Heads

LONGEST_HEAD: Final = 4096
AHEAD_BYTES: Final = 64 * 1024  # what a client may send before its step is answered, until it is not read any more
_STEP: Final = re.compile(rb"POST /v1/models/(?:([A-Za-z0-9._-]+)/sessions/)?([A-Za-z0-9._:@~-]+)/step HTTP/1\.1\r\n")
"""The request line of a step: its model and session, or of a batch step: its model alone."""
_NAMED: Final = b"%s%d\r\nx-request-id: %s\r\n\r\n%s"
_NUMBERED: Final = b"%%s%%d\r\nx-request-id: %s-%%x\r\n\r\n%%s" % PREFIX
"""An answer: its head up to the content length, that length, a request id or the number of one of ours, its body."""


class Reply(HttpWaiter):
    """Who waits for a step over HTTP: writes its answer without a turn of the loop."""

    __slots__ = ("_caller", "_connection", "_done")

    stays = True

    def __init__(self, connection: "HttpConnection", caller: Caller) -> None:
        self._connection, self._caller, self._done = connection, caller, False
        self.kind = caller.accepted
        self.form: Axes = "F"

    def done(self) -> bool:
        """Whether the step is settled; a client that is gone changes nothing, what was accepted is applied."""
        return self._done

    def answered(self, body: bytes) -> None:
        self._done = True
        self._connection.settle(self._caller.ok, body, self._caller.close)

    def refused(self, error: BaseException) -> None:
        self._done = True
        caller, answer = self._caller, problem(error, self._connection.metrics)
        self._connection.settle(head_of(answer, caller.fields), answer.body, caller.close)


class HttpConnection(GuardedConnection):
    """An HTTP connection; the class for uvicorn's `http` setting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: Caller | None = None  # who asked before
        self._name: RequestId | None = None  # the request id of the step that is under way, if it has one
        self._ahead = b""  # what came meanwhile
        self._last = False  # the server stops: close after this answer

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._stepping or self._ahead:
            self._ahead += data
            if len(self._ahead) > AHEAD_BYTES:
                self.flow.pause_reading()
            return
        if self._parts:
            whole = self._more(data)
            if whole is None:
                return
            data = whole
        if not (self._between and self._heads is not None and self._take(self._heads, data)):
            self.parse(data)

    def shutdown(self) -> None:
        """The server stops: answer what was accepted, then close."""
        if self._stepping:
            self._last = True
        else:
            self._keeps = False
            super().shutdown()

    def _take(self, heads: Heads, data: bytes) -> bool:
        """Take a step, where the bytes begin with one and nothing else is under way; False: they are uvicorn's."""
        line = _STEP.match(data)
        if line is None or self.flow.write_paused or (self.cycle is not None and not self.cycle.response_complete):
            return False
        if heads.blocked and network(self.address) in heads.blocked:
            return False
        at, (model, session) = line.end(), line.groups()
        end = data.find(b"\r\n\r\n", at - 2, at + LONGEST_HEAD)
        head = None if end < 0 else heads.read(data[at:end])
        if head is None:
            return False
        length, caller, name = head
        if caller is not self._known:
            self._known = caller
            heads.tries.right(self.address, caller.digest)
        stop = end + 4 + length
        if len(data) < stop:
            self._wait(heads, caller, name, data, stop - len(data))
            return True
        self._ahead, self._name = data[stop:], name
        self._stepping = True  # before the step: its answer may be there at once
        way = caller.ways.get(model or session) or heads.way(caller, model or session)
        reply, body = Reply(self, caller), data[end + 4 : stop]
        if caller.refusal is not None:
            reply.refused(caller.refusal)
        elif model is None:
            heads.steps.take_many(way, body, caller.kind, reply)
        else:
            heads.steps.take(way, str(session, "ascii"), body, caller.kind, reply)
        return True

    def _wait(self, heads: Heads, caller: Caller, name: RequestId | None, data: bytes, missing: int) -> None:
        """Wait for the body of a step, but not of a caller who may take none, nor while too many others are held."""
        refusal = caller.refusal
        if refusal is None:
            try:
                share = self._share = Share(heads.intake, caller.principal.namespace)
                share.add(len(data) + missing)
            except StepcastError as error:
                refusal = error
        if refusal is None:
            self._keep(data, missing)
        else:
            self.end(refusal, caller.cors, name)

    def settle(self, head: bytes, body: bytes, close: bool) -> None:
        """Write an answer, its head up to the content length, then go on with what came meanwhile."""
        self._stepping = False
        if self._share is not None:
            self._share.hold(0)
            self._share = None
        self.server_state.total_requests += 1
        transport = self.transport
        if transport.is_closing():
            return
        if self._last and not close:
            head, close = head.replace(b"\r\n", b"\r\nconnection: close\r\n", 1), True
        if self._name is None:
            transport.write(_NUMBERED % (head, len(body), next_number(), body))
        else:
            transport.write(_NAMED % (head, len(body), self._name, body))
        if close:
            transport.close()
            return
        self._answered_at = self.loop.time()
        if self.timeout_keep_alive_task is None:
            limit_s, handler = self.timeout_keep_alive, self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(limit_s, handler)
        if self._ahead:
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        data, self._ahead = self._ahead, b""
        if data and not self.transport.is_closing():
            self.flow.resume_reading()
            self.data_received(data)
