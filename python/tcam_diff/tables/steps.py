"""Steps of a table: ``tcam`` commands in processes of their own, each run once, so that a table can be stopped and continued.

DIR/steps/NAME.json     command, seconds and machine of a finished step
DIR/steps/NAME.log      its output
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tcam_diff.errors import UserError
from tcam_diff.files import write_text
from tcam_diff.machine import machine
from tcam_diff.progress import Progress, ProgressCallback, StopCallback


@dataclass(frozen=True)
class Step:
    """A command of ``tcam``.

    Args:
        name: name of its record, unique in a table's folder.
        arguments: function that gives the arguments, called when the steps before are finished.
        resume: whether ``--resume auto`` continues the command after a stop.
    """

    name: str
    arguments: Callable[[], list[str]]
    resume: bool = False

    @property
    def record(self) -> str:
        """Name of the files of its record."""
        return record(self.name)


def record(name: str) -> str:
    """Name of the files of a step's record."""
    return name.replace("/", "-")


def step(
    name: str,
    command: str,
    *more: str,
    source: str | None = None,
    resume: bool = False,
    later: Callable[[], list[str]] = list,
) -> Step:
    """Step of a command in words, with further arguments: ``more``, and those of ``later``, known when it begins.

    ``source`` is a first argument that may have spaces, after the name of the command.
    """
    first, *words = command.split()
    known = [first, *([source] if source is not None else []), *words, *more]
    return Step(name, lambda: known + later(), resume)


def run(
    folder: Path, steps: Sequence[Step], progress: ProgressCallback | None = None, stop: StopCallback | None = None
) -> bool:
    """Run the steps that have no record yet, in the table's folder.

    Returns:
        Whether all are finished; False if ``stop`` returned true: the step is sent SIGINT, and continues in the next call.

    Raises:
        UserError: a step failed, with the end of its output, or has the record of another command.
    """
    for done, current in enumerate(steps):
        if progress is not None:
            progress(Progress(done, len(steps), what=current.name))
        arguments = list(current.arguments())
        path = folder / "steps" / f"{current.record}.json"
        if path.is_file():
            before = json.loads(path.read_text())
            if before["command"] != arguments:
                raise UserError(
                    f"{path}: made by another command: tcam {shlex.join(before['command'])}; this table needs tcam "
                    f"{shlex.join(arguments)}; choose another folder for other settings"
                )
            continue
        if not _run(folder, current, arguments, path, stop):
            return False
    if progress is not None:
        progress(Progress(len(steps), len(steps)))
    return True


def _run(folder: Path, current: Step, arguments: list[str], path: Path, stop: StopCallback | None) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    log, start = path.with_suffix(".log"), time.monotonic()
    resume = ["--resume", "auto"] if current.resume else []
    with log.open("w") as output:
        command = [sys.executable, "-m", "tcam_diff.cli", *arguments, *resume]
        # A session of its own: Ctrl-C on the terminal reaches the command once, from here.
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        sent = False
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if stop is not None and stop() and not sent:
                    process.send_signal(signal.SIGINT)  # it writes a checkpoint and ends
                    sent = True
        except BaseException:
            process.kill()
            process.wait()
            raise
        status = process.returncode
    if sent and status:
        return False
    if status:
        end = " / ".join(line for line in log.read_text(errors="replace").splitlines()[-3:] if line.strip())
        raise UserError(f"tcam {shlex.join(arguments)}: failed with status {status}: {end} ({log})")
    content = {"command": arguments, "seconds": round(time.monotonic() - start, 2), "machine": machine()}
    write_text(path, json.dumps(content, indent=1))
    return True
