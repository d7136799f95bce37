"""Ablation: training runs that differ in one key, compared by quality over plane parameters per voxel (Table 4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.encode import load_run
from tcam_diff.autodecoder.train import AutodecoderTraining, train_autodecoder
from tcam_diff.data.store import Store
from tcam_diff.evaluation.reconstruction import evaluate, find_reconstructions, means
from tcam_diff.files import writable_folder, write_bytes, write_text
from tcam_diff.progress import ProgressCallback, StopCallback
from tcam_diff.training.report import png

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def ablate(
    key: str,
    runs: Sequence[tuple[Any, TrainConfig]],
    out: Path,
    *,
    started: Callable[[AutodecoderTraining], None] | None = None,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> list[dict[str, Any]] | None:
    """Train each configuration in a folder of ``out``, and compare the fitted volumes.

    Args:
        key: the key that varies.
        runs: its values, each with a complete configuration.
        out: folder for a run per value, ablation.json and ablation.png. Finished runs in it are not trained again.
        started, progress, stop: callbacks of ``train_autodecoder``.

    Returns:
        For each value {key: value, "seconds": ...} with the metrics of ``evaluate_run``; None if ``stop`` ended a run.
    """
    writable_folder(out)
    rows = []
    for value, config in runs:
        folder = out / f"{key}-{str(value).replace(' ', '')}"
        result = folder / "result.json"
        if not result.exists():
            outcome = train_autodecoder(config, folder, "auto", started=started, progress=progress, stop=stop)
            if outcome.stopped:
                return None
            write_text(result, json.dumps({key: value, "seconds": outcome.seconds, **evaluate_run(folder)}, indent=1))
        rows.append(json.loads(result.read_text()))
    write_text(out / "ablation.json", json.dumps(rows, indent=1))
    write_bytes(out / "ablation.png", plot(key, rows))
    return rows


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Evaluate a run on its whole fitted volumes, without noise.

    Returns:
        Means over the volumes of "mse", "psnr" (dB) and "ssim" (None below 11 voxels along an axis), their 95 % "intervals",
        plane parameters as "latents" and per voxel as "ratio", and the number of "volumes".
    """
    run = load_run(folder)
    store = Store(run.config.data)
    found = find_reconstructions(store, folder)
    (figures,) = means(evaluate(found, store)).values()
    parameters = sum(p.numel() for p in run.raw_planes()[run.objects[0]])
    return {
        **{name: figures[name].mean if name in figures else None for name in ("mse", "psnr", "ssim")},
        "intervals": {n: (figures[n].low, figures[n].high) for n in ("mse", "psnr", "ssim") if n in figures},
        "latents": parameters,
        "ratio": parameters / int(np.prod(found[0].record.info.array_shape)),
        "volumes": len(found),
    }


def plot(key: str, rows: list[dict[str, Any]]) -> bytes:
    """PNG of PSNR and SSIM over plane parameters per voxel."""
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
