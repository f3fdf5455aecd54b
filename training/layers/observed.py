"""The first layer of every network: readings in the caller's units become numbers a network can live with."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stepcast.manifest import Feature

from ..graph import Graph
from ..masks import valid_steps
from .base import Layer, LayerState
from .feedforward import write_look_up


class Observed(Layer):
    """Normalises, puts something sensible where a reading is missing (NaN), and gives categories their vectors.

    What stands in for a missing reading is the feature's policy: its mean, zero (in the caller's unit), or the last
    reading (`hold`). The memory of `hold` is a state tensor like any other, layer "observed", key "last", in
    normalised units; before the first reading it is 0, the mean. Features with an indicator get one more channel per
    column, behind all others: 1 where the reading was missing.
    """

    mean: Tensor
    scale: Tensor
    filler: Tensor
    held: Tensor
    indicated: Tensor
    numeric: Tensor

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__("observed")
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
        starts = np.cumsum([0, *widths])
        self._embedded = [(int(starts[i]), f) for i, f in enumerate(features) if f.embedding is not None]
        numeric = np.setdiff1d(np.arange(self.n_features), [column for column, _ in self._embedded])
        self.register_buffer("numeric", torch.tensor(numeric), persistent=False)
        self.tables = nn.ModuleList(_table(f) for _, f in self._embedded)

    @property
    def size(self) -> int:
        """Channels put out."""
        return len(self.numeric) + len(self.indicated) + sum(f.embedding or 0 for _, f in self._embedded)

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"last": (len(self.held),)} if len(self.held) else {}

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        if lengths is not None:  # whatever stands in the padding must not reach a gradient, not even as 0 * NaN
            x = torch.where(valid_steps(lengths, x.shape[1])[..., None], x, 0.0)
        z = (x - self.mean) / self.scale if self.normalises else x  # (B, T, F)
        if not self.fills:
            return self._embed(z, []), state
        missing = torch.isnan(x)
        filled = torch.where(missing, self.filler, z)
        if len(self.held):
            readings = torch.where(missing, torch.nan, z)[..., self.held]
            held, last = hold(readings, lengths, state["last"])
            filled = filled.index_copy(2, self.held, held)
            state = {"last": last}
        flags = [missing[..., self.indicated].to(filled.dtype)] if len(self.indicated) else []
        return self._embed(filled, flags), state

    def _columns_embedded(self) -> Iterator[tuple[int, nn.Embedding]]:
        for (column, _), table in zip(self._embedded, self.tables, strict=True):
            assert isinstance(table, nn.Embedding)
            yield column, table

    def _embed(self, filled: Tensor, flags: list[Tensor]) -> Tensor:
        """(B, T, size): readings, flags, vectors."""
        if not self._embedded:
            return torch.cat([filled, *flags], dim=2) if flags else filled
        vectors = []
        for column, table in self._columns_embedded():
            x = filled[..., column]  # (B, T)
            inside = (x > -0.5) & (x < table.num_embeddings - 0.5)  # NaN is not
            vectors.append(table(torch.where(inside, x, 0.0).round().long()))
        return torch.cat([filled[..., self.numeric], *flags, *vectors], dim=2)

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        centred = graph.add("Sub", x, graph.constant(self.mean.numpy()))
        z = graph.add("Div", centred, graph.constant(self.scale.numpy()))
        if not self.fills:
            return self._write_embed(graph, z, []), dict(state)
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
        flags = []
        if len(self.indicated):
            gathered = graph.add("Gather", missing, graph.ints(*self.indicated.tolist()), axis=2)
            flags = [graph.add("Cast", gathered, to=1)]
        return self._write_embed(graph, filled, flags), after

    def _write_embed(self, graph: Graph, filled: str, flags: list[str]) -> str:
        """`_embed` in ONNX."""
        if not self._embedded:
            return graph.add("Concat", filled, *flags, axis=2) if flags else filled
        vectors = []
        for column, table in self._columns_embedded():
            x = graph.add("Gather", filled, graph.ints(column), axis=2)  # (B, T, 1)
            above = graph.add("Greater", x, graph.constant(-0.5))
            below = graph.add("Less", x, graph.constant(table.num_embeddings - 0.5))
            index = graph.add("Where", graph.add("And", above, below), x, graph.constant(0.0))
            vectors.append(write_look_up(graph, table, index))
        numeric = graph.add("Gather", filled, graph.ints(*self.numeric.tolist()), axis=2)
        return graph.add("Concat", numeric, *flags, *vectors, axis=2)

    def _merge(self, graph: Graph, filled: str, held: str) -> str:
        """Put the held columns back in their places."""
        source = np.arange(self.n_features)
        source[self.held.numpy()] = self.n_features + np.arange(len(self.held))
        both = graph.add("Concat", filled, held, axis=2)
        return graph.add("Gather", both, graph.ints(*source.tolist()), axis=2)


def _table(feature: Feature) -> nn.Embedding:
    """The vectors of a feature's categories behind that of none of them."""
    table = nn.Embedding(1 + len(feature.categories or ()), feature.embedding or 0)
    with torch.no_grad():
        table.weight[0] = 0.0
    return table


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
