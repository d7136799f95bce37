"""TCAM-Diff's decoder on a large volume, checked at random voxels and timed beside plain PyTorch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tcam_ext
from tcam_ext.selftest.cases import FUSED, Errors, dtype_name, mean_loss, on_cuda, raised
from tcam_ext.testing import (
    FORWARD_LIMIT,
    GRADIENT_LIMIT,
    HALF,
    AtVoxels,
    Problem,
    fused_mirror,
    gradient_error,
    make,
    masked_reference,
    relative,
    round_tensor_float,
)

OPERATING_POINT: dict[str, Any] = dict(
    channels=42, texels=(64, 64, 64), widths=(128, 128, 128, 128, 1), output_activation="sigmoid"
)
VOXELS = 4096  # checked in a volume


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run: by the clock on a CPU, between two events on CUDA."""
    if device == "cpu":
        before = time.perf_counter()
        run()
        return time.perf_counter() - before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def seconds(run: Callable[[], Any], device: str, repeats: int, budget: float) -> list[float]:
    """Seconds of each of ``repeats`` runs after one to warm up; fewer (at least one) if they take longer than ``budget``."""
    began = time.perf_counter()
    first = timed(run, device)
    if first > budget:
        return [first]
    times: list[float] = []
    while len(times) < repeats and (not times or time.perf_counter() - began < budget):
        times.append(timed(run, device))
    return times


def speed(device: str, size: int, budget: float = 5.0) -> Iterator[dict[str, Any]]:
    """Check and time TCAM-Diff's decoder on a volume of ``size`` voxels an axis: a row of the report for each result.

    Forward, the loss with gradients, and forward with backward are each checked at random voxels and then timed; then plain
    PyTorch is timed. A step that fails does not stop the others.
    """
    torch.manual_seed(0)
    p = make(**OPERATING_POINT, size=(size,) * 3)
    compute = torch.bfloat16 if on_cuda(device) else torch.float32
    large = LargeVolume(p, device, compute)
    mine, name = large.mine, dtype_name(compute)
    other = torch.rand(1, 1, *p.size, device=device)

    def forward() -> Any:
        with torch.no_grad():
            return large.decode()

    def one_pass() -> Any:
        return torch.autograd.grad(mean_loss(mine, other, compute_dtype=compute), mine.tensors)

    def backward() -> Any:
        return torch.autograd.grad(large.decode(), mine.tensors, other)

    def stage(check: Callable[[], Errors], what: str, run: Callable[[], Any]) -> Iterator[dict[str, Any]]:
        for part, error, limit in check():
            yield {"kernel": f"{size}^3 {name}", "part": part, "error": error, "limit": limit}
        if not what:
            return
        if device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = seconds(run, device, 5, budget)
        memory = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else None
        yield _speed_row(size, what, f"tcam_ext {name}", times, memory)

    for check, what, run in (
        (large.values, "forward", forward),
        (large.loss, "loss+gradients", one_pass),
        (large.gradients, "forward+backward", backward),
        (large.sums, "", backward),
    ):
        try:
            yield from stage(check, what, run)
        except Exception as error:
            yield raised(f"{size}^3 {name}", error)
            if device != "cpu":
                torch.cuda.synchronize()  # if this raises, this process can no longer use the device
    plain = _PlainDecode(p.to(torch.float32, True, device))
    for what in ("forward", "forward+backward"):
        for autocast in (False,) if device == "cpu" else (False, True):
            times = seconds(lambda w=what, a=autocast: plain.run(w, a), device, 3, budget)  # type: ignore[misc]
            yield _speed_row(size, what, "torch " + ("bfloat16 autocast" if autocast else "float32"), times, None)


def _speed_row(size: int, what: str, rival: str, times: list[float], memory: float | None) -> dict[str, Any]:
    median = statistics.median(times)
    return {"size": size, "what": what, "rival": rival, "seconds": median, "times": times, "mvoxels": size**3 / median / 1e6,
            "memory_mb": memory}  # fmt: skip


