"""Runs the cases in processes of their own, so that a kernel that crashes or hangs fails alone."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

import tcam_ext
from tcam_ext.selftest.cases import all_cases, raised
from tcam_ext.selftest.volumes import speed

START_SECONDS = 60.0  # limit for a process to reach its first case
SPEED = "speed"  # the name of the case that runs speed()


def work(names: list[str], device: str, tiny: bool, size: int) -> None:
    """Run cases, and print a line of JSON before and after each case and for each of its errors; SPEED is one of them."""

    def say(**row: Any) -> None:
        print(json.dumps(row), flush=True)

    known = all_cases(device, tiny)
    if device != "cpu":
        torch.cuda.set_device(torch.device(device).index or 0)
        torch.zeros(1, device=device)
    for name in names:
        say(begin=name)
        began = time.perf_counter()
        torch.manual_seed(0)
        try:
            if name == SPEED:
                for row in speed(device, size):
                    say(**row)
            else:
                for part, error, limit in known[name]():
                    say(kernel=name, part=part, error=error, limit=limit)
        except Exception as error:
            say(**raised(name, error))
            if device != "cpu":
                torch.cuda.synchronize()  # if this raises, this process can no longer use the device
        say(end=name, seconds=round(time.perf_counter() - began, 3))


class Runner:
    """Runs the cases in other processes, one process after the other, and passes their rows to ``report``."""

    def __init__(
        self, device: str, tiny: bool, size: int, case_seconds: float, report: Callable[[dict[str, Any]], None]
    ) -> None:
        self.device, self.tiny, self.size, self.case_seconds, self.report = device, tiny, size, case_seconds, report

    def run(self, names: list[str]) -> bool:
        """Run the cases; whether every kernel is right."""
        right, left = True, list(names)
        while left:
            ok, done, why = self._process(left)
            right &= ok
            left = left[done:]
            if why is None:
                break
            right = False
            ended = left[0] if left else "the process, after its last case"
            self.report({"kernel": ended, "part": "ended its process", "error": None, "limit": 0.0, "why": why})
            left = left[1:]
            if SPEED in left:  # the most important case comes first now
                left = [SPEED, *(n for n in left if n != SPEED)]
        return right

    def _process(self, names: list[str]) -> tuple[bool, int, str | None]:
        """Run cases in one process: whether all were right, how many ended, and why the process ended early, or None."""
        command = [sys.executable, "-m", "tcam_ext.selftest", "--worker", "--device", self.device, "--size", str(self.size)]
        command += ["--tiny"] if self.tiny else []
        root = str(Path(tcam_ext.__file__).resolve().parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(names))
        process.stdin.close()
        lines: queue.Queue[str | None] = queue.Queue()
        errors: list[str] = []
        for stream, put in ((process.stdout, lines.put), (process.stderr, errors.append)):
            threading.Thread(target=_pump, args=(stream, put), daemon=True).start()
        right, done, patience = True, 0, START_SECONDS
        while True:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                process.kill()
                process.wait()
                return right, done, f"no output for {patience:.0f} s"
            if line is None:
                break
            try:
                row = json.loads(line)
            except ValueError:  # output of a tool that wraps the process, such as compute-sanitizer
                print(line, end="", file=sys.stderr, flush=True)
                continue
            patience = self.case_seconds
            if "end" in row:
                done += 1
            if "begin" not in row:
                self.report(row)
            if "error" in row:
                right &= passed(row)
        status = process.wait()
        if status == 0 and done == len(names):
            return right, done, None
        last = [e for e in "".join(filter(None, errors)).strip().splitlines() if e.strip()]
        return right, done, f"exit status {status}" + (f": {last[-1][:300]}" if last else "")


def _pump(stream: IO[str], put: Callable[[Any], Any]) -> None:
    for line in stream:
        put(line)
    put(None)


def passed(row: dict[str, Any]) -> bool:
    return row["error"] is not None and bool(row["error"] < row["limit"])  # not NaN
