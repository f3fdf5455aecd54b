"""Steps by name: inputs as an object by feature name (or a list of such records), outputs as one by output name.

Which position a name has is stepcast.features' to say; whose names hold is said here: inputs are read by those of the
version that takes the step, outputs are named by those of the version that made it.
"""

import math
import re
from typing import Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Raw

from stepcast.errors import InvalidRequest, ShapeMismatch, StateVersionMismatch
from stepcast.features import FeatureNames, Rows, likeliest
from stepcast.manifest import TIME, Manifest

from ..engine import arrays
from ..engine.arrays import Floats, Form, Format
from ..engine.repository import Repository, Served
from ..sessions.core import Answers
from .answers import dumps
from .bodies import JSON, Number, numbers, part

Style = Literal["columns", "records"]

# --- inputs ---------------------------------------------------------------------------------------------------------

_OBJECT: Final = re.compile(rb"[ \t\r\n]*(\[?)[ \t\r\n]*{")
_OPENING: Final = ord("[")
_MAPS: Final = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))  # first bytes of msgpack's maps,
_LISTS: Final = {**dict.fromkeys(range(0x91, 0xA0), 1), 0xDC: 3, 0xDD: 5}  # and of its lists, with their heads' length


def style_of(raw: Any, kind: str) -> Style | None:
    """How inputs, a part of a body, Raw or decoded, are named; None: they are not."""
    if not isinstance(raw, Raw):
        records = isinstance(raw, list) and bool(raw) and isinstance(raw[0], dict)
        return "columns" if isinstance(raw, dict) else "records" if records else None
    if kind == JSON:
        opening = _OBJECT.match(raw)
        return None if opening is None else "records" if opening[1] else "columns"
    head = memoryview(raw)[:6].tobytes()
    if head[0] in _MAPS:
        return "columns"
    first = _LISTS.get(head[0], len(head))
    return "records" if first < len(head) and head[first] in _MAPS else None


def read(
    raw: Any,
    shape: list[int] | None,
    kind: str,
    names: FeatureNames,
    style: Style,
    *,
    rows: Rows = "examples",
    future: int | None = None,
) -> Floats:
    """Named inputs by position: [F] of numbers, [N,F] of records or columns [N], [N,T,F] of columns [N,T].

    Args:
        shape: Of the columns that are a `bin`, without the axis of a wide feature; None: [N].
        rows: What the axis of columns [N] is.
        future: They are what is known of so many steps of a rollout: any feature may be left out.

    Raises:
        InvalidRequest, ShapeMismatch, and what bodies.part raises.
    """
    if style == "records":
        cell: Any = Number | str | list[Number] if names.worded else Number | list[Number]
        x = names.array(part(list[dict[str, cell]], raw, kind, "$.inputs"), rows=rows, future=future)
        if x.ndim != 2:
            raise ShapeMismatch("$.inputs has records of columns, want records of numbers", got=list(x.shape))
        return x
    plain = kind == JSON and isinstance(raw, Raw)
    cells = part(dict[str, Raw] if plain else dict[str, Any], raw, kind, "$.inputs")
    columns = {
        name: _words(cell, kind, f"$.inputs.{name}")
        if name in names.worded
        else _column(cell, shape, kind, f"$.inputs.{name}")
        for name, cell in cells.items()
    }
    return names.array(columns, rows=rows, future=future)


def _words(cell: Any, kind: str, path: str) -> Any:
    """Categories or moments: text, numbers, lists of them, a start; FeatureNames says what is wrong with them."""
    value = part(Any, cell, kind, path)
    if isinstance(value, bytes):
        raise InvalidRequest(f"{path} is a bin of float32, want text, a number, or a list of them")
    return value


