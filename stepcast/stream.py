"""Streams: steps over a WebSocket, many in flight, through broken connections, each answered once, in order.

The conversation is stepcast.protocol's; here it meets a socket and a clock. `AsyncStream` does the work; `Stream` is
the same for synchronous code, on an event loop in a thread of its own.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, Self, TypeVar, overload

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from . import codec
from .calls import Calls, Steps
from .codec import Answer, StepInputs
from .errors import StepcastError, Unavailable, from_problem
from .features import FeatureNames, Floats
from .inputs import Array, Frame, NamedRow, Row, is_frame, rows
from .progress import Progress, shown
from .protocol import WINDOW_STEPS, ClientConversation, Request
from .session_calls import SessionCalls, same_features
from .stream_steps import AskedStep, asked_step, awaited_send, awaited_step, waiting_send, waiting_step
from .transport import Transport
from .wire import Target

P = ParamSpec("P")
T = TypeVar("T")

GIVE_UP_S: Final = 60.0
"""How long there may be no connection where the retry policy has no deadline."""


# --- on asyncio -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Held:
    """Something that waits until a session's features are known; `answer` is what its caller waits for."""

    act: Callable[[], None]
    answer: "asyncio.Future[Any]"


class AsyncStream:
    """A WebSocket that comes back: `async with session.stream() as stream`.

    Leaving the block waits for all answers. While it is open nobody else should step its sessions.

    Args:
        target: The server.
        calls: What can be asked of it over HTTP; its retry policy is the stream's.
        run: Carries such a call.
        model: The model.
        session: The session of all steps; None: each step names its own.
    """

    def __init__(
        self,
        target: Target,
        calls: Calls,
        run: Callable[[Steps[FeatureNames]], Awaitable[FeatureNames]],
        model: str,
        session: str | None = None,
    ) -> None:
        self._target, self._url, self._session = target, target.socket(model, session), session
        self._calls, self._run, self._model = calls, run, model
        self._give_up_s = calls.retry.deadline_s or GIVE_UP_S
        self._talk = ClientConversation(calls.retry.attempts)
        self._waiting: dict[Request, asyncio.Future[dict[str, Any]]] = {}
        self._names: dict[str, FeatureNames] = {}
        self._held: dict[str, list[_Held]] = {}
        self._lookups: set[asyncio.Task[None]] = set()
        self._n_outputs: int | None = None
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._failure: StepcastError | None = None
        self._task: asyncio.Task[None] | None = None

    # --- for the caller -----------------------------------------------------------------------------------------

    send = awaited_send(asked_step)
    step = awaited_step(asked_step)

    def put(self, asked: AskedStep[T]) -> "asyncio.Future[Answer[T]]":
        """Put a step on its way; its future has the answer."""
        session = self._name(asked.session)
        answer: asyncio.Future[Answer[T]] = asyncio.get_running_loop().create_future()
        self._in_turn(session, answer, lambda: self._put(session, asked, answer), asked.form.named)
        return answer

    @overload
    def map(self, inputs: Frame, *, progress: Progress = False) -> AsyncIterator[Answer[NamedRow]]: ...
    @overload
    def map(
        self, inputs: Floats | AsyncIterable[Array] | Iterable[Array], *, progress: Progress = False
    ) -> AsyncIterator[Answer[Floats]]: ...
    @overload
    def map(
        self, inputs: AsyncIterable[Row] | Iterable[Row], *, progress: Progress = False
    ) -> AsyncIterator[Answer[NamedRow]]: ...
    async def map(self, inputs: Any, *, progress: Progress = False) -> AsyncIterator[Answer[Any]]:
        """Step through all inputs, many in flight; the answers in order.

        Args:
            inputs: One step's inputs each; of a DataFrame the rows.
            progress: True: a bar on stderr (needs rich). Or a function that takes how many are answered, and of how
                many (None: not known).
        """
        waiting: deque[asyncio.Future[Answer[Any]]] = deque()
        with shown(progress, inputs) as answered:
            async for item in _each(_items(inputs)):
                waiting.append(self.send(item))
                while waiting and (len(waiting) >= 2 * WINDOW_STEPS or waiting[0].done()):
                    yield await waiting.popleft()
                    answered()
            while waiting:
                yield await waiting.popleft()
                answered()

    async def call(self, op: str, *, session: str | None = None, **fields: Any) -> dict[str, Any]:
        """Another operation (docs/protocol.md); its answer as it is, arrays as raw bytes."""
        steps = int(fields["steps"]) if op == "rollout" and fields.get("commit") else 0
        name = self._name(session)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        request = Request(name, op, fields, steps)
        self._in_turn(name, answer, lambda: self._ask(request, lambda made: _hand_on(made, answer)))
        return await answer

    # --- life ---------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._live())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            while self._waiting or self._held or self._lookups:
                self._idle.clear()
                await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """Close at once; what is unanswered fails."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._fail(Unavailable("the stream was closed"))
        if self._lookups:
            await asyncio.wait(self._lookups)

    async def _live(self) -> None:
        """Connect, talk, connect again."""
        attempt, silent_since = 0, asyncio.get_running_loop().time()
        while True:
            attempt += 1
            try:
                headers = {"x-api-key": self._target.key} if self._target.key else None
                async with connect(
                    self._url, compression=None, max_size=None, additional_headers=headers, ssl=self._target.context
                ) as socket:
                    attempt = 1
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
            await asyncio.sleep(self._calls.retry.pause_s(attempt))

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

    def _put(self, session: str, asked: AskedStep[T], answer: "asyncio.Future[Answer[T]]") -> None:
        names = self._names.get(session) if asked.form.named else None
        made = asked.prepare(names)
        size = None if self._n_outputs is None else made.answer_bytes(self._n_outputs)
        request = Request(session, "step", made.fields, made.steps, size)
        self._ask(request, lambda done: self._stepped(done, made, names, answer))

    def _ask(self, request: Request, then: "Callable[[asyncio.Future[dict[str, Any]]], None]") -> None:
        if self._failure is not None:
            raise self._failure
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        future.add_done_callback(then)
        self._waiting[request] = future
        self._talk.ask(request)
        self._go_on()

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
            loop.call_later(self._calls.retry.jittered(seconds), self._retry, session)
        self._talk.pauses.clear()
        if self._talk.outgoing:
            self._news.set()
        if not (self._waiting or self._held or self._lookups):
            self._idle.set()

    def _retry(self, session: str) -> None:
        self._talk.retry(session)
        self._go_on()

    def _stepped(
        self,
        done: "asyncio.Future[dict[str, Any]]",
        made: StepInputs,
        names: FeatureNames | None,
        answer: "asyncio.Future[Any]",
    ) -> None:
        error = done.exception()
        if error is not None:
            _fail(answer, error)
            return
        message = done.result()
        self._n_outputs = message["shape"][1 if made.fields.get("format") == "NCW" else -1]
        if names is not None and names.manifest.version != message["version"]:
            self._look_up(self._answer_by_version(message, made, names, answer))
        elif not answer.done():
            answer.set_result(codec.answer(message, made, names))

    def _fail(self, error: StepcastError) -> None:
        self._failure = error
        for task in self._lookups:
            task.cancel()
        for held in self._held.values():
            for one in held:
                _fail(one.answer, error)
        self._held.clear()
        self._talk.fail(error.problem())
        self._go_on()

    # --- names --------------------------------------------------------------------------------------------------

    def _in_turn(
        self, session: str, answer: "asyncio.Future[Any]", act: Callable[[], None], named: bool = False
    ) -> None:
        """Act now or, if features must be known first, when they are: in the order of the caller's calls."""
        held = self._held.get(session)
        if held is None and not (named and session not in self._names):
            act()
            return
        if held is None:
            if self._failure is not None:
                raise self._failure
            held = self._held[session] = []
            self._look_up(self._learn(session))
        held.append(_Held(act, answer))

    def _look_up(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(what)
        self._lookups.add(task)
        task.add_done_callback(self._looked_up)

    def _looked_up(self, task: "asyncio.Task[None]") -> None:
        self._lookups.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:  # a defect: no reason to hang
            self._fail(StepcastError(f"the stream ended: {error!r}"))
        self._go_on()

    async def _learn(self, session: str) -> None:
        """Ask for the features of a session's version, then do what is held for it."""
        failure: StepcastError | None = None
        try:
            self._names[session] = await self._run(SessionCalls(self._calls, self._model, session).names())
        except StepcastError as error:
            failure = error
        for held in self._held.pop(session, []):
            try:
                if failure is not None:
                    raise failure
                held.act()
            except (StepcastError, ValueError) as error:
                _fail(held.answer, error)

    async def _answer_by_version(
        self, message: dict[str, Any], made: StepInputs, names: FeatureNames, answer: "asyncio.Future[Any]"
    ) -> None:
        """Answer a step that another version took than its inputs were arranged for."""
        try:
            theirs = await self._run(self._calls.names(self._model, message["version"]))
            answered = codec.answer(message, made, same_features(names, theirs))
        except StepcastError as error:
            _fail(answer, error)
            return
        if not answer.done():
            answer.set_result(answered)


def _fail(answer: "asyncio.Future[Any]", error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)


def _hand_on(made: "asyncio.Future[T]", answer: "asyncio.Future[T]") -> None:
    error = made.exception()
    if error is not None:
        _fail(answer, error)
    elif not answer.done():
        answer.set_result(made.result())


def _items(inputs: Any) -> Any:
    return rows(inputs) if is_frame(inputs) else inputs


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


# --- for synchronous code -------------------------------------------------------------------------------------------


class Stream:
    """AsyncStream for synchronous code: `with session.stream() as stream`. Threads may share it."""

    def __init__(self, transport: Transport, calls: Calls, model: str, session: str | None = None) -> None:
        async def run(steps: Steps[FeatureNames]) -> FeatureNames:
            return await asyncio.to_thread(transport.run, steps)

        self._make: Callable[[], AsyncStream] = lambda: AsyncStream(transport.target, calls, run, model, session)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stepcast-stream", daemon=True)

    send = waiting_send(asked_step)
    step = waiting_step(asked_step)

    def put(self, asked: AskedStep[T]) -> "Future[Answer[T]]":
        """Put a step on its way; its future has the answer."""
        return self._submit(self._answer(asked))

    @overload
    def map(self, inputs: Frame, *, progress: Progress = False) -> Iterator[Answer[NamedRow]]: ...
    @overload
    def map(self, inputs: Floats | Iterable[Array], *, progress: Progress = False) -> Iterator[Answer[Floats]]: ...
    @overload
    def map(self, inputs: Iterable[Row], *, progress: Progress = False) -> Iterator[Answer[NamedRow]]: ...
    def map(self, inputs: Any, *, progress: Progress = False) -> Iterator[Answer[Any]]:
        """Step through all inputs, many in flight; the answers in order.

        Args:
            inputs: One step's inputs each; of a DataFrame the rows.
            progress: True: a bar on stderr (needs rich). Or a function that takes how many are answered, and of how
                many (None: not known).
        """
        waiting: deque[Future[Answer[Any]]] = deque()
        with shown(progress, inputs) as answered:
            for item in _items(inputs):
                waiting.append(self.send(item))
                while waiting and (len(waiting) >= 2 * WINDOW_STEPS or waiting[0].done()):
                    yield waiting.popleft().result()
                    answered()
            while waiting:
                yield waiting.popleft().result()
                answered()

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

    async def _answer(self, asked: AskedStep[T]) -> Answer[T]:
        return await self._stream.put(asked)

    def _submit(self, asked: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(asked, self._loop)
