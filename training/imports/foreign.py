"""From layers and weights that were read from somebody else's file to a model directory, by the usual export.

golden.npz is made by torch from random readings, and proves model.onnx. If the other framework's own answers are
there, they are held against both ways of running the graph: whole sequences, and one step at a time.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from stepcast.errors import ConfigError, ManifestError
from stepcast.manifest import MODEL_FILE, Feature, Feedback, Manifest, Output, sha256_of

from ..data.in_memory import Examples, InMemory
from ..export import manifest_of, next_version, publish, stage, state_tensors
from ..golden import ROWS, STEPS
from ..layers.spec import Shape
from ..layers.specs import EmbeddingSpec, LayerSpec
from ..layers.stack import IllegalLayer, place
from ..network import Network
from ..stepper import Floats, Stepper
from ..weights import Weights, fill

_SPECS: TypeAdapter[tuple[LayerSpec, ...]] = TypeAdapter(tuple[LayerSpec, ...])


@dataclass(frozen=True)
class Foreign:
    """A network that another framework saved.

    Attributes:
        file: Where it was read from.
        framework: Its name, for people.
        specs: Entries of `network:`, as a recipe has them.
        weights: Of each layer with weights, from below.
        features: Of the inputs.
        outputs: Of the answers.
    """

    file: Path
    framework: str
    specs: Sequence[dict[str, Any]]
    weights: Sequence[Weights]
    features: tuple[Feature, ...]
    outputs: tuple[Output, ...]


class Recorded(NamedTuple):
    """What the other framework answered.

    Attributes:
        x: (B, T, F), raw.
        y: (B, T, O), or (B, O) of the last step.
        atol: How far an answer may be from it.
    """

    x: Floats
    y: Floats
    atol: float


def take_in(
    foreign: Foreign, models: Path, name: str, version: int | None = None, recorded: Recorded | None = None
) -> tuple[Path, Manifest]:
    """Write models/<name>/<version>/ (None: the next free one), or nothing.

    Raises:
        ManifestError: the network cannot be built of our layers, the version exists, or answers are not those recorded.
    """
    number = version or next_version(models, name)
    if (models / name / str(number)).exists():
        raise ManifestError(f"{models / name / str(number)} exists. Take another --version.")
    specs = _checked(foreign.file, foreign.specs)
    source = _source(foreign, specs)
    try:
        network = Network.of(specs, source)
        fill(network, foreign.weights)
    except ConfigError as error:
        raise ManifestError(f"{foreign.file}: {error}") from error
    digest = sha256_of(foreign.file)
    new = [folder for folder in (models, *models.parents) if not folder.exists()]
    try:
        staged = stage(network, source, models)
        try:
            far = None if recorded is None else _compare(network, staged, recorded, foreign)
            manifest = manifest_of(
                network,
                source,
                name=name,
                version=number,
                description=f"imported from {foreign.file.name}",
                provenance={
                    "data": f"imported from {foreign.file.name} ({foreign.framework}), sha256 {digest}",
                    "config": {
                        "network": [spec.model_dump(mode="json", by_alias=True, exclude_unset=True) for spec in specs]
                    },
                    "metrics": {} if far is None else {"recorded": {"largest_difference": far}},
                },
                sha256=sha256_of(staged / MODEL_FILE),
            )
            return publish(staged, manifest, models), manifest
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except BaseException:
        for folder in new:  # what this import has made, and nothing lies in
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _written(spec: LayerSpec) -> dict[str, Any]:
    """An entry of `network:` as a recipe has it."""
    return spec.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _checked(file: Path, specs: Sequence[dict[str, Any]]) -> tuple[LayerSpec, ...]:
    try:
        return _SPECS.validate_python(list(specs))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ManifestError(f"{file}: network.{where}: {problem['msg']}") from error


def outputs_of(file: Path, specs: Sequence[dict[str, Any]], size: int) -> int:
    """How many numbers a network of so many inputs answers.

    Raises:
        ManifestError: its layers do not fit each other.
    """
    try:
        end = place(_checked(file, specs), Shape(size=size))[-1]
    except IllegalLayer as error:
        raise ManifestError(f"{file}: {error.where}: {error}") from error
    return getattr(end.spec, "units", None) or end.shape.size or 0


def _source(foreign: Foreign, specs: Sequence[LayerSpec]) -> InMemory:
    """Random readings in the features' units for golden.npz, tokens if the network reads them."""
    rng = np.random.default_rng(0)
    widths = [feature.width for feature in foreign.features]
    mean, scale = (np.repeat([getattr(f, key) for f in foreign.features], widths) for key in ("mean", "scale"))
    shape = (ROWS, 2 * STEPS, sum(widths))
    if isinstance(specs[0], EmbeddingSpec):
        x = rng.integers(0, specs[0].vocabulary, shape).astype(np.float32)
    else:
        x = (rng.normal(size=shape) * scale + mean).astype(np.float32)
    classes = tuple(output.name for output in foreign.outputs)
    classification = getattr(specs[-1], "activation", None) == "softmax" and len(classes) > 1
    return InMemory(
        splits={"test": Examples(list(x), list(np.zeros((*shape[:2], len(classes)), np.float32)))},
        features=foreign.features,
        outputs=foreign.outputs,
        task="classification" if classification else "regression",
        classes=classes if classification else None,
        feedback=_feedback(foreign) if classification else (),
        batch=ROWS,
        seed=0,
        description=f"imported from {foreign.file.name}",
    )


def _feedback(foreign: Foreign) -> tuple[Feedback, ...]:
    """A classifier whose only feature is one-hot of its classes can run free."""
    alone = foreign.features[0] if len(foreign.features) == 1 else None
    if alone is None or alone.width != len(foreign.outputs):
        return ()
    return (Feedback(source="class", feature=alone.name),)


def _compare(network: Network, staged: Path, recorded: Recorded, foreign: Foreign) -> float:
    """The largest difference to the recorded answers, through torch and through the graph.

    Raises:
        ManifestError: it is more than allowed, or the shapes are not those of the network.
    """
    x, y = recorded.x, recorded.y
    features, outputs = sum(f.width for f in foreign.features), len(foreign.outputs)
    shapes = ((*x.shape[:2], outputs), (len(x), outputs))
    if x.ndim != 3 or x.shape[2] != features or y.shape not in shapes:
        raise ManifestError(
            f"{foreign.file}: recorded inputs are {list(x.shape)} and answers {list(y.shape)}; "
            f"wanted [B, T, {features}], and [B, T, {outputs}] or [B, {outputs}]"
        )
    with torch.no_grad():
        answers = {"torch": network(torch.from_numpy(x))[0].numpy()}
    stepper = Stepper(staged, state_tensors(network))
    lengths = np.full(len(x), x.shape[1], np.int32)
    for block in (x.shape[1], 1) if network.streaming else (x.shape[1],):
        start = stepper.initial_states(len(x))
        answers[f"model.onnx, {block} steps a call"] = stepper.in_blocks(x, lengths, start, block)[0]
    far = {way: float(np.abs((a if y.ndim == 3 else a[:, -1]) - y).max(initial=0.0)) for way, a in answers.items()}
    for way, most in far.items():
        if not most <= recorded.atol:
            raise ManifestError(
                f"{foreign.file}: {way}: answers differ from those recorded by up to {most:.3g}, allowed is "
                f"{recorded.atol:g}. Nothing was imported."
            )
    return max(far.values())
