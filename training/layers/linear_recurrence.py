"""Recurrences that are linear in their state, with gates of the input alone: h_t = decay_t h_{t-1} + drive_t.

Gates and candidates of all steps are products made at once; what is left of the loop is one multiplication and one
addition per value. Decays lie between 0 and 1, so products of them vanish but never overflow: no logarithms are needed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import ACTIVATIONS, write_activation
from ..graph import Graph
from .cell_specs import MinGruSpec, RgLruSpec
from .feedforward import write_linear
from .stepwise import CellState, Stepwise, behind_last
from .weights import initialise

SHARPNESS = 8.0  # Griffin's c


class LinearScan(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + drive_t, forwards and backwards by hand.

    Call `apply(decay, drive, h)` with (B, T, H), (B, T, H), (B, H); it returns h of every step, (B, T, H).
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor, h: Tensor) -> Tensor:
        hs = drive.new_empty(drive.shape[0], drive.shape[1] + 1, drive.shape[2])
        hs[:, 0] = h
        for a, b, h0, h1 in zip(*(s.unbind(1) for s in (decay, drive, hs[:, :-1], hs[:, 1:])), strict=True):
            torch.addcmul(b, a, h0, out=h1)
        ctx.save_for_backward(decay, hs)
        return hs[:, 1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, hs = ctx.saved_tensors
        slopes = grad.clone(memory_format=torch.contiguous_format)  # of the loss by each h_t
        behind = zip(*(s.unbind(1)[::-1] for s in (slopes[:, :-1], slopes[:, 1:], decay[:, 1:])), strict=True)
        for now, after, a in behind:
            now.addcmul_(a, after)
        return slopes * hs[:, :-1], slopes, slopes[:, 0] * decay[:, 0]


class LinearRecurrence(Stepwise):
    """Subclasses say what decays and what is added."""

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """decay and drive of every step, (B, T, H) each, of the inputs (B, T, F)."""
        raise NotImplementedError

    def write_coefficients(self, graph: Graph, x: str) -> tuple[str, str]:
        """`coefficients` in ONNX."""
        raise NotImplementedError

    def unroll(self, x: Tensor, lengths: Tensor | None, before: CellState) -> tuple[Tensor, CellState]:
        (h,) = before
        decay, drive = (c.to(h.dtype) for c in self.coefficients(x))  # narrow under autocast; the loop is not
        hs: Tensor = LinearScan.apply(decay, drive, h)  # type: ignore[no-untyped-call]
        return hs, behind_last((hs,), lengths)

    def write_unroll(self, graph: Graph, x: str, before: list[str]) -> tuple[str, list[str]]:
        valid = graph.add("Unsqueeze", graph.valid(), graph.ints(2))  # (B, T, 1)
        decay, drive = self.write_coefficients(graph, x)
        decay = graph.add("Where", valid, decay, graph.constant(1.0))
        drive = graph.add("Where", valid, drive, graph.constant(0.0))
        after, y = graph.scan(
            before, [decay, drive], lambda h, s: [graph.add("Add", graph.add("Mul", s[0], h[0]), s[1])]
        )
        return y, after


class MinGru(LinearRecurrence):
    """z = s(W x_t + b), h_t = (1 - z) h_{t-1} + z a(V x_t + d).

    Feng et al., "Were RNNs All We Needed?" (2024), section 3.1.
    """

    def __init__(self, name: str, spec: MinGruSpec, size: int) -> None:
        super().__init__(name)
        self.units, self.activation = spec.units, spec.activation
        self.linear = nn.Linear(size, 2 * spec.units)  # gate, candidate
        for block in self.linear.weight.detach().chunk(2):
            initialise(block, spec.weight_init, size, spec.units)
        nn.init.zeros_(self.linear.bias)

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, candidate = self.linear(x).chunk(2, dim=-1)
        return torch.sigmoid(-gate), torch.sigmoid(gate) * ACTIVATIONS[self.activation](candidate)

    def write_coefficients(self, graph: Graph, x: str) -> tuple[str, str]:
        both = write_linear(graph, self.linear, x)
        gate, candidate = graph.add_many("Split", 2, both, graph.ints(self.units, self.units), axis=2)
        candidate = write_activation(graph, self.activation, candidate)
        decay = graph.add("Sigmoid", graph.add("Neg", gate))
        return decay, graph.add("Mul", graph.add("Sigmoid", gate), candidate)


class RgLru(LinearRecurrence):
    """u_t = W x_t + b, r, i = s(V u_t + d), a_t = s(L)^(8 r), h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i u_t).

    De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention" (2024), section 2.4. L begins where
    s(L)^8 is spread evenly from 0.9 to 0.999.
    """

    def __init__(self, name: str, spec: RgLruSpec, size: int) -> None:
        super().__init__(name)
        self.units = spec.units
        self.linear = nn.Linear(size, spec.units)
        self.gates = nn.Linear(spec.units, 2 * spec.units)  # recurrence, input
        initialise(self.linear.weight, spec.weight_init, size, spec.units)
        for block in self.gates.weight.detach().chunk(2):
            initialise(block, spec.weight_init, spec.units, spec.units)
        nn.init.zeros_(self.linear.bias)
        nn.init.zeros_(self.gates.bias)
        self.memory = nn.Parameter(torch.logit(torch.empty(spec.units).uniform_(0.9, 0.999) ** (1 / SHARPNESS)))

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = self.linear(x)
        r, i = torch.sigmoid(self.gates(u)).chunk(2, dim=-1)
        fade = SHARPNESS * F.softplus(-self.memory) * r  # -log a
        # 1 - a^2 without cancellation: with w = tanh(-log a) it is 2 w / (1 + w). Below 1e-6 its root has no slope.
        w = torch.tanh(fade)
        return torch.exp(-fade), torch.sqrt((2 * w / (1 + w)).clamp(min=1e-6)) * i * u

    def write_coefficients(self, graph: Graph, x: str) -> tuple[str, str]:
        u = write_linear(graph, self.linear, x)
        gates = graph.add("Sigmoid", write_linear(graph, self.gates, u))
        r, i = graph.add_many("Split", 2, gates, graph.ints(self.units, self.units), axis=2)
        rate = SHARPNESS * F.softplus(-self.memory.detach().double())
        fade = graph.add("Mul", r, graph.constant(rate.cpu().numpy()))
        w = graph.add("Tanh", fade)
        power = graph.add("Div", graph.add("Add", w, w), graph.add("Add", w, graph.constant(1.0)))
        gain = graph.add("Sqrt", graph.add("Max", power, graph.constant(1e-6)))
        return graph.add("Exp", graph.add("Neg", fade)), graph.add("Mul", graph.add("Mul", gain, i), u)
