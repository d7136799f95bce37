"""Planes of new volumes under a frozen decoder (algorithm.md 7.5), many at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.config import EncodeConfig, TrainConfig
from tcam_diff.autodecoder.latents import Entry, LatentSet, LatentWriter
from tcam_diff.autodecoder.objective import Objective, make_decoder, parameter_dtype
from tcam_diff.autodecoder.planes import PLANE_NAMES, init_planes, normalise, plane_sizes
from tcam_diff.autodecoder.tables import PlaneTable
from tcam_diff.data.store import Record, Store
from tcam_diff.errors import UserError
from tcam_diff.progress import Progress, ProgressCallback, StopCallback
from tcam_diff.training import checkpoint
from tcam_diff.training.distributed import device_of
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


def load_run(folder: str | os.PathLike[str], at: Path | None = None) -> TrainedRun:
    """The latest checkpoint of a training run, or the one at ``at``. Raises UserError."""
    folder = Path(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: not a folder of `tcam train-autodecoder` (config.yaml is missing)")
    config = TrainConfig.load(path)
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
        progress: ProgressCallback | None = None,
        stop: StopCallback | None = None,
    ) -> dict[str, Encoded] | None:
        """Planes for volumes (channels, H, W, D) as a store keeps them. Their names are those of their streams of random
        numbers, so it does not matter which are encoded together.

        ``progress`` is called after every step with "active", the volumes still being encoded, and "psnr" (dB), their mean at
        the last check. None where ``stop`` said so.
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
            if stop is not None and stop():
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
            if progress is not None:
                progress(Progress(index + 1, c.steps, {"active": len(active), "psnr": shown}))
            if not active:
                break
        found = {}
        for name in names:
            if name not in best:
                raise UserError(f"{name}: its planes became NaN; lower lr")
            _, planes, steps = best[name]
            found[name] = Encoded(planes, self.objective.psnr(planes, self.decoder, volumes[name]), steps)
        return found


def encode_store(
    run: TrainedRun,
    store: Store,
    out: str | os.PathLike[str],
    config: EncodeConfig | None = None,
    *,
    split: str = "test",
    device: str = "auto",
    started: Callable[[int, int], None] | None = None,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> LatentSet:
    """Find planes for volumes of a store under a run's frozen decoder, and write them as a latent set.

    Args:
        run: of ``load_run``.
        store: prepared as the training data were.
        out: empty, or a folder that was begun with the same arguments: what is there is kept.
        config: how they are found; default: ``EncodeConfig()``.
        split: of the store.
        device: auto, cpu, cuda, ...
        started: told how many volumes are there already, of how many.
        progress: called after every step of a group of ``config.batch`` volumes of one size, with "group", "groups", "active"
            and "psnr" (dB).
        stop: true: raises UserError; volumes that are finished are kept.
    """
    config = config or EncodeConfig()
    _check_preprocessing(run, store)
    records = store.of(split)
    writer = LatentWriter(Path(out), run.config, run.decoder, _provenance(run, store, config.model_dump(mode="json")))
    done: dict[str, Entry] = {r.name: e for r in records if (e := writer.find(r)) is not None}
    groups = _groups([r for r in records if r.name not in done], config.batch)
    if started is not None:
        started(len(done), len(records))
    encoder: Encoder | None = None
    for g, group in enumerate(groups):
        size = group[0].info.shape
        if encoder is None or encoder.size != size:
            encoder = Encoder(run, config, size, device_of(device))

        def show(p: Progress, g: int = g) -> None:
            if progress is not None:
                about = {"group": g + 1, "groups": len(groups), **p.metrics}
                progress(Progress(g * config.steps + p.done, len(groups) * config.steps, about))

        found = encoder.encode({r.name: store.volume(r) for r in group}, show, stop)
        if found is None:
            raise UserError(f"{out}: stopped with {len(done)} of {len(records)} volumes; the same command goes on")
        for record in group:
            new = found[record.name]
            done[record.name] = writer.write(record, new.planes, new.psnr, new.steps)
    writer.finish([done[r.name] for r in records])
    return LatentSet(out)


def export_latents(
    run: TrainedRun, out: str | os.PathLike[str], store: Store | None = None, progress: ProgressCallback | None = None
) -> LatentSet:
    """Write the planes that a run fitted to its training volumes as a latent set.

    ``store``: the training data, where they have moved. ``progress`` is called after every volume.
    """
    store = store or Store(run.config.data)
    _check_preprocessing(run, store)
    by_name = {r.name: r for r in store.records}
    writer = LatentWriter(Path(out), run.config, run.decoder, _provenance(run, store, None))
    first, raw, entries = by_name[run.objects[0]], run.raw_planes(), []
    objective = Objective(run.config, first.info.shape)
    for name in run.objects:
        planes = normalise(raw[name], run.config.norm)
        psnr = objective.psnr(planes, run.decoder, store.volume(by_name[name]))
        entries.append(writer.write(by_name[name], planes, psnr, run.step))
        if progress is not None:
            progress(Progress(len(entries), len(run.objects)))
    writer.finish(entries)
    return LatentSet(out)


def _groups(records: Sequence[Record], most: int) -> list[list[Record]]:
    """Of one size each, and of ``most`` volumes."""
    groups: list[list[Record]] = []
    for record in sorted(records, key=lambda r: r.info.array_shape):
        if not groups or groups[-1][0].info.array_shape != record.info.array_shape or len(groups[-1]) == most:
            groups.append([])
        groups[-1].append(record)
    return groups


def _check_preprocessing(run: TrainedRun, store: Store) -> None:
    """Raises UserError where a store was prepared otherwise than a run's training data."""
    if store.digest != run.digest:
        raise UserError(
            f"{store.folder}: prepared otherwise than the data of {run.folder}; prepare it with the configuration in that "
            "store.json"
        )


def _provenance(run: TrainedRun, store: Store, encoding: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "run": str(run.folder.resolve()),
        "step": run.step,
        "store": str(store.folder.resolve()),
        "store_digest": store.digest,
        "preprocessing": store.config,
        "encode": encoding,
    }
