"""Networks as graphs: what reads what, by value; what is refused, with its path; several outputs and their losses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import OUT, layer_specs, network, plain, readings, rich, training
from torch import Tensor

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Output
from training.check import check_labels
from training.config import Config
from training.data.batch import Batch
from training.data.in_memory import Examples, InMemory
from training.layers.spec import Shape
from training.layers.stack import IllegalLayer, TokenReader, place
from training.network import Network
from training.train import Mean, Trainer

LSTM = {"kind": "lstm", "units": 4}
LOSS = {"kind": "rnn_loss"}
IDENTITY = {"activation": "identity", "weight_init": "identity"}


def answers(layers: list[dict[str, Any]], features: list[Feature], x: list[float], outputs: int = 1) -> list[float]:
    """The answer to one step, of weights as they were initialised."""
    net = network(layers, features, outputs=outputs, spread=0.0)
    return net(torch.tensor([[x]]))[0].flatten().tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("add", 5), ("subtract", -1), ("mul", 6), ("average", 2.5), ("max", 3), ("min", 2)],
)
def test_vertex_takes_its_inputs_place_by_place(kind: str, expected: float) -> None:
    """Of 2 and 3, in the order of the names."""
    assert answers([{"kind": kind, "from": ["f0", "f1"]}, LOSS], plain(2), [2.0, 3.0]) == [expected]


def test_merge_subset_scale_and_shift_are_what_they_say() -> None:
    """Features by name and in the order of the names; both ends of a subset are included."""
    merged = [{"kind": "merge", "from": ["f2", "f0", "f1"]}, {"kind": "subset", "first": 1, "last": 2}]
    moved = [*merged, {"kind": "scale", "factor": 10.0}, {"kind": "shift", "amount": 0.5}, LOSS]
    assert answers(moved, plain(3), [1.0, 2.0, 3.0], 2) == [10.5, 20.5]


def test_several_sources_of_a_layer_are_merged_side_by_side() -> None:
    """A dense layer of ones adds up what it is given: the whole input, and a feature once more."""
    dense = {"kind": "dense", "units": 1, "activation": "identity", "weight_init": "ones", "from": ["observed", "f1"]}
    assert answers([dense, LOSS], plain(2), [1.0, 5.0]) == [11.0]


def test_feature_brings_its_indicator_along() -> None:
    """f1 has one: two values, the second 1 where the reading is missing."""
    net = network([{"kind": "merge", "from": "f1"}, LOSS], rich(), outputs=2)
    x = torch.zeros(1, 2, 4)
    x[0, 1, 1] = torch.nan
    assert net(x)[0][0].tolist() == [[pytest.approx(-0.15), 0], [0, 1]]


def test_list_without_from_is_the_chain_that_from_spells_out() -> None:
    """The same weights, answers and states bit for bit; adapters and dropout included."""
    chain: list[dict[str, Any]] = [LSTM, {"kind": "dropout", "p": 0.5}, {"kind": "gru", "units": 3}, OUT]
    names = ["observed", "lstm_0", "dropout_0", "gru_0"]
    spelled = [{**layer, "from": [name]} for layer, name in zip(chain, names, strict=True)]
    a, b, x = network(chain), network(spelled), readings(plain())
    (y, state), (z, other) = a(x), b(x)
    assert torch.equal(y, z)
    assert state.keys() == other.keys()
    assert a.lower == b.lower == {"observed", "lstm_0", "dropout_0", "gru_0"}


def test_skip_connection_adds_what_went_in() -> None:
    """The network with `add` is the layer plus its input."""
    net = network([{"kind": "dense", "units": 4, "name": "a"}, LSTM, {"kind": "add", "from": ["a", "lstm_0"]}, OUT])
    x = readings(plain())
    seen, _ = net.layers[0](net.observed(x, None, {})[0], None, {})
    state = net.initial_state(6)["lstm_0"]
    told, _ = net.layers[1](seen, None, state)
    torch.testing.assert_close(net(x)[0], net.head.answer(net.head(seen + told), None))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([LSTM, {**OUT, "from": ["lstm_1"]}], "network[1].from: 'lstm_1' is no layer before it and no feature. Did"),
        (
            [LSTM, {**OUT, "from": ["lstm_0", "f9"]}],
            "network[1].from: 'f9' is no layer before it and no feature. There",
        ),
        ([LSTM, {**OUT, "from": ["zz"]}], "network[1].from: 'zz' is no layer before it and no feature. There are"),
        ([{**LSTM, "from": ["b"]}, {**LSTM, "name": "b"}, OUT], "network[0].from: layer 'b' does not stand before it"),
        ([{**LSTM, "from": ["lstm_0"]}, OUT], "network[0].from: layer 'lstm_0' does not stand before it"),
        ([LSTM, {**LSTM, "from": ["observed"]}, OUT], "network[0]: nothing reads 'lstm_0'. Name it in a later"),
        ([{**LSTM, "name": "f1"}, {**OUT, "from": ["f1"]}], "network[1].from: 'f1' is a layer and a feature. Rename"),
        (
            [LSTM, {"kind": "add", "from": ["lstm_0", "f0"]}, OUT],
            "network[1]: add takes inputs of one size, 'lstm_0' has 4, 'observed.f0' has 1",
        ),
        ([LSTM, {"kind": "subtract"}, OUT], "network[1]: subtract takes two inputs, got 1"),
        ([LSTM, {"kind": "subset", "first": 2, "last": 4}, OUT], "network[1]: subset goes up to value 4, there are 0"),
        (
            [LSTM, {"kind": "last_time_step"}, {**OUT, "from": ["lstm_0", "last_time_step_0"]}],
            "network[2]: 'last_time_step_0' is the answer of a many-to-one readout, 'lstm_0' still has its steps. Put",
        ),
        (
            [{"kind": "bidirectional", "layer": {**LSTM, "from": ["f0"]}}, OUT],
            "network[0].layer.from: it belongs to bidirectional, not to the layer in it",
        ),
        ([LSTM, {**OUT, "outputs": ["y0", "z"]}], "network[1].outputs: 'z' is no output of the data. There are 'y0'"),
        ([LSTM, {**OUT, "outputs": ["y"]}], "network[1].outputs: 'y' is no output of the data. Did you mean 'y"),
        ([LSTM, {**OUT, "outputs": ["y1"]}], "network[1].outputs: no output layer answers 'y0', 'y2'"),
        (
            [LSTM, {**OUT, "outputs": ["y0", "y1"]}, {**OUT, "outputs": ["y2", "y1"]}],
            "network[2].outputs: 'y1' is answered twice",
        ),
        ([LSTM, OUT, {**OUT, "outputs": ["y1"]}], "network[1].outputs: one of 2 output layers has to say"),
        (
            [LSTM, {**OUT, "outputs": ["y0", "y1"]}, {"kind": "last_time_step"}, {**OUT, "outputs": ["y2"]}],
            "network[3]: it and 'rnn_output_0' answer, one per row, the other at every step",
        ),
        (
            [{**OUT, "outputs": ["y0", "y1"], "name": "a"}, {**OUT, "outputs": ["y2"], "from": ["a"]}],
            "network[1].from: layer 'a' is an output, which nothing can read",
        ),
    ],
)
def test_illegal_graph_is_refused_with_its_path(layers: list[dict[str, Any]], message: str) -> None:
    """Before anything is trained; with the nearest name if there is one."""
    source = echo(outputs=3, features=2)
    with pytest.raises(ConfigError) as caught:
        Network.of(layer_specs(layers), source)
    assert str(caught.value).startswith(message)


def test_name_of_a_layer_behind_is_refused_when_the_file_is_read() -> None:
    """What may be a feature waits for the data; what is a layer does not."""
    with pytest.raises(IllegalLayer, match="does not stand before it"):
        place(layer_specs([{**LSTM, "from": ["b"]}, {**LSTM, "name": "b"}, OUT]), Shape())
    assert place(layer_specs([{**LSTM, "from": ["later"]}, OUT]), Shape())[0].sources == ("observed.later",)


def test_what_no_recurrent_layer_depends_on_learns_from_all_steps() -> None:
    """tbptt_backward cuts below and inside recurrent layers: a branch around them is not cut."""
    side = {"kind": "dense", "units": 3, "from": ["observed"], "name": "side"}
    net = network([{"kind": "dense", "units": 3}, LSTM, side, {**OUT, "from": ["lstm_0", "side"]}])
    assert net.lower == {"observed", "dense_0", "lstm_0"}
    x, y = readings(plain()), torch.randn(6, 7, 3)

    def gradient(backward: int | None, steps: slice, name: str) -> Tensor:
        z, base, _ = net.train_pass(x, None, net.initial_state(6), backward)
        total, _ = net.head.losses(z[:, steps], base, y[:, steps], None)
        (layer,) = (one for one in net.layers if one.name == name)
        return torch.autograd.grad(total, list(layer.parameters()), allow_unused=True)[0]

    early = slice(0, 4)
    assert torch.equal(gradient(3, early, "side"), gradient(None, early, "side"))
    assert not gradient(3, early, "dense_0").any()
    assert gradient(None, early, "dense_0").any()


# --- several outputs -------------------------------------------------------------------------------------------------


def echo(*, outputs: int = 2, features: int = 2, **more: Any) -> InMemory:
    """Regression on random numbers with units."""
    random = torch.Generator().manual_seed(5)
    x = [torch.randn(8, features, generator=random).numpy() for _ in range(6)]
    y = [torch.randn(8, outputs, generator=random).numpy() for _ in range(6)]
    return InMemory(
        splits={"train": Examples(x, y)},
        features=tuple(Feature(name=f"f{i}") for i in range(features)),
        outputs=tuple(Output(name=f"y{i}", mean=0.5 * i, scale=1.0 + i) for i in range(outputs)),
        task="regression",
        batch=3,
        seed=0,
        alignment="start",
        **more,
    )


TASKS: list[dict[str, Any]] = [
    LSTM,
    {**OUT, "outputs": ["y2", "y0"], "weight": 3.0},
    {**OUT, "outputs": ["y1"], "loss": "l1", "from": ["lstm_0", "f0"]},
]


def test_answers_stand_in_the_order_of_the_data() -> None:
    """Each output layer's own values, where its outputs stand, in their units."""
    source = echo(outputs=3)
    net = Network(layer_specs(TASKS), source.features, source.outputs, False)
    x = torch.randn(2, 4, 2)
    h, _ = net.layers[0](x, None, net.initial_state(2)["lstm_0"])
    y, _ = net(x)
    first, second = (head.linear for head, _ in net.head.tasks())
    torch.testing.assert_close(y[..., [2, 0]], first(h) * torch.tensor([3.0, 1.0]) + torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(y[..., [1]], second(torch.cat([h, x[..., :1]], dim=-1)) * 2.0 + 0.5)


def test_losses_are_means_of_each_layer_added_by_weight() -> None:
    """One update of plain descent equals that of the formula by hand: masks per output, each layer's own count."""
    source = echo(outputs=3)
    net = network(TASKS, source.features, outputs=3)
    by_hand = network(TASKS, source.features, outputs=3)
    x, y = torch.randn(2, 4, 2), torch.randn(2, 4, 3)
    mask = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    z, _ = by_hand(x)
    means = [
        ((z - y)[..., [0, 2]][mask[..., [0, 2]]]).square().mean(),
        ((z - y)[..., 1][mask[..., 1]]).abs().mean(),
    ]
    loss = 3.0 * means[0] + means[1]
    loss.backward()
    trainer = Trainer(net, source, training(optimiser="sgd", momentum=0.0, learning_rate=0.1))
    trainer.network.train()
    batch = Batch(x, y, None, mask)
    losses = Mean(torch.device("cpu"))
    trainer._update(batch, 2, net.initial_state(2), losses)
    assert losses.value == pytest.approx(loss.item())
    for new, old in zip(net.parameters(), by_hand.parameters(), strict=True):
        if old.grad is not None:
            torch.testing.assert_close(new, old - 0.1 * old.grad)


def test_output_layer_without_a_label_teaches_nothing() -> None:
    """Its mean of nothing is 0, not NaN."""
    source = echo(outputs=3)
    net = network(TASKS, source.features, outputs=3)
    before = [p.clone() for p in net.head.heads[1].parameters()]
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    mask[..., 1] = False
    trainer, losses = Trainer(net, source, training(optimiser="sgd")), Mean(torch.device("cpu"))
    trainer._update(Batch(torch.randn(2, 4, 2), torch.randn(2, 4, 3), None, mask), 2, net.initial_state(2), losses)
    assert losses.value > 0
    assert all(torch.equal(a, b) for a, b in zip(before, net.head.heads[1].parameters(), strict=True))


def test_labels_are_checked_by_the_layer_that_takes_them() -> None:
    """poisson for one output refuses a negative label of that output only."""
    counts = {**OUT, "outputs": ["y0"], "loss": "poisson", "activation": "softplus"}
    source = echo(outputs=2)
    x, y = source.splits["train"].x, [abs(v) for v in source.splits["train"].y]
    y[2] = y[2] * [1.0, -1.0]
    plain_units = tuple(Output(name=o.name) for o in source.outputs)
    for column in (1, 0):
        labels = [v.astype("float32") for v in y]
        if column == 0:
            labels[4] = (labels[4] * [-1.0, 1.0]).astype("float32")
        given = replace(source, splits={"train": Examples(x, labels)}, outputs=plain_units)
        net = Network.of(layer_specs([LSTM, counts, {**OUT, "outputs": ["y1"]}]), given)
        if column == 1:
            check_labels(net, given)
        else:
            with pytest.raises(ConfigError, match="loss poisson takes labels at least 0, output 'y0' is -"):
                check_labels(net, given)


def test_residual_of_one_layer_leaves_the_others_alone() -> None:
    """Zero weights: one answers the last reading, the other its mean."""
    outputs = [Output(name="f1", scale=2.0), Output(name="y", mean=7.0)]
    zero = {**OUT, "weight_init": "zero"}
    layers = [LSTM, {**zero, "outputs": ["y"]}, {**zero, "outputs": ["f1"], "residual": True}]
    net = Network(layer_specs(layers), plain(2), outputs, False)
    assert net(torch.tensor([[[3.0, 4.0], [5.0, 6.0]]]))[0].tolist() == [[[4.0, 7.0], [6.0, 7.0]]]


def test_quantiles_of_several_layers_stand_behind_all_point_forecasts() -> None:
    """In the graph's outputs, in the manifest's words, and in the answers; a loss per layer."""
    quantiles = {"distribution": {"kind": "quantile", "levels": [0.1, 0.5, 0.9]}}
    layers = [LSTM, {**OUT, "outputs": ["y2", "y0"], **quantiles}, {**OUT, "outputs": ["y1"], **quantiles}]
    source = echo(outputs=3)
    net = network(layers, source.features, outputs=3)
    assert [output.name for output in net.head.outputs] == [
        *("y0", "y1", "y2", "y2@0.1", "y0@0.1", "y2@0.9", "y0@0.9", "y1@0.1", "y1@0.9")
    ]
    described = net.head.described
    assert described is not None
    assert described.targets == {f"y{i}": (f"y{i}@0.1", f"y{i}", f"y{i}@0.9") for i in (2, 0, 1)}
    x, y = torch.randn(2, 4, 2), torch.randn(2, 4, 3)
    answer, _ = net(x)
    low, median, high = answer[..., [4, 7, 3]], answer[..., :3], answer[..., [6, 8, 5]]
    assert ((low < median) & (median < high)).all()
    z, base, _ = net.train_pass(x, None, net.initial_state(2))
    total, count = net.head.losses(z, base, y, None)
    over = y[..., None] - torch.stack([low, median, high], dim=-1)  # (B, T, K, P)
    levels = torch.tensor([0.1, 0.5, 0.9])
    pinball = torch.maximum(levels * over, (levels - 1) * over).mean(dim=-1)
    torch.testing.assert_close(total, torch.stack([pinball[..., [0, 2]].sum(), pinball[..., 1].sum()]))
    assert count.tolist() == [16, 8]
    with pytest.raises(ConfigError, match=r"network\[2\]\.distribution: it and 'rnn_output_0' have other"):
        Network.of(layer_specs([*layers[:2], {**OUT, "outputs": ["y1"]}]), source)


def test_change_needs_every_output_layer_to_be_residual(tmp_path: Path) -> None:
    """With the place of the one that is not."""
    table = {"kind": "table", "path": "a.csv", "time": "t", "every": "1h", "columns": {"a": {"target": True}}}
    network_ = [LSTM, {**OUT, "outputs": ["a"], "residual": True}, {**OUT, "outputs": ["b"]}]
    split = {"validation": "2020-01-02", "test": "2020-01-03", "target_scale": "change"}
    with pytest.raises(ValueError, match=r"data.target_scale is 'change', network\[2\] says whole values"):
        Config.model_validate({"name": "a", "data": {**table, **split}, "network": network_})


def test_embedding_of_a_feature_reads_tokens_among_other_features() -> None:
    """Which feature, so that wrong tokens are found in its column."""
    embedding = {"kind": "embedding", "vocabulary": 3, "units": 2, "from": ["f1"]}
    source = echo(outputs=1)
    net = Network.of(layer_specs([embedding, {**LSTM, "from": ["embedding_0", "f0"]}, OUT]), source)
    assert net.reads_tokens == (TokenReader(0, 3, "f1"),)
    with pytest.raises(ConfigError, match="feature 'f1' is"):
        Trainer(net, source, training()).fit()
