"""Several output layers of one network: each answers some of the data's outputs, with its own loss and weight."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from stepcast.manifest import Distribution, Feature, Output

from ..graph import Graph
from .output import Head
from .spec import IllegalStack
from .specs import RnnLossSpec, RnnOutputSpec
from .stack import IllegalLayer, Placed


class Tasks(nn.Module):
    """Output layers side by side; for the trainer what one `Head` is.

    Raw values, and what answers are relative to, stand in the order of the output layers. Answers stand in that of the
    data's outputs, all point forecasts first. Sums and counts of losses are vectors with a place for each layer: their
    means are added up, each times its weight.

    Args:
        heads: The output layers.
        places: For each of them the places of its targets among the data's outputs.
        weights: What each loss is multiplied with.

    Attributes:
        outputs: Of the graph.
        described: The distribution in words of the manifest, None without one.
    """

    weights: Tensor
    order: Tensor

    def __init__(self, heads: Sequence[Head], places: Sequence[Sequence[int]], weights: Sequence[float]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.places = [list(some) for some in places]
        self.register_buffer("weights", torch.tensor(weights), persistent=False)
        order = _points_first(heads, self.places)
        self.register_buffer("order", torch.tensor(order), persistent=False)
        side_by_side = [output for head in heads for output in head.outputs]
        self.outputs = tuple(side_by_side[at] for at in order)
        self.described = _all_described(heads)

    def tasks(self) -> Iterator[tuple[Head, list[int]]]:
        """See `Head.tasks`."""
        yield from zip(self.heads, self.places, strict=True)

    @property
    def parts(self) -> Tensor:
        """See `Head.parts`."""
        return torch.tensor([head.parts for head, _ in self.tasks()], device=self.weights.device)

    def forward(self, *hidden: Tensor) -> Tensor:
        """What each output layer reads, (B, T, F), to the raw values of all, (B, T, R)."""
        return torch.cat([head(h) for (head, _), h in zip(self.tasks(), hidden, strict=True)], dim=-1)

    def base(self, observed: Tensor) -> Tensor | None:
        """What the answers are relative to, (B, T, O); 0 for a layer that is relative to nothing."""
        bases = [head.base(observed) for head, _ in self.tasks()]
        if all(base is None for base in bases):
            return None
        filled = [
            observed.new_zeros(*observed.shape[:2], len(head.outputs)) if base is None else base
            for base, (head, _) in zip(bases, self.tasks(), strict=True)
        ]
        return torch.cat(filled, dim=-1)

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
        start = 0
        parts = torch.split(z, [head.raw for head, _ in self.tasks()], dim=-1)
        for (head, places), part in zip(self.tasks(), parts, strict=True):
            stop = start + len(head.outputs)
            yield head, part, None if base is None else base[..., start:stop], places
            start = stop

    def write(self, graph: Graph, observed: str, *hidden: str) -> str:
        """Add the output layers to a graph: the name of all answers."""
        answers = [head.write(graph, observed, h) for (head, _), h in zip(self.tasks(), hidden, strict=True)]
        return graph.add("Gather", graph.add("Concat", *answers, axis=-1), graph.ints(*self.order.tolist()), axis=2)


def _points_first(heads: Sequence[Head], places: Sequence[Sequence[int]]) -> list[int]:
    """The order of all layers' outputs: the point forecasts as the data has them, then all others."""
    points: dict[int, int] = {}
    others: list[int] = []
    start = 0
    for head, own in zip(heads, places, strict=True):
        points |= {place: start + number for number, place in enumerate(own)}
        others += range(start + head.targets, start + len(head.outputs))
        start += len(head.outputs)
    return [points[place] for place in sorted(points)] + others


def _all_described(heads: Sequence[Head]) -> Distribution | None:
    """The distributions of all layers as the one that a manifest has; see `heads_of` for what they have in common."""
    described = [head.described for head in heads if head.described is not None]
    if not described:
        return None
    targets = {name: outputs for one in described for name, outputs in one.targets.items()}
    return described[0].model_copy(update={"targets": targets})


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
        # By number where none is named: names that stand there twice are refused later, by the manifest.
        own = [_place(name, names, end.index) for name in spec.outputs or ()] or list(range(len(names)))
        try:
            heads.append(Head(spec, end.shape.size or 0, features, [outputs[at] for at in own], classification))
        except IllegalStack as error:
            raise IllegalLayer(end.index, str(error)) from error
        places.append(own)
        weights.append(spec.weight)
    if left := sorted(set(names) - {names[at] for own in places for at in own}):
        raise IllegalLayer(ends[-1].index, f"no output layer answers {', '.join(map(repr, left))}", "outputs")
    kinds = [one.model_dump(exclude={"targets"}) if (one := head.described) else None for head in heads]
    for end, kind in zip(ends, kinds, strict=True):
        if kind != kinds[0]:
            message = f"it and {ends[0].name!r} have other distributions. Give all output layers one, or none."
            raise IllegalLayer(end.index, message, "distribution")
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
