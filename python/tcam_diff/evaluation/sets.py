"""Readers of sets of volumes, in [0, 1], from stores, samples and other files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tcam_diff.autodecoder.latents import LatentSet, is_latent_set
from tcam_diff.autodecoder.planes import FILE_END, PLANE_NAMES
from tcam_diff.data import store as stores
from tcam_diff.data.readers import read_case
from tcam_diff.data.sources import Case, find_cases
from tcam_diff.data.volume import Volume
from tcam_diff.diffusion.process import pack
from tcam_diff.errors import UserError
from tcam_diff.folder import Folder
from tcam_diff.progress import Progress, ProgressCallback
from tcam_diff.text import size_text

#: Name for all splits of a store but train.
HELD_OUT = "held out"


class VolumeSet(NamedTuple):
    """Volumes of a set, and their names."""

    names: list[str]
    volumes: Tensor  # (N, ...)


def resampled(volumes: Tensor, size: int) -> Tensor:
    """Volumes (N, channels, H, W, D) with at most ``size`` voxels along each axis, by means over cells."""
    h, w, d = (min(n, size) for n in volumes.shape[2:])
    return F.adaptive_avg_pool3d(volumes.float(), (h, w, d))


def read_set(
    path: Path,
    prepare: Callable[[Tensor], Tensor],
    *,
    split: str | None = None,
    intensity: tuple[float, float] | None = None,
    most: int | None = None,
    progress: ProgressCallback | None = None,
) -> VolumeSet:
    """Read volumes, and apply a function to each.

    Args:
        path: a store of `tcam prepare`, a latent set, whose planes are decoded, a folder of `tcam sample`, or volumes in any
            layout of `tcam check-data`.
        prepare: function of a volume (1, channels, H, W, D) in [0, 1].
        split: split of a store, of a latent set or of a layout with splits; "held out": all but train; None: all.
        intensity: physical values at 0 and 1, for files without this information and with values outside [0, 1].
        most: number of volumes, from the first; None: all.
        progress: called after every volume.

    Returns:
        The names, and the results (N, ...), concatenated.

    Raises:
        UserError: a volume cannot be read, its range is unknown, or the numbers of channels differ.
    """
    readers: list[tuple[str, Callable[[], Tensor]]] = []
    if (path / stores.INDEX).is_file():
        store = stores.Store(path)
        for r in store.records:
            if split in (None, r.split) or (split == HELD_OUT and r.split != "train"):
                readers.append((r.name, lambda r=r: store.images(r)))  # type: ignore[misc]
        if not readers and split != HELD_OUT:
            store.in_split(split or "train")  # raises
    elif is_latent_set(path):
        latents = LatentSet(path)
        for e in latents.entries:
            if split in (None, e.split) or (split == HELD_OUT and e.split != "train"):
                readers.append((e.name, lambda e=e: latents.fitted(e.name).whole()[: e.info.images]))  # type: ignore[misc]
    else:
        cases = [c for c in find_cases(path).cases if split is None or c.split == split]
        readers += [(c.name, lambda c=c: torch.from_numpy(read_unit(c, intensity).data)) for c in cases]  # type: ignore[misc]
    if not readers:
        raise UserError(f"{path}: no volume of the split {split}" if split else f"{path}: no volumes")
    readers = readers[:most]
    results: list[Tensor] = []
    for i, (name, read) in enumerate(readers):
        result = prepare(read()[None])
        if results and result.shape[1] != results[0].shape[1]:
            raise UserError(f"{path}: {name} has {result.shape[1]} channels, {readers[0][0]} {results[0].shape[1]}")
        if results and result.shape != results[0].shape:
            raise UserError(
                f"{path}: {name} has {size_text(result.shape[2:])} voxels, {readers[0][0]} {size_text(results[0].shape[2:])}; "
                "prepare them with crop or resize"
            )
        results.append(result)
        if progress is not None:
            progress(Progress(i + 1, len(readers), what=f"reading {path.name}"))
    return VolumeSet([name for name, _ in readers], torch.cat(results))


def read_planes(path: Path) -> Tensor | None:
    """Packed planes (N, M) of a latent set, or of samples with `--planes`; None: there are none, or they differ in size."""
    if is_latent_set(path):
        latents = LatentSet(path)
        planes = [latents.planes(e) for e in latents.entries]
    else:
        files = sorted(path.glob(f"*{FILE_END}")) if path.is_dir() else []
        files = [f for f in files if (path / f.name.replace(FILE_END, ".json")).is_file()]  # of finished samples
        planes = []
        for file in files:
            folder = Folder(path, file.name, "`tcam sample --planes`", "draw the samples again")
            with folder.reading():
                tensors = folder.read_tensors(file.name)
                planes.append([tensors[name] for name in PLANE_NAMES])
    states = [pack([p.unsqueeze(0) for p in of]) for of in planes]
    return torch.cat(states) if len({s.shape for s in states}) == 1 else None


def sidecar_of(path: Path) -> Path:
    """The JSON file of a sample."""
    return Path(str(path).removesuffix(".gz").removesuffix(".nii") + ".json")


def read_unit(case: Case, intensity: tuple[float, float] | None = None) -> Volume:
    """Volume of a case, with voxels in [0, 1]. A sample's JSON file has its intensities; in BIDS the file of this name has not.

    Args:
        case: the volume.
        intensity: physical values at 0 and 1, for files without this information and with values outside [0, 1].

    Raises:
        UserError: the volume cannot be read, or its range is unknown.
    """
    volume, path = read_case(case), case.images[0]
    sidecar = sidecar_of(path)
    ranges = [] if intensity is None else [intensity] * volume.info.channels
    try:
        if sidecar.exists():
            ranges = json.loads(sidecar.read_text()).get("intensity", ranges)
        info = volume.info.replaced(intensity=ranges)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{sidecar}: damaged: expected JSON, with the intensity if it is of a sample: {error}") from error
    if info.intensity:
        return Volume(info.to_unit(volume.data), info)
    low, high = volume.data.min(), volume.data.max()
    if low < -1e-3 or high > 1 + 1e-3:
        raise UserError(
            f"{path}: values from {low:.4g} to {high:.4g}; expected [0, 1], or physical values at 0 and 1 in --intensity"
        )
    return volume
