"""slstm, min_gru and rg_lru: the papers' equations in NumPy, gradients, beginnings, and numbers that stay finite."""

from typing import Any

import numpy as np
import pytest
import torch
from networks import LINEAR, OUT, network, plain
from numpy.typing import NDArray
from torch import Tensor

from training.layers.cells import Slstm
from training.layers.linear_recurrence import LinearScan, MinGru, RgLru

Floats = NDArray[np.float64]
X = np.linspace(-2.0, 2.0, 10).reshape(5, 2)  # (T, F)
NEW = ("slstm", *LINEAR)


def sigmoid(v: Any) -> Any:
    return 1 / (1 + np.exp(-v))


def numbers(*weights: Tensor) -> list[Floats]:
    return [weight.detach().double().numpy() for weight in weights]


def layer_of(kind: str, units: int = 3, **more: Any) -> Any:
    """The layer alone, for two features, with weights that are nowhere 0."""
    return network([{"kind": kind, "units": units, **more}, OUT], plain(2), seed=4).layers[0]


def run(layer: Any, **state: Floats) -> tuple[Floats, dict[str, Floats]]:
    """Outputs (T, H) and final states of one row that goes on from a state."""
    before = {key: torch.tensor(value[None]).float() for key, value in state.items()}
    y, after = layer(torch.tensor(X[None]).float(), None, before)
    return y[0].detach().numpy(), {key: value[0].detach().numpy() for key, value in after.items()}


def test_slstm_is_the_papers_equations() -> None:
    """Beck et al. 2024: without the stabiliser, which changes no h; the states are those times exp(-m)."""
    layer = layer_of("slstm")
    assert isinstance(layer, Slstm)
    w, r, b, b2 = numbers(layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh)
    h, c, n, m = (
        np.array([0.1, -0.2, 0.3]),
        np.array([0.5, 0.4, -0.9]),
        np.array([1.5, 2.0, 1.0]),
        np.array([0.2, 0, -1]),
    )
    y, after = run(layer, h=h, c=c, n=n, m=m)
    c, n = c * np.exp(m), n * np.exp(m)
    for t, x in enumerate(X):
        i, f, z, o = np.split(w @ x + r @ h + b + b2, 4)
        c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
        n = sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        np.testing.assert_allclose(y[t], h, rtol=1e-5)
    np.testing.assert_allclose(after["c"] * np.exp(after["m"]), c, rtol=1e-5)
    np.testing.assert_allclose(after["n"] * np.exp(after["m"]), n, rtol=1e-5)


def test_slstm_stabiliser_is_the_larger_of_what_stays_and_what_comes() -> None:
    """Equation 15, over steps of literal gates: m = max(log s(f) + m, i); the first step of a sequence takes i."""
    layer = layer_of("slstm", units=1)
    gates = torch.tensor([[-3.0, 0.0, 1.0, 0.0], [-9.0, 4.0, 1.0, 0.0], [2.0, -50.0, -1.0, 0.0]])  # i, f, z, o
    for weight in layer.parameters():
        weight.data.zero_()
    state, found = tuple(torch.zeros(1, 1) for _ in range(4)), []
    for gate in gates:
        state = layer.step(gate[None], state)
        found.append(state[3].item())
    assert found == pytest.approx([-3.0, -3.0 - np.log1p(np.exp(-4.0)), 2.0])
    assert state[2].item() == pytest.approx(1.0)  # a new maximum makes all before it vanish
    assert state[0].item() == pytest.approx(0.5 * np.tanh(-1.0))


def test_slstm_stays_finite_whatever_its_gates_say() -> None:
    """Exponential gates of 500 and -500 from the first step on: answers, states and gradients."""
    layer = layer_of("slstm")
    for scale in (500.0, -500.0):
        x = (scale * torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(1))).requires_grad_()
        y, after = layer(x, None, {key: torch.zeros(2, 3) for key in "hcnm"})
        assert y.abs().max() <= 1.0
        assert all(torch.isfinite(tensor).all() for tensor in after.values())
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), [x, *layer.kernel.parameters()][:4]))


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_min_gru_is_the_papers_equations(activation: str) -> None:
    """Feng et al. 2024: neither gate nor candidate sees the state."""
    layer = layer_of("min_gru", activation=activation)
    assert isinstance(layer, MinGru)
    w, b = numbers(layer.linear.weight, layer.linear.bias)
    h = np.array([0.3, -0.4, 0.9])
    y, after = run(layer, h=h)
    for t, x in enumerate(X):
        gate, candidate = np.split(w @ x + b, 2)
        z, candidate = sigmoid(gate), np.tanh(candidate) if activation == "tanh" else candidate
        h = (1 - z) * h + z * candidate
        np.testing.assert_allclose(y[t], h, rtol=1e-5)
    np.testing.assert_allclose(after["h"], h, rtol=1e-5)


