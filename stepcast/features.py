"""Between names and positions: inputs by feature name become float32 arrays, outputs get their names back. No I/O.

Shape letters: N examples, T steps, F input values, W width of a feature, O outputs.

    names = FeatureNames(manifest)
    x = names.array({"temp": [39.0, 41.5], "humid": [61.0, None]})        # (2, F)
    names.columns(y)                                                     # {"temp": (2,), ...} of y (2, O)
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from .calendars import Calendar, Seconds, Shape, moments_of, seconds
from .errors import InvalidRequest, ShapeMismatch
from .manifest import TIME, Manifest
from .tables import MISSING as NOTHING

Rows = Literal["examples", "steps"]
"""What the rows of inputs of rank 2 are, the axis of columns [N]."""
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.str_]

MISSING: Final = float("nan")


class FeatureNames:
    """A model's features and outputs by name; made once per manifest.

    Attributes:
        worded: Names whose values may be other than numbers: features of categories, and `time`.
        dated: Names of the features that follow from a row's moment.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._slices = manifest.feature_slices()
        self._width = manifest.n_features
        self._required = {f.name for f in manifest.features if f.missing == "refuse"}
        self._indices = {f.name: _indices(f.categories) for f in manifest.features if f.categories is not None}
        self.dated = [f.name for f in manifest.features if f.calendar is not None]
        self.worded = frozenset([*self._indices, TIME] if self.dated else self._indices)
        self._kinds = [(f.name, f.calendar is not None, self._indices.get(f.name)) for f in manifest.features]
        self._plain = len(self._slices) == self._width  # every feature is one value
        self._labels = None if manifest.classes is None else np.array([*manifest.classes, ""])

    # --- inputs ---------------------------------------------------------------------------------------------------

    @cached_property
    def _calendar(self) -> Calendar:
        """Made when the first moment comes; ConfigError where it cannot be."""
        return Calendar.of(self.manifest)

    def array(
        self,
        named: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        rows: Rows = "examples",
        future: int | None = None,
    ) -> Floats:
        """Inputs by position.

        Args:
            named: Values by feature name: numbers make [F], [N] columns [N,F], [N,T] columns [N,T,F]; a number beside
                columns holds for all rows; a feature of width W has W values more in its last axis. None is a missing
                reading. Or a list of such records, one per example (values: numbers, or [T]). A feature of categories
                takes a category's text; one that the model does not know becomes its index 0. The features of a
                calendar may be given by `time`: see stepcast.calendars.
            rows: What [N] is; steps: columns [T] or [N,T].
            future: What is known of so many steps of a rollout: rows are steps, any feature may be left out.

        Raises:
            InvalidRequest: a name is unknown, names are left out whose model takes no missing readings, or a value
                is not a number (or a category, or a moment).
            ShapeMismatch: the features do not have one shape.
            ConfigError: what knows the model's holidays or time zones is not installed here.
        """
        partial = future is not None
        if isinstance(named, Mapping):
            return self._example(named, partial, "$.inputs", future or (0 if rows == "steps" else None))
        if not named:
            raise ShapeMismatch("$.inputs is an empty list, want at least one record", got=[0])
        if not self._indices:  # whose numbers are texts
            plain = [isinstance(record, Mapping) and self._numbers(record, partial) for record in named]
            if all(plain):
                return as_floats(plain, "$.inputs")
        each = [self._example(record, partial, f"$.inputs[{i}]") for i, record in enumerate(named)]
        shapes = sorted({x.shape[:-1] for x in each})
        if len(shapes) > 1:
            raise ShapeMismatch(f"$.inputs has records of shapes {_listed(shapes)}, want one", got=list(shapes))
        return np.stack(each)

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

    def _example(self, named: Mapping[str, Any], partial: bool, path: str, steps: int | None = None) -> Floats:
        """An object's values by position; `steps`: columns [N] are of so many, 0: as they say, None: of examples."""
        if not isinstance(named, Mapping):
            raise InvalidRequest(f"{path} is {type(named).__name__}, want an object of numbers by feature name")
        if not self.worded.isdisjoint(named):
            named = self._spelled(named, path, steps)
        row = self._numbers(named, partial)
        if row is not None:
            return as_floats(row, path)
        self._refuse_unknown(named, path)  # a typing error first: it is why the right name is missing
        if not partial and not self._required <= named.keys():
            self._refuse_missing(named, path)
        return self._columns(named, path)

    def _spelled(self, named: Mapping[str, Any], path: str, steps: int | None) -> dict[str, Any]:
        """The same by numbers alone: categories as their indices, a moment as the features of the calendar."""
        spelled = {name: value for name, value in named.items() if name != TIME or not self.dated}
        for name in self._indices.keys() & spelled.keys():
            spelled[name] = _indices_of(spelled[name], self._indices[name], f"{path}.{name}")
        if len(spelled) == len(named):
            return spelled
        if both := [name for name in self.dated if name in named]:
            told = _listed(map(repr, both))
            raise InvalidRequest(f"{path} has {TIME!r} and what follows from it: {told}. Leave one of them out.")
        shape = self._shape(spelled) or ((steps,) if steps else ())
        time, where, along = named[TIME], f"{path}.{TIME}", len(shape) == 2 or (bool(shape) and steps is not None)
        if not shape and not isinstance(time, list | tuple | np.ndarray | Mapping):
            return spelled | dict(zip(self.dated, self._calendar.row(seconds(time, where)), strict=True))
        moments = moments_of(time, shape, where, along=along, every_s=self.manifest.every_s)
        columns = self._calendar.columns(moments)
        return spelled | {name: columns[..., place] for place, name in enumerate(self.dated)}

    def _shape(self, named: Mapping[str, Any]) -> Shape:
        """The shape of columns; () where all of them are numbers."""
        if _NUMBERS.issuperset(map(type, named.values())):
            return ()
        for name, value in named.items():
            if isinstance(value, list | tuple | np.ndarray) and (where := self._slices.get(name)) is not None:
                shape = np.shape(as_floats(value, name))
                shape = shape[:-1] if where.stop - where.start > 1 else shape
                if shape:
                    return shape
        return ()

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
        advice = f". Give {TIME!r} in place of those of the calendar." if {*self.dated} & {*missing} else ""
        raise InvalidRequest(
            f"{path} leaves out {told}; model {self.manifest.name!r} needs them{advice}", missing=missing
        )

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

    def row(self, values: Sequence[Any]) -> list[float | None]:
        """One example's numbers by position, of features of width 1.

        Args:
            values: The row's moment, if the model has a calendar; then all that is not of the calendar, in the order of
                the features.

        Raises:
            InvalidRequest: the moment, or a category, is none.
        """
        given = iter(values)
        dated = iter(self._calendar.row(seconds(next(given), f"$.inputs.{TIME}")) if self.dated else ())
        row = []
        for name, calendar, indices in self._kinds:
            if calendar:
                row.append(next(dated))
            else:
                value = next(given)
                row.append(value if indices is None else _index_of(value, indices, f"$.inputs.{name}"))
        return [None if value is MISSING else value for value in row]

    # --- cells of tables ------------------------------------------------------------------------------------------

    def of_moments(self, at_s: Seconds) -> Floats:
        """What follows from moments (R,), in seconds since 1970: (R, C), the columns in the order of `dated`."""
        return self._calendar.columns(at_s)

    def of_cells(self, name: str, texts: Iterable[str | None]) -> Floats:
        """A category's indices of a table's cells: a listed text is itself, also if it looks like a missing reading.

        Cells are stripped; NaN stands for a missing one, 0 for a text that the model does not know.
        """
        indices = self._indices[name]
        cells = ["" if text is None else text.strip() for text in texts]
        return np.array([indices.get(cell, MISSING if cell.lower() in NOTHING else 0) for cell in cells], np.float32)

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


