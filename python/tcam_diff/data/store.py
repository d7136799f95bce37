"""Prepared data set on disk: one memory-mapped array per case, so that a box or slice can be read alone.

store.json            preprocessing, splits, and for every case its volume (data/volume.py), sources and sha256
cases/NAME.npy        (channels, H, W, D), uint8 (255 v) or float16, v in [0, 1]
cases/NAME.json       entry of the case, written after its array, so that an interrupted run can continue
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tcam_diff.data import dicom
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
    sources: list[dict[str, Any]]  # path, bytes, mtime_ns
    sha256: str
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

    def sources(self, paths: Sequence[Path]) -> list[dict[str, Any]]:
        """Path, size and modification time of the files of a case. Raises UserError if one is missing."""
        try:
            paths = [f for p in paths for f in (dicom.files(p) if p.is_dir() else [p])]
            stats = [p.stat() for p in paths]
        except OSError as error:
            raise UserError(f"{error.filename}: {reason(error)}") from error
        return [
            {"path": str(p.resolve()), "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for p, s in zip(paths, stats, strict=True)
        ]

    def find(self, name: str, sources: list[dict[str, Any]]) -> Record | None:
        """The record of a case that an earlier run prepared from the same files with the same preprocessing, if any."""
        path, array = self._paths(name)
        if not path.exists() or not array.exists():
            return None
        entry = self.files.read_json(f"cases/{path.name}")
        if entry.get("digest") != self.digest or entry.get("sources") != sources or entry.get("name") != name:
            return None
        with self.files.reading(f"cases/{path.name}"):
            return Record.model_validate(entry)

    def write(self, name: str, split: str, array: np.ndarray, info: VolumeInfo, sources: list[dict[str, Any]]) -> Record:
        """Write the array of a case, then its entry. Raises UserError if the array cannot be written."""
        entry, path = self._paths(name)
        entry.unlink(missing_ok=True)
        try:
            with replacing(path) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {reason(error)}") from error
        record = Record(info=info, name=name, split=split, dtype=array.dtype.name, sources=sources, sha256=sha256(path))
        write_text(entry, json.dumps(record.model_dump(mode="json") | {"digest": self.digest}))
        return record

    def finish(self, records: Sequence[Record | Failure]) -> None:
        """Write the index."""
        self.files.write(
            {
                "digest": self.digest,
                "config": self.config,
                "cases": [r.model_dump(mode="json") for r in records if isinstance(r, Record)],
                "failed": [asdict(r) for r in records if isinstance(r, Failure)],
            }
        )

    def _paths(self, name: str) -> tuple[Path, Path]:
        if not is_file_name(name):
            raise UserError(f"{name!r}: a case's name becomes a file name; give it another name in a table (.csv)")
        return self.folder / "cases" / f"{name}.json", self.folder / "cases" / f"{name}.npy"


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
        self._arrays: dict[str, np.ndarray] = {}

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
        array = self._arrays.get(record.name)
        if array is None:
            path = self.path(record)
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except Exception as error:  # numpy raises many kinds for a malformed header
                raise UserError(f"{path}: cannot be read: {shown(reason(error), 200)}; run `tcam prepare` again") from error
            shape = record.info.array_shape
            if array.shape != shape or array.dtype.name != record.dtype:
                raise UserError(
                    f"{path}: expected {record.dtype} {shape}, got {array.dtype.name} {array.shape}; "
                    "delete it and run `tcam prepare` again"
                )
            self._arrays[record.name] = array
        return array

    def verify(self, record: Record) -> None:
        """Compare a case with its checksum. Raises UserError with the file's name."""
        self.volume(record)
        self.files.verify(f"cases/{record.name}.npy", record.sha256)


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
    return Folder(path, INDEX, "`tcam prepare`", "delete it and run `tcam prepare` again", formats=(1, 2))
