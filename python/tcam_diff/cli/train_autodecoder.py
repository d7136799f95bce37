"""``tcam train-autodecoder``: one decoder, and planes for every volume of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.report import channels_picture, rgb, slices_picture, write_report
from tcam_diff.autodecoder.train import AutodecoderTraining
from tcam_diff.cli.common import INTERRUPTED, duration, say, size_text
from tcam_diff.cli.training import prepare_folder, training
from tcam_diff.training.distributed import Distributed, distributed
from tcam_diff.training.logger import Logger
from tcam_diff.training.loop import Cadence, Outcome, run

SHOWN = [("loss", "loss", 5, ""), ("PSNR", "psnr", 2, " dB")]


def train_autodecoder(
    config: Annotated[str, typer.Argument(help=f"A preset ({', '.join(configs.presets('train'))}) or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. data=STORE steps=8000 channels=24.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="auto: go on from the last checkpoint, if there is one; or a checkpoint's folder."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train one decoder and planes for every volume of a store (`tcam prepare`).

    Ctrl-C stops and writes a checkpoint; --resume auto goes on, bit for bit on a CPU with as many threads. Under torchrun
    the objects are shared among its processes. The run's folder gets config.yaml, checkpoints, metrics.jsonl, TensorBoard
    files, samples (pictures) and report.html.
    """
    wanted = configs.load(TrainConfig, "train", config, overrides or [])
    with distributed(wanted.device) as group:
        at = prepare_folder(out, wanted, resume, group)
        if train(wanted, out, group, at, quiet or not group.first).stopped:
            raise typer.Exit(INTERRUPTED)


def train(config: TrainConfig, out: Path, group: Distributed, resume: Path | None = None, quiet: bool = False) -> Outcome:
    """Train, record, and write the report."""
    task = AutodecoderTraining(config, group, out)
    if not quiet:
        products = str(task.objective.compute).removeprefix("torch.")
        say(
            f"{config.data}: {len(task.records)} volumes, {size_text(task.size)}, {task.channels} channel(s); planes "
            f"C = {config.channels}, {size_text(task.objective.texels)} texels, tables on {task.table.where}; "
            f"{group.world} process(es) on {group.device.type}, products in {products}"
        )
    cadence = Cadence(config.log_every, config.evaluation_steps(), config.checkpoint_steps(), config.keep)
    samples = out / "samples"

    def look(step: int, logger: Logger | None) -> None:
        found = task.slices()
        if logger is None or found is None:
            return
        truth, got, record = found
        samples.mkdir(exist_ok=True)
        picture = slices_picture(truth, got, record, f"step {step}")
        (samples / f"step-{step:08d}.png").write_bytes(picture)
        logger.picture(step, "slices", rgb(picture))
        logger.picture(step, "planes", rgb(channels_picture(next(task.fitted())[1])))

    try:
        with training(task.steps, quiet, SHOWN) as (show, stop):
            outcome = run(task, out, cadence, group, resume=resume, on_progress=show, on_evaluate=look, should_stop=stop)
        if outcome.stopped:
            if not quiet:
                say(f"{out}: stopped at step {outcome.step} of {task.steps}; --resume auto goes on")
            return outcome
        fitted = task.evaluate(range(len(task.records)), whole=True)
        outcome.metrics |= {"fitted_psnr": fitted["psnr"]}
        if group.first:
            write_report(out, config, task, outcome)
        if not quiet:
            say(
                f"{out}: {outcome.step} steps in {duration(outcome.seconds)}, fitted PSNR {fitted['psnr']:.2f} dB over whole "
                f"volumes, noise off; {out / 'report.html'}"
            )
        return outcome
    finally:
        task.close()
