"""Which files make up a split: numbered ones, `x_%d.csv` with numbers from and to, or a glob."""

import re
from pathlib import Path

from stepcast.errors import ConfigError
from stepcast.tables import in_order

NUMBER = re.compile(r"%(?:0(\d+))?d")


def numbered_files(pattern: str, numbers: tuple[int, int], root: Path) -> list[Path]:
    """The files of a pattern with one `%d` (or `%03d`: three digits with leading zeros), `numbers` inclusive.

    Raises:
        ConfigError: the pattern has no `%d` or two of them, or a file is not there.
    """
    places = NUMBER.findall(pattern)
    if len(places) != 1:
        raise ConfigError(f"{pattern!r} has {len(places)} places for a number, wanted one %d (or %03d)")
    first, last = numbers
    digits = int(places[0] or 0)
    paths = [root / NUMBER.sub(f"{number:0{digits}d}", pattern) for number in range(first, last + 1)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(f"{missing[0]}: no such file ({len(missing)} of {len(paths)} missing from {pattern!r})")
    return paths


def globbed_files(pattern: str, root: Path) -> list[Path]:
    """The files of a glob, numbers within names in numeric order: x_9.csv comes before x_10.csv.

    Raises:
        ConfigError: no file matches.
    """
    anchor, relative = _anchored(pattern, root)
    paths = sorted((path for path in anchor.glob(relative) if path.is_file()), key=in_order)
    if not paths:
        raise ConfigError(f"{pattern!r} matches no file in {root}")
    return paths


def _anchored(pattern: str, root: Path) -> tuple[Path, str]:
    """Path.glob wants relative patterns; an absolute one starts at its own root."""
    path = Path(pattern)
    return (Path(path.anchor), str(path.relative_to(path.anchor))) if path.is_absolute() else (root, pattern)


def check_pairs(features: list[Path], labels: list[Path], patterns: tuple[str, str]) -> None:
    """Make sure that the n-th label file belongs to the n-th feature file.

    What stands in place of the wildcards must be the same text in both.

    Raises:
        ConfigError: different numbers of files, or a pair that is none.
    """
    if len(features) != len(labels):
        raise ConfigError(f"{len(features)} files match {patterns[0]!r}, but {len(labels)} match {patterns[1]!r}")
    for x, y in zip(features, labels, strict=True):
        if _wild(x, patterns[0]) != _wild(y, patterns[1]):
            raise ConfigError(f"{x} and {y} have the same place in their lists, but not the same name")


def _wild(path: Path, pattern: str) -> tuple[str, ...]:
    """What a glob's stars stand for in this path."""
    parts = re.split(r"(\*+|\?|\[[^]]*\])", pattern)
    found = re.search("".join("(.*)" if i % 2 else re.escape(part) for i, part in enumerate(parts)) + "$", str(path))
    return found.groups() if found else ()
