"""``tcam ablate``: the same training with several values of one key; Table 4 of the paper with channels=18,20,24,42."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

from tcam_diff import config as configs
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.encode import load_run
from tcam_diff.autodecoder.objective import Objective, unit
from tcam_diff.autodecoder.planes import normalise
from tcam_diff.cli.common import duration, say
from tcam_diff.cli.train_autodecoder import prepare_folder, train
from tcam_diff.data.store import Store
from tcam_diff.errors import UserError
from tcam_diff.evaluation import metrics
from tcam_diff.files import writable_folder, write_text
from tcam_diff.training.ranks import ranks
from tcam_diff.training.records import png


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
            with ranks(wanted.device) as group:
                outcome = train(wanted, folder, group, prepare_folder(folder, wanted, "auto", group), quiet)
            if outcome.stopped:
                raise typer.Exit(1)
            write_text(result, json.dumps({key: value, "seconds": outcome.seconds, **judge(folder)}, indent=1))
        rows.append(json.loads(result.read_text()))
    write_text(out / "ablation.json", json.dumps(rows, indent=1))
    (out / "ablation.png").write_bytes(_plot(key, rows))
    say(f"{key:>14}  parameters/voxel     MSE    PSNR dB    SSIM    time")
    for r in rows:
        ssim = f"{r['ssim']:.4f}" if r["ssim"] is not None else "-"
        say(f"{r[key]!s:>14}  {r['ratio']:16.3f}  {r['mse']:.6f}  {r['psnr']:7.2f}  {ssim:>6}  {duration(r['seconds'])}")
    say(f"{out / 'ablation.png'}")


@torch.no_grad()
def judge(folder: Path) -> dict[str, Any]:
    """Means over the fitted volumes of a run, whole and without noise; parameters of the planes per voxel."""
    run = load_run(folder)
    store = Store(run.config.data)
    by_name = {r.name: r for r in store.records}
    first = by_name[run.objects[0]]
    size = (first.shape[1], first.shape[2], first.shape[3])
    objective = Objective(run.config, size)
    found: dict[str, list[float]] = {"mse": [], "psnr": [], "ssim": []}
    count = 0
    for name, raw in run.raw_planes().items():
        want = unit(torch.from_numpy(np.array(store.volume(by_name[name]))))
        planes = normalise(raw, run.config.norm)
        got = run.decoder(planes, size, compute_dtype=objective.compute)[0].clamp(0, 1).float()
        found["mse"].append(metrics.mse(got, want))
        found["psnr"].append(metrics.psnr(got, want))
        if min(size) >= metrics.WINDOW:
            found["ssim"].append(metrics.ssim3d(got, want))
        count = sum(p.numel() for p in planes)
    means = {k: sum(v) / len(v) if v else None for k, v in found.items()}
    return {**means, "ratio": count / int(np.prod(first.shape)), "volumes": len(found["mse"])}


def _plot(key: str, rows: list[dict[str, Any]]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, name in zip(axes, ("psnr", "ssim"), strict=True):
        points = [(r["ratio"], r[name], r[key]) for r in rows if r[name] is not None]
        if points:
            axis.plot([p[0] for p in points], [p[1] for p in points], "o-")
            for x, y, label in points:
                axis.annotate(f"{key}={label}", (x, y), textcoords="offset points", xytext=(4, -10), fontsize=8)
        axis.set_xlabel("plane parameters per voxel")
        axis.set_ylabel({"psnr": "PSNR (dB)", "ssim": "SSIM"}[name])
        axis.grid(alpha=0.3)
    return png(figure)
