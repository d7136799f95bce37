"""Time the operating point of one build of the CUDA kernels, in a few seconds, to compare builds on a card.

    PYTHONPATH=BUILD python benchmarks/time_build.py [--size 512] [--compute bfloat16]

BUILD is a folder with a tcam_ext package and its binary. TCAM_WARPGROUPS=0 takes the kernels without wgmma. Prints a line of
JSON: medians and ranges, in milliseconds, of forward, of the loss alone, of the loss with gradients, and of forward with
backward, with the target in the place of the gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import harness  # noqa: F401  finds tcam_ext in the tree if it is not installed
import torch

import tcam_ext
from tcam_ext.selftest.volumes import OPERATING_POINT
from tcam_ext.testing import make


def timed(run: Callable[[], object], repeats: int) -> list[float]:
    """Median, smallest and largest of the milliseconds of ``repeats`` runs, after two to warm up."""
    times = []
    for i in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i > 1:
            times.append(start.elapsed_time(end))
    return [round(x, 2) for x in (statistics.median(times), min(times), max(times))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--compute", default="bfloat16", help="bfloat16, float16, tf32 or float32")
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    torch.manual_seed(0)
    p = make(**OPERATING_POINT, size=(a.size,) * 3).to(torch.float32, True, "cuda")
    target = torch.rand(1, 1, *p.size, device="cuda")
    options = {**p.options, "compute_dtype": a.compute if a.compute == "tf32" else getattr(torch, a.compute)}

    def volume() -> torch.Tensor:
        return tcam_ext.decode_grid(p.planes, p.weights, p.biases, p.size, **options)

    def loss() -> torch.Tensor:
        return tcam_ext.decode_grid_loss(p.planes, p.weights, p.biases, target, p.size, **options)

    with torch.no_grad():
        row = {"forward": timed(volume, a.repeats), "loss": timed(loss, a.repeats)}
    row["loss+gradients"] = timed(lambda: loss().backward(), a.repeats)
    row["forward+backward"] = timed(lambda: volume().backward(target), a.repeats)
    print(json.dumps({"build": tcam_ext.__file__, "size": a.size, "compute": a.compute, "ms": row}), flush=True)


if __name__ == "__main__":
    main()
