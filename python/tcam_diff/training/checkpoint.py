"""Checkpoints: folders that appear under their names only when every rank's part is on the disk.

checkpoints/step-00001200/   shared.pt (the same on every rank), shard-R-of-W.pt (a rank's own), manifest.json (sha256)
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from tcam_diff.errors import UserError
from tcam_diff.files import replacing, sha256
from tcam_diff.folder import Folder
from tcam_diff.training.distributed import Distributed

_NAME = re.compile(r"step-(\d{8})")
MANIFEST = "manifest.json"


def save(
    folder: Path,
    step: int,
    shared: dict[str, Any],
    shard: dict[str, Any],
    group: Distributed,
    *,
    score: float | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of ``step``; every rank calls it. Keeps the last ``keep`` and the one of the highest score.

    Raises UserError where it cannot be written; what was there before is then still there.
    """
    final = folder / f"step-{step:08d}"
    staging = folder / f".writing-{final.name}"
    error: OSError | RuntimeError | None = None
    try:
        staging.mkdir(parents=True, exist_ok=True)
        if group.first:
            _write(staging / "shared.pt", shared)
        _write(staging / f"shard-{group.rank}-of-{group.world}.pt", shard)
    except (OSError, RuntimeError) as caught:  # torch's writer raises RuntimeError on a full disk
        error = caught
    if group.any(error is not None):
        if group.first:
            shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"{final}: could not be written: {error or 'see the message of the rank that failed'}; "
            f"{_last(folder)}make room, then --resume auto goes on from there"
        ) from error
    if group.first:
        sums = {p.name: sha256(p) for p in sorted(staging.glob("*.pt"))}
        _files(staging).write({"step": step, "world": group.world, "score": score, "sha256": sums})
        if final.exists():
            shutil.rmtree(final)
        os.replace(staging, final)
        _sync_folder(folder)
        prune(folder, keep)
    group.barrier()
    return final


def prune(folder: Path, keep: int) -> None:
    found = steps(folder)
    scores = {s: _files(folder / f"step-{s:08d}").read().get("score") for s in found}
    best = max((s for s in found if scores[s] is not None), key=lambda s: (scores[s], s), default=None)
    for s in found[:-keep]:
        if s != best:
            shutil.rmtree(folder / f"step-{s:08d}", ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """Of the checkpoints that are whole, in order."""
    if not folder.is_dir():
        return []
    found = [int(m.group(1)) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / MANIFEST).is_file()]
    return sorted(found)


def load(path: Path) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """(step, shared, every rank's shard). Each file is compared with its checksum. Raises UserError saying what to do."""
    files = _files(path)
    manifest = files.read()
    parts: dict[str, Any] = {}
    with files.reading():
        for name, want in manifest["sha256"].items():
            files.verify(name, want)
            with files.reading(name):
                parts[name] = torch.load(path / name, map_location="cpu", weights_only=True)
        step, world = int(manifest["step"]), int(manifest["world"])
        return step, parts["shared.pt"], [parts[f"shard-{r}-of-{world}.pt"] for r in range(world)]


def latest(folder: Path) -> Path | None:
    found = steps(folder)
    return folder / f"step-{found[-1]:08d}" if found else None


def clear_unfinished(folder: Path) -> None:
    """What a run that was killed left behind."""
    for left in folder.glob(".writing-*"):
        shutil.rmtree(left, ignore_errors=True)


def _files(path: Path) -> Folder:
    named = _NAME.fullmatch(path.name)
    before = [s for s in steps(path.parent) if named and s < int(named.group(1))]
    remedy = f"delete {path}: --resume auto then goes on from step {before[-1]}" if before else "there is none before it"
    return Folder(path, MANIFEST, "training", remedy)


def _write(path: Path, what: dict[str, Any]) -> None:
    with replacing(path) as file:
        torch.save(what, file)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _last(folder: Path) -> str:
    found = steps(folder)
    return f"the checkpoint of step {found[-1]} is whole; " if found else ""
