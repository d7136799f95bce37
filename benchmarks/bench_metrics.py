"""SSIM and MS-SSIM of tcam beside MONAI's: seconds, peak memory and difference, on noisy volumes.

python benchmarks/bench_metrics.py [--sizes 64 128] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric
from tcam_diff.evaluation.metrics import SCALES, SIGMA, WINDOW, ms_ssim3d, scales, ssim3d


def metrics(size: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Pairs of functions of two volumes (1, H, W, D) by the metric's name: ours and MONAI's."""
    options: dict[str, Any] = {"spatial_dims": 3, "data_range": 1.0}
    dense = SSIMMetric(**options, win_size=WINDOW, kernel_sigma=SIGMA)
    made = {"SSIM": (ssim3d, lambda a, b: float(dense(a[None], b[None])))}
    count = scales(size)
    if count > 1:
        weights = [w / sum(SCALES[:count]) for w in SCALES[:count]]
        several = MultiScaleSSIMMetric(**options, kernel_size=WINDOW, kernel_sigma=SIGMA, weights=weights)
        made[f"MS-SSIM, {count} scales"] = (ms_ssim3d, lambda a, b: float(several(a[None], b[None])))
    return made


def called(metric: Callable[..., Any], a: torch.Tensor, b: torch.Tensor) -> tuple[float]:
    return (metric(a, b),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="voxels along each axis")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    for key, value in harness.environment().items():
        print(f"# {key}: {value}")
    rows = []
    for size in a.sizes:
        generator = torch.Generator().manual_seed(0)
        truth = torch.rand(1, size, size, size, generator=generator)
        got = (truth + 0.1 * torch.randn(truth.shape, generator=generator)).clamp(0, 1)
        for name, (ours, monai) in metrics(size).items():
            runs = {"tcam": functools.partial(called, ours, got, truth), "MONAI": functools.partial(called, monai, got, truth)}
            difference = abs(runs["tcam"]()[0] - runs["MONAI"]()[0])
            times = harness.interleave(runs, a.repeats)
            for rival, measured in times.items():
                row = harness.row(name, size, "value", rival, measured)
                row.ratio = harness.statistics.median(times["MONAI"]) / row.seconds
                row.memory_mb = harness.peak_memory(runs[rival])
                rows.append({**vars(row), "difference": difference})
                print(f"{harness.line(row)}  difference {difference:.1e}", flush=True)
    if a.json:
        harness.write_json(a.json, rows)
        print(f"wrote {a.json}")


if __name__ == "__main__":
    main()
