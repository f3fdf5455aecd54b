"""Take in a recurrent network that Keras 3 saved (.keras): its configuration and its weights, without TensorFlow."""

import argparse

from .foreign import take_in
from .keras.saved_network import read_keras
from .names import add_names, print_made


def options(parser: argparse.ArgumentParser) -> None:
    """Add what only this kind takes."""
    add_names(parser)


def run(arguments: argparse.Namespace) -> int:
    """Import the file, and print what was made."""
    foreign, notes = read_keras(arguments.file, arguments.features, arguments.outputs)
    directory, manifest = take_in(foreign, arguments.models, arguments.name, arguments.version)
    print_made(directory, manifest)
    for note in notes:
        print(
            f"{note.removeprefix(f'{arguments.file}: ')} in Keras. Here the caller says it: give such steps a mask of 0"
        )
    return 0
