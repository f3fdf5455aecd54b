"""Labelled lines of text to sequences of word vectors: one class per line, at its last word."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stepcast.errors import ConfigError
from stepcast.manifest import Feature

from .align import one_hot
from .in_memory import Classified, Examples, Looked
from .source import SPLITS
from .word_vectors import WordVectors, read_word_vectors

Line = tuple[str, str]  # label, text


class Tokens(Classified):
    """A `Source` of files with one `label<TAB>text` per line, many-to-one.

    As in DL4J's word2vec example, words are lower-cased, those without a vector are dropped, long texts are cut, and
    what goes into the network is the vector of each word.

    Args:
        batch: Texts per batch.
        seed: Of their order.
        root: What paths are relative to.
        vectors: A word2vec file, see `read_word_vectors`.
        train: A UTF-8 file of lines.
        validation: Another one, or None.
        test: Another one, or None.
        max_steps: Words that are kept of a text.
        bucket: See `plan_batches`.
    """

    def __init__(
        self,
        *,
        batch: int,
        seed: int,
        root: Path,
        vectors: str,
        train: str,
        validation: str | None = None,
        test: str | None = None,
        max_steps: int = 256,
        bucket: int = 50,
    ) -> None:
        words = read_word_vectors(root / vectors)
        paths = dict(zip(SPLITS, (train, validation, test), strict=True))
        lines = {split: read_lines(root / path) for split, path in paths.items() if path is not None}
        classes = tuple(sorted({label for label, _ in lines["train"]}))
        super().__init__(
            {
                split: examples(some, words, classes, max_steps, where=str(root / (paths[split] or "")))
                for split, some in lines.items()
            },
            word_feature(words),
            classes,
            batch=batch,
            seed=seed,
            bucket=bucket,
            description=f"{train} with {len(words.words)} word vectors of {vectors}",
        )


def tokens_of(text: str) -> list[str]:
    """Lower-case words, with their apostrophes, without punctuation."""
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def read_lines(path: Path) -> list[Line]:
    """Labels and texts of a file.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line has no label.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from error
    pairs = [line.partition("\t") for line in lines]
    for number, (label, tab, _) in enumerate(pairs):
        if not (label and tab):
            raise ConfigError(f"{path}, line {number + 1}: no label, wanted label<TAB>text")
    if not pairs:
        raise ConfigError(f"{path}: no lines")
    return [(label, text) for label, _, text in pairs]


def word_feature(words: WordVectors) -> Feature:
    """One feature as wide as a vector, scaled so that its values have deviation 1."""
    return Feature(name="word", width=words.vectors.shape[1], scale=float(words.vectors.std()) or 1.0)


def examples(
    lines: Sequence[Line], words: WordVectors, classes: Sequence[str], max_steps: int, *, where: str
) -> Examples:
    """Vectors of each text's words [T, D], and its class [1, O]. `where` is the file, for messages.

    Raises:
        ConfigError: a text without any known word, or a label that training does not have.
    """
    x, y = [], []
    for number, (label, text) in enumerate(lines):
        places = words.known(tokens_of(text))[:max_steps]
        if not places:
            raise ConfigError(f"{where}, line {number + 1}: text has no word with a vector: {text[:60]!r}")
        if label not in classes:
            raise ConfigError(
                f"{where}, line {number + 1}: text has the label {label!r}, training has {', '.join(classes)}"
            )
        x.append(places)
        y.append(one_hot(np.array([classes.index(label)]), len(classes)))
    return Examples(Looked(x, words.vectors), y)
