"""Encoding: optimisation of planes of new volumes under a frozen decoder (algorithm.md 7.5), in batches."""

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
from tcam_diff.autodecoder.objective import TrainingObjective, make_decoder, parameter_dtype
from tcam_diff.autodecoder.planes import PLANE_NAMES, init_planes, normalise, plane_sizes
from tcam_diff.autodecoder.tables import PlaneTable
from tcam_diff.data.store import Record, Store
from tcam_diff.errors import UserError
from tcam_diff.files import locked_folder
from tcam_diff.progress import Progress, ProgressCallback, StopCallback
from tcam_diff.training import checkpoint
from tcam_diff.training.distributed import device_of
from tcam_diff.training.lr import lr_scale
from tcam_diff.training.rng import rng
from tcam_diff.training.states import load_module


@dataclass
class TrainedRun:
    """Decoder and planes of a training run, from a checkpoint."""

    folder: Path
    config: TrainConfig
    step: int
    decoder: tcam_ext.TriplaneDecoder  # averaged, frozen
    objects: list[str]  # names of the training volumes
    shards: list[dict[str, Any]]  # state of each process
    digest: str  # of the preprocessing

    def raw_planes(self) -> dict[str, list[Tensor]]:
        """Planes (1, C, rows, columns) before normalisation, by the volumes' names."""
        return {
            self.objects[o]: [shard[f"value.{n}"][i : i + 1] for n in PLANE_NAMES]
            for shard in self.shards
            for i, o in enumerate(shard["objects"])
        }

    def mean_planes(self) -> list[Tensor]:
        """Mean (1, C, rows, columns) of the normalised training planes, normalised again."""
        sums: list[Tensor] | None = None
        for raw in self.raw_planes().values():
            planes = normalise(raw, self.config.norm)
            sums = planes if sums is None else [s + p for s, p in zip(sums, planes, strict=True)]
        assert sums is not None
        return normalise([s / len(self.objects) for s in sums], self.config.norm)


def load_run(folder: str | os.PathLike[str], at: Path | None = None) -> TrainedRun:
    """Load the latest checkpoint of a training run, or the one at ``at``. Raises UserError if there is none."""
    folder = Path(folder)
    settings = folder / "config.yaml"
    if not settings.is_file():
        raise UserError(f"{folder}: not a folder of `tcam train-autodecoder` (config.yaml is missing)")
    config = TrainConfig.load(settings)
    path = at or checkpoint.latest(folder / "checkpoints")
    if path is None:
        raise UserError(f"{folder}: has no checkpoint yet")
    step, shared, shards = checkpoint.load(path)
    with checkpoint.loading(path):
        task = shared["task"]
        channels = next(v.shape[0] for k, v in reversed(list(task["average"].items())) if k.endswith("weight"))
        decoder = make_decoder(config, channels)
        load_module(decoder, task["average"])
        return TrainedRun(folder, config, step, decoder.requires_grad_(False), task["objects"], shards, task["digest"])


@dataclass
class Encoded:
    """Planes of an encoded volume."""

    planes: list[Tensor]  # (1, C, rows, columns), normalised
    psnr: float  # dB, of the whole volume, without noise
    steps: int  # after which the planes were best


