"""Masks, missing readings, carried state and truncated backpropagation, by value."""

from typing import Any

import numpy as np
import pytest
import torch
from networks import CELLS, LINEAR, OUT, network, plain, readings, rich, same, some_state
from torch import Tensor

from stepcast.errors import ConfigError
from stepcast.manifest import Change, Feature, Output
from training.data.batch import Batch
from training.layers.cell_specs import LstmSpec
from training.layers.observed import hold
from training.layers.specs import RnnOutputSpec
from training.losses import FORMULAS, WHOLE_STEP_LOSSES, Loss
from training.masks import Packing
from training.network import Network, detached, restarted
from training.segments import cut

LAYERS: list[dict[str, Any]] = [
    {"kind": "conv1d", "units": 4},
    {"kind": "lstm", "units": 5},
    {"kind": "dense", "units": 4},
    {"kind": "graves_lstm", "units": 3},
    {"kind": "dense", "units": 3},
    OUT,
]
# Gaps inside, a late start, an early end, an empty row, a full one.
GAPS = torch.tensor(
    [
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [0, 1, 0, 1, 0, 1, 0],
    ],
    dtype=torch.bool,
)
BIDIRECTIONAL: list[dict[str, Any]] = [{"kind": "bidirectional", "layer": {"kind": "lstm", "units": 4}}, OUT]
POOLED: list[dict[str, Any]] = [{"kind": "gru", "units": 4}, {"kind": "global_pooling", "pooling": "avg"}, OUT]
KINDS = ("stack", "bidirectional", "pooled", "decoder")
DECODER: list[dict[str, Any]] = [
    {"kind": "reverse"},
    {"kind": "lstm", "units": 4},
    {"kind": "last_time_step"},
    {"kind": "duplicate_to_time_series"},
    {"kind": "mask"},
    {"kind": "gru", "units": 3},
    OUT,
]


def loss_and_gradients(net: Network, x: Tensor, mask: Tensor | None, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    z, base, _ = net.train_pass(x, mask, net.initial_state(x.shape[0]))
    total, count = net.head.losses(z, base, y, mask)
    loss = total / count
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad]))


@pytest.mark.parametrize("layers", [LAYERS, BIDIRECTIONAL, POOLED, DECODER], ids=KINDS)
@pytest.mark.parametrize("rule", ["hold", "zero"])
@pytest.mark.parametrize("rubbish", [7.5, float("nan"), float("inf")])
def test_what_stands_under_a_mask_reaches_nothing(layers: list[dict[str, Any]], rule: Any, rubbish: float) -> None:
    """No output, no state, no loss, no gradient: bit for bit, even if it is NaN or infinite."""
    net, x, y = network(layers, rich()), readings(rich()), torch.randn(6, 7, 3)
    net.masked_steps = rule
    spoiled_x, spoiled_y = (torch.where(GAPS[..., None], v, rubbish) for v in (x, y))
    with torch.no_grad():
        (clean, clean_state), (spoiled, spoiled_state) = net(x, GAPS), net(spoiled_x, GAPS)
    assert torch.equal(clean, spoiled)
    same(clean_state, spoiled_state)
    (loss, gradients), (spoiled_loss, spoiled_gradients) = (
        loss_and_gradients(net, a, GAPS, b) for a, b in ((x, y), (spoiled_x, spoiled_y))
    )
    assert torch.equal(loss, spoiled_loss)
    assert torch.isfinite(loss)
    for a, b in zip(gradients, spoiled_gradients, strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()


@pytest.mark.parametrize("layers", [LAYERS, BIDIRECTIONAL, POOLED, DECODER], ids=KINDS)
def test_masks_of_ones_equal_no_masks_bit_for_bit(layers: list[dict[str, Any]]) -> None:
    """Outputs, states, losses and gradients."""
    net, x, y = network(layers, rich()), readings(rich()), torch.randn(6, 7, 3)
    ones = torch.ones(6, 7, dtype=torch.bool)
    with torch.no_grad():
        (a, a_state), (b, b_state) = net(x, ones), net(x, None)
    assert torch.equal(a, b)
    same(a_state, b_state)
    (loss, gradients), (other_loss, other_gradients) = (loss_and_gradients(net, x, m, y) for m in (ones, None))
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(g, o) for g, o in zip(gradients, other_gradients, strict=True))


