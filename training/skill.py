"""How much a forecast of a table's series is worth: against persistence, and against the last known day.

Measured on the exported model, one step at a time, every test hour of every series. Further ahead the model runs
free as the service's rollout does: its answers come back as readings, the calendar is known, all else is missing. A
model of a horizon beyond one step cannot run free; it is measured at its horizon.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from .data.table import TableSource, feature_columns
from .evaluate import present_steps
from .stepper import Floats, States, Stepper


@dataclass(frozen=True)
class Skill:
    """Root mean square errors at one distance, per target.

    Attributes:
        ahead: Steps.
        rows: How many forecasts were compared.
        model: (O,) of the forecast.
        persistence: (O,) of the last observed value.
        day_before: (O,) of the value at the same time of the last day that was known.
    """

    ahead: int
    rows: NDArray[np.int64]
    model: NDArray[np.float64]
    persistence: NDArray[np.float64]
    day_before: NDArray[np.float64]

    @property
    def ratio(self) -> NDArray[np.float64]:
        """Model over persistence, (O,); NaN where that has no error."""
        return np.divide(self.model, self.persistence, out=np.full_like(self.model, np.nan), where=self.persistence > 0)

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain numbers by target, for the manifest."""
        return {
            name: {
                "rmse": _rounded(self.model[k]),
                "persistence": _rounded(self.persistence[k]),
                "day_before": _rounded(self.day_before[k]),
                "ratio": _rounded(self.ratio[k]),
                "rows": int(self.rows[k]),
            }
            for k, name in enumerate(names)
        }


@dataclass(frozen=True)
class Replay:
    """The test steps, stepped through once.

    Attributes:
        start: Grid step of the first column.
        x: (S, T, F) readings, the warm-up included.
        present: (S, T).
        y: (S, T, O) forecasts of one step ahead.
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
    """

    def __init__(self, stepper: Stepper, source: TableSource) -> None:
        self.stepper, self.source, self.horizon = stepper, source, source.config.horizon
        # On a grid that does not divide the day, the first step that is at least a day away.
        self.day = math.ceil(pd.Timedelta(days=1) / pd.Timedelta(source.config.every))
        names = [f.name for f in source.features]
        self.columns = [names.index(t) for t in source.targets]
        self.calendar = [i for i, (_, _, column) in enumerate(feature_columns(source.config)) if column is None]
        self.truth = source.x[..., self.columns]  # (S, L, O), NaN where missing
        self.last = _carried(self.truth)  # the last observed values
        self.replay = self._replay()

    def _replay(self) -> Replay:
        start, stop = self.source.bounds["test"]
        batch = self.source.window(start, stop)
        x, present = batch.x.numpy(), present_steps(batch)
        states = self.stepper.initial_states(x.shape[0])
        outputs, kept = [], []
        for t in range(x.shape[1]):
            y, states = self.stepper.run(x[:, t : t + 1], present[:, t].astype(np.int32), states)
            outputs.append(y[:, 0, : len(self.columns)])
            kept.append(states)
        stacked = {name: np.stack([s[name] for s in kept]) for name in states}
        first = stop - x.shape[1]
        return Replay(first, x, present, np.stack(outputs, axis=1), stacked, start - first)

    def skills(self, distances: Sequence[int]) -> list[Skill]:
        """Skill at each distance in steps that the test rows reach; with a longer horizon, at that alone."""
        if self.horizon > 1:
            return [self._skill(self.horizon, self.replay.y)]
        tested = self.replay.x.shape[1] - self.replay.scored
        reached = [ahead for ahead in distances if ahead < tested]
        forecasts = self._rollout(max(reached, default=1))
        return [self._skill(ahead, forecasts[ahead - 1]) for ahead in reached]

    def _rollout(self, steps: int) -> list[Floats]:
        """Forecasts 1..steps ahead of every step, each (S, T, O); every (step, series) pair is one row."""
        replay, source = self.replay, self.source
        n_series, n_steps, n_features = replay.x.shape
        states = {k: s.reshape(n_steps * n_series, *s.shape[2:]) for k, s in replay.states.items()}
        y = replay.y.transpose(1, 0, 2).reshape(n_steps * n_series, -1)
        lengths = np.ones(len(y), np.int32)
        forecasts = [replay.y]
        for ahead in range(1, steps):
            x = np.full((n_steps, n_series, n_features), np.nan, np.float32)
            at = np.minimum(replay.start + np.arange(n_steps) + ahead, source.x.shape[1] - 1)
            x[..., self.calendar] = source.x[:, at][..., self.calendar].transpose(1, 0, 2)
            x = x.reshape(len(y), 1, n_features)
            x[:, 0, self.columns] = y
            out, states = self.stepper.run(x, lengths, states)
            y = out[:, 0, : len(self.columns)]
            forecasts.append(y.reshape(n_steps, n_series, -1).transpose(1, 0, 2))
        return forecasts

    def _skill(self, ahead: int, forecast: Floats) -> Skill:
        """Compare where the forecast's origin is a step and truth, persistence and the day before are all known."""
        replay, stop = self.replay, self.truth.shape[1]
        origin = np.arange(replay.start + replay.scored, stop - ahead)  # (R,)
        truth = self.truth[:, origin + ahead].astype(np.float64)
        # The same time of the last known day, or where that is missing the last value before it.
        day_before = origin + ahead - self.day * math.ceil(ahead / self.day)
        rivals = {
            "model": forecast[:, origin - replay.start],
            "persistence": self.last[:, origin],
            "day_before": np.where(day_before[:, None] >= 0, self.last[:, np.maximum(day_before, 0)], np.nan),
        }
        there = replay.present[:, origin - replay.start, None] & ~np.isnan(truth)
        there = there & ~np.isnan(rivals["persistence"]) & ~np.isnan(rivals["day_before"])
        errors = {name: _rmse(values - truth, there) for name, values in rivals.items()}
        return Skill(ahead, there.sum(axis=(0, 1)), **errors)

    def plot_week(self, path: Path) -> None:
        """Draw a week in the middle of the test steps, or all of fewer: truth, forecast, persistence of each target."""
        replay, source, ahead = self.replay, self.source, self.horizon
        stop = replay.x.shape[1] - ahead  # what is forecast behind it is not known
        steps = min(7 * self.day, stop - replay.scored)
        middle = (replay.scored + stop - steps) // 2
        origin = replay.start + middle + np.arange(steps)
        figure = Figure(figsize=(10, 1.9 * len(source.targets)), layout="constrained")
        panels = figure.subplots(len(source.targets), 1, sharex=True, squeeze=False)[:, 0]
        for k, (axes, name) in enumerate(zip(panels, source.targets, strict=True)):
            times = source.times[origin + ahead]
            axes.plot(times, self.last[0, origin, k], color="0.7", linewidth=1, label="persistence")
            axes.plot(times, self.truth[0, origin + ahead, k], color="black", linewidth=1, label="truth")
            axes.plot(times, replay.y[0, middle : middle + steps, k], color="tab:red", linewidth=1, label="forecast")
            axes.set_ylabel(f"{name} [{source.config.columns[name].unit}]")
        panels[0].set_title(f"{source.series[0]}: test rows, {ahead} x {source.config.every} ahead")
        panels[0].legend(loc="upper right", ncols=3, fontsize="small")
        figure.savefig(path, dpi=80, metadata={"Software": None})


