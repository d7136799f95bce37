"""Process groups started by torchrun, with gloo on CPUs and NCCL on GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from tcam_diff.errors import UserError


@dataclass(frozen=True)
class Distributed:
    """A process of a group: its rank, the number of processes, and its device."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether a flag is true on any rank, for decisions that all ranks must share."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)


def first_process() -> bool:
    """Whether this is the process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def device_of(name: str, local_rank: int = 0) -> torch.device:
    """Device of a name such as cuda:1; "auto" is a GPU if there is one. Raises UserError if the device does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: expected auto, cpu, cuda or cuda:0, cuda:1, ..., got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device: {name}, but torch {torch.__version__} sees no GPU; take device=cpu")
        return torch.device("cuda", local_rank if device.index is None else device.index)
    return device


@contextmanager
def distributed(device: str = "auto", patience: timedelta = timedelta(minutes=10)) -> Iterator[Distributed]:
    """Join the process group that torchrun started, or run as a single process. If one process fails, torchrun ends all.

    Args:
        device: auto, cpu, cuda, ...
        patience: longest time that a rank waits for the others.

    Raises:
        UserError: the device does not exist, or another rank has ended.
    """
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
    where = device_of(device, local)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if world == 1:
        yield Distributed(0, 1, where)
        return
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=patience)
    try:
        yield Distributed(rank, world, where)
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("gloo", "nccl", "process group")):
            raise
        raise UserError(
            f"rank {rank}: another rank has ended ({str(error).splitlines()[0]}); see its message. Start again, training with "
            "--resume auto, with any number of processes that divides batch"
        ) from error
    finally:
        dist.destroy_process_group()
