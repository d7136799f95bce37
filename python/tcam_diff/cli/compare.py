"""``tcam compare``: compare two volumes by MSE, PSNR, 3D SSIM and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcam_diff.cli.common import say
from tcam_diff.data import VOXEL_BUDGET


def command(
    a: Annotated[Path, typer.Argument(help="The reference volume.")],
    b: Annotated[Path, typer.Argument(help="The volume to compare with A.")],
    out: Annotated[Path | None, typer.Option("--out", help="File of the picture; default: compare.png beside B.")] = None,
    channel: Annotated[int, typer.Option(help="Channel of the picture.")] = 0,
    max_voxels: Annotated[int, typer.Option(help="Refuse files with more voxels, channels counted.")] = VOXEL_BUDGET,
) -> None:
    """Print MSE, PSNR and 3D SSIM of B against A and draw both.

    Intensities are scaled by A's own range to [0, 1], so the figures are not those of `tcam evaluate` and of the tables, which
    compare in the [0, 1] of a prepared data set.
    """
    from tcam_diff.data.readers import read_volume
    from tcam_diff.evaluation.compare import compare_volumes, figures_text

    first, second = read_volume(a, max_voxels), read_volume(b, max_voxels)
    picture = out or b.parent / "compare.png"
    say(f"{figures_text(compare_volumes(first, second, picture, channel))}  (in the range of {a.name})")
    say(f"{picture}")
