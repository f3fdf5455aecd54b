"""The first layer of every network: readings in the caller's units become numbers a network can live with."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from stepcast.manifest import Feature

from ..graph import Graph
from ..masks import valid_steps
from .base import Layer, LayerState
from .changes import Changes
from .stack import INPUT
from .vectors import Vectors


class Observed(Layer):
    """Normalises, and puts something sensible where a reading is missing (NaN).

    What stands in for a missing reading is the feature's policy: its mean, zero (in the caller's unit), or the last
    reading (`hold`). The memory of `hold` is a state tensor like any other, layer "observed", key "last", in
    normalised units; before the first reading it is 0, the mean. Features with an indicator get one more channel per
    column, behind all others: 1 where the reading was missing. Behind these come the channels of `Changes`, and
    the vectors of categories (`Vectors`).
    """

    mean: Tensor
    scale: Tensor
    filler: Tensor
    held: Tensor
    indicated: Tensor

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__(INPUT)
        widths = [f.width for f in features]
        mean = np.repeat([f.mean for f in features], widths)
        scale = np.repeat([f.scale for f in features], widths)
        policies = np.repeat([f.missing for f in features], widths)
        indicators = np.repeat([f.indicator for f in features], widths)
        self.n_features = sum(widths)
        self.normalises = bool((mean != 0).any() or (scale != 1).any())
        self.fills = any(f.missing != "refuse" or f.indicator for f in features)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32), persistent=False)
        filler = np.where(policies == "zero", -mean / scale, 0.0)
        self.register_buffer("filler", torch.tensor(filler, dtype=torch.float32), persistent=False)
        self.register_buffer("held", torch.tensor(np.flatnonzero(policies == "hold")), persistent=False)
        self.register_buffer("indicated", torch.tensor(np.flatnonzero(indicators)), persistent=False)
        self.changes = Changes(features)
        self.vectors = Vectors(features, self.n_features + len(self.indicated) + self.changes.size)
        self.columns = _columns(features, self.vectors.places)

    @property
    def size(self) -> int:
        """Channels put out."""
        return self.n_features + len(self.indicated) + self.changes.size + self.vectors.size

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        held = {"last": (len(self.held),)} if len(self.held) else {}
        return {**held, **self.changes.state_shapes()}

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        if lengths is not None:  # whatever stands in the padding must not reach a gradient, not even as 0 * NaN
            x = torch.where(valid_steps(lengths, x.shape[1])[..., None], x, 0.0)
        z = (x - self.mean) / self.scale if self.normalises else x  # (B, T, F)
        if self.fills:
            z, state = self._filled(x, z, lengths, state)
        if self.changes.size:
            changes, after = self.changes(z[..., : self.n_features], lengths, state)
            z, state = torch.cat([z, changes], dim=2), {**state, **after}
        return self.vectors(z), state

    def _filled(self, x: Tensor, z: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        """Readings `x` in normalised units `z`, with something in place of the missing ones, and the indicators."""
        missing = torch.isnan(x)
        filled = torch.where(missing, self.filler, z)
        if len(self.held):
            readings = torch.where(missing, torch.nan, z)[..., self.held]
            held, last = hold(readings, lengths, state["last"])
            filled = filled.index_copy(2, self.held, held)
            state = {**state, "last": last}
        if len(self.indicated):
            filled = torch.cat([filled, missing[..., self.indicated].to(filled.dtype)], dim=2)
        return filled, state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        centred = graph.add("Sub", x, graph.constant(self.mean.numpy()))
        z = graph.add("Div", centred, graph.constant(self.scale.numpy()))
        after = dict(state)
        if self.fills:
            z, after = self._write_filled(graph, x, z, state)
        if self.changes.size:
            changes, behind = self.changes.write(graph, self._readings(graph, z), state)
            z, after = graph.add("Concat", z, changes, axis=2), {**after, **behind}
        return self.vectors.write(graph, z), after

    def _readings(self, graph: Graph, z: str) -> str:
        """The channels before the indicators."""
        return graph.add("Slice", z, graph.ints(0), graph.ints(self.n_features), graph.ints(2))

    def _write_filled(self, graph: Graph, x: str, z: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """`_filled` in ONNX."""
        missing = graph.add("IsNaN", x)
        filled = graph.add("Where", missing, graph.constant(self.filler.numpy()), z)
        after = dict(state)
        if len(self.held):
            columns = graph.ints(*self.held.tolist())
            held, after["last"] = write_hold(
                graph,
                graph.add("Gather", z, columns, axis=2),
                graph.add("Gather", missing, columns, axis=2),
                state["last"],
            )
            filled = self._merge(graph, filled, held)
        if len(self.indicated):
            flags = graph.add("Gather", missing, graph.ints(*self.indicated.tolist()), axis=2)
            filled = graph.add("Concat", filled, graph.add("Cast", flags, to=1), axis=2)
        return filled, after

    def _merge(self, graph: Graph, filled: str, held: str) -> str:
        """Put the held columns back in their places."""
        source = np.arange(self.n_features)
        source[self.held.numpy()] = self.n_features + np.arange(len(self.held))
        both = graph.add("Concat", filled, held, axis=2)
        return graph.add("Gather", both, graph.ints(*source.tolist()), axis=2)


def _columns(features: Sequence[Feature], vectors: Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[int]]:
    """Where each feature stands in what is put out; indicators stand behind all values."""
    columns: dict[str, list[int]] = {}
    start, flag = 0, sum(f.width for f in features)
    for feature in features:
        columns[feature.name] = [*vectors.get(feature.name, range(start, start + feature.width))]
        start += feature.width
        if feature.indicator:
            columns[feature.name] += range(flag, flag + feature.width)
            flag += feature.width
    return columns


def hold(readings: Tensor, lengths: Tensor | None, last: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the last reading forward over missing ones.

    Args:
        readings: (B, T, K), NaN where missing.
        lengths: (B,), None for full rows.
        last: (B, K), the last readings before the first step.

    Returns:
        (B, T, K) without NaN, and the last readings (B, K) after each row's last valid step.
    """
    n_steps = readings.shape[1]
    there = ~torch.isnan(readings)
    if lengths is not None:
        there = there & valid_steps(lengths, n_steps)[..., None]
    steps = torch.arange(n_steps, device=readings.device)[:, None]
    latest = torch.where(there, steps, -1).cummax(dim=1).values  # (B, T, K), -1: none so far
    found = torch.where(there, readings, 0.0).gather(1, latest.clamp(min=0))
    held = torch.where(latest < 0, last[:, None], found)
    return held, held[:, -1]


