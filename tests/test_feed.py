"""Steps that come from a source, in the sessions of this process: positions, steps given again, mixed batches."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import ask
from serving import MODELS

from service.engine.repository import Repository
from service.records.block import Block, Letter, Outbox
from service.records.layout import POSITION
from service.records.record import Source, decode
from service.sessions.core import Address, Answers
from service.sessions.feed import Feed
from service.sessions.turns import Sessions
from service.settings import Settings
from service.store import Done
from service.store.memory import MemoryStore
from service.telemetry import Metrics
from stepcast.errors import ShapeMismatch, SourceConflict

pytestmark = [pytest.mark.anyio, pytest.mark.service]

KIND, NAME = "lstm", b"pumps..."
X = np.random.default_rng(3).normal(size=(8, 30, 3)).astype(np.float32)


class Fed(Feed):
    """A step of a source, which notes what became of it in a future."""

    def __init__(self, first: int, second: int = 0, name: bytes = NAME, outbox: Outbox | None = None) -> None:
        super().__init__(POSITION.pack(name, first, second), outbox)
        self.future: asyncio.Future[tuple[str, Any, int]] = asyncio.get_running_loop().create_future()

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        self.future.set_result(("stepped", answers.outputs[row].copy(), step))

    def redelivered(self, answers: Answers | None, step: int) -> None:
        self.future.set_result(("again", None if answers is None else answers.outputs[0].copy(), step))

    def refused(self, error: BaseException) -> None:
        self.future.set_exception(error)

    def letter(self, answers: Answers, row: int, step: int) -> Letter:
        return Letter(b"in", b"1-1", (b"step", b"%d" % step))


class Telling(MemoryStore):
    """A store that notes the letters of blocks."""

    tells = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Outbox | None, list[bytes]]] = []
        self.sizes: list[tuple[int, bool]] = []

    def replace(self, block: Block, done: Done) -> None:
        self.told.append((block.outbox, [letter.fields[1] for letter in block.letters]))
        self.sizes.append((len(block), bool(block.advance.after.flags & 2)))
        super().replace(block, done)


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    """Sessions of one model, on a store that notes letters."""
    (tmp_path / KIND).symlink_to(MODELS / KIND)
    repository = Repository(tmp_path, device="cpu", threads=1)
    repository.scan()
    return Sessions(repository, Telling(), Settings(models=tmp_path), Metrics())


def at(name: str) -> Address:
    return Address("n", KIND, name)


def feed(sessions: Sessions, name: str, x: Any, fed: Fed, seq: int | None = None) -> "asyncio.Future[Any]":
    """As the door does it: feed first, if it is a single step."""
    x = np.ascontiguousarray(x, np.float32)
    if x.shape[1] > 1 or not sessions.feed(at(name).key, x.tobytes(), seq, fed):
        sessions.step(at(name), x, None, seq, fed)
    return fed.future


async def source_of(sessions: Sessions, name: str) -> Source | None:
    (data,) = await sessions.store.load([at(name).key])
    assert data is not None
    return decode(data).source


async def test_steps_of_a_source_and_others_share_a_batch(sessions: Sessions) -> None:
    """Eight sessions step together, every second one fed: only these get a position, all the right outputs."""
    for t in range(4):
        work = [
            feed(sessions, f"s{i}", X[i : i + 1, t : t + 1], Fed(100 + t, i))
            if i % 2
            else ask(sessions, at(f"s{i}"), X[i : i + 1, t : t + 1])
            for i in range(8)
        ]
        got = await asyncio.gather(*work)
        assert [found[2] if i % 2 else found.step for i, found in enumerate(got)] == [t + 1] * 8
        mixed = [found[1] if i % 2 else found.outputs for i, found in enumerate(got)]
        alone = [await ask(sessions, at(f"alone-{i}"), X[i : i + 1, t : t + 1]) for i in range(8)]
        for one, other in zip(mixed, alone, strict=True):
            np.testing.assert_allclose(one, other.outputs, rtol=1e-5, atol=1e-6)
    for i in range(8):
        assert await source_of(sessions, f"s{i}") == (Source(NAME, 103, i, 4) if i % 2 else None)
    store: Any = sessions.store
    assert (4, True) in store.sizes  # the fed ones were committed side by side,
    assert (4, False) in store.sizes  # and so were the others


async def test_a_position_is_taken_once(sessions: Sessions) -> None:
    """The last one is answered as it was, with its step, after steps of others too; those before it have no answer."""
    first = await feed(sessions, "s", X[:1, :1], Fed(5, 1))
    await feed(sessions, "s", X[:1, 1:2], Fed(5, 2))
    last = await feed(sessions, "s", X[:1, 2:3], Fed(7, 0))
    assert (first[0], last[0], last[2]) == ("stepped", "stepped", 3)
    await ask(sessions, at("s"), X[:1, 3:4])
    kind, outputs, step = await feed(sessions, "s", X[:1, 2:3], Fed(7, 0))
    assert (kind, step) == ("again", 3)
    np.testing.assert_array_equal(outputs, last[1])
    for position in ((5, 1), (5, 2), (6, 9)):
        assert await feed(sessions, "s", X[:1, :1], Fed(*position)) == ("again", None, 0)
    for t in range(16):
        await ask(sessions, at("s"), X[:1, t : t + 1])
    assert await feed(sessions, "s", X[:1, 2:3], Fed(7, 0)) == ("again", None, 3)  # not kept any more
    assert await source_of(sessions, "s") == Source(NAME, 7, 0, 3)
    assert (await feed(sessions, "s", X[:1, 20:21], Fed(7, 1)))[2] == 21


async def test_a_session_has_one_source(sessions: Sessions) -> None:
    """Another one's step is refused, and one that is no good leaves the position as it was."""
    await feed(sessions, "s", X[:1, :1], Fed(5))
    with pytest.raises(
        SourceConflict, match=r"session 's' is fed from another source\. End it, or feed a fork of it\."
    ):
        await feed(sessions, "s", X[:1, :1], Fed(9, name=b"other..."))
    with pytest.raises(ShapeMismatch):
        await feed(sessions, "s", X[:1, :1, :2], Fed(9))
    assert await source_of(sessions, "s") == Source(NAME, 5, 0, 1)


async def test_calls_of_many_steps_have_positions_and_letters_too(sessions: Sessions) -> None:
    """One letter for each row, in the block that holds its record; none for steps without an outbox."""
    store: Any = sessions.store
    outbox = Outbox(b"out", b"group", 0, False)
    await feed(sessions, "s", X[:1, :5], Fed(1, outbox=outbox))
    await feed(sessions, "s", X[:1, 5:6], Fed(2, outbox=outbox))
    work = [feed(sessions, f"t{i}", X[i : i + 1, :1], Fed(3, outbox=outbox)) for i in range(3)]
    await asyncio.gather(*work)
    await ask(sessions, at("s"), X[:1, 6:7])
    assert store.told == [(outbox, [b"5"]), (outbox, [b"6"]), (outbox, [b"1"] * 3), (None, [])]
    assert await source_of(sessions, "s") == Source(NAME, 2, 0, 6)
