"""Content of volumes: foreground, bright voxels, and power by bands of spatial frequency (algorithm.md section 11).

    foreground    volume of the voxels above 0.1 of the data set's range
    bright        volume of the voxels at or above the 95th percentile of the foreground of the training volumes
    power         |FFT|^2 without a window, summed over a band of |frequency| in cycles per voxel

All are of the first channel. Blur lowers the power of the upper bands, noise raises it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import ks_2samp
from torch import Tensor

#: Least value of a voxel of the foreground.
FOREGROUND = 0.1
#: Share of the training volumes' foreground below the bright voxels.
BRIGHT = 0.95
#: Bands of frequency in cycles per voxel, by name.
BANDS = {"low": (0.1, 0.25), "middle": (0.25, 0.35), "high": (0.35, 0.5)}


class Content(NamedTuple):
    """Figures of every volume (N,): foreground and bright voxels in mL, power by bands."""

    foreground: np.ndarray
    bright: np.ndarray
    power: dict[str, np.ndarray]


def bright_level(training: Tensor) -> float:
    """Level of bright voxels: the quantile BRIGHT of the foreground of volumes (N, channels, H, W, D)."""
    values = training[:, 0].float().flatten()
    values = values[values > FOREGROUND]
    return float(values.kthvalue(max(1, round(BRIGHT * len(values)))).values) if len(values) else 1.0


def content(volumes: Tensor, level: float, voxel: float) -> Content:
    """Figures of volumes (N, channels, H, W, D) in [0, 1].

    Args:
        volumes: the volumes.
        level: result of :func:`bright_level`.
        voxel: volume of a voxel in mL.
    """
    first = volumes[:, 0]
    power: dict[str, list[float]] = {f"power_{name}": [] for name in BANDS}
    for volume in first:
        spectrum = torch.fft.rfftn(volume.float()).abs().square()
        for name, weight in _bands(tuple(volume.shape)).items():
            power[f"power_{name}"].append(float((spectrum * weight).sum()))
    foreground = [float((v > FOREGROUND).sum()) * voxel for v in first]
    bright = [float((v >= level).sum()) * voxel for v in first]
    return Content(np.array(foreground), np.array(bright), {name: np.array(p) for name, p in power.items()})


def detail(volume: Tensor, truth: Tensor) -> dict[str, float]:
    """Power of a reconstruction over that of its original, and their coherence, by bands; NaN where there is no power.

    Coherence is the sum of Re(F G*) over the root of the product of the powers, 1 for proportional spectra: noise has power,
    but no coherence.

    Args:
        volume: reconstruction (H, W, D).
        truth: original (H, W, D).

    Returns:
        power_BAND and coherence_BAND for each of BANDS.
    """
    f, g = torch.fft.rfftn(volume.float()), torch.fft.rfftn(truth.float())
    least = 1e-10 * float(g.abs().square().sum())  # rounding
    figures = {}
    for name, weight in _bands(tuple(truth.shape)).items():
        own, original = (float((x.abs().square() * weight).sum()) for x in (f, g))
        common = float(((f * g.conj()).real * weight).sum())
        figures[f"power_{name}"] = own / original if original > least else float("nan")
        figures[f"coherence_{name}"] = common / (own * original) ** 0.5 if min(own, original) > least else float("nan")
    return figures


def contents(sets: Mapping[str, Tensor], training: str, voxel: float) -> dict[str, Content]:
    """Figures of sets by name, with the level of bright voxels of the set ``training``; ``voxel``: volume of a voxel in mL."""
    level = bright_level(sets[training])
    return {name: content(volumes, level, voxel) for name, volumes in sets.items()}


def told_apart(of: Mapping[str, Content], references: Sequence[str]) -> dict[str, dict[str, float]]:
    """P-values of the two-sample Kolmogorov-Smirnov test of the volumes of bright voxels, by set and reference."""
    return {
        name: {r: float(ks_2samp(own.bright, of[r].bright).pvalue) for r in references if r != name} for name, own in of.items()
    }


def p_values(beside: Mapping[str, float]) -> str:
    """P-values of a set beside references, in one line."""
    return ", ".join(f"{p:.2g} ({reference})" for reference, p in beside.items())


@functools.lru_cache(maxsize=4)
def _bands(shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Weights of the half spectrum in each band: 2 for coefficients whose conjugates it leaves out, else 1 or 0."""
    h, w, d = shape
    squares = [torch.fft.fftfreq(h)[:, None, None] ** 2, torch.fft.fftfreq(w)[:, None] ** 2, torch.fft.rfftfreq(d) ** 2]
    frequency = (squares[0] + squares[1] + squares[2]).sqrt()
    twice = torch.full((d // 2 + 1,), 2.0)
    twice[0] = 1
    if d % 2 == 0:
        twice[-1] = 1
    return {name: ((frequency >= low) & (frequency < high)) * twice for name, (low, high) in BANDS.items()}
