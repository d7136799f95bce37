"""Training objective of stage 1, minimised over planes and decoder (algorithm.md sections 6 and 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.config import AutodecoderConfig
from tcam_diff.autodecoder.perceptual import Perceptual, ssim2d
from tcam_diff.autodecoder.planes import normalise, texel_noise, total_variation
from tcam_diff.data.store import unit
from tcam_diff.errors import UserError
from tcam_diff.evaluation.metrics import psnr_of_mse
from tcam_diff.training.rng import rng, seed_of
from tcam_ext import _C
from tcam_ext.reference import linear_taps

#: Most outputs of the decoder.
MOST_CHANNELS = 16

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Lattice:
    """Voxels start + stride (i, j, k)."""

    start: Size
    stride: int


Region = Box | Lattice


@dataclass
class Visit:
    """An object's part in one step: its voxels and the seed of its noise."""

    object: int | str
    regions: list[Region]
    noise_seed: int
    active: bool = True  # False: without weight in the loss
    features: list[Box] = field(default_factory=list)  # slices for SSIM and LPIPS
    targets: list[Tensor] = field(default_factory=list)  # (1, channels, h, w, d) for each region, then for each feature slice

    @property
    def voxels(self) -> int:
        """Number of voxels in the regions."""
        return sum(t.numel() // t.shape[1] for t in self.targets[: len(self.regions)])


def compute_dtype(config: AutodecoderConfig, device: torch.device | None = None) -> torch.dtype:
    """Type of the products on a device, by default a CPU."""
    if config.compute_dtype == "auto":
        fast = _C.cpu_bf16_is_fast() if device is None or device.type == "cpu" else True
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[config.compute_dtype]


def parameter_dtype(config: AutodecoderConfig) -> torch.dtype:
    """Type of planes and weights."""
    return torch.float64 if config.compute_dtype == "float64" else torch.float32


def plane_texels(config: AutodecoderConfig, shape: Sequence[int]) -> Size:
    """Texels along x, y, z of the planes of a volume of ``shape`` voxels."""
    if config.plane_size is None:
        x, y, z = (max(1, (n + 1) // 2) for n in shape)
        return x, y, z
    if isinstance(config.plane_size, int):
        return (config.plane_size,) * 3
    return config.plane_size


def make_decoder(config: AutodecoderConfig, channels: int) -> tcam_ext.TriplaneDecoder:
    """Initial decoder with ``channels`` outputs, 1 to 16. Its weights depend on the configuration's seed alone."""
    if not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(f"channels: expected 1 to {MOST_CHANNELS} outputs of the decoder, got {channels}")
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
    """Matrix (voxels, texels) of linear interpolation along an axis. Voxels and texels are cells of one field of view."""
    below, above, w_below, w_above = linear_taps(0, voxels, voxels, texels, False, "border")
    matrix = torch.zeros(voxels, texels)
    row = torch.arange(voxels)
    matrix.index_put_((row, below), w_below.float(), accumulate=True)
    return matrix.index_put_((row, above), w_above.float(), accumulate=True)


class TrainingObjective:
    """Loss of volumes of one size, without state.

    Args:
        config: model and loss.
        size: voxels along x, y, z.
        device: device of planes and decoder, by default the CPU.
        maps: number of label maps, the last outputs of the decoder.

    Raises:
        UserError: ``label_weight`` is positive, and there are no label maps.
    """

    def __init__(self, config: AutodecoderConfig, size: Size, device: torch.device | None = None, maps: int = 0) -> None:
        if config.label_weight and not maps:
            raise UserError(
                f"label_weight={config.label_weight:g}: the volumes have no label maps; prepare them with label_maps, or take 0"
            )
        self.config, self.size, self.maps = config, size, maps
        self.device = device or torch.device("cpu")
        self.compute = compute_dtype(config, self.device)
        self.texels = plane_texels(config, size)
        dtype = parameter_dtype(config)
        self.interpolation = [interpolation(n, m).to(self.device, dtype) for n, m in zip(size, self.texels, strict=True)]
        self.perceptual: Perceptual | None = None
        if config.perceptual_weight:
            self.perceptual = Perceptual(config.perceptual_weights, config.perceptual).to(self.device)

    # ---- visits ------------------------------------------------------------------------

    def visit(self, name: int | str, count: int) -> Visit:
        """Visit number ``count`` of an object, without targets. Voxels and noise depend on seed, name and count alone."""
        c = self.config
        generator = rng(c.seed, "region", name, count)
        if c.region == "lattice" and c.stride > 1:
            block, at = divmod(count, c.stride**3)  # a block of visits uses every start once
            order = torch.randperm(c.stride**3, generator=rng(c.seed, "lattice", name, block))
            o, s = int(order[at]), c.stride
            x, y, z = (p % n for p, n in zip((o // (s * s), o // s % s, o % s), self.size, strict=True))
            regions: list[Region] = [Lattice((x, y, z), s)]
        elif c.region == "slices":
            regions = list(self._slices(c.slices, generator))
        else:
            regions = [self._box(generator)]
        features = self._slices(c.feature_slices, generator) if c.ssim_weight or c.perceptual_weight else []
        return Visit(name, regions, seed_of(c.seed, "noise", name, count), features=features)

    def read(self, visit: Visit, volume: np.ndarray) -> Visit:
        """Set the targets of a visit to its voxels of ``volume`` (channels, H, W, D)."""
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

    def _box(self, generator: torch.Generator) -> Box:
        """The whole volume, or a random box of about ``voxels_per_step`` voxels in the volume's proportions."""
        voxels = math.prod(self.size)
        if self.config.region != "box" or voxels <= self.config.voxels_per_step:
            x, y, z = ((0, n) for n in self.size)
            return x, y, z
        scale = (self.config.voxels_per_step / voxels) ** (1 / 3)
        box = []
        for n in self.size:
            edge = max(1, round(n * scale))
            lo = int(torch.randint(n - edge + 1, (), generator=generator))
            box.append((lo, lo + edge))
        return box[0], box[1], box[2]

    def _slices(self, each: int, generator: torch.Generator) -> list[Box]:
        """Random slices, ``each`` along every axis."""
        return [
            self._slice(axis, at)
            for axis, n in enumerate(self.size)
            for at in torch.randint(n, (each,), generator=generator).tolist()
        ]

    def _slice(self, axis: int, at: int) -> Box:
        x, y, z = ((at, at + 1) if a == axis else (0, n) for a, n in enumerate(self.size))
        return x, y, z

    # ---- the loss ----------------------------------------------------------------------

    def losses(
        self, raw: Sequence[Tensor], decoder: tcam_ext.TriplaneDecoder, visits: Sequence[Visit], noise: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses data + tv_weight TV + label_weight (CE + Dice) + ssim_weight (1 - SSIM) + perceptual_weight LPIPS.

        The data term is computed with noise, SSIM and LPIPS on decoded slices, with noise if ``feature_noise`` is set. Objects
        are decoded one after another.

        Args:
            raw: planes (B, C, rows, columns) before normalisation, one row per visit.
            decoder: the decoder.
            visits: B visits with targets.
            noise: whether to add noise.

        Returns:
            Losses (B,), and their terms (B,) by name, without gradients.
        """
        c = self.config
        planes = normalise(raw, c.norm)
        objects = list(zip((list(o) for o in zip(*(p.split(1) for p in planes), strict=True)), visits, strict=True))
        terms = {"data": torch.stack([self._data(o, decoder, visit, noise) for o, visit in objects])}
        total = terms["data"]
        if c.tv_weight:
            terms["tv"] = total_variation(planes, c.tv)
            total = total + c.tv_weight * terms["tv"]
        if c.label_weight:
            terms["labels"] = torch.stack([self._labels(o, decoder, visit, noise) for o, visit in objects])
            total = total + c.label_weight * terms["labels"]
        if c.ssim_weight or c.perceptual_weight:
            features = [self._features(o, decoder, visit, noise and c.feature_noise) for o, visit in objects]
            for name, weight in (("ssim", c.ssim_weight), ("perceptual", c.perceptual_weight)):
                if weight:
                    terms[name] = torch.stack([f[name] for f in features])
                    total = total + weight * terms[name]
        return total, {name: t.detach() for name, t in terms.items()}

    def _data(self, planes: list[Tensor], decoder: tcam_ext.TriplaneDecoder, visit: Visit, noise: bool) -> Tensor:
        c = self.config
        planes, options = self._noisy(planes, visit, noise, isinstance(visit.regions[0], Lattice))
        options |= {"loss": c.loss, "beta": c.beta, "compute_dtype": self.compute}
        total = planes[0].new_zeros(())
        for region, target in zip(visit.regions, visit.targets, strict=False):
            target = target.to(self.device, non_blocking=True)
            sampled, size, box = self._sampled(planes, region, target)
            total = total + decoder.loss(sampled, target, size, box=box, **options)
        return total / len(visit.regions)

    def _labels(self, planes: list[Tensor], decoder: tcam_ext.TriplaneDecoder, visit: Visit, noise: bool) -> Tensor:
        """Cross-entropy plus Dice loss of the label maps, each a probability of its own, means over maps and regions."""
        planes, options = self._noisy(planes, visit, noise, isinstance(visit.regions[0], Lattice))
        total = planes[0].new_zeros(())
        for region, target in zip(visit.regions, visit.targets, strict=False):
            want = unit(target[:, -self.maps :].to(self.device, non_blocking=True))
            sampled, size, box = self._sampled(planes, region, want)
            got = decoder(sampled, size, box=box, compute_dtype=self.compute, **options)
            p, t = got[0, -self.maps :].float().clamp(1e-6, 1 - 1e-6).flatten(1), want[0].float().flatten(1)
            dice = (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
            total = total + torch.nn.functional.binary_cross_entropy(p, t) + (1 - dice).mean()
        return total / len(visit.regions)

    def _noisy(
        self, planes: list[Tensor], visit: Visit, noise: bool, lattice: bool = False
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Planes and options of the decoder with the noise of a visit, for boxes or for planes sampled at a lattice."""
        c = self.config
        if not (noise and c.noise_std):
            return planes, {}
        if c.noise_mode == "point":
            return planes, {"noise_std": c.noise_std, "noise_seed": visit.noise_seed}
        if lattice:  # planes sampled at the lattice have one texel per voxel, so no interpolation reduces the noise
            return planes, {"noise_std": c.noise_std, "noise_seed": visit.noise_seed, "noise_mode": "texel"}
        return texel_noise(planes, c.noise_std, self.size, visit.noise_seed), {}

    def _sampled(self, planes: list[Tensor], region: Region, target: Tensor) -> tuple[list[Tensor], Sequence[int], Box | None]:
        """Planes, size and box with which a decoder gives the voxels of a region."""
        if isinstance(region, Lattice):
            return self._lattice(planes, region), target.shape[2:], None
        return planes, self.size, region

    def _lattice(self, planes: list[Tensor], at: Lattice) -> list[Tensor]:
        """Planes that decode to the voxels of a lattice.

        Planes sampled at the rows and columns of the lattice have one texel per voxel, so they are decoded at their own
        resolution without further interpolation. Texels all over the planes get gradients.
        """
        x, y, z = (m[o :: at.stride] for o, m in zip(at.start, self.interpolation, strict=True))
        return [x @ planes[0] @ y.T, y @ planes[1] @ z.T, x @ planes[2] @ z.T]

    def _features(
        self, planes: list[Tensor], decoder: tcam_ext.TriplaneDecoder, visit: Visit, noise: bool
    ) -> dict[str, Tensor]:
        """Losses of the feature slices of a visit, as far as they have weights: mean 1 - SSIM, and the sum over the three axes
        of the mean perceptual distance of their slices (algorithm.md 7.3)."""
        planes, options = self._noisy(planes, visit, noise)
        losses: dict[str, list[Tensor]] = {"ssim": [], "perceptual": []}
        for box, target in zip(visit.features, visit.targets[len(visit.regions) :], strict=True):
            axis = next(a for a, (lo, hi) in enumerate(box) if hi - lo == 1)
            want = unit(target.to(self.device, non_blocking=True))
            got = decoder(planes, self.size, box=box, compute_dtype=self.compute, **options).to(want.dtype)
            got, want = (v.squeeze(2 + axis).transpose(0, 1) for v in (got, want))  # channels as a batch
            if self.config.ssim_weight:
                losses["ssim"].append(1 - ssim2d(got, want))
            if self.perceptual is not None:
                losses["perceptual"].append(self.perceptual(got, want))
        means = {name: torch.stack(values).mean() for name, values in losses.items() if values}
        return {name: 3 * mean if name == "perceptual" else mean for name, mean in means.items()}

    # ---- evaluation --------------------------------------------------------------------

    def check_boxes(self) -> list[Box]:
        """Nine evenly placed slices, three along each axis."""
        return [self._slice(a, min(int(part * n), n - 1)) for a, n in enumerate(self.size) for part in (0.3, 0.5, 0.7)]

    @torch.no_grad()
    def psnr(
        self,
        planes: Sequence[Tensor],
        decoder: tcam_ext.TriplaneDecoder,
        volume: np.ndarray,
        boxes: Sequence[Box] | None = None,
    ) -> float:
        """PSNR (dB) of the images of decoded planes without noise, clamped to [0, 1]. Label maps do not count.

        Args:
            planes: (1, C, rows, columns), normalised.
            decoder: the decoder.
            volume: target (channels, H, W, D) as in a store.
            boxes: voxels to compare; None: the whole volume.
        """
        squared, voxels = 0.0, 0
        for box in self.slabs() if boxes is None else boxes:
            want = unit(self._read(volume, box).to(self.device))
            want = want[:, : want.shape[1] - self.maps]
            got = decoder(planes, self.size, box=box, compute_dtype=self.compute)[:, : want.shape[1]].clamp(0, 1)
            squared += float((got - want).double().square().sum())
            voxels += want.numel()
        return psnr_of_mse(squared / voxels)

    def slabs(self) -> list[Box]:
        """Boxes of about four million voxels that cover the volume."""
        h, w, d = self.size
        thick = max(1, (1 << 22) // (w * d))
        return [((x, min(x + thick, h)), (0, w), (0, d)) for x in range(0, h, thick)]
