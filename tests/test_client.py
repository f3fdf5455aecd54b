"""The SDK against real servers: everything it offers, and what it does when the line breaks or the server dies."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Process, Running, free_port, running

from stepcast import AsyncClient, Client
from stepcast.errors import (
    CheckpointNotFound,
    ExamplesMismatch,
    Forbidden,
    ModelNotFound,
    SessionExists,
    SessionNotFound,
    ShapeMismatch,
    StepConflict,
    Unauthorized,
    Unavailable,
)

pytestmark = pytest.mark.service

MODEL = "lstm"
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def client(memory_server: Running) -> Iterator[Client]:
    """A client of the shared server."""
    with Client(memory_server.url) as made:
        yield made


def sequence(client: Client, steps: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random inputs (T, F) for the model."""
    features = client.manifest(MODEL).n_features
    return np.random.default_rng(seed).standard_normal((steps, features)).astype(np.float32)


# --- a proxy that breaks --------------------------------------------------------------------------------------------


class Proxy:
    """A TCP proxy that cuts each connection when its rule says so.

    Args:
        cut: Takes the number of frames (or, before an upgrade, chunks) that the server has sent on a connection.
    """

    def __init__(self, port: int, cut: Callable[[int], bool]) -> None:
        self._port, self._cut = port, cut
        self.cuts = 0
        self._tasks: set[Any] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._connect, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Stop."""
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)
        await asyncio.sleep(0)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(task := asyncio.current_task())
        ends = [writer]
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            ends.append(back)
            up = asyncio.create_task(self._copy(reader, back))
            try:
                await self._answers(there, writer)
            finally:
                up.cancel()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one end is gone, or the test is over
        finally:
            for end in ends:
                end.transport.abort()
            self._tasks.discard(task)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.read(65536)
        if not head.startswith(b"HTTP/1.1 101"):
            await self._plain(head, reader, writer)
            return
        writer.write(head)
        frames = 0
        while True:
            start = await reader.readexactly(2)
            more = {126: 2, 127: 8}.get(start[1], 0)
            length = await reader.readexactly(more)
            payload = await reader.readexactly(int.from_bytes(length, "big") if more else start[1])
            frames += start[0] & 0x0F < 8
            if self._cut(frames):
                self.cuts += 1
                writer.write(start + length + payload[: len(payload) // 2])
                await writer.drain()
                return
            writer.write(start + length + payload)

    async def _plain(self, data: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chunks = 0
        while data:
            chunks += 1
            if self._cut(chunks):
                self.cuts += 1
                return
            writer.write(data)
            data = await reader.read(65536)


@contextlib.contextmanager
def proxy(url: str, cut: Callable[[int], bool]) -> Iterator[Proxy]:
    """A proxy before a server."""
    made = Proxy(int(url.rpartition(":")[2]), cut)
    try:
        yield made
    finally:
        made.close()


# --- HTTP -----------------------------------------------------------------------------------------------------------


def test_client_steps_as_predict_says(client: Client) -> None:
    """One by one, several at once, several examples: the outputs of the full forward pass, of the inputs' rank."""
    x = sequence(client, 9)
    want = client.predict(MODEL, x)
    session = client.session(MODEL, "client-steps")
    for t in range(5):
        answer = session.step(x[t])
        assert answer.step == t + 1
        assert answer.outputs.dtype == np.float32
        np.testing.assert_allclose(answer.outputs, want[t], **TOLERANCE)
    rest = session.step(x[None, 5:])
    assert rest.step == 9
    np.testing.assert_allclose(rest.outputs[0], want[5:], **TOLERANCE)
    pair = client.session(MODEL, "client-pair")
    np.testing.assert_allclose(pair.step(np.stack([x[0], x[0]])).outputs, [want[0], want[0]], **TOLERANCE)
    with pytest.raises(ExamplesMismatch):
        pair.step(x[0])


def test_client_continues_the_numbers_of_a_session_that_it_did_not_begin(client: Client) -> None:
    """A second client asks first; one that was overtaken is told so, and goes on with the next call."""
    x = sequence(client, 4)
    mine, other = client.session(MODEL, "client-shared"), client.session(MODEL, "client-shared")
    assert mine.step(x[0]).step == 1
    assert other.step(x[1]).step == 2
    with pytest.raises(StepConflict, match="seq 2 with another payload"):
        mine.step(x[2])
    assert mine.step(x[2]).step == 3


