"""Sets of volumes to be compared, in [0, 1], from wherever they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tcam_diff.data import store as stores
from tcam_diff.data.intensity import to_unit
from tcam_diff.data.sources import find_cases
from tcam_diff.data.volumes import read_case
from tcam_diff.errors import UserError
from tcam_diff.progress import Progress, ProgressCallback


def read_set(
    path: Path,
    prepare: Callable[[Tensor], Tensor],
    *,
    split: str | None = None,
    intensity: tuple[float, float] | None = None,
    most: int | None = None,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """(N, ...): ``prepare`` of each volume (1, channels, H, W, D) in [0, 1].

    Args:
        path: a store of `tcam prepare`, a folder of `tcam sample`, or volumes in any layout that check-data knows.
        prepare: what to keep of a volume.
        split: of a store, or of a layout that has splits; None: all.
        intensity: physical values at 0 and 1. Stores know theirs and samples have them in their JSON files; other volumes that
            are not within [0, 1] need it.
        most: volumes, from the first.
        progress: called after every volume.

    Raises UserError naming the file.
    """
    readers: list[Callable[[], np.ndarray]] = []
    if (path / stores.INDEX).is_file():
        store = stores.Store(path)
        splits = [split] if split else sorted({r.split for r in store.records if not r.problem})
        for s in splits:
            readers += [lambda r=r: _stored(store.volume(r)) for r in store.of(s)]  # type: ignore[misc]
    else:
        cases = find_cases(path).cases
        chosen = [c for c in cases if split is None or c.split == split]
        if not chosen:
            raise UserError(f"{path}: no volume of the split {split}")
        for case in chosen:
            beside = Path(str(case.images[0]).removesuffix(".gz").removesuffix(".nii") + ".json")
            readers.append(lambda c=case, j=beside: _unit(read_case(c).data, c.images[0], j, intensity))  # type: ignore[misc]
    readers = readers[:most]
    found: list[Tensor] = []
    for i, read in enumerate(readers):
        kept = prepare(torch.from_numpy(read())[None])
        if found and kept.shape != found[0].shape:
            raise UserError(f"{path}: volume {i} has {kept.shape[1]} channels, the first {found[0].shape[1]}")
        found.append(kept)
        if progress is not None:
            progress(Progress(i + 1, len(readers), what=f"reading {path.name}"))
    return torch.cat(found)


def _stored(volume: np.ndarray) -> np.ndarray:
    return volume.astype(np.float32) / (255 if volume.dtype == np.uint8 else 1)


def _told(sidecar: Path) -> list[tuple[float, float]] | None:
    """What 0 and 1 stand for, where the JSON file beside a volume is that of a sample; BIDS has others there."""
    try:
        held = json.loads(sidecar.read_text())
        return [(float(lo), float(hi)) for lo, hi in held["intensity"]] if "intensity" in held else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{sidecar}: damaged: expected JSON, and of a sample its intensity: {error}") from error


def _unit(data: np.ndarray, path: Path, sidecar: Path, intensity: tuple[float, float] | None) -> np.ndarray:
    """In [0, 1]."""
    told = _told(sidecar)
    if told is not None:
        return to_unit(data, told)
    if intensity is not None:
        return to_unit(data, [intensity] * data.shape[0])
    if data.min() < -1e-3 or data.max() > 1 + 1e-3:
        raise UserError(
            f"{path}: values from {data.min():.4g} to {data.max():.4g}; expected [0, 1], or say with --intensity what 0 and 1 "
            "stand for"
        )
    return data.astype(np.float32)
