"""A training run in a folder, from its configuration to its report: what stage 1 and stage 2 do alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml

from tcam_diff.errors import UserError
from tcam_diff.files import writable_folder, write_text
from tcam_diff.progress import ProgressCallback, StopCallback
from tcam_diff.training import checkpoint
from tcam_diff.training.config import RunConfig
from tcam_diff.training.distributed import Distributed, distributed
from tcam_diff.training.loop import Cadence, Outcome, Task, run

C = TypeVar("C", bound=RunConfig)
T = TypeVar("T", bound=Task)


def train(
    make: Callable[[C, Distributed, Path], T],
    config: C,
    out: Path,
    resume: str | None,
    started: Callable[[T], None] | None,
    progress: ProgressCallback | None,
    stop: StopCallback | None,
) -> Outcome:
    """Train what ``make(config, group, out)`` makes, on the processes that torchrun describes; see the functions of the stages.

    ``started`` is given the task before the first step, on the first process.
    """
    with distributed(config.device) as group:
        at = prepare_folder(out, config, resume, group)
        task = make(config, group, out)
        try:
            if started is not None and group.first:
                started(task)
            cadence = Cadence(config.log_every, config.evaluation_steps(), config.checkpoint_steps(), config.keep)
            outcome = run(task, out, cadence, group, resume=at, progress=progress, stop=stop)
            task.finish(outcome)
            return outcome
        finally:
            task.close()


def prepare_folder(out: Path, config: RunConfig, resume: str | None, group: Distributed) -> Path | None:
    """The checkpoint to go on from. Raises UserError where the folder holds a run that this command would spoil."""
    settings = out / "config.yaml"
    found = checkpoint.latest(out / "checkpoints")
    at: Path | None = None
    if resume is None and found is not None:
        raise UserError(f"{out}: holds a run (up to {found.name}); add --resume auto to go on, or choose another folder")
    if resume == "auto":
        at = found
    elif resume is not None:
        at = Path(resume)
        if not (at / checkpoint.MANIFEST).is_file():
            raise UserError(f"--resume {resume}: expected auto or a folder of a checkpoint, such as {out}/checkpoints/step-...")
    if at is not None and settings.is_file():
        before, now = yaml.safe_load(settings.read_text()), config.model_dump(mode="json")
        for key in now:
            if key not in config.changeable and before.get(key) != now[key]:
                raise UserError(f"{key}: the run in {out} was begun with {before.get(key)}, --resume was given {now[key]}")
    if group.first:
        writable_folder(out)
        write_text(settings, config.yaml())
    group.barrier()
    return at
