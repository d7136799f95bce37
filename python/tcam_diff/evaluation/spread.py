"""Spread of a set of generated volumes beside that of real ones, and their distance from the training volumes.

All figures but MS-SSIM come from root mean square differences of volumes, d(a, b) = sqrt(mean over voxels of (a - b)^2):

    variance          mean over pairs of d^2 / 2, an unbiased estimate of the variance about the mean, averaged over voxels
    pairwise          mean over pairs of d
    nearest training  median over volumes of the smallest d to a training volume
    modes             variance in the first principal modes of the training volumes, as a share of that of the training volumes
    latent modes      the same of planes, for sets whose planes are known

and from the content of each volume (content.py), with the standard deviation over volumes of foreground and bright voxels, and
with power as a share of that of the training volumes.

Intervals are percentiles over bootstrap samples of volumes (95 %). Pairs of a volume with itself do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from tcam_diff.diffusion.prior_fit import principal
from tcam_diff.errors import UserError
from tcam_diff.evaluation.content import Content
from tcam_diff.evaluation.metrics import ms_ssim3d
from tcam_diff.evaluation.reconstruction import Mean
from tcam_diff.training.rng import rng

MODES = 8
TRAINING = "training volumes"


#: Statistics of a set by name. "nearest" is missing for the training volumes themselves.
Figures = dict[str, Mean]


def spreads(
    sets: Mapping[str, Tensor],
    training: Tensor,
    content: Mapping[str, Content] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Figures]:
    """Compute the statistics of sets and of the training volumes, under the name TRAINING.

    Args:
        sets: volumes (N, ...) of one size, at least two, by name.
        training: training volumes of the same size, at least two.
        content: content of all sets and of the training volumes; None: without its statistics.
        resamples: number of bootstrap samples.
        seed: their seed.

    Raises:
        UserError: a set has fewer than two volumes, or the numbers of voxels differ.
    """
    everything = {**sets, TRAINING: training}
    for name, volumes in everything.items():
        if len(volumes) < 2:
            raise UserError(f"{name}: {len(volumes)} volume; the spread of a set needs at least two")
        if volumes.shape[1:] != training.shape[1:]:
            raise UserError(f"{name}: its volumes have another size or number of channels than the training volumes")
    rows = {name: volumes.flatten(1) for name, volumes in everything.items()}
    training = rows[TRAINING]
    components = principal(training.float(), MODES)
    centre, modes = components.mean.double(), components.directions.double()
    own = _projected(training, centre, modes).var(axis=0, ddof=1).sum()
    result = {}
    for name, own_rows in rows.items():
        along = _projected(own_rows, centre, modes) / np.sqrt(own)
        to_training = None if name == TRAINING else nearest(own_rows, training)[0]
        squared = _squared(own_rows, own_rows)
        result[name] = _figures(squared, along, to_training, resamples, np.random.default_rng(seed))
    for name, of_set in (content or {}).items():
        result[name] |= _content_figures(of_set, content[TRAINING], resamples, np.random.default_rng(seed))  # type: ignore[index]
    return result


def latent_modes(states: Mapping[str, Tensor], reference: str, resamples: int = 1000, seed: int = 0) -> dict[str, Mean]:
    """Variance of packed planes in the first principal modes of a reference set, as a share of that set's.

    Args:
        states: packed planes (N, M) by set.
        reference: name of the set of the training planes.
        resamples: number of bootstrap samples.
        seed: their seed.

    Raises:
        UserError: a set has planes of another size, or fewer than two volumes.
    """
    for name, rows in states.items():
        if len(rows) < 2 or rows.shape[1] != states[reference].shape[1]:
            raise UserError(
                f"{name}: {len(rows)} volume(s) with {rows.shape[1]} numbers in planes; expected at least two of the "
                f"{states[reference].shape[1]} of {reference}"
            )
    p = principal(states[reference], MODES)
    own = float(p.variances.double().sum())
    result = {}
    for name, rows in states.items():
        along = _projected(rows, p.mean.double(), p.directions.double()) / np.sqrt(own)
        share = {"latent_modes": lambda chosen, v=along: float(v[chosen].var(axis=0, ddof=1).sum())}
        result[name] = _intervals(share, len(rows), resamples, np.random.default_rng(seed))["latent_modes"]
    return result


def nearest(volumes: Tensor, training: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """RMS difference of each volume from the nearest training volume, and the number of that volume."""
    squared = _squared(volumes.flatten(1), training.flatten(1))
    return np.sqrt(squared.min(1)), squared.argmin(1)


def similarity(volumes: Tensor, most: int = 100, seed: int = 0, resamples: int = 1000) -> Mean:
    """Mean MS-SSIM of pairs of different volumes (N, channels, H, W, D) of a set: the higher, the less they differ.

    At most ``most`` random pairs; the interval is a bootstrap over volumes. Volumes need 22 voxels along each axis.
    """
    every = torch.combinations(torch.arange(len(volumes)))
    pairs = every[torch.randperm(len(every), generator=rng(seed, "pairs"))[:most]].numpy()
    values = np.array([ms_ssim3d(volumes[i].float(), volumes[j].float()) for i, j in pairs])
    generator, means = np.random.default_rng(seed), []
    for _ in range(resamples):
        weight = np.bincount(generator.integers(0, len(volumes), len(volumes)), minlength=len(volumes))
        of_pair = weight[pairs[:, 0]] * weight[pairs[:, 1]]
        if of_pair.any():
            means.append((values * of_pair).sum() / of_pair.sum())
    low, high = np.percentile(means, [2.5, 97.5]) if means else (values.mean(),) * 2
    return Mean(len(volumes), float(values.mean()), float(low), float(high))


def _projected(rows: Tensor, centre: Tensor, modes: Tensor) -> np.ndarray:
    return ((rows.double() - centre) @ modes.T).numpy()


def _squared(a: Tensor, b: Tensor) -> np.ndarray:
    """Mean square differences (len(a), len(b)) of rows."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").square().div(a.shape[1]).numpy()


def _content_figures(own: Content, training: Content, resamples: int, generator: np.random.Generator) -> Figures:
    values = {"foreground": own.foreground, "bright": own.bright} | {
        name: power / max(float(training.power[name].mean()), 1e-30) for name, power in own.power.items()
    }
    functions = {name: (lambda chosen, v=v: float(v[chosen].mean())) for name, v in values.items()}
    for name in ("foreground", "bright"):
        functions[f"{name}_sd"] = lambda chosen, v=values[name]: float(v[chosen].std(ddof=1))
    return _intervals(functions, len(own.foreground), resamples, generator)


def _figures(
    squared: np.ndarray, projected: np.ndarray, to_training: np.ndarray | None, resamples: int, generator: np.random.Generator
) -> Figures:
    count = len(squared)
    functions: dict[str, Callable[[np.ndarray], float]] = {
        "variance": lambda chosen: _over_pairs(squared, chosen) / 2,
        "pairwise": lambda chosen: _over_pairs(np.sqrt(squared), chosen),
        "modes": lambda chosen: float(projected[chosen].var(axis=0, ddof=1).sum()),
    }
    if to_training is not None:
        functions["nearest"] = lambda chosen: float(np.median(to_training[chosen]))
    return _intervals(functions, count, resamples, generator)


def _intervals(
    functions: Mapping[str, Callable[[np.ndarray], float]], count: int, resamples: int, generator: np.random.Generator
) -> Figures:
    """Values of functions of the numbers of chosen volumes, for all ``count`` volumes, with bootstrap intervals."""
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
