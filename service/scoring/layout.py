"""Which columns of a table are what: the session's key, the moment, the mask, and those that features are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from stepcast.errors import ConfigError
from stepcast.features import FeatureNames
from stepcast.manifest import TIME, Feature, Manifest
from stepcast.tables import Origin, TrainedBy, trained_by

from .files import Columns, check_columns, listed


@dataclass(frozen=True)
class Wanted:
    """What the caller says about the columns.

    Attributes:
        renamed: The table's names of features, or of the columns that a model was trained from.
        keep: Columns that the output has, too.
        known_in_row: A feature that is known of the moment ahead stands in the row that forecasts it.
    """

    key: str | None = None
    time: str | None = None
    mask: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    known_in_row: bool = False


@dataclass(frozen=True)
class Layout:
    """Columns by what they are.

    Attributes:
        key, time, mask: None: there is none.
        sources: What features are made of; those of the calendar only where the table has them.
        dated: The features of the calendar follow from `time`.
        absent: Features without a column: a missing reading in every row.
        texts: Features whose cells are categories.
    """

    key: str | None
    time: str | None
    mask: str | None
    keep: tuple[str, ...]
    sources: Mapping[str, Origin]
    dated: bool
    absent: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def columns(self) -> Columns:
        """Those that are read, each once."""
        made_of = [origin.column for origin in self.sources.values() if origin.values is None]
        names = list(dict.fromkeys([*self.carried, *filter(None, [self.mask]), *made_of]))
        texts = {*self.carried, *(self.sources[name].column for name in self.texts if name in self.sources)}
        return Columns(names, frozenset(names) - texts)

    @property
    def carried(self) -> list[str]:
        """Those that the output has, too."""
        return list(dict.fromkeys([*filter(None, [self.key, self.time]), *self.keep]))


def layout_of(manifest: Manifest, names: FeatureNames, path: Path, header: Sequence[str], wanted: Wanted) -> Layout:
    """The layout of tables with this header; a model's own training table needs no options.

    Raises:
        ConfigError: a column is not there, or a feature may not be missing and has none.
    """
    trained = trained_by(manifest)
    _check_renamed(manifest, trained, wanted.renamed)
    key = wanted.key or (trained.series if trained.series in header else None)
    time = wanted.time or next((name for name in (trained.time, TIME) if name in header), None)
    named = [name for name in (key, time, wanted.mask, *wanted.keep) if name is not None]
    check_columns(path, named, header)
    sources: dict[str, Origin] = {}
    absent: list[Feature] = []
    dated = any(name not in header and name not in wanted.renamed for name in names.dated)
    for feature in manifest.features:
        if feature.calendar is not None and dated:
            continue
        origin = _origin(feature, trained, header, wanted.renamed)
        if origin is None:
            absent.append(feature)
        else:
            sources[feature.name] = origin
    _check_absent(manifest, path, header, absent)
    _check_known(manifest, wanted)
    if dated and time is None:
        needs = f"model {manifest.name!r} has a calendar ({', '.join(names.dated)}), so every row needs its moment"
        raise ConfigError(f"{path}: {needs}. Name the column: --time COLUMN, one of {listed(header)}.")
    if not sources and not dated:
        told = listed([feature.name for feature in manifest.features])
        raise ConfigError(f"{path}: no column of model {manifest.name!r} (it has {told}) among {listed(header)}")
    texts = tuple(feature.name for feature in manifest.features if feature.categories is not None)
    lacking = tuple(feature.name for feature in absent)
    layout = Layout(key, time, wanted.mask, wanted.keep, sources, dated, lacking, texts)
    check_columns(path, layout.columns.names, header)
    return layout


def _origin(feature: Feature, trained: TrainedBy, header: Sequence[str], renamed: Mapping[str, str]) -> Origin | None:
    """What a feature is made of: a column of its name, or the one that it was trained from."""
    known = trained.origins.get(feature.name)
    for name in (renamed.get(feature.name), feature.name):
        if name is not None and (name in header or name == renamed.get(feature.name)):
            return Origin(name, range=known.range if known and known.turn is None else None)
    if known is None:
        return None
    column = renamed.get(known.column, known.column)
    if column in header or column != known.column:
        return replace(known, column=column, values=None)
    return known if known.values else None


def _check_renamed(manifest: Manifest, trained: TrainedBy, renamed: Mapping[str, str]) -> None:
    known = {feature.name for feature in manifest.features} | {origin.column for origin in trained.origins.values()}
    for name in renamed:
        if name not in known:
            near = get_close_matches(name, known, 1)
            told = f" The nearest is {near[0]!r}." if near else ""
            raise ConfigError(f"--column {name}=...: model {manifest.name!r} has no such feature.{told}")


def _check_absent(manifest: Manifest, path: Path, header: Sequence[str], absent: Sequence[Feature]) -> None:
    needed = [feature.name for feature in absent if feature.missing == "refuse"]
    if needed:
        near = get_close_matches(needed[0], header, 1)
        told = f" (nearest: {near[0]!r})" if near else ""
        raise ConfigError(
            f"{path}: no column {', '.join(map(repr, needed[:8]))}{told} among {listed(header)}; model "
            f"{manifest.name!r} was trained without missing readings of it. Name it: --column {needed[0]}=COLUMN."
        )


def _check_known(manifest: Manifest, wanted: Wanted) -> None:
    ahead = [feature.name for feature in manifest.features if feature.known and feature.ahead and not feature.calendar]
    if ahead and not wanted.known_in_row:
        raise ConfigError(
            f"model {manifest.name!r} knows {', '.join(map(repr, ahead))} of the moment that it forecasts. A training "
            "table has such a value in the row of its own moment, a step in the row that forecasts it. Put it there, "
            "and say --known-in-row."
        )
