"""Time decode_points beside the usual code: grid_sample, cat, linear.

    python benchmarks/bench_decode_points.py [--points 262144] [--device cuda] [--json FILE]

The operating point is C = 42, planes 3 x (42, 64, 64), MLP 126 -> 128 -> 128 -> 128 -> 128 -> 1, relu, sigmoid, with points
uniform in the box. "forward+backward" computes gradients of planes and decoder, "and xyz" those of the coordinates too. "naive"
decodes all points at once; "naive chunked" decodes and back-propagates 2^15 points at a time. Memory excludes inputs, output
and gradients. decode_points chooses between the formulations "projected" and "features".
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

import tcam_ext
from tcam_ext import library
from tcam_ext.options import PLANE_AXES

CHUNK = 2**15
WHATS = ("forward", "forward+backward", "and xyz")


class Case:
    def __init__(
        self, points: int, device: str, channels: int = 42, texels: int = 64, widths: tuple[int, ...] = (128,) * 4 + (1,)
    ):
        torch.manual_seed(0)
        n = (3 * channels, *widths)
        self.planes = [torch.randn(1, channels, texels, texels, device=device, requires_grad=True) for _ in range(3)]
        self.weights = [
            (torch.randn(n[i + 1], n[i], device=device) * (2 / n[i]) ** 0.5).requires_grad_() for i in range(len(widths))
        ]
        self.biases = [(0.1 * torch.randn(m, device=device)).requires_grad_() for m in widths]
        self.xyz = torch.rand(1, points, 3, device=device) * 2 - 1
        self.grad = torch.rand(1, points, widths[-1], device=device)
        self.options: dict[str, Any] = {"output_activation": "sigmoid"}

    def naive(self, xyz: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        samples = [
            F.grid_sample(p, xyz[..., [c, r]].unsqueeze(1), align_corners=False, padding_mode="border")[:, :, 0]
            for p, (r, c) in zip(self.planes, PLANE_AXES, strict=True)
        ]
        h = torch.cat(samples, 1).mT.to(dtype)
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = F.linear(h.relu() if i else h, w.to(dtype), b.to(dtype))
        return h.float().sigmoid()

    def ours(self, xyz: Tensor, dtype: torch.dtype | str = torch.float32) -> Tensor:
        out: Tensor = tcam_ext.decode_points(self.planes, self.weights, self.biases, xyz, compute_dtype=dtype, **self.options)
        return out

    def run(self, decode: Callable[[Tensor], Tensor], what: str, chunk: int | None = None) -> list[Tensor]:
        inputs = [*self.planes, *self.weights, *self.biases]
        if what == "forward":
            with torch.no_grad():
                return [torch.cat([decode(x) for x in self.xyz.split(chunk or self.xyz.shape[1], 1)], 1)]
        total: list[Tensor] = []
        by_xyz = []
        for x, g in zip(*(t.split(chunk or t.shape[1], 1) for t in (self.xyz, self.grad)), strict=True):
            x = x.detach().requires_grad_(what == "and xyz")
            gradients = list(torch.autograd.grad(decode(x), [*inputs, x] if what == "and xyz" else inputs, g))
            if what == "and xyz":
                by_xyz.append(gradients.pop())
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else gradients
        return total + ([torch.cat(by_xyz, 1)] if by_xyz else [])

    def rivals(self, what: str, names: list[str]) -> dict[str, Callable[[], list[Tensor]]]:
        torch._dynamo.reset()

        def formulation(code: int) -> Callable[[], list[Tensor]]:
            def once() -> list[Tensor]:
                real = library.decode_points, library.decode_points_backward
                library.decode_points = lambda *a: real[0](*a, formulation=code)
                library.decode_points_backward = lambda *a: real[1](*a, formulation=code)
                try:
                    return self.run(self.ours, what)
                finally:
                    library.decode_points, library.decode_points_backward = real

            return once

        def compiled() -> Callable[[], list[Tensor]]:
            fast = torch.compile(self.naive, fullgraph=True)
            return lambda: self.run(fast, what, CHUNK)

        everyone: dict[str, Callable[[], Callable[[], list[Tensor]]]] = {
            "naive": lambda: lambda: self.run(self.naive, what),
            "naive chunked": lambda: lambda: self.run(self.naive, what, CHUNK),
            "naive compiled": compiled,
            "naive bfloat16 MLP": lambda: lambda: self.run(lambda x: self.naive(x, torch.bfloat16), what, CHUNK),
            "ours": lambda: lambda: self.run(self.ours, what),
            "ours projected": lambda: formulation(1),
            "ours features": lambda: formulation(2),
            "ours tf32": lambda: lambda: self.run(lambda x: self.ours(x, "tf32"), what),
            "ours bfloat16": lambda: lambda: self.run(lambda x: self.ours(x, torch.bfloat16), what),
        }
        return {n: everyone[n]() for n in names}


RIVALS = {
    "cpu": ["naive", "naive chunked", "naive compiled", "ours", "ours projected", "ours features"],
    "cuda": ["naive", "naive chunked", "naive compiled", "naive bfloat16 MLP", "ours", "ours tf32", "ours projected",
             "ours features"],
}  # fmt: skip


def compare(
    runs: dict[str, Callable[[], list[Tensor]]], points: int, what: str, case: str, repeats: int, device: str
) -> list[dict[str, Any]]:
    """Time the rivals; ``ratio`` is the speed-up over "naive"."""
    times = harness.interleave(runs, repeats, device)
    base = statistics.median(times["naive"]) if "naive" in times else None
    rows = []
    for name, measured in times.items():
        seconds = statistics.median(measured)
        row = {
            "case": case, "points": points, "what": what, "rival": name, "seconds": seconds, "low": min(measured),
            "high": max(measured), "repeats": len(measured), "mpoints": points / seconds / 1e6,
            "ratio": base / seconds if base else None,
            "memory_mb": round(harness.peak_memory(runs[name], device), 1),
        }  # fmt: skip
        rows.append(row)
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        print(f"{case:<16}{points:>9} {what:<17}{name:<22}{seconds:>9.4f} s{row['mpoints']:>9.2f} Mpoint/s {ratio:>6}"
              f"{row['memory_mb']:>8.0f} MB", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", type=int, default=[2**18])
    parser.add_argument(
        "--rivals", nargs="+", choices=sorted({r for names in RIVALS.values() for r in names} | {"ours bfloat16"})
    )
    parser.add_argument("--device", choices=sorted(RIVALS), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    for key, value in harness.environment().items():
        print(f"# {key}: {value}")
    peak = harness.peak(a.device)
    rows = []
    for n in a.points:
        case = Case(n, a.device)
        for what in WHATS:
            rows += compare(case.rivals(what, a.rivals or RIVALS[a.device]), n, what, "operating point", a.repeats, a.device)
            if a.json:
                harness.write_json(a.json, rows, peak_gflops=peak)


if __name__ == "__main__":
    main()
