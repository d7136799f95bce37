"""The cases of the self-test: every kernel against the reference, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tcam_ext
from tcam_ext import arguments, checks, library, reference
from tcam_ext.activations import ACTIVATIONS, OUTPUT_ACTIVATIONS
from tcam_ext.losses import LOSSES
from tcam_ext.testing import (
    FORWARD_LIMIT,
    GRADIENT_LIMIT,
    HALF,
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

#: The errors that a case measures: name, error, limit.
Errors = Iterator[tuple[str, float, float]]
FUSED = "fused, on tensor cores"  # how explain names these kernels


def on_cuda(device: str) -> bool:
    """Whether the device runs the kernels of csrc/cuda. (A test runs them on a CPU.)"""
    return device != "cpu"


def check_fused(device: str, shape: dict[str, Any], dtype: torch.dtype) -> Errors:
    """The tensor-core kernels against their mirror: values, gradients, the loss with and without its gradients."""
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
    grad = torch.rand_like(out) * trusted  # positive, so that no sum cancels
    want = torch.autograd.grad(out, exact.tensors, grad, retain_graph=True)
    yield "gradients", gradient_error(_gradients(volume, mine, grad), list(want)), 1e-2
    target = torch.where(trusted > 0, out.detach() + 1 + torch.rand_like(out), out.detach()).float()
    each = LOSSES["mse"](out, target.double(), 0.3).flatten(1).sum(1)
    loss = mean_loss(mine, target.to(device), loss="mse", reduction="sum", compute_dtype=dtype)
    yield "loss", relative(loss, each.sum()), 1e-2
    want = torch.autograd.grad(each.sum(), exact.tensors)
    yield "its gradients", gradient_error(list(torch.autograd.grad(loss, mine.tensors)), list(want)), 1e-2
    with torch.no_grad():
        alone = mean_loss(mine, target.to(device), loss="mse", reduction="sum", compute_dtype=dtype)
    yield "loss alone", relative(alone, loss.cpu().double()), 1e-6


def check_fused_points(device: str, shape: dict[str, Any], dtype: torch.dtype, kind: str) -> Errors:
    """Points, and grids decoded voxel by voxel, by the tensor-core kernels, against their mirror."""
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


def check_general(device: str, shape: dict[str, Any], compute: str, **options: Any) -> Errors:
    """The general kernels, which serve every shape, against float64."""
    p = make(**shape, **options)
    rounds = compute == "tf32" and on_cuda(device)
    exact = p.to(torch.float64, True)
    out, trusted = masked_reference(exact, round_tensor_float if rounds else None, 1e-4 if rounds else 1e-5)
    dtype = torch.float64 if compute == "float64" else torch.float32
    mine = p.to(dtype, True, device)
    volume = mine.call(tcam_ext.decode_grid, compute_dtype=compute if rounds else dtype)
    # With a single draw of relu's masks, errors in TensorFloat-32 come close to the limit.
    slack = 2 if rounds else 1
    limit = compute if rounds or compute != "tf32" else "float32"
    yield "values", relative(volume, p.call(reference.decode_grid), terms_of(p)), slack * FORWARD_LIMIT[limit]
    grad = torch.randn_like(out) * trusted
    want = torch.autograd.grad(out, exact.tensors, grad)
    yield "gradients", gradient_error(_gradients(volume, mine, grad.to(dtype)), list(want)), slack * GRADIENT_LIMIT[limit]


def check_points(device: str, points: int, texels: int, **options: Any) -> Errors:
    """Points in float32, with the gradients of their coordinates and extra features. Many points gather projections, few gather
    features."""
    extra_channels = 2
    p = make(channels=6, texels=(texels,) * 3, widths=(40, 33, 2), batch=2, activation="silu", **options)
    p.weights[0] = torch.cat((p.weights[0], torch.randn(40, extra_channels, dtype=torch.float64)), 1)
    exact, mine = p.to(torch.float64, True), p.to(torch.float32, True, device)
    xyz = (torch.rand(2, points, 3) * 2 - 1) * 0.9
    extra = torch.randn(2, points, extra_channels)
    leaves = [
        [t.to(d, k, copy=True).requires_grad_() for t in (xyz, extra)]
        for d, k in (("cpu", torch.float64), (device, torch.float32))
    ]
    want = reference.decode_points(exact.planes, exact.weights, exact.biases, leaves[0][0], extra=leaves[0][1], **p.options)
    got = tcam_ext.decode_points(mine.planes, mine.weights, mine.biases, leaves[1][0], extra=leaves[1][1], **p.options)
    yield "values", relative(got, want), FORWARD_LIMIT["float32"]
    grad = torch.rand_like(want)
    want_grads = list(torch.autograd.grad(want, [*exact.tensors, *leaves[0]], grad))
    grads = list(torch.autograd.grad(got, [*mine.tensors, *leaves[1]], grad.to(device, torch.float32)))
    yield "gradients", gradient_error(grads, want_grads), GRADIENT_LIMIT["float32"]


def check_noise(device: str, mode: str) -> Errors:
    p = make(channels=6, texels=(9, 8, 7), widths=(40, 2), size=(7, 9, 33), batch=2, activation="silu",
             noise_std=0.32, noise_seed=2**40 + 5, noise_mode=mode)  # fmt: skip
    exact, mine = p.to(torch.float64, True), p.to(torch.float32, True, device)
    want, got = exact.call(reference.decode_grid), mine.call(tcam_ext.decode_grid)
    yield "values", relative(got, want), FORWARD_LIMIT["float32"]
    grad = torch.rand_like(want)
    want_grads = list(torch.autograd.grad(want, exact.tensors, grad))
    yield "gradients", gradient_error(_gradients(got, mine, grad), want_grads), GRADIENT_LIMIT["float32"]


def check_normals(device: str) -> Errors:
    got = library.normals(torch.empty(3, 1001, 7, device=device), 3, 99).cpu()
    want = reference.texel_normals(torch.empty(3, 1001, 7), 3, 99)
    yield "values, absolute", float((got - want).abs().max()), 4e-6  # relative errors near zero mean nothing
    yield "bits that differ from a CPU's", float((got != library.normals(torch.empty(3, 1001, 7), 3, 99)).sum()), 0.5


def check_resampling(device: str, **options: Any) -> Errors:
    p = make(channels=3, texels=(9, 4, 31), size=(17, 40, 12)).to(torch.float64, True)
    mine = p.to(torch.float64, True, device)
    want = reference.sample_grid(p.planes, p.size, **options)
    got = tcam_ext.sample_grid(mine.planes, p.size, **options)
    yield "values", relative(got, want), FORWARD_LIMIT["float64"]
    grad = torch.randn_like(want)
    want_grads = list(torch.autograd.grad(want, p.planes, grad))
    grads = list(torch.autograd.grad(got, mine.planes, grad.to(device)))
    yield "adjoint", gradient_error(grads, want_grads), 1e-11


def check_losses(device: str, loss: str, dtype: torch.dtype) -> Errors:
    p = make(widths=(33, 2), size=(9, 8, 33), batch=2, activation="silu", output_activation="sigmoid")
    exact, mine = p.to(torch.float64, True), p.to(torch.float32, True, device)
    shape = (2, 2, *p.size)
    target = (torch.randint(0, 256, shape) if dtype == torch.uint8 else torch.rand(shape)).to(dtype)
    options = dict(loss=loss, reduction="none_batch", **p.options)
    want = reference.decode_grid_loss(*_mlp(exact), target, **options)
    got = tcam_ext.decode_grid_loss(*_mlp(mine), target.to(device), **options)
    yield "values", relative(got, want), FORWARD_LIMIT["float32"]
    weight = torch.tensor([2.0, -3.0])
    want_grads = list(torch.autograd.grad(want, exact.tensors, weight.double()))
    grads = list(torch.autograd.grad(got, mine.tensors, weight.to(device)))
    # l1's slope jumps where the difference is zero: at most one voxel lies on the other side of the jump.
    yield "gradients", gradient_error(grads, want_grads), 3e-3 if loss == "l1" else GRADIENT_LIMIT["float32"]


def check_output_types(device: str) -> Errors:
    p = make(size=(9, 8, 33)).to(torch.float32, device=device)
    full = p.call(tcam_ext.decode_grid)
    for dtype in arguments.DTYPES:
        differ = (p.call(tcam_ext.decode_grid, out_dtype=dtype) != full.to(dtype)).sum()
        yield f"{dtype_name(dtype)} rounded otherwise than torch does", float(differ), 0.5


def check_same_bits(device: str, compute: torch.dtype, shape: dict[str, Any]) -> Errors:
    """Two runs, and a box against the same part of the whole volume."""
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


def mean_loss(p: Problem, target: Tensor, **options: Any) -> Tensor:
    return tcam_ext.decode_grid_loss(*_mlp(p), target, p.size, **{**p.options, **options})


def _gradients(volume: Tensor, p: Problem, grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(volume, p.tensors, grad.to(volume)))


def _centres(size: tuple[int, int, int]) -> Tensor:
    axes = [(torch.arange(n, dtype=torch.float32) + 0.5) / n * 2 - 1 for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def all_cases(device: str, tiny: bool = False) -> dict[str, Callable[[], Errors]]:
    """The cases by name, most important first. ``tiny``: every kernel once, on volumes small enough for compute-sanitizer."""
    by_name: dict[str, Callable[[], Errors]] = {}

    def add(name: str, case: Callable[..., Errors], *arguments: Any, **options: Any) -> None:
        by_name[name] = lambda: case(device, *arguments, **options)

    size = (4, 2, 33) if tiny else (5, 4, 37)
    if on_cuda(device):
        order = [(3, 128), (1, 128), (2, 128), (3, 64), (2, 64), (1, 64)]
        for dtype in HALF:
            for products, width in order:
                for outputs in (1, 3):
                    narrower = (width - 31,) if products > 1 else ()  # padded
                    widths = (width,) * (products + 1 - len(narrower)) + narrower + (outputs,)
                    shape = dict(channels=5, texels=(4, 5, 6), widths=widths, size=size, batch=1 if tiny else 2)
                    add(f"fused {dtype} {width} wide, {products} products, {outputs} outputs", check_fused, shape, HALF[dtype])
        for dtype in HALF:
            shape = dict(channels=5, texels=(4, 5, 6), widths=(128, 100, 90, 2), size=size, batch=2)
            for kind in ("points", "noise", "product"):
                add(f"fused points {dtype}, {kind}", check_fused_points, shape, HALF[dtype], kind)
        slabs = dict(channels=3, texels=(9, 8, 7), widths=(100, 128, 1), size=(13, 6, 70) if tiny else (37, 30, 70))
        add("same bits, fused", check_same_bits, torch.bfloat16, slabs)
    odd = dict(channels=5, texels=(4, 5, 6), widths=(37, 21, 3), size=(4, 3, 17) if tiny else (8, 9, 15))
    wide = dict(channels=7, texels=(4, 5, 6), widths=(256, 256, 200, 5), size=(3, 2, 17) if tiny else (6, 7, 15))
    for compute in ("float32", "tf32", "float64"):
        if compute == "tf32" and not on_cuda(device):
            continue
        for activation in ("relu", "silu") if tiny else ACTIVATIONS:
            options = dict(activation=activation, output_activation="sigmoid")
            add(f"general {compute}, {activation}", check_general, odd, compute, **options)
        add(f"general {compute}, wide", check_general, wide, compute, activation="silu")
    for output in () if tiny else OUTPUT_ACTIVATIONS:
        add(f"general float32, output {output}", check_general, odd, "float32", activation="silu", output_activation=output)
    add("planes over other axes, sums", check_general, odd, "float32", activation="silu", reduce="sum",
        padding_mode="reflection", plane_axes=((0, 1), (2, 0), (0, 2), (1, 2)), grid="corners",
        bounds=((-1.6, 0.7), (2, -1), (-0.5, 0.4)))  # fmt: skip
    few = 40 if tiny else 300
    add("points that gather projections", check_points, 4 * few, 3)
    add("points that gather features", check_points, few, 12 if tiny else 40)
    add("points of planes that are multiplied", check_points, few, 9, reduce="prod", padding_mode="zeros")
    for mode in checks.NOISE_MODES:
        add(f"noise of each {mode}", check_noise, mode)
    add("normals", check_normals)
    for padding in checks.PADDING_MODES:
        add(f"resampling, {padding}", check_resampling, padding_mode=padding)
    add(
        "resampling, corners and bounds",
        check_resampling,
        grid="corners",
        align_corners=True,
        bounds=((-1.4, 0.3), (2.5, -1.7), (-1, 1)),
    )
    for loss in LOSSES:
        for target in (torch.float32, torch.uint8):
            add(f"{loss} of {dtype_name(target)}", check_losses, loss, target)
    add("output types", check_output_types)
    add("same bits, general", check_same_bits, torch.float32, odd)
    return by_name


def raised(kernel: str, error: Exception) -> dict[str, Any]:
    """The row of the report for a kernel that raised."""
    return {"kernel": kernel, "part": "raised", "error": None, "limit": 0.0, "why": f"{type(error).__name__}: {error}"[:500]}
