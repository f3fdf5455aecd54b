"""The `data:` block of kind `table`, and which features and outputs it names."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stepcast.calendars import describe
from stepcast.manifest import TIME, CalendarChannel
from stepcast.tables import WAVES as DIRECTION_WAVES
from stepcast.tables import direction_name

if TYPE_CHECKING:
    from .table import TableSource

Calendar = Literal["hour", "week", "year", "season", "holiday"]
WAVES: Final[dict[Calendar, tuple[Literal["sin", "cos"], ...]]] = {
    "hour": ("sin", "cos"),
    "week": ("sin", "cos"),
    "year": ("sin", "cos"),
    "season": ("cos",),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ColumnConfig(_Strict):
    """One column of the file."""

    unit: str = ""
    target: bool = Field(default=False, description="its value `horizon` steps later is to be forecast")
    range: tuple[float, float] | None = Field(default=None, description="readings outside are taken as missing")
    turn: float | None = Field(default=None, gt=0, description="a direction: this much is one full turn")
    missing: Literal["refuse", "mean", "zero", "hold"] = "hold"
    indicator: bool = False
    changes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="steps: a channel for each says how much the reading has changed over so many"
    )
    known: bool = Field(
        default=False, description="known of the future, as a price is: a step has the value of the moment it forecasts"
    )
    static: bool = Field(default=False, description="of a series, not of a moment, as a height is")
    values: dict[str | int, float | str] | Path | None = Field(
        default=None, description="of a static column that the file does not have: by series, or a file of them"
    )
    category: bool = Field(default=False, description="cells are names, not numbers")
    categories: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="the names, all others are unknown; default: those of the training rows"
    )
    embedding: int | None = Field(
        default=None, ge=1, description="values of a name's learned vector; default: by count"
    )

    @property
    def named(self) -> bool:
        """Whether its cells are names."""
        return self.category or self.categories is not None

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if self.changes and (self.turn is not None or self.named):
            raise ValueError("a direction (turn), or a category, has no changes")
        if self.turn is not None and self.target:
            raise ValueError("a direction (turn) cannot be a target")
        if self.target and (self.known or self.static or self.named):
            raise ValueError("a target cannot be known, static or a category: it is a number that has to be forecast")
        if self.known and self.static:
            raise ValueError("static says that it never changes, known that its future is given. Say one of them.")
        if self.values is not None and not self.static:
            raise ValueError("values are of a series. Set static: true.")
        if self.named and (self.turn is not None or self.range is not None or self.missing == "mean"):
            raise ValueError("a category has no turn, no range and no mean")
        if self.embedding is not None and not self.named:
            raise ValueError("embedding belongs to a category. Set category: true.")
        return self


class HolidaysConfig(_Strict):
    """Whose public holidays the calendar knows."""

    country: str = Field(description="ISO 3166-1 alpha-2, such as US")
    subdivision: str | None = Field(default=None, description="a part of it, ISO 3166-2, such as NY")


class TableConfig(_Strict):
    """`data: {kind: table}`."""

    kind: Literal["table"]
    path: Path = Field(
        description="the CSV or Parquet (.parquet, .pq) file; relative to the configuration file, or inside `package`"
    )
    package: str | None = Field(default=None, description="an installed Python package that carries the file")
    series: str | None = Field(default=None, description="column that tells the series apart; None: there is one")
    time: str
    every: str = Field(description="the grid's step, as pandas writes it: 1h, 15min, 1D")
    columns: dict[str, ColumnConfig] = Field(min_length=1)
    calendar: tuple[Calendar, ...] = Field(
        default=(),
        description="sine and cosine of where the step's time stands in the day, the week, the year; season is the "
        "cosine alone, counted from midwinter: the same in November as in February, so that a model trained on "
        "part of a year meets nothing new in the rest; holiday is 1 if the moment that is forecast is on one",
    )
    zone: str = Field(default="UTC", description="whose wall clocks the calendar reads, such as America/New_York")
    holidays: HolidaysConfig | None = None
    label: str | None = Field(default=None, description="a column of class names; instead of targets")
    classes: tuple[str, ...] | None = Field(
        default=None, min_length=2, description="the classes that `label` may name; default: those it has, sorted"
    )
    horizon: int | tuple[int, ...] = Field(
        default=1, description="how many steps ahead the label of a step is (of a class 0), or a list: a label for each"
    )
    target_scale: Literal["value", "change"] = Field(
        default="value",
        description="what outputs are scaled by; change belongs to `residual: true` in the network",
    )
    validation: datetime = Field(description="first moment of the validation rows; training is all before; UTC")
    test: datetime = Field(description="first moment of the test rows")
    warm_up: int = Field(default=168, ge=0, description="unscored steps before validation and test rows")

    @field_validator("every")
    @classmethod
    def _a_step(cls, every: str) -> str:
        from pandas import Timedelta  # slow to import, and not needed for recipes without a table

        try:
            is_one = Timedelta(every) > Timedelta(0)  # NaT is not
        except ValueError:
            is_one = False
        if not is_one:
            raise ValueError(f"{every!r} is no step of time. Write a number and a unit: 1h, 15min, 1D.")
        return every

    @model_validator(mode="before")
    @classmethod
    def _class_of_now(cls, given: Any) -> Any:
        """A class is told of the step that it stands beside, unless a horizon is set."""
        return {"horizon": 0, **given} if isinstance(given, dict) and given.get("label") else given

    @model_validator(mode="after")
    def _targets(self) -> Self:
        targets = [name for name, column in self.columns.items() if column.target]
        if self.label is None and not targets:
            raise ValueError("columns: none of them has target: true, and there is no label")
        ahead = self.horizons
        if not ahead or ahead[0] < 0 or any(b <= a for a, b in pairwise(ahead)):
            raise ValueError(f"horizon: got {_listed(ahead)}, wanted steps ahead, each more than the one before")
        if self.label is None and (self.classes is not None or not ahead[0]):
            raise ValueError("classes, and a horizon of 0, belong to a label")
        if self.label is not None and isinstance(self.horizon, tuple):
            raise ValueError(f"horizon: got {_listed(ahead)}, but a label has one. Give a number.")
        if self.label is not None and (targets or self.label in self.columns or self.target_scale == "change"):
            raise ValueError(f"label: {self.label!r} stands alone: it is no column, and there are no targets beside it")
        return self

    @model_validator(mode="after")
    def _covariates(self) -> Self:
        if not self.horizons[0] and (known := [name for name, column in self.columns.items() if column.known]):
            raise ValueError(f"columns.{known[0]}: known is of the moment that is forecast, horizon 0 forecasts none")
        if self.series is None and (by := [name for name, column in self.columns.items() if column.values is not None]):
            raise ValueError(f"columns.{by[0]}: values are by series. Name the column that tells series apart: series.")
        if ("holiday" in self.calendar) != (self.holidays is not None):
            raise ValueError("calendar: holiday belongs to holidays: {country: ..}, and they to it")
        names = [channel.name for channel in channels(self)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"columns: {', '.join(map(repr, twice))} is also a channel of a turn or of the calendar")
        if self.calendar and TIME in names:
            raise ValueError(f"columns: {TIME!r} is what the service calls the calendar's moment. Rename the column.")
        return self

    @property
    def horizons(self) -> tuple[int, ...]:
        """Steps ahead of the labels, ascending."""
        return self.horizon if isinstance(self.horizon, tuple) else (self.horizon,)

    def open(self, *, batch: int, seed: int, root: Path) -> "TableSource":
        """Read the file; see `SourceConfig.open`."""
        from .table import TableSource

        return TableSource(self, batch=batch, seed=seed, root=root)


@dataclass(frozen=True, slots=True)
class Channel:
    """One feature that a table makes.

    Attributes:
        source: The column that it is made of, with its name; None: the calendar.
        wave: Of a direction: which function of it.
        calendar: What is read off the calendar.
        ahead: A step has the value of so many steps later.
    """

    name: str
    unit: str
    source: tuple[str, ColumnConfig] | None = None
    wave: Literal["sin", "cos"] | None = None
    calendar: CalendarChannel | None = None
    ahead: int = 0

    @property
    def foreseen(self) -> bool:
        """Whether a rollout knows it: of the calendar, or of a known or static column."""
        return self.source is None or self.source[1].known or self.source[1].static


def channels(config: TableConfig) -> tuple[Channel, ...]:
    """Every feature of a table in the order of `x`; the calendar comes last."""
    return (*_of_columns(config), *_of_calendar(config))


def _of_columns(config: TableConfig) -> Iterator[Channel]:
    for name, column in config.columns.items():
        for ahead in config.horizons if column.known else (0,):
            called = output_name(config, name, ahead) if ahead else name
            if column.turn is None:
                yield Channel(called, column.unit, (name, column), ahead=ahead)
                continue
            for wave in DIRECTION_WAVES:
                unit = f"{wave}(2 pi {name} / {column.turn:g})"
                yield Channel(direction_name(called, wave), unit, (name, column), wave, ahead=ahead)


def _of_calendar(config: TableConfig) -> Iterator[Channel]:
    for period in config.calendar:
        for wave in WAVES.get(period, ()):
            channel = CalendarChannel(of=period, wave=wave, zone=config.zone)
            yield Channel(f"{period}_{wave}", describe(channel), calendar=channel)
        if period == "holiday" and config.holidays is not None:
            channel = CalendarChannel(of="holiday", zone=config.zone, **config.holidays.model_dump())
            for ahead in config.horizons:  # what matters of a holiday is whether the forecast is of one
                called = output_name(config, "holiday", ahead) if ahead else "holiday"
                yield Channel(called, describe(channel), calendar=channel, ahead=ahead)


def output_name(config: TableConfig, target: str, ahead: int) -> str:
    """What a forecast is called: as its target, unless it is a further one of several, as `temp+6h` is."""
    if isinstance(config.horizon, int) or ahead == 1:
        return target
    step = re.fullmatch(r"(\d+)([A-Za-z]+)", config.every)
    return f"{target}+{ahead * int(step[1])}{step[2]}" if step else f"{target}+{ahead}x{config.every}"


def _listed(numbers: Sequence[int]) -> str:
    return f"[{', '.join(map(str, numbers))}]"
