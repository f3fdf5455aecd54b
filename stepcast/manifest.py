"""What an exported model is: features, outputs, state tensors, provenance.

`manifest.json` lies beside `model.onnx` and `golden.npz` in models/<name>/<version>/. The trainer writes it, the
server believes nothing else about a model. Shape letters: B rows, T steps, F input features, O outputs.
"""

import hashlib
import json
import math
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ManifestError

MODEL_FILE, MANIFEST_FILE, GOLDEN_FILE = "model.onnx", "manifest.json", "golden.npz"
TIME: Final = "time"
"""What the moment of a row is called among named inputs."""

Name = Annotated[str, Field(min_length=1, max_length=128)]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Task = Literal["regression", "classification", "multi_label"]
DType = Literal["float32", "float64", "float16", "int64", "int32", "bool"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "float64": 8, "float16": 2, "int64": 8, "int32": 4, "bool": 1}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class CalendarChannel(_Strict):
    """A feature that follows from a row's moment alone; stepcast.calendars computes it.

    A sine or cosine of where the moment stands in the day (`hour`), the week, the year, or the year from midwinter
    (`season`), or 1 on a public holiday. It is read off a wall clock of the time zone.
    """

    of: Literal["hour", "week", "year", "season", "holiday"]
    wave: Literal["sin", "cos"] | None = Field(default=None, description="None: a holiday, which has none")
    zone: str = Field(default="UTC", min_length=1, max_length=128, description="an IANA name, such as Europe/Berlin")
    country: str | None = Field(default=None, description="whose holidays; ISO 3166-1 alpha-2, such as DE")
    subdivision: str | None = Field(default=None, description="a part of the country; ISO 3166-2, such as BY")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.of == "holiday") != (self.wave is None) or (self.of == "holiday") != (self.country is not None):
            raise ValueError("a holiday has a country and no wave, everything else a wave and no country")
        if self.subdivision is not None and self.country is None:
            raise ValueError("subdivision belongs to a country")
        return self


class Change(_Strict):
    """A channel that the graph adds: how much a reading has changed over some steps, divided by `scale`."""

    steps: int = Field(ge=1)
    scale: float = Field(default=1.0, gt=0, description="in the feature's unit")


class Feature(_Strict):
    """One input, or a block of `width` inputs that belong together (the pixels of a frame, a one-hot character).

    `mean` and `scale` are what the graph already applies, (x - mean) / scale; they are here to be read, not to be
    applied again. `missing` says what a NaN means: refused, replaced by the mean, by zero, or by the last reading.

    A feature of `categories` is by position an index: 0 for what is none of them, 1 for the first. By name it is the
    category's text. A feature with a `calendar` may be given by its row's moment. One that is `known` is given for
    every step of a rollout; `ahead` says of which step a row has it. One that is `static` never changes in a session.
    """

    name: Name
    unit: str = ""
    width: int = Field(default=1, ge=1)
    mean: float = 0.0
    scale: float = 1.0
    missing: Literal["refuse", "mean", "zero", "hold"] = "refuse"
    indicator: bool = Field(default=False, description="the graph adds a 1/0 channel that says: was missing")
    categories: tuple[Name, ...] | None = Field(default=None, min_length=1, description="texts of the indices 1, 2, ..")
    embedding: int | None = Field(
        default=None, ge=1, description="the graph makes of the index a learned vector of this many values"
    )
    calendar: CalendarChannel | None = None
    known: bool = Field(default=False, description="known of the future: a rollout is given it for its steps")
    ahead: int = Field(
        default=0, ge=0, description="a row has the value of this many steps later: of the moment that is forecast"
    )
    static: bool = Field(default=False, description="the same at every step of a series; with hold it is sent once")
    changes: tuple[Change, ...] = Field(default=(), description="of a feature of width 1")

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if self.categories is not None:
            _unique("categories", list(self.categories))
            if self.width > 1 or (self.mean, self.scale) != (0.0, 1.0) or self.calendar or self.changes:
                raise ValueError("a feature of categories has width 1, mean 0, scale 1, no calendar and no changes")
        elif self.embedding is not None:
            raise ValueError("embedding belongs to categories")
        if self.calendar is not None and self.width > 1:
            raise ValueError("a calendar feature has width 1")
        return self


