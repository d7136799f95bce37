"""Sets of volumes to be compared, in [0, 1], from wherever they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tcam_diff.data import store as stores
from tcam_diff.data.readers import read_case
from tcam_diff.data.sources import Case, find_cases
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
        splits = [split] if split else sorted({r.split for r in store.records})
        for s in splits:
            readers += [lambda r=r: _stored(store.volume(r)) for r in store.in_split(s)]  # type: ignore[misc]
    else:
        cases = find_cases(path).cases
        chosen = [c for c in cases if split is None or c.split == split]
        if not chosen:
            raise UserError(f"{path}: no volume of the split {split}")
        for case in chosen:
            readers.append(lambda c=case: _unit(c, intensity))  # type: ignore[misc]
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


def _unit(case: Case, intensity: tuple[float, float] | None) -> np.ndarray:
    """In [0, 1]. A sample's JSON file says what 0 and 1 stand for; BIDS has other files in that place."""
    volume, path = read_case(case), case.images[0]
    sidecar = Path(str(path).removesuffix(".gz").removesuffix(".nii") + ".json")
    ranges = [] if intensity is None else [intensity] * volume.info.channels
    try:
        if sidecar.exists():
            ranges = json.loads(sidecar.read_text()).get("intensity", ranges)
        info = volume.info.replaced(intensity=ranges)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{sidecar}: damaged: expected JSON, and of a sample its intensity: {error}") from error
    if info.intensity:
        return info.to_unit(volume.data)
    low, high = volume.data.min(), volume.data.max()
    if low < -1e-3 or high > 1 + 1e-3:
        raise UserError(
            f"{path}: values from {low:.4g} to {high:.4g}; expected [0, 1], or say with --intensity what 0 and 1 stand for"
        )
    return volume.data
