"""``tcam decode``: fitted planes become a NIfTI volume of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tcam_diff.autodecoder import artefact, latents
from tcam_diff.autodecoder.decode import decode_to_file
from tcam_diff.errors import UserError

console = Console()


def decode(
    folder: Annotated[Path, typer.Argument(help="A folder that `tcam fit` wrote, or a latent set.")],
    out: Annotated[Path, typer.Option("--out", help="The volume to write (.nii or .nii.gz).")],
    size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Voxels along the file's axes; default: those of the volume fitted."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, int16, uint16 or uint8 (integers with scl_slope and scl_inter).")
    ] = "float32",
    volume: Annotated[str | None, typer.Option(help="Which volume of a latent set.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Decode FOLDER to a NIfTI file with the field of view of the original, a slab at a time."""
    fitted = _load(folder, volume)
    decode_to_file(fitted, out, size or fitted.meta.shape, dtype, quiet)
    console.print(f"{out}: {' x '.join(map(str, size or fitted.meta.shape))}, {dtype}", highlight=False)


def _load(folder: Path, volume: str | None) -> artefact.FittedVolume:
    if not (folder / latents.INDEX).is_file():
        if volume is not None:
            raise UserError(f"--volume: {folder} is no latent set")
        return artefact.load(folder)
    found = latents.LatentSet(folder)
    if volume is None and len(found.entries) > 1:
        names = ", ".join(e.name for e in found.entries[:5])
        raise UserError(f"{folder}: a latent set of {len(found.entries)} volumes; choose one with --volume: {names}, ...")
    return found.fitted(volume or found.entries[0].name)
