"""``python -m tcam_ext.selftest``: is every kernel right on this machine's devices, and how fast are they beside plain PyTorch.

A line for each kernel: passed or FAILED, its error, its limit. Then the speed of TCAM-Diff's decoder, checked at random voxels.
The exit status is 1 where a kernel is wrong.

The kernels run in a process of their own. One that crashes, hangs, or leaves the device unusable ends that process: it counts
as failed, and another process goes on with the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tcam_ext
from tcam_ext import checks, info, library, reference
from tcam_ext.activations import ACTIVATIONS, OUTPUT_ACTIVATIONS
from tcam_ext.losses import LOSSES
from tcam_ext.testing import (
    FORWARD_LIMIT,
    GRADIENT_LIMIT,
    HALF,
    AtVoxels,
    Problem,
    fused_mirror,
    fused_points_mirror,
    fused_reference,
    gradient_error,
    make,
    masked_reference,
    relative,
    round_tensor_float,
    terms_of,
)

#: What is measured of a case: name, error, limit.
Parts = Iterator[tuple[str, float, float]]
OPERATING_POINT: dict[str, Any] = dict(
    channels=42, texels=(64, 64, 64), widths=(128, 128, 128, 128, 1), output_activation="sigmoid"
)
SIZE = {"cpu": 64, "cuda": 256}  # of the volumes that are timed
VOXELS = 4096  # checked of those
FUSED = "fused, on tensor cores"  # what explain says of these kernels
START_SECONDS = 60.0  # that a process may take to its first case


def on_cuda(device: str) -> bool:
    """Whether the kernels of csrc/cuda run there. (A test has them run on a CPU.)"""
    return device != "cpu"


# ---- cases ---------------------------------------------------------------------------------------


def fused(device: str, shape: dict[str, Any], dtype: torch.dtype) -> Parts:
    """The tensor-core kernels against their mirror: values, gradients, the loss with its gradients and alone."""
    p = make(**shape, output_activation="sigmoid")
    mine = p.to(torch.float32, True, device)
    explained = tcam_ext.explain(mine.call, tcam_ext.decode_grid, compute_dtype=dtype)
    volume = mine.call(tcam_ext.decode_grid, compute_dtype=dtype)
    if FUSED in explained["values"]:
        mirror = fused_mirror(p.to(torch.float32), dtype)[-1].sigmoid().movedim(-1, 1)
        yield "values", relative(volume, mirror.double()), 1e-3
    else:
        yield "values, not fused", relative(volume, p.call(reference.decode_grid)), 1e-2
    if FUSED in explained["gradients"]:
        exact, out, trusted = fused_reference(p, dtype)
    else:
        exact = p.to(torch.float64, True)
        out, trusted = masked_reference(exact, round_tensor_float, margin=1e-4)
    grad = torch.rand_like(out) * trusted  # of one sign: no sum cancels
    want = torch.autograd.grad(out, exact.tensors, grad, retain_graph=True)
    yield "gradients", gradient_error(_gradients(volume, mine, grad), list(want)), 1e-2
    target = torch.where(trusted > 0, out.detach() + 1 + torch.rand_like(out), out.detach()).float()
    each = LOSSES["mse"](out, target.double(), 0.3).flatten(1).sum(1)
    loss = _loss(mine, target.to(device), loss="mse", reduction="sum", compute_dtype=dtype)
    yield "loss", relative(loss, each.sum()), 1e-2
    want = torch.autograd.grad(each.sum(), exact.tensors)
    yield "its gradients", gradient_error(list(torch.autograd.grad(loss, mine.tensors)), list(want)), 1e-2
    with torch.no_grad():
        alone = _loss(mine, target.to(device), loss="mse", reduction="sum", compute_dtype=dtype)
    yield "loss alone", relative(alone, loss.cpu().double()), 1e-6


def fused_points(device: str, shape: dict[str, Any], dtype: torch.dtype, kind: str) -> Parts:
    """Points, and grids that go voxel by voxel, through the tensor-core kernels, against their mirror."""
    p = make(**shape, output_activation="sigmoid", reduce="prod" if kind == "product" else "concat")
    if kind == "noise":
        p.options |= {"noise_std": 0.32, "noise_seed": 11}
    exact, mine = p.to(torch.float64, True), p.to(torch.float32, True, device)
    run: Callable[..., Tensor] = tcam_ext.decode_grid
    if kind == "points":
        xyz = _centres(p.size).to(device).expand(p.planes[0].shape[0], -1, -1)

        def run(planes: Any, weights: Any, biases: Any, size: Any, **options: Any) -> Tensor:
            out: Tensor = tcam_ext.decode_points(planes, weights, biases, xyz, **options)
            return out.mT.unflatten(2, size)

    got = mine.call(run, compute_dtype=dtype)
    explained = tcam_ext.explain(mine.call, run, compute_dtype=dtype)
    if not all(FUSED in text for text in explained.values()):
        yield "values, not fused", relative(got, p.call(reference.decode_grid)), 1e-2
        return
    mirror = fused_points_mirror(p.to(torch.float32), dtype, projected=kind == "points")
    yield "values", relative(got, mirror[-1].sigmoid().movedim(-1, 1).double()), 1e-3
    out, trusted = masked_reference(exact, margin=1e-4, preactivations=mirror)
    grad = torch.rand_like(out) * trusted
    want = torch.autograd.grad(out, exact.tensors, grad)
    yield "gradients", gradient_error(_gradients(got, mine, grad), list(want)), 1e-2


def general(device: str, shape: dict[str, Any], compute: str, **options: Any) -> Parts:
    """The kernels for every shape, layer by layer, against float64."""
    p = make(**shape, **options)
    rounds = compute == "tf32" and on_cuda(device)
    exact = p.to(torch.float64, True)
    out, trusted = masked_reference(exact, round_tensor_float if rounds else None, 1e-4 if rounds else 1e-5)
    dtype = torch.float64 if compute == "float64" else torch.float32
    mine = p.to(dtype, True, device)
    volume = mine.call(tcam_ext.decode_grid, compute_dtype=compute if rounds else dtype)
    # One draw of relu's masks in TensorFloat-32 has errors around its limit.
    slack = 2 if rounds else 1
    limit = compute if rounds or compute != "tf32" else "float32"
    yield "values", relative(volume, p.call(reference.decode_grid), terms_of(p)), slack * FORWARD_LIMIT[limit]
    grad = torch.randn_like(out) * trusted
    want = torch.autograd.grad(out, exact.tensors, grad)
    yield "gradients", gradient_error(_gradients(volume, mine, grad.to(dtype)), list(want)), slack * GRADIENT_LIMIT[limit]


def points(device: str, points: int, texels: int, **options: Any) -> Parts:
    """Points in float32 with the gradients of their coordinates and features; many gather projections, few features."""
    extra = 2
    p = make(channels=6, texels=(texels,) * 3, widths=(40, 33, 2), batch=2, activation="silu", **options)
    p.weights[0] = torch.cat((p.weights[0], torch.randn(40, extra, dtype=torch.float64)), 1)
    exact, mine = p.to(torch.float64, True), p.to(torch.float32, True, device)
    xyz = (torch.rand(2, points, 3) * 2 - 1) * 0.9
    own = torch.randn(2, points, extra)
    leaves = [
        [t.to(d, k, copy=True).requires_grad_() for t in (xyz, own)]
        for d, k in (("cpu", torch.float64), (device, torch.float32))
    ]
    want = reference.decode_points(exact.planes, exact.weights, exact.biases, leaves[0][0], extra=leaves[0][1], **p.options)
    got = tcam_ext.decode_points(mine.planes, mine.weights, mine.biases, leaves[1][0], extra=leaves[1][1], **p.options)
    yield "values", relative(got, want), FORWARD_LIMIT["float32"]
    grad = torch.rand_like(want)
    wanted = list(torch.autograd.grad(want, [*exact.tensors, *leaves[0]], grad))
    found = list(torch.autograd.grad(got, [*mine.tensors, *leaves[1]], grad.to(device, torch.float32)))
    yield "gradients", gradient_error(found, wanted), GRADIENT_LIMIT["float32"]


def noise(device: str, mode: str) -> Parts:
    p = make(channels=6, texels=(9, 8, 7), widths=(40, 2), size=(7, 9, 33), batch=2, activation="silu",
             noise_std=0.32, noise_seed=2**40 + 5, noise_mode=mode)  # fmt: skip
    exact, mine = p.to(torch.float64, True), p.to(torch.float32, True, device)
    want, got = exact.call(reference.decode_grid), mine.call(tcam_ext.decode_grid)
    yield "values", relative(got, want), FORWARD_LIMIT["float32"]
    grad = torch.rand_like(want)
    wanted = list(torch.autograd.grad(want, exact.tensors, grad))
    yield "gradients", gradient_error(_gradients(got, mine, grad), wanted), GRADIENT_LIMIT["float32"]


def normals(device: str) -> Parts:
    got = library.normals(torch.empty(3, 1001, 7, device=device), 3, 99).cpu()
    want = reference.texel_normals(torch.empty(3, 1001, 7), 3, 99)
    yield "values, absolute", float((got - want).abs().max()), 4e-6  # those near zero are differences
    yield "bits that differ from a CPU's", float((got != library.normals(torch.empty(3, 1001, 7), 3, 99)).sum()), 0.5


def resampling(device: str, **options: Any) -> Parts:
    p = make(channels=3, texels=(9, 4, 31), size=(17, 40, 12)).to(torch.float64, True)
    mine = p.to(torch.float64, True, device)
    want = reference.sample_grid(p.planes, p.size, **options)
    got = tcam_ext.sample_grid(mine.planes, p.size, **options)
    yield "values", relative(got, want), FORWARD_LIMIT["float64"]
    grad = torch.randn_like(want)
    wanted = list(torch.autograd.grad(want, p.planes, grad))
    yield "adjoint", gradient_error(list(torch.autograd.grad(got, mine.planes, grad.to(device))), wanted), 1e-11


def losses(device: str, loss: str, target: torch.dtype) -> Parts:
    p = make(widths=(33, 2), size=(9, 8, 33), batch=2, activation="silu", output_activation="sigmoid")
    exact, mine = p.to(torch.float64, True), p.to(torch.float32, True, device)
    seen = torch.randint(0, 256, (2, 2, *p.size)).to(target) if target == torch.uint8 else torch.rand(2, 2, *p.size).to(target)
    options = dict(loss=loss, reduction="none_batch", **p.options)
    want = reference.decode_grid_loss(*_mlp(exact), seen, **options)
    got = tcam_ext.decode_grid_loss(*_mlp(mine), seen.to(device), **options)
    yield "values", relative(got, want), FORWARD_LIMIT["float32"]
    weight = torch.tensor([2.0, -3.0])
    wanted = list(torch.autograd.grad(want, exact.tensors, weight.double()))
    found = list(torch.autograd.grad(got, mine.tensors, weight.to(device)))
    # l1's slope jumps where the difference is zero: at most a voxel sits on the other side.
    yield "gradients", gradient_error(found, wanted), 3e-3 if loss == "l1" else GRADIENT_LIMIT["float32"]


def output_types(device: str) -> Parts:
    p = make(size=(9, 8, 33)).to(torch.float32, device=device)
    full = p.call(tcam_ext.decode_grid)
    for dtype in checks.DTYPES:
        differ = (p.call(tcam_ext.decode_grid, out_dtype=dtype) != full.to(dtype)).sum()
        yield f"{_name(dtype)} rounded otherwise than torch does", float(differ), 0.5


def same_bits(device: str, compute: torch.dtype, shape: dict[str, Any]) -> Parts:
    """Two runs, and a box against the same part of the whole."""
    p = make(**shape).to(torch.float32, True, device)
    runs = []
    for _ in range(2):
        volume = p.call(tcam_ext.decode_grid, compute_dtype=compute)
        runs.append([volume.detach(), *torch.autograd.grad(volume.square().sum(), p.tensors)])
    yield "between two runs", float(sum(int((a != b).sum()) for a, b in zip(*runs, strict=True))), 0.5
    lo = [n // 3 for n in p.size]
    box = [(a, n) for a, n in zip(lo, p.size, strict=True)]
    part = p.call(tcam_ext.decode_grid, compute_dtype=compute, box=box)
    whole = runs[0][0][:, :, lo[0] :, lo[1] :, lo[2] :]
    yield "between a box and the whole", float((part != whole).sum()), 0.5


def _mlp(p: Problem) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    return p.planes, p.weights, p.biases


def _loss(p: Problem, target: Tensor, **options: Any) -> Tensor:
    return tcam_ext.decode_grid_loss(*_mlp(p), target, p.size, **{**p.options, **options})


def _gradients(volume: Tensor, p: Problem, grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(volume, p.tensors, grad.to(volume)))


def _centres(size: tuple[int, int, int]) -> Tensor:
    axes = [(torch.arange(n, dtype=torch.float32) + 0.5) / n * 2 - 1 for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(device: str, tiny: bool = False) -> dict[str, Callable[[], Parts]]:
    """By name, those that matter most first. ``tiny``: every kernel once, on volumes small enough for compute-sanitizer."""
    found: dict[str, Callable[[], Parts]] = {}

    def add(name: str, case: Callable[..., Parts], *arguments: Any, **options: Any) -> None:
        found[name] = lambda: case(device, *arguments, **options)

    size = (4, 2, 33) if tiny else (5, 4, 37)
    if on_cuda(device):
        order = [(3, 128), (1, 128), (2, 128), (3, 64), (2, 64), (1, 64)]
        for dtype in HALF:
            for products, width in order:
                for outputs in (1, 3):
                    narrower = (width - 31,) if products > 1 else ()  # padded
                    widths = (width,) * (products + 1 - len(narrower)) + narrower + (outputs,)
                    shape = dict(channels=5, texels=(4, 5, 6), widths=widths, size=size, batch=1 if tiny else 2)
                    add(f"fused {dtype} {width} wide, {products} products, {outputs} outputs", fused, shape, HALF[dtype])
        for dtype in HALF:
            shape = dict(channels=5, texels=(4, 5, 6), widths=(128, 100, 90, 2), size=size, batch=2)
            for kind in ("points", "noise", "product"):
                add(f"fused points {dtype}, {kind}", fused_points, shape, HALF[dtype], kind)
        slabs = dict(channels=3, texels=(9, 8, 7), widths=(100, 128, 1), size=(13, 6, 70) if tiny else (37, 30, 70))
        add("same bits, fused", same_bits, torch.bfloat16, slabs)
    odd = dict(channels=5, texels=(4, 5, 6), widths=(37, 21, 3), size=(4, 3, 17) if tiny else (8, 9, 15))
    wide = dict(channels=7, texels=(4, 5, 6), widths=(256, 256, 200, 5), size=(3, 2, 17) if tiny else (6, 7, 15))
    for compute in ("float32", "tf32", "float64"):
        if compute == "tf32" and not on_cuda(device):
            continue
        for activation in ("relu", "silu") if tiny else ACTIVATIONS:
            add(f"general {compute}, {activation}", general, odd, compute, activation=activation, output_activation="sigmoid")
        add(f"general {compute}, wide", general, wide, compute, activation="silu")
    for output in () if tiny else OUTPUT_ACTIVATIONS:
        add(f"general float32, output {output}", general, odd, "float32", activation="silu", output_activation=output)
    add("planes over other axes, sums", general, odd, "float32", activation="silu", reduce="sum", padding_mode="reflection",
        plane_axes=((0, 1), (2, 0), (0, 2), (1, 2)), grid="corners", bounds=((-1.6, 0.7), (2, -1), (-0.5, 0.4)))  # fmt: skip
    few = 40 if tiny else 300
    add("points that gather projections", points, 4 * few, 3)
    add("points that gather features", points, few, 12 if tiny else 40)
    add("points of planes that are multiplied", points, few, 9, reduce="prod", padding_mode="zeros")
    for mode in checks.NOISE_MODES:
        add(f"noise of each {mode}", noise, mode)
    add("normals", normals)
    for padding in checks.PADDING_MODES:
        add(f"resampling, {padding}", resampling, padding_mode=padding)
    add(
        "resampling, corners and bounds",
        resampling,
        grid="corners",
        align_corners=True,
        bounds=((-1.4, 0.3), (2.5, -1.7), (-1, 1)),
    )
    for loss in LOSSES:
        for target in (torch.float32, torch.uint8):
            add(f"{loss} of {_name(target)}", losses, loss, target)
    add("output types", output_types)
    add("same bits, general", same_bits, torch.float32, odd)
    return found


# ---- speed ---------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run: the clock's on a CPU, between two events on CUDA."""
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
    """Times of ``repeats`` runs after one to warm up, fewer (at least one) when they take longer than the budget."""
    began = time.perf_counter()
    first = timed(run, device)
    if first > budget:
        return [first]
    times: list[float] = []
    while len(times) < repeats and (not times or time.perf_counter() - began < budget):
        times.append(timed(run, device))
    return times


