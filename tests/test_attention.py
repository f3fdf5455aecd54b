"""Attention over the last steps: the formula in NumPy, what it may look at, and the state that it leaves."""

import numpy as np
import torch
from networks import OUT, network, plain
from torch import Tensor

from training.layers.attention import Attention
from training.layers.specs import AttentionSpec

SPEC = {"kind": "attention", "units": 4, "window": 3, "heads": 2}
X = np.linspace(-1.0, 1.5, 12).reshape(6, 2)  # (T, F)


def layer_of(spread: float = 0.5) -> Attention:
    """The layer alone, for two features."""
    layer = network([SPEC, OUT], plain(2), seed=4, spread=spread).layers[0]
    assert isinstance(layer, Attention)
    return layer


def fresh(layer: Attention, rows: int = 1) -> dict[str, Tensor]:
    return {key: torch.zeros(rows, *shape) for key, shape in layer.state_shapes().items()}


def test_attention_is_the_papers_equations() -> None:
    """Each step by hand: two heads, the step itself and two before it, a score added by how far a key lies back."""
    layer = layer_of()
    w, b, wo, bo, bias = (
        p.detach().double().numpy()
        for p in (layer.project.weight, layer.project.bias, layer.combine.weight, layer.combine.bias, layer.bias)
    )
    y, after = layer(torch.tensor(X[None]).float(), None, fresh(layer))
    q, k, v = np.split(X @ w.T + b, 3, axis=1)
    for t in range(6):
        past = np.arange(max(0, t - 2), t + 1)
        seen = []
        for head, at in enumerate((slice(0, 2), slice(2, 4))):
            scores = k[past, at] @ q[t, at] / np.sqrt(2) + bias[head, t - past]
            weights = np.exp(scores) / np.exp(scores).sum()
            seen.append(weights @ v[past, at])
        np.testing.assert_allclose(y[0, t].detach().numpy(), wo @ np.concatenate(seen) + bo, rtol=1e-4)
    np.testing.assert_allclose(after["keys"][0].detach().numpy(), k[4:], rtol=1e-4)
    np.testing.assert_allclose(after["values"][0].detach().numpy(), v[4:], rtol=1e-4)
    assert after["valid"].tolist() == [[1.0, 1.0]]


def test_steps_that_never_were_are_not_looked_at() -> None:
    """After one step one place is valid, and what the other holds changes nothing."""
    layer, x = layer_of(), torch.tensor(X[None]).float()
    _, state = layer(x[:, :1], None, fresh(layer))
    assert state["valid"].tolist() == [[0.0, 1.0]]
    spoiled = {key: value.clone() for key, value in state.items()}
    spoiled["keys"][:, 0] = spoiled["values"][:, 0] = 1e3
    for one, other in zip(layer(x[:, 1:2], None, state), layer(x[:, 1:2], None, spoiled), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)


def test_rows_keep_their_own_last_steps() -> None:
    """Of 1, 0 and 6 steps: the window ends at each row's last valid step, and an empty row's is what it was."""
    layer, x = layer_of(), torch.tensor(X[None]).float().repeat(3, 1, 1)
    begun = {key: torch.rand_like(value) for key, value in fresh(layer, 3).items()}
    _, after = layer(x, torch.tensor([1, 0, 6]), begun)
    keys = layer.project(x[0])[:, 4:8]
    torch.testing.assert_close(after["keys"][0], torch.stack([begun["keys"][0, 1], keys[0]]))
    assert all(torch.equal(after[key][1], begun[key][1]) for key in begun)
    torch.testing.assert_close(after["keys"][2], keys[4:])


def test_later_steps_teach_earlier_ones_through_keys_and_values() -> None:
    """torch's own check in float64, states included; the first of six steps is out of the last one's reach."""
    layer = layer_of().double()
    x = torch.tensor(X[None]).requires_grad_()
    states = [torch.rand(1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    valid = torch.ones(1, 2, dtype=torch.float64)

    def answer(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return layer(x, None, {"keys": keys, "values": values, "valid": valid})[0]

    assert torch.autograd.gradcheck(answer, (x, *states))
    (gradient,) = torch.autograd.grad(answer(x, *states)[0, 5].sum(), x)
    assert gradient[0].any(dim=1).tolist() == [False, False, False, True, True, True]


def test_biases_begin_at_zero_and_blocks_as_they_are_told() -> None:
    """So that in the beginning only the content decides."""
    torch.manual_seed(0)
    layer = Attention("a", AttentionSpec(kind="attention", units=200, window=5, weight_init="normal"), 50)
    for block in layer.project.weight.detach().chunk(3):
        assert abs(float(block.std()) - 50**-0.5) < 0.005
    assert not any(b.any() for b in (layer.bias, layer.project.bias, layer.combine.bias))
