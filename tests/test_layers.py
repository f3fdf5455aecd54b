"""Every layer kind: torch, and ONNX in one call, in blocks and step by step; gradients against finite differences."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from networks import CELLS, LENGTHS, LINEAR, OUT, mask_of, network, plain, readings, rich, some_state, trending
from torch import Tensor

from stepcast.manifest import Feature, Tolerance
from training.activations import ACTIVATIONS, RECURRENT_NODES
from training.export import prove, state_tensors
from training.graph import Graph
from training.layers.cells import GravesLstm
from training.layers.recurrent import Recurrent
from training.masks import Packing
from training.network import Network
from training.stepper import Stepper

Layers = list[dict[str, Any]]
VIDEO = [Feature(name="pixels", width=2 * 8 * 6)]
TOKENS = [Feature(name="token", missing="zero")]


def cases() -> dict[str, tuple[Layers, list[Feature]]]:
    """Layers and features by a name that tells what is special."""
    found: dict[str, tuple[Layers, list[Feature]]] = {}
    for cell in CELLS:
        one = {"kind": cell, "units": 5}
        found[cell] = [one, OUT], rich()
        found[f"{cell}-stacked"] = [one, {"kind": "dropout", "p": 0.5}, {**one, "units": 3}, OUT], rich()
        found[f"{cell}-layer_norm"] = [{**one, "layer_norm": True}, OUT], rich()
        found[f"{cell}-mask_zero"] = (
            [
                {"kind": "dense", "units": 2, "activation": "relu"},
                {"kind": "mask_zero", "layer": one},
                OUT,
            ],
            rich(),
        )
        for mode in ("concat", "add", "mul", "average"):
            found[f"{cell}-{mode}"] = [{"kind": "bidirectional", "mode": mode, "layer": one}, OUT], rich()
        found[f"{cell}-both_last"] = [{"kind": "bidirectional", "last": True, "layer": one}, OUT], rich()
    for cell in LINEAR:
        one = {"kind": cell, "units": 5}
        found[cell] = [one, {**one, "units": 3}, OUT], rich()
        found[f"{cell}-mask_zero"] = [{"kind": "mask_zero", "layer": one}, OUT], plain()
        found[f"{cell}-both"] = [{"kind": "bidirectional", "layer": one}, OUT], rich()
        found[f"{cell}-both_last"] = [{"kind": "bidirectional", "last": True, "layer": one}, OUT], rich()
    for name in sorted(ACTIVATIONS.keys() - {"softmax", "tanh"}):
        init = {"weight_init": "zero", "recurrent_init": "zero"} if name == "cube" else {}
        found[f"lstm-{name}"] = [{"kind": "lstm", "units": 3, "activation": name, **init}, OUT], plain()
        found[f"dense-{name}"] = [{"kind": "dense", "units": 3, "activation": name}, OUT], plain()
    before = {"kind": "gru", "units": 5, "reset_after": False}
    found["gru-reset_before"] = [before, {**before, "units": 3}, OUT], rich()
    found["gru-reset_before-scan"] = [{**before, "activation": "mish"}, OUT], rich()
    found["gru-reset_before-both"] = [{"kind": "bidirectional", "layer": before}, OUT], rich()
    found["layer_norm-epsilon"] = [{"kind": "layer_norm", "epsilon": 0.01}, {"kind": "gru", "units": 4}, OUT], rich()
    for name in ("hardsigmoid", "softsign", "hardtanh"):
        for cell in ("lstm", "graves_lstm", "gru"):
            found[f"{cell}-gate_{name}"] = [{"kind": cell, "units": 3, "gate_activation": name}, OUT], plain()
    alone = {"kind": "activation", "activation": "cube"}
    found["activation"] = [{"kind": "dense", "units": 3}, alone, {"kind": "gru", "units": 3}, OUT], rich()
    for pooling in ("max", "avg", "sum", "pnorm"):
        layer = {"kind": "global_pooling", "pooling": pooling, "p": 3.0}
        found[f"pooling-{pooling}"] = [{"kind": "gru", "units": 4}, layer, {"kind": "dense", "units": 3}, OUT], rich()
    found["last_time_step"] = [{"kind": "gru", "units": 4}, {"kind": "last_time_step"}, OUT], rich()
    gru, again = {"kind": "gru", "units": 4}, {"kind": "duplicate_to_time_series"}
    found["reverse"] = [{"kind": "reverse"}, gru, OUT], rich()
    found["reverse-back"] = [{"kind": "reverse"}, gru, {"kind": "reverse"}, {"kind": "lstm", "units": 3}, OUT], rich()
    decoder = {"kind": "graves_lstm", "units": 3}
    found["encoder_decoder"] = [gru, {"kind": "last_time_step"}, again, decoder, OUT], rich()
    pooled = {"kind": "global_pooling", "pooling": "avg"}
    found["encoder_decoder-pooled"] = [gru, pooled, {"kind": "dense", "units": 3}, again, decoder, pooled, OUT], rich()
    both = {"kind": "bidirectional", "last": True, "layer": gru}
    found["encoder_decoder-both"] = [both, again, decoder, OUT], rich()
    found["mask"] = [{"kind": "mask"}, gru, {"kind": "mask"}, {"kind": "last_time_step"}, {"kind": "mask"}, OUT], rich()
    conv = {"kind": "conv1d", "units": 4, "kernel": 3, "dilation": 2}
    found["conv1d"] = [conv, {"kind": "conv1d", "units": 3, "kernel": 1}, {"kind": "lstm", "units": 4}, OUT], rich()
    found["conv1d-above"] = [{"kind": "lstm", "units": 4}, conv, OUT], rich()
    attention = {"kind": "attention", "units": 4, "window": 3, "heads": 2}
    found["attention"] = [attention, {"kind": "gru", "units": 4}, {**attention, "window": 9, "heads": 1}, OUT], rich()
    found["layer_norm"] = (
        [{"kind": "dense", "units": 5}, {"kind": "layer_norm"}, {"kind": "gru", "units": 4}, OUT],
        rich(),
    )
    found["rnn_loss"] = [{"kind": "lstm", "units": 3}, {"kind": "rnn_loss"}], rich()
    dense = {"kind": "time_distributed", "layer": {"kind": "dense", "units": 3}}
    named = {"kind": "rnn_to_feed_forward"}, {"kind": "feed_forward_to_rnn"}
    found["time_distributed"] = [named[0], dense, named[1], OUT], rich()
    found["changes"] = [{"kind": "lstm", "units": 4}, OUT], trending(rich())
    found["changes-plain"] = [{"kind": "gru", "units": 3}, OUT], trending(plain())
    found["changes-both"] = [both, OUT], trending(rich())
    embedding = {"kind": "embedding", "vocabulary": 7, "units": 5}
    found["embedding"] = [embedding, {"kind": "lstm", "units": 4}, OUT], TOKENS
    found["video"] = (
        [
            {"kind": "rnn_to_cnn", "height": 8, "width": 6, "channels": 2},
            {"kind": "conv2d", "units": 3, "kernel": [3, 3], "stride": [2, 1], "padding": [1, 0]},
            {"kind": "pool2d", "kernel": [2, 2]},
            {"kind": "pool2d", "kernel": [2, 2], "pooling": "avg", "padding": [1, 1]},
            {"kind": "lstm", "units": 4},
            OUT,
        ],
        VIDEO,
    )
    frames = {"kind": "rnn_to_cnn", "height": 8, "width": 6, "channels": 2}
    conv2d = {"kind": "conv2d", "units": 2, "kernel": [3, 3], "stride": [2, 2]}
    found["video-mask"] = [frames, {"kind": "mask"}, conv2d, {"kind": "mask"}, OUT], VIDEO
    found["video-moved"] = [{"kind": "last_time_step"}, frames, again, {"kind": "reverse"}, conv2d, gru, OUT], VIDEO
    return found | graphs()


def graphs() -> dict[str, tuple[Layers, list[Feature]]]:
    """Networks whose layers do not read the layer before."""
    found: dict[str, tuple[Layers, list[Feature]]] = {}
    inside, below = {"kind": "dense", "units": 4, "name": "inside"}, {"kind": "lstm", "units": 4, "name": "below"}
    other = {"kind": "gru", "units": 4, "name": "other", "from": ["inside"]}
    for vertex in ("merge", "add", "subtract", "mul", "average", "max", "min"):
        joined = {"kind": vertex, "from": ["below", "other"], "name": "joined"}
        found[f"graph-{vertex}"] = [inside, below, other, joined, {"kind": "dense", "units": 3}, OUT], rich()
    found["graph-skip"] = [inside, below, {**OUT, "from": ["observed", "inside", "below"]}], rich()
    by_name = {"kind": "lstm", "units": 3, "from": ["f3", "f1"]}
    found["graph-features"] = (
        [by_name, {"kind": "gru", "units": 3, "from": "f0"}, {**OUT, "from": ["lstm_0", "gru_0"]}],
        rich(),
    )
    moved = [
        {"kind": "subset", "first": 1, "last": 2},
        {"kind": "scale", "factor": -2.0},
        {"kind": "shift", "amount": 0.5},
    ]
    found["graph-moved"] = [below, *moved, OUT], rich()
    last, again = {"kind": "last_time_step"}, {"kind": "duplicate_to_time_series"}
    found["graph-summary"] = (
        [below, last, again, {"kind": "merge", "from": ["below", again["kind"] + "_0"]}, OUT],
        rich(),
    )
    tasks = {**OUT, "outputs": ["y2", "y0"], "weight": 2.0}, {**OUT, "outputs": ["y1"], "loss": "mae", "from": "inside"}
    found["graph-tasks"] = [inside, below, *tasks], rich()
    embedding = {"kind": "embedding", "vocabulary": 7, "units": 5, "from": "token"}
    merged = {"kind": "merge", "from": ["embedding_0", "level"]}
    found["graph-token"] = [embedding, merged, below, OUT], [*plain(1), *TOKENS, Feature(name="level")]
    return found


CASES = cases()
WHOLE = {"bidirectional", "reverse", "duplicate_to_time_series"}  # kinds that have to see the end of a row first


def built(case: str) -> Network:
    """The network of a case; what cubes its values runs away within seven steps unless weights are small."""
    layers, features = CASES[case]
    return network(layers, features, spread=0.02 if "cube" in case else 0.2)


def exported(net: Network, directory: Path) -> None:
    """Write model.onnx."""
    graph = Graph(net.observed.n_features)
    net.write(graph)
    onnx.save(graph.model(doc=""), directory / "model.onnx")


@pytest.mark.parametrize("case", CASES)
def test_layer_agrees_in_torch_and_onnx_however_it_is_stepped(case: str, tmp_path: Path) -> None:
    """Laws 1, 2 and 7: rows of 7, 6, 0, 3 and 1 steps, from states that are not zero, NaN where allowed."""
    layers, features = CASES[case]
    net = built(case)
    x, state = readings(features), None
    mask = mask_of()
    with torch.no_grad():
        state = some_state(net, x) if net.streaming else net.initial_state(6)  # a graph without states begins at zero
        x = torch.where(mask[..., None], x, 0.0)
        y, after = net(x, mask, state)
    golden = {"x": x.numpy(), "lengths": np.array(LENGTHS, np.int32), "y": y.numpy()}
    for prefix, tensors in (("state_in", state), ("state_out", after)):
        golden |= {f"{prefix}.{n}.{k}": tensors[n][k].numpy() for n, keys in net.states().items() for k in keys}
    exported(net, tmp_path)
    assert np.isfinite(golden["y"]).all()
    assert net.streaming == WHOLE.isdisjoint(layer["kind"] for layer in layers)
    assert net.streaming or not state_tensors(net)
    prove(Stepper(tmp_path, state_tensors(net)), golden, net.streaming, Tolerance())


@pytest.mark.parametrize("case", CASES)
def test_padding_and_batch_mates_change_nothing(case: str) -> None:
    """Law 2 in torch: a row alone, without its padding, has the same answers and ends in the same state."""
    _, features = CASES[case]
    net, x, mask = built(case), readings(features), mask_of()
    with torch.no_grad():
        state = some_state(net, x)
        y, after = net(x, mask, state)
        for row in (1, 3):  # one goes on, both are padded
            own = {n: {k: t[row : row + 1] for k, t in s.items()} for n, s in state.items()}
            alone, alone_after = net(x[row : row + 1, : LENGTHS[row]], None, own)
            torch.testing.assert_close(y[row : row + 1, : LENGTHS[row]], alone, rtol=1e-4, atol=1e-5)
            for name, layer in alone_after.items():
                for key, tensor in layer.items():
                    torch.testing.assert_close(after[name][key][row : row + 1], tensor, rtol=1e-4, atol=1e-5)
    assert not y[~mask].any()
    for name, keys in net.states().items():
        for key in keys:
            assert torch.equal(after[name][key][2], state[name][key][2]), f"{name}.{key} of an empty row moved"


@pytest.mark.parametrize("case", [c for c, (layers, _) in CASES.items() if WHOLE & {one["kind"] for one in layers}])
def test_whole_rows_of_one_step_and_of_none_agree(case: str, tmp_path: Path) -> None:
    """What cannot be stepped is called with T=1 too; a batch may have empty rows only."""
    net = built(case)
    exported(net, tmp_path)
    x = readings(CASES[case][1], steps=1).nan_to_num()
    for lengths in ([1, 0, 1, 1, 0, 1], [0] * 6):
        with torch.no_grad():
            y, _ = net(x, mask_of(lengths, 1))
        golden = {"x": x.numpy(), "lengths": np.array(lengths, np.int32), "y": y.numpy()}
        prove(Stepper(tmp_path, ()), golden, net.streaming, Tolerance())
        assert np.isfinite(Stepper(tmp_path, ()).run(golden["x"], golden["lengths"], {})[0]).all()


# Present: 1 2 3 4; 5 7 (a gap between); nothing; 9.
STEPS = [[1, 2, 3, 4], [5, 0, 7, 0], [0, 0, 0, 0], [0, 0, 0, 9]]
THERE = [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["reverse"], [[4, 3, 2, 1], [7, 0, 5, 0], [0, 0, 0, 0], [0, 0, 0, 9]]),
        (["reverse", "reverse"], STEPS),
        (["last_time_step", "duplicate_to_time_series"], [[4, 4, 4, 4], [7, 0, 7, 0], [0, 0, 0, 0], [0, 0, 0, 9]]),
        (
            ["reverse", "last_time_step", "duplicate_to_time_series"],
            [[1, 1, 1, 1], [5, 0, 5, 0], [0, 0, 0, 0], [0, 0, 0, 9]],
        ),
        (["mask"], STEPS),
    ],
    ids=["reverse", "back", "duplicate", "first", "mask"],
)
def test_steps_move_among_the_present_ones_only(kinds: list[str], expected: list[list[int]], tmp_path: Path) -> None:
    """Literal arrays through masks with gaps; the graph gets the present steps in front, as the server gives them."""
    specs = [{"kind": kind} for kind in kinds]
    net = network([*specs, {"kind": "rnn_loss"}], plain(1), outputs=1)
    x, mask = torch.tensor(STEPS).float()[..., None], torch.tensor(THERE).bool()
    y, _ = net(torch.where(mask[..., None], x, torch.nan), mask)
    assert y[..., 0].tolist() == expected
    exported(net, tmp_path)
    packing = Packing.of(mask)
    assert packing.lengths is not None
    packed = packing.pack(x).numpy()
    got, _ = Stepper(tmp_path, ()).run(packed, packing.lengths.numpy().astype(np.int32), {})
    assert packing.unpack(torch.from_numpy(got))[..., 0].tolist() == expected


def test_mask_makes_padding_zero_in_torch_and_onnx(tmp_path: Path) -> None:
    """By itself, before anything else takes the padding away: 9 stands behind rows of 2 and 0 steps."""
    net = network([{"kind": "mask"}, {"kind": "rnn_loss"}], plain(1), outputs=1)
    x, lengths = torch.tensor([[1.0, 2, 9], [9, 9, 9], [3, 4, 5]])[..., None], torch.tensor([2, 0, 3])
    masked, _ = net.layers[0](x, lengths, {})
    assert masked[..., 0].tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert net.layers[0](x, None, {})[0] is x
    exported(net, tmp_path)
    got, _ = Stepper(tmp_path, ()).run(x.numpy(), lengths.numpy().astype(np.int32), {})
    assert got[..., 0].tolist() == masked[..., 0].tolist()


def test_decoder_reads_nothing_but_the_last_summary() -> None:
    """An encoder and a decoder by hand: the decoder's input is the encoder's last state at each of the row's steps."""
    net, x = built("encoder_decoder"), readings(rich())
    encoder, _, _, decoder = net.layers
    with torch.no_grad():
        y, _ = net(x, mask_of())
        for row, length in enumerate(LENGTHS):
            if length == 0:
                continue
            state = net.initial_state(1)
            seen, _ = net.observed(x[row : row + 1, :length], None, state["observed"])
            _, last = encoder(seen, None, state[encoder.name])
            told, _ = decoder(last["h"][:, None].repeat(1, length, 1), None, state[decoder.name])
            torch.testing.assert_close(y[row, :length], net.head.answer(net.head(told), None)[0])


