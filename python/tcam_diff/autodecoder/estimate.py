"""Estimate of the memory, disk space and time of a training run, from a short trial on a few objects."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.report import channels_picture, slices_picture, write_report
from tcam_diff.autodecoder.tables import PlaneTable
from tcam_diff.autodecoder.train import AutodecoderTraining, available_memory
from tcam_diff.data.store import Store, one_shape
from tcam_diff.training.distributed import Distributed, device_of
from tcam_diff.training.logger import Logger
from tcam_diff.training.loop import Outcome
from tcam_diff.training.trial import Requirements, disk_space, memory, occasions, seconds_per_step, write_checkpoint


@dataclass
class PlaneRequirements(Requirements):
    """Requirements of one process of stage 1, in bytes and seconds."""

    tables: float  # bytes of planes and Adam moments
    where: str  # location of the tables: device, host or disk
    available: float  # bytes of free memory where the tables are
    texels: tuple[int, int, int]  # of the planes, along x, y, z


def estimate(config: TrainConfig, seconds: float = 10.0) -> PlaneRequirements:
    """Train for about ``seconds`` in a temporary folder, with as few objects as a step needs, and extrapolate.

    The time includes steps, evaluations, checkpoints (with fsync) and the evaluation of whole volumes at the end. The memory is
    that of the trial plus the tables of the other objects. The disk space is that of checkpoints, and of tables on disk.
    """
    store = Store(config.data)
    records = store.in_split(config.split)[: config.objects]
    count = len(records)
    one_shape(store.folder, records)
    few = min(count, max(config.batch, 2))
    trial = config.model_copy(update={"objects": few})
    group = Distributed(device=device_of(config.device))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        task = AutodecoderTraining(trial, group, folder)
        try:
            per_object = PlaneTable.bytes(
                1, config.channels, task.objective.texels, task.table.tables["value"][0].element_size()
            )
            where, texels = task.place(count), task.objective.texels
            step = seconds_per_step(task, seconds)
            start = time.monotonic()
            task.evaluate(range(few), whole=False)
            evaluate_seconds = (time.monotonic() - start) / few * min(config.evaluate_objects, count)
            start = time.monotonic()
            slices = task.slices()
            logger = Logger(folder, 0)
            logger.scalars(1, {"loss": 1.0, "psnr": 1.0})
            if slices is not None:
                slices_picture(*slices, "trial")
                channels_picture(next(task.fitted())[1])
            logger.close()
            picture_seconds = time.monotonic() - start
            start = time.monotonic()
            score = task.evaluate(range(few), whole=True)
            final_seconds = (time.monotonic() - start) / few * count
            write_report(folder, trial, task, Outcome(1, 1.0, False, {"fitted_psnr": score["psnr"]}))
            save_seconds, trial_bytes = write_checkpoint(task, folder, group)
        finally:
            task.close()
        host, device = memory(group.device)
    more = per_object * (count - few)
    if where == "device" and group.device.type == "cuda":
        device += more
    else:
        host += more if where != "disk" else 0
    checkpoint_bytes = trial_bytes + more
    save_seconds *= checkpoint_bytes / trial_bytes
    evaluations, checkpoints = occasions(config)
    on_disk = per_object * count if where == "disk" else 0
    total = (
        config.steps * step + evaluations * (evaluate_seconds + picture_seconds) + checkpoints * save_seconds + final_seconds
    )
    free = torch.cuda.mem_get_info(group.device)[0] if device and where == "device" else available_memory()
    disk, most = (n + on_disk for n in disk_space(config, checkpoint_bytes))
    return PlaneRequirements(host, device, disk, most, total, step, per_object * count, where, float(free), texels)
