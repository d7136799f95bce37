"""Data sets on disk, in several layouts, as lists of cases."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tcam_diff.data import LAYOUTS
from tcam_diff.data.dicom import find_series
from tcam_diff.data.labels import BRATS, listed_names
from tcam_diff.data.nifti import is_nifti, stem
from tcam_diff.errors import UserError
from tcam_diff.files import reason
from tcam_diff.text import shown

#: Splits of a data set. The Decathlon lists no labels for "test".
SPLITS = ("train", "validation", "test")

#: Names of a case's channels in BraTS releases, in the order of the Decathlon's Task01: FLAIR, T1w, T1gd, T2w.
BRATS_CHANNELS = (("flair", "t2f"), ("t1", "t1n"), ("t1ce", "t1c"), ("t2", "t2w"))


@dataclass(frozen=True)
class Case:
    """Files of one volume: one image or one per channel, and the labels, if any."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    split: str = "train"


@dataclass(frozen=True)
class Source:
    """A data set: its path, its layout, its cases, and the names of its labels by code, where the layout gives them."""

    path: Path
    layout: str
    cases: tuple[Case, ...]
    label_names: Mapping[int, str] = field(default_factory=dict)

    def in_split(self, split: str) -> list[Case]:
        return [c for c in self.cases if c.split == split]


