"""``tcam interpolate``: volumes between two of a latent set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import say, tracked
from tcam_diff.diffusion.config import SampleConfig, Solver
from tcam_diff.files import replacing, writable_folder


def interpolate(
    model: Annotated[Path, typer.Argument(help="A run of `tcam train-diffusion`, or a model's folder.")],
    latents: Annotated[Path, typer.Argument(help="A latent set of the same decoder.")],
    a: Annotated[str, typer.Argument(help="Name of a volume of LATENTS.")],
    b: Annotated[str, typer.Argument(help="Name of another.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the volumes.")],
    n: Annotated[int, typer.Option("--n", min=2, help="How many, the two ends included.")] = 7,
    size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Voxels along the axes. [default: as the training volumes]", show_default=False),
    ] = None,
    solver: Annotated[Solver, typer.Option(help="Of the ODE, both ways.")] = "heun",
    steps: Annotated[int, typer.Option(min=1, help="Intervals.")] = 50,
    dtype: Annotated[str, typer.Option(help="float32, int16, uint16 or uint8 (integers with a scale).")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Write volumes from A to B: the noises that their planes come from, the great circle between those, and back."""
    from tcam_diff.autodecoder.latents import LatentSet
    from tcam_diff.cli.decode import decode_to_file
    from tcam_diff.diffusion.model import TriplaneDiffusion
    from tcam_diff.diffusion.report import plane_strip
    from tcam_diff.diffusion.sampling import Sampler
    from tcam_diff.errors import UserError
    from tcam_diff.evaluation.picture import sheet
    from tcam_diff.training.ranks import device_of
    from tcam_diff.training.records import png

    config = configs.validate(SampleConfig, {"solver": solver, "steps": steps, "final": "x"}, "interpolate")
    loaded = TriplaneDiffusion.load(model, device_of(device))
    held = LatentSet(latents)
    ends = [[p.unsqueeze(0) for p in held.planes(held.entry(name))] for name in (a, b)]
    want = [(1, loaded.channels, *s) for s in loaded.geometry.sizes]
    if [tuple(p.shape) for p in ends[0]] != want:
        raise UserError(f"{latents}: its planes are {[tuple(p.shape) for p in ends[0]]}, those of {model} {want}")
    writable_folder(out)
    planes = Sampler(loaded, config).interpolate(ends[0], ends[1], n)
    strips = []
    for i in tracked(range(n), n, "decoding", quiet):
        one = [p[i : i + 1] for p in planes]
        decode_to_file(loaded.volume(one), out / f"{i:02d}-of-{n}.nii.gz", size or loaded.geometry.shape, dtype, quiet=True)
        strips.append((f"{i / (n - 1):.2f}", plane_strip(loaded, one)))
    with replacing(out / "contact-sheet.png") as file:
        file.write(png(sheet(strips)))
    say(f"{out}: {n} volumes from {a} to {b}; {out / 'contact-sheet.png'}")
