"""What stage 1 minimises over planes and decoder: one visit of some objects (algorithm.md sections 6 and 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.config import ObjectiveConfig
from tcam_diff.autodecoder.perceptual import Perceptual, ssim2d
from tcam_diff.autodecoder.planes import normalise, texel_noise, total_variation
from tcam_diff.evaluation.metrics import psnr_of_mse
from tcam_diff.training.rng import rng, seed_of
from tcam_ext import _C
from tcam_ext.reference import linear_taps

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Lattice:
    """The voxels start + stride (i, j, k)."""

    start: Size
    stride: int


Region = Box | Lattice


@dataclass
class Visit:
    """An object, the voxels that a step looks at, and the seeds of its noise."""

    object: int | str
    regions: list[Region]
    noise_seed: int
    features: list[Box] = field(default_factory=list)  # slices, for SSIM and LPIPS
    targets: list[Tensor] = field(default_factory=list)  # (1, channels, h, w, d), one a region, then one a feature slice

    @property
    def voxels(self) -> int:
        return sum(t.numel() // t.shape[1] for t in self.targets[: len(self.regions)])


def compute_dtype(config: ObjectiveConfig, device: torch.device | None = None) -> torch.dtype:
    """Of the products."""
    if config.compute_dtype == "auto":
        fast = _C.cpu_has_bf16() if device is None or device.type == "cpu" else True
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[config.compute_dtype]


def parameter_dtype(config: ObjectiveConfig) -> torch.dtype:
    return torch.float64 if config.compute_dtype == "float64" else torch.float32


def plane_texels(config: ObjectiveConfig, shape: Sequence[int]) -> Size:
    """Texels along x, y, z of a volume's planes."""
    if config.plane_size is None:
        x, y, z = (max(1, (n + 1) // 2) for n in shape)
        return x, y, z
    if isinstance(config.plane_size, int):
        return (config.plane_size,) * 3
    return config.plane_size


def make_decoder(config: ObjectiveConfig, channels: int) -> tcam_ext.TriplaneDecoder:
    """The decoder at the start of a run: a function of the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "decoder"))
        return tcam_ext.TriplaneDecoder(
            config.channels,
            config.widths,
            channels,
            activation=config.activation,
            output_activation=config.output_activation,
            dtype=parameter_dtype(config),
        )


def interpolation(voxels: int, texels: int) -> Tensor:
    """(voxels, texels): the linear interpolation along an axis, voxels and texels being cells of the same field of view."""
    below, above, w_below, w_above = linear_taps(0, voxels, voxels, texels, False, "border")
    matrix = torch.zeros(voxels, texels)
    row = torch.arange(voxels)
    matrix.index_put_((row, below), w_below.float(), accumulate=True)
    return matrix.index_put_((row, above), w_above.float(), accumulate=True)


class Objective:
    """The loss of volumes of one size; has no state."""

    def __init__(self, config: ObjectiveConfig, size: Size, device: torch.device | None = None) -> None:
        self.config, self.size = config, size
        self.device = device or torch.device("cpu")
        self.compute = compute_dtype(config, self.device)
        self.texels = plane_texels(config, size)
        dtype = parameter_dtype(config)
        self.interpolation = [interpolation(n, m).to(self.device, dtype) for n, m in zip(size, self.texels, strict=True)]
        self.perceptual = Perceptual(config.perceptual_weights).to(self.device) if config.perceptual_weight else None

    # ---- what to look at ---------------------------------------------------------------

    def visit(self, name: int | str, count: int) -> Visit:
        """Visit ``count`` of an object: the same voxels and the same noise whenever and wherever it is asked for."""
        c = self.config
        chosen = rng(c.seed, "region", name, count)
        if c.region == "lattice" and c.stride > 1:
            block, at = divmod(count, c.stride**3)  # every start comes once before one comes again
            order = torch.randperm(c.stride**3, generator=rng(c.seed, "lattice", name, block))
            o, s = int(order[at]), c.stride
            x, y, z = (p % n for p, n in zip((o // (s * s), o // s % s, o % s), self.size, strict=True))
            regions: list[Region] = [Lattice((x, y, z), s)]
        elif c.region == "slices":
            regions = list(self._slices(c.slices, chosen))
        else:
            regions = [self._box(chosen)]
        features = self._slices(c.feature_slices, chosen) if c.ssim_weight or c.perceptual_weight else []
        return Visit(name, regions, seed_of(c.seed, "noise", name, count), features)

    def read(self, visit: Visit, volume: np.ndarray) -> Visit:
        """Fill in what (channels, H, W, D) holds there."""
        visit.targets = [self._read(volume, r) for r in [*visit.regions, *visit.features]]
        return visit

    def _read(self, volume: np.ndarray, region: Region) -> Tensor:
        if isinstance(region, Lattice):
            x, y, z = region.start
            s = region.stride
            part = volume[:, x::s, y::s, z::s]
        else:
            (x0, x1), (y0, y1), (z0, z1) = region
            part = volume[:, x0:x1, y0:y1, z0:z1]
        target = torch.from_numpy(np.array(part, order="C")).unsqueeze(0)
        return target.pin_memory() if self.device.type == "cuda" else target

    def _box(self, chosen: torch.Generator) -> Box:
        """The whole volume, or a random box of about ``voxels_per_step`` voxels in the volume's proportions."""
        voxels = math.prod(self.size)
        if self.config.region != "box" or voxels <= self.config.voxels_per_step:
            x, y, z = ((0, n) for n in self.size)
            return x, y, z
        scale = (self.config.voxels_per_step / voxels) ** (1 / 3)
        box = []
        for n in self.size:
            edge = max(1, round(n * scale))
            lo = int(torch.randint(n - edge + 1, (), generator=chosen))
            box.append((lo, lo + edge))
        return box[0], box[1], box[2]

    def _slices(self, each: int, chosen: torch.Generator) -> list[Box]:
        found = []
        for axis, n in enumerate(self.size):
            for at in torch.randint(n, (each,), generator=chosen).tolist():
                box = [(0, m) for m in self.size]
                box[axis] = (at, at + 1)
                found.append((box[0], box[1], box[2]))
        return found

    # ---- the loss ----------------------------------------------------------------------

    def losses(
        self, raw: Sequence[Tensor], decoder: tcam_ext.TriplaneDecoder, visits: Sequence[Visit], noise: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses of the objects of a visit, and their terms without gradients. ``raw``: planes (B, C, rows, columns).

        data + tv_weight TV + ssim_weight (1 - SSIM) + perceptual_weight LPIPS: the first with noise, the last two on decoded
        slices without. One object is decoded after another.
        """
        c = self.config
        planes = normalise(raw, c.norm)
        each = [list(own) for own in zip(*(p.split(1) for p in planes), strict=True)]
        terms = {"data": torch.stack([self._data(own, decoder, visit, noise) for own, visit in zip(each, visits, strict=True)])}
        total = terms["data"]
        if c.tv_weight:
            terms["tv"] = total_variation(planes, c.tv)
            total = total + c.tv_weight * terms["tv"]
        if c.ssim_weight or c.perceptual_weight:
            seen = [self._features(own, decoder, visit) for own, visit in zip(each, visits, strict=True)]
            for name, weight in (("ssim", c.ssim_weight), ("perceptual", c.perceptual_weight)):
                if weight:
                    terms[name] = torch.stack([s[name] for s in seen])
                    total = total + weight * terms[name]
        return total, {name: t.detach() for name, t in terms.items()}

    def _data(self, planes: list[Tensor], decoder: tcam_ext.TriplaneDecoder, visit: Visit, noise: bool) -> Tensor:
        c = self.config
        options: dict[str, Any] = {"loss": c.loss, "beta": c.beta, "compute_dtype": self.compute}
        if noise and c.noise_std and c.noise_mode == "point":
            options |= {"noise_std": c.noise_std, "noise_seed": visit.noise_seed}
        elif noise and c.noise_std and isinstance(visit.regions[0], Lattice):
            # Planes sampled at the lattice have a texel a voxel: nothing interpolates, so nothing shrinks the noise.
            options |= {"noise_std": c.noise_std, "noise_seed": visit.noise_seed, "noise_mode": "texel"}
        elif noise and c.noise_std:
            planes = texel_noise(planes, c.noise_std, self.size, visit.noise_seed)
        total = planes[0].new_zeros(())
        for region, target in zip(visit.regions, visit.targets, strict=False):
            target = target.to(self.device, non_blocking=True)
            if isinstance(region, Lattice):
                sampled = self._lattice(planes, region)
                total = total + decoder.loss(sampled, target, target.shape[2:], **options)
            else:
                total = total + decoder.loss(planes, target, self.size, box=region, **options)
        return total / len(visit.regions)

    def _lattice(self, planes: list[Tensor], at: Lattice) -> list[Tensor]:
        """Planes that decode to the voxels of a lattice. It is a dense grid of its own: planes sampled at its rows and columns
        have one texel a voxel, so decoding them at their own resolution interpolates nothing more. Every texel gets a gradient
        from all over the volume."""
        x, y, z = (m[o :: at.stride] for o, m in zip(at.start, self.interpolation, strict=True))
        return [x @ planes[0] @ y.T, y @ planes[1] @ z.T, x @ planes[2] @ z.T]

    def _features(self, planes: list[Tensor], decoder: tcam_ext.TriplaneDecoder, visit: Visit) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {"ssim": [], "perceptual": []}
        for box, target in zip(visit.features, visit.targets[len(visit.regions) :], strict=True):
            axis = next(a for a, (lo, hi) in enumerate(box) if hi - lo == 1)
            want = unit(target.to(self.device, non_blocking=True))
            got = decoder(planes, self.size, box=box, compute_dtype=self.compute).to(want.dtype)
            got, want = (v.squeeze(2 + axis).transpose(0, 1) for v in (got, want))  # channels as a batch
            if self.config.ssim_weight:
                found["ssim"].append(1 - ssim2d(got, want))
            if self.perceptual is not None:
                found["perceptual"].append(self.perceptual(got, want))
        return {name: torch.stack(values).mean() for name, values in found.items() if values}

    # ---- how good planes are -----------------------------------------------------------

    def check_boxes(self) -> list[Box]:
        """Nine evenly placed slices, three an axis."""
        boxes = []
        for axis in range(3):
            for part in (0.3, 0.5, 0.7):
                box = [(0, n) for n in self.size]
                at = min(int(part * self.size[axis]), self.size[axis] - 1)
                box[axis] = (at, at + 1)
                boxes.append((box[0], box[1], box[2]))
        return boxes

    @torch.no_grad()
    def psnr(
        self,
        planes: Sequence[Tensor],
        decoder: tcam_ext.TriplaneDecoder,
        volume: np.ndarray,
        boxes: Sequence[Box] | None = None,
    ) -> float:
        """Of normalised planes (1, C, rows, columns), without noise, output clamped; over the whole volume, or boxes."""
        squared, voxels = 0.0, 0
        for box in self.slabs() if boxes is None else boxes:
            want = unit(self._read(volume, box).to(self.device))
            got = decoder(planes, self.size, box=box, compute_dtype=self.compute).clamp(0, 1)
            squared += float((got - want).double().square().sum())
            voxels += want.numel()
        return psnr_of_mse(squared / voxels)

    def slabs(self) -> list[Box]:
        """The volume in pieces of some four million voxels."""
        h, w, d = self.size
        thick = max(1, (1 << 22) // (w * d))
        return [((x, min(x + thick, h)), (0, w), (0, d)) for x in range(0, h, thick)]


def unit(stored: Tensor) -> Tensor:
    """[0, 1] of what a store holds."""
    return stored.float() / 255 if stored.dtype == torch.uint8 else stored.float()
