"""Long tables, a row per series and moment: what a cell says, where a row stands, which columns a model is made of.

The trainer reads its tables by these laws, and so does `stepcast score`; a model that was trained from a table has the
table's columns in its manifest (`provenance.config`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .manifest import Manifest

    Doubles = npt.NDArray[np.float64]

MISSING: Final = frozenset({"", "na", "nan", "null"})
"""Cells without a reading, in lower case and stripped."""
Wave = Literal["sin", "cos"]
WAVES: Final[tuple[Wave, Wave]] = ("sin", "cos")
"""What a direction becomes, in this order."""


def is_parquet(path: Path) -> bool:
    """Whether a file is called one."""
    return path.suffix.lower() in (".parquet", ".pq")


def line(path: Path, row: int) -> str:
    """Where a row (from 0) stands: a line of a CSV, whose first one is its header; the number of a Parquet file's."""
    return f"{path}: row {row}" if is_parquet(path) else f"{path}:{row + 2}"


def in_order(path: Path) -> list[tuple[int, str]]:
    """A path's place among others; numbers in it count as numbers, so that x_9 stands before x_10.

    split() puts digits at the odd places, so they never meet letters.
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def of_direction(values: "Doubles", turn: float, wave: Wave) -> "Doubles":
    """Sine or cosine of directions of which `turn` is a full one."""
    import numpy as np

    angle = 2 * math.pi * values / turn
    return np.sin(angle) if wave == "sin" else np.cos(angle)


def within(values: "Doubles", limits: tuple[float, float]) -> "Doubles":
    """Values, NaN where they lie outside the limits."""
    import numpy as np

    return np.where((values < limits[0]) | (values > limits[1]), np.nan, values)


def direction_name(column: str, wave: Wave) -> str:
    """What a feature is called that is a direction's sine or cosine."""
    return f"{column}_{wave}"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a feature is made of.

    Attributes:
        turn, wave: Of a direction.
        range: Readings outside are missing.
        values: By series, of a static column that the table does not have.
    """

    column: str
    turn: float | None = None
    wave: Wave = "sin"
    range: tuple[float, float] | None = None
    values: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TrainedBy:
    """The table that a model was trained from; empty where it was none.

    Attributes:
        series, time: Its columns.
        origins: By feature; those that are not here have the name of their column, or are of the calendar.
    """

    series: str | None = None
    time: str | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)


def trained_by(manifest: "Manifest") -> TrainedBy:
    """The table that a model was trained from, as its manifest tells."""
    data = manifest.provenance.config.get("data")
    if not isinstance(data, dict) or data.get("kind") != "table" or not isinstance(data.get("columns"), dict):
        return TrainedBy()
    origins: dict[str, Origin] = {}
    for name, column in data["columns"].items():
        limits, turn, values = (column.get(key) for key in ("range", "turn", "values"))
        rest = (limits and (limits[0], limits[1])), (values if isinstance(values, dict) else None)
        if turn is None:
            origins[name] = Origin(name, range=rest[0], values=rest[1])
        else:
            origins |= {direction_name(name, wave): Origin(name, turn, wave, *rest) for wave in WAVES}
    return TrainedBy(data.get("series"), data.get("time"), origins)
