"""The exponential moving average of a module's parameters."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def ema_decay(decay: float, index: int) -> float:
    """The decay of a running average of parameters at step ``index``, with warm-up."""
    return min(decay, (1 + index) / (10 + index))


def update_average(average: nn.Module, module: nn.Module, decay: float, index: int) -> None:
    """average += (1 - d)(module - average), parameter by parameter, with d of step ``index``."""
    pairs = [list(m.parameters()) for m in (average, module)]
    get_ema_multi_avg_fn(ema_decay(decay, index))(*pairs, None)
