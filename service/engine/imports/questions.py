"""What an import is told, and what it must ask: all of it at once."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import TypeAdapter, ValidationError

from stepcast.errors import ManifestError
from stepcast.manifest import Constant, Manifest, StateTensor

_OURS: Final = frozenset({"schema_version", "name", "version", "sha256"})
_LISTS: Final = {"states": "input", "constants": "name"}


def read_partial(path: Path | None) -> dict[str, Any]:
    """Fields of a manifest that are known, from a JSON file.

    Raises:
        ManifestError: the file cannot be read, or has a field that no manifest has or that the import sets itself, or
            a value that is null or of the wrong type.
    """
    try:
        known = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read ({error})") from error
    if not isinstance(known, dict):
        raise ManifestError(f"{path}: is not an object")
    if given := sorted(_OURS & set(known)):
        raise ManifestError(f"{path}: {given} are set by the import. Leave them out.")
    if unknown := sorted(set(known) - set(Manifest.model_fields)):
        raise ManifestError(f"{path}: unknown fields {unknown}")
    for name, value in known.items():
        for where, field, part in _parts(name, value):
            if part is None and not where.endswith("_axis"):
                raise ManifestError(f"{path}: {where} is null. Fill it in, or leave it out.")
            try:
                TypeAdapter(field).validate_python(part)
            except ValidationError as error:
                first = error.errors()[0]
                inner = "".join(f".{key}" for key in first["loc"])
                raise ManifestError(f"{path}: {where}{inner}: {first['msg']}") from error
    return known


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """The path, the type and the value of all that a field gives; a known state or constant may lack what it needs."""
    if name not in _LISTS:
        yield f"$.{name}", Manifest.model_fields[name].annotation, value
        return
    kind = StateTensor if name == "states" else Constant
    yield f"$.{name}", list[dict[str, Any]], value
    for number, entry in enumerate(value):
        for key, part in entry.items():
            where = f"$.{name}[{number}].{key}"
            if key not in kind.model_fields:
                raise ManifestError(f"{where}: unknown field, of {sorted(kind.model_fields)}")
            yield where, kind.model_fields[key].annotation, part


def joined(known: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """What is known, and more of it, which wins; a state is known by its input, a constant by its name."""
    made = {**known, **more}
    for name, key in _LISTS.items():
        if name in made:
            entries: dict[Any, dict[str, Any]] = {}
            for entry in (*known.get(name, ()), *more.get(name, ())):
                entries[entry.get(key)] = {**entries.get(entry.get(key), {}), **entry}
            made[name] = list(entries.values())
    parts = {name: {**known.get(name, {}), **more[name]} for name in ("input", "output") if name in more}
    return made | parts


class Question(NamedTuple):
    """What the graph does not say.

    Attributes:
        text: Facts: which tensor, and what it may be.
        options: What answers it on the command line; a word in capitals stands for what only the user knows.
        fields: The same answer as fields of a manifest; None stands for what only the user knows.
        likely: Whether the options are an answer as they stand.
    """

    text: str
    options: Sequence[str]
    fields: Mapping[str, Any]
    likely: bool = True


class Unclear(ManifestError):
    """A graph of which one thing is not clear."""

    def __init__(self, question: Question) -> None:
        self.question = question
        super().__init__(f"{question.text} Give {' '.join(question.options)}")


class OpenQuestions(ManifestError):
    """An import that must ask.

    Args:
        file: The graph's file.
        questions: All of them.
        draft: A partial manifest with the likeliest answers.
    """

    def __init__(self, file: Path, questions: Sequence[Question], draft: Mapping[str, Any]) -> None:
        self.questions, self.draft = questions, draft
        many = "a question is" if len(questions) == 1 else f"{len(questions)} questions are"
        lines = [str(Unclear(question)) for question in questions]
        if len(lines) > 1:
            lines = [f"\n  {number}. {line}" for number, line in enumerate(lines, 1)]
        super().__init__(f"{file}: {many} open: {''.join(lines)}")

    @property
    def command(self) -> str | None:
        """The options that answer all of it by the likeliest reading; None where only the user knows one of them."""
        if not all(question.likely for question in self.questions):
            return None
        return " ".join(dict.fromkeys(option for question in self.questions for option in question.options))
