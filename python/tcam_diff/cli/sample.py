"""``tcam sample``: volumes from a trained diffusion model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import progress_bar, say, stop_on_interrupt
from tcam_diff.diffusion.config import Method, SampleConfig
from tcam_diff.diffusion.draw import SHEET, Output, draw_samples
from tcam_diff.diffusion.guidance import ImageGuidance, read_known
from tcam_diff.diffusion.model import TriplaneDiffusion, find_model
from tcam_diff.errors import UserError
from tcam_diff.text import size_text
from tcam_diff.training.distributed import first_process

ComputeDtype = Literal["auto", "float32", "bfloat16"]


def command(
    model: Annotated[Path, typer.Argument(help="A run of `tcam train-diffusion`, or a model's folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the volumes; those that are there are kept.")],
    n: Annotated[int, typer.Option("--n", min=1, help="How many.")] = 4,
    first: Annotated[int, typer.Option(min=0, help="Number of the first: sample i is the same in any command.")] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Voxels along the axes. [default: as the training volumes]", show_default=False),
    ] = None,
    solver: Annotated[Method, typer.Option(help="Of the ODE; hot is stochastic.")] = "heun",
    steps: Annotated[int, typer.Option(min=1, help="Intervals; heun and midpoint take two evaluations, rk4 four.")] = 50,
    final: Annotated[str, typer.Option(help="x0: the last estimate of the planes; x: the integrated state.")] = "x0",
    label: Annotated[str | None, typer.Option(help="A class, of a model trained with labels.")] = None,
    hot_k: Annotated[int, typer.Option(min=1, help="Intervals that hot jumps ahead before it adds noise.")] = 2,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Of classifier-free guidance, with --label; 1: none.")] = 1.0,
    known: Annotated[
        Path | None,
        typer.Option(help="A volume that samples agree with: whole with --mask or --known-channels, or coarse."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="A volume on the grid of --known, not 0 where that is known.")] = None,
    known_channels: Annotated[
        str | None, typer.Option(help="Channels of --known that are known, e.g. 0,2; others are drawn.")
    ] = None,
    known_range: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Intensities of --known at 0 and 1. [default: the data set's]", show_default=False),
    ] = None,
    known_noise: Annotated[
        float, typer.Option(min=1e-4, help="How closely it is followed: deviation, of a range of 1.")
    ] = 0.02,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples at a time; 1 with --known. With 1, a volume is always the same to the bit.")
    ] = 4,
    dtype: Annotated[str, typer.Option(help="float32, int16, uint16 or uint8 (integers with a scale).")] = "float32",
    compute_dtype: Annotated[
        ComputeDtype | None,
        typer.Option(help="Of the products. [default: as in training; auto: bfloat16 on GPUs]", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Draw volumes from MODEL: NIfTI files with the data set's affine and intensities, JSON and a preview for each, and a
    contact sheet.

    Sample i depends on the seed and on i alone. Ctrl-C stops; the same command goes on with those that are missing. Under
    torchrun they are shared among its processes.
    """
    settings = {
        "solver": solver, "steps": steps, "final": final, "guidance_scale": guidance_scale, "seed": seed, "hot_k": hot_k,
    }  # fmt: skip
    config = configs.validate(SampleConfig, settings, "sample")
    if guidance_scale != 1 and label is None:
        raise UserError(f"--guidance-scale {guidance_scale:g}: guides towards a class: give --label, or leave it out")
    if known is None and (mask is not None or known_channels is not None or known_range is not None):
        raise UserError("--mask, --known-channels and --known-range say what of --known is known: give that too")

    def guide(loaded: TriplaneDiffusion) -> ImageGuidance | None:
        return None if known is None else read_known(loaded, known, mask, known_channels, known_noise, known_range)

    quiet = quiet or not first_process()
    output, indices = Output(out, size, dtype), range(first, first + n)

    def started(loaded: TriplaneDiffusion, kept: int) -> None:
        say(
            f"{find_model(model)}: {n} volumes, {size_text(size or loaded.geometry.info.shape)}, {solver} with {steps} steps"
            + (f"; {kept} are there already" if kept else "")
        )

    with progress_bar("sampling", quiet) as show, stop_on_interrupt("the same command goes on") as stop:
        done = draw_samples(
            model, output, indices, config, label=label, guide=guide, batch_size=batch_size, compute=compute_dtype,
            device=device, started=None if quiet else started, progress=show, stop=stop,
        )  # fmt: skip
    if not done:
        raise KeyboardInterrupt
    if not quiet:
        say(f"{out}: {n} volumes; {out / SHEET}")
