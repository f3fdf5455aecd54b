"""Writes models/<name>/<version>/, and refuses if the graph does not compute what the network computes.

Three stages: `stage` writes model.onnx and golden.npz into a directory of its own and proves one with the other;
whoever likes measures the staged model; `publish` adds the manifest and moves the directory to its place at once.
"""

import datetime
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from stepcast.errors import ManifestError
from stepcast.manifest import (
    GOLDEN_FILE,
    MODEL_FILE,
    Manifest,
    Provenance,
    StateTensor,
    Tolerance,
    write_manifest,
)

from .config import Config
from .data.source import Source
from .golden import make_golden
from .graph import Graph
from .network import Network
from .stepper import Floats, States, Stepper

LIBRARIES = ("torch", "onnx", "onnxruntime", "numpy", "pydantic")


def stage(network: Network, source: Source, models: Path, tolerance: Tolerance | None = None) -> Path:
    """Write and prove model.onnx and golden.npz in a fresh directory below `models`.

    Returns:
        The staged directory; give it to `publish`, or remove it.

    Raises:
        ManifestError: onnxruntime and torch disagree.
    """
    network = network.to("cpu").eval()
    network.masked_steps = "hold"  # an absent step holds the state in the graph and the service, whatever training did
    with fresh(models) as directory:
        graph = Graph(network.observed.n_features)
        network.write(graph)
        onnx.save(
            graph.model(doc="One step or many of a recurrent network; see manifest.json."),
            directory / MODEL_FILE,
        )
        golden = make_golden(network, source)
        np.savez_compressed(directory / GOLDEN_FILE, **golden)  # type: ignore[arg-type]
        stepper = Stepper(directory, state_tensors(network))
        prove(stepper, golden, network.streaming, tolerance or Tolerance())
    return directory


@contextmanager
def fresh(models: Path) -> Iterator[Path]:
    """A directory of its own below `models`, which stays if all that is done inside succeeds."""
    models.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=".staged-", dir=models))
    try:
        yield directory
    except BaseException:
        shutil.rmtree(directory)
        raise


def publish(staged: Path, manifest: Manifest, models: Path) -> Path:
    """Write the manifest and move a staged directory to models/<name>/<version>, replacing what was there."""
    write_manifest(staged, manifest)
    staged.chmod(0o755)
    final = models / manifest.name / str(manifest.version)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        old = Path(tempfile.mkdtemp(prefix=".replaced-", dir=models))
        os.replace(final, old / "version")
        os.replace(staged, final)
        shutil.rmtree(old)
    else:
        os.replace(staged, final)
    return final


def describe(
    network: Network, source: Source, config: Config, *, sha256: str, version: int, metrics: dict[str, Any]
) -> Manifest:
    """The manifest of a model that was trained, whose graph has a digest."""
    return manifest_of(
        network,
        source,
        name=config.name,
        version=version,
        description=config.description,
        provenance={
            "data": source.description,
            "config": config.model_dump(mode="json", by_alias=True, exclude_unset=True),
            "seed": config.seed,
            "metrics": metrics,
        },
        sha256=sha256,
    )


def manifest_of(
    network: Network,
    source: Source,
    *,
    name: str,
    version: int,
    description: str,
    provenance: dict[str, Any],
    sha256: str,
) -> Manifest:
    """The manifest of a network, wherever its weights come from; what it was made with is added to its provenance."""
    return Manifest(
        name=name,
        version=version,
        description=description,
        features=source.features,
        outputs=network.head.outputs,
        task=source.task,
        classes=source.classes,
        distribution=network.head.described,
        readout="last" if network.summary else source.readout,
        states=state_tensors(network),
        streaming=network.streaming,
        every_s=getattr(source, "every_s", None),  # sequences need not have a clock
        feedback=source.feedback if network.streaming else (),
        provenance=Provenance(
            libraries={library: importlib.metadata.version(library) for library in LIBRARIES},
            environment=environment(),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **provenance,
        ),
        sha256=sha256,
    )


def environment() -> dict[str, str]:
    """Where this runs."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def state_tensors(network: Network) -> tuple[StateTensor, ...]:
    """The graph's state tensors in the order of the layers; none if it cannot be stepped."""
    return tuple(
        StateTensor(
            layer=layer,
            key=key,
            input=f"{layer}.{key}",
            output=f"{layer}.{key}.out",
            shape=shape,
        )
        for layer, shapes in network.states().items()
        for key, shape in shapes.items()
    )


def next_version(models: Path, name: str) -> int:
    """One more than the highest version there is."""
    versions = [int(p.name) for p in (models / name).glob("*") if p.name.isdecimal()]
    return max(versions, default=0) + 1


def prove(stepper: Stepper, golden: dict[str, Floats], streaming: bool, tolerance: Tolerance) -> None:
    """Run the golden rows in one call, in blocks and one step at a time.

    Raises:
        ManifestError: an output at a valid step or a final state is not what torch computed.
    """
    x, lengths = golden["x"], golden["lengths"].astype(np.int32)
    before = _states(golden, "state_in.")
    valid = np.arange(x.shape[1]) < lengths[:, None]
    for block in (x.shape[1], 3, 1) if streaming else (x.shape[1],):
        y, after = stepper.in_blocks(x, lengths, before, block)
        _compare(f"y, {block} steps a call", y[valid], golden["y"][valid], tolerance)
        for name, expected in _states(golden, "state_out.").items():
            _compare(f"state {name}, {block} steps a call", after[name], expected, tolerance)


def _states(golden: dict[str, Floats], prefix: str) -> States:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def _compare(what: str, got: Floats, wanted: Floats, tolerance: Tolerance) -> None:
    close = np.abs(got - wanted) <= tolerance.atol + tolerance.rtol * np.abs(wanted)  # NaN is never close
    if got.shape != wanted.shape or not close.all():
        worst = float(np.nanmax(np.abs(got - wanted), initial=0.0))
        raise ManifestError(
            f"{what}: onnxruntime and torch differ by up to {worst:.3g}, allowed are rtol {tolerance.rtol:g}, "
            f"atol {tolerance.atol:g}. Nothing was exported."
        )
