"""The three feature planes: normalisation, noise, smoothness (algebra of equations 5 to 8 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tcam_ext.reference import linear_taps

#: A plane's two axes, in the order xy, yz, xz.
PLANE_AXES = ((0, 1), (1, 2), (0, 2))
PLANE_NAMES = ("xy", "yz", "xz")


def init_planes(channels: int, texels: Sequence[int], std: float, generator: torch.Generator, batch: int = 1) -> list[Tensor]:
    """Planes (batch, C, rows, columns) drawn from N(0, std^2); ``texels`` are those along x, y, z."""
    return [std * torch.randn(batch, channels, texels[a], texels[b], generator=generator) for a, b in PLANE_AXES]


def rms_norm(plane: Tensor, eps: float = 1e-8) -> Tensor:
    """F / sqrt(mean F^2 + eps) over all of C, rows, columns of a plane: unit energy (equation 6, reading A)."""
    return plane * torch.rsqrt(plane.square().mean(dim=(-3, -2, -1), keepdim=True) + eps)


def texel_noise(
    planes: Sequence[Tensor],
    std: float,
    size: Sequence[int],
    generator: torch.Generator,
    align_corners: bool = False,
    padding_mode: str = "border",
) -> list[Tensor]:
    """Planes plus C N(0, I) per texel, scaled so that the noise has standard deviation ``std`` once sampled (equation 7).

    Bilinear interpolation averages neighbours: the variance at a voxel is the product over both axes of
    w_lo^2 + w_hi^2, whose mean over the voxels of ``size`` is divided out (0.39 when a plane is half as fine as the grid).
    """
    texels = (planes[0].shape[2], planes[0].shape[3], planes[1].shape[3])
    shrink = []
    for n, m in zip(size, texels, strict=True):
        below, above, w_below, w_above = linear_taps(0, n, n, m, align_corners, padding_mode)
        same = below == above
        variance = torch.where(same, (w_below + w_above).square(), w_below.square() + w_above.square())
        shrink.append(float(variance.mean()))
    noisy = []
    for plane, (a, b) in zip(planes, PLANE_AXES, strict=True):
        scale = std / (shrink[a] * shrink[b]) ** 0.5
        noisy.append(plane + scale * torch.randn(plane.shape, generator=generator, dtype=plane.dtype))
    return noisy


def total_variation(planes: Sequence[Tensor]) -> Tensor:
    """Sum over the planes of mean |difference along rows| + mean |difference along columns| (algorithm.md 6.4, l1_mean)."""
    total = planes[0].new_zeros(())
    for p in planes:
        if p.shape[-2] > 1:
            total = total + p.diff(dim=-2).abs().mean()
        if p.shape[-1] > 1:
            total = total + p.diff(dim=-1).abs().mean()
    return total