def _carried(values: Floats) -> Floats:
    """(S, L, O) with the last observed value in place of missing ones."""
    steps = np.arange(values.shape[1])[None, :, None]
    latest = np.maximum.accumulate(np.where(np.isnan(values), 0, steps), axis=1)
    return np.take_along_axis(values, latest, axis=1)


def _rmse(errors: NDArray[np.float64], there: NDArray[np.bool_]) -> NDArray[np.float64]:
    squares = np.where(there, np.square(errors, where=there, out=np.zeros_like(errors)), 0.0)
    total, count = squares.sum(axis=(0, 1)), there.sum(axis=(0, 1))
    return np.asarray(np.sqrt(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)))


def _rounded(value: float) -> float | None:
    """For the manifest: four places, None for what could not be measured."""
    return round(float(value), 4) if np.isfinite(value) else None


def skill_table(source: TableSource, skills: Sequence[Skill]) -> Table:
    """Errors of every target at every distance, for the terminal."""
    every = source.config.every
    table = Table(title="RMSE on the test rows, exported model stepped one by one", title_justify="left")
    for name in ("target", "ahead", "model", "persistence", "day before", "model / persistence"):
        table.add_column(name, justify="left" if name == "target" else "right")
    for skill in skills:
        rows = zip(source.targets, skill.model, skill.persistence, skill.day_before, skill.ratio, strict=True)
        for name, model, persistence, day_before, ratio in rows:
            unit = source.config.columns[name].unit
            numbers = [f"{v:.3f}" for v in (model, persistence, day_before, ratio)]
            table.add_row(f"{name} [{unit}]".replace("[", r"\["), f"{skill.ahead} x {every}", *numbers)
        known = skill.ratio[~np.isnan(skill.ratio)]
        mean = f"{known.mean():.3f}" if known.size else "-"
        table.add_row("mean of ratios", f"{skill.ahead} x {every}", "", "", "", mean)
        table.add_section()
    return table
