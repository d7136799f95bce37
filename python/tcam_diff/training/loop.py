"""Training loop: steps, log, evaluations, checkpoints, stop and resume."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcam_diff.errors import UserError
from tcam_diff.progress import Progress, ProgressCallback, StopCallback
from tcam_diff.training import checkpoint
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.logger import Logger, read_metrics


class Task:
    """Parameters, optimiser and data of a training. Random numbers come from training/rng.py and are no part of its state."""

    steps: int

    #: Metric of ``evaluate`` that is high for good checkpoints, or low if a minus precedes its name.
    score = "psnr"

    def step(self, index: int) -> Mapping[str, Tensor]:
        """Update the parameters once. Returns "loss" and other values to log."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Metrics of the current parameters."""
        raise NotImplementedError

    def draw_pictures(self, step: int, logger: Logger | None) -> None:
        """Draw pictures after an evaluation. Called on every process; only the first one has a logger, if there is a folder."""

    def shared_state(self) -> dict[str, Any]:
        """State for a checkpoint that is equal on all processes."""
        return {}

    def shard_state(self) -> dict[str, Any]:
        """State for a checkpoint of this process."""
        return {}

    def load_state(self, shared: dict[str, Any], shards: Sequence[dict[str, Any]]) -> None:
        """Load the state of a checkpoint. ``shards`` are the states of all processes that wrote it."""

    def finite(self) -> bool:
        """Whether the parameters are finite."""
        return True

    def finish(self, outcome: Outcome) -> None:
        """Write results after the last step or the stop."""

    def close(self) -> None:
        """Release threads and files."""


@dataclass(frozen=True)
class Cadence:
    """Intervals of a run in steps."""

    log: int
    evaluate: int
    checkpoint: int
    keep: int = 2  # number of last checkpoints to keep
    seconds: float = math.inf  # time after which training ends before its last step


@dataclass
class Outcome:
    """End of a run: its last step, its seconds (including those before a restart), whether it was stopped, and its metrics."""

    step: int
    seconds: float
    stopped: bool
    metrics: dict[str, float]


