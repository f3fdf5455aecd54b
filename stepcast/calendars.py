"""Calendar features: what a moment says of itself. The trainer makes its columns here, the service its inputs.

A model's calendar features stand in its manifest (`Feature.calendar`). They follow from the row's moment alone, so a
caller may give the moment, under the name `time`, in their place:

| `time` | of one step | of several steps, [T] or [N,T], and in a rollout |
|---|---|---|
| a moment: ISO 8601 with its offset, or Unix seconds | that of every row | that of the first step |
| lists of moments, in the shape of the other columns | one per row | one per step |
| {"start": moment, "every": "15min"} | | evenly spaced; `every` is the model's if it is left out |

Everything is read off a wall clock of the feature's time zone: `hour` jumps with it when summer time begins, and comes
twice when it ends. No I/O.
"""

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Final
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from .errors import ConfigError, InvalidRequest, ManifestError, ShapeMismatch
from .manifest import CalendarChannel, Manifest
from .rooms import missing

Seconds = npt.NDArray[np.float64]
Shape = tuple[int, ...]

WAVES: Final = {"sin": math.sin, "cos": math.cos}

# Where a moment on its wall clock stands in each period, as a part of it.
_PARTS: Final[dict[str, Callable[[datetime], float]]] = {
    "hour": lambda t: _day(t),
    "week": lambda t: (t.weekday() + _day(t)) / 7,
    "year": lambda t: (_day_of_year(t) - 1 + _day(t)) / 365.25,
    "season": lambda t: (_day_of_year(t) + 9 + _day(t)) / 365.25,
}
_BEGINNINGS: Final = {
    "hour": "hours since 0:00 {zone} / 24",
    "week": "days since Monday 0:00 {zone} / 7",
    "year": "days since 1 January 0:00 {zone} / 365.25",
    "season": "days since 22 December 0:00 {zone} / 365.25",
}
_EVERY: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", re.IGNORECASE)
_UNITS: Final = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
FIRST_S: Final = datetime(2, 1, 1, tzinfo=UTC).timestamp()  # a day off either end, whatever the zone
LAST_S: Final = datetime(9998, 12, 31, tzinfo=UTC).timestamp()


def _day(t: datetime) -> float:
    """The part of its day that has passed on the wall clock."""
    return (t.hour + t.minute / 60 + t.second / 3600) / 24


def _day_of_year(t: datetime) -> int:
    return t.timetuple().tm_yday


def describe(channel: CalendarChannel) -> str:
    """What a channel is, for people: the unit of its feature."""
    if channel.wave is None:
        where = f"{channel.country}-{channel.subdivision}" if channel.subdivision else channel.country
        return f"1 on a public holiday of {where}, by {channel.zone}"
    return f"{channel.wave}(2 pi {_BEGINNINGS[channel.of].format(zone=channel.zone)})"


class Calendar:
    """Values of channels at moments.

    Args:
        channels: Each with how many seconds after a row's own moment it is read.

    Raises:
        ConfigError: a time zone is unknown, or a country's holidays are; or what knows them is not installed.
    """

    def __init__(self, channels: Sequence[tuple[CalendarChannel, float]]) -> None:
        self._clocks: list[tuple[tzinfo, float]] = []  # moments to be read, each once
        self._channels: list[tuple[int, Callable[[datetime], float]]] = []
        for channel, ahead_s in channels:
            clock = _zone(channel.zone), ahead_s
            if clock not in self._clocks:
                self._clocks.append(clock)
            self._channels.append((self._clocks.index(clock), _reader(channel)))

    @classmethod
    def of(cls, manifest: Manifest) -> "Calendar":
        """The calendar of a model, its channels in the order of its features; raises as the constructor."""
        every_s = manifest.every_s or 0.0
        return cls([(f.calendar, f.ahead * every_s) for f in manifest.features if f.calendar is not None])

    def row(self, at_s: float) -> list[float]:
        """Every channel's value for the row of a moment, in seconds since 1970."""
        times = [datetime.fromtimestamp(at_s + ahead_s, zone) for zone, ahead_s in self._clocks]
        return [read(times[clock]) for clock, read in self._channels]

    def columns(self, moments: Seconds) -> npt.NDArray[np.float32]:
        """Every channel's values (..., C) at moments (...)."""
        rows = [self.row(at_s) for at_s in moments.ravel().tolist()]
        return np.array(rows, np.float32).reshape(*moments.shape, len(self._channels))


def check_calendar(manifest: Manifest) -> None:
    """See that a model's calendar features can be made here.

    Raises:
        ManifestError: its time zones or holidays are not known here.
    """
    try:
        Calendar.of(manifest)
    except ConfigError as error:
        raise ManifestError(f"the calendar of model {manifest.name!r}: {error}") from error


def _zone(name: str) -> tzinfo:
    if name == "UTC":  # which needs no data base
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise ConfigError(
            f"time zone {name!r} is not known here. Write an IANA name such as Europe/Berlin; where the machine has no "
            'data base of them, pip install "stepcast[calendar]".'
        ) from error


def _reader(channel: CalendarChannel) -> Callable[[datetime], float]:
    """What reads a channel off a wall clock."""
    if channel.wave is None:
        days = _holidays(channel.country or "", channel.subdivision)
        return lambda t: float(t.date() in days)
    wave, part = WAVES[channel.wave], _PARTS[channel.of]
    return lambda t: wave(2 * math.pi * part(t))