class Output(_Strict):
    """One output; `mean` and `scale` are undone inside the graph, so that values are in `unit`.

    A model of several horizons has an output for every target at each of them: `target` and `ahead` say which. The one
    of a single step ahead is named as its target.
    """

    name: Name
    unit: str = ""
    mean: float = 0.0
    scale: float = 1.0
    target: Name | None = Field(default=None, description="what is forecast, of a model of several horizons")
    ahead: int | None = Field(default=None, ge=1, description="how many steps ahead of the reading")


class Distribution(_Strict):
    """Which outputs describe the distribution of which target.

    A target's point forecast is the output that has the target's name. `targets` lists the outputs that hold its
    parameters, in the caller's units and in the order of the kind. quantile: one for each of `levels`; gaussian: mean,
    scale; student_t: location, scale, degrees of freedom; negative_binomial: mean, dispersion; mixture (of gaussians):
    the weights of all components, then their means, then their scales.
    """

    kind: Literal["quantile", "gaussian", "student_t", "negative_binomial", "mixture"]
    levels: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(default=(), description="of quantiles, ascending")
    targets: dict[Name, tuple[Name, ...]] = Field(min_length=1)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if any(low >= high for low, high in pairwise(self.levels)):
            raise ValueError(f"levels {list(self.levels)} do not ascend")
        if (self.kind == "quantile") != bool(self.levels):
            raise ValueError("'levels' belongs to kind 'quantile', and only to it")
        wanted = {"quantile": len(self.levels), "gaussian": 2, "student_t": 3, "negative_binomial": 2}
        for target, names in self.targets.items():
            want = wanted.get(self.kind, max(3, len(names) // 3 * 3))  # a mixture has as many components as it has
            if len(names) != want:
                raise ValueError(f"targets.{target} names {len(names)} outputs, {self.kind} has {want} parameters")
        if len({len(names) for names in self.targets.values()}) > 1:
            raise ValueError("targets have different numbers of outputs")
        return self


class StateTensor(_Strict):
    """One state tensor of the graph, addressed by layer and key as DL4J does."""

    layer: Name
    key: Name
    input: Name
    output: Name
    dtype: DType = "float32"
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(description="per row, the batch axis left out")
    batch_axis: int | None = Field(
        default=0, ge=0, description="where the graph has the batch axis; None: nowhere, it takes one row"
    )
    initial: float = Field(default=0.0, description="every element's value when there is no stored state")

    @property
    def size(self) -> int:
        """Elements per row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return self.size * ITEM_BYTES[self.dtype]


class _DataTensor(_Strict):
    """Where one row's step lies in a tensor of the graph; the numbers of the wire are its elements in C order."""

    batch_axis: int | None = Field(default=0, ge=0, description="None: nowhere, the graph takes one row")
    time_axis: int | None = Field(default=1, ge=0, description="None: the graph takes one step at a time")
    dtype: DType = Field(default="float32", description="the graph's own; the numbers of the wire are float32")
    shape: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None, description="of one row's step, the batch and the time axis left out; None: one axis"
    )


class InputTensor(_DataTensor):
    """The graph's main input. Ours is `x` float32 [B,T,F]; graphs made by others may differ.

    Whoever exported a graph may have put the last values of a chunk before the next chunk. Then the import writes this
    into the graph, so that a caller sends new values only, and `context` says how many the session's state keeps.
    """

    name: Name = "x"
    context: int = Field(default=0, ge=0, description="values of the last step that stand before a step's own")


class OutputTensor(_DataTensor):
    """The graph's main output. Ours is `y` float32 [B,T,O].

    Chunks may overlap; then the import writes their sum into the graph, so that a step's answer is final, and `overlap`
    says how many values, to which later chunks add, the session's state keeps.
    """

    name: Name = "y"
    overlap: int = Field(default=0, ge=0, description="values of a step to which the next steps add theirs")


class Constant(_Strict):
    """An extra input of the graph that always has the same value (a sample rate, a flag)."""

    name: Name
    dtype: DType
    shape: tuple[int, ...] = ()
    values: tuple[float, ...]


class Feedback(_Strict):
    """In a rollout, `source` (an output's name, or "class": the class chosen or sampled) becomes `feature`.

    A class feeds a feature of width 1 as its index, a wider one as one-hot.
    """

    source: Name
    feature: Name


class Tolerance(_Strict):
    """How close two ways of computing the same thing must be: |a - b| <= atol + rtol * |b|."""

    rtol: float = Field(default=1e-4, ge=0)
    atol: float = Field(default=1e-5, ge=0)


class Provenance(_Strict):
    """Where a model comes from."""

    data: str = ""
    config: dict[str, Any] = {}
    seed: int | None = None
    metrics: dict[str, Any] = {}
    libraries: dict[str, str] = {}
    environment: dict[str, str] = Field(default={}, description="where it was made: Python, system, processor, device")
    created: str = ""


class Manifest(_Strict):
    """The whole contract of one model version. Unknown keys are refused."""

    schema_version: Literal[1] = 1
    name: ModelName
    version: int = Field(ge=1)
    description: str = ""
    features: tuple[Feature, ...] = Field(min_length=1)
    outputs: tuple[Output, ...] = Field(min_length=1)
    task: Task = Field(description="multi_label: every output is the probability of a label, whatever the others are")
    classes: tuple[str, ...] | None = None
    distribution: Distribution | None = Field(default=None, description="None: outputs are point forecasts")
    readout: Literal["each", "last"] = Field(
        default="each", description="last: trained many-to-one, the answer is the output at the last valid step"
    )
    input: InputTensor = InputTensor()
    lengths: Name | None = Field(default="lengths", description="int32 [B], valid steps per row; None: not there")
    output: OutputTensor = OutputTensor()
    constants: tuple[Constant, ...] = ()
    states: tuple[StateTensor, ...] = ()
    rows: Literal["many", "one"] = Field(
        default="many", description="one: the graph takes one row a run, so the server runs it row by row"
    )
    single_steps: Literal["quick", "exact"] = Field(
        default="quick",
        description="exact: the bits that model.onnx gives; quick: within rounding, recurrent nodes as equations",
    )
    streaming: bool = True
    every_s: float | None = Field(default=None, gt=0, description="seconds from one step to the next")
    feedback: tuple[Feedback, ...] = ()
    tolerance: Tolerance = Tolerance()
    provenance: Provenance = Provenance()
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of model.onnx")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _unique("features", [f.name for f in self.features])
        self._check_calendar()
        _unique("outputs", [o.name for o in self.outputs])
        _unique("states", [f"{s.layer}.{s.key}" for s in self.states])
        _unique("state inputs", [s.input for s in self.states])
        _unique("state outputs", [s.output for s in self.states])
        if (self.task == "classification") != (self.classes is not None):
            raise ValueError("'classes' belongs to task 'classification', and only to it")
        if self.classes is not None and len(self.classes) != len(self.outputs):
            raise ValueError(f"{len(self.classes)} classes, but {len(self.outputs)} outputs")
        self._check_distribution()
        self._check_layout()
        features = {f.name for f in self.features}
        sources = {o.name for o in self.outputs} | ({"class"} if self.classes else set())
        for number, link in enumerate(self.feedback):
            if link.feature not in features:
                raise ValueError(f"feedback[{number}].feature {link.feature!r} is not a feature")
            if link.source not in sources:
                raise ValueError(f"feedback[{number}].source {link.source!r} is not an output")
        return self

    def _check_calendar(self) -> None:
        calendar = [f for f in self.features if f.calendar is not None]
        if calendar and any(f.name == TIME for f in self.features):
            raise ValueError(f"features: {TIME!r} is what the moment of a calendar is called. Rename the feature.")
        if self.every_s is None and (ahead := [f.name for f in calendar if f.ahead]):
            raise ValueError(f"feature {ahead[0]!r} is of a moment ahead, which needs every_s")

    def _check_layout(self) -> None:
        for what, tensor, size in (("input", self.input, self.n_features), ("output", self.output, self.n_outputs)):
            if tensor.shape is not None and math.prod(tensor.shape) != size:
                raise ValueError(f"{what}.shape {list(tensor.shape)} does not hold {size} numbers")
        without = [port.name for port in (self.input, self.output) if port.batch_axis is None]
        without += [state.input for state in self.states if state.batch_axis is None]
        if without and self.rows == "many":
            raise ValueError(f"tensors {without} have no batch axis, so 'rows' is \"one\"")

    def _check_distribution(self) -> None:
        if self.distribution is None:
            return
        if self.classes is not None:
            raise ValueError("'distribution' belongs to task 'regression', and only to it")
        outputs = {o.name for o in self.outputs}
        for target, names in self.distribution.targets.items():
            if absent := sorted({target, *names} - outputs):
                raise ValueError(f"distribution.targets.{target}: {', '.join(map(repr, absent))} is not an output")

    @property
    def points(self) -> tuple[Output, ...]:
        """The outputs that forecast one number for each target; without a distribution all of them."""
        targets = self.distribution.targets if self.distribution else {o.name for o in self.outputs}
        return tuple(o for o in self.outputs if o.name in targets)

    @cached_property
    def n_features(self) -> int:
        """F: input values per row and step."""
        return sum(f.width for f in self.features)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row's step in the graph."""
        return (self.n_features,) if self.input.shape is None else self.input.shape

    @property
    def n_outputs(self) -> int:
        """O: output values per row and step."""
        return len(self.outputs)

    @property
    def state_row_bytes(self) -> int:
        """Bytes of state per row, all tensors, in manifest order without padding."""
        return sum(s.row_bytes for s in self.states)

    @cached_property
    def layers(self) -> dict[str, dict[str, StateTensor]]:
        """State tensors by layer, then by key, in manifest order."""
        layers: dict[str, dict[str, StateTensor]] = {}
        for state in self.states:
            layers.setdefault(state.layer, {})[state.key] = state
        return layers

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever the numbers or the layout of the state may: graph and state tensors."""
        layout = [s.model_dump(mode="json") for s in self.states]
        text = json.dumps([self.sha256, layout], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def spelling(self) -> tuple[Any, ...]:
        """What decides which position, and which number there, a named input becomes."""
        every_s = self.every_s if any(f.calendar for f in self.features) else None
        return every_s, *((f.name, f.width, f.categories, f.calendar, f.calendar and f.ahead) for f in self.features)

    def feature_slices(self) -> dict[str, slice]:
        """Where each feature stands in the last axis of `x`."""
        slices, start = {}, 0
        for feature in self.features:
            slices[feature.name] = slice(start, start + feature.width)
            start += feature.width
        return slices


def _unique(what: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} named twice: {', '.join(map(repr, twice))}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json of a model directory models/<name>/<version>/.

    Raises:
        ManifestError: a file is missing, a key is unknown or wrong, model.onnx is not the file the manifest speaks
            of, or the directory's names are not the manifest's.
    """
    path = directory / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such file. To take in a graph made by others, run stepcast import") from error
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or '$'}: {e['msg']}" for e in error.errors()]
        raise ManifestError(f"{path}: " + "; ".join(lines)) from error
    model = directory / MODEL_FILE
    if not model.is_file():
        raise ManifestError(f"{model}: no such file")
    got = sha256_of(model)
    if got != manifest.sha256:
        raise ManifestError(f"{model}: sha256 is {got}, manifest.json says {manifest.sha256}")
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, indented, with a newline at its end."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2)
    (directory / MANIFEST_FILE).write_text(text + "\n")
