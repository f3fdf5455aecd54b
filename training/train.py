"""The training loop: carry the state, cut the gradient, masked loss, clip, step, validate."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepcast.errors import ConfigError

from .averaging import AveragedWeights
from .check import check_labels
from .checkpoint import LAST_FILE, check_meaning, fitting, load_checkpoint, meaning_of, save_checkpoint
from .config import TrainingConfig
from .data.batch import Batch, check_lanes
from .data.prefetch import prefetched
from .data.source import Source, Split
from .layers.base import State
from .network import Network, detached, restarted, rows_of_state
from .optimise import make_optimiser, normalise_gradients, penalise, rate_factor
from .parallel import World
from .progress import Progress
from .segments import check_tokens, cut, labelled, settle, to_device

VALIDATION_BLOCK = 1024  # steps per pass where nothing has to be remembered for gradients


@dataclass
class History:
    """What happened so far; part of every checkpoint."""

    epoch: int = 0  # epochs done
    updates: int = 0
    best: float = float("inf")
    best_epoch: int = -1
    losses: list[tuple[float, float]] = field(default_factory=list)  # training, validation

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: how the loss went, to six digits; None where it is not finite."""
        training, validation = ([_rounded(pair[side]) for pair in self.losses] for side in (0, 1))
        return {
            "updates": self.updates,
            "best_epoch": self.best_epoch + 1,
            "loss": training,
            "validation_loss": validation,
        }


def _rounded(loss: float) -> float | None:
    return float(f"{loss:.6g}") if math.isfinite(loss) else None


