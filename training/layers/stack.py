"""From the `network:` list to a legal network: names, wires, shapes, adapters put in where two layers do not fit.

A list without `from` is a chain; with it, a graph whose layers read only what stands before them. There is one rule for
both: a layer reads what its `from` names, by default the layer before.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from .merging import merged_shape
from .spec import IllegalStack, Shape
from .specs import (
    CnnToRnnSpec,
    ColumnsSpec,
    DuplicateToTimeSeriesSpec,
    EmbeddingSpec,
    IdentityAdapterSpec,
    LastTimeStepSpec,
    LayerSpec,
    MaskSpec,
    OutputSpec,
    ReverseSpec,
    RnnLossSpec,
    RnnOutputSpec,
)

INPUT = "observed"  # the layer that everything starts from
Columns = Mapping[str, Sequence[int]]  # by feature: its places in what `observed` puts out


@dataclass(frozen=True)
class Placed:
    """A layer in its place.

    Attributes:
        index: Of the entry in `network:`; an adapter put in has that of the layer it serves.
        name: How its state is addressed.
        spec: Its configuration.
        sources: Names of what it reads.
        shape: What flows in, merged.
        out: What flows out.
    """

    index: int
    name: str
    spec: LayerSpec | ColumnsSpec
    sources: tuple[str, ...]
    shape: Shape
    out: Shape


class IllegalLayer(ValueError):
    """An illegal network, with the place: `index` into the `network:` list, and the key there."""

    def __init__(self, index: int, message: str, key: str = "") -> None:
        super().__init__(message)
        self.index = index
        self.where = f"network[{index}]" + (f".{key}" if key else "")


def place(specs: Sequence[LayerSpec], shape: Shape, columns: Columns | None = None) -> list[Placed]:
    """Walk through a network from the input up.

    Args:
        specs: The `network:` list.
        shape: What the data gives; its size may still be unknown.
        columns: The data's features; None while it is not open: then any name may be one.

    Raises:
        IllegalLayer: a layer cannot stand where it stands.
    """
    names = _names(specs)
    walk = _Walk(names, shape, columns)
    for index, spec in enumerate(specs):
        try:
            walk.add(index, spec)
        except IllegalStack as error:
            raise IllegalLayer(index, str(error)) from error
    _check_ends(specs, names, walk.placed)
    return walk.placed


class _Walk:
    """The layers placed so far."""

    def __init__(self, names: Sequence[str], shape: Shape, columns: Columns | None) -> None:
        self.placed: list[Placed] = []
        self._names, self._columns = names, columns
        self._shapes = {INPUT: shape}
        self._before = INPUT

    def add(self, index: int, spec: LayerSpec) -> None:
        """Place the next layer, and what it needs in between."""
        name = self._names[index]
        if getattr(spec, "layer", None) is not None and spec.layer.sources:  # type: ignore[union-attr]
            raise IllegalLayer(index, f"it belongs to {spec.kind}, not to the layer in it", "layer.from")
        sources = (self._before,) if spec.sources is None else tuple(self._find(index, s) for s in spec.sources)
        fitting = tuple(self._adapted(index, spec, source, len(sources) > 1) for source in sources)
        shape = merged_shape(spec.merges, [(source, self._shapes[source]) for source in fitting])
        self._put(index, name, spec, fitting, shape)
        if not isinstance(spec, OutputSpec):
            self._before = name

    def _find(self, index: int, source: str) -> str:
        """The layer that a `from` names; a feature is taken out of the input."""
        if source in self._shapes and source in (self._columns or ()):
            raise IllegalLayer(index, f"{source!r} is a layer and a feature. Rename the layer.", "from")
        if source in self._shapes:
            return source
        if source in self._names:
            below = self._names.index(source) < index
            told = "is an output, which nothing can read" if below else "does not stand before it"
            raise IllegalLayer(index, f"layer {source!r} {told}", "from")
        return self._feature(index, source)

    def _feature(self, index: int, feature: str) -> str:
        name = f"{INPUT}.{feature}"
        if self._columns is None:
            self._shapes.setdefault(name, Shape())  # the data will tell
        elif feature not in self._columns:
            known = [*self._shapes, *self._columns]
            nearest = get_close_matches(feature, known, 1)
            told = f" Did you mean {nearest[0]!r}?" if nearest else f" There are {', '.join(map(repr, known))}."
            raise IllegalLayer(index, f"{feature!r} is no layer before it and no feature.{told}", "from")
        elif name not in self._shapes:
            spec = ColumnsSpec(columns=tuple(self._columns[feature]))
            self._put(index, name, spec, (INPUT,), self._shapes[INPUT])
        return name

    def _adapted(self, index: int, spec: LayerSpec, source: str, several: bool) -> str:
        """The source as the layer wants it: frames become values, also where several inputs are merged."""
        shape = self._shapes[source]
        if spec.wants == "frames" and (shape.frame is None or several):
            raise IllegalStack(f"{spec.kind} wants frames. Put rnn_to_cnn with height, width and channels before it.")
        if shape.frame is None or (spec.wants != "values" and not several):
            return source
        name = f"{self._names[index]}_adapter" + (f"_{source}" if several else "")
        if name not in self._shapes:
            self._put(index, name, CnnToRnnSpec(kind="cnn_to_rnn"), (source,), shape)
        return name

    def _put(
        self, index: int, name: str, spec: LayerSpec | ColumnsSpec, sources: tuple[str, ...], shape: Shape
    ) -> None:
        out = spec.out_shape(shape)
        self.placed.append(Placed(index, name, spec, sources, shape, out))
        if not isinstance(spec, OutputSpec):
            self._shapes[name] = out


def _check_ends(specs: Sequence[LayerSpec], names: Sequence[str], placed: Sequence[Placed]) -> None:
    """See that the network ends in its outputs, and that nothing else in it leads nowhere."""
    if not isinstance(specs[-1], OutputSpec):
        raise IllegalLayer(len(specs) - 1, "the last layer must be rnn_output or rnn_loss")
    outputs = [p for p in placed if isinstance(p.spec, OutputSpec)]
    told: Counter[str] = Counter()
    for one in outputs:
        assert isinstance(one.spec, RnnOutputSpec | RnnLossSpec)
        if one.spec.outputs is None and len(outputs) > 1:
            message = f"one of {len(outputs)} output layers has to say which of the data's outputs it answers"
            raise IllegalLayer(one.index, message, "outputs")
        told.update(one.spec.outputs or ())
        if twice := [name for name in one.spec.outputs or () if told[name] > 1]:
            raise IllegalLayer(one.index, f"{twice[0]!r} is answered twice", "outputs")
        if one.shape.summary != outputs[0].shape.summary:
            raise IllegalLayer(one.index, f"it and {outputs[0].name!r} answer, one per row, the other at every step")
    read = {source for one in placed for source in one.sources}
    for index, (name, spec) in enumerate(zip(names, specs, strict=True)):
        if name not in read and not isinstance(spec, OutputSpec):
            raise IllegalLayer(index, f"nothing reads {name!r}. Name it in a later layer's 'from', or take it out.")


@dataclass(frozen=True)
class TokenReader:
    """An embedding of the data's own tokens: its place in `network:`, how many tokens it knows, which feature it reads.

    `feature` is None where the token is all there is.
    """

    index: int
    vocabulary: int
    feature: str | None = None


def token_readers(placed: Sequence[Placed]) -> tuple[TokenReader, ...]:
    """The embeddings that read the data itself: below them values may move, but do not change."""
    moves = ReverseSpec | DuplicateToTimeSeriesSpec | MaskSpec | LastTimeStepSpec | IdentityAdapterSpec
    origin: dict[str, str | None] = {INPUT: None}  # layers that hold data as it came: which feature
    found = []
    for one in placed:
        if len(one.sources) > 1 or one.sources[0] not in origin:
            continue
        feature = origin[one.sources[0]]
        if isinstance(one.spec, ColumnsSpec):
            origin[one.name] = one.name.removeprefix(f"{INPUT}.")
        elif isinstance(one.spec, moves):
            origin[one.name] = feature
        elif isinstance(one.spec, EmbeddingSpec):
            found.append(TokenReader(one.index, one.spec.vocabulary, feature))
    return tuple(found)


def _names(specs: Sequence[LayerSpec]) -> list[str]:
    """`kind_number` for layers without a name; the number counts the layers of that kind from 0."""
    seen: Counter[str] = Counter()
    names: list[str] = []
    for index, spec in enumerate(specs):
        name = spec.name or f"{spec.kind}_{seen[spec.kind]}"
        seen[spec.kind] += 1
        if name in names or name == INPUT:
            raise IllegalLayer(index, f"layer name {name!r} is taken")
        names.append(name)
    return names
