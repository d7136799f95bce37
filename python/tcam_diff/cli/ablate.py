"""``tcam ablate``: the same training with several values of one key; Table 4 of the paper with channels=18,20,24,42."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
import yaml

from tcam_diff import config as configs
from tcam_diff.autodecoder.ablation import judge, plot
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.cli.common import INTERRUPTED, duration, say
from tcam_diff.cli.train_autodecoder import train
from tcam_diff.cli.training import prepare_folder
from tcam_diff.errors import UserError
from tcam_diff.files import writable_folder, write_text
from tcam_diff.training.distributed import distributed


def ablate(
    config: Annotated[str, typer.Argument(help=f"A preset ({', '.join(configs.presets('train'))}) or a YAML file.")],
    values: Annotated[str, typer.Argument(metavar="KEY=V1,V2,...", help="What to vary, e.g. channels=18,20,24,42 (Table 4).")],
    out: Annotated[Path, typer.Option("--out", help="Folder: a run for each value, ablation.json, ablation.png.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes for all of them.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train with each value, and compare MSE, PSNR and SSIM of the fitted volumes over parameters per voxel.

    Ctrl-C stops; the same command goes on.
    """
    key, equals, listed = values.partition("=")
    parsed = [yaml.safe_load(v) for v in listed.split(",")] if "[" not in listed else yaml.safe_load(f"[{listed}]")
    if not equals or len(parsed) < 2:
        raise UserError(f"{values!r}: expected KEY=V1,V2,..., for example channels=18,20,24,42")
    writable_folder(out)
    rows = []
    for value in parsed:
        wanted = configs.load(TrainConfig, "train", config, [*(overrides or []), f"{key}={json.dumps(value)}"])
        folder = out / f"{key}-{str(value).replace(' ', '')}"
        result = folder / "result.json"
        if not result.exists():
            with distributed(wanted.device) as group:
                outcome = train(wanted, folder, group, prepare_folder(folder, wanted, "auto", group), quiet)
            if outcome.stopped:
                raise typer.Exit(INTERRUPTED)
            write_text(result, json.dumps({key: value, "seconds": outcome.seconds, **judge(folder)}, indent=1))
        rows.append(json.loads(result.read_text()))
    write_text(out / "ablation.json", json.dumps(rows, indent=1))
    (out / "ablation.png").write_bytes(plot(key, rows))
    say(f"{key:>14}  parameters/voxel     MSE    PSNR dB    SSIM    time")
    for r in rows:
        ssim = f"{r['ssim']:.4f}" if r["ssim"] is not None else "-"
        say(f"{r[key]!s:>14}  {r['ratio']:16.3f}  {r['mse']:.6f}  {r['psnr']:7.2f}  {ssim:>6}  {duration(r['seconds'])}")
    say(f"{out / 'ablation.png'}")