def _holidays(country: str, subdivision: str | None) -> Any:
    """A country's public holidays, by date; of any year, when it is asked for."""
    try:
        library = importlib.import_module("holidays")
    except ModuleNotFoundError as error:
        raise ConfigError(missing("holidays", "calendar")) from error
    try:
        return library.country_holidays(country, subdiv=subdivision)
    except NotImplementedError as error:
        raise ConfigError(f"holidays: {error}. Write ISO 3166 codes, such as DE and BY.") from error


# --- moments as callers give them -----------------------------------------------------------------------------------


def moments_of(value: Any, shape: Shape, path: str, *, along: bool, every_s: float | None) -> Seconds:
    """The moments of inputs, in seconds since 1970.

    Args:
        value: See the module.
        shape: Of the inputs' columns: (), [N], [T] or [N,T].
        path: Where the value stands, for messages.
        along: Their last axis is one of steps.
        every_s: The model's seconds between steps; None: not known.

    Returns:
        Of `shape`; or of a list's own, if the columns have none.

    Raises:
        InvalidRequest: there is a value that is no moment, or the distance between steps is not known.
        ShapeMismatch: a list has another shape.
    """
    if isinstance(value, Mapping):
        return _spaced(*_span(value, shape, path, along, every_s), shape)
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return _listed(value, shape, path)
    start_s = seconds(value, path)
    if not along or shape[-1] == 1:
        return np.full(shape, start_s)
    return _spaced(start_s, _known(every_s, path), shape)


def seconds(value: Any, path: str) -> float:
    """A moment in seconds since 1970.

    Raises:
        InvalidRequest: it is none, has no offset, or lies outside the years 2 to 9998.
    """
    if isinstance(value, np.ndarray):
        value = value[()]
    if isinstance(value, np.number):
        value = value.item()
    if isinstance(value, np.datetime64):  # has no zone: UTC by numpy's convention
        at_s = float("nan") if np.isnat(value) else float(value.astype("datetime64[us]").astype(np.int64)) / 1e6
    elif isinstance(value, int | float) and not isinstance(value, bool):
        at_s = float(value)
    else:
        at_s = _moment(value, path).timestamp()
    if not FIRST_S <= at_s <= LAST_S:  # NaN too
        hint = " Unix time here is in seconds, not milliseconds." if abs(at_s) > LAST_S else ""
        raise InvalidRequest(f"{path} is {_shown(value)}, want a moment of the years 2 to 9998.{hint}")
    return at_s


def _moment(value: Any, path: str) -> datetime:
    moment: Any = value
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            moment = None
    if not isinstance(moment, datetime):
        raise InvalidRequest(
            f"{path} is {_shown(value)}, want a moment: ISO 8601 such as '2026-01-01T13:00:00Z', or Unix seconds"
        )
    if moment.utcoffset() is None:
        raise InvalidRequest(f"{path} is {_shown(value)}, which has no time zone. Add Z, or an offset such as +01:00.")
    return moment


def _span(value: Mapping[str, Any], shape: Shape, path: str, along: bool, every_s: float | None) -> tuple[float, float]:
    """Start and distance of evenly spaced moments."""
    if not {"start"} <= value.keys() <= {"start", "every"}:
        told = ", ".join(repr(str(key)[:64]) for key in list(value)[:8])
        raise InvalidRequest(f"{path} has {told or 'no fields'}, want 'start' and, if not the model's, 'every'")
    if not along:
        raise InvalidRequest(f"{path} has a start, but these inputs are of one step. Give its moment.")
    every = value.get("every")
    distance_s = _known(every_s, path) if every is None else duration_s(every, f"{path}.every")
    return seconds(value["start"], f"{path}.start"), distance_s


def duration_s(value: Any, path: str) -> float:
    """The seconds of a duration: a number of them, or text such as 15min, 1h, 1D.

    Raises:
        InvalidRequest: it is none, or not above 0.
    """
    found = _EVERY.fullmatch(value.strip()) if isinstance(value, str) else None
    number = float(found[1]) * _UNITS[found[2].lower()] if found else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= LAST_S:
        raise InvalidRequest(f"{path} is {_shown(value)}, want seconds, or text such as '15min', '1h', '1D'")
    return float(number)


def _known(every_s: float | None, path: str) -> float:
    if every_s is None:
        raise InvalidRequest(
            f"{path} is one moment of several steps, and the model does not say how far apart they are. "
            'Give {"start": ..., "every": "1h"}, or every step\'s moment.'
        )
    return every_s


def _spaced(start_s: float, every_s: float, shape: Shape) -> Seconds:
    """Moments of steps, the last axis of `shape`."""
    last_s = start_s + every_s * max(0, shape[-1] - 1)
    if last_s > LAST_S:
        raise InvalidRequest(f"{shape[-1]} steps of {timedelta(seconds=every_s)} end after the year 9998")
    return np.broadcast_to(start_s + every_s * np.arange(shape[-1]), shape)


def _listed(value: Any, shape: Shape, path: str) -> Seconds:
    """A moment each."""
    try:
        given = value if isinstance(value, np.ndarray) else np.asarray(value, object)
    except ValueError as error:
        raise ShapeMismatch(f"{path} is ragged: its rows have different lengths") from error
    if given.shape != (shape or given.shape) or given.ndim > 2:
        raise ShapeMismatch(f"{path} has shape {list(given.shape)}, the other inputs {list(shape)}", got=given.shape)
    items = given.ravel() if given.dtype.kind == "M" else given.ravel().tolist()
    at_s = [seconds(item, f"{path}[{place}]") for place, item in enumerate(items)]
    return np.array(at_s, np.float64).reshape(given.shape)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 64 else text[:60] + " ..."
