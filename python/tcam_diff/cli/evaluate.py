"""``tcam evaluate``: metrics of reconstructions of a store's volumes, or the spread of generated volumes beside theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tcam_diff.cli.common import progress_bar, say


def command(
    real: Annotated[Path, typer.Argument(help="The real volumes: a store of `tcam prepare`.")],
    fake: Annotated[
        Path,
        typer.Argument(
            help="Reconstructions: a run of `tcam train-autodecoder`, a set of `tcam encode` or `tcam export-latents`, or "
            "volumes in any layout with the names of the store's cases. Generated volumes: a folder of `tcam sample`, or "
            "volumes with other names."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of summary.json and, for reconstructions, volumes.csv and metrics.png."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Reconstructions of this split. [default: all]", show_default=False)] = None,
    lpips: Annotated[
        Path | None,
        typer.Option(help="File with torchvision's squeezenet1_1 weights: also LPIPS, of the slices across each axis."),
    ] = None,
    size: Annotated[int, typer.Option(min=2, help="Voxels along each axis, at most, for generated volumes.")] = 64,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Compare volumes with those of a store, in its [0, 1].

    Reconstructions: MSE, PSNR, 3D SSIM, MS-SSIM and LPIPS of every volume, and their means with 95 % bootstrap intervals over
    volumes. Fitted volumes, whose planes were trained with the decoder, and encoded ones are apart.

    Generated volumes: their spread, and their distance from the training volumes, beside those of held-out volumes.
    """
    from tcam_diff.data.store import Store
    from tcam_diff.evaluation.reconstruction import is_generated
    from tcam_diff.files import writable_folder

    if out is not None:
        writable_folder(out)
    store = Store(real)
    if is_generated(store, fake):
        _generated(store, fake, size, out, quiet)
    else:
        _reconstructions(store, fake, split, lpips, out, quiet)
    if out is not None:
        say(f"{out}")


def _reconstructions(store: Any, fake: Path, split: str | None, lpips: Path | None, out: Path | None, quiet: bool) -> None:
    from tcam_diff.autodecoder.perceptual import Perceptual
    from tcam_diff.evaluation import reconstruction as of

    found = of.find_reconstructions(store, fake, split)
    network = Perceptual(str(lpips)) if lpips else None
    with progress_bar("evaluating", quiet, [("PSNR", "psnr", ".2f", " dB")]) as show:
        rows = of.evaluate(found, store, network, show)
    for group, figures in of.means(rows).items():
        count = next(iter(figures.values())).volumes
        say(f"{group}: {_volumes(count)} of {store.folder}; mean (95 % interval over volumes)")
        for name, value in figures.items():
            title, more = of.METRICS[name]
            say(f"  {title + ',':<18}{'higher' if more else 'lower'} is better: {value}")
    if out is not None:
        of.write(out, rows, of.protocol(store, fake, found, split, lpips))


def _generated(store: Any, fake: Path, size: int, out: Path | None, quiet: bool) -> None:
    from tcam_diff.evaluation import spread as of
    from tcam_diff.evaluation.sets import read_set

    with progress_bar("reading", quiet) as show:

        def read(path: Path, part: str | None = None) -> Any:
            return read_set(path, lambda v: of.resampled(v, size), split=part, progress=show)

        sets = {"generated": read(fake)}
        for part in sorted({r.split for r in store.records} - {"train"}):
            sets[f"held out, split {part}"] = read(store.folder, part)
        training = read(store.folder, "train")
    result = of.spreads(sets, training)
    say(f"{fake} beside {store.folder}, at most {size} voxels along each axis; mean (95 % interval over volumes)")
    for name, (title, wanted) in of.STATISTICS.items():
        say(f"{title}; of a good generator {wanted}")
        for label, spread in result.items():
            if name in spread.figures:
                say(f"  {label + ',':<24}{_volumes(spread.volumes):<13}{spread.figures[name]}")
    if out is not None:
        of.write(out, result, of.protocol(store, fake, size))


def _volumes(count: int) -> str:
    return f"{count} volume{'s' if count > 1 else ''}"
