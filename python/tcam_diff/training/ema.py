"""Exponential moving average of a module's parameters."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def update_average(average: nn.Module, module: nn.Module, decay: float, index: int) -> None:
    """Update parameters in place, average += (1 - d)(module - average), with d = min(decay, (1 + index) / (10 + index))."""
    pairs = [list(m.parameters()) for m in (average, module)]
    get_ema_multi_avg_fn(min(decay, (1 + index) / (10 + index)))(*pairs, None)
