"""Comparison of two volumes by metrics and a picture."""

from __future__ import annotations

from pathlib import Path

import torch

from tcam_diff.data.volume import Volume, intensity_range, oriented
from tcam_diff.errors import UserError
from tcam_diff.evaluation import metrics
from tcam_diff.evaluation.picture import compare_picture


def compare_volumes(first: Volume, second: Volume, picture: Path | None = None, channel: int = 0) -> dict[str, float]:
    """Compare ``second`` with ``first``, with intensities scaled to [0, 1] by the range of ``first``.

    Args:
        first: reference.
        second: volume of the same shape.
        picture: PNG to write, of slices of both volumes and their difference; None: no picture.
        channel: channel of the picture.

    Returns:
        "mse", "psnr" (dB) and, if every axis has at least 11 voxels, "ssim".

    Raises:
        UserError: the shapes differ, or there is no such channel.
    """
    a = first.info
    second = oriented(second, a.affine)
    b = second.info
    if a.array_shape != b.array_shape:
        raise UserError(
            f"{b.source}: shape {b.shape} with {b.channels} channel(s), but {a.source} has {a.shape} with {a.channels}; "
            "`tcam decode --size` decodes to any size"
        )
    if not a.same_grid(b):
        raise UserError(f"{b.source}: its affine is not that of {a.source}: the voxels are elsewhere; resample one first")
    if not 0 <= channel < a.channels:
        raise UserError(f"--channel: expected 0 to {a.channels - 1}, got {channel}")
    scale = a.replaced(intensity=intensity_range(first.data))
    unit_a, unit_b = scale.to_unit(first.data), scale.to_unit(second.data)
    tensors = torch.from_numpy(unit_a), torch.from_numpy(unit_b)
    figures = {"mse": metrics.mse(*tensors), "psnr": metrics.psnr(*tensors)}
    if min(a.shape) >= metrics.WINDOW:
        figures["ssim"] = metrics.ssim3d(*tensors)
    if picture is not None:
        names = (Path(a.source).name, Path(b.source).name)
        compare_picture(picture, unit_a[channel], unit_b[channel], a.affine, names, figures_text(figures))
    return figures


def figures_text(figures: dict[str, float]) -> str:
    """One line with the metrics of ``compare_volumes``."""
    ssim = f"{figures['ssim']:.4f}" if "ssim" in figures else f"not defined (an axis is shorter than {metrics.WINDOW} voxels)"
    return f"MSE {figures['mse']:.6f}  PSNR {figures['psnr']:.2f} dB  SSIM {ssim}"
