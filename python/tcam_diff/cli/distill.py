"""``tcam distill``: distil a diffusion model to one that draws volumes with one to four evaluations."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import RESUMED, Quiet, Resume, duration, end_training, progress_bar, say, stop_on_interrupt
from tcam_diff.diffusion.config import DistillConfig
from tcam_diff.errors import UserError
from tcam_diff.text import dtype_text

if TYPE_CHECKING:
    from tcam_diff.diffusion.distill import Distillation

SHOWN = [("loss", "loss", ".4f", ""), ("distance", "distance", ".3f", ""), ("", "steps_per_second", ".2f", " steps/s")]


def command(
    model: Annotated[Path, typer.Argument(help="A run of `tcam train-diffusion` with a prior, or a model's folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. steps=2000.")] = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Distil MODEL to one that draws volumes with one to four evaluations of its network.

    The network learns where the teacher's trajectories from noise lead. To draw volumes: tcam sample OUT --solver consistency
    --steps 1 (or 2, 4). The distance shown is that to the teacher's planes from the same noise, with one evaluation, as a
    share of their spread. Ctrl-C stops and writes a checkpoint; --resume auto continues.
    """
    from tcam_diff.diffusion.distill import distill

    if any(o.startswith("model=") for o in overrides or []):
        raise UserError(f"model: is the first argument, {model}; leave model=... out")
    settings = DistillConfig.load("default", overrides or []).model_copy(update={"model": str(model)})
    with progress_bar("distilling", quiet, SHOWN) as show, stop_on_interrupt(RESUMED) as stop:
        outcome = distill(settings, out, resume, started=None if quiet else announce, progress=show, stop=stop)
    end_training(out, outcome, settings.steps, quiet)
    if not quiet:
        m = {"distance": math.nan, "prior_distance": math.nan} | outcome.metrics
        say(
            f"{out}: {outcome.step} steps in {duration(outcome.seconds)}, distance {m['distance']:.3f} from the teacher's "
            f"planes (the prior alone: {m['prior_distance']:.3f}); to draw volumes: tcam sample {out} --solver consistency "
            "--steps 2 --out DIR"
        )


def announce(task: Distillation) -> None:
    """Print model and machine of a distillation."""
    say(
        f"{task.config.model}: network of {task.parameters / 1e6:.2f} M parameters; trajectories of "
        f"{task.config.teacher_steps} evaluations; {task.group.device.type}, products in {dtype_text(task.compute)}"
    )


command.__doc__ = f"{inspect.getdoc(command)}\n\nKeys with their defaults:\n\n\b\n{configs.describe(DistillConfig)}\n"
