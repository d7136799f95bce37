"""The pointwise losses of decode_grid_loss, by name. csrc/maths/loss.h has the same table for the kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tcam_ext import _C

#: The loss of each voxel as a function of the decoded value, the target, and beta (for smooth_l1).
LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "smooth_l1": lambda got, want, beta: F.smooth_l1_loss(got, want, reduction="none", beta=beta),
    "l1": lambda got, want, beta: F.l1_loss(got, want, reduction="none"),
    "mse": lambda got, want, beta: F.mse_loss(got, want, reduction="none"),
}

if tuple(LOSSES) != _C.losses:
    raise ImportError("tcam_ext: the compiled module has a different table of losses; install again with `pip install .`")
