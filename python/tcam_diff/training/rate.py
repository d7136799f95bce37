"""Learning rates over a run, and the running average of a module's parameters."""

from __future__ import annotations

import math
from typing import Protocol

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Scheduled(Protocol):
    @property
    def steps(self) -> int: ...

    @property
    def schedule(self) -> str: ...

    @property
    def warmup_steps(self) -> int: ...


def rate(config: Scheduled, index: int) -> float:
    """What the learning rates of step ``index`` are multiplied by: warm-up, then constant or half a cosine."""
    scale = min(1.0, (index + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * min(index / config.steps, 1)))
    return scale


def averaging(decay: float, index: int) -> float:
    """The decay of a running average of parameters at step ``index``, with warm-up."""
    return min(decay, (1 + index) / (10 + index))


def update_average(average: nn.Module, module: nn.Module, decay: float, index: int) -> None:
    """average += (1 - d)(module - average), parameter by parameter, with d of step ``index``."""
    pairs = [list(m.parameters()) for m in (average, module)]
    get_ema_multi_avg_fn(averaging(decay, index))(*pairs, None)