class LargeVolume:
    """A volume too large to compute twice, checked at random voxels and by sums over all voxels."""

    def __init__(self, p: Problem, device: str, compute: torch.dtype) -> None:
        self.mine, self.compute = p.to(torch.float32, True, device), compute
        count = min(VOXELS, math.prod(p.size) // 8)
        voxels = torch.stack([torch.randint(0, n, (count,)) for n in p.size], 1).unique(dim=0)
        self.count = len(voxels)
        self.at = (slice(None), slice(None), *voxels.to(device).unbind(1))
        is_fused = FUSED in tcam_ext.explain(self.mine.call, tcam_ext.decode_grid, compute_dtype=compute)["values"]
        rounded = compute in HALF.values()
        self.exact = AtVoxels.of(p.to(torch.float64, True), voxels)
        mirror = fused_mirror(p.to(torch.float32), compute, voxels) if is_fused else None
        rounding, margin = (round_tensor_float, 1e-4) if rounded else (None, 1e-5)
        self.want, self.trusted = masked_reference(self.exact, rounding, margin, mirror)
        self.mirrored = mirror[-1].sigmoid().movedim(-1, 1).double() if mirror else self.want
        self.value_limit = 1e-3 if is_fused else 1e-2 if rounded else FORWARD_LIMIT["float32"]
        self.limit = 1e-2 if rounded else GRADIENT_LIMIT["float32"]

    def decode(self) -> Tensor:
        return self.mine.call(tcam_ext.decode_grid, compute_dtype=self.compute)

    def all(self) -> Errors:
        for stage in (self.values, self.loss, self.gradients, self.sums):
            yield from stage()

    def values(self) -> Errors:
        with torch.no_grad():
            volume = self.decode()
        yield f"values at {self.count} voxels", relative(volume[self.at], self.mirrored), self.value_limit

    def gradients(self) -> Errors:
        """The gradients of the random voxels alone: grad_output is zero at all others."""
        grad = torch.rand_like(self.want) * self.trusted
        volume = self.decode()
        sparse = torch.zeros_like(volume)
        sparse[self.at] = grad.to(sparse)
        want = torch.autograd.grad(self.want, self.exact.tensors, grad, retain_graph=True)
        got = torch.autograd.grad(volume, self.mine.tensors, sparse)
        yield "gradients there", gradient_error(list(got), list(want)), self.limit

    def loss(self) -> Errors:
        """The loss against a target that equals the volume at all other voxels, where the loss then has no slope."""
        with torch.no_grad():
            target = self.decode()
        moved = torch.where(
            self.trusted > 0, self.want.detach() + 1 + torch.rand_like(self.want), target[self.at].cpu().double()
        )
        target[self.at] = moved.to(target)
        each = ((self.want - moved).square() * (self.trusted > 0)).sum()
        want = torch.autograd.grad(each, self.exact.tensors, retain_graph=True)
        loss = mean_loss(self.mine, target, loss="mse", reduction="sum", compute_dtype=self.compute)
        yield "loss there", relative(loss, each), self.limit
        yield "its gradients", gradient_error(list(torch.autograd.grad(loss, self.mine.tensors)), list(want)), self.limit

    def sums(self) -> Errors:
        """Sums over all voxels, by an identity of relu networks.

        With z_l the layers before relu and E = sum z_L^2 / 2, relu(z) = relu'(z) z gives
        <dE/dW_l, W_l> + <dE/db_l, b_l> = <dE/dW_(l+1), W_(l+1)>, or sum z_L^2 for the last layer l = L,
        and <dE/dW_1, W_1> = <dE/dP, P> for the planes P.
        """
        plain = replace(self.mine, options={**self.mine.options, "output_activation": "none"})
        out = plain.call(tcam_ext.decode_grid, compute_dtype=self.compute)
        grads = torch.autograd.grad(out, plain.tensors, out.detach())
        inner = [float((g.double() * t.detach().double()).sum()) for g, t in zip(grads, plain.tensors, strict=True)]
        planes, layers = len(plain.planes), len(plain.weights)
        weights, biases = inner[planes : planes + layers], inner[planes + layers :]
        expected = [*weights[1:], float(out.detach().double().square().sum())]
        worst = max(abs(w + b - e) / abs(e) for w, b, e in zip(weights, biases, expected, strict=True))
        worst = max(worst, abs(sum(inner[:planes]) - weights[0]) / abs(weights[0]))
        yield "sums of all gradients", worst, self.limit


class _PlainDecode:
    """The decoder in plain PyTorch: grid_sample and linear layers, a few slices of x at a time."""

    def __init__(self, p: Problem) -> None:
        self.p, self.device = p, p.planes[0].device
        self.u = [(torch.arange(n, device=self.device) + 0.5) / n * 2 - 1 for n in p.size]
        voxels = 2**21 if self.device.type == "cuda" else 2**17
        self.step = max(1, voxels // (p.size[1] * p.size[2]))

    def chunk(self, x0: int) -> Tensor:
        x, y, z = torch.meshgrid(self.u[0][x0 : x0 + self.step], *self.u[1:], indexing="ij")
        h = [
            F.grid_sample(plane, torch.stack((b, a), -1).view(1, -1, 1, 2), align_corners=False, padding_mode="border")[
                0, :, :, 0
            ].t()
            for plane, (a, b) in zip(self.p.planes, ((x, y), (y, z), (x, z)), strict=True)
        ]
        out = torch.cat(h, -1)
        for i, (w, bias) in enumerate(zip(self.p.weights, self.p.biases, strict=True)):
            out = F.linear(out.relu() if i else out, w, bias)
        return out.sigmoid()

    def run(self, what: str, autocast: bool) -> None:
        with torch.set_grad_enabled(what != "forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            for x0 in range(0, self.p.size[0], self.step):
                out = self.chunk(x0)
                if what != "forward":
                    torch.autograd.grad(out, self.p.tensors, torch.ones_like(out))
