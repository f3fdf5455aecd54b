"""Many-to-one by pooling over time: running, so that each step has the answer for the sequence so far."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..graph import Graph
from ..masks import valid_steps
from .base import Layer, LayerState
from .specs import GlobalPoolingSpec

LOWEST = float(np.finfo(np.float32).min)
TINY = 1e-24


class GlobalPooling(Layer):
    """Maximum, mean, sum or p-norm over the steps so far.

    States start at zero: the sum (of |x|^p for the p-norm), or the maximum beside a count that says if it is one yet.
    """

    def __init__(self, name: str, spec: GlobalPoolingSpec, size: int) -> None:
        super().__init__(name)
        self.pooling, self.p, self.size = spec.pooling, spec.p, size

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        kept = {"max": (self.size,)} if self.pooling == "max" else {"sum": (self.size,)}
        return {**kept, "count": (1,)} if self.pooling in ("max", "avg") else kept

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        valid = x.new_ones(x.shape[:2], dtype=torch.bool)
        if lengths is not None:
            valid = valid_steps(lengths, x.shape[1])
        valid = valid[..., None]
        after = {}
        if "count" in state:
            count = state["count"][:, None] + valid.to(x.dtype).cumsum(dim=1)  # (B, T, 1)
            after["count"] = count[:, -1]
        if self.pooling == "max":
            before = torch.where(state["count"] > 0, state["max"], LOWEST)
            seen = torch.cat([before[:, None], torch.where(valid, x, LOWEST)], dim=1)
            highest = seen.cummax(dim=1).values[:, 1:]
            y = torch.where(count > 0, highest, 0.0)
            return y, {"max": y[:, -1], **after}
        terms = x.abs().clamp(min=TINY) ** self.p if self.pooling == "pnorm" else x
        total = state["sum"][:, None] + torch.where(valid, terms, 0.0).cumsum(dim=1)
        after = {"sum": total[:, -1], **after}
        if self.pooling == "avg":
            return total / count.clamp(min=1.0), after
        return (total.clamp(min=TINY) ** (1.0 / self.p) if self.pooling == "pnorm" else total), after

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        one, last = graph.ints(1), graph.index(-1)
        valid = graph.add("Unsqueeze", graph.valid(), graph.ints(2))
        zero, after, count = graph.constant(0.0), {}, ""
        if "count" in state:
            counted = graph.add("CumSum", graph.add("Cast", valid, to=1), graph.index(1))
            count = graph.add("Add", graph.add("Unsqueeze", state["count"], one), counted)
            after["count"] = graph.add("Gather", count, last, axis=1)
        if self.pooling == "max":
            y = self._write_max(graph, x, valid, count, state)
            return y, {"max": graph.add("Gather", y, last, axis=1), **after}
        terms = x
        if self.pooling == "pnorm":
            size = graph.add("Max", graph.add("Abs", x), graph.constant(TINY))
            terms = graph.add("Pow", size, graph.constant(self.p))
        summed = graph.add("CumSum", graph.add("Where", valid, terms, zero), graph.index(1))
        total = graph.add("Add", graph.add("Unsqueeze", state["sum"], one), summed)
        after["sum"] = graph.add("Gather", total, last, axis=1)
        if self.pooling == "avg":
            total = graph.add("Div", total, graph.add("Max", count, graph.constant(1.0)))
        if self.pooling == "pnorm":
            total = graph.add("Pow", graph.add("Max", total, graph.constant(TINY)), graph.constant(1.0 / self.p))
        return total, after

    def _write_max(self, graph: Graph, x: str, valid: str, count: str, state: Mapping[str, str]) -> str:
        zero, lowest = graph.constant(0.0), graph.constant(LOWEST)
        before = graph.add("Where", graph.add("Greater", state["count"], zero), state["max"], lowest)
        readings = graph.add("Where", valid, x, lowest)
        _, highest = graph.scan([before], [readings], lambda s, i: [graph.add("Max", s[0], i[0])])
        return graph.add("Where", graph.add("Greater", count, zero), highest, zero)
