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
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.str_]

MISSING: Final = float("nan")


class FeatureNames:
    """A model's features and outputs by name; made once per manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._slices = manifest.feature_slices()
        self._width = manifest.n_features
        self._required = {f.name for f in manifest.features if f.missing == "refuse"}
        self._plain = len(self._slices) == self._width  # every feature is one value
        self._labels = None if manifest.classes is None else np.array([*manifest.classes, ""])

    # --- inputs ---------------------------------------------------------------------------------------------------

    def array(self, named: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, partial: bool = False) -> Floats:
        """Inputs by position.

        Args:
            named: Values by feature name: numbers make [F], [N] columns [N,F], [N,T] columns [N,T,F]; a number beside
                columns holds for all rows; a feature of width W has W values more in its last axis. None is a missing
                reading. Or a list of such records, one per example (values: numbers, or [T]).
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
        plain = [isinstance(record, Mapping) and self._numbers(record, partial) for record in named]
        if all(plain):
            return as_floats(plain, "$.inputs")
        rows = [self._example(record, partial, f"$.inputs[{i}]") for i, record in enumerate(named)]
        shapes = sorted({row.shape[:-1] for row in rows})
        if len(shapes) > 1:
            raise ShapeMismatch(f"$.inputs has records of shapes {_listed(shapes)}, want one", got=list(shapes))
        return np.stack(rows)

    def _numbers(self, named: Mapping[str, Any], partial: bool) -> list[float] | None:
        """One example's values by position, NaN where they are missing.

        Returns:
            None where they need a closer look: a name is unknown, a needed one is left out, or a value is no number.
        """
        given, names = named.keys(), self._slices.keys()
        if not self._plain or not given <= names or not (partial or self._required <= given):
            return None
        row = [named.get(name) for name in names]
        return [MISSING if value is None else value for value in row] if _NUMBERS.issuperset(map(type, row)) else None

    def _example(self, named: Mapping[str, Any], partial: bool, path: str) -> Floats:
        if not isinstance(named, Mapping):
            raise InvalidRequest(f"{path} is {type(named).__name__}, want an object of numbers by feature name")
        row = self._numbers(named, partial)
        if row is not None:
            return as_floats(row, path)
        self._refuse_unknown(named, path)  # a typing error first: it is why the right name is missing
        if not partial and not self._required <= named.keys():
            self._refuse_missing(named, path)
        return self._columns(named, path)

    def _columns(self, named: Mapping[str, Any], path: str) -> Floats:
        """The same for columns and wide features."""
        columns = {name: self._column(name, value, f"{path}.{name}") for name, value in named.items()}
        shapes = {name: column.shape[:-1] for name, column in columns.items() if column.ndim > 1}
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
        missing = [f.name for f in self.manifest.features if f.name in self._required and f.name not in named]
        told = ", ".join(map(repr, missing))
        raise InvalidRequest(f"{path} leaves out {told}; model {self.manifest.name!r} needs them", missing=missing)

    def _refuse_unknown(self, named: Mapping[str, Any], path: str) -> None:
        unknown = [str(name)[:_LONGEST] for name in named if name not in self._slices][:_TOLD]
        if not unknown:
            return
        near = {name: close for name in unknown if (close := self._nearest(name))}
        told = _listed(f"{n!r} (nearest: {near[n]!r})" if n in near else repr(n) for n in unknown)
        raise InvalidRequest(
            f"{path} names {told}; model {self.manifest.name!r} has {_listed(map(repr, self._slices))}",
            unknown=unknown,
            nearest=near,
        )

    def _nearest(self, name: str) -> str | None:
        """The feature whose name is most like this one, whatever the case of its letters."""
        names = {known.casefold(): known for known in self._slices}
        close = get_close_matches(name.casefold(), names, 1, cutoff=0.5)
        return names[close[0]] if close else None

    # --- outputs --------------------------------------------------------------------------------------------------

    def columns(self, outputs: Floats) -> dict[str, Floats]:
        """Views of outputs (..., O) by name; for a classifier the classes' probabilities by class."""
        names = self.manifest.classes or [output.name for output in self.manifest.outputs]
        return {name: outputs[..., i] for i, name in enumerate(names)}

    def labels(self, outputs: Floats) -> Labels | None:
        """The likeliest class of each (..., O), "" where the step was masked; None: the model is no classifier."""
        return None if self._labels is None else self._labels[likeliest(outputs)]

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


def likeliest(outputs: Floats) -> Ints:
    """The index of the likeliest class of each (..., O), -1 where the step was masked."""
    masked = np.isnan(outputs)
    return np.where(masked.any(-1), -1, np.where(masked, 0, outputs).argmax(-1))


_TOLD: Final = 12
"""The most names that a message tells, and that nearest ones are looked for,"""
_LONGEST: Final = 128
"""and how much of each: manifests have no longer ones."""
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


def _listed(items: Iterable[object], limit: int = _TOLD) -> str:
    told = [str(item) for item in items]
    return ", ".join(told[:limit]) + (", ..." if len(told) > limit else "")


def _json(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes.items()}
