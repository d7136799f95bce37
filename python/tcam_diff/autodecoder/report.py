"""Pictures and report of a training run of stage 1."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from torch import Tensor

from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.planes import PLANE_NAMES
from tcam_diff.data.store import Record
from tcam_diff.evaluation.picture import comparison
from tcam_diff.files import write_text
from tcam_diff.text import size_text
from tcam_diff.training.logger import read_metrics
from tcam_diff.training.loop import Outcome
from tcam_diff.training.report import curves, facts, page, png

matplotlib.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from tcam_diff.autodecoder.train import AutodecoderTraining


def slices_picture(truth: np.ndarray, got: np.ndarray, record: Record, caption: str) -> bytes:
    """PNG of three orthogonal slices of truth, reconstruction and difference (channels, H, W, D), first channel."""
    figure = comparison(truth[0], got[0], record.info.affine, ("truth", "reconstruction"), f"{record.name}, {caption}")
    return png(figure)


def channels_picture(planes: Sequence[Tensor], most: int = 12) -> bytes:
    """PNG of the first ``most`` channels of normalised planes (1, C, rows, columns)."""
    count = min(most, planes[0].shape[1])
    figure, axes = plt.subplots(3, count, figsize=(1.1 * count, 3.6), layout="constrained", squeeze=False)
    for row, (name, plane) in enumerate(zip(PLANE_NAMES, planes, strict=True)):
        for c in range(count):
            axis = axes[row, c]
            axis.imshow(plane[0, c].float().cpu().numpy().T, origin="lower", cmap="RdBu_r", vmin=-3, vmax=3)
            axis.set_xticks([])
            axis.set_yticks([])
            if c == 0:
                axis.set_ylabel(name)
            if row == 0:
                axis.set_title(str(c), fontsize=8)
    return png(figure)


def rgb(picture: bytes) -> np.ndarray:
    """Pixels (rows, columns, 3) uint8 of a PNG."""
    image = plt.imread(io.BytesIO(picture), format="png")
    return (image[..., :3] * 255).round().astype(np.uint8)


def curve_groups(metrics: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Names of the metrics in each panel of the curves."""
    terms = [[name] for name in ("tv", "labels", "ssim", "perceptual") if any(name in m for m in metrics)]
    return [["loss", "data"], ["psnr"], ["grad_planes", "grad_decoder"], *terms]


def write_report(folder: Path, config: TrainConfig, task: AutodecoderTraining, outcome: Outcome) -> None:
    """Write report.html with result, curves, slices, planes and configuration."""
    metrics = read_metrics(folder)
    slices = task.slices()
    pictures: list[tuple[str, bytes]] = []
    if slices is not None:
        pictures.append(("Truth and reconstruction", slices_picture(*slices, f"step {outcome.step}")))
        pictures.append(("Channels of the planes xy, yz, xz of the same volume", channels_picture(next(task.fitted())[1])))
    voxels = task.channels * int(np.prod(task.size))
    result = {
        "volumes": f"{len(task.records)} of {config.data}, {size_text(task.size)}, {task.channels} channel(s)",
        "fitted PSNR, whole volumes, noise off": f"{outcome.metrics['fitted_psnr']:.2f} dB",
        "plane parameters per volume": f"{sum(int(np.prod(s)) for s in task.table.shapes)} for {voxels} voxels",
        **facts(outcome, task.group),
    }
    text = page(
        "Triplane autodecoder",
        [
            ("Result", result),
            ("Curves", curves(metrics, curve_groups(metrics))),
            *pictures,
            ("Configuration", config.yaml()),
        ],
    )
    write_text(folder / "report.html", text)
