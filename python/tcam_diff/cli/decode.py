"""``tcam decode``: decode fitted planes to a NIfTI volume of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcam_diff.cli.common import Quiet, progress_bar, say
from tcam_diff.text import size_text


def command(
    folder: Annotated[Path, typer.Argument(help="A folder that `tcam fit` wrote, or a latent set.")],
    out: Annotated[Path, typer.Option("--out", help="The volume to write (.nii or .nii.gz).")],
    size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Voxels along the file's axes; default: those of the fitted volume."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, int16, uint16 or uint8 (integers with scl_slope and scl_inter).")
    ] = "float32",
    volume: Annotated[str | None, typer.Option(help="Name of a volume of a latent set.")] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="File for the labels, of volumes prepared with label_maps.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Decode FOLDER to a NIfTI file with the field of view of the original, one slab at a time."""
    from tcam_diff.autodecoder.decode import decode_to_file, load_fitted

    fitted = load_fitted(folder, volume)
    shape = size or fitted.info.shape
    with progress_bar("decoding", quiet) as show:
        decode_to_file(fitted, out, shape, dtype, show, labels)
    say(f"{out}: {size_text(shape)}, {dtype}")
