"""Training run in a folder, from configuration to report, for both stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel

from tcam_diff.config import read_settings
from tcam_diff.errors import UserError
from tcam_diff.files import locked_folder, write_text
from tcam_diff.machine import write_machine
from tcam_diff.progress import ProgressCallback, StopCallback
from tcam_diff.text import shown
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
    """Train the task ``make(config, group, out)`` on the processes that torchrun started.

    The other arguments are those of ``train_autodecoder`` and ``train_diffusion``.
    """
    with _without_subnormals(), distributed(config.device) as group, locked_folder(out) if group.first else nullcontext():
        path = prepare_folder(out, config, resume, group)
        if path is None and group.first:
            write_machine(out, {"processes": f"{group.world} on {group.device.type}"})
        task = make(config, group, out)
        try:
            if started is not None and group.first:
                started(task)
            seconds = math.inf if config.minutes is None else 60 * config.minutes
            cadence = Cadence(config.log_every, config.evaluation_steps(), config.checkpoint_steps(), config.keep, seconds)
            outcome = run(task, out, cadence, group, resume=path, progress=progress, stop=stop)
            task.finish(outcome)
            return outcome
        finally:
            task.close()


@contextmanager
def _without_subnormals() -> Iterator[None]:
    """Take subnormal floats for zero, as the kernels of tcam_ext do: CPUs need a hundred cycles for a product with them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def prepare_folder(out: Path, config: RunConfig, resume: str | None, group: Distributed) -> Path | None:
    """Write the configuration to the folder of a run.

    Returns:
        The checkpoint to resume from, if any.

    Raises:
        UserError: the folder has a run that would be overwritten, there is no checkpoint at ``resume``, or a key changed that
            must not.
    """
    settings = out / "config.yaml"
    last = checkpoint.latest(out / "checkpoints")
    path: Path | None = None
    if resume is None and last is not None:
        raise UserError(f"{out}: contains a run (up to {last.name}); add --resume auto to continue, or choose another folder")
    if resume == "auto":
        path = last
    elif resume is not None:
        path = Path(resume)
        if not (path / checkpoint.MANIFEST).is_file():
            raise UserError(f"--resume {resume}: expected auto or a folder of a checkpoint, such as {out}/checkpoints/step-...")
    if path is not None and settings.is_file():
        fields = {k: f for k, f in type(config).model_fields.items() if not f.is_required()}
        defaults = {
            k: f.get_default(call_default_factory=True) for k, f in fields.items()
        }  # of keys that a later version added
        before, now = defaults | read_settings(settings), config.model_dump(mode="json")
        for key, default in defaults.items():
            if isinstance(default, BaseModel) and isinstance(before[key], dict):
                before[key] = default.model_dump(mode="json") | before[key]
        for key in now:
            if key not in config.changeable and before.get(key) != now[key]:
                raise UserError(f"{key}: the run in {out} began with {shown(before.get(key))}, --resume was given {now[key]}")
    if group.first:
        write_text(settings, config.yaml())
    group.barrier()
    return path