def _column(cell: Any, shape: list[int] | None, kind: str, path: str) -> Number | Floats:
    """One feature's values: a number, or an array."""
    if isinstance(cell, bytes):
        return numbers(cell, _shape_of(len(cell) // 4, shape), kind, path)
    if isinstance(cell, list) or (isinstance(cell, Raw) and memoryview(cell)[0] == _OPENING):
        return numbers(cell, None, kind, path)
    value: Number = part(Number, cell, kind, path)
    return value


def _shape_of(size: int, shape: list[int] | None) -> list[int] | None:
    """The shape of a column of so many values: with an axis more where the feature is wide."""
    if not shape or min(shape) < 1:
        return shape
    width, rest = divmod(size, math.prod(shape))
    return shape if width < 2 or rest else [*shape, width]


def check_layout(layout: Format) -> None:
    """Raises InvalidRequest where named inputs came with a `format`: they have no axis of features."""
    if layout != "NWC":
        raise InvalidRequest(f"$.format is {layout!r}, which says the order of an array's axes; $.inputs are named")


def record_of(manifest: Manifest) -> type[msgspec.Struct] | None:
    """One example's numbers as a struct, its fields in the order of the positions, null where they are left out.

    Returns:
        None where there can be none: a feature has several values, or text, or a name that JSON has to escape.
    """
    if any(feature.width > 1 or feature.categories is not None for feature in manifest.features):
        return None
    return _record([(feature.name, Number) for feature in manifest.features])


def worded_record_of(manifest: Manifest) -> type[msgspec.Struct] | None:
    """One example's moment, which stands for the calendar, and other features as a struct: what FeatureNames.row takes.

    Returns:
        None where there can be none: the model has no moment and no categories, or as for `record_of`.
    """
    given = [feature for feature in manifest.features if feature.calendar is None]
    dated = len(given) < len(manifest.features)
    if any(feature.width > 1 for feature in given) or not (dated or any(feature.categories for feature in given)):
        return None
    kinds: list[tuple[str, Any]] = [(TIME, str | float)] * dated
    kinds += [(feature.name, str | int | None if feature.categories else Number) for feature in given]
    return _record(kinds, needed=int(dated))


def _record(kinds: list[tuple[str, Any]], needed: int = 0) -> type[msgspec.Struct] | None:
    """A struct of these names and types, the first `needed` of which may not be left out."""
    names = {f"f{place}": name for place, (name, _) in enumerate(kinds)}
    fields: list[Any] = [
        (field, kind) if place < needed else (field, kind, None)
        for place, (field, (_, kind)) in enumerate(zip(names, kinds, strict=True))
    ]
    try:
        return msgspec.defstruct("Record", fields, rename=names, forbid_unknown_fields=True, gc=False)
    except ValueError:
        return None


# --- outputs --------------------------------------------------------------------------------------------------------


class Naming:
    """The names of one version.

    Attributes:
        names, width: The outputs' names, and how many there are.
        widths: How many values each feature has.
        step: A step's answer for one example as JSON, from `"outputs"` on, to be filled with a classifier's label, the
            outputs, the step and the version.
        labels: A classifier's classes as JSON.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.features = FeatureNames(manifest)
        self.widths = {feature.name: feature.width for feature in manifest.features}
        names = manifest.classes or tuple(output.name for output in manifest.outputs)
        self.names, self.width = names, len(names)
        self._classes = None if manifest.classes is None else np.array([*manifest.classes, None], object)
        self.labels = None if manifest.classes is None else [*map(dumps, manifest.classes)]
        values = b"{%s}" % b",".join(b"%s:%%s" % dumps(name).replace(b"%", b"%%") for name in names)
        outputs = values if self._classes is None else b'{"class":%%s,"probabilities":%s}' % values
        self.step = b'"outputs":%s,"step":%%d,"version":%%d}' % outputs

    def label(self, y: Floats) -> bytes:
        """The class of a classifier's outputs (O,) as JSON."""
        values, labels = y.tolist(), self.labels or []
        return labels[values.index(max(values))] if values[0] == values[0] else b"null"  # NaN: the step was masked

    def outputs(self, y: Floats, style: Style) -> Any:
        """Outputs (..., O) by name: an object of arrays, or as records nested lists of objects of numbers."""
        if style == "records" and y.ndim > 1:
            return [self.outputs(row, style) for row in y]
        values = {name: column[()] for name, column in self.features.columns(y).items()}  # [()]: of no axes, a number
        if self._classes is None:
            return values
        chosen = self._classes[likeliest(y)]
        return {"class": chosen.tolist() if y.ndim > 1 else chosen, "probabilities": values}


class Names:
    """The names of a model's versions, also of those that were served since the server started."""

    def __init__(self, repository: Repository, model: str) -> None:
        self._repository, self._model = repository, model
        self.known: dict[int, Naming] = {}  # by version

    def of(self, served: Served) -> Naming:
        """The names of a version."""
        naming = self.known.get(served.version)
        if naming is None or naming.features.manifest is not served.manifest:  # a version may be loaded again, changed
            naming = self.known[served.version] = Naming(served.manifest)
        return naming

    def learn(self) -> "Names":
        """Take note of all versions that are served now; itself."""
        for version in self._repository.versions(self._model):
            self.of(self._repository.require(self._model, version))
        return self

    def behind(self, version: int, width: int, step: int) -> Naming:
        """The names of the version that made a step with so many outputs.

        Raises:
            StateVersionMismatch: it has none for them.
        """
        naming = self.known.get(version)
        if naming is not None and naming.width == width:
            return naming
        was = "is not known" if naming is None else f"has {naming.width} outputs, the answer {width}"
        raise StateVersionMismatch(
            f"step {step} was made, but its outputs have no names here: version {version} of model {self._model!r} "
            f"{was}. Send seq {step} again with inputs by position.",
            step=step,
            version=version,
        )


class Named:
    """The form of an answer by name.

    Args:
        axes: Those of its columns are these without the last.
        read_by: The version by whose names the inputs were read.
    """

    __slots__ = ("_known", "_names", "axes", "read_by", "style")

    def __init__(self, names: Names, axes: Form, style: Style, read_by: Served) -> None:
        self._names, self.axes, self.style, self.read_by = names, axes, style, read_by
        self._known = names.known

    def text(self, answers: Answers, row: int, step: int, texts: list[bytes]) -> bytes:
        """A step's answer as JSON, from `"outputs"` on; `texts` are all rows of the answers without brackets."""
        if self.axes == "F":
            values = texts[row].split(b",")
            naming = self._known.get(answers.version)
            if naming is None or naming.width != len(values):
                naming = self._names.behind(answers.version, len(values), step)  # says why
            if naming.labels is None:
                return naming.step % (*values, step, answers.version)
            return naming.step % (naming.label(answers.outputs[row, 0, 0]), *values, step, answers.version)
        return b'"outputs":%s,"step":%d,"version":%d}' % (
            dumps(self.outputs(answers, row, step)),
            step,
            answers.version,
        )

    def outputs(self, answers: Answers, row: int, step: int) -> Any:
        """A step's outputs by name."""
        y = arrays.by_form(answers.outputs[row], self.axes)
        return self._names.behind(answers.version, y.shape[-1], step).outputs(y, self.style)

    def many(self, outputs: Floats) -> Any:
        """The outputs (K, O) of a batch step by name."""
        return self._names.of(self.read_by).outputs(outputs, self.style)
