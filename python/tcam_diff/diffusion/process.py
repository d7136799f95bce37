"""Diffusion process on a quarter circle between planes and noise, and its loss (equation 9; algorithm.md section 2).

    eta = (t / 1000) pi/2,    x_eta = cos(eta) x0 + sin(eta) eps,    eps ~ N(0, I)

Planes have unit energy (RMSNorm), and so has x_eta at every angle. A network that estimates both x0 and eps gives the drift
dx/deta = -sin(eta) x0 + cos(eta) eps without a singularity at either end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tcam_diff.autodecoder.planes import PLANE_AXES
from tcam_diff.training.rng import rng

TIMESTEPS = 1000


def angle(t: Tensor) -> Tensor:
    """Angles eta of timesteps in [0, 1000]."""
    return t * (math.pi / 2 / TIMESTEPS)


def mix(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_eta = cos(eta) x0 + sin(eta) eps of tensors (B, ...) at timesteps (B,) in [0, 1000]."""
    eta = angle(t.to(x0.dtype)).view(-1, *[1] * (x0.dim() - 1))
    return eta.cos() * x0 + eta.sin() * noise


@dataclass(frozen=True)
class Estimate:
    """The network's estimates of noise and planes at a point x and an angle eta."""

    x: Tensor
    noise: Tensor
    x0: Tensor
    eta: float

    @property
    def drift(self) -> Tensor:
        """dx/deta."""
        return math.cos(self.eta) * self.noise - math.sin(self.eta) * self.x0

    @property
    def residual(self) -> Tensor:
        """x - cos(eta) x0 - sin(eta) eps, which is zero for exact posterior means."""
        return self.x - math.cos(self.eta) * self.x0 - math.sin(self.eta) * self.noise


def decisive(variances: tuple[float, float]) -> tuple[float, float]:
    """Range of log tan(eta) in which modes of states are decided, for their smallest and largest variance.

    A mode of variance v is decided near tan(eta) = sqrt(v) (algorithm.md section 11). The range ends a factor of 4 beyond the
    smallest and the largest.
    """
    smallest, largest = variances
    return math.log(smallest) / 2 - math.log(4), math.log(largest) / 2 + math.log(4)


def timesteps(kind: str, batch: int, seed: int, step: int, variances: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Timesteps (batch,) in [0, 1000) of a whole batch, whatever the number of processes.

    Args:
        kind: "stratified": 1000 (i + r_i) / batch with uniform r_i, shuffled; "uniform": independent; "integer": independent
            integers; "antithetic": pairs of integers t, 999 - t; "straight": tan(eta) = s / (1 - s) with stratified s, as on
            the straight path (1 - s) x0 + s eps, which is the arc but for a factor; "spectrum": half of them stratified, the
            others uniform in log tan(eta) over :func:`decisive`.
        batch: volumes of the batch.
        seed: seed of the run.
        step: number of the step.
        variances: smallest and largest variance of the states' modes, for "spectrum".
    """
    generator = rng(seed, "timesteps", step)
    if kind == "integer":
        return torch.randint(TIMESTEPS, (batch,), generator=generator).float()
    if kind == "antithetic":
        half = torch.randint(TIMESTEPS, ((batch + 1) // 2,), generator=generator).float()
        return torch.cat([half, TIMESTEPS - 1 - half])[:batch]
    u = torch.rand(batch, generator=generator, dtype=torch.float64)
    if kind in ("stratified", "straight", "spectrum"):
        u = (torch.randperm(batch, generator=generator) + u) / batch
    if kind == "straight":
        u = torch.atan2(u, 1 - u) / (math.pi / 2)
    if kind == "spectrum":
        low, high = decisive(variances)
        share = (low + (2 * u - 1) * (high - low)).exp().atan() / (math.pi / 2)
        u = torch.where(u < 0.5, 2 * u, share)
    return (u * TIMESTEPS).float().clamp_(max=TIMESTEPS * (1 - 2**-24))


def error(estimates: Sequence[Tensor], truths: Sequence[Tensor], scales: Sequence[Tensor] | None = None) -> Tensor:
    """Mean squared error (B,) of planes (B, C, rows, columns), divided by ``scales``, if any.

    The three planes have equal weight, whatever their sizes.
    """
    squares = [(e.to(t.dtype) - t).square() for e, t in zip(estimates, truths, strict=True)]
    if scales is not None:
        squares = [q / s.to(q).square().clamp(min=1e-6) for q, s in zip(squares, scales, strict=True)]
    return torch.stack([q.mean((1, 2, 3)) for q in squares]).mean(0)


def pack(planes: Sequence[Tensor]) -> Tensor:
    """States (B, M) with the three planes (B, C, rows, columns) of each volume in one row."""
    return torch.cat([p.flatten(1) for p in planes], 1)


def unpack(flat: Tensor, channels: int, texels: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Planes (B, C, rows, columns) of states (B, M): the inverse of :func:`pack`."""
    parts = flat.split([channels * h * w for h, w in texels], 1)
    return [p.unflatten(1, (channels, h, w)) for p, (h, w) in zip(parts, texels, strict=True)]


def flip(planes: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Planes of the volume mirrored along x (0), y (1) or z (2). Exact, since the decoder takes no coordinates."""
    return [
        plane.flip(plane.dim() - 2 + axes.index(axis)) if axis in axes else plane
        for plane, axes in zip(planes, PLANE_AXES, strict=True)
    ]
