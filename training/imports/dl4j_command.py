"""Take in a network that DL4J saved (ModelSerializer): a zip with its configuration and its parameters."""

import argparse
from pathlib import Path

import numpy as np

from stepcast.errors import ConfigError, ManifestError
from stepcast.manifest import Feature

from ..stepper import Floats
from .dl4j.arrays import Stream, read_array
from .dl4j.saved_network import read_dl4j
from .foreign import Recorded, take_in

MOST_RECORDED_BYTES = 1 << 30


def options(parser: argparse.ArgumentParser) -> None:
    """Add what only this kind takes."""
    parser.add_argument(
        "--features",
        type=_features,
        default=(),
        metavar="NAME[:WIDTH],...",
        help="names of the inputs (default: x0,x1,...)",
    )
    parser.add_argument(
        "--outputs",
        type=_names,
        default=(),
        metavar="NAME,...",
        help="names of the outputs or classes (default: y0,...)",
    )
    parser.add_argument("--recorded-input", type=Path, metavar="BIN", help="an INDArray [N,F,T] that DL4J was given")
    parser.add_argument("--recorded-output", type=Path, metavar="BIN", help="what it answered, [N,O,T] or [N,O]")
    parser.add_argument("--atol", type=float, default=1e-5, help="how far answers may be from it (default: 1e-5)")


def run(arguments: argparse.Namespace) -> int:
    """Import the zip, and print what was made."""
    given = arguments.recorded_input, arguments.recorded_output
    if any(given) and not all(given):
        raise ConfigError("--recorded-input and --recorded-output belong together. Give both.")
    foreign = read_dl4j(arguments.file, arguments.features, arguments.outputs)
    recorded = Recorded(_recorded(given[0]), _recorded(given[1]), arguments.atol) if all(given) else None
    directory, manifest = take_in(foreign, arguments.models, arguments.name, arguments.version, recorded)
    states = ", ".join(f"{state.layer}.{state.key}" for state in manifest.states) or "none"
    print(f"wrote {directory}: {manifest.n_features} inputs, {manifest.n_outputs} outputs, states {states}")
    if not manifest.streaming:
        print("it reads whole sequences only: a bidirectional layer needs the steps to come")
    if recorded is not None:
        far = manifest.provenance.metrics["recorded"]["largest_difference"]
        print(f"DL4J's recorded answers are reproduced: largest difference {far:.2g}")
    return 0


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return names


def _features(text: str) -> tuple[Feature, ...]:
    made = []
    for told in _names(text):
        name, colon, width = told.rpartition(":")
        if colon and not (name and width.isdecimal() and int(width)):
            raise argparse.ArgumentTypeError(f"{told!r} is not NAME or NAME:WIDTH")
        made.append(Feature(name=name, width=int(width)) if colon else Feature(name=told))
    return tuple(made)


def _recorded(file: Path) -> Floats:
    """An INDArray with time in the middle: (N, T, F); or as it is if it has no time axis."""
    try:
        with file.open("rb") as bytes_of:
            content = bytes_of.read(MOST_RECORDED_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"{file}: cannot be read ({error.strerror})") from error
    if len(content) > MOST_RECORDED_BYTES:
        raise ManifestError(f"{file}: is longer than {MOST_RECORDED_BYTES} bytes")
    stream = Stream(content, str(file))
    array = read_array(stream).astype(np.float32)
    stream.end()
    return np.ascontiguousarray(array.transpose(0, 2, 1)) if array.ndim == 3 else array
