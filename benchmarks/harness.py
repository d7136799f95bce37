"""Helpers of the benchmarks: environment, timing, peak memory, JSON."""

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

ROOT = Path(__file__).resolve().parents[1]
try:
    import tcam_ext
except ModuleNotFoundError:  # built in place and not installed
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    import tcam_ext
from tcam_ext import _C, library  # noqa: E402
from tcam_ext.selftest.volumes import seconds, timed  # noqa: E402


def commit(*folders: str) -> str:
    """The commit of the sources: TCAM_COMMIT if set (for a copy without .git), else git's, with "+changes" if files differ, or
    those in ``folders`` if any are given."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if given := os.environ.get("TCAM_COMMIT"):
        return given
    if git("rev-parse", "--show-toplevel") != str(ROOT):  # no repository, or that of a parent folder
        return "unknown"
    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "--", *folders) else "")


def append(path: Path | None, row: Row | dict[str, Any]) -> None:
    """Append a row to a file as a line of JSON, so that a later failure does not lose it."""
    if path:
        with path.open("a") as file:
            file.write(json.dumps(asdict(row) if isinstance(row, Row) else row) + "\n")


def _say_what_is_missing(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """An excepthook that reports a missing package in one line: benchmarks of tcam_diff need the extra train."""
    if isinstance(error, ModuleNotFoundError):
        print(f"{Path(sys.argv[0]).name}: the package {error.name} is missing; run pip install '.[train]'", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _say_what_is_missing


@functools.cache
def environment() -> dict[str, Any]:
    """The machine, versions and load at the first call, which precedes every measurement."""

    def run(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:  # no git, no nvidia-smi
            return "unknown"
        return done.stdout.strip()

    facts = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    cpu = {key.strip(): value.strip() for key, value in reversed(facts)}
    name = f"{cpu.get('model name', 'unknown')} (family {cpu.get('cpu family')}, model {cpu.get('model')})"
    return {
        "command": " ".join(["python", *map(shlex.quote, (os.path.relpath(sys.argv[0]), *_arguments()))]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": name,
        "threads": torch.get_num_threads(),
        "isa": _C.cpu_isa(),
        "bf16_instructions": _C.cpu_has_bf16(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "tcam_ext": tcam_ext.__version__,
        "load_before": round(os.getloadavg()[0], 2),
        **gpu(run),
    }


def gpu(run: Callable[..., str]) -> dict[str, Any]:
    """The GPU and its driver; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    fields = "driver_version,clocks.max.sm,power.limit"
    return {
        "card": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        fields: run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"),
        "architectures": _C.cuda_info().get("architectures", "none"),
    }


def _arguments() -> list[str]:
    """The arguments of the command line without those that name output files."""
    arguments = list(sys.argv[1:])
    for place in ("--json", "--jsonl", "--work", "--picture"):
        if place in arguments:
            at = arguments.index(place)
            del arguments[at : at + 2]
    return arguments


def peak(device: str) -> dict[str, float]:
    """The machine's highest rates in GFLOP/s. CPU: a register-only loop on all threads, best of three, in float32 and, where
    the CPU has instructions for it, bfloat16. CUDA: torch's product of two large matrices; also "copy GB/s", read plus
    write."""
    if device == "cuda":
        return matrix_peak()
    threads = torch.get_num_threads()
    kinds = {"float32": 0, "bfloat16": 2}
    return {name: max(_C.cpu_peak_flops(kind, 0.3, threads) for _ in range(3)) / 1e9 for name, kind in kinds.items()}


def cpu_matrix_peak(n: int = 2048) -> dict[str, float]:
    """Rates of torch's product of two large matrices on the CPU in GFLOP/s, which for bfloat16 may use AMX."""
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        rates[name] = 2 * n**3 / statistics.median(measure(lambda a=a, b=b: a @ b, 9)) / 1e9  # type: ignore[misc]
    return rates


def matrix_peak(n: int = 8192) -> dict[str, float]:
    rates = {}
    flag = torch.backends.cuda.matmul.fp32_precision
    for name, dtype, precision in (
        ("float32", torch.float32, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("bfloat16", torch.bfloat16, flag),
        ("float16", torch.float16, flag),
    ):
        torch.backends.cuda.matmul.fp32_precision = precision
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        times = measure(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 20, device="cuda")  # type: ignore[misc]
        rates[name] = 2 * n**3 / statistics.median(times) / 1e9
    torch.backends.cuda.matmul.fp32_precision = flag
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rates["copy GB/s"] = 2 * source.numel() / statistics.median(measure(lambda: target.copy_(source), 20, device="cuda")) / 1e9
    return rates


@dataclass
class Row:
    case: str
    size: int
    what: str  # the pass: forward, forward+backward or loss+gradients
    rival: str
    seconds: float  # median
    low: float
    high: float
    repeats: int
    mvoxels: float  # per second
    ratio: float | None = None  # speed-up over the naive decode of the same case
    memory_mb: float | None = None  # peak, excluding inputs, output, grad_output and returned gradients
    gflops: float | None = None  # of the products between hidden layers
    of_peak: float | None = None  # gflops as a share of the machine's peak
    extrapolated: bool = False


def measure(run: Callable[[], Any], repeats: int, budget: float = 90.0, device: str = "cpu") -> list[float]:
    """Seconds of ``repeats`` runs after a warm-up; fewer, at least one, when they exceed the budget in seconds."""
    return seconds(run, device, repeats, budget)


def interleave(
    runs: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu", budget: float = 300.0
) -> dict[str, list[float]]:
    """Seconds of several rivals that take turns, so that a slow minute of the machine affects all of them. Rounds stop when
    they exceed the budget. A rival that raises is left out, with a line that says why."""
    start = time.perf_counter()
    times: dict[str, list[float]] = {}
    for name, run in runs.items():
        try:
            run()
            times[name] = []
        except Exception as error:
            print(f"# {name}: left out, {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
    rounds = 0
    while rounds < repeats and (rounds == 0 or time.perf_counter() - start < budget):
        for name, measured in times.items():
            measured.append(timed(runs[name], device))
        rounds += 1
    return times


def peak_memory(run: Callable[[], Any], device: str = "cpu") -> float:
    """Peak memory in MB above the level before the run, without what the run returns: resident memory on a CPU (NaN except on
    Linux), memory of torch's allocator on CUDA."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20 - _returned(returned)
    try:
        library._workspaces.__init__()  # type: ignore[misc]
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return float("nan")
    before = _status("VmRSS")
    returned = run()
    return _status("VmHWM") - before - _returned(returned)


def _returned(returned: Any) -> float:
    return sum(t.nbytes for t in returned if isinstance(t, torch.Tensor)) / 2**20


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
    records = [asdict(r) if isinstance(r, Row) else r for r in rows]
    path.write_text(json.dumps({"environment": environment(), **more, "rows": records}, indent=1) + "\n")
