"""Oracles of damaged files: what the product returns is what an independent reading of the same files finds.

An oracle raises UserError where the product refuses the files, and Wrong where its answer is wrong.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import shards  # noqa: F401  # the packages of this checkout come first
import yaml as pyyaml
from tcam_diff.autodecoder.config import EncodeConfig, FitConfig, TrainConfig
from tcam_diff.config import Config, keys
from tcam_diff.data import dicom as product_dicom
from tcam_diff.data import nifti as product_nifti
from tcam_diff.data.check import check_case
from tcam_diff.data.config import PrepareConfig
from tcam_diff.data.readers import read_case, read_volume
from tcam_diff.data.sources import find_cases
from tcam_diff.data.volume import Volume, VolumeInfo
from tcam_diff.diffusion.config import DiffusionConfig, SampleConfig
from tcam_diff.errors import UserError
from tcam_diff.evaluation.config import CriticConfig
from tcam_diff.evaluation.segmenter import SegmentConfig

T = TypeVar("T")
LONGEST = 700  # characters of a refusal


class Wrong(Exception):
    """The product's answer is wrong."""


def oracle(kind: str, seeds: Path) -> Callable[[Path], None]:
    """The function that judges the files in a folder."""
    if kind in ("nifti", "dicom", "yaml"):
        return {"nifti": nifti, "dicom": dicom, "yaml": yaml}[kind]
    import files_folders

    return functools.partial(getattr(files_folders, kind), seeds)


def unclear(message: str, folder: Path, *paths: Path) -> str:
    """Why a refusal is not clear, or "": it is one line that names a file (also of ``paths``) or a key, and is not too long."""
    if any(ord(c) < 32 or c in "\x7f\x85\u2028\u2029" for c in message):
        return "not one line of printable text"
    if len(message.replace(str(folder), "")) > LONGEST:
        return f"{len(message)} characters"
    names = [str(folder), *map(str, paths), *(p.name for p in folder.rglob("*") if p.is_file())]
    options = [key for config in CONFIGS.values() for key in keys(config)]
    if not any(name in message for name in names) and message.split(":")[0] not in options:
        return "it names neither a file nor a key"
    return ""


