"""Callbacks of long-running functions, to report progress and to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Progress of a function.

    Args:
        done: number of finished steps, volumes, slices or epochs.
        total: number of all.
        metrics: last metrics by name, for example loss and psnr.
        what: the current part of functions that do several things.
    """

    done: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    what: str = ""


#: Callback after every step. With several processes only the first one calls it.
ProgressCallback = Callable[[Progress], None]

#: Callback before every step. If it returns true, the function stops in a state from which the same call can continue.
StopCallback = Callable[[], bool]
