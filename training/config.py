"""What a training run is: one YAML file, checked once, frozen, saved beside the weights."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stepcast.errors import ConfigError
from stepcast.manifest import ModelName

from .data.csv_sequences import CsvSequencesConfig
from .data.python_class import PythonConfig
from .data.table_config import TableConfig
from .layers.spec import Shape
from .layers.specs import LayerSpec, RnnLossSpec, RnnOutputSpec
from .layers.stack import IllegalLayer, Placed, place

DataConfig = Annotated[TableConfig | CsvSequencesConfig | PythonConfig, Field(discriminator="kind")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StartConfig(_Strict):
    """Where the first weights come from, if they are not drawn: one of two files, relative to the recipe."""

    dl4j: Path | None = Field(default=None, description="a network that DL4J saved (ModelSerializer zip)")
    checkpoint: Path | None = Field(default=None, description="best.pt of another run")
    fresh: tuple[str, ...] = Field(default=(), description="layers that begin with weights of their own")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.dl4j is None) == (self.checkpoint is None):
            raise ValueError("wanted one of dl4j and checkpoint")
        return self

    @property
    def file(self) -> Path:
        """Whichever is given."""
        return self.dl4j or self.checkpoint or Path()


class TrainingConfig(_Strict):
    """How the weights are found."""

    start: StartConfig | None = None

    backprop: Literal["standard", "truncated"] = "standard"
    tbptt_forward: int = Field(default=20, ge=1, description="steps per update")
    tbptt_backward: int | None = Field(default=None, ge=1, description="steps gradients go back; default: forward's")
    optimiser: Literal["adam", "adamw", "sgd", "nesterov", "rmsprop", "adagrad"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd and nesterov")
    weight_decay: float = Field(default=0.01, ge=0, description="of adamw; biases and gains are left out")
    schedule: Literal["constant", "cosine"] = "constant"
    l1: float = Field(default=0.0, ge=0, description="l1 * |w| is added to the loss, biases left out")
    l2: float = Field(default=0.0, ge=0, description="l2/2 * w^2 is added to the loss, biases left out")
    gradient: Literal[
        "none",
        "clip_global_norm",
        "clip_l2_per_layer",
        "clip_l2_per_parameter",
        "clip_elementwise",
        "renormalize_l2_per_layer",
        "renormalize_l2_per_parameter",
    ] = "none"
    weight_average: float = Field(
        default=0.0, ge=0, lt=1, description="decay per update of the running average of the weights, which is exported"
    )
    gradient_threshold: float = Field(default=1.0, gt=0)
    average: Literal["unmasked", "examples"] = Field(
        default="unmasked", description="what an update's summed loss is divided by; examples is DL4J's rule"
    )
    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=32, ge=1, description="rows per update, over all processes together")
    patience: int | None = Field(default=None, ge=1, description="epochs without a better validation loss, then stop")
    prefetch: int = Field(default=0, ge=0, le=64, description="batches read ahead, in a thread, during an update")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; small networks are fastest with one")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    calibrate: Literal["validation", "folds"] | None = Field(
        default=None, description="rows by whose errors the spread of distributions is stretched after training"
    )
    folds: int = Field(default=8, ge=2, description="blocks of the training rows, each held out from a training")
    masked_steps: Literal["hold", "zero"] = Field(
        default="hold", description="what an absent step does to the state; zero is DL4J's rule"
    )

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.tbptt_backward is not None and self.tbptt_backward > self.tbptt_forward:
            raise ValueError(f"tbptt_backward {self.tbptt_backward} is more than tbptt_forward {self.tbptt_forward}")
        if self.backprop == "standard" and self.model_fields_set & {"tbptt_forward", "tbptt_backward"}:
            raise ValueError("tbptt lengths are set, but backprop is 'standard'. Set backprop: truncated.")
        if self.calibrate == "folds" and self.start is not None:
            raise ValueError("calibrate: folds trains networks from drawn weights, not from start. Take validation.")
        return self


# Under masked_steps 'zero' each run of present steps is a row of its own; these kinds mean the whole row.
RUN_BOUND = ("global_pooling", "conv1d", "reverse", "duplicate_to_time_series")


class Config(_Strict):
    """A whole run."""

    name: ModelName
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: DataConfig
    network: tuple[LayerSpec, ...] = Field(min_length=1)
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _legal_stack(self) -> Self:
        try:
            placed = place(self.network, Shape())
        except IllegalLayer as error:
            raise ValueError(f"{error.where}: {error}") from error
        for problem in _conflicts(placed, self.training):
            raise ValueError(problem)
        if isinstance(self.data, TableConfig) and self.data.target_scale == "change":
            for index, spec in enumerate(self.network):
                if isinstance(spec, RnnOutputSpec | RnnLossSpec) and not spec.residual:
                    where = f"network[{index}]"
                    raise ValueError(f"data.target_scale is 'change', {where} says whole values. Set residual: true.")
        return self


def _conflicts(placed: Sequence[Placed], training: TrainingConfig) -> Iterator[str]:
    """What the layers and the way of training cannot do together."""
    ends = [one.spec for one in placed if isinstance(one.spec, RnnOutputSpec | RnnLossSpec)]
    if training.calibrate is not None and not any(end.distribution for end in ends):
        yield "training.calibrate stretches distributions, and no output layer has one. Set its distribution."
    for one in placed:
        where = f"network[{one.index}]: {one.spec.kind}"
        summary = not one.shape.summary and one.out.summary
        if training.backprop == "truncated" and (not one.spec.streams or summary):
            yield f"{where} cannot be trained truncated. Set training.backprop: standard."
        if training.masked_steps == "zero" and one.spec.kind in RUN_BOUND:
            yield f"{where} has no meaning under masked_steps 'zero'"


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file.

    Args:
        path: The YAML file.
        overrides: `key.path=value`, value in YAML; list entries by number: network.0.units=32.

    Raises:
        ConfigError: with the path of every value that is wrong.
    """
    path = path.absolute()
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {error}") from error
    for override in overrides:
        _override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_problems(error, tree))) from error


def _override(tree: Any, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override!r} is not key=value")
    *parents, last = key.split(".")
    node = tree
    try:
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        node[int(last) if isinstance(node, list) else last] = yaml.safe_load(value)
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise ConfigError(f"--set {override!r}: there is no {key!r} in the configuration") from error


def _problems(error: ValidationError, tree: Any) -> list[str]:
    """One `path: what is wrong` for each problem; the tags of pydantic's unions are no part of the path."""
    problems = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            nearest = get_close_matches(str(problem["loc"][-1]), _keys(problem["loc"][:-1]), 1)
            message = f"unknown. Did you mean {nearest[0]}?" if nearest else "unknown"
        path = _path(problem["loc"], tree)
        problems.append(f"{path}: {message}" if path else message)
    return problems


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that could stand at a place, found by walking through the schema of a configuration."""
    schema = Config.model_json_schema(by_alias=True)
    node: dict[str, Any] = schema
    for part in location:
        mapping = node.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            node = {"$ref": mapping[part]}
        elif isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return list(node.get("properties", ()))


def _path(location: tuple[int | str, ...], tree: Any) -> str:
    path, node = "", tree
    for part in location:
        if isinstance(node, dict) and part not in node and part == node.get("kind"):
            continue  # the tag pydantic chose the class by
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
        if isinstance(node, dict):
            node = node.get(str(part))
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            node = None
    return path
