"""``tcam encode``: planes of new volumes under a trained decoder. ``tcam export-latents``: planes of the training volumes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcam_diff.autodecoder.config import EncodeConfig
from tcam_diff.cli.common import Quiet, duration, progress_bar, say, stop_on_interrupt

if TYPE_CHECKING:
    from tcam_diff.autodecoder.latents import LatentSet


def encode_command(
    run: Annotated[Path, typer.Argument(help="A folder of `tcam train-autodecoder`.")],
    store: Annotated[
        Path, typer.Argument(help="A folder that `tcam prepare` wrote, with the preprocessing of the training data.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the latent set: empty, or unfinished by this command.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. steps=2000 region=box.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the store.")] = "test",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint's folder. [default: the last]", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Encode the volumes of STORE with the frozen decoder of RUN, and write their planes as a latent set.

    Ctrl-C stops; the same command continues with the missing volumes.
    """
    from tcam_diff.autodecoder.encode import encode_store, load_run
    from tcam_diff.data.store import Store

    config = EncodeConfig.load("default", overrides or [])
    kept = 0

    def started(existing: int, total: int) -> None:
        nonlocal kept
        kept = existing
        if kept:
            say(f"{out}: {kept} of {total} volumes already exist")

    shown = [
        ("group", "group", ".0f", ""),
        ("of", "groups", ".0f", ""),
        ("volumes", "active", ".0f", ""),
        ("PSNR", "psnr", ".2f", " dB"),
    ]
    then, start = "finished volumes are kept, and the same command continues", time.monotonic()
    with progress_bar("encoding", quiet, shown) as show, stop_on_interrupt(then) as stop:
        latents = encode_store(
            load_run(run, checkpoint), Store(store), out, config,
            split=split, device=device, started=started, progress=show, stop=stop,
        )  # fmt: skip
    time_text = f", encoded in {duration(time.monotonic() - start)}" if kept < len(latents.entries) else ""
    say(summary(latents, time_text))


def export_command(
    run: Annotated[Path, typer.Argument(help="A folder of `tcam train-autodecoder`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the latent set.")],
    store: Annotated[Path | None, typer.Option(help="The training data, if they have moved.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint's folder. [default: the last]", show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write the planes of RUN's training volumes as a latent set."""
    from tcam_diff.autodecoder.encode import export_latents, load_run
    from tcam_diff.data.store import Store

    with progress_bar("exporting", quiet) as show:
        latents = export_latents(load_run(run, checkpoint), out, None if store is None else Store(store), show)
    say(summary(latents))


def summary(latents: LatentSet, time_text: str = "") -> str:
    """One line about a latent set."""
    share = ", ".join(f"{n} {s['mean_plane_energy_share']:.2f}" for n, s in latents.index["statistics"].items())
    psnr = [e.psnr for e in latents.entries]
    return (
        f"{latents.folder}: {len(psnr)} volumes{time_text}; PSNR {sum(psnr) / len(psnr):.2f} dB "
        f"({min(psnr):.2f} to {max(psnr):.2f}) over whole volumes, noise off; energy of the mean planes: {share}"
    )
