"""The last steps of a sequence as state: what a layer that looks back needs of the call before."""

import torch
from torch import Tensor

from ..graph import Graph


def latest(seen: Tensor, lengths: Tensor | None, reach: int) -> Tensor:
    """The last `reach` valid steps of what was seen, state and input together.

    Args:
        seen: (B, reach + T, ...).
        lengths: (B,) valid steps of the T; None: all.
        reach: Steps that the state holds.

    Returns:
        (B, reach, ...), oldest first; of a row of length 0 the state it had.
    """
    if lengths is None:
        return seen[:, seen.shape[1] - reach :]
    places = lengths[:, None] + torch.arange(reach, device=seen.device)  # (B, reach)
    return seen.gather(1, places.view(*places.shape, *[1] * (seen.ndim - 2)).expand(-1, -1, *seen.shape[2:]))


def write_latest(graph: Graph, seen: str, reach: int) -> str:
    """`latest` in ONNX.

    Args:
        graph: Takes the nodes.
        seen: (B, reach + T, ...).
        reach: Steps that the state holds.
    """
    lengths = graph.add("Unsqueeze", graph.add("Cast", graph.lengths, to=7), graph.ints(1))
    places = graph.add(
        "Unsqueeze", graph.add("Add", lengths, graph.ints(*range(reach))), graph.ints(2)
    )  # (B, reach, 1)
    return graph.add("GatherND", seen, places, batch_dims=1)