def write_hold(graph: Graph, z: str, missing: str, last: str) -> tuple[str, str]:
    """`hold` in ONNX, without a loop.

    ONNX has no running maximum. So: sort the steps that have a reading to the front (TopK on their numbers, others
    get a number past T), count readings so far (CumSum), and the n-th of them is the latest one.
    """
    valid = graph.add("Unsqueeze", graph.valid(), graph.ints(2))
    there = graph.add("And", graph.add("Not", missing), valid)  # (B, T, K)
    steps = graph.add("Cast", graph.add("Unsqueeze", graph.steps(), graph.ints(1)), to=1)  # (T, 1) float
    n_steps = graph.add("Shape", graph.x, start=1, end=2)
    behind = graph.add("Cast", n_steps, to=1)
    sortable = graph.add("Where", there, steps, behind)
    ordered, _ = graph.add_many("TopK", 2, sortable, n_steps, axis=1, largest=0, sorted=1)
    count = graph.add("CumSum", graph.add("Cast", there, to=7), graph.index(1))  # readings so far
    none = graph.add("Equal", count, graph.index(0))
    rank = graph.add("Max", graph.add("Sub", count, graph.index(1)), graph.index(0))
    latest = graph.add("Cast", graph.add("GatherElements", ordered, rank, axis=1), to=7)
    latest = graph.add("Where", none, graph.index(0), latest)
    found = graph.add("GatherElements", z, latest, axis=1)
    held = graph.add("Where", none, graph.add("Unsqueeze", last, graph.ints(1)), found)
    return held, graph.add("Gather", held, graph.index(-1), axis=1)
