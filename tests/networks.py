"""Small networks and sequences for the tests of training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from stepcast.manifest import Change, Feature, Output
from training.config import TrainingConfig
from training.data.batch import Batch
from training.data.in_memory import Examples, InMemory
from training.data.source import Split
from training.layers.base import State
from training.layers.specs import LayerSpec
from training.masks import valid_steps
from training.network import Network

torch.set_num_threads(1)  # the networks here are tiny, and tests run side by side

OUT: dict[str, Any] = {"kind": "rnn_output"}
CELLS = ("simple_rnn", "lstm", "graves_lstm", "gru", "slstm")
LINEAR = ("min_gru", "rg_lru")  # recurrences without recurrent weights
LENGTHS = (7, 6, 0, 3, 1, 7)  # of six rows of seven steps
_SPECS: TypeAdapter[list[LayerSpec]] = TypeAdapter(list[LayerSpec])


def plain(count: int = 4) -> list[Feature]:
    """Features without units, none of which may be missing."""
    return [Feature(name=f"f{i}") for i in range(count)]


def rich(count: int = 4) -> list[Feature]:
    """Features with units, every policy for missing readings, and one indicator."""
    policies = ("hold", "mean", "zero", "hold")
    return [
        Feature(name=f"f{i}", mean=0.3 * i, scale=1.0 + i, missing=policies[i % 4], indicator=i == 1)
        for i in range(count)
    ]


def trending(features: Sequence[Feature]) -> list[Feature]:
    """The same with changes over one, two or three steps, but of the third."""
    changes = [((1, 0.5), (3, 2.0)), ((2, 1.5),), (), ((1, 1.0),)]
    return [
        f.model_copy(update={"changes": tuple(Change(steps=k, scale=s) for k, s in changes[i % 4])})
        for i, f in enumerate(features)
    ]


def layer_specs(layers: Sequence[dict[str, Any]]) -> list[LayerSpec]:
    """The `network:` list of a configuration, checked."""
    return _SPECS.validate_python(list(layers))


def network(
    layers: Sequence[dict[str, Any]],
    features: Sequence[Feature] | None = None,
    *,
    outputs: int = 3,
    classification: bool = False,
    seed: int = 1,
    spread: float = 0.2,
) -> Network:
    """A network whose every weight, biases included, is not what it was initialised to."""
    torch.manual_seed(seed)
    made = Network(
        layer_specs(layers),
        plain() if features is None else features,
        [Output(name=f"y{i}") for i in range(outputs)],
        classification,
    )
    with torch.no_grad():
        for weight in made.parameters():
            weight += spread * torch.randn_like(weight)
    return made.eval()


def readings(features: Sequence[Feature], rows: int = 6, steps: int = 7, seed: int = 2) -> Tensor:
    """(B, T, F): random numbers, NaN at a fifth of the places where the feature allows it."""
    random = torch.Generator().manual_seed(seed)
    widths = [f.width for f in features]
    x = torch.randn(rows, steps, sum(widths), generator=random)
    may_miss = torch.tensor(np.repeat([f.missing != "refuse" for f in features], widths))
    return torch.where((torch.rand(x.shape, generator=random) < 0.2) & may_miss, torch.nan, x)


def some_state(net: Network, x: Tensor) -> State:
    """A state that readings left behind, so that every tensor of it is a legal one; zeros in every second row."""
    with torch.no_grad():
        begun = torch.tensor([x.shape[1] if row % 2 else 0 for row in range(x.shape[0])])
        return net(x.flip(1), valid_steps(begun, x.shape[1]), net.initial_state(x.shape[0]))[1]


def mask_of(lengths: Sequence[int] = LENGTHS, steps: int = 7) -> Tensor:
    """Right padding as a mask (B, T)."""
    return valid_steps(torch.tensor(lengths), steps)


def same(a: State, b: State, **tolerance: float) -> None:
    """Assert that two states are equal; bit for bit without a tolerance."""
    assert {n: set(s) for n, s in a.items()} == {n: set(s) for n, s in b.items()}
    for name, layer in a.items():
        for key, tensor in layer.items():
            torch.testing.assert_close(tensor, b[name][key], **(tolerance or {"rtol": 0, "atol": 0}))


def echo_source(
    *, sequences: int = 12, steps: int = 10, batch: int = 4, labelled: Sequence[int] | None = None, seed: int = 0
) -> InMemory:
    """A regression that can be learned: y_t = x_t + x_{t-1}; labels only at the steps `labelled`, None for all."""
    random = np.random.default_rng(5)
    x = [random.normal(size=(steps, 1)).astype(np.float32) for _ in range(sequences)]
    y = [v + np.vstack([np.zeros((1, 1), np.float32), v[:-1]]) for v in x]
    if labelled is not None:
        hidden = [t for t in range(steps) if t not in labelled]
        for values in y:
            values[hidden] = np.nan
    third = Examples(x[: sequences // 3], y[: sequences // 3])
    return InMemory(
        splits={"train": Examples(x, y), "validation": third, "test": third},
        features=(Feature(name="x"),),
        outputs=(Output(name="y"),),
        task="regression",
        batch=batch,
        seed=seed,
        alignment="start",
        description="echo",
    )


@dataclass(frozen=True)
class Spoiled:
    """A source with other values wherever its masks say that nothing is there."""

    source: InMemory
    value: float

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        """See `Source.batches`."""
        for batch in self.source.batches(split, epoch):
            x, y = (
                values if mask is None else torch.where(mask.view(*mask.shape[:2], -1), values, self.value)
                for values, mask in ((batch.x, batch.x_mask), (batch.y, batch.y_mask))
            )
            yield replace(batch, x=x, y=y)


def training(**values: Any) -> TrainingConfig:
    """A training configuration for small networks."""
    return TrainingConfig.model_validate({"learning_rate": 0.01, "epochs": 3, **values})
