"""A .keras file as a network of ours: layers, and weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from stepcast.errors import ManifestError
from stepcast.manifest import Feature, Output

from ...weights import Weights
from ..archive import Archive
from ..foreign import Foreign
from .configuration import Saved, chain_of
from .layers import Spec, read_layer
from .weights_file import WeightsFile

CONFIGURATION: Final = "config.json"
WEIGHTS: Final = "model.weights.h5"
METADATA: Final = "metadata.json"
MOST_CONFIGURATION_BYTES: Final = 16 << 20
MOST_WEIGHT_BYTES: Final = 1 << 30


def read_keras(file: Path, features: Sequence[Feature] = (), outputs: Sequence[str] = ()) -> tuple[Foreign, list[str]]:
    """A Keras network as `take_in` wants it, and what it does in Keras and not here.

    Args:
        file: A .keras file of Keras 3.
        features: Names and widths of the inputs; none: x0, x1, ... of width 1 each.
        outputs: Names of the outputs; none: y0, y1, ...

    Raises:
        ManifestError: it is damaged, does not fit itself, or holds what Stepcast has no layer for.
    """
    with Archive(file, "Keras 3", (CONFIGURATION, WEIGHTS, METADATA)) as archive:
        _check_version(archive)
        layers = chain_of(archive.read(CONFIGURATION, MOST_CONFIGURATION_BYTES), f"{file}: {CONFIGURATION}")
        if archive.size(WEIGHTS) is None:
            raise ManifestError(f"{file}: has no {WEIGHTS}")
        weights_file = WeightsFile(archive.read(WEIGHTS, MOST_WEIGHT_BYTES), file)
    size = inputs = _inputs(layers, file)
    specs: list[Spec] = []
    weights: list[Weights] = []
    notes = []
    for layer in layers:
        reading = read_layer(layer, size, weights_file)
        specs, size = [*specs, *reading.specs], reading.size
        weights += [] if reading.weights is None else [reading.weights]
        notes += [reading.note] if reading.note else []
    return _named(file, _with_head(specs), weights, (inputs, features), (size, outputs)), notes


def _check_version(archive: Archive) -> None:
    """Raises ManifestError unless Keras 3 saved it: earlier weights lie otherwise, and activations differ."""
    try:
        content = archive.read(METADATA, MOST_CONFIGURATION_BYTES) if archive.size(METADATA) is not None else b"{}"
        version = json.loads(content).get("keras_version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{archive.file}: {METADATA} is no JSON object ({error})") from error
    if not str(version).startswith("3."):
        raise ManifestError(
            f"{archive.file}: was saved by Keras {version}, want 3. Load it with Keras 3 and save it again."
        )


def _inputs(layers: Sequence[Saved], file: Path) -> int:
    """Values per step that go in, by the shape that the first layer was built for."""
    first = layers[0]
    shape = first.fields.get("batch_shape") or first.fields.get("batch_input_shape")
    lookup = next((layer for layer in layers if layer.kind != "InputLayer"), first).kind == "Embedding"
    if lookup:
        if not isinstance(shape, list) or len(shape) == 2:
            return 1
        raise ManifestError(f"{first.where}: tokens have the shape {shape}, want [batch, steps]")
    if not isinstance(shape, list) or len(shape) != 3 or not isinstance(shape[2], int) or shape[2] < 1:
        said = f"its input has the shape {shape}, want [batch, steps, features]"
        raise ManifestError(f"{file}: {said}. Give the model an Input layer before it is saved.")
    return shape[2]


def _with_head(specs: Sequence[Spec]) -> list[Spec]:
    """The last dense layer, or the last activation, becomes the output layer."""
    *below, top = specs or [{}]
    if top.get("kind") == "dense":
        return [*below, {**top, "kind": "rnn_output"}]
    if top.get("kind") == "activation":
        return [*below, {**top, "kind": "rnn_loss"}]
    return [*specs, {"kind": "rnn_loss", "activation": "identity"}]


def _named(
    file: Path,
    specs: Sequence[Spec],
    weights: Sequence[Weights],
    inputs: tuple[int, Sequence[Feature]],
    answers: tuple[int, Sequence[str]],
) -> Foreign:
    (size, features), (count, outputs) = inputs, answers
    made = tuple(features) or tuple(Feature(name=f"x{number}") for number in range(size))
    for what, have, want in (
        ("inputs", sum(f.width for f in made), size),
        ("outputs", len(outputs or range(count)), count),
    ):
        if have != want:
            raise ManifestError(f"{file}: the network has {want} {what}, the names that were given are of {have}")
    names: Sequence[Any] = outputs or [f"y{number}" for number in range(count)]
    return Foreign(file, "Keras", specs, weights, made, tuple(Output(name=name) for name in names))
