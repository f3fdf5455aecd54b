"""`train --sweep`: many trainings of one recipe, each with other values, and the best one exported.

optuna proposes the values (tree-structured Parzen estimator, seeded by the recipe's seed) and ends early what does
worse than the median of the trials before it at the same epoch. What is compared is the best validation loss.
"""

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

from stepcast.errors import ConfigError

from .job import Job, fit, open_job
from .parallel import World, join
from .progress import Progress

Scalar = bool | int | float | str | None
STUDY_FILE = "study.log"
SHOWN = 10  # trials in the table


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RangeConfig(_Strict):
    """Numbers from `low` to `high`, both included; whole ones if both are."""

    low: int | float
    high: int | float
    log: bool = Field(default=False, description="as many between 0.001 and 0.01 as between 0.01 and 0.1")
    step: int | float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log wants low above 0 and no step")
        return self


class ChoicesConfig(_Strict):
    """One of several values."""

    choices: tuple[Scalar, ...] = Field(min_length=1)


class SweepConfig(_Strict):
    """The file of `--sweep`."""

    trials: int = Field(default=20, ge=1)
    prune: bool = Field(default=True, description="end a trial that is worse than the median of those before it")
    parameters: dict[str, RangeConfig | ChoicesConfig] = Field(
        min_length=1, description="by key.path into the recipe, as `--set` takes it"
    )


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep's file.

    Raises:
        ConfigError: with the path of every value that is wrong.
    """
    try:
        return SweepConfig.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {error}") from error
    except ValidationError as error:
        told = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors())
        raise ConfigError(f"{path}: " + "; ".join(told)) from error


class Reporting(Progress):
    """Tells a trial each epoch's loss, and ends it if it is told to."""

    def __init__(self, trial: Any, prune: bool) -> None:
        super().__init__(0)
        self._trial, self._prune = trial, prune

    def epoch(self, number: int, train_loss: float, validation_loss: float | None, seconds: float) -> None:
        """See `Progress.epoch`."""
        self._trial.report(train_loss if validation_loss is None else validation_loss, number)
        if self._prune and self._trial.should_prune():
            raise _optuna().TrialPruned


def sweep(job: Job) -> Job:
    """Run the trials that are missing.

    Each one has its checkpoints in runs/<name>/sweep/<number>/. With --resume the study goes on, else it begins anew.

    Returns:
        The best trial as a job, to be exported.

    Raises:
        ConfigError: the file is wrong, there are several processes, or no trial came to its end.
    """
    optuna, config = _optuna(), load_sweep(job.arguments.sweep)
    world = join(job.config.training.device)
    if world.size > 1:
        raise ConfigError(f"--sweep runs in one process, torchrun started {world.size}")
    folder = job.run_directory / "sweep"
    if not job.arguments.resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(folder / STUDY_FILE)),
        ),
        study_name=job.config.name,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=job.config.seed),
        pruner=optuna.pruners.MedianPruner(),
    )
    missing = config.trials - sum(trial.state.is_finished() for trial in study.trials)
    for _ in range(missing):
        _try(study, config, job, folder, world)
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not done:
        raise ConfigError(f"{job.arguments.sweep}: none of {len(study.trials)} trials came to its end")
    job.console.print(_table(study.trials))
    best = min(done, key=lambda trial: trial.value)
    values = best.user_attrs["set"]
    told = " ".join(f"--set {value}" for value in values)
    job.console.print(f"best: trial {best.number}, {told}", highlight=False, soft_wrap=True)
    return _job_of(job, values, folder, best.number, job.console)


def _try(study: Any, config: SweepConfig, job: Job, folder: Path, world: World) -> None:
    """One trial, from its values to its loss."""
    optuna, state = _optuna(), _optuna().trial.TrialState
    trial = study.ask()
    values = [f"{key}={_written(_suggested(trial, key, space))}" for key, space in config.parameters.items()]
    trial.set_user_attr("set", values)
    told = f"trial {trial.number}: {', '.join(values)}: "
    try:
        one = _job_of(job, values, folder, trial.number, Console(quiet=True))
        _, history = fit(one, world, Reporting(trial, config.prune))
    except optuna.TrialPruned:
        study.tell(trial, state=state.PRUNED)
        job.console.print(f"{told}worse than the median, ended early", highlight=False, soft_wrap=True)
    except ConfigError as error:
        study.tell(trial, state=state.FAIL)
        job.console.print(f"{told}{error}", highlight=False, soft_wrap=True)
    else:
        study.tell(trial, history.best)
        job.console.print(f"{told}{history.best:.6g}", highlight=False, soft_wrap=True)


def _job_of(job: Job, values: list[str], folder: Path, number: int, console: Console) -> Job:
    """The job of a trial: the recipe with its values, its checkpoints in a folder of its own."""
    given = vars(job.arguments)
    own = {"set": [*job.arguments.set, *values], "runs": folder / str(number), "resume": False}
    opened = open_job(argparse.Namespace(**{**given, **own}), console)
    return replace(opened, console=console)


def _suggested(trial: Any, key: str, space: RangeConfig | ChoicesConfig) -> Scalar:
    if isinstance(space, ChoicesConfig):
        chosen: Scalar = trial.suggest_categorical(key, space.choices)
        return chosen
    options: Mapping[str, Any] = {"log": space.log, **({} if space.step is None else {"step": space.step})}
    whole = isinstance(space.low, int) and isinstance(space.high, int)
    number: float = (trial.suggest_int if whole else trial.suggest_float)(key, space.low, space.high, **options)
    return number


def _written(value: Scalar) -> str:
    """A value as `--set` takes it: YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _table(trials: list[Any]) -> Table:
    """The best trials; one that was ended early has the loss it had then."""
    done = sorted((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value)
    table = Table(title=f"Sweep, {len(trials)} trials", title_justify="left")
    for name in ("trial", "validation loss", "ended", "values"):
        table.add_column(name, justify="left" if name == "values" else "right")
    for trial in done[:SHOWN]:
        ended = "early" if trial.state.name == "PRUNED" else ""
        table.add_row(str(trial.number), f"{trial.value:.6g}", ended, " ".join(trial.user_attrs["set"]))
    return table


def _optuna() -> Any:
    try:
        import optuna  # an extra of its own: nothing else needs it, and it is slow to import
    except ImportError as error:
        raise ConfigError("--sweep needs optuna. pip install 'stepcast[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
