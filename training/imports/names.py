"""What the commands of all imports onto training's layers share: names of inputs and outputs, and what is printed."""

import argparse
from pathlib import Path

from stepcast.manifest import Feature, Manifest


def add_names(parser: argparse.ArgumentParser) -> None:
    """Add --features and --outputs."""
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


def print_made(directory: Path, manifest: Manifest) -> None:
    """Say what was written."""
    states = ", ".join(f"{state.layer}.{state.key}" for state in manifest.states) or "none"
    print(f"wrote {directory}: {manifest.n_features} inputs, {manifest.n_outputs} outputs, states {states}")
    if not manifest.streaming:
        print("it reads whole sequences only: a bidirectional layer needs the steps to come")


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
