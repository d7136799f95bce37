"""``tcam train-autodecoder``: train one decoder, and planes for every volume of a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.cli.common import RESUMED, Quiet, Resume, duration, end_training, progress_bar, say, stop_on_interrupt
from tcam_diff.diffusion.config import presets_text
from tcam_diff.text import dtype_text, size_text

if TYPE_CHECKING:
    from tcam_diff.autodecoder.train import AutodecoderTraining


SHOWN = [("loss", "loss", ".5f", ""), ("PSNR", "psnr", ".2f", " dB"), ("", "steps_per_second", ".1f", " steps/s")]


def command(
    config: Annotated[str, typer.Argument(help=f"A preset ({', '.join(configs.presets('train'))}) or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. data=STORE steps=8000 channels=24.")
    ] = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train one decoder and planes for every volume of a store (`tcam prepare`).

    Ctrl-C stops and writes a checkpoint; --resume auto continues, equal to the bit on a CPU with the same number of threads.
    With torchrun the objects are shared among the processes. The run's folder gets config.yaml, checkpoints, metrics.jsonl,
    TensorBoard files, samples (pictures) and report.html.
    """
    from tcam_diff.autodecoder.train import train_autodecoder
    from tcam_diff.training.distributed import first_process

    settings = TrainConfig.load(config, overrides or [])
    quiet = quiet or not first_process()
    with progress_bar("training", quiet, SHOWN) as show, stop_on_interrupt(RESUMED) as stop:
        outcome = train_autodecoder(settings, out, resume, started=None if quiet else announce, progress=show, stop=stop)
    end_training(out, outcome, settings.steps, quiet)
    if not quiet:
        say(
            f"{out}: {outcome.step} steps in {duration(outcome.seconds)}, fitted PSNR {outcome.metrics['fitted_psnr']:.2f} dB "
            f"over whole volumes, noise off; {out / 'report.html'}"
        )


def announce(task: AutodecoderTraining) -> None:
    """Print data, planes and machine of a training run."""
    say(
        f"{task.config.data}: {len(task.records)} volumes, {size_text(task.size)}, {task.channels} channel(s); planes "
        f"C = {task.config.channels}, {size_text(task.objective.texels)} texels, tables on {task.table.where}; "
        f"{task.group.world} process(es) on {task.group.device.type}, products in {dtype_text(task.objective.compute)}"
    )
    if text := presets_text(task.objective.texels):
        say(f"stage 2: {text}")
