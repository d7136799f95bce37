"""What a training run will take on this machine: memory, disk, time. A short trial on a few objects, then arithmetic."""

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
from tcam_diff.training import checkpoint
from tcam_diff.training.distributed import Distributed, device_of
from tcam_diff.training.logger import Logger
from tcam_diff.training.loop import Outcome, peak_memory


@dataclass
class Requirements:
    """Bytes and seconds of one process."""

    host: float
    device: float  # 0 on a CPU
    disk: float  # at the end
    disk_most: float  # meanwhile: the best checkpoint may be an older one, and one is being written
    seconds: float
    step: float  # seconds of one
    tables: float  # bytes of planes and moments, wherever they live
    where: str
    available: float  # bytes of memory that the tables' place still has


def estimate(config: TrainConfig, seconds: float = 10.0) -> Requirements:
    """Run about ``seconds`` of the real thing with as few objects as a step needs, in a folder that is thrown away.

    Time: steps, evaluations, checkpoints (written and synced), and the last look at every volume. Memory: that of the trial and
    the tables of the objects it left out. Disk: checkpoints, and tables where they are on it.
    """
    store = Store(config.data)
    records = store.of(config.split)[: config.objects]
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
            where = task.place(count)
            step = _per_step(task, seconds)
            began = time.monotonic()
            task.evaluate(range(few), whole=False)
            checked = (time.monotonic() - began) / few * min(config.evaluate_objects, count)
            began = time.monotonic()
            found = task.slices()
            logger = Logger(folder, 0)
            logger.scalars(1, {"loss": 1.0, "psnr": 1.0})
            if found is not None:
                slices_picture(*found, "trial")
                channels_picture(next(task.fitted())[1])
            logger.close()
            looked = time.monotonic() - began
            began = time.monotonic()
            score = task.evaluate(range(few), whole=True)
            whole = (time.monotonic() - began) / few * count
            write_report(folder, trial, task, Outcome(1, 1.0, False, {"fitted_psnr": score["psnr"]}))
            began = time.monotonic()
            shared = {"task": task.shared_state(), "seconds": 0.0}
            path = checkpoint.save(folder / "checkpoints", 1, shared, task.shard_state(), group)
            saved = time.monotonic() - began
            written = float(sum(p.stat().st_size for p in path.iterdir()))
        finally:
            task.close()
        host, device = peak_memory(torch.device("cpu")), 0.0
        if group.device.type == "cuda":
            device = peak_memory(group.device)
    more = per_object * (count - few)
    if where == "device" and group.device.type == "cuda":
        device += more
    else:
        host += more if where != "disk" else 0
    one = written + more
    at = [{*range(n, config.steps + 1, n), config.steps} for n in (config.evaluation_steps(), config.checkpoint_steps())]
    evaluations, checkpoints = len(at[0]), len(at[0] | at[1])
    on_disk = per_object * count if where == "disk" else 0
    total = config.steps * step + evaluations * (checked + looked) + checkpoints * saved * one / written + whole
    free = torch.cuda.mem_get_info(group.device)[0] if device and where == "device" else available_memory()
    disk, most = (min(checkpoints, kept) * one + on_disk for kept in (config.keep, config.keep + 2))
    return Requirements(host, device, disk, most, total, step, per_object * count, where, float(free))


def _per_step(task: AutodecoderTraining, seconds: float) -> float:
    """After a warm-up; the mean over as many steps as take the time."""
    began, index, mark, at = time.monotonic(), 0, time.monotonic(), 0
    while True:
        found = task.step(index)
        index += 1
        if index == 3 or (index < 3 and time.monotonic() - began > seconds / 3):
            float(found["loss"])
            mark, at = time.monotonic(), index
        if (index > max(at, 3) and time.monotonic() - began > seconds) or index == task.steps:
            float(found["loss"])  # waits for the device
            return (time.monotonic() - mark) / max(1, index - at)
