"""``tcam prepare``: prepare a data set as a store of volumes in [0, 1]."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import bytes_text, cores, folder_size, say, tracked
from tcam_diff.data import LAYOUTS, VOXEL_BUDGET
from tcam_diff.data.config import PrepareConfig
from tcam_diff.text import size_text

KEYS = configs.describe(PrepareConfig)


def command(
    source: Annotated[Path, typer.Argument(help=f"The data set: {LAYOUTS}.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the store: empty, or unfinished by this command.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. channels=[3] split=monai dtype=float16.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help=f"The preprocessing: {', '.join(configs.presets('prepare'))}, or a YAML file.")
    ] = "cohort",
    download: Annotated[
        bool,
        typer.Option("--download", help="First download SOURCE, a task of the Decathlon, e.g. DIR/Task01_BrainTumour."),
    ] = False,
    max_voxels: Annotated[int, typer.Option(help="Refuse files with more voxels, channels counted.")] = VOXEL_BUDGET,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Processes. [default: the machine's cores]", show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, and only cases that fail.")] = False,
) -> None:
    """Prepare SOURCE: orient, resample, crop or resize, scale to [0, 1], and store for training. Labels go the same way.

    Ctrl-C stops; the same command continues. Cases that cannot be prepared are reported, and the exit status is then 1.
    """
    from tcam_diff.data.prepare import prepare_cases
    from tcam_diff.data.sources import download_decathlon, find_cases
    from tcam_diff.data.store import Record, Store

    config = PrepareConfig.load(preset, overrides or [])
    if download:
        download_decathlon(source, quiet)
    data = find_cases(source)
    say(f"{source}: {data.layout}, {len(data.cases)} cases")
    workers = min(len(data.cases), jobs or cores())
    records = []
    steps = prepare_cases(data.cases, out, config, workers, max_voxels, data.label_names)
    for record in tracked(steps, len(data.cases), "preparing", quiet):
        records.append(record)
        if record.problem:
            say(f"{record.name} [{record.split}]: {record.problem}", "FAILS")
    good = [r for r in records if isinstance(r, Record)]
    splits = ", ".join(f"{n} {s}" for s, n in Counter(r.split for r in good).items())
    shapes = Counter(r.info.array_shape for r in good).most_common()
    say(
        f"{out}: {len(good)} of {len(records)} cases ({splits}), {size_text(shapes[0][0][1:])}"
        f"{' and other sizes' if len(shapes) > 1 else ''}, {shapes[0][0][0]} channel(s), {config.dtype}, "
        f"{bytes_text(folder_size(out))}"
    )
    if names := Store(out).label_names:
        labelled = sum(r.labels_sha256 is not None for r in good)
        say(f"labels of {labelled} cases: {', '.join(f'{code} {name}' for code, name in names.items())}")
    if len(good) < len(records):
        raise typer.Exit(1)


command.__doc__ = f"{inspect.getdoc(command)}\n\nKeys with their defaults, which presets change:\n\n\b\n{KEYS}\n"
