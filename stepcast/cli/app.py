"""All commands of `stepcast` in one application, and how an error becomes one line and an exit status."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from ..arguments import nearest
from ..errors import ConfigError, ManifestError, StepcastError
from . import load, recipes, rooms, sessions, watch

app: Final = typer.Typer(
    name="stepcast",
    help="Serve recurrent networks one step at a time: a session is data, not a process.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (rooms, recipes, sessions, watch, load):
    group.install(app)


@app.command()
def version(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also the libraries it stands on.")] = False,
) -> None:
    """Print the version."""
    from .. import __version__

    print(f"stepcast {__version__}")
    if verbose:
        from importlib import metadata

        there = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
        for name in ("pydantic", "httpx", "fastapi", "uvicorn", "onnxruntime", "onnxruntime-gpu", "torch"):
            print(f"{name} {there.get(name, '- not installed')}")


def run(arguments: Sequence[str]) -> int:
    """Run a command.

    Returns:
        2 for wrong usage, 1 for a failure, 130 after Ctrl-C, else what the command gives.
    """
    try:
        status = app(args=list(arguments), prog_name="stepcast", standalone_mode=False)
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as wrong:
        return 2 if type(wrong).__name__ == "NoArgsIsHelpError" else _say(_usage(wrong), 2)  # the help was shown
    except ConfigError as error:
        return _say(str(error), 1)
    except (ManifestError, StepcastError) as error:
        return _say(f"{type(error).__name__}: {error}", 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # who read the output has gone, as `head` does; the interpreter's last flush must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status if isinstance(status, int) else 0


def _usage(wrong: typer.TyperException) -> str:
    """What is wrong with the command line, and the nearest right name."""
    text = wrong.format_message().partition(" (Possible options")[0].rstrip(". ")
    text += "" if text.endswith("?") else "."
    context, option = getattr(wrong, "ctx", None), getattr(wrong, "option_name", None)
    if context is not None and isinstance(option, str):
        text += nearest(option, [name for parameter in context.command.params for name in parameter.opts])
    command = context.command_path if context is not None else "stepcast"
    return f"{text} See {command} --help."


def _say(text: str, status: int) -> int:
    print(f"stepcast: {text}", file=sys.stderr)
    return status
