"""MSE, PSNR, SSIM, MS-SSIM and LPIPS of volumes in [0, 1] (algorithm.md 5.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    x = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    return kernel / kernel.sum()


def ssim3d(a: Tensor, b: Tensor, slab: int = 16) -> float:
    """Mean structural similarity (Wang 2004) of two volumes (channels, H, W, D) with data range 1.

    The window is Gaussian, 11^3 with sigma 1.5, and stays inside the volume; K1 = 0.01, K2 = 0.03. The result is that of
    MONAI's SSIMMetric. Separable sums in float64 over slabs of ``slab`` windows along x keep memory constant.

    Raises ValueError if the shapes differ or an axis is shorter than the window.
    """
    _check(a, b)
    return _means(a, b, slab)[0]


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.dim() != 4:
        raise ValueError(f"a, b: expected equal shapes (channels, H, W, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(a.shape[1:]) < WINDOW:
        raise ValueError(f"a, b: SSIM needs at least {WINDOW} voxels along each axis, got {tuple(a.shape[1:])}")


def _means(a: Tensor, b: Tensor, slab: int) -> tuple[float, float]:
    """Means over all windows of SSIM and of its factor for contrast and structure."""
    kernels = [gaussian(WINDOW, SIGMA)] * 3
    ssim, contrast, count = 0.0, 0.0, 0
    rows = a.shape[1] - WINDOW + 1
    for start in range(0, rows, slab):
        stop = min(start + slab, rows)
        # Channels as a batch. In float32 the variances of smooth volumes, differences of squares, are off by 1e-5.
        slab_a, slab_b = (v[:, start : stop + WINDOW - 1].double().unsqueeze(1) for v in (a, b))
        luminance, structure = _factors(slab_a, slab_b, kernels)
        ssim += float((luminance * structure).sum())
        contrast += float(structure.sum())
        count += structure.numel()
    return ssim / count, contrast / count


#: Weights of the scales of MS-SSIM, from the finest (Wang 2003).
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def scales(size: int) -> int:
    """The number of scales of MS-SSIM, each half the size of the one before, at which an axis of ``size`` has a window."""
    count = 0
    while count < len(SCALES) and size >> count >= WINDOW:
        count += 1
    return count


def ms_ssim3d(a: Tensor, b: Tensor, slab: int = 16) -> float:
    """Multi-scale structural similarity (Wang 2003) of two volumes (channels, H, W, D) with data range 1.

    The product over scales of the mean contrast and structure, raised to the scale's weight, and of the mean SSIM at the
    coarsest. A scale is half the size of the one before, by averages over 2^3 voxels. If the shortest axis allows fewer than
    five scales, there are as many as it allows, and their weights are scaled to a sum of 1. Negative means count as 0.
    MONAI's MultiScaleSSIMMetric does the same in float32, which costs about 1e-5 at coarse scales.

    Raises ValueError as ``ssim3d`` does, and if there is only one scale.
    """
    _check(a, b)
    count = scales(min(a.shape[1:]))
    if count < 2:
        raise ValueError(f"a, b: MS-SSIM needs at least {2 * WINDOW} voxels along each axis, got {tuple(a.shape[1:])}")
    weights = [w / sum(SCALES[:count]) for w in SCALES[:count]]
    result = 1.0
    a, b = a.float(), b.float()
    for scale, weight in enumerate(weights):
        ssim, contrast = _means(a, b, slab)
        result *= max(ssim if scale == count - 1 else contrast, 0.0) ** weight
        a, b = F.avg_pool3d(a, 2), F.avg_pool3d(b, 2)
    return result


def lpips_of_slices(network: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, batch: int = 16) -> float:
    """Mean LPIPS of the slices across each axis of two volumes (channels, H, W, D), all channels and slices alike."""
    total, count = 0.0, 0
    with torch.no_grad():
        for axis in (1, 2, 3):
            slices = [v.movedim(axis, 1).flatten(0, 1).unsqueeze(1) for v in (a, b)]
            for x, y in zip(*(s.split(batch) for s in slices), strict=True):
                total += float(network(x, y)) * len(x)
                count += len(x)
    return total / count


def ssim_map(a: Tensor, b: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    """SSIM of every window inside images (n, 1, rows, columns) or volumes (n, 1, H, W, D) with data range 1. Differentiable.

    ``kernels`` are the factors of the window along each axis.
    """
    luminance, structure = _factors(a, b, kernels)
    return luminance * structure


def _band(size: int, kernel: Tensor) -> Tensor:
    """Matrix (size, windows) that correlates rows of ``size`` samples with a kernel, faster than a convolution does."""
    windows = size - len(kernel) + 1
    return F.pad(kernel, (0, windows)).repeat(windows)[: windows * size].view(windows, size).T


def _factors(a: Tensor, b: Tensor, kernels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The factors of SSIM of every window: of luminance, and of contrast and structure."""
    bands = [_band(n, kernel.to(a)) for n, kernel in zip(a.shape[2:], kernels, strict=True)]

    def blur(v: Tensor) -> Tensor:
        for axis, band in enumerate(bands, 2):
            v = (v.movedim(axis, -1) @ band).movedim(-1, axis)
        return v

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    return luminance, (2 * covariance + c2) / (var_a + var_b + c2)


def label_counts(predicted: Tensor, reference: Tensor, labels: int) -> Tensor:
    """Numbers of voxels that are true positive, false positive, true negative and false negative, for each label.

    MONAI's get_confusion_matrix counts in float32, which is exact to 2^24 voxels only.

    Args:
        predicted, reference: integers of one shape, 0 for background and 1 to ``labels``.
        labels: number of labels.

    Returns:
        (labels, 4) int64.
    """
    n = labels + 1
    pairs = torch.bincount(reference.flatten().long() * n + predicted.flatten().long(), minlength=n * n).view(n, n)
    true = pairs.diagonal()
    false, missed = pairs.sum(0) - true, pairs.sum(1) - true
    return torch.stack([true, false, pairs.sum() - true - false - missed, missed], 1)[1:]


def label_metrics(counts: Tensor) -> dict[str, Tensor]:
    """Precision, recall, specificity, accuracy and F1 (labels,) in float64 of counts from ``label_counts``.

    NaN where a ratio is 0/0: all but accuracy and specificity of a label that is in neither volume, precision of one that is
    not predicted, and recall of one that is not in the reference.
    """
    tp, fp, tn, fn = counts.double().unbind(-1)
    return {
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
        "specificity": tn / (tn + fp),
        "accuracy": (tp + tn) / (tp + fp + tn + fn),
        "f1": 2 * tp / (2 * tp + fp + fn),
    }
