"""``tcam encode``: planes for new volumes under a trained decoder. ``tcam export-latents``: those of the training volumes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tcam_diff.autodecoder.config import EncodeConfig
from tcam_diff.autodecoder.encode import encode_store, export_latents, load_run
from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.cli.common import duration, progress_bar, say, stop_on_interrupt
from tcam_diff.data.store import Store


def encode_command(
    run: Annotated[Path, typer.Argument(help="A folder of `tcam train-autodecoder`.")],
    store: Annotated[
        Path, typer.Argument(help="A folder that `tcam prepare` wrote, with the preprocessing of the training data.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the latent set: empty, or one that this command has begun.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. steps=2000 region=box.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of the store.")] = "test",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint's folder. [default: the last]", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Find planes for the volumes of STORE with RUN's decoder frozen, and write them as a latent set.

    Ctrl-C stops; the same command goes on with the volumes that are missing.
    """
    config = EncodeConfig.load("default", overrides or [])
    kept = [0]

    def started(there: int, total: int) -> None:
        kept[0] = there
        if there:
            say(f"{out}: {there} of {total} volumes are there already")

    shown = [
        ("group", "group", ".0f", ""),
        ("of", "groups", ".0f", ""),
        ("volumes", "active", ".0f", ""),
        ("PSNR", "psnr", ".2f", " dB"),
    ]
    then, began = "finished volumes are kept, and the same command goes on", time.monotonic()
    with progress_bar("encoding", quiet, shown) as show, stop_on_interrupt(then) as stop:
        found = encode_store(
            load_run(run, checkpoint), Store(store), out, config,
            split=split, device=device, started=started, progress=show, stop=stop,
        )  # fmt: skip
    how = f", encoded in {duration(time.monotonic() - began)}" if kept[0] < len(found.entries) else ""
    say(summary(found, how))


def export_command(
    run: Annotated[Path, typer.Argument(help="A folder of `tcam train-autodecoder`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the latent set.")],
    store: Annotated[Path | None, typer.Option(help="The training data, where they have moved.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint's folder. [default: the last]", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Write the planes that RUN fitted to its training volumes as a latent set."""
    with progress_bar("exporting", quiet) as show:
        found = export_latents(load_run(run, checkpoint), out, None if store is None else Store(store), show)
    say(summary(found))


def summary(found: LatentSet, how: str = "") -> str:
    """A line about a latent set; ``how`` it was made."""
    share = ", ".join(f"{n} {s['mean_plane_energy_share']:.2f}" for n, s in found.index["statistics"].items())
    psnr = [e.psnr for e in found.entries]
    return (
        f"{found.folder}: {len(psnr)} volumes{how}; PSNR {sum(psnr) / len(psnr):.2f} dB ({min(psnr):.2f} to {max(psnr):.2f}) "
        f"over whole volumes, noise off; energy of the mean planes: {share}"
    )
