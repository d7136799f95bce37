"""``tcam train-autodecoder``: one decoder, and planes for every volume of a store."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tcam_diff import config as configs
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.report import channels_picture, rgb, slices_picture, write_report
from tcam_diff.autodecoder.train import Autodecoder
from tcam_diff.cli.common import console, duration, say, size_text, stop_on_interrupt
from tcam_diff.errors import UserError
from tcam_diff.files import writable_folder, write_text
from tcam_diff.training import checkpoint
from tcam_diff.training.loop import Cadence, Outcome, Progress, run
from tcam_diff.training.ranks import Ranks, ranks
from tcam_diff.training.records import Records

#: Keys that a run may be gone on with differently: they change when things happen, or where, not what is computed.
FREE = {"data", "device", "tables", "prefetch", "log_every", "evaluate_every", "evaluate_objects", "checkpoint_every", "keep"}


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
    with ranks(wanted.device) as group:
        at = prepare_folder(out, wanted, resume, group)
        train(wanted, out, group, at, quiet or not group.first)


def train(config: TrainConfig, out: Path, group: Ranks, resume: Path | None = None, quiet: bool = False) -> Outcome:
    """Train, record, and write the report."""
    task = Autodecoder(config, group, out)
    if not quiet:
        products = str(task.objective.compute).removeprefix("torch.")
        say(
            f"{config.data}: {len(task.records)} volumes, {size_text(task.size)}, {task.channels} channel(s); planes "
            f"C = {config.channels}, {size_text(task.objective.texels)} texels, tables on {task.table.where}; "
            f"{group.world} process(es) on {group.device.type}, products in {products}"
        )
    cadence = Cadence(config.log_every, config.evaluation_steps(), config.checkpoint_steps(), config.keep)
    samples = out / "samples"

    def look(step: int, records: Records | None) -> None:
        found = task.slices()
        if records is None or found is None:
            return
        truth, got, record = found
        samples.mkdir(exist_ok=True)
        picture = slices_picture(truth, got, record, f"step {step}")
        (samples / f"step-{step:08d}.png").write_bytes(picture)
        records.picture(step, "slices", rgb(picture))
        records.picture(step, "planes", rgb(channels_picture(next(task.fitted())[1])))

    try:
        with _bar(task.steps, quiet) as show, stop_on_interrupt("a checkpoint is written (again: stop at once)") as stop:
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
    except RuntimeError as error:
        if group.world > 1 and "gloo" in str(error).lower():
            raise UserError(
                f"rank {group.rank}: another rank is gone ({str(error).splitlines()[0]}); see its message. --resume auto "
                "goes on, with any number of ranks that divides batch"
            ) from error
        raise
    finally:
        task.close()


def prepare_folder(out: Path, config: TrainConfig, resume: str | None, group: Ranks) -> Path | None:
    """The checkpoint to go on from. Raises UserError where the folder holds a run that this command would spoil."""
    held = out / "config.yaml"
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
    if at is not None and held.is_file():
        before, now = yaml.safe_load(held.read_text()), config.model_dump(mode="json")
        for key in now:
            if key not in FREE and before.get(key) != now[key]:
                raise UserError(f"{key}: the run in {out} was begun with {before.get(key)}, --resume was given {now[key]}")
    if group.first:
        writable_folder(out)
        write_text(held, config.yaml())
    group.barrier()
    return at


@contextmanager
def _bar(steps: int, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]} PSNR {task.fields[psnr]} dB, {task.fields[rate]} steps/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task("train", total=steps, loss="-", psnr="-", rate="-")
        last = [time.monotonic()]

        def show(p: Progress) -> None:
            def number(key: str, digits: int) -> str:
                value = p.metrics.get(key, math.nan)
                return f"{value:.{digits}f}" if math.isfinite(value) else "-"

            shown = {"loss": number("loss", 5), "psnr": number("psnr", 2), "rate": number("steps_per_second", 1)}
            bar.update(task, completed=p.step, **shown)  # type: ignore[arg-type]
            if not quiet and not console.is_terminal and time.monotonic() - last[0] > 20:
                last[0] = time.monotonic()  # a log file gets a line now and then
                rate = p.metrics.get("steps_per_second")
                left = f", about {duration((p.steps - p.step) / rate)} left" if rate else ""
                say(f"step {p.step}/{p.steps} loss {shown['loss']} PSNR {shown['psnr']} dB{left}")

        yield show
