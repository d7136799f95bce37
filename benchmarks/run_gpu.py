"""Run all checks and measurements that need a GPU, in two calls that fit into fifteen minutes.

    benchmarks/run_gpu.sh first OUT      at most 420 s: build; check every kernel against its mirror, check and time 512^3
                                         (python -m tcam_ext.selftest); rivals at 512^3; tests/ops/test_cuda.py
    benchmarks/run_gpu.sh second OUT     at most 330 s, right after the first and on the same machine: compute-sanitizer;
                                         Nsight Compute; the peak rates of mma_rate.cu; the other GPU tests

The most important steps come first. Every step has a time limit, and a failed step does not stop the others. The calls write
OUT/CALL.log, OUT/CALL.jsonl (one line for each result, written at once) and OUT/CALL.json; the second also writes
OUT/profile.ncu-rep. --steps runs some of the steps only.

Required: torch with CUDA, nvcc, pybind11, ninja, pytest, hypothesis. Not required: .git (TCAM_COMMIT names the commit), an
installed tcam_ext, a network. `make rehearse` runs both calls without a GPU (--device cpu and small sizes).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
RATE = ROOT / "build" / "mma_rate"
LIMIT = {"first": 420, "second": 330}
#: Milliseconds at 512^3 on an H200: measured at commit 6c313ae, and asked for.
EXPECTED = {
    "forward": {"measured": 22.6, "asked": 20},
    "loss+gradients": {"measured": 132, "asked": 85},
    "forward+backward": {"measured": 152, "asked": 105},
}
VERSIONS = """
import importlib.metadata, platform, sys, torch
print("python", platform.python_version())
for name in "torch numpy setuptools pybind11 ninja pytest hypothesis pytest-timeout pytest-xdist pydantic".split():
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not here")
print("a kernel ran:", torch.randn(2048, 2048, device=sys.argv[1]).square().sum().item() > 0)
"""
SECTIONS = [
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables",
    "WarpStateStats", "SchedulerStats", "LaunchStats",
    "Occupancy",
]  # fmt: skip
METRICS = [
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
]


class Run:
    """One call with its folder, log and rows."""

    def __init__(self, call: str, out: Path, device: str, patience: float, steps: list[str]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.call, self.out, self.device, self.patience, self.steps = call, out, device, patience, steps
        self.rows, self.started = out / f"{call}.jsonl", time.monotonic()
        self.log: IO[str] = (out / f"{call}.log").open("w")
        self.rows.write_text("")
        self.failed: list[str] = []
        path = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(path),
            "TCAM_TEST_JSONL": str(self.rows),
            "TCAM_CPU_SETS": "avx2",  # AVX-512 takes minutes to compile, and CPU kernels are not tested here
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or _architecture(),
        }
        self.note(
            call=call, commit=os.environ.get("TCAM_COMMIT", "unknown"), device=device, date=time.strftime("%Y-%m-%d %H:%M")
        )

    def note(self, **row: Any) -> None:
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def say(self, text: str) -> None:
        self.log.write(text + "\n")
        self.log.flush()
        print(text[:160], flush=True)

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env={**self.environment, **environment}, start_new_session=True,
        )  # fmt: skip

    def step(self, name: str, limit: float, *command: str | Path, keep_rows: bool = False, **environment: str) -> bool:
        """Run a command under a time limit and record its exit status. ``keep_rows``: its output contains rows of JSON."""
        if self.steps and name not in self.steps:
            return True
        started = time.monotonic()
        left = LIMIT[self.call] * self.patience - (started - self.started) - 3
        limit = max(1.0, min(limit * self.patience, left))
        self.say(f"== {name} (at most {limit:.0f} s): {' '.join(map(str, command))}")
        try:
            process = self.start(*command, **environment)
        except OSError as error:
            self.say(f"{name}: {error}")
            return self.end(name, 127, started, limit)
        reader = threading.Thread(target=self._pump, args=(process, keep_rows))
        reader.start()
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            self.say(f"{name}: stopped after {limit:.0f} s")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = 124
        reader.join(5)
        return self.end(name, status, started, limit)

    def _pump(self, process: subprocess.Popen[str], keep_rows: bool) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.say(line.rstrip("\n"))
            if keep_rows and line.startswith("{"):
                with self.rows.open("a") as file:
                    file.write(line)

    def end(self, name: str, status: int, started: float, limit: float) -> bool:
        took = time.monotonic() - started
        self.note(step=name, status=status, seconds=round(took, 1), limit=round(limit))
        self.say(f"== {name}: status {status}, {took:.1f} s")
        if status:
            self.failed.append(name)
        return status == 0

    def finish(self) -> int:
        """Write the summary, print the figures beside the expected ones and report failures; the exit status."""
        rows = []
        for line in self.rows.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                self.say(f"not JSON: {line}")
        timed = [r for r in rows if r.get("rival") == "tcam_ext bfloat16" and r.get("what") in EXPECTED]
        for r in timed:
            r["expected_ms_at_512"] = EXPECTED[r["what"]]
            self.say(f"{r['size']}^3 {r['what']}: {r['seconds'] * 1e3:.1f} ms; at 512^3 {EXPECTED[r['what']]}")
        wrong = [r for r in rows if "limit" in r and "kernel" in r and not (r["error"] is not None and r["error"] < r["limit"])]
        for r in wrong:
            self.say(f"WRONG: {r['kernel']}: {r['part']}: {r['error']} (limit {r['limit']}) {r.get('why', '')}")
        broken = [r for r in rows if r.get("outcome") == "failed"]
        for r in broken:
            self.say(f"FAILED: {r['test']}: {r['why'][-150:]}")
        summary = {
            "environment": rows[0],
            "steps": [r for r in rows if "step" in r],
            "kernels": {"right": sum("kernel" in r for r in rows) - len(wrong), "wrong": wrong},
            "tests": {o: sum(r.get("outcome") == o for r in rows) for o in ("passed", "failed", "skipped")}
            | {"broken": broken},
            "rows": [r for r in rows[1:] if not {"step", "kernel", "outcome", "end"} & set(r)],
        }
        (self.out / f"{self.call}.json").write_text(json.dumps(summary, indent=1) + "\n")
        self.say(
            f"{time.monotonic() - self.started:.0f} s in all" + (f"; failed: {' '.join(self.failed)}" if self.failed else "")
        )
        self.log.close()
        return 1 if self.failed else 0


@functools.cache
def _architecture() -> str:
    """The architecture of the first GPU as in TORCH_CUDA_ARCH_LIST; Hopper's without a GPU."""
    script = "import torch; a, b = torch.cuda.get_device_capability(); print(f'{a}.{b}' + ('a' if a == 9 else ''))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return done.stdout.strip() or "9.0a"


