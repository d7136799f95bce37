"""Segmentation of volumes by MONAI's SegResNet, trained on the original volumes of a store (algorithm.md 5.3)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tcam_diff.data.labels import class_numbers, classes
from tcam_diff.data.store import Record, Store, unit, volumes_digest
from tcam_diff.errors import UserError
from tcam_diff.evaluation.metrics import label_counts, label_metrics
from tcam_diff.machine import products
from tcam_diff.progress import ProgressCallback, StopCallback
from tcam_diff.text import size_text
from tcam_diff.training import checkpoint
from tcam_diff.training.config import Count, Rate, RunConfig
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.loop import Outcome, Task
from tcam_diff.training.lr import lr_scale
from tcam_diff.training.rng import rng, seed_of
from tcam_diff.training.run import train
from tcam_diff.training.states import load_module, load_optimiser

Voxels = Annotated[int, Field(ge=8, le=1024)]
Share = Annotated[float, Field(ge=0, le=1)]

#: Most windows at a time, and most voxels of several. Torch does not use oneDNN for single small windows, and is four times
#: slower on CPUs.
WINDOWS, WINDOW_VOXELS = 4, 2**20


class SegmentConfig(RunConfig):
    """SegResNet and its training. Defaults are those of MONAI's BraTS tutorial, but for the labels: one class for each."""

    kind = "segment"
    changeable = RunConfig.changeable | {"data", "evaluate_volumes", "window"}

    data: Annotated[str, Field(description="store of `tcam prepare`, which the command names")] = ""
    split: Annotated[str, Field(description="split of the volumes to train on, those with labels")] = "train"
    init_filters: Annotated[int, Field(ge=8, le=256, multiple_of=8, description="channels of the first layer")] = 16
    blocks_down: Annotated[list[Count], Field(min_length=1, max_length=6)] = Field(default=[1, 2, 2, 4])
    blocks_up: Annotated[list[Count], Field(max_length=5)] = Field(default=[1, 1, 1])
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    foreground: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="values in [0, 1] above this make up a channel's z-score, and others become 0; the tutorial's is 0, "
            "but reconstructions have no exact zeros",
        ),
    ] = 0.02
    batch: Count = 1
    crop: Annotated[tuple[Voxels, Voxels, Voxels] | None, Field(description="random crops of so many voxels; null: none")] = (
        None
    )
    labelled: Annotated[float, Field(ge=0, le=1, description="share of crops about a voxel of a random label")] = 0.0
    flip: Annotated[Share, Field(description="probability of a flip along each axis")] = 0.5
    scale: Annotated[Share, Field(description="intensities are scaled by 1 ± this, at most")] = 0.1
    shift: Annotated[float, Field(ge=0, description="and shifted by this, in standard deviations")] = 0.1
    lr: Rate = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    schedule: Literal["constant", "cosine"] = "cosine"
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="type of the products; auto: bfloat16 if the machine multiplies it"),
    ] = "auto"
    window: Annotated[
        tuple[Voxels, Voxels, Voxels],
        Field(description="voxels of overlapping windows, in which larger volumes are segmented"),
    ] = (160, 160, 160)
    evaluate_volumes: Annotated[Count, Field(description="training volumes of an evaluation during training")] = 4

    def multiple(self) -> int:
        """Number that the sizes of the network's inputs must be multiples of."""
        return int(2 ** (len(self.blocks_down) - 1))


