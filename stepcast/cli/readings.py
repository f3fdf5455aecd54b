"""Readings as people write them: `name=value`, JSON, bare numbers, the rows of a CSV."""

import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .connection import names_of, positions

if TYPE_CHECKING:
    from ..manifest import Manifest

MISSING = {"", "na", "nan", "null"}


def parse(words: Sequence[str], manifest: "Manifest") -> Any:
    """What a step takes, from the words of a command line.

    Args:
        words: `name=value` each, or one JSON value (an object by feature name, or nested lists), or one number for each
            input in the manifest's order.

    Raises:
        ConfigError: a word is none of these, or the names or numbers are not the model's.
    """
    if len(words) == 1 and words[0].lstrip().startswith(("{", "[")):
        return _json(words[0], manifest)
    if all("=" in word for word in words):
        pairs = [word.partition("=") for word in words]
        return positions({name: number(value, name) for name, _, value in pairs}, names_of(manifest))
    row = [number(word, f"input {at}") for at, word in enumerate(words)]
    if len(row) != manifest.n_features:
        names = " ".join(f"{feature.name}=..." for feature in manifest.features)
        raise ConfigError(f"{manifest.name!r} takes {manifest.n_features} numbers, got {len(row)}. By name: {names}")
    return row


def _json(text: str, manifest: "Manifest") -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"no JSON: {error}") from error
    return positions(value, names_of(manifest)) if isinstance(value, dict) else value


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
        known = [feature.name for feature in manifest.features if feature.name in header]
        if not known:
            wanted = ", ".join(feature.name for feature in manifest.features)
            raise ConfigError(f"{path}: no column of {manifest.name!r} (it has {wanted}) among {', '.join(header)}")
        names = names_of(manifest)
        for record in reader:
            where = f"{path}:{reader.line_num}: column "
            yield positions({name: number(record[name] or "", where + repr(name)) for name in known}, names)
