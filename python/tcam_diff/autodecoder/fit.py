"""Fit planes and decoder to one volume (algorithm.md sections 6 and 7)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.config import FitConfig
from tcam_diff.autodecoder.planes import init_planes, rms_norm, texel_noise, total_variation
from tcam_diff.evaluation.metrics import psnr_of_mse
from tcam_ext import _C
from tcam_ext.reference import Taps, linear_taps, sample_plane

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass
class Progress:
    """What a progress bar shows."""

    step: int
    steps: int
    loss: float
    psnr: float  # at the last check, without noise; NaN before the first
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
            name: torch.Generator().manual_seed(config.seed * 1000003 + i)
            for i, name in enumerate(("init", "regions", "noise"))
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
            eps=config.adam_eps,
            fused=True,
        )
        self.base_lr = [g["lr"] for g in self.optimiser.param_groups]
        texels = (self.planes[0].shape[2], self.planes[0].shape[3], self.planes[1].shape[3])
        self.taps = [linear_taps(0, n, n, m, False, "border") for n, m in zip(self.size, texels, strict=True)]
        self.check_boxes = self._check_boxes()
        self.starts: list[tuple[int, int, int]] = []

    # ---- one step ----------------------------------------------------------------------

    def step(self, index: int) -> float:
        """One update; returns the loss."""
        c = self.config
        self._set_learning_rate(index)
        planes = [rms_norm(p) for p in self.planes]
        loss = c.tv_weight * total_variation(planes) if c.tv_weight else self.planes[0].new_zeros(())
        noise: dict[str, Any] = {}
        if c.noise_std and index < c.steps * (1 - c.noise_free_fraction):
            if c.noise_mode == "texel":
                planes = texel_noise(planes, c.noise_std, self.size, self.generators["noise"])
            else:
                seed = int(torch.randint(2**62, (), generator=self.generators["noise"]))
                noise = {"noise_std": c.noise_std, "noise_seed": seed}
        size: Sequence[int] = self.size
        if c.region == "lattice" and c.stride > 1:
            planes, want = self._lattice(planes)
            box, size = None, want.shape[2:]
        else:
            box = self._box()
            (x0, x1), (y0, y1), (z0, z1) = box
            want = self.target[:, :, x0:x1, y0:y1, z0:z1]
        options = {"loss": c.loss, "beta": c.beta, "compute_dtype": self.compute, **noise}
        loss = loss + self.decoder.loss(planes, want, size, box=box, **options)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.planes, c.grad_clip)
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), c.grad_clip)
        self.optimiser.step()
        return float(loss.detach())

    def _lattice(self, planes: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Planes that decode to the voxels start + stride * (i, j, k), and the values wanted there.

        A lattice is a dense grid of its own: planes sampled at its rows and columns have one texel per voxel, so decoding
        them at their own resolution interpolates nothing more. Every texel gets a gradient from all over the volume.
        """
        s = self.config.stride
        if not self.starts:  # every start comes once before one comes again
            order = torch.randperm(s**3, generator=self.generators["regions"]).tolist()
            self.starts = [(o // (s * s), o // s % s, o % s) for o in order]
        start = [o % n for o, n in zip(self.starts.pop(), self.size, strict=True)]
        x, y, z = (Taps(*(t[o::s] for t in taps)) for o, taps in zip(start, self.taps, strict=True))
        sampled = [sample_plane(planes[0], x, y), sample_plane(planes[1], y, z), sample_plane(planes[2], x, z)]
        return sampled, self.target[:, :, start[0] :: s, start[1] :: s, start[2] :: s]

    def _set_learning_rate(self, index: int) -> None:
        c = self.config
        scale = 1.0
        if c.warmup_steps:
            scale = min(1.0, (index + 1) / c.warmup_steps)
        if c.schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * index / self.config.steps))
        for group, lr in zip(self.optimiser.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * scale

    def _random(self, n: int) -> int:
        """Uniform in [0, n)."""
        return int(torch.randint(n, (), generator=self.generators["regions"]))

    def _box(self) -> Box:
        """The whole volume, or a random box of about ``voxels_per_step`` voxels in the volume's proportions."""
        voxels = math.prod(self.size)
        if self.config.region != "box" or voxels <= self.config.voxels_per_step:
            x, y, z = ((0, n) for n in self.size)
            return x, y, z
        scale = (self.config.voxels_per_step / voxels) ** (1 / 3)
        box = []
        for n in self.size:
            edge = max(1, round(n * scale))
            lo = self._random(n - edge + 1)
            box.append((lo, lo + edge))
        return box[0], box[1], box[2]

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
        return psnr_of_mse(squared / voxels)

    # ---- the loop ----------------------------------------------------------------------

    def run(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> FitResult:
        """All steps; stops early when ``should_stop`` says so. The result is the best state checked."""
        start = time.monotonic()
        index, stopped, steps = 0, False, self.config.steps
        best, best_psnr = self._state(), -math.inf
        every = max(1, steps // 20)
        history = []
        checked = math.nan
        while index < steps:
            if should_stop is not None and should_stop():
                stopped = True
                break
            loss = self.step(index)
            index += 1
            if on_progress is not None:
                on_progress(Progress(index, steps, loss, checked, time.monotonic() - start))
            if index % every == 0 and index < steps:
                checked = self.check_psnr()
                history.append({"step": index, "loss": loss, "psnr": checked, "seconds": time.monotonic() - start})
                if checked > best_psnr:
                    best, best_psnr = self._state(), checked
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