def speed(device: str, size: int, budget: float = 5.0) -> Iterator[dict[str, Any]]:
    """TCAM-Diff's decoder on a volume of ``size`` an axis: forward, the loss with gradients, forward and backward, each checked
    at random voxels and then timed; then the same in plain PyTorch. What fails does not stop the rest."""
    torch.manual_seed(0)
    p = make(**OPERATING_POINT, size=(size,) * 3)
    compute = torch.bfloat16 if on_cuda(device) else torch.float32
    large = Large(p, device, compute)
    mine, name = large.mine, _name(compute)
    other = torch.rand(1, 1, *p.size, device=device)

    def forward() -> Any:
        with torch.no_grad():
            return large.decode()

    def one_pass() -> Any:
        return torch.autograd.grad(_loss(mine, other, compute_dtype=compute), mine.tensors)

    def backward() -> Any:
        return torch.autograd.grad(large.decode(), mine.tensors, other)

    def stage(check: Callable[[], Parts], what: str, run: Callable[[], Any]) -> Iterator[dict[str, Any]]:
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
                torch.cuda.synchronize()  # where this raises, the device is of no more use to this process
    plain = _PlainDecode(p.to(torch.float32, True, device))
    for what in ("forward", "forward+backward"):
        for autocast in (False,) if device == "cpu" else (False, True):
            times = seconds(lambda w=what, a=autocast: plain.run(w, a), device, 3, budget)  # type: ignore[misc]
            yield _speed_row(size, what, "torch " + ("bfloat16 autocast" if autocast else "float32"), times, None)


