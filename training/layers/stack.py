"""From the `network:` list to a legal stack: names, shapes, adapters put in where two layers do not fit."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .specs import (
    CnnToRnnSpec,
    DuplicateToTimeSeriesSpec,
    EmbeddingSpec,
    IdentityAdapterSpec,
    IllegalStack,
    LastTimeStepSpec,
    LayerSpec,
    MaskSpec,
    ReverseSpec,
    RnnLossSpec,
    RnnOutputSpec,
    Shape,
)


@dataclass(frozen=True)
class Placed:
    """A layer in its place.

    Attributes:
        index: Of the entry in `network:`; an adapter put in has that of the layer it serves.
        name: How its state is addressed.
        spec: Its configuration.
        shape: What flows in.
    """

    index: int
    name: str
    spec: LayerSpec
    shape: Shape


class IllegalLayer(ValueError):
    """An illegal stack, with the place: `index` into the `network:` list."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def place(specs: Sequence[LayerSpec], shape: Shape) -> list[Placed]:
    """Walk through a stack from below.

    Args:
        specs: The `network:` list.
        shape: What the data gives; its size may still be unknown.

    Raises:
        IllegalLayer: a layer cannot stand where it stands.
    """
    placed: list[Placed] = []
    for index, (name, spec) in enumerate(zip(_names(specs), specs, strict=True)):
        last = index == len(specs) - 1
        if isinstance(spec, RnnOutputSpec | RnnLossSpec) != last:
            wanted = "the last layer must be rnn_output or rnn_loss" if last else f"{spec.kind} must be the last layer"
            raise IllegalLayer(index, wanted)
        try:
            if adapter := _adapter(spec, shape):
                placed.append(Placed(index, f"{name}_adapter", adapter, shape))
                shape = adapter.out_shape(shape)
            placed.append(Placed(index, name, spec, shape))
            shape = spec.out_shape(shape)
        except IllegalStack as error:
            raise IllegalLayer(index, str(error)) from error
    return placed


@dataclass(frozen=True)
class TokenReader:
    """An embedding of the data's own tokens: its place in `network:`, and how many tokens it knows."""

    index: int
    vocabulary: int


def token_reader(placed: Sequence[Placed]) -> TokenReader | None:
    """The embedding that reads the data itself: below it values may move, but do not change."""
    moves = ReverseSpec | DuplicateToTimeSeriesSpec | MaskSpec | LastTimeStepSpec | IdentityAdapterSpec
    above = next((p for p in placed if not isinstance(p.spec, moves)), None)
    if above is None or not isinstance(above.spec, EmbeddingSpec):
        return None
    return TokenReader(above.index, above.spec.vocabulary)


def _adapter(spec: LayerSpec, shape: Shape) -> CnnToRnnSpec | None:
    """What has to come between, None if nothing."""
    if spec.wants == "frames" and shape.frame is None:
        raise IllegalStack(f"{spec.kind} wants frames. Put rnn_to_cnn with height, width and channels before it.")
    return CnnToRnnSpec(kind="cnn_to_rnn") if spec.wants == "values" and shape.frame is not None else None


def _names(specs: Sequence[LayerSpec]) -> list[str]:
    """`kind_number` for layers without a name; the number counts the layers of that kind from 0."""
    seen: Counter[str] = Counter()
    names: list[str] = []
    for index, spec in enumerate(specs):
        name = spec.name or f"{spec.kind}_{seen[spec.kind]}"
        seen[spec.kind] += 1
        if name in names or name == "observed":
            raise IllegalLayer(index, f"layer name {name!r} is taken")
        names.append(name)
    return names
