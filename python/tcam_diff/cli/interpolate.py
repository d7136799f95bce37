"""``tcam interpolate``: volumes between two of a latent set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import say, tracked
from tcam_diff.diffusion.config import Method, SampleConfig
from tcam_diff.errors import UserError
from tcam_diff.files import replacing, writable_folder, write_text

if TYPE_CHECKING:
    import numpy as np


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
    label: Annotated[str | None, typer.Option(help="A class, of a model trained with labels: of both volumes.")] = None,
    solver: Annotated[Method, typer.Option(help="Of the ODE, both ways.")] = "heun",
    steps: Annotated[int, typer.Option(min=1, help="Intervals.")] = 50,
    dtype: Annotated[str, typer.Option(help="float32, int16, uint16 or uint8 (integers with a scale).")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Write volumes from A to B: the noises that their planes come from, the great circle between those, and back.

    OUT gets NIfTI files, a contact sheet, and interpolation.json, which says how they were made.
    """
    from tcam_diff.autodecoder.decode import check_output, decode_to_file
    from tcam_diff.autodecoder.latents import LatentSet
    from tcam_diff.diffusion.model import TriplaneDiffusion
    from tcam_diff.diffusion.report import plane_strip
    from tcam_diff.diffusion.sampling import Sampler
    from tcam_diff.evaluation.picture import sheet
    from tcam_diff.training.distributed import device_of
    from tcam_diff.training.report import png

    check_output(size or (1, 1, 1), dtype)
    if solver == "hot":
        raise UserError("--solver: hot is stochastic, and has no inverse: take another")
    config = configs.validate(SampleConfig, {"solver": solver, "steps": steps, "final": "x"}, "interpolate")
    loaded = TriplaneDiffusion.load(model, device_of(device))
    chosen = loaded.label(label)
    held = LatentSet(latents)
    held.check_decoder(loaded.decoder, model)
    for name in (a, b):
        held.verify(held.entry(name))
    ends = [[p.unsqueeze(0) for p in held.planes(held.entry(name))] for name in (a, b)]
    want = [(1, loaded.channels, *s) for s in loaded.geometry.sizes]
    for name, end in zip((a, b), ends, strict=True):
        found = [tuple(p.shape) for p in end]
        if found != want:
            raise UserError(f"{latents}: its planes are {found} for {name}, those of {model} {want}")
    shape = size or loaded.geometry.shape
    settings = {
        "model": loaded.identity, "a": a, "b": b, "planes": [held.entry(name).sha256 for name in (a, b)], "n": n,
        "size": list(shape), "label": label, "solver": solver, "steps": steps, "dtype": dtype,
    }  # fmt: skip
    record = out / "interpolation.json"
    if record.is_file() and record.read_text() != json.dumps(settings, indent=1):
        raise UserError(f"{record}: is there, of another interpolation: choose another folder")
    writable_folder(out)
    write_text(record, json.dumps(settings, indent=1))
    strips: list[tuple[str, np.ndarray]] = []
    for i, one in tracked(
        enumerate(Sampler(loaded, config).interpolate(ends[0], ends[1], n, chosen)), n, "interpolating", quiet
    ):
        decode_to_file(loaded.volume(one), out / f"{i:02d}-of-{n}.nii.gz", shape, dtype, quiet=True)
        strips.append((f"{i / (n - 1):.2f}", plane_strip(loaded, one)))
    with replacing(out / "contact-sheet.png") as file:
        file.write(png(sheet(strips)))
    say(f"{out}: {n} volumes from {a} to {b}; {out / 'contact-sheet.png'}")
