"""``python -m tcam_ext.selftest``: check every kernel on this machine's devices and time it beside plain PyTorch.

Prints a line for each kernel: passed or FAILED, its error, its limit. Then times TCAM-Diff's decoder and checks it at random
voxels. The exit status is 1 if a kernel is wrong.

The kernels run in a separate process. A kernel that crashes, hangs, or leaves the device unusable ends that process and counts
as failed; another process runs the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch

import tcam_ext
from tcam_ext import info
from tcam_ext.selftest.cases import all_cases
from tcam_ext.selftest.runner import SPEED, Runner, passed, work

SIZE = {"cpu": 64, "cuda": 256}  # of the volume that is timed, voxels an axis


def show(row: dict[str, Any]) -> None:
    if "error" in row:
        verdict = "passed" if passed(row) else "FAILED"
        name = f"{row['kernel']}: {row['part']}"
        print(
            f"{verdict}  {name:<72} {'' if row['error'] is None else format(row['error'], '.2e'):>9}  limit {row['limit']:.0e}"
            + (f"  {row['why']}" if row.get("why") else "")
        )
    elif "rival" in row:
        memory = "" if row["memory_mb"] is None else f"{row['memory_mb']:8.0f} MB at most"
        name = f"{row['size']}^3 {row['what']}"
        print(f"        {name:<32} {row['rival']:<26} {row['seconds'] * 1e3:10.1f} ms {row['mvoxels']:9.1f} Mvoxel/s {memory}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tcam_ext.selftest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help='"cpu", "cuda", "cuda:1"; default: the CPU, then every GPU')
    parser.add_argument(
        "--size", type=int, help="voxels an axis of the timed volume; default 64 on a CPU, 256 on a GPU; 0: no timing"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="run each kernel once on small volumes, without timing (for compute-sanitizer)"
    )
    parser.add_argument("--only", default="", help="run only the cases with this in their name")
    parser.add_argument(
        "--case-seconds", type=float, default=20.0, help="seconds without output after which a case counts as hanging"
    )
    parser.add_argument("--jsonl", type=Path, help="also append every line to this file, as JSON")
    parser.add_argument("--list", action="store_true", help="list the cases without running them")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.size is not None and a.size != 0 and a.size < 8:
        parser.error(f"--size: expected 0, or at least 8, got {a.size}")
    if a.worker:
        return work(json.load(sys.stdin), a.device, a.tiny, a.size)
    devices = [a.device] if a.device else ["cpu", *(f"cuda:{i}" for i in range(_usable()))]
    right = True
    for device in devices:
        kind = device.split(":")[0]
        if kind not in SIZE or (kind == "cuda" and not _usable()):
            parser.error(f'--device: expected "cpu", or "cuda" where there is a GPU and a build with CUDA, got {device}')
        size = (0 if a.tiny else SIZE[kind]) if a.size is None else a.size
        names = [n for n in [*all_cases(device, a.tiny), *([SPEED] if size else [])] if a.only in n]
        if a.list:
            print("\n".join(names))
            continue
        if not names:
            parser.error(f"--only: expected a part of a case's name (--list shows them), got {a.only!r}")
        print("\n".join(f"# {name + ':' if name else '':<22}{value}" for name, value in info.lines()))
        print(f"# on {device}", flush=True)
        with a.jsonl.open("a") if a.jsonl else open(os.devnull, "w") as file:

            def report(row: dict[str, Any], file: IO[str] = file, device: str = device) -> None:
                show(row)
                file.write(json.dumps({"device": device, **row}) + "\n")
                file.flush()

            began = time.perf_counter()
            this = Runner(device, a.tiny, size, a.case_seconds, report).run(names)
        right &= this
        print(
            f"# {device}: {'every kernel is right' if this else 'SOME KERNELS ARE WRONG'}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    sys.exit(0 if right else 1)


def _usable() -> int:
    """GPUs that this build can use."""
    return torch.cuda.device_count() if tcam_ext._C.has_cuda and torch.cuda.is_available() else 0


if __name__ == "__main__":
    main()