def _speed_row(size: int, what: str, rival: str, times: list[float], memory: float | None) -> dict[str, Any]:
    median = statistics.median(times)
    return {"size": size, "what": what, "rival": rival, "seconds": median, "times": times, "mvoxels": size**3 / median / 1e6,
            "memory_mb": memory}  # fmt: skip


class Large:
    """A volume too large to be computed twice, checked at random voxels and by sums over all."""

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

    def all(self) -> Parts:
        for stage in (self.values, self.loss, self.gradients, self.sums):
            yield from stage()

    def values(self) -> Parts:
        with torch.no_grad():
            volume = self.decode()
        yield f"values at {self.count} voxels", relative(volume[self.at], self.mirrored), self.value_limit

    def gradients(self) -> Parts:
        """Of a volume whose gradient is zero at all other voxels."""
        grad = torch.rand_like(self.want) * self.trusted
        volume = self.decode()
        sparse = torch.zeros_like(volume)
        sparse[self.at] = grad.to(sparse)
        wanted = torch.autograd.grad(self.want, self.exact.tensors, grad, retain_graph=True)
        found = torch.autograd.grad(volume, self.mine.tensors, sparse)
        yield "gradients there", gradient_error(list(found), list(wanted)), self.limit

    def loss(self) -> Parts:
        """Against a target that is the volume itself at all other voxels: nothing else has a slope."""
        with torch.no_grad():
            target = self.decode()
        moved = torch.where(
            self.trusted > 0, self.want.detach() + 1 + torch.rand_like(self.want), target[self.at].cpu().double()
        )
        target[self.at] = moved.to(target)
        each = ((self.want - moved).square() * (self.trusted > 0)).sum()
        wanted = torch.autograd.grad(each, self.exact.tensors, retain_graph=True)
        loss = _loss(self.mine, target, loss="mse", reduction="sum", compute_dtype=self.compute)
        yield "loss there", relative(loss, each), self.limit
        yield "its gradients", gradient_error(list(torch.autograd.grad(loss, self.mine.tensors)), list(wanted)), self.limit

    def sums(self) -> Parts:
        """Of all voxels. With z_l the layers before relu and E = sum z_L^2 / 2: because relu(z) = relu'(z) z, <dE/dW_l, W_l> +
        <dE/db_l, b_l> is <dE/dW_(l+1), W_(l+1)>, of the last layer sum z_L^2, and <dE/dW_1, W_1> is <dE/dP, P> of the
        planes."""
        plain = replace(self.mine, options={**self.mine.options, "output_activation": "none"})
        out = plain.call(tcam_ext.decode_grid, compute_dtype=self.compute)
        found = torch.autograd.grad(out, plain.tensors, out.detach())
        inner = [float((g.double() * t.detach().double()).sum()) for g, t in zip(found, plain.tensors, strict=True)]
        planes, layers = len(plain.planes), len(plain.weights)
        weights, biases = inner[planes : planes + layers], inner[planes + layers :]
        expected = [*weights[1:], float(out.detach().double().square().sum())]
        worst = max(abs(w + b - e) / abs(e) for w, b, e in zip(weights, biases, expected, strict=True))
        worst = max(worst, abs(sum(inner[:planes]) - weights[0]) / abs(weights[0]))
        yield "sums of all gradients", worst, self.limit


