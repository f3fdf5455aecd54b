"""Rolling-origin backtests: a recipe's model and its baselines on the same moments, of one split or of many.

With origins the time from the recipe's first test row on is cut into as many equal stretches. Before each of them the
model and the baselines are fitted anew to what lies before it (or once, to what lies before the first): training rows,
then as many validation rows as the recipe has. So every forecast is of a moment that its forecaster has not seen.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from stepcast.errors import ConfigError
from stepcast.manifest import Distribution, Output
from stepcast.predictive import Predictive

from .baselines import Baselines, Fitted
from .calibration import calibrate
from .comparison import Comparison, Floats, joined, rounded
from .config import Config
from .data.table import TableSource
from .export import stage, state_tensors
from .job import fit_anew
from .peers import PEERS, Peer, made_with
from .skill import Measurement
from .stepper import Stepper

Window = Literal["expanding", "sliding"]
FITTED: tuple[Fitted, ...] = ("linear", "trees")
Forecaster = Callable[[TableSource], tuple[Stepper, Predictive | None]]


@dataclass(frozen=True)
class Backtest:
    """What came out.

    Attributes:
        recipe: Name of the model.
        every: The table's step.
        targets: Names of what is forecast.
        origins: First and last moment of the test rows of each origin, as text.
        comparisons: One for each distance, of all origins together.
        block: Steps of a block of the bootstrap.
        peers: Rows of other libraries' networks: which version they were trained with, and on which day.
    """

    recipe: str
    every: str
    targets: tuple[str, ...]
    origins: tuple[tuple[str, str], ...]
    comparisons: tuple[Comparison, ...]
    block: int
    peers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything measured, for JSON: by distance, forecaster and target."""
        return {
            "recipe": self.recipe,
            "every": self.every,
            "origins": [list(origin) for origin in self.origins],
            "horizons": {str(c.ahead): self._scores(c) for c in self.comparisons},
            "peers": {title: dict(made) for title, made in self.peers.items()},
        }

    def _scores(self, comparison: Comparison) -> dict[str, Any]:
        rows = dict(zip(self.targets, map(int, comparison.rows), strict=True))
        return {"rows": rows, "forecasters": {n: self._score(comparison, n) for n in comparison.forecasts}}

    def _score(self, comparison: Comparison, name: str) -> dict[str, Any]:
        """Of one forecaster: each target, and the means of ratio and MASE."""
        low, high = comparison.interval(name, max(self.block, 2 * comparison.ahead))
        columns: dict[str, Any] = {
            "rmse": comparison.rmse(name),
            "ratio": comparison.ratio(name),
            "ratio_low": low[:-1],
            "ratio_high": high[:-1],
            "mase": comparison.mase(name),
            "crps": comparison.crps(name),
        }
        coverage = comparison.coverage() if name == "model" else None
        if coverage is not None:
            columns["coverage_80"] = coverage
        if name != "model":
            columns["p_against_model"] = comparison.diebold_mariano("model", name)
        score: dict[str, Any] = {
            target: {key: rounded(values[k]) for key, values in columns.items()}
            for k, target in enumerate(self.targets)
        }
        score["mean"] = {
            "ratio": rounded(_known_mean(columns["ratio"])),
            "ratio_low": rounded(low[-1]),
            "ratio_high": rounded(high[-1]),
            "mase": rounded(_known_mean(columns["mase"])),
            # Of different units: the mean of the ratios to persistence's.
            "crps_ratio": rounded(_known_mean(columns["crps"] / comparison.crps("persistence"))),
            **({} if coverage is None else {"coverage_80": rounded(_known_mean(coverage))}),
        }
        return score


