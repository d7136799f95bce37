"""Feature planes: normalisation, noise and total variation (equations 5 to 8 of the paper)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tcam_ext import library
from tcam_ext.reference import linear_taps

#: Axes of the planes xy, yz, xz along their rows and columns.
PLANE_AXES = ((0, 1), (1, 2), (0, 2))
PLANE_NAMES = ("xy", "yz", "xz")
#: End of the names of files with the normalised planes of a sample, (C, rows, columns) by name.
FILE_END = "-planes.safetensors"


def plane_sizes(texels: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and columns of the planes xy, yz, xz with ``texels`` along x, y, z."""
    return [(texels[a], texels[b]) for a, b in PLANE_AXES]


def check_planes(planes: Sequence[Tensor], lead: Sequence[int]) -> None:
    """Raise ValueError unless planes xy, yz, xz of floats have shape (*lead, rows, columns) and are of one volume."""
    shapes = [tuple(p.shape) for p in planes]
    texels = (*shapes[0][-2:], shapes[1][-1] if shapes[1] else 0)
    expected = [(*lead, *size) for size in plane_sizes(texels)] if len(texels) == 3 else []
    if shapes != expected or 0 in texels or not all(p.is_floating_point() for p in planes):
        raise ValueError(f"expected planes of floats ({', '.join(map(str, lead))}, rows, columns) of one volume, got {shapes}")


def init_planes(channels: int, texels: Sequence[int], std: float, generator: torch.Generator, batch: int = 1) -> list[Tensor]:
    """Planes (batch, C, rows, columns) drawn from N(0, std^2), with ``texels`` along x, y, z."""
    return [std * torch.randn(batch, channels, h, w, generator=generator) for h, w in plane_sizes(texels)]


def rms_norm(plane: Tensor, dims: Sequence[int] = (-3, -2, -1), eps: float = 1e-8) -> Tensor:
    """F / sqrt(mean F^2 + eps), with the mean over ``dims``, by default C, rows and columns (equation 6)."""
    unit: Tensor = _RMSNorm.apply(plane, tuple(dims), eps)
    return unit


class _RMSNorm(torch.autograd.Function):
    """RMSNorm f = r F, r = (mean F^2 + eps)^(-1/2), with dF = r (df - f mean(f df)), in fewer passes than autograd needs."""

    @staticmethod
    def forward(ctx: Any, plane: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
        count = math.prod(plane.shape[d] for d in dims)
        r = (torch.linalg.vector_norm(plane, dim=dims, keepdim=True).square_() / count).add_(eps).rsqrt_()
        out = plane * r
        ctx.save_for_backward(out, r)
        ctx.dims, ctx.count = dims, count
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        out, r = ctx.saved_tensors
        mean = (grad * out).sum(ctx.dims, keepdim=True) / ctx.count
        return torch.addcmul(grad, out, mean, value=-1).mul_(r), None, None


def normalise(planes: Sequence[Tensor], norm: str = "plane") -> list[Tensor]:
    """Normalise planes (B, C, rows, columns) by equation 6 (algorithm.md section 6).

    ``norm`` is the part that gets unit energy: plane, texel (C entries), channel, triplane, or none.
    """
    if norm == "none":
        return list(planes)
    if norm == "triplane":
        count = sum(p[0].numel() for p in planes)
        energy = torch.stack([p.square().sum(dim=(-3, -2, -1), keepdim=True) for p in planes]).sum(0) / count
        return [p * torch.rsqrt(energy + 1e-8) for p in planes]
    dims = {"plane": (-3, -2, -1), "texel": (-3,), "channel": (-2, -1)}[norm]
    return [rms_norm(p, dims) for p in planes]


def texel_noise(planes: Sequence[Tensor], std: float, size: Sequence[int], seed: int) -> list[Tensor]:
    """Add normal noise to texels, scaled so that its standard deviation at the voxels is ``std`` (equation 7).

    Bilinear interpolation multiplies the variance by w_lo^2 + w_hi^2 along each axis. The noise is divided by the root of the
    mean of this factor over the voxels (0.39 for both axes together if a plane has half the resolution of the grid).

    Args:
        planes: (1, C, rows, columns).
        std: C of equation 7.
        size: voxels along x, y, z.
        seed: seed of the noise.
    """
    texels = (planes[0].shape[2], planes[0].shape[3], planes[1].shape[3])
    kept = [kept_variance(n, m) for n, m in zip(size, texels, strict=True)]
    return [
        plane + (std / (kept[a] * kept[b]) ** 0.5) * library.normals(plane.detach(), 1 + q, seed).to(plane.dtype)
        for q, (plane, (a, b)) in enumerate(zip(planes, PLANE_AXES, strict=True))
    ]


@functools.cache
def kept_variance(voxels: int, texels: int) -> float:
    """Mean of w_lo^2 + w_hi^2 over the voxels of an axis: the variance of unit noise on texels after interpolation."""
    below, above, w_below, w_above = linear_taps(0, voxels, voxels, texels, False, "border")
    variance = torch.where(below == above, (w_below + w_above).square(), w_below.square() + w_above.square())
    return float(variance.mean())


class _MeanAbsoluteDifference(torch.autograd.Function):
    """Mean |p_{i+1} - p_i| (B,) along ``dim`` of (B, C, rows, columns), in half of the passes that autograd needs."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, dim: int) -> Tensor:
        n = p.shape[dim]
        d = p.narrow(dim, 1, n - 1) - p.narrow(dim, 0, n - 1)
        ctx.dim, ctx.count = dim, d[0].numel()
        ctx.save_for_backward(d)
        return torch.linalg.vector_norm(d, 1, dim=(1, 2, 3)) / ctx.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (d,) = ctx.saved_tensors
        slope = d.sign().mul_((grad / ctx.count).view(-1, 1, 1, 1))
        zero = torch.zeros_like(slope.narrow(ctx.dim, 0, 1))
        return torch.cat([zero, slope], ctx.dim) - torch.cat([slope, zero], ctx.dim), None


def total_variation(planes: Sequence[Tensor], kind: str = "l1_mean") -> Tensor:
    """Total variation (B,) of each object: sum over planes and axes of a norm of the differences d (algorithm.md 6.4).

    Args:
        planes: (B, C, rows, columns).
        kind: l1_mean: mean |d|; l2_mean: mean d^2; rms: sqrt(mean d^2); nfd_sum: sqrt(sum d^2), as in NFD.
    """
    total = planes[0].new_zeros(planes[0].shape[0])
    for p in planes:
        for dim in (-2, -1):
            if p.shape[dim] < 2:
                continue
            if kind == "l1_mean":
                total = total + _MeanAbsoluteDifference.apply(p, dim)
                continue
            squares = p.diff(dim=dim).square().flatten(1)
            if kind == "l2_mean":
                total = total + squares.mean(1)
            else:
                total = total + ((squares.mean(1) if kind == "rms" else squares.sum(1)) + 1e-12).sqrt()
    return total