class _PlainDecode:
    """grid_sample and Linear, slices of x at a time."""

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


# ---- the process that runs them --------------------------------------------------------------------


def work(names: list[str], device: str, tiny: bool, size: int) -> None:
    """Runs cases and prints a line of JSON for each part, and one before each case; ``speed`` is one of them."""

    def say(**row: Any) -> None:
        print(json.dumps(row), flush=True)

    known = cases(device, tiny)
    if device != "cpu":
        torch.cuda.set_device(torch.device(device).index or 0)
        torch.zeros(1, device=device)
    for name in names:
        say(begin=name)
        began = time.perf_counter()
        torch.manual_seed(0)
        try:
            if name == SPEED:
                for row in speed(device, size):
                    say(**row)
            else:
                for part, error, limit in known[name]():
                    say(kernel=name, part=part, error=error, limit=limit)
        except Exception as error:
            say(**raised(name, error))
            if device != "cpu":
                torch.cuda.synchronize()  # where this raises, the device is of no more use to this process
        say(end=name, seconds=round(time.perf_counter() - began, 3))


SPEED = "speed"


def raised(kernel: str, error: Exception) -> dict[str, Any]:
    """The row of a kernel that raised."""
    return {"kernel": kernel, "part": "raised", "error": None, "limit": 0.0, "why": f"{type(error).__name__}: {error}"[:500]}


