"""The recurrent cells: their formulas, and what their ONNX nodes want."""

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import ACTIVATIONS, write_activation
from ..graph import Graph
from .cell_specs import GravesLstmSpec, GruSpec, LstmSpec, SlstmSpec
from .peephole import PeepholeLstm
from .recurrent import AnyCellSpec, Recurrent
from .stepwise import CellState, behind_last
from .weights import initialise


class SimpleRnn(Recurrent):
    """h_t = a(W x_t + R h_{t-1} + b)."""

    NODE, KERNEL = "RNN", nn.RNN

    def _initialise(self, spec: AnyCellSpec, size: int) -> None:
        super()._initialise(spec, size)
        self.bias_hh.requires_grad_(False)  # one bias, as DL4J: two would learn twice as fast

    def step(self, projected: Tensor, state: CellState) -> CellState:
        return (ACTIVATIONS[self.activation](projected + self.project_state(state[0])),)

    def write_step(self, graph: Graph, projected: str, state: list[str]) -> list[str]:
        total = graph.add("Add", projected, self.write_recurrent(graph, state[0]))
        return [write_activation(graph, self.activation, total)]


class Lstm(Recurrent):
    """i, f, o = s(W x_t + R h_{t-1} + b), g = a(...), c_t = f c_{t-1} + i g, h_t = o a(c_t)."""

    KEYS: ClassVar[tuple[str, ...]] = ("h", "c")
    GATES, NODE, ORDER, KERNEL = 4, "LSTM", (0, 3, 1, 2), nn.LSTM

    def _initialise(self, spec: AnyCellSpec, size: int) -> None:
        super()._initialise(spec, size)
        assert isinstance(spec, LstmSpec | GravesLstmSpec | SlstmSpec)
        self.bias_ih.data[self.units : 2 * self.units] = spec.forget_bias
        self.bias_hh.requires_grad_(False)

    def step(self, projected: Tensor, state: CellState) -> CellState:
        h, c = state
        a, s = ACTIVATIONS[self.activation], ACTIVATIONS[self.gate_activation]
        i, f, g, o = (projected + self.project_state(h)).chunk(4, dim=1)
        c = s(f) * c + s(i) * a(g)
        return s(o) * a(c), c

    def write_step(self, graph: Graph, projected: str, state: list[str]) -> list[str]:
        return self._write_gates(graph, projected, state)

    def _write_gates(self, graph: Graph, projected: str, state: list[str]) -> list[str]:
        total = graph.add("Add", projected, self.write_recurrent(graph, state[0]))
        i, f, g, o = graph.add_many("Split", 4, total, graph.ints(*[self.units] * 4), axis=1)
        i, f = self._write_peep(graph, i, state[1], 0), self._write_peep(graph, f, state[1], 2)
        i, f = (write_activation(graph, self.gate_activation, gate) for gate in (i, f))
        g = write_activation(graph, self.activation, g)
        c = graph.add("Add", graph.add("Mul", f, state[1]), graph.add("Mul", i, g))
        o = write_activation(graph, self.gate_activation, self._write_peep(graph, o, c, 1))
        return [graph.add("Mul", o, write_activation(graph, self.activation, c)), c]

    def _write_peep(self, graph: Graph, gate: str, cell: str, which: int) -> str:
        """A gate that also sees a cell state; here it does not."""
        return gate

    def node_activations(self) -> list[str]:
        return [self.gate_activation, self.activation, self.activation]


class GravesLstm(Lstm):
    """LSTM with diagonal peepholes: i and f see c_{t-1}, o sees c_t."""

    def __init__(self, name: str, spec: GravesLstmSpec, size: int) -> None:
        super().__init__(name, spec, size)
        self.peephole = nn.Parameter(torch.empty(3, spec.units))  # i, o, f: ONNX's order
        initialise(self.peephole.detach(), "xavier_uniform", spec.units, spec.units)

    def unroll(self, x: Tensor, lengths: Tensor | None, before: CellState) -> tuple[Tensor, CellState]:
        if not self.standard:
            return self._loop(x, lengths, before)
        # Under autocast the projection is narrow; the loop is not.
        projected = self.project_input(x.transpose(0, 1)).to(self.bias_hh.dtype) + self.bias_hh
        hs, cs = PeepholeLstm.apply(projected, *before, self.weight_hh, self.peephole)  # type: ignore[no-untyped-call]
        states = hs.transpose(0, 1), cs.transpose(0, 1)
        return states[0], behind_last(states, lengths)

    def step(self, projected: Tensor, state: CellState) -> CellState:
        h, c = state
        a, s = ACTIVATIONS[self.activation], ACTIVATIONS[self.gate_activation]
        to_i, to_o, to_f = self.peephole
        i, f, g, o = (projected + self.project_state(h)).chunk(4, dim=1)
        c = s(f + to_f * c) * c + s(i + to_i * c) * a(g)
        return s(o + to_o * c) * a(c), c

    def _write_peep(self, graph: Graph, gate: str, cell: str, which: int) -> str:
        peephole = graph.constant(self.peephole[which].detach().cpu().numpy())
        return graph.add("Add", gate, graph.add("Mul", cell, peephole))

    def node_extras(self, graph: Graph) -> list[str]:
        return [graph.constant(self.peephole.detach().cpu().numpy().reshape(1, -1))]


