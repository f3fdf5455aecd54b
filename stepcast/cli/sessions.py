"""step, sessions, state, fork, rollout: what can be done to the sessions of a server."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arguments import nearest
from ..errors import ConfigError
from . import readings
from .connection import HERE, Key, Model, SessionId, Url, connected, line, manifest_of, names_of

if TYPE_CHECKING:
    from ..client import Client

_PANEL = "Sessions of a server"


def install(app: typer.Typer) -> None:
    """Add the commands."""
    # A negative number is no option.
    app.command(rich_help_panel=_PANEL, context_settings={"ignore_unknown_options": True})(step)
    for command in (sessions, state, fork, rollout):
        app.command(rich_help_panel=_PANEL)(command)


def step(
    model: Model,
    session: SessionId,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="READINGS...",
            help="name=value for each feature (one that is left out is missing), or a number for each in order, "
            "or JSON: an object by name, [F], [N,F] or [N,T,F]; or -: such a JSON value on each line of stdin.",
        ),
    ],
    url: Url = HERE,
    key: Key = "",
) -> None:
    """Advance a session, which begins with its first step; prints a line of JSON."""
    with connected(url, key) as client:
        manifest = manifest_of(client, model)
        stepped, names = client.session(model, session), names_of(manifest)
        asked = ([text] for text in sys.stdin if text.strip()) if values == ["-"] else [values]
        for words in asked:
            answer = stepped.step(readings.parse(words, manifest))
            outputs = answer.outputs
            shown = names.named(outputs) if outputs.ndim == 1 else outputs.tolist()
            print(line({"outputs": shown, "step": answer.step, "version": answer.version}), flush=True)


def sessions(
    model: Model,
    prefix: Annotated[str, typer.Option(help="Only ids that start with this.")] = "",
    long: Annotated[bool, typer.Option("--long", "-l", help="A table with step, size and last use.")] = False,
    url: Url = HERE,
    key: Key = "",
) -> None:
    """List a model's sessions, one id a line."""
    with connected(url, key) as client:
        manifest_of(client, model)
        found = client.sessions(model, prefix)
        if long:
            _table(client, model, found)
        else:
            for session in found:
                print(session)


def _table(client: "Client", model: str, found: list[str]) -> None:
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table

    table = Table("session", "step", "examples", "version", "bytes", "last used", box=None)
    for session in found:
        info = client.session(model, session).info()
        used = datetime.fromtimestamp(info["used_at"]).isoformat(" ", "seconds")
        table.add_row(session, *(str(info[name]) for name in ("step", "examples", "version", "bytes")), used)
    Console().print(table)


def state(
    model: Model,
    session: SessionId,
    layer: Annotated[str, typer.Option(help="Only this layer.")] = "",
    set_to: Annotated[Path | None, typer.Option("--set", metavar="FILE", help="Set it from JSON; -: stdin.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Forget it: the next step starts anew.")] = False,
    url: Url = HERE,
    key: Key = "",
) -> None:
    """Print a session's state as JSON (rnnGetPreviousState), or set or clear it."""
    with connected(url, key) as client:
        manifest_of(client, model)
        held = client.session(model, session)
        if clear:
            held.clear()
        elif set_to is not None:
            held.set_state(_read_state(set_to))
        else:
            got = held.get_state()
            if layer and layer not in got.state:
                raise ConfigError(f"{model!r} has no layer {layer!r}.{nearest(layer, list(got.state))}")
            wanted = {layer: got.state[layer]} if layer else got.state
            tensors = {name: {k: v.tolist() for k, v in keys.items()} for name, keys in wanted.items()}
            print(json.dumps({"step": got.step, "version": got.version, "state": tensors}))


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    import numpy as np

    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        fields = json.loads(text)
        return {name: {k: np.asarray(v) for k, v in keys.items()} for name, keys in fields["state"].items()}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f'{path}: no state: wanted {{"state": {{layer: {{key: [[...]]}}}}}}') from error


def fork(
    model: Model,
    session: SessionId,
    to: Annotated[str | None, typer.Argument(help="The child's id; by default a new one.")] = None,
    url: Url = HERE,
    key: Key = "",
) -> None:
    """Make a session with the same state; prints its id."""
    with connected(url, key) as client:
        manifest_of(client, model)
        print(client.session(model, session).fork(to).id)


def rollout(
    model: Model,
    session: SessionId,
    steps: Annotated[int, typer.Argument(min=1, help="How many.")],
    known: Annotated[
        str, typer.Option(metavar="JSON", help="Known future inputs, [H,F] or [N,H,F], or by name [H] or [N,H].")
    ] = "",
    start: Annotated[str, typer.Option(metavar="TIME", help="The first step's moment, for the model's calendar.")] = "",
    every: Annotated[str, typer.Option(help="From step to step, such as 15min; default: the model's.")] = "",
    commit: Annotated[bool, typer.Option("--commit", help="The session takes these steps.")] = False,
    temperature: Annotated[float, typer.Option(min=0, help="Of a classifier; 0 takes the likeliest class.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws; the same seed draws the same.")] = None,
    paths: Annotated[int, typer.Option(min=0, help="Sample paths; their quantiles are printed too.")] = 0,
    url: Url = HERE,
    key: Key = "",
) -> None:
    """Run free, feeding predictions back; prints a line of JSON for each step, an example's one after the other."""
    with connected(url, key) as client:
        manifest = manifest_of(client, model)
        inputs = readings.future(known, start, every, steps, manifest)
        held = client.session(model, session)
        made = held.rollout(steps, inputs, commit=commit, temperature=temperature, seed=seed, paths=paths)
        names = names_of(manifest)
        for example, rows in enumerate(made.outputs):
            for ahead, row in enumerate(rows, 1):
                told: dict[str, Any] = {"example": example, "ahead": ahead, "outputs": names.named(row)}
                if made.quantiles is not None:
                    told["quantiles"] = {
                        name: dict(zip(map(str, made.levels), quantiles[example, ahead - 1].tolist(), strict=True))
                        for name, quantiles in made.quantiles.items()
                    }
                print(line(told))
