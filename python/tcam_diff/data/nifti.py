"""NIfTI files: reading with the checks that nibabel leaves to its callers, and streamed writing."""

from __future__ import annotations

import gzip
import math
import os
import re
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np

from tcam_diff.data import VOXEL_BUDGET
from tcam_diff.data.volume import MILLIMETRES, Volume, VolumeInfo, is_singular
from tcam_diff.errors import UserError
from tcam_diff.files import quiet, reason, replacing
from tcam_diff.text import shown

#: Types in which a volume can be written. NIfTI has no float16.
WRITE_DTYPES = ("float32", "int16", "uint16", "uint8")

_CHUNK = 1 << 20


def is_nifti(path: Path) -> bool:
    """Whether a file is called as NIfTI files are, and is not hidden (as the ``._`` files of a Mac are)."""
    return path.name.lower().endswith((".nii", ".nii.gz")) and not path.name.startswith(".")


def stem(path: Path) -> str:
    """The name of a NIfTI file without its ending."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


# ---- reading ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """Checked header of a file."""

    path: Path
    info: VolumeInfo
    dtype: np.dtype[Any]  # of the stored voxels
    slope: float = 1.0
    inter: float = 0.0
    offset: int = 0  # of the first voxel, in bytes of the unpacked file

    @property
    def end(self) -> int:
        """Bytes of the unpacked file up to the end of the voxels."""
        return self.offset + math.prod(self.info.array_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Scan:
    """Summary of one pass over the voxels."""

    low: float  # smallest finite value, NaN if there is none
    high: float  # largest finite value, NaN if there is none
    not_finite: int  # voxels that are NaN or infinite
    values: tuple[float, ...] | None  # distinct finite values, None if there are more than MOST_VALUES


#: Most distinct values that a scan lists: all that labels of one byte can have.
MOST_VALUES = 256


@np.errstate(all="ignore")
@quiet("nibabel|numpy")
def read_header(path: str | os.PathLike[str], max_voxels: int = VOXEL_BUDGET) -> Header:
    """Read the header of a 3D or 4D (last axis: channels) NIfTI file.

    Checks rank, sizes, voxel budget, data type, affine and spacing. Lengths are converted to mm; a file with unknown units is
    taken to be in mm, with a warning for the first. Raises UserError with the file's name.
    """
    path = Path(path)
    image = _open(path)
    header = image.header
    shape = _shape(path, header, max_voxels)
    dtype = header.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise UserError(f"{path}: expected real voxels, got data type {dtype.name if dtype.fields is None else 'RGB'}")
    space, time = _units(int(header["xyzt_units"]))
    to_mm = np.diag([MILLIMETRES[space]] * 3 + [1.0])
    affine = to_mm @ np.asarray(image.affine, float)
    if not _fits_header(affine):
        raise UserError(f"{path}: the affine has NaN or infinite entries")
    if is_singular(affine):
        raise UserError(f"{path}: the affine is singular: its axes do not span space")
    with nib.openers.ImageOpener(str(path)) as file:  # the raw header: nibabel replaces spacings of 0 by 1
        stored = type(header).from_fileobj(file, check=False)
    zooms = np.asarray(stored["pixdim"][1:4], float)
    if not np.isfinite(zooms).all() or (zooms <= 0).any():
        raise UserError(f"{path}: expected positive spacings, got pixdim {tuple(zooms.tolist())}")
    for field in ("scl_slope", "scl_inter"):
        if np.isinf(float(stored[field])):
            raise UserError(f"{path}: {field} is infinite")
    if space == "unknown":
        _say_units_are_unknown(path)
    codes = int(header["qform_code"]), int(header["sform_code"])
    qform = _scanner(header, to_mm) if min(codes) > 0 else None
    if min(codes) > 0 and qform is None:
        codes = (0, codes[1])
    if qform is not None and np.allclose(qform, affine, rtol=1e-4, atol=1e-4 * float(zooms.min() * to_mm[0, 0])):
        qform = None
    info = VolumeInfo(
        channels=math.prod(shape[3:]),
        shape=(shape[0], shape[1], shape[2]),
        affine=affine,
        codes=codes,
        qform=qform,
        units=("mm", time),
        source=str(path),
    )
    packed = image.dataobj
    return Header(path, info, dtype, float(packed.slope), float(packed.inter), int(packed.offset))


def _fits_header(affine: np.ndarray) -> bool:
    """Whether an affine is finite in float32, the type of headers."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(affine.astype(np.float32)).all())


def _scanner(header: Any, to_mm: np.ndarray) -> np.ndarray | None:
    """The qform in mm, or None if it is no place of a volume."""
    try:
        qform = to_mm @ header.get_qform()
    except ValueError:  # its quaternion is no rotation
        return None
    return qform if _fits_header(qform) and not is_singular(qform) else None


