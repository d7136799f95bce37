"""What several commands share: progress bars, lists of keys, counts of cores."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()

T = TypeVar("T")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def say(text: object, **style: object) -> None:
    """A line, as it is: nothing highlighted, nothing wrapped."""
    console.print(text, highlight=False, soft_wrap=True, **style)  # type: ignore[arg-type]


def tracked(items: Iterable[T], total: int, what: str, quiet: bool) -> Iterator[T]:
    """The items, with a progress bar on a terminal, and in a log file a line now and then."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet, transient=True) as progress:
        task = progress.add_task(what, total=total)
        for done, item in enumerate(items, 1):
            yield item
            progress.update(task, completed=done)
            if not quiet and not console.is_terminal and (done % 16 == 0 or done == total):
                say(f"{what}: {done}/{total}")


def size_text(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


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
