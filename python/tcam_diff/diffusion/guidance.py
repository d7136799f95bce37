"""Sampling of volumes that agree with known voxels: what is outside a lesion, a coarse scan, the other modalities.

At an angle eta the network's estimate x0 of the planes is what it knows of them; its error has a variance of about sin^2(eta),
that of planes of unit energy seen through the noise. The estimate that also knows the voxels y is the minimum over z of

    |m (A decode(z) - y)|^2 / (2 s^2)  +  |z - x0|^2 / (2 sin^2(eta))

where A averages over cells (1: none) and m marks what is known. A few steps of conjugate gradients take x0 towards it, through
the gradient of the fused decoder; the noise is then moved so that cos(eta) x0 + sin(eta) eps stays what it was. As eta goes to
0 the second term holds z fast, so the drift stays finite. This is DiffPIR's proximal step with PiGDM's variance, on planes, not
on voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tcam_diff.data.readers import read_volume
from tcam_diff.data.volume import oriented
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.process import Estimate
from tcam_diff.errors import UserError
from tcam_diff.files import sha256
from tcam_diff.text import size_text


@dataclass
class ImageGuidance:
    """Known voxels of a volume.

    Args:
        known: (channels, h, w, d) in [0, 1]: the volume of the model's size divided by ``factor``; anything where unknown.
        mask: like ``known``, 1 where it is known; None: everywhere.
        factor: voxels of the model's volume along x, y, z that a known one is the mean of.
        noise: s, the standard deviation of known voxels: how closely they are followed.
        iterations: of conjugate gradients at every evaluation of the network.
        provenance: for the record.
    """

    known: Tensor
    mask: Tensor | None = None
    factor: tuple[int, int, int] = (1, 1, 1)
    noise: float = 0.02
    iterations: int = 5
    provenance: dict[str, Any] = field(default_factory=dict)

    def bind(self, model: TriplaneDiffusion) -> Guided:
        """Raises ValueError where the sizes are not the model's."""
        info = model.geometry.info
        want = (info.channels, *(n // f for n, f in zip(info.shape, self.factor, strict=True)))
        if tuple(self.known.shape) != want or any(n % f for n, f in zip(info.shape, self.factor, strict=True)):
            raise ValueError(f"known: expected {want}, the model's volumes over {self.factor}, got {tuple(self.known.shape)}")
        if self.mask is not None and self.mask.shape != self.known.shape:
            raise ValueError(f"mask: expected {tuple(self.known.shape)}, as known, got {tuple(self.mask.shape)}")
        return Guided(self, model)


def read_known(
    model: TriplaneDiffusion,
    known: Path,
    mask: Path | None = None,
    channels: str | None = None,
    noise: float = 0.02,
    intensity: tuple[float, float] | None = None,
) -> ImageGuidance:
    """Guidance by a file: on the model's grid, or coarser by whole factors; its axes are turned to the model's by its affine.
    Raises UserError naming the file."""
    info = model.geometry.info
    volume = oriented(read_volume(known), info.affine)
    shape = volume.info.shape
    fits = all(n % m == 0 for n, m in zip(info.shape, shape, strict=True))
    if not fits or volume.info.channels != info.channels:
        raise UserError(
            f"{known}: expected {info.channels} channel(s) of {size_text(info.shape)} voxels, or whole fractions of these, got "
            f"{volume.info.channels} of {size_text(shape)}; tcam prepare makes volumes of a data set alike"
        )
    factor = tuple(n // m for n, m in zip(info.shape, shape, strict=True))
    given = np.ones_like(volume.data)
    if channels is not None:
        try:
            chosen = {int(c) for c in channels.split(",")}
        except ValueError:
            chosen = {-1}
        if not chosen <= set(range(info.channels)):
            raise UserError(f"--known-channels: expected numbers from 0 to {info.channels - 1} with commas, got {channels}")
        given[[c for c in range(info.channels) if c not in chosen]] = 0
    if mask is not None:
        marked = oriented(read_volume(mask), info.affine)
        if not np.allclose(marked.info.affine, volume.info.affine, atol=0.01 * max(volume.info.spacing)):
            raise UserError(f"{mask}: its affine is not that of {known}: save the mask on the grid of that volume")
        if marked.info.shape != shape or marked.info.channels not in (1, info.channels):
            raise UserError(f"{mask}: expected the {size_text(shape)} voxels of {known}, got {size_text(marked.info.shape)}")
        given = given * (marked.data != 0)
    if not given.any():
        raise UserError(f"{mask or known}: nothing is known: the mask is 0 everywhere")
    provenance = {
        "known": sha256(known),
        "mask": None if mask is None else sha256(mask),
        "channels": channels,
        "noise": noise,
        "range": intensity,
    }
    scale = info if intensity is None else info.replaced(intensity=[intensity] * info.channels)
    unit = torch.from_numpy(scale.to_unit(volume.data))
    return ImageGuidance(unit, torch.from_numpy(given), factor, noise, provenance=provenance)  # type: ignore[arg-type]


class Guided:
    """The correction of a model's estimates."""

    def __init__(self, guidance: ImageGuidance, model: TriplaneDiffusion) -> None:
        self.guidance, self.model = guidance, model
        device = model.device
        mask = torch.ones_like(guidance.known) if guidance.mask is None else guidance.mask
        self.mask = mask.to(device, torch.float32)
        self.known = torch.where(self.mask > 0, guidance.known.to(device, torch.float32), 0)
        self.box = self._box()

    def _box(self) -> list[tuple[int, int]]:
        """The smallest that holds all that is known, in voxels of the model's volume."""
        held = self.mask.amax(0) > 0
        found = []
        for axis, f in enumerate(self.guidance.factor):
            other = tuple(a for a in range(3) if a != axis)
            at = held.any(other[1]).any(other[0]).nonzero().flatten().tolist()
            found.append((at[0] * f, (at[-1] + 1) * f) if at else (0, f))
        return found

    def misfit(self, planes: Sequence[Tensor]) -> Tensor:
        """(B,): the sum over known voxels of the squared difference, of normalised planes."""
        return self._difference(planes).square().sum(1)

    def _difference(self, planes: Sequence[Tensor]) -> Tensor:
        """(B, n): of every voxel of the box that holds all known ones; 0 where it is not known."""
        f = self.guidance.factor
        m = self.model
        volume = m.decoder(list(planes), m.geometry.info.shape, box=self.box, compute_dtype=m.decoding).float()
        if f != (1, 1, 1):
            volume = F.avg_pool3d(volume, f)
        part = (slice(None), *(slice(lo // n, hi // n) for (lo, hi), n in zip(self.box, f, strict=True)))
        return ((volume - self.known[part]) * self.mask[part]).flatten(1)

    def __call__(self, estimate: Estimate) -> Estimate:
        sine, cosine = math.sin(estimate.eta), math.cos(estimate.eta)
        if sine < 1e-6:
            return estimate
        x0 = self._minimise(estimate.x0.detach(), sine)
        return Estimate(estimate.x, estimate.noise - cosine / sine * (x0 - estimate.x0), x0, estimate.eta)

    def _minimise(self, before: Tensor, sine: float) -> Tensor:
        """Conjugate gradients (Polak-Ribiere) from ``before``, a direction and a step for every sample. Along a direction d the
        difference r is taken to be linear, its slope J d from r at a point a little ahead, which gives the step

            -g d / (|J d|^2 / s^2 + |d|^2 / sin^2(eta));

        where that made the objective larger, the next one is a quarter of it.
        """
        g = self.guidance
        z, best = before, before
        lowest = torch.full((len(before), 1), math.inf, device=before.device)
        gradient = direction = step = torch.zeros_like(before)
        for iteration in range(g.iterations + 1):
            last = iteration == g.iterations
            with torch.set_grad_enabled(not last):
                z = z.detach().requires_grad_(not last)
                r = self._difference(self.model.planes(z)) / g.noise
                value = (r.square().sum(1, keepdim=True) + ((z - before) / sine).square().sum(1, keepdim=True)) / 2
                slope = torch.zeros_like(z) if last else torch.autograd.grad(value.sum(), z)[0]
            z, r, value = z.detach(), r.detach(), value.detach()
            better = value < lowest
            best, lowest = torch.where(better, z, best), torch.where(better, value, lowest)
            if last:
                break
            change = _dot(slope, slope - gradient) / _dot(gradient, gradient).clamp_min(1e-30)
            ahead = -slope + (change.clamp_min(0) if iteration else 0) * direction
            ahead = torch.where(_dot(ahead, slope) < 0, ahead, -slope)
            direction, gradient = torch.where(better, ahead, direction), torch.where(better, slope, gradient)
            small = 0.05 * sine / direction.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
            with torch.no_grad():
                along = (self._difference(self.model.planes(z + small * direction)) / g.noise - r) / small
            curvature = _dot(along, along) + _dot(direction, direction) / sine**2
            step = torch.where(better, -_dot(direction, gradient) / curvature.clamp_min(1e-30), step / 4)
            z = best + step * direction
        return best


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, 1) of (B, M)."""
    return (a * b).sum(1, keepdim=True)