def _units(code: int) -> tuple[str, str]:
    """Names of the units of space and time; "unknown" also for codes without a meaning."""
    names = nib.nifti1.unit_codes.label
    space, time = (str(names[c]) if c in names else "unknown" for c in (code & 7, code & 56))
    return space, time


_said_units = False


def _say_units_are_unknown(path: Path) -> None:
    """Warn about the first file without units: many files of a data set lack them."""
    global _said_units
    if not _said_units:
        warnings.warn(f"{path}: its units are unknown; this and other such files are taken to be in mm", stacklevel=2)
    _said_units = True


def read_volume(path: str | os.PathLike[str], max_voxels: int = VOXEL_BUDGET) -> Volume:
    """Read a 3D or 4D (last axis: channels) NIfTI file.

    Checks the header (:func:`read_header`), then the length and the gzip checksum of the file, then that all voxels are finite.
    Raises UserError with the file's name.
    """
    header = read_header(path, max_voxels)
    if _packed(header.path):
        for _ in _unpacked(header):
            pass
    elif (size := header.path.stat().st_size) < header.end:
        raise _truncated(header, size)
    try:
        with np.errstate(all="ignore"), quiet("nibabel"):
            data = np.asarray(_open(header.path).dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: the voxels cannot be read: {reason(error)}") from error
    data = data.reshape(*header.info.shape, header.info.channels)
    data = np.ascontiguousarray(np.moveaxis(data, -1, 0))
    bad = int(data.size - np.isfinite(data).sum())
    if bad:
        raise UserError(f"{path}: {bad} of {data.size} voxels are NaN or infinite; replace them first")
    return Volume(data, header.info)


@np.errstate(all="ignore")
def scan_voxels(header: Header) -> Scan:
    """Find the range, NaNs and distinct values in one pass over the file, with one piece of it in memory at a time.

    Raises UserError if the file is damaged, or shorter or longer than its header promises.
    """
    low, high, bad = math.inf, -math.inf, 0
    values: set[float] | None = set()
    at, rest = 0, b""
    for piece in _unpacked(header):
        begin, end = max(header.offset - at, 0), max(header.end - at, 0)
        at += len(piece)
        rest += piece[begin:end]
        whole = len(rest) // header.dtype.itemsize * header.dtype.itemsize
        raw, rest = np.frombuffer(rest[:whole], header.dtype), rest[whole:]
        if not raw.size:
            continue
        voxels = raw.astype(np.float64) * header.slope + header.inter
        finite = voxels[np.isfinite(voxels.astype(np.float32))]  # the type of a volume in memory
        bad += voxels.size - finite.size
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        if values is not None:
            values.update(np.unique(finite).tolist() if len(values) <= MOST_VALUES else ())
            values = values if len(values) <= MOST_VALUES else None
    listed = None if values is None else tuple(sorted(values))
    return Scan(low if low <= high else math.nan, high if low <= high else math.nan, bad, listed)


def _open(path: Path) -> Any:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: expected a NIfTI file (.nii or .nii.gz), got a folder")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel raises many kinds for malformed headers
        _check_packing(path)
        text = shown(reason(error), 200)
        raise UserError(f"{path}: not a readable NIfTI file (.nii or .nii.gz): {text}") from error
    if not isinstance(image, (nib.Nifti1Image, nib.Nifti2Image)):
        raise UserError(f"{path}: expected a NIfTI file (.nii or .nii.gz), got {type(image).__name__}")
    return image


def _check_packing(path: Path) -> None:
    """Raise UserError if the gzip stream is damaged, which nibabel reports as an unknown file type."""
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return
    try:
        with gzip.open(path, "rb") as stream:
            stream.read(_CHUNK)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file: {error}") from error


def _shape(path: Path, header: Any, max_voxels: int) -> tuple[int, ...]:
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 5 and shape[3] == 1:  # NIfTI vectors: (x, y, z, 1, channels)
        shape = (*shape[:3], shape[4])
    if len(shape) not in (3, 4):
        raise UserError(f"{path}: expected a 3D volume, or 4D with channels last, got shape {shape}")
    if any(n < 1 for n in shape):
        raise UserError(f"{path}: expected at least one voxel along each axis, got shape {shape}")
    voxels = 1
    for n in shape:
        voxels *= n
    if voxels > max_voxels:
        raise UserError(f"{path}: {voxels} voxels, more than the {max_voxels} allowed (--max-voxels)")
    return shape


def _unpacked(header: Header) -> Iterator[bytes]:
    """Bytes of a file in pieces.

    Raises UserError if the file is shorter than its header promises, unpacks to much more, or has a wrong gzip checksum.
    """
    path, total = header.path, 0
    packed = _packed(path)
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as stream:
            while piece := stream.read(_CHUNK):
                total += len(piece)
                if packed and total > header.end + _CHUNK:
                    raise UserError(f"{path}: unpacks to more than the {header.end} bytes that its header promises")
                yield piece
                if not packed and total >= header.end:
                    return
    except (OSError, EOFError, zlib.error) as error:
        what = "cannot be read" if getattr(error, "errno", None) else f"damaged {'gzip ' if packed else ''}file"
        raise UserError(f"{path}: {what}: {reason(error)}") from error
    if total < header.end:
        raise _truncated(header, total)


def _packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _truncated(header: Header, size: int) -> UserError:
    has = "unpacks to" if _packed(header.path) else "has"
    return UserError(f"{header.path}: truncated: the header promises {header.end} bytes, the file {has} {size}")


# ---- writing ---------------------------------------------------------------------------


class Quantiser:
    """Conversion of physical intensities in [lo, hi] to a file's type, physical = raw * slope + inter.

    Values outside [lo, hi] are clamped, never wrapped. Raises UserError for types that are not in WRITE_DTYPES.
    """

    def __init__(self, dtype: str, lo: float, hi: float) -> None:
        if dtype not in WRITE_DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(WRITE_DTYPES)}, got {dtype!r} (NIfTI has no float16)")
        self.dtype = np.dtype(dtype)
        self.slope, self.inter = 1.0, 0.0
        if self.dtype.kind != "f":
            limits = np.iinfo(self.dtype)
            self.low, self.high = float(limits.min), float(limits.max)
            # The header stores float32, so the quantiser uses the rounded numbers, as readers do.
            self.slope = float(np.float32((hi - lo) / (self.high - self.low))) if hi > lo else 1.0
            self.inter = float(np.float32(lo - self.low * self.slope))

    def __call__(self, physical: np.ndarray) -> np.ndarray:
        if self.dtype.kind == "f":
            return physical.astype(self.dtype)
        raw = np.rint((physical.astype(np.float64) - self.inter) / self.slope)
        return np.clip(raw, self.low, self.high).astype(self.dtype)


