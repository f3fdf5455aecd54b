"""What an idle session costs, with 6,000 of them; tests/footprint.py measures 100,000."""

from pathlib import Path

from footprint import check, measure


def test_idle_sessions_cost_their_record_and_the_server_its_hot_cache(tmp_path: Path) -> None:
    """A record is state, kept answers and 72 bytes; a server that steps 6,000 sessions keeps hot_bytes of them."""
    found = measure(tmp_path, sessions=6_000, hot_limit=2 * 2**20)
    print(f"\n{found}")
    check(found)
