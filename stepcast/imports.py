"""`stepcast import [KIND] FILE`: takes a model that others made into the model repository.

A kind is a file format, or a model known by name. Its room does the work: the service takes graphs as they are, the
trainer builds a network and exports it. To add a kind, give it a place in KINDS and write its module, which has

- a docstring, whose first line is the command's description;
- `options(parser)`, which adds the kind's own options; every option takes one value and may be repeated;
- `run(arguments) -> int`, which is given `file`, `models`, `name`, `version` (or None), the kind's own options, and the
  command line as it was `said`. It prints what was made and gives an exit status. What a user has caused it raises as
  ManifestError or ConfigError.
"""

import argparse
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from .arguments import Parser
from .errors import ManifestError
from .rooms import Room, load, module_of


class Kind(NamedTuple):
    """A kind of file that can be imported.

    Attributes:
        room: The room that does it.
        module: The room's module with `options` and `run`; loaded when a file of this kind is imported.
        text: What a file of this kind is.
        claims: Whether a file's content says that it is one; None: this kind is only taken by its name.
    """

    room: Room
    module: str
    text: str
    claims: Callable[[Path], bool] | None


def is_zip_with(*members: str) -> Callable[[Path], bool]:
    """A test whether a file is a zip that has all these members."""

    def claims(file: Path) -> bool:
        try:
            with zipfile.ZipFile(file) as archive:
                return set(members) <= set(archive.namelist())
        except (OSError, ValueError, zipfile.BadZipFile):
            return False

    return claims


def is_no_zip(file: Path) -> bool:
    """Whether a file is anything but a zip: ONNX files have no mark of their own, so their reader must tell."""
    return not zipfile.is_zipfile(file)


KINDS: Final[dict[str, Kind]] = {
    "dl4j": Kind("training", "imports.dl4j_command", "a network that DL4J saved", is_zip_with("configuration.json")),
    "keras": Kind(
        "training",
        "imports.keras_command",
        "a network that Keras 3 saved",
        is_zip_with("config.json", "model.weights.h5"),
    ),
    "onnx": Kind("service", "engine.imports.onnx_command", "a recurrent ONNX graph", is_no_zip),
    "silero": Kind("service", "engine.imports.silero", "Silero's voice activity detector, by name only", None),
    "dtln": Kind("service", "engine.imports.dtln", "DTLN's noise suppression, by name only", None),
}
"""By name. A file is of the first kind that claims it."""


def run(arguments: Sequence[str], prog: str) -> int:
    """Import a file; `arguments` are those behind `import`.

    Returns:
        An exit status.

    Raises:
        ManifestError: the file is of no kind that is known, or cannot be imported.
        ConfigError: a library of the kind's extra is not installed.
        SystemExit: 2 for wrong usage; 0 after --help.
    """
    name, rest = _chosen(arguments)
    parsed = parser(name, prog)
    found = parsed.parse_args(rest)
    _check_file(found.file)
    if found.name is None:
        try:
            found.name = _model_name(found.file.name.partition(".")[0])
        except argparse.ArgumentTypeError as error:
            parsed.error(f"{error}. Give --name.")
    found.said = [*prog.split(), "import", *arguments]
    return int(_module(name).run(found))


def parser(name: str, prog: str) -> Parser:
    """The command line of a kind: what all kinds take, and its own options."""
    module = _module(name)
    kinds = "; ".join(f"{other}: {known.text}" for other, known in KINDS.items())
    described = (module.__doc__ or "").partition("\n")[0]
    made = Parser(prog=f"{prog} import", description=described, epilog=f"KIND is found by content. {kinds}.")
    made.add_argument("file", type=Path, metavar="FILE")
    made.add_argument("--name", type=_model_name, help="the model's name; default: the file's, without its ending")
    made.add_argument("--version", type=_version, help="default: the next free one")
    made.add_argument("--models", type=Path, default=Path("models"), help="model repository to write to")
    module.options(made)
    return made


def _module(name: str) -> Any:
    kind = KINDS[name]
    return load(f"{module_of(kind.room)}.{kind.module}", kind.room)


def _version(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no version: 1 or more")
    return int(text)


def _check_file(file: Path) -> None:
    """Raises ManifestError where nothing can be read; whoever opened a pipe would wait forever."""
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "is not a regular file" if file.exists() else "no such file"
        raise ManifestError(f"{file}: {what}")
    if not file.stat().st_size:
        raise ManifestError(f"{file}: is empty")


def _model_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a model's name: letters, digits, '.', '_' and '-'")
    return text


def _chosen(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The kind, given by name or found by the file's content, and the arguments without it."""
    given = _positional(arguments)
    if not given:
        return "onnx", list(arguments)  # --help, or no file: the parser says so
    first = given[0]
    if arguments[first] in KINDS:
        return arguments[first], [*arguments[:first], *arguments[first + 1 :]]
    file = Path(arguments[first])
    if not file.is_file():
        return "onnx", list(arguments)
    for name, kind in KINDS.items():
        if kind.claims is not None and kind.claims(file):
            return name, list(arguments)
    known = ", ".join(KINDS)
    raise ManifestError(f"{file}: its content is of no kind that can be imported, which are {known}")


def _positional(arguments: Sequence[str]) -> list[int]:
    """Where arguments stand that are neither options nor values of options."""
    found, value = [], False
    for at, argument in enumerate(arguments):
        if value:
            value = False
        elif argument.startswith("-") and argument != "-":
            value = "=" not in argument and argument not in ("-h", "--help")
        else:
            found.append(at)
    return found
