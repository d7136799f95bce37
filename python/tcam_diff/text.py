"""Sizes and types as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def size_text(shape: Iterable[int]) -> str:
    """A shape as text, for example "128 x 128 x 64"."""
    return " x ".join(map(str, shape))


def dtype_text(dtype: torch.dtype) -> str:
    """A type as text, for example "bfloat16"."""
    return str(dtype).removeprefix("torch.")
