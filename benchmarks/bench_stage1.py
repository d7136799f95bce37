"""Stage 1 on `tcam make-cohort`: PSNR after training and, of held-out volumes, after encoding, beside `tcam estimate`.

python benchmarks/bench_stage1.py [--steps N] [--encode-steps N] [--work DIR] [--json FILE]

64 training and 16 held-out volumes of 64^3 (the FLAIR-like channel), C = 42, planes of 32^2, preset "fast" with its noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.training.logger import read_metrics


def tcam(*arguments: object) -> tuple[str, float]:
    """Run a tcam command; its output and its wall time in seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "tcam_diff.cli", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}")
    return done.stdout, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--encode-steps", type=int, default=600)
    parser.add_argument("--work", type=Path, help="keep all files here and reuse its cohort [default: a temporary folder]")
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    for key, value in harness.environment().items():
        print(f"# {key}: {value}")
    with tempfile.TemporaryDirectory() as scratch:
        work = a.work or Path(scratch)
        cohort, store, run, latents = (work / n for n in ("cohort", "store", "run", "latents"))
        tcam("make-cohort", "--n", 80, "--size", 64, "--seed", 0, "--held-out", 16, "--out", cohort, "-q")
        _, preparing = tcam("prepare", cohort, "--out", store, "-q")
        settings = ["fast", f"data={store}", f"steps={a.steps}"]
        said, _ = tcam("estimate", *settings)
        print(said)
        estimated = {line.split()[0]: line.split()[1:4] for line in said.splitlines()}
        shown, training = tcam("train-autodecoder", *settings, "--out", run)
        print(shown)
        shown, encoding = tcam("encode", run, store, "--out", latents, f"steps={a.encode_steps}")
        print(shown)
        metrics = read_metrics(run)
        log = [m for m in metrics if "loss" in m]
        held_out = [e.psnr for e in LatentSet(latents).entries]
        report = (run / "report.html").read_text()
        fitted = float(report.split("noise off</td><td>")[1].split(" dB")[0])
        checkpoints = sum(p.stat().st_size for p in (run / "checkpoints").rglob("*.pt"))
    unit = {"s": 1, "min": 60, "h": 3600, "MB": 1e-3, "GB": 1}
    row = {
        "steps": a.steps,
        "encode_steps": a.encode_steps,
        "prepare_s": preparing,
        "train_s": training,
        "encode_s": encoding,
        "fitted_psnr": fitted,
        "held_out_psnr": sum(held_out) / len(held_out),
        "held_out_low": min(held_out),
        "held_out_high": max(held_out),
        "memory_gb": log[-1]["memory_gb"],
        "disk_gb": checkpoints / 1e9,
        "estimated_s": float(estimated["time"][0]) * unit[estimated["time"][1]],
        "estimated_memory_gb": float(estimated["host"][1]) * unit[estimated["host"][2]],
        "estimated_disk_gb": float(estimated["disk"][0]) * unit[estimated["disk"][1]],
    }
    print(json.dumps(row, indent=1))
    if a.json:
        harness.write_json(a.json, [row], cores=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
