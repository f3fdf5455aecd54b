"""Rows of many sessions through the model: each session's in order, different sessions' together.

Sessions go in blocks. Where many of a block have a step, they take it by the graph for single steps, as a server's
batches do. Where few have many steps each, they take a stretch of them in one run of model.onnx (the sequence way,
padded on the right). Both are the same mathematics; which one it is depends on the numbers of rows alone, so a run that
was interrupted goes on with the same bits.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from stepcast.errors import NonFinite

from ..engine.arrays import Bytes, Floats
from ..engine.model import Runtime

Ints = npt.NDArray[np.int64]

MANY: Final = 64
"""So many sessions and more take single steps: a run of them costs as little per row as one of sequences."""
CELLS: Final = 4096
"""Sessions times steps of a stretch, about,"""
LEAST_STEPS: Final = 8
MOST_STEPS: Final = 512


@dataclass(frozen=True, eq=False)
class Turns:
    """Which rows are whose: session s has the rows `order[starts[s] : starts[s] + counts[s]]`, in this order."""

    order: Ints
    starts: Ints  # (S,)
    counts: Ints  # (S,)


@dataclass(eq=False)
class _Block:
    """B sessions, those with most rows first."""

    turns: Turns
    now: Bytes  # (L, row_bytes), the states of the first ones, which have steps left
    last: Bytes  # (B, row_bytes), and of those that have none

    def retire(self, live: int) -> None:
        """From now on the first `live` have steps left."""
        self.last[live : len(self.now)] = self.now[live:]
        self.now = self.now[:live]

    def rows(self, at: int, steps: int) -> Ints:
        """The next rows (L, T) of those that have steps left, -1 behind a session's last one."""
        turns, live = self.turns, len(self.now)
        steps_at = at + np.arange(steps)
        there = steps_at < turns.counts[:live, None]
        places = np.where(there, turns.starts[:live, None] + steps_at, 0)
        return np.where(there, turns.order[places], -1)


class Runner:
    """Steps rows through a model; `batch_rows` is the most sessions that run together."""

    def __init__(self, runtime: Runtime, batch_rows: int) -> None:
        self._runtime, self._batch_rows = runtime, batch_rows

    def run(self, x: Floats, turns: Turns, states: Bytes, slots: Ints) -> tuple[Floats, list[int]]:
        """Step S sessions through their rows of x (R, F).

        Args:
            states: Packed, (.., row_bytes); session s has the one at slots[s], which becomes the new one.

        Returns:
            Outputs (R, O), NaN where a row was not stepped; and the rows that would have made an output or a state
            infinite: their sessions go on as if they had not come.
        """
        y = np.full((len(x), self._runtime.manifest.n_outputs), np.nan, np.float32)
        failed: list[int] = []
        longest_first = np.argsort(-turns.counts, kind="stable")
        for start in range(0, len(longest_first), self._batch_rows):
            chosen = longest_first[start : start + self._batch_rows]
            own = Turns(turns.order, turns.starts[chosen], turns.counts[chosen])
            now = states[slots[chosen]]
            block = _Block(own, now, np.empty_like(now))
            self._run(block, x, y, failed)
            states[slots[chosen]] = block.last
        return y, failed

    def _run(self, block: _Block, x: Floats, y: Floats, failed: list[int]) -> None:
        counts, at = block.turns.counts, 0
        longest = int(counts[0])
        while at < longest:
            live = int(np.count_nonzero(counts > at))
            block.retire(live)
            steps = min(longest - at, int(np.clip(CELLS // live, LEAST_STEPS, MOST_STEPS)))
            if live >= MANY or steps == 1:
                self._single(block, block.rows(at, 1)[:, 0], x, y, failed)
                at += 1
            else:
                self._stretch(block, block.rows(at, steps), x, y, failed)
                at += steps
        block.retire(0)

    def _single(self, block: _Block, rows: Ints, x: Floats, y: Floats, failed: list[int]) -> None:
        """One step of all that have one left."""
        fed, new = x[rows], np.empty_like(block.now)
        try:
            y[rows] = self._runtime.step(fed, [block.now], [new])
        except NonFinite:  # each alone, so that the guilty one fails alone
            for place, row in enumerate(rows):
                one = slice(place, place + 1)
                try:
                    y[row] = self._runtime.step(fed[one], [block.now[one]], [new[one]])[0]
                except NonFinite:
                    new[one] = block.now[one]
                    failed.append(int(row))
        block.now = new

    def _stretch(self, block: _Block, rows: Ints, x: Floats, y: Floats, failed: list[int]) -> None:
        """Several steps of all that have some left: rows (B, T) of x, -1 behind a session's last one."""
        there = rows >= 0
        lengths = there.sum(axis=1, dtype=np.int32)
        fed = np.where(there[..., None], x[rows], np.float32(0))
        try:
            outputs, new = self._runtime.run(fed, None if there.all() else lengths, block.now)
        except NonFinite:
            whole = block.now
            for step in range(rows.shape[1]):
                live = np.flatnonzero(there[:, step])
                block.now = whole[live]
                self._single(block, rows[live, step], x, y, failed)
                whole[live] = block.now
            block.now = whole
            return
        y[rows[there]] = outputs[there]
        block.now = new
