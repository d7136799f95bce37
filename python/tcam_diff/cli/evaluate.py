"""``tcam evaluate``: metrics of reconstructions against the volumes of a store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tcam_diff.cli.common import progress_bar, say


def command(
    real: Annotated[Path, typer.Argument(help="The original volumes: a store of `tcam prepare`.")],
    fake: Annotated[
        Path,
        typer.Argument(
            help="Their reconstructions: a run of `tcam train-autodecoder`, a set of `tcam encode` or `tcam export-latents`, "
            "or volumes in any layout with the names of the store's cases."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of volumes.csv, summary.json and metrics.png. [default: not written]")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of REAL. [default: all]", show_default=False)] = None,
    lpips: Annotated[
        Path | None,
        typer.Option(help="File with torchvision's squeezenet1_1 weights: also LPIPS, of the slices across each axis."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Compare reconstructions with the volumes of a store, in its [0, 1]: MSE, PSNR, 3D SSIM, MS-SSIM and LPIPS of every
    volume, and their means with 95 % bootstrap intervals over volumes.

    Fitted volumes, whose planes were trained with the decoder, and encoded ones are apart.
    """
    from tcam_diff.autodecoder.perceptual import Perceptual
    from tcam_diff.data.store import Store
    from tcam_diff.evaluation import reconstruction as of
    from tcam_diff.evaluation.metrics import SIGMA, WINDOW, scales
    from tcam_diff.files import writable_folder

    if out is not None:
        writable_folder(out)
    store = Store(real)
    found = of.find_reconstructions(store, fake, split)
    network = Perceptual(str(lpips)) if lpips else None
    with progress_bar("evaluating", quiet, [("PSNR", "psnr", ".2f", " dB")]) as show:
        rows = of.evaluate(found, store, network, show)
    smallest = min(min(r.record.info.shape) for r in found)
    for group, figures in of.means(rows).items():
        count = next(iter(figures.values())).volumes
        say(f"{group}: {count} volume{'s' if count > 1 else ''} of {real}; mean (95 % interval over volumes)")
        for name, value in figures.items():
            title, more = of.METRICS[name]
            say(f"  {title + ',':<18}{'higher' if more else 'lower'} is better: "
                f"{value.mean:.6g} ({value.low:.6g} to {value.high:.6g})")  # fmt: skip
    if out is not None:
        protocol = {
            "real": os.fspath(real),
            "fake": os.fspath(fake),
            "split": split,
            "preprocessing": store.config,
            "range": "the store's [0, 1], reconstructions clamped; no mask",
            "ssim": f"Gaussian window of {WINDOW} voxels, sigma {SIGMA}, inside the volume",
            "ms_ssim": f"as many scales as fit, at most 5; {scales(smallest)} for the smallest volume",
            "lpips": None if lpips is None else os.fspath(lpips),
            "interval": "95 %, percentile bootstrap over volumes, 9999 resamples, seed 0",
        }
        of.write(out, rows, protocol)
        say(f"{out}")
