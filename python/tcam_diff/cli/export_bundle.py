"""``tcam export-bundle``: write a trained model as a MONAI bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcam_diff.cli.common import bytes_text, folder_size, say


def command(
    model: Annotated[Path, typer.Argument(help="A run of `tcam train-diffusion`, or a model's folder.")],
    out: Annotated[Path, typer.Option("--out", help="The bundle's folder.")],
    name: Annotated[str, typer.Option(help="Name of the bundle in its metadata.")] = "Triplane diffusion",
) -> None:
    """Write MODEL as a MONAI bundle: configs/metadata.json, configs/inference.json, models, docs.

    To draw volumes, run this in the bundle's folder: python -m monai.bundle run --config_file configs/inference.json
    """
    from tcam_diff.diffusion import interop
    from tcam_diff.diffusion.model import TriplaneDiffusion

    interop.export_bundle(TriplaneDiffusion.load(model), out, name)
    run = "python -m monai.bundle run --config_file configs/inference.json"
    say(f"{out}: {bytes_text(folder_size(out))}; to draw volumes, run in it: {run}")
