"""What an update of the real trainer does to weights, held against numbers that were found without it.

Two networks small enough to do by hand: a straight line, whose gradient is written down here, and a single tanh unit,
whose gradient is carried forwards along with its state (forward-mode differentiation), so that autograd plays no part.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from networks import OUT, layer_specs, network, plain, training
from numpy.typing import NDArray
from torch import Tensor

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Feedback, Output
from training.config import TrainingConfig
from training.data.batch import Batch
from training.data.source import Split
from training.network import Network
from training.progress import Progress
from training.train import VALIDATION_BLOCK, Trainer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fixed:
    """A source of the same batches in every epoch."""

    train: tuple[Batch, ...]
    validation: tuple[Batch, ...] = ()
    features: tuple[Feature, ...] = (Feature(name="x"),)
    outputs: tuple[Output, ...] = (Output(name="y"),)
    task: Literal["regression"] = "regression"
    classes: None = None
    readout: Literal["each"] = "each"
    feedback: tuple[Feedback, ...] = ()
    description: str = "fixed"

    def batches(self, split: Split, epoch: int = 0) -> Iterator[Batch]:
        """See `Source.batches`."""
        yield from {"train": self.train, "validation": self.validation, "test": ()}[split]


def rows(*values: Sequence[float]) -> Tensor:
    """(B, T, 1)."""
    return torch.tensor(values, dtype=torch.float32)[..., None]


def flags(*values: Sequence[int]) -> Tensor:
    """(B, T) bool."""
    return torch.tensor(values, dtype=torch.bool)


def set_weights(net: Network, values: Sequence[float]) -> None:
    """Fill each tensor that learns with a number."""
    leaves = [p for p in net.parameters() if p.requires_grad]
    with torch.no_grad():
        for leaf, value in zip(leaves, values, strict=True):
            leaf.fill_(value)


def with_weights(layers: Sequence[dict[str, Any]], values: Sequence[float]) -> Network:
    """A network of one feature and one output, each tensor that learns filled with a number."""
    made = network(layers, plain(1), outputs=1, spread=0.0)
    set_weights(made, values)
    return made


def weights(net: Network) -> list[float]:
    return [float(p.detach()) for p in net.parameters() if p.requires_grad]


# --- A straight line: w x + b ------------------------------------------------------------------------------------

START = (2.0, 1.0)
# At w 2, b 1 the errors are 7, 1 and 1: d mse / dw = 2 / 3 (7 + 2 + 3) = 8, d mse / db = 2 / 3 (7 + 1 + 1) = 6.
LINE = Batch(rows([1, 2, 3]), rows([-4, 4, 6]))
SGD: dict[str, Any] = {"optimiser": "sgd", "momentum": 0.0, "learning_rate": 0.1}


def line(
    epochs: int = 1, start: Sequence[float] = START, batches: tuple[Batch, ...] = (LINE,), **config: Any
) -> list[float]:
    """w and b after some epochs of one update each."""
    net = with_weights([OUT], start)
    trainer = Trainer(net, Fixed(batches), training(epochs=epochs, **config))
    for epoch in range(epochs):
        trainer.epoch(epoch, Progress.silent())
    return weights(net)


def near(*values: float) -> Any:
    """Equal to float32's precision."""
    return pytest.approx(list(values), rel=1e-5)


