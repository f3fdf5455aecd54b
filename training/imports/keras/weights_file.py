"""model.weights.h5: arrays by path, each of a shape that is known before it is read.

HDF5 can point into other files (external links, external storage, virtual datasets). Nothing of this is followed.
"""

import io
import math
from pathlib import Path
from typing import Final

import h5py
import numpy as np

from stepcast.errors import ManifestError

from ...stepper import Floats

MOST_NUMBERS: Final = 1 << 28  # of one array


class WeightsFile:
    """The content of a model.weights.h5.

    Raises:
        ManifestError: it is no HDF5 file.
    """

    def __init__(self, content: bytes, file: Path) -> None:
        self._told = f"{file}: model.weights.h5"
        try:
            self._root = h5py.File(io.BytesIO(content), "r")
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ManifestError(f"{self._told}: is no HDF5 file, or a damaged one ({_first(error)})") from error

    def read(self, path: str, shape: tuple[int, ...]) -> Floats:
        """An array as float32, which must have this shape.

        Raises:
            ManifestError: it is not there, elsewhere, of another shape or type, or not finite.
        """
        try:
            dataset = self._dataset(path)
            if dataset.shape != shape:
                raise ManifestError(f"{self._told}: {path} is {list(dataset.shape)}, the layer wants {list(shape)}")
            if dataset.dtype.kind != "f" or math.prod(shape) > MOST_NUMBERS:
                raise ManifestError(f"{self._told}: {path} is {list(shape)} of {dataset.dtype}, want floats")
            values = np.asarray(dataset[()], np.float32)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, MemoryError) as error:
            raise ManifestError(f"{self._told}: {path} cannot be read ({_first(error)})") from error
        if not np.isfinite(values).all():
            raise ManifestError(f"{self._told}: {path} has numbers that are not finite")
        return values

    def has(self, path: str) -> bool:
        """Whether there is anything at a path."""
        group = self._root
        for part in path.split("/"):
            if not isinstance(group, h5py.Group) or not isinstance(group.get(part, getlink=True), h5py.HardLink):
                return False
            group = group[part]
        return True

    def _dataset(self, path: str) -> h5py.Dataset:
        if not self.has(path):
            raise ManifestError(f"{self._told}: has no {path}")
        found = self._root[path]
        if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
            raise ManifestError(f"{self._told}: {path} is no array, or lies in another file. Do not trust it.")
        return found


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
