"""One process or many: what torchrun's environment says, and the few sums that have to be taken over all of them."""

import gc
import os
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepcast.errors import ConfigError

from .data.batch import Batch


@dataclass(frozen=True, slots=True)
class World:
    """All processes of a run. Every process reads the same batches and takes its share of their rows."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Is this the process that prints and writes?"""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """A number, summed over all processes."""
        if self.size > 1:
            value = value.to(self.device, copy=True)  # nccl sums on its own device only
            dist.all_reduce(value)
        return value

    def share(self, batch: Batch) -> Batch:
        """This process's rows. One that would go empty takes a row without its labels, to stay in step."""
        if self.size == 1:
            return batch
        rows = torch.arange(self.rank, batch.x.shape[0], self.size)
        if len(rows):
            return rows_of(batch, rows)
        batch = rows_of(batch, torch.tensor([0]))
        return replace(batch, y_mask=torch.zeros(batch.y.shape[:2], dtype=torch.bool))

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as it is, or averaging its gradients over all processes."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch."""
    return batch.each(lambda tensor: tensor[rows])


def leading() -> bool:
    """Is this the process that prints, going by torchrun's environment alone? For use before `join`."""
    return os.environ.get("RANK", "0") == "0"


def join(device: str) -> World:
    """Join the run torchrun describes, if any, and choose this process's device.

    Args:
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError: CUDA is asked for and is not there, or not for so many processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"training.device: {device!r} is asked for, torch sees no CUDA device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local}"
        if local >= (there := torch.cuda.device_count()):
            raise ConfigError(
                f"torchrun has a process {local} on this machine, torch sees {there} CUDA device(s). "
                "Start fewer processes, or set training.device: cpu."
            )
    if device != "cpu":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return World(rank, size, torch.device(device))


def leave() -> None:
    """Leave the run at its end; the caller has let go of what `wrap` made.

    A wrapped network lies in a cycle and holds gloo's threads: if one is still alive when Python ends, it aborts the
    process, and torchrun then ends the one that exports.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
