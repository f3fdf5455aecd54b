"""The last steps of a sequence as state: what a layer that looks back needs of the call before."""

import torch
from torch import Tensor

from ..graph import Graph


def latest(seen: Tensor, lengths: Tensor | None, reach: int) -> Tensor:
    """The last `reach` valid steps of what was seen, state and input together.

    Args:
        seen: (B, reach + T, F).
        lengths: (B,) valid steps of the T; None: all.
        reach: Steps that the state holds.

    Returns:
        (B, reach, F), oldest first; of a row of length 0 the state it had.
    """
    if lengths is None:
        return seen[:, seen.shape[1] - reach :]
    places = lengths[:, None, None] + torch.arange(reach, device=seen.device)[:, None]
    return seen.gather(1, places.expand(-1, -1, seen.shape[2]))


def write_latest(graph: Graph, seen: str, reach: int, size: int) -> str:
    """`latest` in ONNX.

    Args:
        graph: Takes the nodes.
        seen: (B, reach + T, size).
        reach: Steps that the state holds.
        size: F.
    """
    lengths = graph.add("Unsqueeze", graph.add("Cast", graph.lengths, to=7), graph.ints(1, 2))
    window = graph.constant([[[i] * size for i in range(reach)]], "int64")
    return graph.add("GatherElements", seen, graph.add("Add", lengths, window), axis=1)
