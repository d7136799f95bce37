"""One integer seeds a run; every use of randomness is a stream of its own, named by what it is for.

A stream is a function of its name: (seed, "noise", object, visit) gives the same numbers in any process, on any rank, before
and after a restart. So nothing of it is state, and nothing needs saving.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, *name: str | int) -> int:
    """0 to 2^63 - 1, of the run's seed and the stream's name."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *name)).encode(), digest_size=8).digest(), "little") >> 1


def rng(seed: int, *name: str | int, device: torch.device | None = None) -> torch.Generator:
    """A generator at the start of the named stream. On a GPU the numbers are others than on the CPU."""
    return torch.Generator(device or "cpu").manual_seed(seed_of(seed, *name))