def _indices(categories: Sequence[str]) -> dict[str, int]:
    return {text: index for index, text in enumerate(categories, 1)}


def _indices_of(value: Any, indices: Mapping[str, int], path: str) -> Any:
    """Categories, one or an array of them, as their indices; NaN where one is missing, 0 where it is unknown."""
    if not isinstance(value, list | tuple | np.ndarray):
        return _index_of(value, indices, path)
    try:
        texts = np.asarray(value, object)
    except ValueError as error:
        raise InvalidRequest(f"{path} is ragged: its rows have different lengths") from error
    found = [_index_of(text, indices, path) for text in texts.ravel().tolist()]
    return np.array(found, np.float32).reshape(texts.shape)


def _index_of(text: Any, indices: Mapping[str, int], path: str) -> float:
    """One category's index. A whole number is the category of that text, as a column of a table may hold them."""
    if text is None or text != text:
        return MISSING
    if isinstance(text, np.generic):
        text = text.item()
    if isinstance(text, float) and text.is_integer():
        text = int(text)
    if not isinstance(text, str | int) or isinstance(text, bool):
        raise InvalidRequest(f"{path} has {str(text)[:_LONGEST]!r}, want a category's text, or null")
    return indices.get(str(text), 0)


def _has_text(array: npt.NDArray[Any]) -> bool:
    return any(isinstance(value, str | bytes) for value in array.flat)


def _listed(items: Iterable[object], limit: int = _TOLD) -> str:
    told = [str(item) for item in items]
    return ", ".join(told[:limit]) + (", ..." if len(told) > limit else "")


def _json(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes.items()}
