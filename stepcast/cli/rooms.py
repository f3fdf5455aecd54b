"""Commands of the service and the trainer. They declare their options themselves; here arguments are passed through."""

import os
import sys
from collections.abc import Callable
from typing import Any, Final

import typer

from .. import imports
from ..rooms import Room, load, module_of

_COMMANDS: Final[dict[str, tuple[Room, str]]] = {
    "serve": ("service", "Serve models until SIGTERM; --example serves the model that comes with Stepcast."),
    "consume": ("service", "Step the entries of a Redis Stream, tell the outputs to another, until SIGTERM."),
    "check": ("service", "Prove a model directory, and say where each recurrent node runs."),
    "score": ("service", "Step a table of any size through a model, without a server."),
    "key": ("service", "Make an API key, and its line for the key file."),
    "train": ("training", "Train a network by a recipe, measure it, and write models/<name>/<version>/."),
    "evaluate": ("training", "Measure an exported model one step at a time."),
    "backtest": ("training", "Compare a model with its baselines, on its test rows or from several origins."),
    "export": ("training", "Write a model from the best checkpoint of a run."),
}
PANELS: Final[dict[Room, str]] = {"service": "Serve", "training": "Train"}


def install(app: typer.Typer) -> None:
    """Add the commands."""
    settings: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    for name, (room, text) in _COMMANDS.items():
        app.command(name, help=text, context_settings=settings, rich_help_panel=PANELS[room])(_passed(name, room))
    text = "Take in a model made by others: " + ", ".join(imports.KINDS) + "."
    app.command("import", help=text, context_settings=settings, rich_help_panel=PANELS["service"])(take_in)


def take_in(context: typer.Context) -> int:
    """Import a file by its kind, in the room that knows it."""
    return imports.run(context.args, "stepcast")


def _passed(name: str, room: Room) -> Callable[[typer.Context], int]:
    def command(context: typer.Context) -> int:
        return run(room, [name, *context.args])

    return command


def run(room: Room, arguments: list[str]) -> int:
    """Run a room's own command; its exit status.

    Raises:
        ConfigError: the room's extra is not installed.
    """
    module = f"{module_of(room)}.__main__"
    if room == "training" and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a recipe may name a class that lies here
    return int(load(module, room).main(arguments, prog="stepcast"))
