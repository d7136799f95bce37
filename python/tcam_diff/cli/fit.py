"""``tcam fit``: fit three feature planes and a decoder to a volume."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcam_diff.autodecoder.config import FitConfig
from tcam_diff.cli.common import Quiet, progress_bar, say, stop_on_interrupt
from tcam_diff.data import VOXEL_BUDGET
from tcam_diff.text import dtype_text, size_text


def command(
    volume: Annotated[
        Path, typer.Argument(help="A NIfTI file, 3D or 4D with channels last, or a folder with one DICOM series.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for planes, decoder, configuration and metadata.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the preset, e.g. steps=800 channels=24."),
    ] = None,
    preset: Annotated[str, typer.Option(help="fast: minutes on two cores; paper: the paper's optimisation.")] = "fast",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a fitted volume in the folder.")] = False,
    max_voxels: Annotated[int, typer.Option(help="Refuse files with more voxels, channels counted.")] = VOXEL_BUDGET,
    quiet: Quiet = False,
) -> None:
    """Fit planes and decoder to VOLUME. Ctrl-C stops and keeps the best result so far.

    The keys of the configuration are in the saved config.yaml and in python/tcam_diff/autodecoder/config.py.
    """
    from tcam_diff.autodecoder import artefact
    from tcam_diff.autodecoder.fit import check_channels, fit_volume
    from tcam_diff.autodecoder.objective import compute_dtype, plane_texels
    from tcam_diff.data.readers import read_volume

    config = FitConfig.load(preset, overrides or [])
    source = read_volume(volume, max_voxels)
    check_channels(source)
    with artefact.reserved(out, overwrite):
        info, texels = source.info, plane_texels(config, source.info.shape)
        say(
            f"{info.source}: {size_text(info.shape)}, {info.channels} channel(s); planes C = {config.channels}, "
            f"{size_text(texels)} texels; products in {dtype_text(compute_dtype(config))}"
        )
        shown = [("loss", "loss", ".5f", ""), ("PSNR", "psnr", ".2f", " dB")]
        then = "the best result is kept (again: stop at once, keep nothing)"
        with progress_bar("fitting", quiet, shown) as show, stop_on_interrupt(then) as stop:
            result, info = fit_volume(source, config, progress=show, stop=stop)
        artefact.save_somewhere(out, result, info)
    time = f"{result.seconds:.0f} s" if result.seconds < 600 else f"{result.seconds / 60:.0f} min"
    state = f"stopped after {result.steps_done} steps" if result.stopped else f"{result.steps_done} steps"
    say(f"{out}: {state} in {time}, PSNR {result.psnr:.2f} dB on the check slices, noise off")
