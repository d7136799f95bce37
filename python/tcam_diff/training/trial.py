"""Short trials of a training, from which the memory, disk space and time of a whole run are estimated."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tcam_diff.training import checkpoint
from tcam_diff.training.config import RunConfig
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.loop import Task, peak_memory


@dataclass
class Requirements:
    """Requirements of one process, in bytes and seconds."""

    host: float  # peak memory of the host
    device: float  # peak memory of the GPU, 0 on a CPU
    disk: float  # at the end of the run
    disk_most: float  # during the run, with an older best checkpoint and one being written
    seconds: float  # of the whole run
    step: float  # seconds per step


def seconds_per_step(task: Task, seconds: float) -> float:
    """Mean time of a step after a warm-up, measured for about ``seconds``."""
    start, index, mark, warm = time.monotonic(), 0, time.monotonic(), 0
    while True:
        loss = task.step(index)["loss"]
        index += 1
        if index == 3 or (index < 3 and time.monotonic() - start > seconds / 3):
            float(loss)
            mark, warm = time.monotonic(), index
        if (index > max(warm, 3) and time.monotonic() - start > seconds) or index == task.steps:
            float(loss)  # waits for the device
            return (time.monotonic() - mark) / max(1, index - warm)


def write_checkpoint(task: Task, folder: Path, group: Distributed) -> tuple[float, float]:
    """Write a checkpoint. Returns its seconds and bytes."""
    start = time.monotonic()
    shared = {"task": task.shared_state(), "seconds": 0.0}
    path = checkpoint.save(folder / "checkpoints", 1, shared, task.shard_state(), group)
    return time.monotonic() - start, float(sum(p.stat().st_size for p in path.iterdir()))


def occasions(config: RunConfig) -> tuple[int, int]:
    """Numbers of evaluations and of checkpoints of a run. A checkpoint is written after every evaluation, too."""
    at = [{*range(n, config.steps + 1, n), config.steps} for n in (config.evaluation_steps(), config.checkpoint_steps())]
    return len(at[0]), len(at[0] | at[1])


def disk_space(config: RunConfig, checkpoint_bytes: float) -> tuple[float, float]:
    """Bytes of the checkpoints of a run, at its end and at most."""
    _, checkpoints = occasions(config)
    return min(checkpoints, config.keep) * checkpoint_bytes, min(checkpoints, config.keep + 2) * checkpoint_bytes


def memory(device: torch.device) -> tuple[float, float]:
    """Peak memory of the host and of the GPU, 0 on a CPU, in bytes."""
    return peak_memory(torch.device("cpu")), peak_memory(device) if device.type == "cuda" else 0.0
