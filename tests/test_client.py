"""The SDK against real servers: everything it offers, and what it does when the line breaks or the server dies."""

import asyncio
import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from serving import MODELS, Process, Running, free_port, running

from stepcast import AsyncClient, Client, Retry
from stepcast.calls import Calls, Pause
from stepcast.errors import (
    CheckpointNotFound,
    ExamplesMismatch,
    Forbidden,
    InvalidRequest,
    LayerNotFound,
    ModelNotFound,
    SessionExists,
    SessionNotFound,
    ShapeMismatch,
    StepConflict,
    Unauthorized,
    Unavailable,
)
from stepcast.wire import Broken

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
        Client(f"http://127.0.0.1:{free_port()}", retry=Retry(first_pause_s=0.01)) as client,
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


# --- names ----------------------------------------------------------------------------------------------------------


def test_client_steps_by_name_as_by_position(client: Client) -> None:
    """Numbers, columns, columns of steps, records and a DataFrame: the outputs are those of the arrays, under names."""
    x = sequence(client, 6)
    want = client.session(MODEL, "named-0").step(x[None]).outputs[0]
    one = client.session(MODEL, "named-1")
    row = dict(zip("uvw", x[0].tolist(), strict=True))
    answer = one.step(row)
    assert (answer.step, answer.version) == (1, 1)
    assert answer.outputs == {"u": pytest.approx(want[0, 0], abs=1e-5), "v": pytest.approx(want[0, 1], abs=1e-5)}
    columns = {name: x[None, 1:3, i] for i, name in enumerate("wvu"[::-1])}
    np.testing.assert_allclose(one.step(columns).outputs["v"], want[None, 1:3, 1], **TOLERANCE)
    frame = pd.DataFrame(x[3:], columns=list("uvw"), index=[10, 20, 30])[["w", "u", "v"]]
    made = one.step(frame, rows="steps")
    assert made.step == 6
    pd.testing.assert_frame_equal(
        made.outputs, pd.DataFrame(want[3:], columns=["u", "v"], index=[10, 20, 30]), rtol=1e-4
    )
    many = client.session(MODEL, "named-2").step([row, row])
    assert [outputs["u"] for outputs in many.outputs] == pytest.approx([want[0, 0]] * 2, abs=1e-5)
    wide = pd.DataFrame(x, columns=list("uvw"))
    np.testing.assert_allclose(client.session(MODEL, "named-3").step(wide).outputs["u"][0], want[0, 0], **TOLERANCE)
    np.testing.assert_allclose(client.predict(MODEL, wide).to_numpy(), want, **TOLERANCE)
    batch = client.step_many(MODEL, ["named-4", "not an id"], {name: x[:2, i] for i, name in enumerate("uvw")})
    np.testing.assert_allclose(batch.outputs["v"], [want[0, 1], np.nan], **TOLERANCE)


def test_client_names_the_classes_of_a_classifier(client: Client) -> None:
    """The likeliest, and the probability of each."""
    x = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    y = client.predict("rnn_loss_classes", x)
    with client.session("rnn_loss_classes") as session:
        outputs = session.step(dict(zip("uvw", x[0].tolist(), strict=True))).outputs
    assert outputs["class"] == ["calm", "gust", "storm"][y[0].argmax()]
    assert outputs["probabilities"]["gust"] == pytest.approx(y[0, 1], abs=1e-5)
    frame = client.predict("rnn_loss_classes", pd.DataFrame(x, columns=list("uvw")))
    assert list(frame["class"]) == [["calm", "gust", "storm"][i] for i in y.argmax(-1)]
    last = client.predict("last_step", pd.DataFrame(x, columns=list("uvw")))
    assert list(last.index) == [3]


