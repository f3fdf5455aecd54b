"""A look with the fuzzers: the corpus, then some seconds of new cases. `make fuzz` takes minutes."""

from pathlib import Path

import pytest
from fuzz import Fuzzers, Target, corpus, judge, rounds

pytestmark = [pytest.mark.service, pytest.mark.slow]


def test_nothing_that_is_sent_breaks_the_server(tmp_path: Path) -> None:
    """No 500, no traceback, no hang, no drop without a close; little memory, and others are served meanwhile."""
    with Target(tmp_path) as target:
        fuzzers = Fuzzers(target)
        corpus(fuzzers)
        said = list(rounds(fuzzers, 6.0, 1, 40))
        fuzzers.close()
    assert len(said) >= len(fuzzers.all), said
    judge(target.seen)
