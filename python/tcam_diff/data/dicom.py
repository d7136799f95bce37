"""DICOM series: folders of slices, read as volumes with MONAI and pydicom (extra ``dicom``)."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tcam_diff.data.nifti import VOXEL_BUDGET, Header, Scan
from tcam_diff.data.volume import Volume, VolumeInfo
from tcam_diff.errors import UserError


def find_series(folder: Path) -> list[Path]:
    """Folders at or below ``folder`` with .dcm files."""
    return sorted({p.parent for p in folder.rglob("*.dcm")})


def read_header(folder: Path, max_voxels: int = VOXEL_BUDGET) -> Header:
    """Header of a series, without its voxels. Raises UserError if the slices are not one evenly spaced volume."""
    slices = _slices(folder)
    first = slices[0]
    series = {str(getattr(s, "SeriesInstanceUID", "")) for s in slices}
    if len(series) > 1:
        raise UserError(f"{folder}: slices of {len(series)} series; put each in a folder of its own")
    try:
        grids = {(int(s.Rows), int(s.Columns), tuple(float(x) for x in s.ImageOrientationPatient)) for s in slices}
        rows = np.asarray([float(x) for x in first.ImageOrientationPatient[:3]])
        columns = np.asarray([float(x) for x in first.ImageOrientationPatient[3:]])
        normal = np.cross(rows, columns)
        positions = np.asarray([[float(x) for x in s.ImagePositionPatient] for s in slices])
        between = [float(x) for x in first.PixelSpacing]
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: a slice lacks its geometry: {error}") from error
    if len(grids) > 1:
        raise UserError(f"{folder}: the slices differ in size or orientation")
    order = np.argsort(positions @ normal)
    along = (positions @ normal)[order]
    gaps = np.diff(along)
    if len(gaps) and (gaps.min() <= 0 or gaps.max() - gaps.min() > 0.01 * gaps.mean() + 1e-3):
        raise UserError(f"{folder}: gaps between slices from {gaps.min():g} to {gaps.max():g} mm: one is missing or duplicated")
    step = (positions[order[-1]] - positions[order[0]]) / max(1, len(slices) - 1)
    if len(slices) == 1:
        step = normal * float(getattr(first, "SliceThickness", None) or 1)
    affine = np.eye(4)  # (column, row, slice) to the patient's left, posterior, superior
    affine[:3, :3] = np.stack([rows * between[1], columns * between[0], step], 1)
    affine[:3, 3] = positions[order[0]]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UserError(f"{folder}: the geometry of its slices is singular")
    shape = (int(first.Columns), int(first.Rows), len(slices))
    if min(shape) < 1 or math.prod(shape) > max_voxels:
        raise UserError(f"{folder}: {math.prod(shape)} voxels, expected 1 to {max_voxels} (--max-voxels)")
    info = VolumeInfo(channels=1, shape=shape, affine=affine, codes=(1, 1), source=str(folder))
    return Header(folder, info, np.dtype(np.float32))


def read_volume(folder: Path, max_voxels: int = VOXEL_BUDGET) -> Volume:
    """Read a series in physical units (for CT: HU). Raises UserError with the folder's name."""
    from monai.data import PydicomReader

    header = read_header(folder, max_voxels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = PydicomReader()
            data, meta = reader.get_data(reader.read(folder))
    except Exception as error:  # pydicom raises many kinds
        raise UserError(
            f"{folder}: the voxels cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    data = np.ascontiguousarray(data, dtype=np.float32)
    if data.shape != header.info.shape:
        raise UserError(f"{folder}: expected {header.info.shape} voxels from the slices' headers, got {data.shape}")
    if not np.isfinite(data).all():
        raise UserError(f"{folder}: {int((~np.isfinite(data)).sum())} voxels are NaN or infinite")
    return Volume(data[None], header.info.replaced(affine=meta["affine"]))


def scan(folder: Path, max_voxels: int = VOXEL_BUDGET) -> Scan:
    """Range of the voxels of a series. Raises UserError with the folder's name."""
    data = read_volume(folder, max_voxels).data
    return Scan(float(data.min()), float(data.max()), 0, None)


def _slices(folder: Path) -> list[Any]:
    try:
        import pydicom
    except ImportError as error:
        raise UserError(f"{folder}: DICOM needs the package pydicom: pip install 'tcam-ext[dicom]'") from error
    slices = []
    for file in sorted(folder.glob("*.dcm")):
        try:
            slices.append(pydicom.dcmread(file, stop_before_pixels=True))
        except Exception as error:
            raise UserError(f"{file}: not a readable DICOM file: {error}") from error
    if not slices:
        raise UserError(f"{folder}: no .dcm file in it")
    return slices