def test_client_lets_names_be_missing_where_the_model_does(client: Client) -> None:
    """What is left out is NaN; where the model needs it, or does not know it, the error says which."""
    answer = client.session("policies", "missing-1").step({"v": 1.0})
    same = client.session("policies", "missing-2").step([None, 1.0, None])
    np.testing.assert_array_equal([answer.outputs["u"], answer.outputs["v"]], same.outputs)
    session = client.session(MODEL, "missing-3")
    with pytest.raises(InvalidRequest, match="leaves out 'u', 'w'"):
        session.step({"v": 1.0})
    with pytest.raises(InvalidRequest, match="names 'uu' \\(nearest: 'u'\\)"):
        session.step({"uu": 1.0, "v": 1.0, "w": 1.0})
    with pytest.raises(ValueError, match="layout"):
        session.step({"u": [1.0], "v": [1.0], "w": [1.0]}, layout="NCW")
    with pytest.raises(SessionNotFound):
        session.info()


def test_client_rolls_out_what_is_named(client: Client) -> None:
    """What is known of the future by name; the columns are those of the array."""
    session = client.session(MODEL, "named-rollout")
    session.step(sequence(client, 1)[0])
    known = np.full((4, 3), np.nan, np.float32)
    known[:, 2] = [0.1, 0.2, 0.3, 0.4]
    want = session.rollout(4, known).outputs
    np.testing.assert_array_equal(session.rollout(4, {"w": known[:, 2]}).outputs["v"], want[..., 1])
    assert session.info()["step"] == 1


def test_client_names_inputs_as_the_sessions_version_does(tmp_path: Path) -> None:
    """A session stays on its version when another goes live; the names are its own."""
    root = tmp_path / "models"
    shutil.copytree(MODELS / MODEL, root / MODEL)
    with running(store="memory://", models=root, repository_poll_s=0.05) as server, Client(server.url) as client:
        old = client.session(MODEL, "old")
        x = sequence(client, 2)
        row = dict(zip("uvw", x[0].tolist(), strict=True))
        old.step(row)
        with next_version(root, {"u": "first", "v": "second", "w": "third"}):
            deadline = time.monotonic() + 20
            while client.manifest(MODEL).version == 1 and time.monotonic() < deadline:
                time.sleep(0.05)
        assert old.step(row).version == 1
        new = client.session(MODEL, "new")
        answer = new.step({"first": row["u"], "second": row["v"], "third": row["w"]})
        assert answer.version == 2
        assert set(answer.outputs) == {"u", "v"}
        with client.stream(MODEL) as stream:
            assert stream.step(row, session="old").step == 3
            assert stream.step({"first": 1.0, "second": 1.0, "third": 1.0}, session="new").version == 2
            with pytest.raises(InvalidRequest, match="names 'u'"):
                stream.step(row, session="other")


@contextlib.contextmanager
def next_version(root: Path, names: dict[str, str]) -> Iterator[None]:
    """Put a version 2 beside version 1 whose features have other names."""
    made = root / ".next"
    shutil.copytree(root / MODEL / "1", made)
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["version"], manifest["feedback"] = 2, []
    for feature in manifest["features"]:
        feature["name"] = names[feature["name"]]
    (made / "manifest.json").write_text(json.dumps(manifest))
    made.rename(root / MODEL / "2")
    yield


# --- the rest of a session ------------------------------------------------------------------------------------------


def test_client_gets_and_sets_one_layer(client: Client) -> None:
    """The other layers stay; an unknown layer is the server's error."""
    session = client.session("stacked", "layers")
    session.step(np.ones(3))
    before = session.get_state()
    layer = session.get_layer("gru_0")
    np.testing.assert_array_equal(layer["h"], before.state["gru_0"]["h"])
    assert session.set_layer("gru_0", {"h": np.full_like(layer["h"], 0.5)})["step"] == 1
    after = session.get_state()
    np.testing.assert_array_equal(after.state["gru_0"]["h"], np.full_like(layer["h"], 0.5))
    np.testing.assert_array_equal(after.state["lstm_0"]["c"], before.state["lstm_0"]["c"])
    with pytest.raises(LayerNotFound):
        session.get_layer("none")
    with pytest.raises(LayerNotFound):
        session.set_layer("none", {"h": [[1.0]]})