def call(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call the product. Warnings must be its own and name a file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
        warnings.filterwarnings("ignore", category=ResourceWarning)
        result = function(*arguments, **options)
    for w in caught:
        if "/case" not in str(w.message):
            raise Wrong(f"{w.filename}:{w.lineno}: {w.category.__name__}: {w.message}")
    return result


def check(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


def plainly(function: Callable[..., T], *arguments: Any) -> T:
    """The result of an independent reader, which must read what the product reads."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return function(*arguments)
    except Exception as error:
        raise Wrong(f"read by the product, but an independent reader says: {error!r}") from error


# ---- images --------------------------------------------------------------------------------


def nifti(folder: Path) -> None:
    nib.imageglobals.logger.disabled = True
    images(folder, plain_nifti)


def dicom(folder: Path) -> None:
    images(folder, plain_series)


def images(folder: Path, plain: Callable[[Path], tuple[np.ndarray, np.ndarray]]) -> None:
    """Judge every case of a data set. Raises the first refusal where all are refused."""
    where = next((folder / name for name in ("list.json", "table.csv") if (folder / name).exists()), folder)
    source, refusals, read = call(find_cases, where), [], 0
    for case in source.cases[:8]:
        report = call(check_case, case)
        paths = (*case.images, *([case.label] if case.label else []))
        problem = report.problem and unclear(report.problem, folder, *paths)
        check(not problem, f"unclear problem of check-data ({problem}): {report.problem}")
        json.dumps(report.plain())
        try:
            volume = call(read_case, case)
        except UserError as error:
            check(report.problem, f"check-data finds no problem, but reading says: {error}")
            problem = unclear(str(error), folder, *paths)
            check(not problem, f"unclear refusal ({problem}): {error}")
            refusals.append(error)
            continue
        read += 1
        labelled = case.label is not None and case.label.name in report.problem
        check(not report.problem or labelled, f"read, but check-data says: {report.problem}")
        if not report.problem:
            check(report.shape == volume.info.shape and report.channels == volume.info.channels, "check-data has another shape")
            ends = [volume.data.min(), volume.data.max()]
            check(
                np.allclose([report.low, report.high], ends, rtol=1e-5, atol=1e-5 * max(map(abs, ends)) + 1e-37),
                "another range",
            )
        same_volume(volume, case.images, plain)
        written(volume, folder)
    if refusals and not read:
        raise refusals[0]


def same_volume(volume: Volume, paths: tuple[Path, ...], plain: Callable[[Path], tuple[np.ndarray, np.ndarray]]) -> None:
    """Compare a volume with what an independent reader finds in its files."""
    info = volume.info
    check(volume.data.shape == info.array_shape and volume.data.dtype == np.float32, f"{volume.data.shape}, {info.array_shape}")
    check(np.isfinite(info.affine).all() and np.isfinite(volume.data).all(), "not finite")
    check(abs(np.linalg.det(info.affine)) > 0 and min(info.spacing) > 0, "a singular affine")
    parts = [plainly(plain, path) for path in paths]
    voxels = np.concatenate([part[0] for part in parts])
    check(voxels.shape == volume.data.shape, f"{volume.data.shape}, but {voxels.shape} in the file")
    near = np.abs(volume.data - voxels) <= 1e-6 * np.abs(voxels) + 2e-6 * np.abs(voxels).max() + 1e-37  # float32
    check(
        near.all(),
        f"{np.count_nonzero(~near)} voxels differ from those of the file, by up to {np.abs(volume.data - voxels).max()}",
    )
    corners = np.array([[*np.multiply(c, np.subtract(info.shape, 1)), 1] for c in np.ndindex(2, 2, 2)], float)
    off = np.linalg.norm(corners @ (info.affine - parts[0][1]).T, axis=1).max()
    check(off <= 0.05 * min(info.spacing), f"its corners are {off} mm from those of the file, of spacing {info.spacing}")


def written(volume: Volume, folder: Path) -> None:
    """Write the volume and read it again, also its metadata."""
    info = VolumeInfo.model_validate(json.loads(json.dumps(volume.info.model_dump(mode="json"))))
    check(info == volume.info, "its metadata do not survive JSON")
    path = folder / "written.nii"
    quantiser = product_nifti.Quantiser("float32", 0, 1)
    try:
        call(product_nifti.write_volume, path, iter([volume.data]), info, quantiser)
        again = call(read_volume, path)
    except UserError as error:
        raise Wrong(f"cannot be written and read again: {error}") from error
    check(np.array_equal(again.data, volume.data), "other voxels after it was written")
    corners = np.array([[*np.multiply(c, np.subtract(info.shape, 1)), 1] for c in np.ndindex(2, 2, 2)], float)
    off = np.linalg.norm(corners @ (info.affine - again.info.affine).T, axis=1).max()
    far = np.abs(info.affine).max()
    check(off <= 0.05 * min(info.spacing) + 1e-6 * far, f"after it was written its corners are {off} mm away")


def plain_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (channels, H, W, D) and affine in mm, by nibabel's plain reading."""
    image = nib.load(path)
    voxels = np.asarray(image.dataobj, np.float64)
    voxels = voxels.reshape(*voxels.shape[:3], -1)
    scale = {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)
    return np.moveaxis(voxels, -1, 0), np.diag([scale] * 3 + [1.0]) @ image.affine


def plain_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (1, columns, rows, slices) and affine of a series, by pydicom's pixels and the positions of the slices."""
    slices = [s for path in product_dicom.files(folder) for s in plain_frames(path)]
    normal = np.cross(*np.split(slices[0][2], 2))
    slices.sort(key=lambda s: float(s[1] @ normal))
    pixels, positions, turn, spacing = zip(*slices, strict=True)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = turn[0][:3] * spacing[0][1], turn[0][3:] * spacing[0][0]
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(slices) - 1) if len(slices) > 1 else 0
    affine[:3, 3] = positions[0]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    if len(slices) == 1:  # the thickness is the header's
        affine[:, 2] = product_dicom.read_header(folder).info.affine[:, 2]
    return np.stack([p.T for p in pixels], -1)[None], affine


def plain_frames(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Pixels in physical units, position, orientation and spacing of the frames of a file."""
    import pydicom

    s = pydicom.dcmread(path)
    kind = [str(part).upper() for part in s.get("ImageType") or ()]
    if "Rows" not in s or "LOCALIZER" in kind or s.get("Modality") in product_dicom.NOT_IMAGES:
        return
    pixels, groups = s.pixel_array.astype(np.float64), s.get("PerFrameFunctionalGroupsSequence")
    if groups is None:
        slope, intercept = s.get("RescaleSlope"), s.get("RescaleIntercept")
        if slope is not None and intercept is not None:  # the standard has both or none
            pixels = pixels * float(slope) + float(intercept)
        vectors = (np.array(s[n].value, float) for n in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))
        yield pixels, *vectors  # type: ignore[misc]
        return
    for number, group in enumerate(groups):

        def item(name: str, group: Any = group) -> Any:
            return (group if name in group else s.SharedFunctionalGroupsSequence[0])[name][0]

        frame, values = pixels if pixels.ndim == 2 else pixels[number], None
        with_values = [
            g for g in (group, *s.get("SharedFunctionalGroupsSequence", ())) if "PixelValueTransformationSequence" in g
        ]
        if with_values:
            values = with_values[0].PixelValueTransformationSequence[0]
            frame = frame * float(values.RescaleSlope) + float(values.RescaleIntercept)
        yield (
            frame,
            np.array(item("PlanePositionSequence").ImagePositionPatient, float),
            np.array(item("PlaneOrientationSequence").ImageOrientationPatient, float),
            np.array(item("PixelMeasuresSequence").PixelSpacing, float),
        )


# ---- configurations --------------------------------------------------------------------------

CONFIGS: dict[str, type[Config]] = {
    "fit": FitConfig, "train": TrainConfig, "diffusion": DiffusionConfig, "encode": EncodeConfig, "prepare": PrepareConfig,
    "critic": CriticConfig, "sample": SampleConfig, "segment": SegmentConfig,
}  # fmt: skip


def yaml(folder: Path) -> None:
    """Load a configuration: its values are those in the file, it is finite, and it survives being written."""
    for kind, model in CONFIGS.items():
        path = folder / f"{kind}.yaml"
        if not path.exists():
            continue
        config = call(model.load, path)
        given = plainly(pyyaml.safe_load, path.read_bytes())
        same_values(given, config.model_dump(mode="json"), kind)
        again = folder / "again.yaml"
        again.write_text(config.yaml())
        check(call(model.load, again) == config, "another configuration after it was written")
        check(model.model_validate(config.model_dump()) == config, "a value outside its range")
        return
    raise UserError(f"{folder}: no configuration")


def same_values(given: Any, value: Any, where: str) -> None:
    """Compare a value in a file with that of the configuration."""
    if isinstance(given, dict) and isinstance(value, dict):
        for key, inner in given.items():
            check(key in value, f"{where}.{key} is ignored")
            same_values(inner, value[key], f"{where}.{key}")
    elif isinstance(given, list) and isinstance(value, list):
        check(len(given) == len(value), f"{where}: {given} became {value}")
        for i, (a, b) in enumerate(zip(given, value, strict=True)):
            same_values(a, b, f"{where}[{i}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        check(abs(value) < float("inf"), f"{where} is {value}")
        check(not isinstance(given, bool) and (given == value or float(given) == value), f"{where}: {given!r} became {value}")
    else:
        check(given == value or str(given) == value, f"{where}: {given!r} became {value!r}")
