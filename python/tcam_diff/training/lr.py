"""Learning rate schedules."""

from __future__ import annotations

import math

from tcam_diff.training.config import OptimiserConfig


def lr_scale(config: OptimiserConfig, index: int) -> float:
    """Factor of the learning rates at step ``index``: linear warm-up, times 1 or half a cosine."""
    scale = min(1.0, (index + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * min(index / config.steps, 1)))
    return scale
