"""Helpers of the commands: output, progress bars, and stopping on Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from tcam_diff.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from tcam_diff.training.loop import Outcome

#: Names of files may contain brackets and colons: nothing in a text is markup or an emoji.
console = Console(markup=False, emoji=False)

T = TypeVar("T")

#: Options that commands share.
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Resume = Annotated[
    str | None,
    typer.Option("--resume", help="auto: continue from the last checkpoint, if any; or a checkpoint's folder."),
]


def cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0))


def say(text: str, problem: str = "") -> None:
    """Print a line without highlighting or wrapping, after the word of a ``problem`` in red."""
    console.print(Text.assemble((problem, "red"), " " if problem else "", text), highlight=False, soft_wrap=True)


#: Label, metric, format and unit of each value beside a progress bar.
Shown = Sequence[tuple[str, str, str, str]]


@contextmanager
def progress_bar(what: str, quiet: bool = False, shown: Shown = ()) -> Iterator[ProgressCallback]:
    """Callback that draws a bar on a terminal. If the output is a file, it prints a line every 20 seconds and at the end."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left", markup=False),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None, figures="")
        last, current = time.monotonic(), what

        def figure(label: str, value: float, form: str, unit: str) -> str:
            return f"{label} {value:{form}}{unit}".strip() if math.isfinite(value) else f"{label} -".strip()

        def show(p: Progress) -> None:
            nonlocal last, current
            if p.what not in ("", current) or p.done < bar.tasks[0].completed:
                current = p.what or current
                bar.reset(task, description=current)
            figures = ", ".join(
                figure(label, p.metrics.get(key, math.nan), form, unit)
                for label, key, form, unit in shown
                if key in p.metrics or not p.what
            )
            bar.update(task, total=p.total, completed=p.done, figures=figures)
            if not quiet and not console.is_terminal and (time.monotonic() - last > 20 or p.done == p.total):
                last, left = time.monotonic(), bar.tasks[0].time_remaining
                about = f", about {duration(left)} left" if left else ""
                say(f"{current}: {p.done}/{p.total} {figures}".rstrip() + about)

        yield show


def tracked(items: Iterable[T], total: int, what: str, quiet: bool) -> Iterator[T]:
    """Yield the items and show a progress bar."""
    with progress_bar(what, quiet) as show:
        for done, item in enumerate(items, 1):
            yield item
            show(Progress(done, total))


def bytes_text(count: float) -> str:
    """A number of bytes as text, for example "1.25 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def folder_size(path: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def duration(seconds: float) -> str:
    """A duration as text, for example "45 s", "12 min" or "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


#: Exit status of a command that was stopped, the same as shells use for Ctrl-C.
INTERRUPTED = 130

#: Message of `stop_on_interrupt` in training commands.
RESUMED = "a checkpoint is written (again: stop at once)"


def end_training(out: Path, outcome: Outcome, steps: int, quiet: bool) -> None:
    """End the command with status INTERRUPTED if the training was stopped."""
    if outcome.stopped:
        if not quiet:
            say(f"{out}: stopped at step {outcome.step} of {steps}; --resume auto continues")
        raise typer.Exit(INTERRUPTED)


@contextmanager
def stop_on_interrupt(then: str) -> Iterator[Callable[[], bool]]:
    """Callback that tells whether Ctrl-C was pressed or SIGTERM received. The second signal raises KeyboardInterrupt.

    ``then`` is printed at the first signal and says what happens after the stop.
    """
    stopping = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            raise KeyboardInterrupt
        stopping = True
        say(f"stopping after this step; {then}")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
