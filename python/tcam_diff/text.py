"""Sizes and types as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def size_text(shape: Iterable[int]) -> str:
    """A shape as text, for example "128 x 128 x 64"."""
    return " x ".join(map(str, shape))


def shown(value: object, most: int = 80) -> str:
    """A value for a message: one line without control characters, of at most ``most`` characters."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in str(value)[: 4 * most])
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def dtype_text(dtype: torch.dtype) -> str:
    """A type as text, for example "bfloat16"."""
    return str(dtype).removeprefix("torch.")
