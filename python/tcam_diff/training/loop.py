"""The loop of all trainings: steps, log, evaluations, checkpoints, a way to stop and to go on."""

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
    """A training: parameters, optimiser, data. All randomness comes from training/rng.py, so the states below are complete."""

    steps: int

    #: The metric of ``evaluate`` that is high for good checkpoints, or, with a minus before it, low.
    score = "psnr"

    def step(self, index: int) -> Mapping[str, Tensor]:
        """Update the parameters; returns "loss" and whatever else should be logged."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Metrics of the parameters as they are."""
        raise NotImplementedError

    def draw_pictures(self, step: int, logger: Logger | None) -> None:
        """Called after every evaluation, on every process; ``logger``: on the first one, where there is a folder."""

    def shared_state(self) -> dict[str, Any]:
        """What is equal on all processes, for a checkpoint."""
        return {}

    def shard_state(self) -> dict[str, Any]:
        """What this process alone has."""
        return {}

    def load_state(self, shared: dict[str, Any], shards: Sequence[dict[str, Any]]) -> None:
        """Take the states of a checkpoint: ``shards`` are those of all processes that wrote it."""

    def finite(self) -> bool:
        """Whether the parameters are."""
        return True

    def finish(self, outcome: Outcome) -> None:
        """Called after the last step, or the stop: for results that are written beside the checkpoints."""

    def close(self) -> None:
        """Release threads and files."""


@dataclass(frozen=True)
class Cadence:
    """In steps."""

    log: int
    evaluate: int
    checkpoint: int
    keep: int = 2


@dataclass
class Outcome:
    """How a run ended: after which step, after how many seconds (those before a restart too), and with which metrics."""

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
    """Train from the start, or from the checkpoint ``resume``, to the last step, or until ``stop``.

    ``folder`` gets metrics.jsonl, TensorBoard files and checkpoints: at the end, at the cadence asked for, and at every
    evaluation, so that the best can be kept. None: nothing is written, and a loss that is no number does not end the run.

    Raises UserError where the loss is no number, or a checkpoint cannot be written or read; earlier ones are then intact.
    """
    loop = _Loop(task, folder, cadence, group or Distributed(), resume)
    try:
        return loop.train(progress, stop)
    finally:
        if loop.logger is not None:
            loop.logger.close()


class _Loop:
    """The state of a run."""

    def __init__(self, task: Task, folder: Path | None, cadence: Cadence, group: Distributed, resume: Path | None) -> None:
        self.task, self.cadence, self.group = task, cadence, group
        self.checkpoints = None if folder is None else folder / "checkpoints"
        if self.checkpoints is not None and group.first:
            checkpoint.clear_unfinished(self.checkpoints)
        group.barrier()
        self.step, self.before, self.saved = 0, 0.0, -1
        if resume is not None:
            self.step, shared, shards = checkpoint.load(resume)
            self.before, self.saved = float(shared["seconds"]), self.step
            task.load_state(shared["task"], shards)
        self.metrics: dict[str, float] = {} if folder is None else _last_metrics(folder, self.step)
        self.logger = Logger(folder, self.step) if folder is not None and group.first else None
        self.measured: dict[int, float] = {}  # the score at the last step that was evaluated
        self.finite = torch.ones((), dtype=torch.bool, device=group.device)
        self.began = time.monotonic()
        self.mark = (self.step, self.began)  # from which the rate is measured

    def train(self, progress: ProgressCallback | None, stop: StopCallback | None) -> Outcome:
        task, group, cadence, stopped = self.task, self.group, self.cadence, False
        while self.step < task.steps:
            if stop is not None and (group.world == 1 or self.step % 10 == 0) and group.any(stop()):
                stopped = True
                break
            found = task.step(self.step)
            self.step += 1
            self.finite &= torch.isfinite(found["loss"])
            last = self.step == task.steps
            if self.step % cadence.log == 0 or last:
                self.log(found)
            if self.step % cadence.evaluate == 0 or last:
                self.evaluate()
            if progress is not None and group.first:
                progress(Progress(self.step, task.steps, dict(self.metrics)))
            if self.step % cadence.checkpoint == 0 or self.step in self.measured or last:
                self.save()
        if self.saved != self.step:
            self.save()
        return Outcome(self.step, self.seconds(), stopped, self.metrics)

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def log(self, found: Mapping[str, Tensor]) -> None:
        now, group = time.monotonic(), self.group
        logged = {name: float(group.sum(v.clone().to(group.device)) / group.world) for name, v in found.items()}
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
        found, score = self.task.evaluate(), self.task.score
        self.metrics |= found
        value = found.get(score.lstrip("-"))
        self.measured = {} if value is None else {self.step: -value if score.startswith("-") else value}
        if self.logger is not None:
            self.logger.scalars(self.step, found)
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
    """Those that the run had at ``step``, when it was stopped."""
    found: dict[str, float] = {}
    for record in read_metrics(folder):
        if record["step"] <= step:
            found |= {k: math.nan if v is None else v for k, v in record.items() if k != "step"}
    return found


def _not_a_number(step: int, metrics: Mapping[str, float], checkpoints: Path) -> UserError:
    shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if not k.startswith(("seconds", "steps", "memory")))
    last = checkpoint.latest(checkpoints)
    where = f"{last} is good: --resume auto goes on from it" if last else "there is no checkpoint yet"
    return UserError(
        f"step {step}: the loss or a parameter is NaN or infinite ({shown or 'before the first record'}); {where}. "
        "Lower the learning rates, raise warmup_steps, or take compute_dtype=float32"
    )


def peak_memory(device: torch.device) -> float:
    """Bytes: of the device's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
