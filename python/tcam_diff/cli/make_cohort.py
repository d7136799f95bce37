"""``tcam make-cohort``: make brains with lesions from the MNI152 template, in the layout of the Decathlon's Task01."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcam_diff.cli.common import Quiet, cores, say, tracked


def command(
    out: Annotated[Path, typer.Option("--out", help="Folder for the cohort: empty, or unfinished by this command.")],
    n: Annotated[int, typer.Option("--n", help="Number of cases, including held-out ones.")] = 64,
    size: Annotated[int, typer.Option("--size", help="Voxels along each axis of a cube of 192 mm.")] = 96,
    seed: Annotated[int, typer.Option("--seed", help="Equal seeds and options give equal files, byte for byte.")] = 0,
    held_out: Annotated[
        int | None,
        typer.Option("--held-out", help="Number of the last cases to list as test. [default: a fifth]", show_default=False),
    ] = None,
    noise: Annotated[
        float,
        typer.Option("--noise", help="Largest standard deviation of the noise; that of a case is uniform from 0 to this."),
    ] = 0.01,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Processes. [default: the machine's cores]", show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Make a cohort of brains with lesions: four correlated modalities, labels, and dataset.json.

    Each case is the MNI152 template under a random affine map and a random deformation, with one or two lesions (oedema,
    necrotic core, enhancing rim) and with random contrasts, bias fields and noise. Ctrl-C stops; the same command continues.
    """
    from tcam_diff.data import cohort

    recipe = cohort.Cohort(n, size, seed, n // 5 if held_out is None else held_out, noise)
    workers = min(n, jobs or cores())
    for _ in tracked(cohort.make_cohort(out, recipe, workers), n, "cases", quiet):
        pass
    say(
        f"{out / 'dataset.json'}: {n - recipe.held_out} training and {recipe.held_out} held-out cases, "
        f"{size} x {size} x {size}, {', '.join(cohort.MODALITIES)}"
    )
