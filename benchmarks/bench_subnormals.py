"""One step's loss and gradients of a decoder whose outputs are nearly 0, as those of a background after long training.

    PYTHONPATH=BUILD python benchmarks/bench_subnormals.py [--name TEXT] [--json FILE]

BUILD is a folder with a tcam_ext package and its binary, to compare builds; results are added to FILE. With a sigmoid after
logits of -L, gradients have the size of exp(-2 L) / N, which is subnormal in float32 from L of about 38.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import harness
import torch

import tcam_ext
from tcam_ext.testing import make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="this build")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--logits", type=float, nargs="+", default=[0.0, -20.0, -40.0], help="means of the logits")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="add the figures here")
    a = parser.parse_args()
    rows = []
    for compute in ("float32", "bfloat16"):
        for logit in a.logits:
            torch.manual_seed(0)
            p = make(channels=21, texels=(32,) * 3, widths=(128, 128, 1), size=(a.size,) * 3).to(torch.float32, True, "cpu")
            with torch.no_grad():
                p.biases[-1].fill_(logit)
            options = {"output_activation": "sigmoid", "compute_dtype": getattr(torch, compute)}
            target = torch.zeros(1, 1, *p.size)

            def step(p=p, target=target, options=options) -> None:  # type: ignore[no-untyped-def]
                tcam_ext.decode_grid_loss(p.planes, p.weights, p.biases, target, p.size, **options).backward()

            seconds = harness.measure(step, a.repeats)
            row = {"build": a.name, "products": compute, "logit": logit, "size": a.size, "ms": 1e3 * statistics.median(seconds)}
            row |= {"low": 1e3 * min(seconds), "high": 1e3 * max(seconds)}
            rows.append(row)
            print(row, flush=True)
    if a.json:
        before = json.loads(a.json.read_text())["rows"] if a.json.exists() else []
        harness.write_json(a.json, [*before, *rows])


if __name__ == "__main__":
    main()
