"""Checkpoints: folders that appear under their names only when the parts of all ranks are on disk.

checkpoints/step-00001200/   shared.pt (equal on all ranks), shard-R-of-W.pt (part of a rank), manifest.json (sha256)
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tcam_diff.errors import UserError
from tcam_diff.files import quiet, reason, replacing, sha256
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
    """Write a checkpoint. Every rank calls this function.

    Args:
        folder: folder of the checkpoints.
        step: number of the step.
        shared: state that is equal on all ranks.
        shard: state of this rank.
        group: the ranks.
        score: the higher, the better the checkpoint; None: not evaluated.
        keep: number of last checkpoints to keep, in addition to the one with the highest score.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: the checkpoint cannot be written; earlier ones are then intact.
    """
    final = folder / f"step-{step:08d}"
    staging = folder / f".writing-{final.name}"
    error: OSError | None = None
    try:
        staging.mkdir(parents=True, exist_ok=True)
        if group.first:
            _write(staging / "shared.pt", shared)
        _write(staging / f"shard-{group.rank}-of-{group.world}.pt", shard)
    except OSError as caught:
        error = caught
    if group.any(error is not None):
        if group.first:
            shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"{final}: cannot be written: {reason(error) if error else 'see the message of the rank that failed'}; "
            f"{_last(folder)}free some space, then continue with --resume auto"
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
    """Delete all checkpoints but the last ``keep`` and the one with the highest score."""
    complete = steps(folder)
    scores = {s: _files(folder / f"step-{s:08d}").read().get("score") for s in complete}
    best = max((s for s in complete if scores[s] is not None), key=lambda s: (scores[s], s), default=None)
    for s in complete[:-keep]:
        if s != best:
            shutil.rmtree(folder / f"step-{s:08d}", ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(m.group(1)) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / MANIFEST).is_file())


def load(path: Path) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Load a checkpoint and compare its files with their checksums.

    Returns:
        The step, the shared state, and the states of all ranks that wrote it.

    Raises:
        UserError: a file is missing or damaged.
    """
    files = _files(path)
    manifest = files.read()
    parts: dict[str, Any] = {}
    with files.reading():
        for name, checksum in manifest["sha256"].items():
            files.verify(name, checksum)
            with files.reading(name), quiet("torch"):
                parts[name] = torch.load(path / name, map_location="cpu", weights_only=True)
                if not isinstance(parts[name], dict):
                    raise ValueError(f"expected a state, got {type(parts[name]).__name__}")
        step, world = int(manifest["step"]), int(manifest["world"])
        if world < 1:
            raise ValueError(f"world: expected at least 1, got {world}")
        number = _NAME.fullmatch(path.name)
        if number and int(number.group(1)) != step:
            raise ValueError(f"step: expected that of the folder's name, got {step}")
        return step, parts["shared.pt"], [parts[f"shard-{r}-of-{world}.pt"] for r in range(world)]


@contextlib.contextmanager
def loading(path: Path) -> Iterator[None]:
    """Convert errors about the state in a checkpoint to UserError."""
    with _files(path).reading("."):  # the folder: its files were read
        yield


def latest(folder: Path) -> Path | None:
    """Folder of the last complete checkpoint, if any."""
    complete = steps(folder)
    return folder / f"step-{complete[-1]:08d}" if complete else None


def clear_unfinished(folder: Path) -> None:
    """Delete unfinished checkpoints of a killed run."""
    for partial in folder.glob(".writing-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _files(path: Path) -> Folder:
    name = _NAME.fullmatch(path.name)
    earlier = [s for s in steps(path.parent) if name and s < int(name.group(1))]
    remedy = f"delete {path}; --resume auto then continues from step {earlier[-1]}" if earlier else "there is no earlier one"
    return Folder(path, MANIFEST, "training", remedy)


def _write(path: Path, state: dict[str, Any]) -> None:
    with replacing(path) as file:
        torch.save(state, file)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _last(folder: Path) -> str:
    complete = steps(folder)
    return f"the checkpoint of step {complete[-1]} is intact; " if complete else ""
