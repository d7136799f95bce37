"""Volumes as a page holds them: one channel in [0, 1], in compressed NIfTI files of bytes."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from tcam_diff.data.nifti import Quantiser, write_volume
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.errors import UserError
from tcam_diff.text import size_text


@dataclass(frozen=True)
class Shown:
    """A volume of a page."""

    name: str
    data: Tensor  # (H, W, D) in [0, 1], float32
    info: VolumeInfo  # of data
    whole: VolumeInfo  # before it was shrunk
    channel: int

    @property
    def detail(self) -> str:
        """Its size, the sizes of its voxels and its intensities, as text."""
        size = f"{size_text(self.whole.shape)} voxels of {' x '.join(f'{s:.3g}' for s in self.whole.spacing)} mm"
        if self.info.shape != self.whole.shape:
            size += f", averaged to {size_text(self.info.shape)} for this page"
        low, high = self.whole.intensity[self.channel] if self.whole.intensity else (0, 1)
        if (low, high) == (0, 1):
            return size
        return f"{size}; 0 and 1 stand for {low:.4g} and {high:.4g}"


def shown(name: str, data: Tensor, info: VolumeInfo, channel: int, size: int) -> Shown:
    """One channel of a volume (channels, H, W, D) in [0, 1], with at most ``size`` voxels along each axis.

    Raises UserError if there is no such channel.
    """
    if not 0 <= channel < info.channels:
        raise UserError(f"--channel: expected 0 to {info.channels - 1}, the channels of {name}, got {channel}")
    one = info.replaced(channels=1, intensity=[(0.0, 1.0)], label_maps={})
    return shrunk(Shown(name, data[channel].float(), one, info, channel), size)


def shrunk(volume: Shown, size: int) -> Shown:
    """A volume with at most ``size`` voxels along each axis: means over cells, in the same field of view."""
    h, w, d = (min(n, size) for n in volume.info.shape)
    if (h, w, d) == volume.info.shape:
        return volume
    data = adaptive_avg_pool3d(volume.data[None], (h, w, d))[0]
    return replace(volume, data=data, info=volume.info.resized((h, w, d)))


def nifti(volume: Shown) -> bytes:
    """A volume as .nii.gz: bytes whose slope makes them [0, 1], with the affine of the volume."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii"
        write_volume(path, iter([volume.data[None].numpy()]), volume.info, Quantiser("uint8", 0.0, 1.0))
        return gzip.compress(path.read_bytes(), 9, mtime=0)


def fitting(volumes: Sequence[Shown], most: int) -> list[tuple[Shown, bytes]]:
    """The volumes and their files, shrunk until the files have at most ``most`` bytes together. Raises UserError."""
    size = max((max(v.info.shape) for v in volumes), default=0)
    while True:
        volumes = [shrunk(v, size) for v in volumes]
        files = [nifti(v) for v in volumes]
        total = sum(map(len, files))
        if total <= most:
            return list(zip(volumes, files, strict=True))
        size = int(size * min(0.95, (max(most, 0) / total) ** (1 / 3)))
        if size < 8:
            raise UserError(f"--volumes: {len(volumes)} volumes are too many for a page of this size; take fewer")
