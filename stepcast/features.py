"""Between names and positions: inputs by feature name become float32 arrays, outputs get their names back. No I/O.

Shape letters: N examples, T steps, F input values, W width of a feature, O outputs.

    names = FeatureNames(manifest)
    x = names.array({"temp": [39.0, 41.5], "humid": [61.0, None]})        # (2, F)
    names.columns(y)                                                     # {"temp": (2,), ...} of y (2, O)
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .errors import InvalidRequest, ShapeMismatch
from .manifest import Manifest

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.str_]

MISSING: Final = float("nan")


class FeatureNames:
    """A model's features and outputs by name; made once per manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._slices = manifest.feature_slices()
        self._width = manifest.n_features
        self._numbers = {f.name: self._slices[f.name].start for f in manifest.features if f.width == 1}
        self._required = {f.name for f in manifest.features if f.missing == "refuse"}
        self._labels = None if manifest.classes is None else np.array(manifest.classes)

    # --- inputs ---------------------------------------------------------------------------------------------------

    def array(self, named: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, partial: bool = False) -> Floats:
        """Inputs by position.

        Args:
            named: Values by feature name: numbers make [F], [N] columns [N,F], [N,T] columns [N,T,F]; a feature of
                width W has W values more in its last axis. None is a missing reading. Or a list of such records, one
                per example (values: numbers, or [T]).
            partial: Any feature may be left out, whatever its policy (what is known of a rollout's future).

        Raises:
            InvalidRequest: a name is unknown, names are left out whose model takes no missing readings, or a value
                is not a number.
            ShapeMismatch: the features do not have one shape.
        """
        if isinstance(named, Mapping):
            return self._example(named, partial, "$.inputs")
        if not named:
            raise ShapeMismatch("$.inputs is an empty list, want at least one record", got=[0])
        rows = [self._example(record, partial, f"$.inputs[{i}]") for i, record in enumerate(named)]
        shapes = sorted({row.shape[:-1] for row in rows})
        if len(shapes) > 1:
            raise ShapeMismatch(f"$.inputs has records of shapes {_listed(shapes)}, want one", got=list(shapes))
        return np.stack(rows)

    def _example(self, named: Mapping[str, Any], partial: bool, path: str) -> Floats:
        if not isinstance(named, Mapping):
            raise InvalidRequest(f"{path} is {type(named).__name__}, want an object of numbers by feature name")
        if not partial and not self._required <= named.keys():
            self._refuse_missing(named, path)
        row = [MISSING] * self._width
        numbers = self._numbers
        for name, value in named.items():
            at = numbers.get(name)
            if at is None or type(value) not in _NUMBERS:
                return self._columns(named, path)
            row[at] = MISSING if value is None else value
        return as_floats(row, path)

    def _columns(self, named: Mapping[str, Any], path: str) -> Floats:
        """The same for columns and wide features."""
        self._refuse_unknown(named, path)
        columns = {name: self._column(name, value, f"{path}.{name}") for name, value in named.items()}
        shapes = {name: column.shape[:-1] for name, column in columns.items()}
        shape = next(iter(shapes.values()), ())
        if any(other != shape for other in shapes.values()):
            told = _listed(f"{name!r} {list(other)}" for name, other in shapes.items())
            raise ShapeMismatch(f"{path} has features of different shapes: {told}", shapes=_json(shapes))
        if len(shape) > 2:
            raise ShapeMismatch(
                f"{path} has columns of shape {list(shape)}, want numbers, [N] or [N,T]", got=list(shape)
            )
        x = np.full((*shape, self._width), MISSING, np.float32)
        for name, column in columns.items():
            x[..., self._slices[name]] = column
        return x

    def _column(self, name: str, value: object, path: str) -> Floats:
        """One feature's values, its width as the last axis."""
        where = self._slices[name]
        width = where.stop - where.start
        if value is None and width > 1:
            return np.full(width, MISSING, np.float32)
        array = as_floats(value, path)
        if width == 1:
            return array[..., None]
        if array.shape[-1:] != (width,):
            shape = list(array.shape)
            raise ShapeMismatch(f"{path} has shape {shape}, want {width} values in its last axis", got=shape)
        return array

    def _refuse_missing(self, named: Mapping[str, Any], path: str) -> None:
        self._refuse_unknown(named, path)  # a typing error first: it is why the right name is missing
        missing = [f.name for f in self.manifest.features if f.name in self._required and f.name not in named]
        told = ", ".join(map(repr, missing))
        raise InvalidRequest(f"{path} leaves out {told}; model {self.manifest.name!r} needs them", missing=missing)

    def _refuse_unknown(self, named: Mapping[str, Any], path: str) -> None:
        unknown = [name for name in named if name not in self._slices]
        if not unknown:
            return
        nearest = {name: near[0] for name in unknown if (near := get_close_matches(str(name), self._slices, 1))}
        told = ", ".join(f"{n!r} (nearest: {nearest[n]!r})" if n in nearest else repr(n) for n in unknown)
        raise InvalidRequest(
            f"{path} names {told}; model {self.manifest.name!r} has {_listed(map(repr, self._slices))}",
            unknown=[str(name) for name in unknown],
            nearest=nearest,
        )

    # --- outputs --------------------------------------------------------------------------------------------------

    def columns(self, outputs: Floats) -> dict[str, Floats]:
        """Views of outputs (..., O) by name; for a classifier the classes' probabilities by class."""
        names = self.manifest.classes or [output.name for output in self.manifest.outputs]
        return {name: outputs[..., i] for i, name in enumerate(names)}

    def labels(self, outputs: Floats) -> Labels | None:
        """The likeliest class of each (..., O), "" where the step was masked; None: the model is no classifier."""
        if self._labels is None:
            return None
        masked = np.isnan(outputs).any(-1)
        return np.where(masked, "", self._labels[np.where(masked, 0, outputs.argmax(-1))])

    def named(self, outputs: Floats) -> dict[str, Any]:
        """Outputs by name: numbers of [O], arrays [N] of [N,O], [N,T] of [N,T,O].

        A classifier's are {"class", "probabilities": by class}.
        """
        values: dict[str, Any] = self.columns(outputs)
        labels: Any = self.labels(outputs)
        if outputs.ndim == 1:
            values = {name: float(value) for name, value in values.items()}
            labels = None if labels is None else str(labels)
        return values if labels is None else {"class": labels, "probabilities": values}


_NUMBERS: Final = frozenset({int, float, type(None)})
"""Types of a single reading in the common case: whatever else, a numpy scalar too, goes the longer way."""


def as_floats(values: object, path: str = "inputs") -> Floats:
    """An array of float32; None becomes NaN.

    Raises:
        InvalidRequest: it is ragged, or has values that are not numbers.
    """
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiubO" or (array.dtype == object and _has_text(array)):
            raise TypeError("got text")
        with np.errstate(over="ignore"):  # infinite in float32: the server refuses it, by its index
            return np.asarray(array, np.float32, order="C")  # object to float: None becomes NaN
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{path}: want numbers, null, or arrays of one shape of them; {error}") from error


def _has_text(array: npt.NDArray[Any]) -> bool:
    return any(isinstance(value, str | bytes) for value in array.flat)


def _listed(items: Iterable[object], limit: int = 12) -> str:
    told = [str(item) for item in items]
    return ", ".join(told[:limit]) + (", ..." if len(told) > limit else "")


def _json(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes.items()}