def write_volume(path: str | os.PathLike[str], slabs: Iterator[np.ndarray], info: VolumeInfo, quantiser: Quantiser) -> None:
    """Write a volume slab by slab, with one slab in memory at a time.

    The file appears under its name only when it is complete. Several channels, the slowest axis of a NIfTI file, pass through
    an uncompressed temporary file beside it.

    Args:
        path: a .nii or .nii.gz file.
        slabs: consecutive slabs (channels, H, W, d) of the last axis, in physical units.
        info: geometry of the whole volume.
        quantiser: conversion to the type of the file.

    Raises:
        UserError: wrong file name, missing folder, or an axis above 32767 voxels.
    """
    path = Path(path)
    if not is_nifti(path):
        raise UserError(f"{path}: expected a name ending in .nii or .nii.gz")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder")
    header = _header(path, info, quantiser)
    with replacing(path) as target, _stream(path, target) as out:
        out.write(header)
        if info.channels == 1:
            for slab in slabs:
                out.write(quantiser(slab[0]).tobytes(order="F"))
            return
        with tempfile.TemporaryFile(dir=path.parent) as spill:
            h, w, d = info.shape
            plane = h * w * quantiser.dtype.itemsize
            z = 0
            for slab in slabs:
                for c in range(info.channels):
                    spill.seek((c * d + z) * plane)
                    spill.write(quantiser(slab[c]).tobytes(order="F"))
                z += slab.shape[3]
            spill.seek(0)
            while piece := spill.read(_CHUNK):
                out.write(piece)


def _header(path: Path, info: VolumeInfo, quantiser: Quantiser) -> bytes:
    if max(info.array_shape) > 32767:
        raise UserError(f"{path}: NIfTI-1 axes end at 32767 voxels, got {info.shape}")
    header, (qcode, scode), (space, time) = nib.Nifti1Header(), info.codes, info.units
    qform = info.affine if info.qform is None else info.qform
    header.set_data_dtype(quantiser.dtype)
    header.set_data_shape(info.shape if info.channels == 1 else (*info.shape, info.channels))
    header.set_zooms(info.spacing if info.channels == 1 else (*info.spacing, 1.0))
    axes = qform[:3, :3] / np.linalg.norm(qform[:3, :3], axis=0)
    sheared = not np.allclose(axes.T @ axes, np.eye(3), atol=1e-4)
    header.set_qform(qform, code=0 if sheared else qcode or (0 if scode else 1), strip_shears=True)
    header.set_sform(info.affine, code=scode or 2)  # always set: the qform cannot represent shears
    header.set_xyzt_units(space if space != "unknown" else "mm", time if time != "unknown" else "sec")
    header.set_slope_inter(quantiser.slope, quantiser.inter)
    header["descrip"] = b"tcam"
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    return bytes(header.binaryblock) + b"\0\0\0\0"


@contextmanager
def _stream(path: Path, file: IO[bytes]) -> Iterator[IO[bytes]]:
    if not _packed(path):
        yield file
        return
    with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as packed:
        yield packed  # type: ignore[misc]