class Gru(Recurrent):
    """r, z = s(W x_t + R h_{t-1} + b), n = a(W x_t + b + r (R h_{t-1} + b')), h_t = (1 - z) n + z h_{t-1}.

    Without `reset_after` the candidate is n = a(W x_t + b + R (r h_{t-1}) + b'), as first published (Cho et al. 2014).
    """

    GATES, NODE, ORDER, KERNEL = 3, "GRU", (1, 0, 2), nn.GRU

    def __init__(self, name: str, spec: GruSpec, size: int) -> None:
        super().__init__(name, spec, size)
        self.reset_after = spec.reset_after

    @property
    def standard(self) -> bool:
        return super().standard and self.reset_after

    def step(self, projected: Tensor, state: CellState) -> CellState:
        (h,) = state
        a, s = ACTIVATIONS[self.activation], ACTIVATIONS[self.gate_activation]
        r, z, n = projected.chunk(3, dim=1)
        recurrent_r, recurrent_z, recurrent_n = self.project_state(h).chunk(3, dim=1)
        r, z = s(r + recurrent_r), s(z + recurrent_z)
        if self.reset_after:
            n = a(n + r * recurrent_n)
        else:
            n = a(n + F.linear(r * h, self.weight_hh[2 * self.units :], self.bias_hh[2 * self.units :]))
        return (n + z * (h - n),)

    def write_step(self, graph: Graph, projected: str, state: list[str]) -> list[str]:
        (h,) = state
        sizes = graph.ints(*[self.units] * 3)
        r, z, n = graph.add_many("Split", 3, projected, sizes, axis=1)
        recurrent = graph.add_many("Split", 3, self.write_recurrent(graph, h), sizes, axis=1)
        r = write_activation(graph, self.gate_activation, graph.add("Add", r, recurrent[0]))
        z = write_activation(graph, self.gate_activation, graph.add("Add", z, recurrent[1]))
        if self.reset_after:
            product = graph.add("Mul", r, recurrent[2])
        else:
            weight, bias = (w[2 * self.units :].detach().cpu().numpy() for w in (self.weight_hh, self.bias_hh))
            product = graph.add("MatMul", graph.add("Mul", r, h), graph.constant(weight.T))
            product = graph.add("Add", product, graph.constant(bias))
        n = write_activation(graph, self.activation, graph.add("Add", n, product))
        return [graph.add("Add", n, graph.add("Mul", z, graph.add("Sub", h, n)))]

    def node_activations(self) -> list[str]:
        return [self.gate_activation, self.activation]

    def node_attributes(self) -> dict[str, Any]:
        return {**super().node_attributes(), "linear_before_reset": int(self.reset_after)}


class Slstm(Lstm):
    """LSTM with an exponential input gate, a normaliser n and a stabiliser m: xLSTM's sLSTM, with one head.

    Beck et al., "xLSTM: Extended Long Short-Term Memory" (2024), equations 8 to 17, with a sigmoid forget gate:
    m_t = max(log s(f) + m_{t-1}, i), i' = exp(i - m_t), f' = exp(log s(f) + m_{t-1} - m_t),
    c_t = f' c_{t-1} + i' a(z), n_t = f' n_{t-1} + i', h_t = s(o) c_t / n_t.

    All states begin as zeros. n is at least 1 behind the first step, so n of 0 tells a sequence that has not begun; its
    first step forgets everything: m = i.
    """

    KEYS = ("h", "c", "n", "m")

    @property
    def standard(self) -> bool:
        return False

    @property
    def one_node(self) -> bool:
        return False

    def step(self, projected: Tensor, state: CellState) -> CellState:
        h, c, n, m = state
        i, f, z, o = (projected + self.project_state(h)).chunk(4, dim=1)
        kept = torch.where(n > 0, F.logsigmoid(f) + m, -torch.inf)
        m = torch.maximum(kept, i)
        f, i = torch.exp(kept - m), torch.exp(i - m)
        c, n = f * c + i * ACTIVATIONS[self.activation](z), f * n + i
        return torch.sigmoid(o) * c / n, c, n, m

    def write_step(self, graph: Graph, projected: str, state: list[str]) -> list[str]:
        h, c, n, m = state
        total = graph.add("Add", projected, self.write_recurrent(graph, h))
        i, f, z, o = graph.add_many("Split", 4, total, graph.ints(*[self.units] * 4), axis=1)
        begun = graph.add("Greater", n, graph.constant(0.0))
        kept = graph.add("Sub", m, graph.add("Softplus", graph.add("Neg", f)))
        kept = graph.add("Where", begun, kept, graph.constant(-np.inf))
        m = graph.add("Max", kept, i)
        f, i = (graph.add("Exp", graph.add("Sub", gate, m)) for gate in (kept, i))
        z = write_activation(graph, self.activation, z)
        c = graph.add("Add", graph.add("Mul", f, c), graph.add("Mul", i, z))
        n = graph.add("Add", graph.add("Mul", f, n), i)
        return [graph.add("Mul", graph.add("Sigmoid", o), graph.add("Div", c, n)), c, n, m]
