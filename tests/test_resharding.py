"""A server on a Redis Cluster: slots that move delay nobody for long, a shard that is lost fails its own steps only."""

import os
import time

import httpx
import pytest
from redis_servers import RedisServer, cluster_url, each_redis
from resharding import KIND, Load, reshard
from serving import running

from service.store.redis.topology import slot_of

pytestmark = [pytest.mark.service, pytest.mark.slow]

SECONDS = float(os.environ.get("RESHARD_S", "4"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Redis 6.2 and 7 refuse other commands while a slot moves."""
    if metafunc.function is test_no_step_fails_while_slots_move_and_one_move_is_interrupted:
        each_redis(metafunc)


def test_no_step_fails_while_slots_move_and_one_move_is_interrupted(own_cluster: list[RedisServer]) -> None:
    """Also of sessions with checkpoints, and of new ones in the slot that moves."""
    seen, wrong = reshard(own_cluster, SECONDS)
    assert not seen.failed, (str(seen), seen.failed[:3])
    assert not wrong
    assert seen.p99_s < 0.5, str(seen)


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_lost_shard_fails_its_own_sessions_only(own_cluster: list[RedisServer], how: str) -> None:
    """Others are answered, and as fast as before, also those that are new or have to be loaded."""
    for server in own_cluster:
        server.cli("CONFIG", "SET", "cluster-require-full-coverage", "no")
        server.cli("CONFIG", "SET", "cluster-node-timeout", "60000")  # nobody takes over
    lost: list[str] = []
    kept: list[str] = []
    for name in (f"l{i}" for i in range(100)):  # the first of three primaries has the first third
        (lost if slot_of(f"default/{KIND}/{name}") <= 5460 else kept).append(name)
    with running(store=cluster_url(own_cluster), store_timeout_s=1.0, hot_bytes=0) as server:
        with Load(server.url, [lost[:8], kept[:8], kept[8:16]]) as load:
            time.sleep(0.7)
        before = load.seen
        assert not before.failed, before.failed[:3]
        with (
            Load(server.url, [kept[16:24], kept[24:32]]) as others,
            Load(server.url, [lost[8:16], lost[16:24]]) as theirs,
        ):
            others.seen.waits_s.clear()
            (own_cluster[0].kill if how == "kill" else own_cluster[0].pause)()
            time.sleep(0.2)
            with httpx.Client(base_url=server.url, timeout=20) as http:
                for name in kept[32:40]:
                    assert others.step(http, name)
            time.sleep(2)
        assert not others.seen.failed, (str(others.seen), others.seen.failed[:3])
        assert theirs.seen.failed
        assert {"store_unavailable" in failed for failed in theirs.seen.failed} == {True}
        assert others.seen.p99_s < max(2 * before.p99_s, 0.1), (str(before), str(others.seen))
        own_cluster[0].start() if how == "kill" else own_cluster[0].resume()