class Runner:
    """Runs the cases in other processes, one after the other, and reports."""

    def __init__(
        self, device: str, tiny: bool, size: int, case_seconds: float, report: Callable[[dict[str, Any]], None]
    ) -> None:
        self.device, self.tiny, self.size, self.case_seconds, self.report = device, tiny, size, case_seconds, report

    def run(self, names: list[str]) -> bool:
        """Whether every kernel is right."""
        right, left = True, list(names)
        while left:
            ok, done, why = self._process(left)
            right &= ok
            left = left[done:]
            if why is None:
                break
            right = False
            ended = left[0] if left else "the process, after its last case"
            self.report({"kernel": ended, "part": "ended its process", "error": None, "limit": 0.0, "why": why})
            left = left[1:]
            if SPEED in left:  # what is wanted most comes first now
                left = [SPEED, *(n for n in left if n != SPEED)]
        return right

    def _process(self, names: list[str]) -> tuple[bool, int, str | None]:
        """Whether all was right, how many cases ended, and why the process ended before the rest."""
        command = [sys.executable, "-m", "tcam_ext.selftest", "--worker", "--device", self.device, "--size", str(self.size)]
        command += ["--tiny"] if self.tiny else []
        root = str(Path(tcam_ext.__file__).resolve().parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(names))
        process.stdin.close()
        lines: queue.Queue[str | None] = queue.Queue()
        errors: list[str] = []
        for stream, put in ((process.stdout, lines.put), (process.stderr, errors.append)):
            threading.Thread(target=_pump, args=(stream, put), daemon=True).start()
        right, done, patience = True, 0, START_SECONDS
        while True:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                process.kill()
                process.wait()
                return right, done, f"nothing was heard of it for {patience:.0f} s"
            if line is None:
                break
            try:
                row = json.loads(line)
            except ValueError:  # of a tool that runs around the process
                print(line, end="", file=sys.stderr, flush=True)
                continue
            patience = self.case_seconds
            if "end" in row:
                done += 1
            if "begin" not in row:
                self.report(row)
            if "error" in row:
                right &= _passed(row)
        status = process.wait()
        if status == 0 and done == len(names):
            return right, done, None
        last = [e for e in "".join(filter(None, errors)).strip().splitlines() if e.strip()]
        return right, done, f"exit status {status}" + (f": {last[-1][:300]}" if last else "")


