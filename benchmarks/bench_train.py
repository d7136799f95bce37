"""Time a training step of stage 1 beside decode_grid_loss alone on the same shapes: the decoder's share of a step.

python benchmarks/bench_train.py [--device cuda] [--cases ...] [--repeats 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.objective import Lattice
from tcam_diff.autodecoder.train import AutodecoderTraining
from tcam_diff.data.store import StoreWriter, quantise
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.training.distributed import Distributed, device_of


@dataclass
class Case:
    preset: str
    size: int
    overrides: tuple[str, ...] = ()
    objects: int = 16


CASES = {
    "cohort 64, fast": Case("fast", 64),
    "cohort 64, fast, stride 3": Case("fast", 64, ("stride=3",)),
    "cohort 64, four layers": Case("fast", 64, ("widths=[128,128,128,128]",)),
    "cohort 64, whole volumes": Case("fast", 64, ("region=volume", "batch=1")),
    "brats 128, whole volumes": Case("fast", 128, ("region=volume", "batch=1", "widths=[128,128,128,128]"), 2),
    "brats 128, paper": Case("paper-brats", 128, ("perceptual_weight=0", "batch=1"), 2),
}


def make_store(folder: Path, size: int, objects: int) -> None:
    writer = StoreWriter(folder, {})
    rng = np.random.default_rng(0)
    info = VolumeInfo(channels=1, shape=(size, size, size), affine=np.eye(4), intensity=[(0.0, 1.0)])
    records = [
        writer.write(f"v{i}", "train", quantise(rng.random((1, size, size, size)), "uint8"), info, []) for i in range(objects)
    ]
    writer.finish(records)


def bare(task: AutodecoderTraining) -> Callable[[], None]:
    """decode_grid_loss with its gradients, of the voxels of step 0 object by object, on planes that are there already."""
    visits = task._visits(0)
    c = task.config
    calls: list[tuple[list[torch.Tensor], torch.Tensor, dict[str, Any]]] = []
    for visit in visits:
        planes = [p.clone() for p in task.table.planes(visit.object)]
        options: dict[str, Any] = {"loss": c.loss, "beta": c.beta, "compute_dtype": task.objective.compute}
        if c.noise_std:
            options |= {"noise_std": c.noise_std, "noise_seed": 1, "noise_mode": c.noise_mode}
        for region, target in zip(visit.regions, visit.targets, strict=True):
            target = target.to(task.group.device)
            if isinstance(region, Lattice):
                sampled = [p.detach().requires_grad_() for p in task.objective._lattice(planes, region)]
                calls.append((sampled, target, options | {"size": target.shape[2:]}))
            else:
                leaves = [p.requires_grad_() for p in planes]
                calls.append((leaves, target, options | {"size": task.size, "box": region}))

    def run() -> None:
        for planes, target, options in calls:
            task.decoder.loss(planes, target, **options).backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES)[:4])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    environment = harness.environment()
    for key, value in environment.items():
        print(f"# {key}: {value}")
    rows = []
    print(f"{'case':<28} {'voxels':>9} {'step s':>8} {'bare s':>8} {'Mvox/s':>7} {'share':>6} {'200,000 steps':>14}")
    for name in a.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            make_store(Path(folder) / "store", case.size, case.objects)
            over = [f"data={folder}/store", f"device={a.device}", "steps=100000", *case.overrides]
            config = TrainConfig.load(case.preset, over)
            task = AutodecoderTraining(config, Distributed(device=device_of(a.device)), Path(folder))
            index = [0]

            def step(task: AutodecoderTraining = task, index: list[int] = index) -> None:
                task.step(index[0])
                index[0] += 1

            times = harness.interleave({"step": step, "bare": bare(task)}, a.repeats, device_of(a.device).type)
            voxels = sum(v.voxels for v in task._visits(0))
            task.close()
        whole, alone = (statistics.median(times[k]) for k in ("step", "bare"))
        share = statistics.median(b / s for s, b in zip(times["step"], times["bare"], strict=True))
        hours = 200000 * whole / 3600
        rows.append({
            "case": name, "size": case.size, "batch": config.batch, "voxels": voxels, "step_s": whole, "bare_s": alone,
            "step_low": min(times["step"]), "step_high": max(times["step"]), "share": share, "hours_200000": hours,
        })  # fmt: skip
        print(f"{name:<28} {voxels:>9} {whole:8.4f} {alone:8.4f} {voxels / whole / 1e6:7.2f} {share:6.0%} {hours:12.1f} h")
    if a.json:
        harness.write_json(a.json, rows)


if __name__ == "__main__":
    main()
