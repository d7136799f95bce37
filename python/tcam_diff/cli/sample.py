"""``tcam sample``: draw volumes from a trained diffusion model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import ComputeDtype, Quiet, progress_bar, say, stop_on_interrupt
from tcam_diff.diffusion.config import Grid, Method, SampleConfig
from tcam_diff.errors import UserError
from tcam_diff.pretrained import names
from tcam_diff.pretrained import pretrained as packaged
from tcam_diff.text import size_text

if TYPE_CHECKING:
    from tcam_diff.diffusion.guidance import ImageGuidance
    from tcam_diff.diffusion.model import TriplaneDiffusion


# Half of these lines are options: typer reads them from the signature.
def command(
    out: Annotated[Path, typer.Option("--out", help="Folder for the volumes; existing ones are kept.")],
    model: Annotated[
        Path | None,
        typer.Argument(help="A run of `tcam train-diffusion` or `tcam distill`, or a model's folder.", show_default=False),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(help=f"A model of the package instead of MODEL: {', '.join(names())}.", show_default=False),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of volumes.")] = 4,
    first: Annotated[int, typer.Option(min=0, help="Number of the first sample; sample i is the same in any command.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Voxels along the axes. [default: as the training volumes]", show_default=False),
    ] = None,
    solver: Annotated[
        Method,
        typer.Option(help="Solver of the ODE; churn, hot and consistency (of models of `tcam distill`) are stochastic."),
    ] = "heun",
    steps: Annotated[
        int, typer.Option(min=1, help="Intervals, each of one evaluation of the network or several (heun: two).")
    ] = 50,
    grid: Annotated[
        Grid,
        typer.Option(
            help="Intervals; spectrum: where the latents' modes are decided; auto: spectrum where the model knows it."
        ),
    ] = "auto",
    final: Annotated[str, typer.Option(help="Result; x0: the last estimate of the planes; x: the integrated state.")] = "x0",
    label: Annotated[str | None, typer.Option(help="Class of the samples, for models with labels.")] = None,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(
            help="Voxel sizes in mm, of the model's own number of voxels, for models trained with spacing=true. "
            "[default: those of random training volumes]",
            show_default=False,
        ),
    ] = None,
    hot_k: Annotated[int, typer.Option(min=1, help="Intervals that hot jumps ahead before it adds noise.")] = 2,
    churn: Annotated[
        float, typer.Option(min=0, max=8, help="Lengths of an interval by which churn goes back, by adding noise, before it.")
    ] = 1.0,
    guidance_scale: Annotated[
        float, typer.Option(min=0, help="Scale of classifier-free guidance, with --label; 1: none.")
    ] = 1.0,
    prior_guidance: Annotated[
        float,
        typer.Option(
            min=0,
            help="Scale of what the network adds to the model's prior; 1: as trained; 1.2: more spread and detail.",
        ),
    ] = 1.0,
    known: Annotated[
        Path | None,
        typer.Option(help="A volume that guides the samples; it may be coarser than they are."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A volume on the grid of --known, nonzero for known voxels; without it all are known.")
    ] = None,
    known_channels: Annotated[
        str | None, typer.Option(help="Known channels of --known, e.g. 0,2; without it all are known.")
    ] = None,
    known_range: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Intensities of --known at 0 and 1. [default: the data set's]", show_default=False),
    ] = None,
    known_noise: Annotated[
        float, typer.Option(min=1e-4, help="Standard deviation of samples from --known, in a range of 1.")
    ] = 0.02,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples at a time (always 1 with --known). Only 1 gives results equal to the bit.")
    ] = 4,
    dtype: Annotated[str, typer.Option(help="float32, int16, uint16 or uint8 (integers with a scale).")] = "float32",
    planes: Annotated[bool, typer.Option("--planes", help="Also write the planes of each volume, as safetensors.")] = False,
    labels: Annotated[
        bool,
        typer.Option(
            "--labels",
            help="Also write the labels of each volume, and dataset.json for `tcam prepare`. For models of label_maps.",
        ),
    ] = False,
    compute_dtype: Annotated[
        ComputeDtype | None,
        typer.Option(
            help="Type of the products; auto: bfloat16 if the machine multiplies it. [default: that of training]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Draw volumes from MODEL: a NIfTI file with the affine and intensities of the training data, a JSON file and a preview for
    each, and a contact sheet.

    Sample i depends on the seed and on i alone. Ctrl-C stops; the same command continues with the missing samples. With
    torchrun samples are shared among the processes.
    """
    from tcam_diff.diffusion.draw import SHEET, Output, draw_samples
    from tcam_diff.diffusion.guidance import read_known
    from tcam_diff.diffusion.model import find_model
    from tcam_diff.training.distributed import first_process

    if (model is None) == (pretrained is None):
        raise UserError("MODEL: give a run or a model's folder, or --pretrained NAME, and not both")
    source = packaged(pretrained) if pretrained is not None else model
    assert source is not None
    settings = {
        "solver": solver, "steps": steps, "grid": grid, "final": final, "guidance_scale": guidance_scale, "seed": seed,
        "hot_k": hot_k, "churn": churn, "spacing": spacing, "prior_guidance": prior_guidance,
    }  # fmt: skip
    config = configs.validate(SampleConfig, settings, "sample")
    if guidance_scale != 1 and label is None:
        raise UserError(f"--guidance-scale {guidance_scale:g}: needs a class; add --label, or leave the scale out")
    if known is None and (mask is not None or known_channels is not None or known_range is not None):
        raise UserError("--mask, --known-channels and --known-range describe --known; add --known, or leave them out")

    def guide(loaded: TriplaneDiffusion) -> ImageGuidance | None:
        return None if known is None else read_known(loaded, known, mask, known_channels, known_noise, known_range)

    quiet = quiet or not first_process()
    output, indices = Output(out, size, dtype, planes, labels), range(first, first + n)

    def started(loaded: TriplaneDiffusion, kept: int) -> None:
        shape = size_text(size or loaded.geometry.info.shape)
        say(
            f"{pretrained or find_model(source)}: {n} volumes, {shape}, {solver} with {steps} steps"
            + (f"; {kept} already exist" if kept else "")
        )

    with progress_bar("sampling", quiet) as show, stop_on_interrupt("the same command continues") as stop:
        done = draw_samples(
            source, output, indices, config, label=label, guide=guide, batch_size=batch_size, compute=compute_dtype,
            device=device, started=None if quiet else started, progress=show, stop=stop,
        )  # fmt: skip
    if not done:
        raise KeyboardInterrupt
    if not quiet:
        say(f"{out}: {n} volumes; {out / SHEET}")
