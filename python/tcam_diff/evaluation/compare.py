"""Two volumes side by side: figures and a picture."""

from __future__ import annotations

from pathlib import Path

import torch

from tcam_diff.data.intensity import intensity_range, to_unit
from tcam_diff.data.nifti import Volume
from tcam_diff.errors import UserError
from tcam_diff.evaluation import metrics
from tcam_diff.evaluation.picture import compare_picture


def compare_volumes(first: Volume, second: Volume, picture: Path | None = None, channel: int = 0) -> dict[str, float]:
    """MSE, PSNR (dB) and SSIM of ``second`` against ``first``, intensities scaled by the range of ``first`` to [0, 1], as
    "mse", "psnr" and, where every axis has at least 11 voxels, "ssim".

    ``picture``: a PNG of slices of ``channel`` of both, and their difference. Raises UserError where the shapes differ.
    """
    if first.data.shape != second.data.shape:
        raise UserError(
            f"{second.source}: shape {second.data.shape[1:]} with {second.data.shape[0]} channel(s), but {first.source} has "
            f"{first.data.shape[1:]} with {first.data.shape[0]}; `tcam decode --size` gives any size"
        )
    if not 0 <= channel < first.data.shape[0]:
        raise UserError(f"--channel: expected 0 to {first.data.shape[0] - 1}, got {channel}")
    ranges = intensity_range(first.data)
    unit_a, unit_b = to_unit(first.data, ranges), to_unit(second.data, ranges)
    a, b = torch.from_numpy(unit_a), torch.from_numpy(unit_b)
    found = {"mse": metrics.mse(a, b), "psnr": metrics.psnr(a, b)}
    if min(first.shape) >= metrics.WINDOW:
        found["ssim"] = metrics.ssim3d(a, b)
    if picture is not None:
        names = (Path(first.source).name, Path(second.source).name)
        compare_picture(picture, unit_a[channel], unit_b[channel], first.affine, names, figures_text(found))
    return found


def figures_text(found: dict[str, float]) -> str:
    """The figures of ``compare_volumes`` as a line."""
    ssim = f"{found['ssim']:.4f}" if "ssim" in found else f"not defined (an axis is shorter than {metrics.WINDOW} voxels)"
    return f"MSE {found['mse']:.6f}  PSNR {found['psnr']:.2f} dB  SSIM {ssim}"
