"""What the recurrent layers share: how a cell is run over time, in torch and in ONNX. The cells are in cells.py.

Parameters lie as torch.nn.LSTM, GRU and RNN have them, so that the fast kernels run wherever the configuration is one
they know (tanh and sigmoid, no peepholes, no layer norm); everything else runs the same parameters through a loop over
time. In ONNX a layer is one LSTM, GRU or RNN node; only what these nodes do not know (layer norm, rare activations)
is a Scan.
"""

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..activations import RECURRENT_NODES
from ..graph import Graph
from .cell_specs import GravesLstmSpec, GruSpec, LstmSpec, SimpleRnnSpec, SlstmSpec
from .stepwise import CellState, Stepwise, behind_last
from .weights import initialise

AnyCellSpec = SimpleRnnSpec | LstmSpec | GravesLstmSpec | GruSpec | SlstmSpec
EPSILON = 1e-5  # of layer norm


class Recurrent(Stepwise):
    """A cell run over time. Subclasses give the cell's formula and its ONNX node.

    Class attributes:
        GATES: Blocks of H rows in the weights, in torch's order.
        NODE: The ONNX operator.
        ORDER: For each of the operator's gate blocks the number of torch's block.
        KERNEL: The torch module that holds the parameters and runs the standard configuration.
    """

    GATES: ClassVar[int] = 1
    NODE: ClassVar[str]
    ORDER: ClassVar[tuple[int, ...]] = (0,)
    KERNEL: ClassVar[type[nn.RNN] | type[nn.LSTM] | type[nn.GRU]]

    def __init__(self, name: str, spec: AnyCellSpec, size: int) -> None:
        super().__init__(name)
        self.activation, self.units = spec.activation, spec.units
        self.gate_activation = "sigmoid" if isinstance(spec, SimpleRnnSpec | SlstmSpec) else spec.gate_activation
        self.kernel = self.KERNEL(size, spec.units, batch_first=True)
        self.gains: nn.Parameter | None = None
        if spec.layer_norm:  # of the input's part and of the state's part
            self.gains = nn.Parameter(torch.ones(2, self.GATES * spec.units))
        self._initialise(spec, size)

    def _initialise(self, spec: AnyCellSpec, size: int) -> None:
        for block in self.weight_ih.detach().chunk(self.GATES):
            initialise(block, spec.weight_init, size, self.units)
        for block in self.weight_hh.detach().chunk(self.GATES):
            initialise(block, spec.recurrent_init, self.units, self.units)
        nn.init.zeros_(self.bias_ih)
        nn.init.zeros_(self.bias_hh)

    @property
    def weight_ih(self) -> Tensor:
        """(gates * H, F)."""
        return self.kernel.weight_ih_l0  # type: ignore[return-value]

    @property
    def weight_hh(self) -> Tensor:
        """(gates * H, H)."""
        return self.kernel.weight_hh_l0  # type: ignore[return-value]

    @property
    def bias_ih(self) -> Tensor:
        """(gates * H,)."""
        return self.kernel.bias_ih_l0  # type: ignore[return-value]

    @property
    def bias_hh(self) -> Tensor:
        """(gates * H,); learns only where it is not the same as bias_ih."""
        return self.kernel.bias_hh_l0  # type: ignore[return-value]

    @property
    def standard(self) -> bool:
        """Does torch have a kernel for this configuration?"""
        return self.activation == "tanh" and self.gate_activation == "sigmoid" and self.gains is None

    @property
    def one_node(self) -> bool:
        """Does ONNX have a node for this configuration?"""
        return self.gains is None and {self.activation, self.gate_activation} <= RECURRENT_NODES.keys()

    def unroll(self, x: Tensor, lengths: Tensor | None, before: CellState) -> tuple[Tensor, CellState]:
        return self._kernel(x, lengths, before) if self.standard else self._loop(x, lengths, before)

    def _kernel(self, x: Tensor, lengths: Tensor | None, before: CellState) -> tuple[Tensor, CellState]:
        """torch's own kernel, over packed sequences if rows differ in length."""
        initial: Any = tuple(s[None].contiguous() for s in before)
        initial = initial if len(initial) > 1 else initial[0]
        if lengths is None:
            y, final = self.kernel(x, initial)
        else:  # a packed sequence has no row of length 0: such a row runs one step, which the caller takes back
            packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
            packed, final = self.kernel(packed, initial)
            y, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        finals = final if isinstance(final, tuple) else (final,)
        return y, tuple(f[0] for f in finals)

    def _loop(self, x: Tensor, lengths: Tensor | None, before: CellState) -> tuple[Tensor, CellState]:
        """The cell's formula, step by step; the input's part of all steps is one product."""
        state, states = before, []
        for projected in self.project_input(x).unbind(1):
            state = self.step(projected, state)
            states.append(state)
        stacked = tuple(torch.stack(each, dim=1) for each in zip(*states, strict=True))
        return stacked[0], behind_last(stacked, lengths)

    def project_input(self, x: Tensor) -> Tensor:
        """The part of the gates that comes from the input, (B, T, gates * H)."""
        if self.gains is None:
            return F.linear(x, self.weight_ih, self.bias_ih)
        product = F.linear(x, self.weight_ih)
        return F.layer_norm(product, product.shape[-1:], self.gains[0], eps=EPSILON) + self.bias_ih

    def project_state(self, h: Tensor) -> Tensor:
        """The part of the gates that comes from the hidden state, (B, gates * H)."""
        if self.gains is None:
            return F.linear(h, self.weight_hh, self.bias_hh)
        product = F.linear(h, self.weight_hh)
        return F.layer_norm(product, product.shape[-1:], self.gains[1], eps=EPSILON) + self.bias_hh

    def step(self, projected: Tensor, state: CellState) -> CellState:
        """One step: the input's part of the gates (B, gates * H) and the state, to the new state."""
        raise NotImplementedError

    def write_step(self, graph: Graph, projected: str, state: list[str]) -> list[str]:
        """`step` in ONNX."""
        raise NotImplementedError

    def node_activations(self) -> list[str]:
        """Names for the ONNX node's `activations`, in the operator's order."""
        return [self.activation]

    def node_extras(self, graph: Graph) -> list[str]:
        """Inputs of the ONNX node behind the states."""
        return []

    def write_unroll(self, graph: Graph, x: str, before: list[str]) -> tuple[str, list[str]]:
        # onnxruntime's nodes give a row of length 0 a zero state, not the one that went in; the caller takes it back.
        return self._write_node(graph, x, before) if self.one_node else self._write_scan(graph, x, before)

    def _write_node(self, graph: Graph, x: str, before: list[str]) -> tuple[str, list[str]]:
        one, zero = graph.ints(1), graph.ints(0)
        states = [graph.add("Unsqueeze", state, zero) for state in before]  # (1, B, H)
        weights = [graph.constant(a) for a in self._node_weights()]
        inputs = [graph.add("Transpose", x, perm=[1, 0, 2]), *weights, graph.lengths, *states]
        outputs = 1 + len(self.KEYS)
        y, *finals = graph.add_many(self.NODE, outputs, *inputs, *self.node_extras(graph), **self.node_attributes())
        y = graph.add("Transpose", graph.add("Squeeze", y, one), perm=[1, 0, 2])  # (T, 1, B, H) to (B, T, H)
        return y, [graph.add("Squeeze", final, zero) for final in finals]

    def _node_weights(self) -> list[NDArray[np.float32]]:
        """W, R and B with the leading axis of directions, gate blocks in the operator's order."""
        weights = [self._reordered(w)[None] for w in (self.weight_ih, self.weight_hh)]
        return [
            *weights,
            np.concatenate([self._reordered(self.bias_ih), self._reordered(self.bias_hh)])[None],
        ]

    def _reordered(self, weight: Tensor) -> NDArray[np.float32]:
        blocks = weight.detach().float().cpu().chunk(self.GATES)
        return np.asarray(torch.cat([blocks[i] for i in self.ORDER]).numpy())

    def node_attributes(self) -> dict[str, Any]:
        """Attributes of the ONNX node; alpha and beta are listed only for activations that have them."""
        nodes = [RECURRENT_NODES[name] for name in self.node_activations()]
        attributes: dict[str, Any] = {"hidden_size": self.units, "activations": [n for n, _, _ in nodes]}
        for key, values in (("alpha", [a for _, a, _ in nodes]), ("beta", [b for _, _, b in nodes])):
            if given := [v for v in values if v is not None]:
                attributes[f"activation_{key}"] = given
        return attributes

    def _write_scan(self, graph: Graph, x: str, before: list[str]) -> tuple[str, list[str]]:
        projected = self._write_projection(graph, x, self.weight_ih, self.bias_ih, 0)
        alive = graph.add("Cast", graph.add("Unsqueeze", graph.valid(), graph.ints(2)), to=1)  # (B, T, 1)

        def body(states: list[str], slices: list[str]) -> list[str]:
            there = graph.add("Greater", slices[1], graph.constant(0.5))
            new = self.write_step(graph, slices[0], states)
            return [graph.add("Where", there, n, o) for n, o in zip(new, states, strict=True)]

        after, y = graph.scan(before, [projected, alive], body)
        return y, after

    def write_recurrent(self, graph: Graph, h: str) -> str:
        """`project_state` in ONNX."""
        return self._write_projection(graph, h, self.weight_hh, self.bias_hh, 1)

    def _write_projection(self, graph: Graph, x: str, weight: Tensor, bias: Tensor, part: int) -> str:
        y = graph.add("MatMul", x, graph.constant(weight.detach().cpu().numpy().T))
        if self.gains is not None:
            gain = graph.constant(self.gains[part].detach().cpu().numpy())
            y = graph.add("LayerNormalization", y, gain, axis=-1, epsilon=EPSILON)
        return graph.add("Add", y, graph.constant(bias.detach().cpu().numpy()))
