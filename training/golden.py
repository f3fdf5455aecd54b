"""golden.npz: recorded inputs, lengths, states and answers, made by torch from real data."""

import numpy as np
import torch
from torch import Tensor

from stepcast.errors import ConfigError

from .data.source import SPLITS, Source
from .layers.base import State
from .masks import valid_steps
from .network import Network
from .stepper import Floats

ROWS, STEPS = 6, 12


@torch.no_grad()
def make_golden(network: Network, source: Source) -> dict[str, Floats]:
    """Arrays x, lengths, y, state_in.<layer>.<key>, state_out.<layer>.<key>.

    Six rows of different lengths, one of them empty. The first three go on from states that earlier readings left,
    the others begin. Readings are missing wherever the features allow it. The network is on the CPU and in eval mode.
    """
    x = _with_gaps(_readings(source), source)  # (ROWS, 2 * STEPS, F)
    steps = x.shape[1] // 2
    lengths = torch.tensor([steps, max(1, steps - 1), 0, steps, max(1, steps // 2), 1])
    state = network.initial_state(ROWS)
    begun = torch.tensor([steps] * 3 + [0] * 3)
    if network.streaming:
        _, state = network(x[:, :steps], valid_steps(begun, steps), state)
    x = torch.where(valid_steps(lengths, steps)[..., None], x[:, steps:], 0.0)
    y, after = network(x, valid_steps(lengths, steps), state)
    arrays = {"x": x.numpy(), "lengths": lengths.to(torch.int32).numpy(), "y": y.numpy()}
    return {**arrays, **_named("state_in", state, network), **_named("state_out", after, network)}


def _named(prefix: str, state: State, network: Network) -> dict[str, Floats]:
    names = [(layer, key) for layer, shapes in network.states().items() for key in shapes]
    return {f"{prefix}.{layer}.{key}": state[layer][key].numpy() for layer, key in names}


def _readings(source: Source) -> Tensor:
    """Real readings, (ROWS, even number of steps, F), from the first split that has any."""
    for split in reversed(SPLITS):
        for batch in source.batches(split):
            steps = max(2, min(2 * STEPS, batch.x.shape[1] - batch.x.shape[1] % 2))
            x = batch.x[:, :steps] if batch.x.shape[1] >= 2 else batch.x.repeat(1, 2, 1)
            return x[torch.arange(ROWS) % x.shape[0]].clone()
    raise ConfigError("data: no split has any sequence")


def _with_gaps(x: Tensor, source: Source) -> Tensor:
    """NaN at every seventh reading of the features that may be missing; what may not be missing is made 0."""
    may_miss = np.repeat([f.missing != "refuse" for f in source.features], [f.width for f in source.features])
    allowed = torch.from_numpy(may_miss)
    scattered = (torch.arange(x.numel()).view(x.shape) % 7 == 3) & allowed
    return torch.where(scattered, torch.nan, torch.where(torch.isnan(x) & ~allowed, 0.0, x))
