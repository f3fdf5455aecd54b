"""What layers compute and how their weights begin, by value: what torch and ONNX could both have wrong."""

from typing import Any

import numpy as np
import pytest
import torch
from networks import OUT, layer_specs, network, plain
from numpy.typing import NDArray

from stepcast.manifest import Feature, Output
from training.layers.recurrent import Recurrent
from training.layers.weights import initialise
from training.losses import Loss
from training.metrics import metrics_for
from training.network import Network

Floats = NDArray[np.float64]
IN, UNITS = 50, 200


@pytest.mark.parametrize(
    ("how", "deviation"),
    [
        ("xavier", (2 / 250) ** 0.5),
        ("xavier_uniform", (2 / 250) ** 0.5),
        ("relu", (2 / 50) ** 0.5),
        ("relu_uniform", (2 / 50) ** 0.5),
        ("lecun_normal", (1 / 50) ** 0.5),
        ("lecun_uniform", (1 / 50) ** 0.5),
        ("normal", (1 / 50) ** 0.5),
        ("uniform", (1 / 50) ** 0.5 / 3**0.5),
        ("zero", 0.0),
        ("ones", 0.0),
    ],
)
def test_weights_begin_with_the_deviation_their_name_promises(how: Any, deviation: float) -> None:
    """10,000 numbers around 0; the uniform ones inside sqrt(3) deviations, the normal ones beyond."""
    torch.manual_seed(0)
    weight = torch.full((UNITS, IN), torch.nan)
    initialise(weight, how, IN, UNITS)
    assert float(weight.std()) == pytest.approx(deviation, rel=0.03)
    assert float(weight.mean()) == pytest.approx(float(how == "ones"), abs=0.005)
    if deviation:
        uniform = "uniform" in how
        assert (float(weight.abs().max()) <= deviation * 3**0.5 * 1.0001) == uniform


def test_orthogonal_and_identity_weights() -> None:
    """R^T R is 1 for both."""
    for how in ("orthogonal", "identity"):
        weight = torch.full((8, 8), torch.nan)
        initialise(weight, how, 8, 8)  # type: ignore[arg-type]
        torch.testing.assert_close(weight.T @ weight, torch.eye(8), rtol=0, atol=1e-6)
    assert torch.equal(weight, torch.eye(8))


def test_gates_begin_apart() -> None:
    """Each gate's recurrent block is orthogonal by itself; input blocks have the fans of one gate."""
    torch.manual_seed(0)
    layer = network([{"kind": "lstm", "units": UNITS}, OUT], plain(IN), outputs=1, spread=0.0).layers[0]
    assert isinstance(layer, Recurrent)
    for block in layer.weight_hh.detach().chunk(4):
        torch.testing.assert_close(block.T @ block, torch.eye(UNITS), rtol=0, atol=1e-4)
    assert float(layer.weight_ih.detach().std()) == pytest.approx((2 / (IN + UNITS)) ** 0.5, rel=0.03)
    assert not layer.bias_hh.any()


def sigmoid(v: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-v)))


def normed(v: Floats, gain: Floats) -> Floats:
    """Over all gates together, in each row; 1e-5 under the root."""
    return np.asarray((v - v.mean()) / np.sqrt(v.var() + 1e-5) * gain)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("cell", ["simple_rnn", "lstm", "gru"])
