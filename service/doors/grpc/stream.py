"""ModelStreamInfer: one stream's requests to the sessions and back; the order within a sequence is stepcast.protocol's.

A request costs no task: one task of the stream reads, another writes, and an answer is made where the step is.
"""

import asyncio
from collections import deque
from typing import Final

import grpc

from stepcast.errors import Draining, IntakeFull, ModelNotFound, Unavailable
from stepcast.protocol import ServerConversation, Ticket

from ...engine.repository import Repository
from ...settings import Settings
from ...telemetry import Metrics
from ..intake import Share
from ..oip.errors import failure
from ..oip.infer import Inferred
from ..oip.requests import Request
from ..steps import Way
from . import requests
from .burst import Burst
from .callers import Context, problem_of
from .messages import StreamInferResponse

WAITING_BYTES: Final = 2**20
"""Answers that may wait to be written until no more requests are read."""
LARGE_BYTES: Final = 64 * 1024
"""Requests from this size on count among the bytes that a server takes at once."""
GRPC_ERRORS: Final = "triton_grpc_error"
"""Metadata of a client that wants the stream to end with an error's status, instead of messages that tell errors."""

Ways = dict[str, Way]


class Frame(Ticket[Request, bytes]):
    """A request on its way, and who hears of its answer."""

    __slots__ = ("_done", "_stream", "held", "way")

    def __init__(self, stream: "Stream", way: Way, request: Request, held: int, step: bool) -> None:
        super().__init__(request, step)
        self._stream, self.way, self.held, self._done = stream, way, held, False

    def inferred(self, answer: Inferred) -> None:
        """The request has its answer."""
        self._done = True
        message = StreamInferResponse()
        requests.write(message.infer_response, answer)
        self._stream.answered(self, message.SerializeToString())

    def failed(self, error: BaseException) -> None:
        """It was refused."""
        self._done = True
        self._stream.answered(self, self._stream.problem(self.request, error))

    def gone(self) -> bool:
        """Whether it is settled; a client that is gone changes nothing, what was accepted is applied."""
        return self._done


