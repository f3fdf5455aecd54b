"""new: a recipe for a CSV that was looked at. schema: what a recipe or a manifest may hold."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ..arguments import nearest
from ..errors import ConfigError
from ..rooms import load, module_of, room
from .look import Column, Look, look
from .rooms import PANELS

_FEWEST_STEPS: Final = 40
_WORDS: Final = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"}  # what YAML takes for no text


class Schema(StrEnum):
    """What has a schema."""

    RECIPE = "recipe"
    MANIFEST = "manifest"


def install(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(rich_help_panel=PANELS["training"])(new)
    app.command(rich_help_panel=PANELS["training"])(schema)


def schema(of: Annotated[Schema, typer.Argument(help="What is described.")]) -> None:
    """Print a JSON schema: of a training recipe, or of manifest.json."""
    from ..manifest import Manifest

    described: Any = Manifest
    if of is Schema.RECIPE:
        described = load(f"{module_of('training')}.config", "training").Config
    print(json.dumps(described.model_json_schema(), indent=2))


def new(
    csv: Annotated[
        Path | None, typer.Argument(help="Readings: a line of names, then a row for each moment.", show_default=False)
    ] = None,
    example: Annotated[str, typer.Option(help="Instead copy a worked example's recipe; `list` lists them.")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The recipe; default: NAME.yaml here.")] = None,
    name: Annotated[str, typer.Option(help="The model's name; default: the file's.")] = "",
    time: Annotated[str | None, typer.Option(help="The time column; default: found.")] = None,
    series: Annotated[str | None, typer.Option(help="The column that tells series apart; default: found.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="To forecast; repeatable; default: all numbers.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing recipe.")] = False,
) -> None:
    """Look at a CSV and write a commented recipe that forecasts its next readings, for `stepcast train`."""
    if example:
        _copy(example, force)
        return
    if csv is None:
        raise typer.BadParameter("Name a CSV, or an example: --example list.")
    seen = look(csv, time, series)
    model = name or re.sub(r"[^A-Za-z0-9._-]+", "_", csv.stem).strip("._-") or "model"
    recipe = out or Path(f"{model}.yaml")
    _put(recipe, write(seen, model, recipe.parent, target or ()), force)
    kind = f"{len(seen.keys)} series by {seen.series!r}" if seen.series else "one series"
    print(f"{csv}: {seen.rows} rows, {kind}, a step every {seen.every}, {seen.absent} steps without a row")
    print(f"wrote {recipe}. Train it: stepcast train {recipe}")


def _copy(example: str, force: bool) -> None:
    """Copy a recipe that comes with the trainer, and the small files it reads, to here."""
    folder = room("training") / "recipes"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if example == "list":
        print("\n".join(known))
        return
    if example not in known:
        raise ConfigError(f"there is no example {example!r}, there are {', '.join(known)}.{nearest(example, known)}")
    for path in sorted(folder.glob(f"{example}.*")):
        _put(Path(path.name), path.read_text(), force)
    print(f"wrote {example}.yaml. Train it: stepcast train {example}.yaml")


def _put(path: Path, text: str, force: bool) -> None:
    if path.exists() and not force:
        raise ConfigError(f"{path}: is there already. Write over it by --force.")
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


def write(seen: Look, model: str, folder: Path, targets: Sequence[str]) -> str:
    """The recipe's text.

    Args:
        folder: Where the recipe will lie; the CSV's path is relative to it.
        targets: What is to be forecast; empty: every column of numbers.

    Raises:
        ConfigError: a target is no column of numbers, there is none, or the file is too short to be split.
    """
    numbers = [column for column in seen.columns if column.numeric and not column.constant]
    if not numbers:
        raise ConfigError(f"{seen.path}: no column of numbers that change besides {seen.time!r}")
    known = [column.name for column in numbers]
    for one in targets:
        if one not in known:
            raise ConfigError(
                f"{seen.path}: no column of numbers {one!r} among {', '.join(known)}.{nearest(one, known)}"
            )
    if seen.steps < _FEWEST_STEPS:
        raise ConfigError(f"{seen.path}: {seen.steps} steps of {seen.every}, a recipe needs {_FEWEST_STEPS}")
    lines = [*_head(seen, model), *_data(seen, numbers, targets or known, folder), "", *_network(seen)]
    return "\n".join(lines) + "\n"


def _head(seen: Look, model: str) -> Iterator[str]:
    last = seen.moment(seen.steps - 1)
    yield f"# Written by `stepcast new` from {_comment(seen.path.name)}: {seen.rows} rows,"
    yield f"# {seen.first.isoformat()} to {last.isoformat()}."
    yield "#"
    yield f"#   stepcast train {model}.yaml"
    yield "#"
    yield "# Every key is explained by `stepcast schema recipe`."
    yield f"name: {_text(model)}"
    yield "seed: 1"
    yield ""


def _data(seen: Look, numbers: Sequence[Column], targets: Sequence[str], folder: Path) -> Iterator[str]:
    yield "data:"
    yield "  kind: table"
    yield f"  path: {_text(_relative(seen.path, folder))}  # relative to this file"
    if seen.series is not None:
        shown = ", ".join(seen.keys[:5]) + (", ..." if len(seen.keys) > 5 else "")
        yield f"  series: {_text(seen.series)}  # {len(seen.keys)}: {_comment(shown)}"
    yield f"  time: {_text(seen.time)}"
    total = seen.steps * max(1, len(seen.keys))
    yield f"  every: {seen.every}  # {seen.steps} steps; {_share(seen.absent, total)} have no row: they are masked"
    yield "  columns:  # target: to be forecast; missing: refuse, mean, zero or hold (the last reading)"
    for column in seen.columns:
        yield _column(column, column.name in targets, seen.rows, column in numbers)
    yield "  # calendar: [hour, week]  # tells the network the time; a client then sends each reading's, too"
    yield "  horizon: 1  # steps ahead"
    yield "  target_scale: change  # learn the change, not the value: belongs to residual below"
    validation, test = (seen.moment(seen.steps * part // 100).replace(tzinfo=None) for part in (70, 85))
    yield f"  validation: {validation.isoformat(' ')}  # training is all before: 70 % of the time"
    yield f"  test: {test.isoformat(' ')}  # the last 15 %"
    yield f"  warm_up: {min(168, seen.steps // 4)}  # unscored steps before validation and test"


def _column(column: Column, target: bool, rows: int, numeric: bool) -> str:
    gaps = f"; {_share(column.empty, rows)} empty" if column.empty else ""
    if not numeric:
        what = "one value" if column.constant else "text"
        labels = column.labels
        what = f"looks like a label ({', '.join(labels)})" if labels else what
        return f"    # {_text(column.name)}: left out, {_comment(what)}{gaps}"
    unit = re.search(r"[(\[]([^()\[\]]+)[)\]]\s*$", column.name)  # temperature (°C)
    fields = (
        [f"unit: {json.dumps(unit[1] if unit else '', ensure_ascii=False)}"]
        + ["target: true"] * target
        + ["indicator: true"] * bool(column.empty)
    )
    note = "; whole numbers, few values: a label?" if column.labels else ""
    return f"    {_text(column.name)}: {{{', '.join(fields)}}}  # {column.low:g} to {column.high:g}{gaps}{note}"


def _network(seen: Look) -> Iterator[str]:
    train = seen.steps * 70 // 100
    lanes = max(1, min(16, train // 200))
    yield "network:"
    yield "  - {kind: lstm, units: 32}"
    yield "  - {kind: rnn_output, residual: true, loss: mse}"
    yield ""
    yield "training:"
    yield "  backprop: truncated"
    yield f"  tbptt_forward: {min(24, max(2, train // 4))}  # steps per update"
    yield "  optimiser: adam"
    yield "  learning_rate: 0.003"
    yield "  schedule: cosine"
    yield "  gradient: clip_global_norm"
    yield "  epochs: 20"
    yield f"  batch: {lanes * max(1, len(seen.keys))}  # stretches of the series side by side"
    yield "  patience: 5  # epochs without a better validation loss, then stop"
    yield "  threads: 1  # small networks are fastest with one"


def _text(word: str) -> str:
    """A word as YAML takes it for text."""
    plain = re.fullmatch(r"[A-Za-z_][\w./-]*", word, re.ASCII) and word.lower() not in _WORDS
    return word if plain else json.dumps(word, ensure_ascii=False)


def _comment(text: str) -> str:
    """Text that stays on its line."""
    return " ".join(text.split())[:120]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if part else "none"


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
