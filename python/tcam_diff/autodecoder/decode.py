"""Fitted planes decoded to files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tcam_diff.autodecoder import artefact, latents
from tcam_diff.data.nifti import Quantiser, write_volume
from tcam_diff.errors import UserError
from tcam_diff.progress import Progress, ProgressCallback


def load_fitted(folder: Path, volume: str | None = None) -> artefact.FittedVolume:
    """What `tcam fit` wrote into a folder, or a volume of a latent set. Raises UserError where it is neither."""
    if not (folder / latents.INDEX).is_file():
        if volume is not None:
            raise UserError(f"--volume: {folder} is no latent set")
        return artefact.load(folder)
    latent_set = latents.LatentSet(folder)
    if volume is None and len(latent_set.entries) > 1:
        names = ", ".join(e.name for e in latent_set.entries[:5])
        raise UserError(f"{folder}: a latent set of {len(latent_set.entries)} volumes; choose one with --volume: {names}, ...")
    return latent_set.fitted(volume or latent_set.entries[0].name)


def check_output(size: tuple[int, int, int], dtype: str) -> None:
    """Whether a volume of this size and type can be written. Raises UserError."""
    if min(size) < 1 or max(size) > 32767:
        raise UserError(f"--size: expected three positive numbers, at most 32767 (NIfTI-1), got {' '.join(map(str, size))}")
    Quantiser(dtype, 0.0, 1.0)


def decode_to_file(
    fitted: artefact.FittedVolume,
    out: str | os.PathLike[str],
    size: tuple[int, int, int],
    dtype: str = "float32",
    progress: ProgressCallback | None = None,
) -> None:
    """Write a volume as NIfTI with the field of view of the original, slab by slab: memory does not grow with it.

    Args:
        fitted: of ``artefact.load``, ``LatentSet.fitted`` or ``TriplaneDiffusion.volume``.
        out: a .nii or .nii.gz file.
        size: voxels along the file's axes.
        dtype: float32, int16, uint16 or uint8 (integers with scl_slope and scl_inter).
        progress: called after every slab with the slices written.
    """
    check_output(size, dtype)
    info = fitted.info.resized(size)
    quantiser = Quantiser(dtype, min(lo for lo, _ in info.intensity), max(hi for _, hi in info.intensity))

    def slabs() -> Iterator[np.ndarray]:
        done = 0
        for slab in fitted.decode(size):
            yield slab
            done += slab.shape[3]
            if progress is not None:
                progress(Progress(done, size[2]))

    write_volume(out, slabs(), info, quantiser)
