"""The comparison of layer kinds: as many weights for each, every kind trained, exported and stepped."""

import pytest
from networks import OUT, echo_source

from benchmarks.layer_kinds import KINDS, Row, measure, table
from training.config import Config

LSTM = {"kind": "lstm", "units": 12}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_as_many_weights_as_the_lstm(kind: str) -> None:
    """Within a tenth at this size, and every number of its row is one."""
    config = Config.model_validate(
        {
            "name": "echo",
            "data": {"kind": "python", "class": "nowhere:Nothing"},
            "network": [LSTM, {"kind": "dropout", "p": 0.1}, LSTM, OUT],
            "training": {"epochs": 1},
        }
    )
    row = measure(config, echo_source(), kind, 2000)
    assert row.kind == kind
    assert row.weights == pytest.approx(2000, rel=0.1)
    assert row.scores["rmse"] > 0
    assert row.update_ms > 0
    assert row.step_us > 0


def test_table_has_a_line_for_every_kind() -> None:
    """As it stands in the documentation."""
    rows = [Row("lstm", 64, 53573, {"1 h": 0.875}, 18.12, 47.2), Row("gru", 74, 53655, {"1 h": 0.8633}, 26.1, 64.6)]
    assert table(rows).splitlines() == [
        "| kind | units | weights | 1 h | update [ms] | step [µs] |",
        "|---|---|---|---|---|---|",
        "| `lstm` | 64 | 53,573 | 0.875 | 18.1 | 47 |",
        "| `gru` | 74 | 53,655 | 0.863 | 26.1 | 65 |",
    ]