def test_cell_is_the_formula_of_the_page(cell: str, layer_norm: bool) -> None:
    """Written out in NumPy: gates in torch's order, layer norm of input and state apart, before the bias."""
    layer = network([{"kind": cell, "units": 2, "layer_norm": layer_norm}, OUT], plain(1)).layers[0]
    assert isinstance(layer, Recurrent)
    w, r, b, b2 = (
        p.detach().double().numpy() for p in (layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh)
    )
    gains = np.ones((2, len(b))) if layer.gains is None else layer.gains.detach().double().numpy()
    x, h, c = 0.003 * np.linspace(-2, 2, 5), np.array([0.3, -0.4]), np.array([0.5, 0.1])
    state = {key: torch.tensor(v[None]).float() for key, v in (("h", h), ("c", c)) if key in layer.KEYS}
    y, _ = layer(torch.tensor(x).float().view(1, 5, 1), None, state)
    for t in range(5):
        inner, outer = w[:, 0] * x[t], r @ h
        if layer_norm:
            inner, outer = normed(inner, gains[0]), normed(outer, gains[1])
        inner, outer = inner + b, outer + b2
        if cell == "simple_rnn":
            h = np.tanh(inner + outer)
        elif cell == "lstm":
            i, f, g, o = np.split(inner + outer, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            (ir, iz, inn), (hr, hz, hn) = np.split(inner, 3), np.split(outer, 3)
            z = sigmoid(iz + hz)
            h = (1 - z) * np.tanh(inn + sigmoid(ir + hr) * hn) + z * h
        np.testing.assert_allclose(y[0, t].detach().numpy(), h, rtol=1e-4)


def test_dropout_takes_the_share_it_is_asked_for() -> None:
    """A fifth of the values, the others made larger by a quarter."""
    layer = network([{"kind": "dropout", "p": 0.2}, OUT], plain(1), outputs=1).layers[0]
    layer.train()
    y, _ = layer(torch.ones(1, 10000, 1), None, {})
    assert sorted(set(y.flatten().tolist())) == [0.0, 1.25]
    assert float((y == 0).float().mean()) == pytest.approx(0.2, abs=0.02)


def test_layer_norm_is_its_formula_at_every_step() -> None:
    """1, 2 and 6 have mean 3 and variance 14/3; gain and bias begin as 1 and 0."""
    layer = network([{"kind": "layer_norm"}, OUT], plain(3), spread=0.0).layers[0]
    wanted = (np.array([1.0, 2.0, 6.0]) - 3) / np.sqrt(14 / 3 + 1e-5)
    y, _ = layer(torch.tensor([[[1.0, 2.0, 6.0], [7.0, 7.0, 7.0]]]), None, {})
    np.testing.assert_allclose(y[0].detach().numpy(), [wanted, [0, 0, 0]], rtol=1e-5)
    layer.norm.weight.data.fill_(2.0)
    layer.norm.bias.data.fill_(0.5)
    np.testing.assert_allclose(
        layer(torch.tensor([[[1.0, 2.0, 6.0]]]), None, {})[0][0, 0].detach(), 2 * wanted + 0.5, rtol=1e-5
    )


def test_pooling_is_its_formula_from_step_to_step() -> None:
    """Of 3, -4 and 0, so far; the state goes on in a second call."""
    expected = {
        "max": [3, 3, 3, 3],
        "avg": [3, -0.5, -1 / 3, 0.5],
        "sum": [3, -1, -1, 2],
        "pnorm": [3, 5, 5, 34**0.5],
    }
    for pooling, values in expected.items():
        layer = network([{"kind": "global_pooling", "pooling": pooling}, OUT], plain(1), outputs=1).layers[0]
        state = {key: torch.zeros(1, *shape) for key, shape in layer.state_shapes().items()}
        first, state = layer(torch.tensor([[[3.0], [-4.0], [0.0]]]), None, state)
        second, _ = layer(torch.tensor([[[3.0]]]), None, state)
        assert [*first.flatten().tolist(), second.item()] == pytest.approx(values)


def test_mean_of_a_window_leaves_padding_out() -> None:
    """Frames of ones stay ones at their borders; a mean over the padding would be a quarter in the corner."""
    pool = {"kind": "pool2d", "pooling": "avg", "kernel": [2, 2], "stride": [2, 2], "padding": [1, 1]}
    frames = {"kind": "rnn_to_cnn", "height": 2, "width": 2}
    pixels = [Feature(name="pixels", width=4)]
    layers = network([frames, pool, OUT], pixels, outputs=1).layers
    assert layers[1](layers[0](torch.ones(1, 1, 4), None, {})[0], None, {})[0].flatten().tolist() == [1.0] * 4


def test_cross_entropy_survives_probabilities_of_zero_and_one() -> None:
    """A hard sigmoid gives them exactly: loss and gradient stay finite, clipped at 1e-5."""
    z = torch.tensor([[[-9.0, 9.0]]], requires_grad=True)
    total, _ = Loss("xent", "hardsigmoid")(z, torch.tensor([[[1.0, 0.0]]]), None)
    assert float(total.detach()) == pytest.approx(-2 * np.log(1e-5), rel=1e-2)
    (gradient,) = torch.autograd.grad(total, z)
    assert torch.isfinite(gradient).all()


def test_biases_begin_where_they_are_set_and_answers_are_in_the_outputs_unit() -> None:
    """Dense: 0.5; head: 0. With zero weights the answer is the mean; otherwise mean + scale * value."""
    dense = {"kind": "dense", "units": 2, "bias": 0.5, "activation": "identity", "weight_init": "zero"}
    head = {**OUT, "weight_init": "ones"}
    for kind, answer in (({**head, "weight_init": "zero"}, 3.0), (head, 3.0 + 4.0 * (0.5 + 0.5))):
        net = Network(layer_specs([dense, kind]), plain(1), [Output(name="y", mean=3.0, scale=4.0)], False)
        with torch.no_grad():
            assert net(torch.ones(1, 1, 1))[0].item() == answer


def test_other_names_of_a_loss_are_that_loss() -> None:
    """DL4J has three for the cross entropy of classes and two for the squared error."""
    z, target = torch.tensor([[[0.3, -1.0, 2.0]]]), torch.tensor([[[0.0, 1.0, 0.0]]])
    for name, others in {"mcxent": ("negativeloglikelihood", "sparse_mcxent"), "mse": ("squared_loss",)}.items():
        for activation in ("softmax", "sigmoid"):
            wanted, count = Loss(name, activation)(z, target, None)
            for other in others:
                got = Loss(other, activation)(z, target, None)
                assert (float(got[0]), int(got[1])) == (float(wanted), int(count))


def test_metrics_follow_the_task() -> None:
    """Ranks for classes, errors for numbers."""
    outputs = (Output(name="a"), Output(name="b"))
    assert metrics_for(outputs, ("a", "b")).result().as_dict()["task"] == "classification"
    assert metrics_for(outputs, None).result().as_dict()["task"] == "regression"
