"""Take in a network that DL4J saved (ModelSerializer): a zip with its configuration and its parameters."""

import argparse
from pathlib import Path

import numpy as np

from stepcast.errors import ConfigError, ManifestError

from ..stepper import Floats
from .dl4j.arrays import Stream, read_array
from .dl4j.saved_network import read_dl4j
from .foreign import Recorded, take_in
from .names import add_names, print_made

MOST_RECORDED_BYTES = 1 << 30


def options(parser: argparse.ArgumentParser) -> None:
    """Add what only this kind takes."""
    add_names(parser)
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
    print_made(directory, manifest)
    if recorded is not None:
        far = manifest.provenance.metrics["recorded"]["largest_difference"]
        print(f"DL4J's recorded answers are reproduced: largest difference {far:.2g}")
    return 0


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
