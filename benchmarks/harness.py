"""What every benchmark shares: the environment, timing, peak memory, JSON."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import tcam_ext
from tcam_ext import _C, library


@functools.cache
def environment() -> dict[str, Any]:
    """As it was at the first call, which is before anything is measured."""

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    facts = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    cpu = {key.strip(): value.strip() for key, value in reversed(facts)}
    name = f"{cpu.get('model name', 'unknown')} (family {cpu.get('cpu family')}, model {cpu.get('model')})"
    return {
        "command": " ".join(["python", *map(shlex.quote, (os.path.relpath(sys.argv[0]), *_arguments()))]),
        "commit": run("git", "rev-parse", "--short", "HEAD")
        + ("+changes" if run("git", "status", "--porcelain", "..") else ""),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": name,
        "threads": torch.get_num_threads(),
        "isa": _C.cpu_isa(),
        "bf16_instructions": _C.cpu_has_bf16(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "tcam_ext": tcam_ext.__version__,
        "load_before": round(os.getloadavg()[0], 2),
    }


def _arguments() -> list[str]:
    """Those of the command line that matter to a figure: not where it is written."""
    found = list(sys.argv[1:])
    if "--json" in found:
        at = found.index("--json")
        del found[at : at + 2]
    return found


def fma_peak() -> dict[str, float]:
    """GFLOP/s of registers alone on all threads, best of three: float32, and bfloat16 where there are instructions."""
    threads = torch.get_num_threads()
    kinds = {"float32": 0, "bfloat16": 2}
    return {name: max(_C.cpu_peak_flops(kind, 0.3, threads) for _ in range(3)) / 1e9 for name, kind in kinds.items()}


@dataclass
class Row:
    case: str
    size: int
    what: str  # forward, or forward+backward
    rival: str
    seconds: float  # median
    low: float
    high: float
    repeats: int
    mvoxels: float  # per second
    ratio: float | None = None  # to the naive decode of the same case
    memory_mb: float | None = None  # peak above inputs, output, grad_output and returned gradients
    gflops: float | None = None  # of the hidden layers
    of_peak: float | None = None
    extrapolated: bool = False


def measure(run: Callable[[], Any], repeats: int, budget: float = 90.0) -> list[float]:
    """Times of ``repeats`` runs after one to warm up, fewer (at least one) when they take longer than the budget."""
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    if first > budget:
        return [first]
    times = []
    while len(times) < repeats and (not times or time.perf_counter() - start < budget):
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return times


def interleave(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """The same for several rivals by turns, so that a slow minute of the machine falls on all of them."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - before)
    return times


def peak_memory(run: Callable[[], Any]) -> float:
    """MB by which resident memory rises above its level before, less what the run returns (Linux; NaN elsewhere)."""
    try:
        library._workspaces.__init__()  # type: ignore[misc]
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return float("nan")
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    returned = sum(t.nbytes for t in kept if isinstance(t, torch.Tensor)) / 2**20
    return peak - before - returned


def _status(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return float(line.split()[1]) / 1024


def row(case: str, size: int, what: str, rival: str, times: list[float]) -> Row:
    median = statistics.median(times)
    return Row(case, size, what, rival, median, min(times), max(times), len(times), size**3 / median / 1e6)


HEADER = (
    f"{'case':<16}{'size':>5} {'what':<17}{'rival':<26}{'median s':>9}{'spread':>16}{'Mvox/s':>8}"
    f"{'ratio':>7}{'MB':>7}{'GFLOP/s':>8}{'peak':>6}"
)


def line(r: Row) -> str:
    spread = f"{r.low:.3f}..{r.high:.3f}"
    return (
        f"{r.case:<16}{r.size:>5} {r.what:<17}{r.rival:<26}{r.seconds:>9.3f}{spread:>16}{r.mvoxels:>8.2f}"
        f"{'' if r.ratio is None else f'{r.ratio:.1f}':>7}{'' if r.memory_mb is None else f'{r.memory_mb:.0f}':>7}"
        f"{'' if r.gflops is None else f'{r.gflops:.0f}':>8}{'' if r.of_peak is None else f'{100 * r.of_peak:.0f}%':>6}"
        f"{'  (extrapolated)' if r.extrapolated else ''}"
    )


def write_json(path: Path, rows: Sequence[Row | dict[str, Any]], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [asdict(r) if isinstance(r, Row) else r for r in rows]
    path.write_text(json.dumps({"environment": environment(), **more, "rows": found}, indent=1) + "\n")
    print(f"wrote {path}")
