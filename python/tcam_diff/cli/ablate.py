"""``tcam ablate``: compare training runs that differ in one key; Table 4 of the paper is channels=18,20,24,42."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
import yaml

from tcam_diff import config as configs
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.cli.common import INTERRUPTED, RESUMED, Quiet, duration, progress_bar, say, stop_on_interrupt
from tcam_diff.cli.train_autodecoder import SHOWN, announce
from tcam_diff.errors import UserError


def command(
    config: Annotated[str, typer.Argument(help=f"A preset ({', '.join(configs.presets('train'))}) or a YAML file.")],
    values: Annotated[
        str, typer.Argument(metavar="KEY=V1,V2,...", help="Key and values to vary, e.g. channels=18,20,24,42 (Table 4).")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for a run per value, ablation.json and ablation.png.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes for all runs.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train with each value, and compare MSE, PSNR and SSIM of the fitted volumes over plane parameters per voxel.

    Ctrl-C stops; the same command continues.
    """
    from tcam_diff.autodecoder.ablation import ablate

    key, equals, listed = values.partition("=")
    parsed = [yaml.safe_load(v) for v in listed.split(",")] if "[" not in listed else yaml.safe_load(f"[{listed}]")
    if not equals or len(parsed) < 2:
        raise UserError(f"{values!r}: expected KEY=V1,V2,..., for example channels=18,20,24,42")
    changes = {f"{key}={json.dumps(value)}": value for value in parsed}
    runs = [(v, TrainConfig.load(config, [*(overrides or []), change])) for change, v in changes.items()]
    with progress_bar("training", quiet, SHOWN) as show, stop_on_interrupt(RESUMED) as stop:
        rows = ablate(key, runs, out, started=None if quiet else announce, progress=show, stop=stop)
    if rows is None:
        raise typer.Exit(INTERRUPTED)
    say(f"{key:>14}  parameters/voxel     MSE    PSNR dB    SSIM    time")
    for r in rows:
        ssim = f"{r['ssim']:.4f}" if r["ssim"] is not None else "-"
        say(f"{r[key]!s:>14}  {r['ratio']:16.3f}  {r['mse']:.6f}  {r['psnr']:7.2f}  {ssim:>6}  {duration(r['seconds'])}")
    say(f"{out / 'ablation.png'}")
