"""What several commands share: lines, the progress bar, stopping on Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tcam_diff.progress import Progress, ProgressCallback
from tcam_diff.training.loop import Outcome

console = Console()

T = TypeVar("T")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def say(text: object, **style: object) -> None:
    """A line, as it is: nothing highlighted, nothing wrapped."""
    console.print(text, highlight=False, soft_wrap=True, **style)  # type: ignore[arg-type]


#: Label, metric, format and unit of each figure that is shown beside a progress bar.
Shown = Sequence[tuple[str, str, str, str]]


@contextmanager
def progress_bar(what: str, quiet: bool = False, shown: Shown = ()) -> Iterator[ProgressCallback]:
    """A callback that draws a bar on a terminal, and in a log file writes a line every 20 seconds and at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
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
            figures = ", ".join(figure(label, p.metrics.get(key, math.nan), form, unit) for label, key, form, unit in shown)
            bar.update(task, total=p.total, completed=p.done, figures=figures)
            if not quiet and not console.is_terminal and (time.monotonic() - last > 20 or p.done == p.total):
                last, left = time.monotonic(), bar.tasks[0].time_remaining
                about = f", about {duration(left)} left" if left else ""
                say(f"{current}: {p.done}/{p.total} {figures}".rstrip() + about)

        yield show


def tracked(items: Iterable[T], total: int, what: str, quiet: bool) -> Iterator[T]:
    """The items, with a progress bar."""
    with progress_bar(what, quiet) as show:
        for done, item in enumerate(items, 1):
            yield item
            show(Progress(done, total))


def bytes_text(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def folder_size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


#: Exit status of a command that was stopped before its end, as a shell has it for Ctrl-C.
INTERRUPTED = 130


#: What `stop_on_interrupt` says in a training.
RESUMED = "a checkpoint is written (again: stop at once)"


def end_training(out: Path, outcome: Outcome, steps: int, quiet: bool) -> None:
    """End the command, with its exit status, where the training was stopped."""
    if outcome.stopped:
        if not quiet:
            say(f"{out}: stopped at step {outcome.step} of {steps}; --resume auto goes on")
        raise typer.Exit(INTERRUPTED)


@contextmanager
def stop_on_interrupt(then: str) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) asks for a clean stop; the second interrupts at once."""
    asked = [False]

    def ask(number: int, frame: FrameType | None) -> None:
        if asked[0]:
            raise KeyboardInterrupt
        asked[0] = True
        say(f"stopping after this step; {then}")

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
