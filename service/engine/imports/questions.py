"""What an import is told, and what it must ask: all of it at once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from stepcast.errors import ManifestError
from stepcast.manifest import Manifest

_OURS: Final = frozenset({"schema_version", "name", "version", "sha256"})
_LISTS: Final = {"states": "input", "constants": "name"}


def read_partial(path: Path | None) -> dict[str, Any]:
    """Fields of a manifest that are known, from a JSON file.

    Raises:
        ManifestError: the file cannot be read, or has a field that no manifest has or that the import sets itself.
    """
    try:
        known = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read ({error})") from error
    if not isinstance(known, dict):
        raise ManifestError(f"{path}: is not an object")
    for name in _LISTS:
        entries = known.get(name, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ManifestError(f"{path}: $.{name} is not a list of objects")
    for name in ("input", "output"):
        if not isinstance(known.get(name, {}), dict):
            raise ManifestError(f"{path}: $.{name} is not an object")
    if given := sorted(_OURS & set(known)):
        raise ManifestError(f"{path}: {given} are set by the import. Leave them out.")
    if unknown := sorted(set(known) - set(Manifest.model_fields)):
        raise ManifestError(f"{path}: unknown fields {unknown}")
    return known


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
    """

    text: str
    options: Sequence[str]
    fields: Mapping[str, Any]

    @property
    def likely(self) -> bool:
        """Whether the options are an answer as they stand."""
        return bool(self.options) and not any(option.rpartition("=")[2].isupper() for option in self.options)


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
        lines = [f"{q.text} Give {' '.join(q.options)}" if q.options else q.text for q in questions]
        if len(lines) > 1:
            lines = [f"\n  {number}. {line}" for number, line in enumerate(lines, 1)]
        super().__init__(f"{file}: {many} open: {''.join(lines)}")

    @property
    def command(self) -> str | None:
        """The options that answer all of it by the likeliest reading; None where only the user knows one of them."""
        if not all(question.likely for question in self.questions):
            return None
        return " ".join(dict.fromkeys(option for question in self.questions for option in question.options))
