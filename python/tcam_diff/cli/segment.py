"""``tcam segment``: segmentation of reconstructions by networks trained on originals; table 2 of the paper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import INTERRUPTED, Quiet, duration, progress_bar, say, stop_on_interrupt

if TYPE_CHECKING:
    from tcam_diff.evaluation.segmentation import Result, Row
    from tcam_diff.evaluation.segmenter import SegmentationTraining

SHOWN = [("loss", "loss", ".3f", ""), ("F1", "f1", ".3f", ""), ("", "steps_per_second", ".1f", " steps/s")]
REFERENCES = {"truth": "ground truth", "original": "segmentation of the original by the same network"}


def command(
    real: Annotated[Path, typer.Argument(metavar="STORE", help="The originals: a store of `tcam prepare` with labels.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for a run per repeat, segmentation.json, volumes.csv and segmentation.png.")
    ],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECONSTRUCTIONS]... [KEY=VALUE]...",
            help="Runs of `tcam train-autodecoder`, sets of `tcam encode` or `tcam export-latents`, or folders of volumes with "
            "the names of the store's cases. Changes to the training, e.g. steps=2000.",
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help=f"Network and training: {', '.join(configs.presets('segment'))}, or a YAML file.")
    ] = "small",
    repeats: Annotated[int, typer.Option(min=1, help="Trainings, each with a seed of its own.")] = 4,
    train_on: Annotated[
        Path | None,
        typer.Option(help="Store whose volumes the networks are trained on, e.g. of generated pairs. [default: STORE]"),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train MONAI's SegResNet on the originals, or on the volumes of --train-on, and segment originals and RECONSTRUCTIONS: F1,
    precision, recall, specificity and accuracy of each label, against the ground truth and against the segmentation of the
    original.

    Volumes of the training split and others are apart. Means are over volumes, then over repeats. Ctrl-C stops; the same
    command continues, and keeps finished repeats.
    """
    from tcam_diff.data.store import Store
    from tcam_diff.evaluation.segmentation import segment
    from tcam_diff.evaluation.segmenter import SegmentConfig

    changes = [m for m in more or [] if "=" in m and not Path(m).exists()]
    paths = [Path(m) for m in more or [] if m not in changes]
    config = SegmentConfig.load(preset, changes)
    with progress_bar("training", quiet, SHOWN) as show, stop_on_interrupt("the same command continues") as stop:
        started = None if quiet else announce
        training = None if train_on is None else Store(train_on)
        result = segment(Store(real), paths, config, out, repeats, training=training, started=started, progress=show, stop=stop)
    if result is None:
        raise typer.Exit(INTERRUPTED)
    report(train_on or real, config.split, result)
    say(f"{out / 'segmentation.png'}")


def announce(task: SegmentationTraining) -> None:
    """Print data, labels and machine of a training."""
    parameters = sum(p.numel() for p in task.network.parameters()) / 1e6
    say(
        f"{task.folder}: {len(task.records)} volumes of {task.config.data}, {task.channels} channel(s), labels "
        f"{', '.join(task.names)}; SegResNet of {parameters:.2f} M parameters, {task.steps} steps on {task.group.device.type}"
    )


def report(data: Path, split: str, result: Result) -> None:
    """Print a table for each split and reference. ``data``, ``split``: the training volumes."""
    from tcam_diff.evaluation.segmentation import METRICS, blocks

    repeats = len(result.seconds)
    say(
        f"{data}: {repeats} training(s) on {result.trained_on} volumes of the split {split}, "
        f"{duration(sum(result.seconds) / repeats)} each; higher is better; mean over volumes"
        + (f" ± standard deviation over {repeats} trainings" if repeats > 1 else "")
    )
    for part, reference, rows in blocks(result):
        seen = "which the networks were trained on" if part == result.trained else "held out from the networks' training"
        say(f"\nsplit {part}, {seen}; against the {REFERENCES[reference]}")
        width = max(len(_title(r)) for r in rows)
        names = max(8, *(len(r.label) for r in rows))
        heads = list(METRICS.values())
        lines = [("", "label", *(_share(heads, reference, "of originals")))]
        for row in rows:
            figures = [_figure(*row.metrics[m]) for m in METRICS]
            lines.append((_title(row), row.label, *_share(figures, reference, _figure(*row.share))))
        for title, label, *cells in lines:
            say(f"{title:{width}}  {label:{names}}  " + "  ".join(f"{c:15}" for c in cells).rstrip())


def _share(cells: list[str], reference: str, share: str) -> list[str]:
    """Cells of a line with the share of the originals' F1 after F1, in tables against the truth."""
    return [cells[0], "" if share == "-" else share, *cells[1:]] if reference == "truth" else cells


def _title(row: Row) -> str:
    kind = f" ({row.group})" if row.group else ""
    return f"{row.images}{kind}, {row.volumes} volumes"


def _figure(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.4f}" + ("" if math.isnan(deviation) else f" ± {deviation:.4f}")
