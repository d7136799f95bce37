"""Voxel sizes as a condition of stage 2, for data sets of one shape whose fields of view differ, such as CT.

With one shape the voxel sizes and the field of view say the same. The network takes the logarithms of the sizes along x, y
and z, with the mean and the standard deviation of the training volumes' as zero and one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tcam_diff.data.volume import MILLIMETRES, VolumeInfo
from tcam_diff.training.rng import rng

#: Least standard deviation of the logarithms: a hundredth of a voxel's size.
LEAST = 0.01


class Spacings(nn.Module):
    """Voxel sizes of the training volumes, in mm.

    Args:
        sizes: sizes along x, y, z (N, 3), positive. Raises ValueError if they are not.
    """

    def __init__(self, sizes: Tensor) -> None:
        super().__init__()
        if sizes.dim() != 2 or sizes.shape[1] != 3 or not len(sizes) or not (sizes > 0).all():
            raise ValueError(f"spacings: expected positive numbers (N, 3), got {tuple(sizes.shape)}")
        self.sizes = nn.Buffer(sizes.float().contiguous())

    def condition(self, sizes: Tensor) -> Tensor:
        """What the network takes for voxel sizes (B, 3) in mm."""
        logs = self.sizes.log()
        return (sizes.to(logs).log() - logs.mean(0)) / logs.std(0, correction=0).clamp(min=LEAST)

    @property
    def ends(self) -> tuple[list[float], list[float]]:
        """Smallest and largest sizes along each axis."""
        return self.sizes.min(0).values.tolist(), self.sizes.max(0).values.tolist()

    def is_far(self, sizes: Sequence[float], factor: float = 1.5) -> bool:
        """Whether a size is beyond the training volumes' smallest or largest by more than a factor."""
        low, high = self.ends
        return any(not a / factor <= n <= b * factor for n, a, b in zip(sizes, low, high, strict=True))

    def drawn(self, indices: Sequence[int], seed: int) -> Tensor:
        """Voxel sizes (B, 3) of samples with these numbers: each that of a training volume drawn at random."""
        rows = [int(torch.randint(len(self.sizes), (), generator=rng(seed, "spacing", i))) for i in indices]
        return self.sizes[rows]


def of_volume(info: VolumeInfo) -> list[float]:
    """Voxel sizes of a volume in mm."""
    return [size * MILLIMETRES[info.units[0]] for size in info.spacing]


def with_spacing(info: VolumeInfo, sizes: Sequence[float]) -> VolumeInfo:
    """The metadata of a volume with other voxel sizes, in mm, and its centre at the same place."""
    return info.scaled([new / old for new, old in zip(sizes, of_volume(info), strict=True)])
