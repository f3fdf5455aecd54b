"""Take a recurrent ONNX graph that others made into the model repository."""

import argparse
from pathlib import Path

from .onnx_graphs import import_onnx


def options(parser: argparse.ArgumentParser) -> None:
    """Add what a graph may have to be told."""
    parser.add_argument("--manifest", type=Path, help="JSON of manifest fields that cannot be guessed")


def run(arguments: argparse.Namespace) -> int:
    """Take a foreign graph into the repository, and say how it was read."""
    made = import_onnx(arguments.file, arguments.models, arguments.name, arguments.version, arguments.manifest)
    manifest = made.manifest
    print(f"{made.directory}: {manifest.n_features} features, {manifest.n_outputs} outputs")
    for what, tensor in (("input", manifest.input), ("output", manifest.output)):
        print(f"{what} {tensor.name!r}: batch axis {tensor.batch_axis}, time axis {tensor.time_axis}")
    for state in manifest.states:
        where = f"{list(state.shape)}, axis {state.batch_axis}"
        print(f"state {state.layer}.{state.key}: {state.input!r} -> {state.output!r}, {where}")
    print("golden.npz was recorded from this graph: compare it with your training framework before you trust it")
    return 0
