"""Streams: steps over a WebSocket, many in flight, through broken connections, each answered once, in order.

The conversation is stepcast.protocol's; here it meets a socket and a clock. `AsyncStream` does the work; `Stream` is
the same for synchronous code, on an event loop in a thread of its own.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import msgspec
import numpy.typing as npt
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from . import codec
from .codec import Answer
from .errors import StepcastError, Unavailable, from_problem
from .protocol import WINDOW_STEPS, ClientConversation, Request

T = TypeVar("T")

FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect: the server's base URL, and a key."""

    url: str
    key: str | None

    def socket(self, model: str, session: str | None) -> str:
        """The WebSocket's URL."""
        base = "ws" + self.url.removeprefix("http").rstrip("/")
        path = f"/v1/models/{quote(model, safe='')}"
        return f"{base}{path}/stream" if session is None else f"{base}{path}/sessions/{quote(session, safe='')}/stream"


class AsyncStream:
    """A WebSocket that comes back: `async with session.stream() as stream`.

    Leaving the block waits for all answers. While it is open nobody else should step its sessions.

    Args:
        session: The session of all steps; None: each step names its own.
        give_up_s: How long there may be no connection before what is unanswered fails with Unavailable.
    """

    def __init__(self, target: Target, model: str, session: str | None, give_up_s: float = 60.0) -> None:
        self._target, self._url, self._session = target, target.socket(model, session), session
        self._give_up_s = give_up_s
        self._talk = ClientConversation()
        self._waiting: dict[Request, asyncio.Future[dict[str, Any]]] = {}
        self._n_outputs: int | None = None
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._failure: StepcastError | None = None
        self._task: asyncio.Task[None] | None = None

    # --- for the caller -----------------------------------------------------------------------------------------

    def send(
        self,
        inputs: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        *,
        layout: str = "NWC",
        session: str | None = None,
    ) -> "asyncio.Future[Answer]":
        """Put a step on its way; its future has the answer. Steps of a session are applied in the order of calls."""
        asked = codec.step_inputs(inputs, mask, layout)
        size = None if self._n_outputs is None else asked.answer_bytes(self._n_outputs)
        request = Request(self._name(session), "step", asked.fields, asked.steps, size)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._ask(request).add_done_callback(lambda made: self._stepped(made, answer))
        return answer

    async def step(
        self,
        inputs: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        *,
        layout: str = "NWC",
        session: str | None = None,
    ) -> Answer:
        """Advance a session and wait for the answer."""
        return await self.send(inputs, mask, layout=layout, session=session)

    async def map(self, inputs: AsyncIterable[npt.ArrayLike] | Iterable[npt.ArrayLike]) -> AsyncIterator[Answer]:
        """Step through all inputs, many in flight; the answers in order."""
        waiting: deque[asyncio.Future[Answer]] = deque()
        async for item in _each(inputs):
            waiting.append(self.send(item))
            while waiting and (len(waiting) >= 2 * WINDOW_STEPS or waiting[0].done()):
                yield await waiting.popleft()
        while waiting:
            yield await waiting.popleft()

    async def call(self, op: str, *, session: str | None = None, **fields: Any) -> dict[str, Any]:
        """Another operation (docs/protocol.md); its answer as it is, arrays as raw bytes."""
        steps = int(fields["steps"]) if op == "rollout" and fields.get("commit") else 0
        return await self._ask(Request(self._name(session), op, fields, steps))

    # --- life ---------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._live())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            while self._waiting:
                self._idle.clear()
                await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """Close at once; what is unanswered fails."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._fail(Unavailable("the stream was closed"))

    async def _live(self) -> None:
        """Connect, talk, connect again."""
        pause_s, silent_since = FIRST_PAUSE_S, asyncio.get_running_loop().time()
        while True:
            try:
                headers = {"x-api-key": self._target.key} if self._target.key else None
                async with connect(self._url, compression=None, max_size=None, additional_headers=headers) as socket:
                    pause_s = FIRST_PAUSE_S
                    await self._converse(socket)
            except InvalidStatus as refused:
                error = _refusal(refused)
                if error.status not in (429, 502, 503, 504):
                    self._fail(error)
                    return
            except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError):
                pass
            except Exception as error:  # a defect, or a server that is none: no reason to hang
                self._fail(StepcastError(f"the stream ended: {error!r}"))
                raise
            finally:
                if self._talk.connected:
                    silent_since = asyncio.get_running_loop().time()
                self._talk.lose()
            if asyncio.get_running_loop().time() - silent_since > self._give_up_s:
                self._fail(Unavailable(f"{self._url} could not be reached for {self._give_up_s} s"))
                return
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    async def _converse(self, socket: ClientConnection) -> None:
        self._talk.connect()
        self._news.set()
        writer = asyncio.get_running_loop().create_task(self._write(socket))
        try:
            async for data in socket:
                if isinstance(data, bytes):
                    self._talk.receive(codec.unpack(data))
                    self._go_on()
        finally:
            writer.cancel()
            await asyncio.wait([writer])

    async def _write(self, socket: ClientConnection) -> None:
        outgoing = self._talk.outgoing
        try:
            while True:
                while outgoing:
                    await socket.send(codec.pack(outgoing.popleft()))
                self._news.clear()
                await self._news.wait()
        except ConnectionClosed:
            pass  # the reader sees it, too

    # --- the conversation ---------------------------------------------------------------------------------------

    def _name(self, session: str | None) -> str:
        name = session or self._session
        if name is None:
            raise ValueError("name the session: this stream is for any of them")
        return name

    def _ask(self, request: Request) -> "asyncio.Future[dict[str, Any]]":
        if self._failure is not None:
            raise self._failure
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[request] = future
        self._talk.ask(request)
        self._go_on()
        return future

    def _go_on(self) -> None:
        """Hand out what is done, begin the pauses, wake the writer."""
        loop = asyncio.get_running_loop()
        for request in self._talk.done:
            future = self._waiting.pop(request)
            if future.cancelled():
                continue
            if request.problem is not None:
                future.set_exception(from_problem(request.problem))
            else:
                future.set_result(request.answer or {})
        self._talk.done.clear()
        for session, seconds in self._talk.pauses:
            loop.call_later(seconds, self._retry, session)
        self._talk.pauses.clear()
        if self._talk.outgoing:
            self._news.set()
        if not self._waiting:
            self._idle.set()

    def _retry(self, session: str) -> None:
        self._talk.retry(session)
        self._go_on()

    def _stepped(self, made: "asyncio.Future[dict[str, Any]]", answer: "asyncio.Future[Answer]") -> None:
        error = made.exception()
        if error is None:
            decoded = codec.answer(made.result())
            self._n_outputs = decoded.outputs.shape[-1]
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(decoded)

    def _fail(self, error: StepcastError) -> None:
        self._failure = error
        self._talk.fail(error.problem())
        self._go_on()


async def _each(items: AsyncIterable[T] | Iterable[T]) -> AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
            await asyncio.sleep(0)  # answers come in meanwhile


def _refusal(refused: InvalidStatus) -> StepcastError:
    response = refused.response
    try:
        return from_problem(msgspec.json.decode(response.body or b""))
    except (msgspec.DecodeError, AttributeError):
        return StepcastError(f"HTTP {response.status_code} instead of a WebSocket")


class Stream:
    """AsyncStream for synchronous code: `with session.stream() as stream`."""

    def __init__(self, target: Target, model: str, session: str | None, give_up_s: float = 60.0) -> None:
        self._make: Callable[[], AsyncStream] = lambda: AsyncStream(target, model, session, give_up_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stepcast-stream", daemon=True)

    def send(
        self,
        inputs: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        *,
        layout: str = "NWC",
        session: str | None = None,
    ) -> "Future[Answer]":
        """Put a step on its way; its future has the answer. Steps of a session are applied in the order of calls."""
        return self._submit(self._stream.step(inputs, mask, layout=layout, session=session))

    def step(
        self,
        inputs: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        *,
        layout: str = "NWC",
        session: str | None = None,
    ) -> Answer:
        """Advance a session and wait for the answer."""
        return self.send(inputs, mask, layout=layout, session=session).result()

    def map(self, inputs: Iterable[npt.ArrayLike]) -> Iterator[Answer]:
        """Step through all inputs, many in flight; the answers in order."""
        waiting: deque[Future[Answer]] = deque()
        for item in inputs:
            waiting.append(self.send(item))
            while waiting and (len(waiting) >= 2 * WINDOW_STEPS or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def call(self, op: str, *, session: str | None = None, **fields: Any) -> dict[str, Any]:
        """Another operation (docs/protocol.md); its answer as it is, arrays as raw bytes."""
        return self._submit(self._stream.call(op, session=session, **fields)).result()

    def __enter__(self) -> Self:
        self._thread.start()
        self._stream = self._submit(self._open()).result()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self._submit(self._stream.__aexit__(kind, *rest)).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _open(self) -> AsyncStream:
        return await self._make().__aenter__()

    def _submit(self, asked: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(asked, self._loop)
