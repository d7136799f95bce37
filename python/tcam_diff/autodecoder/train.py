"""Training of stage 1 on a data set: one decoder, and planes for every volume (algorithm.md section 7)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tcam_ext
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.objective import TrainingObjective, Visit, make_decoder, parameter_dtype
from tcam_diff.autodecoder.planes import init_planes, normalise
from tcam_diff.autodecoder.report import channels_picture, rgb, slices_picture, write_report
from tcam_diff.autodecoder.tables import PlaneTable
from tcam_diff.data.store import Record, Store, one_shape, unit
from tcam_diff.errors import UserError
from tcam_diff.files import write_bytes
from tcam_diff.progress import ProgressCallback, StopCallback
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.ema import update_average
from tcam_diff.training.logger import Logger
from tcam_diff.training.loop import Outcome, Task
from tcam_diff.training.lr import lr_scale
from tcam_diff.training.rng import evenly, rng
from tcam_diff.training.run import train
from tcam_diff.training.states import load_module, load_optimiser


class _Loss(nn.Module):
    """Module that computes the objective and has the decoder's parameters, for DistributedDataParallel to wrap."""

    def __init__(self, decoder: tcam_ext.TriplaneDecoder, objective: TrainingObjective) -> None:
        super().__init__()
        self.decoder = decoder
        self.objective = objective

    def forward(self, planes: list[Tensor], visits: list[Visit], noise: bool) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.losses(planes, self.decoder, visits, noise)