def _pump(stream: IO[str], put: Callable[[Any], Any]) -> None:
    for line in stream:
        put(line)
    put(None)


def _passed(row: dict[str, Any]) -> bool:
    return row["error"] is not None and bool(row["error"] < row["limit"])  # not NaN


def show(row: dict[str, Any]) -> None:
    if "error" in row:
        verdict = "passed" if _passed(row) else "FAILED"
        name = f"{row['kernel']}: {row['part']}"
        print(
            f"{verdict}  {name:<72} {'' if row['error'] is None else format(row['error'], '.2e'):>9}  limit {row['limit']:.0e}"
            + (f"  {row['why']}" if row.get("why") else "")
        )
    elif "rival" in row:
        memory = "" if row["memory_mb"] is None else f"{row['memory_mb']:8.0f} MB at most"
        name = f"{row['size']}^3 {row['what']}"
        print(f"        {name:<32} {row['rival']:<26} {row['seconds'] * 1e3:10.1f} ms {row['mvoxels']:9.1f} Mvoxel/s {memory}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tcam_ext.selftest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help='"cpu", "cuda", "cuda:1"; default: the CPU, then every GPU')
    parser.add_argument(
        "--size", type=int, help="voxels an axis of the volume that is timed; default 64 on a CPU, 256 on a GPU; 0: none"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="each kernel once, on small volumes, and no timing: for compute-sanitizer"
    )
    parser.add_argument("--only", default="", help="the cases whose name has this in it")
    parser.add_argument(
        "--case-seconds", type=float, default=20.0, help="that a case may be silent before it counts as hanging"
    )
    parser.add_argument("--jsonl", type=Path, help="append every line to this file too")
    parser.add_argument("--list", action="store_true", help="name the cases and run none")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.size is not None and a.size != 0 and a.size < 8:
        parser.error(f"--size: expected 0, or at least 8, got {a.size}")
    if a.worker:
        return work(json.load(sys.stdin), a.device, a.tiny, a.size)
    devices = [a.device] if a.device else ["cpu", *(f"cuda:{i}" for i in range(_usable()))]
    right = True
    for device in devices:
        kind = device.split(":")[0]
        if kind not in SIZE or (kind == "cuda" and not _usable()):
            parser.error(f'--device: expected "cpu", or "cuda" where there is a GPU and a build with CUDA, got {device}')
        size = (0 if a.tiny else SIZE[kind]) if a.size is None else a.size
        names = [n for n in [*cases(device, a.tiny), *([SPEED] if size else [])] if a.only in n]
        if a.list:
            print("\n".join(names))
            continue
        if not names:
            parser.error(f"--only: expected a part of a case's name (--list shows them), got {a.only!r}")
        print("\n".join(f"# {name + ':' if name else '':<22}{value}" for name, value in info.lines()))
        print(f"# on {device}", flush=True)
        with a.jsonl.open("a") if a.jsonl else open(os.devnull, "w") as file:

            def report(row: dict[str, Any], file: IO[str] = file, device: str = device) -> None:
                show(row)
                file.write(json.dumps({"device": device, **row}) + "\n")
                file.flush()

            began = time.perf_counter()
            this = Runner(device, a.tiny, size, a.case_seconds, report).run(names)
        right &= this
        print(
            f"# {device}: {'every kernel is right' if this else 'SOME KERNELS ARE WRONG'}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    sys.exit(0 if right else 1)


def _usable() -> int:
    """GPUs that this build can use."""
    return torch.cuda.device_count() if tcam_ext._C.has_cuda and torch.cuda.is_available() else 0


if __name__ == "__main__":
    main()
