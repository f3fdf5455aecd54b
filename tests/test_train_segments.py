"""Which steps run and which labels count, and which tokens are none."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from networks import OUT, network, training

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Output
from training.data.batch import Batch
from training.data.in_memory import Examples, InMemory
from training.data.source import Source
from training.segments import check_tokens, settle
from training.train import History, Trainer

LSTM: list[dict[str, Any]] = [{"kind": "lstm", "units": 8}, OUT]


def test_one_to_many_runs_on_missing_readings() -> None:
    """A step with a label is a step even if its input is absent: missing where that is allowed, else zero."""
    mask = torch.tensor([[True, False, False]])
    batch = Batch(torch.full((1, 3, 2), 9.0), torch.zeros(1, 3, 1), mask, torch.tensor([[True, True, False]]))
    settled = settle(batch, fillable=torch.tensor([True, False]), summary=False)
    assert settled.x_mask is not None
    assert settled.x_mask.tolist() == [[True, True, False]]
    torch.testing.assert_close(settled.x[0, :2], torch.tensor([[9.0, 9.0], [torch.nan, 0.0]]), equal_nan=True)


def test_many_to_one_counts_the_last_present_step_alone() -> None:
    """However the label's row is masked; without any mask it is the last step."""
    mask = torch.tensor([[True, True, False], [True, False, True]])
    batch = Batch(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1), mask, torch.ones(2, 3, dtype=torch.bool))
    settled = settle(batch, fillable=torch.tensor([False]), summary=True)
    assert settled.y_mask is not None
    assert settled.y_mask.tolist() == [[False, True, False], [False, False, True]]
    bare = settle(Batch(batch.x, batch.y), fillable=torch.tensor([False]), summary=True)
    assert bare.y_mask is not None
    assert bare.y_mask.tolist() == [[False, False, True]] * 2


def test_features_and_labels_of_different_length_are_an_error() -> None:
    """DL4J warns and trains nothing."""
    batch = Batch(torch.zeros(2, 3, 1), torch.zeros(2, 1, 1))
    with pytest.raises(ConfigError, match=r"features of \(2, 3\) rows and steps, labels of \(2, 1\)"):
        settle(batch, fillable=torch.tensor([False]), summary=False)


def test_labels_without_a_mask_count_where_the_input_is() -> None:
    """Padding is never learned from."""
    mask = torch.tensor([[True, False]])
    settled = settle(
        Batch(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), mask), fillable=torch.tensor([False]), summary=False
    )
    assert settled.y_mask is mask


# --- Tokens ------------------------------------------------------------------------------------------------------


def tokens(*rows: list[float], **feature: Any) -> InMemory:
    """Rows of token numbers, each labelled 1 at every step."""
    x = [np.array(row, np.float32)[:, None] for row in rows]
    examples = Examples(x, [np.ones_like(row) for row in x])
    return InMemory(
        splits={"train": examples, "validation": examples},
        features=(Feature(name="word", **feature),),
        outputs=(Output(name="y"),),
        task="regression",
        batch=len(rows),
        seed=0,
        alignment="start",
    )


def embed(source: Source) -> History:
    """One epoch of an embedding of five tokens."""
    layers = [{"kind": "embedding", "vocabulary": 5, "units": 2}, *LSTM]
    net = network(layers, source.features, outputs=1, spread=0.0)
    return Trainer(net, source, training(epochs=1)).fit()


@pytest.mark.parametrize("wrong", [5.0, 4.6, -1.0, -0.6, 1e9, math.nan, math.inf])
def test_token_outside_the_vocabulary_is_an_error_in_training(wrong: float) -> None:
    """The network would take the nearest one and learn from another text than the one that was given."""
    with pytest.raises(ConfigError, match=r"feature 'word' is .* at step 1 of row 0 of a batch, .* are 0 to 4\. Enl"):
        embed(tokens([4, wrong, 0]))


def test_token_outside_the_vocabulary_is_an_error_in_validation() -> None:
    """The loss that decides which weights are kept is not measured on other tokens either."""
    source, bad = tokens([4, 1, 0]), tokens([4, 1, 7])
    with pytest.raises(ConfigError, match="is 7 at step 2"):
        embed(replace(source, splits={**source.splits, "validation": bad.splits["validation"]}))


def test_normalised_tokens_are_an_error() -> None:
    """A reader's default for numbers makes other numbers of them."""
    with pytest.raises(ConfigError, match=r"is 0, to the network -2 at step 0 .* Do not normalise tokens\."):
        embed(tokens([0, 2, 4], mean=2.0))


def test_tokens_of_the_vocabulary_padding_and_missing_ones_train() -> None:
    """Nothing is looked at under the mask; a missing token is what the feature's policy says."""
    assert embed(tokens([0, 4, 3], [1])).updates == 1
    assert embed(tokens([0, math.nan, 3], missing="zero")).updates == 1
    x, mask = torch.tensor([[[2.0], [99.0]]]), torch.tensor([[True, False]])
    batch = Batch(x, torch.zeros(1, 2, 1), mask)
    check_tokens(batch, vocabulary=5, feature=Feature(name="word"))
    with pytest.raises(ConfigError, match="is 99 at step 1"):
        check_tokens(replace(batch, x_mask=None), vocabulary=5, feature=Feature(name="word"))


def test_many_to_one_row_without_a_label_at_its_last_step_counts_nothing() -> None:
    """Labels of earlier steps do not stand in for it."""
    batch = Batch(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1), None, torch.tensor([[True, True, False], [True] * 3]))
    settled = settle(batch, fillable=torch.tensor([False]), summary=True)
    assert settled.y_mask is not None
    assert settled.y_mask.tolist() == [[False] * 3, [False, False, True]]
    per_output = replace(batch, y=torch.zeros(2, 3, 2), y_mask=torch.tensor([[[True, False]] * 3] * 2))
    settled = settle(per_output, fillable=torch.tensor([False]), summary=True)
    assert settled.y_mask is not None
    assert settled.y_mask[:, :2].sum() == 0
    assert settled.y_mask[:, 2].tolist() == [[True, False]] * 2
