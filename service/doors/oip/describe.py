"""What the Open Inference Protocol tells of a server and its models: documents by the protocol's field names.

gRPC's messages have the same fields. Batches: a request's first axis are the examples of its sequence.
"""

from collections.abc import Mapping
from typing import Any, Final

import stepcast
from stepcast.manifest import Manifest

from ...engine.repository import Repository, Served
from ...settings import Settings
from .infer import Inference
from .requests import served_of

NAME: Final = "stepcast"
PLATFORM: Final = "onnxruntime_onnx"
EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "parameters",
    "sequence",
    "sequence(string_id)",
    "statistics",
)
_TYPES: Final = {
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}
_FOR_EVER_US: Final = 2**63 - 1


def server() -> dict[str, Any]:
    """The server's metadata."""
    return {"name": NAME, "version": stepcast.__version__, "extensions": list(EXTENSIONS)}


def metadata(repository: Repository, model: str, version: str = "") -> dict[str, Any]:
    """A model's metadata: its inputs and outputs with the axis of examples."""
    served = served_of(repository, model, version)
    manifest = served.manifest
    x = {"name": manifest.input.name, "datatype": "FP32", "shape": [-1, manifest.n_features]}
    y = {"name": manifest.output.name, "datatype": "FP32", "shape": [-1, manifest.n_outputs]}
    versions = [str(served.version)] if version else [str(number) for number in repository.versions(model)]
    return {"name": model, "versions": versions, "platform": PLATFORM, "inputs": [x], "outputs": [y]}


def config(repository: Repository, settings: Settings, model: str, version: str = "") -> dict[str, Any]:
    """A model's configuration, by the fields of Triton's ModelConfig."""
    manifest = served_of(repository, model, version).manifest
    x = {"name": manifest.input.name, "data_type": "TYPE_FP32", "dims": [manifest.n_features]}
    y = {"name": manifest.output.name, "data_type": "TYPE_FP32", "dims": [manifest.n_outputs]}
    document = {
        "name": model,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": settings.examples_limit,
        "input": [x],
        "output": [y],
        "default_model_filename": "model.onnx",
    }
    return document | ({"sequence_batching": _sequence_batching(manifest, settings)} if manifest.streaming else {})


def _sequence_batching(manifest: Manifest, settings: Settings) -> dict[str, Any]:
    states = [
        {
            "input_name": state.input,
            "output_name": state.output,
            "data_type": f"TYPE_{_TYPES[state.dtype]}",
            "dims": list(state.shape),
        }
        for state in manifest.states
    ]
    return {
        "max_sequence_idle_microseconds": settings.ttl_s * 1_000_000 or _FOR_EVER_US,
        "oldest": {"max_candidate_sequences": settings.queue_limit},
        "state": states,
    }


def statistics(inference: Inference, model: str = "", version: str = "") -> dict[str, Any]:
    """What was counted of one version, of all versions of a model, or of all models."""
    repository = inference.repository
    if version:
        found = [served_of(repository, model, version)]
    else:
        names = [model] if model else repository.names()
        found = [repository.require(name, number) for name in names for number in repository.versions(name)]
    return {"model_stats": [_statistics(inference, served) for served in found]}


def _statistics(inference: Inference, served: Served) -> dict[str, Any]:
    counts = inference.statistics.of(served.name, served.version)
    said = {"name": served.name, "version": str(served.version)}
    return said | counts.document(inference.turns.runs(served))


def index(repository: Repository, asked: Mapping[str, Any]) -> list[dict[str, str]]:
    """The versions that there are, with `ready` only those that are served."""
    ready = [
        {"name": name, "version": str(version), "state": "READY", "reason": ""}
        for name in repository.names()
        for version in repository.versions(name)
    ]
    failed = [
        {"name": name, "version": str(version), "state": "UNAVAILABLE", "reason": reason}
        for name, version, reason in repository.failed()
    ]
    return ready if asked.get("ready") else ready + failed
