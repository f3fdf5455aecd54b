"""How fast training is: against a bare torch loop, peepholes against none, bucketed lengths against padded ones.

`python -m benchmarks` prints these ratios. Rivals take turns on one thread, the fastest turn of each counts, and time
is the processor's: on a busy machine the clock on the wall measures the neighbours.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcast.manifest import Feature, Output

from .config import TrainingConfig
from .data.in_memory import Examples, InMemory
from .layers.cell_specs import GravesLstmSpec, LstmSpec
from .layers.specs import RnnOutputSpec
from .network import Network
from .progress import Progress
from .train import Trainer

SYMBOLS, UNITS, ROWS, STEPS, SEGMENT = 64, 256, 32, 200, 50  # of the character recipe
FEW_UNITS = 16
CLIP, RATE = 1.0, 1e-3


def compare(quick: bool = False) -> dict[str, float]:
    """Ratios by what they compare; above 1, the first is faster. What a first epoch costs is in time, as it says.

    Args:
        quick: One turn with tiny layers, to see that it runs; the ratios mean nothing then.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _ratios(FEW_UNITS, 32, turns=1) if quick else _ratios(UNITS, 512, turns=20)
    finally:
        torch.set_num_threads(threads)


def _ratios(units: int, sequences: int, turns: int) -> dict[str, float]:
    source = _symbols()
    ours, bare = _epoch("lstm", source, units), _bare_epoch(source, units)
    peepholes, one_layer = (_epoch(kind, source, units, layers=1) for kind in ("graves_lstm", "lstm"))
    padded, bucketed = (_epoch("lstm", _lengths(bucket, sequences), units, layers=1) for bucket in (0, 16))
    first = _seconds(peepholes)
    return {
        "LSTM with TBPTT / bare torch.nn.LSTM loop (wanted: 0.95)": _faster(ours, bare, turns),
        "GravesLSTM / LSTM, both warm (wanted: 0.6)": _faster(peepholes, one_layer, turns),
        "GravesLSTM's very first epoch / a warm one, in time": round(first / _seconds(peepholes), 3),
        "length-bucketed epoch / padded epoch (wanted: 1.5)": _faster(bucketed, padded, max(1, turns // 6)),
    }


def _faster(one: Callable[[], Any], other: Callable[[], Any], turns: int) -> float:
    """How many times faster `one` is than `other`, both warm."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(turns + 1):
        for which, run in enumerate((one, other)):
            spent = _seconds(run)
            if turn:  # the first turn warms up
                seconds[which].append(spent)
    return round(min(seconds[1]) / min(seconds[0]), 3)


def _seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _symbols() -> InMemory:
    """One batch of one-hot symbols; the label is the next one."""
    symbols = np.random.default_rng(0).integers(0, SYMBOLS, (ROWS, STEPS + 1))
    one_hot = np.eye(SYMBOLS, dtype=np.float32)[symbols]
    return _source(Examples(list(one_hot[:, :-1]), list(one_hot[:, 1:])))


def _lengths(bucket: int, sequences: int) -> InMemory:
    """Sequences of 5 to 400 steps, most of them short, as sentences are."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.5, 0.9, sequences).astype(int), 5, 400)
    one_hot = [np.eye(SYMBOLS, dtype=np.float32)[random.integers(0, SYMBOLS, n + 1)] for n in lengths]
    return _source(Examples([s[:-1] for s in one_hot], [s[1:] for s in one_hot]), bucket)


def _source(examples: Examples, bucket: int = 0) -> InMemory:
    classes = tuple(f"symbol {i}" for i in range(SYMBOLS))
    return InMemory(
        splits={"train": examples},
        features=(Feature(name="symbol", width=SYMBOLS),),
        outputs=tuple(Output(name=name) for name in classes),
        task="classification",
        classes=classes,
        batch=ROWS,
        seed=0,
        alignment="start",
        bucket=bucket,
    )


def _epoch(kind: str, source: InMemory, units: int, layers: int = 2) -> Callable[[], float]:
    """One epoch of ours: two layers, clipping, Adam."""
    cell = {"kind": kind, "units": units}
    spec = GravesLstmSpec.model_validate(cell) if kind == "graves_lstm" else LstmSpec.model_validate(cell)
    network = Network.of([spec] * layers + [RnnOutputSpec(kind="rnn_output")], source)
    config = TrainingConfig(
        backprop="truncated",
        tbptt_forward=SEGMENT,
        gradient="clip_global_norm",
        gradient_threshold=CLIP,
        learning_rate=RATE,
    )
    trainer, silent = Trainer(network, source, config), Progress.silent()
    return lambda: trainer.epoch(0, silent)


class _Bare(nn.Module):
    """What one would write without this package."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(SYMBOLS, units, num_layers=2, batch_first=True)
        self.out = nn.Linear(units, SYMBOLS)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, state = self.lstm(x, state)
        return self.out(h), state


def _bare_epoch(source: InMemory, units: int) -> Callable[[], None]:
    """The same batch, segments, clipping and optimiser in a bare loop."""
    net = _Bare(units)
    optimiser = torch.optim.Adam(net.parameters(), RATE)

    def run() -> None:
        for batch in source.batches("train"):
            labels = batch.y.argmax(dim=2)
            state = torch.zeros(2, ROWS, units), torch.zeros(2, ROWS, units)
            for start in range(0, STEPS, SEGMENT):
                part = slice(start, start + SEGMENT)
                optimiser.zero_grad(set_to_none=True)
                z, (h, c) = net(batch.x[:, part], state)
                F.cross_entropy(z.flatten(0, 1), labels[:, part].flatten()).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(net.parameters(), CLIP)
                optimiser.step()
                state = h.detach(), c.detach()

    return run
