"""One long text, character by character: the next one is the label."""

import pydoc_data.topics
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Feedback, Output

from .batch import Batch
from .plan import epoch_order
from .source import SPLITS, Split

UNKNOWN = "\ufffd"  # stands for every character that is not in the alphabet


class Characters:
    """A `Source` of lanes: the text is cut into `batch` long pieces that are read side by side, `steps` at a time.

    The state goes on from window to window, so nothing of the text before is lost, and it is the whole text that is
    learned from. A character goes in as its index (feature `character`, for an embedding) or as one-hot; what comes
    out has one class per character, which a rollout feeds back.

    Args:
        batch: Lanes.
        seed: Shuffles where the windows of an epoch begin.
        root: What `path` is relative to.
        path: A UTF-8 text file; None takes what Python's `help()` has to say about the language itself.
        steps: Characters per window.
        alphabet: Most classes, the unknown one included: the most frequent characters of the training part. An
            embedding needs a vocabulary of this size.
        held_out: Share of the text, at its end, for validation, and as much again for test.
        encoding: How a character goes in.

    Raises:
        ConfigError: the file cannot be read, or is too short to be cut.
    """

    task: Literal["regression", "classification"] = "classification"
    readout: Literal["each", "last"] = "each"

    def __init__(
        self,
        *,
        batch: int,
        seed: int,
        root: Path,
        path: str | None = None,
        steps: int = 64,
        alphabet: int = 128,
        held_out: float = 0.05,
        encoding: Literal["index", "one_hot"] = "index",
    ) -> None:
        text = _read(None if path is None else root / path)
        self._batch, self._seed, self._steps, self._encoding = batch, seed, steps, encoding
        ends = [0, round(len(text) * (1 - 2 * held_out)), round(len(text) * (1 - held_out)), len(text)]
        parts = [text[start:end] for start, end in pairwise(ends)]
        self.classes = (*sorted(char for char, _ in Counter(parts[0]).most_common(alphabet - 1)), UNKNOWN)
        self._texts = {split: self._indices(part) for split, part in zip(SPLITS, parts, strict=True)}
        if len(parts[0]) < batch * (steps + 1) or min(map(len, parts)) < 2:
            raise ConfigError(f"data.options: {len(text)} characters are too few for {batch} lanes of {steps} steps")
        width = 1 if encoding == "index" else len(self.classes)
        self.features = (Feature(name="character", width=width),)
        self.outputs = tuple(Output(name=character) for character in self.classes)
        self.feedback = (Feedback(source="class", feature="character"),)
        self.description = f"{path or 'pydoc_data.topics'}: {len(text)} characters, {len(self.classes)} classes"

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        """See `Source.batches`. The split's last few characters, fewer than there are lanes, are left out."""
        text = self._texts[split]
        if split == "train":  # windows begin elsewhere each time, so that no cut is always at the same place
            text = text[epoch_order(self._seed, epoch).integers(self._steps) :]
        lanes = min(self._batch, (len(text) - 1) // 2)
        length = (len(text) - 1) // lanes
        x = text[: lanes * length].reshape(lanes, length)
        y = text[1 : lanes * length + 1].reshape(lanes, length)
        for start in range(0, length, self._steps):
            window = slice(start, start + self._steps)
            starts = torch.full((lanes,), start == 0)
            yield Batch(self._encoded(x[:, window]), self._one_hot(y[:, window]), starts=starts)

    def _indices(self, text: str) -> NDArray[np.int64]:
        places = {character: index for index, character in enumerate(self.classes)}
        unknown = places[UNKNOWN]
        return np.array([places.get(character, unknown) for character in text], np.int64)

    def _encoded(self, window: NDArray[np.int64]) -> Tensor:
        if self._encoding == "one_hot":
            return self._one_hot(window)
        return torch.from_numpy(window).float()[..., None]  # (B, T, 1)

    def _one_hot(self, window: NDArray[np.int64]) -> Tensor:
        return torch.nn.functional.one_hot(torch.from_numpy(window), len(self.classes)).float()  # (B, T, O)


def _read(path: Path | None) -> str:
    if path is None:
        topics: dict[str, str] = pydoc_data.topics.topics
        return "\n\n".join(topics[key] for key in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from error
