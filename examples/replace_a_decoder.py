"""Replace the decoder of a triplane project: an EG3D-like module in plain PyTorch, then one call of tcam_ext.

python examples/replace_a_decoder.py [--points 200000]
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

import tcam_ext
from tcam_ext import conventions


class Decoder(torch.nn.Module):
    """The project's decoder: samples of three planes at points, their mean, and an MLP."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(channels, 64), torch.nn.Softplus(), torch.nn.Linear(64, 4))

    def forward(self, planes: torch.Tensor, xyz: torch.Tensor) -> torch.Tensor:
        """Decode planes (B, 3, C, h, w) at xyz (B, N, 3) in [-1, 1] to (B, N, 4)."""
        features = []
        for plane, (rows, columns) in zip(planes.unbind(1), conventions.eg3d.plane_axes, strict=True):
            grid = xyz[..., [columns, rows]].unsqueeze(1)
            features.append(F.grid_sample(plane, grid, align_corners=False, padding_mode="zeros")[:, :, 0].mT)
        decoded: torch.Tensor = self.net(torch.stack(features).mean(0))
        return decoded


def replacement(decoder: Decoder, planes: torch.Tensor, xyz: torch.Tensor) -> torch.Tensor:
    """The same function of the same parameters in one call."""
    linears = [m for m in decoder.net if isinstance(m, torch.nn.Linear)]
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]
    decoded: torch.Tensor = tcam_ext.decode_points(planes, weights, biases, xyz, **conventions.eg3d.options)
    return decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200_000)
    a = parser.parse_args()
    torch.manual_seed(0)
    decoder, planes = Decoder(), torch.randn(1, 3, 32, 128, 128, requires_grad=True)
    xyz = torch.rand(1, a.points, 3) * 2 - 1
    results = {}
    for name, decode in (("before", decoder), ("after", lambda p, x: replacement(decoder, p, x))):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            out = decode(planes, xyz)
            gradients = torch.autograd.grad(out.square().sum(), [planes, *decoder.parameters()])
            times.append(time.perf_counter() - start)
        results[name] = [out.detach(), *gradients]
        print(f"{name}: {1e3 * sorted(times[1:])[1]:.0f} ms for forward and backward")
    worst = max(float((b - c).norm() / b.norm()) for b, c in zip(results["before"], results["after"], strict=True))
    print(f"largest relative difference of the output and the gradients: {worst:.1e}")


if __name__ == "__main__":
    main()
