"""Faults of the machine: memory that runs out, a disk that fills at every write, and two processes on one folder."""

from __future__ import annotations

import ctypes
import math
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from shards import Shard, Tally

#: Numbers of calls at which the disk is full, for commands that take seconds.
PLACES = {"train-autodecoder": 60, "train-diffusion": 60}

SOURCE = Path(__file__).with_name("full_disk.c")


def shards() -> list[Shard]:
    from commands import NAMES, on_inputs

    return [
        *(Shard(f"memory-{name}", 20, partial(on_inputs, out_of_memory, name)) for name in NAMES),
        *(
            Shard(f"disk-{name}", PLACES.get(name, 120), partial(on_inputs, full_disk, name), SOURCE, at_most=True)
            for name in NAMES
        ),
        *(Shard(f"twins-{name}", 20, partial(on_inputs, twins, name)) for name in NAMES),
    ]


def resumed(command: Any, want: str, out: Path, work: Path) -> str:
    """Run a command again without the fault. Returns what is wrong."""
    from commands import digest, leftovers, run

    status, text = run(command.arguments(out), work / "log")
    if status == 2 and command.finished and command.finished in text and digest(command, out) == want:
        return ""
    if status:
        return f"resumed with exit status {status}\n{text}"
    if (got := digest(command, out)) != want:
        return f"resumed to other bits: {got}\n{text}"
    return f"left {rest}" if (rest := leftovers(out)) else ""


# ---- memory ------------------------------------------------------------------------------------


def out_of_memory(command: Any, want: str, whole: float, rng: random.Random, cases: int, work: Path, tally: Tally) -> None:
    """Limit the address space of a command to a part of what it takes: up to 1.2 times, log-uniform from 1 MiB."""
    from commands import digest, run, start

    child, sizes = start(command.arguments(work / "free"), work / "log"), []
    while not sizes or child.running():
        sizes.append(_address_space(child.pid) or sizes[-1])
    needs = max(sizes) - _address_space(os.getpid())
    print(f"{needs / 2**20:.0f} MiB of address space", flush=True)
    for case in range(cases):
        out, more = work / "out", int(2 ** rng.uniform(20, math.log2(1.2 * needs)))
        shutil.rmtree(out, ignore_errors=True)

        def limit(more: int = more) -> None:
            most = _address_space(os.getpid()) + more
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

        status, text = run(command.arguments(out), work / "log", limit)
        name = {"case": case, "bytes": more}
        if status == 0 and digest(command, out) == want:
            tally.count("enough memory, same bits")
        elif status not in (1, 2) or not says_memory(text) or not one_line_or_failures(text):
            tally.fail(name, f"exit status {status}\n{text}")
        elif problem := resumed(command, want, out, work):
            tally.fail(name, f"{text}\nthen {problem}")
        else:
            tally.count("one line, then same bits")


def _address_space(pid: int) -> int:
    """Bytes of a process's address space; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def says_memory(text: str) -> bool:
    return any(word in text.lower() for word in ("memory", "unable to allocate", "can't start new thread"))


def one_line_or_failures(text: str) -> bool:
    """Whether a command ended with one line, or listed cases that it could not prepare, without a traceback."""
    from commands import one_line

    return one_line(text) or ("FAILS" in text and "Traceback" not in text)


# ---- disk --------------------------------------------------------------------------------------


def full_disk(command: Any, want: str, whole: float, rng: random.Random, cases: int, work: Path, tally: Tally) -> None:
    """Let a command's folder be full from each of its calls on that need space, or from ``cases`` of them."""
    from commands import run

    disk = ctypes.CDLL(os.environ["LD_PRELOAD"])
    disk.full_disk_counter.restype = ctypes.POINTER(ctypes.c_long)
    counter = disk.full_disk_counter()

    def arm(out: Path, first: int) -> Callable[[], None]:
        return lambda: disk.full_disk_arm(os.fsencode(out), ctypes.c_long(first))

    out = work / "out"
    run(command.arguments(out), work / "log", arm(out, -1))
    total = counter.contents.value
    if not total:
        tally.fail("without a fault", "no call was counted: the library is not loaded")
    print(f"{total} calls need space", flush=True)
    calls = range(total) if total <= cases else sorted(rng.sample(range(total), cases))
    for first in calls:
        shutil.rmtree(out, ignore_errors=True)
        status, text = run(command.arguments(out), work / "log", arm(out, first))
        name = {"first call that fails": first, "of": total}
        good = "No space left on device" in text and str(out) in text and one_line_or_failures(text)
        if status not in (1, 2) or not good:
            tally.fail(name, f"exit status {status}\n{text}")
            continue
        if command.name == "fit" and (problem := _rescued(command, text, want)):
            tally.fail(name, f"{text}\nthen {problem}")
            continue
        if problem := resumed(command, want, out, work):
            tally.fail(name, f"{text}\nthen {problem}")
        else:
            tally.count("one line, then same bits")


def _rescued(command: Any, text: str, want: str) -> str:
    """What is wrong with the copy of a fit that the message names. A disk that is full before the fit begins has none."""
    from commands import digest

    if "the fitted volume is in " not in text:
        return "" if "cannot be written" in text and "steps" not in text else "the fit is lost"
    copy = Path(text.split("the fitted volume is in ")[1].splitlines()[0])
    got = digest(command, copy)
    shutil.rmtree(copy)
    return "" if got == want else f"its copy is {got}"


# ---- two processes ---------------------------------------------------------------------------------


def twins(command: Any, want: str, whole: float, rng: random.Random, cases: int, work: Path, tally: Tally) -> None:
    """Start a command twice on one folder, the second one at a random moment of the first."""
    from commands import digest, leftovers, one_line, start

    for case in range(cases):
        out, delay = work / "out", rng.uniform(0, 1.1 * whole) if case % 3 else rng.uniform(0, 0.02)
        shutil.rmtree(out, ignore_errors=True)
        children = [start(command.arguments(out), work / "first")]
        time.sleep(delay)
        children.append(start(command.arguments(out), work / "second"))
        ends = [(child.wait(), child.text) for child in children]
        refusals = [text for status, text in ends if status == 2]
        known = all(one_line(t) and ("another process" in t or (command.finished and command.finished in t)) for t in refusals)
        good = all(status in (0, 2) for status, _ in ends) and len(refusals) < 2 and known
        got = digest(command, out)
        if not good or got != want or leftovers(out):
            shown = "\n".join(f"exit status {status}: {text}" for status, text in ends)
            tally.fail({"case": case, "delay": round(delay, 3)}, f"{got}, {leftovers(out)}\n{shown}")
        else:
            tally.count("one refused, one result" if refusals else "one after the other, one result")
