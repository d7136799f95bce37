"""Time sample_points and sample_grid beside grid_sample and cat.

    python benchmarks/bench_sample.py [--points 262144] [--size 96] [--device cuda] [--json FILE]

Planes 3 x (42, 64, 64), concatenated. The naive grid creates coordinates and samples them as points. "forward+backward"
computes gradients of the planes, "and xyz" those of the coordinates too. Memory excludes inputs, output and gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import bench_decode_points
import harness
import torch
import torch.nn.functional as F
from torch import Tensor

import tcam_ext
from tcam_ext.options import PLANE_AXES

Run = Callable[[], list[Tensor]]


def naive(planes: list[Tensor], xyz: Tensor) -> Tensor:
    return torch.cat(
        [
            F.grid_sample(p, xyz[..., [c, r]].unsqueeze(1), align_corners=False, padding_mode="border")[:, :, 0]
            for p, (r, c) in zip(planes, PLANE_AXES, strict=True)
        ],
        1,
    )


def runs(sample: dict[str, Callable[[], Tensor]], inputs: list[Tensor], grad: Tensor, backward: bool) -> dict[str, Run]:
    def once(f: Callable[[], Tensor]) -> list[Tensor]:
        if backward:
            out = f()
            return list(torch.autograd.grad(out, inputs, grad.view(out.shape)))
        with torch.no_grad():
            return [f()]

    return {name: lambda f=f: once(f) for name, f in sample.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=2**18)
    parser.add_argument("--size", type=int, default=96, help="voxels along each axis of the grid")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    for key, value in harness.environment().items():
        print(f"# {key}: {value}")
    torch.manual_seed(0)
    planes = [torch.randn(1, 42, 64, 64, device=a.device, requires_grad=True) for _ in range(3)]
    rows = []

    def add(points: int, what: str, case: str, rivals: dict[str, Run]) -> None:
        rows.extend(bench_decode_points.compare(rivals, points, what, case, a.repeats, a.device))
        if a.json:
            harness.write_json(a.json, rows)

    xyz = (torch.rand(1, a.points, 3, device=a.device) * 2 - 1).requires_grad_()
    fixed, grad = xyz.detach(), torch.randn(126 * a.points, device=a.device)
    for what, where, inputs in (("forward", fixed, []), ("forward+backward", fixed, planes), ("and xyz", xyz, [*planes, xyz])):
        both: dict[str, Callable[[], Tensor]] = {
            "naive": lambda where=where: naive(planes, where).mT,  # type: ignore[misc]
            "ours": lambda where=where: tcam_ext.sample_points(planes, where),  # type: ignore[misc]
        }
        add(a.points, what, "points", runs(both, inputs, grad, what != "forward"))

    n = a.size
    grad = torch.randn(126 * n**3, device=a.device)

    def naive_grid() -> Tensor:
        axis = (torch.arange(n, device=a.device) + 0.5) / n * 2 - 1
        where = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(1, -1, 3)
        return naive(planes, where).view(1, 126, n, n, n)

    for what in ("forward", "forward+backward"):
        both = {"naive": naive_grid, "ours": lambda: tcam_ext.sample_grid(planes, (n, n, n))}
        add(n**3, what, f"grid {n}³", runs(both, planes, grad, what != "forward"))


if __name__ == "__main__":
    main()
