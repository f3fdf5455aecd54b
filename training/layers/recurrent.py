"""Recurrent layers: what they share, and the four kinds.

Parameters lie as torch.nn.LSTM, GRU and RNN have them, so that the fast kernels run wherever the configuration is one
they know (tanh and sigmoid, no peepholes, no layer norm); everything else runs the same parameters through a loop over
time. In ONNX a layer is one LSTM, GRU or RNN node.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..activations import ACTIVATIONS, RECURRENT_NODES
from ..graph import Graph
from .base import Layer, LayerState, keep, valid_steps
from .specs import GravesLstmSpec, GruSpec, LstmSpec, SimpleRnnSpec
from .weights import initialise


class Recurrent(Layer):
    """A cell run over time. Subclasses give the cell's formula and its ONNX node.

    Class attributes:
        KEYS: The state's keys, `h` first.
        GATES: Blocks of H rows in the weights, in torch's order.
        NODE: The ONNX operator.
        ORDER: For each of the operator's gate blocks the number of torch's block.
        KERNEL: The torch module that holds the parameters and runs the standard configuration.
    """

    KEYS: ClassVar[tuple[str, ...]] = ("h",)
    GATES: ClassVar[int] = 1
    NODE: ClassVar[str]
    ORDER: ClassVar[tuple[int, ...]] = (0,)
    KERNEL: ClassVar[type[nn.RNNBase]]

    def __init__(self, name: str, spec: "SimpleRnnSpec | LstmSpec | GravesLstmSpec | GruSpec", size: int) -> None:
        super().__init__(name)
        self.spec, self.units = spec, spec.units
        self.kernel = self.KERNEL(size, spec.units, batch_first=True)
        self._initialise(size)

    def _initialise(self, size: int) -> None:
        hidden = self.units
        # DL4J's rule for gated cells: fan-in H, fan-out F + H, for both matrices; blocks of one gate at a time.
        for weight, how in (
            (self.kernel.weight_ih_l0, self.spec.weight_init),
            (self.kernel.weight_hh_l0, self.spec.recurrent_init),
        ):
            for block in weight.detach().chunk(self.GATES):
                initialise(block, how, size if weight is self.kernel.weight_ih_l0 else hidden, hidden)
        nn.init.zeros_(self.kernel.bias_ih_l0)
        nn.init.zeros_(self.kernel.bias_hh_l0)

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {key: (self.units,) for key in self.KEYS}

    @property
    def standard(self) -> bool:
        """Does torch have a kernel for this configuration?"""
        gate = getattr(self.spec, "gate_activation", "sigmoid")
        return self.spec.activation == "tanh" and gate == "sigmoid" and not self.spec.layer_norm

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        before = tuple(state[key] for key in self.KEYS)
        y, after = self._kernel(x, lengths, before) if self.standard else self._loop(x, lengths, before)
        return y, dict(zip(self.KEYS, after, strict=True))

    def _kernel(self, x: Tensor, lengths: Tensor | None, before: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """torch's own kernel, over packed sequences if rows differ in length."""
        initial: Any = tuple(s[None].contiguous() for s in before)
        initial = initial if len(initial) > 1 else initial[0]
        if lengths is None:
            y, final = self.kernel(x, initial)
        else:  # a packed sequence has no row of length 0: those run one step, which is then taken back
            packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
            packed, final = self.kernel(packed, initial)
            y, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
            y = torch.where(valid_steps(lengths, x.shape[1])[..., None], y, 0.0)
        finals = final if isinstance(final, tuple) else (final,)
        return y, tuple(keep(lengths, new[0], old) for new, old in zip(finals, before, strict=True))

    def _loop(self, x: Tensor, lengths: Tensor | None, before: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The cell's formula, step by step; the input's part of all steps is one product."""
        projected = self.project_input(x)
        alive = None if lengths is None else valid_steps(lengths, x.shape[1])
        state, outputs = before, []
        for t in range(x.shape[1]):
            new = self.step(projected[:, t], state)
            if alive is not None:
                new = tuple(torch.where(alive[:, t, None], n, o) for n, o in zip(new, state, strict=True))
            state = new
            outputs.append(state[0])
        return torch.stack(outputs, dim=1), state

    def project_input(self, x: Tensor) -> Tensor:
        """The part of the gates that comes from the input, (B, T, gates * H)."""
        return nn.functional.linear(x, self.kernel.weight_ih_l0, self.kernel.bias_ih_l0)

    def project_state(self, h: Tensor) -> Tensor:
        """The part of the gates that comes from the hidden state, (B, gates * H)."""
        return nn.functional.linear(h, self.kernel.weight_hh_l0, self.kernel.bias_hh_l0)

    def step(self, projected: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step: the input's part of the gates (B, gates * H) and the state, to the new state."""
        raise NotImplementedError

    def activations(self) -> list[str]:
        """Names for the ONNX node's `activations`, in the operator's order."""
        return [self.spec.activation]

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        one, zero = graph.ints(1), graph.ints(0)
        before = [graph.add("Unsqueeze", state[key], zero) for key in self.KEYS]  # (1, B, H)
        weights = [graph.constant(a) for a in self._onnx_weights()]
        inputs = [graph.add("Transpose", x, perm=[1, 0, 2]), *weights, graph.lengths, *before, *self._onnx_extra(graph)]
        y, *finals = graph.add_many(self.NODE, 1 + len(self.KEYS), *inputs, **self._onnx_attributes())
        y = graph.add("Transpose", graph.add("Squeeze", y, one), perm=[1, 0, 2])  # (T, 1, B, H) to (B, T, H)
        # onnxruntime gives a row of length 0 a zero state, not the one that went in.
        after = [graph.keep(graph.add("Squeeze", f, zero), state[k]) for f, k in zip(finals, self.KEYS, strict=True)]
        return y, dict(zip(self.KEYS, after, strict=True))

    def _onnx_weights(self) -> list[NDArray[np.float32]]:
        """W, R and B with the leading axis of directions, gate blocks in the operator's order."""
        kernel = self.kernel
        weights = [self._reordered(w)[None] for w in (kernel.weight_ih_l0, kernel.weight_hh_l0)]
        bias = np.concatenate([self._reordered(kernel.bias_ih_l0), self._reordered(kernel.bias_hh_l0)])[None]
        return [*weights, bias]

    def _reordered(self, weight: Tensor) -> NDArray[np.float32]:
        blocks = weight.detach().float().cpu().chunk(self.GATES)
        return torch.cat([blocks[i] for i in self.ORDER]).numpy()

    def _onnx_extra(self, graph: Graph) -> list[str]:
        return []

    def _onnx_attributes(self) -> dict[str, Any]:
        nodes = [RECURRENT_NODES[name] for name in self.activations()]
        attributes: dict[str, Any] = {"hidden_size": self.units, "activations": [name for name, _, _ in nodes]}
        if any(alpha or beta for _, alpha, beta in nodes):
            attributes["activation_alpha"] = [alpha for _, alpha, _ in nodes]
            attributes["activation_beta"] = [beta for _, _, beta in nodes]
        return attributes


class SimpleRnn(Recurrent):
    """h_t = a(W x_t + R h_{t-1} + b)."""

    NODE, KERNEL = "RNN", nn.RNN

    def step(self, projected: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (ACTIVATIONS[self.spec.activation](projected + self.project_state(state[0])),)


class Lstm(Recurrent):
    """i, f, o = s(W x_t + R h_{t-1} + b), g = a(...), c_t = f c_{t-1} + i g, h_t = o a(c_t)."""

    KEYS, GATES, NODE, ORDER, KERNEL = ("h", "c"), 4, "LSTM", (0, 3, 1, 2), nn.LSTM
    spec: LstmSpec | GravesLstmSpec

    def _initialise(self, size: int) -> None:
        super()._initialise(size)
        self.kernel.bias_ih_l0.data[self.units : 2 * self.units] = self.spec.forget_bias
        self.kernel.bias_hh_l0.requires_grad_(False)  # one bias, as DL4J: two would learn twice as fast

    def step(self, projected: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = state
        a, s = ACTIVATIONS[self.spec.activation], ACTIVATIONS[self.spec.gate_activation]
        i, f, g, o = (projected + self.project_state(h)).chunk(4, dim=1)
        c = s(f) * c + s(i) * a(g)
        return s(o) * a(c), c

    def activations(self) -> list[str]:
        return [self.spec.gate_activation, self.spec.activation, self.spec.activation]


class GravesLstm(Lstm):
    """LSTM with diagonal peepholes: i and f see c_{t-1}, o sees c_t."""

    spec: GravesLstmSpec

    def __init__(self, name: str, spec: GravesLstmSpec, size: int) -> None:
        super().__init__(name, spec, size)
        self.peephole = nn.Parameter(torch.empty(3, spec.units))  # i, o, f: ONNX's order
        initialise(self.peephole.detach(), "xavier_uniform", spec.units, spec.units)

    @property
    def standard(self) -> bool:
        return False

    def step(self, projected: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = state
        a, s = ACTIVATIONS[self.spec.activation], ACTIVATIONS[self.spec.gate_activation]
        to_i, to_o, to_f = self.peephole
        i, f, g, o = (projected + self.project_state(h)).chunk(4, dim=1)
        c = s(f + to_f * c) * c + s(i + to_i * c) * a(g)
        return s(o + to_o * c) * a(c), c

    def _onnx_extra(self, graph: Graph) -> list[str]:
        return [graph.constant(self.peephole.detach().cpu().numpy().reshape(1, -1))]


class Gru(Recurrent):
    """r, z = s(W x_t + R h_{t-1} + b), n = a(W x_t + b + r (R h_{t-1} + b')), h_t = (1 - z) n + z h_{t-1}."""

    GATES, NODE, ORDER, KERNEL = 3, "GRU", (1, 0, 2), nn.GRU
    spec: GruSpec

    def step(self, projected: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = state
        a, s = ACTIVATIONS[self.spec.activation], ACTIVATIONS[self.spec.gate_activation]
        r, z, n = projected.chunk(3, dim=1)
        recurrent_r, recurrent_z, recurrent_n = self.project_state(h).chunk(3, dim=1)
        r, z = s(r + recurrent_r), s(z + recurrent_z)
        n = a(n + r * recurrent_n)
        return (n + z * (h - n),)

    def activations(self) -> list[str]:
        return [self.spec.gate_activation, self.spec.activation]

    def _onnx_attributes(self) -> dict[str, Any]:
        return {**super()._onnx_attributes(), "linear_before_reset": 1}
