"""Several output layers of one network: each answers some of the data's outputs, with its own loss and weight."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

import numpy as np
import torch
from torch import Tensor, nn

from stepcast.manifest import Feature, Output

from ..graph import Graph
from .output import Head
from .spec import IllegalStack
from .specs import RnnLossSpec, RnnOutputSpec
from .stack import IllegalLayer, Placed


class Tasks(nn.Module):
    """Output layers side by side; for the trainer what one `Head` is.

    Values before the activation stand in the order of the output layers, answers in that of the data's outputs. Sums
    and counts of losses are vectors with a place for each layer: their means are added up, each times its weight.

    Args:
        heads: The output layers.
        places: For each of them the places of its outputs among the data's.
        weights: What each loss is multiplied with.
    """

    weights: Tensor
    order: Tensor

    def __init__(self, heads: Sequence[Head], places: Sequence[Sequence[int]], weights: Sequence[float]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.places = [list(some) for some in places]
        self.register_buffer("weights", torch.tensor(weights), persistent=False)
        self.register_buffer("order", torch.tensor(np.argsort(np.concatenate(self.places))), persistent=False)

    def tasks(self) -> Iterator[tuple[Head, list[int]]]:
        """See `Head.tasks`."""
        yield from zip(self.heads, self.places, strict=True)

    @property
    def parts(self) -> Tensor:
        """See `Head.parts`."""
        return torch.tensor([head.parts for head, _ in self.tasks()], device=self.weights.device)

    def forward(self, *hidden: Tensor) -> Tensor:
        """What each output layer reads (B, T, F) to its values before the activation, side by side."""
        return torch.cat([head(h) for (head, _), h in zip(self.tasks(), hidden, strict=True)], dim=-1)

    def base(self, observed: Tensor) -> Tensor | None:
        """What the answers are relative to, (B, T, O); 0 for a layer that is relative to nothing."""
        bases = [head.base(observed) for head, _ in self.tasks()]
        if all(base is None for base in bases):
            return None
        filled = [
            observed.new_zeros(*observed.shape[:2], len(places)) if base is None else base
            for base, places in zip(bases, self.places, strict=True)
        ]
        return torch.cat(filled, dim=-1)[..., self.order]

    def answer(self, z: Tensor, base: Tensor | None) -> Tensor:
        """See `Head.answer`."""
        answers = [head.answer(part, own) for head, part, own, _ in self._each(z, base)]
        return torch.cat(answers, dim=-1)[..., self.order]

    def losses(self, z: Tensor, base: Tensor | None, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weighted sums and counts, (tasks,) each; see `Head.losses`."""
        sums, counts = [], []
        for head, part, own, places in self._each(z, base):
            seen = mask[..., places] if mask is not None and mask.ndim == 3 else mask
            total, count = head.losses(part, own, y[..., places], seen)
            sums.append(total)
            counts.append(count)
        return torch.stack(sums) * self.weights, torch.stack(counts)

    def _each(self, z: Tensor, base: Tensor | None) -> Iterator[tuple[Head, Tensor, Tensor | None, list[int]]]:
        """Each output layer with its part of `z` and of `base`."""
        parts = torch.split(z, [len(places) for places in self.places], dim=-1)
        for (head, places), part in zip(self.tasks(), parts, strict=True):
            yield head, part, None if base is None else base[..., places], places

    def write(self, graph: Graph, observed: str, *hidden: str) -> str:
        """Add the output layers to a graph: the name of all answers."""
        answers = [head.write(graph, observed, h) for (head, _), h in zip(self.tasks(), hidden, strict=True)]
        return graph.add("Gather", graph.add("Concat", *answers, axis=-1), graph.ints(*self.order.tolist()), axis=2)


def heads_of(
    ends: Sequence[Placed], features: Sequence[Feature], outputs: Sequence[Output], classification: bool
) -> Head | Tasks:
    """The output layers of a network as one.

    Args:
        ends: Their places.
        features: The data's; answers may be relative to them.
        outputs: The data's; each is answered by exactly one layer.
        classification: Are they classes, of which each step has one?

    Raises:
        IllegalLayer: a layer does not fit the data.
    """
    names = [output.name for output in outputs]
    heads, places, weights = [], [], []
    for end in ends:
        spec = end.spec
        assert isinstance(spec, RnnOutputSpec | RnnLossSpec)
        own = [_place(name, names, end.index) for name in spec.outputs or names]
        try:
            heads.append(Head(spec, end.shape.size or 0, features, [outputs[at] for at in own], classification))
        except IllegalStack as error:
            raise IllegalLayer(end.index, str(error)) from error
        places.append(own)
        weights.append(spec.weight)
    if left := sorted(set(names) - {names[at] for own in places for at in own}):
        raise IllegalLayer(ends[-1].index, f"no output layer answers {', '.join(map(repr, left))}", "outputs")
    if classification and len(ends) > 1:
        raise IllegalLayer(ends[1].index, "each step has one class, which one output layer has to tell from all others")
    if len(heads) == 1 and weights == [1.0] and places[0] == list(range(len(names))):
        return heads[0]
    return Tasks(heads, places, weights)


def _place(name: str, names: Sequence[str], index: int) -> int:
    if name in names:
        return names.index(name)
    nearest = get_close_matches(name, names, 1)
    told = f"Did you mean {nearest[0]!r}?" if nearest else f"There are {', '.join(map(repr, names))}."
    raise IllegalLayer(index, f"{name!r} is no output of the data. {told}", "outputs")
