"""Fitted planes decoded to files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.progress import Progress

from tcam_diff.autodecoder import artefact
from tcam_diff.cli.common import console
from tcam_diff.data.nifti import Quantiser, resized_affine, write_volume
from tcam_diff.errors import UserError


def check_output(size: tuple[int, int, int], dtype: str) -> None:
    """Whether a volume of this size and type can be written. Raises UserError."""
    if min(size) < 1 or max(size) > 32767:
        raise UserError(f"--size: expected three positive numbers, at most 32767 (NIfTI-1), got {' '.join(map(str, size))}")
    Quantiser(dtype, 0.0, 1.0)


def decode_to_file(
    fitted: artefact.FittedVolume,
    out: Path,
    size: tuple[int, int, int],
    dtype: str = "float32",
    quiet: bool = False,
) -> None:
    check_output(size, dtype)
    meta = fitted.meta
    quantiser = Quantiser(dtype, min(lo for lo, _ in meta.intensity), max(hi for _, hi in meta.intensity))
    affine = resized_affine(np.asarray(meta.affine), meta.shape, size)
    with Progress(console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("decoding", total=size[2])

        def slabs() -> Iterator[np.ndarray]:
            for slab in fitted.decode(size):
                yield slab
                progress.advance(task, slab.shape[3])

        codes, units = (meta.codes[0], meta.codes[1]), (meta.units[0], meta.units[1])
        write_volume(out, slabs(), size, meta.channels, affine, quantiser, codes, units)
