"""``tcam compare``: MSE, PSNR, 3D SSIM and a picture of two volumes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from tcam_diff.data.nifti import VOXEL_BUDGET, read_volume
from tcam_diff.data.volume import Volume, intensity_range
from tcam_diff.errors import UserError
from tcam_diff.evaluation import metrics
from tcam_diff.evaluation.picture import compare_picture

console = Console()


def compare(
    a: Annotated[Path, typer.Argument(help="The reference volume.")],
    b: Annotated[Path, typer.Argument(help="The volume to judge.")],
    out: Annotated[Path | None, typer.Option("--out", help="The picture; default: compare.png beside B.")] = None,
    channel: Annotated[int, typer.Option(help="Channel of the picture.")] = 0,
    max_voxels: Annotated[int, typer.Option(help="Refuse larger files.")] = VOXEL_BUDGET,
) -> None:
    """Print MSE, PSNR and 3D SSIM of B against A (intensities scaled by A's range to [0, 1]) and draw both."""
    first, second = read_volume(a, max_voxels), read_volume(b, max_voxels)
    picture = out or b.parent / "compare.png"
    compare_volumes(first, second, picture, channel)
    console.print(f"{picture}", highlight=False)


def compare_volumes(first: Volume, second: Volume, picture: Path, channel: int = 0) -> dict[str, float]:
    a, b = first.info, second.info
    if a.array_shape != b.array_shape:
        raise UserError(
            f"{b.source}: shape {b.shape} with {b.channels} channel(s), but {a.source} has {a.shape} with {a.channels}; "
            "`tcam decode --size` gives any size"
        )
    if not 0 <= channel < a.channels:
        raise UserError(f"--channel: expected 0 to {a.channels - 1}, got {channel}")
    scale = a.replaced(intensity=intensity_range(first.data))
    unit_a, unit_b = scale.to_unit(first.data), scale.to_unit(second.data)
    ta, tb = torch.from_numpy(unit_a), torch.from_numpy(unit_b)
    found = {"mse": metrics.mse(ta, tb), "psnr": metrics.psnr(ta, tb)}
    text = f"MSE {found['mse']:.6f}  PSNR {found['psnr']:.2f} dB"
    if min(a.shape) >= metrics.WINDOW:
        found["ssim"] = metrics.ssim3d(ta, tb)
        text += f"  SSIM {found['ssim']:.4f}"
    else:
        text += f"  SSIM not defined (an axis is shorter than {metrics.WINDOW} voxels)"
    console.print(text, highlight=False)
    names = (Path(a.source).name, Path(b.source).name)
    compare_picture(picture, unit_a[channel], unit_b[channel], a.affine, names, text)
    return found
