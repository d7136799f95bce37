"""The loop of both stages: steps, log, evaluations, checkpoints, a way to stop and to go on."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tcam_diff.errors import UserError
from tcam_diff.training import checkpoint
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.logger import Logger, read_metrics


class Task(Protocol):
    """What is trained. Randomness comes from named streams (training/rng.py), so that the states below are all there is."""

    steps: int

    def step(self, index: int) -> Mapping[str, Tensor]:
        """Update the parameters; "loss" and whatever else is worth a record."""

    def evaluate(self) -> dict[str, float]:
        """On the way. What ``score`` names decides which checkpoint is the best."""

    def shared_state(self) -> dict[str, Any]: ...

    def shard_state(self) -> dict[str, Any]: ...

    def load_state(self, shared: dict[str, Any], shards: Sequence[dict[str, Any]]) -> None: ...

    def finite(self) -> bool: ...


@dataclass(frozen=True)
class Cadence:
    """In steps."""

    log: int
    evaluate: int
    checkpoint: int
    keep: int = 2


@dataclass
class Progress:
    step: int
    steps: int
    metrics: dict[str, float]
    seconds: float  # of the whole run, before a restart too


@dataclass
class Outcome:
    step: int
    seconds: float
    stopped: bool
    metrics: dict[str, float]


def run(
    task: Task,
    folder: Path,
    cadence: Cadence,
    group: Distributed,
    *,
    resume: Path | None = None,
    score: str = "psnr",
    on_progress: Callable[[Progress], None] | None = None,
    on_evaluate: Callable[[int, Logger | None], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Train from the start, or from the checkpoint ``resume``, to the last step, or until ``should_stop``.

    ``score``: the metric of evaluations that is high for good checkpoints, or, with a minus before it, low.
    Ends with a checkpoint; there is one at every evaluation too, so that the best can be kept. Raises UserError where the loss
    is no number, or a checkpoint cannot be written or read; the checkpoints before are then intact.
    """
    checkpoints = folder / "checkpoints"
    if group.first:
        checkpoint.clear_unfinished(checkpoints)
    group.barrier()
    step, before, saved = 0, 0.0, -1
    if resume is not None:
        step, shared, shards = checkpoint.load(resume)
        before, saved = float(shared["seconds"]), step
        task.load_state(shared["task"], shards)
    logger = Logger(folder, step) if group.first else None
    began = time.monotonic()
    metrics = _last_metrics(folder, step)  # those of a run that is gone on with
    measured: dict[int, float] = {}  # the score at the last step that was evaluated
    finite = torch.ones((), dtype=torch.bool, device=group.device)
    mark, mark_time, stopped = step, began, False

    def seconds() -> float:
        return before + time.monotonic() - began

    def save() -> None:
        nonlocal saved
        if group.any(not (bool(finite) and task.finite())):
            raise _not_a_number(step, metrics, checkpoints)
        shared = {"task": task.shared_state(), "seconds": seconds()}
        checkpoint.save(checkpoints, step, shared, task.shard_state(), group, score=measured.get(step), keep=cadence.keep)
        saved = step

    try:
        while step < task.steps:
            if should_stop is not None and (group.world == 1 or step % 10 == 0) and group.any(should_stop()):
                stopped = True
                break
            found = task.step(step)
            step += 1
            finite &= torch.isfinite(found["loss"])
            last = step == task.steps
            if step % cadence.log == 0 or last:
                now = time.monotonic()
                logged = {name: float(group.sum(v.clone().to(group.device)) / group.world) for name, v in found.items()}
                logged["steps_per_second"] = (step - mark) / max(now - mark_time, 1e-9)
                logged["seconds"] = seconds()
                logged["memory_gb"] = peak_memory(group.device) / 1e9
                metrics |= logged
                if group.any(not bool(finite)):
                    raise _not_a_number(step, metrics, checkpoints)
                mark, mark_time = step, now
                if logger is not None:
                    logger.scalars(step, logged)
            if step % cadence.evaluate == 0 or last:
                checked = task.evaluate()
                metrics |= checked
                value = checked.get(score.lstrip("-"))
                measured = {} if value is None else {step: -value if score.startswith("-") else value}
                if logger is not None:
                    logger.scalars(step, checked)
                if on_evaluate is not None:
                    on_evaluate(step, logger)
                mark, mark_time = step, time.monotonic()
            if on_progress is not None:
                on_progress(Progress(step, task.steps, metrics, seconds()))
            if step % cadence.checkpoint == 0 or step in measured or last:
                save()
                mark, mark_time = step, time.monotonic()
        if saved != step:
            save()
    finally:
        if logger is not None:
            logger.close()
    return Outcome(step, seconds(), stopped, metrics)


def _last_metrics(folder: Path, step: int) -> dict[str, float]:
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
