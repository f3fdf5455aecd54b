"""Measures an exported model as it will be served: onnxruntime, one step at a time."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from .data.batch import Batch, check_lanes
from .data.source import Source, Split
from .metrics import RegressionResult, Result, metrics_for, presence
from .probabilistic import DistributionMetrics
from .segments import settle
from .stepper import Floats, States, Stepper


def evaluate(
    stepper: Stepper,
    source: Source,
    split: Split,
    *,
    streaming: bool = True,
    summary: bool = False,
    distribution: DistributionMetrics | None = None,
) -> Result:
    """The masked metrics of a split.

    Args:
        stepper: The exported model.
        source: Where the sequences come from.
        split: Which of them.
        streaming: False for a model that only takes whole sequences.
        summary: Does only a row's last answer count?
        distribution: Measures the distributions, too, of a model that forecasts them.
    """
    metrics = metrics_for(source.outputs, source.classes, source.task)
    for batch, y in answers(stepper, source, split, streaming=streaming, summary=summary):
        mask = None if batch.y_mask is None else batch.y_mask.numpy()
        metrics.update(y[..., : len(source.outputs)], batch.y.numpy(), mask)
        if distribution is not None:
            distribution.update(y, batch.y.numpy(), presence(mask, batch.y.shape))
    result = metrics.result()
    if distribution is None or not isinstance(result, RegressionResult):
        return result
    return replace(result, distribution=distribution.result())


def answers(
    stepper: Stepper, source: Source, split: Split, *, streaming: bool = True, summary: bool = False
) -> Iterator[tuple[Batch, Floats]]:
    """Each batch of a split with its answers (B, T, O); 0 at absent steps."""
    fillable = np.repeat([f.missing != "refuse" for f in source.features], [f.width for f in source.features])
    states: States | None = None
    for batch in source.batches(split):
        batch = settle(batch, fillable=torch.from_numpy(fillable), summary=summary)
        states = _opening_states(stepper, batch, states)
        present = present_steps(batch)
        x = batch.x.numpy()
        if streaming:
            y, states = replay(stepper, x, present, states)
        else:
            y = whole(stepper, x, present)
        yield batch, y


def replay(stepper: Stepper, x: Floats, present: NDArray[np.bool_], states: States) -> tuple[Floats, States]:
    """One step at a time; an absent step is a row of length 0, which leaves the state alone."""
    outputs = []
    for t in range(x.shape[1]):
        step = np.ascontiguousarray(x[:, t : t + 1])
        y, states = stepper.run(step, present[:, t].astype(np.int32), states)
        outputs.append(np.where(present[:, t, None], y[:, 0], 0.0))
    return np.stack(outputs, axis=1), states


def whole(stepper: Stepper, x: Floats, present: NDArray[np.bool_]) -> Floats:
    """One call for each row, over its present steps: for models that cannot be stepped."""
    outputs = None
    for row in range(x.shape[0]):
        steps = x[row : row + 1, present[row]]
        if steps.shape[1] == 0:
            continue
        y, _ = stepper.run(steps, np.array([steps.shape[1]], np.int32), stepper.initial_states(1))
        outputs = np.zeros((*x.shape[:2], y.shape[2]), np.float32) if outputs is None else outputs
        outputs[row, present[row]] = y[0]
    assert outputs is not None
    return outputs


def present_steps(batch: Batch) -> NDArray[np.bool_]:
    """(B, T), True where a step is there."""
    shape = (batch.x.shape[0], batch.x.shape[1])
    return np.ones(shape, np.bool_) if batch.x_mask is None else np.asarray(batch.x_mask.numpy())


def _opening_states(stepper: Stepper, batch: Batch, states: States | None) -> States:
    """Fresh states for rows that start a sequence, the old ones for lanes that go on."""
    fresh = stepper.initial_states(batch.x.shape[0])
    fresh |= {f"{n}.{k}": t.numpy() for n, layer in (batch.begin or {}).items() for k, t in layer.items()}
    if states is None or batch.starts is None:
        return fresh
    check_lanes(next((len(old) for old in states.values()), len(batch.starts)), batch)
    starts = batch.starts.numpy()
    return {name: np.where(starts.reshape(-1, *[1] * (old.ndim - 1)), fresh[name], old) for name, old in states.items()}
