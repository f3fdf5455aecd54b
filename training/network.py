"""The whole network: readings in, answers out, state carried in the open."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Output

from .data.source import Source
from .graph import Graph
from .layers import build
from .layers.base import Layer, LayerState, State
from .layers.merging import merge, write_merge
from .layers.observed import Observed
from .layers.spec import Learns, Shape, learning_of
from .layers.specs import LayerSpec, OutputSpec
from .layers.stack import INPUT, IllegalLayer, Placed, place, token_readers
from .layers.tasks import heads_of
from .masks import MaskedSteps, moves_of

Values = dict[str, Tensor]  # by layer name, each (B, T, ...)


class Network(nn.Module):
    """Layers between `Observed` and the outputs, each reading what its `from` names: a chain, or a graph.

    Values are raw on both sides: normalisation is part of the network, as it is part of the exported graph.

    Attributes:
        layers: In the order of the `network:` list, which is one they can run in.
        head: The output layer, or all of them as one.
        lower: Names of the layers that a recurrent layer depends on, itself included. Truncated backpropagation cuts
            there, never above.
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
        placed = place(specs, Shape(size=self.observed.size), self.observed.columns)
        self._placed = {p.name: p for p in placed}
        self._ends = [p for p in placed if isinstance(p.spec, OutputSpec)]
        self.layers = nn.ModuleList(build(p) for p in placed if not isinstance(p.spec, OutputSpec))
        self.head = heads_of(self._ends, features, outputs, classification)
        for _, learning, layer in self.parts():
            if learning and learning.frozen:
                layer.requires_grad_(False)
        self.summary = self._ends[0].shape.summary
        self.reads_tokens = token_readers(placed)
        self.streaming = all(p.spec.streams for p in placed)
        self.lower = _needed([p.name for p in placed if p.spec.recurrent], self._placed) | {INPUT}
        above = (p for p in placed if p.name not in self.lower)
        self._crossing = {source for p in above for source in p.sources} & self.lower  # what the layers above read

    @classmethod
    def of(cls, specs: Sequence[LayerSpec], source: Source) -> "Network":
        """The network of a configuration for what a source gives.

        Raises:
            ConfigError: the data does not fit the layers; with the layer's path.
        """
        try:
            network = cls(specs, source.features, source.outputs, source.task == "classification")
            network._check_feedback(source)
            network._check_labels(source)
        except IllegalLayer as error:
            raise ConfigError(f"{error.where}: {error}") from error
        return network

    def _check_feedback(self, source: Source) -> None:
        """In a rollout a class becomes the next token: an embedding has to know all of them."""
        classes = source.classes or ()
        fed = [f.feature for f in source.feedback if f.source == "class"]
        for reader in self.reads_tokens:
            if (reader.feature is None or reader.feature in fed) and fed and len(classes) > reader.vocabulary:
                raise IllegalLayer(
                    reader.index,
                    f"embedding has a vocabulary of {reader.vocabulary}, the data feeds {len(classes)} classes back as "
                    f"{reader.feature or fed[0]!r}. Set vocabulary: {len(classes)}.",
                )

    def _check_labels(self, source: Source) -> None:
        """Labels of which each may be there are probabilities apart from each other."""
        for end, (head, _) in zip(self._ends, self.head.tasks(), strict=True):
            if source.task == "multi_label" and (head.loss.name, head.activation) != ("xent", "sigmoid"):
                got = f"loss {head.loss.name} with activation {head.activation}"
                raise IllegalLayer(end.index, f"task multi_label wants loss xent with activation sigmoid, got {got}")

    def parts(self) -> Iterator[tuple[str, Learns | None, nn.Module]]:
        """What may have weights, from below: its name, how it learns if that is its own matter, and the module.

        First what reads the features, whose weights are the vectors of categories; the output layers are the last.
        """
        yield self.observed.name, None, self.observed
        below = (place for place in self._placed.values() if not isinstance(place.spec, OutputSpec))
        heads = (head for head, _ in self.head.tasks())
        for one, layer in (*zip(below, self.layers, strict=True), *zip(self._ends, heads, strict=True)):
            yield one.name, learning_of(one.spec), layer

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

    def opening_state(self, rows: int, begin: Mapping[str, Mapping[str, Tensor]] | None) -> State:
        """The state that rows start from: what the data hands over, zeros for all else.

        Raises:
            ConfigError: it hands over what this network has no state for.
        """
        state = self.initial_state(rows)
        for name, layer in (begin or {}).items():
            for key, given in layer.items():
                wanted = state.get(name, {}).get(key)
                if wanted is None or wanted.shape != given.shape:
                    there = "none" if wanted is None else list(wanted.shape)
                    raise ConfigError(
                        f"data: hands over state {name}.{key} {list(given.shape)}, the network has {there}"
                    )
                state[name][key] = given.to(wanted.dtype)
        return state

    def forward(self, x: Tensor, mask: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """Answers in the caller's units, and the state after the last present step.

        Args:
            x: (B, T, F) raw readings, NaN where missing.
            mask: (B, T) bool; an absent step holds the state and its answer is 0.
            state: What an earlier call gave; None: the initial state.
        """
        state = self.initial_state(x.shape[0]) if state is None else state
        moves = moves_of(mask, self.masked_steps)
        values, base, after = self._lower(moves.pack(x), moves.lengths, moves.enter(state))
        z, after = self._upper(values, moves.lengths, after)
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
        cut = 0 if backward is None or self.lower == {INPUT} else max(0, x.shape[1] - backward)
        if cut == 0:
            values, base, state = self._lower_masked(x, mask, state)
        else:
            with torch.no_grad():
                early, early_base, state = self._lower_masked(x[:, :cut], _part(mask, 0, cut), state)
            late, late_base, state = self._lower_masked(x[:, cut:], _part(mask, cut, x.shape[1]), state)
            values = {name: torch.cat([early[name], late[name]], dim=1) for name in late}
            base = None if early_base is None or late_base is None else torch.cat([early_base, late_base], dim=1)
        z, state = self._upper_masked(values, mask, state)
        return z, base, state

    def _lower(self, x: Tensor, lengths: Tensor | None, state: State) -> tuple[Values, Tensor | None, State]:
        """Up to and including the topmost recurrent layers: what the layers above read of it."""
        after = dict(state)
        values = {INPUT: self._run(self.observed, x, lengths, after)}
        base = self.head.base(values[INPUT])
        self._run_all((layer for layer in self.stack()[1:] if layer.name in self.lower), values, lengths, after)
        return {name: values[name] for name in self._crossing}, base, after

    def _lower_masked(self, x: Tensor, mask: Tensor | None, state: State) -> tuple[Values, Tensor | None, State]:
        lower, upper = self._split(state)
        moves = moves_of(mask, self.masked_steps)
        values, base, after = self._lower(moves.pack(x), moves.lengths, moves.enter(lower))
        base = None if base is None else moves.unpack(base)
        unpacked = {name: moves.unpack(value) for name, value in values.items()}
        return unpacked, base, {**moves.leave(after, lower), **upper}

    def _upper_masked(self, values: Values, mask: Tensor | None, state: State) -> tuple[Tensor, State]:
        lower, upper = self._split(state)
        moves = moves_of(mask, self.masked_steps)
        packed = {name: moves.pack(value) for name, value in values.items()}
        z, after = self._upper(packed, moves.lengths, moves.enter(upper))
        return moves.unpack(z), {**lower, **moves.leave(after, upper)}

    def _split(self, state: State) -> tuple[State, State]:
        """The states of the layers up to the topmost recurrent ones, and of those above."""
        lower = {name: layer for name, layer in state.items() if name in self.lower}
        return lower, {name: layer for name, layer in state.items() if name not in self.lower}

    def _upper(self, values: Values, lengths: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Above the topmost recurrent layers, up to the output activation."""
        after, values = dict(state), dict(values)
        self._run_all((layer for layer in self.stack() if layer.name not in self.lower), values, lengths, after)
        return self.head(*(self._input(end.name, values) for end in self._ends)), after

    def _run_all(self, layers: Iterable[Layer], values: Values, lengths: Tensor | None, state: State) -> None:
        """Run layers one after the other; their outputs and states are put in place."""
        for layer in layers:
            values[layer.name] = self._run(layer, self._input(layer.name, values), lengths, state)

    def _input(self, name: str, values: Values) -> Tensor:
        """What a layer reads, (B, T, F)."""
        placed = self._placed[name]
        return merge(placed.spec.merges, [values[source] for source in placed.sources])

    def _run(self, layer: Layer, x: Tensor, lengths: Tensor | None, state: State) -> Tensor:
        """Run one layer and replace its state in place."""
        own: LayerState = state.get(layer.name, {})
        y, after = layer(x, lengths, own)
        if after:
            state[layer.name] = after
        return y  # type: ignore[no-any-return]

    def write(self, graph: Graph) -> None:
        """Write the network into a graph, with one input and one output for each state tensor."""
        values: dict[str, str] = {}
        for layer in self.stack():
            shapes = layer.state_shapes()
            begin = graph.state_input if self.streaming else graph.zeros
            before = {key: begin(f"{layer.name}.{key}", shape) for key, shape in shapes.items()}
            x = self._written(graph, layer.name, values) if values else graph.x
            values[layer.name], after = layer.write(graph, x, before)
            for key, shape in self.states().get(layer.name, {}).items():
                graph.output(after[key], f"{layer.name}.{key}.out", ["B", *shape])
        hidden = (self._written(graph, end.name, values) for end in self._ends)
        graph.output(self.head.write(graph, values[INPUT], *hidden), "y", ["B", "T", len(self.head.outputs)])

    def _written(self, graph: Graph, name: str, values: Mapping[str, str]) -> str:
        """`_input` in ONNX."""
        placed = self._placed[name]
        return write_merge(graph, placed.spec.merges, [values[source] for source in placed.sources])


def _needed(names: Iterable[str], placed: Mapping[str, Placed]) -> set[str]:
    """These layers and all that they depend on."""
    found: set[str] = set()
    left = [*names]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += placed[name].sources if name in placed else ()
    return found


def _part(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if mask is None else mask[:, start:stop]


def detached(state: State) -> State:
    """The same state as constants: gradients end here."""
    return {name: {key: tensor.detach() for key, tensor in layer.items()} for name, layer in state.items()}


def restarted(state: State, starts: Tensor | None, fresh: State | None = None) -> State:
    """The state with a fresh one, of zeros if None, in the rows that start a new sequence; starts None: in all."""
    return {
        name: {
            key: torch.where(_starting(starts, t), torch.zeros_like(t) if fresh is None else fresh[name][key], t)
            for key, t in layer.items()
        }
        for name, layer in state.items()
    }


def _starting(starts: Tensor | None, like: Tensor) -> Tensor:
    starts = like.new_ones(like.shape[:1], dtype=torch.bool) if starts is None else starts
    return starts.view(-1, *[1] * (like.ndim - 1))


def rows_of_state(state: State, default: int) -> int:
    """B of a state; `default` if it has no tensor."""
    return next((tensor.shape[0] for layer in state.values() for tensor in layer.values()), default)
