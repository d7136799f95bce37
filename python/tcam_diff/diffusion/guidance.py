"""Sampling of volumes that agree with known voxels: what is outside a lesion, a coarse scan, the other modalities.

At an angle eta the network's estimate x0 of the planes is what it knows of them; its error has a variance of about sin^2(eta),
that of planes of unit energy seen through the noise. The estimate that also knows the voxels y is the minimum over z of

    |m (A decode(z) - y)|^2 / (2 s^2)  +  |z - x0|^2 / (2 sin^2(eta))

where A averages over cells (1: none) and m marks what is known. A few steps of Adam take x0 towards it, through the gradient
of the fused decoder; the noise is then moved so that cos(eta) x0 + sin(eta) eps stays what it was. As eta goes to 0 the second
term holds z fast, so the drift stays finite. This is DiffPIR's proximal step with PiGDM's variance, on planes, not on voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.process import Estimate


@dataclass
class ImageGuidance:
    """Known voxels of a volume.

    Args:
        known: (channels, h, w, d) in [0, 1]: the volume of the model's size divided by ``factor``; anything where unknown.
        mask: like ``known``, 1 where it is known; None: everywhere.
        factor: voxels of the model's volume along x, y, z that a known one is the mean of.
        noise: s, the standard deviation of known voxels: how closely they are followed.
        iterations: steps of Adam at every evaluation of the network.
        rate: of those steps, times sin(eta).
        provenance: for the record.
    """

    known: Tensor
    mask: Tensor | None = None
    factor: tuple[int, int, int] = (1, 1, 1)
    noise: float = 0.02
    iterations: int = 5
    rate: float = 0.1
    provenance: dict[str, Any] = field(default_factory=dict)

    def bind(self, model: TriplaneDiffusion) -> Guided:
        """Raises ValueError where the sizes are not the model's."""
        g = model.geometry
        want = (g.outputs, *(n // f for n, f in zip(g.shape, self.factor, strict=True)))
        if tuple(self.known.shape) != want or any(n % f for n, f in zip(g.shape, self.factor, strict=True)):
            raise ValueError(f"known: expected {want}, the model's volumes over {self.factor}, got {tuple(self.known.shape)}")
        if self.mask is not None and self.mask.shape != self.known.shape:
            raise ValueError(f"mask: expected {tuple(self.known.shape)}, as known, got {tuple(self.mask.shape)}")
        return Guided(self, model)


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
        f = self.guidance.factor
        m = self.model
        volume = m.decoder(list(planes), m.geometry.shape, box=self.box, compute_dtype=m.decoding).float()
        if f != (1, 1, 1):
            volume = F.avg_pool3d(volume, f)
        part = (slice(None), *(slice(lo // n, hi // n) for (lo, hi), n in zip(self.box, f, strict=True)))
        error = (volume - self.known[part]) * self.mask[part]
        return error.square().sum((1, 2, 3, 4))

    def __call__(self, estimate: Estimate) -> Estimate:
        g = self.guidance
        sine, cosine = math.sin(estimate.eta), math.cos(estimate.eta)
        if sine < 1e-6:
            return estimate
        before = estimate.x0.detach()
        with torch.enable_grad():
            z = before.clone().requires_grad_()
            adam = torch.optim.Adam([z], lr=g.rate * sine)
            for _ in range(g.iterations):
                prior = (z - before).square().sum() / (2 * sine**2)
                data = self.misfit(self.model.planes(z)).sum() / (2 * g.noise**2)
                (z.grad,) = torch.autograd.grad(prior + data, z)
                adam.step()
        x0 = z.detach()
        return Estimate(estimate.x, estimate.noise - cosine / sine * (x0 - before), x0, estimate.eta)
