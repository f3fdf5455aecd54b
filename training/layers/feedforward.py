"""Layers without memory that act on each step alone."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS, write_activation
from ..graph import Graph
from .base import Layer, LayerState
from .specs import ActivationSpec, DenseSpec, DropoutSpec, EmbeddingSpec, LayerNormSpec
from .weights import initialise


def write_linear(graph: Graph, linear: nn.Linear, x: str) -> str:
    """Add W x + b at every step to a graph."""
    weight = linear.weight.detach().float().cpu().numpy().T
    y = graph.add("MatMul", x, graph.constant(weight))
    return graph.add("Add", y, graph.constant(linear.bias.detach().float().cpu().numpy()))


def write_look_up(graph: Graph, table: nn.Embedding, x: str) -> str:
    """Add a table's vectors (B, T, D) of the tokens x (B, T, 1) to a graph; another number is the nearest token."""
    # Clipped, so that no input whatever can make the look-up fail.
    last = graph.constant(table.num_embeddings - 1)
    nearest = graph.add("Clip", graph.add("Round", x), graph.constant(0.0), last)
    token = graph.add("Squeeze", graph.add("Cast", nearest, to=7), graph.ints(2))
    return graph.add("Gather", graph.constant(table.weight.detach().cpu().numpy()), token, axis=0)


class Dense(Layer):
    """activation(W x + b)."""

    def __init__(self, name: str, spec: DenseSpec, size: int) -> None:
        super().__init__(name)
        self.activation = spec.activation
        self.linear = nn.Linear(size, spec.units)
        initialise(self.linear.weight, spec.weight_init, size, spec.units)
        nn.init.constant_(self.linear.bias, spec.bias)

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        return ACTIVATIONS[self.activation](self.linear(x)), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        return write_activation(graph, self.activation, write_linear(graph, self.linear, x)), {}


class Activation(Layer):
    """An activation alone."""

    def __init__(self, name: str, spec: ActivationSpec) -> None:
        super().__init__(name)
        self.activation = spec.activation

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        return ACTIVATIONS[self.activation](x), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        return write_activation(graph, self.activation, x), {}


class LayerNorm(Layer):
    """Mean 0 and variance 1 over the values of each step, then a gain and a bias (Ba, Kiros and Hinton, 2016)."""

    def __init__(self, name: str, spec: LayerNormSpec, size: int) -> None:
        super().__init__(name)
        self.norm = nn.LayerNorm(size, eps=spec.epsilon)

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        return self.norm(x), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        gain, bias = (graph.constant(p.detach().float().cpu().numpy()) for p in (self.norm.weight, self.norm.bias))
        return graph.add("LayerNormalization", x, gain, bias, axis=-1, epsilon=self.norm.eps), {}


class Dropout(Layer):
    """Zeroes values while training; nothing at all in the exported graph."""

    def __init__(self, name: str, spec: DropoutSpec) -> None:
        super().__init__(name)
        self.p = spec.p

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        return torch.nn.functional.dropout(x, self.p, self.training), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        return x, {}


class Identity(Layer):
    """What is only a name: adapters without work, the many-to-one readout, and vertices, whose inputs are merged."""

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        return x, state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        return x, {}


class Columns(Layer):
    """Some of the values at every step."""

    places: Tensor

    def __init__(self, name: str, places: Sequence[int]) -> None:
        super().__init__(name)
        self.register_buffer("places", torch.tensor(list(places)), persistent=False)

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        return x[..., self.places], state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        return graph.add("Gather", x, graph.ints(*self.places.tolist()), axis=2), {}


class Affine(Layer):
    """factor x + amount: fixed numbers, nothing learns."""

    def __init__(self, name: str, *, factor: float = 1.0, amount: float = 0.0) -> None:
        super().__init__(name)
        self.factor, self.amount = factor, amount

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        return self.factor * x + self.amount, state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        return graph.add("Add", graph.add("Mul", x, graph.constant(self.factor)), graph.constant(self.amount)), {}


class Embedding(Layer):
    """A learned vector for each token; a number that is no token becomes the nearest one."""

    def __init__(self, name: str, spec: EmbeddingSpec) -> None:
        super().__init__(name)
        self.activation, self.vocabulary = spec.activation, spec.vocabulary
        self.table = nn.Embedding(spec.vocabulary, spec.units)

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        token = x[..., 0].round().clamp(0, self.vocabulary - 1).long()
        return ACTIVATIONS[self.activation](self.table(token)), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        return write_activation(graph, self.activation, write_look_up(graph, self.table, x)), {}