def backtest(
    config: Config,
    source: TableSource,
    forecaster: Forecaster,
    *,
    origins: int | None = None,
    refit: bool = True,
    window: Window = "expanding",
    fitted: Sequence[Fitted] = FITTED,
    peers: Sequence[str] = (),
    distances: Sequence[int] = (1, 6, 24),
    told: Callable[[str], None] = lambda line: None,
) -> Backtest:
    """Compare a model with its baselines.

    Args:
        config: Of the model.
        source: Its table, with the recipe's splits.
        forecaster: Gives the model that forecasts a source's test rows.
        origins: How many stretches the time from the first test row on is cut into; None: one, the test rows.
        refit: Fit anew before each of them?
        window: Training rows begin with the table, or so that they are as many before each origin.
        fitted: Which of the baselines that have to be fitted.
        peers: Which libraries' networks, of `PEERS`; fitted as the baselines are.
        distances: Steps ahead of a model of one horizon; others have their own.
        told: Takes a line on what is being done.

    Raises:
        ConfigError: there are too few test rows for so many origins.
    """
    parts: dict[int, list[Comparison]] = {}
    spans = []
    for number, fold in enumerate(folds(source, origins or 1, refit=refit, window=window)):
        start, stop = fold.bounds["test"]
        spans.append((str(fold.times[start]), str(fold.times[stop - 1])))
        told(f"origin {number + 1}: {spans[-1][0]} to {spans[-1][1]}")
        if refit or not number:
            (stepper, predictive), baselines = forecaster(fold), Baselines(fold)
            networks: dict[tuple[str, tuple[int, ...]], Peer] = {}
        measurement = Measurement(stepper, fold, predictive, baselines)
        skills = measurement.skills(distances)
        reached = tuple(skill.ahead for skill in skills)
        said = {}
        for name in peers if reached else ():
            title, network = PEERS[name]
            told(f"  {title}")
            if (name, reached) not in networks:
                networks[name, reached] = network(fold, reached)
            said[title] = networks[name, reached].forecasts(measurement.origins(min(reached)))
        for skill in skills:
            at = measurement.origins(skill.ahead)
            more: dict[str, Floats] = {kind: baselines.fitted(kind, skill.ahead)[:, at] for kind in fitted}
            more |= {title: forecasts[skill.ahead][:, : len(at)] for title, forecasts in said.items()}
            parts.setdefault(skill.ahead, []).append(skill.beside(more))
    if not parts:
        raise ConfigError("backtest: no horizon of the model lies within the test rows of an origin")
    comparisons = tuple(joined(some) for _, some in sorted(parts.items()))
    trained_now = {PEERS[name][0]: made_with(name) for name in peers}
    times = tuple(spans)
    return Backtest(config.name, source.config.every, source.targets, times, comparisons, baselines.day, trained_now)


def folds(source: TableSource, origins: int, *, refit: bool, window: Window) -> Iterator[TableSource]:
    """The source as it stands before each origin; see `backtest`.

    Raises:
        ConfigError: an origin would have no test row.
    """
    (begin, validation), (_, test), (_, end) = (source.bounds[s] for s in ("train", "validation", "test"))
    cuts = np.linspace(test, end, origins + 1).astype(int)
    if origins < 1 or len(set(cuts)) <= origins:
        raise ConfigError(f"--origins {origins}: there are {end - test} test steps. Take at most one for each.")
    for start, stop in pairwise(cuts):
        passed = int(start) - test if refit else 0
        first = begin + passed if window == "sliding" else begin
        yield source.between(
            {
                "train": (first, validation + passed),
                "validation": (validation + passed, test + passed),
                "test": (int(start), int(stop)),
            }
        )


def trained(config: Config, told: Callable[[str], None] = lambda line: None) -> Forecaster:
    """Train the recipe's network on a source: the exported graph is what forecasts."""

    def forecaster(source: TableSource) -> tuple[Stepper, Predictive | None]:
        network, history = fit_anew(config, source)
        told(f"  best epoch {history.best_epoch + 1} of {history.epoch}")
        calibrate(network, source, config, told)
        scratch = Path(tempfile.mkdtemp(prefix="stepcast-backtest-"))
        try:
            stepper = Stepper(stage(network, source, scratch), state_tensors(network))
            return stepper, predictive_of(network.head.outputs, network.head.described)
        finally:
            shutil.rmtree(scratch)

    return forecaster


def predictive_of(outputs: Sequence[Output], distribution: Distribution | None) -> Predictive | None:
    """What a model's outputs say besides one number for each target; None: nothing."""
    return None if distribution is None else Predictive(outputs, distribution)


