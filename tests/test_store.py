"""One contract for all stores: compare-and-set, expiry, side records, listing."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
from blocks import Block, replaced
from redis_servers import GIVEN, VERSIONS

from service.records.record import new_record
from service.store import Store, Write
from service.store.memory import MemoryStore
from service.store.sqlite import SqliteStore
from service.store.urls import StoreOptions, open_store
from stepcast.errors import ConfigError, StoreUnavailable

pytestmark = [pytest.mark.anyio, pytest.mark.service]

_names = (f"t{n}-{Random().getrandbits(32):08x}" for n in count())
_URLS = (
    *("memory", "sqlite", "behind", *GIVEN),
    *(f"{kind}-{v}" for v in VERSIONS for kind in ("redis", "sentinel", "cluster")),
)


def record(step: int = 0, state: bytes = b"state") -> bytes:
    """A new session's bytes; no two are equal."""
    return new_record(1, b"fprint01", step=step, state=state).encode()


def token(data: bytes) -> bytes:
    return data[8:24]


async def until(probe: Callable[[], Awaitable[Any]], wanted: Any, timeout_s: float = 20.0) -> None:
    """Return as soon as the probe gives what is wanted."""
    deadline = time.monotonic() + timeout_s
    while (got := await probe()) != wanted:
        assert time.monotonic() < deadline, got
        await asyncio.sleep(0.01)


async def listed(store: Store, prefix: str) -> list[str]:
    """All pages of a list; Redis gives short ones where it has many other keys."""
    found, cursor = await store.list_keys(prefix, "", 20)
    while cursor:
        page, cursor = await store.list_keys(prefix, cursor, 20)
        found += page
    return found


