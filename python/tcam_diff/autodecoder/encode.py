"""Planes of new volumes under a frozen decoder (algorithm.md 7.5), many at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff import config as configs
from tcam_diff.autodecoder.config import EncodeConfig, TrainConfig
from tcam_diff.autodecoder.objective import Objective, make_decoder, parameter_dtype
from tcam_diff.autodecoder.planes import PLANE_NAMES, init_planes, normalise, plane_sizes
from tcam_diff.autodecoder.tables import PlaneTable
from tcam_diff.errors import UserError
from tcam_diff.training import checkpoint
from tcam_diff.training.lr import lr_scale
from tcam_diff.training.rng import rng


@dataclass
class TrainedRun:
    """What encoding needs of a finished, or stopped, training run."""

    folder: Path
    config: TrainConfig
    step: int
    decoder: tcam_ext.TriplaneDecoder  # the average, frozen
    objects: list[str]
    shards: list[dict[str, Any]]
    digest: str  # of the preprocessing

    def raw_planes(self) -> dict[str, list[Tensor]]:
        """Name -> planes (1, C, rows, columns)."""
        found = {}
        for shard in self.shards:
            for i, o in enumerate(shard["objects"]):
                found[self.objects[o]] = [shard[f"value.{n}"][i : i + 1] for n in PLANE_NAMES]
        return found

    def mean_planes(self) -> list[Tensor]:
        """The mean of the normalised training planes, normalised."""
        sums: list[Tensor] | None = None
        for raw in self.raw_planes().values():
            planes = normalise(raw, self.config.norm)
            sums = planes if sums is None else [s + p for s, p in zip(sums, planes, strict=True)]
        assert sums is not None
        return normalise([s / len(self.objects) for s in sums], self.config.norm)


def load_run(folder: Path, at: Path | None = None) -> TrainedRun:
    """The latest checkpoint of a training run, or the one at ``at``. Raises UserError."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: not a folder of `tcam train-autodecoder` (config.yaml is missing)")
    config = configs.load(TrainConfig, "train", path)
    chosen = at or checkpoint.latest(folder / "checkpoints")
    if chosen is None:
        raise UserError(f"{folder}: has no checkpoint yet")
    step, shared, shards = checkpoint.load(chosen)
    task = shared["task"]
    channels = next(v.shape[0] for k, v in reversed(list(task["average"].items())) if k.endswith("weight"))
    decoder = make_decoder(config, channels)
    decoder.load_state_dict(task["average"])
    return TrainedRun(folder, config, step, decoder.requires_grad_(False), task["objects"], shards, task["digest"])


@dataclass
class Encoded:
    planes: list[Tensor]  # normalised, (1, C, rows, columns)
    psnr: float  # of the whole volume, without noise
    steps: int


class Encoder:
    """Finds planes for volumes of the size that the decoder was trained on, or any other."""

    def __init__(self, run: TrainedRun, config: EncodeConfig, size: tuple[int, int, int], device: torch.device) -> None:
        own = {k: v for k in ("region", "voxels_per_step", "slices", "stride") if (v := getattr(config, k)) is not None}
        merged = {
            **own,
            "steps": config.steps,
            "lr_planes": config.lr,
            "noise_free_fraction": config.noise_free_fraction,
            "schedule": "cosine",
            "warmup_steps": 0,
            "seed": config.seed,
        }
        self.config, self.size, self.device = config, size, device
        self.training = run.config.model_copy(update=merged)
        self.objective = Objective(self.training, size, device)
        self.decoder = run.decoder.to(device)
        if config.init == "mean":
            self.start = run.mean_planes()
            want = plane_sizes(self.objective.texels)
            if [tuple(p.shape[2:]) for p in self.start] != want:
                self.start = [
                    torch.nn.functional.interpolate(p, w, mode="bilinear") for p, w in zip(self.start, want, strict=True)
                ]
        else:
            c = run.config
            self.start = init_planes(c.channels, self.objective.texels, 1.0, rng(c.seed, "planes"))

    def encode(
        self,
        volumes: Mapping[str, np.ndarray],
        on_step: Callable[[int, int, float], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> dict[str, Encoded] | None:
        """Planes for volumes (channels, H, W, D) as a store keeps them. Their names are those of their streams of random
        numbers, so it does not matter which are encoded together.

        ``on_step(step, active, psnr)``. None where ``should_stop`` said so.
        """
        c = self.training
        names = list(volumes)
        table = PlaneTable(names, c.channels, self.objective.texels, device=self.device, dtype=parameter_dtype(c))
        table.fill(lambda _: self.start)
        boxes = self.objective.check_boxes()
        best: dict[str, tuple[float, list[Tensor], int]] = {}
        poor = dict.fromkeys(names, 0)
        active, shown = list(names), float("nan")
        for index in range(c.steps):
            if should_stop is not None and should_stop():
                return None
            visits = [self.objective.read(self.objective.visit(n, index), volumes[n]) for n in active]
            rows = table.fetch(active)
            noise = index < c.steps * (1 - c.noise_free_fraction)
            self.objective.losses(rows.leaves, self.decoder, visits, noise)[0].sum().backward()
            table.update(rows, lr=c.lr_planes * lr_scale(c, index), beta2=c.beta2, eps=c.adam_eps, clip=c.grad_clip)
            if (index + 1) % self.config.check_every == 0 or index + 1 == c.steps:
                scores = []
                for n in list(active):
                    planes = normalise(table.planes(n), c.norm)
                    score = self.objective.psnr(planes, self.decoder, volumes[n], boxes)
                    scores.append(score)
                    gain = score - best[n][0] if n in best else float("inf")
                    if gain > 0 and math.isfinite(score):
                        best[n] = (score, [p.clone() for p in planes], index + 1)
                    poor[n] = poor[n] + 1 if gain < self.config.plateau_db else 0
                    if self.config.plateau_db and poor[n] >= 3:
                        active.remove(n)
                shown = sum(scores) / len(scores)
            if on_step is not None:
                on_step(index + 1, len(active), shown)
            if not active:
                break
        found = {}
        for name in names:
            if name not in best:
                raise UserError(f"{name}: its planes became NaN; lower lr")
            _, planes, steps = best[name]
            found[name] = Encoded(planes, self.objective.psnr(planes, self.decoder, volumes[name]), steps)
        return found
