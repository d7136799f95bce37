"""Prepared data set on disk: one memory-mapped array per case, so that a box or slice can be read alone.

store.json         preprocessing, splits, names of the labels, and for every case its volume (data/volume.py), sources
                   and sha256
cases/NAME.npy     (channels, H, W, D), uint8 (255 v) or float16, v in [0, 1]
labels/NAME.npy    (H, W, D) uint8, the codes of the data set, voxel for voxel; absent for cases without labels
cases/NAME.json    entry of the case, written after its arrays, so that an interrupted run can continue
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from tcam_diff.data import dicom
from tcam_diff.data.labels import label_names
from tcam_diff.data.sources import Case
from tcam_diff.data.volume import FileName, VolumeInfo, VolumeRecord, is_file_name
from tcam_diff.errors import UserError
from tcam_diff.files import reason, replacing, sha256, writable_folder, write_text
from tcam_diff.folder import Folder
from tcam_diff.text import shown

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "store.json"


class Record(VolumeRecord):
    """Entry of a prepared case."""

    name: FileName
    split: str
    dtype: str
    sources: list[dict[str, Any]]  # path, bytes, mtime_ns; of the label file also "labels": true
    sha256: str
    labels_sha256: str | None = None  # None: no labels, as in formats 1 and 2
    label_codes: list[Annotated[int, Field(ge=0, le=255)]] = Field(default_factory=list)  # those that voxels have
    problem: ClassVar[str] = ""


@dataclass(frozen=True)
class Failure:
    """Entry of a case that could not be prepared."""

    name: str
    split: str
    problem: str


class StoreWriter:
    """Writer of a store.

    Args:
        folder: a new folder, or a store of the same preprocessing.
        config: preprocessing, for the index.

    Raises:
        UserError: the folder has volumes of another preprocessing, or cannot be written.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.config = folder, config
        self.digest = hashlib.sha256(
            json.dumps({k: v for k, v in config.items() if not k.startswith(("split", "val_"))}, sort_keys=True).encode()
        ).hexdigest()
        writable_folder(folder / "cases")
        self.files = _folder(folder)
        index = self.files / INDEX
        if index.exists() and (digest := self.files.read_json(INDEX).get("digest")) != self.digest:
            raise UserError(
                f"{folder}: contains volumes that were prepared differently"
                + ("" if digest is None else f" (their preprocessing: config in {index})")
                + "; choose another folder"
            )

    def sources(self, case: Case) -> list[dict[str, Any]]:
        """Path, size and modification time of the files of a case. Raises UserError if one is missing."""
        label = [] if case.label is None else [{**s, "labels": True} for s in _stats([case.label])]
        return _stats(case.images) + label

    def find(self, name: str, sources: list[dict[str, Any]]) -> Record | None:
        """The record of a case that an earlier run prepared from the same files with the same preprocessing, if any."""
        path, array, labels = self._paths(name)
        if not path.exists() or not array.exists():
            return None
        entry = self.files.read_json(f"cases/{path.name}")
        if entry.get("digest") != self.digest or entry.get("sources") != sources or entry.get("name") != name:
            return None
        with self.files.reading(f"cases/{path.name}"):
            record = Record.model_validate(entry)
        return None if record.labels_sha256 is not None and not labels.exists() else record

    def write(
        self,
        name: str,
        split: str,
        array: np.ndarray,
        info: VolumeInfo,
        sources: list[dict[str, Any]],
        labels: np.ndarray | None = None,
    ) -> Record:
        """Write the array (channels, H, W, D) of a case and its labels (H, W, D) uint8, if any, then its entry.

        Raises UserError if an array cannot be written.
        """
        entry, path, label_path = self._paths(name)
        entry.unlink(missing_ok=True)
        label_path.unlink(missing_ok=True)
        checksum = _write_array(path, array)
        label_checksum = None if labels is None else _write_array(label_path, labels)
        record = Record(
            info=info,
            name=name,
            split=split,
            dtype=array.dtype.name,
            sources=sources,
            sha256=checksum,
            labels_sha256=label_checksum,
            label_codes=[] if labels is None else np.flatnonzero(np.bincount(labels.ravel(), minlength=256)).tolist(),
        )
        write_text(entry, json.dumps(record.model_dump(mode="json") | {"digest": self.digest}))
        return record

    def finish(self, records: Sequence[Record | Failure], names: Mapping[int, str] | None = None) -> None:
        """Write the index. ``names`` are names of labels by code; codes without one get a name too."""
        codes = {code for r in records if isinstance(r, Record) for code in r.label_codes}
        self.files.write(
            {
                "digest": self.digest,
                "config": self.config,
                "labels": {str(code): name for code, name in label_names(names or {}, codes).items()},
                "cases": [r.model_dump(mode="json") for r in records if isinstance(r, Record)],
                "failed": [asdict(r) for r in records if isinstance(r, Failure)],
            }
        )

    def _paths(self, name: str) -> tuple[Path, Path, Path]:
        """Files of a case: its entry, its array and its labels."""
        if not is_file_name(name):
            raise UserError(f"{name!r}: a case's name becomes a file name; give it another name in a table (.csv)")
        cases = self.folder / "cases"
        return cases / f"{name}.json", cases / f"{name}.npy", self.folder / "labels" / f"{name}.npy"


