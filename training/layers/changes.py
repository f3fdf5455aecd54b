"""How much readings have changed over the last steps: a trend that a network need not take apart by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stepcast.manifest import Feature

from ..graph import Graph
from .base import LayerState
from .window import latest, write_latest

LIMIT = 5.0
"""Changes are cut to this many usual ones: a glitch, or the first reading after none, is no trend."""


@dataclass(frozen=True)
class Lag:
    """The changes over one number of steps.

    Attributes:
        steps: How many.
        places: Of the readings among those that have changes.
        scales: The usual change of each in normalised units.
    """

    steps: int
    places: list[int]
    scales: list[float]


class Changes(nn.Module):
    """One channel for each of a feature's `changes`: (x_t - x_{t-k}) / scale, 0 until k steps have been seen.

    Readings reach a recurrent layer in units of their deviation over the whole series. The change of an hour is a few
    hundredths of that, which saturating gates hardly see; here it is in units of its own deviation. A missing reading
    counts as what stands in for it. The state are the last readings, key "before", and how many steps there were, key
    "seen", up to the longest `k`.
    """

    columns: Tensor

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__()
        starts = np.cumsum([0, *(f.width for f in features)])
        changing = [(int(start), f) for start, f in zip(starts, features, strict=False) if f.changes]
        self.register_buffer("columns", torch.tensor([start for start, _ in changing]), persistent=False)
        self.reach = max((c.steps for _, f in changing for c in f.changes), default=0)
        by_steps: dict[int, list[tuple[int, float]]] = {}
        for place, (_, feature) in enumerate(changing):
            for change in feature.changes:
                by_steps.setdefault(change.steps, []).append((place, change.scale / feature.scale))
        self.lags = [
            Lag(steps, [place for place, _ in entries], [scale for _, scale in entries])
            for steps, entries in sorted(by_steps.items())
        ]
        self.size = sum(len(lag.places) for lag in self.lags)

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes per row of the state tensors, by key."""
        return {"before": (self.reach, len(self.columns)), "seen": (1,)} if self.size else {}

    def forward(self, z: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        """The changes (B, T, `size`) of normalised readings (B, T, F), and the state behind them."""
        n_steps = z.shape[1]
        now = z[..., self.columns]  # (B, T, C)
        series = torch.cat([state["before"], now], dim=1)  # (B, reach + T, C)
        count = state["seen"] + torch.arange(n_steps, device=z.device)  # (B, T), steps before each one
        channels = []
        for lag in self.lags:
            then = series[:, self.reach - lag.steps : self.reach - lag.steps + n_steps, lag.places]
            change = (now[..., lag.places] - then) / torch.tensor(lag.scales, device=z.device)
            channels.append(torch.where((count >= lag.steps)[..., None], change, 0.0))
        passed = n_steps if lengths is None else lengths[:, None]
        seen = (state["seen"] + passed).clamp(max=self.reach)
        before = latest(series, lengths, self.reach)
        return torch.cat(channels, dim=2).clamp(-LIMIT, LIMIT), {"before": before, "seen": seen}

    def write(self, graph: Graph, z: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """`forward` in ONNX."""
        now = graph.add("Gather", z, graph.ints(*self.columns.tolist()), axis=2)
        series = graph.add("Concat", state["before"], now, axis=1)
        count = graph.add("Add", state["seen"], graph.add("Cast", graph.steps(), to=1))  # (B, T)
        channels = []
        for lag in self.lags:
            stretch = [graph.ints(self.reach - lag.steps), graph.ints(-lag.steps), graph.ints(1)]
            then = graph.add("Gather", graph.add("Slice", series, *stretch), graph.ints(*lag.places), axis=2)
            change = graph.add("Sub", graph.add("Gather", now, graph.ints(*lag.places), axis=2), then)
            known = graph.add("GreaterOrEqual", count, graph.constant(float(lag.steps)))
            scaled = graph.add("Div", change, graph.constant(lag.scales))
            known = graph.add("Unsqueeze", known, graph.ints(2))
            channels.append(graph.add("Where", known, scaled, graph.constant(0.0)))
        joined = graph.add("Concat", *channels, axis=2)
        joined = graph.add("Clip", joined, graph.constant(-LIMIT), graph.constant(LIMIT))
        passed = graph.add("Unsqueeze", graph.add("Cast", graph.lengths, to=1), graph.ints(1))
        seen = graph.add("Min", graph.add("Add", state["seen"], passed), graph.constant(float(self.reach)))
        return joined, {"before": write_latest(graph, series, self.reach), "seen": seen}