def test_absent_step_holds_the_state() -> None:
    """A sequence with gaps is the sequence without them; answers at gaps are 0."""
    net, x = network(LAYERS, rich()), readings(rich())
    state = some_state(net, x)
    with torch.no_grad():
        y, after = net(x, GAPS, state)
        for row in range(6):
            there = GAPS[row]
            own = {n: {k: t[row : row + 1] for k, t in s.items()} for n, s in state.items()}
            if there.any():
                alone, own = net(x[row : row + 1, there], None, own)
                torch.testing.assert_close(y[row, there], alone[0])
            same({n: {k: t[row : row + 1] for k, t in s.items()} for n, s in after.items()}, own, rtol=1e-4, atol=1e-5)
    assert not y[~GAPS].any()


@pytest.mark.parametrize("cell", [*CELLS, *LINEAR])
def test_rule_zero_is_dl4js(cell: str) -> None:
    """h_t and c_t times the mask after every step: outputs 0 at a gap, and everything forgotten behind it."""
    net, x = network([{"kind": cell, "units": 3}, OUT]), readings(plain())
    net.masked_steps = "zero"
    state = {"recurrent": some_state(net, x)[net.layers[0].name]}["recurrent"]
    with torch.no_grad():
        y, after = net(x, GAPS, {net.layers[0].name: state})
        expected = []
        for t in range(7):
            h, state = net.layers[0](x[:, t : t + 1], None, state)
            state = {key: tensor * GAPS[:, t, None] for key, tensor in state.items()}
            expected.append(net.head.answer(net.head(h), None) * GAPS[:, t, None, None])
    torch.testing.assert_close(y, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)
    same(after, {net.layers[0].name: state}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_chunks_equal_one_call(cut: int) -> None:
    """With gaps and missing readings on both sides of the cut."""
    net, x = network(LAYERS, rich()), readings(rich())
    with torch.no_grad():
        y, after = net(x, GAPS)
        first, state = net(x[:, :cut], GAPS[:, :cut])
        second, state = net(x[:, cut:], GAPS[:, cut:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), y, rtol=1e-4, atol=1e-5)
    same(after, state, rtol=1e-4, atol=1e-5)


def test_packing_moves_present_steps_to_the_front_and_back() -> None:
    """By value, in order; what is only right-padded does not move at all."""
    x = torch.arange(14.0).view(2, 7, 1)
    mask = torch.tensor([[0, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    packing = Packing.of(mask)
    assert packing.lengths is not None
    assert packing.lengths.tolist() == [3, 3]
    assert packing.pack(x)[:, :3, 0].tolist() == [[1, 3, 4], [7, 8, 13]]
    assert packing.unpack(packing.pack(x))[..., 0].tolist() == [[0, 1, 0, 3, 4, 0, 0], [7, 8, 0, 0, 0, 0, 13]]
    assert Packing.of(torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)).order is None


def test_hold_carries_the_last_reading_over_gaps_calls_and_padding() -> None:
    """Literal arrays: two columns, a second call, a padded row."""
    nan = torch.nan
    readings_ = torch.tensor([[[1, nan], [nan, nan], [3, 5]], [[nan, 7], [nan, nan], [nan, 99]]])
    held, last = hold(readings_, torch.tensor([3, 2]), torch.tensor([[-1.0, -2], [-3, -4]]))
    assert held[0].tolist() == [[1, -2], [1, -2], [3, 5]]
    assert held[1, :2].tolist() == [[-3, 7], [-3, 7]]
    assert last.tolist() == [[3, 5], [-3, 7]]


def test_missing_readings_become_what_their_policy_says() -> None:
    """mean, zero in the caller's unit, the last reading, and a flag; the rest is normalised."""
    features = [
        Feature(name="a", mean=10, scale=2, missing="mean"),
        Feature(name="b", mean=10, scale=2, missing="zero", indicator=True),
        Feature(name="c", mean=10, scale=2, missing="hold"),
    ]
    net = network([{"kind": "lstm", "units": 2}, OUT], features)
    x = torch.tensor([[[12, 14, 16], [torch.nan] * 3]])
    z, state = net.observed(x, None, net.initial_state(1)["observed"])
    assert z[0].tolist() == [[1, 2, 3, 0], [0, -5, 3, 1]]
    assert state["last"].tolist() == [[3]]


def test_changes_are_in_units_of_usual_ones_and_0_until_there_were_enough_steps() -> None:
    """Literal numbers over two calls: held readings count, an indicator lies before them, far ones are cut."""
    changes = (Change(steps=1, scale=4.0), Change(steps=3, scale=8.0))
    features = [
        Feature(name="a", mean=10, scale=2, missing="hold", indicator=True, changes=changes),
        Feature(name="b"),
        Feature(name="c", scale=10, changes=(Change(steps=1),)),
    ]
    net = network([{"kind": "lstm", "units": 2}, OUT], features)
    x = torch.tensor([[[12, 0, 1], [16, 0, 2], [torch.nan, 0, 2], [20, 0, 0], [20, 0, 90], [4, 0, 88]]])
    z, state = net.observed(x[:, :2], torch.tensor([2]), net.initial_state(1)["observed"])
    assert state["seen"].tolist() == [[2]]
    assert z[0, :, 3:].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0]]
    z, state = net.observed(x[:, 2:], None, state)
    expected = [[0, 0, 0], [1, -2, 1], [0, 5, 0.5], [-4, -2, -1.5]]
    torch.testing.assert_close(z[0, :, 4:], torch.tensor(expected, dtype=torch.float32))
    assert z[0, :, 3].tolist() == [1, 0, 0, 0]
    assert state["seen"].tolist() == [[3]]
    torch.testing.assert_close(state["before"], torch.tensor([[[5, 0.0], [5, 9], [-3, 8.8]]]))


def test_residual_is_what_the_answer_is_added_to() -> None:
    """The last reading of the feature with the output's name, in its unit; other outputs stand alone."""
    features = [Feature(name="a", mean=10, scale=2, missing="hold"), Feature(name="b")]
    outputs = [Output(name="b", scale=3), Output(name="c", mean=5), Output(name="a", scale=4)]
    specs = [LstmSpec(kind="lstm", units=2), RnnOutputSpec(kind="rnn_output", residual=True, weight_init="zero")]
    net = Network(specs, features, outputs, False).eval()
    assert net.head.linear is not None
    torch.nn.init.constant_(net.head.linear.bias, 1.0)
    y, _ = net(torch.tensor([[[12.0, 7.0], [torch.nan, 8.0]]]))
    assert y[0].tolist() == [[10, 6, 16], [11, 6, 16]]


def test_restarted_zeroes_the_rows_that_start() -> None:
    """And leaves the lanes that go on."""
    state = {"a": {"h": torch.ones(3, 2)}}
    assert restarted(state, torch.tensor([True, False, True]))["a"]["h"].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert not restarted(state, None)["a"]["h"].any()


# --- Truncated backpropagation -----------------------------------------------------------------------------------


def manual_gradients(
    net: Network, x: Tensor, y: Tensor, segments: list[tuple[int, int, int]], mask: Tensor, y_mask: Tensor
) -> list[list[Tensor]]:
    """The reference: one step at a time, detached by hand; an absent step is a row of length 0.

    Args:
        net: Two recurrent layers below a dense one.
        x: (B, T, F).
        y: (B, T, O).
        segments: (start, the step gradients begin at, stop).
        mask: (B, T), present steps.
        y_mask: (B, T), steps whose label counts.

    Returns:
        The gradients of each segment.
    """
    state, gradients = net.initial_state(x.shape[0]), []
    leaves = [p for p in net.parameters() if p.requires_grad]
    for start, begin, stop in segments:
        state, total = detached(state), torch.zeros(())
        for t in range(start, stop):
            h = x[:, t : t + 1]
            for layer in net.stack():
                h, after = layer(h, mask[:, t].long(), state.get(layer.name, {}))
                if t < begin and layer.name in net.lower:  # this step is a constant for all recurrent layers and below
                    h, after = h.detach(), {k: v.detach() for k, v in after.items()}
                state = {**state, **({layer.name: after} if after else {})}
            total = total + net.head.losses(net.head(h), None, y[:, t : t + 1], y_mask[:, t : t + 1])[0]
        count = y_mask[:, start:stop].sum() * y.shape[2]
        gradients.append(list(torch.autograd.grad(total / count, leaves)))
    return gradients


def segment_gradients(net: Network, batch: Batch, forward: int, backward: int | None) -> list[list[Tensor]]:
    state, gradients = net.initial_state(batch.x.shape[0]), []
    leaves = [p for p in net.parameters() if p.requires_grad]
    for part in cut(batch, forward):
        z, base, state = net.train_pass(part.x, part.x_mask, detached(state), backward)
        total, count = net.head.losses(z, base, part.y, part.y_mask)
        gradients.append(list(torch.autograd.grad(total / count, leaves)))
    return gradients


# Ten steps: full, ended early, begun late, with gaps, of one step; each segment of three or four has labels.
RAGGED = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        [1, 0, 0, 1, 0, 1, 1, 0, 0, 1],
        [0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)
LABELLED = RAGGED & torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 0, 1]], dtype=torch.bool)