class Encoder:
    """Encoder of volumes of one size, which need not be that of the training volumes.

    Args:
        run: training run of the decoder.
        config: optimisation.
        size: voxels along x, y, z.
        device: device of decoder and planes.
        maps: number of the volumes' label maps.
    """

    def __init__(
        self, run: TrainedRun, config: EncodeConfig, size: tuple[int, int, int], device: torch.device, maps: int = 0
    ) -> None:
        changes = {
            **{k: v for k in ("region", "voxels_per_step", "slices", "stride") if (v := getattr(config, k)) is not None},
            "steps": config.steps,
            "lr_planes": config.lr,
            "noise_free_fraction": config.noise_free_fraction,
            "schedule": "cosine",
            "warmup_steps": 0,
            "seed": config.seed,
        }
        self.config, self.size, self.device = config, size, device
        self.training = run.config.model_copy(update=changes)
        self.objective = TrainingObjective(self.training, size, device, maps)
        self.decoder = run.decoder.to(device)
        if config.init == "mean":
            self.start = run.mean_planes()
            sizes = plane_sizes(self.objective.texels)
            if [tuple(p.shape[2:]) for p in self.start] != sizes:
                self.start = [
                    torch.nn.functional.interpolate(p, s, mode="bilinear") for p, s in zip(self.start, sizes, strict=True)
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
        """Encode volumes.

        Args:
            volumes: arrays (channels, H, W, D) as in a store. Random numbers depend on a volume's name, so a result does not
                depend on which volumes are encoded together.
            progress: called after every step with "active", the number of unfinished volumes, and "psnr" (dB), their mean at
                the last check.
            stop: asked before every step.

        Returns:
            The result of each volume, or None if ``stop`` returned true.

        Raises:
            UserError: the planes of a volume became NaN.
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
            losses = self.objective.losses(rows.leaves, self.decoder, visits, noise)[0]
            if self.config.mean_weight:
                losses = losses + self.config.mean_weight * self._distance(rows.leaves)
            losses.sum().backward()
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
        results = {}
        for name in names:
            if name not in best:
                raise UserError(f"{name}: its planes became NaN; lower lr")
            _, planes, steps = best[name]
            results[name] = Encoded(planes, self.objective.psnr(planes, self.decoder, volumes[name]), steps)
        return results

    def _distance(self, raw: Sequence[Tensor]) -> Tensor:
        """Mean square (B,) of normalised planes less the first ones, in which the three planes have equal weight."""
        pairs = zip(normalise(raw, self.training.norm), normalise(self.start, self.training.norm), strict=True)
        return torch.stack([(p - s.to(p)).square().mean((1, 2, 3)) for p, s in pairs]).mean(0)


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
    """Encode the volumes of a store under a run's frozen decoder, and write them as a latent set.

    Args:
        run: result of ``load_run``.
        store: volumes with the preprocessing of the training data.
        out: a new folder, or an unfinished latent set with the same arguments, which is completed.
        config: optimisation; default: ``EncodeConfig()``.
        split: split of the store to encode.
        device: auto, cpu, cuda, ...
        started: called with the number of volumes that are already encoded, and the number of all.
        progress: called after every step of a group of ``config.batch`` volumes of one size, with "group", "groups", "active"
            and "psnr" (dB).
        stop: asked before every step; true: raise UserError, keeping finished volumes.

    Raises:
        UserError: ``stop`` returned true, the store has another preprocessing, or ``out`` has another decoder's latents.
    """
    config = config or EncodeConfig()
    _check_preprocessing(run, store)
    records = store.in_split(split)
    with locked_folder(Path(out)):
        settings = config.model_dump(mode="json")
        if not config.mean_weight:
            del settings["mean_weight"]  # sets of earlier versions do not have it
        writer = LatentWriter(Path(out), run.config, run.decoder, _provenance(run, store, settings))
        done: dict[str, Entry] = {r.name: e for r in records if (e := writer.find(r)) is not None}
        groups = _groups([r for r in records if r.name not in done], config.batch)
        if started is not None:
            started(len(done), len(records))
        encoder: Encoder | None = None
        for g, group in enumerate(groups):
            size = group[0].info.shape
            if encoder is None or encoder.size != size:
                encoder = Encoder(run, config, size, device_of(device), len(group[0].info.label_maps))

            def show(p: Progress, g: int = g) -> None:
                if progress is not None:
                    metrics = {"group": g + 1, "groups": len(groups), **p.metrics}
                    progress(Progress(g * config.steps + p.done, len(groups) * config.steps, metrics))

            encoded = encoder.encode({r.name: store.volume(r) for r in group}, show, stop)
            if encoded is None:
                raise UserError(f"{out}: stopped with {len(done)} of {len(records)} volumes; the same command continues")
            for record in group:
                result = encoded[record.name]
                done[record.name] = writer.write(record, result.planes, result.psnr, result.steps)
        writer.finish([done[r.name] for r in records])
    return LatentSet(out)


def export_latents(
    run: TrainedRun, out: str | os.PathLike[str], store: Store | None = None, progress: ProgressCallback | None = None
) -> LatentSet:
    """Write the planes of a run's training volumes as a latent set.

    Args:
        run: result of ``load_run``.
        out: folder of the latent set.
        store: the training data, if they have moved.
        progress: called after every volume.

    Raises:
        UserError: the store has another preprocessing, or ``out`` has another decoder's latents.
    """
    store = store or Store(run.config.data)
    _check_preprocessing(run, store)
    by_name = {r.name: r for r in store.records}
    with locked_folder(Path(out)):
        writer = LatentWriter(Path(out), run.config, run.decoder, _provenance(run, store, None))
        first, raw, entries = by_name[run.objects[0]], run.raw_planes(), []
        objective = TrainingObjective(run.config, first.info.shape, maps=len(first.info.label_maps))
        for name in run.objects:
            planes = normalise(raw[name], run.config.norm)
            psnr = objective.psnr(planes, run.decoder, store.volume(by_name[name]))
            entries.append(writer.write(by_name[name], planes, psnr, run.step))
            if progress is not None:
                progress(Progress(len(entries), len(run.objects)))
        writer.finish(entries)
    return LatentSet(out)


def _groups(records: Sequence[Record], most: int) -> list[list[Record]]:
    """Groups of at most ``most`` volumes of one size."""
    groups: list[list[Record]] = []
    for record in sorted(records, key=lambda r: r.info.array_shape):
        if not groups or groups[-1][0].info.array_shape != record.info.array_shape or len(groups[-1]) == most:
            groups.append([])
        groups[-1].append(record)
    return groups


def _check_preprocessing(run: TrainedRun, store: Store) -> None:
    """Raise UserError if the preprocessing of a store is not that of a run's training data."""
    if store.digest != run.digest:
        raise UserError(
            f"{store.folder}: prepared differently from the data of {run.folder}; prepare it with the configuration in the "
            "store.json of those"
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
