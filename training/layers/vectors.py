"""Learned vectors in place of the indices of categories: an embedding for each feature that has names."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stepcast.manifest import Feature

from ..graph import Graph
from .feedforward import write_look_up


class Vectors(nn.Module):
    """A table of vectors for each feature with an `embedding`.

    A vector's first value stands where the index stood, the others behind all other channels. Index 0, and whatever is
    no index, is none of the feature's categories: its vector begins as zero, and learns only where training rows have
    it.

    Args:
        features: Of the data; the first channels are their columns.
        channels: How many there are without vectors.

    Attributes:
        size: Channels that vectors add.
        places: Where the channels of each feature's vector stand.
    """

    def __init__(self, features: Sequence[Feature], channels: int) -> None:
        super().__init__()
        starts = np.cumsum([0, *(f.width for f in features)])
        embedded = [(int(starts[i]), f) for i, f in enumerate(features) if f.embedding is not None]
        self._columns = [column for column, _ in embedded]
        self.tables = nn.ModuleList(_table(f) for _, f in embedded)
        self.places: Mapping[str, list[int]] = {}
        self._order = [*range(channels)]  # where each channel stands when whole vectors were put behind all else
        behind: list[int] = []
        at = channels
        for column, feature in embedded:
            size = feature.embedding or 0
            first = channels + len(behind)
            self.places = {**self.places, feature.name: [column, *range(first, first + size - 1)]}
            self._order[column] = at
            behind += range(at + 1, at + size)
            at += size
        self._order += behind
        self.size = len(behind)

    def _each(self) -> Iterator[tuple[int, nn.Embedding]]:
        """Column and table of each feature."""
        for column, table in zip(self._columns, self.tables, strict=True):
            assert isinstance(table, nn.Embedding)
            yield column, table

    def forward(self, z: Tensor) -> Tensor:
        """Channels (B, T, C) with vectors in them, (B, T, C + size)."""
        if not self._columns:
            return z
        vectors = []
        for column, table in self._each():
            x = z[..., column]  # (B, T)
            inside = (x > -0.5) & (x < table.num_embeddings - 0.5)  # NaN is not
            vectors.append(table(torch.where(inside, x, 0.0).round().long()))
        return torch.cat([z, *vectors], dim=2)[..., self._order]

    def write(self, graph: Graph, z: str) -> str:
        """`forward` in ONNX."""
        if not self._columns:
            return z
        vectors = []
        for column, table in self._each():
            x = graph.add("Gather", z, graph.ints(column), axis=2)  # (B, T, 1)
            above = graph.add("Greater", x, graph.constant(-0.5))
            below = graph.add("Less", x, graph.constant(table.num_embeddings - 0.5))
            index = graph.add("Where", graph.add("And", above, below), x, graph.constant(0.0))
            vectors.append(write_look_up(graph, table, index))
        return graph.add("Gather", graph.add("Concat", z, *vectors, axis=2), graph.ints(*self._order), axis=2)


def _table(feature: Feature) -> nn.Embedding:
    """The vectors of a feature's categories behind that of none of them."""
    table = nn.Embedding(1 + len(feature.categories or ()), feature.embedding or 0)
    with torch.no_grad():
        table.weight[0] = 0.0
    return table
