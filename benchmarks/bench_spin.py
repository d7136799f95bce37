"""Spinning threads: a training step of stage 1 for several GOMP_SPINCOUNT, alone and beside a process that keeps one core busy.

    python benchmarks/bench_spin.py [--rounds N] [--steps N] [--settings SETTING ...] [--json FILE]

The settings are those of `make demo`: volumes of 48^3, C = 8, planes of 24^2. Each measurement is a process of its own; the
settings take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: Settings of the environment; "default" is libgomp's.
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    **{f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in (0, 1000, 5000, 10000, 20000, 100000)},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}


def child(store: Path, steps: int) -> None:
    """Print the seconds of each step, in a process whose environment is one of the settings."""
    from tcam_diff.autodecoder.config import TrainConfig
    from tcam_diff.autodecoder.train import AutodecoderTraining
    from tcam_diff.training.distributed import Distributed

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.load("fast", [f"data={store}", "channels=8", "plane_size=24", f"steps={steps + 10}", "device=cpu"])
        task = AutodecoderTraining(config, Distributed(), Path(folder))
        for index in range(steps + 10):  # ten to warm up
            start = time.perf_counter()
            float(task.step(index)["loss"])
            if index >= 10:
                print(time.perf_counter() - start)
        task.close()


def make_store(folder: Path) -> None:
    """Write 16 smooth random volumes of 48^3."""
    import numpy as np
    from scipy import ndimage
    from tcam_diff.data.store import StoreWriter, quantise
    from tcam_diff.data.volume import VolumeInfo

    writer, rng, records = StoreWriter(folder, {}), np.random.default_rng(0), []
    for i in range(16):
        smooth = ndimage.gaussian_filter(rng.standard_normal((1, 48, 48, 48)), (0, 3, 3, 3))
        info = VolumeInfo(channels=1, shape=(48, 48, 48), affine=np.eye(4), intensity=[(0.0, 1.0)])
        records.append(writer.write(f"v{i}", "train", quantise((smooth * 3 + 0.5).clip(0, 1), "uint8"), info, []))
    writer.finish(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING",
                        help="settings beside the default: " + ", ".join(SETTINGS))  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        child(a.child, a.steps)
        return
    import harness

    for key, value in harness.environment().items():
        print(f"# {key}: {value}")
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    settings = [name for name in SETTINGS if name in ("default", *a.settings)]
    times: dict[tuple[str, bool], list[float]] = {(name, busy): [] for name in settings for busy in (False, True)}
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder) / "store")
        for _ in range(a.rounds):
            for (name, busy), measured in times.items():
                beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"])] if busy else []
                try:
                    command = [sys.executable, __file__, "--child", f"{folder}/store", "--steps", str(a.steps)]
                    done = subprocess.run(
                        command, env={**plain, **SETTINGS[name]}, stdout=subprocess.PIPE, text=True, check=True
                    )
                finally:
                    for process in beside:
                        process.kill()
                        process.wait()
                measured.append(statistics.median(map(float, done.stdout.split())))
    best = statistics.median(times["default", False])
    rows = []
    for name in settings:
        alone, beside_busy = (sorted(times[name, busy]) for busy in (False, True))
        row = {
            "setting": name,
            "alone_ms": statistics.median(alone) * 1e3,
            "alone_range_ms": [alone[0] * 1e3, alone[-1] * 1e3],
            "busy_ms": statistics.median(beside_busy) * 1e3,
            "busy_range_ms": [beside_busy[0] * 1e3, beside_busy[-1] * 1e3],
            "alone_to_default": statistics.median(alone) / best,
            "busy_to_alone": statistics.median(beside_busy) / statistics.median(alone),
        }
        rows.append(row)
        print(f"{name:<26} {row['alone_ms']:6.1f} ms alone, {row['busy_ms']:6.1f} ms beside a busy process", flush=True)
    if a.json:
        harness.write_json(a.json, rows)


if __name__ == "__main__":
    main()
