"""Layers around a recurrent layer: both directions, and skipping steps by their values."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ..graph import Graph
from ..masks import Packing, valid_steps
from .base import Layer, LayerState
from .cell_specs import BidirectionalSpec, MaskZeroSpec
from .merging import merge, write_merge
from .sequence import reverse, write_reverse
from .stepwise import Stepwise


class Bidirectional(Layer):
    """Two layers with weights of their own, the second over each row's valid steps in reverse.

    It has no state and cannot be stepped: its answers depend on steps to come. Outputs are concatenated, added,
    multiplied or averaged.
    """

    streaming = False

    def __init__(self, name: str, spec: BidirectionalSpec, forwards: Stepwise, backwards: Stepwise) -> None:
        super().__init__(name)
        self.spec, self.forwards, self.backwards = spec, forwards, backwards

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        zeros = {key: x.new_zeros(x.shape[0], *shape) for key, shape in self.forwards.state_shapes().items()}
        ahead, ahead_state = self.forwards(x, lengths, zeros)
        back, back_state = self.backwards(reverse(x, lengths), lengths, zeros)
        if self.spec.last:  # each direction's last output, the same at every step
            y = merge(self.spec.mode, [ahead_state["h"], back_state["h"]])
            return y[:, None].expand(-1, x.shape[1], -1), state
        return merge(self.spec.mode, [ahead, reverse(back, lengths)]), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        before = {key: graph.zeros(key, shape) for key, shape in self.forwards.state_shapes().items()}
        ahead, ahead_state = self.forwards.write(graph, x, before)
        back, back_state = self.backwards.write(graph, write_reverse(graph, x), before)
        if self.spec.last:
            y = graph.add(
                "Unsqueeze", write_merge(graph, self.spec.mode, [ahead_state["h"], back_state["h"]]), graph.ints(1)
            )
            steps = graph.add("Concat", graph.ints(1), graph.add("Shape", x, start=1, end=2), graph.ints(1), axis=0)
            return graph.add("Expand", y, steps), {}
        return write_merge(graph, self.spec.mode, [ahead, write_reverse(graph, back)]), {}


def _write_gather(graph: Graph, x: str, order: str) -> str:
    """x (B, T, F) with its steps taken in `order` (B, T)."""
    expanded = graph.add("Expand", graph.add("Unsqueeze", order, graph.ints(2)), graph.add("Shape", x))
    return graph.add("GatherElements", x, expanded, axis=1)


class MaskZero(Layer):
    """Runs a recurrent layer over the steps where any input differs from `value`; at the others the state holds.

    The outputs at skipped steps are 0.
    """

    def __init__(self, name: str, spec: MaskZeroSpec, inner: Stepwise) -> None:
        super().__init__(name)
        self.value, self.inner = spec.value, inner

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.inner.state_shapes()

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        present = (x != self.value).any(dim=2)
        if lengths is not None:
            present = present & valid_steps(lengths, x.shape[1])
        packing = Packing.of(present)
        y, state = self.inner(packing.pack(x), packing.lengths, state)
        return packing.unpack(y), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        same = graph.add("Equal", x, graph.constant(self.value))
        differs = graph.add("Cast", graph.add("Not", same), to=1)
        any_differs = graph.add("ReduceMax", differs, axes=[2], keepdims=0)
        present = graph.add("And", graph.add("Greater", any_differs, graph.constant(0.5)), graph.valid())
        n_steps = graph.add("Shape", x, start=1, end=2)
        behind = graph.add("Where", present, graph.index(0), n_steps)
        sortable = graph.add("Cast", graph.add("Add", graph.steps(), behind), to=1)  # present steps first, in order
        _, order = graph.add_many("TopK", 2, sortable, n_steps, axis=1, largest=0, sorted=1)
        count = graph.add("ReduceSum", graph.add("Cast", present, to=6), graph.ints(1), keepdims=0)
        with graph.lengths_are(count):
            y, after = self.inner.write(graph, _write_gather(graph, x, order), state)
            y = graph.add("Where", graph.add("Unsqueeze", graph.valid(), graph.ints(2)), y, graph.constant(0.0))
        places = graph.add("Expand", graph.add("Unsqueeze", order, graph.ints(2)), graph.add("Shape", y))
        zeros = graph.add("Mul", y, graph.constant(np.float32(0)))
        return graph.add("ScatterElements", zeros, places, y, axis=1), after
