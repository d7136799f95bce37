"""``tcam train-diffusion``: a diffusion model of the planes of a latent set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.autodecoder.report import rgb
from tcam_diff.cli.common import INTERRUPTED, duration, say, size_text
from tcam_diff.cli.training import prepare_folder, training
from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.training.distributed import Distributed, distributed
from tcam_diff.training.logger import Logger
from tcam_diff.training.loop import Cadence, Outcome, run

SHOWN = [("loss", "loss", 4, ""), ("validation", "validation_loss", 4, "")]


def train_diffusion(
    config: Annotated[str, typer.Argument(help=f"A preset ({', '.join(configs.presets('diffusion'))}) or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. latents=LATENTS steps=8000 network.cross=none."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="auto: go on from the last checkpoint, if there is one; or a checkpoint's folder."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a diffusion model on a latent set (`tcam export-latents` or `tcam encode`).

    Ctrl-C stops and writes a checkpoint; --resume auto goes on, bit for bit on a CPU with as many threads. Under torchrun a
    batch is shared among its processes. The run's folder gets config.yaml, checkpoints, model/ (for `tcam sample`),
    metrics.jsonl, TensorBoard files, samples (pictures) and report.html.
    """
    wanted = configs.load(DiffusionConfig, "diffusion", config, overrides or [])
    with distributed(wanted.device) as group:
        at = prepare_folder(out, wanted, resume, group)
        if train(wanted, out, group, at, quiet or not group.first).stopped:
            raise typer.Exit(INTERRUPTED)


def train(config: DiffusionConfig, out: Path, group: Distributed, resume: Path | None = None, quiet: bool = False) -> Outcome:
    """Train, record, write the model and the report."""
    from tcam_diff.diffusion.report import samples_picture, write_report
    from tcam_diff.diffusion.train import DiffusionTraining

    task = DiffusionTraining(config, group, out)
    if not quiet:
        sizes = ", ".join(size_text(p.shape[2:]) for p in task.data.planes)
        say(
            f"{config.latents}: {len(task.data)} volumes, planes C = {task.data.channels}, {sizes}; network of "
            f"{task.parameters / 1e6:.2f} M parameters; {group.world} process(es) on {group.device.type}, products in "
            f"{str(task.compute).removeprefix('torch.')}"
        )
    cadence = Cadence(config.log_every, config.evaluation_steps(), config.checkpoint_steps(), config.keep)
    samples = out / "samples"

    def look(step: int, logger: Logger | None) -> None:
        if logger is None:
            return
        model = task.model(step)
        model.save(out / "model")
        if config.preview_steps:
            samples.mkdir(exist_ok=True)
            picture = samples_picture(model, config.preview_steps)
            (samples / f"step-{step:08d}.png").write_bytes(picture)
            logger.picture(step, "samples", rgb(picture))

    with training(task.steps, quiet, SHOWN) as (show, stop):
        score = "-validation_loss"
        outcome = run(
            task, out, cadence, group, resume=resume, score=score, on_progress=show, on_evaluate=look, should_stop=stop
        )
    if group.first:
        task.model(outcome.step).save(out / "model")
    if outcome.stopped:
        if not quiet:
            say(f"{out}: stopped at step {outcome.step} of {task.steps}; --resume auto goes on")
        return outcome
    if group.first:
        write_report(out, config, task, outcome)
    if not quiet:
        loss = outcome.metrics.get("validation_loss", float("nan"))
        say(
            f"{out}: {outcome.step} steps in {duration(outcome.seconds)}, loss of the average {loss:.4f} (2 at the start); "
            f"{out / 'report.html'}; tcam sample {out} --out DIR draws volumes"
        )
    return outcome
