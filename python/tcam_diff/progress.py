"""Callbacks of functions that run for long: one reports progress, one asks them to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """How far a function is.

    Args:
        done: steps, volumes, slices or epochs done, of ``total``.
        total: those there will be.
        metrics: the last figures by their names, for example loss and psnr.
        what: what is being done, where a function does several things one after another.
    """

    done: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    what: str = ""


#: Called after every step. In a run of several processes the first one alone calls it.
ProgressCallback = Callable[[Progress], None]

#: Asked before every step; true: stop, and leave everything so that the same call goes on later.
StopCallback = Callable[[], bool]
