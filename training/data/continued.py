"""What a decoder reads: the rest of sequences, begun with the state in which an encoder ends their first steps."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Feedback, Output, Task, read_manifest

from ..stepper import Stepper
from .batch import Batch
from .source import Source, SourceConfig, Split


class Continued:
    """A `Source` for the decoder of an encoder-decoder: `class: training.data.continued:Continued`.

    The encoder is a finished model. It reads the first `context` steps of every sequence; its state becomes the
    decoder's beginning, and the decoder is trained on the steps behind them. The encoder does not learn.

    Args:
        encoder: Directory of the model, relative to the recipe.
        data: A `data:` block of the same features as the encoder's.
        context: Steps that the encoder reads. Every sequence has more.
        layers: Which layer of the decoder begins with the state of which layer of the encoder.
        batch, seed, root: See `SourceConfig.open`.
    """

    def __init__(
        self,
        encoder: str,
        data: Mapping[str, Any],
        context: int,
        layers: Mapping[str, str],
        *,
        batch: int,
        seed: int,
        root: Path,
    ) -> None:
        from ..config import DataConfig  # which names this module's siblings

        manifest = read_manifest((root / encoder).resolve())
        try:
            config: SourceConfig = TypeAdapter(DataConfig).validate_python(dict(data))
        except ValidationError as error:
            raise ConfigError(f"data.options.data: {error.errors()[0]['msg']}") from error
        self._source: Source = config.open(batch=batch, seed=seed, root=root)
        self._stepper, self._states = Stepper.of(root / encoder, manifest), manifest.layers
        self._context, self._layers = context, dict(layers)
        takes, gives = ([f.name for f in some] for some in (manifest.features, self._source.features))
        if takes != gives:
            raise ConfigError(f"data.options.encoder: it takes {', '.join(takes)}, the data gives {', '.join(gives)}")
        if absent := sorted(set(self._layers.values()) - manifest.layers.keys()):
            known = ", ".join(manifest.layers)
            raise ConfigError(f"data.options.layers: the encoder has no state of {absent[0]!r}, only of {known}")

    @property
    def features(self) -> tuple[Feature, ...]:
        return self._source.features

    @property
    def outputs(self) -> tuple[Output, ...]:
        return self._source.outputs

    @property
    def task(self) -> Task:
        return self._source.task

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self._source.classes

    @property
    def readout(self) -> Any:
        return self._source.readout

    @property
    def feedback(self) -> tuple[Feedback, ...]:
        return self._source.feedback

    @property
    def description(self) -> str:
        return f"{self._source.description}; continued behind {self._context} steps"

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        """See `Source.batches`."""
        for batch in self._source.batches(split, epoch):
            if batch.starts is not None and not batch.starts.all():
                raise ConfigError("data.options.data: gives lanes of long series, an encoder reads whole sequences")
            if batch.x.shape[1] <= self._context:
                raise ConfigError(f"data.options.context: {self._context}, a sequence has {batch.x.shape[1]} steps")
            masks = (None if m is None else m[:, self._context :] for m in (batch.x_mask, batch.y_mask))
            x, y = batch.x[:, self._context :], batch.y[:, self._context :]
            yield Batch(x, y, *masks, begin=self._begin(batch))

    def _begin(self, batch: Batch) -> dict[str, dict[str, torch.Tensor]]:
        """The states behind the context: its present steps moved to the front, as the service moves them."""
        x = batch.x[:, : self._context].numpy()
        lengths = np.full(len(x), self._context, np.int32)
        if batch.x_mask is not None:
            there = batch.x_mask[:, : self._context].numpy()
            order = np.argsort(~there, axis=1, kind="stable")
            x, lengths = np.take_along_axis(x, order[..., None], axis=1), there.sum(axis=1).astype(np.int32)
        _, states = self._stepper.run(np.ascontiguousarray(x), lengths, self._stepper.initial_states(len(x)))
        return {
            ours: {key: torch.from_numpy(states[f"{theirs}.{key}"]) for key in self._states[theirs]}
            for ours, theirs in self._layers.items()
        }
