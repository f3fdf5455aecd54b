"""Short reviews made up from a few words, to tell good ones from bad ones: sentiment with a grammar.

A review has one, three, five or seven clauses such as "the screen is not very sharp". A clause praises or blames by
its adjective, "not", "never" and "hardly" turn that round, and the review is what most of its clauses are. Words
alone do not tell: their order does.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.in_memory import Classified, in_splits
from ..data.tokens import Line, examples, tokens_of, word_feature
from ..data.word_vectors import WordVectors, learn_word_vectors, read_word_vectors, write_word_vectors

GOOD = ("good", "great", "bright", "sharp", "fast", "solid", "lovely", "superb", "quiet", "handy", "light", "smooth")
BAD = ("bad", "awful", "dim", "blurry", "slow", "flimsy", "ugly", "dreadful", "noisy", "clumsy", "heavy", "rough")
THINGS = ("screen", "keyboard", "battery", "camera", "case", "sound", "price", "menu", "hinge", "lens", "charger")
TURNS = ("not", "never", "hardly")
VERBS = ("is", "was", "seems", "feels", "looks")
DEGREES = ("very", "really", "quite", "rather")
LINKS = ("and", "also", "while", "besides")
CLASSES = ("negative", "positive")


class Reviews(Classified):
    """A `Source`, many-to-one, of word vectors.

    Args:
        batch: Reviews per batch.
        seed: Of the reviews, of their order, and of the vectors if they are learned.
        root: What `vectors` is relative to.
        vectors: A word2vec file; None learns vectors from the training reviews. The recipe's was made so:
            `write_vectors(Path("training/recipes/reviews.vec"))`.
        size: Numbers per vector, if they are learned.
        train: Reviews to train on.
        validation: Reviews to validate with.
        test: Reviews to test with.
        bucket: See `plan_batches`.
    """

    def __init__(
        self,
        *,
        batch: int,
        seed: int,
        root: Path,
        vectors: str | None = None,
        size: int = 16,
        train: int = 3000,
        validation: int = 500,
        test: int = 1000,
        bucket: int = 50,
    ) -> None:
        rng = np.random.default_rng([seed, 2013])
        lines = in_splits(
            lambda count: [review(rng) for _ in range(count)], train=train, validation=validation, test=test
        )
        words = _learn(lines["train"], size, seed) if vectors is None else read_word_vectors(root / vectors)
        super().__init__(
            {split: examples(some, words, CLASSES, 64, where=split) for split, some in lines.items()},
            word_feature(words),
            CLASSES,
            batch=batch,
            seed=seed,
            bucket=bucket,
            description=f"{train} made-up reviews with {len(words.words)} word vectors",
        )


def write_vectors(path: Path, *, seed: int = 1, size: int = 16, reviews: int = 3000) -> None:
    """Learn vectors from reviews of their own and write them in word2vec's text format."""
    rng = np.random.default_rng([seed, 2013])
    write_word_vectors(path, _learn([review(rng) for _ in range(reviews)], size, seed))


def _learn(lines: Sequence[Line], size: int, seed: int) -> WordVectors:
    return learn_word_vectors([tokens_of(text) for _, text in lines], size, seed)


def review(rng: np.random.Generator) -> Line:
    """A label and a text with an odd number of clauses, so that there is a majority; moods colour most of them."""
    mood = rng.choice([0.15, 0.85])
    praises = rng.random(2 * int(rng.integers(0, 4)) + 1) < mood
    text = _clause(rng, praises[0])
    for praise in praises[1:]:
        text += f" {rng.choice(LINKS)} {_clause(rng, praise)}"
    return CLASSES[int(praises.mean() > 0.5)], text


def _clause(rng: np.random.Generator, praise: bool) -> str:
    """One statement about one thing."""
    turned = rng.random() < 0.25
    words = ["the", rng.choice(THINGS), rng.choice(VERBS)]
    if turned:
        words.append(rng.choice(TURNS))
    if rng.random() < 0.5:
        words.append(rng.choice(DEGREES))
    words.append(rng.choice(GOOD if praise != turned else BAD))
    return " ".join(words)