@dataclass
class Segmenter:
    """A trained network. Class 0 is background; class i has the name ``names[i - 1]``."""

    network: nn.Module
    names: list[str]
    config: SegmentConfig
    device: torch.device

    @torch.no_grad()
    def __call__(self, volume: Tensor) -> Tensor:
        """Classes (H, W, D) uint8 of a volume (channels, H, W, D) in [0, 1]."""
        from monai.inferers import sliding_window_inference

        c, multiple = self.config, self.config.multiple()
        window = [min(w, -(-n // multiple) * multiple) for w, n in zip(c.window, volume.shape[1:], strict=True)]
        image = normalised(volume, *statistics(volume, c.foreground), c.foreground)[None].to(self.device)
        self.network.eval()
        together = max(1, min(WINDOWS, WINDOW_VOXELS // math.prod(window)))
        with _products(c, self.device):
            scores = sliding_window_inference(image, window, together, self.network, overlap=0.25, mode="gaussian")
        assert isinstance(scores, Tensor)
        return scores[0].argmax(0).to("cpu", torch.uint8)


def statistics(volume: Tensor, foreground: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (channels,) of the values above ``foreground``, in each channel of (channels, H, W, D).

    A channel that is constant there has 1 for its deviation, and one without such values mean 0.
    """
    inside = volume > foreground
    count = inside.sum((1, 2, 3)).clamp(min=1)
    mean = torch.where(inside, volume, 0).double().sum((1, 2, 3)) / count
    centred = torch.where(inside, volume.double() - mean.view(-1, 1, 1, 1), 0)
    std = (centred.square().sum((1, 2, 3)) / count).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def normalised(volume: Tensor, mean: Tensor, std: Tensor, foreground: float) -> Tensor:
    """The z-score of the values above ``foreground`` in (channels, H, W, D), and 0 elsewhere."""
    score = (volume - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    return torch.where(volume > foreground, score, 0)


class SegmentationTraining(Task):
    """Training run of a segmenter: network, optimiser and data. Raises UserError if configuration and data do not fit."""

    score = "f1"

    def __init__(self, config: SegmentConfig, group: Distributed, folder: Path) -> None:
        from monai.losses import DiceCELoss

        if group.world > 1:
            raise UserError(f"tcam segment: expected one process, got {group.world} of torchrun; start it alone")
        self.config, self.group, self.steps, self.folder = config, group, config.steps, folder
        self.store = Store(config.data)
        self.records = labelled_records(self.store, config.split)
        self.names, self.numbers = classes(self.store.label_names.values()), class_numbers(self.store.label_names)
        self.channels = self.records[0].info.images
        for r in self.records:
            if r.info.images != self.channels:
                raise UserError(f"{config.data}: {r.name} has {r.info.images} channels, {self.records[0].name} {self.channels}")
        self._check_sizes()
        self.network = _network(config, self.channels, len(self.names)).to(group.device)
        self.segmenter = Segmenter(self.network, self.names, config, group.device)
        self.optimiser = torch.optim.Adam(
            self.network.parameters(),
            lr=config.lr,
            betas=(0.9, config.beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-5)
        self._statistics: dict[int, tuple[Tensor, Tensor]] = {}

    def _check_sizes(self) -> None:
        c, multiple = self.config, self.config.multiple()
        if len(c.blocks_up) != len(c.blocks_down) - 1:
            raise UserError(f"blocks_up: expected one number fewer than in blocks_down {c.blocks_down}, got {c.blocks_up}")
        for key, given in (("window", c.window), ("crop", c.crop or ())):
            if any(n % multiple for n in given):
                raise UserError(f"{key}: expected multiples of {multiple}, got {given}")
        sizes = {r.info.shape for r in self.records}
        if c.crop is None and (len(sizes) > 1 or any(n % multiple for size in sizes for n in size)):
            raise UserError(
                f"crop: expected a size, because the volumes of {c.data} are not all of one size of multiples of {multiple}; "
                f"they have {', '.join(map(size_text, sorted(sizes)[:3]))}"
            )

    # ---- a step ------------------------------------------------------------------------

    def volume(self, position: int) -> int:
        """Volume at a position of the sequence of shuffled epochs."""
        epoch, at = divmod(position, len(self.records))
        order = torch.randperm(len(self.records), generator=rng(self.config.seed, "order", epoch))
        return int(order[at])

    def sample(self, step: int, position: int) -> tuple[Tensor, Tensor]:
        """Image (channels, h, w, d) and classes (1, h, w, d) at a position within the batch of a step, augmented."""
        c, number = self.config, self.volume(step * self.config.batch + position)
        record = self.records[number]
        generator = rng(c.seed, "sample", step, position)
        box = self._box(record, generator)
        every = (slice(self.channels), *box)
        image = unit(torch.from_numpy(np.array(self.store.volume(record)[every])))
        image = normalised(image, *self._stats(number), c.foreground)
        labels = torch.from_numpy(self.numbers[self.store.labels(record)[box]])[None]
        *flips, scale, shift = torch.rand(5, generator=generator).tolist()
        axes = [1 + a for a in range(3) if flips[a] < c.flip]
        return image.flip(axes) * (1 + c.scale * (2 * scale - 1)) + c.shift * (2 * shift - 1), labels.flip(axes)

    def _box(self, record: Record, generator: torch.Generator) -> tuple[slice, ...]:
        """The crop of a sample: anywhere, or, for a share of them, with a voxel of a random label at a random place in it."""

        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        shape, crop = record.info.shape, self.config.crop or record.info.shape
        if any(n < c for n, c in zip(shape, crop, strict=True)):
            raise UserError(f"crop: expected at most the {shape} voxels of {record.name} in {self.config.data}, got {crop}")
        start = [draw(n - c + 1) for n, c in zip(shape, crop, strict=True)]
        codes = [c for c in record.label_codes if c]
        if codes and float(torch.rand((), generator=generator)) < self.config.labelled:
            places = np.flatnonzero(self.store.labels(record) == codes[draw(len(codes))])
            voxel = np.unravel_index(places[draw(len(places))], shape)
            start = [min(max(int(v) - draw(c), 0), n - c) for v, n, c in zip(voxel, shape, crop, strict=True)]
        return tuple(slice(s, s + c) for s, c in zip(start, crop, strict=True))

    def _stats(self, number: int) -> tuple[Tensor, Tensor]:
        if number not in self._statistics:
            volume = self.store.images(self.records[number])
            self._statistics[number] = statistics(volume, self.config.foreground)
        return self._statistics[number]

    def step(self, index: int) -> dict[str, Tensor]:
        """Update the network once. Returns "loss" and the gradient norm."""
        c, device = self.config, self.group.device
        samples = [self.sample(index, i) for i in range(c.batch)]
        images, labels = (torch.stack(parts).to(device) for parts in zip(*samples, strict=True))
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed_of(c.seed, "dropout", index))
            with _products(c, device):
                scores = self.network(images)
        loss = self.loss(scores.float(), labels)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in self.network.parameters() if p.grad is not None]).norm()
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = c.lr * lr_scale(c, index)
        self.optimiser.step()
        return {"loss": loss.detach(), "grad": norm}

    # ---- evaluation and checkpoints ----------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Mean "f1" over the labels of the first ``evaluate_volumes`` training volumes."""
        values = []
        for record in self.records[: self.config.evaluate_volumes]:
            predicted = self.segmenter(self.store.images(record))
            truth = torch.from_numpy(self.numbers[self.store.labels(record)])
            values.append(label_metrics(label_counts(predicted, truth, len(self.names)))["f1"])
        return {"f1": float(torch.stack(values).nanmean())}

    def shared_state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "labels": self.names,
            "channels": self.channels,
            "objects": [r.name for r in self.records],
            "digest": self.store.digest,
            "volumes": [volumes_digest(self.records), *(r.labels_sha256 for r in self.records)],
        }

    def load_state(self, shared: dict[str, Any], shards: Sequence[dict[str, Any]]) -> None:
        now = self.shared_state()
        shared.setdefault("volumes", now["volumes"])  # of earlier versions
        if any(shared[key] != now[key] for key in ("labels", "channels", "objects", "digest", "volumes")):
            raise UserError(f"{self.config.data}: its cases, labels or preprocessing are not those with which the run began")
        load_module(self.network, shared["network"])
        load_optimiser(self.optimiser, shared["optimiser"])

    def finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.network.parameters())


def labelled_records(store: Store, split: str) -> list[Record]:
    """The records of a split that have labels. Raises UserError if there are none, or no voxel has one but background."""
    records = [r for r in store.in_split(split) if r.labels_sha256 is not None]
    if not records:
        store.labels(store.in_split(split)[0])  # says why
    if not any(set(r.label_codes) - {0} for r in records):
        raise UserError(f"{store.folder}: every label in the split {split!r} is 0, background; expected labels to train on")
    return records


def train_segmenter(
    config: SegmentConfig,
    out: str | os.PathLike[str],
    resume: str | None = None,
    *,
    started: Callable[[SegmentationTraining], None] | None = None,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> Outcome:
    """Train a segmenter on the labelled volumes of a store.

    Args:
        config: for example ``SegmentConfig.load("small", ["data=STORE"])``.
        out: folder of the run: config.yaml, checkpoints, metrics.jsonl, TensorBoard files.
        resume: "auto": continue from the last checkpoint in ``out``, if any; or a checkpoint's folder; None: start anew.
        started: called with the training before its first step.
        progress: called after every step, with "loss" and "f1" of training volumes among the metrics.
        stop: asked before every step; true: write a checkpoint and return.

    Raises:
        UserError: ``out`` has a run that would be overwritten, configuration and data do not fit, or the loss is not finite.
    """
    return train(SegmentationTraining, config, Path(out), resume, started, progress, stop)


def load_segmenter(folder: str | os.PathLike[str], device: torch.device | None = None) -> Segmenter:
    """Load the latest checkpoint of a training run. Raises UserError if there is none."""
    folder, device = Path(folder), device or torch.device("cpu")
    path = checkpoint.latest(folder / "checkpoints")
    if path is None:
        raise UserError(f"{folder}: has no checkpoint of a segmenter")
    config = SegmentConfig.load(folder / "config.yaml")
    _, shared, _ = checkpoint.load(path)
    with checkpoint.loading(path):
        task = shared["task"]
        network = _network(config, task["channels"], len(task["labels"]))
        load_module(network, task["network"])
        return Segmenter(network.requires_grad_(False).to(device), list(task["labels"]), config, device)


def _network(config: SegmentConfig, channels: int, labels: int) -> nn.Module:
    """Initial network. Its weights depend on the configuration's seed alone."""
    from monai.networks.nets import SegResNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "segmenter"))
        return SegResNet(
            blocks_down=tuple(config.blocks_down),
            blocks_up=tuple(config.blocks_up),
            init_filters=config.init_filters,
            in_channels=channels,
            out_channels=1 + labels,
            dropout_prob=config.dropout or None,
        )


def _products(config: SegmentConfig, device: torch.device) -> torch.autocast:
    """Context in which products have the configuration's type."""
    dtype = products(config.compute_dtype, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
