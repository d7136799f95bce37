"""Named streams of random numbers, all derived from the seed of a run.

A stream is a function of its name: (seed, "noise", object, visit) gives the same numbers in any process, on any rank, before
and after a restart. Checkpoints therefore contain no state of random number generators.
"""

from __future__ import annotations

import functools
import hashlib

import torch


def seed_of(seed: int, *name: str | int) -> int:
    """Seed of a stream, 0 to 2^63 - 1, from the run's seed and the stream's name."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *name)).encode(), digest_size=8).digest(), "little") >> 1


def rng(seed: int, *name: str | int, device: torch.device | None = None) -> torch.Generator:
    """Generator at the start of a stream. GPUs and CPUs give different numbers."""
    return torch.Generator(device or "cpu").manual_seed(seed_of(seed, *name))


def evenly(count: int, total: int) -> list[int]:
    """``count`` numbers, or all, evenly spread from 0 to ``total`` - 1."""
    count = min(count, total)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def in_epochs(position: int, count: int, seed: int) -> int:
    """Number at a position of the sequence of shuffled epochs over 0 to count - 1, a function without state."""
    epoch, at = divmod(position, count)
    return int(_shuffled(count, seed, epoch)[at])


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(count, generator=rng(seed, "order", epoch))