def recurrent_ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node if n.op_type in ("RNN", "LSTM", "GRU", "Scan")]


@pytest.mark.parametrize(
    ("cell", "op"), [("simple_rnn", "RNN"), ("lstm", "LSTM"), ("graves_lstm", "LSTM"), ("gru", "GRU")]
)
def test_recurrent_layer_is_one_node_where_onnx_has_one(cell: str, op: str, tmp_path: Path) -> None:
    """Not unrolled, not scanned; peepholes are the node's P input."""
    exported(network([{"kind": cell, "units": 3}, OUT]), tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    assert recurrent_ops(model) == [op]
    node = next(n for n in model.graph.node if n.op_type == op)
    assert (len(node.input) > 7) == (cell == "graves_lstm")
    exported(network([{"kind": cell, "units": 3, "layer_norm": True}, OUT]), tmp_path)
    assert recurrent_ops(onnx.load(tmp_path / "model.onnx")) == ["Scan"]


def test_onnx_nodes_take_every_activation_they_are_trusted_with(tmp_path: Path) -> None:
    """The list of activations that stay inside the node is not longer than what the node's graph shows."""
    for name in RECURRENT_NODES:
        exported(network([{"kind": "lstm", "units": 3, "activation": name}, OUT]), tmp_path)
        assert recurrent_ops(onnx.load(tmp_path / "model.onnx")) == ["LSTM"], name


@pytest.mark.parametrize("cell", CELLS[:4])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_fast_path_equals_the_written_formula(cell: str, lengths: tuple[int, ...] | None) -> None:
    """torch's kernels and the hand-written peephole loop against the cell's `step`: values and all gradients."""
    net = network([{"kind": cell, "units": 5}, OUT])
    layer = net.layers[0]
    assert isinstance(layer, Recurrent)
    x = torch.randn(6, 7, 4, requires_grad=True)
    ends = None if lengths is None else torch.tensor(lengths)
    before = tuple(torch.randn(6, 5, requires_grad=True) for _ in layer.KEYS)
    inputs = [x, *before, *(p for p in layer.parameters() if p.requires_grad)]

    def run(unroll: Any) -> tuple[list[Tensor], list[Tensor]]:
        y, after = unroll(x, ends, before)
        rows = torch.ones(6, dtype=torch.bool) if lengths is None else torch.tensor(lengths) > 0
        valid = mask_of(lengths or [7] * 6)
        values = [y[valid], *(a[rows] for a in after)]
        weights = [torch.linspace(-1, 1, v.numel()).view_as(v) for v in values]
        loss = sum(((v * w).sum() for v, w in zip(values, weights, strict=True)), torch.zeros(()))
        return values, list(torch.autograd.grad(loss, inputs))

    for fast, slow in zip(run(layer.unroll), run(layer._loop), strict=True):
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_peepholes_begin_xavier_uniform_whatever_recurrent_init_says() -> None:
    """Between -sqrt(6 / 2 H) and sqrt(6 / 2 H), with variance 1 / H, beside recurrent weights that begin at 0."""
    torch.manual_seed(3)
    spec = {"kind": "graves_lstm", "units": 400, "recurrent_init": "zero"}
    layer = network([spec, OUT], plain(1), spread=0.0).layers[0]
    assert isinstance(layer, GravesLstm)
    drawn = layer.peephole.detach()
    assert not layer.weight_hh.any()
    assert float(drawn.abs().max()) <= (6 / 800) ** 0.5
    assert float(drawn.square().mean()) == pytest.approx(1 / 400, rel=0.1)


def test_peepholes_see_the_old_cell_and_the_new_one() -> None:
    """DL4J's formula, written out in NumPy: i and f with c_{t-1}, o with c_t."""
    layer = network([{"kind": "graves_lstm", "units": 2}, OUT], plain(1)).layers[0]
    assert isinstance(layer, GravesLstm)
    w, r, b = (t.detach().double().numpy() for t in (layer.weight_ih, layer.weight_hh, layer.bias_ih))
    b = b + layer.bias_hh.detach().double().numpy()
    p_i, p_o, p_f = layer.peephole.detach().double().numpy()
    x, h, c = np.linspace(-2, 2, 5), np.array([0.3, -0.4]), np.array([0.5, 0.1])
    state = {"h": torch.tensor(h[None]).float(), "c": torch.tensor(c[None]).float()}
    y, after = layer(torch.tensor(x).float().view(1, 5, 1), None, state)

    def sigmoid(v: Any) -> Any:
        return 1 / (1 + np.exp(-v))

    for t in range(5):
        i, f, g, o = np.split(w[:, 0] * x[t] + r @ h + b, 4)
        c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(g)
        h = sigmoid(o + p_o * c) * np.tanh(c)
        np.testing.assert_allclose(y[0, t].detach().numpy(), h, rtol=1e-5)
    np.testing.assert_allclose(after["c"][0].detach().numpy(), c, rtol=1e-5)


def test_lstm_has_one_bias_that_learns_and_a_forget_bias() -> None:
    """As in DL4J; torch's second bias stays what it is."""
    torch.manual_seed(0)
    layer = network([{"kind": "lstm", "units": 3, "forget_bias": 2.5}, OUT], spread=0).layers[0]
    assert isinstance(layer, Recurrent)
    assert layer.bias_ih.tolist() == [0] * 3 + [2.5] * 3 + [0] * 6
    assert not layer.bias_hh.requires_grad


def outputs_and_gradients(net: Network, x: Tensor, mask: Tensor | None, y: Tensor) -> list[Tensor]:
    """Answers, final states, the summed loss, its count and the gradient of every weight."""
    with torch.no_grad():
        answer, state = net(x, mask)
    z, base, _ = net.train_pass(x, mask, net.initial_state(x.shape[0]))
    total, count = net.head.losses(z, base, y, mask)
    gradients = torch.autograd.grad((total / count).sum(), [p for p in net.parameters() if p.requires_grad])
    return [answer, *(t for layer in state.values() for t in layer.values()), total.detach(), count, *gradients]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rubbish", [1e3, float("nan")])
def test_values_under_a_mask_reach_nothing_in_any_layer(case: str, rubbish: float) -> None:
    """Gaps, a late start, padding and an empty row: no output, state, loss or gradient moves by a bit."""
    net, x, y = built(case), readings(CASES[case][1]), torch.randn(6, 7, 3)
    mask = mask_of().clone()
    mask[0, 2:4] = mask[1, 0] = False
    clean = outputs_and_gradients(net, x, mask, y)
    spoiled_x, spoiled_y = (torch.where(mask[..., None], values, rubbish) for values in (x, y))
    spoiled = outputs_and_gradients(net, spoiled_x, mask, spoiled_y)
    assert all(torch.isfinite(one).all() for one in clean)
    assert all(torch.equal(one, other) for one, other in zip(clean, spoiled, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_masks_of_ones_equal_no_masks_bit_for_bit_in_any_layer(case: str) -> None:
    """Outputs, states, loss, count and gradients."""
    net, x, y = built(case), readings(CASES[case][1]), torch.randn(6, 7, 3)
    ones, none = (outputs_and_gradients(net, x, mask, y) for mask in (torch.ones(6, 7, dtype=torch.bool), None))
    assert all(torch.equal(one, other) for one, other in zip(ones, none, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_finite_differences_under_masks(case: str) -> None:
    """Along random directions of all weights and the input together, in float64, with gaps and rows of length 0."""
    layers, features = CASES[case]
    net = built(case).double()
    x = readings(features).double()
    mask = mask_of().clone()
    mask[0, 2:4] = False
    labels = torch.randn(6, 7, 3, dtype=torch.float64)
    state = {n: {k: t.double() for k, t in s.items()} for n, s in net.initial_state(6).items()}
    there = ~torch.isnan(x) & mask[..., None]
    x.requires_grad_(all(layer["kind"] != "embedding" for layer in layers))

    def loss() -> Tensor:
        z, base, _ = net.train_pass(x, mask, state)
        total, count = net.head.losses(z, base, labels, mask)
        return (total / count).sum()

    leaves = [p for p in net.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])
    gradients = torch.autograd.grad(loss(), leaves)
    torch.manual_seed(3)
    for _ in range(3):
        directions = [torch.randn_like(leaf) for leaf in leaves]
        if x.requires_grad:
            directions[-1] = torch.where(there, directions[-1], 0.0)
        slope = sum(float((g * d).nan_to_num().sum()) for g, d in zip(gradients, directions, strict=True))
        step, values = 1e-6, []
        with torch.no_grad():
            for sign in (1, -2):
                for leaf, direction in zip(leaves, directions, strict=True):
                    leaf += sign * step * direction
                values.append(float(loss()))
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf += step * direction
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-7)


def test_a_gru_that_resets_before_the_product_is_chos() -> None:
    """Two steps by the equations of Cho et al. 2014, written out in numpy."""
    net = network([{"kind": "gru", "units": 2, "reset_after": False}, OUT], plain(3), outputs=1)
    layer = next(one for one in net.layers if isinstance(one, Recurrent))
    w, u = layer.weight_ih.detach().double().numpy(), layer.weight_hh.detach().double().numpy()
    b, c = layer.bias_ih.detach().double().numpy(), layer.bias_hh.detach().double().numpy()
    x, h = np.array([[0.5, -1.0, 2.0], [1.0, 0.25, -0.5]]), np.array([0.3, -0.6])
    (got,), (state,) = layer.unroll(torch.tensor(x[None], dtype=torch.float32), None, (torch.tensor(h[None]).float(),))
    for step, now in enumerate(x):
        r, z = (1 / (1 + np.exp(-(w[k] @ now + b[k] + u[k] @ h + c[k]))) for k in (slice(0, 2), slice(2, 4)))
        n = np.tanh(w[4:] @ now + b[4:] + u[4:] @ (r * h) + c[4:])
        h = (1 - z) * n + z * h
        np.testing.assert_allclose(got[step].detach().numpy(), h, 1e-5, 1e-6)
    np.testing.assert_allclose(state[0].detach().numpy(), h, 1e-5, 1e-6)


def test_hardsigmoid6_is_not_hardsigmoid() -> None:
    """relu6(x + 3) / 6 by literal values, beside clip(0.2 x + 0.5, 0, 1)."""
    x = torch.tensor([-3.0, -2.6, 0.0, 1.5, 2.6, 3.0])
    torch.testing.assert_close(ACTIVATIONS["hardsigmoid6"](x), torch.tensor([0.0, 0.4 / 6, 0.5, 0.75, 5.6 / 6, 1.0]))
    torch.testing.assert_close(ACTIVATIONS["hardsigmoid"](x), torch.tensor([0.0, 0.0, 0.5, 0.8, 1.0, 1.0]))
