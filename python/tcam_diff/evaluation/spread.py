"""Spread of a set of generated volumes beside that of real ones, and their distance from the training volumes.

All figures come from root mean square differences of volumes, d(a, b) = sqrt(mean over voxels of (a - b)^2), after resampling:

    variance          mean over pairs of d^2 / 2, an unbiased estimate of the variance about the mean, averaged over voxels
    pairwise          mean over pairs of d
    nearest training  median over volumes of the smallest d to a training volume
    modes             variance in the first principal modes of the training volumes, as a share of that of the training volumes

Intervals are percentiles over bootstrap samples of volumes (95 %). Pairs of a volume with itself do not count.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import tcam_ext
from tcam_diff.data.store import Store
from tcam_diff.errors import UserError
from tcam_diff.evaluation.reconstruction import Mean
from tcam_diff.files import locked_folder, write_text

MODES = 8
#: Statistics of a set: name, title, and what a good generator shows.
STATISTICS = {
    "variance": ("variance about the mean", "that of held-out volumes"),
    "pairwise": ("mean RMS difference of pairs", "that of held-out volumes"),
    "modes": (f"variance in the first {MODES} modes of the training volumes, their own = 1", "that of held-out volumes"),
    "nearest": ("median RMS difference from the nearest training volume", "not below that of held-out volumes"),
}


def resampled(volumes: Tensor, size: int) -> Tensor:
    """Volumes (N, channels, H, W, D) as rows (N, numbers): means over cells, at most ``size`` along each axis."""
    h, w, d = (min(n, size) for n in volumes.shape[2:])
    return F.adaptive_avg_pool3d(volumes.float(), (h, w, d)).flatten(1)


@dataclass(frozen=True)
class Spread:
    """Statistics of a set, with intervals. "nearest" is missing for the training volumes themselves."""

    volumes: int
    figures: dict[str, Mean]


def spreads(sets: dict[str, Tensor], training: Tensor, resamples: int = 1000, seed: int = 0) -> dict[str, Spread]:
    """Compute the statistics of sets.

    Args:
        sets: rows (N, numbers) of ``resampled``, at least two, by name.
        training: rows of the training volumes, at least two.
        resamples: number of bootstrap samples.
        seed: their seed.

    Raises:
        UserError: a set has fewer than two volumes, or the numbers of voxels differ.
    """
    for name, rows in {**sets, "training volumes": training}.items():
        if len(rows) < 2:
            raise UserError(f"{name}: {len(rows)} volume; the spread of a set needs at least two")
        if rows.shape[1] != training.shape[1]:
            raise UserError(f"{name}: its volumes have another size or number of channels than the training volumes")
    centre = training.double().mean(0)
    _, _, directions = torch.linalg.svd(training.double() - centre, full_matrices=False)
    modes = directions[: min(MODES, len(training) - 1)]
    own = _projected(training, centre, modes).var(axis=0, ddof=1).sum()
    result = {}
    for name, rows in {**sets, "training volumes": training}.items():
        squared = _squared(rows, rows)
        projected = _projected(rows, centre, modes) / np.sqrt(own)
        nearest = None if rows is training else np.sqrt(_squared(rows, training).min(1))
        result[name] = Spread(len(rows), _figures(squared, projected, nearest, resamples, np.random.default_rng(seed)))
    return result


def protocol(store: Store, fake: Path, size: int) -> dict[str, Any]:
    """How generated volumes were compared with those of a store, for ``write``."""
    interval = "95 %, percentile bootstrap over volumes, seed 0"
    return {"real": str(store.folder), "fake": str(fake), "preprocessing": store.config, "size": size, "interval": interval}


def write(out: Path, result: dict[str, Spread], protocol: dict[str, Any]) -> None:
    """Write summary.json, with the statistics of every set and ``protocol``, to a folder."""
    with locked_folder(out):
        sets = {name: {n: asdict(f) for n, f in spread.figures.items()} for name, spread in result.items()}
        content = {"protocol": protocol | {"tcam_ext": tcam_ext.__version__}, "sets": sets}
        write_text(out / "summary.json", json.dumps(content, indent=1))


def _projected(rows: Tensor, centre: Tensor, modes: Tensor) -> np.ndarray:
    return ((rows.double() - centre) @ modes.T).numpy()


def _squared(a: Tensor, b: Tensor) -> np.ndarray:
    """Mean square differences (len(a), len(b)) of rows."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").square().div(a.shape[1]).numpy()


def _figures(
    squared: np.ndarray, projected: np.ndarray, nearest: np.ndarray | None, resamples: int, generator: np.random.Generator
) -> dict[str, Mean]:
    count = len(squared)
    functions: dict[str, Callable[[np.ndarray], float]] = {
        "variance": lambda chosen: _over_pairs(squared, chosen) / 2,
        "pairwise": lambda chosen: _over_pairs(np.sqrt(squared), chosen),
        "modes": lambda chosen: float(projected[chosen].var(axis=0, ddof=1).sum()),
    }
    if nearest is not None:
        functions["nearest"] = lambda chosen: float(np.median(nearest[chosen]))
    everything = np.arange(count)
    samples = [generator.integers(0, count, count) for _ in range(resamples)]
    samples = [s for s in samples if len(np.unique(s)) > 1]
    figures = {}
    for name, function in functions.items():
        low, high = np.percentile([function(s) for s in samples], [2.5, 97.5])
        figures[name] = Mean(count, function(everything), float(low), float(high))
    return figures


def _over_pairs(matrix: np.ndarray, chosen: np.ndarray) -> float:
    """Mean of the entries of a symmetric matrix over pairs of different chosen rows."""
    pairs = chosen[:, None] != chosen
    return float(matrix[np.ix_(chosen, chosen)][pairs].mean())
