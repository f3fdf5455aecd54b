"""Whether a row's answer is the same bits whatever rows run beside it: tried on this machine when a version is loaded.

Law 2 holds within the manifest's tolerance for every model. A matrix kernel may sum in another order for another number
of rows; where a version passes here, it did not, in any batch that was tried.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np

from stepcast.errors import NonFinite

from .arrays import Array, Bytes, Floats, Ints
from .buffers import row_type, rows_of
from .golden import Golden
from .model import Runtime

_ROWS_ALONE: Final = 34  # different rows; batches of any size are made of them
_STEPS: Final = 3  # of the longest call
_BUDGET_S: Final = 0.5  # of one trial; a large model is tried in batches as large as there is time for

Batch = Callable[[Ints], tuple[Floats, Bytes]]
"""Runs these of the rows together: outputs (B, ...) and packed states (B, row_bytes)."""


class Trial(NamedTuple):
    """What was found.

    Attributes:
        exact: Whether every row was bit-equal to itself alone.
        rows: The largest batch that was tried.
        difference: The largest absolute difference of an output or a state.
    """

    exact: bool
    rows: int
    difference: float


class BatchInvariance(NamedTuple):
    """Trials of single steps, and of calls of several steps; None where there are none, or nothing could be tried."""

    steps: Trial | None
    calls: Trial | None

    def document(self) -> dict[str, dict[str, Any] | None]:
        """As it is answered."""
        return {name: None if trial is None else trial._asdict() for name, trial in self._asdict().items()}

    def __str__(self) -> str:
        told = []
        for name, trial in self._asdict().items():
            if trial is not None:
                found = "bit-equal" if trial.exact else f"equal within {trial.difference:.2g}"
                told.append(f"{name} are {found} in batches of up to {trial.rows} rows")
        return ", ".join(told) or "batches were not tried, since what they would compute is not finite"


def try_batches(runtime: Runtime, most_rows: int) -> BatchInvariance:
    """Compare rows alone with the same rows in batches of 1, 2, 3, 5, 8, ... `most_rows`.

    Readings are those of golden.npz, so that tokens are tokens; states are those that it ends with, and random ones.
    Single steps run by the graph that serves them. A call's rows differ in length, and are not padded when alone. It
    takes about a second at most, for a model of a few layers some milliseconds.
    """
    random = np.random.default_rng(0)
    x, states = _rows(runtime, random)
    lengths = random.integers(2, _STEPS + 1, len(x)).astype(np.int32)

    def step(pick: Ints) -> tuple[Floats, Bytes]:
        after = np.empty((len(pick), runtime.row_bytes), np.uint8)
        return runtime.step(x[pick, 0], [states[pick]], [after]), after

    def call(pick: Ints) -> tuple[Floats, Bytes]:
        each = lengths[pick]
        y = np.zeros((len(pick), _STEPS, runtime.manifest.n_outputs), np.float32)
        found, after = runtime.run(x[pick, : each.max()], each, states[pick])
        there = np.arange(_STEPS) < each[:, None]  # (B, T)
        y[there] = found[there[:, : each.max()]]
        return y, after

    def trial(run: Batch) -> Trial | None:
        try:
            return _try(run, runtime, most_rows, random)
        except NonFinite:
            return None

    return BatchInvariance(trial(step) if runtime.manifest.streaming else None, trial(call))


def _rows(runtime: Runtime, random: np.random.Generator) -> tuple[Floats, Bytes]:
    """Readings (_ROWS_ALONE, _STEPS, F) and packed states (_ROWS_ALONE, row_bytes), every other one scaled at random.

    Scaled towards zero, that is: a state that is never negative, such as a variance, stays one.
    """
    readings, used = Golden(runtime.directory, runtime.manifest).samples()
    x = readings[random.integers(0, len(readings), (_ROWS_ALONE, _STEPS))]
    states = used[random.integers(0, len(used), _ROWS_ALONE)]
    for tensor in rows_of(states, row_type(runtime.manifest)).values():
        if tensor.dtype.kind == "f":
            tensor[::2] *= random.random(tensor[::2].shape).astype(tensor.dtype)
    return x, states


def _try(run: Batch, runtime: Runtime, most_rows: int, random: np.random.Generator) -> Trial:
    deadline = time.monotonic() + _BUDGET_S
    lone = [run(np.array([row])) for row in range(_ROWS_ALONE)]
    y, states = (np.concatenate(parts) for parts in zip(*lone, strict=True))
    exact, difference, tried = True, 0.0, 0
    for size in _sizes(most_rows):
        if tried >= 3 and time.monotonic() > deadline:
            break
        pick = random.integers(0, _ROWS_ALONE, size)
        got_y, got_states = run(pick)
        if got_y.tobytes() != y[pick].tobytes() or got_states.tobytes() != states[pick].tobytes():
            got, want = (rows_of(packed, row_type(runtime.manifest)) for packed in (got_states, states[pick]))
            pairs = [(got_y, y[pick]), *((got[name], want[name]) for name in got)]
            exact, difference = False, max(difference, *(_distance(*pair) for pair in pairs))
        tried = size
    return Trial(exact, tried, difference)


def _distance(a: Array, b: Array) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))


def _sizes(most: int) -> Iterator[int]:
    """1, 2, 3, 5, 8, ... below `most`, and `most`."""
    size, following = 1, 2
    while size < most:
        yield size
        size, following = following, size + following
    yield most
