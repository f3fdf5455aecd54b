"""normalizer.bin: what DL4J did to inputs and labels before the network saw them, as mean and scale per column.

The file is the text NORMALIZER, a version, the normaliser's type and its arrays (ND4J's NormalizerSerializer). Stepcast
keeps normalisation inside the graph, as (x - mean) / scale of inputs and y * scale + mean of outputs.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepcast.errors import ManifestError

from .arrays import Stream, read_array

JAVA_OBJECT = b"\xac\xed"  # how a Java serialisation stream begins; it would be code
Columns = NDArray[np.float64]  # (F,)


class Scaling(NamedTuple):
    """(x - mean) / scale, per column."""

    mean: Columns
    scale: Columns


class Normaliser(NamedTuple):
    """What is done to inputs, and undone of outputs if labels were normalised too."""

    inputs: Scaling
    labels: Scaling | None


def read_normaliser(content: bytes, name: str) -> Normaliser:
    """Read normalizer.bin.

    Raises:
        ManifestError: it is damaged, a Java object, or of a type that is not a mean and a scale per column.
    """
    if content.startswith(JAVA_OBJECT):
        raise ManifestError(f"{name}: is a serialised Java object, which is never read. Save it again with DL4J 0.9.")
    stream = Stream(content, name)
    if (header := stream.text()) != "NORMALIZER":
        raise ManifestError(f"{name}: is no normaliser (begins with {header[:40]!r})")
    if (version := stream.number(">i")) != 1:
        raise ManifestError(f"{name}: is of version {version}, known is 1")
    kind = stream.text()
    if kind == "STANDARDIZE":
        has_labels = stream.number(">?")
        made = [_standard(stream) for _ in range(1 + has_labels)]
    elif kind == "MIN_MAX":
        has_labels = stream.number(">?")
        low, high = stream.number(">d"), stream.number(">d")
        made = [_min_max(stream, low, high) for _ in range(1 + has_labels)]
    else:
        raise ManifestError(f"{name}: is of type {kind[:40]!r}, known are STANDARDIZE and MIN_MAX")
    stream.end()
    for scaling in made:
        if not all(np.isfinite(part).all() for part in scaling):
            raise ManifestError(f"{name}: has a mean or a scale that is not finite")
    return Normaliser(made[0], made[1] if has_labels else None)


def _columns(stream: Stream) -> Columns:
    return read_array(stream).astype(np.float64).reshape(-1)


def _standard(stream: Stream) -> Scaling:
    mean, deviation = _columns(stream), _columns(stream)
    return _scaling(stream, mean, deviation)


def _min_max(stream: Stream, low: float, high: float) -> Scaling:
    """x to (x - least) / (most - least) * (high - low) + low, said as a mean and a scale."""
    least, most = _columns(stream), _columns(stream)
    if not high > low or least.shape != most.shape:
        raise ManifestError(f"{stream.name}: to the range {low} to {high}, from {least.size} and {most.size} columns")
    scale = np.where(most > least, most - least, 1.0) / (high - low)
    return _scaling(stream, least - low * scale, scale)


def _scaling(stream: Stream, mean: Columns, scale: Columns) -> Scaling:
    if mean.shape != scale.shape:
        raise ManifestError(f"{stream.name}: {mean.size} means and {scale.size} scales")
    return Scaling(mean, np.where(scale > 0, scale, 1.0))  # a constant column is only shifted, as in DL4J
