"""Guidance of samples by known voxels, for example voxels outside a lesion, a coarse scan, or other modalities.

At an angle eta the error of the network's estimate x0 of the planes has a variance of about sin^2(eta). The estimate that also
takes the known voxels y into account minimises over z

    |m (A decode(z) - y)|^2 / (2 s^2)  +  |z - x0|^2 / (2 sin^2(eta))

where A averages over the cells of a coarser grid, m is the mask of known voxels and s is their standard deviation. A few steps
of conjugate gradients move x0 towards this minimum, and the noise is changed so that cos(eta) x0 + sin(eta) eps stays the same.
As eta goes to 0 the second term keeps z at x0, so the drift stays finite. The method is DiffPIR's proximal step with PiGDM's
variance, on planes instead of voxels.
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
        known: voxels (channels, h, w, d) in [0, 1], of the model's size divided by ``factor``; arbitrary if unknown.
        mask: shape of ``known``, 1 for known voxels and 0 for others; None: all are known.
        factor: voxels of the model's volume along x, y, z per known voxel, which is their mean.
        noise: standard deviation s of the known voxels.
        iterations: iterations of conjugate gradients at every evaluation of the network.
        provenance: origin of the voxels, for the samples' JSON files.
    """

    known: Tensor
    mask: Tensor | None = None
    factor: tuple[int, int, int] = (1, 1, 1)
    noise: float = 0.02
    iterations: int = 5
    provenance: dict[str, Any] = field(default_factory=dict)

    def bind(self, model: TriplaneDiffusion) -> Guided:
        """Correction of a model's estimates. Raises ValueError if the shapes do not fit the model."""
        info = model.geometry.info
        shape = (info.channels, *(n // f for n, f in zip(info.shape, self.factor, strict=True)))
        if tuple(self.known.shape) != shape or any(n % f for n, f in zip(info.shape, self.factor, strict=True)):
            raise ValueError(f"known: expected {shape}, the model's volumes over {self.factor}, got {tuple(self.known.shape)}")
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
    """Read known voxels from files. Axes are permuted and flipped to the model's orientation.

    Args:
        model: the model.
        known: volume on the model's grid, or on one that is coarser by integer factors.
        mask: volume on the grid of ``known``, nonzero for known voxels; None: all.
        channels: known channels, for example "0,2"; None: all.
        noise: standard deviation of the known voxels in a range of 1.
        intensity: physical values of ``known`` at 0 and 1; None: those of the model.

    Raises:
        UserError: a file cannot be read or does not fit, or no voxel is known.
    """
    info = model.geometry.info.of_images()
    volume = oriented(read_volume(known), info.affine)
    shape = volume.info.shape
    if any(n % m for n, m in zip(info.shape, shape, strict=True)) or volume.info.channels != info.channels:
        raise UserError(
            f"{known}: expected {info.channels} channel(s) of {size_text(info.shape)} voxels or integer fractions, got "
            f"{volume.info.channels} of {size_text(shape)}; use a volume with the preprocessing of the training data"
        )
    factor = tuple(n // m for n, m in zip(info.shape, shape, strict=True))
    weights = np.ones_like(volume.data)
    if channels is not None:
        try:
            kept = {int(c) for c in channels.split(",")}
        except ValueError:
            kept = {-1}
        if not kept <= set(range(info.channels)):
            raise UserError(f"--known-channels: expected numbers from 0 to {info.channels - 1} with commas, got {channels}")
        weights[[c for c in range(info.channels) if c not in kept]] = 0
    if mask is not None:
        mask_volume = oriented(read_volume(mask), info.affine)
        if not np.allclose(mask_volume.info.affine, volume.info.affine, atol=0.01 * max(volume.info.spacing)):
            raise UserError(f"{mask}: its affine is not that of {known}: save the mask on the grid of that volume")
        if mask_volume.info.shape != shape or mask_volume.info.channels not in (1, info.channels):
            raise UserError(
                f"{mask}: expected the {size_text(shape)} voxels of {known}, got {size_text(mask_volume.info.shape)}"
            )
        weights = weights * (mask_volume.data != 0)
    if not weights.any():
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
    maps = torch.zeros(model.geometry.info.channels - info.channels, *shape)  # label maps are unknown
    known_values, mask_values = (torch.cat([values, maps]) for values in (unit, torch.from_numpy(weights)))
    return ImageGuidance(known_values, mask_values, factor, noise, provenance=provenance)  # type: ignore[arg-type]


class Guided:
    """Correction of a model's estimates by known voxels."""

    def __init__(self, guidance: ImageGuidance, model: TriplaneDiffusion) -> None:
        self.guidance, self.model = guidance, model
        device = model.device
        mask = torch.ones_like(guidance.known) if guidance.mask is None else guidance.mask
        self.mask = mask.to(device, torch.float32)
        self.known = torch.where(self.mask > 0, guidance.known.to(device, torch.float32), 0)
        self.box = self._box()

    def _box(self) -> list[tuple[int, int]]:
        """Smallest box with all known voxels, in voxels of the model's volume."""
        known = self.mask.amax(0) > 0
        box = []
        for axis, f in enumerate(self.guidance.factor):
            other = tuple(a for a in range(3) if a != axis)
            at = known.any(other[1]).any(other[0]).nonzero().flatten().tolist()
            box.append((at[0] * f, (at[-1] + 1) * f) if at else (0, f))
        return box

    def misfit(self, planes: Sequence[Tensor]) -> Tensor:
        """Sum of the squared differences (B,) of decoded planes (B, C, rows, columns) from the known voxels."""
        return self._difference(planes).square().sum(1)

    def _difference(self, planes: Sequence[Tensor]) -> Tensor:
        """Differences (B, n) of decoded planes from the voxels of the box, 0 for unknown ones."""
        f = self.guidance.factor
        m = self.model
        volume = m.decoder(list(planes), m.geometry.info.shape, box=self.box, compute_dtype=m.decoding).float()
        if f != (1, 1, 1):
            volume = F.avg_pool3d(volume, f)
        part = (slice(None), *(slice(lo // n, hi // n) for (lo, hi), n in zip(self.box, f, strict=True)))
        return ((volume - self.known[part]) * self.mask[part]).flatten(1)

    def __call__(self, estimate: Estimate) -> Estimate:
        """Correct an estimate. The point x stays the same."""
        sine, cosine = math.sin(estimate.eta), math.cos(estimate.eta)
        if sine < 1e-6:
            return estimate
        x0 = self._minimise(estimate.x0.detach(), sine)
        return Estimate(estimate.x, estimate.noise - cosine / sine * (x0 - estimate.x0), x0, estimate.eta)

    def _minimise(self, before: Tensor, sine: float) -> Tensor:
        """Minimise by conjugate gradients (Polak-Ribiere) from ``before`` (B, M), independently for each sample.

        Along a direction d the difference r is linearised with its slope J d from a finite difference, which gives the step

            -g d / (|J d|^2 / s^2 + |d|^2 / sin^2(eta)).

        If a step makes the objective larger, the next one goes a quarter as far from the best point.
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
    """Inner products (B, 1) of rows (B, M)."""
    return (a * b).sum(1, keepdim=True)
