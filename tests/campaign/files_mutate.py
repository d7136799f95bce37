"""Cases, and their mutations: of bytes, of what the formats consist of (files_formats.py, files_values.py), and of checksums.

A case is a set of files by their names in a folder, packed to one string of bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from files_formats import any_bytes, dicom, nifti, nifti_gz
from files_values import checkpoint, csv_table, npy, safetensors, tree_json, tree_yaml

Files = dict[str, bytes]
Bytes = Callable[[bytes], bytes]

#: Name of the file of an input that is no packed case.
ALONE = {"nifti": "a.nii", "dicom": "a.dcm", "yaml": "fit.yaml", "safetensors": "manifest.json", "store": "store.json"}


def pack(files: Files) -> bytes:
    sizes = json.dumps({name: len(content) for name, content in files.items()}).encode()
    return sizes + b"\n" + b"".join(files.values())


def unpack(data: bytes, kind: str) -> Files:
    head, _, rest = data.partition(b"\n")
    files, at = {}, 0
    try:
        for name, size in json.loads(head).items():
            files[name] = rest[at : at + size]
            at += size
    except (ValueError, AttributeError, TypeError):
        return {ALONE.get(kind, "config.yaml"): data}
    return files


def mutated(files: Files, rng: random.Random, library: Bytes) -> Files:
    """The files after one to three mutations. ``library`` is libFuzzer's mutation of bytes."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not files:
            break
        name = rng.choice(list(files))
        draw = rng.random()
        if draw < 0.03:
            del files[name]
        elif draw < 0.06:
            files[name] = files[rng.choice(list(files))]
        elif draw < 0.25:
            files[name] = library(files[name])
        elif draw < 0.4:
            files[name] = any_bytes(files[name], rng)
        else:
            try:
                files[name] = structured(name, files[name], rng)
            except Exception:  # what an earlier mutation damaged is no longer parsed
                files[name] = any_bytes(files[name], rng)
    return with_checksums(files) if rng.random() < 0.8 else files


def structured(name: str, data: bytes, rng: random.Random) -> bytes:
    """A file with a part changed that its format has a name for."""
    for ending, change in STRUCTURES.items():
        if name.endswith(ending):
            return change(data, rng)
    return any_bytes(data, rng)


def with_checksums(files: Files) -> Files:
    """The files with the checksums of their indexes as they are now, so that what lies behind the checksum is read."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    def of(folder: str, name: str) -> str | None:
        return sums.get(f"{folder}{name}")

    def mend(content: Any, folder: str) -> None:
        if isinstance(content.get("sha256"), dict):
            content["sha256"] = {name: of(folder, name) or old for name, old in content["sha256"].items()}
        for key, form in (("volumes", "planes/{}.safetensors"), ("cases", "cases/{}.npy")):
            for entry in content.get(key) or ():
                entry["sha256"] = of(folder, form.format(entry["name"])) or entry["sha256"]
        if "decoder_sha256" in content:
            content["decoder_sha256"] = of(folder, "decoder.safetensors") or content["decoder_sha256"]

    mended = dict(files)
    for name, data in files.items():
        if name.endswith(("manifest.json", "latents.json", "model.json", "store.json")):
            try:
                content = json.loads(data)
                mend(content, name[: name.rfind("/") + 1])
                mended[name] = json.dumps(content, indent=1).encode()
            except Exception:  # the index itself is damaged
                continue
    return mended


STRUCTURES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".nii": nifti, ".nii.gz": nifti_gz, ".dcm": dicom, ".json": tree_json, ".yaml": tree_yaml, ".safetensors": safetensors,
    ".npy": npy, ".pt": checkpoint, ".csv": csv_table,
}  # fmt: skip


def files_of(folder: Path) -> Files:
    """The files of a folder, as a case."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
