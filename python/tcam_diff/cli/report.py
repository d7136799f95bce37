"""``tcam report``: one HTML file with volumes in a viewer, tables, curves, protocol, hardware and commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcam_diff.cli.common import Quiet, bytes_text, progress_bar, say


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of `tcam train-autodecoder`, `tcam train-diffusion`, `tcam distill`, `tcam encode`, "
            "`tcam export-latents`, `tcam sample`, `tcam baseline`, `tcam evaluate`, `tcam segment`, `tcam table` and "
            "`tcam figure`.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The HTML file.")],
    store: Annotated[
        Path | None, typer.Option(help="The real volumes. [default: the store that the runs name]", show_default=False)
    ] = None,
    volumes: Annotated[int, typer.Option(min=1, help="Volumes of each kind, at most.")] = 3,
    size: Annotated[int, typer.Option(min=8, help="Voxels along each axis, at most; larger volumes are averaged.")] = 128,
    channel: Annotated[int, typer.Option(min=0, help="Channel of the volumes.")] = 0,
    niivue: Annotated[
        Path | None,
        typer.Option(help="The viewer's npm package. [default: what tcam was built with]", show_default=False),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a page that shows real volumes beside their reconstructions and generated ones, slice by slice.

    The page is one file below 25 MB and opens without a network. Volumes are shown with fewer voxels where it would be larger.
    """
    from tcam_diff.report.page import Choice, report

    choice = Choice(volumes, size, channel)
    with progress_bar("reading volumes", quiet) as show:
        written = report(runs, out, store=store, choice=choice, package=niivue, progress=show)
    for remark in written.remarks:
        say(remark, "note:")
    say(f"{out}: {written.volumes} volumes, {bytes_text(written.bytes)}")
