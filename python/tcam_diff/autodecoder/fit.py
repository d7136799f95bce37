"""Fit planes and decoder to one volume (algorithm.md sections 6 and 7)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.config import FitConfig
from tcam_diff.autodecoder.planes import init_planes, rms_norm, texel_noise, total_variation
from tcam_ext import _C

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass
class Progress:
    """What a progress bar shows."""

    step: int
    steps: int
    loss: float
    psnr: float  # of the voxels of recent steps, noise included
    seconds: float


@dataclass
class FitResult:
    planes: list[Tensor]  # normalised, (1, C, rows, columns)
    decoder: tcam_ext.TriplaneDecoder
    config: FitConfig
    steps_done: int
    seconds: float
    stopped: bool
    psnr: float  # on the check voxels, without noise
    history: list[dict[str, float]] = field(default_factory=list)


def compute_dtype(config: FitConfig) -> torch.dtype:
    if config.compute_dtype == "auto":
        return torch.bfloat16 if _C.cpu_has_bf16() else torch.float32
    return torch.bfloat16 if config.compute_dtype == "bfloat16" else torch.float32


def plane_texels(config: FitConfig, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if config.plane_size is None:
        x, y, z = (max(1, (n + 1) // 2) for n in shape)
        return x, y, z
    if isinstance(config.plane_size, int):
        return (config.plane_size,) * 3
    return config.plane_size


class Fitter:
    """Owns the parameters, the optimiser state and the seeds of one fit."""

    def __init__(self, target: np.ndarray, config: FitConfig) -> None:
        """target: (channels, H, W, D) in [0, 1]."""
        self.config = config
        self.target = torch.from_numpy(np.ascontiguousarray(target, dtype=np.float32)).unsqueeze(0)
        h, w, d = self.target.shape[2:]
        self.size = (h, w, d)
        # One integer seeds the run; each use has a stream of its own.
        self.generators = {
            name: torch.Generator().manual_seed(config.seed * 1000003 + i) for i, name in enumerate(("init", "boxes", "noise"))
        }
        self.planes = [
            p.requires_grad_()
            for p in init_planes(
                config.channels,
                plane_texels(config, self.size),
                config.plane_init_std,
                self.generators["init"],
            )
        ]
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.generators["init"])))
            self.decoder = tcam_ext.TriplaneDecoder(
                config.channels,
                config.widths,
                self.target.shape[1],
                activation=config.activation,
                output_activation=config.output_activation,
            )
        self.compute = compute_dtype(config)
        self.optimiser = torch.optim.Adam(
            [
                {"params": self.planes, "lr": config.lr_planes},
                {"params": list(self.decoder.parameters()), "lr": config.lr_decoder},
            ],
            betas=(0.9, config.beta2),
        )
        self.base_lr = [g["lr"] for g in self.optimiser.param_groups]
        self.stages = [(level.factor, level.steps) for level in config.levels if min(self.size) >= 4 * level.factor]
        self.stages.append((1, config.steps))
        self.total_steps = sum(n for _, n in self.stages)
        self.check_boxes = self._check_boxes()

    # ---- one step ----------------------------------------------------------------------

    def step(self, index: int, target: Tensor) -> tuple[float, float]:
        """One update; returns the loss and the mean squared error of the voxels it read."""
        c = self.config
        self._set_learning_rate(index)
        size = tuple(target.shape[2:])
        planes = [rms_norm(p) for p in self.planes]
        loss = c.tv_weight * total_variation(planes) if c.tv_weight else self.planes[0].new_zeros(())
        if c.noise_std and index < self.total_steps * (1 - c.noise_free_fraction):
            planes = texel_noise(planes, c.noise_std, size, self.generators["noise"])
        boxes = self._boxes(size)
        voxels = sum(math.prod(hi - lo for lo, hi in box) for box in boxes)
        squared = 0.0
        for box in boxes:
            (x0, x1), (y0, y1), (z0, z1) = box
            want = target[:, :, x0:x1, y0:y1, z0:z1]
            got = self.decoder(planes, size, box=box, compute_dtype=self.compute)
            share = math.prod(hi - lo for lo, hi in box) / voxels
            loss = loss + share * self._data_loss(got, want)
            squared += share * float(F.mse_loss(got.detach(), want))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.planes, c.grad_clip)
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), c.grad_clip)
        self.optimiser.step()
        return float(loss.detach()), squared

    def _data_loss(self, got: Tensor, want: Tensor) -> Tensor:
        if self.config.loss == "smooth_l1":
            return F.smooth_l1_loss(got, want, beta=self.config.beta)
        return F.l1_loss(got, want) if self.config.loss == "l1" else F.mse_loss(got, want)

    def _set_learning_rate(self, index: int) -> None:
        c = self.config
        scale = 1.0
        if c.warmup_steps:
            scale = min(1.0, (index + 1) / c.warmup_steps)
        if c.schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * index / self.total_steps))
        for group, lr in zip(self.optimiser.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * scale

    def _random(self, n: int) -> int:
        """Uniform in [0, n)."""
        return int(torch.randint(n, (), generator=self.generators["boxes"]))

    def _boxes(self, size: tuple[int, ...]) -> list[Box]:
        """The voxels of one step: the whole volume, one random box, or random slices."""
        c = self.config
        whole = [(0, n) for n in size]
        if math.prod(size) <= c.voxels_per_step:
            return [(whole[0], whole[1], whole[2])]
        boxes = []
        if c.slices_per_step:
            for _ in range(c.slices_per_step):
                axis, box = self._random(3), list(whole)
                at = self._random(size[axis])
                box[axis] = (at, at + 1)
                boxes.append((box[0], box[1], box[2]))
            return boxes
        scale = (c.voxels_per_step / math.prod(size)) ** (1 / 3)
        box = []
        for n in size:
            edge = max(1, round(n * scale))
            lo = self._random(n - edge + 1)
            box.append((lo, lo + edge))
        return [(box[0], box[1], box[2])]

    # ---- noise-free check --------------------------------------------------------------

    def _check_boxes(self) -> list[Box]:
        """Nine evenly placed slices, three an axis: how good the planes are without noise."""
        boxes = []
        for axis in range(3):
            for part in (0.3, 0.5, 0.7):
                box = [(0, n) for n in self.size]
                at = min(int(part * self.size[axis]), self.size[axis] - 1)
                box[axis] = (at, at + 1)
                boxes.append((box[0], box[1], box[2]))
        return boxes

    @torch.no_grad()
    def check_psnr(self) -> float:
        planes = [rms_norm(p) for p in self.planes]
        squared, voxels = 0.0, 0
        for box in self.check_boxes:
            (x0, x1), (y0, y1), (z0, z1) = box
            want = self.target[:, :, x0:x1, y0:y1, z0:z1]
            got = self.decoder(planes, self.size, box=box, compute_dtype=self.compute).clamp(0, 1)
            squared += float((got - want).square().sum())
            voxels += want.numel()
        return psnr(squared / voxels)

    # ---- the loop ----------------------------------------------------------------------

    def run(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> FitResult:
        """All stages; stops early when ``should_stop`` says so. The result is the best state checked."""
        start = time.monotonic()
        index, stopped = 0, False
        error: float | None = None
        best, best_psnr = self._state(), -math.inf
        every = max(1, self.total_steps // 20)
        history = []
        for factor, steps in self.stages:
            target = self.target if factor == 1 else F.avg_pool3d(self.target, factor, ceil_mode=True, count_include_pad=False)
            for _ in range(steps):
                if should_stop is not None and should_stop():
                    stopped = True
                    break
                loss, squared = self.step(index, target)
                error = squared if error is None else 0.95 * error + 0.05 * squared
                index += 1
                if on_progress is not None:
                    on_progress(Progress(index, self.total_steps, loss, psnr(error), time.monotonic() - start))
                if factor == 1 and (index % every == 0 or index == self.total_steps):
                    checked = self.check_psnr()
                    history.append({"step": index, "loss": loss, "psnr": checked, "seconds": time.monotonic() - start})
                    if checked > best_psnr:
                        best, best_psnr = self._state(), checked
            if stopped:
                break
        checked = self.check_psnr()
        if checked >= best_psnr:
            best, best_psnr = self._state(), checked
        planes, decoder_state = best
        self.decoder.load_state_dict(decoder_state)
        return FitResult(
            [rms_norm(p) for p in planes],
            self.decoder,
            self.config,
            index,
            time.monotonic() - start,
            stopped,
            best_psnr,
            history,
        )

    def _state(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        return [p.detach().clone() for p in self.planes], {k: v.clone() for k, v in self.decoder.state_dict().items()}


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1]."""
    return math.inf if mse == 0 else -10 * math.log10(mse)
