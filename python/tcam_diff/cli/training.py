"""What the training commands of both stages share: the run's folder, the progress bar, a way to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tcam_diff.cli.common import console, duration, say, stop_on_interrupt
from tcam_diff.errors import UserError
from tcam_diff.files import writable_folder, write_text
from tcam_diff.training import checkpoint
from tcam_diff.training.config import RunConfig
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.loop import Progress


def prepare_folder(out: Path, config: RunConfig, resume: str | None, group: Distributed) -> Path | None:
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
            if key not in config.changeable and before.get(key) != now[key]:
                raise UserError(f"{key}: the run in {out} was begun with {before.get(key)}, --resume was given {now[key]}")
    if group.first:
        writable_folder(out)
        write_text(held, config.yaml())
    group.barrier()
    return at


@contextmanager
def training(
    steps: int, quiet: bool, shown: Sequence[tuple[str, str, int, str]]
) -> Iterator[tuple[Callable[[Progress], None], Callable[[], bool]]]:
    """(on_progress, should_stop) of a run; ``shown``: label, metric, digits and unit of what the bar tells."""
    with _bar(steps, quiet, shown) as show, stop_on_interrupt("a checkpoint is written (again: stop at once)") as stop:
        yield show, stop


@contextmanager
def _bar(steps: int, quiet: bool, shown: Sequence[tuple[str, str, int, str]]) -> Iterator[Callable[[Progress], None]]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}, {task.fields[rate]} steps/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task("train", total=steps, told="", rate="-")
        last = [time.monotonic()]

        def show(p: Progress) -> None:
            def number(key: str, digits: int) -> str:
                value = p.metrics.get(key, math.nan)
                return f"{value:.{digits}f}" if math.isfinite(value) else "-"

            told = " ".join(f"{label} {number(key, digits)}{unit}" for label, key, digits, unit in shown)
            bar.update(task, completed=p.step, told=told, rate=number("steps_per_second", 1))
            if not quiet and not console.is_terminal and time.monotonic() - last[0] > 20:
                last[0] = time.monotonic()  # a log file gets a line now and then
                rate = p.metrics.get("steps_per_second")
                left = f", about {duration((p.steps - p.step) / rate)} left" if rate else ""
                say(f"step {p.step}/{p.steps} {told}{left}")

        yield show
