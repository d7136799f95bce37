"""Estimate of the memory, disk space and time of a training run of stage 2, from a short trial."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.diffusion.train import DiffusionTraining
from tcam_diff.training.distributed import Distributed, device_of
from tcam_diff.training.logger import Logger
from tcam_diff.training.trial import Requirements, disk_space, memory, occasions, seconds_per_step, write_checkpoint


def estimate(config: DiffusionConfig, seconds: float = 10.0) -> Requirements:
    """Train for about ``seconds`` in a temporary folder, with the whole latent set, and extrapolate.

    The time includes reading the latents, fitting the prior, steps, evaluations with their samples, and checkpoints (with
    fsync). Raises UserError as ``train_diffusion`` does.
    """
    group = Distributed(device=device_of(config.device))
    with tempfile.TemporaryDirectory() as scratch:
        folder, start = Path(scratch), time.monotonic()
        task = DiffusionTraining(config, group, folder)
        begin = time.monotonic() - start
        step = seconds_per_step(task, seconds)
        start = time.monotonic()
        task.evaluate()
        logger = Logger(folder, 0)
        task.draw_pictures(1, logger)
        logger.close()
        evaluation = time.monotonic() - start
        save, checkpoint_bytes = write_checkpoint(task, folder, group)
        model = float(sum(p.stat().st_size for p in (folder / "model").iterdir()))
    evaluations, checkpoints = occasions(config)
    disk, most = (n + model for n in disk_space(config, checkpoint_bytes))
    total = begin + config.steps * step + evaluations * evaluation + checkpoints * save
    return Requirements(*memory(group.device), disk, most, total, step)