def find_cases(path: Path) -> Source:
    """List the cases of a data set in one of LAYOUTS, without opening their images.

    Raises UserError if the path has none of the layouts, has no case, or has two cases of one name.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected {LAYOUTS}")
    if path.is_dir():
        layout, cases = _folder(path)
    elif is_nifti(path):
        layout, cases = "file", [Case(stem(path), (path,))]
    elif path.suffix == ".json":
        layout, cases = "datalist", _datalist(path, path.parent)
    elif path.suffix == ".csv":
        layout, cases = "table", _table(path)
    else:
        raise UserError(f"{path}: expected {LAYOUTS}")
    if not cases:
        raise UserError(f"{path}: no case found in it; expected {LAYOUTS}")
    seen: dict[str, Case] = {}
    for case in cases:
        if case.name in seen:
            raise UserError(
                f"{path}: two cases are called {case.name!r}: {seen[case.name].images[0]} and {case.images[0]}; "
                "a table (.csv) with a column name can tell them apart"
            )
        seen[case.name] = case
    return Source(path, layout, tuple(cases), _label_names(path, layout))


def download_decathlon(path: Path, quiet: bool = False) -> None:
    """Download and unpack a task of the Medical Segmentation Decathlon with MONAI, unless its dataset.json exists.

    Raises UserError if the last part of ``path`` is not the name of a task, or the download fails.
    """
    from monai.apps import DecathlonDataset, download_and_extract

    if (path / "dataset.json").exists():
        return
    task = path.name
    if task not in DecathlonDataset.resource:
        raise UserError(f"{path}: expected a task's name at the end, one of {', '.join(DecathlonDataset.resource)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        url, checksum = DecathlonDataset.resource[task], DecathlonDataset.md5[task]
        download_and_extract(url, path.parent / f"{task}.tar", path.parent, checksum, progress=not quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{task}: could not be downloaded from {url} ({error}); without a network, download and unpack it on another "
            f"machine, put it at {path}, and leave --download out"
        ) from error


def _folder(path: Path) -> tuple[str, list[Case]]:
    if (path / "dataset.json").exists():
        content = _json(path / "dataset.json")
        if "training" not in content and (path / "imagesTr").is_dir():
            return "nnU-Net", _nnunet(path)
        return "Decathlon", _with_test_labels(path, _datalist(path / "dataset.json", path))
    files = sorted(p for p in path.iterdir() if is_nifti(p))
    if files:
        return _flat(files)
    brats = [case for folder in sorted(path.iterdir()) if folder.is_dir() and (case := _brats(folder))]
    if brats:
        return "BraTS", brats
    series = find_series(path)
    return ("DICOM", [Case(_series_name(p, path), (p,)) for p in series]) if series else ("folder", [])


def _label_names(path: Path, layout: str) -> Mapping[int, str]:
    """Names of labels by code, of a dataset.json or of folders of BraTS cases; empty for other layouts."""
    if layout in ("Decathlon", "nnU-Net"):
        return listed_names(_json(path / "dataset.json").get("labels"))
    if layout == "datalist":
        return listed_names(_json(path).get("labels"))
    return BRATS if layout == "BraTS" else {}


def _with_test_labels(folder: Path, cases: list[Case]) -> list[Case]:
    """Cases of a Decathlon folder, of which those of the split "test" have the labels labelsTs/NAME, where these exist.

    dataset.json lists only the images of "test". `tcam make-cohort` writes labelsTs, and so do others that hold out cases.
    """

    def label(case: Case) -> Path | None:
        path = folder / "labelsTs" / case.images[0].name
        return path if case.split == "test" and case.label is None and path.is_file() else case.label

    return [replace(c, label=label(c)) for c in cases]


def _flat(files: list[Path]) -> tuple[str, list[Case]]:
    """A folder of NIfTI files: one case each, or one channel each where several cases have the same channels as in nnU-Net."""
    cases = _channels(files)
    numbers = {len(c) for c in cases.values()}
    if len(cases) > 1 and len(numbers) == 1 and numbers != {1}:
        return "folder of nnU-Net cases", [Case(name, images) for name, images in cases.items()]
    return "folder", [Case(stem(p), (p,)) for p in files]


def _nnunet(folder: Path) -> list[Case]:
    """Cases of an nnU-Net folder: imagesTr/CASE_0000.nii.gz, CASE_0001.nii.gz, ..., labelsTr/CASE.nii.gz, imagesTs, labelsTs.

    Raises UserError if an image is not called so.
    """

    def files(part: str) -> list[Path]:
        return sorted(p for p in (folder / part).iterdir() if is_nifti(p)) if (folder / part).is_dir() else []

    cases = []
    for part, split in (("Tr", "train"), ("Ts", "test")):
        images, labels = files(f"images{part}"), {stem(p): p for p in files(f"labels{part}")}
        grouped = _channels(images)
        if not grouped and images:
            raise UserError(
                f"{folder / f'images{part}'}: expected CASE_0000.nii.gz, CASE_0001.nii.gz, ..., got {images[0].name}"
            )
        cases += [Case(name, paths, labels.get(name), split) for name, paths in grouped.items()]
    return cases


def _channels(files: list[Path]) -> dict[str, tuple[Path, ...]]:
    """The files of each case by its name, channels _0000, _0001, ... in order; empty if a file is not called so."""
    cases: dict[str, list[Path]] = {}
    for file in files:
        name, _, number = stem(file).rpartition("_")
        if not name or number != f"{len(cases.get(name, ())):04d}":
            return {}
        cases.setdefault(name, []).append(file)
    return {name: tuple(images) for name, images in cases.items()}


def _series_name(series: Path, base: Path) -> str:
    return "-".join(series.relative_to(base).parts) or series.name


def _brats(folder: Path) -> Case | None:
    """A BraTS case, or None if the folder has none of the channels. Missing channels are listed, for check-data to report."""
    files = sorted(p for p in folder.iterdir() if is_nifti(p))

    def named(*names: str) -> Path | None:
        return next((p for p in files for n in names if stem(p).lower().endswith((f"_{n}", f"-{n}"))), None)

    present = [named(*names) for names in BRATS_CHANNELS]
    if not any(present):
        return None
    missing = [folder / f"{folder.name}_{names[0]}.nii.gz" for names in BRATS_CHANNELS]
    images = tuple(p or m for p, m in zip(present, missing, strict=True))
    return Case(folder.name, images, named("seg"))


def _datalist(path: Path, base: Path) -> list[Case]:
    """Cases of a Decathlon dataset.json or a MONAI datalist.

    The file is {"training": [{"image": ..., "label": ...}, ...], "validation": [...], "test": [...]} with paths relative to
    ``base``. "image" may be a list with one file per channel, and "test" a list of paths. MONAI's load_decathlon_datalist
    reads one key at a time and does not say which entry is wrong.
    """
    content, cases = _json(path), []
    for key, split in (("training", "train"), ("validation", "validation"), ("test", "test")):
        entries = content.get(key, [])
        if not isinstance(entries, list):
            raise UserError(f"{path}: {key}: expected a list, got {type(entries).__name__}")
        for i, entry in enumerate(entries):
            cases.append(_entry(f"{path}: {key}[{i}]", {"image": entry} if isinstance(entry, str) else entry, base, split))
    return cases


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, which may begin with a byte order mark. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file: {shown(reason(error), 200)}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected an object with lists 'training', 'validation' or 'test', got {type(content).__name__}"
        )
    return content


def _entry(where: str, entry: Any, base: Path, split: str) -> Case:
    """The case of an entry. ``where`` names the entry in error messages."""
    image = entry.get("image") if isinstance(entry, dict) else None
    images = [image] if isinstance(image, str) else image
    if not isinstance(images, list) or not images or not all(isinstance(p, str) and p for p in images):
        raise UserError(f'{where}: expected {{"image": "path", "label": "path"}}, got {json.dumps(entry)[:80]}')
    label = entry.get("label")
    if label is not None and not isinstance(label, str):
        raise UserError(f"{where}: label: expected a path, got {json.dumps(label)[:80]}")
    for text in (*images, label or ""):
        if not _is_path(text):
            raise UserError(f"{where}: expected a path, got {shown(repr(text))}")
    name = entry.get("name") or stem(Path(images[0]))
    return Case(str(name), tuple(base / p for p in images), base / label if label else None, split)


def _is_path(text: str) -> bool:
    """Whether a text can be the path of a file: without control characters, with names of at most 255 bytes."""
    if any(ord(c) < 32 or c in "\x7f\x85\u2028\u2029" for c in text):
        return False
    try:
        return all(len(os.fsencode(part)) <= 255 for part in text.split("/"))
    except UnicodeEncodeError:
        return False


def _table(path: Path) -> list[Case]:
    """Cases of a CSV file with a column image (one path, or one per channel separated by semicolons) and optional columns name,
    label and split."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table: {shown(reason(error), 200)}") from error
    if "image" not in columns:
        raise UserError(f"{path}: expected a column image, got {shown(', '.join(columns)) or 'no columns'}")
    cases = []
    for number, row in enumerate(rows, 2):
        split = (row.get("split") or "train").strip()
        if split not in SPLITS:
            raise UserError(f"{path}, line {number}: split: expected one of {', '.join(SPLITS)}, got {shown(repr(split))}")
        images = [p.strip() for p in (row.get("image") or "").split(";") if p.strip()]
        entry = {"image": images, "label": (row.get("label") or "").strip() or None, "name": (row.get("name") or "").strip()}
        cases.append(_entry(f"{path}, line {number}", entry, path.parent, split))
    return cases
