"""Volumes and their metadata, in memory and in JSON files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import nibabel as nib
import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_serializer,
    model_validator,
)

from tcam_diff.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


#: Names of NIfTI's units of space, in millimetres, and of time.
MILLIMETRES = {"mm": 1.0, "meter": 1000.0, "micron": 0.001, "unknown": 1.0}
TIMES = ("unknown", "sec", "msec", "usec", "hz", "ppm", "rads")


def is_singular(affine: np.ndarray) -> bool:
    """Whether the axes of an affine do not span space, whatever the size of a voxel within float32, the type in headers."""
    with np.errstate(all="ignore"):
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        sound = sizes.min() > np.finfo(np.float32).tiny and np.isfinite(sizes.astype(np.float32)).all()
        return not (sound and abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-6)


def is_file_name(name: str) -> bool:
    """Whether a file of this name lies in its folder and is not hidden."""
    return name not in ("", ".", "..") and not name.startswith(".") and not {"/", "\0"} & set(name)


def _file_name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("expected the name of a file")
    return name


#: Name of a volume, which is also the name of its file.
FileName = Annotated[str, AfterValidator(_file_name)]


def _matrix(affine: Any) -> np.ndarray:
    try:
        matrix = np.array(affine, float)
    except TypeError as error:
        raise ValueError("expected 4 x 4 numbers") from error
    if matrix.shape != (4, 4):
        raise ValueError(f"expected 4 x 4 numbers, got {matrix.shape}")
    if not np.isfinite(matrix).all() or is_singular(matrix) or matrix[3].tolist() != [0, 0, 0, 1]:
        raise ValueError("expected finite axes that span space, and a last row 0, 0, 0, 1")
    matrix.flags.writeable = False
    return matrix


def _unit(name: str) -> str:
    if name not in MILLIMETRES and name not in TIMES:
        raise ValueError(f"expected a unit, one of {', '.join((*MILLIMETRES, *TIMES[1:]))}")
    return name


def _optional_matrix(matrix: Any) -> np.ndarray | None:
    return None if matrix is None else _matrix(matrix)


Size = Annotated[int, Field(ge=1)]


class VolumeInfo(BaseModel):
    """Metadata of a volume (channels, H, W, D): grid, affine and intensities. Other keys of a JSON file are ignored."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    channels: Annotated[int, Field(ge=1)]
    shape: tuple[Size, Size, Size]
    affine: Annotated[
        np.ndarray, BeforeValidator(_matrix), PlainSerializer(np.ndarray.tolist)
    ]  # (4, 4), voxel index to units[0]
    codes: tuple[int, int] = (0, 2)  # NIfTI's qform and sform codes; (0, 2): aligned to another volume
    qform: Annotated[
        np.ndarray | None, BeforeValidator(_optional_matrix), PlainSerializer(lambda q: None if q is None else q.tolist())
    ] = None  # (4, 4), where it differs from the affine, which is then the sform
    units: tuple[Annotated[str, AfterValidator(_unit)], Annotated[str, AfterValidator(_unit)]] = ("mm", "sec")
    intensity: list[tuple[float, float]] = []  # physical values at 0 and 1 per channel; empty if unknown
    label_maps: dict[str, list[int]] = {}  # the last channels: name, and codes of the labels inside, where the channel is 1
    source: str = ""  # file or folder of the volume

    @model_validator(mode="before")
    @classmethod
    def _format_1(cls, values: Any) -> Any:
        """Convert format 1: stores and latent sets with shape (channels, H, W, D), models with "outputs" for channels."""
        if isinstance(values, dict) and "channels" not in values:
            shape = values.get("shape", ())
            if isinstance(shape, list | tuple) and len(shape) == 4:
                return values | {"channels": shape[0], "shape": shape[1:]}
            if "outputs" in values:
                return values | {"channels": values["outputs"]}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> VolumeInfo:
        if self.intensity and len(self.intensity) != self.channels:
            raise ValueError(f"intensity: expected a pair for each of {self.channels} channels, got {len(self.intensity)}")
        if len(self.label_maps) >= self.channels:
            raise ValueError(f"label_maps: expected fewer than the {self.channels} channels, got {len(self.label_maps)}")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, handler: Any) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {k: v for k, v in values.items() if k not in ("qform", "label_maps") or v}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VolumeInfo) and self.model_dump() == other.model_dump()

    @property
    def array_shape(self) -> tuple[int, int, int, int]:
        """(channels, H, W, D)."""
        return self.channels, *self.shape

    @property
    def images(self) -> int:
        """Number of channels that are images, which come before the label maps."""
        return self.channels - len(self.label_maps)

    def of_images(self) -> VolumeInfo:
        """The metadata without label maps."""
        return self.replaced(channels=self.images, intensity=self.intensity[: self.images], label_maps={})

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel sizes along the array's axes, in units[0]."""
        x, y, z = nib.affines.voxel_sizes(self.affine).tolist()
        return x, y, z

    @property
    def orientation(self) -> str:
        """Directions of the array's axes, for example RAS."""
        return "".join(str(c) for c in nib.aff2axcodes(self.affine))

    def replaced(self, **changes: Any) -> VolumeInfo:
        """A validated copy with other values of some fields. A new affine moves the qform with it."""
        if self.qform is not None and "affine" in changes:
            moved = self.qform @ np.linalg.inv(self.affine) @ np.asarray(changes["affine"], float)
            changes = {"qform": moved, **changes}
        return VolumeInfo(**dict(self) | changes)

    def same_grid(self, other: VolumeInfo) -> bool:
        """Whether two volumes have one shape, and their corner voxels lie within a tenth of a voxel of each other."""
        if self.shape != other.shape:
            return False
        corners = np.array([(*np.multiply(c, np.subtract(self.shape, 1)), 1) for c in np.ndindex(2, 2, 2)], float)
        off = corners @ (self.affine - other.affine).T
        return bool(np.linalg.norm(off[:, :3], axis=1).max() <= 0.1 * min(self.spacing))

    def resized(self, shape: tuple[int, int, int]) -> VolumeInfo:
        """The metadata of the same field of view with ``shape`` voxels.

        Voxels are cells: (i_old + 1/2)/n_old = (i_new + 1/2)/n_new, so i_old = s i_new + (s - 1)/2 with s = n_old/n_new.
        """
        s = np.asarray(self.shape, float) / np.asarray(shape, float)
        step = np.eye(4)
        step[:3, :3] = np.diag(s)
        step[:3, 3] = (s - 1) / 2
        return self.replaced(shape=shape, affine=self.affine @ step)

    def scaled(self, factors: Sequence[float]) -> VolumeInfo:
        """The metadata of as many voxels, larger by a factor along each axis, about the same centre."""
        step = np.eye(4)
        step[:3, :3] = np.diag(factors)
        step[:3, 3] = (np.asarray(self.shape) - 1) / 2 * (1 - np.asarray(factors))
        return self.replaced(affine=self.affine @ step)

    def to_unit(self, data: np.ndarray) -> np.ndarray:
        """Map physical intensities (channels, H, W, D) to [0, 1], with clipping."""
        unit = np.empty(data.shape, np.float32)
        for c, (lo, hi) in enumerate(self.intensity):
            np.clip((data[c] - lo) / (hi - lo), 0, 1, out=unit[c])
        return unit

    def to_physical(self, values: Tensor) -> Tensor:
        """Map values (..., channels, H, W, D) in [0, 1] to physical intensities."""
        low, high = values.new_tensor(self.intensity).view(-1, 2, 1, 1, 1).unbind(1)
        return low + (high - low) * values


