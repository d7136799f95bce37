"""Kills: commands that end at random moments and are resumed. The end must have the bits of a run that was not killed."""

from __future__ import annotations

import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

from shards import Shard, Tally

CASES = 120  # of each command; the first 100 with SIGKILL, the others with SIGTERM


def shards() -> list[Shard]:
    from commands import NAMES, on_inputs

    return [Shard(f"kills-{name}", CASES, partial(on_inputs, kills, name)) for name in NAMES]


def kills(command: Any, want: str, whole: float, rng: random.Random, cases: int, work: Path, tally: Tally) -> None:
    """Kill a command once in each case."""
    polite = cases * 20 // CASES
    for case in range(cases):
        number = signal.SIGKILL if case < cases - polite else signal.SIGTERM
        what = _one(command, number, whole, want, rng, work)
        if what.startswith("same bits"):
            tally.count(what)
        else:
            tally.fail({"case": case, "signal": number.name}, what)


def _one(command: Any, number: signal.Signals, whole: float, want: str, rng: random.Random, work: Path) -> str:
    from commands import digest, leftovers, one_line, run, start

    out = work / "out"
    while True:  # until the signal came before the end
        shutil.rmtree(out, ignore_errors=True)
        child = start(command.arguments(out), work / "log")
        time.sleep(rng.uniform(0, whole))
        child.kill(number, group=rng.random() < 0.3)
        status = child.wait()
        if status == -999:
            return f"no end after {number.name}\n{child.text}"
        if number == signal.SIGKILL and child.orphans():
            return "workers live on"
        if status == -number or (number == signal.SIGTERM and status != 0):
            break
    if number == signal.SIGTERM and "Traceback" in child.text:
        return f"a traceback after {number.name}\n{child.text}"
    between = digest(command, out) if out.exists() else "unfinished: no folder"
    if between.startswith("ERROR"):
        return f"after the {number.name} the result is neither there nor unfinished: {between}"
    status, text = run(command.arguments(out), work / "log")
    if status == 2 and command.finished and command.finished in text and one_line(text) and between == want:
        return f"same bits after {number.name} at the very end"
    if status:
        return f"resumed with exit status {status}\n{text}"
    got = digest(command, out)
    if got != want:
        return f"resumed to other bits: {got}\n{text}"
    if rest := leftovers(out):
        return f"left {rest}"
    return f"same bits after {number.name}"
