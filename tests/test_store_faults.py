"""What each store does when what it rests on fails: never a wrong answer, always StoreUnavailable, never for ever."""

import asyncio
import logging
import os
import resource
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from blocks import Block, outcomes, replaced
from redis_servers import RedisFactory, RedisServer, cluster_url, each_redis

from service.records.record import new_record
from service.store import Store, Write
from service.store.memory import MemoryStore
from service.store.redis.topology import slot_of
from service.store.sqlite import SqliteStore
from service.store.urls import StoreOptions, open_store
from service.store.write_behind import BehindStore
from stepcast.errors import InvalidRequest, StoreUnavailable

pytestmark = [pytest.mark.anyio, pytest.mark.service]
pytest_generate_tests = each_redis

_names = (f"default/pump/f{n}-{Random().getrandbits(32):08x}" for n in count())
_FAST = StoreOptions(connect_timeout_s=0.5, reply_timeout_s=0.5, replica_timeout_s=0.3)


def record(step: int = 0, state: bytes = b"state") -> bytes:
    return new_record(1, b"fprint01", step=step, state=state).encode()


def token(data: bytes) -> bytes:
    return data[8:24]


async def opened(url: str, durability: str = "commit", replica_timeout_s: float = 0.3) -> Store:
    store = open_store(url, durability=durability, options=replace(_FAST, replica_timeout_s=replica_timeout_s))
    await store.open()
    return store


async def recovered(call: Callable[[], Awaitable[Any]], timeout_s: float = 20.0) -> Any:
    """What `call` returns once the store is back."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return await call()
        except StoreUnavailable:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.05)


async def until(probe: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(probe):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


# --- SQLite ---------------------------------------------------------------------------------------------------------

_WRITER = """
import asyncio, sys
from service.records.record import new_record
from service.store import Write
from service.store.sqlite import SqliteStore

