"""Readers of a case's files, which are NIfTI files or folders of DICOM slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tcam_diff.data import VOXEL_BUDGET, dicom, nifti
from tcam_diff.data.labels import label_codes
from tcam_diff.data.nifti import Header, Scan
from tcam_diff.data.sources import Case
from tcam_diff.data.volume import Volume
from tcam_diff.errors import UserError


def read_header(path: Path, max_voxels: int = VOXEL_BUDGET) -> Header:
    """Read a header. Raises UserError with the name of the file or folder."""
    return dicom.read_header(path, max_voxels) if path.is_dir() else nifti.read_header(path, max_voxels)


def scan(header: Header, max_voxels: int = VOXEL_BUDGET) -> Scan:
    """Find the range and the values of the voxels. Raises UserError with the name of the file or folder."""
    return dicom.scan(header.path, max_voxels) if header.path.is_dir() else nifti.scan_voxels(header)


def read_volume(path: Path, max_voxels: int = VOXEL_BUDGET) -> Volume:
    """Read a volume with all checks. Raises UserError with the name of the file or folder."""
    return dicom.read_volume(path, max_voxels) if path.is_dir() else nifti.read_volume(path, max_voxels)


def same_grid(first: Header, other: Header) -> None:
    """Raise UserError if two files of a case differ in shape or affine."""
    if other.info.shape != first.info.shape:
        raise UserError(f"{other.path}: expected the {first.info.shape} voxels of {first.path.name}, got {other.info.shape}")
    if not other.info.same_grid(first.info):
        raise UserError(f"{other.path}: its affine is not that of {first.path.name}; resample one to the other first")


def read_case(case: Case, max_voxels: int = VOXEL_BUDGET) -> Volume:
    """Read the channels of a case as one volume. Raises UserError if they are not on one grid."""
    first, *others = (read_header(p, max_voxels) for p in case.images)
    for other in others:
        same_grid(first, other)
    volumes = [read_volume(p, max_voxels) for p in case.images]
    data = np.concatenate([v.data for v in volumes]) if others else volumes[0].data
    return Volume(data, volumes[0].info.replaced(channels=len(data)))


def read_label_header(path: Path, image: Header, max_voxels: int = VOXEL_BUDGET) -> Header:
    """Read the header of a label file. Raises UserError if it is not on the grid of the image, or has several channels."""
    header = read_header(path, max_voxels)
    same_grid(image, header)
    if header.info.channels != 1:
        raise UserError(f"{path}: expected one label per voxel, got {header.info.channels} channels")
    return header


def read_labels(case: Case, max_voxels: int = VOXEL_BUDGET) -> np.ndarray | None:
    """Read the labels (H, W, D) uint8 of a case; None if it has none.

    Raises UserError if they are not on the image's grid, or are no integers from 0 to 255.
    """
    if case.label is None:
        return None
    read_label_header(case.label, read_header(case.images[0], max_voxels), max_voxels)
    data = read_volume(case.label, max_voxels).data[0]
    with np.errstate(invalid="ignore"):
        labels = data.astype(np.uint8)
    if not np.array_equal(labels, data):
        values = np.unique(data)
        label_codes(case.label, values.tolist() if len(values) <= 256 else None)
    return labels
