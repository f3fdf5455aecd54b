"""Fixtures for all tests: servers from serving.py and redis_servers.py."""

import os

import pytest
from redis_servers import (
    own_cluster,
    redis_cluster,
    redis_factory,
    redis_pair,
    redis_sentinel,
    redis_server,
    redis_version,
    redis_watched,
    shared_redis,
)
from serving import http, memory_server, spawn

__all__ = [
    "http",
    "memory_server",
    "own_cluster",
    "redis_cluster",
    "redis_factory",
    "redis_pair",
    "redis_sentinel",
    "redis_server",
    "redis_version",
    "redis_watched",
    "shared_redis",
    "spawn",
]

# Before torch and scikit-learn are imported: tests run side by side, and the arrays are tiny. Threads of OpenMP that
# wait for each other's processor spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked anyio run on asyncio."""
    return "asyncio"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The laws first, which take one worker for long, then files with slow tests: none is left alone at the end."""
    _leave_out(items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_laws.py", item.path not in slow))


LIGHT_DOORS = {"inference-": ("memory", "redis"), "grpc-": ("redis",)}
"""Doors that come to the sessions by the same way as others do: the stores on which they go through the laws."""


def _leave_out(items: list[pytest.Item]) -> None:
    """Leave out the laws of light doors on other stores than theirs."""

    def is_wanted(item: pytest.Item) -> bool:
        if item.path.name != "test_laws.py" or "[" not in item.name:
            return True
        parts = item.name.partition("[")[2]
        stores = [store for door, light in LIGHT_DOORS.items() if door in parts for store in light]
        return not stores or any(store in parts for store in stores)

    items[:] = [item for item in items if is_wanted(item)]