def _url(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    if kind in GIVEN:
        return GIVEN[kind]
    kind, _, version = kind.partition("-")
    if not version:
        return "memory://" if kind == "memory" else f"sqlite:///{folder / 'own.db'}"
    servers = request.getfixturevalue("shared_redis").get(kind, version)
    if kind == "sentinel":
        return f"redis+sentinel://127.0.0.1:1,{servers[0].name}/pump/0"
    return "redis+cluster://" + ",".join(s.name for s in servers[:2]) if kind == "cluster" else str(servers[0].url)


@pytest.fixture(params=_URLS)
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Makes stores over the same sessions (memory: one store)."""
    kind = request.param
    url = _url(kind, request, tmp_path)
    durability = "interval" if kind == "behind" else "commit"
    options = StoreOptions(interval_s=0.02, reply_timeout_s=10.0)
    one = open_store(url, durability=durability, options=options)
    return (lambda: one) if kind == "memory" else lambda: open_store(url, durability=durability, options=options)


@pytest.fixture
async def store(opener: Callable[[], Store]) -> AsyncIterator[Store]:
    """Each kind of store, open."""
    store = opener()
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def key() -> str:
    """A session that no other test has."""
    return f"default/pump/{next(_names)}"


async def test_change_creates_only_where_nothing_is(store: Store, key: str) -> None:
    first, second = record(), record()
    assert await store.load([key]) == [None]
    assert await store.change([Write(key, None, first)]) == [True]
    assert await store.change([Write(key, None, second)]) == [False]
    assert await store.load([key]) == [first]


async def test_change_replaces_only_the_record_it_names(store: Store, key: str) -> None:
    old, new, late = record(1), record(2), record(3)
    assert await store.change([Write(key, token(old), new)]) == [False]
    assert await store.change([Write(key, None, old)]) == [True]
    assert await store.change([Write(key, token(old), new)]) == [True]
    assert await store.change([Write(key, token(old), late)]) == [False]
    assert await store.load([key]) == [new]


async def test_replace_puts_steps_only_where_the_record_is_the_old_one(store: Store, key: str) -> None:
    """More than one command of them, each judged by itself; a time to live holds."""
    keys = [f"{key}-{i}" for i in range(40)]
    old, new = [record(i) for i in range(40)], [record(100 + i) for i in range(40)]
    assert await replaced(store, Block(keys[:1], old[:1], new[:1])) == [False]  # there is none
    await store.change([Write(k, None, data) for k, data in zip(keys, old, strict=True) if k != keys[7]])
    assert await replaced(store, Block(keys, old, new, 60.0)) == [k != keys[7] for k in keys]
    assert await store.load(keys) == [n if k != keys[7] else None for k, n in zip(keys, new, strict=True)]
    assert await replaced(store, Block(keys[1:3], [old[1], new[2]], [new[2], old[2]])) == [False, True]
    assert await store.load(keys[1:3]) == [new[1], old[2]]


async def test_two_writers_make_the_same_token_and_one_of_them_is_refused(store: Store, key: str) -> None:
    """Two replicas that step one record both count its revision on: whoever comes second must not find itself there."""
    first, second = (f"{key}-{i}" for i in range(2))
    old, other = record(1), record(2)
    theirs, ours, good = record(3), record(4), record(5)
    ours = ours[:8] + token(theirs) + ours[24:]
    await store.change([Write(first, None, old), Write(second, None, other)])
    assert await replaced(store, Block([first], [old], [theirs])) == [True]
    assert await replaced(store, Block([first, second], [old, other], [ours, good])) == [False, True]
    assert await store.load([first, second]) == [theirs, good]


@pytest.mark.parametrize("count", [1, 2, 300])
async def test_block_creates_sessions_where_there_are_none(store: Store, key: str, count: int) -> None:
    """One that is there already is refused alone, and keeps its side records; a new one has none."""
    keys, new = [f"{key}-{i}" for i in range(count)], [record(i) for i in range(count)]
    there = record(1000)
    await store.change([Write(keys[0], None, there, None, {"c": b"1"})])
    assert await replaced(store, Block(keys, None, new, 60.0)) == [False] + [True] * (count - 1)
    assert await store.load(keys) == [there, *new[1:]]
    assert await store.list_sides(keys[0]) == ["c"]
    assert await store.change([Write(keys[0], token(there), None, touch_sides=True)]) == [True]
    assert await replaced(store, Block(keys[:1], None, new[:1])) == [True]
    assert await store.load(keys) == new
    assert await store.list_sides(keys[0]) == []


@pytest.mark.parametrize("count", [1, 40])
async def test_block_of_sessions_with_sides_gives_these_the_new_time_to_live(
    store: Store, key: str, count: int
) -> None:
    keys, old, new = [f"{key}-{i}" for i in range(count)], *([record(i) for i in range(count)] for _ in range(2))
    await store.change([Write(k, None, data, 0.3, {"c": b"1"}) for k, data in zip(keys, old, strict=True)])
    assert await replaced(store, Block(keys, old, new, None, touch_sides=True)) == [True] * count
    await asyncio.sleep(0.4)
    assert await store.load(keys) == new
    assert await store.load_side(keys[-1], "c") == b"1"
    assert await replaced(store, Block(keys, new, old, 0.05, touch_sides=True)) == [True] * count
    await until(lambda: store.load(keys), [None] * count)
    assert await store.list_sides(keys[-1]) == []


@pytest.mark.parametrize("ttl_s", [None, 60.0])
async def test_block_that_stays_is_replaced_whole_and_judged_row_by_row(
    store: Store, key: str, ttl_s: float | None
) -> None:
    """Many commands of them, many times; one that another writer has changed is refused alone, and others read them."""
    keys = [f"{key}-{i}" for i in range(300)]
    now = [record(i) for i in range(300)]
    await store.change([Write(k, None, data, ttl_s) for k, data in zip(keys, now, strict=True)])
    block = Block(keys, now, now, ttl_s, stays=True)
    for _ in range(3):
        now = [record(i) for i in range(300)]
        # the same incarnation and the next revision would do; any other token does as well
        block = block.following(now)
        assert await replaced(store, block) == [True] * 300
        block.old[:] = 0  # nobody may read the old ones any more
        assert await store.load(keys) == now
    others = record(1000)
    assert await store.change([Write(keys[70], token(now[70]), others, ttl_s)]) == [True]
    assert await store.change([Write(keys[71], token(now[71]), None)]) == [True]
    new = [record(i) for i in range(300)]
    assert await replaced(store, block.following(new)) == [i not in (70, 71) for i in range(300)]
    found = await store.load(keys)
    assert found[70:72] == [others, None]
    assert found[:70] + found[72:] == new[:70] + new[72:]
    assert await replaced(store, Block(keys[3:4], new[3:4], now[3:4], ttl_s)) == [True]
    assert await store.load(keys[2:5]) == [new[2], now[3], new[4]]


async def test_change_forgets_only_the_record_it_names(store: Store, key: str) -> None:
    data = record()
    await store.change([Write(key, None, data)])
    assert await store.change([Write(key, token(record()), None)]) == [False]
    assert await store.change([Write(key, None, None)]) == [False]
    assert await store.load([key]) == [data]
    assert await store.change([Write(key, token(data), None)]) == [True]
    assert await store.load([key]) == [None]
    assert await store.change([Write(key, token(data), data)]) == [False]
    assert await store.change([Write(key, None, None)]) == [True]


async def test_change_judges_each_write_of_a_call_by_itself(store: Store) -> None:
    """150 sessions, every third one refused; more than one command's worth in Redis."""
    keys = [f"default/pump/{next(_names)}" for _ in range(150)]
    old, new = [record(i) for i in range(150)], [record(i + 1) for i in range(150)]
    assert all(await store.change([Write(k, None, r) for k, r in zip(keys, old, strict=True)]))
    expect = [token(r) if i % 3 else token(record()) for i, r in enumerate(old)]
    writes = [Write(k, e, r) for k, e, r in zip(keys, expect, new, strict=True)]
    assert await store.change(writes) == [i % 3 != 0 for i in range(150)]
    loaded = await store.load([*keys, "default/pump/none"])
    assert loaded == [*(n if i % 3 else o for i, (o, n) in enumerate(zip(old, new, strict=True))), None]


async def test_change_and_load_take_nothing(store: Store) -> None:
    assert await store.change([]) == []
    assert await store.load([]) == []
    await store.ping()


async def test_record_of_any_bytes_and_a_megabyte_comes_back_as_it_was(store: Store, key: str) -> None:
    data = record(state=bytes(range(256)) * 4096)
    side = b"\x00\r\n$-1\r\n\xff"
    assert await store.change([Write(key, None, data, 60.0, {"a name": side})]) == [True]
    assert await store.load([key]) == [data]
    assert await store.load_side(key, "a name") == side


async def test_session_is_forgotten_when_its_time_is_over(store: Store, key: str) -> None:
    other = key + "-for-ever"
    await store.change([Write(key, None, record(), 0.05, {"c": b"1"}), Write(other, None, record())])
    await until(lambda: store.load([key]), [None])
    assert await store.list_sides(key) == []
    assert await store.load_side(key, "c") is None
    assert await listed(store, key) == [other]
    assert await store.change([Write(key, token(record()), record())]) == [False]
    assert await store.change([Write(key, None, record(), 60.0)]) == [True]
    assert await store.list_sides(key) == []


async def test_write_gives_the_session_and_its_sides_a_new_time_to_live(store: Store, key: str) -> None:
    first, second, third = record(1), record(2), record(3)
    await store.change([Write(key, None, first, 0.3, {"c": b"1"})])
    assert await store.change([Write(key, token(first), second, None, touch_sides=True)]) == [True]
    await asyncio.sleep(0.4)
    assert await store.load([key]) == [second]
    assert await store.load_side(key, "c") == b"1"
    assert await store.change([Write(key, token(second), third, 0.05, touch_sides=True)]) == [True]
    await until(lambda: store.load([key]), [None])
    assert await store.list_sides(key) == []


async def test_sides_are_set_with_the_record_or_not_at_all(store: Store, key: str) -> None:
    first, second = record(1), record(2)
    assert await store.load_side(key, "a") is None
    assert await store.list_sides(key) == []
    await store.change([Write(key, None, first, 60.0, {"b": b"1", "a": b"2"})])
    assert await store.change([Write(key, token(second), second, 60.0, {"a": b"no", "z": b"no"}, True)]) == [False]
    assert await store.list_sides(key) == ["a", "b"]
    assert await store.change([Write(key, token(first), second, 60.0, {"a": b"3"}, True)]) == [True]
    assert await store.load_side(key, "a") == b"3"
    assert await store.load_side(key, "b") == b"1"
    assert await store.load_side(key, "c") is None


async def test_sides_die_with_the_session(store: Store, key: str) -> None:
    first, second = record(1), record(2)
    await store.change([Write(key, None, first, None, {"a": b"1"})])
    await store.change([Write(key, token(first), None, touch_sides=True)])
    assert await store.list_sides(key) == []
    await store.change([Write(key, None, second)])
    assert await store.list_sides(key) == []


async def test_list_pages_through_every_key_of_a_prefix(store: Store, key: str) -> None:
    """Names with the characters that mean something to a pattern; neighbours that only look alike."""
    mine = {f"{key}*@:{i:03d}" for i in range(250)}
    others = [f"{key}x@:1", f"{key}", f"{key}-", "default/pump/*"]
    await store.change([Write(k, None, record(), 60.0, {"c": b"1"}) for k in [*mine, *others]])
    assert set(await listed(store, f"{key}*")) == mine


async def test_concurrent_writers_never_lose_an_update(opener: Callable[[], Store], key: str) -> None:
    """Four clients count to 40 each on one session and one on a session of its own, all through compare-and-set."""
    stores = [opener() for _ in range(1 if "Behind" in type(opener()).__name__ else 2)]
    for store in stores:
        await store.open()
    await stores[0].change([Write(key, None, new_record(1, b"fprint01").encode())])

    async def count_up(store: Store) -> None:
        done = 0
        while done < 40:
            (data,) = await store.load([key])
            assert data is not None
            step = int.from_bytes(data[24:32], "little") + 1
            (applied,) = await store.change([Write(key, token(data), record(step))])
            done += applied

    await asyncio.gather(*(count_up(store) for store in stores * (4 // len(stores))))
    (data,) = await stores[0].load([key])
    assert data is not None
    assert int.from_bytes(data[24:32], "little") == 160
    for store in stores:
        await store.close()


async def test_store_agrees_with_a_dict_whatever_the_order(store: Store, key: str) -> None:
    """400 random calls against the obvious model."""
    random, model, sides = Random(3), dict[str, bytes](), dict[str, dict[str, bytes]]()
    keys = [f"{key}-{i}" for i in range(4)]
    for _ in range(400):
        chosen = random.sample(keys, random.randint(1, 4))
        writes = [_random_write(random, k, model.get(k), bool(sides.get(k))) for k in chosen]
        expected = []
        for write in writes:
            old = model.get(write.key)
            expected.append((token(old) if old else None) == write.expect)
            if expected[-1]:
                _apply(write, model, sides)
        assert await store.change(writes) == expected
        assert await store.load(keys) == [model.get(k) for k in keys]
        assert await store.list_sides(keys[0]) == sorted(sides.get(keys[0], {}))


def _random_write(random: Random, key: str, old: bytes | None, has_sides: bool) -> Write:
    expect = random.choice([None, token(record()), *[token(old) if old else None] * 4])
    data = None if random.random() < 0.2 else record(random.randrange(1000))
    names = {random.choice("abc"): random.randbytes(5)} if random.random() < 0.3 else None
    return Write(key, expect, data, random.choice([None, 60.0]), names, has_sides)


def _apply(write: Write, model: dict[str, bytes], sides: dict[str, dict[str, bytes]]) -> None:
    if write.expect is None or write.record is None:
        model.pop(write.key, None)
        sides.pop(write.key, None)
    if write.record is not None:
        model[write.key] = write.record
        sides.setdefault(write.key, {}).update(write.sides or {})


async def test_commits_in_flight_together_all_come_true(store: Store, key: str) -> None:
    writes = [Write(f"{key}-{i}", None, record(i)) for i in range(200)]
    results = await asyncio.gather(*(store.change([write]) for write in writes))
    assert results == [[True]] * 200
    assert await store.load([write.key for write in writes]) == [write.record for write in writes]


async def test_cancelled_commit_harms_no_other(store: Store, key: str) -> None:
    tasks = [asyncio.ensure_future(store.change([Write(f"{key}-{i}", None, record(i))])) for i in range(50)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    for task in tasks[::2]:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert [await task for task in tasks[1::2]] == [[True]] * 25
    await store.ping()


async def test_close_can_be_called_twice(opener: Callable[[], Store], key: str) -> None:
    store = opener()
    await store.open()
    await store.change([Write(key, None, record())])
    await store.close()
    await store.close()


async def test_acknowledged_sessions_are_there_after_a_restart(opener: Callable[[], Store], key: str) -> None:
    first = opener()
    if first.volatile:
        return
    await first.open()
    old, new = record(1), record(2)
    await first.change([Write(key, None, old, 60.0, {"c": b"1"})])
    await first.change([Write(key, token(old), new, 60.0, touch_sides=True)])
    await first.close()
    second = opener()
    await second.open()
    assert await second.load([key]) == [new]
    assert await second.list_sides(key) == ["c"]
    await second.close()


@pytest.mark.parametrize("make", [MemoryStore, SqliteStore])
async def test_sweep_frees_expired_sessions_with_bounded_work(make: Any, tmp_path: Path) -> None:
    """1000 sessions expire; the 600 created after them sweep them out, though nobody asks for them."""
    now = 1000.0
    if make is SqliteStore:
        store = SqliteStore(tmp_path / "own.db", clock_ms=lambda: int(now * 1000))
    else:
        store = MemoryStore(clock=lambda: now)
    await store.open()
    await store.change([Write(f"old{i}", None, record(), 5.0, {"c": b"1"}) for i in range(1000)])
    now += 6
    for i in range(600):
        await store.change([Write(f"new{i}", None, record())])
    assert held(store) <= 600
    assert (await store.list_keys("old", "", 10))[0] == []
    await store.close()


def held(store: Any) -> int:
    """Sessions in memory or in the file, live or not."""
    if isinstance(store, MemoryStore):
        return len(store._records)
    with contextlib.closing(__import__("sqlite3").connect(store._path)) as connection:
        return int(connection.execute("SELECT count(*) FROM sessions").fetchone()[0])


@pytest.mark.parametrize(
    ("url", "durability", "word"),
    [
        ("postgres://x", "commit", "postgres"),
        ("memory://", "replicated", "needs Redis"),
        ("memory://", "always", "always"),
        ("sqlite://", "commit", "names no file"),
        ("sqlite:///:memory:", "commit", "names no file"),
        ("sqlite:///a.db?sync=full", "commit", "'sync'"),
        ("sqlite:///a.db?synchronous=off", "commit", "'off'"),
        ("redis://h1,h2/0", "commit", "2 hosts"),
        ("redis://h/zero", "commit", "'zero'"),
        ("redis://h:port/0", "commit", "'h:port'"),
        ("redis://h/0?retry=1", "commit", "'retry'"),
        ("redis+sentinel://h:26379", "commit", "names no service"),
        ("redis+cluster://h/3", "commit", "only one"),
        ("rediss://h/0?ssl_ca_certs=/none", "commit", "certificates"),
    ],
)
def test_open_store_refuses_what_it_does_not_know(url: str, durability: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        open_store(url, durability=durability)


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:1", "redis+cluster://127.0.0.1:1", "redis+sentinel://127.0.0.1:1/p"]
)
async def test_open_says_what_is_unreachable(url: str) -> None:
    store = open_store(url)
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1") as caught:
        await store.open()
    assert caught.value.retry_after_s is not None
    await store.close()
