"""Where volumes come from: data sets in the layouts that people have, as lists of cases."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcam_diff.data.dicom import find_series
from tcam_diff.errors import UserError

#: Parts of a data set. "test" has no labels in the Decathlon.
SPLITS = ("train", "validation", "test")

#: The names that BraTS releases give to a case's channels, in the order of the Decathlon's Task01: FLAIR, T1w, T1gd, T2w.
BRATS_CHANNELS = (("flair", "t2f"), ("t1", "t1n"), ("t1ce", "t1c"), ("t2", "t2w"))

LAYOUTS = (
    "a Decathlon task folder (dataset.json, imagesTr, labelsTr, imagesTs), a datalist (.json), a folder of BraTS cases "
    "(CASE/CASE_flair.nii.gz or CASE/CASE-t2f.nii.gz, ...), a folder of NIfTI files, a table (.csv) with a column image, a "
    "NIfTI file, or folders of DICOM series (.dcm)"
)


@dataclass(frozen=True)
class Case:
    """A volume: one file, or one a channel; its labels, if there are any."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    split: str = "train"


@dataclass(frozen=True)
class Source:
    path: Path
    layout: str
    cases: tuple[Case, ...]

    def of(self, split: str) -> list[Case]:
        return [c for c in self.cases if c.split == split]


def find_cases(path: Path) -> Source:
    """The cases of a data set in any of LAYOUTS. Only lists files: whether they are there and whole is for check-data to say.

    Raises UserError where the path is none of them, or where nothing is in it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected {LAYOUTS}")
    if path.is_dir():
        layout, cases = _folder(path)
    elif path.name.endswith((".nii", ".nii.gz")):
        layout, cases = "file", [Case(_stem(path), (path,))]
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
    return Source(path, layout, tuple(cases))


def download_decathlon(path: Path, quiet: bool = False) -> None:
    """Fetch and unpack a task of the Medical Segmentation Decathlon with MONAI, unless it is there already.

    Raises UserError where the name is none of the tasks', or where it cannot be fetched.
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
            f"{task}: could not be fetched from {url} ({error}); where this machine has no network, fetch and unpack it on one "
            f"that has, put it at {path}, and leave --download out"
        ) from error


def _folder(path: Path) -> tuple[str, list[Case]]:
    if (path / "dataset.json").exists():
        return "Decathlon", _datalist(path / "dataset.json", path)
    files = sorted(p for p in path.iterdir() if p.name.endswith((".nii", ".nii.gz")) and not p.name.startswith("."))
    if files:
        return "folder", [Case(_stem(p), (p,)) for p in files]
    brats = [case for folder in sorted(path.iterdir()) if folder.is_dir() and (case := _brats(folder))]
    if brats:
        return "BraTS", brats
    series = find_series(path)
    return ("DICOM", [Case(_series_name(p, path), (p,)) for p in series]) if series else ("folder", [])


def _series_name(series: Path, base: Path) -> str:
    return "-".join(series.relative_to(base).parts) or series.name


def _brats(folder: Path) -> Case | None:
    """The channels of a case, or None where the folder has none of them. What is missing is listed: check-data names it."""
    files = sorted(p for p in folder.iterdir() if p.name.endswith((".nii", ".nii.gz")))

    def called(*names: str) -> Path | None:
        return next((p for p in files for n in names if _stem(p).lower().endswith((f"_{n}", f"-{n}"))), None)

    found = [called(*names) for names in BRATS_CHANNELS]
    if not any(found):
        return None
    missing = [folder / f"{folder.name}_{names[0]}.nii.gz" for names in BRATS_CHANNELS]
    images = tuple(f or m for f, m in zip(found, missing, strict=True))
    return Case(folder.name, images, called("seg"))


def _datalist(path: Path, base: Path) -> list[Case]:
    """dataset.json of the Decathlon, or the datalist of MONAI: {"training": [{"image": ..., "label": ...}, ...], "validation":
    [...], "test": [...]}, paths relative to the file. "image" may be a list, one file a channel; "test" a list of paths.

    (MONAI's own load_decathlon_datalist reads one key at a time and says little of what is wrong.)
    """
    try:
        listed = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(listed, dict):
        raise UserError(
            f"{path}: expected an object with lists 'training', 'validation' or 'test', got {type(listed).__name__}"
        )
    cases = []
    for key, split in (("training", "train"), ("validation", "validation"), ("test", "test")):
        entries = listed.get(key, [])
        if not isinstance(entries, list):
            raise UserError(f"{path}: {key}: expected a list, got {type(entries).__name__}")
        for i, entry in enumerate(entries):
            cases.append(_entry(f"{path}: {key}[{i}]", {"image": entry} if isinstance(entry, str) else entry, base, split))
    return cases


def _entry(what: str, entry: Any, base: Path, split: str) -> Case:
    image = entry.get("image") if isinstance(entry, dict) else None
    images = [image] if isinstance(image, str) else image
    if not isinstance(images, list) or not images or not all(isinstance(p, str) and p for p in images):
        raise UserError(f'{what}: expected {{"image": "path", "label": "path"}}, got {json.dumps(entry)[:80]}')
    label = entry.get("label")
    if label is not None and not isinstance(label, str):
        raise UserError(f"{what}: label: expected a path, got {json.dumps(label)[:80]}")
    name = entry.get("name") or _stem(Path(images[0]))
    return Case(str(name), tuple(base / p for p in images), base / label if label else None, split)


def _table(path: Path) -> list[Case]:
    """Columns image (several paths, one a channel, with semicolons between), and where given name, label, split."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table: {error}") from error
    if "image" not in columns:
        raise UserError(f"{path}: expected a column image, got {', '.join(columns) or 'no columns'}")
    cases = []
    for number, row in enumerate(rows, 2):
        split = (row.get("split") or "train").strip()
        if split not in SPLITS:
            raise UserError(f"{path}, line {number}: split: expected one of {', '.join(SPLITS)}, got {split!r}")
        images = [p.strip() for p in (row.get("image") or "").split(";") if p.strip()]
        entry = {"image": images, "label": (row.get("label") or "").strip() or None, "name": (row.get("name") or "").strip()}
        cases.append(_entry(f"{path}, line {number}", entry, path.parent, split))
    return cases


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
