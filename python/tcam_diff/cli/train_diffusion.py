"""``tcam train-diffusion``: train a diffusion model of the planes of a latent set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import RESUMED, Quiet, Resume, duration, end_training, progress_bar, say, stop_on_interrupt
from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.text import dtype_text, size_text

if TYPE_CHECKING:
    from tcam_diff.diffusion.train import DiffusionTraining


def command(
    config: Annotated[str, typer.Argument(help=f"A preset ({', '.join(configs.presets('diffusion'))}) or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. latents=LATENTS steps=8000 network.cross=none."),
    ] = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train a diffusion model on a latent set (`tcam export-latents` or `tcam encode`).

    Ctrl-C stops and writes a checkpoint; --resume auto continues, equal to the bit on a CPU with the same number of threads.
    With torchrun a batch is shared among the processes. The run's folder gets config.yaml, checkpoints, model/ (for
    `tcam sample`), metrics.jsonl, TensorBoard files, samples (pictures) and report.html.
    """
    from tcam_diff.diffusion.train import train_diffusion
    from tcam_diff.training.distributed import first_process

    settings = DiffusionConfig.load(config, overrides or [])
    quiet = quiet or not first_process()
    evaluated = ("average", "training_loss") if settings.validation is None else ("validation", "validation_loss")
    shown = [("loss", "loss", ".4f", ""), (*evaluated, ".4f", ""), ("", "steps_per_second", ".1f", " steps/s")]
    with progress_bar("training", quiet, shown) as show, stop_on_interrupt(RESUMED) as stop:
        outcome = train_diffusion(settings, out, resume, started=None if quiet else announce, progress=show, stop=stop)
    end_training(out, outcome, settings.steps, quiet)
    if not quiet:
        loss = outcome.metrics.get(evaluated[1], float("nan"))
        say(
            f"{out}: {outcome.step} steps in {duration(outcome.seconds)}, {evaluated[1].replace('_', ' ')} {loss:.4f}; "
            f"{out / 'report.html'}; to draw volumes: tcam sample {out} --out DIR"
        )


def announce(task: DiffusionTraining) -> None:
    """Print data, network and machine of a training run."""
    sizes = ", ".join(size_text(p.shape[2:]) for p in task.data.planes)
    if task.prior is not None and task.config.prior == "gaussian":
        smallest, largest = task.prior.range
        say(
            f"prior: normal distribution with {len(task.prior.directions)} principal directions, variances {smallest:.3g} to "
            f"{largest:.4g}"
        )
    say(
        f"{task.config.latents}: {len(task.data)} volumes, planes C = {task.data.channels}, {sizes}; network of "
        f"{task.parameters / 1e6:.2f} M parameters; {task.group.world} process(es) on {task.group.device.type}, products in "
        f"{dtype_text(task.compute)}"
    )