class Objective(nn.Module):
    """The network and its loss as one module, so that every process of a run averages the same gradients."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, segment: Batch, state: State, backward: int | None) -> tuple[Tensor, Tensor, State]:
        z, base, state = self.network.train_pass(segment.x, segment.x_mask, state, backward)
        total, count = self.network.head.losses(z.float(), base, segment.y, segment.y_mask)
        return total, count, state


class Trainer:
    """Trains a network on a source.

    Args:
        network: With fresh weights; trained in place.
        source: Where batches come from.
        config: How.
        world: All processes of the run.
        seed: Of the run.
        directory: Where checkpoints go; None: nowhere.
    """

    def __init__(
        self,
        network: Network,
        source: Source,
        config: TrainingConfig,
        *,
        world: World | None = None,
        seed: int = 0,
        directory: Path | None = None,
    ) -> None:
        self.world, self.source, self.config = world or World(), source, config
        self.seed, self.directory = seed, directory
        if config.precision == "float16" and self.world.device.type == "cpu":
            raise ConfigError("training.precision: float16 needs CUDA. On a CPU take bfloat16 or float32.")
        self.network = network.to(self.world.device)
        self.network.masked_steps = config.masked_steps
        self.objective = self.world.wrap(Objective(self.network))
        self.optimiser = make_optimiser(self.network, config)
        self.rates = [float(group["lr"]) for group in self.optimiser.param_groups]  # before the schedule
        self.scaler = torch.amp.GradScaler(enabled=config.precision == "float16")
        self.averaged = AveragedWeights(self.network, config.weight_average) if config.weight_average else None
        self.history = History()
        widths = [f.width for f in source.features]
        may_miss = torch.tensor([f.missing != "refuse" for f in source.features])
        self.fillable = may_miss.repeat_interleave(torch.tensor(widths)).to(self.world.device)

    def fit(self, *, resume: bool = False, progress: Progress | None = None) -> History:
        """Train until the last epoch or until patience runs out, then take the best weights.

        Raises:
            ConfigError: the data has no label to train on or one that the loss cannot take, or the loss is not finite
                from the first epoch on.
        """
        check_labels(self.network, self.source)
        progress = progress or Progress.silent()
        if resume and self.directory is not None:
            self._resume(self.directory)
        while self.history.epoch < self.config.epochs and not self._out_of_patience():
            started = time.monotonic()
            train_loss = self.epoch(self.history.epoch, progress)
            with self.averaged.in_place() if self.averaged else nullcontext():
                validation_loss = self.validate("validation")
            self._note(train_loss, train_loss if validation_loss is None else validation_loss)
            progress.epoch(self.history.epoch, train_loss, validation_loss, time.monotonic() - started)
        self._take_best()
        return self.history

    def epoch(self, epoch: int, progress: Progress) -> float:
        """One pass over the training data: truncated backpropagation through time. Returns the mean loss."""
        config = self.config
        self.network.train()
        torch.manual_seed(hash((self.seed, epoch, self.world.rank)) % 2**31)  # dropout's; a resumed run draws the same
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_factor(config, epoch)
        losses, state = Mean(self.world.device), None
        for batch, rows in self._batches("train", epoch):
            state = self._opening_state(batch, state)
            for segment in cut(batch, config.tbptt_forward if config.backprop == "truncated" else batch.x.shape[1]):
                if self.world.sum(torch.tensor(int(labelled(segment)))):
                    state = self._update(segment, rows, state, losses)
                else:  # nothing to learn here, but the state has to get past it
                    state = self._advance(segment, state)
                progress.segment(epoch)
        if losses.count == 0:
            raise ConfigError("data: no label in the training split is unmasked, nothing can be learned from it")
        return losses.value

    def _update(self, segment: Batch, rows: int, state: State, losses: "Mean") -> State:
        """One segment, one step of the optimiser. Returns the state as constants.

        Args:
            segment: This process's rows.
            rows: Of all processes.
            state: Before the segment.
            losses: Takes the segment's loss in.
        """
        self.optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            total, count, state = self.objective(segment, state, self.config.tbptt_backward)
        everywhere = self.world.sum(count)
        divisor = everywhere.clamp(min=1)  # an output layer without a label here has a sum of 0
        if self.config.average == "examples":
            divisor = torch.zeros_like(everywhere) + rows * self.network.head.parts
        # The mean over all processes: their gradients are averaged, so each one's share is taken `size` times.
        self.scaler.scale((total * self.world.size / divisor).sum()).backward()
        self.scaler.unscale_(self.optimiser)
        normalise_gradients(self.network, self.config)
        penalise(self.network, self.config)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.averaged:
            self.averaged.update()
        losses.add(self.world.sum(total.detach()), everywhere)
        self.history.updates += 1
        return detached(state)

    @torch.no_grad()
    def _advance(self, segment: Batch, state: State) -> State:
        return self.network(segment.x, segment.x_mask, state)[1]  # type: ignore[no-any-return]

    @torch.no_grad()
    def validate(self, split: Split) -> float | None:
        """Mean loss over a split, each sequence from its beginning; None if the split is empty."""
        self.network.eval()
        losses, state = Mean(self.world.device), None
        for batch, _ in self._batches(split, 0):
            state = self._opening_state(batch, state)
            whole = not self.network.streaming or self.network.summary
            for block in cut(batch, batch.x.shape[1] if whole else VALIDATION_BLOCK):
                with self._autocast():
                    z, base, state = self.network.train_pass(block.x, block.x_mask, state)
                total, count = self.network.head.losses(z.float(), base, block.y, block.y_mask)
                losses.add(self.world.sum(total), self.world.sum(count))
        return losses.value if losses.count else None

    def _batches(self, split: Split, epoch: int) -> Iterator[tuple[Batch, int]]:
        """This process's rows of each batch, ready to run, and how many rows all processes have of it."""
        features, columns = self.source.features, self.network.observed.columns
        for batch in prefetched(self.source.batches(split, epoch), self.config.prefetch):
            for reader in self.network.reads_tokens:  # before rows are shared out, so that all processes stop, not one
                feature = next(f for f in features if reader.feature in (None, f.name))
                check_tokens(batch, vocabulary=reader.vocabulary, feature=feature, column=columns[feature.name][0])
            mine = to_device(self.world.share(batch), self.world.device)
            yield settle(mine, fillable=self.fillable, summary=self.network.summary), batch.x.shape[0]

    def _opening_state(self, batch: Batch, state: State | None) -> State:
        """Fresh state for rows that start a sequence, the old one for lanes that go on."""
        rows = batch.x.shape[0]
        if state is None or batch.starts is None or bool(batch.starts.all()):
            return self.network.opening_state(rows, batch.begin)
        check_lanes(rows_of_state(state, rows), batch)
        return restarted(state, batch.starts, self.network.opening_state(rows, batch.begin))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=getattr(torch, self.config.precision))

    def _out_of_patience(self) -> bool:
        patience, history = self.config.patience, self.history
        return patience is not None and history.epoch - 1 - history.best_epoch >= patience

    def _note(self, train_loss: float, validation_loss: float) -> None:
        """Count the epoch and write the checkpoints."""
        history = self.history
        history.losses.append((train_loss, validation_loss))
        better = validation_loss < history.best
        if not better and history.best_epoch < 0:
            raise ConfigError(
                f"training: the loss is not finite after epoch {history.epoch + 1} (training {train_loss}, validation "
                f"{validation_loss}). Lower training.learning_rate, clip gradients, or look for huge numbers in it."
            )
        if better:
            history.best, history.best_epoch = validation_loss, history.epoch
            weights = self.averaged.weights if self.averaged else self.network.state_dict()
            self.best_weights = {k: v.detach().clone() for k, v in weights.items()}
        history.epoch += 1
        if self.directory is not None and self.world.leads:
            save_checkpoint(self.directory, self._everything(), best=better)

    def _everything(self) -> dict[str, Any]:
        return {
            "meaning": meaning_of(self.source),
            "network": self.network.state_dict(),
            "best": self.best_weights,
            "kind": self.config.optimiser,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged.state() if self.averaged else None,
            "history": asdict(self.history),
        }

    def _resume(self, directory: Path) -> None:
        saved = load_checkpoint(directory, self.world.device)
        if saved is None:
            return
        with fitting(directory / LAST_FILE):
            if saved["kind"] != self.config.optimiser:
                raise ValueError(f"optimiser {saved['kind']}, not {self.config.optimiser}")
            check_meaning(saved, self.source)
            self.network.load_state_dict(saved["network"])
            self.best_weights = saved["best"]
            self.optimiser.load_state_dict(saved["optimiser"])
            self.scaler.load_state_dict(saved["scaler"])
            self.history = History(**saved["history"])
            if self.averaged:
                if saved.get("averaged") is None:
                    raise ValueError("weights without their average")
                self.averaged.load(saved["averaged"])

    def _take_best(self) -> None:
        if self.history.best_epoch >= 0:
            self.network.load_state_dict(self.best_weights)
        self.network.eval()


class Mean:
    """A running mean that stays on the device until it is read; of several output layers the sum of their means."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, total: Tensor, count: Tensor) -> None:
        """Add a sum and its count."""
        self._sum = self._sum + total
        self._count = self._count + count

    @property
    def count(self) -> int:
        """How many entries so far."""
        return int(self._count.sum())

    @property
    def value(self) -> float:
        """The mean, NaN if there is nothing yet."""
        return float((self._sum / self._count.clamp(min=1)).sum()) if self.count else float("nan")
