"""Networks of other libraries beside a model: by name, on the same rows, without a look at what comes."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import CELLS
from test_horizons import opened, recipe

from stepcast.errors import ConfigError
from training import peers
from training.__main__ import main
from training.peers import PEERS, chosen

assert CELLS  # importing it sets torch to one thread

each = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                find_spec(name) is None, reason=f"NOT COMPARED with {name}: the extra 'peers' is not installed"
            ),
        )
        for name in PEERS
    ],
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that are not ours


@pytest.fixture(autouse=True)
def _one_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to know which rows a network is given."""
    monkeypatch.setattr(peers, "EPOCHS", 1)


def test_peers_are_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is unknown or not installed is named before anything is trained."""
    assert chosen("") == ()
    with pytest.raises(ConfigError, match="--peers: 'prophet' is none of darts, gluonts"):
        chosen("prophet")
    for name in PEERS:
        if find_spec(name) is None:
            with pytest.raises(ConfigError, match=f"--peers: '{name}' is not installed. pip install"):
                chosen(name)
        else:
            assert chosen(f" {name},{name},") == (name,)
    assert main(["backtest", str(recipe(tmp_path)), "--origins", "1", "--peers", "prophet"]) == 2
    assert "'prophet' is none of" in capsys.readouterr().err


@each
def test_peer_forecasts_each_origin_from_what_came_before_it(name: str, tmp_path: Path) -> None:
    """Other rows from step 151 on change no forecast made up to 150, but those after; all have the right size."""
    path = recipe(tmp_path, (1, 3))
    before, truth = PEERS[name][1](opened(path), (1, 3)), opened(path).x[..., :2]
    lines = (tmp_path / "heat.csv").read_text().splitlines()
    lines[152:] = [line.rsplit(",", 3)[0] + ",5.5,5,5" for line in lines[152:]]
    (tmp_path / "heat.csv").write_text("\n".join(lines))
    after = PEERS[name][1](opened(path), (1, 3))
    early, late = np.arange(144, 151), np.arange(151, 190)
    first, second = before.forecasts(early), after.forecasts(early)
    seen = before.forecasts(late)
    for ahead, forecast in first.items():
        assert forecast.shape == (1, 7, 2)
        np.testing.assert_allclose(forecast, second[ahead], rtol=1e-4)
        error = seen[ahead] - truth[:, late + ahead]
        assert (np.sqrt(np.square(error).mean(axis=(0, 1))) < 3 * truth.std(axis=(0, 1))).all()
    changed = after.forecasts(late)
    assert all(np.abs(seen[ahead] - changed[ahead]).max() > 0.1 for ahead in (1, 3))


@each
def test_backtest_has_a_row_of_the_peer(name: str, tmp_path: Path) -> None:
    """On the same rows as the model, with its own errors."""
    path, scores = recipe(tmp_path, (1, 3)), tmp_path / "scores.json"
    options = ["--origins", "1", "--without", "trees", "--peers", name, "--json", str(scores)]
    assert main(["backtest", str(path), "--out", str(tmp_path / "m"), *options]) == 0
    for horizon in json.loads(scores.read_text())["horizons"].values():
        names = list(horizon["forecasters"])
        assert names[-1] == PEERS[name][0]
        rows = [horizon["forecasters"][n]["heat"]["rmse"] for n in (names[-1], "model", "linear", "persistence")]
        assert len(set(rows)) == 4
        assert 0 < rows[0] < 100


def test_rows_of_peers_are_kept_beside_the_same_forecasts_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file with a row that this run does not train: kept with its day, dropped beside another model, or unasked."""
    path, scores, page = recipe(tmp_path, (1, 3)), tmp_path / "scores.json", tmp_path / "page.md"
    page.write_text("<!-- backtest -->\n<!-- end of backtest -->\n")
    files = ["--json", str(scores), "--page", str(page)]
    options = ["--origins", "1", "--without", "trees", "--out", str(tmp_path / "m"), *files]

    def run(*more: str) -> dict[str, Any]:
        assert main(["backtest", str(path), *options, *more]) == 0
        told: dict[str, Any] = json.loads(scores.read_text())
        return told

    plain = run()
    assert plain["peers"] == {}
    row = {ahead: {**at["forecasters"]["linear"], "mark": ahead} for ahead, at in plain["horizons"].items()}
    made = {"with": "darts 0.48.1", "on": "2026-01-02"}
    for ahead, at in plain["horizons"].items():
        at["forecasters"]["darts_lstm"] = row[ahead]
    given = json.dumps({**plain, "peers": {"darts_lstm": made}})

    scores.write_text(given)
    kept = run("--keep-peers")
    assert kept == json.loads(given)
    assert "| darts lstm | " in page.read_text()
    assert "darts lstm: trained with darts 0.48.1 on 2026-01-02." in page.read_text()

    assert run()["peers"] == {}
    assert "darts" not in page.read_text() + scores.read_text()

    scores.write_text(given)
    capsys.readouterr()
    other = run("--keep-peers", "--set", "seed=5")
    assert other["peers"] == {}
    assert "darts_lstm" not in other["horizons"]["1"]["forecasters"]
    assert "darts_lstm: was measured beside other forecasts, and is left out." in capsys.readouterr().out