def test_rg_lru_is_the_papers_equations() -> None:
    """De et al. 2024, behind a linear layer: a = s(L)^(8 r)."""
    layer = layer_of("rg_lru")
    assert isinstance(layer, RgLru)
    w, b, v, d, memory = numbers(
        layer.linear.weight, layer.linear.bias, layer.gates.weight, layer.gates.bias, layer.memory
    )
    h = np.array([0.3, -0.4, 0.9])
    y, _ = run(layer, h=h)
    for t, x in enumerate(X):
        u = w @ x + b
        r, i = np.split(sigmoid(v @ u + d), 2)
        a = sigmoid(memory) ** (8.0 * r)
        h = a * h + np.sqrt(1 - a**2) * (i * u)
        np.testing.assert_allclose(y[t], h, rtol=1e-5)


def test_rg_lru_begins_with_long_memories() -> None:
    """s(L)^8 is spread from 0.9 to 0.999; gates begin in the middle."""
    torch.manual_seed(0)
    layer = network([{"kind": "rg_lru", "units": 400}, OUT], plain(2), spread=0.0).layers[0]
    assert isinstance(layer, RgLru)
    memory = torch.sigmoid(layer.memory.detach()) ** 8
    assert float(memory.min()) == pytest.approx(0.9, abs=0.002)
    assert float(memory.max()) == pytest.approx(0.999, abs=0.002)
    assert float(memory.mean()) == pytest.approx(0.9495, abs=0.005)
    assert not layer.gates.bias.any()
    assert not layer.linear.bias.any()


def test_rg_lru_of_a_gate_that_is_shut_keeps_its_state_and_its_slope() -> None:
    """a of 1 to the last bit: the root of 1 - a^2 has no slope there, the gradient stays finite."""
    layer = layer_of("rg_lru")
    with torch.no_grad():
        layer.gates.bias[:3] = -200.0
    x = torch.tensor(X[None]).float().requires_grad_()
    h = torch.tensor([[0.3, -0.4, 0.9]])
    y, _ = layer(x, None, {"h": h})
    torch.testing.assert_close(y[:, -1], h, rtol=0, atol=0.05)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), [x, *layer.parameters()]))


def test_scan_gradients_equal_finite_differences() -> None:
    """In float64, of decay, drive and the first state; of one step too."""
    random = torch.Generator().manual_seed(3)
    for steps in (1, 4):
        decay, drive = (torch.rand(2, steps, 3, dtype=torch.float64, generator=random) for _ in range(2))
        h = torch.randn(2, 3, dtype=torch.float64, generator=random)
        inputs = [one.requires_grad_() for one in (decay, drive, h)]
        assert torch.autograd.gradcheck(LinearScan.apply, inputs)


@pytest.mark.parametrize("kind", NEW)
def test_layer_gradients_equal_finite_differences(kind: str) -> None:
    """torch's own check in float64: of the inputs and of every state, over rows of 4, 2 and 0 steps."""
    layer = layer_of(kind).double()
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    begun = {"n": 1.5, "m": 0.2}
    states = [torch.full((3, 3), begun.get(key, 0.3), dtype=torch.float64, requires_grad=True) for key in layer.KEYS]

    def answer(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        y, after = layer(x, torch.tensor([4, 2, 0]), dict(zip(layer.KEYS, states, strict=True)))
        return y, *after.values()

    assert torch.autograd.gradcheck(answer, (x, *states))


@pytest.mark.parametrize("kind", NEW)
def test_input_weights_begin_as_they_are_told(kind: str) -> None:
    """weight_init by gate, biases of 0; slstm forgets little at first."""
    torch.manual_seed(0)
    layer = network([{"kind": kind, "units": 200, "weight_init": "normal"}, OUT], plain(50), spread=0.0).layers[0]
    weight = layer.weight_ih if isinstance(layer, Slstm) else layer.linear.weight
    assert isinstance(weight, Tensor)
    for block in weight.detach().split(200):
        assert float(block.std()) == pytest.approx(50**-0.5, rel=0.03)
    if isinstance(layer, Slstm):
        assert layer.bias_ih.tolist() == [0.0] * 200 + [1.0] * 200 + [0.0] * 400
