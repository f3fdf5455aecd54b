"""How much a forecast of a table's series is worth: against naive forecasts of the same moments.

Measured on the exported model, one step at a time, every test hour of every series. At a horizon that the model has an
output for, that output is its forecast. Further ahead the model runs free as the service's rollout does: its answers of
one step ahead come back as readings, the calendar, what is known and what is static are given, all else is missing. A
model of several horizons is measured in both ways, and one that says nothing of the next step in the first alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from stepcast.predictive import Predictive

from .baselines import Baselines
from .comparison import Comparison
from .data.table import TableSource
from .evaluate import present_steps
from .stepper import Floats, States, Stepper


@dataclass(frozen=True)
class Replay:
    """The test steps, stepped through once.

    Attributes:
        start: Grid step of the first column.
        x: (S, T, F) readings, the warm-up included.
        present: (S, T).
        y: (S, T, O) answers: the targets' forecasts at the first horizon, then those at the next.
        states: By name, (T, S, ...): the states behind every step.
        scored: Columns before this one are warm-up.
    """

    start: int
    x: Floats
    present: NDArray[np.bool_]
    y: Floats
    states: States
    scored: int


class Measurement:
    """Forecasts of a table's test steps at any distance.

    Args:
        stepper: The exported model.
        source: The table.
        predictive: What the model's outputs say besides one number for each target.
        baselines: Of the same table, if they are there already.
    """

    def __init__(
        self,
        stepper: Stepper,
        source: TableSource,
        predictive: Predictive | None = None,
        baselines: Baselines | None = None,
    ) -> None:
        self.stepper, self.source, self.predictive = stepper, source, predictive
        self.baselines = baselines or Baselines(source)
        self.columns = self.baselines.columns
        self.foreseen = [place for place, channel in enumerate(source.channels) if channel.foreseen]
        self.replay = self._replay()

    def _replay(self) -> Replay:
        start, stop = self.source.bounds["test"]
        batch = self.source.window(start, stop)
        x, present = batch.x.numpy(), present_steps(batch)
        states = self.stepper.initial_states(x.shape[0])
        outputs, kept = [], []
        for t in range(x.shape[1]):
            y, states = self.stepper.run(x[:, t : t + 1], present[:, t].astype(np.int32), states)
            outputs.append(y[:, 0])
            kept.append(states)
        stacked = {name: np.stack([s[name] for s in kept]) for name in states}
        first = stop - x.shape[1]
        return Replay(first, x, present, np.stack(outputs, axis=1), stacked, start - first)

    def skills(self, distances: Sequence[int]) -> list[Comparison]:
        """The model and its rivals at each of its horizons; of a model of one step at any distance.

        Args:
            distances: Steps ahead, for a model of one step. What the test rows do not reach is left out.
        """
        horizons = self.source.horizons
        wanted = distances if horizons == (1,) else horizons
        reached = [ahead for ahead in wanted if len(self.origins(ahead))]
        free = reached if self.source.feedback else []
        rolled = self._rollout(max(free, default=1))
        return [
            self._skill(
                ahead,
                self.direct(ahead) if ahead in horizons else None,
                rolled[ahead - 1] if ahead in free else None,
            )
            for ahead in reached
        ]

    def direct(self, ahead: int) -> Floats:
        """The answers (S, T, O) of the outputs of one horizon."""
        first = self.source.horizons.index(ahead) * len(self.columns)
        return self.replay.y[..., first : first + len(self.columns)]

    def _rollout(self, steps: int) -> list[Floats]:
        """Forecasts 1..steps ahead of every step, each (S, T, O); every (step, series) pair is one row."""
        replay, source = self.replay, self.source
        if not source.feedback:
            return []
        n_series, n_steps, n_features = replay.x.shape
        states = {k: s.reshape(n_steps * n_series, *s.shape[2:]) for k, s in replay.states.items()}
        y = self.direct(1).transpose(1, 0, 2).reshape(n_steps * n_series, -1)
        lengths = np.ones(len(y), np.int32)
        forecasts = [self.direct(1)]
        for ahead in range(1, steps):
            x = np.full((n_steps, n_series, n_features), np.nan, np.float32)
            at = np.minimum(replay.start + np.arange(n_steps) + ahead, source.x.shape[1] - 1)
            x[..., self.foreseen] = source.x[:, at][..., self.foreseen].transpose(1, 0, 2)
            x = x.reshape(len(y), 1, n_features)
            x[:, 0, self.columns] = y
            out, states = self.stepper.run(x, lengths, states)
            y = out[:, 0, : len(self.columns)]
            forecasts.append(y.reshape(n_steps, n_series, -1).transpose(1, 0, 2))
        return forecasts

    def _skill(self, ahead: int, direct: Floats | None, rolled: Floats | None) -> Comparison:
        """Compare where the forecast's origin is a step, and the truth and what naive forecasts repeat is known."""
        replay, baselines = self.replay, self.baselines
        origin = self.origins(ahead)
        model = direct if rolled is None or direct is not None else rolled
        said = {"model": model, **({"rollout": rolled} if direct is not None and ahead > 1 else {})}
        given = {n: self._at(f, origin - replay.start) for n, f in said.items() if f is not None}
        truth = baselines.truth[:, origin + ahead]
        forecasts = {**given, **baselines.naive(ahead, origin)}
        comparison = Comparison(ahead, truth, forecasts, baselines.scale)
        if self.predictive is None or direct is None:
            return comparison
        first = self.source.horizons.index(ahead) * len(self.columns)
        parameters = self.predictive.parameters(replay.y[:, origin - replay.start])  # (S, R, K, P)
        parameters = parameters[..., first : first + len(self.columns), :].astype(np.float64)
        return replace(comparison, distribution=self.predictive.distribution, parameters=parameters)

    def origins(self, ahead: int) -> NDArray[np.int64]:
        """(R,) test steps whose forecasts can be compared with what came."""
        first, stop = self.replay.start + self.replay.scored, self.baselines.truth.shape[1]
        return np.arange(first, min(self.source.bounds["test"][1], stop - ahead))

    def _at(self, forecast: Floats, columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Forecasts (S, R, O) of some of the replayed steps, NaN of absent ones."""
        there = self.replay.present[:, columns, None]
        return np.where(there, forecast[:, columns].astype(np.float64), np.nan)

    def plot_week(self, path: Path) -> None:
        """Draw a week in the middle of the test steps, or all of fewer: truth, forecast, persistence of each target."""
        replay, source, ahead = self.replay, self.source, self.source.horizons[0]
        stop = replay.x.shape[1] - ahead  # what is forecast behind it is not known
        steps = min(7 * self.baselines.day, stop - replay.scored)
        middle = (replay.scored + stop - steps) // 2
        origin = replay.start + middle + np.arange(steps)
        figure = Figure(figsize=(10, 1.9 * len(source.targets)), layout="constrained")
        panels = figure.subplots(len(source.targets), 1, sharex=True, squeeze=False)[:, 0]
        for k, (axes, name) in enumerate(zip(panels, source.targets, strict=True)):
            times = source.times[origin + ahead]
            axes.plot(times, self.baselines.last[0, origin, k], color="0.7", linewidth=1, label="persistence")
            axes.plot(times, self.baselines.truth[0, origin + ahead, k], color="black", linewidth=1, label="truth")
            axes.plot(times, replay.y[0, middle : middle + steps, k], color="tab:red", linewidth=1, label="forecast")
            axes.set_ylabel(f"{name} [{source.config.columns[name].unit}]")
        panels[0].set_title(f"{source.series[0]}: test rows, {ahead} x {source.config.every} ahead")
        panels[0].legend(loc="upper right", ncols=3, fontsize="small")
        figure.savefig(path, dpi=80, metadata={"Software": None})


def skill_table(source: TableSource, skills: Sequence[Comparison]) -> Table:
    """Errors of every target at every distance, for the terminal."""
    every = source.config.every
    table = Table(title="RMSE on the test rows, exported model stepped one by one", title_justify="left")
    rolled = any("rollout" in skill.forecasts for skill in skills)
    naive = [n for n in skills[0].forecasts if n not in ("model", "rollout")] if skills else []
    forecasters = ["model", *(["rollout"] if rolled else []), *naive[:2]]  # a terminal is narrow
    for name in ("target", "ahead", *forecasters, "model / persistence"):
        first = name == "target"
        table.add_column(name.replace("_", " "), justify="left" if first else "right", no_wrap=first)
    for skill in skills:
        errors = [skill.rmse(n) if n in skill.forecasts else None for n in forecasters]
        ratio = skill.ratio("model")
        for k, name in enumerate(source.targets):
            unit = source.config.columns[name].unit
            numbers = ["" if error is None else f"{error[k]:.3f}" for error in errors]
            label = f"{name} [{unit}]".replace("[", r"\[")
            table.add_row(label, f"{skill.ahead} x {every}", *numbers, f"{ratio[k]:.3f}")
        known = ratio[~np.isnan(ratio)]
        mean = f"{known.mean():.3f}" if known.size else "-"
        table.add_row("mean of ratios", f"{skill.ahead} x {every}", *[""] * len(forecasters), mean)
        table.add_section()
    return table
