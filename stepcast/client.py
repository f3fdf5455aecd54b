"""The SDK: open a session, step it, get and set its state, stream it; sync (`Client`) and async (`AsyncClient`).

    with Client("http://127.0.0.1:8000") as client, client.session("weather", "kjfk") as session:
        answer = session.step({"temp": 39.0, "humid": 61.0, "pressure": 1012.0})
        print(answer.outputs["temp"])

Steps are numbered, so that a call is sent again after a broken connection or a full queue without being applied twice.
Errors are those of stepcast.errors. What can be asked is described once, in stepcast/calls.py and session_calls.py:
`waiting` and `awaiting` make a method of such a description, with its types and its documentation.
"""

import asyncio
import ssl
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from .calls import Calls, Steps
from .retry import Retry
from .session_calls import SessionCalls, new_id
from .signatures import described
from .stream import AsyncStream, Stream
from .transport import AsyncTransport, Transport
from .wire import Target

C = TypeVar("C")
P = ParamSpec("P")
T = TypeVar("T")


def waiting(ask: Callable[Concatenate[C, P], Steps[T]]) -> Callable[Concatenate[Any, P], T]:
    """A method that asks this and waits for the result."""

    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run(ask(self.calls, *args, **kwargs))  # type: ignore[no-any-return]

    return described(method, ask, _result(ask))


