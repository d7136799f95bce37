"""Decoding of fitted planes to files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from tcam_diff.autodecoder import artefact, latents
from tcam_diff.data.labels import labels_of_maps
from tcam_diff.data.nifti import Quantiser, write_volume
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.errors import UserError
from tcam_diff.progress import Progress, ProgressCallback

NO_MAPS = "the volumes have no label maps; prepare them with label_maps, and train on that store"
#: Least levels of an integer type that each channel of a file must keep.
LEAST_LEVELS = 32


class Decodable(Protocol):
    """A volume that is decoded when it is written."""

    @property
    def info(self) -> VolumeInfo:
        """Its metadata."""

    def decode(self, size: tuple[int, int, int]) -> Iterator[np.ndarray]:
        """Consecutive slabs (channels, H, W, d) of a size, in physical units."""


def load_fitted(folder: Path, volume: str | None = None) -> artefact.FittedVolume:
    """Load a folder of `tcam fit`, or one volume of a latent set.

    Args:
        folder: either kind of folder.
        volume: name in the latent set; may be None if the set has one volume.

    Raises:
        UserError: the folder is neither, or the volume is missing or ambiguous.
    """
    if not latents.is_latent_set(folder):
        if volume is not None:
            raise UserError(f"--volume: {folder} is not a latent set")
        return artefact.load(folder)
    latent_set = latents.LatentSet(folder)
    if volume is None and len(latent_set.entries) > 1:
        names = ", ".join(e.name for e in latent_set.entries[:5])
        raise UserError(f"{folder}: a latent set of {len(latent_set.entries)} volumes; choose one with --volume: {names}, ...")
    return latent_set.fitted(volume or latent_set.entries[0].name)


def check_output(size: tuple[int, int, int], dtype: str) -> None:
    """Raise UserError if a volume of this size and type cannot be written."""
    if min(size) < 1 or max(size) > 32767:
        raise UserError(f"--size: expected three positive numbers, at most 32767 (NIfTI-1), got {' '.join(map(str, size))}")
    Quantiser(dtype, 0.0, 1.0)


def decode_to_file(
    fitted: Decodable,
    out: str | os.PathLike[str],
    size: tuple[int, int, int],
    dtype: str = "float32",
    progress: ProgressCallback | None = None,
    labels: str | os.PathLike[str] | None = None,
) -> None:
    """Write a volume as NIfTI with the field of view of the original, one slab at a time, so memory does not grow with it.

    Label maps are not written. ``labels`` is a file of their own for the labels.

    Args:
        fitted: result of ``artefact.load``, ``LatentSet.fitted`` or ``TriplaneDiffusion.volume``.
        out: a .nii or .nii.gz file.
        size: voxels along the file's axes.
        dtype: float32, int16, uint16 or uint8 (integers with scl_slope and scl_inter).
        progress: called after every slab, counting slices.
        labels: a .nii or .nii.gz file for the labels, uint8; None: they are not written.

    Raises:
        UserError: size, type or file name cannot be written, or the volume has no label maps.
    """
    check_output(size, dtype)
    maps, codes = fitted.info.label_maps, []
    if labels is not None and not maps:
        raise UserError(f"{labels}: {NO_MAPS}")
    info = fitted.info.of_images().resized(size)
    quantiser = Quantiser(dtype, min(lo for lo, _ in info.intensity), max(hi for _, hi in info.intensity))
    for channel, (lo, hi) in enumerate(info.intensity):
        if quantiser.dtype.kind != "f" and (hi - lo) / quantiser.slope < LEAST_LEVELS:
            raise UserError(
                f"{out}: channel {channel} ({lo:g} to {hi:g}) would keep {(hi - lo) / quantiser.slope:.0f} levels of {dtype} "
                "beside the other channels, which share one slope; choose float32"
            )

    def slabs() -> Iterator[np.ndarray]:
        done = 0
        for slab in fitted.decode(size):
            yield slab[: info.channels]
            if labels is not None:
                codes.append(labels_of_maps(slab[info.channels :], maps)[None])
            done += slab.shape[3]
            if progress is not None:
                progress(Progress(done, size[2]))

    write_volume(out, slabs(), info, quantiser)
    if labels is not None:
        of_labels = info.replaced(channels=1, intensity=[(0.0, 255.0)])
        write_volume(labels, iter(codes), of_labels, Quantiser("uint8", 0.0, 255.0))
