"""Fit planes and decoder to one volume (algorithm.md sections 6 and 7)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.config import FitConfig
from tcam_diff.autodecoder.objective import Objective, make_decoder, parameter_dtype
from tcam_diff.autodecoder.planes import init_planes, normalise
from tcam_diff.training.lr import lr_scale
from tcam_diff.training.rng import rng


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


class Fitter:
    """Owns the parameters and the optimiser state of one fit."""

    def __init__(self, target: np.ndarray, config: FitConfig) -> None:
        """target: (channels, H, W, D) in [0, 1]."""
        self.config = config
        self.target = np.ascontiguousarray(target, dtype=np.float32)
        h, w, d = self.target.shape[1:]
        self.size = (h, w, d)
        self.objective = Objective(config, self.size)
        start = init_planes(config.channels, self.objective.texels, config.plane_init_std, rng(config.seed, "planes"))
        self.planes = [p.to(parameter_dtype(config)).requires_grad_() for p in start]
        self.decoder = make_decoder(config, self.target.shape[0])
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

    def step(self, index: int) -> float:
        """One update; returns the loss."""
        c = self.config
        for group, lr in zip(self.optimiser.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * lr_scale(c, index)
        visit = self.objective.read(self.objective.visit(0, index), self.target)
        noise = index < c.steps * (1 - c.noise_free_fraction)
        loss = self.objective.losses(self.planes, self.decoder, [visit], noise)[0].sum()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.planes, c.grad_clip)
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), c.grad_clip)
        self.optimiser.step()
        return float(loss.detach())

    @torch.no_grad()
    def check_psnr(self) -> float:
        """On nine slices, without noise."""
        planes = normalise(self.planes, self.config.norm)
        return self.objective.psnr(planes, self.decoder, self.target, self.objective.check_boxes())

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
            normalise(planes, self.config.norm),
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
