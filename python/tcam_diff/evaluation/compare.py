"""Two volumes side by side: figures and a picture."""

from __future__ import annotations

from pathlib import Path

import torch

from tcam_diff.data.volume import Volume, intensity_range, oriented
from tcam_diff.errors import UserError
from tcam_diff.evaluation import metrics
from tcam_diff.evaluation.picture import compare_picture


def compare_volumes(first: Volume, second: Volume, picture: Path | None = None, channel: int = 0) -> dict[str, float]:
    """MSE, PSNR (dB) and SSIM of ``second`` against ``first``, intensities scaled by the range of ``first`` to [0, 1], as
    "mse", "psnr" and, where every axis has at least 11 voxels, "ssim".

    ``picture``: a PNG of slices of ``channel`` of both, and their difference. Raises UserError where the shapes differ.
    """
    a = first.info
    second = oriented(second, a.affine)
    b = second.info
    if a.array_shape != b.array_shape:
        raise UserError(
            f"{b.source}: shape {b.shape} with {b.channels} channel(s), but {a.source} has {a.shape} with {a.channels}; "
            "`tcam decode --size` gives any size"
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
    """The figures of ``compare_volumes`` as a line."""
    ssim = f"{figures['ssim']:.4f}" if "ssim" in figures else f"not defined (an axis is shorter than {metrics.WINDOW} voxels)"
    return f"MSE {figures['mse']:.6f}  PSNR {figures['psnr']:.2f} dB  SSIM {ssim}"
