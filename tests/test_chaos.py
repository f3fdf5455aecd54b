"""The short form of the chaos test; `make chaos` runs the long one (tests/chaos.py)."""

import asyncio
from pathlib import Path

import pytest
import stream_chaos
from chaos import Count, redis_run, sqlite_run

pytestmark = pytest.mark.service


def check(count: Count) -> None:
    """Every law held, and there was something to hold against."""
    print(count)
    assert (count.lost, count.doubled, count.different) == (0, 0, 0)
    assert count.steps > 100
    assert count.retries
    assert count.dropped
    assert count.repeated
    assert count.ahead
    assert count.refused


def test_nothing_is_lost_or_doubled_when_servers_and_the_primary_are_killed(tmp_path: Path) -> None:
    """Three servers on Redis at level `replicated`: one is killed while the primary is replaced by its replica."""
    count = asyncio.run(redis_run(tmp_path, seed=3, sessions=30, seconds=0, most=400))
    check(count)
    assert (count.kills, count.failovers) == (1, 1)
    assert count.unavailable
    assert count.conflicts


def test_nothing_is_lost_or_doubled_when_the_only_server_is_killed(tmp_path: Path) -> None:
    """One server on SQLite, killed."""
    count = asyncio.run(sqlite_run(tmp_path, seed=4, sessions=30, seconds=0, most=400))
    check(count)
    assert count.kills == 1


def test_no_entry_of_a_stream_is_lost_or_stepped_twice(tmp_path: Path) -> None:
    """Three consumers: killed, put to sleep, their Redis killed, entries given again."""
    count = stream_chaos.run(tmp_path, entries=8000, sessions=80, seed=5, rate=2500, pause_s=0.3)
    print(count)
    assert count.wrong == 0
    assert count.told_twice == 0
    assert count.bad
    assert count.kills >= 2
    assert count.naps
    assert count.restarts
    assert count.given_again
