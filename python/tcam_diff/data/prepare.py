"""Preprocessing with MONAI's transforms: files in physical units become volumes in [0, 1] of one shape.

The presets brats-flair-128, brats-4ch-128, pancreas-256 and colon-512 prepare the paper's data sets (algorithm.md section 8).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from tcam_diff.data import VOXEL_BUDGET
from tcam_diff.data.config import PrepareConfig
from tcam_diff.data.labels import label_maps
from tcam_diff.data.readers import read_case, read_labels
from tcam_diff.data.sources import Case
from tcam_diff.data.store import Failure, Record, StoreWriter, quantise
from tcam_diff.data.volume import Volume, VolumeInfo, intensity_range
from tcam_diff.errors import UserError
from tcam_diff.files import locked_folder, reason
from tcam_diff.processes import map_on_processes


def split_cases(cases: Sequence[Case], config: PrepareConfig) -> list[Case]:
    """Assign the split of the configuration to cases.

    "monai" shuffles the training cases as DecathlonDataset does (numpy's RandomState(split_seed)) and takes the first
    val_fraction of them for validation.
    """
    if config.split == "listed":
        return list(cases)
    train = [i for i, c in enumerate(cases) if c.split == "train"]
    order = np.arange(len(train))
    np.random.RandomState(config.split_seed).shuffle(order)
    held_out = {train[i] for i in order[: int(len(train) * config.val_fraction)]}
    return [replace(c, split="validation") if i in held_out else c for i, c in enumerate(cases)]


def prepare_volume(volume: Volume, config: PrepareConfig, max_voxels: int = VOXEL_BUDGET) -> tuple[np.ndarray, VolumeInfo]:
    """Apply the preprocessing to one volume.

    Returns:
        Float32 voxels (channels, H, W, D) in [0, 1], and their geometry with the physical values at 0 and 1.

    Raises:
        UserError: the volume lacks one of the channels, or would have more than ``max_voxels`` voxels.
    """
    from monai.data import MetaTensor
    from monai.transforms import ScaleIntensityRange

    data = volume.data
    if config.channels is not None:
        if max(config.channels) >= data.shape[0]:
            raise UserError(f"{volume.info.source}: channels {config.channels} of {data.shape[0]} (the first is 0)")
        data = data[config.channels]
    image: Any = MetaTensor(torch.from_numpy(data), affine=torch.tensor(volume.info.affine))
    ranges = [config.window] * data.shape[0] if config.window else []
    if config.window:
        image = ScaleIntensityRange(*config.window, b_min=0.0, b_max=1.0, clip=True)(image)
    for step in _geometry(config, nearest=False):
        if config.spacing and type(step).__name__ == "Spacing":
            _check_size(volume.info, image.affine.numpy(), image.shape, config.spacing, max_voxels)
        image = step(image)
    array = np.ascontiguousarray(image.numpy(), dtype=np.float32)
    if config.percentiles:
        low, high = config.percentiles
        ranges = intensity_range(array, low, high, volume.info.source)
        array = np.stack(
            [ScaleIntensityRange(lo, hi, b_min=0.0, b_max=1.0, clip=True)(c) for c, (lo, hi) in zip(array, ranges, strict=True)]
        )
    info = volume.info.replaced(channels=len(array), shape=array.shape[1:], affine=np.asarray(image.affine), intensity=ranges)
    return array.clip(0, 1), info


def prepare_labels(labels: np.ndarray, affine: np.ndarray, config: PrepareConfig) -> np.ndarray:
    """Apply the geometry of the preprocessing to labels, with the nearest voxel's label instead of interpolation.

    Args:
        labels: (H, W, D) uint8, on the grid of the volume.
        affine: the volume's.
        config: preprocessing.

    Returns:
        (H, W, D) uint8, on the grid of the prepared volume.
    """
    from monai.data import MetaTensor

    image: Any = MetaTensor(torch.from_numpy(labels.astype(np.float32))[None], affine=torch.tensor(affine))
    for step in _geometry(config, nearest=True):
        image = step(image)
    return np.ascontiguousarray(image.numpy()[0]).astype(np.uint8)


def with_label_maps(
    array: np.ndarray, info: VolumeInfo, labels: np.ndarray, maps: Mapping[str, list[int]]
) -> tuple[np.ndarray, VolumeInfo]:
    """Append the label maps of prepared labels (H, W, D) to a prepared volume and to its metadata."""
    channels = np.concatenate([array, label_maps(labels, maps)])
    intensity = [*info.intensity, *[(0.0, 1.0)] * len(maps)]
    return channels, info.replaced(channels=len(channels), intensity=intensity, label_maps=dict(maps))


def _check_size(info: VolumeInfo, affine: np.ndarray, shape: Sequence[int], spacing: Sequence[float], max_voxels: int) -> None:
    """Raise UserError if a volume of another spacing has more voxels than are allowed."""
    sizes = nib.affines.voxel_sizes(affine)
    voxels = shape[0] * math.prod(math.ceil(n * a / b) for n, a, b in zip(shape[1:], sizes, spacing, strict=True))
    if voxels > max_voxels:
        have, want = (" x ".join(f"{x:.4g}" for x in s) for s in (sizes, spacing))
        raise UserError(
            f"{info.source}: spacing {want} mm makes {voxels} voxels of its {have} mm, more than the {max_voxels} allowed "
            "(--max-voxels)"
        )


def _geometry(config: PrepareConfig, nearest: bool) -> list[Any]:
    """MONAI's transforms of the grid. The grids and positions of voxels are the same with and without ``nearest``."""
    from monai.transforms import (
        CenterSpatialCrop,
        Orientation,
        Resize,
        Spacing,
        SpatialPad,
    )  # slow to import

    steps: list[Any] = []
    if config.orientation:
        steps.append(Orientation(axcodes=config.orientation, labels=(("L", "R"), ("P", "A"), ("I", "S"))))
    if config.spacing:
        steps.append(Spacing(pixdim=config.spacing, mode="nearest" if nearest else "bilinear"))
    if config.crop:
        steps += [CenterSpatialCrop(roi_size=config.crop), SpatialPad(spatial_size=config.crop)]
    if config.resize:
        mode = "nearest-exact" if nearest else "trilinear"  # torch's "nearest" is half a voxel off
        steps.append(Resize(spatial_size=config.resize, mode=mode, anti_aliasing=not nearest))
    return steps


def prepare_cases(
    cases: Sequence[Case],
    folder: Path,
    config: PrepareConfig,
    jobs: int = 1,
    max_voxels: int = VOXEL_BUDGET,
    names: Mapping[int, str] | None = None,
) -> Iterator[Record | Failure]:
    """Write a store case by case, and its index after the last case.

    Cases that an earlier run prepared from the same files with the same preprocessing are kept.

    Args:
        cases: cases of the data set.
        folder: folder of the store.
        config: preprocessing.
        jobs: processes.
        max_voxels: largest file to read, in voxels times channels.
        names: names of labels by code, ``label_names`` of the data set.

    Yields:
        For each case, in order, its record, or a Failure if it cannot be prepared.

    Raises:
        UserError: the folder has volumes of another preprocessing, or no case can be prepared.
    """
    records: list[Record | Failure] = []
    with locked_folder(folder):
        settings = config.model_dump(mode="json")
        if config.label_maps is None:
            del settings["label_maps"]  # stores of earlier versions do not have it
        writer = StoreWriter(folder, settings)
        work = functools.partial(_prepare_one, writer, config, max_voxels)
        for record in map_on_processes(work, split_cases(cases, config), jobs):
            records.append(record)
            yield record
        if all(r.problem for r in records):
            raise UserError(f"{folder}: none of {len(records)} cases could be prepared; the first: {records[0].problem}")
        writer.finish(records, names)


def _prepare_one(writer: StoreWriter, config: PrepareConfig, max_voxels: int, case: Case) -> Record | Failure:
    try:
        sources = writer.sources(case)
        prepared = writer.find(case.name, sources)
        if prepared is not None:
            return prepared.model_copy(update={"split": case.split})
        labels = read_labels(case, max_voxels)
        volume = read_case(case, max_voxels)
        array, info = prepare_volume(volume, config, max_voxels)
        if labels is not None:
            labels = prepare_labels(labels, volume.info.affine, config)
        if config.label_maps is not None:
            if labels is None:
                raise UserError(f"{case.images[0]}: has no labels for label_maps")
            array, info = with_label_maps(array, info, labels, config.label_maps)
        return writer.write(case.name, case.split, quantise(array, config.dtype), info, sources, labels)
    except UserError as error:
        return Failure(case.name, case.split, str(error))
    except OSError as error:  # a file that vanished
        return Failure(case.name, case.split, f"{error.filename or case.images[0]}: {reason(error)}")
    except (MemoryError, RuntimeError) as error:  # raised by a transform
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Failure(case.name, case.split, f"{case.images[0]}: {text}")
