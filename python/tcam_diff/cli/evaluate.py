"""``tcam evaluate``: metrics of reconstructions of a store's volumes, or of generated volumes beside them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import Quiet, progress_bar, say
from tcam_diff.errors import UserError
from tcam_diff.evaluation.config import CriticConfig


def command(
    real: Annotated[Path, typer.Argument(help="The real volumes: a store of `tcam prepare`.")],
    fake: Annotated[
        list[str],
        typer.Argument(
            metavar="FAKE... [KEY=VALUE]...",
            help="Reconstructions: a run of `tcam train-autodecoder` or `tcam baseline`, a set of `tcam encode` or "
            "`tcam export-latents`, or volumes in any layout with the names of the store's cases. Generated volumes: folders "
            "of `tcam sample`, other volumes, and latent sets beside them; "
            "{seed} in a name is replaced by 0, 1, ... for each critic. KEY=VALUE: changes to the critic, e.g. epochs=50 "
            "constraint=clip.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of summary.json, volumes.csv and pictures.", show_default=False)
    ] = None,
    split: Annotated[str | None, typer.Option(help="Reconstructions of this split. [default: all]", show_default=False)] = None,
    lpips: Annotated[
        Path | None,
        typer.Option(help="File with torchvision's squeezenet1_1 weights: also LPIPS, of the slices across each axis."),
    ] = None,
    size: Annotated[int, typer.Option(min=2, help="Voxels along each axis, at most, for generated volumes.")] = 64,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Also FID and MMD of generated volumes, over the features of a network: a folder of `tcam features train`, or "
            "a file of MedicalNet's weights.",
            show_default=False,
        ),
    ] = None,
    critics: Annotated[
        int, typer.Option(min=0, help="Also this many critics (WGAN-GP) of generated volumes, each with its own seed.")
    ] = 0,
    controls: Annotated[
        bool, typer.Option(help="Features and critics: also compare real volumes, unchanged, blurred and noisy.")
    ] = True,
    intensity: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="Physical values at 0 and 1, for generated files other than samples. [default: values are in 0 to 1]",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compare volumes with those of a store, in its [0, 1].

    Reconstructions: MSE, PSNR, 3D SSIM, MS-SSIM and LPIPS of every volume, and their means with 95 % bootstrap intervals over
    volumes. Fitted volumes, whose planes were trained with the decoder, and encoded ones are apart.

    Generated volumes: their spread and diversity, and their distance from the training volumes, beside those of held-out
    volumes; FID and MMD; the Wasserstein distance by critics. Values of FID, MMD and critics depend on size, network and
    numbers of volumes, so compare only those of one call.
    """
    from tcam_diff.data.store import Store
    from tcam_diff.evaluation.reconstruction import is_generated
    from tcam_diff.files import writable_folder

    paths = [f for f in fake if "=" not in f or Path(f).exists()]
    changes = [f for f in fake if f not in paths]
    if not paths:
        raise UserError(f"FAKE: expected a folder of volumes, a run or a latent set, got only {' '.join(changes)}")
    if out is not None:
        writable_folder(out)
    store = Store(real)
    if any(is_generated(store, Path(p.replace("{seed}", "0"))) for p in paths):
        unused = [n for n, given in (("--split", split), ("--lpips", lpips)) if given]
        if unused:
            raise UserError(f"{unused[0]}: only for reconstructions, but {' '.join(paths)} has generated volumes")
        options = {"critics": critics, "controls": controls, "intensity": intensity}
        _generated(store, paths, size, features, changes, options, out, quiet)
    else:
        unused = [n for n, given in (("--features", features), ("--critics", critics), (" ".join(changes), changes)) if given]
        if len(paths) > 1 or unused:
            what = unused[0] if unused else paths[1]
            raise UserError(f"{what}: only for generated volumes, but {paths[0]} has reconstructions")
        _reconstructions(store, Path(paths[0]), split, lpips, out, quiet)
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
            title, better = of.METRICS[name]
            say(f"  {title + ',':<46}{better} is better: {value}")
    if out is not None:
        of.write(out, rows, of.protocol(store, fake, found, split, lpips))


def _generated(
    store: Any,
    paths: list[str],
    size: int,
    features: Path | None,
    changes: list[str],
    options: dict[str, Any],
    out: Path | None,
    quiet: bool,
) -> None:
    from tcam_diff.evaluation import generation as of
    from tcam_diff.evaluation.content import p_values
    from tcam_diff.evaluation.distances import convergence
    from tcam_diff.evaluation.features import load_features
    from tcam_diff.text import size_text

    network = load_features(features) if features else None
    critic = CriticConfig.load("default", [f"size={size}", *changes]) if options["critics"] else None
    if changes and critic is None:
        raise UserError(f"{changes[0]}: a change to the critic, but --critics is 0")
    with progress_bar("reading", quiet, [("W", "distance", ".3g", "")]) as show:
        result = of.evaluate_sets(store, paths, size=size, features=network, critic=critic, progress=show, **options)
    say(f"beside {store.folder}, {size_text(result.size)} voxels; mean (95 % interval)")
    width = 2 + max(map(len, result.figures))
    for name, (title, wanted) in of.STATISTICS.items():
        if not any(name in figures for figures in result.figures.values()):
            continue
        over = ""
        if name in ("fid", "mmd"):
            over = f" from {result.critic_real}, {result.compared} volumes each, {result.features}"
        say(f"{title}{over}; of a good generator {wanted}")
        for label, figures in result.figures.items():
            if name in figures:
                count = f"{_volumes(result.counts[label])}, " if label in result.counts and not over else ""
                say(f"  {label + ',':<{width}}{count}{figures[name]}")
    say("bright voxels: p-values of the two-sample Kolmogorov-Smirnov test; below 0.05 the sets differ")
    for label, beside in result.told_apart.items():
        if beside:
            say(f"  {label + ',':<{width}}{p_values(beside)}")
    if critic is not None:
        say(f"Wasserstein distance from {result.critic_real} by critics of {critic.size} voxels along each axis; low is close")
        for label, scores in result.critics.items():
            say(f"  {label}: {convergence(label, scores)}")
    if (network or critic) and result.critic_real != of.HELD_OUT:
        say(f"{store.folder}: no held-out volumes, so copies of training volumes have the best FID, MMD and W", "NOTE")
    if out is not None:
        given = options | {"features": None if features is None else str(features)}
        of.write(out, result, of.protocol(store, paths, size, critic) | {"options": given})


def _volumes(count: int) -> str:
    return f"{count} volume{'s' if count > 1 else ''}"


command.__doc__ = (
    f"{inspect.getdoc(command)}\n\nKeys of the critic with their defaults:\n\n\b\n{configs.describe(CriticConfig)}\n"
)