def line_gradient(w: Tensor, b: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the mean squared error."""
    x, y = batch.x.flatten(), batch.y.flatten()
    error = w * x + b - y
    return 2 * (error * x).mean(), 2 * error.mean()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (1.2, 0.4)),
        ({"learning_rate": 0.01}, (1.92, 0.94)),
        ({"average": "examples"}, (2 - 0.1 * 24, 1 - 0.1 * 18)),
        ({"gradient": "clip_global_norm", "gradient_threshold": 5.0}, (1.6, 0.7)),
        ({"gradient": "clip_global_norm", "gradient_threshold": 20.0}, (1.2, 0.4)),
        ({"gradient": "clip_l2_per_layer", "gradient_threshold": 5.0}, (1.6, 0.7)),
        ({"gradient": "clip_l2_per_parameter", "gradient_threshold": 7.0}, (1.3, 0.4)),
        ({"gradient": "clip_elementwise", "gradient_threshold": 7.0}, (1.3, 0.4)),
        ({"gradient": "renormalize_l2_per_layer"}, (1.92, 0.94)),
        ({"gradient": "renormalize_l2_per_parameter"}, (1.9, 0.9)),
        ({"l2": 0.5}, (2 - 0.1 * (8 + 0.5 * 2), 0.4)),
        ({"l1": 0.5}, (2 - 0.1 * (8 + 0.5), 0.4)),
        ({"l1": 0.25, "l2": 0.5}, (2 - 0.1 * (8 + 0.25 + 1), 0.4)),
        # Penalties come after clipping: they are not clipped, and do not count towards the norm.
        ({"gradient": "clip_global_norm", "gradient_threshold": 5.0, "l2": 0.5}, (2 - 0.1 * (4 + 1), 0.7)),
        ({"gradient": "clip_elementwise", "gradient_threshold": 7.0, "l1": 0.5}, (2 - 0.1 * (7 + 0.5), 0.4)),
        ({"gradient": "renormalize_l2_per_layer", "l2": 1.0}, (2 - 0.1 * (0.8 + 2), 0.94)),
        ({"gradient": "renormalize_l2_per_layer", "gradient_threshold": 5.0}, (1.92, 0.94)),  # a limit is not a length
    ],
)
def test_one_update_is_the_formula(config: dict[str, Any], expected: tuple[float, float]) -> None:
    """The gradient of LINE is (8, 6), of length 10; plain SGD takes a tenth of what every setting makes of it."""
    assert line(**{**SGD, **config}) == near(*expected)


def test_negative_numbers_are_treated_as_positive_ones() -> None:
    """Mirrored labels and weights give (-8, -6): l1 adds the sign, clipping cuts on both sides."""
    mirrored = Batch(LINE.x, -LINE.y)
    clip = {"gradient": "clip_elementwise", "gradient_threshold": 7.0}
    assert line(start=(-2.0, -1.0), batches=(mirrored,), **SGD, **clip) == near(-1.3, -0.4)
    assert line(start=(-2.0, -1.0), batches=(mirrored,), **SGD, l1=0.5) == near(-2 + 0.1 * (8 + 0.5), -0.4)


def test_momentum_keeps_nine_tenths_of_the_last_update() -> None:
    """Two epochs by hand: the second gradient, at w 1.2, b 0.4, is (-28 / 15, 1.6)."""
    sgd = {"learning_rate": 0.1, "momentum": 0.9}
    assert line(2, **sgd, optimiser="sgd") == near(1.2 - 0.1 * (7.2 - 28 / 15), 0.4 - 0.1 * (5.4 + 1.6))
    assert line(1, **sgd, optimiser="nesterov") == near(2 - 0.1 * 8 * 1.9, 1 - 0.1 * 6 * 1.9)
    assert line(1, **{**sgd, "momentum": 0.5}, optimiser="nesterov") == near(2 - 0.1 * 8 * 1.5, 1 - 0.1 * 6 * 1.5)


OPTIMISERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "adam": lambda p, rate: torch.optim.Adam(p, rate, betas=(0.9, 0.999), eps=1e-8),
    "rmsprop": lambda p, rate: torch.optim.RMSprop(p, rate, alpha=0.95, eps=1e-8),
    "adagrad": lambda p, rate: torch.optim.Adagrad(p, rate, eps=1e-10),
    "sgd": lambda p, rate: torch.optim.SGD(p, rate, momentum=0.8),
    "nesterov": lambda p, rate: torch.optim.SGD(p, rate, momentum=0.8, nesterov=True),
}


@pytest.mark.parametrize("size", [1.0, 1e-7], ids=["large", "tiny"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_optimiser_is_torchs_on_gradients_by_hand(optimiser: str, schedule: str, size: float) -> None:
    """Four updates with the constants of docs/models.md; a schedule multiplies the rate of each epoch.

    Gradients of 1e-7 are of the size of the epsilons, which the others do not feel.
    """
    rate, start = 0.1 * size, [size * value for value in START]
    batch = Batch(LINE.x, size * LINE.y)
    leaves = [torch.tensor(value) for value in start]
    reference = OPTIMISERS[optimiser](leaves, rate)
    for epoch in range(4):
        factor = 0.01 + 0.99 * (1 + math.cos(math.pi * epoch / 4)) / 2 if schedule == "cosine" else 1.0
        reference.param_groups[0]["lr"] = rate * factor
        for leaf, gradient in zip(leaves, line_gradient(*leaves, batch), strict=True):
            leaf.grad = gradient
        reference.step()
    config = {"optimiser": optimiser, "learning_rate": rate, "momentum": 0.8, "schedule": schedule}
    assert line(4, start, (batch,), **config) == near(*(float(leaf) for leaf in leaves))


@pytest.mark.parametrize(("optimiser", "epsilon"), [("rmsprop", 1e-8), ("adagrad", 1e-6)])
def test_rmsprop_and_adagrad_are_dl4js_for_gradients_that_their_epsilons_do_not_feel(
    optimiser: str, epsilon: float
) -> None:
    """DL4J's squares start at epsilon, ours at 0: equal updates at gradients (8, 6), others at a millionth of them."""
    decay, share = (0.95, 0.05) if optimiser == "rmsprop" else (1.0, 1.0)
    for size, alike in ((1.0, True), (1e-6, False)):
        gradient, start = size * np.array([8.0, 6.0]), size * np.array(START)
        squares = decay * epsilon + share * gradient**2
        dl4j = start - 0.1 * gradient / (np.sqrt(squares) + epsilon)
        ours = line(1, start.tolist(), (Batch(LINE.x, size * LINE.y),), optimiser=optimiser, learning_rate=0.1)
        assert (ours == near(*dl4j)) is alike


@pytest.mark.parametrize("decay", [None, 0.0, 0.5])
def test_adamw_decays_weights_by_a_setting_and_leaves_biases_alone(decay: float | None) -> None:
    """w (1 - rate * decay), then Adam's first step, the rate itself; b takes that step alone. The default is 0.01."""
    given = {} if decay is None else {"weight_decay": decay}
    net = with_weights([OUT], START)
    config = training(**{**SGD, "optimiser": "adamw"}, **given)
    Trainer(net, Fixed((LINE,)), config).epoch(0, Progress.silent())
    assert weights(net) == pytest.approx([2 * (1 - 0.1 * (0.01 if decay is None else decay)) - 0.1, 0.9], rel=1e-5)


@pytest.mark.parametrize(
    ("x_mask", "y_mask", "x_seen"),
    [
        (None, flags([1, 0, 1]), [1.0, 3.0]),
        (flags([0, 1, 1]), None, [2.0, 3.0]),
        (flags([1, 1, 0]), flags([1, 0, 0]), [1.0]),
        (None, flags([1, 0, 1])[..., None], [1.0, 3.0]),
    ],
)
def test_masked_labels_have_no_part_in_an_update(
    x_mask: Tensor | None, y_mask: Tensor | None, x_seen: list[float]
) -> None:
    """The same update as of a batch that has the unmasked steps alone; the loss is their mean."""
    masked = Batch(LINE.x, LINE.y, x_mask, y_mask)
    seen = [LINE.x.flatten().tolist().index(x) for x in x_seen]
    short = Batch(LINE.x[:, seen], LINE.y[:, seen])
    assert line(batches=(masked,), **SGD) == near(*line(batches=(short,), **SGD))
    error = 2 * short.x + 1 - short.y
    trainer = Trainer(with_weights([OUT], START), Fixed((masked,)), training(**SGD))
    assert trainer.epoch(0, Progress.silent()) == pytest.approx(float(error.square().mean()))


def test_layers_are_clipped_apart_and_the_network_together() -> None:
    """Two layers in a row, both of the network's gradient (48, 24) and (72, 24): norms 53.67 and 75.89."""
    # y = a (w x + b) + c at x 2, label 0: w 1, b 1, a 2, c 6: answer 12, error 12, d = 24.
    layers = [{"kind": "dense", "units": 1, "activation": "identity"}, OUT]
    gradient = np.array([24 * 2 * 2, 24 * 2, 24 * 3, 24.0])
    for kind, groups in (
        ("clip_global_norm", [[0, 1, 2, 3]]),
        ("clip_l2_per_layer", [[0, 1], [2, 3]]),
        ("clip_l2_per_parameter", [[0], [1], [2], [3]]),
    ):
        expected = np.array([1.0, 1.0, 2.0, 6.0])
        for group in groups:
            expected[group] -= 0.1 * gradient[group] * 30 / max(30.0, float(np.linalg.norm(gradient[group])))
        net = with_weights(layers, [1.0, 1.0, 2.0, 6.0])
        config = training(**SGD, gradient=kind, gradient_threshold=30.0)
        Trainer(net, Fixed((Batch(rows([2]), rows([0])),)), config).epoch(0, Progress.silent())
        assert weights(net) == pytest.approx(expected.tolist(), rel=1e-5), kind


def test_labels_are_learned_in_the_networks_scale_and_relative_to_the_last_reading() -> None:
    """Feature (x - 1) / 2, target (y - x - 3) / 4: from w 2, b 1 the gradient is written out by hand."""
    feature, output = Feature(name="v", mean=1.0, scale=2.0), Output(name="v", mean=3.0, scale=4.0)
    x, y = np.array([1.0, 3.0, 5.0]), np.array([-4.0, 6.0, 28.0])
    z, target = (x - 1) / 2, (y - x - 3) / 4  # 0, 1, 2 and -2, 0, 5
    error = 2 * z + 1 - target  # 3, 3, 0
    for residual in (True, False):
        error = 2 * z + 1 - (target if residual else (y - 3) / 4)
        net = Network(layer_specs([{**OUT, "residual": residual}]), [feature], [output], False)
        set_weights(net, START)
        source = Fixed((Batch(rows(x.tolist()), rows(y.tolist())),), features=(feature,), outputs=(output,))
        loss = Trainer(net, source, training(**SGD)).epoch(0, Progress.silent())
        assert loss == pytest.approx(float(np.square(error).mean()))
        assert weights(net) == near(2 - 0.2 * (error * z).mean(), 1 - 0.2 * error.mean())


@pytest.mark.parametrize(("missing", "seen"), [("mean", 0.0), ("refuse", -1.0)])
def test_label_of_an_absent_step_is_learned_from_what_stands_in_for_its_reading(missing: Any, seen: float) -> None:
    """The mean, or 0 in the caller's unit; one output of two is labelled, so the mask is per output."""
    feature = Feature(name="x", mean=1.0, scale=1.0, missing=missing)
    outputs = (Output(name="a"), Output(name="b"))
    batch = Batch(rows([3, 9]), torch.zeros(1, 2, 2), flags([1, 0]), torch.tensor([[[True, True], [False, True]]]))
    net = Network(layer_specs([OUT]), [feature], outputs, False)
    set_weights(net, (2.0, 1.0))
    Trainer(net, Fixed((batch,), features=(feature,), outputs=outputs), training(**SGD)).epoch(0, Progress.silent())
    first, second = 2 * 2 + 1, 2 * seen + 1  # the first step's normalised reading is 2
    linear = net.head.linear
    assert linear is not None
    assert linear.weight.flatten().tolist() == near(2 - 0.2 * first * 2 / 3, 2 - 0.2 * (first * 2 + second * seen) / 3)
    assert linear.bias.tolist() == near(1 - 0.2 * first / 3, 1 - 0.2 * (first + second) / 3)


# --- A tanh unit: h' = tanh(w x + r h + b), y = v h + d ----------------------------------------------------------

UNIT: list[dict[str, Any]] = [{"kind": "simple_rnn", "units": 1}, OUT]
UNIT_START = (0.8, 0.9, -0.2, 1.5, 0.3)  # w, r, b, v, d


@dataclass
class ByHand:
    """The trainer's rules for the tanh unit, step by step in float64.

    The slope of h by w, r and b travels forwards with h. It begins at zero in every segment (the state comes in as a
    constant), and stays zero before the last `backward` steps of a segment.
    """

    config: TrainingConfig
    theta: Floats
    updates: int = 0

    def epoch(self, batches: Sequence[Batch], rate: float) -> float:
        """Change theta by one pass; returns the mean loss of the labels that counted."""
        h, total, count = np.zeros(0), 0.0, 0
        for batch in batches:
            n_rows, n_steps = batch.x.shape[:2]
            starts = np.ones(n_rows, bool) if batch.starts is None else batch.starts.numpy()
            h = np.where(starts, 0.0, np.resize(h, n_rows)) if len(h) else np.zeros(n_rows)
            length = self.config.tbptt_forward if self.config.backprop == "truncated" else n_steps
            for start in range(0, n_steps, length):
                stop = min(start + length, n_steps)
                h, loss, labels, gradient = self._segment(batch, h, start, stop)
                total, count = total + loss, count + labels
                if labels:
                    self._apply(gradient / (n_rows if self.config.average == "examples" else labels), rate)
        return total / count

    def _segment(self, batch: Batch, h: Floats, start: int, stop: int) -> tuple[Floats, float, int, Floats]:
        """State after, summed loss, labels that counted, and the gradient of the sum."""
        w, r, b, v, d = self.theta
        x, y = batch.x[..., 0].double().numpy(), batch.y[..., 0].double().numpy()
        ones = np.ones(x.shape, bool)
        mask = ones if batch.x_mask is None else batch.x_mask.numpy()
        counts = mask if batch.y_mask is None else batch.y_mask.numpy()
        begin = start if self.config.tbptt_backward is None else max(start, stop - self.config.tbptt_backward)
        h, loss, gradient = h.copy(), 0.0, np.zeros(5)
        for row in range(len(h)):
            slope = np.zeros(3)
            for t in range(start, stop):
                if mask[row, t]:
                    before = h[row]
                    h[row] = math.tanh(w * x[row, t] + r * before + b)
                    inner = np.array([x[row, t], before, 1.0]) + r * slope
                    slope = (1 - h[row] ** 2) * inner if t >= begin else np.zeros(3)
                elif self.config.masked_steps == "zero":
                    h[row], slope = 0.0, np.zeros(3)
                if counts[row, t]:
                    error = v * h[row] + d - y[row, t]
                    loss += error**2
                    gradient += 2 * error * np.array([*(v * slope), h[row], 1.0])
        return h, loss, int(counts[:, start:stop].sum()), gradient

    def _apply(self, gradient: Floats, rate: float) -> None:
        config, limit = self.config, self.config.gradient_threshold
        if config.gradient == "clip_global_norm":
            gradient = gradient * min(1.0, limit / float(np.linalg.norm(gradient)))
        penalised = np.array([1, 1, 0, 1, 0]) * (config.l2 * self.theta + config.l1 * np.sign(self.theta))
        self.theta = self.theta - rate * (gradient + penalised)
        self.updates += 1


GENERATOR = torch.Generator().manual_seed(11)
LONG = Batch(torch.randn(3, 10, 1, generator=GENERATOR), torch.randn(3, 10, 1, generator=GENERATOR))
HOLES = flags([1, 1, 0, 1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 1, 1, 1, 1, 1])
LABELS = HOLES & flags([1, 0, 1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 1, 1, 1, 0])
MASKED = Batch(LONG.x, LONG.y, HOLES, LABELS)
# Nothing to learn in the segments of steps 0 to 3 and 8 to 9.
RARE = Batch(LONG.x, LONG.y, HOLES, HOLES & flags(*[[0, 0, 0, 0, 1, 1, 1, 0, 0, 0]] * 3))
LANES = tuple(
    Batch(LONG.x[:, at : at + 5], LONG.y[:, at : at + 5], starts=torch.tensor([at == 0, True, at == 0]))
    for at in (0, 5)
)
TRUNCATED = {"backprop": "truncated", "tbptt_forward": 4}  # segments of 4, 4 and 2 steps


@pytest.mark.parametrize(
    ("batches", "config", "updates"),
    [
        ((LONG,), {}, 1),
        ((LONG,), TRUNCATED, 3),
        ((LONG,), {**TRUNCATED, "tbptt_backward": 2}, 3),
        ((LONG,), {**TRUNCATED, "tbptt_backward": 1}, 3),
        ((LONG,), {**TRUNCATED, "tbptt_forward": 3, "tbptt_backward": 2}, 4),
        ((MASKED,), {}, 1),
        ((MASKED,), {**TRUNCATED, "tbptt_backward": 3}, 3),
        ((MASKED,), {"masked_steps": "zero"}, 1),
        ((MASKED,), {**TRUNCATED, "tbptt_backward": 3, "masked_steps": "zero"}, 3),
        ((MASKED,), {**TRUNCATED, "average": "examples"}, 3),
        ((RARE,), TRUNCATED, 1),
        ((RARE,), {**TRUNCATED, "masked_steps": "zero", "l2": 0.1}, 1),
        (LANES, {}, 2),
        (LANES, {**TRUNCATED, "tbptt_backward": 3}, 4),
        ((LONG, LONG), TRUNCATED, 6),
        ((LONG,), {**TRUNCATED, "gradient": "clip_global_norm", "gradient_threshold": 0.3, "l1": 0.02, "l2": 0.05}, 3),
    ],
)
def test_recurrent_updates_are_those_by_hand(batches: tuple[Batch, ...], config: dict[str, Any], updates: int) -> None:
    """Two epochs of plain SGD on a cosine: weights, losses and the number of updates."""
    settings = training(**{**SGD, "schedule": "cosine", "epochs": 2, **config})
    net, hand = with_weights(UNIT, UNIT_START), ByHand(settings, np.array(UNIT_START))
    trainer = Trainer(net, Fixed(batches), settings)
    for epoch, factor in enumerate((1.0, 0.505)):
        loss = trainer.epoch(epoch, Progress.silent())
        assert loss == pytest.approx(hand.epoch(batches, 0.1 * factor), rel=1e-5)
        assert weights(net) == pytest.approx(hand.theta.tolist(), rel=1e-4, abs=1e-6)
        assert trainer.history.updates == hand.updates == updates * (epoch + 1)


def test_the_hand_written_unit_tells_the_rules_apart() -> None:
    """Each setting above ends at weights of its own: a trainer that ignored one would be found out."""
    ends = []
    for batch, config in (
        (LONG, {}),
        (LONG, TRUNCATED),
        (LONG, {**TRUNCATED, "tbptt_backward": 2}),
        (MASKED, {}),
        (MASKED, {"masked_steps": "zero"}),
        (MASKED, {"average": "examples"}),
    ):
        hand = ByHand(training(**SGD, **config), np.array(UNIT_START))
        hand.epoch([batch], 0.1)
        ends.append(hand.theta)
    for a, one in enumerate(ends):
        assert all(float(np.abs(one - other).max()) > 1e-3 for other in ends[:a])


def test_validation_carries_its_state_over_blocks() -> None:
    """Longer than a block: the loss of one pass over everything, for a network that streams and one that does not."""
    steps = VALIDATION_BLOCK + 300
    x = torch.sin(torch.arange(2.0 * steps)).view(2, steps, 1)
    mask = torch.arange(2 * steps).view(2, steps) % 7 != 3
    slow = {"kind": "simple_rnn", "units": 1, "activation": "identity"}  # a sum over all steps: no block forgets
    for layers in (
        [slow, OUT],
        [{"kind": "bidirectional", "layer": slow}, OUT],
        [slow, {"kind": "last_time_step"}, OUT],
    ):
        net = network(layers, plain(1), outputs=1, spread=0.0)
        with torch.no_grad():
            for name, p in net.named_parameters():
                if "weight_hh" in name:
                    p.fill_(0.999)
            y, _ = net(x, mask)
        source = Fixed((), (Batch(x, torch.zeros_like(x), mask),))
        counted = y.square()[mask] if not net.summary else torch.stack([y[0, mask[0]][-1], y[1, mask[1]][-1]]).square()
        assert Trainer(net, source, training()).validate("validation") == pytest.approx(float(counted.mean()), rel=1e-4)


# --- Dropout, patience, resuming ---------------------------------------------------------------------------------


def test_dropout_is_on_in_training_and_off_elsewhere() -> None:
    """Inputs of 1, labels of 0, w 1: every answer is 1; dropped by half it is 0 or 2, and so is its input."""
    ones = Batch(torch.ones(1, 400, 1), torch.zeros(1, 400, 1))
    net = with_weights([{"kind": "dropout", "p": 0.5}, OUT], (1.0, 0.0))
    trainer = Trainer(net, Fixed((ones,), (ones,)), training(**SGD, epochs=2), seed=5)
    assert trainer.validate("validation") == 1.0
    loss = trainer.epoch(0, Progress.silent())  # the mean of 0 and 4
    assert 1.6 < loss < 2.4
    assert weights(net) == pytest.approx([1 - 0.1 * 2 * loss, -0.1 * loss], rel=1e-5)
    w, b = weights(net)
    assert trainer.validate("validation") == pytest.approx((w + b) ** 2, rel=1e-5)
    assert not trainer.network.training
    again = trainer.epoch(1, Progress.silent())
    assert trainer.network.training
    kept = (again - b**2) / ((2 * w + b) ** 2 - b**2)
    assert 0.4 < kept < 0.6
    assert kept != pytest.approx(loss / 4, rel=1e-3)  # another epoch, other draws
    trainer.fit()
    with torch.no_grad():
        assert float(net(torch.ones(1, 1, 1))[0]) == pytest.approx(sum(weights(net)))


def drifting(directory: Path | None = None, **config: Any) -> Trainer:
    """A bias on its way from 1 to 10: 2.8, 4.24, 5.392, 6.3136, ...; validation would like it at 4."""
    zero = torch.zeros(1, 1, 1)
    source = Fixed((Batch(zero, zero + 10),), (Batch(zero, zero + 4),))
    return Trainer(with_weights([OUT], START), source, training(**{**SGD, "epochs": 50, **config}), directory=directory)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_ends_a_run_and_the_best_weights_stay(patience: int) -> None:
    """The second epoch is the best; one epoch more for each unit of patience, and w and b are the second's."""
    trainer = drifting(patience=patience)
    history = trainer.fit()
    assert (history.epoch, history.best_epoch) == (2 + patience, 1)
    assert weights(trainer.network) == pytest.approx([2.0, 4.24])
    assert history.best == pytest.approx(0.24**2, rel=1e-4)
    expected = [1.2**2, 0.24**2, 1.392**2, 2.3136**2, 3.05088**2]
    assert [validation for _, validation in history.losses] == pytest.approx(expected[: 2 + patience], rel=1e-4)
    assert [train for train, _ in history.losses[:2]] == pytest.approx([81.0, 7.2**2], rel=1e-4)


def test_equal_losses_cost_patience() -> None:
    """Nothing moves at this rate: the first epoch stays the best one."""
    history = drifting(patience=2, learning_rate=1e-12).fit()
    assert (history.epoch, history.best_epoch) == (3, 0)


def test_training_loss_decides_where_there_is_no_validation_split() -> None:
    """It falls from epoch to epoch, so the last weights are the best."""
    trainer = Trainer(with_weights([OUT], START), Fixed((LINE,)), training(**{**SGD, "learning_rate": 0.01}, epochs=3))
    history = trainer.fit()
    assert history.best_epoch == 2
    assert all(train == validation for train, validation in history.losses)
    assert history.best == history.losses[-1][0]


def test_resumed_run_remembers_the_best_epoch_before_the_break(tmp_path: Path) -> None:
    """Stopped behind the best epoch, it goes on from the last weights and still ends with the best ones."""
    assert drifting(tmp_path, epochs=3).fit().best_epoch == 1
    resumed = drifting(tmp_path, epochs=5)
    history = resumed.fit(resume=True)
    assert (history.epoch, history.updates, history.best_epoch) == (5, 5, 1)
    expected = [1.2**2, 0.24**2, 1.392**2, 2.3136**2, 3.05088**2]
    assert [validation for _, validation in history.losses] == pytest.approx(expected, rel=1e-4)
    assert weights(resumed.network) == pytest.approx([2.0, 4.24])


def averaging(directory: Path | None = None, start: Sequence[float] = START, **config: Any) -> Trainer:
    """A line whose weights are averaged; the same batch is its validation."""
    source = Fixed((LINE,), validation=(LINE,))
    return Trainer(with_weights([OUT], start), source, training(**SGD, **config), directory=directory)


def test_average_of_the_weights_is_what_is_validated_and_kept(tmp_path: Path) -> None:
    """After one update 0.1 of the start remains, after two 0.15 of the average; updates go on from the weights."""
    one = averaging(tmp_path, weight_average=0.15, epochs=1)
    history = one.fit()
    average = (0.1 * 2 + 0.9 * 1.2, 0.1 * 1 + 0.9 * 0.4)
    assert weights(one.network) == near(*average)
    errors = [average[0] * x + average[1] - y for x, y in ((1, -4), (2, 4), (3, 6))]
    assert history.losses[0][1] == pytest.approx(sum(e * e for e in errors) / 3, rel=1e-5)
    trained_on = averaging(weight_average=0.15, epochs=2).fit().losses[1][0]  # not the average
    assert trained_on == pytest.approx(sum((1.2 * x + 0.4 - y) ** 2 for x, y in ((1, -4), (2, 4), (3, 6))) / 3)
    second = line(epochs=2, **SGD)
    two = averaging(weight_average=0.15, epochs=2)
    two.epoch(0, Progress.silent())
    two.epoch(1, Progress.silent())
    assert weights(two.network) == near(*second)
    assert two.averaged is not None
    averages = [float(value) for value in two.averaged.weights.values()]
    assert averages == near(*(0.15 * a + 0.85 * w for a, w in zip(average, second, strict=True)))
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert [float(value) for value in best.values()] == near(*average)


def test_resumed_average_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """One epoch, and two more from the checkpoint, against three; a checkpoint without an average is refused."""
    config = {"weight_average": 0.7}
    unbroken = averaging(epochs=3, **config)
    history = unbroken.fit()
    averaging(tmp_path, epochs=1, **config).fit()
    resumed = averaging(tmp_path, (0.0, 0.0), epochs=3, **config)
    assert resumed.fit(resume=True) == history
    assert weights(resumed.network) == weights(unbroken.network)
    averaging(tmp_path / "plain", epochs=1).fit()
    with pytest.raises(ConfigError, match="weights without their average"):
        averaging(tmp_path / "plain", epochs=2, **config).fit(resume=True)


@pytest.mark.parametrize("optimiser", ["sgd", "nesterov", "adam", "adamw", "rmsprop", "adagrad"])
def test_resumed_optimiser_goes_on_bit_for_bit(optimiser: str, tmp_path: Path) -> None:
    """Two epochs, and two more from the checkpoint, against four: moments, step counts and a schedule included."""
    config = {"optimiser": optimiser, "learning_rate": 0.05, "schedule": "cosine", "epochs": 4, **TRUNCATED}
    unbroken = Trainer(with_weights(UNIT, UNIT_START), Fixed((MASKED,)), training(**config))
    history = unbroken.fit()
    broken = Trainer(with_weights(UNIT, UNIT_START), Fixed((MASKED,)), training(**config), directory=tmp_path)
    for epoch in range(2):
        loss = broken.epoch(epoch, Progress.silent())
        broken._note(loss, loss)
    resumed = Trainer(with_weights(UNIT, (0.0,) * 5), Fixed((MASKED,)), training(**config), directory=tmp_path)
    assert resumed.fit(resume=True) == history
    assert weights(resumed.network) == weights(unbroken.network)
