"""DICOM series: the slices of a folder as one volume, read with pydicom (extra ``dicom``).

Voxels and affine come from the same slices, in the order of their positions, whatever their files are called and their instance
numbers say. The affine keeps the shear of a tilted gantry.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tcam_diff.data import VOXEL_BUDGET
from tcam_diff.data.nifti import Header, Scan
from tcam_diff.data.volume import Volume, VolumeInfo, is_singular
from tcam_diff.errors import UserError
from tcam_diff.files import quiet, reason
from tcam_diff.text import shown

#: Largest distance of a slice from its place on the line of the series: mm, and share of the gap between slices.
MOST_OFF_LINE, MOST_OFF_GAP = 0.02, 0.1

#: Largest difference of orientations (cosines), and relative difference of pixel spacings, of one series.
SAME = 1e-4

#: Modalities of objects that lie beside images: structures, doses, segmentations, reports, presentation states, registrations.
NOT_IMAGES = ("RTSTRUCT", "RTDOSE", "RTPLAN", "RTIMAGE", "SEG", "SR", "PR", "REG", "KO")


@dataclass(frozen=True)
class Slice:
    """A slice: a file, or a frame of a multi-frame file.

    Vectors are in mm, in the patient's coordinates: left, posterior, superior.
    """

    path: Path
    frame: int | None  # None: the file has one
    series: str
    size: tuple[int, int]  # rows, columns
    position: tuple[float, ...]  # of the first pixel's centre
    orientation: tuple[float, ...]  # directions in which columns and rows count up
    spacing: tuple[float, ...]  # between rows, between columns
    gap: float  # to the next slice, as far as the header says; for a single slice
    rescale: tuple[float, float] | None = None  # slope and intercept of a frame; None: as the file says

    def __str__(self) -> str:
        return self.path.name if self.frame is None else f"frame {self.frame + 1} of {self.path.name}"


def is_dicom(file: Path) -> bool:
    """Whether a file is DICOM by its ending or its content, which alone need not have one."""
    if file.name.startswith(".") or not file.is_file():
        return False
    if file.suffix.lower() == ".dcm":
        return True
    try:
        with open(file, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def files(folder: Path) -> list[Path]:
    """The DICOM files directly in a folder, by name."""
    return sorted(f for f in folder.iterdir() if is_dicom(f))


def find_series(folder: Path) -> list[Path]:
    """Folders at or below ``folder`` with DICOM files other than the directory of a medium."""
    folders: set[Path] = set()
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if "__MACOSX" in parts or any(p.startswith(".") for p in parts) or file.parent in folders:
            continue
        if file.name.upper() != "DICOMDIR" and is_dicom(file):
            folders.add(file.parent)
    return sorted(folders)


def read_header(folder: Path, max_voxels: int = VOXEL_BUDGET) -> Header:
    """Header of a series, without its voxels. Raises UserError where the slices are not one evenly spaced volume."""
    return _header(folder, read_slices(folder), max_voxels)


def read_volume(folder: Path, max_voxels: int = VOXEL_BUDGET) -> Volume:
    """Read a series in physical units (for CT: HU). Raises UserError naming the folder or the file."""
    slices = read_slices(folder)
    header = _header(folder, slices, max_voxels)
    data = np.empty(header.info.shape, np.float32)
    by_file: dict[Path, list[int]] = {}
    for k, s in enumerate(slices):
        by_file.setdefault(s.path, []).append(k)
    for path, places in by_file.items():
        for k, pixels in zip(places, _pixels(path, [slices[k] for k in places]), strict=True):
            data[:, :, k] = pixels.T
    if not np.isfinite(data).all():
        raise UserError(f"{folder}: {int((~np.isfinite(data)).sum())} voxels are NaN or infinite")
    return Volume(data[None], header.info)


def scan(folder: Path, max_voxels: int = VOXEL_BUDGET) -> Scan:
    """Range of a series."""
    data = read_volume(folder, max_voxels).data
    return Scan(float(data.min()), float(data.max()), 0, None)


def read_slices(folder: Path) -> list[Slice]:
    """The slices of the one series in a folder, in the order of their positions.

    Localizers and objects that are no images are left out. Raises UserError where there is no series, or more than one, or
    where the slices are not one evenly spaced volume; the message names the slices.
    """
    slices = [s for file in files(folder) for s in _slices_of(file)]
    if not slices:
        raise UserError(f"{folder}: no DICOM image in it")
    by_series: dict[str, list[Slice]] = {}
    for s in slices:
        by_series.setdefault(s.series, []).append(s)
    if len(by_series) > 1:
        shown = ", ".join(f"{len(own)} slices with {own[0]}" for own in list(by_series.values())[:4])
        raise UserError(f"{folder}: {len(by_series)} series ({shown}); put each in a folder of its own")
    return _ordered(folder, slices)


def _slices_of(file: Path) -> list[Slice]:
    header = _read(file, stop_before_pixels=True)
    try:
        with quiet("pydicom"):
            return list(_image(file, header))
    except UserError:
        raise
    except Exception as error:  # pydicom reads elements when they are asked for, and raises many kinds
        raise UserError(f"{file}: the slice lacks its geometry: {shown(reason(error), 200)}") from error


def _image(file: Path, header: Any) -> Iterator[Slice]:
    """Slices of a file, none if it is no image. Raises any error where elements are damaged."""
    if "LOCALIZER" in [str(part).upper() for part in getattr(header, "ImageType", None) or ()]:
        return
    if str(getattr(header, "Modality", "")) in NOT_IMAGES:
        return
    if not hasattr(header, "Rows"):
        if _stores_images(header):
            raise UserError(f"{file}: an image without Rows: it may be truncated; copy it again")
        return
    if int(getattr(header, "SamplesPerPixel", 1) or 1) != 1:
        raise UserError(f"{file}: expected one value a pixel, got {header.SamplesPerPixel} (a colour image)")
    size, series = (int(header.Rows), int(header.Columns)), str(getattr(header, "SeriesInstanceUID", ""))
    if "PerFrameFunctionalGroupsSequence" in header:
        yield from _frames(file, header, series, size)
        return
    if int(getattr(header, "NumberOfFrames", 1) or 1) > 1:
        raise UserError(
            f"{file}: a multi-frame file without a position for each frame; convert it first, for example with dcm2niix"
        )
    yield Slice(
        file, None, series, size, _floats(header.ImagePositionPatient, 3), _floats(header.ImageOrientationPatient, 6),
        _floats(header.PixelSpacing, 2), _gap(header),
    )  # fmt: skip


def _stores_images(header: Any) -> bool:
    """Whether the class of an object is one of images, or is not known, as in a file that ends early."""
    kinds = [
        k for part in (header.file_meta, header) for k in (part.get("MediaStorageSOPClassUID"), part.get("SOPClassUID")) if k
    ]
    return not len(header) or not kinds or any("Image Storage" in kind.name for kind in kinds)


def _frames(file: Path, header: Any, series: str, size: tuple[int, int]) -> Iterator[Slice]:
    """Slices of an enhanced multi-frame file: what is not said for each frame is said once for all."""
    shared = header.SharedFunctionalGroupsSequence[0] if "SharedFunctionalGroupsSequence" in header else None
    groups, frames = header.PerFrameFunctionalGroupsSequence, int(getattr(header, "NumberOfFrames", 1) or 1)
    if len(groups) != frames:
        raise ValueError(f"expected a position for each of {frames} frames, got {len(groups)}")
    for number, group in enumerate(groups):

        def item(name: str, group: Any = group) -> Any:
            for place in (group, shared):
                if place is not None and name in place:
                    return place[name][0]
            return None

        measures, orientation = item("PixelMeasuresSequence"), item("PlaneOrientationSequence")
        place, values = item("PlanePositionSequence"), item("PixelValueTransformationSequence")
        if measures is None or orientation is None or place is None:
            raise ValueError(f"frame {number + 1} has no position, orientation or pixel spacing")
        rescale = (1.0, 0.0) if values is None else (float(values.RescaleSlope), float(values.RescaleIntercept))
        yield Slice(
            file, number, series, size, _floats(place.ImagePositionPatient, 3),
            _floats(orientation.ImageOrientationPatient, 6), _floats(measures.PixelSpacing, 2), _gap(measures), rescale,
        )  # fmt: skip


def _floats(values: Any, count: int) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values)
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"expected {count} finite numbers, got {numbers}")
    return numbers


def _gap(header: Any) -> float:
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        value = getattr(header, name, None)
        if value is not None and abs(float(value)) > 0:
            return abs(float(value))
    return 1.0


def _normal(s: Slice) -> np.ndarray:
    return np.cross(s.orientation[:3], s.orientation[3:])


def _ordered(folder: Path, slices: Sequence[Slice]) -> list[Slice]:
    """The slices by their positions. Raises UserError naming those that do not belong to one evenly spaced volume."""
    common = Counter((s.size, s.orientation, s.spacing) for s in slices).most_common(1)[0][0]
    size, orientation, spacing = common
    for what, odd in (
        ("another size", [s for s in slices if s.size != size]),
        ("another orientation", [s for s in slices if not np.allclose(s.orientation, orientation, rtol=0, atol=SAME)]),
        ("other pixel spacings", [s for s in slices if not np.allclose(s.spacing, spacing, rtol=SAME, atol=0)]),
    ):
        if odd:
            raise UserError(f"{folder}: {_names(odd)}: {what} than the other slices")
    across = np.array([orientation[:3], orientation[3:]])
    if not np.allclose(across @ across.T, np.eye(2), atol=1e-3):
        raise UserError(f"{folder}: its rows and columns are not at right angles: ImageOrientationPatient {orientation}")
    normal = np.cross(across[0], across[1])
    order = sorted(slices, key=lambda s: float(np.dot(s.position, normal)))
    if len(order) < 2:
        return order
    positions = np.array([s.position for s in order])
    gaps = np.diff(positions @ normal)
    pairs = list(zip(gaps, order, order[1:], strict=False))
    doubled = [s for gap, *pair in pairs for s in pair if not gap > 0.1 * gaps.max()]
    if doubled:
        raise UserError(f"{folder}: slices at one position: {_names(list(dict.fromkeys(doubled)))}")
    usual = float(statistics.median_low(gaps))
    line = positions[0] + np.linspace(0, 1, len(order))[:, None] * (positions[-1] - positions[0])
    most = min(MOST_OFF_LINE, MOST_OFF_GAP * usual)
    if np.linalg.norm(positions - line, axis=1).max() > most:
        wide = [f"{a} and {b}" for gap, a, b in pairs if gap > 1.5 * usual]
        if wide:
            where = "; between ".join(wide[:3])
            raise UserError(f"{folder}: a slice is missing between {where} (gaps of {usual:g} mm elsewhere)")
        raise UserError(f"{folder}: not on the line of the other slices: {_names(_off_line(order, positions, most))}")
    return order


def _off_line(order: Sequence[Slice], positions: np.ndarray, most: float) -> list[Slice]:
    """The slices off the line that the median step draws through the median place."""
    number = np.arange(len(order))
    step = np.median(np.diff(positions, axis=0), axis=0)
    start = np.median(positions - number[:, None] * step, axis=0)
    off = np.linalg.norm(positions - start - number[:, None] * step, axis=1)
    return [s for s, d in zip(order, off, strict=True) if d > most] or list(order)


def _names(slices: Sequence[Slice]) -> str:
    return ", ".join(map(str, slices[:4])) + (f" and {len(slices) - 4} more" if len(slices) > 4 else "")


def _header(folder: Path, slices: Sequence[Slice], max_voxels: int) -> Header:
    first, last = slices[0], slices[-1]
    between_rows, between_columns = first.spacing
    step = (np.subtract(last.position, first.position) / (len(slices) - 1)) if len(slices) > 1 else _normal(first) * first.gap
    affine = np.eye(4)  # (column, row, slice) to the patient's left, posterior, superior
    columns = [np.multiply(first.orientation[:3], between_columns), np.multiply(first.orientation[3:], between_rows), step]
    affine[:3, :3] = np.stack(columns, 1)
    affine[:3, 3] = first.position
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    if min(first.spacing) <= 0 or is_singular(affine):
        raise UserError(f"{folder}: the geometry of its slices is singular: spacing {first.spacing}, step {step.tolist()}")
    shape = (first.size[1], first.size[0], len(slices))
    if min(shape) < 1 or math.prod(shape) > max_voxels:
        raise UserError(f"{folder}: {math.prod(shape)} voxels, expected 1 to {max_voxels} (--max-voxels)")
    info = VolumeInfo(channels=1, shape=shape, affine=affine, codes=(1, 1), source=str(folder))
    return Header(folder, info, np.dtype(np.float32))


def _pixels(path: Path, slices: Sequence[Slice]) -> Iterator[np.ndarray]:
    """(rows, columns) of each slice of a file, in physical units."""
    from pydicom.pixels import apply_modality_lut

    header = _read(path)
    try:
        with quiet("pydicom"):
            stored = header.pixel_array
            whole = apply_modality_lut(stored, header) if slices[0].rescale is None else stored
    except Exception as error:  # pydicom raises many kinds; where a decoder is missing, lines that name the packages
        text = shown("; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or repr(error), 500)
        raise UserError(f"{path}: the voxels cannot be read: {text}") from error
    for s in slices:
        pixels = whole if s.frame is None or whole.ndim == 2 else whole[s.frame]
        if pixels.shape != s.size:
            raise UserError(f"{path}: expected {s.size[0]} x {s.size[1]} pixels from its header, got {pixels.shape}")
        yield pixels if s.rescale is None else pixels.astype(np.float64) * s.rescale[0] + s.rescale[1]


def _read(file: Path, stop_before_pixels: bool = False) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise UserError(f"{file.parent}: DICOM needs the package pydicom: pip install 'tcam-ext[dicom]'") from error
    try:
        with quiet("pydicom"):
            return pydicom.dcmread(file, stop_before_pixels=stop_before_pixels)
    except Exception as error:  # pydicom raises many kinds
        raise UserError(f"{file}: not a readable DICOM file: {shown(reason(error), 200)}") from error
