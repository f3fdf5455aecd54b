"""The SDK: open a session, step it, get and set its state, stream it; sync (`Client`) and async (`AsyncClient`).

    with Client("http://127.0.0.1:8000") as client:
        session = client.session("weather", "kjfk")
        answer = session.step(readings)

Steps are numbered, so that a call is sent again after a broken connection or a full queue without being applied twice.
Errors are those of stepcast.errors. What is asked is written once, in stepcast/calls.py; the two clients only differ in
how they carry it.
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import httpx
import numpy.typing as npt

from . import codec
from .calls import BatchAnswer, Broken, Call, Calls, Pause, Reply, SessionCalls, Steps
from .codec import MSGPACK, Answer, Floats, Forecast, SessionState, State
from .stream import AsyncStream, Stream, Target

T = TypeVar("T")


# --- sync -----------------------------------------------------------------------------------------------------------


class Client:
    """A server, for synchronous code. Not to be shared by threads.

    Args:
        url: Base URL, http:// or https://.
        key: API key.
        timeout_s: Longest wait for one response.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 30.0) -> None:
        self._target = Target(url, key)
        self._http = httpx.Client(base_url=url, headers=_headers(key), timeout=timeout_s)
        self._calls = Calls()

    def models(self) -> list[dict[str, Any]]:
        """The served models."""
        return self._run(self._calls.models())

    def manifest(self, model: str, version: int | None = None) -> dict[str, Any]:
        """A version's manifest, the live one's where none is named."""
        return self._run(self._calls.manifest(model, version))

    def predict(
        self, model: str, inputs: npt.ArrayLike, mask: npt.ArrayLike | None = None, layout: str = "NWC"
    ) -> Floats:
        """The stateless full forward pass over [T,F] or [B,T,F]."""
        return self._run(self._calls.predict(model, inputs, mask, layout))

    def step_many(
        self,
        model: str,
        sessions: Sequence[str],
        inputs: npt.ArrayLike,
        seqs: Sequence[int | None] | None = None,
    ) -> BatchAnswer:
        """One step for each of K sessions, inputs [K,F]. Without `seqs` a lost answer is not asked for again."""
        return self._run(self._calls.step_many(model, sessions, inputs, seqs))

    def sessions(self, model: str, prefix: str = "") -> list[str]:
        """Ids of all sessions that start with `prefix`."""
        return self._run(self._calls.sessions(model, prefix))

    def session(self, model: str, session: str) -> "Session":
        """A session by its id; it begins with its first step or `create`."""
        return Session(self, model, session)

    def create(
        self,
        model: str,
        session: str | None = None,
        *,
        examples: int | None = None,
        version: int | None = None,
        ttl_s: float | None = None,
    ) -> "Session":
        """Create a session; without an id it gets one.

        Raises:
            SessionExists.
        """
        made = Session(self, model, session or secrets.token_urlsafe(16))
        self._run(made._calls.create(_given(examples=examples, version=version, ttl_s=ttl_s), session is None))
        return made

    def stream(self, model: str) -> Stream:
        """A WebSocket for any number of the model's sessions."""
        return Stream(self._target, model, None)

    def close(self) -> None:
        """Give connections back."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        try:
            asked = next(steps)
            while True:
                asked = steps.send(self._carry(asked))
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def _carry(self, asked: Call | Pause) -> Reply | Broken | None:
        if isinstance(asked, Pause):
            time.sleep(asked.seconds)
            return None
        try:
            response = self._http.request(asked.method, asked.path, content=_body(asked))
        except httpx.TransportError as error:
            return Broken(f"{type(error).__name__}: {error}")
        return Reply(response.status_code, response.content, response.headers)


class Session:
    """One session of a model, for synchronous code; made by Client.session."""

    def __init__(self, client: Client, model: str, session: str) -> None:
        self._client = client
        self._calls = SessionCalls(client._calls, model, session)
        self.model, self.id = model, session

    def info(self) -> dict[str, Any]:
        """Step, examples, version, size and times."""
        return self._client._run(self._calls.info())

    def step(
        self,
        inputs: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        layout: str = "NWC",
        version_policy: str | None = None,
    ) -> Answer:
        """Advance by [F], [N,F] or [N,T,F] (rnnTimeStep); applied exactly once, however often it must be sent."""
        return self._client._run(self._calls.step(inputs, mask, layout, version_policy))

    def rollout(
        self,
        steps: int,
        inputs: npt.ArrayLike | None = None,
        *,
        commit: bool = False,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Forecast:
        """Run free, feeding predictions back; `inputs` [H,F] or [N,H,F] are what is known of the future."""
        return self._client._run(self._calls.rollout(steps, inputs, commit, temperature, seed))

    def get_state(self) -> SessionState:
        """All layers' state (rnnGetPreviousState)."""
        return self._client._run(self._calls.get_state())

    def set_state(self, state: State | SessionState) -> None:
        """Set all layers' state (rnnSetPreviousState)."""
        self._client._run(self._calls.set_state(state))

    def clear(self) -> None:
        """Forget the state (rnnClearPreviousState)."""
        self._client._run(self._calls.clear())

    def fork(self, to: str | None = None) -> "Session":
        """A new session with the same state."""
        return Session(self._client, self.model, self._client._run(self._calls.fork(to)))

    def checkpoint(self, name: str | None = None) -> str:
        """Name the session as it is now; the name."""
        return self._client._run(self._calls.checkpoint(name))

    def checkpoints(self) -> dict[str, int]:
        """Step by checkpoint."""
        return self._client._run(self._calls.checkpoints())

    def rewind(self, to: str) -> None:
        """Go back to a checkpoint."""
        self._client._run(self._calls.rewind(to))

    def end(self) -> None:
        """End and forget the session."""
        self._client._run(self._calls.end())

    def stream(self) -> Stream:
        """A WebSocket for this session. Step the session through it alone while it is open."""
        return Stream(self._client._target, self.model, self.id)