class Store:
    """A prepared data set, opened for reading.

    Arrays are memory-mapped at first use, which checks shape and type. :meth:`verify` compares checksums. Raises UserError if
    the index is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.files = _folder(self.folder)
        index = self.files.read()
        with self.files.reading():
            self.config: dict[str, Any] = dict(index["config"])
            self.digest = str(index["digest"])
            self.records = [Record.model_validate(entry) for entry in index["cases"]]
            self.label_names = {int(code): str(name) for code, name in dict(index.get("labels", {})).items()}
            if not all(0 < code <= 255 for code in self.label_names):
                raise ValueError("labels: expected codes 1 to 255")
        self._arrays: dict[Path, np.ndarray] = {}

    def in_split(self, split: str) -> list[Record]:
        """Records of a split. Raises UserError if there are none."""
        records = [r for r in self.records if r.split == split]
        if not records:
            shown = ", ".join(f"{s} ({n})" for s, n in Counter(r.split for r in self.records).items())
            raise UserError(f"{self.folder}: no case of the split {split!r}; it has {shown}")
        return records

    def path(self, record: Record) -> Path:
        """File of a case's array."""
        return self.folder / "cases" / f"{record.name}.npy"

    def volume(self, record: Record) -> np.ndarray:
        """Read-only, memory-mapped array (channels, H, W, D) of a case. Raises UserError if it cannot be read."""
        return self._mapped(self.path(record), record.info.array_shape, record.dtype)

    def images(self, record: Record) -> Tensor:
        """The images (images, H, W, D) of a case in [0, 1], without its label maps."""
        import torch

        return unit(torch.tensor(self.volume(record)[: record.info.images]))

    def labels(self, record: Record) -> np.ndarray:
        """Read-only, memory-mapped labels (H, W, D) uint8 of a case: the data set's codes, named by ``label_names``.

        Raises UserError if the case has none, or they cannot be read.
        """
        if record.labels_sha256 is None:
            raise UserError(
                f"{self.folder}: {record.name} has no labels: none were found beside its image, or the store is of an earlier "
                "version; `tcam prepare` into a new folder keeps those of the data set"
            )
        return self._mapped(self.folder / "labels" / f"{record.name}.npy", record.info.shape, "uint8")

    def verify(self, record: Record) -> None:
        """Compare a case and its labels with their checksums. Raises UserError with the file's name."""
        self.volume(record)
        self.files.verify(f"cases/{record.name}.npy", record.sha256)
        if record.labels_sha256 is not None:
            self.labels(record)
            self.files.verify(f"labels/{record.name}.npy", record.labels_sha256)

    def _mapped(self, path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """A memory-mapped array. Raises UserError if it cannot be read, or has another shape or type."""
        array = self._arrays.get(path)
        if array is None:
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except Exception as error:  # numpy raises many kinds for a malformed header
                raise UserError(f"{path}: cannot be read: {shown(reason(error), 200)}; run `tcam prepare` again") from error
            if array.shape != shape or array.dtype.name != dtype:
                raise UserError(
                    f"{path}: expected {dtype} {shape}, got {array.dtype.name} {array.shape}; "
                    "delete it and run `tcam prepare` again"
                )
            self._arrays[path] = array
        return array


def quantise(array: np.ndarray, dtype: str) -> np.ndarray:
    """Convert values in [0, 1] to the type of the store: uint8 is 255 v, rounded."""
    return np.rint(array * 255).astype(np.uint8) if dtype == "uint8" else array.astype(np.float16)


def unit(stored: Tensor) -> Tensor:
    """Values in [0, 1] as float32 of stored voxels in uint8 (255 v) or floats."""
    return stored.float() / 255 if not stored.is_floating_point() else stored.float()


def volumes_digest(records: Sequence[Record]) -> str:
    """Digest of the names and voxels of volumes."""
    return hashlib.sha256(json.dumps([(r.name, r.sha256) for r in records]).encode()).hexdigest()


def one_shape(folder: Path, records: Sequence[Record]) -> tuple[int, int, int, int]:
    """The shape (channels, H, W, D) of all records. Raises UserError if they differ."""
    shape = records[0].info.array_shape
    for r in records[1:]:
        if r.info.array_shape != shape:
            raise UserError(
                f"{folder}: {r.name} has shape {r.info.array_shape}, {records[0].name} {shape}; "
                "prepare them with crop or resize"
            )
    return shape


def _folder(path: Path) -> Folder:
    return Folder(path, INDEX, "`tcam prepare`", "delete it and run `tcam prepare` again", formats=(1, 2, 3))


def _stats(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Path, size and modification time of files, and of those in DICOM folders. Raises UserError if one is missing."""
    try:
        files = [f for p in paths for f in (dicom.files(p) if p.is_dir() else [p])]
        stats = [f.stat() for f in files]
    except OSError as error:
        raise UserError(f"{error.filename}: {reason(error)}") from error
    return [
        {"path": str(f.resolve()), "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for f, s in zip(files, stats, strict=True)
    ]


def _write_array(path: Path, array: np.ndarray) -> str:
    """Write a .npy file. Returns its sha256. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error
    return sha256(path)