class Stream:
    """One call of ModelStreamInfer.

    Args:
        namespace: The caller's.
        share: Holds the bytes of large requests that are not answered.
    """

    def __init__(
        self,
        burst: Burst,
        repository: Repository,
        namespace: str,
        share: Share,
        context: Context,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._burst, self._repository = burst, repository
        self._namespace, self._share, self._context = namespace, share, context
        self._metrics, self._stall_s, self._limit = metrics, settings.stall_s, settings.frames_limit
        self._talk: ServerConversation[Request, bytes] = ServerConversation(settings.frames_limit)
        self._ways: Ways = {}
        self._out: deque[bytes] = deque()
        self._out_bytes = 0
        self._wake, self._room = asyncio.Event(), asyncio.Event()  # something to write; room to read
        self._written, self._writing, self._stalled = 0, False, False
        self._heard_all = self._over = False
        self._error: BaseException | None = None  # that the stream ends with
        said = dict(context.invocation_metadata() or ())
        self._ends_with_errors = said.get(GRPC_ERRORS) == "true"

    async def run(self) -> None:
        """Serve the stream to its end; raises the error that it ends with."""
        loop, reader = asyncio.get_running_loop(), asyncio.ensure_future(self._read())
        task = asyncio.current_task()
        assert task is not None
        self._stall = loop.call_later(self._stall_s, self._check, 0, task)
        try:
            await self._write()
        except asyncio.CancelledError:
            if not self._stalled:
                raise
            task.uncancel()
        finally:
            self._over = True
            self._stall.cancel()
            reader.cancel()
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """The server stops: answer what was accepted, then end the stream."""
        self._end(Draining("the server is shutting down. Open the stream again.", retry_after_s=1.0))

    def _end(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self._talk.drain()
        self._wake.set()

    # --- from the client ----------------------------------------------------------------------------------------

    async def _read(self) -> None:
        read, talk = self._context.read, self._talk
        try:
            while (data := await read()) is not grpc.aio.EOF and not talk.draining:
                self._take(data)
                while talk.room - len(self._out) <= 0 or self._out_bytes > WAITING_BYTES:
                    self._room.clear()
                    await self._room.wait()
        except Exception as error:
            self._end(error)
        self._heard_all = True
        self._wake.set()

    def _take(self, data: bytes) -> None:
        """Take a request."""
        try:
            request = requests.read(data)
        except Exception as error:
            self._put(self.problem(None, error))
            return
        model = request.model
        way = self._ways.get(model) or self._way(model)
        # What ends a sequence waits for what came before, and holds back what comes behind. So does a step whose
        # session has to be looked at first.
        alone = request.parameters.get("sequence_end") is True or self._has_versions(model)
        sequence, held = f"{model}/{request.parameters.get('sequence_id', '')}", 0
        try:
            if len(data) > LARGE_BYTES:
                self._share.add(held := len(data))
        except IntakeFull as error:
            self._talk.refuse(sequence, self.problem(request, error))
            self._put_ready()
            return
        frame = Frame(self, way, request, held, not alone)
        if self._talk.begin(sequence, frame):
            self._burst.take(way, request, frame)

    def _has_versions(self, model: str) -> bool:
        """Whether several versions of a model are served."""
        try:
            return len(self._repository.versions(model)) > 1
        except ModelNotFound:
            return False

    def _way(self, model: str) -> Way:
        way = Way(self._namespace, model)
        if len(self._ways) < self._limit:
            self._ways[model] = way
        return way

    # --- to the client ------------------------------------------------------------------------------------------

    def answered(self, frame: Frame, answer: bytes) -> None:
        """A request has its answer."""
        talk = self._talk
        if frame.held and not self._over:
            self._share.add(-frame.held)
        if talk.end(frame):
            self._put(answer)
            return
        talk.finish(frame, answer)
        self._put_ready()
        while talk.ready:
            held = talk.ready.popleft()
            assert isinstance(held, Frame)
            self._burst.take(held.way, held.request, held)

    def _put_ready(self) -> None:
        """Put the answers whose turn has come."""
        for answer in self._talk.answers:
            self._put(answer)
        self._talk.answers.clear()

    def problem(self, request: Request | None, error: BaseException) -> bytes:
        """An error as a message; none where the client wants the stream to end with it."""
        if self._ends_with_errors:
            self._end(error)
            return b""
        failed = failure(error, self._metrics)
        message = StreamInferResponse(error_message=failed.text)
        response = message.infer_response
        if request is not None:
            response.id, response.model_name = request.id, request.model
        response.parameters["stepcast_code"].string_param = failed.error.code
        if said := problem_of(failed.error):
            response.parameters["stepcast_problem"].string_param = said.decode()
        return bytes(message.SerializeToString())

    def _put(self, answer: bytes) -> None:
        if not answer:
            return
        self._out.append(answer)
        self._out_bytes += len(answer)
        self._wake.set()

    async def _write(self) -> None:
        """Write answers until all of them are written and none will come."""
        out, write, talk, wake = self._out, self._context.write, self._talk, self._wake
        while True:
            while out:
                answer = out.popleft()
                self._writing = True
                await write(answer)
                self._writing = False
                self._written += 1
                self._out_bytes -= len(answer)
                if not self._room.is_set():
                    self._room.set()
            if (self._heard_all or talk.draining) and not talk.in_flight:
                return
            wake.clear()
            await wake.wait()

    def _check(self, written: int, task: "asyncio.Task[None]") -> None:
        """Cut the client off that has left its answers unread since the last time."""
        if self._writing and self._written == written:
            self._stalled = True
            self._out.clear()
            text = f"answers were left unread for {self._stall_s:g} s"
            self._error = Unavailable(f"{text}. Open another stream, and send what has none again by its stepcast_seq.")
            task.cancel()
        else:
            self._stall = asyncio.get_running_loop().call_later(self._stall_s, self._check, self._written, task)
