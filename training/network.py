"""The whole network: readings in, answers out, state carried in the open."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Output

from .data.source import Source
from .graph import Graph
from .layers import build
from .layers.base import Layer, LayerState, State
from .layers.observed import Observed
from .layers.output import Head
from .layers.specs import IllegalStack, LayerSpec, RnnLossSpec, RnnOutputSpec, Shape
from .layers.stack import IllegalLayer, place, token_reader
from .masks import MaskedSteps, moves_of


class Network(nn.Module):
    """A stack of layers between `Observed` and `Head`.

    Values are raw on both sides: normalisation is part of the network, as it is part of the exported graph.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        features: Sequence[Feature],
        outputs: Sequence[Output],
        classification: bool,
    ) -> None:
        super().__init__()
        self.masked_steps: MaskedSteps = "hold"
        self.observed = Observed(features)
        placed = place(specs, Shape(size=self.observed.size))
        self.layers = nn.ModuleList(build(p) for p in placed[:-1])
        head, below = placed[-1].spec, placed[-1].shape
        assert isinstance(head, RnnOutputSpec | RnnLossSpec)
        self.head = Head(head, below.size or 0, features, outputs, classification)
        self.summary = below.summary
        self.reads_tokens = token_reader(placed)
        self.streaming = all(p.spec.streams for p in placed)
        # Truncated backpropagation cuts below and inside the topmost recurrent layer, never above it.
        self.top = max((i + 1 for i, p in enumerate(placed[:-1]) if p.spec.recurrent), default=0)

    @classmethod
    def of(cls, specs: Sequence[LayerSpec], source: Source) -> "Network":
        """The network of a configuration for what a source gives.

        Raises:
            ConfigError: the data does not fit the layers; with the layer's path.
        """
        try:
            network = cls(specs, source.features, source.outputs, source.task == "classification")
            network._check_feedback(source)
        except IllegalLayer as error:
            raise ConfigError(f"network[{error.index}]: {error}") from error
        except IllegalStack as error:
            raise ConfigError(f"network[{len(specs) - 1}]: {error}") from error
        return network

    def _check_feedback(self, source: Source) -> None:
        """In a rollout a class becomes the next token: an embedding has to know all of them."""
        reader, classes = self.reads_tokens, source.classes or ()
        fed = [f.feature for f in source.feedback if f.source == "class"]
        if reader and fed and len(classes) > reader.vocabulary:
            raise IllegalLayer(
                reader.index,
                f"embedding has a vocabulary of {reader.vocabulary}, the data feeds {len(classes)} classes back as "
                f"{fed[0]!r}. Set vocabulary: {len(classes)}.",
            )

    def stack(self) -> list[Layer]:
        """All layers that may carry state, from below."""
        return [self.observed, *self.layers]

    def states(self) -> dict[str, Mapping[str, tuple[int, ...]]]:
        """Shapes per row of the state tensors, by layer and key; none if the network cannot be stepped."""
        return {layer.name: shapes for layer in self.stack() if self.streaming and (shapes := layer.state_shapes())}

    def initial_state(self, rows: int) -> State:
        """Zeros, the state of sequences that have not begun."""
        device = self.observed.mean.device
        return {
            layer.name: {key: torch.zeros(rows, *shape, device=device) for key, shape in shapes.items()}
            for layer in self.stack()
            if (shapes := layer.state_shapes())
        }

    def forward(self, x: Tensor, mask: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """Answers in the caller's units, and the state after the last present step.

        Args:
            x: (B, T, F) raw readings, NaN where missing.
            mask: (B, T) bool; an absent step holds the state and its answer is 0.
            state: What an earlier call gave; None: the initial state.
        """
        state = self.initial_state(x.shape[0]) if state is None else state
        moves = moves_of(mask, self.masked_steps)
        hidden, base, after = self._lower(moves.pack(x), moves.lengths, moves.enter(state))
        z, after = self._upper(hidden, moves.lengths, after)
        return moves.unpack(self.head.answer(z, base)), moves.leave(after, state)

    def train_pass(
        self, x: Tensor, mask: Tensor | None, state: State, backward: int | None = None
    ) -> tuple[Tensor, Tensor | None, State]:
        """What the loss needs: values before the output activation, what they are relative to, and the state.

        Args:
            x: (B, T, F).
            mask: (B, T) bool.
            state: Carried in as constants.
            backward: The recurrent layers, and all below them, get gradients from the last `backward` steps only;
                the layers above from all. None: no limit.
        """
        cut = 0 if backward is None or self.top == 0 else max(0, x.shape[1] - backward)
        if cut == 0:
            hidden, base, state = self._lower_masked(x, mask, state)
        else:
            with torch.no_grad():
                early, early_base, state = self._lower_masked(x[:, :cut], _part(mask, 0, cut), state)
            late, late_base, state = self._lower_masked(x[:, cut:], _part(mask, cut, x.shape[1]), state)
            hidden = torch.cat([early, late], dim=1)
            base = None if early_base is None or late_base is None else torch.cat([early_base, late_base], dim=1)
        z, state = self._upper_masked(hidden, mask, state)
        return z, base, state

    def _lower(self, x: Tensor, lengths: Tensor | None, state: State) -> tuple[Tensor, Tensor | None, State]:
        """Up to and including the topmost recurrent layer."""
        after = dict(state)
        observed = _run(self.observed, x, lengths, after)
        hidden = observed
        for layer in self.layers[: self.top]:
            hidden = _run(layer, hidden, lengths, after)
        return hidden, self.head.base(observed), after

    def _lower_masked(self, x: Tensor, mask: Tensor | None, state: State) -> tuple[Tensor, Tensor | None, State]:
        lower, upper = self._split(state)
        moves = moves_of(mask, self.masked_steps)
        hidden, base, after = self._lower(moves.pack(x), moves.lengths, moves.enter(lower))
        base = None if base is None else moves.unpack(base)
        return moves.unpack(hidden), base, {**moves.leave(after, lower), **upper}

    def _upper_masked(self, hidden: Tensor, mask: Tensor | None, state: State) -> tuple[Tensor, State]:
        lower, upper = self._split(state)
        moves = moves_of(mask, self.masked_steps)
        z, after = self._upper(moves.pack(hidden), moves.lengths, moves.enter(upper))
        return moves.unpack(z), {**lower, **moves.leave(after, upper)}

    def _split(self, state: State) -> tuple[State, State]:
        """The states of the layers up to the topmost recurrent one, and of those above."""
        above = {layer.name for layer in self.stack()[self.top + 1 :]}
        lower = {name: layer for name, layer in state.items() if name not in above}
        return lower, {name: layer for name, layer in state.items() if name in above}

    def _upper(self, hidden: Tensor, lengths: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Above the topmost recurrent layer, up to the output activation."""
        after = dict(state)
        for layer in self.layers[self.top :]:
            hidden = _run(layer, hidden, lengths, after)
        return self.head(hidden), after

    def write(self, graph: Graph) -> None:
        """Write the network into a graph, with one input and one output for each state tensor."""
        value, observed = graph.x, ""
        for layer in self.stack():
            shapes = layer.state_shapes()
            begin = graph.state_input if self.streaming else graph.zeros
            before = {key: begin(f"{layer.name}.{key}", shape) for key, shape in shapes.items()}
            value, after = layer.write(graph, value, before)
            observed = observed or value
            for key, shape in self.states().get(layer.name, {}).items():
                graph.output(after[key], f"{layer.name}.{key}.out", ["B", *shape])
        graph.output(self.head.write(graph, value, observed), "y", ["B", "T", len(self.head.outputs)])


def _run(layer: Any, x: Tensor, lengths: Tensor | None, state: State) -> Tensor:
    """Run one layer and replace its state in place."""
    own: LayerState = state.get(layer.name, {})
    y, after = layer(x, lengths, own)
    if after:
        state[layer.name] = after
    return y  # type: ignore[no-any-return]


def _part(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if mask is None else mask[:, start:stop]


def detached(state: State) -> State:
    """The same state as constants: gradients end here."""
    return {name: {key: tensor.detach() for key, tensor in layer.items()} for name, layer in state.items()}


def restarted(state: State, starts: Tensor | None) -> State:
    """The state with fresh zeros in the rows that start a new sequence; starts None means all of them."""
    return {
        name: {
            key: torch.zeros_like(t) if starts is None else torch.where(starts.view(-1, *[1] * (t.ndim - 1)), 0.0, t)
            for key, t in layer.items()
        }
        for name, layer in state.items()
    }


def rows_of_state(state: State, default: int) -> int:
    """B of a state; `default` if it has no tensor."""
    return next((tensor.shape[0] for layer in state.values() for tensor in layer.values()), default)
