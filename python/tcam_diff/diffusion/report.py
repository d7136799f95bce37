"""Pictures and report of a training run of stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tcam_diff.diffusion.config import DiffusionConfig, SampleConfig
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.evaluation.picture import sheet, strip
from tcam_diff.files import write_text
from tcam_diff.text import dtype_text
from tcam_diff.training.logger import read_metrics
from tcam_diff.training.loop import Outcome
from tcam_diff.training.report import Content, curves, facts, page, png

if TYPE_CHECKING:
    from tcam_diff.diffusion.train import DiffusionTraining

#: Names of the metrics in each panel of the curves.
CURVES = (("loss", "validation_loss", "training_loss"), ("noise", "image"), ("residual",))


@torch.no_grad()
def plane_strip(model: TriplaneDiffusion, planes: list[Tensor], longest: int = 128) -> np.ndarray:
    """Three slices (rows, columns) of the first channel of a volume, decoded to at most ``longest`` voxels along each axis."""
    info = model.geometry.info
    scale = min(1.0, longest / max(info.shape))
    h, w, d = (max(1, round(n * scale)) for n in info.shape)
    values = model.decode(planes, (h, w, d))[0, 0].float().cpu().numpy()
    return strip(values, info.resized((h, w, d)).affine)


def samples_picture(model: TriplaneDiffusion, steps: int, count: int = 4) -> bytes:
    """PNG of the first samples with the model's seed, integrated by ab2. With labels the classes take turns."""
    config = SampleConfig(solver="ab2", steps=steps, seed=model.config.seed)
    sampler, classes = Sampler(model, config), model.geometry.classes
    if not classes:
        planes = sampler.sample(range(count))
        each = [(f"sample {i}", [p[i : i + 1] for p in planes]) for i in range(count)]
    else:
        numbers = [i % len(classes) for i in range(count)]
        each = [(f"sample {i}, {classes[k]}", sampler.sample([i], k)) for i, k in enumerate(numbers)]
    strips = [(title, plane_strip(model, planes)) for title, planes in each]
    return png(sheet(strips))


def write_report(folder: Path, config: DiffusionConfig, task: DiffusionTraining, outcome: Outcome) -> None:
    """Write report.html with result, curves, samples and configuration."""
    metrics = read_metrics(folder)
    loss, residual = (outcome.metrics.get(f"{task.evaluated}_{name}", float("nan")) for name in ("loss", "residual"))
    result = {
        "volumes": f"{len(task.data)} of {config.latents}, batch {config.batch}",
        f"loss of the average on {task.evaluated} volumes": f"{loss:.4f}",
        "residual, mean square": f"{residual:.4f}",
        "parameters": f"{task.parameters / 1e6:.2f} M, products in {dtype_text(task.compute)}",
        **facts(outcome, task.group),
    }
    sections: list[tuple[str, Content]] = [("Result", result)]
    sections.append(("Curves", curves(metrics, CURVES)))
    if config.preview_steps:
        picture = samples_picture(task.model(outcome.step), config.preview_steps)
        sections.append((f"Samples (ab2, {config.preview_steps} steps)", picture))
    sections.append(("Configuration", config.yaml()))
    write_text(folder / "report.html", page("Triplane diffusion", sections))