def pytest(*arguments: str, workers: int) -> list[str]:
    """The command that runs the GPU tests, with or without plugins of pytest."""
    options = ["-m", "gpu", "--hypothesis-profile=card", "-p", "no:cacheprovider", "-o", "addopts=", "--strict-markers"]
    options += ["--import-mode=importlib", "-q", "-rfE", "--tb=short"]
    if workers and importlib.util.find_spec("xdist"):
        options += ["-n", str(workers)]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def first(run: Run, size: int) -> None:
    architecture = _architecture().replace(".", "")
    RATE.parent.mkdir(exist_ok=True)
    gencode = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    rate = ("mma_rate", 110, "nvcc", "-std=c++17", "-O3", gencode, "benchmarks/mma_rate.cu", "-o", RATE)
    compiling = threading.Thread(target=run.step, args=rate)
    compiling.start()
    building = threading.Thread(
        target=run.step,
        args=("build", 110, sys.executable, "setup.py", "-q", "build_ext", "--inplace"),
        kwargs={"TCAM_CUDA": "on"},
    )
    building.start()
    run.step("nvidia-smi", 20, "nvidia-smi")
    run.step("versions", 60, sys.executable, "-c", VERSIONS, run.device)
    building.join()
    selftest = [sys.executable, "-m", "tcam_ext.selftest", "--device", run.device, "--jsonl", run.rows]
    run.step("selftest", 130, *selftest, "--size", str(size))
    rivals = ["naive float32", "naive bfloat16 autocast", "factored PyTorch float32"]
    rivals += ["ours float16", "ours tf32", "ours float32"]
    if run.device == "cpu":
        rivals = ["naive float32", "factored PyTorch float32", "ours float32"]
    run.step(
        "rivals", 100, sys.executable, "benchmarks/bench_decode_grid.py", "--device", run.device, "--cases", "tcam", "--sizes",
        str(size), "--repeats", "3", "--budget", "2", "--rivals", *rivals, "--jsonl", run.rows,
    )  # fmt: skip
    run.step("test_cuda", 75, *pytest("tests/ops/test_cuda.py", workers=0))
    compiling.join()


def second(run: Run, size: int) -> None:
    part = "fused bfloat16 128" if run.device != "cpu" else "wide"
    for tool, limit, cases in (("memcheck", 60, ""), ("racecheck", 50, part), ("synccheck", 30, part)):
        run.step(
            tool, limit, "compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "9",
            sys.executable, "-m", "tcam_ext.selftest", "--device", run.device, "--tiny", "--case-seconds", "45",
            "--only", cases, "--jsonl", run.rows, PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
    report = run.out / "profile"
    one_call = [sys.executable, "benchmarks/one_call.py", "--device", run.device, "--size", str(size // 2)]
    ncu = ["ncu", "--clock-control", "none", "--target-processes", "all"]
    ncu += ["--kernel-name", "regex:fused_|delta_sums|add_axis_sum|map_kernel", "--launch-count", "24"]
    sections = [x for s in SECTIONS for x in ("--section", s)]
    run.step("profile", 45, *ncu, *sections, "--force-overwrite", "--export", report, *one_call)
    run.step("profile_text", 15, "ncu", "--import", f"{report}.ncu-rep", "--page", "details", "--print-units", "base")
    # Metrics run apart from the sections: Nsight Compute refuses all of them if it does not know one name.
    run.step("profile_metrics", 25, *ncu, "--metrics", ",".join(METRICS), *one_call)
    run.step("ceilings", 35, os.environ.get("TCAM_RATE", str(RATE)), keep_rows=True)
    run.step("other_tests", 70, *pytest("tests/ops", "--ignore=tests/ops/test_cuda.py", workers=8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=list(LIMIT))
    parser.add_argument("out", type=Path, help="the folder for results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=512, help="voxels along each axis of the volume that is timed")
    parser.add_argument("--steps", nargs="+", default=[], metavar="STEP", help="run these steps only, as named in the log")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on every time limit, for slower machines")
    a = parser.parse_args()
    run = Run(a.call, a.out.resolve(), a.device, a.patience, a.steps)
    {"first": first, "second": second}[a.call](run, a.size)
    sys.exit(run.finish())


if __name__ == "__main__":
    main()
