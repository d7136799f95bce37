"""Trained models that come with the package, one in each folder here: those of `tcam export-model`, with their model cards."""

from __future__ import annotations

from pathlib import Path

from tcam_diff.errors import UserError

CARD = "README.md"


def names() -> list[str]:
    """Names of the models."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob(f"*/{CARD}"))


def pretrained(name: str) -> Path:
    """Folder of a model, for ``TriplaneDiffusion.load``. Raises UserError if there is none of this name."""
    if name not in names():
        known = f"expected one of {', '.join(names())}" if names() else "this installation has none"
        raise UserError(f"--pretrained: {known}, got {name}")
    return Path(__file__).parent / name