async def main(path, first):
    store = SqliteStore(path)
    await store.open()
    for n in range(first, 1_000_000):
        assert await store.change([Write(f"k{n:07d}", None, new_record(1, b"fprint01").encode())]) == [True]
        print(n, flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def test_sqlite_keeps_every_acknowledged_commit_when_killed(tmp_path: Path) -> None:
    """kill -9 at any moment, five times on the same file; a commit in flight is there or not."""
    path, written = tmp_path / "own.db", set[str]()
    for kill in range(5):
        command = [sys.executable, "-c", _WRITER, str(path), str(1000 * kill)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            written |= {child.stdout.readline().strip() for _ in range(20 + 31 * kill)}
            child.kill()
            written |= set(child.stdout.read().split())
    with closing(sqlite3.connect(path)) as connection:
        kept = {str(int(key[1:])) for (key,) in connection.execute("SELECT key FROM sessions")}
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert written <= kept
    assert len(kept - written) <= 5


async def test_sqlite_file_can_be_made_by_many_at_once(tmp_path: Path) -> None:
    stores = [SqliteStore(tmp_path / "own.db") for _ in range(8)]
    await asyncio.gather(*(store.open() for store in stores))
    applied = await asyncio.gather(*(store.change([Write("k", None, record())]) for store in stores))
    assert sorted(applied) == [[False]] * 7 + [[True]]
    for store in stores:
        await store.close()


async def test_sqlite_waits_for_another_process_and_then_gives_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteStore(tmp_path / "own.db", busy_timeout_s=0.2)
    await store.open()
    data = record()
    other = sqlite3.connect(tmp_path / "own.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked") as caught:
        await store.change([Write("k", None, data)])
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert caught.value.retry_after_s == 0.1
    assert str(tmp_path) not in str(caught.value)  # where the file is, is the operator's business: the log says it
    assert f"{tmp_path / 'own.db'}: database is locked" in caplog.messages
    waiting = [asyncio.ensure_future(store.change([Write(f"k{i}", None, data)])) for i in range(20)]
    await asyncio.sleep(0.05)
    assert await store.load(["k"]) == [None]  # readers wait for nobody
    other.execute("ROLLBACK")
    other.close()
    assert await asyncio.gather(*waiting) == [[True]] * 20
    await store.close()


async def test_sqlite_refuses_when_the_disk_is_full_and_goes_on_when_it_is_not(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "own.db")
    await store.open()
    small = record()
    assert await store.change([Write("k", None, small)]) == [True]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(StoreUnavailable, match=r"full|disk I/O") as caught:
            await store.change([Write("big", None, record(state=bytes(400_000)))])
        assert await store.load(["k"]) == [small]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.retry_after_s is not None
    assert await store.change([Write("k", token(small), record(1))]) == [True]
    await store.close()


async def test_sqlite_says_that_a_file_is_read_only(tmp_path: Path) -> None:
    """A write version that no SQLite knows makes a file read-only, for root as well."""
    store = SqliteStore(tmp_path / "own.db")
    await store.open()
    await store.close()
    _patch(tmp_path / "own.db", 18, b"\x03")
    with pytest.raises(StoreUnavailable, match="readonly"):
        await store.open()


async def test_sqlite_says_that_a_file_is_damaged_or_another_programs(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        await SqliteStore(tmp_path / "text.db").open()
    with pytest.raises(StoreUnavailable, match=r"none/own\.db: unable to open"):
        await SqliteStore(tmp_path / "none" / "own.db").open()
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE cats (name)")
    other.close()
    with pytest.raises(StoreUnavailable, match="another program"):
        await SqliteStore(tmp_path / "other.db").open()


async def test_sqlite_says_that_a_file_is_damaged_in_use(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "own.db")
    await store.open()
    await store.change([Write(f"k{i}", None, record(state=bytes(3000))) for i in range(100)])
    await store.close()
    _patch(tmp_path / "own.db", 4096, os.urandom(40_000))
    await store.open()
    with pytest.raises(StoreUnavailable, match="malformed"):
        await store.load([f"k{i}" for i in range(100)])
    await store.close()


async def test_sqlite_refuses_the_file_of_a_newer_server(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "own.db")
    await store.open()
    await store.close()
    with sqlite3.connect(tmp_path / "own.db") as other:
        other.execute("PRAGMA user_version = 2")
    other.close()
    with pytest.raises(StoreUnavailable, match="schema 2, this server knows up to 1"):
        await store.open()


async def test_sqlite_refuses_after_close(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "own.db")
    await store.open()
    await store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.load(["k"])
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.change([Write("k", None, record())])


def _patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


# --- Redis ----------------------------------------------------------------------------------------------------------


async def test_redis_down_is_said_within_the_time_and_over_without_a_restart(redis_factory: RedisFactory) -> None:
    server = redis_factory()
    store, key, data = await opened(server.url), next(_names), record()
    assert await store.change([Write(key, None, data)]) == [True]
    server.kill()
    for call in (store.ping(), store.load([key]), store.change([Write(key, token(data), record())])):
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=server.name) as caught:
            await call
        assert caught.value.retry_after_s is not None
        assert time.monotonic() - started < 1.0
    server.start()
    assert await store.load([key]) == [data]
    assert await store.change([Write(key, token(data), record())]) == [True]
    await store.close()


async def test_redis_restarted_empty_makes_absent_records_and_refused_writes(redis_factory: RedisFactory) -> None:
    """The script cache is gone as well as the sessions."""
    server = redis_factory()
    store, key, data = await opened(server.url), next(_names), record()
    await store.change([Write(key, None, data)])
    server.kill()
    server.lose_files()
    server.start()
    assert await recovered(lambda: store.change([Write(key, token(data), record())])) == [False]
    assert await store.load([key]) == [None]
    assert await store.change([Write(key, None, data)]) == [True]
    await store.close()


async def test_redis_that_forgot_the_script_gets_it_again(redis_factory: RedisFactory) -> None:
    server = redis_factory()
    store = await opened(server.url)
    writes = [Write(next(_names), None, record()) for _ in range(40)]
    await store.change([Write(next(_names), None, record())])
    assert server.cli("SCRIPT", "FLUSH") == "OK"
    assert await store.change(writes) == [True] * 40
    first, second, third = writes[0].record, record(7), record(8)
    for old, new in ((first, second), (second, third)):
        assert await replaced(store, Block([writes[0].key], [old], [new])) == [True]
        assert await store.load([writes[0].key]) == [new]
        assert server.cli("SCRIPT", "FLUSH") == "OK"
    block = Block([writes[0].key], [third], [third], stays=True)
    assert await replaced(store, block.following([second])) == [True]
    assert await store.load([writes[0].key]) == [second]
    many = [record(i) for i in range(300)]
    keys = [next(_names) for _ in many]
    assert server.cli("SCRIPT", "FLUSH") == "OK"
    assert await replaced(store, Block(keys, None, many)) == [True] * 300
    assert await store.load(keys) == many
    await store.close()


async def test_redis_full_refuses_and_keeps_what_it_has(redis_factory: RedisFactory) -> None:
    server = redis_factory("maxmemory 3mb", "maxmemory-policy noeviction")
    store, key, data = await opened(server.url), next(_names), record()
    await store.change([Write(key, None, data)])
    big = [Write(next(_names), None, record(state=bytes(100_000))) for _ in range(100)]
    with pytest.raises(StoreUnavailable, match="OOM") as caught:
        await store.change(big)
    assert caught.value.retry_after_s == 5.0
    assert await store.load([key]) == [data]
    assert server.cli("CONFIG", "SET", "maxmemory", "100kb") == "OK"
    with pytest.raises(StoreUnavailable, match="OOM"):
        await store.ping()
    assert await store.change([Write(key, token(data), None)]) == [True]  # forgetting helps
    assert server.cli("CONFIG", "SET", "maxmemory", "0") == "OK"
    assert await store.change([Write(key, None, data)]) == [True]
    await store.close()


async def test_redis_replica_is_refused_as_read_only(redis_pair: tuple[RedisServer, RedisServer]) -> None:
    with pytest.raises(StoreUnavailable, match="READONLY"):
        await opened(redis_pair[1].url)


async def test_redis_that_becomes_a_replica_refuses_writes_until_it_is_primary_again(
    redis_pair: tuple[RedisServer, RedisServer],
) -> None:
    primary, replica = redis_pair
    store, key, data = await opened(primary.url), next(_names), record()
    await store.change([Write(key, None, data)])
    assert replica.cli("REPLICAOF", "NO", "ONE") == "OK"
    assert primary.cli("REPLICAOF", "127.0.0.1", str(replica.port)) == "OK"
    with pytest.raises(StoreUnavailable, match="READONLY"):
        await store.change([Write(key, token(data), record())])
    assert primary.cli("REPLICAOF", "NO", "ONE") == "OK"
    assert await recovered(lambda: store.change([Write(key, token(data), record())])) == [True]
    await store.close()


async def test_redis_slow_is_said_within_the_time_and_does_not_mix_up_replies(redis_factory: RedisFactory) -> None:
    """What was sent before the pause may be applied after it; replies that come late reach nobody."""
    server = redis_factory()
    store = await opened(server.url)
    keys, datas = [next(_names) for _ in range(5)], [record(i) for i in range(5)]
    await store.change([Write(k, None, d) for k, d in zip(keys, datas, strict=True)])
    server.pause()
    started = time.monotonic()
    late = record(9)
    calls = [*(store.load([k]) for k in keys[1:]), store.change([Write(keys[0], token(datas[0]), late)])]
    ended = asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, StoreUnavailable) for outcome in await ended)
    assert time.monotonic() - started < 2.0
    server.resume()
    loaded = await recovered(lambda: store.load(keys))
    assert loaded[1:] == datas[1:]
    assert loaded[0] in (datas[0], late)
    await store.close()


