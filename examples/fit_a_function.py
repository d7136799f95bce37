"""Fit three feature planes and a decoder to a function of space, and decode it at another resolution.

python examples/fit_a_function.py [--steps 300] [--size 64]
"""

from __future__ import annotations

import argparse
import time

import torch

import tcam_ext


def gyroid(size: int) -> torch.Tensor:
    """A smooth periodic volume (1, 1, size, size, size) in [0, 1]."""
    u = (torch.arange(size) + 0.5) / size * 2 * torch.pi
    x, y, z = torch.meshgrid(u, u, u, indexing="ij")
    return torch.sigmoid(4 * (x.sin() * y.cos() + y.sin() * z.cos() + z.sin() * x.cos()))[None, None]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of volumes in [0, 1]."""
    return float(-10 * (a - b).square().mean().log10())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", type=int, default=64, help="voxels along each axis")
    a = parser.parse_args()
    torch.manual_seed(0)
    target = gyroid(a.size)
    planes = torch.nn.Parameter(0.1 * torch.randn(1, 3, 16, 24, 24))
    decoder = tcam_ext.TriplaneDecoder(16, widths=(64, 64))
    optimiser = torch.optim.Adam([planes, *decoder.parameters()], lr=1e-2)
    start = time.perf_counter()
    for step in range(a.steps):
        optimiser.zero_grad(set_to_none=True)
        loss = decoder.loss(planes, target)  # forward, loss and backward in one pass, without storing the volume
        loss.backward()
        optimiser.step()
        if step % 100 == 0 or step + 1 == a.steps:
            print(f"step {step}: smooth L1 {float(loss.detach()):.5f}")
    print(f"{a.steps} steps of {a.size}^3 voxels in {time.perf_counter() - start:.1f} s")
    with torch.no_grad():
        same = decoder(planes, target.shape[2:])
        finer = decoder(planes, (2 * a.size,) * 3)
    print(f"PSNR {psnr(same, target):.1f} dB, at twice the resolution {psnr(finer, gyroid(2 * a.size)):.1f} dB")


if __name__ == "__main__":
    main()
