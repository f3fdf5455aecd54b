"""Take a recurrent ONNX graph that others made into the model repository."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from stepcast.errors import ManifestError

from .axes import numbered
from .onnx_graphs import Imported, import_onnx
from .questions import OpenQuestions, joined


def options(parser: argparse.ArgumentParser) -> None:
    """Add what a graph may have to be told."""
    add = parser.add_argument
    add("--manifest", type=Path, metavar="FILE", help="JSON of manifest fields that are known; options win over it")
    add("--questions", type=Path, metavar="FILE", help="where to write a --manifest to edit, if something is not clear")
    add("--input", metavar="NAME", help="the input that carries the data")
    add("--output", metavar="NAME", help="the output that is answered")
    add("--state", action="append", default=[], metavar="INPUT:OUTPUT", help="a state and its next value; may repeat")
    constant = "an input that is always the same: sr=16000, or numbers between commas; may repeat"
    add("--constant", action="append", default=[], metavar="NAME=VALUE", help=constant)
    add("--features", metavar="N|NAMES", help="how many features a step has, or their names between commas")
    add("--outputs", metavar="N|NAMES", help="how many outputs a step has, or their names between commas")
    kept = "values of a step that the session keeps"
    add("--context", metavar="[INPUT:]N", help=f"{kept}, to stand before the next step's")
    add("--overlap", metavar="[OUTPUT:]N", help=f"{kept}, to be added to the next step's")
    at = "axis: 1 of input and output, or input=1, output=1"
    add("--batch-axis", action="append", default=[], metavar="AXIS", help=f"batch {at}, or STATE=1; may repeat")
    add(
        "--time-axis",
        action="append",
        default=[],
        metavar="AXIS",
        help=f"time {at}; none: one step in a call; may repeat",
    )


def run(arguments: argparse.Namespace) -> int:
    """Take a foreign graph into the repository, and say how it was read."""
    try:
        where = arguments.models, arguments.name, arguments.version, arguments.manifest
        say(import_onnx(arguments.file, *where, _answers(arguments)))
    except OpenQuestions as asked:
        hints = _hints(asked, arguments)
        raise ManifestError("\n".join([str(asked), *hints])) from asked
    return 0


def _answers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options as fields of a manifest."""
    known: dict[str, Any] = {}
    for side in ("input", "output"):
        if getattr(arguments, side) is not None:
            known = joined(known, {side: {"name": getattr(arguments, side)}})
    for text in arguments.state:
        before, found, after = text.partition(":")
        if not (before and found and after):
            raise ManifestError(f"--state {text!r} is not INPUT:OUTPUT, such as h:h_next")
        known = joined(known, {"states": [{"input": before, "output": after}]})
    for text in arguments.constant:
        name, _, values = text.partition("=")
        try:
            known = joined(known, {"constants": [{"name": name, "values": [float(v) for v in values.split(",")]}]})
        except ValueError:
            raise ManifestError(f"--constant {text!r} is not NAME=NUMBER, such as sr=16000") from None
    for field, letter in (("features", "x"), ("outputs", "y")):
        text = getattr(arguments, field)
        if text is not None:
            known[field] = (
                numbered(letter, int(text), letter == "x") if text.isdigit() else [{"name": n} for n in text.split(",")]
            )
    for option, side in (("context", "input"), ("overlap", "output")):
        text = getattr(arguments, option)
        if text is not None:
            name, _, values = text.rpartition(":")
            if not values.isdigit():
                raise ManifestError(f"--{option} {text!r} is not a number of values, such as {side}:64")
            known = joined(known, {side: {option: int(values), **({"name": name} if name else {})}})
    for axis in ("batch_axis", "time_axis"):
        for text in getattr(arguments, axis):
            known = joined(known, _axis(axis, text))
    return known


def _axis(axis: str, text: str) -> dict[str, Any]:
    """`1`, `input=1`, `h=1` as fields of a manifest."""
    name, _, number = text.rpartition("=")
    if not (number.isdigit() or (number == "none" and axis == "time_axis")):
        raise ManifestError(f"--{axis.replace('_', '-')} {text!r} is not an axis, such as 1 or input=1")
    value = {axis: int(number) if number.isdigit() else None}
    if name in ("", "input", "output"):
        return {side: value for side in ("input", "output") if name in ("", side)}
    if axis == "time_axis":
        raise ManifestError(f"--time-axis {text!r}: a state has no time axis. Give input=AXIS or output=AXIS.")
    return {"states": [{"input": name, **value}]}


def say(made: Imported) -> None:
    """Print how a graph was read, and what was done to it."""
    manifest = made.manifest
    print(f"{made.directory}: {manifest.n_features} features, {manifest.n_outputs} outputs")
    for what, tensor in (("input", manifest.input), ("output", manifest.output)):
        shape = "" if tensor.shape is None else f", each step {list(tensor.shape)}"
        print(f"{what} {tensor.name!r}: batch axis {tensor.batch_axis}, time axis {tensor.time_axis}{shape}")
    for state in manifest.states:
        where = f"{list(state.shape)}, axis {state.batch_axis}"
        print(f"state {state.layer}.{state.key}: {state.input!r} -> {state.output!r}, {where}")
    if not manifest.states:
        print("it has no state: what it answers to a step follows from this step alone")
    for done in made.done:
        print(f"note: {done}")
    if made.unanswered:
        print(f"not answered: {', '.join(map(repr, made.unanswered))}")
    print("golden.npz was recorded from this graph: compare it with your training framework before you trust it")


def _hints(asked: OpenQuestions, arguments: argparse.Namespace) -> list[str]:
    """What to do about open questions: the file to edit, the command that would do."""
    hints = []
    if arguments.questions is not None:
        try:
            arguments.questions.write_text(json.dumps(asked.draft, indent=2) + "\n")
        except OSError as error:
            raise ManifestError(f"{arguments.questions}: cannot be written ({error.strerror})") from error
        hints.append(f"{arguments.questions} has what was read. Fill in what is null, and give it as --manifest.")
    if asked.command is not None:
        hints.append(f"Likely: {shlex.join([*arguments.said, *shlex.split(asked.command)])}")
    return hints
