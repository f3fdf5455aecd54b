"""What an import is told, and what it must ask: all of it at once."""

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from stepcast.errors import ManifestError
from stepcast.manifest import Manifest

_OURS: Final = frozenset({"schema_version", "name", "version", "sha256"})


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
    if given := sorted(_OURS & set(known)):
        raise ManifestError(f"{path}: {given} are set by the import. Leave them out.")
    if unknown := sorted(set(known) - set(Manifest.model_fields)):
        raise ManifestError(f"{path}: unknown fields {unknown}")
    return known


class Question(NamedTuple):
    """What the graph does not say.

    Attributes:
        text: Facts, then the fields of a manifest that would answer it.
    """

    text: str


class Questions:
    """Questions as they turn up; who asks goes on with its likeliest reading, so that the others turn up too."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def ask(self, text: str) -> None:
        """One more question."""
        self.asked.append(Question(text))

    def settle(self) -> None:
        """Raises ManifestError, with all of them, where there are any."""
        if self.asked:
            raise ManifestError("\n".join(question.text for question in self.asked))