# --- async ----------------------------------------------------------------------------------------------------------


class AsyncClient:
    """A server, for asyncio. Tasks may share it; the steps of one session go one at a time.

    Args:
        url: Base URL, http:// or https://.
        key: API key.
        timeout_s: Longest wait for one response.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 30.0) -> None:
        self._target = Target(url, key)
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(key), timeout=timeout_s)
        self._calls = Calls()

    async def models(self) -> list[dict[str, Any]]:
        """The served models."""
        return await self._run(self._calls.models())

    async def manifest(self, model: str, version: int | None = None) -> dict[str, Any]:
        """A version's manifest, the live one's where none is named."""
        return await self._run(self._calls.manifest(model, version))

    async def predict(
        self, model: str, inputs: npt.ArrayLike, mask: npt.ArrayLike | None = None, layout: str = "NWC"
    ) -> Floats:
        """The stateless full forward pass over [T,F] or [B,T,F]."""
        return await self._run(self._calls.predict(model, inputs, mask, layout))

    async def step_many(
        self,
        model: str,
        sessions: Sequence[str],
        inputs: npt.ArrayLike,
        seqs: Sequence[int | None] | None = None,
    ) -> BatchAnswer:
        """One step for each of K sessions, inputs [K,F]. Without `seqs` a lost answer is not asked for again."""
        return await self._run(self._calls.step_many(model, sessions, inputs, seqs))

    async def sessions(self, model: str, prefix: str = "") -> list[str]:
        """Ids of all sessions that start with `prefix`."""
        return await self._run(self._calls.sessions(model, prefix))

    def session(self, model: str, session: str) -> "AsyncSession":
        """A session by its id; it begins with its first step or `create`."""
        return AsyncSession(self, model, session)

    async def create(
        self,
        model: str,
        session: str | None = None,
        *,
        examples: int | None = None,
        version: int | None = None,
        ttl_s: float | None = None,
    ) -> "AsyncSession":
        """Create a session; without an id it gets one.

        Raises:
            SessionExists.
        """
        made = AsyncSession(self, model, session or secrets.token_urlsafe(16))
        await self._run(made._calls.create(_given(examples=examples, version=version, ttl_s=ttl_s), session is None))
        return made

    def stream(self, model: str) -> AsyncStream:
        """A WebSocket for any number of the model's sessions."""
        return AsyncStream(self._target, model, None)

    async def close(self) -> None:
        """Give connections back."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        try:
            asked = next(steps)
            while True:
                asked = steps.send(await self._carry(asked))
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def _carry(self, asked: Call | Pause) -> Reply | Broken | None:
        if isinstance(asked, Pause):
            await asyncio.sleep(asked.seconds)
            return None
        try:
            response = await self._http.request(asked.method, asked.path, content=_body(asked))
        except httpx.TransportError as error:
            return Broken(f"{type(error).__name__}: {error}")
        return Reply(response.status_code, response.content, response.headers)


class AsyncSession:
    """One session of a model, for asyncio; made by AsyncClient.session."""

    def __init__(self, client: AsyncClient, model: str, session: str) -> None:
        self._client = client
        self._calls = SessionCalls(client._calls, model, session)
        self.model, self.id = model, session

    async def info(self) -> dict[str, Any]:
        """Step, examples, version, size and times."""
        return await self._client._run(self._calls.info())

    async def step(
        self,
        inputs: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        layout: str = "NWC",
        version_policy: str | None = None,
    ) -> Answer:
        """Advance by [F], [N,F] or [N,T,F] (rnnTimeStep); applied exactly once, however often it must be sent."""
        return await self._client._run(self._calls.step(inputs, mask, layout, version_policy))

    async def rollout(
        self,
        steps: int,
        inputs: npt.ArrayLike | None = None,
        *,
        commit: bool = False,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Forecast:
        """Run free, feeding predictions back; `inputs` [H,F] or [N,H,F] are what is known of the future."""
        return await self._client._run(self._calls.rollout(steps, inputs, commit, temperature, seed))

    async def get_state(self) -> SessionState:
        """All layers' state (rnnGetPreviousState)."""
        return await self._client._run(self._calls.get_state())

    async def set_state(self, state: State | SessionState) -> None:
        """Set all layers' state (rnnSetPreviousState)."""
        await self._client._run(self._calls.set_state(state))

    async def clear(self) -> None:
        """Forget the state (rnnClearPreviousState)."""
        await self._client._run(self._calls.clear())

    async def fork(self, to: str | None = None) -> "AsyncSession":
        """A new session with the same state."""
        return AsyncSession(self._client, self.model, await self._client._run(self._calls.fork(to)))

    async def checkpoint(self, name: str | None = None) -> str:
        """Name the session as it is now; the name."""
        return await self._client._run(self._calls.checkpoint(name))

    async def checkpoints(self) -> dict[str, int]:
        """Step by checkpoint."""
        return await self._client._run(self._calls.checkpoints())

    async def rewind(self, to: str) -> None:
        """Go back to a checkpoint."""
        await self._client._run(self._calls.rewind(to))

    async def end(self) -> None:
        """End and forget the session."""
        await self._client._run(self._calls.end())

    def stream(self) -> AsyncStream:
        """A WebSocket for this session. Step the session through it alone while it is open."""
        return AsyncStream(self._client._target, self.model, self.id)


def _headers(key: str | None) -> dict[str, str]:
    headers = {"content-type": MSGPACK, "accept": MSGPACK}
    return headers if key is None else {**headers, "x-api-key": key}


def _body(call: Call) -> bytes | None:
    return None if call.fields is None else codec.pack(call.fields)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