def test_a_block_ends_the_session_that_has_no_name(client: Client) -> None:
    """A session whose id the caller gave stays, another is ended; `keep` decides otherwise; ending twice is well."""
    x = sequence(client, 1)[0]
    with client.session(MODEL) as nameless, client.session(MODEL, "block-kept") as kept:
        nameless.step(x)
        kept.step(x)
        child, named = nameless.fork(), nameless.fork("block-child")
    with pytest.raises(SessionNotFound):
        nameless.info()
    assert kept.info()["step"] == named.info()["step"] == child.info()["step"] == 1
    with kept.fork() as child:
        pass
    with pytest.raises(SessionNotFound):
        child.info()
    with client.session(MODEL, "block-gone", keep=False) as gone, client.session(MODEL, keep=True) as stays:
        stays.step(x)
        gone.step(x)
        gone.end()
    assert stays.info()["step"] == 1
    with client.session(MODEL):
        pass


def test_a_session_goes_on_after_its_stream(client: Client) -> None:
    """It asks how far the stream has brought it."""
    x = sequence(client, 3)
    session = client.session(MODEL, "after-stream")
    session.step(x[0])
    with session.stream() as stream:
        stream.step(x[1])
    assert session.step(x[2]).step == 3


def test_threads_share_a_client_and_a_session(memory_server: Running, client: Client) -> None:
    """Eight threads, a session each and one for all: every step once, every answer its own."""
    x = sequence(client, 30)
    want = client.predict(MODEL, x)
    shared = client.session(MODEL, "threads-shared")
    taken: list[int] = []

    def play(number: int) -> None:
        session = client.session(MODEL, f"threads-{number}")
        for t, row in enumerate(x):
            np.testing.assert_allclose(session.step(row).outputs, want[t], **TOLERANCE)
            taken.append(shared.step(row).step)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(play, range(8)))
    assert sorted(taken) == list(range(1, 8 * 30 + 1))
    assert shared.info()["step"] == 8 * 30


def test_tasks_share_a_session(memory_server: Running, client: Client) -> None:
    """Their steps take turns."""
    x = sequence(client, 1)[0]

    async def play() -> list[int]:
        async with AsyncClient(memory_server.url) as there, there.session(MODEL) as session:
            return [answer.step for answer in await asyncio.gather(*[session.step(x) for _ in range(20)])]

    assert sorted(asyncio.run(play())) == list(range(1, 21))


# --- patience -------------------------------------------------------------------------------------------------------


def test_wait_ready_waits_for_the_server(spawn: Callable[..., Process]) -> None:
    """A client may be there first."""
    port = free_port()
    with Client(f"http://127.0.0.1:{port}") as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait_ready, 30)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        spawn("memory://", port=port)
        waiting.result(30)
        assert client.models()
    with (
        Client(f"http://127.0.0.1:{free_port()}") as client,
        pytest.raises(Unavailable, match=r"not ready within 0\.3 s"),
    ):
        client.wait_ready(0.3)