def tables(result: Backtest) -> Iterator[Table]:
    """A table for each distance, for the terminal: ratios to persistence by target."""
    for comparison in result.comparisons:
        title = f"{comparison.ahead} x {result.every} ahead: RMSE / persistence's"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for column in (*result.targets, "mean", "MASE", "CRPS"):
            table.add_column(column, justify="right", min_width=5, no_wrap=True)
        scores = result._scores(comparison)["forecasters"]
        for name, score in scores.items():
            ratios = [_shown(score[target]["ratio"]) for target in (*result.targets, "mean")]
            mean = score["mean"]
            table.add_row(name.replace("_", " "), *ratios, *(_shown(mean[key]) for key in ("mase", "crps_ratio")))
        if (coverage := comparison.coverage()) is not None:
            shares = ", ".join(f"{t} {c:.0%}" for t, c in zip(result.targets, coverage, strict=True))
            table.caption = f"within the 80 % interval: {_known_mean(coverage):.1%} ({shares})"
        yield table


def markdown(result: Mapping[str, Any]) -> str:
    """The same as Markdown, from what `Backtest.as_dict` gave; * marks what the model differs from (p < 0.05)."""
    lines = []
    for ahead, scores in result["horizons"].items():
        names = [name for name in next(iter(scores["forecasters"].values())) if name != "mean"]
        lines += [f"**{ahead} x {result['every']} ahead**", ""]
        lines += [f"| | {' | '.join(names)} | mean | 95 % of the mean | MASE | CRPS |", "|---" * (len(names) + 5) + "|"]
        for name, score in scores["forecasters"].items():
            cells = [_shown(score[t]["ratio"]) + _star(score[t].get("p_against_model")) for t in names]
            mean = score["mean"]
            between = f"{_shown(mean['ratio_low'])} to {_shown(mean['ratio_high'])}"
            cells += [_shown(mean["ratio"]), between, _shown(mean["mase"]), _shown(mean["crps_ratio"])]
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
        lines.append("")
        model = scores["forecasters"]["model"]
        if "coverage_80" in model["mean"]:
            shares = ", ".join(f"{t} {model[t]['coverage_80']:.1%}" for t in names)
            lines += [f"Within the model's 80 % interval: {model['mean']['coverage_80']:.1%} ({shares}).", ""]
    for title, made in result.get("peers", {}).items():
        lines += [f"{title.replace('_', ' ')}: trained with {made['with']} on {made['on']}.", ""]
    return "\n".join(lines)


def with_kept(scores: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Scores, and the rows of peers that a file of earlier scores has beside them.

    A row is kept if it was measured beside the same forecasts: rows and errors of the model and of persistence are the
    same for every target at every horizon. Then it would come out the same again.

    Args:
        scores: What `Backtest.as_dict` gave.
        path: A file that `write_json` wrote; nothing is kept of one that is not there.

    Returns:
        The scores, and names of the rows that could not be kept.
    """
    old = json.loads(path.read_text()) if path.is_file() else {}
    others = [title for title in old.get("peers", {}) if title not in scores["peers"]]
    if not others or _measured(old) != _measured(scores):
        return scores, others
    horizons = {}
    for ahead, at in scores["horizons"].items():
        before = old["horizons"][ahead]["forecasters"]
        horizons[ahead] = {**at, "forecasters": at["forecasters"] | {title: before[title] for title in others}}
    return {**scores, "horizons": horizons, "peers": scores["peers"] | {t: old["peers"][t] for t in others}}, []


def _measured(scores: Mapping[str, Any]) -> Any:
    """By horizon how many rows were compared, and the errors of the model and of persistence."""
    found = {}
    for ahead, at in scores["horizons"].items():
        both = [at["forecasters"][name] for name in ("model", "persistence")]
        found[ahead] = at["rows"], [{target: one[target]["rmse"] for target in at["rows"]} for one in both]
    return found


def write_json(path: Path, scores: Mapping[str, Any]) -> None:
    """Write what `Backtest.as_dict` gave."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores, indent=1) + "\n")


PAGE_MARKS = ("<!-- backtest -->", "<!-- end of backtest -->")


def write_page(path: Path, scores: Mapping[str, Any]) -> None:
    """Put the tables between the marks of a page.

    Raises:
        ConfigError: the page does not have both marks.
    """
    begin, end = PAGE_MARKS
    before, found, rest = path.read_text().partition(begin) if path.is_file() else ("", "", "")
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{path}: has no {begin} and {end}. Put both where the tables belong.")
    path.write_text(f"{before}{begin}\n\n{markdown(scores)}\n{end}{after}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _star(p: float | None) -> str:
    return "*" if p is not None and p < 0.05 else ""


def _known_mean(values: Any) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
