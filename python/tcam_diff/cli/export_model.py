"""``tcam export-model``: write a small copy of a model, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcam_diff.cli.common import say
from tcam_diff.errors import UserError
from tcam_diff.files import reason


def command(
    model: Annotated[Path, typer.Argument(help="A run of `tcam train-diffusion` or `tcam distill`, or a model's folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the copy, from which `tcam sample` draws.")],
    dtype: Annotated[str, typer.Option(help="Type of the weights: bfloat16, half as large, or float32.")] = "bfloat16",
    note: Annotated[
        Path | None, typer.Option(help="Markdown for the model card: data, training, licence.", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Write a copy of MODEL to give away: its weights in bfloat16, and a model card, README.md.

    The run is not needed to draw from the copy. Checkpoints and logs stay in the run.
    """
    from tcam_diff.diffusion.export import export_model

    try:
        text = "" if note is None else note.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"--note {note}: expected a text in UTF-8: {reason(error)}") from error
    size = export_model(model, out, dtype, text)
    say(f"{out}: {size / 1e6:.1f} MB; to draw volumes: tcam sample {out} --out DIR")