class Schedule:
    """Objects visited by each step, as a function of the step without state.

    Object o belongs to slot o mod batch. A slot visits its objects in random order, shuffled anew in every epoch. Each rank has
    batch / ranks slots and the planes of their objects, so the objects of a step are the same for any number of ranks. An epoch
    visits every object ``inner`` times: slots with an object less than others are idle in its last turn.
    """

    def __init__(self, objects: int, batch: int, inner: int, seed: int) -> None:
        self.objects, self.batch, self.inner, self.seed = objects, batch, inner, seed

    def of_slot(self, slot: int) -> range:
        """Objects of a slot."""
        return range(slot, self.objects, self.batch)

    def at(self, step: int, slot: int) -> tuple[int, int, bool]:
        """Object that a slot visits in a step, the number of its earlier visits, and False if the slot is idle instead."""
        objects = self.of_slot(slot)
        turn, inner = divmod(step, self.inner)
        epoch, at = divmod(turn, -(-self.objects // self.batch))
        order = torch.randperm(len(objects), generator=rng(self.seed, "order", slot, epoch))
        return objects[int(order[min(at, len(objects) - 1)])], epoch * self.inner + inner, at < len(objects)


class AutodecoderTraining(Task):
    """Training run of stage 1: parameters, optimiser state and data. Raises UserError if configuration and data do not fit."""

    def __init__(self, config: TrainConfig, group: Distributed, folder: Path) -> None:
        self.config, self.group, self.steps, self.folder = config, group, config.steps, folder
        self.store = Store(config.data)
        self.records = self.store.in_split(config.split)[: config.objects]
        channels, h, w, d = one_shape(self.store.folder, self.records)
        self.size, self.channels = (h, w, d), channels
        if channels > 16:
            raise UserError(f"{config.data}: {channels} channels; the decoder has at most 16 outputs")
        if config.batch > len(self.records):
            raise UserError(f"batch: expected at most the {len(self.records)} objects of {config.data}, got {config.batch}")
        if config.batch % group.world:
            raise UserError(f"batch: expected a multiple of the {group.world} ranks, got {config.batch}")
        maps = [r.info.label_maps for r in self.records]
        if any(m != maps[0] for m in maps):
            raise UserError(f"{config.data}: its volumes have different label maps")
        self.objective = TrainingObjective(config, self.size, group.device, len(maps[0]))
        self.schedule = Schedule(len(self.records), config.batch, config.inner_steps, config.seed)
        each = config.batch // group.world
        self.slots = range(group.rank * each, (group.rank + 1) * each)
        self.mine = sorted(o for s in self.slots for o in self.schedule.of_slot(s))  # objects of this rank
        dtype = parameter_dtype(config)
        self.table = PlaneTable(
            self.mine,
            config.channels,
            self.objective.texels,
            device=group.device,
            dtype=dtype,
            where=self.place(len(self.mine)),
            folder=folder / "tables" / f"rank-{group.rank}",
        )
        self.table.fill(self.start)
        self.decoder = make_decoder(config, channels).to(group.device)
        self.average = make_decoder(config, channels).to(group.device).requires_grad_(False)
        self.optimiser = torch.optim.Adam(
            self.decoder.parameters(), lr=config.lr_decoder, betas=(0.9, config.beta2), eps=config.adam_eps, fused=True
        )
        loss = _Loss(self.decoder, self.objective)
        self.loss: nn.Module = DistributedDataParallel(loss) if group.world > 1 else loss
        self._readers = ThreadPoolExecutor(2) if config.prefetch else None
        self._ahead: dict[int, Future[list[Visit]]] = {}

    def place(self, objects: int) -> str:
        """Location of the tables of so many objects: device, host or disk."""
        if self.config.tables != "auto":
            return self.config.tables
        need = PlaneTable.bytes(objects, self.config.channels, self.objective.texels)
        if self.group.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.group.device)
            return "device" if need < 0.6 * free else "host"
        return "device" if need < 0.6 * available_memory() else "disk"

    def start(self, number: int) -> list[Tensor]:
        """Initial planes of an object."""
        c = self.config
        name: tuple[str | int, ...] = ("planes",) if c.shared_init else ("planes", number)
        return init_planes(c.channels, self.objective.texels, c.plane_init_std, rng(c.seed, *name))

    # ---- a step ------------------------------------------------------------------------

    def _visits(self, step: int) -> list[Visit]:
        visits = []
        for slot in self.slots:
            number, count, active = self.schedule.at(step, slot)
            visit = self.objective.visit(number, count)
            visit.active = active
            visits.append(self.objective.read(visit, self.store.volume(self.records[number])))
        return visits

    def _next(self, step: int) -> list[Visit]:
        """Visits of a step. Threads read those of the next steps ahead."""
        if self._readers is None:
            return self._visits(step)
        for s in range(step, min(step + 1 + self.config.prefetch, self.steps)):
            if s not in self._ahead:
                self._ahead[s] = self._readers.submit(self._visits, s)
        return self._ahead.pop(step).result()

    def step(self, index: int) -> dict[str, Tensor]:
        """Update the decoder and the visited planes once. Returns "loss", its terms and the gradient norms.

        An idle slot computes the loss of a visit with weight 0, so that all ranks take part in every step.
        """
        c = self.config
        visits = self._next(index)
        rows = self.table.fetch([v.object for v in visits])
        noise = index < c.steps * (1 - c.noise_free_fraction)
        losses, terms = self.loss(rows.leaves, visits, noise)
        self.optimiser.zero_grad(set_to_none=True)
        weights = losses.new_tensor([v.active for v in visits])
        # The sum gives each object's planes the gradient of their own loss. The decoder gets the sum over the slots' number.
        (losses * weights).sum().backward()
        for p in self.decoder.parameters():
            if p.grad is not None:
                p.grad /= len(visits)
        scale = lr_scale(c, index)
        active = [v.active for v in visits]
        norms = self.table.update(rows, lr=c.lr_planes * scale, beta2=c.beta2, eps=c.adam_eps, clip=c.grad_clip, active=active)
        decoder_norm = nn.utils.clip_grad_norm_(self.decoder.parameters(), c.grad_clip)
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = c.lr_decoder * scale
        self.optimiser.step()
        update_average(self.average, self.decoder, c.ema_decay, index)
        each = {"loss": losses.detach(), **terms, "grad_planes": norms}
        # The loop takes the mean over ranks.
        count = max(1, sum(self.schedule.at(index, slot)[2] for slot in range(c.batch))) / self.group.world
        means = {name: (t * weights.to(t)).sum() / count for name, t in each.items()}
        return {**means, "grad_decoder": decoder_norm}

    # ---- evaluation --------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, objects: Sequence[int] | None = None, whole: bool | None = None) -> dict[str, float]:
        """Evaluate planes under the averaged decoder, without noise.

        Args:
            objects: numbers of the objects, over all ranks; None: ``evaluate_objects`` of them, evenly spread.
            whole: use whole volumes instead of nine slices; None: as ``evaluate_whole`` says.

        Returns:
            "psnr" (dB), the mean over the objects, and "plane_rms", the mean root mean square of their planes.
        """
        if objects is None:
            objects = evenly(self.config.evaluate_objects, len(self.records))
        whole = self.config.evaluate_whole if whole is None else whole
        sums = torch.zeros(3, dtype=torch.float64, device=self.group.device)
        boxes = None if whole else self.objective.check_boxes()
        for o in objects:
            if o not in self.table.row:
                continue
            raw = self.table.planes(o)
            planes = normalise(raw, self.config.norm)
            sums[0] += self.objective.psnr(planes, self.average, self.store.volume(self.records[o]), boxes)
            sums[1] += float(torch.stack([p.square().mean() for p in raw]).mean().sqrt())
            sums[2] += 1
        psnr, energy, count_ = self.group.sum(sums).tolist()
        return {"psnr": psnr / count_, "plane_rms": energy / count_}

    @torch.no_grad()
    def slices(self) -> tuple[np.ndarray, np.ndarray, Record] | None:
        """Truth, reconstruction (channels, H, W, D) in [0, 1] and record of this rank's first object, if it has one."""
        if not self.mine:
            return None
        number = self.mine[0]
        record = self.records[number]
        truth = unit(torch.tensor(self.store.volume(record))).numpy()
        planes = normalise(self.table.planes(number), self.config.norm)
        got = np.concatenate([
            self.average(planes, self.size, box=box, compute_dtype=self.objective.compute).clamp(0, 1)[0].float().cpu().numpy()
            for box in self.objective.slabs()
        ], axis=1)  # fmt: skip
        return truth, got, record

    def fitted(self) -> Iterator[tuple[Record, list[Tensor]]]:
        """Records and normalised planes (1, C, rows, columns) of this rank's objects."""
        for o in self.mine:
            yield self.records[o], normalise(self.table.planes(o), self.config.norm)

    def draw_pictures(self, step: int, logger: Logger | None) -> None:
        """Draw slices of this rank's first object to samples/ and TensorBoard, and its planes to TensorBoard."""
        if logger is None or (slices := self.slices()) is None:
            return
        samples = self.folder / "samples"
        samples.mkdir(exist_ok=True)
        picture = slices_picture(*slices, f"step {step}")
        write_bytes(samples / f"step-{step:08d}.png", picture)
        logger.picture(step, "slices", rgb(picture))
        logger.picture(step, "planes", rgb(channels_picture(next(self.fitted())[1])))

    def finish(self, outcome: Outcome) -> None:
        """Unless the run was stopped, add "fitted_psnr" (dB) of all whole volumes to the metrics and write report.html."""
        if outcome.stopped:
            return
        outcome.metrics["fitted_psnr"] = self.evaluate(range(len(self.records)), whole=True)["psnr"]
        if self.group.first:
            write_report(self.folder, self.config, self, outcome)

    # ---- checkpoints -------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        return {
            "decoder": self.decoder.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "objects": [r.name for r in self.records],
            "digest": self.store.digest,
        }

    def shard_state(self) -> dict[str, Any]:
        return self.table.state()

    def load_state(self, shared: dict[str, Any], shards: Sequence[dict[str, Any]]) -> None:
        if shared["objects"] != [r.name for r in self.records] or shared["digest"] != self.store.digest:
            raise UserError(f"{self.config.data}: its cases or their preprocessing are not those with which the run began")
        load_module(self.decoder, shared["decoder"])
        load_module(self.average, shared["average"])
        load_optimiser(self.optimiser, shared["optimiser"])
        self.table.load(shards)

    def finite(self) -> bool:
        """Whether the decoder is finite. NaN in planes reaches the decoder in the step that visits them."""
        return all(bool(torch.isfinite(p).all()) for p in self.decoder.parameters())

    def close(self) -> None:
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)


