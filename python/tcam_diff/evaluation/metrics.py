"""MSE, PSNR and 3D SSIM of volumes in [0, 1] (algorithm.md 5.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared error over all voxels, summed in float64."""
    return float((a.double() - b.double()).square().mean())


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of volumes in [0, 1]."""
    return psnr_of_mse(mse(a, b))


def psnr_of_mse(error: float) -> float:
    """10 log10(1 / MSE) in dB, for a data range of 1."""
    return math.inf if error == 0 else -10 * math.log10(error)


def gaussian(taps: int, sigma: float) -> Tensor:
    """Gaussian kernel (taps,) with sum 1 and standard deviation ``sigma`` in samples."""
    x = torch.arange(taps, dtype=torch.float32) - (taps - 1) / 2
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    return kernel / kernel.sum()


def ssim3d(a: Tensor, b: Tensor, slab: int = 32) -> float:
    """Mean structural similarity (Wang 2004) of two volumes (channels, H, W, D) with data range 1.

    The window is Gaussian, 11^3 with sigma 1.5, and stays inside the volume; K1 = 0.01, K2 = 0.03. The result is that of
    MONAI's SSIMMetric. Separable convolutions over slabs of ``slab`` windows along x keep memory constant.

    Raises ValueError if the shapes differ or an axis is shorter than the window.
    """
    if a.shape != b.shape or a.dim() != 4:
        raise ValueError(f"a, b: expected equal shapes (channels, H, W, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(a.shape[1:]) < WINDOW:
        raise ValueError(f"a, b: SSIM needs at least {WINDOW} voxels along each axis, got {tuple(a.shape[1:])}")
    kernels = [gaussian(WINDOW, SIGMA)] * 3
    total, count = 0.0, 0
    rows = a.shape[1] - WINDOW + 1
    for start in range(0, rows, slab):
        stop = min(start + slab, rows)
        slab_a, slab_b = (v[:, start : stop + WINDOW - 1].float().unsqueeze(1) for v in (a, b))  # channels as a batch
        part = ssim_map(slab_a, slab_b, kernels)
        total += float(part.double().sum())
        count += part.numel()
    return total / count


def ssim_map(a: Tensor, b: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    """SSIM of every window inside images (n, 1, rows, columns) or volumes (n, 1, H, W, D) with data range 1. Differentiable.

    ``kernels`` are the factors of the window along each axis.
    """
    convolve = F.conv2d if len(kernels) == 2 else F.conv3d

    def blur(v: Tensor) -> Tensor:
        for axis, kernel in enumerate(kernels):
            shape = [1] * (2 + len(kernels))
            shape[2 + axis] = -1
            v = convolve(v, kernel.view(shape))
        return v

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    return ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    )
