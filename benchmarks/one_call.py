"""One forward and one loss with gradients at the operating point, as the target of a profiler.

python benchmarks/one_call.py --device cuda --size 256
"""

from __future__ import annotations

import argparse

import harness
import torch

import tcam_ext
from tcam_ext.selftest.volumes import OPERATING_POINT
from tcam_ext.testing import make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--compute", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    a = parser.parse_args()
    torch.manual_seed(0)
    p = make(**OPERATING_POINT, size=(a.size,) * 3).to(torch.float32, True, a.device)
    options = {**p.options, "compute_dtype": getattr(torch, a.compute)}
    with torch.no_grad():
        volume = p.call(tcam_ext.decode_grid, compute_dtype=options["compute_dtype"])
    loss = tcam_ext.decode_grid_loss(p.planes, p.weights, p.biases, torch.rand_like(volume), p.size, **options)
    loss.backward()
    print(f"{harness.commit()}: volume's mean {float(volume.mean()):.4f}, loss {float(loss.detach()):.4f}")


if __name__ == "__main__":
    main()
