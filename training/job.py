"""What every command starts from, and the training of one network by one recipe."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from .check import check_held_out, check_names
from .config import Config, load
from .data.source import Source
from .network import Network
from .parallel import World, join
from .progress import Progress
from .start import begin
from .train import History, Trainer


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe with its overrides, and the data it names."""

    arguments: argparse.Namespace
    config: Config
    source: Source
    console: Console

    @property
    def run_directory(self) -> Path:
        """Where checkpoints of this model lie."""
        return Path(self.arguments.runs) / self.config.name


def open_job(arguments: argparse.Namespace, console: Console) -> Job:
    """Read the recipe and open its data.

    Raises:
        ConfigError: either cannot be.
    """
    config = load(arguments.config, arguments.set)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    source = config.data.open(batch=config.training.batch, seed=config.seed, root=arguments.config.absolute().parent)
    console.print(f"{config.name}: {source.description}", highlight=False)
    return Job(arguments, config, source, console)


def fit(job: Job, world: World, progress: Progress | None = None) -> tuple[Network, History]:
    """Train the job's network from its beginning, or from its last checkpoint if the command says so.

    Returns:
        The network with its best weights, and how it went.
    """
    config = job.config
    torch.manual_seed(config.seed)
    network = Network.of(config.network, job.source)
    check_names(network, job.source, config)
    check_held_out(network, job.source, config)
    if (start := config.training.start) is not None:
        taken = begin(network, start, job.arguments.config.absolute().parent)
        job.console.print(f"begins with the weights of {start.file}: {', '.join(taken)}", highlight=False)
    trainer = Trainer(network, job.source, config.training, world=world, seed=config.seed, directory=job.run_directory)
    weights = sum(p.numel() for p in network.parameters() if p.requires_grad)
    job.console.print(f"{weights} weights, {world.device}, {world.size} process(es)", highlight=False)
    return network, trainer.fit(resume=job.arguments.resume, progress=progress)


def fit_anew(config: Config, source: Source) -> tuple[Network, History]:
    """Train a network of a recipe on another source: from drawn weights, without checkpoints, in this process alone."""
    torch.manual_seed(config.seed)
    network = Network.of(config.network, source)
    check_held_out(network, source, config)
    world = World(device=join(config.training.device).device)
    return network, Trainer(network, source, config.training, world=world, seed=config.seed).fit()