async def test_redis_that_still_loads_its_file_is_unavailable(redis_factory: RedisFactory) -> None:
    server = redis_factory()
    store = open_store(server.url, options=StoreOptions(connect_timeout_s=10.0, reply_timeout_s=10.0))
    await store.change([Write(next(_names), None, record()) for _ in range(3000)])
    server.stop()
    with server.config.open("a") as config:
        config.write("key-load-delay 1000\n")  # it answers after every 1000 commands
    server.start(wait=False)
    await until(lambda: "LOADING" in server.cli("GET", "x"))
    with pytest.raises(StoreUnavailable, match="LOADING"):
        await store.ping()
    await recovered(store.ping)
    await store.close()


async def test_redis_wrong_password_is_said_without_the_password(redis_factory: RedisFactory) -> None:
    server = redis_factory("requirepass right")
    with pytest.raises(StoreUnavailable, match="WRONGPASS") as caught:
        await opened(f"redis://:wr0ng@{server.name}/0")
    assert "wr0ng" not in str(caught.value)
    with pytest.raises(StoreUnavailable, match="NOAUTH"):
        await opened(server.url)
    store = await opened(f"redis://default:right@{server.name}/3")
    assert await store.change([Write("k", None, record())]) == [True]
    assert server.cli("-a", "right", "-n", "3", "EXISTS", "stepcast:{k}").startswith("1")
    await store.close()