def test_client_gets_and_sets_the_state_bit_for_bit(client: Client) -> None:
    """What get gave, put into the same and into another session, gives the same next answer."""
    x = sequence(client, 3)
    session = client.session(MODEL, "client-state")
    session.step(x[0])
    state = session.get_state()
    assert state.step == 1
    assert {layer: sorted(keys) for layer, keys in state.state.items()} == {"lstm_0": ["c", "h"]}
    after = session.step(x[1]).outputs
    session.set_state(state)
    assert session.step(x[1]).step == 2
    np.testing.assert_array_equal(session.get_state().state["lstm_0"]["h"].shape, state.state["lstm_0"]["h"].shape)
    other = client.session(MODEL, "client-state-2")
    other.set_state(state.state)
    np.testing.assert_array_equal(other.get_state().state["lstm_0"]["c"], state.state["lstm_0"]["c"])
    answer = other.step(x[1])
    assert answer.step == 1
    np.testing.assert_array_equal(answer.outputs, after)


def test_client_forks_checkpoints_rewinds_clears_and_ends(client: Client) -> None:
    """The whole life of a session."""
    x = sequence(client, 5)
    session = client.create(MODEL, "client-life", examples=1)
    with pytest.raises(SessionExists):
        client.create(MODEL, "client-life")
    session.step(x[0])
    assert session.checkpoint("one") == "one"
    child = session.fork()
    second = session.step(x[1]).outputs
    np.testing.assert_array_equal(child.step(x[1]).outputs, second)
    assert session.checkpoint() == "step-2"
    assert session.checkpoints() == {"one": 1, "step-2": 2}
    session.rewind("one")
    again = session.step(x[1])
    assert again.step == 2
    np.testing.assert_array_equal(again.outputs, second)
    with pytest.raises(CheckpointNotFound):
        session.rewind("none")
    session.clear()
    np.testing.assert_allclose(session.step(x[0]).outputs, client.predict(MODEL, x[:1])[0], **TOLERANCE)
    assert client.sessions(MODEL, "client-life") == ["client-life"]
    session.end()
    with pytest.raises(SessionNotFound):
        session.info()
    with pytest.raises(SessionNotFound):
        session.end()
    assert session.step(x[0]).step == 1


def test_client_steps_many_sessions_at_once(client: Client) -> None:
    """Per-item results; None is a missing reading only where the model knows such."""
    x = sequence(client, 3)
    want = client.predict(MODEL, x[None, :1].repeat(3, 0).reshape(3, 1, -1))[:, 0]
    names = ["client-many-0", "not an id", "client-many-2"]
    made = client.step_many(MODEL, names, x[:1].repeat(3, 0))
    assert made.steps == [1, None, 1]
    assert made.errors[1].code == "invalid_session_id"
    np.testing.assert_allclose(made.outputs[[0, 2]], want[[0, 2]], **TOLERANCE)
    assert np.isnan(made.outputs[1]).all()


def test_client_raises_the_servers_errors(client: Client) -> None:
    """By class, with their facts."""
    with pytest.raises(ShapeMismatch) as caught:
        client.session(MODEL, "client-errors").step([1.0])
    assert caught.value.facts["got"] == [1, 1]
    with pytest.raises(ModelNotFound):
        client.session("nothing", "s").step([1.0])
    with pytest.raises(ValueError, match="rank"):
        client.session(MODEL, "client-errors").step(1.0)


def test_client_whose_answer_was_lost_steps_once(memory_server: Running, client: Client) -> None:
    """The proxy drops every second response after the server has given it."""
    responses = iter(range(1000))
    x = sequence(client, 12)
    with proxy(memory_server.url, lambda _: next(responses) % 2 == 0) as broken, Client(broken.url) as shaky:
        session = shaky.session(MODEL, "client-lost")
        answers = [session.step(row) for row in x]
        assert broken.cuts >= 12
        child = session.fork()
        session.end()
    assert [answer.step for answer in answers] == list(range(1, 13))
    np.testing.assert_allclose([answer.outputs for answer in answers], client.predict(MODEL, x), **TOLERANCE)
    assert client.session(MODEL, child.id).info()["step"] == 12


def test_client_without_a_server_says_so() -> None:
    """After its tries; nothing hangs."""
    with (
        Client(f"http://127.0.0.1:{free_port()}") as client,
        pytest.raises(Unavailable, match="ConnectionRefusedError"),
    ):
        client.models()


def test_client_uses_its_key() -> None:
    """HTTP and WebSocket; a role that is too small is an error of the call."""
    with running(store="memory://", api_keys="read:a:reader-key,step:a:stepper-key") as server:
        with Client(server.url, key="wrong-key") as client:
            with pytest.raises(Unauthorized):
                client.models()
            with client.stream(MODEL) as stream, pytest.raises(Unauthorized):
                stream.step([0.0], session="s")
        with Client(server.url, key="stepper-key") as client, client.session(MODEL, "s").stream() as stream:
            assert stream.step(sequence(client, 1)[0]).step == 1
        with Client(server.url, key="reader-key") as client:
            assert client.session(MODEL, "s").info()["step"] == 1
            with client.session(MODEL, "s").stream() as stream:
                assert stream.call("info")["step"] == 1
                with pytest.raises(Forbidden):
                    stream.step(sequence(client, 1)[0])