def run(
    task: Task,
    folder: Path | None,
    cadence: Cadence,
    group: Distributed | None = None,
    *,
    resume: Path | None = None,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> Outcome:
    """Train to the last step, to the end of the time, or until ``stop`` returns true.

    Args:
        task: the training.
        folder: folder for metrics.jsonl, TensorBoard files and checkpoints. Checkpoints are written at their interval, at
            every evaluation and at the end. None: nothing is written, and the loss may be NaN or infinite.
        cadence: intervals.
        group: the processes; default: this one.
        resume: checkpoint to continue from; None: start anew.
        progress: called after every step on the first process.
        stop: asked before every step.

    Raises:
        UserError: the loss is NaN or infinite, or a checkpoint cannot be written or read; earlier ones are then intact.
    """
    loop = _Loop(task, folder, cadence, group or Distributed(), resume)
    try:
        return loop.train(progress, stop)
    finally:
        if loop.logger is not None:
            loop.logger.close()


class _Loop:
    """State of a run."""

    def __init__(self, task: Task, folder: Path | None, cadence: Cadence, group: Distributed, resume: Path | None) -> None:
        self.task, self.cadence, self.group = task, cadence, group
        self.checkpoints = None if folder is None else folder / "checkpoints"
        if self.checkpoints is not None and group.first:
            checkpoint.clear_unfinished(self.checkpoints)
        group.barrier()
        self.step, self.before, self.saved = 0, 0.0, -1
        if resume is not None:
            self.step, shared, shards = checkpoint.load(resume)
            with checkpoint.loading(resume):
                self.before, self.saved = float(shared["seconds"]), self.step
                task.load_state(shared["task"], shards)
                if not (math.isfinite(self.before) and task.finite()):
                    raise ValueError("a parameter is NaN or infinite")
        self.metrics: dict[str, float] = {} if folder is None else _last_metrics(folder, self.step)
        self.logger = Logger(folder, self.step) if folder is not None and group.first else None
        self.measured: dict[int, float] = {}  # the score at the last step that was evaluated
        self.finite = torch.ones((), dtype=torch.bool, device=group.device)
        self.began = time.monotonic()
        self.mark = (self.step, self.began)  # start of the measurement of steps per second

    def train(self, progress: ProgressCallback | None, stop: StopCallback | None) -> Outcome:
        task, group, cadence, stopped = self.task, self.group, self.cadence, False
        last = self.step == task.steps or self.spent()
        while not last:
            if stop is not None and (group.world == 1 or self.step % 10 == 0) and group.any(stop()):
                stopped = True
                break
            values = task.step(self.step)
            self.step += 1
            self.finite &= torch.isfinite(values["loss"])
            last = self.step == task.steps or self.spent()
            if self.step % cadence.log == 0 or last:
                self.log(values)
            if self.step % cadence.evaluate == 0 or last:
                self.evaluate()
            if progress is not None and group.first:
                progress(Progress(self.step, task.steps, dict(self.metrics)))
            if self.step % cadence.checkpoint == 0 or self.step in self.measured or last:
                self.save()
        if self.saved != self.step:
            self.save()
        return Outcome(self.step, self.seconds(), stopped, self.metrics)

    def spent(self) -> bool:
        """Whether the time of the run is over, on all processes alike."""
        return math.isfinite(self.cadence.seconds) and self.group.any(self.seconds() >= self.cadence.seconds)

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def log(self, values: Mapping[str, Tensor]) -> None:
        now, group = time.monotonic(), self.group
        logged = {name: float(group.sum(v.clone().to(group.device)) / group.world) for name, v in values.items()}
        logged["steps_per_second"] = (self.step - self.mark[0]) / max(now - self.mark[1], 1e-9)
        logged["seconds"] = self.seconds()
        logged["memory_gb"] = peak_memory(group.device) / 1e9
        self.metrics |= logged
        if self.checkpoints is not None and group.any(not bool(self.finite)):
            raise _not_a_number(self.step, self.metrics, self.checkpoints)
        self.mark = (self.step, now)
        if self.logger is not None:
            self.logger.scalars(self.step, logged)

    def evaluate(self) -> None:
        metrics, score = self.task.evaluate(), self.task.score
        self.metrics |= metrics
        value = metrics.get(score.lstrip("-"))
        self.measured = {} if value is None else {self.step: -value if score.startswith("-") else value}
        if self.logger is not None:
            self.logger.scalars(self.step, metrics)
        self.task.draw_pictures(self.step, self.logger)
        self.mark = (self.step, time.monotonic())

    def save(self) -> None:
        if self.checkpoints is None:
            return
        if self.group.any(not (bool(self.finite) and self.task.finite())):
            raise _not_a_number(self.step, self.metrics, self.checkpoints)
        shared = {"task": self.task.shared_state(), "seconds": self.seconds()}
        score, shard = self.measured.get(self.step), self.task.shard_state()
        checkpoint.save(self.checkpoints, self.step, shared, shard, self.group, score=score, keep=self.cadence.keep)
        self.saved = self.step
        self.mark = (self.step, time.monotonic())


def _last_metrics(folder: Path, step: int) -> dict[str, float]:
    """Last metrics up to ``step`` in the log of a stopped run."""
    metrics: dict[str, float] = {}
    for record in read_metrics(folder):
        if record["step"] <= step:
            metrics |= {k: math.nan if v is None else v for k, v in record.items() if k != "step"}
    return metrics


def _not_a_number(step: int, metrics: Mapping[str, float], checkpoints: Path) -> UserError:
    shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if not k.startswith(("seconds", "steps", "memory")))
    last = checkpoint.latest(checkpoints)
    where = f"{last} is good: --resume auto continues from it" if last else "there is no checkpoint yet"
    return UserError(
        f"step {step}: the loss or a parameter is NaN or infinite ({shown or 'before the first record'}); {where}. "
        "Lower the learning rates, raise warmup_steps, or take compute_dtype=float32"
    )


def peak_memory(device: torch.device) -> float:
    """Peak memory in bytes of the device's allocator, or of this process for a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
