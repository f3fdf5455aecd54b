"""A DL4J zip as a network of ours: layers, weights, and what its normaliser did."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from stepcast.errors import ManifestError
from stepcast.manifest import Feature, Output

from ...weights import Weights
from ..archive import Archive
from ..foreign import Foreign, outputs_of
from .arrays import Stream, read_array
from .configuration import Link, read_configuration, specs_of
from .normaliser import JAVA_OBJECT, Normaliser, Scaling, read_normaliser

CONFIGURATION: Final = "configuration.json"
COEFFICIENTS: Final = "coefficients.bin"
NORMALISER: Final = "normalizer.bin"
PREPROCESSOR: Final = "preprocessor.bin"
MOST_CONFIGURATION_BYTES: Final = 16 << 20
MOST_COEFFICIENT_BYTES: Final = 1 << 30
HEADER_BYTES: Final = 1 << 12  # of an INDArray: modes, types, shape information
WIDEST: Final = 8  # bytes of a number


class Saved(NamedTuple):
    """What a zip holds.

    Attributes:
        links: The layers, from below.
        weights: Of each layer with weights.
        normaliser: None if none was saved.
    """

    links: list[Link]
    weights: list[Weights]
    normaliser: Normaliser | None


def read_saved(file: Path) -> Saved:
    """Read a ModelSerializer zip.

    Raises:
        ManifestError: it is damaged, does not fit itself, or holds what Stepcast has no layer for.
    """
    with Archive(file, "DL4J", (CONFIGURATION, COEFFICIENTS, NORMALISER, PREPROCESSOR)) as archive:
        name = f"{file}: {CONFIGURATION}"
        links = read_configuration(archive.read(CONFIGURATION, MOST_CONFIGURATION_BYTES), name)
        flat = _coefficients(archive, sum(link.reading.count for link in links))
        normaliser = _normaliser(archive)
    if not np.isfinite(flat).all():
        raise ManifestError(f"{file}: {COEFFICIENTS} has numbers that are not finite")
    cuts = np.cumsum([0, *(link.reading.count for link in links)])
    parts = [(link.reading, flat[start:stop]) for link, (start, stop) in zip(links, pairwise(cuts), strict=True)]
    weights: list[Weights] = [
        {name: torch.from_numpy(value) for name, value in reading.weights(part).items()}
        for reading, part in parts
        if reading.count
    ]
    return Saved(links, weights, normaliser)


def _coefficients(archive: Archive, count: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """All parameters in their flat order, (count,); the size is known before anything is inflated.

    Raises:
        ManifestError: there are more or fewer than the layers have.
    """
    declared, name = archive.size(COEFFICIENTS), f"{archive.file}: {COEFFICIENTS}"
    if declared is None:
        if count:
            raise ManifestError(f"{name}: is not there, the layers have {count} parameters")
        return np.zeros(0, np.float32)
    limit = min(MOST_COEFFICIENT_BYTES, WIDEST * count + HEADER_BYTES)
    if declared > limit:
        raise ManifestError(f"{name}: declares {declared} bytes, the layers have {count} parameters")
    stream = Stream(archive.read(COEFFICIENTS, limit), name)
    flat = read_array(stream)
    stream.end()
    if flat.size != count:
        raise ManifestError(f"{name}: has {flat.size} parameters, the layers have {count}")
    return flat.reshape(-1).astype(np.float32)


def _normaliser(archive: Archive) -> Normaliser | None:
    limit = MOST_CONFIGURATION_BYTES
    if archive.size(PREPROCESSOR) is not None:
        content = archive.read(PREPROCESSOR, limit)
        what = "a serialised Java object" if content.startswith(JAVA_OBJECT) else "unknown to Stepcast"
        raise ManifestError(
            f"{archive.file}: {PREPROCESSOR} is {what}, and is not read. Delete it from the zip, and normalise inputs "
            "yourself."
        )
    if archive.size(NORMALISER) is None:
        return None
    return read_normaliser(archive.read(NORMALISER, limit), f"{archive.file}: {NORMALISER}")


def read_dl4j(file: Path, features: Sequence[Feature] = (), outputs: Sequence[str] = ()) -> Foreign:
    """A DL4J network as `take_in` wants it.

    Args:
        file: A ModelSerializer zip.
        features: Names and widths of the inputs; none: x0, x1, ... of width 1 each.
        outputs: Names of the outputs; none: y0, y1, ...

    Raises:
        ManifestError: see `read_saved`; or names do not fit the network.
    """
    saved = read_saved(file)
    specs = specs_of(saved.links)
    size = next((link.reading.size for link in saved.links if link.reading.size is not None), None)
    if size is None:
        raise ManifestError(f"{file}: no layer says how many inputs the network has")
    count = outputs_of(file, specs, size)
    if outputs and len(outputs) != count:
        raise ManifestError(f"{file}: the network has {count} outputs, {len(outputs)} names were given")
    labels = saved.normaliser.labels if saved.normaliser else None
    return Foreign(
        file=file,
        framework="DL4J",
        specs=specs,
        weights=saved.weights,
        features=_scaled(file, list(features), size, saved.normaliser.inputs if saved.normaliser else None),
        outputs=_answers(file, outputs or [f"y{n}" for n in range(count)], labels),
    )


def _scaled(file: Path, features: list[Feature], size: int, scaling: Scaling | None) -> tuple[Feature, ...]:
    """Features with the normaliser's mean and scale.

    Raises:
        ManifestError: they have other widths than the network, or one feature would need several means.
    """
    features = features or [Feature(name=f"x{n}") for n in range(size)]
    width = sum(feature.width for feature in features)
    if width != size:
        raise ManifestError(f"{file}: the network has {size} inputs, --features are {width} wide")
    if scaling is None:
        return tuple(features)
    if scaling.mean.size != size:
        raise ManifestError(f"{file}: normalizer.bin has {scaling.mean.size} columns, the network has {size} inputs")
    made, at = [], 0
    for feature in features:
        columns = slice(at, at + feature.width)
        means, scales = scaling.mean[columns], scaling.scale[columns]
        if (means != means[0]).any() or (scales != scales[0]).any():
            raise ManifestError(
                f"{file}: normalizer.bin scales the columns of feature {feature.name!r} apart. Name each of them."
            )
        made.append(feature.model_copy(update={"mean": float(means[0]), "scale": float(scales[0])}))
        at += feature.width
    return tuple(made)


def _answers(file: Path, names: Sequence[str], scaling: Scaling | None) -> tuple[Output, ...]:
    """Outputs in the labels' units."""
    if scaling is None:
        return tuple(Output(name=name) for name in names)
    if scaling.mean.size != len(names):
        raise ManifestError(f"{file}: normalizer.bin has {scaling.mean.size} labels, the network {len(names)} outputs")
    return tuple(
        Output(name=name, mean=float(mean), scale=float(scale))
        for name, mean, scale in zip(names, *scaling, strict=True)
    )
