"""``tcam interpolate``: interpolate between two volumes of a latent set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import ComputeDtype, Quiet, progress_bar, say
from tcam_diff.diffusion.config import Method, SampleConfig


def command(
    model: Annotated[Path, typer.Argument(help="A run of `tcam train-diffusion`, or a model's folder.")],
    latents: Annotated[Path, typer.Argument(help="A latent set of the same decoder.")],
    a: Annotated[str, typer.Argument(help="Name of a volume of LATENTS.")],
    b: Annotated[str, typer.Argument(help="Name of another volume.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the volumes.")],
    n: Annotated[int, typer.Option("--n", min=2, help="Number of volumes, including both ends.")] = 7,
    size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Voxels along the axes. [default: as the training volumes]", show_default=False),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Class of both volumes, for models with labels.")] = None,
    solver: Annotated[Method, typer.Option(help="Solver of the ODE in both directions.")] = "heun",
    steps: Annotated[int, typer.Option(min=1, help="Intervals of the solver.")] = 50,
    dtype: Annotated[str, typer.Option(help="float32, int16, uint16 or uint8 (integers with a scale).")] = "float32",
    compute_dtype: Annotated[
        ComputeDtype, typer.Option(help="Type of the products; auto: bfloat16 if the machine multiplies it.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Write volumes from A to B, along the great circle between the noises of their planes.

    OUT gets NIfTI files, a contact sheet, and interpolation.json with the settings.
    """
    from tcam_diff.diffusion.draw import SHEET, Output, draw_between

    output = Output(out, size, dtype)
    config = configs.validate(SampleConfig, {"solver": solver, "steps": steps}, "interpolate")
    with progress_bar("interpolating", quiet) as show:
        draw_between(model, latents, a, b, output, n, config, label=label, compute=compute_dtype, device=device, progress=show)
    say(f"{out}: {n} volumes from {a} to {b}; {out / SHEET}")
