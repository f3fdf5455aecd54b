"""What a caller may give as inputs, and how the outputs go back: in the form in which the inputs came.

| inputs | outputs |
|---|---|
| an array, or nested lists | float32 array |
| a dict of numbers by feature name | dict of numbers by output name |
| a dict of columns | dict of columns |
| a list of records | list of dicts |
| a pandas DataFrame | DataFrame with the same index |

A classifier's dict is {"class": ..., "probabilities": {...}}; its DataFrame has a column `class` and one per class.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt

from .features import FeatureNames, Floats, Labels, Rows, as_floats

V = TypeVar("V")
L = TypeVar("L")
O = TypeVar("O")  # noqa: E741 - outputs, as everywhere


class Frame(Protocol):
    """A table like pandas' DataFrame: columns by name, an index, made from columns and an index."""

    @property
    def columns(self) -> Any:
        """Names of the columns."""

    @property
    def index(self) -> Any:
        """Labels of the rows."""

    def __getitem__(self, name: Any, /) -> Any:
        """A column."""


F = TypeVar("F", bound=Frame)

Array: TypeAlias = (
    npt.ArrayLike
    | Sequence[float | None]
    | Sequence[Sequence[float | None]]
    | Sequence[Sequence[Sequence[float | None]]]
)
"""Numbers by position; None and NaN are missing readings."""
Moment: TypeAlias = str | float | datetime
"""ISO 8601 text with its offset, Unix seconds, or a datetime that knows its zone."""
Row: TypeAlias = Mapping[str, Moment | None]
"""One example, one step: numbers by feature name, categories as text, the moment as `time`."""
Columns: TypeAlias = Mapping[str, Array | Sequence[datetime] | Sequence[str | None] | Mapping[str, Moment]]
"""[N] or [N,T] by feature name; `time` also as its start and the distance of the steps."""
Records: TypeAlias = Sequence[Row]
"""One row per example."""


class Named(dict[str, V | L | dict[str, V]], Generic[V, L]):
    """Outputs by name: of type V; a classifier's `class` of type L, its `probabilities` of V by class."""

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, name: Literal["class"], /) -> L: ...
        @overload
        def __getitem__(self, name: Literal["probabilities"], /) -> dict[str, V]: ...
        @overload
        def __getitem__(self, name: str, /) -> V: ...
        def __getitem__(self, name: str, /) -> Any: ...


NamedRow: TypeAlias = Named[float, str]
NamedColumns: TypeAlias = Named[Floats, Labels]


# --- forms ----------------------------------------------------------------------------------------------------------


class Form(ABC, Generic[O]):
    """Inputs in a caller's form, for which outputs can be brought into the same form."""

    named = True

    @abstractmethod
    def array(self, names: FeatureNames | None, rows: Rows = "examples", future: int | None = None) -> Floats:
        """The inputs by position; `names` is needed where `named`, the rest is FeatureNames.array's."""

    @abstractmethod
    def outputs(self, y: Floats, names: FeatureNames | None) -> O:
        """Outputs (..., O), of as many examples and steps as the inputs, in the caller's form."""


class _Positional(Form[Floats]):
    named = False

    def __init__(self, values: object) -> None:
        self._values = values

    def array(self, names: FeatureNames | None, rows: Rows = "examples", future: int | None = None) -> Floats:
        return as_floats(self._values)

    def outputs(self, y: Floats, names: FeatureNames | None) -> Floats:
        return y


class _ByName(Form[Any]):
    """A dict of numbers or columns."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def array(self, names: FeatureNames | None, rows: Rows = "examples", future: int | None = None) -> Floats:
        return _known(names).array(self._values, rows=rows, future=future)

    def outputs(self, y: Floats, names: FeatureNames | None) -> Named[Any, Any]:
        return Named(_known(names).named(y))


class _Records(Form[list[Named[Any, Any]]]):
    def __init__(self, values: Sequence[Mapping[str, Any]]) -> None:
        self._values = values

    def array(self, names: FeatureNames | None, rows: Rows = "examples", future: int | None = None) -> Floats:
        return _known(names).array(self._values, rows=rows, future=future)

    def outputs(self, y: Floats, names: FeatureNames | None) -> list[Named[Any, Any]]:
        return [Named(_known(names).named(row)) for row in np.atleast_2d(y)]


class _Table(Form[Any]):
    """A DataFrame: a row per example or, where the call reads rows as steps, per step."""

    def __init__(self, values: Frame) -> None:
        self._values = values

    def array(self, names: FeatureNames | None, rows: Rows = "examples", future: int | None = None) -> Floats:
        columns = {name: _column(self._values[name]) for name in self._values.columns}
        return _known(names).array(columns, rows=rows, future=future)

    def outputs(self, y: Floats, names: FeatureNames | None) -> Any:
        y = np.atleast_2d(y)
        labels, columns = _known(names).labels(y), _known(names).columns(y)
        made = columns if labels is None else {"class": labels, **columns}
        return type(self._values)(made, index=self._values.index[-len(y) :])  # type: ignore[call-arg]


def form(inputs: Any) -> Form[Any]:
    """The form in which inputs came."""
    if isinstance(inputs, np.ndarray):
        return _Positional(inputs)
    if isinstance(inputs, Mapping):
        return _ByName(inputs)
    if is_frame(inputs):
        return _Table(inputs)
    if isinstance(inputs, Sequence) and len(inputs) and isinstance(inputs[0], Mapping):
        return _Records(inputs)
    return _Positional(inputs)


def is_frame(inputs: object) -> bool:
    """Whether inputs are a DataFrame; pandas is not imported to find out."""
    return hasattr(type(inputs), "columns") and hasattr(type(inputs), "index")


def rows(frame: Frame) -> Iterator[dict[str, Any]]:
    """A DataFrame's rows as records."""
    names = list(frame.columns)
    for row in zip(*(_column(frame[name]).tolist() for name in names), strict=True):
        yield dict(zip(names, row, strict=True))


def _column(column: Any) -> npt.NDArray[Any]:
    """A DataFrame's column: of a nullable type with NaN for NA, of sequences (a wide feature) with an axis more."""
    if not isinstance(column.dtype, np.dtype) and column.dtype.kind in "fiub":
        return np.asarray(column.to_numpy(np.float64, na_value=np.nan))
    values = np.asarray(column)
    return np.stack(list(values)) if values.dtype == object and len(values) and np.ndim(values[0]) else values


def _known(names: FeatureNames | None) -> FeatureNames:
    if names is None:
        raise ValueError("named inputs need the model's manifest")
    return names