async def test_redis_port_of_another_program_is_unavailable() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        with pytest.raises(StoreUnavailable, match="not a reply of Redis"):
            await opened(f"redis://127.0.0.1:{port}")


async def test_rediss_talks_tls_and_checks_the_certificate(redis_server: RedisServer) -> None:
    """A TLS port in front of a Redis server, with a certificate that was made for this test alone."""
    certificate = Path(__file__).parent / "data" / "localhost.pem"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind = await asyncio.open_connection("127.0.0.1", redis_server.port)
        await asyncio.gather(forward(reader, behind[1]), forward(behind[0], writer))

    async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context) as front:
        url = f"rediss://127.0.0.1:{front.sockets[0].getsockname()[1]}/0"
        store, data = await opened(f"{url}?ssl_ca_certs={certificate}"), record(state=bytes(200_000))
        key = next(_names)
        assert await store.change([Write(key, None, data)]) == [True]
        assert await store.load([key]) == [data]
        await store.close()
        with pytest.raises(StoreUnavailable, match="certificate verify failed"):
            await opened(url)


async def test_redis_that_accepts_but_never_answers_is_unavailable_in_time() -> None:
    """And nothing is left behind: the server sees the connection end."""
    ended = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        ended.set()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as other:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"no connection within 0\.5 s"):
            await opened(f"redis://127.0.0.1:{other.sockets[0].getsockname()[1]}")
        assert time.monotonic() - started < 1.0
        await asyncio.wait_for(ended.wait(), 5)


async def test_redis_connection_closed_while_idle_costs_nothing(redis_factory: RedisFactory) -> None:
    server = redis_factory()
    store = await opened(server.url)
    server.cli("CLIENT", "KILL", "TYPE", "normal")
    await asyncio.sleep(0.05)
    assert await store.change([Write(next(_names), None, record())]) == [True]
    await store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.ping()


async def test_redis_calls_in_flight_share_one_connection(redis_factory: RedisFactory) -> None:
    server = redis_factory()
    store = await opened(server.url)
    await asyncio.gather(*(store.change([Write(next(_names), None, record())]) for _ in range(100)))
    assert server.cli("CLIENT", "LIST").count("name=stepcast") == 1
    await store.close()


