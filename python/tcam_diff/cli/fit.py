"""``tcam fit``: a volume becomes three feature planes and a decoder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tcam_diff.autodecoder import artefact
from tcam_diff.autodecoder.config import FitConfig, load_config
from tcam_diff.autodecoder.fit import FitResult, Fitter
from tcam_diff.autodecoder.fit import Progress as FitProgress
from tcam_diff.autodecoder.objective import compute_dtype, plane_texels
from tcam_diff.cli.common import stop_on_interrupt
from tcam_diff.data.nifti import VOXEL_BUDGET, read_volume
from tcam_diff.data.volume import Volume, VolumeInfo, intensity_range
from tcam_diff.errors import UserError

console = Console()


def fit(
    volume: Annotated[Path, typer.Argument(help="A 3D NIfTI file, or 4D with channels last (.nii, .nii.gz).")],
    out: Annotated[Path, typer.Option("--out", help="Folder for planes, decoder, configuration and metadata.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the preset, e.g. steps=800 channels=24."),
    ] = None,
    preset: Annotated[str, typer.Option(help="fast: minutes on two cores; paper: the paper's optimisation.")] = "fast",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a fitted volume in the folder.")] = False,
    max_voxels: Annotated[int, typer.Option(help="Refuse larger files.")] = VOXEL_BUDGET,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Fit planes and decoder to VOLUME. Ctrl-C stops and keeps the best result so far.

    Keys of the configuration: see the saved config.yaml, or python/tcam_diff/autodecoder/config.py.
    """
    config = load_config(preset, overrides or [])
    source = read_volume(volume, max_voxels)
    if source.info.channels > 16:
        raise UserError(f"{volume}: {source.info.channels} channels; the decoder has at most 16 outputs")
    artefact.prepare(out, overwrite)
    result, info = fit_volume(source, config, quiet)
    artefact.save(out, result, info)
    rate = f"{result.seconds:.0f} s" if result.seconds < 600 else f"{result.seconds / 60:.0f} min"
    state = f"stopped after {result.steps_done} steps" if result.stopped else f"{result.steps_done} steps"
    console.print(
        f"{out}: {state} in {rate}, PSNR {result.psnr:.2f} dB on the check slices, noise off", highlight=False, soft_wrap=True
    )


def fit_volume(source: Volume, config: FitConfig, quiet: bool = False) -> tuple[FitResult, VolumeInfo]:
    """Scale, fit with a progress bar, and describe."""
    ranges = intensity_range(source.data, 0, 100 if config.intensity == "minmax" else 99.5)
    info = source.info.replaced(intensity=ranges, source=Path(source.info.source).name)
    fitter = Fitter(info.to_unit(source.data), config)
    texels = plane_texels(config, info.shape)
    console.print(
        f"{source.info.source}: {' x '.join(map(str, info.shape))}, {info.channels} channel(s); planes "
        f"C = {config.channels}, {' x '.join(map(str, texels))} texels; products in "
        f"{str(compute_dtype(config)).removeprefix('torch.')}",
        highlight=False,
        soft_wrap=True,
    )
    with (
        _bar(config.steps, quiet) as show,
        stop_on_interrupt("the best result is kept (again: stop at once, keep nothing)") as stop,
    ):
        result = fitter.run(show, stop)
    return result, info


@contextmanager
def _bar(steps: int, quiet: bool) -> Iterator[Callable[[FitProgress], None]]:
    columns = (
        TextColumn("fitting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]} PSNR {task.fields[psnr]} dB"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet) as progress:
        task = progress.add_task("fit", total=steps, loss="-", psnr="-")
        last = [time.monotonic()]

        def show(p: FitProgress) -> None:
            psnr = "-" if not math.isfinite(p.psnr) else f"{p.psnr:.2f}"
            progress.update(task, completed=p.step, loss=f"{p.loss:.5f}", psnr=psnr)
            if not quiet and not console.is_terminal and (time.monotonic() - last[0] > 20 or p.step == p.steps):
                last[0] = time.monotonic()  # a log file gets a line now and then
                left = p.seconds / p.step * (p.steps - p.step)
                console.print(
                    f"step {p.step}/{p.steps} loss {p.loss:.5f} PSNR {psnr} dB, about {left:.0f} s left",
                    highlight=False,
                )

        yield show