class VolumeRecord(BaseModel):
    """Base of records with the metadata of a volume. In JSON the keys of ``info`` are on the level of the record's fields."""

    model_config = ConfigDict(frozen=True)

    info: VolumeInfo

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, values: Any) -> Any:
        return values | {"info": values} if isinstance(values, dict) and "info" not in values else values

    @model_serializer(mode="wrap")
    def _flat(self, handler: Any) -> dict[str, Any]:
        values = handler(self)
        info = values.pop("info")
        return {**values, **info}


@dataclass
class Volume:
    """Voxels (channels, H, W, D) in float32 and physical units, with their metadata."""

    data: np.ndarray
    info: VolumeInfo


def oriented(volume: Volume, affine: np.ndarray) -> Volume:
    """Permute and flip the axes of a volume to the orientation of ``affine``, without resampling."""
    info = volume.info
    turn = nib.orientations.ornt_transform(nib.io_orientation(info.affine), nib.io_orientation(affine))
    data = np.stack([nib.apply_orientation(channel, turn) for channel in volume.data])
    moved = info.affine @ nib.orientations.inv_ornt_aff(turn, info.shape)
    return Volume(data, info.replaced(shape=data.shape[1:], affine=moved))


def intensity_range(data: np.ndarray, low: float = 0.0, high: float = 100.0, source: str = "") -> list[tuple[float, float]]:
    """Choose the physical values that map to 0 and 1 for each channel.

    The voxels above the lower percentile are the foreground. Where more than half of it would be clipped at the upper end, as
    in a volume of a few vessels, the upper end is the percentile of the foreground alone, with a warning. A constant channel
    gets a range of width one.

    Args:
        data: intensities (channels, H, W, D).
        low, high: percentiles of a channel; 0 and 100 are its least and largest value.
        source: name of the volume, for messages.

    Returns:
        A pair of physical values per channel.

    Raises:
        UserError: the range overflows float32.
    """
    ranges = []
    for number, channel in enumerate(data):
        lo = float(channel.min() if low == 0 else np.percentile(channel, low))
        hi = float(channel.max() if high == 100 else np.percentile(channel, high))
        if not np.isfinite(hi - lo):
            raise UserError(f"{source or 'a volume'}: intensities from {lo:g} to {hi:g} overflow float32")
        if high < 100 and np.count_nonzero(channel > hi) > 0.5 * np.count_nonzero(channel > lo):
            others = channel[channel > lo]
            hi = float(np.percentile(others, high))
            share = f"{100 * others.size / channel.size:.2g} %"
            warnings.warn(
                f"{source or 'a volume'}: channel {number}: only {share} of the voxels are above {lo:g}; the value at 1 is the "
                f"percentile {high:g} of these, {hi:g}",
                stacklevel=2,
            )
        ranges.append((lo, hi if hi > lo else lo + 1.0))
    return ranges