def awaiting(ask: Callable[Concatenate[C, P], Steps[T]]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """A coroutine method that asks this."""

    async def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run(ask(self.calls, *args, **kwargs))  # type: ignore[no-any-return]

    return described(method, ask, _result(ask))


def _result(ask: Callable[..., Any]) -> Any:
    """T, where a description returns Steps[T]."""
    return ask.__annotations__["return"].__args__[2]


# --- sync -----------------------------------------------------------------------------------------------------------


class Client:
    """A server, for synchronous code. Threads may share it.

    Args:
        url: Base URL, http:// or https://.
        key: API key.
        timeout_s: Longest wait for one response.
        retry: How often, and after which pauses, something is asked again.
        tls: For https://; None: the system's certificates.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout_s: float = 30.0,
        retry: Retry | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.calls = Calls(retry or Retry())
        self._transport = Transport(Target(url, key, tls), timeout_s)

    wait_ready = waiting(Calls.wait_ready)
    models = waiting(Calls.models)
    manifest = waiting(Calls.manifest)
    predict = waiting(Calls.predict)
    step_many = waiting(Calls.step_many)
    sessions = waiting(Calls.sessions)

    def session(self, model: str, session: str | None = None, *, keep: bool | None = None) -> "Session":
        """A session by its id; it begins with its first step.

        Args:
            model: The model.
            session: Its id; None: a new one.
            keep: Whether the session outlives a `with` block. By default one whose id you gave does, and one without
                is ended, as nobody could find it again.
        """
        return Session(self._transport, SessionCalls(self.calls, model, session or new_id()), _kept(session, keep))

    def create(
        self,
        model: str,
        session: str | None = None,
        *,
        examples: int | None = None,
        version: int | None = None,
        ttl_s: float | None = None,
    ) -> "Session":
        """Create a session.

        Args:
            model: The model.
            session: Its id; None: a new one.
            examples: N; by default the first step decides.
            version: The model version; by default the live one.
            ttl_s: Seconds without a step after which the session is forgotten.

        Raises:
            SessionExists.
        """
        made = self.session(model, session)
        fields = {"examples": examples, "version": version, "ttl_s": ttl_s}
        made.run(made.calls.create(fields, own_id=session is None))
        return made

    def stream(self, model: str) -> Stream:
        """A WebSocket for any number of the model's sessions."""
        return Stream(self._transport, self.calls, model)

    def run(self, steps: Steps[T]) -> T:
        """Carry out a call of stepcast.calls."""
        return self._transport.run(steps)

    def close(self) -> None:
        """Give connections back."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Session:
    """One session of a model, for synchronous code; made by Client.session.

    Threads may share it, their calls take turns. In a `with` block: see `Client.session` on what remains.

    Attributes:
        model: The model's name.
        id: The session's id.
    """

    def __init__(self, transport: Transport, calls: SessionCalls, keep: bool) -> None:
        self.calls = calls
        self.model, self.id = calls.model, calls.session
        self._transport, self._keep = transport, keep
        self._turn = threading.Lock()

    info = waiting(SessionCalls.info)
    step = waiting(SessionCalls.step)
    rollout = waiting(SessionCalls.rollout)
    get_state = waiting(SessionCalls.get_state)
    set_state = waiting(SessionCalls.set_state)
    get_layer = waiting(SessionCalls.get_layer)
    set_layer = waiting(SessionCalls.set_layer)
    clear = waiting(SessionCalls.clear)
    checkpoint = waiting(SessionCalls.checkpoint)
    checkpoints = waiting(SessionCalls.checkpoints)
    rewind = waiting(SessionCalls.rewind)
    end = waiting(SessionCalls.end)

    def fork(self, to: str | None = None, *, keep: bool | None = None) -> "Session":
        """A new session with the same state; `to` and `keep` as `Client.session` takes them."""
        child = SessionCalls(self.calls.calls, self.model, self.run(self.calls.fork(to)))
        return Session(self._transport, child, _kept(to, keep))

    def stream(self) -> Stream:
        """A WebSocket for this session. Step the session through it alone while it is open."""
        self.calls.forget_step()
        return Stream(self._transport, self.calls.calls, self.model, self.id)

    def run(self, steps: Steps[T]) -> T:
        """Carry out a call of stepcast.calls, when it is its turn."""
        with self._turn:
            return self._transport.run(steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._keep:
            self.run(self.calls.end_if_there())


# --- async ----------------------------------------------------------------------------------------------------------


class AsyncClient:
    """A server, for asyncio. Tasks may share it.

    Args:
        url: Base URL, http:// or https://.
        key: API key.
        timeout_s: Longest wait for one response.
        retry: How often, and after which pauses, something is asked again.
        tls: For https://; None: the system's certificates.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout_s: float = 30.0,
        retry: Retry | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.calls = Calls(retry or Retry())
        self._transport = AsyncTransport(Target(url, key, tls), timeout_s)

    wait_ready = awaiting(Calls.wait_ready)
    models = awaiting(Calls.models)
    manifest = awaiting(Calls.manifest)
    predict = awaiting(Calls.predict)
    step_many = awaiting(Calls.step_many)
    sessions = awaiting(Calls.sessions)

    def session(self, model: str, session: str | None = None, *, keep: bool | None = None) -> "AsyncSession":
        """A session by its id, as `Client.session`."""
        return AsyncSession(self._transport, SessionCalls(self.calls, model, session or new_id()), _kept(session, keep))

    async def create(
        self,
        model: str,
        session: str | None = None,
        *,
        examples: int | None = None,
        version: int | None = None,
        ttl_s: float | None = None,
    ) -> "AsyncSession":
        """Create a session, as `Client.create`.

        Raises:
            SessionExists.
        """
        made = self.session(model, session)
        fields = {"examples": examples, "version": version, "ttl_s": ttl_s}
        await made.run(made.calls.create(fields, own_id=session is None))
        return made

    def stream(self, model: str) -> AsyncStream:
        """A WebSocket for any number of the model's sessions."""
        return AsyncStream(self._transport.target, self.calls, self.run, model)

    async def run(self, steps: Steps[T]) -> T:
        """Carry out a call of stepcast.calls."""
        return await self._transport.run(steps)

    async def close(self) -> None:
        """Give connections back."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncSession:
    """One session of a model, for asyncio; made by AsyncClient.session.

    Tasks may share it, their calls take turns. In an `async with` block: see `Client.session` on what remains.

    Attributes:
        model: The model's name.
        id: The session's id.
    """

    def __init__(self, transport: AsyncTransport, calls: SessionCalls, keep: bool) -> None:
        self.calls = calls
        self.model, self.id = calls.model, calls.session
        self._transport, self._keep = transport, keep
        self._turn = asyncio.Lock()

    info = awaiting(SessionCalls.info)
    step = awaiting(SessionCalls.step)
    rollout = awaiting(SessionCalls.rollout)
    get_state = awaiting(SessionCalls.get_state)
    set_state = awaiting(SessionCalls.set_state)
    get_layer = awaiting(SessionCalls.get_layer)
    set_layer = awaiting(SessionCalls.set_layer)
    clear = awaiting(SessionCalls.clear)
    checkpoint = awaiting(SessionCalls.checkpoint)
    checkpoints = awaiting(SessionCalls.checkpoints)
    rewind = awaiting(SessionCalls.rewind)
    end = awaiting(SessionCalls.end)

    async def fork(self, to: str | None = None, *, keep: bool | None = None) -> "AsyncSession":
        """A new session with the same state; `to` and `keep` as `Client.session` takes them."""
        child = SessionCalls(self.calls.calls, self.model, await self.run(self.calls.fork(to)))
        return AsyncSession(self._transport, child, _kept(to, keep))

    def stream(self) -> AsyncStream:
        """A WebSocket for this session. Step the session through it alone while it is open."""
        self.calls.forget_step()
        return AsyncStream(self._transport.target, self.calls.calls, self._transport.run, self.model, self.id)

    async def run(self, steps: Steps[T]) -> T:
        """Carry out a call of stepcast.calls, when it is its turn."""
        async with self._turn:
            return await self._transport.run(steps)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._keep:
            await self.run(self.calls.end_if_there())


def _kept(session: str | None, keep: bool | None) -> bool:
    return session is not None if keep is None else keep
