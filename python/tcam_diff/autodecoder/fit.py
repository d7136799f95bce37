"""Fit of planes and decoder to one volume (algorithm.md sections 6 and 7)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.config import FitConfig
from tcam_diff.autodecoder.objective import TrainingObjective, make_decoder, parameter_dtype
from tcam_diff.autodecoder.planes import init_planes, normalise
from tcam_diff.data.volume import Volume, VolumeInfo, intensity_range
from tcam_diff.errors import UserError
from tcam_diff.progress import ProgressCallback, StopCallback
from tcam_diff.training.loop import Cadence, Task, run
from tcam_diff.training.lr import lr_scale
from tcam_diff.training.rng import rng


@dataclass
class FitResult:
    """Best state of a fit."""

    planes: list[Tensor]  # (1, C, rows, columns), normalised
    decoder: tcam_ext.TriplaneDecoder
    config: FitConfig
    steps_done: int
    seconds: float
    stopped: bool
    psnr: float  # dB, on the check slices, without noise
    history: list[dict[str, float]] = field(default_factory=list)


class Fitter(Task):
    """Fit of one volume: ``Fitter(target, config).run()``.

    Args:
        target: voxels (channels, H, W, D) in [0, 1].
        config: model, loss and optimisation.
    """

    def __init__(self, target: np.ndarray, config: FitConfig) -> None:
        self.config, self.steps, self.done = config, config.steps, 0
        self.target = np.ascontiguousarray(target, dtype=np.float32)
        h, w, d = self.target.shape[1:]
        self.size = (h, w, d)
        self.objective = TrainingObjective(config, self.size)
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
        self.loss, self.began = math.nan, time.monotonic()
        self.best, self.best_psnr = self._state(), -math.inf
        self.history: list[dict[str, float]] = []

    def step(self, index: int) -> dict[str, Tensor]:
        """Update planes and decoder once. Returns "loss"."""
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
        self.done, self.loss = index + 1, float(loss.detach())
        return {"loss": loss.detach()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """PSNR (dB) on nine slices, without noise. Keeps the best state."""
        planes = normalise(self.planes, self.config.norm)
        psnr = self.objective.psnr(planes, self.decoder, self.target, self.objective.check_boxes())
        self.history.append({"step": self.done, "loss": self.loss, "psnr": psnr, "seconds": time.monotonic() - self.began})
        if psnr >= self.best_psnr:
            self.best, self.best_psnr = self._state(), psnr
        return {"psnr": psnr}

    def run(self, progress: ProgressCallback | None = None, stop: StopCallback | None = None) -> FitResult:
        """Run all steps, or until ``stop`` returns true.

        ``progress`` gets "loss" and "psnr" (dB). The result is the best of 20 states evaluated during the fit and the last one.
        """
        self.began = time.monotonic()
        every = max(1, self.steps // 20)
        outcome = run(self, None, Cadence(1, every, every), progress=progress, stop=stop)
        if outcome.stopped:
            self.evaluate()
        planes, decoder = self.best
        self.decoder.load_state_dict(decoder)
        return FitResult(
            normalise(planes, self.config.norm),
            self.decoder,
            self.config,
            outcome.step,
            time.monotonic() - self.began,
            outcome.stopped,
            self.best_psnr,
            self.history[:-1],  # without the last evaluation
        )

    def _state(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        return [p.detach().clone() for p in self.planes], {k: v.clone() for k, v in self.decoder.state_dict().items()}


def fit_volume(
    source: Volume, config: FitConfig, *, progress: ProgressCallback | None = None, stop: StopCallback | None = None
) -> tuple[FitResult, VolumeInfo]:
    """Scale a volume to [0, 1] and fit planes and decoder to it.

    Args:
        source: the volume, in physical units.
        config: model, loss and optimisation.
        progress: called after every step with "loss" and "psnr" (dB) among the metrics.
        stop: asked before every step; true: end the fit and keep its best state.

    Returns:
        The fit and the metadata of the volume, for ``artefact.save``.

    Raises:
        UserError: the volume has more than 16 channels.
    """
    check_channels(source)
    ranges = intensity_range(source.data, 0, 100 if config.intensity == "minmax" else 99.5, source.info.source)
    info = source.info.replaced(intensity=ranges, source=Path(source.info.source).name)
    return Fitter(info.to_unit(source.data), config).run(progress, stop), info


def check_channels(source: Volume) -> None:
    """Raise UserError if a volume has more channels than the 16 outputs of a decoder."""
    if source.info.channels > 16:
        raise UserError(f"{source.info.source}: {source.info.channels} channels; the decoder has at most 16 outputs")
