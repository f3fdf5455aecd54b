"""What an idle session costs, with 6,000 of them; tests/footprint.py measures 100,000."""

from pathlib import Path

import pytest
from footprint import check, measure
from redis_servers import VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_idle_sessions_cost_their_record_and_the_server_its_hot_cache(tmp_path: Path, version: str) -> None:
    """A record is state, kept answers and 72 bytes; a server that steps 6,000 sessions keeps hot_bytes of them."""
    found = measure(tmp_path, sessions=6_000, hot_limit=2 * 2**20, version=version)
    print(f"\n{found}")
    check(found)