@pytest.mark.parametrize(("forward", "backward"), [(10, None), (10, 10), (4, 4), (4, 2), (3, 1), (10, 3), (25, None)])
@pytest.mark.parametrize("cells", [("lstm", "gru"), ("graves_lstm", "simple_rnn")], ids="-".join)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "ragged"])
def test_tbptt_gradients_equal_the_hand_unrolled_reference(
    cells: tuple[str, str], forward: int, backward: int | None, masked: bool
) -> None:
    """Segments of 4, 4 and 2: recurrent layers learn from a segment's last steps only, the dense one from all."""
    net = network([*({"kind": cell, "units": 4} for cell in cells), {"kind": "dense", "units": 3}, OUT])
    x, y = readings(plain(), rows=5, steps=10), torch.randn(5, 10, 3)
    mask, y_mask = (RAGGED, LABELLED) if masked else (torch.ones_like(RAGGED), torch.ones_like(RAGGED))
    stops = [min(start + forward, 10) for start in range(0, 10, forward)]
    starts = range(0, 10, forward)
    spans = [(a, a if backward is None else max(a, b - backward), b) for a, b in zip(starts, stops, strict=True)]
    expected = manual_gradients(net, x, y, spans, mask, y_mask)
    got = segment_gradients(net, Batch(x, y, *((mask, y_mask) if masked else ())), forward, backward)
    assert len(got) == len(expected) == -(-10 // forward)
    for one, other in zip(got, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_one_segment_over_all_equals_full_backpropagation() -> None:
    """TBPTT with a segment as long as the sequence, or longer, is BPTT bit for bit; a shorter one is not."""
    net = network([{"kind": "lstm", "units": 4}, OUT])
    x, y = readings(plain()), torch.randn(6, 7, 3)
    _, full = loss_and_gradients(net, x, None, y)
    for forward in (7, 20):
        (got,) = segment_gradients(net, Batch(x, y), forward, None)
        assert all(torch.equal(a, b) for a, b in zip(got, full, strict=True))
    truncated = segment_gradients(net, Batch(x, y), 7, 2)[0]
    assert not all(torch.allclose(a, b) for a, b in zip(truncated, full, strict=True))


# --- Losses ------------------------------------------------------------------------------------------------------

PROBABLE = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]], dtype=torch.float64)
VALUES = torch.tensor([[[1.0, 2.0, -1.0], [0.5, 3.0, 2.0]]], dtype=torch.float64)
ONE_HOT = torch.tensor([[[1.0, 0, 0], [0, 0, 1.0]]], dtype=torch.float64)
TARGETS = torch.tensor([[[2.0, 2.0, 1.0], [1.0, 1.0, 4.0]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "p", "target", "expected"),
    [
        ("mcxent", PROBABLE, ONE_HOT, -(np.log(0.7) + np.log(0.1)) / 2),
        ("kl_divergence", PROBABLE, ONE_HOT, -(np.log(0.7) + np.log(0.1)) / 2),
        ("xent", PROBABLE, ONE_HOT, -(np.log([0.7, 0.8, 0.9, 0.9, 0.2, 0.1]).sum()) / 2),
        ("mse", VALUES, TARGETS, (1 + 0 + 4 + 0.25 + 4 + 4) / 6),
        ("l2", VALUES, TARGETS, (1 + 0 + 4 + 0.25 + 4 + 4) / 2),
        ("mae", VALUES, TARGETS, (1 + 0 + 2 + 0.5 + 2 + 2) / 6),
        ("l1", VALUES, TARGETS, (1 + 0 + 2 + 0.5 + 2 + 2) / 2),
        ("huber", VALUES, TARGETS, (0.5 + 0 + 1.5 + 0.125 + 1.5 + 1.5) / 6),
        ("mape", VALUES, TARGETS, 100 * (0.5 + 0 + 2 + 0.5 + 2 + 0.5) / 6),
        ("poisson", VALUES.abs(), TARGETS, (9.5 - 2 * np.log(2) - np.log(0.5) - np.log(3) - 4 * np.log(2)) / 2),
        ("hinge", VALUES, TARGETS.sign(), (0 + 0 + 2 + 0.5 + 0 + 0) / 2),
        ("squared_hinge", VALUES, TARGETS.sign(), (0 + 0 + 4 + 0.25 + 0 + 0) / 2),
        ("wasserstein", VALUES, TARGETS, (2 + 4 - 1 + 0.5 + 3 + 8) / 6),
        ("cosine_proximity", VALUES, TARGETS, -(5 / np.sqrt(6 * 9) + 11.5 / np.sqrt(13.25 * 18)) / 2),
        ("msle", VALUES.abs(), TARGETS, np.square(np.log([2 / 3, 1, 1, 1.5 / 2, 2, 3 / 5])).sum() / 6),
    ],
)
def test_loss_is_the_published_formula(name: str, p: Tensor, target: Tensor, expected: float) -> None:
    """Averaged over entries or summed over a step's outputs and averaged over steps; a masked step changes nothing."""
    total, count = Loss(name, "identity")(p, target, None)
    assert float(total / count) == pytest.approx(expected)
    padded, nan = torch.cat([p, p + 5], dim=1), torch.full_like(target, torch.nan)
    mask = torch.tensor([[True, True, False, False]])
    total, count = Loss(name, "identity")(padded, torch.cat([target, nan], dim=1), mask)
    assert float(total / count) == pytest.approx(expected)


def test_every_loss_formula_is_checked_by_value() -> None:
    """The table above is complete."""
    table = test_loss_is_the_published_formula.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {row[0] for row in table} == set(FORMULAS)


SQUASHED = ("mcxent", "xent", "kl_divergence", "poisson", "msle")  # these want outputs above 0


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_gradient_equals_finite_differences_under_masks(name: str, per_output: bool, fused: bool) -> None:
    """Every loss, with the activations it is used with: exact where it counts, exactly 0 under the mask."""
    if per_output and name in WHOLE_STEP_LOSSES:
        with pytest.raises(ConfigError, match="mask per output"):
            Loss(name, "softmax")(VALUES, TARGETS, torch.ones(1, 2, 3, dtype=torch.bool))
        return
    activation = {True: "softmax" if name == "mcxent" else "sigmoid", False: "softplus" if name in SQUASHED else "tanh"}
    random = torch.Generator().manual_seed(7)
    z = torch.randn(4, 5, 3, dtype=torch.float64, generator=random)
    target = torch.rand(4, 5, 3, dtype=torch.float64, generator=random) + 0.1
    if "hinge" in name:
        target = (target - 0.6).sign()
    if name in ("mcxent", "xent", "kl_divergence"):
        target = target / 2
    mask = torch.rand((4, 5, 3) if per_output else (4, 5), generator=random) < 0.6
    wide = mask.view(4, 5, -1).expand(4, 5, 3)
    if name == "xent" and not fused:
        activation[False] = "hardsigmoid"
    loss = Loss(name, activation[fused], [1.0, 0.5, 2.0])

    def value(z: Tensor) -> Tensor:
        total, count = loss(z, torch.where(wide, target, torch.nan), mask)
        return total / count

    z.requires_grad_()
    assert torch.autograd.gradcheck(value, z)
    (gradient,) = torch.autograd.grad(value(z), z)
    assert torch.equal(gradient[~wide], torch.zeros_like(gradient[~wide]))
    assert gradient[wide].abs().max() > 0


@pytest.mark.parametrize(("name", "activation"), [("mcxent", "softmax"), ("xent", "sigmoid")])
def test_fused_cross_entropy_equals_its_formula_and_survives_extremes(name: str, activation: str) -> None:
    """Softmax and sigmoid are taken together with the logarithm."""
    z = torch.tensor([[[0.3, -1.0, 2.0], [1.0, 0.0, -2.0]]])
    fused, _ = Loss(name, activation)(z, ONE_HOT.float(), None)
    p = torch.softmax(z, -1) if activation == "softmax" else torch.sigmoid(z)
    plain_, _ = Loss(name, "identity")(p, ONE_HOT.float(), None)
    torch.testing.assert_close(fused, plain_)
    extreme, _ = Loss(name, activation)(z * 1000, ONE_HOT.float(), None)
    assert torch.isfinite(extreme)


def test_mask_per_output_counts_entries_and_weights_weigh() -> None:
    """Two of three outputs of one step."""
    mask = torch.tensor([[[True, False, True], [False, False, False]]])
    total, count = Loss("mse", "identity", [1.0, 100.0, 2.0])(VALUES, TARGETS, mask)
    assert (float(total), int(count)) == (1 + 2 * 4, 2)
    total, count = Loss("l2", "identity")(VALUES, TARGETS, mask)
    assert (float(total), int(count)) == (1 + 4, 1)


def test_class_label_of_zeros_says_nothing() -> None:
    """DL4J's gradient there is p, towards no class at all; here such a step has no loss and no gradient."""
    z = torch.randn(1, 2, 3, requires_grad=True)
    total, count = Loss("mcxent", "softmax")(z, torch.tensor([[[0.0, 0, 0], [0, 1, 0]]]), None)
    (gradient,) = torch.autograd.grad(total, z)
    assert int(count) == 2
    assert not gradient[0, 0].any()
    torch.testing.assert_close(gradient[0, 1], torch.softmax(z[0, 1], -1) - torch.tensor([0.0, 1, 0]))