def test_retry_doubles_its_pauses_up_to_the_longest() -> None:
    """What the server asks for comes in place of the first; a random part is added."""
    exact = Retry(first_pause_s=0.1, longest_pause_s=0.5, jitter=0)
    assert [exact.pause_s(attempt) for attempt in (1, 2, 3, 4)] == pytest.approx([0.1, 0.2, 0.4, 0.5])
    assert exact.pause_s(2, asked_s=0.2) == pytest.approx(0.4)
    pauses = [Retry(first_pause_s=0.1, jitter=0.5).pause_s(1) for _ in range(1000)]
    assert 0.1 <= min(pauses) < 0.105 < 0.145 < max(pauses) <= 0.15
    for wrong in ({"attempts": 0}, {"jitter": -1.0}, {"deadline_s": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            Retry(**wrong)


def test_retry_ends_with_its_attempts_or_its_deadline() -> None:
    """On a clock of the test's: no call goes on beyond the deadline, and none is sent with a longer timeout."""
    now = 0.0

    def play(policy: Retry, timeouts: list[float | None]) -> None:
        nonlocal now
        steps = Calls(policy, lambda: now).models()
        asked = next(steps)
        while True:
            if isinstance(asked, Pause):
                now += asked.seconds
                asked = steps.send(None)
            else:
                timeouts.append(asked.timeout_s)
                asked = steps.send(Broken("gone"))

    def ask(policy: Retry) -> tuple[int, list[float | None]]:
        timeouts: list[float | None] = []
        with pytest.raises(Unavailable, match="gone"):
            play(policy, timeouts)
        return len(timeouts), timeouts

    assert ask(Retry(attempts=3)) == (3, [None] * 3)
    started = now
    sent, timeouts = ask(Retry(attempts=100, first_pause_s=1, longest_pause_s=1, jitter=0, deadline_s=4.5))
    assert sent == 5
    assert timeouts == pytest.approx([4.5, 3.5, 2.5, 1.5, 0.5])
    assert now - started == pytest.approx(4)


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


def test_stream_refuses_steps_behind_a_refused_one(memory_server: Running, client: Client) -> None:
    """They were meant for another state; the next call goes on where the session is."""
    x = sequence(client, 3)

    async def play() -> None:
        async with AsyncClient(memory_server.url) as there, there.session(MODEL, "refused").stream() as stream:
            await stream.step(x[0])
            bad, behind = stream.send([1.0]), stream.send(x[1])
            with pytest.raises(ShapeMismatch):
                await bad
            with pytest.raises(StepConflict):
                await behind
            assert (await stream.step(x[1])).step == 2

    asyncio.run(play())


def test_stream_takes_names(client: Client) -> None:
    """Records, columns and the rows of a DataFrame, between arrays and in their order; a wrong name is that step's."""
    x = sequence(client, 40)
    want = client.predict(MODEL, x)
    records = [dict(zip("uvw", row.tolist(), strict=True)) for row in x]
    with client.session(MODEL, "stream-named").stream() as stream:
        futures = [stream.send(records[0]), stream.send(x[1]), stream.send(records[2])]
        assert [future.result().step for future in futures] == [1, 2, 3]
        assert futures[2].result().outputs["u"] == pytest.approx(want[2, 0], abs=1e-5)
        got = [answer.outputs["v"] for answer in stream.map(records[3:20])]
        got += [answer.outputs["v"] for answer in stream.map(pd.DataFrame(x[20:], columns=list("uvw")))]
        np.testing.assert_allclose(got, want[3:, 1], **TOLERANCE)
        with pytest.raises(InvalidRequest, match="nearest: 'u'"):
            stream.step({"uu": 1.0})
        assert stream.step(records[0]).step == 41
        assert stream.call("info")["step"] == 41


def test_stream_sends_what_was_given_though_the_buffer_is_filled_anew(client: Client) -> None:
    """A caller may use one array, or one dict, for all readings."""
    x = sequence(client, 60)
    want = client.predict(MODEL, x)
    buffer, row = np.empty(3, np.float32), dict.fromkeys("uvw", 0.0)
    with client.session(MODEL).stream() as stream:
        futures = []
        for values in x[:30]:
            buffer[:] = values
            futures.append(stream.send(buffer))
        named = []
        for values in x[30:]:
            row.update(zip("uvw", values.tolist(), strict=True))
            named.append(stream.send(row))
        np.testing.assert_allclose([future.result().outputs for future in futures], want[:30], **TOLERANCE)
        np.testing.assert_allclose([future.result().outputs["v"] for future in named], want[30:, 1], **TOLERANCE)


def test_stream_with_names_of_an_unknown_model_fails(client: Client) -> None:
    """By the error of the look-up, for what was held behind it too; leaving the block does not hang."""
    with client.stream("nothing") as stream:
        waiting = [stream.send({"u": 1.0}, session="s") for _ in range(3)]
        for future in waiting:
            with pytest.raises(ModelNotFound):
                future.result(20)


def test_stream_shows_progress_on_request(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    """A function hears of each answer; True draws a bar on stderr; by default nothing is said."""
    x = sequence(client, 5)
    told: list[tuple[int, int | None]] = []
    with client.session(MODEL).stream() as stream:
        assert len(list(stream.map(x, progress=lambda answered, total: told.append((answered, total))))) == 5
        assert told == [(answered, 5) for answered in range(1, 6)]
        assert [answer.step for answer in stream.map(iter(list(x)))] == [6, 7, 8, 9, 10]
        assert capsys.readouterr() == ("", "")
        assert len(list(stream.map((row for row in x), progress=True))) == 5
    assert "5/" in capsys.readouterr().err


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
