"""Readings as people write them: `name=value`, JSON, bare numbers, the rows of a CSV."""

import csv
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConfigError
from ..tables import MISSING
from .connection import names_of, positions

if TYPE_CHECKING:
    from ..features import FeatureNames
    from ..manifest import Manifest

_UNIX: Final = re.compile(r"-?\d+(\.\d+)?")


def parse(words: Sequence[str], manifest: "Manifest", future: int | None = None) -> Any:
    """What a step takes, from the words of a command line.

    Args:
        words: `name=value` each, or one JSON value (an object by feature name, or nested lists), or one number for each
            input in the manifest's order.
        future: It is what is known of so many steps of a rollout.

    Raises:
        ConfigError: a word is none of these, or the names or numbers are not the model's.
    """
    if len(words) == 1 and words[0].lstrip().startswith(("{", "[")):
        return _json(words[0], manifest, future)
    if all("=" in word for word in words):
        names = names_of(manifest)
        pairs = [word.partition("=") for word in words]
        return positions({key: _value(value, key, names) for key, _, value in pairs}, names, future)
    row = [number(word, f"input {at}") for at, word in enumerate(words)]
    if len(row) != manifest.n_features:
        by_name = " ".join(f"{feature.name}=..." for feature in manifest.features)
        raise ConfigError(f"{manifest.name!r} takes {manifest.n_features} numbers, got {len(row)}. By name: {by_name}")
    return row


def _json(text: str, manifest: "Manifest", future: int | None) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"no JSON: {error}") from error
    return positions(value, names_of(manifest), future) if isinstance(value, dict) else value


def _value(text: str, name: str, names: "FeatureNames", where: str = "") -> Any:
    """A reading, a category's text, or a moment (text, or Unix seconds); None where it is missing."""
    if name not in names.worded:
        return number(text, where or name)
    word = text.strip()
    if word.lower() in MISSING:
        return None
    return float(word) if name == _time() and _UNIX.fullmatch(word) else word


def _time() -> str:
    from ..manifest import TIME

    return TIME


def future(known: str, start: str, every: str, steps: int, manifest: "Manifest") -> Any:
    """What a rollout is given: JSON of what is known of its steps, and the first one's moment.

    Raises:
        ConfigError: as `parse`, or a moment comes beside an array.
    """
    if every and not start:
        raise ConfigError("--every is the distance of steps whose first has a moment. Give --start.")
    if not start:
        return parse([known], manifest, steps) if known else None
    try:
        value = json.loads(known or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("--start belongs to inputs by name: --known is an array")
    moment: Any = float(start) if _UNIX.fullmatch(start) else start
    return positions(
        {**value, _time(): {"start": moment, **({"every": every} if every else {})}}, names_of(manifest), steps
    )


def number(text: str, where: str) -> float:
    """A reading; NaN where it is missing.

    Raises:
        ConfigError: it is no number.
    """
    if text.strip().lower() in MISSING:
        return math.nan
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} is no number. Write name=value, a number, or JSON.") from error


def rows(path: Path, manifest: "Manifest") -> Iterator[Any]:
    """The rows of a CSV whose header names features; other columns are left out. `-` is standard input.

    Raises:
        ConfigError: the file cannot be read, or has no column of the model's.
    """
    try:
        file = sys.stdin if str(path) == "-" else path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        names = names_of(manifest)
        known = [feature.name for feature in manifest.features if feature.name in header]
        if not any(feature.calendar for feature in manifest.features if feature.name in header):
            known += [name for name in names.worded - {*known} if name in header]  # the moment
        if not known:
            wanted = ", ".join(feature.name for feature in manifest.features)
            raise ConfigError(f"{path}: no column of {manifest.name!r} (it has {wanted}) among {', '.join(header)}")
        for record in reader:
            where = f"{path}:{reader.line_num}: column "
            values = {name: _value(record[name] or "", name, names, where + repr(name)) for name in known}
            try:
                yield positions(values, names)
            except ConfigError as error:
                raise ConfigError(f"{path}:{reader.line_num}: {error}") from error
