"""Attention over the last steps: what it may look back on is its state."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..graph import Graph
from .base import Layer, LayerState
from .feedforward import write_linear
from .specs import AttentionSpec
from .weights import initialise
from .window import latest, write_latest


class Attention(Layer):
    """Scaled dot-product attention of each step over itself and the `window` - 1 steps before it.

    Vaswani et al., "Attention Is All You Need" (2017), with several heads, and as in Raffel et al. (2020) a learned
    number per head that is added to the scores by how many steps a key lies back.

    The state is what the next step looks back on, oldest first: `keys` and `values` of the last `window` - 1 steps, and
    in `valid` 1 for each that there was. In the beginning none is valid, so zeros are nothing, not a key.
    """

    def __init__(self, name: str, spec: AttentionSpec, size: int) -> None:
        super().__init__(name)
        self.units, self.heads, self.reach = spec.units, spec.heads, spec.window - 1
        self.project = nn.Linear(size, 3 * spec.units)  # query, key, value
        self.combine = nn.Linear(spec.units, spec.units)
        self.bias = nn.Parameter(torch.zeros(spec.heads, spec.window))  # by steps back
        for block in self.project.weight.detach().chunk(3):
            initialise(block, spec.weight_init, size, spec.units)
        initialise(self.combine.weight, spec.weight_init, spec.units, spec.units)
        nn.init.zeros_(self.project.bias)
        nn.init.zeros_(self.combine.bias)

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"keys": (self.reach, self.units), "values": (self.reach, self.units), "valid": (self.reach,)}

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        query, *new = self.project(x).to(state["keys"].dtype).chunk(3, dim=2)
        keys, values = (torch.cat([state[key], n], dim=1) for key, n in zip(("keys", "values"), new, strict=True))
        valid = torch.cat([state["valid"], x.new_ones(x.shape[:2], dtype=query.dtype)], dim=1)  # (B, W + T)
        back = self._back(x.shape[1], x.device)
        allowed = (back >= 0) & (back <= self.reach) & (valid[:, None] > 0.5)  # (B, T, W + T)
        scores = torch.einsum("bthd,bshd->bhts", self._split(query), self._split(keys))
        scores = scores / math.sqrt(self.units // self.heads) + self.bias[:, back.clamp(0, self.reach)]
        weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=-1)  # (B, heads, T, W + T)
        seen = torch.einsum("bhts,bshd->bthd", weights, self._split(values)).flatten(2)
        after = {"keys": keys, "values": values, "valid": valid}
        return self.combine(seen), {key: latest(t, lengths, self.reach) for key, t in after.items()}

    def _back(self, n_steps: int, device: torch.device) -> Tensor:
        """How many steps each key lies behind each query, (T, W + T); negative: ahead of it."""
        steps = torch.arange(n_steps, device=device)
        return steps[:, None] + self.reach - torch.arange(self.reach + n_steps, device=device)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, U) to (B, T, heads, U / heads)."""
        return x.view(*x.shape[:2], self.heads, -1)

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        three = graph.ints(*[self.units] * 3)
        query, key, value = graph.add_many("Split", 3, write_linear(graph, self.project, x), three, axis=2)
        new = {"keys": key, "values": value, "valid": self._write_ones(graph, x)}
        seen = {name: graph.add("Concat", state[name], new[name], axis=1) for name in new}
        back = self._write_back(graph, seen["valid"])
        queries = self._write_split(graph, query, [0, 2, 1, 3])
        scores = graph.add("MatMul", queries, self._write_split(graph, seen["keys"], [0, 2, 3, 1]))
        scores = graph.add("Div", scores, graph.constant(math.sqrt(self.units // self.heads)))
        near = graph.add("Min", graph.add("Max", back, graph.index(0)), graph.index(self.reach))
        bias = graph.add("Gather", graph.constant(self.bias.detach().cpu().numpy()), near, axis=1)
        allowed = self._write_allowed(graph, back, near, seen["valid"])
        scores = graph.add("Where", allowed, scores, graph.constant(-np.inf))
        weights = graph.add("Softmax", graph.add("Add", scores, bias), axis=-1)
        mixed = graph.add("MatMul", weights, self._write_split(graph, seen["values"], [0, 2, 1, 3]))
        joined = graph.add("Reshape", graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), graph.ints(0, 0, self.units))
        y = write_linear(graph, self.combine, joined)
        return y, {name: write_latest(graph, tensor, self.reach) for name, tensor in seen.items()}

    def _write_ones(self, graph: Graph, x: str) -> str:
        """Ones (B, T)."""
        return graph.add("Expand", graph.constant(1.0), graph.add("Shape", x, start=0, end=2))

    def _write_back(self, graph: Graph, valid: str) -> str:
        """`_back` in ONNX."""
        n_seen = graph.add("Squeeze", graph.add("Shape", valid, start=1, end=2), graph.ints(0))
        places = graph.add("Range", graph.index(0), n_seen, graph.index(1))
        queries = graph.add("Add", graph.add("Unsqueeze", graph.steps(), graph.ints(1)), graph.index(self.reach))
        return graph.add("Sub", queries, places)

    def _write_allowed(self, graph: Graph, back: str, near: str, valid: str) -> str:
        """Which keys each query may look at, (B, 1, T, W + T): near enough, not ahead of it, and there at all."""
        there = graph.add("Unsqueeze", graph.add("Greater", valid, graph.constant(0.5)), graph.ints(1, 2))
        return graph.add("And", graph.add("Equal", back, near), there)

    def _write_split(self, graph: Graph, x: str, order: list[int]) -> str:
        """(B, T, U) as (B, T, heads, U / heads), its axes in this order."""
        split = graph.add("Reshape", x, graph.ints(0, 0, self.heads, self.units // self.heads))
        return graph.add("Transpose", split, perm=order)