# --- streams --------------------------------------------------------------------------------------------------------


def test_stream_gives_every_answer_in_order(client: Client) -> None:
    """Four hundred steps, many in flight."""
    x = sequence(client, 400)
    with client.session(MODEL, "stream-plain").stream() as stream:
        answers = list(stream.map(x))
        assert stream.call("info")["step"] == 400
    assert [answer.step for answer in answers] == list(range(1, 401))
    np.testing.assert_allclose([answer.outputs for answer in answers], client.predict(MODEL, x), **TOLERANCE)


def test_stream_through_a_proxy_that_cuts_every_50_frames_gets_every_answer_once(
    memory_server: Running, client: Client
) -> None:
    """In the middle of a frame; the client resends from its last answer."""
    x = sequence(client, 500)
    with proxy(memory_server.url, lambda frames: frames >= 50) as broken, Client(broken.url) as shaky:
        with shaky.session(MODEL, "stream-cut").stream() as stream:
            answers = list(stream.map(x))
        assert broken.cuts >= 10
    assert [answer.step for answer in answers] == list(range(1, 501))
    np.testing.assert_allclose([answer.outputs for answer in answers], client.predict(MODEL, x), **TOLERANCE)
    assert client.session(MODEL, "stream-cut").info()["step"] == 500


def test_stream_survives_kill_9_of_the_server(spawn: Callable[..., Process], tmp_path: Path) -> None:
    """Killed twice in mid-stream; a new process on the same file goes on, every answer once, in order."""
    store, port = f"sqlite:///{tmp_path}/sessions.db", free_port()
    server = spawn(store, "--port", str(port))
    with Client(server.url) as client:
        x = sequence(client, 240)
        answers = []
        with client.session(MODEL, "stream-killed").stream() as stream:
            for answer in stream.map(x):
                answers.append(answer)
                if len(answers) in (60, 150):
                    server.kill()
                    server = spawn(store, "--port", str(port))
        assert [answer.step for answer in answers] == list(range(1, 241))
        np.testing.assert_allclose([answer.outputs for answer in answers], client.predict(MODEL, x), **TOLERANCE)
        assert client.session(MODEL, "stream-killed").info()["step"] == 240


def test_stream_survives_a_drain(spawn: Callable[..., Process], tmp_path: Path) -> None:
    """SIGTERM in mid-stream: the server says come back, the client comes back to the next one."""
    store, port = f"sqlite:///{tmp_path}/sessions.db", free_port()
    server = spawn(store, "--port", str(port))
    with Client(server.url) as client:
        x = sequence(client, 120)
        answers = []
        with client.session(MODEL, "stream-drained").stream() as stream:
            for answer in stream.map(x):
                answers.append(answer)
                if len(answers) == 50:
                    assert server.terminate() in (0, -signal.SIGTERM)
                    server = spawn(store, "--port", str(port))
        assert [answer.step for answer in answers] == list(range(1, 121))
        np.testing.assert_allclose([answer.outputs for answer in answers], client.predict(MODEL, x), **TOLERANCE)


def test_stream_refuses_steps_behind_a_refused_one(client: Client) -> None:
    """They were meant for another state; the next call goes on where the session is."""
    x = sequence(client, 3)
    with client.session(MODEL, "stream-refused").stream() as stream:
        stream.step(x[0])
        bad, behind = stream.send([1.0]), stream.send(x[1])
        with pytest.raises(ShapeMismatch):
            bad.result()
        with pytest.raises(StepConflict):
            behind.result()
        assert stream.step(x[1]).step == 2


def test_stream_of_an_unknown_model_fails_at_once(client: Client) -> None:
    """With the server's error, and it stays so."""
    with client.stream("nothing") as stream:
        for _ in range(2):
            with pytest.raises(ModelNotFound):
                stream.step([0.0], session="s")


def test_async_client_streams_many_sessions_on_one_socket(memory_server: Running, client: Client) -> None:
    """Thirty sessions, twenty steps each, all in flight; HTTP beside it."""
    x = sequence(client, 20)
    want = client.predict(MODEL, x)

    async def play() -> None:
        async with AsyncClient(memory_server.url) as there, there.stream(MODEL) as stream:
            names = [f"stream-many-{i}" for i in range(30)]
            futures = {name: [stream.send(row, session=name) for row in x] for name in names}
            for name, answers in futures.items():
                got = [await answer for answer in answers]
                assert [answer.step for answer in got] == list(range(1, 21)), name
                np.testing.assert_allclose([answer.outputs for answer in got], want, **TOLERANCE)
            session = there.session(MODEL, names[0])
            assert (await session.info())["step"] == 20
            assert (await session.step(x[0])).step == 21
            child = await session.fork()
            state = await child.get_state()
            assert state.step == 21

    asyncio.run(play())
