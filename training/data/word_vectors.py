"""Word vectors in the word2vec formats, text or binary, read by gensim."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stepcast.errors import ConfigError

from .align import Array


@dataclass(frozen=True)
class WordVectors:
    """A vocabulary: `vectors[i]` [D] belongs to `words[i]`."""

    words: tuple[str, ...]
    vectors: Array

    @cached_property
    def index(self) -> dict[str, int]:
        """Place of each word."""
        return {word: number for number, word in enumerate(self.words)}

    def known(self, tokens: Iterable[str]) -> list[int]:
        """Places of the tokens that have a vector; the others are dropped."""
        return [self.index[token] for token in tokens if token in self.index]


def read_word_vectors(path: Path, limit: int | None = None) -> WordVectors:
    """Read a word2vec file: binary if it is called *.bin or *.bin.gz, else text.

    Args:
        path: May be compressed with gzip (*.gz).
        limit: The first so many words only; files are sorted by frequency.

    Raises:
        ConfigError: the file cannot be read, or gensim is not installed.
    """
    models = _gensim()
    binary = path.name.removesuffix(".gz").endswith(".bin")
    try:
        loaded = models.KeyedVectors.load_word2vec_format(str(path), binary=binary, limit=limit)
    except (OSError, EOFError, ValueError) as error:
        kind = "binary" if binary else "text"
        raise ConfigError(f"{path}: cannot be read as word2vec's {kind} format ({error})") from error
    return WordVectors(tuple(loaded.index_to_key), np.asarray(loaded.vectors, np.float32))


def learn_word_vectors(sentences: Sequence[Sequence[str]], size: int, seed: int) -> WordVectors:
    """Learn vectors of `size` numbers from a small corpus; the same seed gives the same vectors."""
    corpus = [list(sentence) for sentence in sentences]
    # A wide window: what a word means shows in the whole text, what it is only in its neighbours.
    settings = {"vector_size": size, "window": 20, "min_count": 1, "epochs": 20}
    model = _gensim().Word2Vec(corpus, seed=seed, workers=1, **settings)
    return WordVectors(tuple(model.wv.index_to_key), np.asarray(model.wv.vectors, np.float32))


def write_word_vectors(path: Path, words: WordVectors, *, binary: bool = False) -> None:
    """Write a word2vec file."""
    vectors = _gensim().KeyedVectors(words.vectors.shape[1])
    vectors.add_vectors(list(words.words), words.vectors)
    vectors.save_word2vec_format(str(path), binary=binary)


def _gensim() -> Any:
    try:
        from gensim import models  # an extra of its own: nothing else needs it, and it is slow to import
    except ImportError as error:
        raise ConfigError("word vectors need gensim. Install stepcast[word2vec].") from error
    return models