async def test_redis_settings_that_lose_sessions_are_warned_of(
    redis_factory: RedisFactory, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = redis_factory(), redis_factory("maxmemory-policy allkeys-lru", "appendonly no")
    with caplog.at_level(logging.WARNING):
        await (await opened(good.url)).close()
        assert caplog.messages == []
        await (await opened(bad.url)).close()
    assert "'allkeys-lru'" in caplog.messages[0]
    assert "appendonly" in caplog.messages[1]


async def test_replicated_acknowledges_only_what_a_replica_has(redis_pair: tuple[RedisServer, RedisServer]) -> None:
    """Also not by reading back what was refused; and what was acknowledged outlives the primary."""
    primary, replica = redis_pair
    store, key, first, second = await opened(primary.url, "replicated"), next(_names), record(1), record(2)
    assert await store.change([Write(key, None, first)]) == [True]
    replica.pause()
    with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
        await store.change([Write(key, token(first), second)])
    with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
        await store.load([key])
    replica.resume()
    (kept,) = await recovered(lambda: store.load([key]))
    assert kept == second
    third = record(3)
    assert await store.change([Write(key, token(second), third)]) == [True]
    await store.close()
    primary.kill()
    replica.cli("REPLICAOF", "NO", "ONE")
    heir = await opened(replica.url)
    assert await heir.load([key]) == [third]
    await heir.close()


async def test_replicated_commits_in_flight_do_not_wait_in_one_line(
    redis_pair: tuple[RedisServer, RedisServer],
) -> None:
    store = await opened(redis_pair[0].url, "replicated")
    results = await asyncio.gather(*(store.change([Write(next(_names), None, record())]) for _ in range(100)))
    assert results == [[True]] * 100
    await store.close()


async def test_sentinel_failover_is_followed(
    redis_pair: tuple[RedisServer, RedisServer], redis_sentinel: RedisServer
) -> None:
    primary, replica = redis_pair
    url = f"redis+sentinel://127.0.0.1:1,{redis_sentinel.name}/pump/0"
    store, key, first = await opened(url, "replicated", 5.0), next(_names), record(1)
    assert await store.change([Write(key, None, first)]) == [True]
    primary.kill()
    commit_store = open_store(url, options=_FAST)
    assert await recovered(lambda: commit_store.load([key])) == [first]
    assert await recovered(lambda: commit_store.change([Write(key, token(first), record(2))])) == [True]
    assert replica.cli("EXISTS", f"stepcast:{{{key}}}") == "1"
    await store.close()
    await commit_store.close()


async def test_sentinel_that_does_not_know_the_service_is_said(redis_sentinel: RedisServer) -> None:
    with pytest.raises(StoreUnavailable, match="no sentinel knows a primary 'fan'"):
        await opened(f"redis+sentinel://{redis_sentinel.name}/fan")


async def test_cluster_failover_is_followed(own_cluster: list[RedisServer]) -> None:
    """A third of the sessions is away for a moment; no acknowledged one is lost at level `replicated`."""
    urls = cluster_url(own_cluster)
    store = await recovered(lambda: opened(urls, "replicated"))  # the replicas have just joined
    datas = {next(_names): record(i) for i in range(60)}
    for key, data in datas.items():
        assert await store.change([Write(key, None, data)]) == [True]
    await store.close()
    plain = await opened(urls)
    assert await plain.load(list(datas)) == list(datas.values())
    own_cluster[0].kill()
    assert await recovered(lambda: plain.load(list(datas))) == list(datas.values())
    newer = {key: record(100) for key in datas}
    writes = [Write(key, token(datas[key]), newer[key]) for key in datas]
    assert await recovered(lambda: plain.change(writes)) == [True] * 60
    found, cursor = await plain.list_keys("", "", 1000)
    while cursor:
        page, cursor = await plain.list_keys("", cursor, 1000)
        found += page
    assert set(found) == set(datas)
    await plain.close()


async def test_cluster_slot_that_moves_is_followed(own_cluster: list[RedisServer]) -> None:
    """ASK and TRYAGAIN while it moves, MOVED when it has."""
    store, key, data = await opened(f"redis+cluster://{own_cluster[0].name}"), next(_names), record()
    assert await store.change([Write(key, None, data, None, {"c": b"1"})]) == [True]
    slot = str(slot_of(key))
    ids = {server: server.cli("CLUSTER", "MYID") for server in own_cluster[:3]}
    source = next(s for s in own_cluster[:3] if s.cli("CLUSTER", "COUNTKEYSINSLOT", slot) == "2")
    target = next(s for s in own_cluster[:3] if s is not source)
    target.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    source.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    second = record(2)
    assert await store.change([Write(key, token(data), second, None, touch_sides=True)]) == [True]
    migrate = ("MIGRATE", "127.0.0.1", str(target.port))
    source.cli(*migrate, f"stepcast:{{{key}}}", "0", "1000")
    half = asyncio.ensure_future(store.change([Write(key, token(second), record(3), None, touch_sides=True)]))
    await asyncio.sleep(0.02)
    source.cli(*migrate, f"stepcast:{{{key}}}:c", "0", "1000")
    assert await half == [True]
    assert await store.load_side(key, "c") == b"1"
    for server in own_cluster[:3]:
        server.cli("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
    (current,) = await store.load([key])
    assert current is not None
    assert await store.change([Write(key, token(current), None, touch_sides=True)]) == [True]
    await store.close()


class Count:
    """Sessions that count, each by blocks; what became of every step is known or asked for, as a server does it."""

    def __init__(self, store: Store, keys: list[str]) -> None:
        self.store, self.keys = store, keys
        self.now = [record(0) for _ in keys]
        self.unknown = 0

    async def create(self) -> None:
        """All at 0."""
        assert await replaced(self.store, Block(self.keys, None, self.now)) == [True] * len(self.keys)

    async def step(self) -> None:
        """One more for all; a row whose outcome is unknown is read, and stepped again where it was not applied."""
        todo = list(range(len(self.keys)))
        after = [record(int.from_bytes(data[24:32], "little") + 1) for data in self.now]
        while todo:
            block = Block(*([each[i] for i in todo] for each in (self.keys, self.now, after)))
            told = await outcomes(self.store, block)
            lost = [i for i, one in zip(todo, told, strict=True) if isinstance(one, BaseException)]
            assert all(isinstance(one, StoreUnavailable) or one is True for one in told), told
            self.unknown += len(lost)
            found = await recovered(lambda lost=lost: self.store.load([self.keys[i] for i in lost]))
            todo = [i for i, data in zip(lost, found, strict=True) if data != after[i]]
            assert all(data in (self.now[i], after[i]) for i, data in zip(lost, found, strict=True))
        self.now = after


async def test_cluster_block_is_told_by_shard_when_one_hangs(own_cluster: list[RedisServer]) -> None:
    """Sessions of the others are told at once, those of the one that hangs within its time; then all goes on."""
    store, keys = await opened(cluster_url(own_cluster)), [next(_names) for _ in range(300)]
    count = Count(store, keys)
    await count.create()
    own_cluster[0].pause()
    told: list[tuple[float, int, Any]] = []
    everyone, started = asyncio.Event(), time.monotonic()

    def hear(rows: Sequence[int], outcome: Any) -> None:
        told.append((time.monotonic() - started, len(rows), outcome))
        if sum(rows for _, rows, _ in told) == 300:
            everyone.set()

    after = [record(1) for _ in keys]
    store.replace(Block(keys, count.now, after), hear)  # type: ignore[arg-type]
    await asyncio.wait_for(everyone.wait(), 10)
    own_cluster[0].resume()
    good = [(at, rows) for at, rows, outcome in told if isinstance(outcome, list) and all(outcome)]
    late = [(at, rows) for at, rows, outcome in told if isinstance(outcome, StoreUnavailable)]
    assert sum(rows for _, rows in good) + sum(rows for _, rows in late) == 300
    assert sum(rows for _, rows in late) in range(50, 150)
    assert max(at for at, _ in good) < 0.4 < min(at for at, _ in late)
    found = await recovered(lambda: store.load(keys))
    assert all(data in pair for data, pair in zip(found, zip(count.now, after, strict=True), strict=True))
    count.now = found
    for _ in range(3):
        await count.step()
    assert await store.load(keys) == count.now
    await store.close()


async def test_cluster_blocks_lose_and_double_nothing_while_slots_move(own_cluster: list[RedisServer]) -> None:
    """MOVED and ASK for plain blocks: all sessions go on counting, and no outcome is unknown to anybody."""
    store, keys = await opened(cluster_url(own_cluster)), [next(_names) for _ in range(60)]
    count = Count(store, keys)
    await count.create()
    ids = {server: server.cli("CLUSTER", "MYID") for server in own_cluster[:3]}
    for key in keys[:6]:
        slot = str(slot_of(key))
        source = next(s for s in own_cluster[:3] if s.cli("CLUSTER", "COUNTKEYSINSLOT", slot) == "1")
        target = next(s for s in own_cluster[:3] if s is not source)
        target.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        source.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        await count.step()  # the record is still there
        assert source.cli("MIGRATE", "127.0.0.1", str(target.port), f"stepcast:{{{key}}}", "0", "1000") == "OK"
        await count.step()  # ASK
        for server in (target, source, *own_cluster[:3]):
            server.cli("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        await count.step()  # MOVED
    assert count.unknown == 0
    assert await store.load(keys) == count.now
    assert {int.from_bytes(data[24:32], "little") for data in count.now} == {18}
    await store.close()


async def test_replicated_blocks_are_told_when_a_replica_has_them(redis_pair: tuple[RedisServer, RedisServer]) -> None:
    """Where it does not, every row is unknown, until the replica is back."""
    store, keys = await opened(redis_pair[0].url, "replicated"), [next(_names) for _ in range(150)]
    count = Count(store, keys)
    await count.create()
    await count.step()
    redis_pair[1].pause()
    after = [record(9) for _ in keys]
    told = await outcomes(store, Block(keys, count.now, after))
    assert {str(one) for one in told} == {f"Redis at {redis_pair[0].name}: 0 of 1 replicas have it after 0.3 s."}
    redis_pair[1].resume()
    assert await recovered(lambda: store.load(keys)) == after
    await store.close()


# --- Write-behind ---------------------------------------------------------------------------------------------------


async def test_behind_writes_only_the_newest_record_and_at_the_end(tmp_path: Path) -> None:
    base, other = SqliteStore(tmp_path / "own.db"), SqliteStore(tmp_path / "own.db")
    store = BehindStore(base, interval_s=60.0)
    await store.open()
    await other.open()
    datas = [record(i) for i in range(10)]
    assert await store.change([Write("k", None, datas[0])]) == [True]
    for old, new in pairwise(datas):
        assert await store.change([Write("k", token(old), new, 60.0)]) == [True]
    assert await store.load(["k"]) == [datas[9]]
    assert await other.load(["k"]) == [datas[0]]
    await store.close()
    assert await other.load(["k"]) == [datas[9]]
    await other.close()


async def test_behind_drops_and_counts_what_another_writer_overtook(tmp_path: Path) -> None:
    base, other = SqliteStore(tmp_path / "own.db"), SqliteStore(tmp_path / "own.db")
    store = BehindStore(base, interval_s=60.0)
    await store.open()
    await other.open()
    first, ours, theirs = record(1), record(2), record(3)
    await store.change([Write("k", None, first)])
    assert await store.change([Write("k", token(first), ours)]) == [True]
    assert await other.change([Write("k", token(first), theirs)]) == [True]
    await store.flush()
    assert store.dropped == 1
    assert await store.load(["k"]) == [theirs]
    assert await store.change([Write("k", token(ours), record())]) == [False]
    assert await store.change([Write("k", token(theirs), record())]) == [True]
    await store.close()
    await other.close()


async def test_behind_keeps_its_promise_when_the_base_is_away(redis_factory: RedisFactory) -> None:
    """Commits go on for one interval, then they are refused until what waits is stored."""
    server, now = redis_factory(), 100.0
    store = BehindStore(open_store(server.url, options=_FAST), 60.0, clock=lambda: now)
    await store.open()
    key, datas = next(_names), [record(i) for i in range(5)]
    await store.change([Write(key, None, datas[0])])
    assert await store.change([Write(key, token(datas[0]), datas[1])]) == [True]
    server.pause()
    with pytest.raises(StoreUnavailable):
        await store.flush()
    now += 59
    assert await store.change([Write(key, token(datas[1]), datas[2])]) == [True]
    now += 2
    with pytest.raises(StoreUnavailable, match=r"no (reply|connection)"):
        await store.change([Write(key, token(datas[2]), datas[3])])
    with pytest.raises(StoreUnavailable, match=r"no (reply|connection)"):
        await store.ping()
    assert await store.load([key]) == [datas[2]]
    server.resume()  # the first flush may arrive only now
    await recovered(store.flush)
    assert await store.change([Write(key, token(datas[2]), datas[3])]) == [True]
    await store.close()
    plain = await opened(server.url)
    assert await plain.load([key]) == [datas[3]]
    await plain.close()


async def test_behind_flushes_before_a_checkpoint_or_the_end_of_a_session() -> None:
    base = MemoryStore()
    store = BehindStore(base, interval_s=60.0)
    first, second, third = record(1), record(2), record(3)
    await store.change([Write("k", None, first)])
    await store.change([Write("k", token(first), second)])
    assert await store.change([Write("k", token(second), third, None, {"c": b"1"})]) == [True]
    assert await base.load(["k"]) == [third]
    await store.change([Write("k", token(third), first)])
    assert await store.change([Write("k", token(first), None)]) == [True]
    assert await base.load(["k"]) == await store.load(["k"]) == [None]
    await store.flush()
    assert await base.load(["k"]) == [None]


class _Unsteady(MemoryStore):
    """A store whose commits fail now and then, before or after they were applied, and whose loads fail too."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random

    async def load(self, keys: Sequence[str]) -> list[bytes | None]:
        await self._stumble()
        return await super().load(keys)

    async def change(self, writes: Sequence[Write]) -> list[bool]:
        await self._stumble()
        applied = await super().change(writes)
        await self._stumble()
        return applied

    async def _stumble(self) -> None:
        await asyncio.sleep(0)
        if self._random.random() < 0.2:
            raise StoreUnavailable("stumbled.", retry_after_s=0.0)


@pytest.mark.parametrize("seed", range(4))
async def test_behind_loses_no_acknowledged_step_over_an_unsteady_base(seed: int) -> None:
    """Ten sessions count, checkpoint and are flushed while the base fails a fifth of the time."""
    random = Random(seed)
    base = _Unsteady(random)
    store = BehindStore(base, interval_s=0.001)
    keys = [f"k{i}" for i in range(10)]
    for key in keys:
        await recovered(lambda key=key: _created(store, key))

    async def count_up(key: str) -> int:
        done = 0
        while done < 60:
            (data,) = await recovered(lambda: store.load([key]))
            step = int.from_bytes(data[24:32], "little")
            assert step >= done, "an acknowledged step is gone"
            sides = {"c": b"1"} if random.random() < 0.1 else None
            with suppress(StoreUnavailable):
                (applied,) = await store.change([Write(key, token(data), record(step + 1), None, sides)])
                done = max(done, step + applied)
        return done

    done = await asyncio.gather(*(count_up(key) for key in keys))
    await recovered(store.flush)
    kept = [int.from_bytes((data or b"")[24:32], "little") for data in await MemoryStore.load(base, keys)]
    assert kept == done
    assert store.dropped == 0


async def _created(store: Store, key: str) -> None:
    if await store.load([key]) == [None]:
        await store.change([Write(key, None, record(0))])


async def test_a_cursor_that_is_none_is_refused_by_redis(redis_server: RedisServer) -> None:
    """A cursor that no page gave is an error of the caller's, not of the server's."""
    store = open_store(redis_server.url)
    await store.open()
    try:
        for cursor in ("zzz", "1:", "-1:0", "é", "1:" + "9" * 30, f"0:{2**64}", "0:" + "9" * 20):
            with pytest.raises(InvalidRequest, match="was not given by this server"):
                await store.list_keys("", cursor, 10)
        await store.list_keys("", f"0:{2**64 - 1}", 10)
    finally:
        await store.close()
