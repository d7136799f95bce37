"""Cosine transform of planes, and its octaves of spatial frequency (algorithm.md section 11)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=32)
def dct(n: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Tensor:
    """Orthonormal DCT-II matrix (n, n): row k has frequency k / 2n cycles per texel."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * (k + 0.5) * k[:, None]) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


def transform_planes(planes: Tensor, inverse: bool = False) -> Tensor:
    """DCT-II of every plane (..., rows, columns), or its inverse."""
    matrix = dct.__wrapped__ if torch.compiler.is_compiling() else dct  # Dynamo cannot trace lru_cache
    rows, columns = (matrix(n, planes.dtype, planes.device) for n in planes.shape[-2:])
    return rows.T @ planes @ columns if inverse else rows @ planes @ columns.T


def octaves_of(rows: int, columns: int) -> Tensor:
    """Octave of every coefficient (rows, columns) of a plane's transform.

    Octave 0 is the plane's mean. Octave k has the radii from 2^(k - 1) to 2^k, in units of the lowest frequency along the
    longer side.
    """
    longest = max(rows, columns)
    radius = torch.hypot(torch.arange(rows)[:, None] * (longest / rows), torch.arange(columns) * (longest / columns))
    return torch.where(radius < 0.5, 0, 1 + radius.clamp(min=1).log2().floor().long())
