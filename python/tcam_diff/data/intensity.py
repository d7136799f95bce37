"""Physical intensities to [0, 1], per channel."""

from __future__ import annotations

import numpy as np

from tcam_diff.errors import UserError


def intensity_range(data: np.ndarray, low: float = 0.0, high: float = 100.0) -> list[tuple[float, float]]:
    """Per channel of (channels, H, W, D), the values that map to 0 and to 1: two percentiles, by default min and max.

    A constant channel gets a range of width one, so that it maps to 0 and back to itself.
    """
    ranges = []
    for channel in data:
        lo = float(channel.min() if low == 0 else np.percentile(channel, low))
        hi = float(channel.max() if high == 100 else np.percentile(channel, high))
        if not np.isfinite(hi - lo):
            raise UserError(f"intensities from {lo:g} to {hi:g} overflow float32")
        ranges.append((lo, hi if hi > lo else lo + 1.0))
    return ranges


def to_unit(data: np.ndarray, ranges: list[tuple[float, float]]) -> np.ndarray:
    """(channels, H, W, D) to [0, 1], clipped."""
    unit = np.empty(data.shape, np.float32)
    for c, (lo, hi) in enumerate(ranges):
        np.clip((data[c] - lo) / (hi - lo), 0, 1, out=unit[c])
    return unit