def train_autodecoder(
    config: TrainConfig,
    out: str | os.PathLike[str],
    resume: str | None = None,
    *,
    started: Callable[[AutodecoderTraining], None] | None = None,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> Outcome:
    """Train one decoder and planes for every volume of a store, on the processes that torchrun started, or on this one.

    Args:
        config: for example ``TrainConfig.load("fast", ["data=STORE"])``.
        out: folder of the run: config.yaml, machine.json, checkpoints, metrics.jsonl, TensorBoard files, samples (pictures),
            report.html.
        resume: "auto": continue from the last checkpoint in ``out``, if any; or a checkpoint's folder; None: start anew.
        started: called with the training before its first step, on the first process.
        progress: called after every step, with "loss" and "psnr" (dB) among the metrics.
        stop: asked before every step; true: write a checkpoint and return.

    Returns:
        The last step and its metrics; "fitted_psnr" (dB) is the mean over all whole volumes, without noise.

    Raises:
        UserError: ``out`` has a run that would be overwritten, configuration and data do not fit, or the loss is not finite.
    """
    return train(AutodecoderTraining, config, Path(out), resume, started, progress, stop)


def available_memory() -> float:
    """Bytes of available memory: MemAvailable, or less if the cgroup has a lower limit."""
    free = math.inf
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = float(line.split()[1]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = float(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            free = min(free, float(limit) - used)
    except OSError:
        pass
    return free
